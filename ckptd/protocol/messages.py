"""The messages between agent, ranks, launcher and `ckptctl`: few, typed and versioned.

Each message is a frozen record with scalar, list and dict fields; on the wire it is its fields plus `"type"`.
`parse` checks names and types of every field, so the code behind it never meets a missing key. A peer of another
`PROTOCOL_VERSION` is refused in its first message with words that say which side is older.
"""

from __future__ import annotations

from typing import Any

from ckptd.protocol.message import PROTOCOL_VERSION, Message, check_version, parse, to_frame

__all__ = ["PROTOCOL_VERSION", "Message", "check_version", "parse", "to_frame"]
"""What belongs to every message, for whoever uses one."""


class Hello(Message):
    """First message of every connection: who speaks, in which version. `role` is "rank", "launcher" or "ctl"."""

    role: str
    pid: int
    version: int = PROTOCOL_VERSION


class Welcome(Message):
    """The agent's answer to `Hello`.

    `frameworks` lists the adapters that its plugins registered, as {"name", "trigger", "target"}: a rank that has
    imported `trigger` uses the object at `target` ("module:attribute") to capture and restore.
    """

    agent_pid: int
    frameworks: list[dict[str, str]]
    version: int = PROTOCOL_VERSION


class Refused(Message):
    """A request that can't be done; `error` is `CkptdError.to_json()`."""

    error: dict[str, Any]


class Done(Message):
    """A request that was done; `result` is what the verb returns."""

    result: dict[str, Any] = {}  # noqa: RUF012 - copied for each instance


# --- rank → agent ---------------------------------------------------------------------------------------------


class Join(Message):
    """A rank takes its place in the job. `generation` is what its launcher was told, 0 when nobody told it.

    So is `incarnation`, the name of this very run of the job, which another one of the same name does not have.
    """

    job: str
    rank: int
    world_size: int
    generation: int
    options: dict[str, Any] = {}  # noqa: RUF012 - copied for each instance
    incarnation: str = ""


class Rejoin(Message):
    """A rank that lost its agent hands back what it was lent: its control page, and then its slots, as descriptors.

    `slots` are {"slot", "seal"} in the order of the descriptors; "seal" are the fields of the `Seal` by which the rank
    has sealed it last, None when it never has. `restored` and `stepped` say whether it has its state, and has finished
    a step of its own. The answer is `Adopted`.
    """

    job: str
    rank: int
    generation: int
    incarnation: str
    step: int
    restored: bool
    stepped: bool
    slots: list[dict[str, Any]]


class Reserve(Message):
    """A rank asks for slots that can hold `image_bytes`, because its layout is new or has grown."""

    image_bytes: int


class Open(Message):
    """A rank asks for descriptors of the offered checkpoint's `files`, named as in its manifest; at most 64."""

    files: list[str]


class Restored(Message):
    """A rank has put the offered snapshot into its objects."""

    generation: int
    step: int
    seconds: float


class RestoreFailed(Message):
    """A rank could not use the offered snapshot; it ends with this error."""

    generation: int
    step: int
    error: dict[str, Any]


class Stepped(Message):
    """A rank has finished its first step since it joined; `at_s` is the monotonic clock, shared by the node."""

    step: int
    at_s: float


class Seal(Message):
    """A rank has written a complete shard image of `step` into `slot`; it won't touch that slot until released.

    The image describes itself (a safetensors header), so the tensor table needs no message. `witness` are digests of
    a few replicated tensors by name, which have to be the same on all ranks.
    """

    step: int
    slot: int
    image_bytes: int
    seconds: float
    values: dict[str, float] = {}  # noqa: RUF012 - copied for each instance
    final: bool = False
    witness: dict[str, str] = {}  # noqa: RUF012 - copied for each instance


class Missed(Message):
    """A rank saw the announced step too late, or could not capture it; `error` says why when it was a fault."""

    step: int
    at_step: int
    error: dict[str, Any] | None = None


class Imported(Message):
    """What a rank has imported of the packages that its launcher preloads, beyond what it was forked with."""

    modules: list[str]


class Request(Message):
    """A rank asks for a checkpoint at the next boundary that all ranks can meet."""

    at_step: int


class Leave(Message):
    """A rank has left its training block. The answer comes when nothing of it waits to be committed."""

    step: int


class Raised(Message):
    """A rank ends with an uncaught exception."""

    job: str
    rank: int
    generation: int
    exception: dict[str, Any]


# --- agent → rank ---------------------------------------------------------------------------------------------


class Admitted(Message):
    """A place in the job; its control page comes along.

    `offer` is None for a fresh start, else {"generation", "step", "tier", "in_memory"}; then a second descriptor holds
    the manifest of what is offered (`ckptd.storage.manifest`), whose files the rank may `Open`. `incarnation` names the
    run of the job. A rank that loses its agent looks for another one for `agent_wait_s`; not at all when that is 0.
    `numbers` are {"metric", "skipped"}: what of its reports to write to the ring, None for nothing, and the ranges of
    steps to come, first and last, that it is to skip.
    """

    generation: int
    offer: dict[str, Any] | None = None
    incarnation: str = ""
    agent_wait_s: float = 0.0
    numbers: dict[str, Any] = {}  # noqa: RUF012 - copied for each instance


class Adopted(Message):
    """The agent has taken over a rank that came back, or a launcher; what they say next is heard again."""


class Opened(Message):
    """The files that a rank asked for, one descriptor each in the same order."""

    files: list[str]


class Lent(Message):
    """The rank's slots, one descriptor each in the order of `slots`; slots lent earlier and not listed are gone."""

    slots: list[int]
    size_bytes: int


# --- ckptctl → agent ------------------------------------------------------------------------------------------


class Submit(Message):
    """Start a job; `config` is `JobConfig.to_json()`."""

    config: dict[str, Any]


class Status(Message):
    """Ask for the live state of one job, or of all of them."""

    job: str | None = None


class Control(Message):
    """Ask a job to do something: `verb` is "checkpoint", "stop", "halt" or "restart".

    A restart with `step` begins with the newest checkpoint that is no newer. `options` of a stop are `grace` and
    `no_checkpoint`; those of a halt are `after_step`, `at`, `at_next_checkpoint` and `clear`, none to see what is set.
    """

    job: str
    verb: str
    wait: bool = True
    step: int | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 - copied for each instance


class Fault(Message):
    """Do a job harm on purpose, if it allows that; `fault` is `core.policy.chaos.Fault.to_json()`."""

    job: str
    fault: dict[str, Any]


# --- agent ↔ launcher -----------------------------------------------------------------------------------------


class Ready(Message):
    """The launcher has imported its preload list in `seconds`; `skipped` maps module names to reasons."""

    seconds: float
    preloaded: list[str]
    skipped: dict[str, str]
    version: int = PROTOCOL_VERSION


class Returned(Message):
    """A launcher that lost its agent comes back to the next one, which answers `Adopted`.

    `ranks` are {"rank", "pid"} of all that it was told to start last. How those ended that have is told afterwards.
    """

    job: str
    incarnation: str
    pid: int
    generation: int
    ranks: list[dict[str, int]]


class Dissolve(Message):
    """The launcher ends every rank and itself."""


class Spawn(Message):
    """Start one rank: `env` is added to the launcher's environment, output goes to the two files."""

    rank: int
    env: dict[str, str]
    stdout: str
    stderr: str


class Spawned(Message):
    """A rank's process exists."""

    rank: int
    pid: int
    at_s: float


class SpawnFailed(Message):
    """A rank's process could not be started."""

    rank: int
    error: dict[str, Any]


class Learn(Message):
    """Import these too before the next fork: ranks have needed them."""

    modules: list[str]


class Learned(Message):
    """The launcher has loaded `modules` more in `seconds`; `skipped` maps names to reasons."""

    modules: int
    seconds: float
    skipped: dict[str, str]


class Kill(Message):
    """Send `signal` to every rank's process group. What else descends from ranks ends with the last of them."""

    signal: int


class Exited(Message):
    """A rank's process has ended and was reaped; `returncode` as `subprocess` has it."""

    rank: int
    pid: int
    returncode: int
    at_s: float
    core_dumped: bool = False
