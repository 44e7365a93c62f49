"""The launcher's event loop: messages from the agent, ends of ranks, and the signal to stop.

One thread, no locks, nothing that waits except `select`: the process that forks must be as plain as it can be. The
loop has no `finally` and no `with` on the way from a fork to its return, because a child leaves through it.
"""

from __future__ import annotations

import errno
import os
import selectors
import signal
import socket
import time
from dataclasses import dataclass

from ckptd.errors import AgentError, CkptdError, ConfigError, FencedError, StoreError
from ckptd.launcher.command import Belonging, RankCommand
from ckptd.launcher.control import Control
from ckptd.launcher.learning import Learner
from ckptd.launcher.processes import end_descendants, flush_c_streams, fork, kill_group
from ckptd.launcher.rank import Dispositions, RankStart
from ckptd.launcher.seeking import Seeker
from ckptd.launcher.stdio import complain, flush_streams
from ckptd.protocol.messages import Dissolve, Exited, Kill, Learn, Learned, Message, Spawn, Spawned, SpawnFailed

_STRAYS_EVERY_S = 1.0
_SWEEP_DEADLINE_S = 2.0
_END_DEADLINE_S = 10.0
_TERM_GRACE_S = 5.0
"""For ranks that have waited for an agent in vain, between SIGTERM and SIGKILL."""
_LOG_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class _Rank:
    rank: int
    pid: int
    pidfd: int


class Launcher:
    """Serves one agent: starts ranks, tells how each ended, and leaves nothing of them behind."""

    def __init__(
        self,
        control: Control,
        command: RankCommand,
        *,
        belongs: Belonging | None,
        learner: Learner,
        dispositions: Dispositions,
        interpreter: tuple[str, ...],
    ) -> None:
        self._control = control
        self._command = command
        self._seeker = None if belongs is None else Seeker(belongs)
        self._learner = learner
        self._dispositions = dispositions
        self._interpreter = interpreter
        self._pid = os.getpid()
        self._ranks: dict[int, _Rank] = {}
        self._agent_gone = False
        self._generation = 0
        self._started: dict[int, int] = {}
        """The process of each rank that was ordered last, by rank."""
        self._ended: dict[int, Exited | SpawnFailed] = {}
        """How those ended that have, for the next agent: this one may die before it has heard of it."""
        self._kill_at_s: float | None = None
        self._end_by_s: float | None = None
        self._selector = selectors.DefaultSelector()
        self._stop_reader, self._stop_writer = socket.socketpair()
        self._stop_writer.setblocking(False)

    def prepare(self) -> None:
        """Begin to listen: to the agent, and to the signals that mean stop."""
        signal.set_wakeup_fd(self._stop_writer.fileno())
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who was born ignoring it never learns how a child has ended
        for number in (signal.SIGTERM, signal.SIGINT):
            # The handler does nothing: what counts is the byte that Python writes to the wake-up descriptor.
            signal.signal(number, lambda *_: None)
        self._selector.register(self._control.stream, selectors.EVENT_READ, self._on_control)
        self._selector.register(self._stop_reader, selectors.EVENT_READ, self._on_stop)

    def serve(self) -> RankStart | None:
        """Serve until there is nothing left to do; in a forked child return at once with what it is to become."""
        while not self._finished():
            events = self._selector.select(self._patience_s())
            at_s = time.monotonic()
            # Ends first: `at_s` is when they became known, and a message may take long to act upon.
            for key, _ in events:
                if isinstance(key.data, int):
                    self._on_rank_end(key.data, at_s)
            for key, _ in events:
                if not isinstance(key.data, int):
                    start: RankStart | None = key.data()
                    if start is not None:
                        return start
            if self._seeker is not None and self._seeker.seeking:
                start = self._seek(self._seeker, at_s)
                if start is not None:
                    return start
            self._reap_strays()
        return None

    def _finished(self) -> bool:
        if not self._ranks:
            return self._agent_gone or self._end_by_s is not None
        if self._end_by_s is not None and time.monotonic() > self._end_by_s:
            complain(f"{len(self._ranks)} ranks can't be killed; the kernel holds them")
            return True
        return False

    def _patience_s(self) -> float | None:
        if self._end_by_s is not None:
            return max(0.0, self._end_by_s - time.monotonic())
        if self._kill_at_s is not None:
            return max(0.0, self._kill_at_s - time.monotonic())
        if self._seeker is not None and self._seeker.seeking:
            return self._seeker.patience_s(time.monotonic())
        # Orphans of ranks that end meanwhile announce themselves only by SIGCHLD. Until somebody looks they cost a row
        # of the process table each, so a slow look is enough.
        return _STRAYS_EVERY_S if self._ranks else None

    # --- events ------------------------------------------------------------------------------------------------

    def _on_control(self) -> RankStart | None:
        messages = self._control.receive()
        if messages is None:
            self._selector.unregister(self._control.stream)
            if self._seeker is None or self._end_by_s is not None:
                self._leave()
            else:
                self._seeker.begin(time.monotonic())
            return None
        return self._obey(messages)

    def _obey(self, messages: list[Message]) -> RankStart | None:
        for message in messages:
            if isinstance(message, Spawn):
                start = self._spawn(message)
                if start is not None:
                    return start
            elif isinstance(message, Learn):
                self._learner.begin(message.modules)
                self._await_trial()
            elif isinstance(message, Kill):
                self._kill(message.signal)
            elif isinstance(message, Dissolve):
                self._end()
            else:
                complain(f"the agent sent {type(message).__name__}, which means nothing to a launcher")
        return None

    def _await_trial(self) -> None:
        trial = self._learner.trial
        if trial is not None and trial not in self._selector.get_map():
            self._selector.register(trial, selectors.EVENT_READ, self._on_trial)

    def _on_trial(self) -> None:
        assert self._learner.trial is not None
        self._selector.unregister(self._learner.trial)
        learned = self._learner.end()
        self._await_trial()
        if learned is not None:
            self._control.send(Learned(learned.modules, learned.seconds, learned.skipped))

    def _seek(self, seeker: Seeker, now_s: float) -> RankStart | None:
        """Look for the next agent; when that has come to nothing, end the ranks, with a word of warning first."""
        if self._kill_at_s is not None or seeker.too_late(now_s):
            if self._kill_at_s is None:
                complain("no agent has come back: the ranks are ended")
                self._kill(signal.SIGTERM)
                self._kill_at_s = now_s + _TERM_GRACE_S
            if now_s >= self._kill_at_s or not self._ranks:
                self._leave()
            return None
        try:
            ranks = [{"rank": rank, "pid": pid} for rank, pid in self._started.items()]
            found = seeker.look(now_s, ranks, self._generation)
        except FencedError as error:
            complain(f"the ranks are ended: {error}")
            self._leave()
            return None
        if found is None:
            return None
        self._control, messages = found
        self._selector.register(self._control.stream, selectors.EVENT_READ, self._on_control)
        for ended in self._ended.values():
            self._control.send(ended)
        return self._obey(messages)

    def _leave(self) -> None:
        """End every rank, and then this process: there is nobody to serve."""
        if self._seeker is not None:
            self._seeker.end()
        self._agent_gone, self._kill_at_s = True, None
        self._end()

    def _on_stop(self) -> None:
        numbers = set(self._stop_reader.recv(4096))
        # Every handled signal writes a byte here, also one whose handler a learned module has set.
        if numbers & {signal.SIGTERM, signal.SIGINT}:
            self._end()

    def _on_rank_end(self, pid: int, at_s: float) -> None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended == 0:
            return
        rank = self._ranks.pop(pid)
        self._selector.unregister(rank.pidfd)
        os.close(rank.pidfd)
        code = os.waitstatus_to_exitcode(status)
        report = Exited(rank.rank, pid, code, at_s, core_dumped=os.WCOREDUMP(status))
        if self._started.get(rank.rank) == pid:
            self._ended[rank.rank] = report
        self._control.send(report)
        if not self._ranks:
            self._sweep()

    # --- starting ----------------------------------------------------------------------------------------------

    def _spawn(self, order: Spawn) -> RankStart | None:
        """Start a rank and answer; in the forked child return what it is to become."""
        opened: list[int] = []
        self._generation = int(order.env.get("CKPTD_GENERATION", "0"))
        self._started.pop(order.rank, None)
        self._ended.pop(order.rank, None)
        if self._end_by_s is not None:
            self._refuse(order, AgentError(f"rank {order.rank} was not started: its launcher is ending"), opened)
            return None
        try:
            for path in (order.stdout, order.stderr):
                opened.append(os.open(path, _LOG_FLAGS, 0o600))
        except OSError as error:
            self._refuse(order, StoreError(f"the output file {path} can't be opened: {error.strerror}"), opened)
            return None
        start = RankStart(
            command=self._command,
            env=order.env,
            stdout_fd=opened[0],
            stderr_fd=opened[1],
            launcher_pid=self._pid,
            packages=self._learner.packages,
            dispositions=self._dispositions,
            interpreter=self._interpreter,
        )
        flush_streams()
        flush_c_streams()
        failed_reader, failed_writer = os.pipe()
        # A signal that reached the child before it is a rank would run the launcher's handler there, and the byte
        # of it would arrive here, where the two share a socket: a killed rank would stop its launcher.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = fork()
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            hint = "the limit of processes (ulimit -u, pids.max) or of memory is reached"
            refusal = AgentError(f"rank {order.rank} could not be started: {error.strerror}", hint=hint)
            self._refuse(order, refusal, [*opened, failed_reader, failed_writer])
            return None
        if pid == 0:
            if self._command.mode == "exec":
                start.execute(failed_writer)
            self._abandon()
            return start
        at_s = time.monotonic()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(failed_writer)
        _lead_group(pid)
        failure = _await_exec(failed_reader) if self._command.mode == "exec" else None
        for descriptor in (*opened, failed_reader):
            os.close(descriptor)
        if failure is not None:
            os.waitpid(pid, 0)
            self._fail(order, self._not_executed(failure))
            return None
        pidfd = os.pidfd_open(pid)
        self._started[order.rank] = pid
        self._ranks[pid] = _Rank(order.rank, pid, pidfd)
        self._selector.register(pidfd, selectors.EVENT_READ, pid)
        self._control.send(Spawned(order.rank, pid, at_s))
        return None

    def _refuse(self, order: Spawn, error: CkptdError, opened: list[int]) -> None:
        for descriptor in opened:
            os.close(descriptor)
        self._fail(order, error)

    def _fail(self, order: Spawn, error: CkptdError) -> None:
        failed = self._ended[order.rank] = SpawnFailed(order.rank, error.to_json())
        self._control.send(failed)

    def _not_executed(self, code: int) -> ConfigError:
        hints = {
            errno.ENOENT: "it was looked up on the job's PATH; for a script, the interpreter of its first line",
            errno.EACCES: f"chmod +x {self._command.target}",
            errno.ENOEXEC: "it is neither a program nor a script whose first line names its interpreter",
        }
        return ConfigError(f"{self._command.target} can't be executed: {os.strerror(code)}", hint=hints.get(code))

    def _abandon(self) -> None:
        """Let go of what the child has inherited, so that no destructor closes a number that is in use again."""
        self._control.close()
        self._selector.close()
        self._learner.forget()
        self._stop_reader.close()
        self._stop_writer.close()

    # --- ending ------------------------------------------------------------------------------------------------

    def _kill(self, number: int) -> None:
        # With SIGKILL the rest of what descends from the ranks follows as soon as the last of them has ended.
        for pid in self._ranks:
            kill_group(pid, number)

    def _end(self) -> None:
        """Kill every rank; the loop goes on until they are reaped, or until waiting longer is of no use."""
        if self._end_by_s is None:
            self._end_by_s = time.monotonic() + _END_DEADLINE_S
        self._kill(signal.SIGKILL)

    def _sweep(self) -> None:
        """Kill and reap what the ranks of a generation have left: data loader workers, helpers, their children.

        The next generation must not share its cores, ports or GPU with them. No rank lives now, so whatever
        descends from the launcher is such a leftover.
        """
        if not end_descendants(_SWEEP_DEADLINE_S):
            complain("processes that the ranks have left can't be killed; the kernel holds them")

    def _reap_strays(self) -> None:
        """Reap orphans that have ended; a rank that has ended is left to its own event."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None or ended.si_pid in self._ranks:
                return
            os.waitpid(ended.si_pid, 0)


def _lead_group(pid: int) -> None:
    """Make the child lead its process group, as it does itself: whoever is first, nobody may meet it without one."""
    try:
        os.setpgid(pid, pid)
    except OSError as error:
        # It has executed its program, or has ended: either way it has been there itself.
        if error.errno not in (errno.EACCES, errno.ESRCH):
            raise


def _await_exec(reader: int) -> int | None:
    """Wait until a child has executed its program, which closes the pipe; return the error's number if it failed."""
    answer = os.read(reader, 32)
    return int(answer) if answer else None
