"""A rank that holds up the others, seen from outside; and evidence of a death."""

from __future__ import annotations

import json
from pathlib import Path

from tests.end_to_end.harness import LIGHT, World, until


def warned(world: World) -> list[tuple[str, int]]:
    """Return what the job's status warns of."""
    status = world.status("straggle")
    return [(item["kind"], item["rank"]) for item in (status or {}).get("warnings", ())]


def test_a_straggler_is_shown_and_said_once_and_cleared(world: World) -> None:
    """Of two ranks in lock-step the one that sleeps in its forward is named, until it does not any more."""
    slow, end = world.folder / "slow", world.folder / "end"
    slow.touch()
    run = world.run("straggle.py", slow, end)
    world.until_training("straggle", 5)
    until(lambda: warned(world) == [("straggler", 1)], "the warning")
    shown = world.ctl("status", "straggle").stdout
    assert "straggler: rank 1 needs " in shown
    slow.unlink()
    until(lambda: not warned(world), "that it is cleared")
    end.touch()
    lines = [json.loads(line) for line in world.finish(run).splitlines() if line.startswith("{")]
    said = [line for line in lines if line["event"] in ("rank slow", "rank not slow any more")]
    assert [(line["event"], line["rank"]) for line in said] == [("rank slow", 1), ("rank not slow any more", 1)]
    assert said[0]["waits_left_out"]
    assert said[0]["own_s"] > 0.05
    assert said[0]["peers_s"] < said[0]["own_s"] / 1.5
    assert world.incidents_now("straggle") == []


def test_a_death_leaves_evidence(light: World) -> None:
    """The incident of a killed rank names a folder with what the pages said, the last lines and the machine's state."""
    run = light.run(LIGHT, 10**6, 0.02)
    light.until_training("train", 20, committed=True)
    light.kill_rank("train", 1)
    light.until_training("train", generation=2)
    incidents = until(
        lambda: [item for item in light.incidents_now("train") if item["evidence_path"]], "the incident's evidence"
    )
    path = incidents[0]["evidence_path"]
    folder = Path(path)
    assert folder == light.home / "jobs" / "train" / "incidents" / "1"
    assert {"summary.txt", "incident.json", "pages.jsonl", "machine.txt"} <= {file.name for file in folder.iterdir()}
    pages = [json.loads(line) for line in (folder / "pages.jsonl").read_text().splitlines()]
    assert {line["rank"] for line in pages} == {0, 1}
    assert "rank 1 failed first" in (folder / "summary.txt").read_text()
    run.terminate()
    light.finish(run, code=75)
