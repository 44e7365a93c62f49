"""What must hold after each fault of a campaign, looked at from outside."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import psutil

from ckptd.core.policy.chaos import Planned
from ckptd.launcher.learning import NICENESS
from tests.end_to_end.harness import until
from tests.faults.job import RANKS, Job

_FAIL = {"kill", "stop", "exception", "nan", "launcher"}
"""What the job has to restart for; it trains on through everything else."""
_DESCRIPTORS = 16
"""How many more an agent may have for a while than at its quietest: connections and files that are in use."""
_BEFORE_S = 0.5
_HEALTHY_STEPS = 200
"""How far behind the newest checkpoint a healthy one may be, beyond an interval."""


class Checks:
    """Looks before and after each fault, and raises `AssertionError` for what does not hold."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._random = random.Random(1)
        self._shm = set(os.listdir("/dev/shm"))
        self._descriptors = 0
        self._agent = 0
        self._known = 0
        self._before: dict[str, Any] = {}
        self._pids: list[int] = []
        self._done: list[tuple[str, float]] = []

    def before(self) -> None:
        """Take note of what must not be lost."""
        job = self._job
        self._before = job.until_training(committed=True)
        self._pids = job.pids()
        self._known = len(job.incidents())
        self._done = []
        count = len(os.listdir(f"/proc/{job.daemon.pid}/fd"))
        if self._agent != job.daemon.pid:
            self._agent, self._descriptors = job.daemon.pid, count
        self._descriptors = min(self._descriptors, count)
        if self._random.random() < 0.4:
            self._wait_for_a_moment()

    def _wait_for_a_moment(self) -> None:
        """Wait a little for a capture or a flush to be under way: moments at which the most could go wrong."""
        moment, end_s = self._random.choice(["capture", "flush"]), time.monotonic() + 1.0
        while time.monotonic() < end_s:
            if moment == "flush" and self._job.files(".tmp-*"):
                return
            if moment == "capture" and any(rank["state"] == "capturing" for rank in self._job.status()["ranks"]):
                return

    def inflict(self, planned: Planned) -> str:
        """Do a fault; a killed agent is started again."""
        at = time.time()
        result = self._job.inflict(planned.fault)
        if planned.fault.kind == "agent":
            self._job.restart_agent()
        self._done.append((planned.fault.kind, at))
        return f"{result['what']}, at step {result['step']}"

    def after(self) -> None:
        """Wait until the job trains again, and hold it against what was before."""
        job = self._job
        try:
            self._hold()
        except AssertionError as error:
            raise AssertionError(f"{error}; {job.status()}; {job.incidents()[-2:]}; {job.log()[-6000:]}") from None

    def _hold(self) -> None:
        job, before = self._job, self._before
        fails = [at for kind, at in self._done if kind in _FAIL]
        if fails:
            until(lambda: self._recovered(fails[-1]), "the recovery")
        after = job.until_training()
        incidents = job.incidents()[self._known :]
        # The generation only grows, and without a failure it is the same, with the same processes.
        if fails:  # a number that could not be recorded on a full disk is left out
            assert after["generation"] >= before["generation"] + len(incidents), (before, after, incidents)
        else:
            assert after["generation"] == before["generation"], (before, after, incidents)
            assert job.pids() == self._pids
            assert after["step"] >= before["step"]
        job.until_commit(before["last_committed"]["step"])  # also beyond a full disk
        self._nothing_lost(incidents)
        self._nothing_left_over()

    def _recovered(self, since: float) -> bool:
        new = self._job.incidents()[self._known :]
        return bool(new) and new[-1]["failed_at"] > since - _BEFORE_S and "total" in new[-1]["seconds"]

    def _nothing_lost(self, incidents: list[dict[str, Any]]) -> None:
        committed, bound = self._before["last_committed"]["step"], self._job.interval_steps
        for item in incidents:
            restored = item["restored"]
            if item["lost_steps"] is None:
                continue  # the one after it came before anything was decided
            slack = _HEALTHY_STEPS if any(other["kind"] == "nan" for other in incidents) else 0
            assert restored is not None, item
            assert restored["step"] >= committed - slack, (committed, item)
            assert item["lost_steps"] <= bound + slack, (bound, item)
        assert max(step for _, step in self._job.committed()) >= committed - (_HEALTHY_STEPS if incidents else 0)

    def _nothing_left_over(self) -> None:
        """Look at processes, /dev/shm and the agent's descriptors, once what is under way is over."""
        job = self._job

        def clean() -> bool:
            # The launcher is the only process beside the agent and the ranks, but for its trial of what to preload.
            there = [process for process in job.world.processes() if not _is_trial(process)]
            expected = {job.daemon.pid, *job.pids()}  # anew: the second of two faults may have ended the last ones
            return len(there) == RANKS + 2 and expected <= {process.pid for process in there}

        try:
            until(clean, "nothing but agent, launcher and ranks", 20)
        except AssertionError as error:
            there = [(process.pid, process.cmdline()) for process in job.world.processes()]
            raise AssertionError(f"{error}: ranks {job.pids()}, there are {there}") from None
        self.nothing_left()
        most = self._descriptors + _DESCRIPTORS
        until(lambda: len(os.listdir(f"/proc/{job.daemon.pid}/fd")) <= most, "no more descriptors than before", 20)

    def nothing_left(self) -> None:
        """Look for segments of ours."""
        assert not [name for name in set(os.listdir("/dev/shm")) - self._shm if "ckptd" in name]


def _is_trial(process: psutil.Process) -> bool:
    try:
        return process.nice() == NICENESS and "ckptd.launcher" in process.cmdline()
    except psutil.NoSuchProcess:
        return True
