"""What the reading verbs say of a job when one of its places can't be read, and of a job that is nowhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
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
from tests.daemon.job_store.stored import flush, pattern

Verb = Callable[..., tuple[int, str, str]]


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two stores of a job that the journal knows, with the same checkpoint."""
    monkeypatch.setenv("CKPTD_HOME", str(tmp_path / "home"))
    near, far = tmp_path / "near", tmp_path / "far"
    with ThreadPoolExecutor(2) as pool:
        job = JobStore(LocalTier(near), "gpt", pool)
        assert job.claim(1, None)
        flush(job, [{"w": pattern(10)}], CheckpointId(1, 10))
    shutil.copytree(near, far)
    config = JobConfig("gpt", ("train.py",), (StoreConfig(str(near)), StoreConfig(str(far))))
    journal = Journal(tmp_path / "home")
    journal.write_job(entry_now("gpt", config.to_json(), {"state": "finished"}, os.getpid(), "gone"))
    journal.close()
    return near, far


@pytest.fixture
def ckptctl(stores: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> Verb:
    """Runs a verb; returns exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        return (main(arguments), *capsys.readouterr())

    return run


def lose(store: Path) -> None:
    """Put a file where the job's folder was, so that nothing can be listed."""
    shutil.rmtree(store / "gpt")
    (store / "gpt").write_bytes(b"")


@pytest.mark.parametrize("lost", [0, 1])
def test_one_place_that_can_not_be_read(ckptctl: Verb, stores: tuple[Path, Path], tmp_path: Path, lost: int) -> None:
    """Who wants to read gets what the other place has, and is told; who asks for every copy gets an error."""
    lose(stores[lost])
    code, out, error = ckptctl("ls", "gpt", "--json")
    assert [(item["step"], item["tier"]) for item in json.loads(out)] == [(10, ("local", "local-2")[1 - lost])]
    assert (code, f"not in this answer: can't list {stores[lost]}" in error) == (4, True)
    for arguments in (("show", "gpt"), ("export", "gpt", "10", "--to", str(tmp_path / "exported"))):
        code, out, error = ckptctl(*arguments)
        assert (code, "step 10" in out, str(stores[lost]) in error) == (0, True, True)
    for arguments in (("tag", "gpt", "paper"), ("verify", "gpt", "--all"), ("show", "gpt", "20")):
        code, out, error = ckptctl(*arguments)
        assert (code, out, str(stores[lost]) in error) == (4, "", True)


def test_no_place_that_can_be_read(ckptctl: Verb, stores: tuple[Path, Path]) -> None:
    """When nothing can be read, or nothing is where it can, that is the error, and not that there is nothing."""
    for store in stores:
        lose(store)
    for nothing in (False, True):
        if nothing:
            shutil.rmtree(stores[0])
        for verb in ("ls", "show"):
            code, out, error = ckptctl(verb, "gpt")
            assert (code, out, error.startswith("ckptctl: error: can't list")) == (4, "", True)


@pytest.mark.parametrize(
    "arguments", [("ls", "JOB"), ("ls", "JOB", "--deleted"), ("tag", "JOB"), ("prune", "JOB", "--undo", "1")]
)
def test_a_job_that_is_nowhere(ckptctl: Verb, stores: tuple[Path, Path], arguments: tuple[str, ...]) -> None:
    """A name that was mistyped is an error that lists the jobs there are, and not an empty list."""
    code, out, error = ckptctl(*(part.replace("JOB", f"{stores[0]}/gtp") for part in arguments))
    assert (code, out) == (3, "")
    assert error.splitlines() == [f"ckptctl: error: there is no job gtp in {stores[0]}", "  hint: jobs there: gpt"]
