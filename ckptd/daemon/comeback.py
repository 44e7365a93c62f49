"""Jobs that come back by themselves when the service starts: after its own restart, a stop, or a reboot of the node.

The journal says of each whether it should: nobody has stopped the job itself, and it has not ended. Whether its ranks
still run, or it begins with its newest checkpoint, is for `Agent.adopt` to find out. A job that can't come back keeps
no other from it: the reason is logged, and it is tried again until it is back or somebody gives it up. One that takes
the agent along again and again comes last, and ever more slowly.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace

from ckptd.core.generation import Generation
from ckptd.core.job_states import JobState
from ckptd.daemon.adopting import legacy_of
from ckptd.daemon.fdstore import FdStore
from ckptd.daemon.living import boot_id, is_alive, signal_to
from ckptd.daemon.supervisor import Supervisor
from ckptd.errors import AgentError, CkptdError, FencedError
from ckptd.journal import JobEntry, Journal
from ckptd.log import Logger

_RETRY_S = (2.0, 5.0, 10.0, 30.0, 60.0)
"""How long after each failure a job is tried again; the last from then on."""
_SUSPECT = 5
"""After so many agents in a row that have ended soon after it was back, a job has to wait until the others are."""
_PROVEN_S = 10.0
"""When an agent lives so long after it, bringing a job back was not its end."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a job comes back, and why it does or does not."""

    back: bool
    reason: str
    alive: bool = False
    """Whether its processes have gone on without an agent."""


def judge(entry: JobEntry, *, boot: str, alive: bool) -> Verdict:
    """Decide whether the job of an entry comes back.

    `boot` names the present boot of the node, `alive` says whether its launcher or any of its ranks still runs.
    """
    life, state = entry.life, entry.status.get("state")
    if not life.comes_back:
        return Verdict(False, f"it is {state}, and nothing of it is left to do for a service")
    if alive:
        return Verdict(True, "its processes have gone on", alive=True)
    if life.stopped:
        return Verdict(False, f"it was {state} on purpose, and nothing of it is left to stop")
    if not entry.config.get("command"):
        return Verdict(False, "its ranks have ended, and it is for their own launcher to start others")
    if life.boot_id != boot:
        return Verdict(True, f"the node has started anew since it was {state}")
    if state == "stopped":
        return Verdict(True, "it was stopped with the service")
    return Verdict(True, f"its agent and its processes ended while it was {state}")


def retry_s(failures: int) -> float:
    """Return how long to wait after a job has failed to come back so often.

    There is no error after which it would not be tried again: after a reboot a network, a mount or a command may come
    late, who holds the job may let go of it, and somebody may mend what is wrong, and should need to do no more.
    """
    return _RETRY_S[min(failures, len(_RETRY_S)) - 1]


class Comebacks:
    """Brings the jobs of a journal back, by `adopt`; `runs` says whether a job is here already.

    `kept` holds on to what was left of a job for as long as it is to come back.
    """

    def __init__(
        self,
        journal: Journal,
        adopt: Callable[[JobEntry], Supervisor],
        runs: Callable[[str], bool],
        kept: FdStore,
        logger: Logger,
    ) -> None:
        self._journal = journal
        self._adopt = adopt
        self._runs = runs
        self._kept = kept
        self._log = logger
        self._attempts: dict[str, int] = {}
        self._unproven: set[str] = set()
        self._waiting: set[str] = set()
        self._said: dict[str, str] = {}
        """What was said last of why a job stays away."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def begin(self, about_to: Callable[[], None] = lambda: None) -> list[Supervisor]:
        """Try every job once, and go on with those that have to wait; return the jobs that are back.

        Jobs whose ranks train without an agent come first. `about_to` is called before each.
        """
        self._attempts = self._journal.read_attempts()
        entries = [(entry, _judge(entry)) for entry in self._journal.read_jobs()]
        back: list[Supervisor] = []
        for entry, verdict in sorted(entries, key=lambda item: not item[1].alive):
            before = self._attempts.get(entry.job, 0)
            if verdict.back and before >= _SUSPECT:
                problem = AgentError(f"the last {before} agents ended soon after they had brought it back")
                self._failed(entry, problem, before - _SUSPECT + 1)
            elif verdict.back:
                about_to()
                back += self._try(entry, verdict, 1)
            elif entry.life.stopped:
                self._forget(entry.job)
        self._kept.remove_rest(self._waiting)
        return back

    def _try(self, entry: JobEntry, verdict: Verdict, attempt: int) -> list[Supervisor]:
        self._count(entry.job)
        try:
            job = self._adopt(entry)
        except CkptdError as error:
            self._failed(entry, error, attempt)
            return []
        self._log.info("job comes back", job=entry.job, reason=verdict.reason)
        last = None if verdict.alive else job.machine.generation
        job.ended.add_done_callback(lambda end: self._ended(job, entry, end.result().error, attempt, last))
        return [job]

    def _ended(
        self, job: Supervisor, entry: JobEntry, error: CkptdError | None, attempt: int, last: Generation | None
    ) -> None:
        """Have a job come back again that has ended, and was not to.

        Either it could not even begin, since its store could not be read yet or its node was not fit: its generation is
        still the `last` one. Or the agent before was killed while it stopped the job because of its own end, which was
        completed now.
        """
        if self._closed:
            return
        if job.left is not None:
            self._try_again(entry.job, 1)
            return
        passes = error is not None and (error.retryable or job.machine.node_refused)
        if error is not None and passes and not job.stopping and job.machine.generation is last:
            try:
                self._journal.write_job(entry)  # its end was not meant
            except CkptdError as problem:
                self._log.error("journal failed", error=str(problem))
            self._failed(entry, error, attempt)

    def _forget(self, job: str) -> None:
        """Complete a stop that has left nothing but a launcher without ranks, or a word in the journal."""
        try:
            forget(self._journal, job)
        except CkptdError as problem:
            self._log.error("journal failed", error=str(problem))

    def _count(self, job: str) -> None:
        """Count an attempt, until the agent has outlived it."""
        self._unproven.add(job)
        self._note(job, self._attempts.get(job, 0) + 1)
        asyncio.get_running_loop().call_later(_PROVEN_S, self._prove, job)

    def _prove(self, job: str) -> None:
        if job in self._unproven:
            self._unproven.discard(job)
            self._note(job, 0)

    def _note(self, job: str, attempts: int) -> None:
        self._attempts[job] = attempts
        try:
            self._journal.write_attempts(job, attempts)
        except CkptdError as problem:
            self._log.error("journal failed", error=str(problem))

    def _failed(self, entry: JobEntry, error: CkptdError, attempt: int) -> None:
        wait_s = retry_s(attempt)
        if self._said.get(entry.job) != error.message:
            self._said[entry.job] = error.message
            self._log.error("job stays away", job=entry.job, error=str(error), retry_in_s=wait_s)
        self._waiting.add(entry.job)
        task = asyncio.get_running_loop().create_task(self._try_later(entry.job, attempt + 1, wait_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _try_later(self, job: str, attempt: int, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        self._waiting.discard(job)
        self._try_again(job, attempt)
        self._kept.remove_rest(self._waiting)

    def _try_again(self, job: str, attempt: int) -> None:
        try:
            entry = self._journal.read_job(job)  # somebody may have stopped it, or run it
        except CkptdError as problem:
            self._log.error("journal failed", error=str(problem))
            return
        verdict = None if entry is None else _judge(entry)
        if entry is not None and verdict is not None and verdict.back and not self._runs(job):
            self._try(entry, verdict, attempt)

    def close(self) -> None:
        """Try no more; what has not come back will at the next start."""
        self._closed = True
        for job in tuple(self._unproven):
            self._prove(job)  # this agent ends because it is told to
        for task in self._tasks:
            task.cancel()


def _judge(entry: JobEntry) -> Verdict:
    life, legacy = entry.life, legacy_of(entry)
    launcher = is_alive(life.launcher_pid, life.launcher_started, life.boot_id)
    alive = launcher and not life.stopped  # a launcher alone has nothing that could be stopped with a checkpoint
    return judge(entry, boot=boot_id(), alive=alive or (legacy is not None and legacy.has_living()))


def refuse_second(journal: Journal, job: str) -> None:
    """Raise `FencedError` when a job goes on without an agent, and waits for one to take it over.

    A second copy would make a generation of its own: the first would train for nothing until it is found out.
    """
    try:
        entry = journal.read_job(job)
    except CkptdError:
        return  # a journal that can't be read keeps nobody from training, and is logged by the first write
    if entry is not None and entry.life.comes_back and _judge(entry).alive:
        raise FencedError(
            f"job {job} trains already, and the ckptd that ran it is gone",
            hint="start ckptd again: it goes on with the job as it is, or stops it: ckptctl stop",
        )


def forget(journal: Journal, job: str) -> bool:
    """Have a job that is not here stay away: somebody stops it before it has come back. Return whether it was to.

    A launcher that has gone on without an agent is told to end its ranks.
    """
    entry = journal.read_job(job)
    if entry is None or not entry.life.comes_back:
        return False
    life, status = replace(entry.life, comes_back=False), {**entry.status, "state": JobState.STOPPED.value}
    journal.write_job(replace(entry, status=status, life=life))
    signal_to(life.launcher_pid, life.launcher_started, life.boot_id, signal.SIGTERM)
    return True
