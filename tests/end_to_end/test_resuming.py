"""`ckptctl run --resume-from`: a job begins with another one's checkpoint, on a machine that never saw that one."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from ckptd.types import CheckpointId
from tests.crash.state import expected
from tests.end_to_end.harness import LIGHT, World
from tests.end_to_end.test_refusals import last_words
from tests.object_store import server

EVERY = "1h"
"""So that only the last step of each run is captured: everybody knows then which steps there are."""


def said(output: str, event: str) -> list[dict[str, Any]]:
    """The log's lines of one event."""
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


@pytest.mark.xdist_group("object store")
def test_from_a_bucket_on_a_new_machine(light: World, s3_process: server.Server) -> None:
    """From the bucket of a job that was never here a new job goes on to the very end of an uninterrupted run."""
    world = light
    place = f"s3://{s3_process.make_bucket()}/runs"
    world.env.update(s3_process.environ)
    command = ["run", "--nproc", "2", "--every", EVERY, "--store", place, *world.preload, "--", LIGHT]
    for steps in (40, 60):
        world.finish(world.ctl_popen(*command, str(steps), "0"))
    shutil.rmtree(world.home)  # from here on it is another machine
    assert [item["step"] for item in world.json("ls", f"{place}/train")] == [60, 40]
    assert not world.home.exists()
    options = ("--name", "tuned", "--resume-from", f"{place}/train")
    output = world.finish(world.run(LIGHT, 80, 0, every=EVERY, options=options))
    (resumed,) = said(output, "resumed")
    assert (resumed["source"], resumed["step"]) == (f"{place}/train", 60)
    assert "restored (60, 'local')" in output
    ends = [json.loads((world.folder / f"end-{rank}.json").read_text()) for rank in range(2)]
    assert ends == [expected(rank, 80) for rank in range(2)]

    output = world.finish(world.run(LIGHT, 90, 0, every=EVERY, options=options))
    assert said(output, "resuming") == []
    assert [line["step"] for line in said(output, "resume not needed")] == [80]
    assert "restored (80, 'local')" in output

    damage(s3_process, place, CheckpointId(2, 60))
    options = ("--name", "older", "--resume-from", f"{place}/train")
    output = world.finish(world.run(LIGHT, 50, 0, every=EVERY, options=options))
    assert [line["step"] for line in said(output, "checkpoint damaged")] == [60]
    assert "restored (40, 'local')" in output
    refused = world.run(LIGHT, 50, 0, options=(*options, "--name", "nothing", "--resume-step", "60"))
    assert "to resume from is whole" in last_words(world.finish(refused, code=5))
    refused = world.run(LIGHT, 50, 0, options=("--name", "nothing", "--resume-from", "s3://no-such-bucket/gpt"))
    last_words(world.finish(refused, code=14))
    world.until_empty()


def damage(running: server.Server, place: str, checkpoint: CheckpointId) -> None:
    """Flip a byte of a checkpoint in the bucket."""
    bucket, _, prefix = place.removeprefix("s3://").partition("/")
    client = running.client()
    key = f"{prefix}/train/g{checkpoint.generation:06d}/s{checkpoint.step:012d}/rank-00000.safetensors"
    data = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    data[-5000] ^= 1
    client.put_object(Bucket=bucket, Key=key, Body=bytes(data))


def test_another_number_of_ranks(world: World) -> None:
    """What two ranks have left in a folder is what one rank of another job begins with, and ends well."""
    world.finish(world.run("train.py", 20, every=EVERY))
    options = ("--name", "alone", "--resume-from", "runs/train", "--resume-step", "20")
    output = world.finish(world.run("train.py", 30, every=EVERY, nproc=1, options=options))
    (started,) = said(output, "generation started")
    assert (started["restore_step"], started["restore_world_size"]) == (20, 2)
    assert "restored (20, 'local')" in output
    assert world.tensors("alone")[0] == 30


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--resume-from", "gpt"], 2, "'gpt' names no job in a place"),
        (["--resume-from", "s3://bucket"], 2, "'s3://bucket' names no job in a place"),
        (["--resume-from", "runs/a b"], 2, "'a b' can't name a job"),
        (["--resume-step", "3"], 2, "resume_step is 3, and no job to resume from is named"),
        (["--resume-from", "runs/gpt", "--resume-step", "0"], 2, "resume_step is 0"),
        (["--resume-from", "runs/gpt"], 3, "there is no job gpt in "),
        (["--resume-from", "nfs4://x/runs/gpt"], 12, "no plugin opens nfs4://"),
    ],
)
def test_what_can_not_be_resumed_from(world: World, arguments: list[str], code: int, says: str) -> None:
    """Each is refused in one line with a hint and its exit code, and no rank is started."""
    output = world.finish(world.run("train.py", 10, options=tuple(arguments)), code=code)
    error = last_words(output)
    assert says in error
    assert "hint: " in error
    assert "restored" not in output
