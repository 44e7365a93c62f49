"""What a manifest says about the bytes of each file, cut into pieces that can be read and checked one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ckptd.errors import DamagedError
from ckptd.storage import image
from ckptd.storage.digest import combine, digest, shard_digest
from ckptd.storage.manifest import RANK, Chunk, Manifest, Shard, StoredTensor
from ckptd.storage.ranges import leaves
from ckptd.types import Piece, TensorSpan

_NO_BYTES = digest(b"")
_GAP_BYTES = 64 * 2**10
"""A gap that is read rather than skipped: reading it costs less than a request of its own."""
_Named = tuple[Chunk, StoredTensor]


class Check(NamedTuple):
    """A range of a file that has a digest: a leaf of a tensor, or the header."""

    begin: int
    end: int
    digest: str
    tensor: str | None
    """None for the header."""
    followed_by: Sequence[str] = ()
    """The digests that are digested behind the bytes: a header's digest is that of the whole shard."""

    def holds(self, data: memoryview) -> bool:
        """Whether `data` is what was stored in the range."""
        found = digest(data) if self.tensor is not None else shard_digest(bytes(data), self.followed_by)
        return found == self.digest


@dataclass(frozen=True, slots=True)
class FileChecks:
    """What a manifest says about one file that it needs."""

    file: str
    """Seen from the job's folder."""
    size_bytes: int | None
    """None for a file of another checkpoint, of which only the end of what is needed is known."""
    checks: tuple[Check, ...]
    """In rising order; no two share a byte. Together they are all of a file of the checkpoint's own."""
    spans: tuple[TensorSpan, ...] | None
    """What its header has to list; None when that is not to be looked at."""
    faults: tuple[str, ...]
    """Where the manifest contradicts itself about this file."""
    tensors: tuple[str, ...]
    """What is lost with the file."""

    def size_problem(self, size_bytes: int) -> str | None:
        """Say what is wrong with a copy of that size, if anything is."""
        if self.size_bytes is not None and size_bytes != self.size_bytes:
            return f"{size_bytes} bytes where the manifest says {self.size_bytes}"
        return next(lost_beyond(self, size_bytes), None)

    def refuse_contradictions(self, where: str) -> None:
        """Raise `DamagedError` when the manifest can't vouch for this file."""
        if self.faults:
            raise DamagedError(
                f"the manifest can't vouch for {where}: {self.faults[0]}",
                hint="the manifest itself is damaged: another tier may have a good one",
            )


class Unit(NamedTuple):
    """A piece of a file that is read at once."""

    begin: int
    end: int
    checks: Sequence[Check]
    """Those of which all bytes lie in it; no check lies across its ends."""


def checks_of(loaded: Manifest, *, headers: bool) -> dict[str, FileChecks]:
    """Return by file what a manifest says, of every file that it needs.

    With `headers` the header of each of its own files has to list the same tensors as the manifest. That finds a
    manifest in which a name or a dtype has changed, which no digest covers; it costs a parse of every header.
    """
    needed: dict[str, list[_Named]] = {shard.file: [] for shard in loaded.shards}
    for tensor in loaded.tensors.values():
        for chunk in tensor.chunks:
            needed.setdefault(chunk.file, []).append((chunk, tensor))
    shards = {shard.file: shard for shard in loaded.shards}
    return {file: _file_checks(file, chunks, shards.get(file), headers=headers) for file, chunks in needed.items()}


def _file_checks(file: str, chunks: list[_Named], shard: Shard | None, *, headers: bool) -> FileChecks:
    chunks.sort(key=lambda item: (item[0].begin, item[0].end))
    faults: list[str] = []
    checks: list[Check] = []
    spans: tuple[TensorSpan, ...] | None = None
    if shard is not None:
        own = [item for item in chunks if item[0].shard == shard.rank]
        digests = [chunk.digest for chunk, _ in own if chunk.digest is not None]
        if not _lie_side_by_side([chunk for chunk, _ in own], shard.size_bytes):
            faults.append("the manifest does not say what all its bytes are")
        elif shard.digest is not None and len(digests) == len(own):
            header_bytes = own[0][0].begin
            checks.append(Check(0, header_bytes, shard.digest, None, digests))
            spans = tuple(_span(chunk, tensor) for chunk, tensor in own) if headers else None
        else:
            faults.append("the manifest has no digest of it")
    for chunk, tensor in chunks:
        if chunk.leaves and combine(chunk.leaves) != chunk.digest:
            faults.append(f"the manifest's digests of tensor {tensor.name!r} contradict each other")
        for begin, end, value in leaves(chunk):
            _add(Check(begin, end, value or "", tensor.name), checks, faults)
    return FileChecks(
        file,
        None if shard is None else shard.size_bytes,
        tuple(checks),
        spans,
        tuple(dict.fromkeys(faults)),
        tuple(sorted({tensor.name for _, tensor in chunks} - {image.VALUES_NAME})),
    )


def _add(check: Check, checks: list[Check], faults: list[str]) -> None:
    if check.begin == check.end:
        if check.digest != _NO_BYTES:
            faults.append(f"{_subject(check)} has no bytes and the digest of some")
    elif not checks or check.begin >= checks[-1].end:
        checks.append(check)
    elif check[:3] != checks[-1][:3]:  # equal tensors are stored once, and named several times
        faults.append(f"the manifest says two things about bytes of {_subject(check)}")


def _lie_side_by_side(own: Sequence[Chunk], end: int) -> bool:
    begins = [chunk.begin for chunk in own]
    return bool(own) and [chunk.end for chunk in own] == [*begins[1:], end]


def _span(chunk: Chunk, tensor: StoredTensor) -> TensorSpan:
    piece = None if tensor.placement == RANK else Piece(tensor.name, tensor.shape or (), chunk.offset)
    return TensorSpan(chunk.entry, chunk.dtype, chunk.shape, chunk.begin, chunk.end, piece)


def units(checks: FileChecks, size_bytes: int, unit_bytes: int, *, gaps: bool) -> list[Unit]:
    """Cut a file into units of up to `unit_bytes`, which is a leaf at least; without `gaps` only what has checks.

    A header that is longer than that is a unit by itself.
    """
    found: list[Unit] = []
    group: list[Check] = []
    first = last = 0
    for begin, end, check in _segments(checks, size_bytes, unit_bytes, gaps=gaps):
        if last > first and (end - first > unit_bytes or begin > last + _GAP_BYTES):
            found.append(Unit(first, last, tuple(group)))
            group, first, last = [], begin, begin
        if last == first:
            first = begin
        if check is not None:
            group.append(check)
        last = end
    if last > first:
        found.append(Unit(first, last, tuple(group)))
    return found


def _segments(
    checks: FileChecks, size_bytes: int, unit_bytes: int, *, gaps: bool
) -> Iterator[tuple[int, int, Check | None]]:
    at = 0
    for check in checks.checks:
        if check.end > size_bytes:
            break
        if gaps:
            yield from _gap(at, check.begin, unit_bytes)
        yield check.begin, check.end, check
        at = check.end
    if gaps:
        yield from _gap(at, size_bytes, unit_bytes)


def _gap(begin: int, end: int, unit_bytes: int) -> Iterator[tuple[int, int, None]]:
    for at in range(begin, end, unit_bytes):
        yield at, min(at + unit_bytes, end), None


def problems(unit: Unit, data: memoryview, spans: Sequence[TensorSpan] | None, file_bytes: int) -> Iterator[str]:
    """Yield what is wrong with the bytes of a unit; each tensor may be named once for each of its leaves."""
    for check in unit.checks:
        part = data[check.begin - unit.begin : check.end - unit.begin]
        if not check.holds(part):
            yield f"{_subject(check)} is not what was committed (its digest differs)"
        elif check.tensor is None and spans is not None:
            yield from _header_problems(bytes(part), spans, file_bytes)


def _header_problems(header: bytes, spans: Sequence[TensorSpan], file_bytes: int) -> Iterator[str]:
    """Yield why a header that is what was stored does not make the file one that the manifest describes."""
    try:
        if image.header_bytes(header) != len(header):
            yield "its header does not end where its tensors begin"
            return
        listed = image.parse_header(header, file_bytes)
    except DamagedError as error:
        yield f"it is no safetensors file: {error.message}"
        return
    if listed.image_bytes != file_bytes:
        yield "its header does not say what all its bytes are"
    of_header = {span.name: span for span in listed.spans}
    of_manifest = {span.name: span for span in spans}
    differing = [name for name in {**of_header, **of_manifest} if of_header.get(name) != of_manifest.get(name)]
    if differing:
        yield f"its header and the manifest disagree about {_names(differing)}"


def lost_beyond(checks: FileChecks, size_bytes: int) -> Iterator[str]:
    """Yield what a file lacks that ends too early, each tensor once."""
    for subject in dict.fromkeys(_subject(check) for check in checks.checks if check.end > size_bytes):
        yield f"{size_bytes} bytes, which is too short for {subject}"


def what_is_lost(checks: FileChecks) -> str:
    """Return in words which tensors are gone with a file."""
    return f"tensor {checks.tensors[0]!r}" if len(checks.tensors) == 1 else f"{len(checks.tensors)} tensors"


def _names(names: Iterable[str]) -> str:
    first, *others = names
    return f"tensor {first!r}" + (f" and {len(others)} more" if others else "")


def _subject(check: Check | None) -> str:
    return "its header" if check is None or check.tensor is None else f"tensor {check.tensor!r}"
