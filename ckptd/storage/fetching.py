"""Checkpoints brought back to a tier, and mended on one: file by file, from whichever tier has a good copy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ckptd.errors import CkptdError, DamagedError, NotFoundError, RefusedError, StoreError
from ckptd.storage import catalog, flight, keys
from ckptd.storage.checks import FileChecks, checks_of
from ckptd.storage.copying import FILES_AT_ONCE, commit
from ckptd.storage.file_stream import Progress, TierStream, examine, within
from ckptd.storage.manifest import Manifest
from ckptd.storage.tier import Pace, Report, Tier
from ckptd.types import CheckpointId

STALL_S = 60.0
"""How long a source may take to answer one request before another copy is tried."""
_PATIENCE = 10
"""So many times longer the last source may take: there is no other to turn to, and slow is better than nothing."""
_MISSING = "the file is missing"


@dataclass(frozen=True, slots=True)
class Fetched:
    """Where each file of a checkpoint came from."""

    origins: Mapping[str, str]
    """The tier's name by file as seen from the job's folder; the target's own for what was kept."""
    size_bytes: int
    """How much was copied."""


@dataclass(frozen=True, slots=True)
class Repair:
    """A file of a checkpoint that was damaged."""

    file: str
    """Seen from the job's folder."""
    problems: tuple[str, ...]
    source: str | None
    """The tier that had a good copy; None when none has, and the file is as it was."""
    error: str | None
    """Why there is no good copy, in words."""


def _silent(event: str, fields: Mapping[str, Any]) -> None:
    del event, fields


@dataclass(frozen=True, slots=True)
class _Version:
    """A manifest of a checkpoint; all tiers have the same, unless one is damaged."""

    document: bytes
    loaded: Manifest
    tiers: tuple[str, ...]
    """The names of those that have it."""


@dataclass(frozen=True, slots=True)
class _Errand:
    """Bringing files of a checkpoint to a tier from others."""

    target: Tier
    job: str
    checkpoint: CheckpointId
    sources: Sequence[Tier]
    """Cheapest first."""
    threads: int
    stall_s: float | None
    pace: Pace | None
    progress: Progress | None
    report: Report
    failures: dict[int, int] = field(default_factory=dict)
    """How often each source, by its place, could not be read: those that fail are asked last."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def versions(self) -> tuple[list[_Version], bytes | None]:
        """Return every manifest that can be used, and the target's own bytes: None if it has none, b"" if unreadable.

        When there is none, raises what went wrong, and `NotFoundError` if nothing did: it has gone from everywhere.
        """
        key = keys.manifest_key(self.job, self.checkpoint)
        holders: dict[bytes, list[str]] = {}
        errors: list[CkptdError] = []
        own: bytes | None = None
        try:
            own = self.target.get(key)
            holders[own] = [self.target.name]
        except NotFoundError:
            pass
        except CkptdError as error:
            own = b""
            errors.append(error)
        for place, source in enumerate(self.sources):
            try:
                document = within(self.stall_s, f"{source.url}/{key}", partial(source.get, key))
                holders.setdefault(document, []).append(source.name)
            except NotFoundError:
                continue
            except CkptdError as error:
                self._note_failure(place, keys.MANIFEST, error)
                errors.append(error)
        versions = []
        for document, names in holders.items():
            try:
                loaded = catalog.parse_manifest(document, f"{key} on {', '.join(names)}", self.job, self.checkpoint)
            except DamagedError as error:
                self.report("manifest damaged", {"error": error.message})
                errors.append(error)
            else:
                versions.append(_Version(document, loaded, tuple(names)))
        if not versions:
            raise errors[0] if errors else self._gone()
        return versions, own

    def _gone(self) -> NotFoundError:
        names = ", ".join(dict.fromkeys(tier.name for tier in (self.target, *self.sources)))
        return NotFoundError(
            f"{self.checkpoint} of job {self.job} is on none of {names}: it was pruned, or never there",
            hint="does another agent run the job? `ckptctl ls` lists what there is now",
        )

    def damage(self, checks: FileChecks) -> list[str]:
        """Return what is wrong with the target's own copy; that it is missing or can't be read is damage too."""
        try:
            return examine(self.target, f"{self.job}/{checks.file}", checks, pace=self.pace)
        except NotFoundError:
            return [_MISSING]
        except (DamagedError, StoreError) as error:
            return [error.message]

    def replace(self, checks: FileChecks) -> tuple[Tier, int] | CkptdError:
        """Put a file on the target from the first source whose copy is good; return that source and the size.

        Returns a `DamagedError` when there is no good copy, and a `StoreError` when one may be where nothing can be
        read now. What goes wrong with the target is raised.
        """
        errors: list[CkptdError] = []
        key = f"{self.job}/{checks.file}"
        with self.lock:
            places = sorted(range(len(self.sources)), key=lambda place: self.failures.get(place, 0))
        for place in places:
            source = self.sources[place]
            stall_s = self.stall_s if self.stall_s is None or place != places[-1] else self.stall_s * _PATIENCE
            stream: TierStream | None = None
            try:
                size_bytes = within(stall_s, f"{source.url}/{key}", partial(source.size_bytes, key))
                stream = TierStream(source, key, size_bytes, checks, stall_s=stall_s, progress=self.progress)
                self.target.put(key, stream, pace=self.pace)
            except CkptdError as error:
                if stream is not None and stream.failure is None:
                    raise
                self._note_failure(place, checks.file, error)
                errors.append(error)
            else:
                self.report("file fetched", {"tier": source.name, "file": checks.file, "size_bytes": size_bytes})
                return source, size_bytes
        return _no_good_copy(f"{self.target.url}/{key}", errors)

    def _note_failure(self, place: int, file: str, error: CkptdError) -> None:
        self.report("copy unusable", {"tier": self.sources[place].name, "file": file, "error": error.message})
        if isinstance(error, StoreError):
            with self.lock:
                self.failures[place] = self.failures.get(place, 0) + 1

    def put_manifest(self, version: _Version, own: bytes | None) -> None:
        """Have the manifest on the target, in the place of a damaged one too."""
        if own is None:
            commit(self.target, self.job, self.checkpoint, version.document)
        elif own != version.document:
            self.target.put(keys.manifest_key(self.job, self.checkpoint), version.document)


def _no_good_copy(where: str, errors: Sequence[CkptdError]) -> CkptdError:
    reasons = "; ".join(error.message for error in errors) or "no other tier is known"
    message = f"no good copy to make {where} from: {reasons}"
    if any(isinstance(error, StoreError) and error.retryable for error in errors):
        return StoreError(message, hint="try again when every store answers")
    if any(isinstance(error, StoreError) for error in errors):
        return RefusedError(message, hint="a good copy may be where we are not let in: look at the credentials")
    return DamagedError(message, hint="another step may be intact: `ckptctl ls` lists what there is")


def _settle(versions: Sequence[_Version], fits: Callable[[_Version], bool]) -> _Version | None:
    """Return the manifest that all files agree with, None when there is none.

    When tiers differ, more of them are right. When as many have one as another, the files decide; where those agree
    with both, the difference is in what no file tells (the name of a tensor, a metric), and nobody can know.
    """
    for copies in sorted({len(version.tiers) for version in versions}, reverse=True):
        fitting = [version for version in versions if len(version.tiers) == copies and fits(version)]
        if len(fitting) > 1:
            raise DamagedError(
                f"tiers have different manifests of {fitting[0].loaded.job} {fitting[0].loaded.id}, and each fits",
                hint="compare them, and remove or replace the one that is wrong",
            )
        if fitting:
            return fitting[0]
    return None


def fetch(
    sources: Sequence[Tier],
    target: Tier,
    job: str,
    checkpoint: CheckpointId,
    *,
    threads: int = FILES_AT_ONCE,
    stall_s: float | None = STALL_S,
    pace: Pace | None = None,
    progress: Progress | None = None,
    report: Report = _silent,
) -> Fetched:
    """Have a checkpoint on the target, every byte of it checked; return where each of its files came from.

    A file that is there and intact stays, which is read to know that. What is missing or damaged comes from the
    cheapest source that has a good copy; one that does not answer for `stall_s` is none. Its manifest is put last.

    Raises `NotFoundError` when no tier has the checkpoint, `DamagedError` when a part of it is good nowhere, and a
    `StoreError` when a good copy may be where nothing can be read now. Nothing is committed on the target then.
    """
    errand = _Errand(target, job, checkpoint, _cheapest_first(sources), threads, stall_s, pace, progress, report)
    versions, own = errand.versions()
    fetched: dict[bytes, Fetched] = {}
    errors: list[CkptdError] = []

    def fits(version: _Version) -> bool:
        try:
            fetched[version.document] = _bring(errand, version.loaded)
        except (DamagedError, StoreError) as error:
            errors.append(error)
            return False
        return True

    version = _settle(versions, fits)
    if version is None:
        raise errors[0]
    errand.put_manifest(version, own)
    return fetched[version.document]


def _cheapest_first(sources: Sequence[Tier]) -> Sequence[Tier]:
    return sorted(sources, key=lambda tier: tier.capabilities.cost)


def _bring(errand: _Errand, loaded: Manifest) -> Fetched:
    origins: dict[str, str] = {}
    copied: list[int] = []

    def bring(checks: FileChecks) -> None:
        found = errand.damage(checks)
        if not found:
            origins[checks.file] = errand.target.name
            return
        if found[0] == _MISSING:
            errand.report("file wanted", {"tier": errand.target.name, "file": checks.file})
        else:
            errand.report("file damaged", {"tier": errand.target.name, "file": checks.file, "error": found[0]})
        came = errand.replace(checks)
        if isinstance(came, CkptdError):
            raise came
        source, size_bytes = came
        origins[checks.file] = source.name
        copied.append(size_bytes)

    flight.run(checks_of(loaded, headers=True).values(), lambda: bring, errand.threads)
    return Fetched(origins, sum(copied))


def repair(
    tier: Tier,
    others: Sequence[Tier],
    job: str,
    checkpoint: CheckpointId,
    *,
    threads: int = FILES_AT_ONCE,
    stall_s: float | None = STALL_S,
    pace: Pace | None = None,
    progress: Progress | None = None,
    report: Report = _silent,
) -> list[Repair]:
    """Replace what is damaged of a checkpoint on a tier, and nothing else; return what that was, and what came of it.

    An empty list means that it is intact. Raises `NotFoundError` when it is not committed on that tier, and what goes
    wrong when something is put there; that a file has no good copy anywhere is said in the list.
    """
    errand = _Errand(tier, job, checkpoint, _cheapest_first(others), threads, stall_s, pace, progress, report)
    versions, own = errand.versions()
    if own is None:
        raise NotFoundError(
            f"{job} {checkpoint} is not committed on {tier.url}", hint="fetch or upload it: another tier has it"
        )
    found: dict[bytes, list[Repair]] = {}

    def fits(version: _Version) -> bool:
        found[version.document] = _mend(errand, version.loaded)
        return all(item.error is None for item in found[version.document])

    version = _settle(versions, fits)
    if version is None:
        return found[max(versions, key=lambda item: len(item.tiers)).document]
    repairs = [item for each in found.values() for item in each if item.error is None]
    if own != version.document:
        errand.put_manifest(version, own)
        file = keys.folder(checkpoint) + keys.MANIFEST
        repairs.append(Repair(file, ("the manifest is not what was committed",), version.tiers[0], None))
    return repairs


def _mend(errand: _Errand, loaded: Manifest) -> list[Repair]:
    repairs: list[Repair] = []

    def mend(checks: FileChecks) -> None:
        found = errand.damage(checks)
        if not found:
            return
        came = errand.replace(checks)
        source, error = (None, came.message) if isinstance(came, CkptdError) else (came[0].name, None)
        repairs.append(Repair(checks.file, tuple(found), source, error))

    flight.run(checks_of(loaded, headers=True).values(), lambda: mend, errand.threads)
    return sorted(repairs, key=lambda item: item.file)
