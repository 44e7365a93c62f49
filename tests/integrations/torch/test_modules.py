"""Modules: plain ones are filled by copying, those with code of their own load themselves."""

import copy
import tempfile

import pytest
import torch
from torch import nn

from ckptd.errors import StateError
from ckptd_integrations.torch.objects import is_plain, loads_itself


class ExtraState(nn.Module):
    """Has state beside its parameters, with a tensor in it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.seen = {"count": 0, "mean": torch.zeros(2)}

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


class Renaming(nn.Module):
    """Writes its parameter under another name and reads it from there."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.loads = 0
        self.register_state_dict_post_hook(self._rename)
        self.register_load_state_dict_pre_hook(self._accept)

    @staticmethod
    def _rename(module, state, prefix, metadata):
        state[prefix + "w"] = state.pop(prefix + "weight") * 2

    @staticmethod
    def _accept(module, state, prefix, *rest):
        state[prefix + "weight"] = state.pop(prefix + "w") / 2
        module.loads += 1


class Versioned(nn.Module):
    """Looks at the version its state was written with."""

    _version = 7

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.seen_version = None

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        self.seen_version = local_metadata.get("version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class OwnDict(nn.Module):
    """Returns something else than a dict of tensors."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))

    def state_dict(self):
        return [self.weight.detach(), {"format": 1}]

    def load_state_dict(self, state):
        self.weight.data.copy_(state[0])


def test_extra_state(harness):
    """Extra state is captured with the parameters and loaded through the module, as tensors of its own."""
    first, second = ExtraState(), ExtraState()
    first.seen = {"count": 3, "mean": torch.ones(2)}
    image = harness.capture(model=first)
    harness.restore(image, model=second)
    image[:] = bytes(len(image))
    harness.same(second.state_dict(), first.state_dict())
    assert not is_plain(first)
    assert not loads_itself(first)


def test_extra_state_does_not_hide_a_mismatch(harness):
    """A module with extra state is checked like a plain one before it loads itself."""
    other = ExtraState()
    other.layer = nn.Linear(2, 3)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(StateError, match=r"'model\.layer\.weight' is \[2, 2\].*\[3, 2\] in the model"):
        harness.restore(harness.capture(model=ExtraState()), model=other)
    other.layer = nn.Linear(2, 2, bias=False)
    with pytest.raises(StateError, match=r"'model\.layer\.bias' is in the checkpoint and not in the model"):
        harness.restore(harness.capture(model=ExtraState()), model=other)
    harness.same(other.seen, before["_extra_state"])


def test_hooks(harness):
    """Hooks that change what is written and read see what they would see with `load_state_dict`."""
    first, second = nn.Sequential(Renaming(), nn.Linear(2, 2)), nn.Sequential(Renaming(), nn.Linear(2, 2))
    harness.restore(harness.capture(model=first), model=second)
    harness.same(second.state_dict(), first.state_dict())
    assert torch.equal(first[0].weight, second[0].weight)
    assert second[0].loads == 1
    assert loads_itself(first)


def test_versions(harness, monkeypatch):
    """A module that looks at the version of its state gets the one that was captured, not its own of today."""
    first, second = nn.Sequential(Versioned()), nn.Sequential(Versioned())
    image = harness.capture(model=first)
    monkeypatch.setattr(Versioned, "_version", 8)
    harness.restore(image, model=second)
    harness.same(second.state_dict(), first.state_dict())
    assert second[0].seen_version == 7


def test_a_hook_that_came_later(harness):
    """A module that was plain when it was captured may load itself now."""
    plain, hooked = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    calls = []
    hooked.register_load_state_dict_pre_hook(lambda module, state, prefix, metadata, *rest: calls.append(metadata))
    harness.restore(harness.capture(model=plain), model=hooked)
    harness.same(hooked.state_dict(), plain.state_dict())
    assert [metadata["version"] for metadata in calls] == [1]


def test_own_state_dicts(harness):
    """A module whose methods return and take something of its own is left to itself."""
    first, second = OwnDict(), OwnDict()
    harness.restore(harness.capture(model=first), model=second)
    assert torch.equal(first.weight, second.weight)


def test_modules_that_refuse(harness):
    """An error while a module loads itself becomes one that names the module and the cause."""

    class Refusing(ExtraState):
        def set_extra_state(self, state):
            raise KeyError("nothing for me")

    with pytest.raises(StateError, match=r"'model', a Refusing, did not accept .*KeyError.*nothing for me"):
        harness.restore(harness.capture(model=ExtraState()), model=Refusing())


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.InstanceNorm2d(2, track_running_stats=True)),
        lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(2, 3)),
        lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)),
        lambda: torch.compile(nn.Linear(2, 2)),
        lambda: nn.ParameterDict({"a": torch.ones(2)}),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_modules_of_torch(harness, make):
    """Modules of torch that are parameters and buffers only are recognised as such, and filled by copying."""
    first, second = make(), make()
    for parameter in first.parameters():
        parameter.data.normal_()
    pointers = [tensor.data_ptr() for tensor in second.state_dict().values()]
    harness.restore(harness.capture(model=first), model=second)
    harness.same(second.state_dict(), first.state_dict())
    assert [tensor.data_ptr() for tensor in second.state_dict().values()] == pointers
    parametrized = any(hasattr(part, "parametrizations") for part in first.modules())
    assert is_plain(first) or parametrized


def test_ddp(harness):
    """A module wrapped for data parallel training is captured with its wrapper's names and goes on working."""
    with tempfile.NamedTemporaryFile() as file:
        store = torch.distributed.FileStore(file.name, 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            first, second = (nn.parallel.DistributedDataParallel(nn.Linear(2, 2)) for _ in range(2))
            image = harness.capture(model=first)
            harness.restore(image, model=second)
            harness.same(second.state_dict(), first.state_dict())
            assert "module.weight" in first.state_dict()
            x = torch.ones(1, 2)
            for model in (first, second):
                model(x).sum().backward()
            assert torch.equal(first.module.weight.grad, second.module.weight.grad)
        finally:
            torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_modules(harness):
    """A module that has not seen its input yet is refused at capture, and materialised by a restore."""
    lazy = nn.LazyLinear(3)
    with pytest.raises(StateError, match=r"'model\.weight' holds an uninitialised parameter.*forward"):
        harness.capture(model=lazy)
    ready = nn.LazyLinear(3)
    ready(torch.ones(1, 2))
    harness.restore(harness.capture(model=ready), model=lazy)
    harness.same(lazy.state_dict(), ready.state_dict())


def test_loaders_and_other_objects(harness):
    """Any object with the two methods is captured by what one returns and loaded by what the other takes."""

    class Loader:
        def __init__(self, position):
            self.state = {"position": position, "order": torch.randperm(5), "epoch": [position]}

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = state

    first, second = Loader(3), Loader(0)
    image = harness.capture(loader=first)
    harness.restore(image, loader=second)
    image[:] = bytes(len(image))
    harness.same(second.state, first.state)
