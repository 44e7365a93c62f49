"""Others in the store: what killed agents have left, and a second agent that runs the same job by mistake."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.crash.calls import Harm
from tests.crash.judge import inspect
from tests.crash.matrix import Bench, Phase, Place
from tests.crash.world import JOB, Forkserver, Running, World

_OLD_S = 3600
_NO_HARM = Harm()


def _litter(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 5000)
    os.utime(path, (time.time() - _OLD_S,) * 2)
    return path


def test_what_a_killed_agent_of_long_ago_has_left(world: World) -> None:
    """Temporary files, spares, a folder that was never committed: never restored from, never counted, and collected."""
    assert world.run(60).code == 0
    newest = inspect(world.job).newest
    litter = [
        _litter(world.job, f"g000001/s{newest[1]:012d}/.tmp-0123456789abcdef-rank-00000.safetensors"),
        _litter(world.job, "g000001/.tmp-0123456789abcdef-generation.json"),
        _litter(world.job, "g000001/s000000999999/.tmp-0123456789abcdef-manifest.json"),
        _litter(world.job, "g000001/s000000000001/rank-00000.safetensors"),
        _litter(world.store, ".tmp-spares/.tmp-spares-0123456789abcdef"),
    ]
    outcome = world.run(130)
    assert outcome.code == 0, outcome.output[-4000:]
    assert f"restored ({newest[1]}, 'local')" in outcome.output
    assert world.ended_right(130)
    assert [path for path in litter if path.exists()] == []
    found = inspect(world.job)
    assert (found.problems, found.garbage) == ([], [])


@pytest.mark.chaos
def test_two_agents_on_one_store(world: World, tmp_path: Path) -> None:
    """A second agent with a state folder of its own is refused with exit code 11, and the first goes on undisturbed."""
    job = Running(world)
    job.until("checkpoint committed", 2)
    other_server = Forkserver(tmp_path / "other-plugins")
    other = World(tmp_path / "other", other_server)
    try:
        other.use(world.store)
        other.start(other.command(200), counted=False)
        refused = other.wait()
        assert refused.code == 11, refused.output
        assert str(job.pid) in refused.output, "who holds the store is not said"
    finally:
        other.end()
        other_server.close()
    before = job.look()
    assert before.problems == []
    job.until("checkpoint committed", 2)
    assert job.stop().code == 75
    found = inspect(world.job)
    assert found.problems == []
    assert {key[0] for key in found.needs} == {1}
    steps = found.newest[1] + 30
    assert world.run(steps).code == 0
    assert world.ended_right(steps)


@pytest.mark.chaos
@pytest.mark.xdist_group("object store")
def test_two_agents_with_one_bucket(bucket_bench: Bench, tmp_path: Path) -> None:
    """Of two agents with disks of their own and one bucket the later one has it; the other says so and trains on."""
    first = Place(bucket_bench, tmp_path / "first", Phase("two", 0, has_bucket=True))
    assert first.bucket is not None
    assert first.bench.gate is not None
    job = Running(first.world, "--every", "1s")
    first.bench.gate.arm(job.pid, _NO_HARM)
    server = Forkserver(tmp_path / "plugins")
    other = World(tmp_path / "second", server)
    try:
        job.until("checkpoint committed", tier="s3")
        other.environ |= {name: value for name, value in first.world.environ.items() if name.startswith("AWS_")}
        other.stores.append(first.bucket.url)
        second = Running(other, "--every", "1s")
        second.until("generation started")
        fenced = job.until("upload failed")
        assert "generation 2 of job crash is claimed" in fenced["error"]
        second.until("checkpoint committed", 2, tier="s3")
        job.until("checkpoint committed", 2, tier="local")
        assert [job.stop().code, second.stop().code] == [10, 75]
        for place in first.places():
            assert inspect(place).problems == []
        assert inspect(other.job).problems == []
        assert max(inspect(first.mirror / JOB).needs)[0] == 2
    finally:
        other.end()
        server.close()
        first.close()
