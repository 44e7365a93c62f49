"""A restore fills what is bound, or says what does not fit and changes nothing."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ckptd.errors import DamagedError, StateError
from ckptd.storage.digest import LEAF_BYTES
from ckptd.storage.image import VALUES_NAME, parse
from tests.integrations.torch.offering import Offered


def make(width=3, dtype=torch.float32, optimizer=torch.optim.Adam):
    """Return objects that have trained a step, and values beside them."""
    model = nn.Sequential(nn.Linear(2, width), nn.Linear(width, 2)).to(dtype)
    state = {"model": model, "optimizer": optimizer(model.parameters(), lr=0.1), "log": [1.5], "nest": {"x": [1]}}
    model(torch.ones(2, dtype=dtype)).sum().backward()
    state["optimizer"].step()
    return state | {"scheduler": torch.optim.lr_scheduler.StepLR(state["optimizer"], 2), "table": torch.ones(4)}


def contents(state):
    return {
        name: copy.deepcopy(value.state_dict() if hasattr(value, "state_dict") else value)
        for name, value in state.items()
    }


def refuses(harness, image, state):
    """Restore, expect a refusal, and check that nothing was changed by it."""
    before = contents(state)
    generator = torch.get_rng_state()
    binding = harness.bind(rng=True, **state)
    with Offered([image]) as offered, pytest.raises(StateError) as refused:
        binding.restore(offered)
    harness.same(contents(state), before)
    assert binding.state == state
    assert torch.equal(torch.get_rng_state(), generator)
    assert refused.value.hint
    return refused.value.message


def test_shapes(harness):
    """A tensor of another shape is named with both shapes."""
    message = refuses(harness, harness.capture(rng=True, **make(3)), make(5))
    assert message == "tensor 'model.0.weight' is [3, 2] in the checkpoint and [5, 2] in the model"


def test_dtypes(harness):
    """A tensor of another dtype is named with both, because a conversion would lose bits."""
    message = refuses(harness, harness.capture(rng=True, **make()), make(dtype=torch.float64))
    assert message == "tensor 'model.0.weight' is float32 in the checkpoint and float64 in the model"


@pytest.mark.parametrize(("captured", "bound"), [(True, False), (False, True)])
def test_tensors_of_a_model(harness, captured, bound):
    """A parameter that only one side has is named, with the side that has it."""
    message = refuses(
        harness,
        harness.capture(a=1, model=nn.Linear(2, 2, bias=captured)),
        {"a": 2, "model": nn.Linear(2, 2, bias=bound)},
    )
    sides = ("checkpoint", "model") if captured else ("model", "checkpoint")
    assert message == f"tensor 'model.bias' is in the {sides[0]} and not in the {sides[1]}"


def test_wrapped_models(harness):
    """A model that was captured wrapped and is bound bare is refused with a hint that says so."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    image = harness.capture(model=Wrapper(nn.Linear(2, 2)))
    with pytest.raises(StateError, match=r"module\.weight.*1 more.*wrapped"):
        harness.restore(image, model=nn.Linear(2, 2))


def test_names(harness):
    """A name that only one side has is named; the generators alone may be missing on either side."""
    image = harness.capture(rng=True, **make())
    assert "'extra'" in refuses(harness, image, make() | {"extra": 1})
    less = make()
    del less["table"]
    assert "'table'" in refuses(harness, image, less)
    harness.restore(image, rng=False, **make())
    harness.restore(harness.capture(**make()), rng=True, **make())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"table": torch.ones(5)}, ["tensor 'table' is [4] in the checkpoint and [5] in the bound state"]),
        ({"table": torch.ones(4, dtype=torch.int64)}, ["'table'", "float32", "int64"]),
        ({"table": torch.ones(4, device="meta")}, ["'table'", "meta"]),
        ({"table": np.ones(4, np.float32)}, ["'table'", "Tensor", "ndarray"]),
        ({"table": nn.Linear(1, 1)}, ["'table'", "Tensor", "Linear"]),
        ({"log": {}}, ["'log'", "list", "dict"]),
        ({"log": [nn.Linear(1, 1)]}, ["'log.0'", "float", "Linear"]),
        ({"log": [1.0, nn.Linear(1, 1)]}, ["'log.1'", "Linear"]),
        ({"nest": {"net": nn.Linear(1, 1)}}, ["'nest.net'", "Linear"]),
        ({"model": 3}, ["'model'", "Sequential", "int"]),
        ({"scheduler": None}, ["'scheduler'", "StepLR", "NoneType"]),
        ({"log": torch.ones(1)}, ["'log'", "list", "Tensor"]),
    ],
    ids=lambda value: "",
)
def test_kinds(harness, change, words):
    """An object that the captured one can't fill is refused with both kinds, however deep it lies."""
    message = refuses(harness, harness.capture(rng=True, **make()), make() | change)
    for word in words:
        assert word in message


def test_read_only_arrays(harness):
    """An array that can't be written to is refused before anything is filled."""
    array = np.zeros(2)
    array.flags.writeable = False
    message = refuses(
        harness, harness.capture(a=torch.ones(1), array=np.ones(2)), {"a": torch.zeros(1), "array": array}
    )
    assert "'array' is read-only" in message


def test_optimizers_of_another_class(harness):
    """An optimizer of another class is refused; its state would load and be wrong."""
    state = make()
    image = harness.capture(rng=True, **state)
    assert "Adam and is a SGD now" in refuses(
        harness, image, state | {"optimizer": make(optimizer=torch.optim.SGD)["optimizer"]}
    )


def test_optimizers_of_other_parameters(harness):
    """An optimizer whose parameters come in other groups or another order is refused."""
    state = make()
    image = harness.capture(rng=True, **state)
    parameters = list(state["model"].parameters())
    groups = torch.optim.Adam([{"params": parameters[:1]}, {"params": parameters[1:]}])
    assert "of [4] parameters in the checkpoint and of [1, 3] now" in refuses(
        harness, image, state | {"optimizer": groups}
    )
    order = torch.optim.Adam(parameters[::-1])
    assert "parameter 0 in group 0 of optimizer 'optimizer' is [3, 2]" in refuses(
        harness, image, state | {"optimizer": order}
    )


def test_schedulers_of_another_class(harness):
    """A scheduler of another class is refused, though loading it would not fail."""
    state = make()
    image = harness.capture(rng=True, **state)
    other = torch.optim.lr_scheduler.ExponentialLR(state["optimizer"], 0.9)
    assert "StepLR and is a ExponentialLR now" in refuses(harness, image, state | {"scheduler": other})


def test_scalers_that_differ(harness):
    """A scaler that is enabled on one side only is refused before its loading fails halfway."""
    on, off = torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu", enabled=False)
    a = torch.zeros(2)
    assert "enabled when it was captured and is disabled" in refuses(
        harness, harness.capture(a=a + 1, s=on), {"a": a, "s": off}
    )
    assert "disabled when it was captured and is enabled" in refuses(
        harness, harness.capture(a=a + 1, s=off), {"a": a, "s": on}
    )


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_flipped_bits(harness, tmp_path, on_disk):
    """One flipped bit, anywhere in a tensor or the values, is found by its digest, and the tensor is named."""
    image = harness.capture(rng=True, **make())
    for span in parse(image).spans:
        if span.begin == span.end:
            continue
        with Offered([image], tmp_path if on_disk else None) as offered:
            offered.flip(0, (span.begin + span.end) // 2)
            with pytest.raises(DamagedError) as refused:
                harness.bind(rng=True, **make()).restore(offered)
        assert repr(span.name) in refused.value.message
        assert "rank-00000.safetensors" in refused.value.message
        assert refused.value.hint


def test_every_leaf_is_checked(harness):
    """In a tensor of several leaves, a flipped bit in any of them is found."""
    image = harness.capture(x=torch.arange(3 * LEAF_BYTES // 4 + 5, dtype=torch.int32))
    span = next(span for span in parse(image).spans if span.name == "x")
    for at in range(span.begin, span.end, LEAF_BYTES):
        with Offered([image]) as offered:
            offered.flip(0, at)
            with pytest.raises(DamagedError, match="'x'"):
                harness.bind(x=torch.zeros(3 * LEAF_BYTES // 4 + 5, dtype=torch.int32)).restore(offered)


def test_what_was_not_digested_yet(harness):
    """A snapshot that has no digests yet is restored without them."""
    state = make()
    with Offered([harness.capture(**state)], digested=False) as offered:
        twin = harness.bind(**make())
        twin.restore(offered)
    harness.same(contents(twin.state), contents(state))


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_files_that_end_early(harness, tmp_path, on_disk):
    """A file that ends before its tensors do is damage, wherever it was cut."""
    image = harness.capture(rng=True, **make())
    for size in (0, 7, 4095, 4096, len(image) // 2, len(image) - 1):
        with Offered([image], tmp_path if on_disk else None) as offered:
            offered.cut(0, size)
            with pytest.raises(DamagedError):
                harness.bind(rng=True, **make()).restore(offered)


def test_values_that_are_none(harness):
    """A checkpoint without values, or with others than ours, is damaged."""
    image = harness.capture(x=torch.ones(1))
    with Offered([image]) as offered, pytest.raises(DamagedError, match="no values"):
        del offered.document["tensors"][VALUES_NAME]
        harness.bind(x=torch.zeros(1)).restore(offered)
    values = parse(image).values
    image[values.begin + 8 : values.end] = bytes(values.end - values.begin - 8)
    with Offered([image]) as offered, pytest.raises(DamagedError, match="can't be read"):
        harness.bind(x=torch.zeros(1)).restore(offered)


def test_nothing_aliases_the_image(harness):
    """After a restore the image can be overwritten: every restored object has memory of its own."""
    state = make() | {"array": np.arange(3.0), "values": (torch.ones(2), {"deep": torch.ones(3)})}
    image = harness.capture(rng=True, **state)
    for twin in (make() | {"array": np.zeros(3), "values": None}, make() | {"array": None, "values": ()}):
        filled = harness.restore(image, rng=True, **twin)
        generator = torch.get_rng_state()
        before = contents(filled)
        keep = bytes(image)
        image[:] = b"\xff" * len(image)
        harness.same(contents(filled), before)
        harness.same(before, contents(state))
        assert torch.equal(torch.get_rng_state(), generator)
        image[:] = keep
        for tensor in filled["optimizer"].state_dict()["state"][0].values():
            tensor.add_(1)
        filled["table"].add_(1)
        assert image == keep


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


UNFILLABLE = {
    "a tensor of layout sparse_coo": torch.Tensor.to_sparse,
    "a nested tensor": lambda tensor: torch.nested.nested_tensor([tensor]),
    "a meta tensor": lambda tensor: tensor.to("meta"),
    "a tensor without memory": freed,
}
"""What can be made of a tensor that nothing can be put into any more, by how that is called."""


@pytest.mark.parametrize("kind", UNFILLABLE)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_targets_that_can_not_be_filled(harness, kind):
    """A bound tensor that can't take bytes is named with what it is, though an ordinary one was captured."""
    binding = harness.bind(x=UNFILLABLE[kind](torch.ones(3)))
    with Offered([harness.capture(x=torch.zeros(3))]) as offered, pytest.raises(StateError) as refused:
        binding.restore(offered)
    assert refused.value.message == f"tensor 'x' can't be filled: in the bound state it is {kind}"


def test_targets_that_show_their_elements_otherwise(harness):
    """Negated, stepped and expanded views get what they showed when an ordinary tensor was captured."""
    x = torch.arange(3.0)
    targets = {
        "negated": torch._neg_view(torch.zeros(3)),
        "stepped": torch.zeros(6)[::2],
        "reversed order": torch.zeros(3, 3).t()[0],
        "whole": torch.zeros(3),
    }
    image = harness.capture(state={name: x.clone() for name in targets})
    harness.restore(image, state=targets)
    for name, tensor in targets.items():
        assert torch.equal(tensor, x), name


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_one_tensor_shown_in_two_ways(harness, order):
    """What was captured once under two names comes back under both, though one of them is bound to a negated view."""
    x = torch.arange(1.0, 5)
    targets = {"a": torch.zeros(4), "b": torch._neg_view(torch.zeros(4))}
    harness.restore(harness.capture(a=x, b=x), **{name: targets[name] for name in order})
    assert all(torch.equal(tensor, x) for tensor in targets.values())


def test_names_of_one_tensor_in_any_order(harness):
    """What was captured once under several names is restored under each, whichever is bound first, and as what."""
    x = torch.arange(4.0).view(2, 2)
    image = harness.capture(first=x, second=x, third=x)
    targets = {"third": torch.zeros(2, 2), "second": torch.zeros(2, 2).t(), "first": torch.zeros(2, 2)}
    made = harness.restore(image, **targets)
    assert all(made[name] is tensor and torch.equal(tensor, x) for name, tensor in targets.items())
    made = harness.restore(image, third=None, second=targets["second"].zero_(), first=None)
    assert all(torch.equal(tensor, x) for tensor in made.values())
    same = torch.zeros(2, 2)
    harness.restore(image, first=same, second=same, third=same)
    assert torch.equal(same, x)


def test_filled_in_place(harness):
    """Parameters, buffers, tensors and arrays stay the same objects and the same memory."""
    model, x, array = nn.BatchNorm1d(3), torch.zeros(2), np.zeros(2)
    source = nn.BatchNorm1d(3)
    source(torch.randn(4, 3))
    tensors = [x, *model.state_dict(keep_vars=True).values()]
    places = [tensor.data_ptr() for tensor in tensors]
    versions = [tensor._version for tensor in tensors]
    image = harness.capture(model=source, x=torch.ones(2), array=np.ones(2))
    made = harness.restore(image, model=model, x=x, array=array)
    assert made == {"model": model, "x": x, "array": array}
    assert [tensor.data_ptr() for tensor in (x, *model.state_dict(keep_vars=True).values())] == places
    assert all(tensor._version > version for tensor, version in zip(tensors, versions, strict=True))
    harness.same(model.state_dict(), source.state_dict())
    harness.same(array, np.ones(2))


def test_tensors_that_need_gradients(harness):
    """A bound tensor that needs a gradient, or has one, is filled without touching either."""
    x = torch.zeros(2, requires_grad=True)
    x.sum().backward()
    harness.restore(harness.capture(x=torch.ones(2)), x=x)
    assert torch.equal(x, torch.ones(2))
    assert x.requires_grad
    assert torch.equal(x.grad, torch.ones(2))


def test_captured_with_gradients(harness):
    """Tensors in the middle of a graph are captured by their elements."""
    x = torch.ones(2, requires_grad=True)
    made = harness.restore(harness.capture(y=x * 3, z=(x.double() * 1j)), y=None, z=None)
    harness.same(made, {"y": torch.full((2,), 3.0), "z": torch.full((2,), 1j, dtype=torch.complex128)})
    assert not made["y"].requires_grad
