"""`ckptctl` and wrong arguments: one line, a hint and exit code 2, and nothing is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptd.cli.main import main
from ckptd.journal import JobEntry, Journal
from ckptd.store_config import StoreConfig

LONG = "9" * 5000


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder whose journal knows a job; the current folder is an empty one beside it."""
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("CKPTD_HOME", str(home))
    monkeypatch.chdir(here)
    config = {"name": "gpt", "command": [], "store": [StoreConfig(str(tmp_path / "runs")).to_json()]}
    journal = Journal(home)
    journal.write_job(JobEntry("gpt", config, {}, 0, "", 0.0))
    journal.close()
    return here


@pytest.mark.parametrize(
    ("line", "says", "hint"),
    [
        ("show gpt abc", "'abc' is no step", "ckptctl ls"),
        ("show gpt \u00b2", "'\u00b2' is no step", "ckptctl ls"),
        (f"show gpt {LONG}", f"'{LONG[:40]}' is no step", "ckptctl ls"),
        ("incidents gpt last", "'last' is no incident", "ckptctl incidents gpt"),
        ("tag gpt --remove", "no tag is named", "ckptctl tag gpt"),
        ("tag gpt --move", "no tag is named", "ckptctl tag gpt"),
        ("tag gpt best 30 --remove", "whatever step it names", "leave out STEP"),
        ("run --halt-at 2026-01-01T00:00:00 -- train.py", "which is over", "would stop at once"),
        ("ls gpt --store=", "no store is named", "--store ./runs"),
        ("run --nproc 2 train.py --lr 3", "unknown arguments: train.py --lr 3", "put the command behind --"),
        ("ls gpt --tiers local", "unknown arguments: --tiers local", "--help"),
        ("ls file://runs/gpt", "names the host 'runs' and no folder", "three slashes"),
    ],
)
def test_wrong_arguments(known: Path, capsys: pytest.CaptureFixture[str], line: str, says: str, hint: str) -> None:
    """Each is named in one line, with what to do."""
    assert main(line.split(" ")) == 2
    out, error = capsys.readouterr()
    first, second = error.splitlines()
    assert (out, first.startswith("ckptctl: error: ")) == ("", True)
    assert says in first
    assert hint in second
    assert list(known.iterdir()) == []
