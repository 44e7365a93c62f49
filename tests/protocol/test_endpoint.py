"""Where the socket is, and that it can be reached however deep its folder lies."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ckptd.protocol import endpoint
from ckptd.protocol.endpoint import connect, home, short_name, socket_path

_ALL = {"HOME": "/home/me", "CKPTD_HOME": "/state", "CKPTD_SOCKET": "/run/my.sock", "XDG_RUNTIME_DIR": "/run/user/7"}


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["HOME"], "/home/me/.local/state/ckptd"),
        (["HOME", "XDG_RUNTIME_DIR", "CKPTD_SOCKET"], "/home/me/.local/state/ckptd"),
        (["HOME", "CKPTD_HOME"], "/state"),
        (list(_ALL), "/state"),
    ],
)
def test_home(names: list[str], wanted: str) -> None:
    """The state folder is `CKPTD_HOME`, else below the user's home; nothing else moves it."""
    assert home({name: _ALL[name] for name in names}) == wanted


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["HOME"], "/home/me/.local/state/ckptd/ckptd.sock"),
        (["HOME", "XDG_RUNTIME_DIR"], "/run/user/7/ckptd/ckptd.sock"),
        (["HOME", "CKPTD_HOME"], "/state/ckptd.sock"),
        (["HOME", "CKPTD_HOME", "XDG_RUNTIME_DIR"], "/run/user/7/ckptd/ckptd.sock"),
        (["HOME", "CKPTD_SOCKET"], "/run/my.sock"),
        (list(_ALL), "/run/my.sock"),
    ],
)
def test_socket_path(names: list[str], wanted: str) -> None:
    """`CKPTD_SOCKET` wins, then a state folder of one's own, then the runtime folder, then the state folder."""
    assert socket_path({name: _ALL[name] for name in names}) == wanted


@pytest.mark.parametrize("name", ["CKPTD_HOME", "CKPTD_SOCKET", "XDG_RUNTIME_DIR"])
def test_an_empty_variable_is_an_unset_one(name: str) -> None:
    """A variable that is set to nothing means the same as no variable."""
    assert socket_path({"HOME": "/home/me", name: ""}) == socket_path({"HOME": "/home/me"})
    assert home({"HOME": "/home/me", name: ""}) == home({"HOME": "/home/me"})


def test_relative_places_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks may run in another folder than the agent: what both are told must be absolute."""
    monkeypatch.chdir(tmp_path)
    assert home({"CKPTD_HOME": "state"}) == f"{tmp_path}/state"
    assert socket_path({"CKPTD_SOCKET": "run/../my.sock"}) == f"{tmp_path}/my.sock"
    assert socket_path({"CKPTD_HOME": "state"}) == f"{tmp_path}/state/ckptd.sock"


@pytest.mark.parametrize("depth", [1, 40])
def test_a_deep_folder_can_be_bound_and_reached(tmp_path: Path, depth: int) -> None:
    """A socket far deeper than the 107 bytes that the kernel allows is bound and reached through its short name."""
    folder = tmp_path.joinpath(*["a-long-name-of-a-folder-ä"] * depth)
    folder.mkdir(parents=True)
    path = str(folder / "ckptd.sock")
    assert (len(os.fsencode(path)) > 107) == (depth > 1) or depth == 1
    with socket.socket(socket.AF_UNIX) as listener:
        with short_name(path) as name:
            assert len(os.fsencode(name)) <= 107
            listener.bind(name)
        listener.listen()
        assert (folder / "ckptd.sock").is_socket()
        stream = connect(path, 5.0)
        served, _ = listener.accept()
        stream.sendall(b"hello")
        assert served.recv(10) == b"hello"
        assert not stream.get_inheritable()
        stream.close()
        served.close()


def test_a_short_name_is_itself(tmp_path: Path) -> None:
    """A path that fits is used as it is, so that error messages and `ss` show the real one."""
    with short_name("/run/user/7/ckptd/ckptd.sock") as name:
        assert name == "/run/user/7/ckptd/ckptd.sock"


def test_nothing_stays_open(tmp_path: Path) -> None:
    """The opened folder behind a short name is closed again, also when connecting failed."""
    folder = tmp_path.joinpath(*["a-long-name-of-a-folder"] * 6)
    folder.mkdir(parents=True)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        connect(str(folder / "nobody.sock"), 1.0)
    with pytest.raises(FileNotFoundError):
        connect(str(folder / "no-folder" / "nobody.sock"), 1.0)
    with pytest.raises(RuntimeError), short_name(str(folder / "a.sock")):
        raise RuntimeError
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_limit_is_the_kernels() -> None:
    """Every name that is not shortened fits into a socket address."""
    assert endpoint._MAX_NAME_BYTES < 108
