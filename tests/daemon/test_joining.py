"""Who may take a rank's place, what a rank may say, and what no message can do to the agent."""

from __future__ import annotations

import os
from typing import Any

import pytest

from ckptd.config import JobConfig
from ckptd.errors import AgentError, CkptdError, ConfigError, NotFoundError
from ckptd.protocol import messages as m
from ckptd.protocol.codec import encode
from ckptd.store_config import StoreConfig
from ckptd.types import RaisedException
from tests.daemon.harness import PATIENCE_S, AgentThread, Node, PuppetError, until
from tests.daemon.speaker import Speaker


def refused(speaker: Speaker, message: m.Message) -> CkptdError:
    """Return the error with which a message is refused."""
    with pytest.raises(CkptdError) as error:
        speaker.ask(message)
    return error.value


def test_a_rank_with_another_world_size_is_refused(node: Node, agent: AgentThread) -> None:
    """A rank that knows of another number of ranks gets a `config` error with both, and the job goes on."""
    first = node.puppet(0, 2)
    first.start_attach()
    until(lambda: agent.status()["state"] == "starting", "the job")
    with pytest.raises(PuppetError, match="rank 0 of 3 can't join job job of 2 ranks") as error:
        node.puppet(0, 3).attach()
    assert error.value.code == "config"
    second = node.puppet(1, 2)
    assert second.attach()[0] == first.finish()[0] == 1


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0), (0, -3), (10**9, 1), (0, 10**9)])
def test_an_impossible_rank_is_refused(
    node: Node, agent: AgentThread, speaker: Speaker, rank: int, world_size: int
) -> None:
    """A rank outside its own world is a `config` error, and leaves no job behind that others would not fit into."""
    assert isinstance(refused(speaker, m.Join("job", rank, world_size, 0, {"store": str(node.store)})), ConfigError)
    assert not agent.call(lambda: agent.agent.jobs)


def test_a_rank_of_an_older_generation_is_refused(node: Node, agent: AgentThread) -> None:
    """A zombie that was started for a generation that is over gets a `fenced` error, not a place in the new one."""
    first = node.puppet()
    first.attach()
    first.kill()
    until(lambda: agent.status()["state"] == "pending", "readiness for new ranks")
    assert node.puppet().attach()[0] == 2
    with pytest.raises(PuppetError, match="generation 1 of job job is over") as error:
        node.puppet(CKPTD_GENERATION="1").attach()
    assert error.value.code == "fenced"


def test_a_rank_of_a_job_that_is_not_here_is_refused(node: Node, agent: AgentThread) -> None:
    """A rank whose supervisor is not this agent is a `fenced` error: it must not start a job of its own."""
    with pytest.raises(PuppetError, match="does not run job job") as error:
        node.puppet(CKPTD_GENERATION="7").attach()
    assert error.value.code == "fenced"
    assert not agent.call(lambda: agent.agent.jobs)


def test_a_job_that_an_agent_runs_itself_has_no_guests(node: Node, agent: AgentThread) -> None:
    """A training started by hand under the name of a supervised job is refused at once, and may use it afterwards."""
    config = JobConfig(
        "job", ("/bin/sh", "-c", "sleep 1000"), (StoreConfig(str(node.store)),), preload=(), cwd=str(node.folder)
    )
    agent.call(agent.agent.submit, config)
    guest = node.puppet()
    with pytest.raises(PuppetError, match="job job is run by this agent") as error:
        guest.attach()
    assert error.value.code == "fenced"
    agent.call(lambda: agent.job().stop(1.0, checkpoint=False))
    until(lambda: agent.job().ended.done(), "the end of the supervised job")
    assert guest.attach()[0] == 2


def test_a_process_may_attach_again(node: Node, agent: AgentThread) -> None:
    """A process that has left its block may begin the same job anew, as a notebook does, and restores its end."""
    puppet = node.puppet()
    puppet.attach()
    puppet.train(5)
    puppet.do("run.close()")
    assert puppet.attach()[:2] == [2, 5]
    puppet.train(1)
    puppet.do("run.close()")
    assert puppet.attach()[:2] == [3, 6]


def test_what_a_guest_reports_is_not_the_holders(node: Node, agent: AgentThread) -> None:
    """An exception of a process that never got the place is not taken for that of the rank that holds it."""
    holder, guest = node.puppet(), node.puppet()
    holder.attach()
    holder.train(1)
    with pytest.raises(PuppetError, match="which can't be captured"):
        guest.do("import threading\nckptd.attach(lock=threading.Lock())")
    holder.kill()
    (incident,) = until(node.incidents, "the incident")
    assert incident["cause"] in ("rank 0 was killed by SIGKILL", "rank 0 ended while it was training")  # by kernel
    assert incident["exception"] is None


def test_the_newest_of_several_that_wait_for_one_place(node: Node, agent: AgentThread) -> None:
    """When two processes wait for one rank's place, the older one is told so at once and trains on unprotected."""
    holder, older, newer = node.puppet(), node.puppet(), node.puppet()
    holder.attach()
    older.start_attach()
    until(lambda: agent.job().machine._waiting == {0: older.pid}, "the first one's arrival")
    newer.start_attach()
    assert older.finish() == [1, None, None]
    assert older.said.count("UNPROTECTED") == 1
    assert "another process has come to be rank 0" in older.said
    holder.kill()
    assert newer.finish()[0] == 2


def test_a_rank_that_gives_up_waiting_is_forgotten(node: Node, agent: AgentThread) -> None:
    """A rank that closes its connection before it is admitted is not waited for by the next generation."""
    holder = node.puppet()
    holder.attach()
    impatient = node.puppet()
    impatient.start("import ckptd.client.session\nckptd.client.session.ADMIT_DEADLINE_S = 0.2")
    impatient.finish()
    assert impatient.attach() == [1, None, None]
    assert "did not answer within 0.2 s" in impatient.said
    until(lambda: not agent.job().machine._waiting, "its being forgotten")
    holder.kill()
    assert node.puppet().attach()[0] == 2


# --- single messages ----------------------------------------------------------------------------------------------


def test_a_rank_speaks_only_after_it_joined(speaker: Speaker) -> None:
    """Messages of a rank that has no place are refused, each by its name."""
    assert "Reserve makes no sense before Join" in str(refused(speaker, m.Reserve(5000)))


def test_a_connection_is_one_rank(speaker: Speaker, node: Node, agent: AgentThread) -> None:
    """Who is a rank already is refused a second place, of which nobody would let go when its connection closes."""
    speaker.join("job")
    again = refused(speaker, m.Join("other", 0, 2, 0, {"store": str(node.store)}))
    assert again.message == "this connection is a rank's already"
    assert list(agent.call(lambda: agent.agent.jobs)) == ["job"]


def test_a_slot_that_was_not_lent_can_not_be_sealed(speaker: Speaker, agent: AgentThread) -> None:
    """Sealing a slot that the rank doesn't have is refused in the log, and nothing is flushed."""
    admitted = speaker.join()
    assert (admitted.generation, admitted.offer) == (1, None)
    speaker.channel.send(m.Seal(1, 5, 4096, 0.0, final=True), PATIENCE_S)
    assert isinstance(speaker.ask(m.Reserve(4096)), m.Lent)
    (refusal,) = agent.events("message refused")
    assert (refusal["message"], refusal["pid"]) == ("Seal", os.getpid())
    assert "sealed slot 5, which it was not lent" in refusal["error"]
    assert agent.status()["last_committed"] is None


@pytest.mark.parametrize("size", [0, -1, -(10**9)])
def test_slots_of_no_size_are_refused(speaker: Speaker, agent: AgentThread, size: int) -> None:
    """A rank that asks for nothing is refused, and its job goes on."""
    speaker.join()
    assert f"slots of {size} bytes" in str(refused(speaker, m.Reserve(size)))
    assert isinstance(speaker.ask(m.Reserve(4096)), m.Lent)


def test_slots_are_asked_for_one_after_the_other(speaker: Speaker) -> None:
    """A rank that asks for larger slots while it waits for some is refused these, and gets those it asked for first."""
    speaker.join()
    speaker.channel.stream.sendall(b"".join(encode(m.to_frame(m.Reserve(size))) for size in (4096, 2**24)))
    first, second = (speaker.channel.receive(PATIENCE_S) for _ in range(2))
    assert isinstance(first, m.Refused)
    assert "waits for slots already" in first.error["message"]
    assert isinstance(second, m.Lent)


@pytest.mark.parametrize("error", [True, 7, "no", [], {"code": "config"}])
def test_what_else_a_rank_may_call_an_error(error: Any) -> None:
    """What comes with an exception counts as an error of ckptd only if it is written like one."""
    told = RaisedException.from_json({"type": "E", "message": "m", "traceback": "t", "error": error})
    assert told.error == (error if isinstance(error, dict) else None)


def test_what_is_not_for_ranks_is_refused(speaker: Speaker, node: Node) -> None:
    """A rank can't ask what ctl asks, nor ctl ask what a rank asks."""
    speaker.join()
    assert isinstance(refused(speaker, m.Status()), AgentError)
    ctl = Speaker(node, "ctl")
    assert isinstance(refused(ctl, m.Reserve(4096)), AgentError)
    assert isinstance(refused(ctl, m.Control("nosuch", "stop")), NotFoundError)
    ctl.close()


@pytest.mark.parametrize(
    "options",
    [
        {"every_s": "soon"},
        {"slots": 0},
        {"overlap": "maybe"},
        {"flush_max_bytes_per_s": -1},
        {"nosuch": 1},
        {"store": "nfs4://x"},
    ],
)
def test_bad_options_are_refused(node: Node, speaker: Speaker, agent: AgentThread, options: dict[str, Any]) -> None:
    """What can't be a setting is refused when the first rank joins, and the name is free for a better try."""
    with pytest.raises(CkptdError):
        speaker.join(**options)
    assert not agent.call(lambda: agent.agent.jobs)
    admitted = speaker.join()
    assert (admitted.generation, admitted.offer) == (1, None)
