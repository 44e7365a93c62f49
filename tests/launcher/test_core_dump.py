"""Whether a rank that died has left a core file, as the kernel told its parent."""

from __future__ import annotations

import resource

import pytest

from ckptd.protocol import messages

DIES = """
import os, resource, signal, sys

resource.setrlimit(resource.RLIMIT_CORE, (int(os.environ["CORE"]), resource.getrlimit(resource.RLIMIT_CORE)[1]))
os.kill(os.getpid(), int(os.environ["NUMBER"]))
"""


@pytest.mark.parametrize(
    ("number", "core", "dumped"), [(11, True, True), (6, True, True), (11, False, False), (9, True, False)]
)
def test_a_core_file_is_told_of(start, script, tmp_path, number, core, dumped):
    """A rank that dumps core is reported so, and one that may not, or whose signal has none, is not."""
    limit = resource.getrlimit(resource.RLIMIT_CORE)[1]
    if core and 0 <= limit < 2**28:
        pytest.skip(f"core files are limited to {limit} bytes here")
    agent = start([str(script(DIES))])
    agent.spawn(0, {"CORE": str(limit if core else 0), "NUMBER": str(number)})
    ended = agent.expect(messages.Exited)
    assert (ended.returncode, ended.core_dumped) == (-number, dumped)
    for path in (tmp_path / "work").glob("core*"):
        path.unlink()
