"""An independent look at what an agent has left: nothing of ckptd is asked, only JSON, safetensors and xxhash.

`inspect` reads a job's folder: every manifest must name whole files that hold exactly what training had at that step.
`Witness` follows the calls of an agent: nothing that a manifest names may be touched, and no manifest may go before a
newer one has come.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from safetensors import safe_open

from tests.crash.state import WORLD_SIZE, expected

Id = tuple[int, int]
_MANIFEST = re.compile(r"g(\d{6})/s(\d{12})/manifest\.json")
_RECORD = re.compile(r"g(\d{6})/generation\.json")
_MUTATING = {"pwrite", "pwritev", "write", "ftruncate", "truncate", "fallocate", "posix_fallocate"}
_GOING = {"unlink", "remove", "rename", "replace"}
_COMING = {"link", "rename", "replace"}


@dataclass
class Found:
    """What a job's folder holds."""

    needs: dict[Id, set[str]] = field(default_factory=dict)
    """What every committed checkpoint names, its manifest too, seen from the job's folder."""
    problems: list[str] = field(default_factory=list)
    garbage: list[str] = field(default_factory=list)
    """What no checkpoint needs, records of generations aside."""

    @property
    def newest(self) -> Id:
        """The newest committed checkpoint, (0, 0) if there is none."""
        return max(self.needs, default=(0, 0))


def inspect(job: Path) -> Found:
    """Read everything below a job's folder."""
    found = Found()
    there = [path for path in job.rglob("*") if job.exists()]
    names = {str(path.relative_to(job)) for path in there if not path.is_dir()}
    for name in sorted(names):
        match = _MANIFEST.fullmatch(name)
        if match is not None:
            key = (int(match[1]), int(match[2]))
            found.needs[key] = {name} | _check(job, name, key, found.problems)
        if _RECORD.fullmatch(name):
            record = json.loads((job / name).read_text())
            if name != f"g{record['generation']:06d}/generation.json":
                found.problems.append(f"{name} is that of generation {record['generation']}")
    needed = set().union(*found.needs.values()) if found.needs else set()
    found.garbage = sorted(name for name in names - needed if not _RECORD.fullmatch(name))
    found.garbage += [f"empty folder {path.relative_to(job)}" for path in there if path.is_dir() and _is_empty(path)]
    found.garbage += [str(path) for path in job.parent.glob(".*") if path.name.startswith(".tmp")]
    return found


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _check(job: Path, name: str, key: Id, problems: list[str]) -> set[str]:
    try:
        manifest = json.loads((job / name).read_bytes())
        return _check_parsed(job, name, key, manifest, problems)
    except (ValueError, KeyError, TypeError, OSError, IndexError) as error:
        problems.append(f"{name} can't be read: {type(error).__name__} {error}")
        return set()


def _check_parsed(job: Path, name: str, key: Id, manifest: Mapping[str, Any], problems: list[str]) -> set[str]:
    if (manifest["generation"], manifest["step"], manifest["complete"]) != (*key, True):
        problems.append(f"{name} says that it is generation {manifest['generation']}, step {manifest['step']}")
    folder = name.rpartition("/")[0]
    files = [f"{folder}/{shard['file'].rpartition('/')[2]}" for shard in manifest["shards"]]
    if [shard["rank"] for shard in manifest["shards"]] != list(range(WORLD_SIZE)):
        problems.append(f"{name} has not the shards of all ranks")
    for file, shard in zip(files, manifest["shards"], strict=True):
        problems += [f"{name}: {file}: {problem}" for problem in _check_shard(job / file, shard)]
    needed = set(files)
    for tensor, described in manifest["tensors"].items():
        for chunk in described["chunks"]:
            file = chunk.get("file") or files[chunk["shard"]]
            needed.add(file)
            data = _read(job / file, *chunk["byte_range"])
            digest = xxhash.xxh3_128_hexdigest(data)
            if digest != chunk["digest"]:
                problems.append(f"{name}: {tensor} in {file} is not what its digest says")
            wanted = expected(chunk["shard"], key[1]).get(tensor)
            if wanted is not None and digest != wanted:
                problems.append(f"{name}: {tensor} of rank {chunk['shard']} is not what training had at step {key[1]}")
    missing = set(expected(0, 0)) - set(manifest["tensors"])
    problems += [f"{name} lacks {tensor}" for tensor in sorted(missing)]
    return needed


def _check_shard(path: Path, shard: Mapping[str, Any]) -> list[str]:
    if not path.exists():
        return ["is missing"]
    found = []
    if path.stat().st_size != shard["size_bytes"]:
        found.append(f"has {path.stat().st_size} bytes, not {shard['size_bytes']}")
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:begin])
    with safe_open(path, "np") as opened:
        names = set(opened.keys())
    places = sorted((*entries[name]["data_offsets"], name) for name in names)
    digests = [xxhash.xxh3_128_digest(data[begin + first : begin + end]) for first, end, _ in places]
    whole = xxhash.xxh3_128(data[:begin])
    for digest in digests:
        whole.update(digest)
    if whole.hexdigest() != shard["digest"]:
        found.append("is not what its digest says")
    return found


def _read(path: Path, begin: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(begin)
        data = file.read(end - begin)
    if len(data) != end - begin:
        raise ValueError(f"{path} ends before byte {end}")
    return data


class Witness:
    """Follows what agents do to a job's folder, in the order in which they did it."""

    def __init__(self, job: Path, before: Found) -> None:
        self._job = str(job.resolve())
        self._needs = dict(before.needs)
        self._going: dict[str, tuple[Id, set[str]]] = {}
        """Manifests that are being removed, by name: they are there again when that fails."""
        self.problems: list[str] = []

    def follow(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take in the calls of one agent, as `calls` has noted them."""
        for line in lines:
            names = [self._name(path) for path in line["paths"]]
            call = line["call"]
            if line.get("begin") and call in _GOING and names[0] is not None:
                self._goes(names[0], call)
            if line.get("begin") and call in _MUTATING and names[0] is not None:
                self._is_unneeded(names[0], f"{call} to")
            if line.get("begin") and call in ("rename", "replace") and names[-1] is not None:
                self._is_unneeded(names[-1], "something is renamed over")
            if line.get("failed") and call in _GOING and names[0] in self._going:
                key, needed = self._going.pop(names[0])
                self._needs[key] = needed
            if line.get("done") and call in _COMING and names[-1] is not None:
                self._comes(names[-1])
            if line.get("done") and call in _GOING and names[0] is not None:
                self._going.pop(names[0], None)
        for name in [name for name in self._going if (Path(self._job) / name).exists()]:
            key, needed = self._going.pop(name)
            self._needs[key] = needed  # it was to go, and the agent was killed before

    def _name(self, path: str | None) -> str | None:
        prefix = f"{self._job}/"
        return path.removeprefix(prefix) if path is not None and path.startswith(prefix) else None

    def _is_unneeded(self, name: str, what: str) -> None:
        holders = [key for key, needed in self._needs.items() if name in needed]
        if holders:
            self.problems.append(f"{what} {name}, which {holders} needs")

    def _goes(self, name: str, call: str) -> None:
        match = _MANIFEST.fullmatch(name)
        if match is None:
            self._is_unneeded(name, f"{call} of")
            return
        key = (int(match[1]), int(match[2]))
        if key in self._needs:
            self._going[name] = (key, self._needs.pop(key))
        if max(self._needs, default=(0, 0)) < key:
            self.problems.append(f"the manifest of {key} goes, and nothing newer is committed")

    def _comes(self, name: str) -> None:
        match = _MANIFEST.fullmatch(name)
        if match is None:
            return
        key = (int(match[1]), int(match[2]))
        self._needs[key] = {name}
        try:
            manifest = json.loads((Path(self._job) / name).read_text())
        except FileNotFoundError:  # pruned since: what it needed is not known any more
            return
        folder = name.rpartition("/")[0]
        self._needs[key] |= {f"{folder}/{shard['file'].rpartition('/')[2]}" for shard in manifest["shards"]}
        for tensor in manifest["tensors"].values():
            self._needs[key] |= {chunk["file"] for chunk in tensor["chunks"] if chunk.get("file")}

    @property
    def committed(self) -> list[Id]:
        """What is committed now, as far as the calls tell."""
        return sorted(self._needs)


def lines_of(log: Path) -> list[dict[str, Any]]:
    """Read the calls that an agent has noted; the last line of a killed one may be torn."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
