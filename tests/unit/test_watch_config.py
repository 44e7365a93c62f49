"""The settings `hang` and `straggler`: every way to write them, and what can't be meant."""

from __future__ import annotations

import json
import tomllib

import pytest

from ckptd.config import JobConfig, load_job_file
from ckptd.errors import ConfigError
from ckptd.watch_config import HangConfig, StragglerConfig, read_hang, read_straggler


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("off", None),
        (False, None),
        ({}, HangConfig()),
        ({"floor": "2s"}, HangConfig(floor_s=2)),
        ({"floor": "2s", "ceiling": 1200, "first": "1h"}, HangConfig(2, 1200, 3600)),
        ("floor=2s,ceiling=20m, first=1h", HangConfig(2, 1200, 3600)),
    ],
)
def test_hang(written: object, meant: HangConfig | None) -> None:
    """Flags, tables with units and plain seconds mean the same."""
    assert read_hang(written) == meant


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        (True, "hang is True"),
        (5, "hang is 5"),
        ("5s", "hang '5s' is not understood"),
        ({"bottom": "5s"}, "no setting 'bottom'"),
        ({"floor": "0.1s"}, "the floor of hang is 0.1 s"),
        ({"floor": "20m"}, "ceiling of hang is below"),
        ({"floor": "5s", "first": "2s"}, "allows less for the first step"),
        ({"floor": "soon"}, "hang.floor 'soon' is no duration"),
        ({"floor": True}, "hang.floor is True"),
        ({"floor": float("nan")}, "hang.floor is nan"),
    ],
)
def test_hangs_that_make_no_sense(written: object, problem: str) -> None:
    """What can't be meant is refused, by name."""
    with pytest.raises(ConfigError, match=problem):
        read_hang(written)


def test_straggler() -> None:
    """The factor and whether it is a failure, each with a default."""
    assert read_straggler({}) == StragglerConfig(1.5, restart=False)
    assert read_straggler({"factor": 3, "restart": True}) == StragglerConfig(3.0, restart=True)


@pytest.mark.parametrize("written", [{"factor": 1}, {"factor": "2"}, {"restart": 1}, {"often": 3}, False])
def test_stragglers_that_make_no_sense(written: object) -> None:
    """What can't be meant is refused."""
    with pytest.raises(ConfigError, match="straggler"):
        read_straggler(written)


@pytest.mark.parametrize("setting", ["hang = false", 'hang = {floor = "2s", ceiling = "1m"}', ""])
def test_a_job_keeps_its_settings(tmp_path, setting: str) -> None:
    """A job file's settings survive the way over the socket and into the journal, switched off or not."""
    path = tmp_path / "job.toml"
    path.write_text(f'command = ["train.py"]\nstore = "runs"\nstraggler = {{factor = 2}}\n{setting}\n')
    config = load_job_file(path)
    written = tomllib.loads(setting)
    assert config.hang == (read_hang(written["hang"]) if written else HangConfig())
    assert JobConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
