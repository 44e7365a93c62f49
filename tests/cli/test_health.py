"""What the verbs say of the health of checkpoints, from the journal and from manifests alone."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptd.cli.main import main
from ckptd.config import JobConfig
from ckptd.daemon.job_store import JobStore
from ckptd.journal import Journal, entry_now
from ckptd.storage.local import LocalTier
from ckptd.store_config import StoreConfig
from ckptd.types import CheckpointId
from tests.daemon.job_store.stored import make_image, order, pattern

TOLD = {"ckptd.healthy_generation": 1.0, "ckptd.healthy_step": 20.0, "ckptd.suspect_since": 35.0}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Five checkpoints; the last manifest says that step 20 is healthy, and what came after step 35 suspect."""
    monkeypatch.setenv("CKPTD_HOME", str(tmp_path / "home"))
    with ThreadPoolExecutor(2) as pool:
        job = JobStore(LocalTier(tmp_path / "runs"), "gpt", pool)
        assert job.claim(1, None)
        for step in (10, 20, 30, 40, 50):
            shards = {0: make_image({"w": pattern(step)})}
            values = {"loss": float(step), **(TOLD if step == 50 else {})}
            job.flush(dataclasses.replace(order(shards, CheckpointId(1, step)), values=values), shards)
    yield tmp_path / "runs"


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[int, str | None]:
    """Return what `ls` says, by step."""
    assert main(("ls", *arguments, "--json")) == 0
    return {item["step"]: item["health"] for item in json.loads(capsys.readouterr().out)}


def journal(tmp_path: Path, store: Path, healthy: list[int], suspect: list[int]) -> None:
    """Write down what an agent knew of generation 1."""
    numbers = {
        "healthy": [{"generation": 1, "step": step} for step in healthy],
        "suspect": [{"generation": 1, "step": step} for step in suspect],
    }
    config = JobConfig("gpt", ("train.py",), (StoreConfig(str(store)),))
    status = {"state": "finished", "generation": 1, "numbers": numbers}
    book = Journal(tmp_path / "home")
    book.write_job(entry_now("gpt", config.to_json(), status, os.getpid(), "gone"))
    book.close()


def test_manifests_alone_tell(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that who has nothing but the store knows what the newest manifest says."""
    place = f"{store}/gpt"
    assert listed(capsys, place) == {10: "healthy", 20: "healthy", 30: None, 40: "suspect", 50: "suspect"}
    assert main(("show", place, "40")) == 0
    shown = capsys.readouterr().out
    assert "suspect: a bad number was reported after it" in shown
    assert main(("show", place, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["health"] == "suspect"
    assert main(("show", place)) == 0
    assert "ckptd." not in capsys.readouterr().out  # its own notes are no metrics


def test_the_journal_knows_better(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that what was written down after the newest manifest counts: a trouble that has passed, say."""
    journal(tmp_path, store, [20, 30, 40], [])
    assert listed(capsys, "gpt") == {10: "healthy", 20: "healthy", 30: "healthy", 40: "healthy", 50: None}


@pytest.mark.parametrize("by_name", [True, False])
def test_a_prune_by_hand_keeps_the_newest_healthy_one(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], by_name: bool
) -> None:
    """Proves that with and without a journal the newest healthy one stays, and the next that may prove to be."""
    if by_name:
        journal(tmp_path, store, [10, 20], [40, 50])
    assert main(("prune", "gpt" if by_name else f"{store}/gpt", "--keep-last", "1")) == 0
    assert "the newest healthy one" in capsys.readouterr().out
    assert sorted(listed(capsys, f"{store}/gpt")) == [20, 30, 50]


def test_a_damaged_newest_manifest_tells_nothing(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that what can't be read is no reason to fail, nor to call anything suspect."""
    (store / "gpt" / "g000001" / "s000000000050" / "manifest.json").write_text("{")
    assert main(("ls", f"{store}/gpt")) == 5
    assert "suspect" not in capsys.readouterr().out
