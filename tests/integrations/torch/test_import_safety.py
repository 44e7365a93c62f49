"""What can't be trusted: nothing that is imported runs code, and nothing that contradicts itself is committed."""

import io
import json
import os
import pickle
import zipfile

import pytest
import torch

from ckptd.errors import DamagedError, NotFoundError, StateError
from ckptd_integrations.torch import inert
from ckptd_integrations.torch.dcp_format import import_dcp
from ckptd_integrations.torch.import_safetensors import import_safetensors
from ckptd_integrations.torch.torch_format import import_torch
from tests.integrations.torch.stored import imported, restored, save_dcp


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_nothing_that_is_imported_runs_code(tmp_path):
    """Code in a torch file, in a DCP folder's metadata or values is not run; what holds it is named."""
    trap = str(tmp_path / "trap")
    torch.save({"model": {"w": torch.ones(1)}, "evil": Evil(trap)}, tmp_path / "evil.pt")
    with pytest.raises(StateError, match=r"open, which is not loaded"):
        imported(import_torch, tmp_path / "evil.pt")
    save_dcp({"model": {"w": torch.ones(1)}, "evil": Evil(trap)}, tmp_path / "values")
    with pytest.raises(StateError, match=r"'evil' is of a type that is not loaded"):
        imported(import_dcp, tmp_path / "values")
    save_dcp({"model": {"w": torch.ones(1)}}, tmp_path / "metadata")
    path = tmp_path / "metadata" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data["evil"] = Evil(trap)
    path.write_bytes(pickle.dumps(metadata))
    tier, _, at = imported(import_dcp, tmp_path / "metadata")
    assert not os.path.exists(trap)
    assert restored(tier, at, {"model": {"w": torch.zeros(1)}})["model"]["w"].tolist() == [1]
    path.write_bytes(pickle.dumps(Evil(trap)))
    with pytest.raises(DamagedError):
        imported(import_dcp, tmp_path / "metadata")
    assert not os.path.exists(trap)


def test_a_torch_file_that_zipfile_refuses(tmp_path):
    """A damaged directory of the archive is damage, and no fault of the format."""
    path = tmp_path / "model.pt"
    torch.save({"w": torch.ones(3)}, path)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x06\x07") + 4] = 1  # as if the archive were a part of several
    path.write_bytes(data)
    with pytest.raises(zipfile.BadZipFile):
        zipfile.is_zipfile(path)
    with pytest.raises(DamagedError, match="is no file that torch can load"):
        imported(import_torch, path)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_read_as_data(protocol):
    """Plain data comes as it is, whatever the protocol; of an object come its name, arguments and state."""
    plain = {"a": [1, -2, 1 << 70, 2.5, None, True, "ä" * 300], "b": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), 3: {}}
    plain["again"] = plain["a"]
    assert inert.read(io.BytesIO(pickle.dumps(plain, protocol)), "x") == plain
    made = inert.read(io.BytesIO(pickle.dumps(ValueError("oh"), protocol)), "x")
    assert (made.name.rpartition(".")[2], made.arguments) == ("ValueError", ("oh",))
    made = inert.read(io.BytesIO(pickle.dumps(torch.Size([2, 3]), protocol)), "x")
    assert (made.name, made.arguments) == ("torch.Size", ((2, 3),))


def damaged_dcp(folder, change):
    save_dcp({"model": {"w": torch.arange(6.0)}}, folder)
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata, next(iter(metadata.storage_data.values())))
    path.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (lambda _, info: setattr(info, "relative_path", "../x"), DamagedError, "not beside it"),
        (lambda _, info: setattr(info, "relative_path", "gone.distcp"), NotFoundError, "gone"),
        (lambda _, info: setattr(info, "length", 40), DamagedError, "can't be loaded"),
        (lambda _, info: setattr(info, "transform_descriptors", ["zstd"]), StateError, "zstd"),
        (lambda metadata, _: setattr(metadata, "storage_data", None), DamagedError, "does not describe"),
        (
            lambda metadata, _: setattr(metadata.state_dict_metadata["model.w"], "size", torch.Size([7])),
            DamagedError,
            "make up the whole",
        ),
        (
            lambda metadata, _: setattr(metadata.state_dict_metadata["model.w"], "size", torch.Size([3])),
            DamagedError,
            "not what the metadata says",
        ),
    ],
)
def test_a_dcp_folder_that_contradicts_itself(tmp_path, change, kind, says):
    """What metadata says is held against the files; nothing outside of the folder is read."""
    damaged_dcp(tmp_path / "dcp", change)
    with pytest.raises(kind, match=says):
        imported(import_dcp, tmp_path / "dcp")


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x05", b"cos\nsystem\n", b"garbage" * 20, pickle.dumps([set()], 5), b"}("]
)
def test_what_is_no_metadata(tmp_path, content):
    """Any bytes in the place of a DCP folder's metadata are one error of ours."""
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(DamagedError):
        imported(import_dcp, tmp_path)


def header(entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", DamagedError),
        (b"\xff" * 8, DamagedError),
        (b"\x10" + b"\0" * 7 + b"{}", DamagedError),
        (header([]), DamagedError),
        (header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}), DamagedError),
        (header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 8]}}) + bytes(8), DamagedError),
        (header({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}) + bytes(8), DamagedError),
        (header({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}) + bytes(8), StateError),
    ],
)
def test_what_is_no_safetensors_file(tmp_path, content, kind):
    """Bytes that are no whole safetensors file, or have a dtype that ckptd has not, are refused by name."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(kind, match=r"model\.safetensors|header"):
        imported(import_safetensors, tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04garbage"])
def test_what_is_no_torch_file(tmp_path, content):
    """Bytes that torch can't load are an error of one line that names the file."""
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(DamagedError, match=r"model\.pt") as caught:
        imported(import_torch, tmp_path / "model.pt")
    assert "\n" not in caught.value.message


def test_torch_files_that_hold_no_states(tmp_path):
    """A tensor, a list or a dict of numbered things is refused; so is a torn zip archive."""
    for number, item in enumerate((torch.ones(1), [torch.ones(1)], {1: torch.ones(1)})):
        torch.save(item, tmp_path / f"{number}.pt")
        with pytest.raises(StateError, match="not states by name"):
            imported(import_torch, tmp_path / f"{number}.pt")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/other", b"")
    (tmp_path / "zip.pt").write_bytes(stream.getvalue())
    with pytest.raises(DamagedError):
        imported(import_torch, tmp_path / "zip.pt")
