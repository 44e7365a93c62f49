"""The service of one user, under that user's own systemd and without root: the unit with the drop-in `user.conf`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ckptd.journal import Journal
from tests.daemon import bytes_framework
from tests.systemd.container import Container
from tests.systemd.service import SCRIPT, UNIT
from tests.waiting import until

pytestmark = pytest.mark.systemd
_UID = 64902


@pytest.mark.timeout(300)
def test_the_service_of_a_user(_bootable: None, tmp_path: Path) -> None:
    """A user enables the unit with its drop-in; a restart of it costs its job no step, and lingering brings it up."""
    home = tmp_path / "home"
    units = home / ".config" / "systemd" / "user"
    (units / "ckptd.service.d").mkdir(parents=True)
    env = bytes_framework.install(home / "plugins")
    (units / "ckptd.service").write_text(UNIT.read_text())
    (units / "ckptd.service.d" / "user.conf").write_text((UNIT.parent / "user.conf").read_text())
    environment = " ".join(f"{key}={value}" for key, value in env.items())
    (units / "ckptd.service.d" / "zz-here.conf").write_text(
        f"[Service]\nExecStart=\nExecStart={sys.executable} -m ckptd.daemon\nEnvironment={environment}\n"
    )
    (home / "job.toml").write_text(
        f'command = ["{SCRIPT}", "1000000", "0.01"]\nnproc = 2\nevery = "200ms"\nstore = "runs"\n'
        f'python = "{sys.executable}"\npreload = ["ckptd"]\n'
    )
    for path in (home, *home.rglob("*")):
        os.chown(path, _UID, _UID)
    container = Container(tmp_path, home)
    container.add_user("somebody", _UID, str(home))

    def run(*command: str) -> str:
        words = [f"XDG_RUNTIME_DIR=/run/user/{_UID}", f"HOME={home}", *(f"{key}={value}" for key, value in env.items())]
        who = ("setpriv", f"--reuid={_UID}", f"--regid={_UID}", "--clear-groups", "env", "-C", str(home))
        return container.run(*who, *words, *command)

    def steps() -> list[str]:
        log = home / "steps-0.log"
        return log.read_text().splitlines() if log.exists() else []

    try:
        container.boot()
        container.run("loginctl", "enable-linger", "somebody")
        until(lambda: container.run("systemctl", "is-active", f"user@{_UID}", check=False) == "active\n", "a manager")
        run("systemctl", "--user", "enable", "--now", "ckptd")
        run(sys.executable, "-m", "ckptd.cli.main", "submit", "job.toml")
        until(lambda: len(steps()) > 20, "steps")
        run("systemctl", "--user", "restart", "ckptd")
        done = len(steps())
        until(lambda: len(steps()) > done + 50, "more steps")
        assert steps() == [f"1 {step}" for step in range(1, len(steps()) + 1)]
        run("systemctl", "--user", "stop", "ckptd")
        journal = Journal(home / ".local" / "state" / "ckptd", read_only=True)
        entry = journal.read_job("job")
        journal.close()
        assert entry is not None
        assert (entry.status["state"], entry.life.comes_back) == ("stopped", True)
        assert (units / "default.target.wants" / "ckptd.service").is_symlink()
    except AssertionError:
        sys.stdout.write(container.run("journalctl", "--no-pager", "-n", "200", check=False))
        raise
    finally:
        container.close()
