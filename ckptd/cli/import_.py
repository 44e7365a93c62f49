"""`ckptctl import`: a checkpoint made of files that others wrote."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckptd.cli.common import find_job, open_plugins, step_number
from ckptd.cli.render import show_json
from ckptd.errors import ConfigError, StoreError
from ckptd.storage.importing import WHOLE_STATE, bring_in
from ckptd.storage.keys import check_job
from ckptd.units import show_size

_AUTO = "auto"


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "import",
        help="make a checkpoint of files that others wrote",
        description="Begin a job with weights from elsewhere: a safetensors file, one with an index, or a folder of "
        "such; a DCP folder; a torch file; or what `ckptctl export` wrote. The result is a checkpoint like any other, "
        "of the whole job: any number of ranks restores it, when they attach what is in it under the same names. "
        "Nothing that is read can run code; what that refuses is named.",
    )
    parser.add_argument("source", metavar="FROM", help="a file or a folder")
    parser.add_argument("--job", metavar="NAME", required=True, help="the job to begin; it must have no checkpoint yet")
    parser.add_argument("--store", metavar="PLACE", required=True, help="where the job will run: a path or a URL")
    parser.add_argument("--step", metavar="N", help="training begins after it (default: what FROM says, else 0)")
    parser.add_argument("--format", default=_AUTO, help="auto (default), safetensors, dcp, torch, or a plugin's")
    parser.add_argument(
        "--as",
        dest="names",
        action="append",
        default=[],
        metavar="NAME[=GROUP]",
        help="import only what is named, as the state NAME: GROUP is a file's name without its ending, or keys joined "
        "by dots (model=model_state_dict); NAME alone takes all that is there as one state",
    )
    parser.add_argument(
        "--json", action="store_true", help="{job, generation, step, states, tensors, size_bytes, notes}"
    )
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Import one checkpoint."""
    source = Path(options.source).absolute()
    check_job(options.job)
    names = _names(options.names)
    step = step_number(options.step)
    formats = open_plugins().formats
    (place,) = find_job(options.job, options.store)
    try:
        importer = formats.importer(formats.detect(source) if options.format == _AUTO else options.format)
        with importer(source, names) as cargo:
            step = cargo.step or 0 if step is None else step
            imported = bring_in(cargo, place.tier, place.job, step)
    except OSError as error:
        raise StoreError(
            f"can't read {source}: {error.strerror or error}", hint="look at its owner, its mode and its disk"
        ) from error
    finally:
        place.tier.close()
    if options.json:
        show_json(
            {
                "job": place.job,
                "generation": imported.id.generation,
                "step": imported.id.step,
                "states": list(cargo.states),
                "tensors": imported.tensors,
                "size_bytes": imported.size_bytes,
                "notes": list(cargo.notes),
            }
        )
    else:
        print(f"imported {source} as step {imported.id.step} of job {place.job} in {place.tier.url}")
        print(f"  {imported.tensors} tensors, {show_size(imported.size_bytes)}")
        print(f"  to be attached: {', '.join(cargo.states)}")
        for line in cargo.notes:
            print(f"  {line}")
    return 0


def _names(given: Sequence[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for text in given:
        name, equals, group = text.partition("=")
        if not name or (equals and not group) or name in names:
            raise ConfigError(
                f"--as {text!r} can't be used", hint="write it like --as model=model_state_dict, each once"
            )
        names[name] = group or WHOLE_STATE
    if WHOLE_STATE in names.values() and len(names) > 1:
        raise ConfigError("--as NAME alone takes everything, so there can be no other", hint="write --as NAME=GROUP")
    return names
