"""Steps that leave alone what is being copied pass; the image is the boundary's all the same."""

import random
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ckptd.errors import StateError
from ckptd_integrations.torch import capture, copying, layouts
from tests.integrations.torch.test_overlap import Beside

LARGE = 2000
"""Elements of a tensor that waits; those of 10 elements are copied at the boundary."""


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(layouts, "SMALL_BYTES", 1)
    monkeypatch.setattr(layouts, "SMALL_TENSOR_BYTES", 1000)


@pytest.fixture
def gate(monkeypatch):
    """Copies beside training end only when this is set."""
    gate = threading.Event()

    def held(*arguments):
        if threading.current_thread().name == "ckptd-capture":
            gate.wait(30)
        copying.copy_bytes(*arguments)

    monkeypatch.setattr(capture, "copy_bytes", held)
    yield gate
    gate.set()


def graded(parameters, only=None):
    """Give gradients to those parameters, and to no other."""
    for parameter in parameters:
        parameter.grad = None if only is not None and parameter not in set(only) else torch.ones_like(parameter)


def test_an_optimizer_of_something_else_passes(gate):
    """A step of an optimizer whose parameters are not captured waits for nothing."""
    own, other = nn.Parameter(torch.randn(LARGE)), nn.Parameter(torch.randn(LARGE))
    optimizer, outsider = torch.optim.Adam([own]), torch.optim.Adam([other])
    graded([own, other])
    with Beside(state=[own], optimizer=optimizer) as beside:
        optimizer.step()
        beside.begin()
        outsider.step()
        assert not beside.waits
        gate.set()
        optimizer.step()
        assert len(beside.waits) == 1
        assert beside.is_right()


def test_parameters_without_gradients_are_left_alone(gate):
    """A step that has gradients for small parameters only, copied at the boundary, passes and harms nothing."""
    large, small = nn.Parameter(torch.randn(LARGE)), nn.Parameter(torch.randn(10))
    optimizer = torch.optim.Adam([large, small], fused=True)
    graded([large, small])
    with Beside(state=[large, small], optimizer=optimizer) as beside:
        optimizer.step()
        beside.begin()
        graded([large, small], only=[small])
        for _ in range(3):
            optimizer.step()
        assert not beside.waits
        gate.set()
        graded([large, small])
        optimizer.step()
        assert len(beside.waits) == 1
        assert beside.is_right()


def test_what_passes_is_still_watched(gate):
    """Somebody who changes what is being copied is noticed, also after a step has passed."""
    large, small = nn.Parameter(torch.randn(LARGE)), nn.Parameter(torch.randn(10))
    optimizer = torch.optim.SGD([large, small], lr=0.1)
    graded([large, small], only=[small])
    with Beside(state={"large": large, "small": small}, optimizer=optimizer) as beside:
        optimizer.step()
        beside.begin()
        optimizer.step()
        with torch.no_grad():
            large.add_(1.0)
        gate.set()
        with pytest.raises(StateError, match=r"state\.large"):
            beside.copy.finish()


class Own(torch.optim.SGD):
    """An optimizer of the user's, which may do anything to its parameters."""


def test_optimizers_of_users_wait(gate):
    """Of an optimizer that is not torch's nobody knows what it leaves alone: it waits, with gradients or without."""
    large = nn.Parameter(torch.randn(LARGE))
    optimizer = Own([large], lr=0.1)
    graded([large])
    with Beside(state=[large], optimizer=optimizer) as beside:
        optimizer.step()
        beside.begin()
        gate.set()
        large.grad = None
        optimizer.step()
        assert len(beside.waits) == 1


def test_optimizers_that_keep_odd_tensors_wait(gate):
    """An optimizer that keeps tensors without a storage waits for the copy, and its step does not fail for it."""
    own, other = nn.Parameter(torch.randn(LARGE)), nn.Parameter(torch.randn(LARGE))
    optimizer, outsider = torch.optim.SGD([own], lr=0.1), Own([other], lr=0.1)
    outsider.state[other]["mask"] = torch.ones(LARGE).to_sparse()
    graded([own, other])
    with Beside(state=[own], optimizer=optimizer) as beside:
        optimizer.step()
        beside.begin()
        gate.set()
        outsider.step()
        assert len(beside.waits) == 1
        assert beside.is_right()


@settings(deadline=None, max_examples=25)
@given(st.randoms(use_true_random=False), st.lists(st.sampled_from([10, LARGE, 3 * LARGE]), min_size=2, max_size=6))
def test_any_steps(choices: random.Random, sizes):
    """Whatever steps follow the boundary, with whatever gradients, the image is that of the boundary and never void."""
    parameters = [nn.Parameter(torch.randn(size)) for size in sizes]
    cut = choices.randrange(1, len(parameters))
    optimizers = [
        choices.choice([torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])(part, lr=0.1)
        for part in (parameters[:cut], parameters[cut:])
    ]
    graded(parameters)
    with Beside(state=parameters, optimizers=optimizers) as beside:
        for optimizer in optimizers:
            optimizer.step()
        beside.begin()
        for _ in range(choices.randrange(1, 5)):
            graded(parameters, only=choices.sample(parameters, choices.randrange(len(parameters) + 1)))
            choices.choice(optimizers).step()
        if beside.copy is not None:
            beside.copy.finish()
        assert beside.is_right()
