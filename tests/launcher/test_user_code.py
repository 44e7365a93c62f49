"""Preloaded modules, and machines, that do to a launcher what nobody should."""

from __future__ import annotations

import signal

import pytest

from ckptd.protocol import messages

CHANGES = {
    "folder": ("import os\nos.chdir('/')", "changes the current folder to /"),
    "folder, and fails": ("import os\nos.chdir('/')\nraise RuntimeError('no')", "import failed: RuntimeError: no"),
    "SIGCHLD is ignored": (
        "import signal\nsignal.signal(17, signal.SIG_IGN)",
        "changes what these signals do: SIGCHLD",
    ),
    "all children are reaped": (
        "import os, signal\nsignal.signal(17, lambda *_: os.waitpid(-1, os.WNOHANG))",
        "changes what these signals do: SIGCHLD",
    ),
    "a signal without name": ("import signal\nsignal.signal(40, print)", "changes what these signals do: 40"),
    "stdout is closed": ("import sys\nsys.stdout.close()", "replaces or closes the standard streams"),
    "stdout is replaced": ("import sys\nsys.stdout = object()", "replaces or closes the standard streams"),
    "a long reason": ("raise ValueError('a\\0b' + 'x' * 300000)", r"import failed: ValueError: a\0bxxx"),
    "no reason": (
        "class Odd(Exception):\n    def __str__(self):\n        raise KeyError\nraise Odd",
        "import failed: Odd: <exception str() failed>",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_module_that_changes_its_process_is_left_to_the_ranks(start, modules, script, what):
    """What a rank would not get as from plain Python, or what the launcher can't live with, is not preloaded."""
    text, reason = CHANGES[what]
    (modules / "odd.py").write_text(text)
    script("import os, sys\nprint('odd' in sys.modules, os.path.basename(os.getcwd()))\nraise SystemExit(3)")
    agent = start(["train.py"], preload=["odd"])
    assert agent.expect(messages.Ready).skipped["odd"].startswith(reason)
    (result,) = agent.run({})
    assert (result.returncode, result.stdout) == (3, "False work\n")


def test_a_handler_of_a_preloaded_module_is_there_in_the_ranks(start, modules, script):
    """A module that handles a signal since its import does so in a rank, too."""
    (modules / "handles.py").write_text("import signal\nsignal.signal(signal.SIGUSR1, lambda *_: print('handled'))")
    script("import handles, os, signal\nos.kill(os.getpid(), signal.SIGUSR1)")
    (result,) = start(["train.py"], preload=["handles"]).run({})
    assert (result.returncode, result.stdout) == (0, "handled\n")


@pytest.mark.parametrize("preload", [["json"], []])
def test_a_launcher_that_is_born_ignoring_its_children(start, script, preload):
    """Whoever starts the agent may ignore SIGCHLD; the ends of ranks are told all the same, and ranks inherit it."""
    script("import signal\nprint(signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN)\nraise SystemExit(3)")
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        agent = start(["train.py"], preload=preload)
    finally:
        signal.signal(signal.SIGCHLD, before)
    (result,) = agent.run({})
    assert (result.returncode, result.stdout) == (3, "True\n")
