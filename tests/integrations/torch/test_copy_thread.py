"""The thread that copies beside training."""

import subprocess
import sys

from ckptd_integrations.torch import overlap


def test_a_copy_that_no_thread_made_is_not_made_again(monkeypatch):
    """What was copied at the boundary for want of a thread is not copied again once a thread starts: the slot may be
    sealed by then, and the tensors another step's."""
    source, first, second = bytearray(b"1"), bytearray(1), bytearray(1)
    thread = overlap.CopyThread()

    def refuse(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(overlap.threading.Thread, "start", refuse)
        assert thread.begin(lambda: first.__setitem__(0, source[0])).done()
    source[0] = ord("2")
    thread.begin(lambda: second.__setitem__(0, source[0])).result()
    assert (first, second) == (b"1", b"2")
    thread.close()


def test_a_process_that_is_nicer_already():
    """A training that runs at the lowest priority, and may not raise it, is copied beside itself all the same."""
    code = """
import os
from ckptd_integrations.torch.overlap import CopyThread
os.nice(19)
if os.getuid() == 0:
    os.setuid(65534)
made = []
CopyThread().begin(lambda: made.append(os.getpriority(os.PRIO_PROCESS, 0))).result()
assert made == [19], made
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
