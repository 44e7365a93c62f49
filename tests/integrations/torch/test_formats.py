"""Exports to torch's own formats and imports of them: the library loads every element, and a restore brings it back."""

import json
import math
import warnings
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp

from ckptd.errors import DamagedError, StateError
from ckptd.storage import keys
from ckptd_integrations.torch.tensors import DTYPES
from tests.integrations.torch.stored import AT, IMPORTERS, commit, committed, exported, image_of, imported, restored

FORMATS = ("torch", "dcp")


def zoo():
    """Tensors of all dtypes, shapes and strides, and names that are no identifiers."""
    bits = torch.arange(48, dtype=torch.uint8)
    tensors = {name: (bits % 2).bool() if name == "BOOL" else bits.view(dtype) for name, dtype in DTYPES.items()}
    shared = torch.randn(3, 4)
    return {
        **tensors,
        "complex128": torch.randn(5, 2, dtype=torch.complex128),
        "conjugated": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0),
        "hollow": torch.empty(3, 0, 2, dtype=torch.bfloat16),
        "nan": torch.tensor([math.nan, -0.0, math.inf]),
        "turned": torch.randn(4, 6).t(),
        "every other": torch.randn(9)[::2],
        "expanded": torch.randn(3, 1).expand(3, 5),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "tied": shared,
        "tied too": shared,
        "part of tied": shared[1:],
        "ä b/c": torch.ones(1),
        "line\nbreak": torch.ones(2),
        "": torch.ones(3),
        "a": {"b": torch.ones(4)},
        "a.b": torch.ones(5),
    }


def flat(state, path=()):
    """Yield every leaf of a nested state with its path, as DCP sees it."""
    if isinstance(state, dict):
        for key, item in state.items():
            yield from flat(item, (*path, str(key)))
    else:
        yield ".".join(path), state


def load(name, folder, wanted):
    """Load an export with the library that it is for; return it in the form of `wanted`."""
    if name == "torch":
        return torch.load(folder / "checkpoint.pt", weights_only=True)
    target = {key: empty(item) for key, item in wanted.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no other ranks
        dcp.load(target, storage_reader=dcp.FileSystemReader(folder))
    return target


def empty(item):
    """Return a copy without what matters."""
    if isinstance(item, torch.Tensor):
        return torch.zeros(item.shape, dtype=item.dtype)
    if isinstance(item, (dict, OrderedDict)):
        return {key: empty(inner) for key, inner in item.items()}
    if isinstance(item, list) and any(isinstance(inner, (dict, list, torch.Tensor)) for inner in item):
        return [empty(inner) for inner in item]
    return None


@pytest.mark.parametrize("name", FORMATS)
def test_every_tensor_is_exported(tmp_path, harness, name):
    """Tensors of all dtypes, shapes and names are what they were, element by element, as the library loads them."""
    state = zoo()
    if name == "dcp":
        del state["a.b"]  # the next test
    folder = exported(name, committed({"state": state}), tmp_path / "out")
    harness.same(load(name, folder, {"state": state}), {"state": state})
    described = json.loads((folder / "checkpoint.json").read_text())
    assert (described["step"], described["values"]) == (7, {"loss": 0.5})
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_names_that_dcp_joins_are_refused(tmp_path):
    """Two tensors that DCP would call the same are refused by name, and nothing is left."""
    tier = committed({"state": {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}})
    with pytest.raises(StateError, match=r"state\.a\.b") as caught:
        exported("dcp", tier, tmp_path / "out")
    assert "\n" not in caught.value.message
    assert not list(tmp_path.iterdir())


def test_a_torch_file_keeps_ties(tmp_path):
    """Tied tensors share memory in the torch file too, and tensors that are only equal do not."""
    shared = torch.zeros(3)
    tier = committed({"state": {"a": shared, "b": shared, "c": torch.zeros(3)}})
    loaded = torch.load(exported("torch", tier, tmp_path / "out") / "checkpoint.pt", weights_only=True)["state"]
    loaded["a"] += 1
    assert loaded["b"].tolist() == [1, 1, 1]
    assert loaded["c"].tolist() == [0, 0, 0]


VALUES = {
    "none": None,
    "flag": True,
    "number": -3,
    "huge": 1 << 200,
    "float": -0.0,
    "nan": math.nan,
    "complex": 1 - 2j,
    "text": "ä\n\0",
    "bytes": b"\0\xff",
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "size": torch.Size([2, 3]),
    "list": [1, [2.5, "x"], {"y": None}],
    "empty list": [],
    "tuple": (1, (2,)),
    "many": list(range(1000)),
    "many floats": tuple(i / 7 for i in range(100)),
    "set": {1, 2},
    "counter": Counter("aab"),
    "ordered": OrderedDict(b=1, a=2),
    "numbered": {0: "a", 1: "b"},
    "tensors": [torch.ones(2), {"x": torch.zeros(1)}],
    "pair": (torch.ones(2), 5),
}
CHANGED = {
    "deque": (deque([1, 2], maxlen=5), [1, 2]),
    "frozen": (frozenset({3}), {3}),
    "default": (defaultdict(int, a=1), {"a": 1}),
    "scalar": (np.float32(1.5), 1.5),
    "numbers": ([np.int64(4)], [4]),
    "array": (np.arange(6.0).reshape(2, 3), torch.arange(6.0, dtype=torch.float64).view(2, 3)),
}


def test_every_value_is_in_a_torch_file(tmp_path, harness):
    """Values come back with their types, and what torch would refuse to load comes as its plain likeness."""
    state = VALUES | {name: item for name, (item, _) in CHANGED.items()}
    folder = exported("torch", committed({"state": state, "number": 5}), tmp_path / "out")
    loaded = torch.load(folder / "checkpoint.pt", weights_only=True)
    harness.same(loaded, {"state": VALUES | {name: item for name, (_, item) in CHANGED.items()}, "number": 5})


@pytest.mark.parametrize("name", FORMATS)
def test_values_come_back_by_an_import(tmp_path, harness, name):
    """What an export holds fills bound objects again, deques and arrays too: it takes the form of what is bound."""
    state = {key: item for key, item in VALUES.items() if name == "torch" or key != "numbered"}
    state |= {key: item for key, (item, _) in CHANGED.items() if key not in ("scalar", "numbers", "frozen")}
    folder = exported(name, committed({"state": state, "epoch": 5, "recent": deque([1.5], 3)}), tmp_path / "out")
    tier, _, at = imported(IMPORTERS[name], folder)
    fresh = {key: type(item)() if isinstance(item, (list, set)) else item for key, item in state.items()}
    fresh["deque"], fresh["array"] = deque(maxlen=5), np.zeros((2, 3))
    bound = {"state": fresh, "epoch": 0, "recent": deque(maxlen=3)}
    recent = bound["recent"]
    back = restored(tier, at, bound)
    if name == "torch":
        harness.same(back["state"], {key: state[key] for key in back["state"]})
        assert list(back["state"]) == list(state)
    assert back["state"]["deque"] == deque([1, 2])
    assert back["state"]["array"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (back["epoch"], list(recent), recent.maxlen) == (5, [1.5], 3)


class Tied(nn.Module):
    """A model with tied weights and buffers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.last.weight = self.first.weight

    def forward(self, numbers):
        return self.last(self.norm(self.first(numbers)))


def make(optimizer, seed):
    torch.manual_seed(seed)
    model = Tied()
    made = {
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=0.1),
        "momentum": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "plain": lambda: torch.optim.SGD(model.parameters(), lr=0.1),
        "groups": lambda: torch.optim.Adam(
            [{"params": [model.first.weight], "lr": torch.tensor(0.1)}, {"params": model.norm.parameters()}]
        ),
    }[optimizer]()
    schedule = torch.optim.lr_scheduler.StepLR(made, 3)
    return {"model": model, "optimizer": made, "schedule": schedule}


def train(state, steps):
    for _ in range(steps):
        state["optimizer"].zero_grad()
        state["model"](torch.randint(7, (5,))).square().mean().backward()
        state["optimizer"].step()
        state["schedule"].step()


@pytest.mark.parametrize("optimizer", ["adamw", "momentum", "plain", "groups"])
@pytest.mark.parametrize("name", FORMATS)
def test_training_goes_on_after_export_and_import(tmp_path, harness, name, optimizer):
    """Exported, imported and restored, a run draws the same numbers and ends bit for bit as one uninterrupted."""
    state = make(optimizer, 1)
    train(state, 4)
    folder = exported(name, committed(state, rng=True), tmp_path / "out")
    train(state, 4)
    tier, cargo, at = imported(IMPORTERS[name], folder)
    assert (cargo.states, cargo.step, cargo.metrics) == (("model", "optimizer", "schedule"), 7, {"loss": 0.5})
    again = make(optimizer, 2)
    restored(tier, at, again, rng=True)
    train(again, 4)
    for key in state:
        harness.same(again[key].state_dict(), state[key].state_dict(), key)


@pytest.mark.parametrize("name", FORMATS)
def test_torch_loads_the_states_itself(tmp_path, harness, name):
    """Without ckptd, `load_state_dict` takes what the library loaded, and training goes on as it would have."""
    state = make("adamw", 1)
    train(state, 4)
    folder = exported(name, committed(state), tmp_path / "out")
    wanted = {key: item.state_dict() for key, item in state.items()}
    loaded = load(name, folder, wanted)
    again = make("adamw", 2)
    for key, item in again.items():
        item.load_state_dict(loaded[key])
    torch.manual_seed(3)
    train(state, 4)
    torch.manual_seed(3)
    train(again, 4)
    harness.same(again["model"], state["model"])


def test_a_dcp_folder_is_what_torch_would_write(tmp_path):
    """Names and shapes are those that `dcp.save` gives the same states."""
    state = make("adamw", 1)
    train(state, 1)
    theirs, ours = tmp_path / "theirs", exported("dcp", committed(state), tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({key: item.state_dict() for key, item in state.items()}, checkpoint_id=theirs)
    read = [dcp.FileSystemReader(folder).read_metadata() for folder in (theirs, ours)]
    sizes = [{key: getattr(item, "size", None) for key, item in one.state_dict_metadata.items()} for one in read]
    assert sizes[0] == sizes[1]
    assert read[0].planner_data == read[1].planner_data
    assert "optimizer.state.0.exp_avg" in sizes[1]


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_imported_exports_the_same(tmp_path, harness, name):
    """Export, import and export again: the two exports hold the same."""
    state = make("adamw", 1) | {"counts": [1, 2], "x": torch.ones(3)}
    train(state, 2)
    first = exported(name, committed(state, rng=True), tmp_path / "first")
    tier, _, at = imported(IMPORTERS[name], first)
    second = exported(name, tier, tmp_path / "second", at=at)
    if name == "torch":
        loaded = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (first, second)]
    else:
        loaded = []
        for folder in (first, second):
            again, cargo, where = imported(IMPORTERS[name], folder)
            loaded.append({tensor.name: again_bytes(tensor) for tensor in cargo.tensors} | {"states": cargo.states})
            assert again.get(keys.manifest_key("job", where))
    harness.same(loaded[0], loaded[1])


def again_bytes(tensor):
    data = bytearray(tensor.data.size_bytes)
    tensor.data.read_into(0, memoryview(data))
    return tensor.dtype, tensor.shape, bytes(data)


def test_what_ranks_had_of_their_own(tmp_path, harness):
    """Rank 0's is the state; below rank-N is what another rank had otherwise, dict by dict, and nothing else."""
    common = torch.arange(4.0)
    ranks = [
        {
            "state": {"same": common, "own": torch.tensor([float(rank)]), "seed": rank, "name": "x"},
            "loader": [rank, torch.full((2,), rank)],
            "both": {"deep": {"a": 1, "b": 2}},
        }
        for rank in range(3)
    ]
    ranks[2]["state"]["more"] = torch.ones(1)
    ranks[1]["loader"] = ranks[0]["loader"]
    tier = commit([image_of(state, rank, 3) for rank, state in enumerate(ranks)])
    loaded = torch.load(exported("torch", tier, tmp_path / "out") / "checkpoint.pt", weights_only=True)
    harness.same(
        loaded,
        {
            **ranks[0],
            "rank-1": {"state": {"own": torch.tensor([1.0]), "seed": 1}},
            "rank-2": {
                "state": {"own": torch.tensor([2.0]), "seed": 2, "more": torch.ones(1)},
                "loader": ranks[2]["loader"],
            },
        },
    )
    _, cargo, _ = imported(IMPORTERS["torch"], tmp_path / "out")
    assert cargo.states == ("state", "loader", "both")
    assert [note for note in cargo.notes if "rank-2" in note]
    tier, cargo, at = imported(IMPORTERS["torch"], tmp_path / "out", {"loader": "rank-2.loader"})
    assert cargo.notes == ("left out: rank-1, what one rank had of its own",)
    harness.same(restored(tier, at, {"loader": [0, torch.zeros(2, dtype=torch.int64)]})["loader"], ranks[2]["loader"])


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_damaged_is_exported(tmp_path, name):
    """A flipped bit in the store is found before anything stands in the target's place."""
    tier = committed({"state": {"w": torch.arange(5000.0)}})
    key = keys.shard_key("job", AT, 0)
    data = bytearray(tier.get(key))
    data[9000] ^= 1
    tier.put(key, bytes(data))
    with pytest.raises(DamagedError, match=r"'state\.w'"):
        exported(name, tier, tmp_path / "out")
    assert not list(tmp_path.iterdir())
