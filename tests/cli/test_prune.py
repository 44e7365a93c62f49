"""`ckptctl prune`: what it plans, prints and does, on a folder that it holds and on a bucket that it can't hold."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptd.cli import main as cli
from ckptd.daemon.job_store import JobStore
from ckptd.storage import catalog, keys
from ckptd.storage.local import LocalTier
from ckptd.types import CheckpointId
from tests.daemon.job_store.stored import committed, flush, pattern, steps

LEFT_OVER = keys.shard_key("job", CheckpointId(1, 9), 0)
Verb = Callable[..., Any]


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    """A folder with five checkpoints of a job, all after the first refer to it, and a left-over."""
    made = LocalTier(tmp_path / "runs")
    with ThreadPoolExecutor(2) as pool:
        store = JobStore(made, "job", pool)
        assert store.claim(1, None)
        for step in range(1, 6):
            flush(store, [{"frozen": pattern(1, 9000), "trained": pattern(10 + step)}], CheckpointId(1, step))
    made.put(LEFT_OVER, b"never committed")
    return made


@pytest.fixture
def ctl(tier: LocalTier, capsys: pytest.CaptureFixture[str]) -> Verb:
    """Runs a verb on that job; returns exit code, output and errors."""

    def run(verb: str, *arguments: str, place: str | None = None) -> tuple[int, str, str]:
        code = cli.main([verb, place or f"{tier.root}/job", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes folders places that nobody can hold."""
    monkeypatch.setattr(LocalTier, "capabilities", replace(LocalTier.capabilities, exclusive_hold=False))
    yield


def test_a_plan_is_printed_and_then_carried_out(tier: LocalTier, ctl: Verb) -> None:
    """A dry run shows the same plan and changes nothing; what goes, goes with its reason, and the rest is whole."""
    before = {entry.key for entry in tier.list("")}
    code, dry, _ = ctl("prune", "--keep-last", "2", "--dry-run")
    assert code == 0
    assert {entry.key for entry in tier.list("")} == before
    lines = [line.split() for line in dry.splitlines()]
    assert ["STEP", "GENERATION", "SIZE", "VERDICT", "REASONS"] in lines
    verdicts = {int(line[0]): line[4] for line in lines if line[0].isdigit()}
    assert verdicts == {5: "keep", 4: "keep", 3: "remove", 2: "remove", 1: "remove"}
    assert "garbage: g000001/s000000000009/rank-00000.safetensors, 15 B: its checkpoint was never committed" in dry
    code, out, _ = ctl("prune", "--keep-last", "2")
    assert code == 0
    assert out.startswith(dry)
    assert committed(tier) == tuple(steps(4, 5))
    assert LEFT_OVER not in {entry.key for entry in tier.list("")}
    for checkpoint in steps(4, 5):
        assert catalog.verify(tier, "job", checkpoint) == []


def test_the_shape_of_json(ctl: Verb) -> None:
    """What programs read is what the README says, for a plan and for what was done."""
    _, out, _ = ctl("prune", "--keep-last", "4", "--dry-run", "--json")
    (planned,) = json.loads(out)
    code, out, _ = ctl("prune", "--keep-last", "4", "--json")
    (done,) = json.loads(out)
    assert code == 0
    assert planned | {"freed_bytes": done["freed_bytes"]} == done
    assert planned["freed_bytes"] is None
    assert (done["tier"], done["alone"], done["records"], done["swept"], done["errors"]) == ("local", True, [], [], [])
    assert done["freed_bytes"] == done["planned_bytes"] == 15, "the first one's file is referred to"
    assert done["garbage"][0]["file"] == LEFT_OVER.removeprefix("job/")
    oldest = done["checkpoints"][-1]
    assert oldest == {
        "generation": 1, "step": 1, "size_bytes": oldest["size_bytes"],
        "verdict": "remove", "reasons": ["no rule keeps it"],
    }  # fmt: skip


def test_undo(tier: LocalTier, ctl: Verb) -> None:
    """With a grace a removal is listed, comes back bit for bit, and is over when somebody says so."""
    before = tier.get(keys.manifest_key("job", CheckpointId(1, 2)))
    ctl("prune", "--keep-last", "3", "--grace", "1h")
    assert committed(tier) == tuple(steps(3, 4, 5))
    assert [item["step"] for item in json.loads(ctl("ls", "--deleted", "--json")[1])] == [2, 1]
    assert "waits" in ctl("prune", "--keep-last", "3", "--dry-run")[1]
    code, out, _ = ctl("prune", "--undo", "2", "--dry-run")
    assert (code, "can be committed again" in out) == (0, True)
    assert committed(tier) == tuple(steps(3, 4, 5))
    (removed,) = json.loads(ctl("prune", "--undo", "2", "--dry-run", "--json")[1])
    assert (removed["generation"], removed["step"], removed["tier"]) == (1, 2, "local")
    assert removed["deleted_at"] > 1e9
    code, out, _ = ctl("prune", "--undo", "2")
    assert (code, "committed again" in out) == (0, True)
    assert tier.get(keys.manifest_key("job", CheckpointId(1, 2))) == before
    assert ctl("verify", "--all")[0] == 0
    assert "final" in ctl("prune", "--keep-last", "3", "--grace", "0")[1]
    assert json.loads(ctl("ls", "--deleted", "--json")[1]) == []
    code, _, error = ctl("prune", "--undo", "1")
    assert (code, "can be undone" in error) == (3, True)
    assert ctl("verify", "--all")[0] == 0


def test_what_an_agent_holds_is_not_pruned(tier: LocalTier, ctl: Verb, tmp_path: Path) -> None:
    """While another process holds the job the verb is refused and says why; a dry run shows what is certain."""
    parent = os.getpid()
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        holder = LocalTier(tmp_path / "runs")
        holder.hold("job", 0)
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    assert os.getpid() == parent
    try:
        os.read(ready[0], 1)
        code, _, error = ctl("prune", "--keep-last", "1")
        assert code == 11
        assert "stop the job" in error
        assert "never committed" not in ctl("prune", "--keep-last", "1", "--dry-run")[1]
        assert len(committed(tier)) == 5
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)
        for descriptor in (*ready, *done):
            os.close(descriptor)


@pytest.mark.usefixtures("shared")
def test_where_others_may_write_it_is_careful(tier: LocalTier, ctl: Verb) -> None:
    """Young left-overs stay, and a removal can be undone for an hour unless somebody says otherwise."""
    _, out, _ = ctl("prune", "--keep-last", "4")
    assert "undoable" in out
    assert "garbage" not in out
    assert [item["step"] for item in json.loads(ctl("ls", "--deleted", "--json")[1])] == [1]
    os.utime(tier.root / LEFT_OVER, (1.0, 1.0))
    _, out, _ = ctl("prune", "--keep-last", "3", "--grace", "0")
    assert "was not committed within 86400 s" in out
    assert committed(tier) == tuple(steps(3, 4, 5))
    assert json.loads(ctl("ls", "--deleted", "--json")[1]) == []
    assert ctl("verify", "--all")[0] == 0


def test_a_bare_place_needs_a_rule(tier: LocalTier, ctl: Verb) -> None:
    """Nothing is removed by rules that nobody has given; a job that isn't there is an error."""
    code, _, error = ctl("prune")
    assert (code, "nothing says what to keep" in error) == (2, True)
    assert ctl("prune", "--keep-last", "2", place=f"{tier.root}/other")[0] == 3
    assert ctl("prune", "--keep-last", "0")[0] == 2
    assert ctl("prune", "--keep-best", "loss")[0] == 2
    assert len(committed(tier)) == 5


def test_rules_replace_those_of_the_job(ctl: Verb) -> None:
    """A rule that is given counts alone, and a name keeps a checkpoint whatever the rules say."""
    ctl("tag", "paper", "2")
    _, out, _ = ctl("prune", "--keep-every", "3 steps", "--dry-run", "--json")
    (plan,) = json.loads(out)
    kept = {item["step"]: item["reasons"] for item in plan["checkpoints"] if item["verdict"] == "keep"}
    assert set(kept) == {1, 2, 3, 5}
    assert "tagged paper" in kept[2]
    for bound, left in (("1", [5, 2]), ("1GB", [5, 4, 3, 2, 1])):
        _, out, _ = ctl("prune", "--max", bound, "--dry-run", "--json")
        (plan,) = json.loads(out)
        assert [item["step"] for item in plan["checkpoints"] if item["verdict"] == "keep"] == left
