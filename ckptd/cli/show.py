"""`ckptctl show`: what is in one checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from ckptd.cli.common import find_job, pick, step_number, tell_unread, when
from ckptd.cli.health import health_of, word
from ckptd.cli.render import show_fields, show_json, show_table
from ckptd.core.health import OWN
from ckptd.errors import CkptdError
from ckptd.storage.catalog import holdings, load_manifest
from ckptd.storage.image import VALUES_NAME
from ckptd.storage.keys import checkpoint_prefix
from ckptd.storage.manifest import Manifest, StoredTensor
from ckptd.units import show_size

_HEALTH = {
    "healthy": "healthy, as far as was reported of later steps",
    "suspect": "suspect: a bad number was reported after it",
    None: "not known: no report of a later step has told yet",
}


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser("show", help="show what is in a checkpoint")
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("step", nargs="?", metavar="STEP", help="the newest one without it")
    parser.add_argument("--store", metavar="PLACE", help="look here instead of where the job ran")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--json",
        action="store_true",
        help="the manifest, format version 1, with {state_bytes, size_bytes, referred_tensors, health}",
    )
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Show one checkpoint."""
    unread: list[CkptdError] = []
    places = find_job(options.job, options.store)
    place, chosen = pick(places, step_number(options.step), unread)[0]
    tell_unread(unread)
    beside = (item for item in holdings(place.tier, place.job).committed if item.generation >= chosen.generation)
    health = word(health_of(places, dict.fromkeys({chosen, *beside}, place)), chosen)
    loaded = load_manifest(place.tier, place.job, chosen)
    tensors = {name: item for name, item in loaded.tensors.items() if name != VALUES_NAME}
    referred = sum(any(map(loaded.refers, item.chunks)) for item in tensors.values())
    if options.json:
        sizes = {"state_bytes": loaded.state_bytes, "size_bytes": loaded.size_bytes, "referred_tensors": referred}
        show_json({**loaded.document, **sizes, "health": health})
        return 0
    parent = loaded.parent
    began = "afresh" if parent is None else f"with step {parent.step} of generation {parent.generation}"
    show_fields(
        [
            ("checkpoint", f"step {loaded.id.step} of job {place.job}"),
            ("generation", f"{loaded.id.generation}, which began {began}"),
            ("committed", when(loaded.created_at)),
            ("place", f"{place.tier.url}/{checkpoint_prefix(place.job, chosen)}"),
            ("state", f"{show_size(loaded.state_bytes)} of {loaded.world_size} ranks"),
            ("written", f"{show_size(loaded.size_bytes)} in {len(loaded.shards)} shards"),
            ("tensors", f"{len(tensors)}{_elsewhere(referred)}"),
            ("values", ", ".join(f"{name} {value:g}" for name, value in _reported(loaded)) or "none reported"),
            ("health", _HEALTH[health]),
            ("written by", f"ckptd {loaded.document['producer']['ckptd']}"),
        ]
    )
    if options.tensors:
        print()
        rows = [
            (name, _dtype(item), _shape(item.shape), item.placement, len(item.chunks)) for name, item in tensors.items()
        ]
        show_table("TENSOR DTYPE SHAPE OF CHUNKS>", rows, "no tensor")
    return 0


def _elsewhere(referred: int) -> str:
    return f", {referred} of them in files that were written before or by another rank" if referred else ""


def _reported(loaded: Manifest) -> list[tuple[str, float]]:
    """Return what ranks have reported, without ckptd's own notes."""
    return [(name, value) for name, value in loaded.values.items() if not name.startswith(OWN)]


def _dtype(tensor: StoredTensor) -> str:
    dtypes = {chunk.dtype for chunk in tensor.chunks}
    return dtypes.pop() if len(dtypes) == 1 else "differs"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "differs" if shape is None else f"[{', '.join(map(str, shape))}]"
