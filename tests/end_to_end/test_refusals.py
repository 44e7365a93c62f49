"""Bad input gets one line, a hint and its exit code, never a traceback, and loses nothing."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.end_to_end.harness import LIGHT, World

TRAIN = str(Path(__file__).parent / "scripts" / "train.py")


def last_words(text: str) -> str:
    """Return the error and its hint from a run's output, after checking that no traceback is there."""
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith("ckptctl: error: ")]
    assert len(lines) == 1, text
    return text[text.index(lines[0]) :]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["run", "--", "no_such_script.py"], 2, "there is no script no_such_script.py"),
        (["run", "--", "no-such-program"], 2, "there is no command no-such-program"),
        (["run"], 2, "no command is given"),
        (["run", "--every", "5x", "--", TRAIN], 2, "--every '5x' is no duration"),
        (["run", "--nproc", "0", "--", TRAIN], 2, "nproc is 0"),
        (["run", "--keep-last", "0", "--", TRAIN], 2, "keep_last is 0"),
        (["run", "--name", "a/b", "--", TRAIN], 2, "'a/b' can't name a job"),
        (["run", "--store", "/proc/nowhere", "--", TRAIN], 4, "can't write to /proc/nowhere"),
        (["run", "--store", "nfs4://x/y", "--", TRAIN], 12, "no plugin opens nfs4://"),
        (["run", "--python", "/no/such/python", "--", TRAIN], 2, "can't start /no/such/python"),
        (["status", "nothing"], 3, "there is no job nothing"),
        (["ls", "nothing"], 3, "there is no job nothing"),
        (["ls", "nothing", "--store", "."], 3, "there is no job nothing in"),
        (["show", "nothing"], 3, "there is no job nothing"),
        (["verify", "nothing"], 3, "there is no job nothing"),
        (["incidents", "nothing"], 3, "there is no job nothing"),
        (["stop", "nothing"], 3, "there is no job nothing"),
        (["submit", "missing.toml"], 2, "can't read missing.toml"),
    ],
)
def test_bad_arguments(world: World, arguments: list[str], code: int, says: str) -> None:
    """Each unusable argument is refused in one line with its exit code, before anything is started."""
    result = world.ctl(*arguments)
    assert result.returncode == code, result.stderr
    assert says in last_words(result.stderr)
    assert not world.store.exists()


def test_argparse_refusals_have_the_same_exit_code(world: World) -> None:
    """A misspelt flag or verb ends with 2 as well."""
    assert world.ctl("run", "--nprocs", "2").returncode == 2
    assert world.ctl("runn").returncode == 2
    assert world.ctl("run", "--nproc", "two", "--", TRAIN).returncode == 2


def test_an_exception_of_the_script_is_not_tried_for_ever(world: World) -> None:
    """The same exception at the same step ends the job as failed: three times, and once more from an older checkpoint.

    Its traceback stands in one place.
    """
    run = world.run("train.py", 60, "--pause=0.01", "--raise-at=40")
    output = world.finish(run, code=10)
    words = output[output.index("The rank's traceback:") :]
    assert words.count("Traceback (most recent call last)") == 1
    assert re.search(r'File ".*/train.py", line \d+, in <module>', words)
    assert "launcher" not in words
    incidents = world.incidents("train")
    tries = len(incidents)  # a third time, and once more if there was an older checkpoint to begin with
    assert [item["failed_step"] for item in incidents] == [39] * tries
    assert tries in (3, 4)
    said = rf"ckptctl: error: the same failure {tries} times in a row at step 39: rank [01] raised ValueError: no good"
    assert re.search(said, words)
    assert incidents[-1]["decision"].startswith(f"give up: the same failure {tries} times")
    assert incidents[0]["exception"]["type"] == "ValueError"
    status = world.json("status", "train")
    assert (status["state"], status["restarts"]) == ("failed", tries - 1)
    assert world.json("ls", "train")
    assert all(item["intact"] for item in world.json("verify", "train", "--all"))
    shown = world.ctl("incidents", "train", str(tries)).stdout
    assert "rank" in shown
    assert "ValueError: no good at step 40" in shown


def test_state_that_can_not_be_captured_names_its_key(world: World) -> None:
    """A lock inside the state is refused at attach with its key and type; nothing is tried again."""
    output = world.finish(world.run("refused.py", "lock", nproc=1), code=7)
    assert "Traceback" not in output
    assert "extra.list.1" in last_words(output)
    assert "lock" in last_words(output)
    assert len(world.incidents("refused")) == 1
    output = world.finish(
        world.run("refused.py", "lock", nproc=1, options=("--no-preload", "--name", "executed")), code=7
    )
    assert "extra.list.1" in output.splitlines()[-2]
    assert len(world.incidents("executed")) == 1


def test_a_model_of_another_shape_is_refused(world: World) -> None:
    """A restored state that does not fit names the tensor and both shapes, and the checkpoint stays as it was."""
    fits = ("refused.py", 8)
    cheap = {"nproc": 1, "options": ("--no-preload",)}  # a rank without optimizer imports half of what is preloaded
    world.finish(world.run(*fits, **cheap))
    output = world.finish(world.run("refused.py", 16, nproc=1), code=7)
    words = last_words(output)
    assert "model.0.weight" in words
    assert "[8, 4]" in words
    assert "[16, 4]" in words
    world.finish(world.run(*fits, **cheap))
    assert all(item["intact"] for item in world.json("verify", "refused", "--all"))


def test_too_little_memory_for_slots(world: World) -> None:
    """Slots that don't fit are refused at the start with the bytes that they need."""
    output = world.finish(world.run("refused.py", "big", nproc=1, CKPTD_MEMORY_MAX="100MiB"), code=6)
    words = last_words(output)
    assert "not enough memory for slots" in words
    assert int(re.search(r"\((\d+) bytes\)", words)[1]) >= 2 * 64 * 2**20 * 4
    assert "CKPTD_MEMORY_MAX" in words


def newest_manifest(world: World, job: str) -> Path:
    """Return the path of a job's newest manifest."""
    return max((world.store / job).glob("g*/s*/manifest.json"))


def test_a_shard_cut_short(light: World) -> None:
    """`verify` names a shard that was cut, and a restart goes back to the checkpoint before it and says so."""
    world = light
    world.finish(world.run(LIGHT, 40, 0.02))
    good = [item["step"] for item in world.json("ls", "train")]
    shard = newest_manifest(world, "train").parent / "rank-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 4096)
    result = world.ctl("verify", "train")
    assert result.returncode == 5
    assert "rank-00001.safetensors" in result.stdout
    output = world.finish(world.run(LIGHT, 50, 0))
    assert f"restored ({good[1]}, 'local')" in output
    (damaged,) = [json.loads(line) for line in output.splitlines() if '"checkpoint damaged"' in line]
    assert damaged["step"] == good[0]
    assert "rank-00001" in damaged["error"]


def test_a_manifest_that_is_not_json(light: World) -> None:
    """`ls` and `verify` name an unreadable manifest; with no other checkpoint left the job refuses to begin afresh."""
    world = light
    world.finish(world.run(LIGHT, 30, 0, every="1h"))
    manifest = newest_manifest(world, "train")
    before = manifest.read_bytes()
    manifest.write_text("{ not json")
    for verb in ("ls", "verify", "show"):
        result = world.ctl(verb, "train")
        assert result.returncode == 5
        assert "is not JSON" in result.stdout + result.stderr
        assert "Traceback" not in result.stderr
    output = world.finish(world.run(LIGHT, 50, 0), code=5)
    assert "none can be restored" in last_words(output)
    assert "is not JSON" in last_words(output)
    manifest.write_bytes(before)
    assert "restored (30, 'local')" in world.finish(world.run(LIGHT, 50, 0))
