"""`ckptctl export`: a copy of a checkpoint that needs neither ckptd nor the store."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ckptd.cli.common import find_job, open_plugins, pick, step_number, tell_unread
from ckptd.cli.render import show_json
from ckptd.errors import CkptdError
from ckptd.storage.export import export
from ckptd.units import parse_size, show_size


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "export",
        help="copy a checkpoint to files that need no ckptd",
        description="Copy a checkpoint to a folder that other programs can read: as safetensors files (tensors only), "
        "as a torch file (checkpoint.pt, for torch.load with weights_only=True), as a DCP folder (for "
        "torch.distributed.checkpoint.load), or in any format that a plugin knows. Every byte is checked on its way, "
        "and the folder appears whole or not at all.",
    )
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("step", nargs="?", metavar="STEP", help="the newest one without it")
    parser.add_argument("--to", metavar="DIR", required=True, help="a folder that is empty, or does not exist yet")
    parser.add_argument("--format", default="safetensors", help="safetensors (default), dcp, torch, or a plugin's")
    parser.add_argument(
        "--max-file", metavar="SIZE", help='of tensors in one safetensors file (default "5GB", 0 for one file each)'
    )
    parser.add_argument("--store", metavar="PLACE", help="look here instead of where the job ran")
    parser.add_argument("--json", action="store_true", help="{generation, step, to, files, tensors, size_bytes, notes}")
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Export one checkpoint, every byte checked on its way."""
    limit = None if options.max_file is None else parse_size(options.max_file, "--max-file")
    exporter = open_plugins().formats.exporter(options.format, splits=limit is not None)
    unread: list[CkptdError] = []
    place, chosen = pick(find_job(options.job, options.store), step_number(options.step), unread)[0]
    tell_unread(unread)
    target = Path(options.to).absolute()
    written = export(exporter, place.tier, place.job, chosen, target, max_file_bytes=limit)
    if options.json:
        show_json(
            {
                "generation": chosen.generation,
                "step": chosen.step,
                "to": str(target),
                "files": list(written.files),
                "tensors": written.tensors,
                "size_bytes": written.size_bytes,
                "notes": list(written.notes),
            }
        )
    else:
        print(f"exported step {chosen.step} of generation {chosen.generation} to {target}")
        print(f"  {written.tensors} tensors, {show_size(written.size_bytes)}")
        for line in (*written.notes, *written.files):
            print(f"  {line}")
    return 0
