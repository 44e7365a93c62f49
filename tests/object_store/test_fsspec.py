"""The tier over fsspec: in memory, on disk, on a web server to read, and on a real object store."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed: pip install 'ckptd[s3]'")

from fsspec.implementations.local import LocalFileSystem  # noqa: E402
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402
from fsspec.registry import known_implementations  # noqa: E402

from ckptd.errors import (  # noqa: E402
    ConfigError,
    DamagedError,
    FencedError,
    NotFoundError,
    PluginError,
    RefusedError,
    StoreError,
)
from ckptd.storage.local import LocalTier  # noqa: E402
from ckptd.storage.tier import Cost, FailureGroup, Tier  # noqa: E402
from ckptd.testing import TierSuite  # noqa: E402
from ckptd_plugins import storage_fsspec  # noqa: E402
from ckptd_plugins.storage_fsspec import KNOWN, FsspecTier, ckptd_tiers, open_fsspec, schemes  # noqa: E402


@pytest.fixture
def memory_url() -> Iterator[str]:
    """A place of a test's own in fsspec's memory, which all of a process share."""
    place = f"/{uuid.uuid4().hex}"
    yield f"memory:/{place}"
    for path in [path for path in MemoryFileSystem.store if path.startswith(place)]:
        del MemoryFileSystem.store[path]
    MemoryFileSystem.pseudo_dirs[:] = [path for path in MemoryFileSystem.pseudo_dirs if not path.startswith(place)]


class TestMemory(TierSuite):
    """fsspec's memory keeps the contract of what it is declared to do."""

    @pytest.fixture
    def tier(self, memory_url: str) -> FsspecTier:
        """An empty place in memory."""
        return FsspecTier(memory_url)


class TestFolder(TierSuite):
    """A folder through fsspec keeps the contract, with a temporary name and a move."""

    @pytest.fixture
    def tier(self, tmp_path: Path) -> FsspecTier:
        """A folder that is not there yet."""
        return FsspecTier(f"file://{tmp_path}/store")

    def reopen(self, tier: Tier) -> FsspecTier:
        return FsspecTier(tier.url)

    def litter(self, tier: Tier) -> bool:
        folder = Path(tier.url.removeprefix("file://")) / "job/s1"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".tmp-0123456789abcdef-killed").write_bytes(b"half")
        return True


class TestCarefully(TierSuite):
    """A filesystem of which nothing is known keeps the contract without anything being trusted to it."""

    @pytest.fixture
    def tier(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FsspecTier:
        """A folder through a filesystem that moves over nothing, as many do."""

        class Strict(LocalFileSystem):
            protocol = "strict"

            def mv(self, path1: str, path2: str, **options: Any) -> None:
                if self.exists(path2):
                    raise FileExistsError(path2)
                super().mv(path1, path2, **options)

        fsspec.register_implementation("strict", Strict, clobber=True)
        tier = FsspecTier(f"strict://{tmp_path}/store")
        assert not tier.capabilities.atomic_replace
        return tier


@pytest.mark.timeout(450)  # s3fs itself asks a server that does not answer up to 25 times, for 15 s each
class TestObjectStore(TierSuite):
    """A real object store through fsspec keeps the contract as ``gs`` and ``az`` do: objects appear whole."""

    racers = 3  # the server lets a loser wait for its turn, a second at a time

    @pytest.fixture
    def tier(self, s3_url: str) -> Iterator[FsspecTier]:
        """An empty prefix on a real server."""
        tier = FsspecTier(s3_url)
        yield tier
        tier.close()

    def reopen(self, tier: Tier) -> FsspecTier:
        return FsspecTier(tier.url)

    def test_puts_what_is_larger_than_a_piece(self, tier: FsspecTier) -> None:
        """An object of several pieces arrives whole, and one whose stream is damaged leaves no trace."""
        data = os.urandom(2**20) * 35
        tier.put("job/large", data)
        found = memoryview(bytearray(len(data)))
        tier.read_into("job/large", 0, found)
        assert found == data

        class Damaged:
            size_bytes = len(data)

            def read_into(self, offset: int, into: memoryview) -> None:
                if offset > 2**24:
                    raise DamagedError("the tensor is damaged")

        with pytest.raises(DamagedError, match="the tensor is damaged"):
            tier.put("job/never", Damaged())
        assert [entry.key for entry in tier.list("")] == ["job/large"]

    def test_says_what_is_wrong(self, tier: FsspecTier, monkeypatch: pytest.MonkeyPatch) -> None:
        """A bucket that isn't there and a wrong secret are refused, a server that is down is transient."""
        with pytest.raises(RefusedError, match="no-such-bucket"):
            FsspecTier("s3://no-such-bucket-here/runs").check_writable()
        wrong = FsspecTier(tier.url, {"secret": "wrong-secret-value", "key": os.environ["AWS_ACCESS_KEY_ID"]})
        with pytest.raises(RefusedError) as caught:
            wrong.put("job/a", b"x")
        assert "wrong-secret-value" not in str(caught.value)
        away = {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 0}}}
        monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
        with pytest.raises(StoreError) as caught_away:
            FsspecTier(tier.url, away).get("job/a")
        assert caught_away.value.retryable


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a word; knows no ranges."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The URL of a web server that serves the folder "runs"."""
    LocalTier(tmp_path / "runs").put("job/s1/a", bytes(range(256)) * 10)
    LocalTier(tmp_path / "runs").put("job/s2/b", b"12345")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/runs"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_reads_from_a_web_server(web: str) -> None:
    """Objects of a plain web server are listed and read, by ranges too where it knows none; nothing is put there."""
    tier = FsspecTier(web)
    assert {(entry.key, entry.size_bytes) for entry in tier.list("job/")} == {("job/s1/a", 2560), ("job/s2/b", 5)}
    assert tier.get("job/s2/b") == b"12345"
    into = memoryview(bytearray(300))
    tier.read_into("job/s1/a", 100, into)
    assert into == (bytes(range(256)) * 10)[100:400]
    with pytest.raises(DamagedError, match="ends at byte 2560"):
        tier.read_into("job/s1/a", 2500, into)
    descriptor = tier.open("job/s2/b")
    assert os.pread(descriptor, 10, 0) == b"12345"
    os.close(descriptor)
    with pytest.raises(NotFoundError, match="job/never"):
        tier.get("job/never")
    for refused in (tier.check_writable, lambda: tier.put("job/a", b"x")):
        with pytest.raises(RefusedError, match="can only be read"):
            refused()
    tier.close()


def test_a_server_that_is_away_has_not_lost_anything() -> None:
    """An unreachable server is a transient error for every call, never "not found" and never an empty listing."""
    tier = FsspecTier("http://127.0.0.1:9/runs")
    for call in (
        lambda: tier.get("job/a"),
        lambda: tier.size_bytes("job/a"),
        lambda: tier.read_into("job/a", 0, memoryview(bytearray(1))),
        lambda: tier.open("job/a"),
        lambda: list(tier.list("job/")),
    ):
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.retryable, caught.value


def test_a_folder_that_can_not_be_listed_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder that fails to be read fails the listing, where fsspec's own `find` would leave it out."""
    tier = FsspecTier(f"file://{tmp_path}")
    tier.put("job/s1/a", b"x")
    tier.put("job/s2/a", b"x")
    listing = LocalFileSystem.ls

    def failing(self: LocalFileSystem, path: str, **options: Any) -> Any:
        if path.endswith("s2"):
            raise OSError(5, "Input/output error")
        return listing(self, path, **options)

    monkeypatch.setattr(LocalFileSystem, "ls", failing)
    with pytest.raises(StoreError, match="Input/output error"):
        list(tier.list("job/"))


def test_what_has_no_time_is_young(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a filesystem does not say how old an object is, nothing counts as old: it may be on its way just now."""
    tier = FsspecTier(memory_url)
    for key in ("job/a", "job/.tmp-b"):
        tier.put(key, b"x")
    listing = MemoryFileSystem.ls

    def timeless(self: MemoryFileSystem, path: str, **options: Any) -> Any:
        return [{name: info[name] for name in ("name", "type", "size")} for info in listing(self, path, **options)]

    monkeypatch.setattr(MemoryFileSystem, "ls", timeless)
    (entry,) = tier.list("job/")
    assert time.time() - 60 < entry.modified_at <= time.time()
    assert tier.sweep("job/", 60.0) == []


def test_declares_what_it_is_trusted_with(memory_url: str, tmp_path: Path) -> None:
    """Create-only is not declared where fsspec looks first and then writes; costs and failure groups fit the place."""
    memory, folder = FsspecTier(memory_url), FsspecTier(f"file://{tmp_path}")
    for tier in (memory, folder):
        assert not tier.capabilities.create_only_put
        with pytest.raises(RefusedError, match="no create-only put"):
            tier.put("job/a", b"x", create_only=True)
    assert (memory.capabilities.cost, memory.capabilities.failure_group) == (Cost.MEMORY, FailureGroup.PROCESS)
    assert (folder.capabilities.cost, folder.capabilities.failure_group) == (Cost.DISK, FailureGroup.NODE)
    away = FsspecTier("http://127.0.0.1:9/runs").capabilities
    assert (away.cost, away.failure_group, away.create_only_put) == (Cost.NETWORK, FailureGroup.SITE, False)


@pytest.mark.parametrize("url_of", ["memory", "folder"])
def test_the_suite_catches_create_only_by_looking_first(url_of: str, memory_url: str, tmp_path: Path) -> None:
    """Were create-only declared for memory or a folder, the suite would say that it has more than one winner."""

    class Pretending(FsspecTier):
        def put(self, key: str, data: Any, *, create_only: bool = False, pace: Any = None) -> None:
            if create_only:
                turn.wait(10)  # all are at the same point, as they may be
                with contextlib.suppress(FileExistsError):
                    self._fs.makedirs(self._path(key).rpartition("/")[0], exist_ok=True)
                if self._fs.exists(self._path(key)):
                    raise FencedError("exists already")
                turn.wait(10)
            super().put(key, data, pace=pace)

    suite = TierSuite()
    turn = threading.Barrier(suite.racers)
    tier = Pretending(memory_url if url_of == "memory" else f"file://{tmp_path}")
    tier.capabilities = type(tier.capabilities)(
        **{name: getattr(tier.capabilities, name) for name in tier.capabilities.__slots__} | {"create_only_put": True}
    )
    with pytest.raises(AssertionError, match="of 8 created"):
        suite.test_create_only_has_one_winner(tier)


def test_what_is_put_in_a_folder_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a local disk the file is synced before it gets its name, and the folder afterwards."""
    events: list[str] = []
    sync, move = os.fsync, LocalFileSystem.mv

    def moved(self: LocalFileSystem, *arguments: Any, **options: Any) -> None:
        events.append("move")
        move(self, *arguments, **options)

    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync file"), sync(descriptor))[1])
    monkeypatch.setattr(LocalFileSystem, "mv", moved)
    monkeypatch.setattr(storage_fsspec, "sync_folder", lambda _: events.append("sync folder"))
    FsspecTier(f"file://{tmp_path}").put("job/a", b"x")
    assert events == ["sync file", "move", "sync folder"]


def test_a_failed_put_leaves_no_file(tmp_path: Path) -> None:
    """Whatever fails while an object is written, its temporary file goes."""
    tier = FsspecTier(f"file://{tmp_path}/store")

    class Damaged:
        size_bytes = 100

        def read_into(self, offset: int, into: memoryview) -> None:
            raise DamagedError("the tensor is damaged")

    with pytest.raises(DamagedError):
        tier.put("job/a", Damaged())
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def test_empty_folders_go_with_their_last_object(tmp_path: Path) -> None:
    """Deleting leaves no tree of empty folders, and no more goes than is empty."""
    tier = FsspecTier(f"file://{tmp_path}/store")
    tier.put("job/s1/a", b"x")
    tier.put("job/s2/deep/a", b"x")
    tier.delete("job/s2/deep/a")
    assert {path.name for path in (tmp_path / "store").rglob("*")} == {"job", "s1", "a"}
    tier.delete("job/s1/a")
    assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "./folder",
        "simplecache::memory://x",
        "https://user:password@host/runs",
        "https://host/runs?sig=secret",
        "https://host/runs#part",
    ],
)
def test_refuses_what_is_no_place(url: str) -> None:
    """A chain, a path, and a URL that carries what must not be logged are refused, and not repeated with it."""
    with pytest.raises(ConfigError) as caught:
        open_fsspec(url)
    assert "password" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_says_what_is_missing() -> None:
    """A scheme whose package is not installed, and an option that nobody knows, are errors with a hint."""
    with pytest.raises(PluginError, match="gcsfs") as caught:
        open_fsspec("gs://bucket/runs")
    assert caught.value.hint
    with pytest.raises(ConfigError, match="ftp"):
        open_fsspec("ftp://127.0.0.1/runs", {"no_such_option": 1, "port": "none"})


def test_registers_every_scheme_that_is_nobody_elses() -> None:
    """What fsspec knows is registered, but for our own schemes and for what is only a view of another filesystem."""
    (factory,) = ckptd_tiers()
    assert factory.schemes == schemes()
    ours = {"file", "local", "s3", "s3a"}
    views = {"async_wrapper", "asyncwrapper", "asynclocal", "blockcache", "cached", "dask", "data", "dir", "dvc"}
    views |= {"filecache", "generic", "gist", "git", "github", "jlab", "jupyter", "libarchive", "pyscript"}
    views |= {"reference", "simplecache", "tar", "wandb", "zip"}
    assert set(KNOWN) <= set(known_implementations)
    assert set(known_implementations) - set(KNOWN) <= ours | views | set(schemes())
    assert not ours & set(schemes())


def test_loading_the_plugin_loads_no_fsspec() -> None:
    """An agent that uses no such store does not pay for it."""
    import subprocess
    import sys

    code = "import sys, ckptd_plugins.storage_fsspec as s; s.ckptd_tiers(); sys.exit('fsspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
