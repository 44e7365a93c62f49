"""`ckptctl export`: a copy of a checkpoint that needs neither ckptd nor the store."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ckptd.cli.common import find_job, pick, step_number
from ckptd.cli.render import show_json
from ckptd.errors import ConfigError
from ckptd.storage.export import export
from ckptd.units import show_size

_FORMATS = ("safetensors",)


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser("export", help="copy a checkpoint's tensors to plain files that need no ckptd")
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("step", nargs="?", metavar="STEP", help="the newest one without it")
    parser.add_argument("--to", metavar="DIR", required=True, help="a folder that is empty, or does not exist yet")
    parser.add_argument("--format", default=_FORMATS[0], metavar="FORMAT", help=f"{', '.join(_FORMATS)} (default)")
    parser.add_argument("--store", metavar="PLACE", help="look here instead of where the job ran")
    parser.add_argument("--json", action="store_true", help="{generation, step, to, files, tensors, size_bytes}")
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Export one checkpoint, every byte checked on its way."""
    if options.format not in _FORMATS:
        raise ConfigError(f"there is no format {options.format!r}", hint=f"formats: {', '.join(_FORMATS)}")
    place, chosen = pick(find_job(options.job, options.store), step_number(options.step))[0]
    target = Path(options.to).absolute()
    written = export(place.tier, place.job, chosen, target)
    if options.json:
        show_json(
            {
                "generation": chosen.generation,
                "step": chosen.step,
                "to": str(target),
                "files": list(written.files),
                "tensors": written.tensors,
                "size_bytes": written.size_bytes,
            }
        )
    else:
        print(f"exported step {chosen.step} of generation {chosen.generation} to {target}")
        print(f"  {written.tensors} tensors, {show_size(written.size_bytes)}; what is no tensor is not among it")
        for file in written.files:
            print(f"  {file}")
    return 0
