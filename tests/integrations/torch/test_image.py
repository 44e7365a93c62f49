"""What a capture writes, seen by the standard library of the format and by the memory it wrote into."""

import json
import mmap
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from ckptd.errors import InvariantError, StateError
from ckptd.storage.image import ITEM_BYTES, VALUES_NAME, parse
from ckptd_integrations.torch import copying
from ckptd_integrations.torch.tensors import DTYPE_NAMES


def load(image):
    return safetensors.torch.load(bytes(image))


def names(image):
    return {span.name for span in parse(image).spans} - {VALUES_NAME}


def test_safetensors_opens_an_image(harness, tmp_path):
    """The standard library opens an image as a file, with names that a person can read and equal tensors."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    file = tmp_path / "rank-00000.safetensors"
    file.write_bytes(harness.capture(model=model, optimizer=optimizer, rng=True))
    with safetensors.safe_open(file, "pt") as opened:
        assert opened.metadata()["ckptd.framework"] == "torch"
        for key, tensor in model.state_dict().items():
            harness.same(opened.get_tensor(f"model.{key}"), tensor)
        for key, tensor in optimizer.state_dict()["state"][1].items():
            harness.same(opened.get_tensor(f"optimizer.state.1.{key}"), tensor)


@pytest.mark.parametrize("dtype", [*DTYPE_NAMES, torch.complex128], ids=str)
def test_dtypes(harness, dtype):
    """Every dtype of the image has one of torch's, is readable by the standard library and comes back as it was."""
    raw = torch.randint(0, 2, (4, 3 * dtype.itemsize), dtype=torch.uint8)
    tensor = raw.view(dtype)
    image = harness.capture(x=tensor, empty=tensor[:0], scalar=tensor[1, 1])
    stored = torch.view_as_real(tensor) if dtype is torch.complex128 else tensor
    harness.same(load(image)["x"], stored)
    blank = torch.zeros_like(raw).view(dtype)
    harness.restore(image, x=blank, empty=blank[:0].clone(), scalar=blank[0, 0].clone())
    harness.same(blank, tensor)
    made = harness.restore(image, x=None, empty=None, scalar=None)
    harness.same(made, {"x": tensor, "empty": tensor[:0], "scalar": tensor[1, 1]})


def test_every_dtype_of_the_format_is_used():
    """No dtype that the image can hold is left unused, so nothing is refused that need not be."""
    assert set(DTYPE_NAMES.values()) == set(ITEM_BYTES)


def test_tied_weights_once(harness):
    """Memory that several names share is captured once, and restored under each name."""
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    model[1].weight = model[0].weight
    image = harness.capture(model=model, head=model[1].weight, part=model[1].weight[:2])
    assert names(image) == {"model.0.weight", "part"}
    untied = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    head, part = torch.zeros(8, 4), torch.zeros(2, 4)
    harness.restore(image, model=untied, head=head, part=part)
    for tensor in (untied[0].weight, untied[1].weight, head):
        assert torch.equal(tensor, model[0].weight)
    assert torch.equal(part, head[:2])


def test_not_contiguous(harness):
    """Transposed, expanded, conjugated and channels-last tensors are stored in row-major order, and keep strides."""
    x = torch.randn(4, 6, dtype=torch.complex64)
    state = {
        "transposed": x.t(),
        "strided": x.real[::2, ::3],
        "expanded": torch.arange(3.0).expand(2, 3),
        "conjugated": x.conj(),
        "negated": x.conj().imag,
        "negated-one": x[0, 0].conj().imag,
        "wide": torch.randn(2, dtype=torch.complex128).conj(),
        "images": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    image = harness.capture(state=state)
    harness.same(load(image)["state.transposed"], x.t().contiguous())
    made = harness.restore(image, state=dict.fromkeys(state))["state"]
    harness.same(made, state)
    assert made["images"].stride() == state["images"].stride()
    assert made["transposed"].stride() == state["transposed"].stride()
    expanded = torch.zeros(3).expand(2, 3)
    blank = {key: torch.zeros_like(tensor) for key, tensor in state.items()} | {
        "expanded": expanded,
        "conjugated": torch.zeros_like(x).conj(),
    }
    harness.restore(image, state=blank)
    harness.same(blank, state)
    assert blank["expanded"] is expanded


def test_names_are_unique(harness):
    """Paths that read the same get different names, and no name can be mistaken for a part of the header."""
    a, b, c, d = (torch.tensor(float(i)) for i in range(4))
    state = {"a": {"b.c": a, "b": {"c": b}}, "a.b": {"c": c}, "__metadata__": d, "x\n\ud800": {"y": a + 4}}
    image = harness.image(harness.bind(**state))
    assert names(image) == {"a.b.c", "a.b.c~2", "a.b.c~3", "__metadata__~2", r"x\n\ud800.y"}
    harness.same(harness.restore(image, **dict.fromkeys(state)), state)


def test_arrays_are_tensors(harness):
    """NumPy arrays are named tensors of the image, also when torch could not hold them as they are."""
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    frozen = np.arange(3.0)
    frozen.flags.writeable = False
    image = harness.capture(array=array, backwards=array[:, ::-1], frozen=frozen)
    harness.same(load(image)["array"], torch.from_numpy(array))
    target = np.zeros((2, 3), np.int16)
    made = harness.restore(image, array=target, backwards=None, frozen=None)
    assert made["array"] is target
    harness.same(made, {"array": array, "backwards": array[:, ::-1], "frozen": frozen})


def test_layout_is_reused_until_it_changes(harness):
    """Header and layout are the same objects while only contents change, also when the values get a little longer."""
    model = nn.Linear(2, 2)
    binding = harness.bind(model=model, epoch=1, rng=True)
    first = binding.prepare(1)
    binding.state["epoch"] = 123456789
    assert binding.prepare(1).layout is first.layout
    binding.state["note"] = "x" * 100_000
    longer = binding.prepare(1)
    assert longer.layout is not first.layout
    assert longer.image_bytes > first.image_bytes
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    binding.state["optimizer"] = optimizer
    before = binding.prepare(1).layout
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    grown = binding.prepare(1).layout
    assert grown is not before
    assert "optimizer.state.0.momentum_buffer" in {span.name for span in grown.spans}
    binding.state["model"] = nn.Linear(2, 3)
    assert binding.prepare(1).layout is not grown
    assert parse(harness.image(binding)).header == binding.prepare(1).layout.header


def test_a_capture_reads_what_is_there_now(harness):
    """Two captures of one layout hold the elements and values of their own moment."""
    x = torch.zeros(3)
    binding = harness.bind(x=x, step=1)
    first = harness.image(binding)
    x.add_(1)
    binding.state["step"] = 2
    second = harness.image(binding)
    harness.same(harness.restore(first, x=None, step=None), {"x": torch.zeros(3), "step": 1})
    harness.same(harness.restore(second, x=None, step=None), {"x": torch.ones(3), "step": 2})


def test_memory_can_be_closed(harness):
    """After a capture, a restore and refused restores no view of the memory is left: it can be unmapped."""
    state = {"model": nn.BatchNorm1d(3), "lazy": torch.ones(2, dtype=torch.complex128).conj(), "values": [1, "two"]}
    binding = harness.bind(**state, rng=True)
    prepared = binding.prepare(1)
    with mmap.mmap(-1, prepared.image_bytes) as memory:
        with memoryview(memory) as slot:
            holders = sys.getrefcount(slot)
            prepared.write(slot)
            assert sys.getrefcount(slot) == holders
            harness.restore(slot, **state, rng=True)
            with slot.toreadonly() as image:
                harness.restore(image, **{**state, "lazy": None}, rng=True)
                for other in ({"model": nn.Linear(2, 2)}, {"lazy": torch.ones(3)}, {"more": 1}):
                    with pytest.raises(StateError) as refused:
                        harness.restore(image, **(state | other), rng=True)
                    image.tobytes()
                    assert refused.value.hint
        memory.close()


def test_a_slot_that_does_not_fit_is_a_bug(harness):
    """A slot that is too small or read-only stops the capture before the first byte is written."""
    prepared = harness.bind(x=torch.ones(3)).prepare(1)
    small = bytearray(prepared.image_bytes - 1)
    with pytest.raises(InvariantError):
        prepared.write(memoryview(small))
    assert small == bytes(len(small))
    with pytest.raises(InvariantError):
        prepared.write(memoryview(bytes(prepared.image_bytes)))


def test_memory_that_moves_is_noticed(harness):
    """A tensor that gets other memory between `prepare` and `write` is named, not copied from where it was."""
    x = torch.ones(3)
    prepared = harness.bind(x=x).prepare(1)
    x.data = torch.ones(5)
    with pytest.raises(StateError, match="'x'"):
        prepared.write(memoryview(bytearray(prepared.image_bytes)))


@pytest.mark.parametrize("threads", [1, 3])
def test_copies_are_complete(monkeypatch, threads):
    """Small, large and very large copies arrive whole, with one thread and with several."""
    monkeypatch.setattr(copying, "copy_threads", lambda: threads)
    monkeypatch.setattr(copying, "LARGE_BYTES", 64)
    monkeypatch.setattr(copying, "SHARED_BYTES", 64)
    monkeypatch.setattr(copying, "CHUNK_BYTES", 100)
    sizes = [0, 1, 63, 64, 65, 149, 150, 1001, 4096]
    sources = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    targets = [torch.zeros_like(source) for source in sources]
    copying.copy_bytes([t.data_ptr() for t in targets], [s.data_ptr() for s in sources], sizes)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(source, target)


def test_copies_need_no_threads(monkeypatch):
    """Where no thread can be started any more, the copy is made without."""

    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(copying.threading.Thread, "start", refuse)
    monkeypatch.setattr(copying, "copy_threads", lambda: 4)
    source = torch.randint(0, 256, (copying.SHARED_BYTES,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    copying.copy_bytes([target.data_ptr()], [source.data_ptr()], [source.numel()])
    assert torch.equal(source, target)


def test_threads_are_this_ranks_share(monkeypatch):
    """A rank takes its share of the cores and never less than one thread, whatever the environment says."""
    monkeypatch.setattr(copying.os, "sched_getaffinity", lambda _: range(6))
    for ranks, threads in (("", 4), ("1", 4), ("2", 3), ("4", 1), ("64", 1), ("0", 4), ("x", 4)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert copying.copy_threads() == threads


def test_values_need_no_pickle(harness):
    """The values blob is what `torch.save` wrote, loads with `weights_only` and holds nothing but JSON inside."""
    image = harness.capture(epoch=3, names={"a", "b"})
    values = parse(image).values
    blob = bytes(image[values.begin + 8 : values.end])
    import io

    outer = torch.load(io.BytesIO(blob), weights_only=True)
    assert set(outer) == {"version", "tree"}
    assert json.loads(outer["tree"])["entries"][0] == ["epoch", 3]


def test_importing_the_package_costs_no_torch():
    """The agent may import the package: torch comes in with `framework` only."""
    code = "import sys, ckptd_integrations.torch; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
