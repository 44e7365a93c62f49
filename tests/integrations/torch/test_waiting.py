"""How long a rank waits for others, as far as one process can show; `end_to_end/test_stragglers` has two ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ckptd_integrations.torch.waiting import WaitMeter


@pytest.fixture
def group():
    """A process group over gloo of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def hooks(module):
    """How many hooks wait for a gradient of the module."""
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in module.parameters())


def backward(model):
    model(torch.ones(4, 8)).sum().backward()


def test_waits_for_collectives_are_counted_until_the_end(group):
    """Each collective that Python waits for is told of while the meter is open, and torch is as before afterwards."""
    before, waits = dist.distributed_c10d.Work.wait, []
    meter = WaitMeter()
    meter.count([], waits.append)
    dist.all_reduce(torch.ones(1))
    dist.all_reduce(torch.ones(1), async_op=True).wait()
    assert len(waits) == 2
    assert all(wait > 0 for wait in waits)
    meter.close()
    dist.all_reduce(torch.ones(1))
    assert len(waits) == 2
    assert dist.distributed_c10d.Work.wait is before


def test_several_meters(group):
    """Of several open meters each is told once, and the one that is left goes on."""
    first, second = [], []
    meters = [WaitMeter(), WaitMeter()]
    meters[0].count([], first.append)
    meters[1].count([], second.append)
    dist.all_reduce(torch.ones(1))
    meters[0].close()
    dist.all_reduce(torch.ones(1))
    meters[1].close()
    assert (len(first), len(second)) == (1, 2)


def test_the_end_of_backward_is_timed_at_the_last_gradient(group):
    """After two passes one hook is left, on the parameter whose gradient comes last, and each pass is told of."""
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    model, waits = nn.parallel.DistributedDataParallel(net), []
    meter = WaitMeter()
    meter.count([model], waits.append)
    for _ in range(2):
        backward(model)
    assert hooks(net) == 1
    assert hooks(net[0]) == 1
    for _ in range(3):
        backward(model)
    assert len(waits) == 3
    meter.close()
    assert hooks(net) == 0
    backward(model)
    assert len(waits) == 3


def test_frozen_and_unused_parameters_are_no_trouble():
    """Frozen parameters and what is no module are left alone, and a hook called outside of backward does nothing."""
    net, waits = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), []
    net[0].requires_grad_(False)
    meter = WaitMeter()
    meter.count([net, nn.ReLU(), "no module", torch.ones(1)], waits.append)
    assert hooks(net[0]) == 0
    for _ in range(4):
        backward(net)
    assert len(waits) == 2
    next(iter(net[2].bias._post_accumulate_grad_hooks.values()), lambda _: None)(net[2].bias)
    next(iter((net[2].weight._post_accumulate_grad_hooks or {}).values()), lambda _: None)(net[2].weight)
    assert len(waits) == 2
    meter.close()


def test_gradients_are_bit_for_bit_the_same():
    """Timing changes no gradient."""
    grads = []
    for timed in (False, True):
        torch.manual_seed(0)
        net, meter = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), WaitMeter()
        if timed:
            meter.count([net], lambda _: None)
        for _ in range(4):
            backward(net)
        grads.append([p.grad.clone() for p in net.parameters()])
        meter.close()
    assert all(torch.equal(left, right) for left, right in zip(*grads, strict=True))
