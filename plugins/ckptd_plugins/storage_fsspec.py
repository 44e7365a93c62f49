"""Whatever fsspec opens, as a tier: ``gs://``, ``az://``, ``sftp://``, ``https://`` (to read) and what else it knows.

fsspec hides differences that a checkpoint's safety hangs on, so what a filesystem is trusted with is in a table here,
and everything that is not in it gets the most careful treatment: written under a temporary name and moved. A
create-only put is declared only where the server itself refuses the second one; fsspec's own ``mode="create"`` looks
first and then writes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ckptd.errors import ConfigError, DamagedError, NotFoundError, PluginError, RefusedError, StoreError
from ckptd.plugin import TierFactory, hookimpl
from ckptd.storage.folders import sync_folder
from ckptd.storage.stream import Stream, piece, stream_of
from ckptd.storage.tier import Capabilities, Cost, Data, Entry, FailureGroup, Pace
from ckptd_plugins.fsspec_failures import Secrets, foreign_errors, translated

KNOWN = (
    *("abfs", "adl", "arrow_hdfs", "az", "box", "dbfs", "dropbox", "ftp", "gcs", "gdrive", "gs", "hdfs", "hf", "http"),
    *("https", "lakefs", "memory", "oci", "ocilake", "oss", "root", "sftp", "smb", "ssh", "tos", "tosfs", "webdav"),
    "webhdfs",
)
"""The schemes that fsspec knows by itself and that lead to a place of their own. Written down, since asking fsspec
means importing it, which takes every start of an agent 0.1 s."""

_PIECE_BYTES = 16 * 2**20
_TEMPORARY = ".tmp-"
_FOLDER_ATTEMPTS = 10
_WRONG_OPTION: tuple[type[BaseException], ...] = (TypeError,)
"""What a filesystem raises for an option that it does not know, besides all else."""


@dataclass(frozen=True, slots=True)
class _Manner:
    """What a filesystem is trusted with."""

    whole: bool = False
    """An object appears when its last byte is there, and takes the place of an older one in that moment."""
    streams: bool = True
    """It takes large objects piece by piece."""
    renames: bool = False
    """A move takes the place of what is there in one moment, and `rmdir` refuses a folder that is not empty."""
    creates: bool = False
    """The server refuses to put what is there already."""
    writes: bool = True


_CAREFUL = _Manner()
_READ_ONLY = _Manner(writes=False)
_OBJECTS = _Manner(whole=True, creates=True)
_FOLDERS = _Manner(renames=True)
_MANNERS = {
    "memory": _Manner(whole=True, streams=False),
    "file": _FOLDERS,
    "local": _FOLDERS,
    "sftp": _FOLDERS,
    "ssh": _FOLDERS,
    # a precondition on the server: If-None-Match, or ifGenerationMatch=0
    "gs": _OBJECTS,
    "gcs": _OBJECTS,
    "az": _OBJECTS,
    "abfs": _OBJECTS,
    "s3": _OBJECTS,
    "http": _READ_ONLY,
    "https": _READ_ONLY,
}
_PLACES = {
    "memory": (Cost.MEMORY, FailureGroup.PROCESS),
    "file": (Cost.DISK, FailureGroup.NODE),
    "local": (Cost.DISK, FailureGroup.NODE),
}


class FsspecTier:
    """A folder or prefix of a filesystem that fsspec opens; `options` are that filesystem's own, credentials too."""

    name = "fsspec"

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        scheme = _checked_scheme(url)
        self._secrets = Secrets(options or {})
        self._manner = _MANNERS.get(scheme, _CAREFUL)
        self._local = scheme in ("file", "local")
        self.url = url.rstrip("/")
        cost, failure_group = _PLACES.get(scheme, (Cost.NETWORK, FailureGroup.SITE))
        self.capabilities = Capabilities(
            create_only_put=self._manner.creates,
            atomic_replace=self._manner.whole or self._manner.renames,
            range_read=True,
            multipart=False,
            server_checksum=False,
            consistent_list=self._manner.writes,
            exclusive_hold=False,
            lends_files=False,
            cost=cost,
            failure_group=failure_group,
        )
        self._fs: Any
        self._fs, root = _open_filesystem(url, dict(options or {}), self._secrets)
        self._root = root.rstrip("/")

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    @contextlib.contextmanager
    def _failing(self, verb: str, key: str) -> Iterator[None]:
        """Turn what a filesystem raises into an error of ours; those of streams pass through."""
        try:
            yield
        except foreign_errors() as error:
            raise translated(error, verb, f"{self.url}/{key}", self._secrets) from error

    # --- putting ----------------------------------------------------------------------------------------------

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Keep `data` under `key`, in the way that this filesystem is trusted with."""
        if not self._manner.writes:
            raise RefusedError(f"{self.url} can only be read", hint="name another store to write checkpoints to")
        if create_only and not self._manner.creates:
            raise RefusedError(f"{self.url} has no create-only put", hint="its filesystem looks first and then writes")
        path, stream = self._path(key), stream_of(data)
        with self._failing("put", key):
            if not self._manner.whole:
                self._put_aside(path, stream, pace)
            elif create_only or not self._manner.streams or stream.size_bytes <= _PIECE_BYTES:
                mode = "create" if create_only else "overwrite"
                self._fs.pipe_file(path, _in_memory(stream, pace), mode=mode)
            else:
                file = self._fs.open(path, "wb", block_size=_PIECE_BYTES)
                try:
                    _write(file, stream, pace)
                except BaseException:
                    _abandon(file)
                    raise
                file.close()

    def _put_aside(self, path: str, data: Stream, pace: Pace | None) -> None:
        """Write under a temporary name, and move."""
        folder, _, name = path.rpartition("/")
        temporary = f"{folder}/{_TEMPORARY}{os.urandom(8).hex()}-{name}"
        try:
            with self._opened_new(folder, temporary) as file:
                _write(file, data, pace)
                if self._local:
                    file.flush()
                    os.fsync(file.fileno())
            if not self._manner.renames and self._fs.exists(path):
                self._fs.rm_file(path)
            self._fs.mv(temporary, path)
        except BaseException:
            with contextlib.suppress(*foreign_errors()):
                self._fs.rm_file(temporary)
            raise
        if self._local:
            sync_folder(Path(folder))

    def _opened_new(self, folder: str, path: str) -> Any:
        """Open a file in a folder that need not exist, and that a prune may remove while it is still empty."""
        for _ in range(_FOLDER_ATTEMPTS - 1):
            self._fs.makedirs(folder, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                return self._fs.open(path, "wb", block_size=_PIECE_BYTES)
        self._fs.makedirs(folder, exist_ok=True)
        return self._fs.open(path, "wb", block_size=_PIECE_BYTES)

    def check_writable(self) -> None:
        """Put a small object and delete it."""
        probe = f"{_TEMPORARY}{os.urandom(8).hex()}-probe"
        self.put(probe, b"ckptd")
        with self._failing("delete", probe):
            self._fs.rm_file(self._path(probe))

    # --- reading ----------------------------------------------------------------------------------------------

    def get(self, key: str) -> bytes:
        """Return a small object whole."""
        with self._failing("read", key):
            return bytes(self._fs.cat_file(self._path(key)))

    def size_bytes(self, key: str) -> int:
        """Return the size of an object."""
        with self._failing("read", key):
            size = self._fs.info(self._path(key)).get("size")
        if size is None:
            raise StoreError(f"{self.url}/{key}: its size is unknown", hint="a server that names no sizes is no store")
        return int(size)

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Fill all of `into`, range by range."""
        for begin in range(0, len(into), _PIECE_BYTES):
            part = into[begin : begin + _PIECE_BYTES]
            part[:] = self._range(key, offset + begin, offset + begin + len(part))

    def _range(self, key: str, begin: int, end: int) -> bytes:
        try:
            with self._failing("read", key):
                found: bytes = self._fs.cat_file(self._path(key), start=begin, end=end)
        except StoreError:
            self._require_bytes(key, end)  # many refuse a range that begins behind the end
            raise
        if len(found) < end - begin:
            self._require_bytes(key, end)
            raise StoreError(f"{self.url}/{key}: {len(found)} of {end - begin} bytes from {begin} were read")
        if len(found) > end - begin:  # a web server that knows no ranges sends everything
            self._require_bytes(key, end)
            if len(found) != self.size_bytes(key):
                raise StoreError(f"{self.url}/{key}: bytes {begin} to {end} were asked for, {len(found)} were sent")
            found = found[begin:end]
        return found

    def _require_bytes(self, key: str, end: int) -> None:
        size_bytes = self.size_bytes(key)
        if size_bytes < end:
            raise DamagedError(f"{self.url}/{key} ends at byte {size_bytes}, {end} were wanted")

    def open(self, key: str) -> int:
        """Bring a copy into memory, and return a descriptor for reading it."""
        size_bytes = self.size_bytes(key)
        writable = os.memfd_create("ckptd-object", os.MFD_CLOEXEC)
        try:
            with self._failing("read", key):
                self._fs.get_file(self._path(key), f"/proc/self/fd/{writable}")
            found_bytes = os.fstat(writable).st_size
            if found_bytes not in (size_bytes, self.size_bytes(key)):
                raise StoreError(f"{self.url}/{key} has {size_bytes} bytes, and {found_bytes} were read")
            return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(writable)

    # --- listing and deleting ---------------------------------------------------------------------------------

    def list(self, prefix: str) -> Iterator[Entry]:
        """Look into the folders below `prefix`.

        Folder by folder, since fsspec's own `find` and `walk` leave out what they fail to read.
        """
        for key, info in self._files(prefix.rpartition("/")[0], prefix):
            if not key.rpartition("/")[2].startswith(_TEMPORARY):
                size = info.get("size")
                yield Entry(key, self.size_bytes(key) if size is None else int(size), _modified_at(info))

    def _files(self, folder: str, prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for info in self._look(folder):
            path = str(info["name"]).rstrip("/")
            key = path.removeprefix(f"{self._root}/")
            if key in (path, folder) or not key.startswith(prefix):
                continue  # a folder names itself, where it is an object too or has nothing in it
            if info["type"] == "directory":
                yield from self._files(key, prefix)
            else:
                yield key, info

    def _look(self, folder: str) -> Sequence[Mapping[str, Any]]:
        """List one folder; one that isn't there holds nothing."""
        path = self._path(folder) if folder else self._root
        try:
            with self._failing("list", folder):
                self._fs.invalidate_cache()
                found: Sequence[Mapping[str, Any]] = self._fs.ls(path, detail=True)
        except NotFoundError:
            return ()
        return found

    def delete(self, key: str) -> None:
        """Remove an object, and the folders above it that are empty now where those can't be lost with something."""
        path = self._path(key)
        try:
            with self._failing("delete", key):
                self._fs.rm_file(path)
        except NotFoundError:
            return
        if self._manner.renames:
            with contextlib.suppress(*foreign_errors()):  # not empty, or gone
                while (path := path.rpartition("/")[0]) != self._root:
                    self._fs.rmdir(path)

    def sweep(self, prefix: str, older_than_s: float) -> Sequence[str]:
        """Remove temporary files; where objects appear whole, what is unfinished can't be seen through fsspec."""
        removed: list[str] = []
        before_s = time.time() - older_than_s
        folder = prefix.rpartition("/")[0]
        for key, info in self._files(folder, f"{folder}/" if folder else ""):
            if key.rpartition("/")[2].startswith(_TEMPORARY) and _modified_at(info) < before_s:
                self.delete(key)
                removed.append(f"temporary file {self.url}/{key}")
        return removed

    def hold(self, job: str, deadline_s: float) -> None:
        """Refuse: fsspec knows no locks."""
        del deadline_s
        raise RefusedError(f"{self.url} has no locks that could keep other agents from job {job}")

    def close(self) -> None:
        """Let go of the filesystem; its connections end with it, and it is part of a cycle."""
        self._fs = None
        gc.collect()


def _checked_scheme(url: str) -> str:
    """Return the scheme; refuse URLs that are no place, or that carry what must not be shown."""
    scheme, has_scheme, _ = url.partition("://")
    if not has_scheme or "::" in url:
        raise ConfigError(f"{url!r} is no URL of one filesystem", hint="write it like gs://bucket/runs, without ::")
    parts = urlsplit(url)
    if parts.password is not None or parts.query or parts.fragment:
        raise ConfigError(
            f"a {scheme}:// URL with credentials or a query can't be a store, since URLs are shown and logged",
            hint="give them as options of the store, or in the way that the filesystem's own documentation says",
        )
    return scheme


def _open_filesystem(url: str, options: dict[str, Any], secrets: Secrets) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs  # noqa: PLC0415 - 0.1 s, for those who use it
    except ImportError as error:
        raise PluginError(f"{url} needs fsspec", hint="pip install fsspec, and the package for that store") from error
    try:
        found, root = url_to_fs(url, **{"skip_instance_cache": True, "use_listings_cache": False, **options})
    except ImportError as error:
        raise PluginError(f"{url} needs a package: {error}", hint="install it where the agent runs") from error
    except _WRONG_OPTION + foreign_errors() as error:
        raise ConfigError(
            f"{url} can't be opened: {secrets.hidden(str(error))}", hint="check the options of that store"
        ) from error
    return found, str(root)


def _in_memory(data: Stream, pace: Pace | None) -> bytes:
    """Return a stream whole."""
    whole = memoryview(bytearray(data.size_bytes))
    for begin in range(0, data.size_bytes, _PIECE_BYTES):
        part = whole[begin : begin + _PIECE_BYTES]
        if pace is not None:
            pace(len(part))
        data.read_into(begin, part)
    return bytes(whole)


def _write(file: Any, data: Stream, pace: Pace | None) -> None:
    for begin in range(0, data.size_bytes, _PIECE_BYTES):
        end = min(begin + _PIECE_BYTES, data.size_bytes)
        if pace is not None:
            pace(end - begin)
        file.write(piece(data, begin, end))


def _abandon(file: Any) -> None:
    """Give up a file that is being written: closing it, as its own destructor does, would put what there is of it."""
    with contextlib.suppress(*foreign_errors()):
        file.discard()
    file.closed = True


def _modified_at(info: Mapping[str, Any]) -> float:
    """Return when an object was put; now where a filesystem does not say: nothing goes for an age that is unknown."""
    for name in ("mtime", "modified", "LastModified", "last_modified", "updated", "created"):
        value = info.get(name)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return time.time()


def open_fsspec(url: str, options: Mapping[str, Any] | None = None) -> FsspecTier:
    """Open what a URL names, with the options of its filesystem."""
    return FsspecTier(url, options)


def schemes() -> tuple[str, ...]:
    """Return what fsspec knows by itself, and what installed packages have registered with it.

    Plain paths, ``file`` and ``s3`` are not among them: the tiers of their own do more.
    """
    registered = {entry.name for entry in entry_points(group="fsspec.specs")}
    return tuple(sorted({*KNOWN, *registered} - {"file", "local", "s3", "s3a"}))


@hookimpl
def ckptd_tiers() -> list[TierFactory]:
    """Register every scheme that fsspec opens and no tier of our own does."""
    return [TierFactory("fsspec", schemes(), open_fsspec)]
