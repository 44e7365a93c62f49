"""What one run of the simulation looks like: everything is drawn from the seed, and may be overridden."""

from __future__ import annotations

import random
from dataclasses import dataclass

FAULT_KINDS = (
    "rank", "rank", "rank", "rank", "rank", "ranks", "ranks", "launcher", "agent", "agent", "agent", "stop",
    "hang", "hang",
    "damage", "damage", "damage", "memory", "memory", "memory", "checkpoint", "restart", "step back", "step back",
    "bucket down", "bucket slow", "disk lost", "disk lost",
)  # fmt: skip
"""How often each is drawn, beside takeovers in some of the runs, for which the job writes down more, and halts."""


@dataclass(frozen=True, slots=True)
class Options:
    """The size, the pace and the faults of one run."""

    world_size: int = 2
    supervised: bool = True
    total_steps: int = 20
    every_s: float = 1.0
    step_s: float = 0.1
    capture_part_s: float = 0.01
    restore_part_s: float = 0.01
    latency_s: float = 0.005
    """The longest time that a message takes. Beyond the interval policy's `REACTION_S` steps are missed for it."""
    write_s: float = 0.1
    """The typical time to write one shard."""
    tick_s: float = 0.05
    slots: int = 2
    reuse: bool = True
    """Whether parts that have not changed are referred to."""
    differ_from: int | None = None
    """From which step on replicated tensors are not the same on all ranks."""
    keep_last: int = 3
    grace_s: float = 0.0
    """For how long what was removed from the disk can be brought back."""
    scrub_s: float = 0.0
    """After how long a stored copy is read again; 0: never."""
    disk_files: int = 0
    """How many files the disk has room for while faults last; 0: as many as there are."""
    state_grows: bool = False
    """Whether the first step makes the state larger, as an optimizer's does, so that new slots are needed."""
    faults: int = 4
    """How many faults there are at most; afterwards the job must finish."""
    fault_chance: float = 0.02
    """The chance of a fault at an event."""
    write_error_chance: float = 0.0
    stall_chance: float = 0.0
    """The chance that the agent stalls between reading the ranks' steps and acting upon them."""
    bucket: bool = False
    """Whether checkpoints are uploaded to a bucket, from which a node that has lost its disk restores."""
    bucket_put_s: float = 0.05
    """The typical time to put one object into it."""
    bucket_read_s: float = 0.05
    """The longest time that a look at what it holds takes."""
    bucket_error_chance: float = 0.0
    bucket_fault_chance: float = 0.0
    """The chance of a fault at an event of an upload."""
    bucket_keep_last: int = 3
    backlog: int = 2
    upload_every_s: float = 0.0
    unfit_chance: float = 0.0
    """The chance that a look at the node finds it unfit, while faults last."""
    nan_at: int = 0
    """The step whose batch makes the loss of one rank a NaN, and then the weights of all; 0: none does."""
    fault_kinds: tuple[str, ...] = FAULT_KINDS

    @classmethod
    def draw(cls, seed: int) -> Options:
        """Draw the options of a seed."""
        rng = random.Random(f"options {seed}")
        step_s = rng.choice((0.02, 0.05, 0.1, 0.3)) * rng.uniform(0.7, 1.3)
        every_s = step_s * rng.choice((1, 2, 4, 8)) + rng.uniform(0, 0.1)
        bucket, bad_step = rng.random() < 0.4, rng.choice((0, 0, 0, 0, rng.randint(1, 60)))
        return cls(
            world_size=rng.choice((1, 2, 2, 2, 2, 3)),
            supervised=rng.random() < 0.75,
            total_steps=rng.randint(3, 60),
            every_s=every_s,
            step_s=step_s,
            capture_part_s=step_s * rng.choice((0.01, 0.1, 0.5)),
            restore_part_s=step_s * rng.choice((0.01, 0.3)),
            latency_s=rng.choice((0.0, 0.001, 0.02, 0.02, 0.2)),
            write_s=every_s * rng.choice((0.01, 0.1, 0.5, 1.5)),
            tick_s=rng.choice((0.05, 0.05, 0.1)),
            slots=rng.choice((1, 2, 2, 2, 3)),
            reuse=rng.random() < 0.8,
            differ_from=rng.choice((None, None, None, None, 1, rng.randint(1, 40))),
            keep_last=rng.choice((1, 2, 3, 3)),
            state_grows=rng.random() < 0.3,
            faults=rng.choice((0, 1, 2, 3, 4, 6, 8)),
            fault_chance=rng.choice((0.001, 0.003, 0.01, 0.03)),
            write_error_chance=rng.choice((0.0, 0.0, 0.02, 0.1)),
            stall_chance=rng.choice((0.0, 0.1)),
            bucket=bucket,
            bucket_put_s=every_s * rng.choice((0.01, 0.1, 0.5, 1.5)),
            bucket_error_chance=rng.choice((0.0, 0.0, 0.02, 0.25)),
            bucket_fault_chance=rng.choice((0.001, 0.01, 0.03)),
            bucket_keep_last=rng.choice((1, 2, 3)),
            backlog=rng.choice((1, 2, 2)),
            upload_every_s=every_s * rng.choice((0, 0, 3)),
            grace_s=every_s * rng.choice((0, 0, 3, 30)),
            disk_files=rng.choice((0, 0, 0, rng.randint(2, 15))),
            scrub_s=every_s * rng.choice((0, 1, 1, 5)),
            unfit_chance=rng.choice((0.0, 0.0, 0.0, 0.5)),
            nan_at=bad_step if not bucket or seed % 3 == 0 else 0,  # most of the others are to have damaged copies
            fault_kinds=(*FAULT_KINDS, *rng.choice(((), (), ("takeover",) * 6)), *rng.choice(((), (), ("halt",) * 4))),
        )
