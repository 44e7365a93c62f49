"""A run that is captured, restored into new objects and continued is bit for bit the run that went on."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lr

from ckptd_integrations.torch.sources import CheckpointTensors

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "momentum-foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam-fused-tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), fused=True),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"),
    "groups": lambda p: torch.optim.AdamW([{"params": p[:2], "lr": 0.1}, {"params": p[2:], "weight_decay": 0.0}]),
    "named": lambda p: torch.optim.Adam([(f"p{i}", x) for i, x in enumerate(p)]),
}
SCHEDULERS = {
    "step": lambda o: lr.StepLR(o, 2),
    "multistep": lambda o: lr.MultiStepLR(o, [2, 2, 4, 6]),
    "lambda": lambda o: lr.LambdaLR(o, lambda step: 0.9**step),
    "lambda-object": lambda o: lr.LambdaLR(o, Warmup(3)),
    "multiplicative": lambda o: lr.MultiplicativeLR(o, lambda _: 0.9),
    "constant": lambda o: lr.ConstantLR(o, total_iters=4),
    "linear": lambda o: lr.LinearLR(o, total_iters=4),
    "exponential": lambda o: lr.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lr.PolynomialLR(o, 9),
    "cosine": lambda o: lr.CosineAnnealingLR(o, 9),
    "restarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 3),
    "onecycle": lambda o: lr.OneCycleLR(o, 0.2, total_steps=20),
    "cyclic": lambda o: lr.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "plateau": lambda o: lr.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o: lr.SequentialLR(o, [lr.ConstantLR(o, 0.1, 3), lr.ExponentialLR(o, 0.9)], [3]),
    "chained": lambda o: lr.ChainedScheduler([lr.ConstantLR(o, 0.1, 3), lr.ExponentialLR(o, 0.9)]),
    "swalr": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=5),
}


class Warmup:
    """A factor with a state of its own, which `LambdaLR` captures with itself."""

    def __init__(self, steps):
        self.steps = steps
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        return min(1.0, (step + 1) / self.steps)


class Trainer:
    """A small run with everything that has a state: dropout, batch statistics, optimizer, scheduler, scaler."""

    def __init__(self, optimizer="adam", scheduler=None, scaler=False, dtype=torch.float32):
        self.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 2)).to(dtype)
        self.dtype = dtype
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.parameters()))
        self.state = {"model": self.model, "optimizer": self.optimizer, "log": []}
        if scheduler is not None:
            self.state["scheduler"] = SCHEDULERS[scheduler](self.optimizer)
        if scaler:
            self.state["scaler"] = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)

    def step(self):
        x = torch.randn(5, 4, dtype=self.dtype) + random.random() + np.random.random()  # noqa: NPY002 - the global generator is what is captured

        def closure():
            self.optimizer.zero_grad()
            loss = self.model(x).float().square().mean()
            (self.state["scaler"].scale(loss) if "scaler" in self.state else loss).backward()
            return loss

        if isinstance(self.optimizer, torch.optim.LBFGS):
            loss = self.optimizer.step(closure)
        else:
            loss = closure()
            if "scaler" in self.state:
                self.state["scaler"].step(self.optimizer)
                self.state["scaler"].update()
            else:
                self.optimizer.step()
        scheduler = self.state.get("scheduler")
        if isinstance(scheduler, lr.ReduceLROnPlateau):
            scheduler.step(float(loss.detach()))
        elif scheduler is not None:
            scheduler.step()
        self.state["log"].append(float(loss.detach()))

    def snapshot(self):
        """Everything there is to know of the run, but for functions."""
        return {
            name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in self.state.items()
        }


def seed(number):
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.manual_seed(number)


def continues_bit_identical(harness, make, before=3, after=4):
    """Train, capture, go on; then restore into new objects of another beginning, and go on the same way."""
    seed(1)
    first = make()
    for _ in range(before):
        first.step()
    image = harness.capture(rng=True, **first.state)
    captured = first.snapshot()["log"][:]
    for _ in range(after):
        first.step()
    draws = (random.random(), np.random.random(), torch.rand(2))  # noqa: NPY002

    seed(2)
    second = make()
    for _ in range(before % 2):
        second.step()
    harness.restore(image, rng=True, **second.state)
    assert second.state["log"] == captured
    for _ in range(after):
        second.step()
    harness.same(second.snapshot(), first.snapshot())
    harness.same((random.random(), np.random.random(), torch.rand(2)), draws)  # noqa: NPY002
    return first, second


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(harness, optimizer):
    """Each optimizer of torch goes on bit-identical, restored over a fresh one and over one that has trained."""
    for before in (2, 3):
        continues_bit_identical(harness, lambda: Trainer(optimizer), before)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", ["momentum", "adam-fused-tensor-lr"])
def test_schedulers(harness, optimizer, scheduler):
    """Each learning rate scheduler goes on bit-identical, with a number and with a tensor as learning rate."""
    continues_bit_identical(harness, lambda: Trainer(optimizer, scheduler))


def test_scaler(harness):
    """The loss scale and its growth go on, also right after a step that was skipped for overflow."""
    first, _ = continues_bit_identical(harness, lambda: Trainer("adam", "step", scaler=True), before=2)
    assert first.state["scaler"].get_scale() != 2.0**40


@pytest.mark.parametrize("optimizer", ["adam", "momentum", "adamw-foreach"])
def test_low_precision(harness, optimizer):
    """Parameters and moments in bfloat16 come back in bfloat16."""
    _, second = continues_bit_identical(harness, lambda: Trainer(optimizer, dtype=torch.bfloat16))
    assert second.optimizer.state[second.model[0].weight]


def test_before_the_first_step(harness):
    """An optimizer that has no state yet is captured and restored as it is."""
    continues_bit_identical(harness, lambda: Trainer("adamw-fused", "onecycle"), before=0)


class Float32Moments(torch.optim.Optimizer):
    """Keeps moments in float32 whatever its parameters are, as mixed precision optimizers do."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                moment = self.state[parameter].setdefault("moment", torch.zeros(parameter.shape))
                moment.mul_(0.9).add_(parameter.grad.float())
                parameter.sub_(group["lr"] * moment)


def test_moments_keep_their_precision(harness, monkeypatch):
    """Moments of a wider dtype than their parameter's are not narrowed, which torch's own loading would do."""
    monkeypatch.setitem(OPTIMIZERS, "moments", Float32Moments)
    _, second = continues_bit_identical(harness, lambda: Trainer("moments", dtype=torch.bfloat16))
    moment = second.optimizer.state[second.model[0].weight]["moment"]
    assert moment.dtype is torch.float32
    assert not torch.equal(moment, moment.bfloat16().float())


def test_channels_last(harness):
    """Moments keep the memory order of their channels-last parameters, on which fused kernels rely."""

    class Convolutions(Trainer):
        def __init__(self):
            self.model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
            self.state = {"model": self.model, "optimizer": self.optimizer, "log": []}

        def step(self):
            self.optimizer.zero_grad()
            loss = self.model(torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.state["log"].append(float(loss.detach()))

    _, second = continues_bit_identical(harness, Convolutions)
    weight = second.model.weight
    assert second.optimizer.state[weight]["exp_avg"].stride() == weight.stride()


def test_a_learning_rate_tensor_stays_the_same_object(harness):
    """A learning rate that is a tensor is filled in place: a captured CUDA graph reads it from where it is."""
    first, second = Trainer("adam-fused-tensor-lr"), Trainer("adam-fused-tensor-lr")
    first.optimizer.param_groups[0]["lr"].fill_(0.5)
    rate = second.optimizer.param_groups[0]["lr"]
    harness.restore(harness.capture(optimizer=first.optimizer), optimizer=second.optimizer)
    assert second.optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 0.5


def test_several_optimizers_in_a_list(harness):
    """Objects in the user's own lists and dicts are loaded where they stand."""
    nets = {"g": nn.Linear(2, 2), "d": nn.Linear(2, 1)}
    optimizers = [torch.optim.Adam(nets["g"].parameters()), torch.optim.SGD(nets["d"].parameters(), momentum=0.9)]
    nets["d"](nets["g"](torch.ones(2))).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    image = harness.capture(nets=nets, optimizers=optimizers)
    twins = {"g": nn.Linear(2, 2), "d": nn.Linear(2, 1)}
    restored = [torch.optim.Adam(twins["g"].parameters()), torch.optim.SGD(twins["d"].parameters(), momentum=0.9)]
    modules = list(twins.values())
    harness.restore(image, nets=twins, optimizers=restored)
    assert list(twins.values()) == modules
    for before, after in zip((*nets.values(), *optimizers), (*modules, *restored), strict=True):
        harness.same(after.state_dict(), before.state_dict())


def test_an_optimizer_keeps_the_tensors_that_were_read_into(harness, monkeypatch):
    """The state of a fresh optimizer exists once: what was made for it is what it steps, without another copy."""
    made = []
    make = CheckpointTensors.make
    monkeypatch.setattr(
        CheckpointTensors, "make", lambda *args, **kwargs: made.append(make(*args, **kwargs)) or made[-1]
    )
    first, second = Trainer("adam"), Trainer("adam")
    first.step()
    harness.restore(harness.capture(optimizer=first.optimizer), optimizer=second.optimizer)
    kept = [tensor for state in second.optimizer.state.values() for tensor in state.values()]
    assert kept
    assert {id(tensor) for tensor in kept} == {id(tensor) for tensor in made}


def test_an_optimizer_that_has_stepped_is_filled_in_place(harness):
    """State that exists already stays where it is: a captured CUDA graph may refer to it, and memory may be short."""
    first, second = Trainer("adam"), Trainer("adam")
    for trainer in (first, second, first):
        trainer.step()
    before = [tensor for state in second.optimizer.state.values() for tensor in state.values()]
    harness.restore(harness.capture(optimizer=first.optimizer), optimizer=second.optimizer)
    after = [tensor for state in second.optimizer.state.values() for tensor in state.values()]
    assert all(now is then for now, then in zip(after, before, strict=True))
    harness.same(second.optimizer.state_dict(), first.optimizer.state_dict())
