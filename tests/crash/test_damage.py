"""Checkpoints that were damaged while nobody looked: each damage is named, and what is intact is used instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.judge import inspect
from tests.crash.matrix import Bench
from tests.crash.world import JOB, World

MORE_STEPS = 30
_HEADER_AT, _DATA_AT = 200, 100_000


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def _cut(path: Path, size_bytes: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size_bytes)


Damage = Callable[[Path], None]
_SHARD, _MANIFEST = "rank-00000.safetensors", "manifest.json"
DAMAGE: dict[str, tuple[str, Damage]] = {
    "truncated": (_SHARD, lambda path: _cut(path, path.stat().st_size - 4096)),
    "cut by a byte": (_SHARD, lambda path: _cut(path, path.stat().st_size - 1)),
    "zero length": (_SHARD, lambda path: _cut(path, 0)),
    "missing": (_SHARD, lambda path: path.unlink()),
    "a bit of the data": (_SHARD, lambda path: _flip(path, _DATA_AT)),
    "a bit of the header": (_SHARD, lambda path: _flip(path, _HEADER_AT)),
    "a bit of the header's length": (_SHARD, lambda path: _flip(path, 1)),
    "too long": (_SHARD, lambda path: path.write_bytes(path.read_bytes() + bytes(4096))),
    "zeros": (_SHARD, lambda path: path.write_bytes(bytes(path.stat().st_size))),
    "a bit of the manifest": (_MANIFEST, lambda path: _flip(path, path.stat().st_size // 2)),
    "a bit of a digest": (_MANIFEST, lambda path: _flip(path, path.read_bytes().index(b'"digest"') + 20)),
    "a truncated manifest": (_MANIFEST, lambda path: _cut(path, path.stat().st_size // 2)),
    "an empty manifest": (_MANIFEST, lambda path: _cut(path, 0)),
}

NOT_RESTORED_FROM = ("a bit of the header", "a bit of the header's length")
"""A restore reads tensors where the manifest says they are: these are named by verify, and nothing is lost."""
_IN_EVERY_RUN = ("a bit of the data", "a bit of the manifest")
_EACH = pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=() if name in _IN_EVERY_RUN else pytest.mark.chaos) for name in DAMAGE]
)


def _finished(world: World, template: Path) -> tuple[int, int]:
    """Fill a world with a finished job; return its two newest steps."""
    shutil.copytree(template, world.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock"))
    older, newest = sorted(inspect(world.job).needs)[-2:]
    return older[1], newest[1]


def _damaged(world: World, job: Path, damage: str) -> Path:
    """Damage the newest checkpoint in a job's folder; return the file."""
    file, harm = DAMAGE[damage]
    path = max(job.glob("g*/s*/manifest.json")).with_name(file)
    harm(path)
    return path


def _named(path: Path, output: str) -> bool:
    """Whether a run has said what is wrong: the file, or the tensor in it that a rank has read."""
    return path.name in output or "tensor 'moving' is not what was captured" in output


@_EACH
def test_the_older_one_is_used(bench: Bench, world: World, damage: str) -> None:
    """With one tier: verify and the run name the damage, the next older checkpoint is restored, the end is right."""
    older, newest = _finished(world, bench.template("finished"))
    path = _damaged(world, world.job, damage)
    seen = world.ctl("verify", JOB, "--all", "--store", str(world.store))
    assert seen.code == 5, seen.output
    assert path.name in seen.output
    assert f"step {older} of generation 1 on local: intact" in seen.output
    outcome = world.run(newest + MORE_STEPS)
    assert outcome.code == 0, outcome.output[-4000:]
    begun_with = newest if damage in NOT_RESTORED_FROM else older
    assert f"restored ({begun_with}, 'local')" in outcome.output
    assert damage in NOT_RESTORED_FROM or _named(path, outcome.output), "the damage is not named"
    assert world.ended_right(newest + MORE_STEPS)


@_EACH
def test_the_other_tier_is_used(bench: Bench, world: World, damage: str) -> None:
    """With two tiers: nothing is lost, the damage is named and mended from the other tier, and the end is right."""
    _, newest = _finished(world, bench.template("finished"))
    far = world.folder / "far"
    shutil.copytree(world.store, far)
    world.stores.append(str(far))
    path = _damaged(world, world.job, damage)
    outcome = world.run(newest + MORE_STEPS)
    assert outcome.code == 0, outcome.output[-4000:]
    assert f"restored ({newest}, " in outcome.output
    assert damage in NOT_RESTORED_FROM or _named(path, outcome.output), "the damage is not named"
    assert world.ended_right(newest + MORE_STEPS)
    for store in (world.store, far):
        assert inspect(store / JOB).newest[1] == newest + MORE_STEPS


def test_damage_of_everything_is_no_fresh_start(bench: Bench, world: World) -> None:
    """When every checkpoint is damaged the job ends with an error that names them, and nothing is removed."""
    _finished(world, bench.template("finished"))
    manifests = sorted(world.job.glob("g*/s*/manifest.json"))
    for manifest in manifests:
        _flip(manifest.with_name("rank-00000.safetensors"), _DATA_AT)
    before = sorted(str(path) for path in world.job.rglob("*.safetensors"))
    outcome = world.run(200)
    assert outcome.code != 0
    assert "\nTraceback" not in outcome.output
    assert "tensor 'moving' is not what was captured" in outcome.output
    assert sorted(str(path) for path in world.job.rglob("*.safetensors")) == before
    assert [path for path in manifests if not path.exists()] == []


def test_a_record_of_a_generation_that_is_damaged_is_named(bench: Bench, world: World) -> None:
    """A generation record that can't be read ends the start with exit code 5 and its name: lineage is never guessed."""
    _finished(world, bench.template("finished"))
    record = world.job / "g000001" / "generation.json"
    record.write_text(json.dumps({"generation": 1}))
    outcome = world.run(200)
    assert outcome.code == 5, outcome.output
    assert str(record) in outcome.output
