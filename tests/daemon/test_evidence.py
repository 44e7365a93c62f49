"""What is gathered of a failure: real processes that sleep, loop, are stopped or dead, and sources that hang."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.core.policy.hang import Sample
from ckptd.daemon.evidence import kernel, looking, machine, traces
from ckptd.daemon.evidence.collect import Order, RankView, collect
from ckptd.daemon.evidence.folders import prune
from ckptd.daemon.evidence.stacks import find_py_spy, read_stacks
from ckptd.errors import AgentError
from ckptd.types import Evidence, RaisedException
from tests.waiting import until

HANG = Evidence("hang", "hang", 1, 0.9, "no rank has finished a step for 6.0 s", 1.0)
SLEEPS = "import time\ndef wait_for_nothing():\n    time.sleep(1000)\nprint('up', flush=True)\nwait_for_nothing()\n"
LOOPS = "def turn():\n    print('up', flush=True)\n    while True: pass\nturn()\n"

Start = Callable[[str], int]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a Python program and return its process number once it has printed something."""
    started: list[subprocess.Popen[str]] = []

    def begin(source: str) -> int:
        script = tmp_path / f"train-{len(started)}.py"
        script.write_text(source)
        process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process.pid

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def order(folder: Path, *pids: int, **other: object) -> Order:
    """Return an order about ranks of these process numbers."""
    ranks = [
        RankView(
            rank, pid, {"STEP": 4, "PHASE": 2}, [Sample(rank, 4, 10**9, "training", 2.0 + n) for n in range(3)],
            folder / f"rank-{rank:05d}.out", folder / f"rank-{rank:05d}.err",
        )
        for rank, pid in enumerate(pids)
    ]  # fmt: skip
    facts = {"folder": folder / "incidents" / "3", "job": "gpt", "generation": 2, "evidence": HANG, "ranks": ranks}
    return Order(**{**facts, **other})  # type: ignore[arg-type]


def state_of(pid: int) -> str:
    """Return the letter that the kernel has for a process."""
    return kernel.thread(pid).state


def test_a_bundle_shows_what_every_rank_does(tmp_path: Path, start: Start) -> None:
    """Stacks, kernel state, pages and output of every rank lie in the folder, and the summary names them all."""
    (tmp_path / "rank-00000.out").write_text("epoch 1\nepoch 2\n")
    (tmp_path / "rank-00001.err").write_text("a warning\n")
    asleep, busy = start(SLEEPS), start(LOOPS)
    bundle = collect(order(tmp_path, asleep, busy))
    files = {path.name for path in bundle.path.iterdir()}
    assert files >= {
        "summary.txt", "incident.json", "stacks.txt", "pages.jsonl", "machine.txt", "rank-00000.out", "rank-00001.err",
        "rank-00000.proc", "rank-00001.proc",
    }  # fmt: skip
    assert "sleeps, in wait_for_nothing (train-0.py:3: time.sleep(1000))" in bundle.findings[0]
    assert "is busy" in bundle.findings[1]
    assert "turn (train-1.py:3: while True: pass)" in bundle.findings[1]
    summary = (bundle.path / "summary.txt").read_text()
    assert HANG.summary in summary
    assert all(name in summary for name in files - {"summary.txt"})
    assert "time.sleep(1000)" in (bundle.path / "stacks.txt").read_text()
    assert "== status ==" in (bundle.path / "rank-00000.proc").read_text()
    lines = [json.loads(line) for line in (bundle.path / "pages.jsonl").read_text().splitlines()]
    assert [line["at_s"] for line in lines[:3]] == [2.0, 3.0, 4.0]
    assert lines[3] == {"rank": 0, "now": {"STEP": 4, "PHASE": 2}}
    facts = json.loads((bundle.path / "incident.json").read_text())
    assert facts["finding"]["ranks"]["0"] == bundle.findings[0]
    assert (bundle.path.stat().st_mode & 0o077) == 0
    assert state_of(asleep) == "S"
    assert state_of(busy) == "R"


def test_a_stopped_rank_is_the_culprit_and_stays_as_it_is(tmp_path: Path, start: Start) -> None:
    """A stopped process is read all the same, is to blame, and is not woken; the others are not stopped."""
    asleep, stopped = start(SLEEPS), start(LOOPS)
    os.kill(stopped, signal.SIGSTOP)
    until(lambda: state_of(stopped) == "T", "the stop")
    bundle = collect(order(tmp_path, asleep, stopped))
    assert bundle.culprit == 1
    assert "is stopped by a signal" in bundle.findings[1]
    assert "turn (train-1.py:" in bundle.findings[1]
    assert state_of(stopped) == "T"
    assert state_of(asleep) == "S"
    os.kill(stopped, signal.SIGCONT)
    until(lambda: state_of(stopped) == "R", "that it goes on")


def test_a_death_has_its_traceback_and_the_survivors(tmp_path: Path, start: Start) -> None:
    """Of a rank that raised there is the whole traceback; that its process is gone hinders nothing."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    raised = RaisedException("ValueError", "no", "Traceback (most recent call last):\n  ...\nValueError: no\n")
    evidence = Evidence("exit", "exception", 0, 1.0, "rank 0 raised ValueError: no", 1.0, exception=raised)
    bundle = collect(order(tmp_path, process.pid, start(SLEEPS), evidence=evidence))
    assert (bundle.path / "rank-00000.traceback").read_text() == raised.traceback
    assert bundle.findings[0] == "has ended"
    assert bundle.culprit == 0
    summary = (bundle.path / "summary.txt").read_text()
    assert "rank 0 failed first" in summary
    assert "Python stack of rank 0: the process has ended" in summary


def test_what_hangs_is_left_behind_and_said(tmp_path: Path, start: Start) -> None:
    """A file whose opening never comes back keeps neither the rest nor the caller, and that is said."""
    os.mkfifo(tmp_path / "rank-00000.out")
    began_s = time.monotonic()
    bundle = collect(order(tmp_path, start(SLEEPS), deadline_s=2.0))
    passed_s = time.monotonic() - began_s
    os.close(os.open(tmp_path / "rank-00000.out", os.O_WRONLY | os.O_NONBLOCK))  # lets the thread go
    assert passed_s < 60  # it would be for ever
    summary = (bundle.path / "summary.txt").read_text()
    assert "what the ranks printed: not there when time was up" in summary
    assert (bundle.path / "stacks.txt").exists()


def test_size_is_bounded_and_cuts_are_said(tmp_path: Path, start: Start) -> None:
    """However much was printed, the folder stays within its bound, keeps the last lines, and says what was cut."""
    (tmp_path / "rank-00000.out").write_text("".join(f"line {n}\n" for n in range(200_000)))
    limit_bytes = 72 * 1024
    bundle = collect(order(tmp_path, start(SLEEPS), max_bytes=limit_bytes))
    assert sum(path.stat().st_size for path in bundle.path.iterdir()) <= limit_bytes
    kept = (bundle.path / "rank-00000.out").read_text().splitlines()
    assert kept == [f"line {n}" for n in range(200_000 - len(kept), 200_000)]
    assert ": cut from " in (bundle.path / "summary.txt").read_text()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, start: Start) -> None:
    """Where nothing can be written the caller hears of it, by ckptd's own error."""
    (tmp_path / "incidents").write_text("not a folder")
    with pytest.raises(AgentError, match="can't write evidence"):
        collect(order(tmp_path, start(SLEEPS)))


def test_where_no_thread_can_be_started(tmp_path: Path) -> None:
    """A node without room for another thread costs the evidence, by ckptd's own error: the agent has to go on."""
    script = """
import os, pathlib, resource, sys, threading
from ckptd.daemon.evidence.collect import Order, RankView, collect
from ckptd.errors import AgentError
from ckptd.types import Evidence
size_bytes = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
threading.stack_size(2**26)
resource.setrlimit(resource.RLIMIT_AS, (size_bytes + 2**25, -1))
evidence = Evidence("hang", "hang", None, 0.9, "it stands still", 1.0)
ranks = [RankView(0, os.getpid(), None, (), None, None)]
try:
    collect(Order(pathlib.Path(sys.argv[1]), "gpt", 1, evidence, ranks))
except AgentError as error:
    print(error.message)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "1")], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"evidence was not written to {tmp_path / '1'}: can't start new thread\n"


def test_without_py_spy_the_kernel_still_says_who_works(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without py-spy the bundle says so, and a rank that computes is told from one that sleeps."""
    monkeypatch.setattr(looking, "find_py_spy", lambda: None)
    bundle = collect(order(tmp_path, start(SLEEPS), start(LOOPS)))
    assert bundle.findings[0] == "sleeps; its stack could not be read"
    assert bundle.findings[1].startswith("is busy (")
    assert "py-spy is not installed" in (bundle.path / "summary.txt").read_text()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_a_missing_permission_is_said_with_the_way_out(tmp_path: Path, start: Start) -> None:
    """py-spy that may not read other processes is told apart from one that fails."""
    pid, program = start(SLEEPS), find_py_spy()
    assert program is not None
    powerless = tmp_path / "py-spy"
    powerless.write_text(f'#!/bin/sh\nexec setpriv --bounding-set=-sys_ptrace {program} "$@"\n')
    powerless.chmod(0o755)
    found = read_stacks(pid, time.monotonic() + 30, str(powerless))
    assert not found.threads
    assert "CAP_SYS_PTRACE" in found.problem
    assert "ptrace_scope" in found.problem


def test_a_py_spy_that_hangs_is_ended(tmp_path: Path) -> None:
    """A py-spy that does not come back is killed at its bound, and that is said."""
    hanging = tmp_path / "py-spy"
    hanging.write_text("#!/bin/sh\nexec sleep 1000\n")
    hanging.chmod(0o755)
    found = read_stacks(os.getpid(), time.monotonic() + 0.3, str(hanging))
    assert found.problem == "py-spy did not come back in time"


def test_only_the_newest_folders_stay(tmp_path: Path) -> None:
    """Old incidents lose their folders, by number and not by name; what is no incident's is left alone."""
    for number in range(1, 13):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "summary.txt").write_text("")
    (tmp_path / "notes").mkdir()
    prune(tmp_path, keep=3)
    assert {path.name for path in tmp_path.iterdir()} == {"10", "11", "12", "notes"}


def test_collectives_are_asked_for_and_fetched(tmp_path: Path) -> None:
    """A rank that listens on torch's pipe is asked for its flight recorder, and the answer and NCCL's log are kept."""
    env = traces.trace_env(tmp_path, 0, {})
    pipe, dump = Path(f"{env['TORCH_NCCL_DEBUG_INFO_PIPE_FILE']}0.pipe"), Path(f"{env['TORCH_FR_DUMP_TEMP_FILE']}0")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def answer() -> None:
        def asked() -> bytes:
            try:
                return os.read(reader, 128)
            except BlockingIOError:
                return b""

        until(asked, "the request")
        dump.write_bytes(b"\x80\x02recorded")

    Path(env["NCCL_DEBUG_FILE"]).write_text("NCCL WARN Call to connect failed\n")
    thread = threading.Thread(target=answer)
    thread.start()
    view = RankView(0, 1, None, (), tmp_path / "rank-00000.out", None)
    part = traces.traces([view], time.monotonic() + 30)
    thread.join()
    os.close(reader)
    assert {piece.name: piece.data for piece in part.pieces} == {
        "flight-recorder-0": b"\x80\x02recorded",
        "nccl-00000.log": b"NCCL WARN Call to connect failed\n",
    }
    assert not part.missing


def test_what_the_user_asks_of_nccl_is_left_as_it_is(tmp_path: Path) -> None:
    """Variables of the user's own are not replaced, and NCCL is not made to print less than was asked for."""
    theirs = {"NCCL_DEBUG": "INFO", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/scratch/fr_"}
    assert traces.trace_env(tmp_path, 0, theirs) == {
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(tmp_path / "collectives-"),
    }


def test_a_folder_without_pipes_gets_none(tmp_path: Path) -> None:
    """Where no pipe can be made, no rank is told to make one: torch would end it."""
    assert "TORCH_NCCL_DEBUG_INFO_PIPE_FILE" not in traces.trace_env(tmp_path / "not there", 0, {})


def test_the_kernels_log_shows_gpu_errors(tmp_path: Path) -> None:
    """Lines of the NVIDIA driver are put where nobody has to look for them; without any, there is no such file."""
    log = tmp_path / "kmsg"
    log.write_text("6,1,5000000,-;usb 1-1: new device\n")
    assert [piece.name for piece in machine.kernel_log(log).pieces] == ["kernel.log"]
    log.write_text("4,2,6000000,-;NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus\n")
    found = {piece.name: piece.data.decode() for piece in machine.kernel_log(log).pieces}
    assert found["xids.txt"] == "[    6.000000] NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus\n"


def test_nvidia_smi_is_kept_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nvidia-smi says is kept, one that hangs is given up with the suspicion that this is, and none is no loss."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if shutil.which("nvidia-smi") is None:
        assert machine.gpus(time.monotonic() + 5) == machine.Part()
    program.write_text("#!/bin/sh\necho GPU 00000000:3B:00.0\n")
    program.chmod(0o755)
    assert machine.gpus(time.monotonic() + 30).pieces[0].data == b"GPU 00000000:3B:00.0\n"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    assert "points to a GPU or its driver" in machine.gpus(time.monotonic() + 0.2).missing[0]
