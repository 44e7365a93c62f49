"""What runs in the guest runs on any folder, and says what the judge expects."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.powercut import moments
from tests.powercut.guest import Training
from tests.powercut.judge import Judge


class Listener:
    """Hears what a guest says, and asks the judge."""

    def __init__(self) -> None:
        self.judge = Judge()
        self.phases: set[str] = set()
        self.wrong: list[str] = []

    def say(self, event: str, **said: Any) -> None:
        """Take the place of the line to the host."""
        if event == "phase":
            self.phases.add(said["name"])
        elif event in ("may", "did"):
            getattr(self.judge, event)(said["register"], said["value"])
        elif event == "found":
            self.wrong += self.judge.found(said["registers"])
        else:
            self.wrong.append(said["text"])

    def boot(self, root: Path, steps: int) -> None:
        """Look, and go on for a few steps."""
        with ThreadPoolExecutor(4) as pool:
            training = Training(root, 7, self.say, pool)
            training.look()
            training.claim()
            for _ in range(steps):
                training.step()
            training.close()


def test_boots_find_what_was_acknowledged(tmp_path: Path) -> None:
    """Without a power cut every boot finds exactly what was acknowledged, and comes by every phase but the host's."""
    listener = Listener()
    for _ in range(6):
        listener.boot(tmp_path, 5)
    assert listener.wrong == []
    assert listener.phases <= set(moments.PHASES) - {"boot"}
    assert listener.phases >= {"verify", "claim", "flush", "commit", "prune"}


def test_what_is_damaged_is_noticed(tmp_path: Path) -> None:
    """A shard that was changed, and a manifest that is gone, are found at the next look."""
    listener = Listener()
    listener.boot(tmp_path, 3)
    newest = max(tmp_path.rglob("manifest.json")).parent
    shard = newest / "rank-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5000] ^= 1
    shard.write_bytes(data)
    min(tmp_path.rglob("manifest.json")).unlink()
    listener.boot(tmp_path, 0)
    assert any("rank-00001" in problem for problem in listener.wrong)
    assert any("other bytes" in problem for problem in listener.wrong)
    assert any("gone" in problem for problem in listener.wrong)
