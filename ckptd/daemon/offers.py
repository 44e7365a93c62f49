"""What a generation begins with, as its ranks get it: a manifest, and descriptors of the files that it names.

The ranks of a node restore from each other's slots and from one another's files, each just the parts that it needs. So
nothing is brought anywhere first: they are lent what there is, to read only.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

from ckptd.core.restore import Source
from ckptd.daemon.job_store import JobStore
from ckptd.errors import DamagedError, NotFoundError, StoreError

_FILES_HINT = "raise the limit of open files"


class Offer(ABC):
    """A checkpoint or snapshot that is offered to one generation. Has to be closed."""

    def __init__(self, source: Source, document: bytes, files: Collection[str]) -> None:
        """Take over the manifest's bytes and the names of the files that may be opened."""
        self.source = source
        self._files = frozenset(files)
        self._manifest = _readable_memory(f"ckptd-manifest-{source.id.step}", document)

    def manifest(self) -> int:
        """Return a descriptor of the manifest, with a position of its own; the caller closes it."""
        return read_only(self._manifest)

    def check(self, files: Sequence[str]) -> None:
        """Refuse what is no part of this offer; raises `NotFoundError` naming it."""
        for file in files:
            if file not in self._files:
                raise NotFoundError(f"{file!r} is no file of {self.source}, which is offered")

    def open(self, files: Sequence[str]) -> list[int]:
        """Return descriptors of `files`, in their order; the caller closes them. May block."""
        self.check(files)
        opened: list[int] = []
        try:
            opened.extend(map(self._open, files))
        except BaseException:
            close_all(opened)
            raise
        return opened

    @abstractmethod
    def _open(self, file: str) -> int:
        """Return a descriptor of a file of this offer."""

    def close(self) -> None:
        """Let go of everything; what ranks were lent stays theirs."""
        os.close(self._manifest)


class SlotOffer(Offer):
    """A snapshot in memory: its files are the slots of all ranks."""

    def __init__(self, source: Source, document: bytes, slots: Mapping[str, int]) -> None:
        """Offer what the descriptors in `slots` hold, by file, and take them over."""
        super().__init__(source, document, slots)
        self._slots = slots

    def _open(self, file: str) -> int:
        return read_only(self._slots[file])

    def close(self) -> None:
        """Let go of the slots as well."""
        super().close()
        close_all(self._slots.values())


class StoredOffer(Offer):
    """A checkpoint on a tier."""

    def __init__(self, source: Source, document: bytes, files: Collection[str], store: JobStore) -> None:
        """Offer `files` of `store`."""
        super().__init__(source, document, files)
        self._store = store

    def _open(self, file: str) -> int:
        try:
            return self._store.open(file)
        except NotFoundError as error:
            raise DamagedError(f"a file of {self.source} is gone: {error.message}", hint=error.hint) from error


def read_only(descriptor: int) -> int:
    """Return another descriptor of the same memory or file that can't write, with a position of its own.

    Raises `StoreError` when this process has no descriptor left.
    """
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"can't lend what is offered: {error.strerror}", hint=_FILES_HINT) from error


def _readable_memory(name: str, content: bytes) -> int:
    try:
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    except OSError as error:
        raise StoreError(f"can't lend a manifest: {error.strerror}", hint=_FILES_HINT) from error
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError as error:
        os.close(descriptor)
        raise StoreError(f"can't lend a manifest of {len(content)} bytes: {error.strerror}") from error
    return descriptor


def close_all(descriptors: Collection[int]) -> None:
    """Close every one of them."""
    for descriptor in descriptors:
        os.close(descriptor)
