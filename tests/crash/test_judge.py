"""The judge of the matrix judged: what it is there to notice, it notices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.crash.judge import Found, Witness, inspect
from tests.crash.matrix import Bench


@pytest.fixture
def job(bench: Bench, tmp_path: Path) -> Path:
    """A finished job's folder, to be spoiled."""
    shutil.copytree(bench.template("finished") / "runs", tmp_path / "runs")
    return tmp_path / "runs" / "crash"


def test_a_finished_job_is_whole_and_clean(job: Path) -> None:
    """Nothing is wrong with what nothing happened to."""
    found = inspect(job)
    assert (found.problems, found.garbage, len(found.needs)) == ([], [], 2)


def test_a_flipped_bit_anywhere_is_noticed(job: Path) -> None:
    """A bit of the header, of a tensor and of the padding: each is a problem of the manifests that need the file."""
    shard = max(job.glob("g*/s*/rank-00000.safetensors"))
    whole = shard.read_bytes()
    for at in (100, len(whole) // 2, len(whole) - 1):
        spoiled = bytearray(whole)
        spoiled[at] ^= 1
        shard.write_bytes(spoiled)
        assert inspect(job).problems, f"byte {at}"
    shard.write_bytes(whole)
    assert inspect(job).problems == []


def test_whole_files_of_the_wrong_step_are_noticed(job: Path) -> None:
    """A checkpoint that is intact, and is not what training had at its step, is a problem."""
    newest = max(job.glob("g*/s*/manifest.json")).parent
    document = json.loads((newest / "manifest.json").read_text())
    document["step"] += 1
    other = newest.with_name(f"s{document['step']:012d}")
    newest.rename(other)
    (other / "manifest.json").write_text(json.dumps(document))
    assert any("not what training had" in problem for problem in inspect(job).problems)


def test_garbage_is_named(job: Path) -> None:
    """Temporary files, orphan shards and empty folders are garbage, and so is what lies at the root of the store."""
    newest = max(job.glob("g*/s*/manifest.json")).parent
    (newest / ".tmp-0-rank-00000.safetensors").touch()
    (newest / "rank-00007.safetensors").touch()
    (job / "g000001" / "s000000999999").mkdir()
    (job.parent / ".tmp-0-probe").touch()
    assert len(inspect(job).garbage) == 4


def _line(call: str, *paths: Path, **more: object) -> dict[str, object]:
    return {"call": call, "paths": [str(path) for path in paths], **more}


@pytest.mark.parametrize("call", ["unlink", "rename", "pwrite", "ftruncate"])
def test_harm_to_a_live_file_is_noticed(job: Path, call: str) -> None:
    """A call that removes, renames away or writes to a file that a manifest names is a problem, the older one's too."""
    witness = Witness(job, inspect(job))
    shard = min(job.glob("g*/s*/rank-00000.safetensors"))
    witness.follow([_line(call, shard, shard.with_name("elsewhere"), begin=True)])
    assert len(witness.problems) == 1


def test_the_last_manifest_may_not_go(job: Path) -> None:
    """A manifest may go when a newer one is committed, and not before."""
    older, newest = sorted(job.glob("g*/s*/manifest.json"))
    witness = Witness(job, inspect(job))
    witness.follow([_line("unlink", older, begin=True), _line("unlink", older, done=True)])
    assert witness.problems == []
    newest.unlink()
    older.unlink()
    witness.follow([_line("unlink", newest, begin=True), _line("unlink", newest, done=True)])
    assert witness.problems
    assert witness.committed == []


def test_a_commit_is_taken_in(job: Path) -> None:
    """A manifest that gets its name is committed from then on, with all that it needs."""
    witness = Witness(job, Found())
    newest = max(job.glob("g*/s*/manifest.json"))
    witness.follow([_line("link", newest.with_name(".tmp-0-manifest.json"), newest, done=True)])
    assert witness.committed == [(1, int(newest.parent.name[1:]))]
    witness.follow([_line("unlink", newest.with_name("rank-00001.safetensors"), begin=True)])
    assert len(witness.problems) == 1
