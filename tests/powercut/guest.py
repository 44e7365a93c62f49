"""What runs in the guest: looks at what the last power cut has left, then flushes, commits, tags and prunes for ever.

Everything that it says is one line of JSON. `may` comes before a change and `did` when the call that made it has
returned; `found` is all that is there after a boot, and `problem` whatever should not be.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ckptd.core import lineage
from ckptd.core.policy.retention import RetentionPolicy, judge
from ckptd.daemon.job_store import JobStore
from ckptd.errors import CkptdError
from ckptd.storage import catalog, keys, removing
from ckptd.storage.local import LocalTier
from ckptd.storage.tier import Data, Pace
from ckptd.types import CheckpointId
from tests.daemon.job_store.stored import make_image, order, read_back
from tests.powercut.judge import SOMETHING

JOB = "job"
RANKS = 3
POLICY = RetentionPolicy(keep_last=2)
SABOTAGE = ("no-fsync", "no-file-fsync", "no-folder-fsync")
_DISK, _PORT, _MOUNTED = Path("/sys/block/vda/queue"), "/dev/ttyS1", Path("/data")
_GRACES_S = (0.0, 0.0, 3.0)
"""For how long a prune can be undone, one of them in each boot."""
Say = Callable[..., None]


class TalkingTier(LocalTier):
    """A local tier that says when a commit begins."""

    def __init__(self, root: Path, say: Say) -> None:
        super().__init__(root)
        self._say = say

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Put, as ever."""
        if key.endswith(keys.MANIFEST):
            self._say("phase", name="commit")
        super().put(key, data, create_only=create_only, pace=pace)


class Training:
    """One boot's generation of a job, without ranks: their images are made from the seed."""

    def __init__(self, root: Path, seed: int, say: Say, pool: ThreadPoolExecutor) -> None:
        self._seed, self._say = seed, say
        self._tier = TalkingTier(root, say)
        self._rng = random.Random(f"{seed} {time.time_ns()}")
        self._store = JobStore(self._tier, JOB, pool, grace_s=self._rng.choice(_GRACES_S))
        self._pruner = ThreadPoolExecutor(1)
        self._pruning: Future[None] | None = None
        self._at = CheckpointId(0, 0)
        self._parent: CheckpointId | None = None

    def look(self) -> None:
        """Say everything that is on the tier, every byte of it verified, and what is wrong with it."""
        self._say("phase", name="verify")
        found = catalog.holdings(self._tier, JOB)
        registers = {f"generation {number}": self._digest(keys.generation_key(JOB, number)) for number in found.parents}
        registers |= {f"tag {name}": str(tag.id) for name, tag in catalog.tags(self._tier, JOB).items()}
        for checkpoint in found.committed:
            registers[f"checkpoint {checkpoint}"] = self._digest(keys.manifest_key(JOB, checkpoint))
            self._verify(checkpoint)
        line = lineage.candidates(found.parents, found.committed)
        if line[:1] != list(found.committed[-1:]):
            self._say("problem", text=f"a restart would begin with {line[:1]}, not with {found.committed[-1:]}")
        self._parent = line[0] if line else None
        self._at = CheckpointId(
            lineage.latest_generation(found.parents, found.committed), self._parent.step if self._parent else 0
        )
        self._say("found", registers=registers, newest=str(self._parent), checkpoints=len(found.committed))

    def claim(self) -> None:
        """Begin the next generation, as an agent does at its start."""
        self._say("phase", name="claim")
        self._tier.check_writable()
        self._tier.hold(JOB, 0.0)
        self._at = CheckpointId(self._at.generation + 1, self._at.step)
        register = f"generation {self._at.generation}"
        self._say("may", register=register, value=SOMETHING)
        if not self._store.claim(self._at.generation, self._parent):
            self._say("problem", text=f"{register} is somebody else's")
        self._say("did", register=register, value=self._digest(keys.generation_key(JOB, self._at.generation)))
        self._undo()

    def step(self) -> None:
        """Flush one snapshot and commit it, then maybe tag it, and prune beside the next one's flush."""
        self._at = CheckpointId(self._at.generation, self._at.step + 1)
        register = f"checkpoint {self._at}"
        images = {rank: make_image(self._state(self._at, rank)) for rank in range(RANKS)}
        self._say("may", register=register, value=SOMETHING)
        self._say("phase", name="flush")
        self._store.flush(order(images, self._at, self._parent), images)
        self._say("did", register=register, value=self._digest(keys.manifest_key(JOB, self._at)))
        if self._rng.random() < 0.4:
            self._say("phase", name="tag")
            self._tag()
        if self._pruning is not None:
            self._pruning.result()
        if self._rng.random() < 0.7:
            self._pruning = self._pruner.submit(self._prune)
        if self._rng.random() < 0.3:
            self._say("phase", name="idle")
            time.sleep(self._rng.uniform(0, 0.5))

    def close(self) -> None:
        """Wait for what is under way, and let go of the tier."""
        self._pruner.shutdown()
        if self._pruning is not None:
            self._pruning.result()
        self._tier.close()

    def _tag(self) -> None:
        """Move a tag to the newest checkpoint, give it one more, or take one away."""
        fixed = [name for name in catalog.tags(self._tier, JOB) if name != "moving"]
        if self._rng.random() < 0.5:
            self._change("tag moving", str(self._at), lambda: self._put_tag("moving", move=True))
        elif len(fixed) < 2:
            name = f"step-{self._at.step}"
            self._change(f"tag {name}", str(self._at), lambda: self._put_tag(name, move=False))
        else:
            name = min(fixed)
            self._change(f"tag {name}", None, lambda: catalog.remove_tag(self._tier, JOB, name))

    def _put_tag(self, name: str, *, move: bool) -> None:
        catalog.put_tag(self._tier, JOB, name, self._at, time.time(), move=move)

    def _change(self, register: str, value: str | None, act: Callable[[], None]) -> None:
        self._say("may", register=register, value=value)
        act()
        self._say("did", register=register, value=value)

    def _prune(self) -> None:
        """Remove what retention lets go, and now and then everything that nobody needs."""
        verdicts = judge(catalog.held(self._tier, JOB, with_values=False), POLICY, {})
        kept = [item.id for item in verdicts if item.keep]
        ids = [item.id for item in verdicts if not item.keep]
        for checkpoint in ids:
            self._say("may", register=f"checkpoint {checkpoint}", value=None)
        self._say("phase", name="prune")
        _raise_first(self._store.pruning.prune(ids, kept).errors)
        for checkpoint in ids:
            self._say("did", register=f"checkpoint {checkpoint}", value=None)
        if self._rng.random() < 0.3:
            needed_from = min(kept).generation
            for number in range(1, needed_from):
                self._say("may", register=f"generation {number}", value=None)
            _raise_first(self._store.pruning.collect(kept, needed_from).errors)

    def _undo(self) -> None:
        """Bring checkpoints back that were pruned with a time of grace: none of their files may have gone."""
        self._say("phase", name="undo")
        listed = catalog.listing(self._tier, JOB)
        for checkpoint in sorted({marker.checkpoint for marker in listed.markers} - listed.committed):
            if self._rng.random() < 0.5:
                continue
            register = f"checkpoint {checkpoint}"
            self._say("may", register=register, value=SOMETHING)
            removing.undo(self._tier, JOB, checkpoint)
            self._say("did", register=register, value=self._digest(keys.manifest_key(JOB, checkpoint)))
            self._verify(checkpoint)

    def _verify(self, checkpoint: CheckpointId) -> None:
        for problem in catalog.verify(self._tier, JOB, checkpoint):
            self._say("problem", text=f"{checkpoint}: {problem}")
        if read_back(self._tier, checkpoint) != [self._state(checkpoint, rank) for rank in range(RANKS)]:
            self._say("problem", text=f"{checkpoint} holds other bytes than the ranks had")

    def _digest(self, key: str) -> str:
        return hashlib.sha256(self._tier.get(key)).hexdigest()[:16]

    def _state(self, at: CheckpointId, rank: int) -> Mapping[str, bytes]:
        """Return a rank's tensors: one that rarely changes, one that all ranks have alike, one that always changes.

        Rank 0's file has few blocks, rank 1's goes past the page cache and rank 2's mostly through it.
        """
        sizes = random.Random(f"{self._seed} sizes {at.generation} {rank}")
        weights_bytes = (4096, sizes.randint(2**20, 2 * 2**20), sizes.randint(2**16, 3 * 2**18))[rank]

        def tensor(name: str, size_bytes: int) -> bytes:
            return random.Random(f"{self._seed} {name}").randbytes(size_bytes)

        state = {"weights": tensor(f"weights {at} {rank}", weights_bytes)}
        if rank:
            state["frozen"] = tensor(f"frozen {at.step // 7} {rank}", rank * 2**19)
            state["shared"] = tensor(f"shared {at}", 2**17)
        return state


def _raise_first(errors: Sequence[CkptdError]) -> None:
    for error in errors:
        raise error


def rehearse(root: Path, steps: int) -> None:
    """Do once, in a folder, all that a guest does, and say which modules it takes."""

    def say(event: str, **fields: Any) -> None:
        if event == "problem":
            raise AssertionError(fields["text"])

    for _ in range(2):
        with ThreadPoolExecutor(4) as pool:
            training = Training(root, 0, say, pool)
            training.look()
            training.claim()
            for _ in range(steps):
                training.step()
            training.close()
    files = {getattr(module, "__file__", None) for module in sys.modules.values()}
    json.dump(sorted(file for file in files if file), sys.stdout)


def sabotage(kind: str) -> None:
    """Make fsync do nothing, for all descriptors or for those of files or of folders."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if (kind == "no-file-fsync" and is_folder) or (kind == "no-folder-fsync" and not is_folder):
            real(descriptor)

    os.fsync = fsync


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`, however little a terminal takes at once."""
    while data:
        data = data[os.write(descriptor, data) :]


def main() -> int:
    """Serve as the guest's only program; the kernel's command line comes as the environment."""
    port, lock = os.open(_PORT, os.O_WRONLY), threading.Lock()

    def say(event: str, **fields: Any) -> None:
        with lock:
            write_all(port, json.dumps({"event": event, **fields}).encode() + b"\n")

    cache = (_DISK / "write_cache").read_text().strip()
    if cache != "write back":
        say("problem", text=f"the kernel takes the disk's cache for {cache!r}, and sends no flushes then")
    if kind := os.environ.get("ckptd_sabotage"):
        sabotage(kind)
    try:
        with ThreadPoolExecutor(4) as pool:
            training = Training(_MOUNTED / "store", int(os.environ["ckptd_seed"]), say, pool)
            training.look()
            if "ckptd_last" in os.environ:
                training.close()
                return 0
            training.claim()
            while True:
                training.step()
    except CkptdError as error:
        say("problem", text=f"{type(error).__name__}: {error}")
        traceback.print_exc()
        return 1
