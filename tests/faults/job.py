"""A real job of two torch ranks under a real daemon, for faults: what is done to it, and what became of it."""

from __future__ import annotations

import glob
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ckptd.cli.common import ask
from ckptd.core.policy.chaos import Fault
from ckptd.protocol import messages as m
from tests.end_to_end.harness import World, until

VICTIM = Path(__file__).parent / "scripts" / "victim.py"
NAME = "victim"
EVERY_S = 0.5
RANKS = 2
_CAPTURE_S = 0.3
"""From the moment at which a capture is due until its snapshot is complete, with room for a busy machine."""


class Ends:
    """Watches processes by pidfd, and knows when the last of them has ended."""

    def __init__(self, pids: Iterable[int]) -> None:
        self.last_at: float | None = None
        """Wall time of the end of the last one; None while any is there."""
        self._descriptors = [os.pidfd_open(pid) for pid in pids]
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        left = select.poll()
        for descriptor in self._descriptors:
            left.register(descriptor, select.POLLIN)
        for _ in self._descriptors:
            ((descriptor, _),) = left.poll()[:1]
            left.unregister(descriptor)
            os.close(descriptor)
        self.last_at = time.time()


class Job:
    """One job in a world of its own. `restart_agent` does what systemd would."""

    def __init__(
        self,
        world: World,
        *,
        name: str = NAME,
        settings: Mapping[str, Any] | None = None,
        prefix: tuple[str, ...] = (),
        pause_s: float = 0.02,
        width: int = 64,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Describe it; `settings` are further lines of the job file, `prefix` comes before the daemon's command."""
        self.world = world
        self.name = name
        self.socket = world.home / "ckptd.sock"
        self.daemon: subprocess.Popen[str] | None = None
        self._pause_s = pause_s
        self._prefix = prefix
        self._env = dict(env or {})
        lines = {
            "command": [str(VICTIM), str(pause_s), str(width)],
            "name": name,
            "nproc": RANKS,
            "every": f"{int(EVERY_S * 1000)}ms",
            "store": str(world.store),
            "chaos": True,
            "max_restarts": 10_000,
            **(settings or {}),
        }
        text = "\n".join(f"{key} = {_toml(value)}" for key, value in lines.items())
        (world.folder / "job.toml").write_text(text + "\n")

    def start(self) -> None:
        """Start daemon and job, and wait until it has a checkpoint."""
        self.restart_agent()
        submitted = self.world.ctl("submit", "job.toml")
        assert submitted.returncode == 0, submitted.stderr
        self.until_training(committed=True)

    def restart_agent(self) -> None:
        """Start the daemon, after the one before has gone."""
        if self.daemon is not None:
            self.daemon.wait()
        command = [*self._prefix, sys.executable, "-m", "ckptd.daemon"]
        self.daemon = self.world.popen(command, CKPTD_LOG_FORMAT="json", **self._env)
        until(lambda: self._answers() or self.daemon.poll() is not None, "the daemon's answer")
        assert self.daemon.poll() is None, self.log()[-4000:]

    def _answers(self) -> bool:
        return self.socket.exists() and f'"pid": {self.daemon.pid}' in self.log()

    def log(self) -> str:
        """Return what the daemon has logged so far."""
        assert self.daemon is not None
        return self.world.output(self.daemon)

    def events(self, event: str) -> list[dict[str, Any]]:
        """Return what this daemon has logged under a name; a line that is being written is left out."""
        lines = [line for line in self.log().splitlines(keepends=True) if f'"event": "{event}"' in line]
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    # --- looking ------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return its live status."""
        status = self.world.status(self.name)
        assert status is not None
        return status

    def incidents(self) -> list[dict[str, Any]]:
        """Return its incidents."""
        return self.world.incidents_now(self.name)

    def pids(self) -> list[int]:
        """Return the processes of its ranks."""
        return [rank["pid"] for rank in self.status()["ranks"]]

    def until_training(
        self, *, generation: int = 1, step: int = 1, committed: bool = False, patience_s: float = 120.0
    ) -> dict[str, Any]:
        """Wait until every rank trains in at least that generation, beyond that step."""

        def there() -> dict[str, Any] | None:
            now = self.world.status(self.name)
            if now is None or now["state"] != "running" or now["generation"] < generation or now["step"] < step:
                assert now is None or now["state"] not in ("failed", "finished", "stopped"), self.log()[-4000:]
                return None
            if not all(rank["state"] in ("training", "capturing") and rank["step"] for rank in now["ranks"]):
                return None
            return now if now["last_committed"] or not committed else None

        return until(there, f"generation {generation} at step {step} of {self.name}", patience_s)

    def until_commit(self, after: int, patience_s: float = 120.0) -> int:
        """Wait until a checkpoint beyond a step is committed; return its step."""

        def there() -> int | None:
            last = self.status()["last_committed"]
            return last["step"] if last is not None and last["step"] > after else None

        return until(there, f"a commit beyond step {after}", patience_s)

    def committed(self) -> set[tuple[int, int]]:
        """Return the generations and steps of what is committed in the store."""
        return {(int(path.parts[-3][1:]), int(path.parts[-2][1:])) for path in self.files("manifest.json")}

    def files(self, pattern: str) -> list[Path]:
        """Return the files of that name in the folders of its checkpoints; folders may go meanwhile."""
        return [Path(path) for path in glob.glob(f"{self.world.store}/{self.name}/g*/s*/{pattern}")]

    @property
    def interval_steps(self) -> int:
        """How many steps may lie between two checkpoints: an interval's, and those of announcement and capture."""
        return int((EVERY_S + _CAPTURE_S) / self._pause_s) + 10

    # --- harm ---------------------------------------------------------------------------------------------------

    def inflict(self, fault: Fault) -> dict[str, Any]:
        """Have the agent do what `ckptctl chaos` asks for."""
        return ask(self.socket, m.Fault(self.name, fault.to_json()), 150.0)

    def order(self, rank: int, word: str) -> float:
        """Order a rank to do something to itself; return the wall time at which it began to."""
        did = self.world.folder / f"did-{rank}"
        did.unlink(missing_ok=True)
        written = self.world.folder / f".order-{rank}"
        written.write_text(word)
        written.rename(self.world.folder / f"order-{rank}")
        until(lambda: did.exists() and did.read_text(), f"rank {rank} obeys")
        return float(did.read_text())

    def finish(self, ahead: int = 60) -> int:
        """Let the job train so many steps further and end; return its last step."""
        last = self.status()["step"] + ahead
        written = self.world.folder / ".end"
        written.write_text(str(last))
        written.rename(self.world.folder / "end")
        until(lambda: self.status()["state"] not in ("running", "draining"), "the end of the job")
        assert self.status()["state"] == "finished", self.log()[-4000:]
        return last

    def close(self) -> None:
        """End job and daemon."""
        if self.daemon is not None and self.daemon.poll() is None:
            self.world.ctl("stop", self.name)
            self.daemon.terminate()
            self.daemon.wait(60)


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)
