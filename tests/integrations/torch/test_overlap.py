"""Captures beside training: the same image as at the boundary, and a change under the copy never goes unnoticed."""

import mmap
import threading

import pytest
import torch
from torch import nn

from ckptd.client.framework import Membership
from ckptd.errors import StateError
from ckptd.storage.image import parse
from ckptd_integrations.torch import layouts, overlap
from ckptd_integrations.torch.framework import TorchFramework


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Let small tensors wait, too."""
    monkeypatch.setattr(layouts, "SMALL_BYTES", 1)
    monkeypatch.setattr(layouts, "SMALL_TENSOR_BYTES", 0)


class Beside:
    """Objects that are bound, memory for their images, and a copy that began at the last boundary."""

    def __init__(self, **state):
        self.binding = TorchFramework().bind(state, rng=True, membership=Membership(0, 1))
        self.waits = []
        self.copy = None
        self._memory = []

    def memory(self):
        memory = mmap.mmap(-1, self.binding.prepare(1).image_bytes)
        self._memory.append(memory)
        return memory

    def begin(self):
        """Write what a boundary's image is, and begin another one beside training."""
        self.expected, self.slot = self.memory(), self.memory()
        self.binding.prepare(1).write(memoryview(self.expected))
        self.copy = self.binding.prepare(1).begin(memoryview(self.slot))
        self.binding.before_optimizer_steps(self.wait)
        return self.copy

    def wait(self):
        self.waits.append(threading.get_ident())
        if self.copy is not None:
            self.copy.finish()

    def is_right(self):
        return self.expected[:] == self.slot[:]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.binding.close()
        for memory in self._memory:
            memory.close()  # fails when anything still refers to it


def model_of(width=32):
    return nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 8), nn.Linear(8, 8))


def backward(model):
    model(torch.randn(4, 8)).square().mean().backward()


def step(model, *optimizers):
    backward(model)
    for optimizer in optimizers:
        optimizer.step()


MAKERS = {
    "SGD": lambda p: [torch.optim.SGD(p, lr=0.1, momentum=0.9)],
    "AdamW": lambda p: [torch.optim.AdamW(p, foreach=False)],
    "AdamW foreach": lambda p: [torch.optim.AdamW(p, foreach=True)],
    "AdamW fused": lambda p: [torch.optim.AdamW(p, fused=True)],
    "Adagrad": lambda p: [torch.optim.Adagrad(p)],
    "two": lambda p: [torch.optim.AdamW(p[:3]), torch.optim.SGD(p[3:], lr=0.1, momentum=0.9)],
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("backwards", [1, 3])
def test_the_image_is_that_of_the_boundary(kind, backwards):
    """For every kind of optimizer, and however many backward passes come before its step: the step waits for the copy,
    which is what the boundary's would have been."""
    model = model_of()
    optimizers = MAKERS[kind](list(model.parameters()))
    with Beside(model=model, parts={"optimizers": optimizers}) as beside:
        step(model, *optimizers)
        assert beside.begin() is not None
        for _ in range(backwards):
            backward(model)
        assert not beside.waits
        for optimizer in optimizers:
            optimizer.step()
        assert len(beside.waits) == len(optimizers)
        assert beside.is_right()


def test_scaler():
    """A step that a scaler skips waits for nothing and changes nothing; one that it makes waits."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with Beside(model=model, optimizer=optimizer, scaler=scaler) as beside:
        step(model, optimizer)
        copy = beside.begin()
        for loss_factor in (float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(4, 8)).square().mean() * loss_factor).backward()
            scaler.step(optimizer)
            scaler.update()
            assert len(beside.waits) == (loss_factor == 1.0)
        copy.finish()
        assert beside.is_right()


def test_closures():
    """An optimizer that evaluates the model several times in one step waits before the first."""
    model = nn.Linear(8, 8)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 8)).square().mean()
        loss.backward()
        return loss

    with Beside(model=model, optimizer=optimizer) as beside:
        optimizer.step(closure)
        beside.begin()
        optimizer.step(closure)
        assert len(beside.waits) == 1
        assert beside.is_right()


def test_optimizers_in_backward_hooks():
    """Optimizers that step while gradients are still being computed wait as well, on whatever thread that is."""
    model = model_of()
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1, momentum=0.9) for parameter in model.parameters()}
    with Beside(model=model, optimizers=list(optimizers.values())) as beside:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda item: optimizers[item].step())
        backward(model)
        beside.begin()
        backward(model)
        assert len(beside.waits) == len(optimizers)
        assert beside.is_right()


def test_an_optimizer_that_is_not_bound():
    """Also an optimizer that nobody bound waits before it changes a parameter that a bound one owns."""
    model = model_of()
    bound, other = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(model.parameters(), lr=0.2)
    with Beside(model=model, bound=bound) as beside:
        step(model, bound)
        beside.begin()
        step(model, other)
        assert len(beside.waits) == 1
        assert beside.is_right()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_steps():
    """A compiled step calls the hook as well."""
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    compiled = torch.compile(optimizer.step, backend="eager")
    with Beside(model=model, optimizer=optimizer) as beside:
        backward(model)
        compiled()
        beside.begin()
        backward(model)
        compiled()
        assert beside.waits
        assert beside.is_right()


CHANGES = {
    "model.2.weight": lambda model, optimizer: model[2].weight.clamp_(-0.1, 0.1),
    "model.0.weight": lambda model, optimizer: setattr(model[0].weight, "data", torch.zeros(32, 8)),
    "optimizer.state.1.exp_avg": lambda model, optimizer: optimizer.state[model[0].bias]["exp_avg"].zero_(),
    "optimizer.state.0.step": lambda model, optimizer: optimizer.step.__wrapped__(optimizer),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_under_the_copy_is_named(name):
    """What changes a parameter or an optimizer's state between boundary and step makes the image void, by name: in
    place, by replacing its memory, or by a fused step that went around the hook."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with Beside(model=model, optimizer=optimizer) as beside:
        step(model, optimizer)
        copy = beside.begin()
        backward(model)
        with torch.no_grad():
            CHANGES[name](model, optimizer)
        for _ in range(2):
            with pytest.raises(StateError, match=rf"'{name}'.*changed while it was copied"):
                copy.finish()


def test_only_what_an_optimizer_owns_waits():
    """Buffers, frozen parameters, learning rates that are tensors and all else may change right after the boundary."""
    model = model_of()
    model[3].requires_grad_(False)
    rate = torch.tensor(0.1)
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=rate, foreach=False)
    free = torch.zeros(1000)
    with Beside(model=model, optimizer=optimizer, free=free, array=free.numpy()[5:]) as beside:
        step(model, optimizer)
        copy = beside.begin()
        with torch.no_grad():
            for item in (model[1].running_mean, model[3].weight, rate, free):
                item.add_(1)
        copy.finish()
        assert beside.is_right()


def test_modules_that_hand_out_other_tensors():
    """A module with hooks hands out detached tensors; what its optimizer owns waits all the same, and is watched."""
    model = nn.Linear(8, 8)
    model.register_state_dict_post_hook(lambda *_: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Beside(model=model, optimizer=optimizer) as beside:
        step(model, optimizer)
        copy = beside.begin()
        with torch.no_grad():
            model.weight.zero_()
        with pytest.raises(StateError, match=r"'model\.weight'"):
            copy.finish()


def test_nothing_waits_without_an_optimizer_or_its_steps():
    """Where no optimizer is bound, or no step of one was seen since the last image (as when it is replayed as a graph),
    the image is complete at once."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Beside(model=model) as beside:
        step(model, optimizer)
        assert beside.begin() is None
        assert beside.is_right()
    with Beside(model=model, optimizer=optimizer) as beside:
        assert beside.begin() is None
        assert beside.is_right()
        step(model, optimizer)
        beside.begin().finish()
        assert beside.begin() is None
        assert beside.is_right()


def test_inference_tensors():
    """Tensors that torch counts no changes of are copied at the boundary."""
    with torch.inference_mode():
        weight = torch.randn(8, 8)
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Beside(model=model, optimizer=optimizer) as beside:
        step(model, optimizer)
        optimizer.state[model[0].weight]["kept"] = weight
        assert beside.begin() is None
        assert beside.is_right()


def test_copies_need_no_thread(monkeypatch):
    """Where no thread can be started any more, the copy is made at the boundary."""

    def refuse(self):
        raise RuntimeError("can't start new thread")

    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Beside(model=model, optimizer=optimizer) as beside:
        step(model, optimizer)
        monkeypatch.setattr(overlap.threading.Thread, "start", refuse)
        copy = beside.begin()
        assert copy.done
        copy.finish()
        assert beside.is_right()


def test_finish_from_two_threads():
    """Training and autograd may both finish a copy; afterwards nothing refers to the slot."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Beside(model=model, optimizer=optimizer) as beside:
        step(model, optimizer)
        copy = beside.begin()
        other = threading.Thread(target=copy.finish)
        other.start()
        copy.finish()
        other.join()
        assert copy.done
        assert beside.is_right()


def test_hooks_go_with_the_binding():
    """A binding that is closed, or forgotten, leaves no hook behind in torch."""
    from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks

    before = len(hooks)
    with Beside(a=1):
        assert len(hooks) == before + 1
    assert len(hooks) == before
    TorchFramework().bind({"a": 1}, rng=False, membership=Membership(0, 1))
    assert len(hooks) == before


class Device:
    """Stands for the copies of a device that orders steps after them."""

    def __init__(self):
        self.done = False
        self.calls = []

    def order(self):
        self.calls.append("order")

    def synchronize(self):
        self.calls.append("synchronize")
        self.done = True


def test_a_device_orders_steps_after_the_copy():
    """While a device copies, a step does not wait on the host, and what it changes does not make the image void; what
    was changed before does. When the copy is done, the step is a chance to finish it."""
    for early in (False, True):
        tensor = nn.Parameter(torch.zeros(3))
        tensor.grad = torch.ones(3)
        device, hook, waits = Device(), overlap.StepHook(), []
        pending = overlap.PendingCopy(overlap.Watch(["w"], [tensor], [tensor]), [tensor], None, device)
        hook.follow(pending)
        hook.call(lambda seen=waits: seen.append(1))
        optimizer = torch.optim.SGD([tensor], lr=0.1)
        if early:
            with torch.no_grad():
                tensor.add_(1)
        for _ in range(2):
            optimizer.step()
        assert device.calls == ["order", "order"]
        assert not waits
        device.done = True
        optimizer.step()
        assert waits
        if early:
            with pytest.raises(StateError, match="'w'"):
                pending.finish()
        else:
            pending.finish()
        assert device.calls[-1] == "synchronize"
        hook.close()


def test_layout_names_are_those_of_the_boundary():
    """An image begun beside training is complete for any reader once it is finished."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    with Beside(model=model, optimizer=optimizer) as beside:
        step(model, optimizer)
        beside.begin().finish()
        with memoryview(beside.slot) as image:
            names = {span.name for span in parse(image).spans}
        assert {"model.0.weight", "optimizer.state.0.exp_avg"} <= names
