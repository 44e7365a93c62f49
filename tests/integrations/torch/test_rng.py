# ruff: noqa: NPY002 - NumPy's global generator is what is captured
"""Random number generators: a restored process draws what the captured one would have drawn."""

import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from ckptd.errors import StateError
from ckptd.storage.image import parse


def draw():
    return [random.random(), random.gauss(0, 1), np.random.normal(), torch.randn(3), torch.randint(9, (2,))]


def test_generators_go_on(harness):
    """Python's, NumPy's and torch's generators go on as captured, halves of Gaussian pairs included."""
    draw()
    image = harness.capture(rng=True, a=1)
    expected = draw()
    draw()
    harness.restore(image, rng=True, a=1)
    harness.same(draw(), expected)


def test_capture_draws_nothing(harness):
    """A capture leaves the generators as they are."""
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    harness.capture(rng=True, a=1)
    harness.same((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()), states)


def test_refused_generators(harness):
    """With `rng=False` no generator is captured, and a restore touches none."""
    image = harness.capture(rng=True, a=1)
    without = harness.capture(rng=False, a=1)
    assert not [span.name for span in parse(without).spans if "rng" in span.name]
    state = torch.get_rng_state()
    harness.restore(image, rng=False, a=1)
    harness.restore(without, rng=True, a=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("make", "draw_one"),
    [
        (lambda: torch.Generator(), lambda g: torch.rand(2, generator=g).tolist()),
        (lambda: random.Random(5), lambda g: g.random()),
        (lambda: np.random.default_rng(5), lambda g: g.random()),
        (lambda: np.random.Generator(np.random.MT19937(5)), lambda g: g.random()),
        (lambda: np.random.RandomState(5), lambda g: g.rand()),
    ],
    ids=["torch", "python", "pcg64", "mt19937", "randomstate"],
)
def test_generators_of_the_user(harness, make, draw_one):
    """A generator that the user bound goes on too, in place."""
    first, second = make(), make()
    draw_one(first)
    image = harness.capture(generator=first, shuffle={"deep": first})
    assert harness.restore(image, generator=second, shuffle={"deep": second})["generator"] is second
    assert draw_one(second) == draw_one(first)


def test_generators_of_another_kind(harness):
    """A generator of another algorithm is refused before anything is filled."""
    a = torch.zeros(1)
    image = harness.capture(a=a + 1, generator=np.random.default_rng(1))
    for other in (np.random.Generator(np.random.MT19937(1)), torch.Generator(), random.Random(1)):
        with pytest.raises(StateError, match=r"PCG64.*is a "):
            harness.restore(image, a=a, generator=other)
    assert float(a) == 0
    with pytest.raises(StateError, match="SystemRandom"):
        harness.capture(generator=random.SystemRandom())


def test_a_process_that_has_not_loaded_numpy(harness, tmp_path):
    """A restore sets NumPy's generator also where the user's code has not imported NumPy yet."""
    image = tmp_path / "image"
    image.write_bytes(harness.capture(rng=True, a=1))
    expected = np.random.random()
    code = f"""
        from ckptd.client.framework import Membership
        from ckptd_integrations.torch.framework import TorchFramework
        from tests.integrations.torch.offering import Offered
        with Offered([open({str(image)!r}, "rb").read()]) as offered:
            TorchFramework().bind({{"a": 0}}, rng=True, membership=Membership(0, 1)).restore(offered)
        import numpy
        print(numpy.random.random())
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert float(run.stdout) == expected


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(harness):
    """On a GPU, tensors go through the image and back to their device, and its generators go on."""
    model = torch.nn.Linear(3, 3, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1, device="cuda"), capturable=True)
    model(torch.ones(2, 3, device="cuda")).sum().backward()
    optimizer.step()
    free = torch.arange(6.0, device="cuda").view(2, 3).t()
    image = harness.capture(rng=True, model=model, optimizer=optimizer, free=free)
    expected = torch.rand(2, device="cuda")
    twin = torch.nn.Linear(3, 3, device="cuda")
    other = torch.optim.AdamW(twin.parameters(), lr=torch.tensor(0.2, device="cuda"), capturable=True)
    made = harness.restore(image, rng=True, model=twin, optimizer=other, free=None)
    assert torch.equal(torch.rand(2, device="cuda"), expected)
    assert torch.equal(made["free"], free)
    assert made["free"].stride() == free.stride()
    for left, right in zip(optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        for key in left:
            assert left[key].device == right[key].device
            assert torch.equal(left[key], right[key])
