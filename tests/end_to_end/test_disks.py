"""A job on several disks, run, killed, looked at and pruned by the real commands."""

from __future__ import annotations

import json
from pathlib import Path

from tests.end_to_end.harness import LIGHT, World


def shards(folder: Path) -> set[str]:
    """The shards on a disk, as seen from it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}


def test_a_job_on_two_disks(light: World) -> None:
    """Both disks hold shards, all is intact, the job goes on from them, and what was pruned is on neither."""
    world = light
    disks = [world.folder / "nvme0", world.folder / "nvme1"]
    command = ["run", "--nproc", "2", "--every", "200ms", "--log-format", "json", "--keep-last", "2"]
    command += ["--store", "nvme0,nvme1", *world.preload, "--", LIGHT]
    world.finish(world.ctl_popen(*command, "60", "0.01"))
    output = world.finish(world.ctl_popen(*command, "120", "0.01"))
    assert '"restore_tier": "local"' in output
    listed = world.json("ls", "train")
    assert (len(listed), listed[0]["step"]) == (2, 120)
    assert world.json("ls", "train", "--store", "nvme0,nvme1") == listed
    assert all(item["intact"] for item in world.json("verify", "train", "--all"))
    first, second = map(shards, disks)
    assert first
    assert second
    assert not first & second
    manifests = sorted(disks[0].glob("train/g*/s*/manifest.json"))
    assert len(manifests) == 2
    wanted = {
        str(manifest.relative_to(disks[0]).with_name(item["file"]))
        for manifest in manifests
        for item in json.loads(manifest.read_text())["shards"]
    }
    assert wanted <= first | second
    (disks[1] / ".ckptd-disk").unlink()
    refused = world.ctl(*command, "130", "0")
    assert refused.returncode == 14
    assert "nvme1 is not disk 2 of 2 of this store" in refused.stderr
    alone = world.ctl("ls", "train", "--store", "nvme0")
    assert alone.returncode == 14
    assert "nvme0 is disk 1 of 2 of a store" in alone.stderr
    world.until_empty()
