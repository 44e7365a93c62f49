"""What ckptd costs a training script: its import, and each step.

Times are minima of several runs, compared with an empty run beside them: what a busy machine adds, it adds to both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.client.run import Run
from ckptd.protocol.page import NEVER, PAGE_BYTES, ControlPage, Phase, Word

ROOT = Path(__file__).resolve().parents[2]
IMPORT_S = 0.030
STEP_RATIO = 60
"""A step may cost this many empty function calls. One takes 25 to 80 ns, so this stands for 1.5 to 5 microseconds."""
HEAVY = (
    "asyncio",
    "structlog",
    "fsspec",
    "pluggy",
    "torch",
    "numpy",
    "rich",
    "xxhash",
    "multiprocessing",
    "pathlib",
    "dataclasses",
    "subprocess",
    "inspect",
    "logging",
    "email",
    "urllib",
    "http",
    "ssl",
    "tempfile",
    "concurrent",
)
"""Modules that the training side must not import, nor anything it imports. The second half are those of the standard
library that would cost a rank milliseconds for nothing."""


def cpu_s(code: str) -> float:
    """The processor time of a Python process that runs `code`."""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def test_import_is_cheap() -> None:
    """`import ckptd` costs less than 30 ms of processor time over bare Python."""
    bare, ours = [], []
    for _ in range(7):
        bare.append(cpu_s("pass"))
        ours.append(cpu_s("import ckptd"))
    assert min(ours) - min(bare) < IMPORT_S, f"importing ckptd takes {(min(ours) - min(bare)) * 1000:.0f} ms"


def _modules_after(code: str) -> set[str]:
    said = subprocess.run(
        [sys.executable, "-c", f"import sys; before = set(sys.modules); {code}; print(*set(sys.modules) - before)"],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout
    return set(said.split())


def test_import_loads_nothing_but_itself() -> None:
    """`import ckptd` loads the package and its version; everything else comes with the first name that is used."""
    assert _modules_after("import ckptd") - {"__future__"} == {"ckptd", "ckptd.version"}


@pytest.mark.parametrize("name", ["attach", "resumable", "Run", "Restored", "CkptdError"])
def test_public_names_load_nothing_heavy(name: str) -> None:
    """Using any public name of the package loads no heavy module."""
    loaded = _modules_after(f"import ckptd; ckptd.{name}")
    assert not {module for module in loaded if module.partition(".")[0] in HEAVY}


def test_no_client_module_loads_anything_heavy() -> None:
    """No module of the training side loads asyncio, structlog, fsspec, pluggy, torch or numpy, nor other weight."""
    modules = [f"ckptd.client.{path.stem}" for path in (ROOT / "ckptd/client").glob("[!_]*.py")]
    assert len(modules) >= 5
    loaded = _modules_after(f"import {', '.join(modules)}")
    assert not {module for module in loaded if module.partition(".")[0] in HEAVY}
    third_party = {module.partition(".")[0] for module in loaded} - set(sys.stdlib_module_names) - {"ckptd"}
    assert not third_party, "the client is stdlib only"


def test_public_names_are_lazy_and_complete() -> None:
    """`dir(ckptd)` lists the documented names, each can be used, and a wrong one is an `AttributeError`."""
    import ckptd

    assert dir(ckptd) == sorted(ckptd.__all__)
    for name in ckptd.__all__:
        assert getattr(ckptd, name) is getattr(ckptd, name)
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        ckptd.atach  # noqa: B018


# --- steps ------------------------------------------------------------------------------------------------------


def cost_s(function: Callable[[], object]) -> float:
    """The time of one call, the least of several measurements."""
    return min(timeit.repeat(function, number=5000, repeat=9)) / 5000


def empty() -> None:
    """The cheapest that a function can be."""


@pytest.fixture
def page() -> Iterator[ControlPage]:
    """A real control page in shared memory."""
    descriptor = os.memfd_create("test-page", os.MFD_CLOEXEC)
    os.posix_fallocate(descriptor, 0, PAGE_BYTES)
    made = ControlPage(descriptor)
    os.close(descriptor)
    made.format()
    yield made
    made.close()


def protected(page: ControlPage) -> Run:
    """A run in the state that it has between two captures: a page, and its first step behind it."""
    run = Run()
    run._words = page.words
    run.step()
    return run


def test_a_step_without_agent_is_cheap() -> None:
    """A step of a run that nobody protects costs next to nothing."""
    run = Run()
    run.step()
    assert cost_s(run.step) < STEP_RATIO * cost_s(empty)


def test_a_step_with_a_page_is_cheap(page: ControlPage) -> None:
    """A step of a protected run, with nothing due, costs a few writes to memory and no system call."""
    run = protected(page)
    step_s = cost_s(run.step)
    assert step_s < STEP_RATIO * cost_s(empty)
    assert page.words[Word.STEP] == run._step > 5000


def test_a_hook_is_cheap(page: ControlPage) -> None:
    """An optimizer's step that has nothing to wait for is not held up by the question."""
    run = protected(page)
    assert cost_s(run._before_optimizer_step) < STEP_RATIO * cost_s(empty)


def test_steps_in_a_loop_are_cheap(page: ControlPage) -> None:
    """`for step in run.steps(...)` costs hardly more than `run.step()` in a loop."""
    run = protected(page)
    iterator = run.steps(10**9)
    assert cost_s(lambda: next(iterator)) < 1.5 * STEP_RATIO * cost_s(empty)


def test_a_step_says_where_it_is(page: ControlPage) -> None:
    """What the agent reads after a step: its number, a beat that moves, and a phase that a step leaves alone."""
    run = protected(page)
    page.words[Word.PHASE] = Phase.TRAINING
    before = page.words[Word.BEAT_NS]
    for wanted in (2, 3, 4):
        run.step()
        assert page.words[Word.STEP] == wanted
    assert page.words[Word.BEAT_NS] > before
    assert page.phase is Phase.TRAINING
    assert page.words[Word.CAPTURE_STEP] == NEVER
