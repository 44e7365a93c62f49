"""The blocking channel over real sockets: deadlines are kept, descriptors arrive, refusals are raised as themselves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ckptd.errors import AgentError, ConfigError, MemoryBudgetError, ProtocolError
from ckptd.protocol.channel import Channel, expect, open_channel
from ckptd.protocol.codec import Decoder, encode
from ckptd.protocol.messages import (
    PROTOCOL_VERSION,
    Admitted,
    Done,
    Hello,
    Leave,
    Lent,
    Message,
    Refused,
    Reserve,
    Welcome,
    parse,
    to_frame,
)

DEADLINE_S = 30.0
"""Generous: it only matters when something is broken."""


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel and the raw socket of its peer."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


def memory(text: bytes) -> int:
    """A descriptor of some memory that holds `text`."""
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(descriptor, text)
    return descriptor


def lend(peer: socket.socket, data: bytes, *texts: bytes) -> None:
    """Send bytes with descriptors beside them, and close ours, as an agent does."""
    descriptors = [memory(text) for text in texts]
    socket.send_fds(peer, [data], descriptors)
    for descriptor in descriptors:
        os.close(descriptor)


def told(peer: socket.socket, count: int) -> list[object]:
    """Receive `count` messages at the raw end."""
    decoder, found = Decoder(), []
    while len(found) < count:
        data = peer.recv(65536)
        assert data
        found += [parse(frame) for frame in decoder.feed(data)]
    return found


# --- messages ---------------------------------------------------------------------------------------------------


def test_messages_arrive_in_order(pair: tuple[Channel, socket.socket]) -> None:
    """What was sent in one piece or in many is received message by message, oldest first."""
    channel, peer = pair
    peer.sendall(b"".join(encode(to_frame(Leave(step))) for step in range(3)))
    assert [channel.receive(DEADLINE_S) for _ in range(3)] == [Leave(0), Leave(1), Leave(2)]
    data = encode(to_frame(Leave(3)))
    writer = threading.Thread(
        target=lambda: [(peer.send(data[at : at + 1]), time.sleep(0.001)) for at in range(len(data))]
    )
    writer.start()
    assert channel.receive(DEADLINE_S) == Leave(3)
    writer.join()


def test_a_call_returns_its_answer(pair: tuple[Channel, socket.socket]) -> None:
    """A request reaches the peer, and its answer is what the call returns."""
    channel, peer = pair
    peer.sendall(encode(to_frame(Done({"step": 7}))))
    assert channel.call(Leave(3), DEADLINE_S) == Done({"step": 7})
    assert told(peer, 1) == [Leave(3)]


@pytest.mark.parametrize(
    "error", [MemoryBudgetError("too much", hint="use less"), ConfigError("no"), AgentError("not now", hint=None)]
)
def test_a_refusal_is_raised_as_its_error(pair: tuple[Channel, socket.socket], error: ConfigError) -> None:
    """A `Refused` answer is raised as the typed error that the agent had, with message and hint."""
    channel, peer = pair
    peer.sendall(encode(to_frame(Refused(error.to_json()))))
    with pytest.raises(type(error)) as caught:
        channel.call(Reserve(10), DEADLINE_S)
    assert (caught.value.message, caught.value.hint) == (error.message, error.hint)
    peer.sendall(encode(to_frame(Done())))
    assert channel.call(Leave(1), DEADLINE_S) == Done()  # a refusal is an answer: the channel goes on


def test_expect_names_both_kinds() -> None:
    """An answer of another kind is a `ProtocolError` that says what came and what was due."""
    assert expect(Done(), Done) == Done()
    with pytest.raises(ProtocolError, match="answered with Done where Welcome was due"):
        expect(Done(), Welcome)


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 10, b"\0\0\0\x02[]", encode({"type": "nonsense"}), encode({"type": "leave"})]
)
def test_garbage_is_a_protocol_error(pair: tuple[Channel, socket.socket], garbage: bytes) -> None:
    """What is no message of this protocol is a `ProtocolError`."""
    channel, peer = pair
    peer.sendall(garbage)
    with pytest.raises(ProtocolError):
        channel.receive(DEADLINE_S)


# --- peers that are silent, stuck or gone -----------------------------------------------------------------------


def within(seconds: float, call: Callable[[], object], error: type[Exception], match: str) -> None:
    """Assert that a call raises after about `seconds`: not before, and not much later even on a busy machine."""
    begin_s = time.monotonic()
    with pytest.raises(error, match=match):
        call()
    assert seconds * 0.9 <= time.monotonic() - begin_s < seconds + 5.0


def test_a_silent_peer_costs_the_deadline(pair: tuple[Channel, socket.socket]) -> None:
    """Nothing comes: the call ends at its deadline with an `AgentError` that says how long it waited."""
    channel, _ = pair
    within(0.2, lambda: channel.call(Leave(1), 0.2), AgentError, r"did not answer within 0\.2 s")


def test_a_dripping_peer_costs_the_deadline_too(pair: tuple[Channel, socket.socket]) -> None:
    """A peer that sends a byte now and then does not stretch the deadline: it counts for the whole message."""
    channel, peer = pair
    stop = threading.Event()

    def drip() -> None:
        peer.send(b"\0\0\x10\0")
        while not stop.wait(0.02):
            peer.send(b" ")

    writer = threading.Thread(target=drip)
    writer.start()
    try:
        within(0.3, lambda: channel.receive(0.3), AgentError, r"did not answer within 0\.3 s")
    finally:
        stop.set()
        writer.join()


def test_a_peer_that_does_not_read_costs_the_deadline(pair: tuple[Channel, socket.socket]) -> None:
    """When the socket's buffer is full, sending ends at its deadline."""
    channel, _ = pair
    big = Done({"text": "x" * 2**22})
    within(0.2, lambda: channel.send(big, 0.2), AgentError, "did not take a message: deadline passed")


def test_a_closed_peer_is_an_agent_error(pair: tuple[Channel, socket.socket]) -> None:
    """A peer that closed is noticed at once, in receiving and in sending, as an `AgentError`."""
    channel, peer = pair
    peer.close()
    with pytest.raises(AgentError, match="closed the connection"):
        channel.receive(DEADLINE_S)
    with pytest.raises(AgentError, match="Broken pipe"):
        channel.send(Leave(1), DEADLINE_S)


def test_a_reset_peer_is_an_agent_error(pair: tuple[Channel, socket.socket]) -> None:
    """A peer that dies with our message unread resets the connection; that is an `AgentError` too."""
    channel, peer = pair
    channel.send(Leave(1), DEADLINE_S)
    peer.close()
    with pytest.raises(AgentError, match=r"Connection reset|closed the connection"):
        channel.receive(DEADLINE_S)


def test_a_late_answer_is_not_the_next_one(pair: tuple[Channel, socket.socket]) -> None:
    """After a call that got no answer in time, the late answer is never taken for that of the next call."""
    channel, peer = pair
    with pytest.raises(AgentError, match="did not answer"):
        channel.call(Reserve(10), 0.05)
    with suppress(OSError):
        lend(peer, encode(to_frame(Lent([0], 10))), b"late")
    with pytest.raises(AgentError, match="connection to the agent is closed"):
        channel.call(Leave(1), DEADLINE_S)


@pytest.mark.parametrize("exchange", [Channel.call, Channel.send])
def test_what_was_given_up_has_no_successor(exchange: Callable[[Channel, Message, float], object]) -> None:
    """A signal's handler that raises once a message is out, and nobody waits yet, takes the connection with it."""

    class Interrupted(socket.socket):
        def sendall(self, data: object, flags: int = 0) -> None:
            super().sendall(data, flags)  # type: ignore[arg-type]
            raise KeyboardInterrupt

    ours, theirs = socket.socketpair()
    channel = Channel(Interrupted(fileno=ours.detach()))
    with theirs:
        with pytest.raises(KeyboardInterrupt):
            exchange(channel, Reserve(4096), DEADLINE_S)
        assert told(theirs, 1) == [Reserve(4096)]
        with pytest.raises(AgentError, match="is closed"):
            exchange(channel, Reserve(4096), DEADLINE_S)


def test_half_a_message_is_not_followed_by_another(pair: tuple[Channel, socket.socket]) -> None:
    """After a message that was taken only in part, nothing is sent that the peer would read as its rest."""
    channel, peer = pair
    with pytest.raises(AgentError, match="deadline passed"):
        channel.send(Done({"text": "x" * 2**22}), 0.05)
    with pytest.raises(AgentError, match="connection to the agent is closed"):
        channel.send(Leave(1), DEADLINE_S)
    seen = b""
    while data := peer.recv(2**20):
        seen += data
    assert b"leave" not in seen


# --- descriptors ------------------------------------------------------------------------------------------------


def test_descriptors_come_with_their_message(pair: tuple[Channel, socket.socket]) -> None:
    """Descriptors arrive in the order of the messages that own them, and are usable after the sender closed its own."""
    channel, peer = pair
    lend(peer, encode(to_frame(Admitted(1))), b"page")
    lend(peer, encode(to_frame(Lent([0, 1], 10))), b"slot 0", b"slot 1")
    assert channel.receive(DEADLINE_S) == Admitted(1)
    (page,) = channel.take_descriptors(1)
    assert channel.receive(DEADLINE_S) == Lent([0, 1], 10)
    slots = channel.take_descriptors(2)
    try:
        assert [os.pread(descriptor, 100, 0) for descriptor in (page, *slots)] == [b"page", b"slot 0", b"slot 1"]
    finally:
        for descriptor in (page, *slots):
            os.close(descriptor)


def test_as_many_descriptors_as_there_are_slots(pair: tuple[Channel, socket.socket]) -> None:
    """A page's worth of slots, 64, arrives with one message."""
    channel, peer = pair
    lend(peer, encode(to_frame(Lent(list(range(64)), 10))), *(b"%d" % number for number in range(64)))
    channel.receive(DEADLINE_S)
    descriptors = channel.take_descriptors(64)
    assert [os.pread(descriptor, 9, 0) for descriptor in descriptors] == [b"%d" % number for number in range(64)]
    for descriptor in descriptors:
        os.close(descriptor)


def test_a_message_in_pieces_keeps_its_descriptors(pair: tuple[Channel, socket.socket]) -> None:
    """Descriptors that come with the first bytes of a message are there when its last byte is."""
    channel, peer = pair
    data = encode(to_frame(Admitted(1)))
    lend(peer, data[:3], b"page")
    peer.sendall(data[3:])
    assert channel.receive(DEADLINE_S) == Admitted(1)
    (page,) = channel.take_descriptors(1)
    assert os.pread(page, 9, 0) == b"page"
    os.close(page)


def test_missing_descriptors_are_a_protocol_error(pair: tuple[Channel, socket.socket]) -> None:
    """A peer that announces more than it sends is refused with both numbers."""
    channel, peer = pair
    lend(peer, encode(to_frame(Lent([0, 1], 10))), b"only one")
    channel.receive(DEADLINE_S)
    with pytest.raises(ProtocolError, match="2 descriptors were announced, 1 arrived"):
        channel.take_descriptors(2)


def test_closing_closes_what_nobody_took(pair: tuple[Channel, socket.socket]) -> None:
    """No descriptor outlives its channel unless somebody took it."""
    channel, peer = pair
    before = set(os.listdir("/proc/self/fd"))
    lend(peer, encode(to_frame(Lent([0, 1], 10))), b"0", b"1")
    channel.receive(DEADLINE_S)
    assert len(set(os.listdir("/proc/self/fd")) - before) == 2
    channel.close()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_descriptors_are_not_inherited(pair: tuple[Channel, socket.socket]) -> None:
    """A program that the user's script starts does not inherit slots, which would keep their memory alive."""
    channel, peer = pair
    lend(peer, encode(to_frame(Admitted(1))), b"page")
    channel.receive(DEADLINE_S)
    (page,) = channel.take_descriptors(1)
    try:
        assert not os.get_inheritable(page)
        code = "import os, sys; sys.exit(os.path.exists(f'/proc/self/fd/{sys.argv[1]}'))"
        assert subprocess.run([sys.executable, "-c", code, str(page)], check=False, close_fds=False).returncode == 0
    finally:
        os.close(page)


# --- opening ----------------------------------------------------------------------------------------------------


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[bytes], str]]:
    """Start a peer that answers whoever connects with fixed bytes; returns the socket's path."""
    path = tmp_path / "ckptd.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    threads: list[threading.Thread] = []

    def start(answer: bytes) -> str:
        def work() -> None:
            stream, _ = listener.accept()
            with stream:
                told(stream, 1)
                stream.sendall(answer)
                stream.recv(1)  # until the other side closes

        thread = threading.Thread(target=work)
        thread.start()
        threads.append(thread)
        return str(path)

    yield start
    for thread in threads:
        thread.join(DEADLINE_S)
    listener.close()


def test_opening_greets(serve: Callable[[bytes], str]) -> None:
    """A channel is open once both sides have said hello in the same version."""
    channel, welcome = open_channel(serve(encode(to_frame(Welcome(7, [])))), "rank", DEADLINE_S)
    channel.close()
    assert welcome == Welcome(7, [])


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (to_frame(Welcome(7, [], PROTOCOL_VERSION + 1)), ProtocolError, "this side is older"),
        ({**to_frame(Welcome(7, [], PROTOCOL_VERSION + 1)), "new": 1}, ProtocolError, "this side is older"),
        (to_frame(Welcome(7, [], PROTOCOL_VERSION - 1)), ProtocolError, "the agent is older"),
        (
            to_frame(Refused(ProtocolError("no", hint="this client is older").to_json())),
            ProtocolError,
            "client is older",
        ),
        (to_frame(Done()), ProtocolError, "answered with Done where Welcome was due"),
    ],
)
def test_a_wrong_greeting_closes(
    serve: Callable[[bytes], str], answer: dict[str, object], error: type[Exception], says: str
) -> None:
    """Another version or another answer is raised with words that say what to do, and the connection is closed."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error) as caught:
        open_channel(serve(encode(answer)), "rank", DEADLINE_S)
    assert says in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the server's side may still be closing


def test_nobody_listens(tmp_path: Path) -> None:
    """Where nobody listens, opening raises `OSError` at once, and nothing stays open."""
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        open_channel(str(tmp_path / "nobody"), "rank", DEADLINE_S)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "dead"))
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        open_channel(str(tmp_path / "dead"), "rank", DEADLINE_S)
    assert set(os.listdir("/proc/self/fd")) == before


def test_hello_says_who_speaks(tmp_path: Path) -> None:
    """The first message of a connection has the role, this process and our version."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "sock"))
    listener.listen()
    try:
        with pytest.raises(AgentError):
            open_channel(str(tmp_path / "sock"), "ctl", 0.1)
        stream, _ = listener.accept()
        with stream:
            assert told(stream, 1) == [Hello("ctl", os.getpid(), PROTOCOL_VERSION)]
    finally:
        listener.close()
