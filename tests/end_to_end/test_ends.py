"""Every way in which a rank ends, and a node that is not fit: what is said of it by the real command."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.harness import World, until


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """A real cgroup of 96 MiB, with the memory controller of version 1."""
    path = Path(f"/sys/fs/cgroup/memory/ckptd-test-ends-{os.getpid()}")
    try:
        path.mkdir()
        (path / "memory.limit_in_bytes").write_text(str(96 * 2**20))
    except OSError as error:
        pytest.skip(f"no cgroup of version 1 can be made here: {error}")
    yield path

    def removed() -> bool:
        with contextlib.suppress(OSError):
            path.rmdir()
        return not path.exists()

    until(removed, "the removal of the cgroup")


@pytest.mark.parametrize(
    ("how", "kind", "number", "cause"),
    [
        ("segfault", "signal", 11, "rank 1 was killed by SIGSEGV"),
        ("abort", "signal", 6, "rank 1 was killed by SIGABRT"),
        ("SIGTERM", "signal", 15, "rank 1 was killed by SIGTERM"),
        ("SIGKILL", "signal", 9, "rank 1 was killed by SIGKILL"),
        ("exit", "exit", None, "rank 1 ended with exit code 3"),
        ("raise", "exception", None, "rank 1 raised ValueError: loss is nan"),
    ],
)
def test_how_a_rank_ends(light: World, how: str, kind: str, number: int | None, cause: str) -> None:
    """Each way to end is the cause by its name, its peer's lost connection is a consequence, and the job goes on."""
    light.finish(light.run(str(Path(__file__).parent / "scripts" / "ends.py"), "--how", how))
    (incident,) = light.incidents_now("ends")
    assert incident["cause"].removesuffix(", core dumped") == cause
    assert (incident["kind"], incident["signal"], incident["rank"]) == (kind, number, 1)
    assert incident["consequences"] in (["rank 0 lost its connection to rank 1"], ["ckptd ended rank 0"])
    assert incident["closed"]
    told = light.ctl("incidents", "ends", "1").stdout
    assert cause in told
    assert len(told.splitlines()) < 20


def test_the_cause_is_found_behind_its_symptom(light: World) -> None:
    """A lost connection that is known first is a consequence of the rank that failed and takes its time to end."""
    output = light.finish(light.run("ends.py", "--how", "raise slowly"))
    (incident,) = light.incidents_now("ends")
    assert incident["cause"] == "rank 1 raised ValueError: loss is nan"
    assert incident["consequences"] == ["rank 0 lost its connection to rank 1"]
    assert "rank 1 failed by itself; rank 0 did not" in incident["reasons"][0]
    assert incident["exception"]["type"] == "ValueError"
    assert '"cause changed"' in output
    folder = Path(incident["evidence_path"])
    assert "rank 1 raised ValueError" in (folder / "summary.txt").read_text()
    assert (folder / "rank-00001.traceback").read_text().rstrip() == incident["exception"]["traceback"].rstrip()


@pytest.mark.parametrize("preload", [(), ("--no-preload",)])
def test_an_exit_code_is_found_behind_its_symptom(light: World, preload: tuple[str, ...]) -> None:
    """A rank that is ended while it clears up after `sys.exit(3)` has failed with that code, and its peer by it."""
    light.finish(light.run("ends.py", "--how", "exit slowly", options=preload))
    (incident,) = light.incidents_now("ends")
    assert incident["cause"] == "rank 1 ended with exit code 3"
    assert incident["consequences"] == ["rank 0 lost its connection to rank 1"]
    assert (incident["kind"], incident["signal"], incident["returncode"]) == ("exit", None, 3)


def test_a_rank_that_runs_out_of_memory(light: World, memory_cgroup: Path) -> None:
    """A rank that the kernel kills in its cgroup is said to have run out of memory, with the limit."""
    light.finish(light.run("ends.py", "--how", "oom", "--cgroup", memory_cgroup))
    (incident,) = light.incidents_now("ends")
    assert incident["cause"] == "rank 1 was killed by the kernel: out of memory; its cgroup may use 96.0 MiB"
    assert (incident["kind"], incident["signal"], incident["rank"]) == ("oom", 9, 1)


# --- the node -----------------------------------------------------------------------------------------------------

SWITCH = """
import os
from ckptd.plugin import hookimpl

class Switch:
    name = "switch"

    def check(self, plan):
        try:
            with open(os.environ["SWITCH"]) as file:
                return file.read() or None
        except FileNotFoundError:
            return None

@hookimpl
def ckptd_check_node():
    return [Switch()]
"""


@pytest.fixture
def switch(light: World) -> Path:
    """A file whose words a check of the node, which is really installed, gives for its reason."""
    folder = light.folder / "plugins"
    info = folder / "node_switch-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: node-switch\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ckptd]\nnode_switch = node_switch\n")
    (folder / "node_switch.py").write_text(SWITCH)
    light.env["SWITCH"] = str(light.folder / "switch")
    return light.folder / "switch"


def test_a_restart_waits_for_its_node(light: World, switch: Path) -> None:
    """A rank dies on a node that is not fit: the job waits with the reason in status and log, and goes on by itself."""
    run = light.run("ends.py", "--how", "none", "--at", 10**6, "--steps", 10**6)
    light.until_training("ends", 10, committed=True)
    switch.write_text("the fans are off")
    light.kill_rank("ends", 0)
    reason = "the node is not ready: switch: the fans are off"
    until(lambda: reason in [item["summary"] for item in light.status("ends")["warnings"]], "the warning in status")
    assert light.status("ends")["state"] == "preparing"
    shown = light.ctl("status", "ends").stdout
    assert reason in shown
    switch.unlink()
    light.until_training("ends", 10, generation=2)
    assert light.ctl("stop", "ends").returncode == 0
    output = light.finish(run, 75)
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [line["reasons"] for line in lines if line["event"] == "node not ready"] == [["switch: the fans are off"]]
    assert any(line["event"] == "node ready" for line in lines)
    (incident,) = light.incidents_now("ends")
    assert any(reason in item for item in incident["reasons"])


def test_a_node_that_stays_unfit_is_refused(light: World, switch: Path) -> None:
    """A first start on such a node ends after `--check-wait` with the reason, which the incident keeps."""
    switch.write_text("the fans are off")
    output = light.finish(light.run("ends.py", "--how", "none", options=("--check-wait", "1s")), 10)
    assert "the node is not ready: switch: the fans are off" in output
    (incident,) = light.incidents_now("ends")
    assert (incident["kind"], incident["decision"]) == (
        "not ready", "give up: the node is not ready: switch: the fans are off",
    )  # fmt: skip
    told = light.ctl("incidents", "ends", "1").stdout
    assert "the fans are off" in told
    assert len(told.splitlines()) < 20
