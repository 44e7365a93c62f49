"""What others wrote as safetensors, and what an export says of itself."""

from __future__ import annotations

import json
from pathlib import Path

from ckptd.storage.export import DESCRIPTION
from ckptd.storage.safetensors_files import Description, read_description


def test_what_is_no_number_in_json_is_no_metric(tmp_path: Path) -> None:
    """Python writes and reads NaN and infinity, other readers of a manifest don't: neither gets into one."""
    values = {"loss": 0.5, "best": float("nan"), "worst": float("inf")}
    (tmp_path / DESCRIPTION).write_text(json.dumps({"step": 7, "producer": {"ckptd": "1"}, "values": values}))
    assert read_description(tmp_path) == Description(7, {"loss": 0.5})
