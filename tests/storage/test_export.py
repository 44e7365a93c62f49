"""An exported checkpoint: opened with the library for its format alone, every element is where it belongs."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd.errors import ConfigError, DamagedError, NotFoundError, StoreError
from ckptd.storage import catalog, export, image, keys, manifest
from ckptd.storage.assembling import assemble
from ckptd.storage.boxes import Box, Shape
from ckptd.storage.digest import LEAF_BYTES
from ckptd.storage.export_safetensors import export_safetensors
from ckptd.storage.image import TensorSpec
from ckptd.storage.memory import MemoryTier
from ckptd.types import CheckpointId, Piece

AT = CheckpointId(2, 40)
Entries = Mapping[str, "tuple[np.ndarray[Any, Any], Piece | None]"]
_DTYPES = {"float32": "F32", "uint8": "U8", "float64": "F64"}


def commit(tier: MemoryTier, ranks: list[Entries]) -> None:
    """Commit a checkpoint of those entries of each rank."""
    contents = []
    for rank, entries in enumerate(ranks):
        specs = [TensorSpec(name, _DTYPES[a.dtype.name], a.shape, piece) for name, (a, piece) in entries.items()]
        layout = image.plan(specs, 3, {})
        data = memoryview(bytearray(layout.image_bytes))
        data[: len(layout.header)] = layout.header
        for span in layout.spans[:-1]:
            data[span.begin : span.end] = entries[span.name][0].tobytes()
        image.write_values(data, layout.values, b"abc")
        tier.put(keys.shard_key("job", AT, rank), data)
        contents.append(catalog.describe_shard(rank, data))
    document = manifest.build("job", AT, None, contents, created_at=1.0, values={"loss": 0.5})
    tier.put(keys.manifest_key("job", AT), manifest.encode(document))


def load(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Load every tensor of an exported folder, by the name that it had."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        group = re.sub(r"(-\d{5}-of-\d{5})?\.safetensors$", "", path.relative_to(folder).as_posix())
        with safetensors.safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
        found |= {f"{group}.{name}": tensor for name, tensor in safetensors.numpy.load_file(path).items()}
    return found


def same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether names, dtypes, shapes and every element are equal."""
    return set(found) == set(wanted) and all(
        (found[name].dtype, found[name].shape, found[name].tobytes())
        == (wanted[name].dtype, wanted[name].shape, wanted[name].tobytes())
        for name in wanted
    )


@st.composite
def partitions(draw: st.DrawFn, shape: Shape) -> list[Box]:
    """A tensor's whole, cut along its dimensions again and again."""
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 4)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, box.shape[dim]))
        for begin, size in ((0, cut), (cut, box.shape[dim] - cut)):
            offset, part = list(box.offset), list(box.shape)
            offset[dim] += begin
            part[dim] = size
            boxes.append(Box(tuple(offset), tuple(part)))
    return boxes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_parts_are_put_together(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """However a tensor of the job is cut into boxes and spread over ranks, the export has it whole."""
    folder = tmp_path_factory.mktemp("export") / "out"
    world_size = data.draw(st.integers(1, 3))
    ranks: list[dict[str, Any]] = [{} for _ in range(world_size)]
    wanted = {}
    for number in range(data.draw(st.integers(1, 3))):
        shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=3)))
        name = f"model.w{number}"
        whole = np.random.default_rng(number).random(shape).astype(data.draw(st.sampled_from(["f4", "f8"])))
        wanted[name] = whole
        for at, box in enumerate(data.draw(partitions(shape))):
            places = tuple(slice(b, b + s) for b, s in zip(*box, strict=True))
            piece = Piece(name, shape, box.offset)
            rank = data.draw(st.integers(0, world_size - 1))
            ranks[rank][f"{name}~{at}"] = (np.ascontiguousarray(whole[places]).reshape(box.shape), piece)
    tier = MemoryTier()
    commit(tier, ranks)
    written = export.export(export_safetensors, tier, "job", AT, folder)
    assert same(load(folder), wanted)
    assert written.tensors == len(wanted)
    assert written.size_bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert {path.name for path in folder.parent.iterdir()} == {"out"}


def test_large_parts_are_put_together(tmp_path: Path) -> None:
    """Columns of a tensor whose parts have several leaves come together, though leaves end in the middle of a row."""
    whole = np.random.default_rng(0).random((3000, 1501)).astype("f4")
    assert whole[:, :700].nbytes > 2 * LEAF_BYTES
    ranks = [
        {"m.w": (np.ascontiguousarray(whole[:, begin:end]), Piece("m.w", whole.shape, (0, begin)))}
        for begin, end in ((0, 700), (700, 1501))
    ]
    tier = MemoryTier()
    commit(tier, ranks)
    export.export(export_safetensors, tier, "job", AT, tmp_path / "out")
    assert same(load(tmp_path / "out"), {"m.w": whole})


def number(value: float, size: int = 5) -> tuple[np.ndarray[Any, Any], None]:
    """A tensor of one rank."""
    return np.full((size,), value, "f4"), None


def test_what_ranks_have_alike_is_there_once(tmp_path: Path) -> None:
    """What all ranks have alike is at the top, what is a rank's own in its folder, each in its state's file."""
    ranks: list[Entries] = [
        {"model.a": number(1), "model.b": number(2), "only": number(3), "step": number(9)},
        {"model.a": number(1), "model.b": number(4), "step": number(9)},
    ]
    tier = MemoryTier()
    commit(tier, ranks)
    written = export.export(export_safetensors, tier, "job", AT, tmp_path / "out")
    assert sorted(written.files) == [
        "checkpoint.json", "model.safetensors", "rank-0/model.safetensors", "rank-0/only.safetensors",
        "rank-1/model.safetensors", "step.safetensors",
    ]  # fmt: skip
    wanted = {
        "model.a": 1, "rank-0/model.b": 2, "rank-1/model.b": 4, "rank-0/only.only": 3, "step.step": 9,
    }  # fmt: skip
    assert same(load(tmp_path / "out"), {name: number(value)[0] for name, value in wanted.items()})
    described = json.loads((tmp_path / "out/checkpoint.json").read_text())
    assert (described["job"], described["generation"], described["step"]) == ("job", 2, 40)
    assert described["values"] == {"loss": 0.5}


def test_a_large_state_is_split(tmp_path: Path) -> None:
    """Files stay below the limit but for a tensor that is larger alone; the index names each tensor's file."""
    state = {f"m.t{at}": number(at, 100) for at in range(6)} | {"m.big": number(7, 600)}
    tier = MemoryTier()
    commit(tier, [state])
    written = export.export(export_safetensors, tier, "job", AT, tmp_path / "out", max_file_bytes=1000)
    index = json.loads((tmp_path / "out/m.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 6 * 400 + 2400
    assert len(set(index["weight_map"].values())) == 4
    for name, file in index["weight_map"].items():
        tensor = safetensors.numpy.load_file(tmp_path / "out" / file)[name]
        assert tensor.tobytes() == state[f"m.{name}"][0].tobytes()
    assert set(written.files) == {"checkpoint.json", "m.safetensors.index.json", *index["weight_map"].values()}
    assert set(load(tmp_path / "out")) == set(state)
    export.export(export_safetensors, tier, "job", AT, tmp_path / "one", max_file_bytes=0)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"m.safetensors", "checkpoint.json"}


@pytest.mark.parametrize("name", ["../../etc/x", "a/b.c", "..", ".hidden", "", "a b.c", "ä.c"])
def test_names_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    """No tensor's name leads out of the folder."""
    tier = MemoryTier()
    commit(tier, [{name: number(1)}])
    written = export.export(export_safetensors, tier, "job", AT, tmp_path / "out")
    (file,) = set(written.files) - {"checkpoint.json"}
    assert "/" not in file
    assert not file.startswith(".")
    assert len(safetensors.numpy.load_file(tmp_path / "out" / file)) == 1


def test_names_that_come_together_stay_apart(tmp_path: Path) -> None:
    """Tensors whose names differ in what a file name can't say are both there."""
    tier = MemoryTier()
    names = ["a", "a.a", "x/y.t", "x?y.t", "a.__metadata__"]
    commit(tier, [{name: number(value) for value, name in enumerate(names)}])
    export.export(export_safetensors, tier, "job", AT, tmp_path / "out")
    assert sorted(float(tensor[0]) for tensor in load(tmp_path / "out").values()) == [0, 1, 2, 3, 4]


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    """A folder that is there and empty is filled."""
    tier = MemoryTier()
    commit(tier, [{"a.t": number(1)}])
    (tmp_path / "out").mkdir()
    export.export(export_safetensors, tier, "job", AT, tmp_path / "out")
    assert same(load(tmp_path / "out"), {"a.t": number(1)[0]})


def test_a_state_may_be_larger_than_memory(tmp_path: Path) -> None:
    """What is put together for other libraries is mapped so that the kernel sets no memory aside for it."""
    tier = MemoryTier()
    commit(tier, [{"a.t": number(1)}])
    source = export.Source(tier, "job", catalog.load_manifest(tier, "job", AT))
    assembled = assemble(source, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert bytes(assembled.tensor("a.t", 0).data) == number(1)[0].tobytes()
    _, _, mapping = Path("/proc/self/smaps").read_text().partition(f"{tmp_path}/.assembled-")
    flags = next(line for line in mapping.splitlines() if line.startswith("VmFlags:")).split()
    assert "ac" not in flags  # accounted for, as if all of it were written


@pytest.mark.parametrize("kind", ["the current folder", "a mount"])
def test_a_folder_that_can_not_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The current folder and a mount, empty as they are, are refused before anything is read: name one in there."""
    tier = MemoryTier()
    commit(tier, [{"a.t": number(1)}])
    target = tmp_path / "place"
    target.mkdir()
    with ExitStack() as stack:
        if kind == "a mount":
            command = ["mount", "-t", "tmpfs", "-o", "size=8m", "ckptd-test", str(target)]
            if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
                pytest.skip("mounting a filesystem needs root, and a machine that lets it")
            stack.callback(subprocess.run, ["umount", "-l", str(target)], check=True)
        else:
            monkeypatch.chdir(target)
        with pytest.raises(ConfigError, match=kind) as caught:
            export.export(export_safetensors, tier, "job", AT, target)
        assert f"--to {target}/export" in str(caught.value.hint)
        assert list(target.iterdir()) == []
        export.export(export_safetensors, tier, "job", AT, target / "export")
        assert same(load(target / "export"), {"a.t": number(1)[0]})


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    """A job whose many ranks each have something of their own is exported with few files open at once."""
    tier = MemoryTier()
    commit(tier, [{"loader.t": number(rank)} for rank in range(100)])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        export.export(export_safetensors, tier, "job", AT, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    loaded = [safetensors.numpy.load_file(tmp_path / f"out/rank-{rank}/loader.safetensors") for rank in range(100)]
    assert [float(tensors["t"][0]) for tensors in loaded] == list(range(100))


@pytest.mark.parametrize("there", ["folder", "file", "broken link", "link to an empty folder"])
def test_nothing_is_overwritten(tmp_path: Path, there: str) -> None:
    """Where anything is already, nothing is written, and the hint says what --to may name."""
    tier = MemoryTier()
    commit(tier, [{"a.t": number(1)}])
    target = tmp_path / "out"
    if there == "folder":
        target.mkdir()
        (target / "mine").write_text("precious")
    elif there == "file":
        target.write_text("precious")
    else:
        if there == "link to an empty folder":
            (tmp_path / "nowhere").mkdir()
        target.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="there already") as caught:
        export.export(export_safetensors, tier, "job", AT, target)
    assert caught.value.hint
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("damage", ["flipped bit", "cut", "missing", "no checkpoint", "disk"])
def test_a_failed_export_leaves_nothing(tmp_path: Path, damage: str) -> None:
    """Damaged bytes are never exported: the error names them, and neither the folder nor a part of it is left."""
    tier = MemoryTier()
    commit(tier, [{"a.t": number(1), "b.u": number(2)}])
    key = keys.shard_key("job", AT, 0)
    target, kind = tmp_path / "new" / "deep" / "out", DamagedError
    if damage == "flipped bit":
        data = bytearray(tier.get(key))
        data[data.index(number(2)[0].tobytes()) + 3] ^= 1
        tier.put(key, bytes(data))
    elif damage == "cut":
        tier.put(key, tier.get(key)[:4100])
    elif damage == "missing":
        tier.delete(key)
        kind = NotFoundError
    elif damage == "no checkpoint":
        tier.delete(keys.manifest_key("job", AT))
        kind = NotFoundError
    else:
        (tmp_path / "file").write_text("")
        target, kind = tmp_path / "file" / "out", StoreError
    with pytest.raises(kind) as caught:
        export.export(export_safetensors, tier, "job", AT, target)
    assert "\n" not in caught.value.message
    assert {path.name for path in tmp_path.iterdir()} <= {"file"}
    if damage == "flipped bit":
        assert "'u'" in caught.value.message
