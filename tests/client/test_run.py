"""What training code holds, without an agent: it counts, keeps, and is never in the way."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator

import pytest

from ckptd.client.capturing import numbers
from ckptd.client.run import Run, current_run
from ckptd.errors import StateError


def test_steps_are_counted_from_one() -> None:
    """Step N is yielded before it is done, and N steps are done when the loop ends."""
    run = Run()
    assert list(run.steps(4)) == [1, 2, 3, 4]
    assert run._step == 4
    assert list(run.steps(4)) == []
    assert list(run.steps(6)) == [5, 6]


def test_a_loop_that_is_left_early_has_not_done_its_step() -> None:
    """A step that `break` leaves is not counted, and a further loop begins with it."""
    run = Run()
    for step in run.steps(10):
        if step == 3:
            break
    assert run._step == 2
    assert next(iter(run.steps(10))) == 3


def test_steps_and_step_count_together() -> None:
    """`run.step()` in a loop of one's own and `run.steps()` count the same steps."""
    run = Run()
    for _ in range(3):
        run.step()
    assert list(run.steps(5)) == [4, 5]


def test_a_run_without_agent_is_harmless() -> None:
    """Without an agent every call does nothing, quietly, as often as it is made."""
    run = Run()
    with run:
        for step in run.steps(1000):
            run.report(loss=1.0 / step)
            run.checkpoint()
    run.close()
    run.step()
    assert (run.generation, run.restored, run.protected, dict(run.state)) == (1, None, False, {})
    assert current_run() is None


def test_a_run_without_agent_lets_exceptions_through() -> None:
    """The block hides nothing, with or without an agent."""
    with pytest.raises(ValueError, match="mine"), Run():
        raise ValueError("mine")


def test_a_run_has_nothing_to_attach_twice() -> None:
    """Objects are attached once, in one call."""
    with pytest.raises(StateError, match="has its objects already"):
        Run().attach(model={})


# --- report -------------------------------------------------------------------------------------------------------


class Graph:
    """What a loss drags along."""


class Tensor:
    """A tensor: it has a graph, its copy has none, and reading it may wait for a GPU."""

    reads = 0

    def __init__(self, value: float, graph: Graph | None = None) -> None:
        self._value = value
        self._graph = graph

    def detach(self) -> Tensor:
        """Return the same number without the graph."""
        return Tensor(self._value)

    def __float__(self) -> float:
        type(self).reads += 1
        return self._value


@pytest.fixture(autouse=True)
def _count_reads() -> Iterator[None]:
    """Count reads from zero."""
    Tensor.reads = 0
    yield


def test_report_drops_the_graph() -> None:
    """A reported loss does not keep its graph alive, not even until the next report."""
    run, graph = Run(), Graph()
    seen = weakref.ref(graph)
    run.report(loss=Tensor(0.5, graph))
    del graph
    gc.collect()
    assert seen() is None


def test_report_converts_late() -> None:
    """A tensor is read when a checkpoint needs its number, not when it is reported."""
    run = Run()
    for step in range(100):
        run.report(loss=Tensor(float(step)))
    assert Tensor.reads == 0
    assert numbers(run._values) == {"loss": 99.0}
    assert Tensor.reads == 1


class Broken:
    """A number that can't be read."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __float__(self) -> float:
        raise self._error


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        "a text",
        None,
        [1.0],
        {},
        object(),
        10**400,
        Tensor(math.nan),
        Broken(RuntimeError("device-side assert")),
        Broken(OverflowError("too large")),
        Broken(ZeroDivisionError("0")),
    ],
)
def test_what_is_no_number_is_left_out(value: object) -> None:
    """NaN, infinities and whatever is no number are left out of the manifest; the others stay."""
    run = Run()
    run.report(before=1, wrong=value, after=2.5)
    assert numbers(run._values) == {"before": 1.0, "after": 2.5}


def test_the_last_report_of_a_name_counts() -> None:
    """A value reported again replaces the older one, and other names stay."""
    run = Run()
    run.report(loss=1.0, lr=0.1)
    run.report(loss=2.0)
    assert numbers(run._values) == {"loss": 2.0, "lr": 0.1}
