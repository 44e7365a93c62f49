"""Everything that is no tensor: it comes back with its types, or is refused with its name."""

import copy
import datetime as dt
import enum
import functools
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from math import prod
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ckptd.errors import DamagedError, StateError
from ckptd.storage.image import parse, read_values, write_values
from ckptd_integrations.torch.nodes import read_document

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.complex128, torch.uint8]


@st.composite
def tensors(draw):
    """Tensors of many dtypes and shapes, some without elements, some not contiguous."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    size = dtype.itemsize * prod(shape)
    tensor = (torch.arange(size) * 7 % 13 % 2).to(torch.uint8).view(dtype).view(shape)
    if draw(st.booleans()) and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1)
    return tensor


keys = st.one_of(
    st.text(st.characters(), max_size=6),
    st.sampled_from(["a.b", "", "\n", "\ud800", "tensor", "__metadata__", "é.ß"]),
    st.integers(-3, 3),
    st.integers(),
    st.booleans(),
    st.none(),
    st.binary(max_size=3),
    st.tuples(st.integers(0, 3), st.text(max_size=2)),
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, 2**63 - 1, -(2**63), -(2**63) - 1, 2**4000, -0.0]),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(), max_size=8),
    st.binary(max_size=8),
    st.sampled_from([torch.float32, torch.device("cpu"), torch.device("cuda:3"), torch.Size([1, 2])]),
    st.sampled_from([np.float64(0.5), np.int32(-7), np.bool_(True), np.float16("nan")]),
    st.lists(st.floats(), min_size=62, max_size=66),
    st.lists(st.integers(-(2**63), 2**63), min_size=62, max_size=66).map(tuple),
    tensors(),
    tensors().map(lambda tensor: (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.builds(deque, st.lists(inner, max_size=3), st.sampled_from([None, 5])),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
        st.dictionaries(st.text(max_size=4), tensors(), max_size=4),
        st.builds(defaultdict, st.sampled_from([list, int, None]), st.dictionaries(keys, inner, max_size=2)),
        st.dictionaries(keys, st.integers(0, 9), max_size=3).map(Counter),
        st.sets(keys, max_size=3),
        st.frozensets(keys, max_size=3),
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=120)
@given(state=st.dictionaries(st.sampled_from("abc"), values, min_size=1))
def test_round_trip(harness, state):
    """Any nesting of containers, tensors and values comes back with the same types, order, keys and bits."""
    image = harness.capture(**state)
    made = harness.restore(image, **dict.fromkeys(state))
    harness.same(made, state)
    harness.same(harness.restore(image, **made), state)


@settings(deadline=None, max_examples=80)
@given(state=st.dictionaries(keys, values, max_size=4), other=st.dictionaries(keys, values, max_size=4))
def test_containers_are_filled_in_place(harness, state, other):
    """A bound dict or list stays the same object and equals the captured one, whatever it held before."""
    before = {key: value for key, value in other.items() if not shares_tensors(state.get(key), value)}
    bound, members = dict(before), copy.deepcopy(list(before.values()))
    made = harness.restore(harness.capture(bound=state, members=[1, state]), bound=bound, members=members)
    assert made["bound"] is bound
    assert made["members"] is members
    harness.same(made, {"bound": state, "members": [1, state]})


def shares_tensors(left, right):
    """Tensors and arrays at the same place are filled, not replaced, so another shape there is refused."""

    def holds(value):
        if isinstance(value, (dict, list, tuple, deque)):
            return any(map(holds, value.values() if isinstance(value, dict) else value))
        return isinstance(value, (torch.Tensor, np.ndarray))

    return holds(left) and holds(right)


def test_own_look_alikes(harness):
    """A user's own tuples and dicts that look like nodes of the tree are only what they are."""
    state = {
        "a": ("tensor", "a"),
        "b": ["flat", "dict", "p", "k"],
        "c": {"entries": [], "aliases": {}},
        "d": ("object", "module", "Linear", None, None),
        "e": "tensor",
    }
    harness.same(harness.restore(harness.capture(**state), **dict.fromkeys(state)), state)


def test_references_into_containers_stay_valid(harness):
    """Lists, dicts, sets and tensors deep inside a bound container are filled in place too."""
    captured = {"log": [1.0, 2.0], "seen": {3}, "nest": {"x": torch.ones(2), "pair": (torch.ones(1), [5])}}
    log, seen, x, y, five = [9.0], {1, 2}, torch.zeros(2), torch.zeros(1), []
    pair = (y, five)
    bound = {"old": 1, "nest": {"pair": pair, "x": x}, "log": log, "seen": seen}
    nest = bound["nest"]
    harness.restore(harness.capture(bound=captured), bound=bound)
    assert (bound["log"], bound["seen"], bound["nest"], nest["x"]) == (log, seen, nest, x)
    assert bound["log"] is log
    assert bound["seen"] is seen
    assert bound["nest"] is nest
    assert nest["x"] is x
    assert nest["pair"] is pair
    harness.same(bound, captured)


def test_values_are_read_from_state(harness):
    """What can't be filled in place stands in the binding's state, and what is reassigned there is captured next."""
    binding = harness.bind(epoch=1, name="a", shape=(1, 2), best=None)
    binding.state["epoch"] = 5
    image = harness.image(binding)
    binding.state["best"] = {"loss": 0.5}
    later = harness.image(binding)
    harness.same(
        harness.restore(image, epoch=0, name="", shape=(), best=None),
        {"epoch": 5, "name": "a", "shape": (1, 2), "best": None},
    )
    assert harness.restore(later, epoch=0, name="", shape=(), best=None)["best"] == {"loss": 0.5}


class Point(NamedTuple):
    """A subclass of tuple."""

    x: int
    y: int


class Level(enum.IntEnum):
    """A subclass of int."""

    HIGH = 3


class OwnDict(dict):
    """A subclass of dict."""


def freed():
    """Return a tensor whose memory was given back, as FSDP does between uses."""
    tensor = torch.ones(2)
    tensor.untyped_storage().resize_(0)
    return tensor


class HalfStateful:
    """Has only one of the two methods."""

    def state_dict(self):
        return {}


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (threading.Lock(), "_thread.lock"),
        (Point(1, 2), "Point"),
        (Level.HIGH, "Level"),
        (OwnDict(), "OwnDict"),
        (np.str_("x"), "numpy.str_"),
        (torch.__version__, "TorchVersion"),
        (Decimal(1), "decimal.Decimal"),
        (dt.datetime(2026, 1, 1, tzinfo=dt.UTC), "datetime.datetime"),
        (PurePosixPath("/"), "PurePosixPath"),
        (len, "builtin_function_or_method"),
        (nn.Linear, "type"),
        (functools.partial(int), "functools.partial"),
        (object(), "object"),
        (bytearray(b"x"), "bytearray"),
        (range(3), "range"),
        (HalfStateful(), "HalfStateful"),
        (np.array(["x"]), "NumPy array of dtype <U1"),
        (np.array([None]), "NumPy array of dtype object"),
        (np.zeros(2, ">f4"), "NumPy array of dtype >f4"),
        (np.ma.zeros(2), "MaskedArray"),
        (defaultdict(lambda: 0), "defaultdict"),
        ({torch.ones(1)}, "tensor in a set"),
        ({torch.ones(1): 1}, "tensor in a set or as a key"),
        ({(1, torch.ones(1)): 1}, "tensor in a set or as a key"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(harness, value, kind):
    """What can't come back as it is, is refused at capture, with the path of keys to it and its type."""
    for state in ({"sampler": {"odd": value}}, [0, {"odd": value}], {"odd": value, "x": torch.ones(1)}):
        with pytest.raises(StateError) as refused:
            harness.capture(loader=state, x=torch.ones(2))
        path = {2: "loader.sampler.odd", 1: "loader.1.odd"}[1 + isinstance(state, dict)]
        path = "loader.odd" if "odd" in state else path
        assert repr(path) in refused.value.message
        assert kind in refused.value.message
        assert refused.value.hint


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.ones(2).to_sparse(), "a tensor of layout sparse_coo"),
        (lambda: torch.ones(2, 2).to_sparse_csr(), "a tensor of layout sparse_csr"),
        (lambda: torch.ones(2).to_mkldnn(), "a tensor of layout _mkldnn"),
        (lambda: torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
        (lambda: torch.empty(2, device="meta"), "a meta tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "a quantised tensor (qint8)"),
        (lambda: torch.ones(2).to(torch.float8_e4m3fnuz), "a tensor of dtype float8_e4m3fnuz"),
        (lambda: nn.parameter.UninitializedParameter(), "an uninitialised parameter"),
        (freed, "a tensor without memory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_refused_tensors(harness, make, kind):
    """Tensors that are no plain elements are refused with their name and what they are, alone and among others."""
    for state in ({"x": make()}, {"a": torch.ones(1), "x": make(), "b": 1}):
        with pytest.raises(StateError) as refused:
            harness.capture(batch=state)
        assert refused.value.message.startswith(f"state 'batch.x' holds {kind}")


def test_refused_objects_inside_a_state(harness):
    """An object inside what `state_dict` returned is refused, because a restore would have nothing to load it into."""

    class Loader:
        def state_dict(self):
            return {"net": nn.Linear(1, 1)}

        def load_state_dict(self, state):
            raise AssertionError

    with pytest.raises(StateError, match=r"'loader\.net' holds a torch\.nn\.modules\.linear\.Linear") as refused:
        harness.capture(loader=Loader())
    assert "state_dict()" in refused.value.hint


def test_refused_recursion(harness):
    """A container that contains itself is refused instead of ending in a recursion error."""
    loop = {}
    loop["again"] = [loop]
    with pytest.raises(StateError, match=r"nested deeper.*contains itself"):
        harness.capture(loop=loop)


def test_refused_names(harness):
    """Names that ckptd keeps for itself are refused when they are bound, and when they appear later."""
    with pytest.raises(StateError, match="__ckptd__"):
        harness.bind(**{"__ckptd__.rng": 1})
    binding = harness.bind(a=1)
    binding.state[3] = 4
    with pytest.raises(StateError, match="3"):
        binding.prepare(1)


@pytest.mark.parametrize(
    "tree",
    [
        "",
        "[]",
        '{"entries": [], "aliases": {}}',
        '{"entries": [["a", ["nonsense", 1]]], "aliases": {}, "views": {}}',
        '{"entries": [["a", ["tensor"]]], "aliases": {}, "views": {}}',
        '{"entries": [["a", []]], "aliases": {}, "views": {}}',
        '{"entries": [["a", ["dtype", "load"]]], "aliases": {}, "views": {}}',
        '{"entries": [["a", ["set", [["list", []]]]]], "aliases": {}, "views": {}}',
        '{"entries": [["a", ["dict", [1]]]], "aliases": {}, "views": {}}',
        '{"entries": [["a", ["tensor", "b"]]], "aliases": {}, "views": {}}',
        "[" * 5000,
    ],
)
def test_a_tree_that_is_none(harness, tree):
    """Values that are no tree, or name tensors that are not there, are damage and not a crash."""
    import io

    blob = io.BytesIO()
    torch.save({"version": 1, "tree": tree}, blob)
    image = harness.capture(a="x" * 20_000)
    write_values(image, parse(image).values, blob.getvalue())
    with pytest.raises(DamagedError):
        harness.restore(image, a=None)


def test_values_that_hold_code(harness):
    """Values that only a pickle with code could have written are refused unread."""
    import io

    blob = io.BytesIO()
    torch.save({"version": 1, "tree": PurePosixPath("/")}, blob)
    with pytest.raises(DamagedError):
        read_document(blob.getvalue())
    with pytest.raises(DamagedError):
        read_document(b"not a file")


def test_values_of_a_later_version(harness):
    """Values of another format version are refused with both numbers, not guessed at."""
    import io

    blob = io.BytesIO()
    torch.save({"version": 99, "tree": "{}"}, blob)
    with pytest.raises(StateError, match="99"):
        read_document(blob.getvalue())
    image = harness.capture(a=1)
    assert read_document(read_values(image, parse(image).values)).entries["a"].value == 1
