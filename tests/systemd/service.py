"""The service of `systemd/ckptd.service` in a container, and what it leaves for us to look at."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ckptd.journal import JobEntry, Journal
from tests.daemon import bytes_framework
from tests.systemd.container import ROOT, Container
from tests.waiting import until

UNIT = ROOT / "systemd" / "ckptd.service"
SCRIPT = Path(__file__).parent / "scripts" / "steps.py"
_UID = 64901
_TERMINAL = ("finished", "failed", "stopped")


class Service:
    """The installed service of a user of its own, whose state folder lies outside, where a reboot leaves it alone."""

    def __init__(self, container: Container, state: Path, *, settings: str = "") -> None:
        """Install it; `settings` are lines for a drop-in, put behind the ones that name this project's programs."""
        self.container = container
        self.state = state
        self.work = state / "work"
        self.store = state / "runs"
        self._env = bytes_framework.install(state / "plugins")
        for folder in (self.work, self.store):
            folder.mkdir()
        container.add_user("ckptd", _UID, str(state))
        for path in (state, *state.rglob("*")):
            os.chown(path, _UID, _UID)
        units = container.files / "etc" / "systemd" / "system"
        (units / "ckptd.service.d").mkdir(parents=True)
        (units / "multi-user.target.wants").mkdir()
        (units / "ckptd.service").write_text(UNIT.read_text())
        (units / "multi-user.target.wants" / "ckptd.service").symlink_to("../ckptd.service")
        environment = " ".join(f"{key}={value}" for key, value in self._env.items())
        (units / "ckptd.service.d" / "here.conf").write_text(
            f"[Service]\nStateDirectory=\nExecStart=\nExecStart={sys.executable} -m ckptd.daemon\n"
            f"Environment=CKPTD_HOME={state / 'home'} CKPTD_LOG_FORMAT=json {environment}\n{settings}\n"
        )

    # --- what can be done -------------------------------------------------------------------------------------

    def systemctl(self, verb: str, *options: str) -> str:
        """Run a verb of systemctl on it, to its end."""
        return self.container.run("systemctl", verb, *options, "ckptd.service")

    def ctl(self, *arguments: str) -> str:
        """Run `ckptctl` as the service's user."""
        env = {**self._env, "CKPTD_HOME": str(self.state / "home"), "CKPTD_SOCKET": "/run/ckptd/ckptd.sock"}
        assignments = [f"{key}={value}" for key, value in env.items()]
        who = ("setpriv", f"--reuid={_UID}", f"--regid={_UID}", "--clear-groups", "env", "-C", str(self.work))
        return self.container.run(*who, *assignments, sys.executable, "-m", "ckptd.cli.main", *arguments)

    def submit(self, name: str, steps: int, pause_s: float, *, flush_max: str = "0") -> None:
        """Hand it a job."""
        file = self.work / f"{name}.toml"
        file.write_text(
            f'command = ["{SCRIPT}", "{steps}", "{pause_s}"]\nnproc = 2\nevery = "200ms"\nflush_max = "{flush_max}"\n'
            f'store = "{self.store}"\npython = "{sys.executable}"\npreload = ["ckptd"]\ncwd = "{self.work}"\n'
        )
        self.ctl("submit", str(file))

    # --- what can be seen -------------------------------------------------------------------------------------

    def show(self, name: str) -> str:
        """Return a property of the unit."""
        return self.systemctl("show", f"--property={name}", "--value").strip()

    @property
    def agent(self) -> int:
        """The agent's process, as the container numbers it; 0: there is none."""
        return int(self.show("MainPID"))

    def entry(self, job: str) -> JobEntry | None:
        """Return what the journal says of a job."""
        journal = Journal(self.state / "home", read_only=True)
        try:
            return journal.read_job(job)
        finally:
            journal.close()

    def until_state(self, job: str, *states: str) -> JobEntry:
        """Wait until a job is written down in one of some states."""

        def there() -> JobEntry | None:
            entry = self.entry(job)
            return entry if entry is not None and entry.status["state"] in states else None

        found: JobEntry = until(there, f"job {job} {' or '.join(states)}")
        return found

    def steps(self, rank: int = 0) -> list[tuple[int, int]]:
        """Return generation and step of every step that a rank has finished, in order."""
        log = self.work / f"steps-{rank}.log"
        whole = log.read_text().rpartition("\n")[0] if log.exists() else ""
        return [(int(generation), int(step)) for generation, step in map(str.split, whole.splitlines())]

    def until_step(self, step: int) -> None:
        """Wait until both ranks have finished a step, in whatever generation."""
        for rank in (0, 1):
            until(lambda rank=rank: (self.steps(rank) or [(0, 0)])[-1][1] >= step, f"step {step} of rank {rank}")

    def committed(self, job: str) -> list[int]:
        """Return the committed steps."""
        return sorted(json.loads(path.read_text())["step"] for path in (self.store / job).glob("g*/s*/manifest.json"))

    def log(self) -> list[dict[str, Any]]:
        """Return what the agents of this boot have logged."""
        text = self.container.run("journalctl", "--unit=ckptd.service", "--output=cat", "--no-pager")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def said(self) -> str:
        """Return everything that is in the service's log."""
        return self.container.run("journalctl", "--unit=ckptd.service", "--no-pager")
