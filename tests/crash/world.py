"""The place of one case: a state folder, a store, and agents that are run in it one after another."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.crash import calls
from tests.crash.judge import Found, inspect, lines_of
from tests.crash.state import WORLD_SIZE, expected
from tests.daemon import bytes_framework

SCRIPT = Path(__file__).parent / "scripts" / "train.py"
JOB = "crash"
EVERY = "60ms"
PATIENCE_S = 40.0
_NOTHING = calls.Harm()
_LOOKS = 20


class Forkserver:
    """Runs `ckptctl` in forks of a process that has it imported; one at a time."""

    def __init__(self, plugins: Path) -> None:
        given = {name: value for name, value in os.environ.items() if not name.startswith(("CKPTD_", "XDG_RUNTIME"))}
        self.environ = {**given, **bytes_framework.install(plugins)}
        self.environ["CKPTD_PLUGINS_BLOCK"] += ",check_node"  # its probe is no call of the storage layer
        self.environ["PYTHONPATH"] += f":{given.get('PYTHONPATH', '')}".rstrip(":")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.agent", "--serve"],
            env=self.environ, cwd=bytes_framework.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip

    def start(
        self,
        arguments: Sequence[str],
        *,
        environ: Mapping[str, str],
        folder: Path,
        output: Path,
        counted: str,
        later_s: float,
    ) -> int:
        """Start a verb, with a clock that is ahead by so much; return its process number."""
        order = {
            "arguments": list(arguments), "environ": dict(environ), "folder": str(folder), "output": str(output),
            "calls": counted, "later_s": later_s,
        }  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        return int(self._answer(PATIENCE_S)["pid"])

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """Return the exit code of what was started last, minus its signal if it was killed."""
        return int(self._answer(patience_s)["status"])

    def _answer(self, patience_s: float) -> dict[str, int]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], patience_s)[0]:
            raise TimeoutError
        line = self._process.stdout.readline()
        assert line, "the fork server has ended"
        answer: dict[str, int] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)
        self._process.stdout.close()


@dataclass(frozen=True)
class Outcome:
    """How an agent ended."""

    code: int
    output: str
    calls: list[dict[str, Any]]

    @property
    def count(self) -> int:
        """How many calls it has counted."""
        return max((line["n"] for line in self.calls), default=0)


class World:
    """A folder with all that one case needs."""

    def __init__(self, folder: Path, server: Forkserver) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.store = folder / "runs"
        self.job = self.store / JOB
        self.stores: list[str] = [str(self.store)]
        self.server = server
        self.environ = {**server.environ, "CKPTD_HOME": str(self.home), "CRASH_WORLD": str(folder)}
        self._runs = 0
        self.is_running = False
        self._pid = 0
        folder.mkdir(parents=True, exist_ok=True)

    def use(self, store: Path) -> None:
        """Have the store somewhere else."""
        self.store, self.job = store, store / JOB
        self.stores = [str(store)]

    def command(self, steps: int, *options: str, pause_s: float = 0.006) -> list[str]:
        """Return the arguments of `ckptctl run` for this job."""
        places = [part for place in self.stores for part in ("--store", place)]
        return [
            "run", "--name", JOB, "--nproc", "2", "--every", EVERY, "--keep-last", "2", "--preload", "ckptd",
            "--log-format", "json", *places, *options, "--", str(SCRIPT), str(steps), str(pause_s),
        ]  # fmt: skip

    def start(
        self, arguments: Sequence[str], harm: calls.Harm = _NOTHING, *, counted: bool = True, later_s: float = 0.0
    ) -> int:
        """Start a verb and return its process number."""
        self._runs += 1
        self.is_running = True
        self.output.touch()
        given = calls.to_json([str(self.store), str(self.home / "leases")], str(self.log), harm) if counted else ""
        self._pid = self.server.start(
            arguments,
            environ=self.environ,
            folder=self.folder,
            output=self.output,
            counted=given,
            later_s=later_s,
        )
        return self._pid

    @property
    def log(self) -> Path:
        """Where the agent that was started last notes its calls: nowhere below what is counted."""
        return self.folder.with_name(f"{self.folder.name}.calls-{self._runs}")

    @property
    def output(self) -> Path:
        """What the agent that was started last has printed."""
        return self.folder / f"output-{self._runs}.txt"

    def wait(self) -> Outcome:
        """Wait for the agent that was started last."""
        try:
            code = self.server.wait()
            self.is_running = False
        except TimeoutError:
            self.end()
            raise AssertionError(f"not over within {PATIENCE_S:g} s:\n{self.output.read_text()[-4000:]}") from None
        return Outcome(code, self.output.read_text(errors="replace"), lines_of(self.log))

    def run(self, steps: int, harm: calls.Harm = _NOTHING, *options: str) -> Outcome:
        """Run the job to its end, or until harm ends it."""
        self.start(self.command(steps, *options), harm)
        return self.wait()

    def ctl(self, *arguments: str, later_s: float = 0.0) -> Outcome:
        """Run another verb."""
        self.start(arguments, counted=False, later_s=later_s)
        return self.wait()

    def ended_right(self, steps: int) -> bool:
        """Whether every rank has ended with the state that training has after `steps`."""
        ends = [json.loads((self.folder / f"end-{rank}.json").read_text()) for rank in range(WORLD_SIZE)]
        return ends == [expected(rank, steps) for rank in range(WORLD_SIZE)]

    def processes(self) -> list[psutil.Process]:
        """Return every process that was started in this world and is alive."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("CRASH_WORLD") == str(self.folder) and process.status() != "zombie":
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def end(self) -> None:
        """Kill every process of this world."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)  # it was forked: its environment does not show whose it is
            self.server.wait()
            self.is_running = False
        for process in self.processes():
            process.kill()

    def until_empty(self) -> None:
        """Wait until no process of this world is left; what an agent started has to end with it."""
        end_s = time.monotonic() + PATIENCE_S
        while left := self.processes():
            assert time.monotonic() < end_s, f"left running: {left}"
            time.sleep(0.01)

    def remove(self) -> None:
        """Remove everything that this world has on disk."""
        self.end()
        shutil.rmtree(self.folder, ignore_errors=True)
        for log in self.folder.parent.glob(f"{self.folder.name}.calls-*"):
            log.unlink()


class Running:
    """A job that runs beside its test, until told to stop."""

    def __init__(self, world: World, *options: str, harm: calls.Harm = _NOTHING) -> None:
        self._world = world
        self.pid = world.start(world.command(10**6, *options, pause_s=0.005), harm)
        self._seen = 0

    def events(self) -> list[dict[str, Any]]:
        """Return what the agent has logged so far."""
        lines = self._world.output.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def until(self, event: str, times: int = 1, **fields: Any) -> dict[str, Any]:
        """Wait until an event was logged so often since the last call, with these fields; return the last of them."""
        end_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < end_s:
            new = self.events()[self._seen :]
            found = [item for item in new if item["event"] == event and fields.items() <= item.items()]
            if len(found) >= times:
                self._seen += new.index(found[times - 1]) + 1
                return found[times - 1]
            time.sleep(0.01)
        raise AssertionError(f"no {event!r} {fields} in:\n{self._world.output.read_text()[-4000:]}")

    def look(self) -> Found:
        """Inspect the store while things come and go: what is wrong at one moment alone was on its way."""
        for left in reversed(range(_LOOKS)):
            found = inspect(self._world.job)
            if not found.problems or not left:
                break
            time.sleep(0.02)
        return found

    def stop(self, *, at_once: bool = False) -> Outcome:
        """Ask for the end, and wait for it; with `at_once` nothing in memory is waited for."""
        os.kill(self.pid, signal.SIGTERM)
        if at_once:
            self.until("stopping")
            os.kill(self.pid, signal.SIGTERM)
        return self._world.wait()
