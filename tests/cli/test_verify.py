"""`ckptctl verify` on stores that were damaged by hand: what is named, what is mended, and the exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptd.cli.main import main
from ckptd.daemon.job_store import JobStore
from ckptd.storage.local import LocalTier
from ckptd.types import CheckpointId
from tests.daemon.job_store.stored import flush, pattern

Verb = Callable[..., tuple[int, str, str]]


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two stores with the same two checkpoints of a job."""
    monkeypatch.setenv("CKPTD_HOME", str(tmp_path / "home"))
    with ThreadPoolExecutor(2) as pool:
        job = JobStore(LocalTier(tmp_path / "one"), "gpt", pool)
        assert job.claim(1, None)
        for step in (10, 20):
            flush(job, [{"frozen": pattern(7, 9000), "w": pattern(step)}], CheckpointId(1, step))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    return tmp_path / "one", tmp_path / "two"


@pytest.fixture
def ckptctl(stores: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> Verb:
    """Run `verify` on both stores; return exit code, stdout and stderr."""

    def run(*arguments: str, both: bool = True) -> tuple[int, str, str]:
        places = [part for store in stores[: 2 if both else 1] for part in ("--store", str(store))]
        code = main(["verify", "gpt", *arguments, *places])
        return (code, *capsys.readouterr())

    return run


def shard(store: Path, step: int = 20) -> Path:
    """The file that was written for a step."""
    return store / f"gpt/g000001/s{step:012d}/rank-00000.safetensors"


def spoil(path: Path) -> None:
    """Change a byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_every_copy_is_verified(ckptctl: Verb, stores: tuple[Path, Path]) -> None:
    """Each place is looked at under a name of its own, and without being asked nothing is mended."""
    spoil(shard(stores[1]))
    before = shard(stores[1]).read_bytes()
    code, out, _ = ckptctl("--all")
    assert code == 5
    states = [line.rpartition(" on ")[2] for line in out.splitlines() if line.startswith("step")]
    assert states == ["local: intact", "local-2: DAMAGED", "local: intact", "local-2: intact"]
    assert shard(stores[1]).read_bytes() == before


@pytest.mark.parametrize("what", ["shard", "manifest", "missing"])
def test_a_repair(ckptctl: Verb, stores: tuple[Path, Path], what: str) -> None:
    """What is damaged is replaced from the other store, which is said with the reason; then all is intact."""
    path = shard(stores[0]) if what != "manifest" else shard(stores[0]).with_name("manifest.json")
    whole = path.read_bytes()
    path.unlink() if what == "missing" else spoil(path)
    code, out, err = ckptctl("--repair")
    assert (code, err) == (0, "")
    assert "on local: mended" in out
    assert f"{path.name}: " in out
    assert "mended from local-2" in out
    assert path.read_bytes() == whole
    assert "mended" not in ckptctl("--repair")[1]


def test_the_shape_of_json(ckptctl: Verb, stores: tuple[Path, Path]) -> None:
    """It tells how each copy is now, and what was done for that."""
    spoil(shard(stores[0]))
    code, out, _ = ckptctl("--repair", "--json")
    first, second = json.loads(out)
    assert code == 0
    assert (first["intact"], first["problems"], first["tier"]) == (True, [], "local")
    (mended,) = first["mended"]
    assert (mended["file"], mended["tier"]) == ("g000001/s000000000020/rank-00000.safetensors", "local-2")
    assert mended["problems"]
    assert second == {"generation": 1, "step": 20, "tier": "local-2", "intact": True, "problems": [], "mended": []}


@pytest.mark.parametrize("alone", [False, True])
def test_what_can_not_be_mended(ckptctl: Verb, stores: tuple[Path, Path], alone: bool) -> None:
    """Without a good copy nothing changes, and it says what is damaged and why it stays so."""
    for store in stores:
        spoil(shard(store))
    before = shard(stores[0]).read_bytes()
    code, out, _ = ckptctl("--repair", both=not alone)
    assert code == 5
    assert "DAMAGED" in out
    assert "no good copy" in out
    assert shard(stores[0]).read_bytes() == before


def test_one_tier_is_mended_from_another(ckptctl: Verb, stores: tuple[Path, Path]) -> None:
    """`--tier` says where to verify, not where good copies may be."""
    for store, step in zip(stores, (20, 10), strict=True):
        spoil(shard(store, step))
    code, out, _ = ckptctl("--all", "--repair", "--tier", "local-2")
    assert code == 0
    assert "local:" not in out
    code, _, err = ckptctl("--tier", "nowhere")
    assert code == 3
    assert "its tiers: local, local-2" in err


def test_nothing_is_mended_under_a_running_job(ckptctl: Verb, stores: tuple[Path, Path]) -> None:
    """While somebody holds the job on a tier, damage is named and a repair is refused, with what to do."""
    spoil(shard(stores[0]))
    agent = LocalTier(stores[0])
    agent.hold("gpt", 0.0)
    assert ckptctl()[0] == 5
    code, _, err = ckptctl("--repair")
    assert code == 11
    assert "stop the job first" in err
    agent.close()
    assert ckptctl("--repair")[0] == 0
