"""The conformance suite of formats that checkpoints are exported to and imported from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import TypeVar

from ckptd.errors import CkptdError, ConfigError, DamagedError, NotFoundError
from ckptd.plugin import FormatSpec
from ckptd.plugin.formats import Formats
from ckptd.storage import catalog, image, keys, manifest
from ckptd.storage.boxes import Shape
from ckptd.storage.export import Exported, export
from ckptd.storage.image import ITEM_BYTES, TensorSpec
from ckptd.storage.importing import Importer, bring_in
from ckptd.storage.memory import MemoryTier
from ckptd.storage.stream import Stream
from ckptd.testing.expecting import expecting, only_if
from ckptd.testing.working import at_once, pattern, raise_first
from ckptd.types import CheckpointId, Piece

_JOB, _AT = "conformance", CheckpointId(1, 7)
_RANKS = 2
_STATES: Mapping[str, Mapping[str, tuple[str, Shape]]] = {
    "model": {
        "weight": ("F32", (6, 10)),
        "half": ("BF16", (5,)),
        "flags": ("BOOL", (9,)),
        "scalar": ("F64", ()),
        "nothing": ("F32", (0, 3)),
        "large": ("U8", (3, 3_000_001)),
    },
    "moments": {"first": ("F32", (6, 10)), "step": ("I64", (1,))},
}
_CUT = frozenset({"model.weight", "moments.first"})
"""Tensors of which each rank has some columns; all ranks have the others alike."""
Result = TypeVar("Result")
Content = tuple[str, Shape, bytes]


class FormatSuite:
    """The contract of `ckptd.storage.export.Exporter` and `ckptd.storage.importing.Importer`.

    Subclass it and give it a `spec` fixture, the `FormatSpec`. A format that reads what is no tensor should override
    `values`. What the format can't do is not asked of it; one that can't export is not asked for imports either.
    """

    def values(self, states: Mapping[str, Mapping[str, str]]) -> bytes:
        """Return the values of a checkpoint as its framework writes them.

        Each of `states` is a dict of tensors: by key, the name of the tensor in the checkpoint.
        """
        return repr(sorted(states)).encode()

    def test_describes_itself(self, spec: FormatSpec) -> None:
        """Its name is one word, it says what it is, and can do something."""
        assert spec.name
        assert not any(character.isspace() for character in spec.name)
        assert spec.about.strip()
        assert spec.exporter or spec.importer, "it can do nothing"
        assert spec.exporter or not spec.splits, "what does not export can't split files"

    def test_exports_into_its_folder(self, spec: FormatSpec, tmp_path: Path) -> None:
        """An export is files in the folder that was given; nothing lies beside it, and the store is as it was."""
        tier = self._committed()
        before = {entry.key: tier.get(entry.key) for entry in tier.list("")}
        written = self._export(spec, tier, tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {"out"}
        assert len(written.files) > 1, "there is no file but the description"
        assert written.tensors > 0
        assert all(len(note.splitlines()) == 1 for note in written.notes), "a note is a line"
        assert {entry.key: tier.get(entry.key) for entry in tier.list("")} == before, "the store was changed"

    def test_exports_nothing_damaged(self, spec: FormatSpec, tmp_path: Path) -> None:
        """A changed byte of any tensor, and a shard that is missing, are errors; then there is no export."""
        for name in _contents():
            tier = self._committed()
            chunk = catalog.load_manifest(tier, _JOB, _AT).tensors[name].chunks[0]
            if chunk.begin < chunk.end:
                data = bytearray(tier.get(f"{_JOB}/{chunk.file}"))
                data[chunk.end - 1] ^= 1
                tier.put(f"{_JOB}/{chunk.file}", bytes(data))
                with expecting(DamagedError, f"{name} is damaged"):
                    self._export(spec, tier, tmp_path / "out")
        tier = self._committed()
        tier.delete(keys.shard_key(_JOB, _AT, 1))
        with expecting(NotFoundError, "a shard is missing"):
            self._export(spec, tier, tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_closes_what_it_opens(self, spec: FormatSpec, tmp_path: Path) -> None:
        """No file is open any more when an export, or the context of an import, is over."""
        tier = self._committed()
        self._export(spec, tier, tmp_path / "first")  # libraries open what they need
        if spec.importer:
            _found(spec, tmp_path / "first")
        before = _open_files()
        self._export(spec, tier, tmp_path / "second")
        if spec.importer:
            _found(spec, tmp_path / "second")
        assert _open_files() == before, "files are left open"

    def test_imports_what_it_exported(self, spec: FormatSpec, tmp_path: Path) -> None:
        """Every tensor is whole again, byte for byte, under all states, and what was read is as it was."""
        folder = self._exported(spec, tmp_path)
        before = _bytes_below(folder)
        with _importer(spec)(folder, {}) as cargo:
            assert sorted(cargo.states) == sorted(_STATES)
            assert cargo.step in (None, _AT.step)
        assert _bytes_below(folder) == before, "what was imported was changed"
        assert _found(spec, folder) == sorted(_contents().values())

    def test_imports_a_group_under_a_name(self, spec: FormatSpec, tmp_path: Path) -> None:
        """Only the group that is named comes, as the state that was wished for; one that is not there is refused."""
        folder = self._exported(spec, tmp_path)
        with _importer(spec)(folder, {"net": "moments"}) as cargo:
            assert cargo.states == ("net",)
        wanted = [content for name, content in _contents().items() if name.startswith("moments.")]
        assert _found(spec, folder, {"net": "moments"}) == sorted(wanted)
        with expecting(ConfigError, "there is no such group") as caught, _importer(spec)(folder, {"net": "absent"}):
            pass
        _check_error(caught.error)

    def test_streams_can_be_read_anywhere(self, spec: FormatSpec, tmp_path: Path) -> None:
        """A tensor's bytes are the same in whatever order, and by how many threads, they are read."""
        folder = self._exported(spec, tmp_path)
        with _importer(spec)(folder, {}) as cargo:
            wholes = [_read(tensor.data, 0, tensor.data.size_bytes) for tensor in cargo.tensors]

            def read(number: int) -> None:
                """Read all tensors in parts, beginning with another one than other threads do."""
                for at in range(len(wholes)):
                    index = (at + number) % len(wholes)
                    data, size = wholes[index], len(wholes[index])
                    for begin in reversed(range(0, size, size // 3 + 1)):
                        end = min(begin + size // 3 + 1, size)
                        assert _read(cargo.tensors[index].data, begin, end) == data[begin:end], f"bytes from {begin}"

            raise_first(at_once(3, read))

    def test_refuses_what_it_can_not_read(self, spec: FormatSpec, tmp_path: Path) -> None:
        """Nothing, an empty folder, and files that were cut or overwritten are errors of a line, or change nothing."""
        folder = self._exported(spec, tmp_path)
        (tmp_path / "empty").mkdir()
        for place in (tmp_path / "absent", tmp_path / "empty"):
            with expecting(CkptdError, f"{place.name} holds nothing") as caught, _importer(spec)(place, {}):
                pass
            _check_error(caught.error)
        wanted = sorted(_contents().values())
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            whole = path.read_bytes()
            for torn in (b"", whole[:5], whole[: len(whole) // 2], whole[:-1], b"\xff" * len(whole)):
                path.write_bytes(torn)
                try:
                    found = _found(spec, folder)
                except CkptdError as error:
                    _check_error(error)
                else:
                    assert found == wanted, f"{path.name} was cut to {len(torn)} of {len(whole)} bytes"
            path.write_bytes(whole)

    def _committed(self) -> MemoryTier:
        """Return a tier with a checkpoint of two ranks."""
        tier = MemoryTier()
        catalog.claim_generation(tier, _JOB, _AT.generation, None, 0.0)
        values = self.values({state: {key: f"{state}.{key}" for key in held} for state, held in _STATES.items()})
        shards = []
        for rank in range(_RANKS):
            parts = {name: _part(name, content, rank) for name, content in _contents().items()}
            layout = image.plan([spec for spec, _ in parts.values()], len(values), {})
            data = memoryview(bytearray(layout.image_bytes))
            data[: len(layout.header)] = layout.header
            for span in layout.spans[:-1]:
                data[span.begin : span.end] = parts[span.name][1]
            image.write_values(data, layout.values, values)
            tier.put(keys.shard_key(_JOB, _AT, rank), data)
            shards.append(catalog.describe_shard(rank, data))
        document = manifest.build(_JOB, _AT, None, shards, created_at=1.0, values={"loss": 0.5})
        tier.put(keys.manifest_key(_JOB, _AT), manifest.encode(document))
        return tier

    def _export(self, spec: FormatSpec, tier: MemoryTier, to: Path) -> Exported:
        only_if(bool(spec.exporter), f"format {spec.name} does not export")
        return export(Formats([spec], _call).exporter(spec.name), tier, _JOB, _AT, to)

    def _exported(self, spec: FormatSpec, tmp_path: Path) -> Path:
        only_if(bool(spec.importer), f"format {spec.name} does not import")
        self._export(spec, self._committed(), tmp_path / "out")
        return tmp_path / "out"


def _call(name: str, function: Callable[..., Result], *arguments: object) -> Result:
    """Call a format's target; its faults are shown as they are."""
    assert name
    return function(*arguments)


def _importer(spec: FormatSpec) -> Importer:
    return Formats([spec], _call).importer(spec.name)


def _found(spec: FormatSpec, place: Path, names: Mapping[str, str] | None = None) -> list[Content]:
    """Import what lies at `place` into a new store; return all its tensors."""
    tier = MemoryTier()
    with _importer(spec)(place, names or {}) as cargo:
        done = bring_in(cargo, tier, _JOB, _AT.step)
    assert not catalog.verify(tier, _JOB, done.id), "the checkpoint that was made is not intact"
    tensors = catalog.load_manifest(tier, _JOB, done.id).tensors
    data = tier.get(keys.shard_key(_JOB, done.id, 0))
    return sorted(
        (tensor.chunks[0].dtype, tensor.chunks[0].shape, data[tensor.chunks[0].begin : tensor.chunks[0].end])
        for name, tensor in tensors.items()
        if name != image.VALUES_NAME
    )


@cache
def _contents() -> Mapping[str, Content]:
    """Return the checkpoint's tensors, whole."""
    found: dict[str, Content] = {}
    for state, held in _STATES.items():
        for key, (dtype, shape) in held.items():
            data = pattern(ITEM_BYTES[dtype] * prod(shape), seed=len(found))
            found[f"{state}.{key}"] = dtype, shape, bytes(byte & 1 for byte in data) if dtype == "BOOL" else data
    return found


def _part(name: str, content: Content, rank: int) -> tuple[TensorSpec, bytes]:
    """Return what a rank has of a tensor."""
    dtype, shape, data = content
    if name not in _CUT:
        return TensorSpec(name, dtype, shape), data
    rows, columns = shape
    begin, end = (0, 4) if rank == 0 else (4, columns)
    size = ITEM_BYTES[dtype]
    own = b"".join(data[(row * columns + begin) * size : (row * columns + end) * size] for row in range(rows))
    return TensorSpec(name, dtype, (rows, end - begin), Piece(name, shape, (0, begin))), own


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _read(data: Stream, begin: int, end: int) -> bytes:
    into = memoryview(bytearray(end - begin))
    data.read_into(begin, into)
    return bytes(into)


def _check_error(error: CkptdError) -> None:
    assert error.message.strip()
    assert len(error.message.splitlines()) == 1, f"an error is one line: {error.message!r}"


def _bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
