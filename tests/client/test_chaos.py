"""What a rank does to itself: once for each order, at its step, and nothing where nobody asked."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch

from ckptd.client.chaos import ChaosError, SelfHarm, poison
from ckptd.protocol.page import PAGE_BYTES, ControlPage, Harm, Word


@pytest.fixture
def page() -> Iterator[ControlPage]:
    """A control page."""
    descriptor = os.memfd_create("test-page", os.MFD_CLOEXEC)
    os.posix_fallocate(descriptor, 0, PAGE_BYTES)
    page = ControlPage(descriptor)
    os.close(descriptor)
    page.format()
    yield page
    page.close()


def test_an_exception_comes_once_and_not_before_its_step(page: ControlPage) -> None:
    """The boundary of the step raises, and none before or after it; the page says that it was done."""
    harm = SelfHarm()
    harm.boundary(page.words, 1, {})
    number = page.harm(Harm.EXCEPTION, 3, 0, 0)
    harm.boundary(page.words, 2, {})
    assert page.words[Word.HARMED] == 0
    with pytest.raises(ChaosError, match="after step 3"):
        harm.boundary(page.words, 3, {})
    assert page.words[Word.HARMED] == number
    harm.boundary(page.words, 4, {})


def test_a_slow_rank_is_slow_for_a_while(page: ControlPage) -> None:
    """Each boundary takes longer until the time is over, and then no more."""
    harm = SelfHarm()
    page.harm(Harm.SLOW, 0, 60, 30)
    begin_s = time.monotonic()
    steps = 0
    while time.monotonic() < begin_s + 0.06:
        harm.boundary(page.words, steps, {})
        steps += 1
    assert 1 <= steps <= 3
    time.sleep(0.07)
    harm.boundary(page.words, steps, {})
    assert harm._slow_until_s == 0.0


def test_the_first_float_tensor_becomes_nan(page: ControlPage) -> None:
    """The model's own tensor is poisoned in place; counters and plain values are passed over, by name in the report."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    state = {"seen": 3, "steps": torch.zeros(2, dtype=torch.int64), "model": model}
    page.harm(Harm.NAN, 0, 0, 0)
    SelfHarm().boundary(page.words, 1, state)
    assert model[0].weight.isnan().all()
    assert not model[1].weight.isnan().any()
    assert poison(state) == "model.0.weight"
    assert poison({"seen": 3, "list": [torch.zeros(1, dtype=torch.uint8)]}) is None
    nested = {"ema": [{"w": torch.ones(2)}]}
    assert poison(nested) == "ema.0.w"
    assert nested["ema"][0]["w"].isnan().all()
