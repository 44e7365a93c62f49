"""Runs the real `ckptctl` with real ranks in a world of its own, and looks at it from outside."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from safetensors import safe_open

from ckptd.cli.status import current
from ckptd.journal import Journal
from tests.daemon import bytes_framework
from tests.waiting import PATIENCE_S, until

SCRIPTS = Path(__file__).parent / "scripts"
LIGHT = str(Path(__file__).parents[1] / "crash" / "scripts" / "train.py")
"""A training in lock-step without torch, `LIGHT STEPS PAUSE_S`: for what is not about torch, whose import takes 3 s."""


class World:
    """A state folder, a store and the processes started in it; `close` fails when anything of it is left running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.store = folder / "runs"
        # A short path: multiprocessing puts sockets there, whose names are limited.
        self.temporary = Path(tempfile.mkdtemp(prefix="ckptd-world-"))
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("CKPTD_", "XDG_RUNTIME"))},
            "CKPTD_HOME": str(self.home),
            "WORLD_TAG": str(folder),
            "TMPDIR": str(self.temporary),
        }
        self.preload: tuple[str, ...] = ()
        self._started: list[subprocess.Popen[str]] = []

    def leave_out_torch(self) -> None:
        """Have jobs train without torch, by scripts like `LIGHT`; `preload` is what `ckptctl run` needs for it."""
        self.env |= bytes_framework.install(self.folder / "plugins")
        self.preload = ("--preload", "ckptd")

    def popen(self, arguments: list[str], **env: str) -> subprocess.Popen[str]:
        """Start a program in this world; its output is a file, so nothing can block on a pipe."""
        log = (self.folder / f"output-{len(self._started)}.txt").open("w")
        process = subprocess.Popen(
            arguments, cwd=self.folder, env={**self.env, **env}, stdout=log, stderr=subprocess.STDOUT, text=True
        )
        log.close()
        self._started.append(process)
        return process

    def output(self, process: subprocess.Popen[str]) -> str:
        """Return what a process has printed so far."""
        return (self.folder / f"output-{self._started.index(process)}.txt").read_text()

    def run(
        self,
        script: str,
        *arguments: object,
        nproc: int = 2,
        every: str = "200ms",
        options: tuple[str, ...] = (),
        **env: str,
    ):
        """Start `ckptctl run` on a script of the scripts folder."""
        path = script if os.path.isabs(script) else str(SCRIPTS / script)
        command = [
            "run",
            "--nproc",
            str(nproc),
            "--every",
            every,
            "--store",
            str(self.store),
            "--log-format",
            "json",
            *self.preload,
            *options,
        ]
        return self.ctl_popen(*command, "--", path, *map(str, arguments), **env)

    def ctl_popen(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start a `ckptctl` verb."""
        return self.popen([sys.executable, "-m", "ckptd.cli.main", *arguments], **env)

    def ctl(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a `ckptctl` verb to its end."""
        return subprocess.run(
            [sys.executable, "-m", "ckptd.cli.main", *arguments],
            cwd=self.folder, env={**self.env, **env}, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip

    def json(self, *arguments: str) -> Any:
        """Return the JSON that a reading verb prints."""
        result = self.ctl(*arguments, "--json")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def finish(self, process: subprocess.Popen[str], code: int = 0) -> str:
        """Wait for a process, check its exit code, and return its output."""
        process.wait(PATIENCE_S)
        assert process.returncode == code, (
            f"exit code {process.returncode}, not {code}:\n{self.output(process)[-6000:]}"
        )
        return self.output(process)

    def status(self, job: str) -> dict[str, Any] | None:
        """Return a job's live status without the cost of a new interpreter."""
        journal = Journal(self.home, read_only=True)
        try:
            entry = journal.read_job(job)
        finally:
            journal.close()
        return None if entry is None else current(entry)

    def until_training(
        self, job: str, step: int = 1, *, committed: bool = False, generation: int = 1
    ) -> dict[str, Any]:
        """Wait until a job has finished `step` in at least that generation, and has a checkpoint if asked for."""

        def there() -> dict[str, Any] | None:
            now = self.status(job)
            last = self._started[-1]
            assert last.poll() is None or last.returncode == 0, self.output(last)[-6000:]
            if now is None or now["step"] < step or now["generation"] < generation:
                return None
            if not all(rank["state"] in ("training", "capturing") for rank in now["ranks"]):
                return None
            return now if now["last_committed"] or not committed else None

        return until(there, f"step {step} of job {job}")

    def kill_rank(self, job: str, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank of a running job."""
        status = self.status(job)
        assert status is not None
        os.kill(status["ranks"][rank]["pid"], number)

    def kill_pid(self, pid: int) -> None:
        """Kill a process of this world."""
        assert pid in {process.pid for process in self.processes()}
        os.kill(pid, signal.SIGKILL)

    def processes(self) -> list[psutil.Process]:
        """Return every process of this world that is alive, whoever its parent is now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("WORLD_TAG") == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def launchers(self) -> list[psutil.Process]:
        """Return every launcher, and every rank that was forked from one and bears its name."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                if "ckptd.launcher" in process.cmdline():
                    found.append(process)
        return found

    def wipe(self, folder: Path) -> None:
        """Delete a folder while somebody may write into it."""

        def gone() -> bool:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise
                return not folder.exists()
            return True

        until(gone, f"the end of {folder}")

    def until_empty(self, patience_s: float = PATIENCE_S) -> None:
        """Wait until no process of this world is left."""
        try:
            until(lambda: not self.processes(), "the end of every process", patience_s)
        except AssertionError:
            left = [process.as_dict(["pid", "cmdline", "status"]) for process in self.processes()]
            raise AssertionError(f"left running: {left}") from None

    def incidents_now(self, job: str) -> list[dict[str, Any]]:
        """Return a job's incidents without the cost of a new interpreter."""
        journal = Journal(self.home, read_only=True)
        try:
            return journal.read_incidents(job)
        finally:
            journal.close()

    def incidents(self, job: str) -> list[dict[str, Any]]:
        """Return a job's incidents."""
        return self.json("incidents", job)

    def tensors(self, job: str) -> tuple[int, dict[str, str]]:
        """Return step and SHA-256 of every tensor of a job's newest checkpoint, read as any third party would."""
        newest = max((self.store / job).glob("g*/s*/manifest.json"))
        manifest = json.loads(newest.read_text())
        digests = {}
        for shard in manifest["shards"]:
            with safe_open(newest.parent / shard["file"], "pt") as file:
                for name in file.keys():
                    if name != "__ckptd__.values":
                        data = file.get_tensor(name).contiguous().view(-1).numpy().tobytes()
                        digests[f"{shard['rank']}/{name}"] = hashlib.sha256(data).hexdigest()
        return manifest["step"], digests

    def close(self) -> None:
        """End what still runs of what this world started."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)
