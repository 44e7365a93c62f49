"""An agent that is killed while it uploads: the next one sends what is missing, and nothing twice."""

from __future__ import annotations

import sys

import pytest

from tests.end_to_end.harness import SCRIPTS, World, until
from tests.object_store import server
from tests.object_store.faults import Drip
from tests.object_store.proxied import proxy_of

SIZE_MIB, PART_MIB, IN_FLIGHT = 60, 5, 2


@pytest.mark.xdist_group("object store")
@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_a_killed_agents_upload_is_continued(light: World, s3_process: server.Server, engine: str) -> None:
    """Parts that a killed agent has sent are not sent again by the next agent, and the checkpoint is whole there."""
    world, proxy, bucket = light, proxy_of(s3_process), s3_process.make_bucket()
    world.env.update({**s3_process.environ, "AWS_ENDPOINT_URL": proxy.endpoint, "CKPTD_LOG_FORMAT": "json"})
    (world.folder / "job.toml").write_text(
        f'command = ["{SCRIPTS / "large.py"}", "3", "{SIZE_MIB}"]\nnproc = 1\npreload = ["ckptd"]\nname = "large"\n'
        f'every = "1h"\n[[store]]\nurl = "runs"\n[[store]]\nurl = "s3://{bucket}/runs"\nengine = "{engine}"\n'
        f'part_bytes = "{PART_MIB}MiB"\nparts_in_flight = {IN_FLIGHT}\n'
    )

    def begin():
        agent = world.popen([sys.executable, "-m", "ckptd.daemon"])
        until(lambda: "agent started" in world.output(agent), "an agent")
        return agent

    try:
        slow = proxy.add(Drip(5 * 2**20), "part")
        agent = begin()
        submitted = world.ctl("submit", "job.toml")
        assert submitted.returncode == 0, submitted.stderr
        until(lambda: proxy.counts()["part"] >= 5 + IN_FLIGHT, "five parts")
        agent.kill()
        agent.wait()
        sent = proxy.counts()["part"]
        whole = SIZE_MIB // PART_MIB
        assert sent < whole
        slow.end()
        agent = begin()
        until(lambda: world.status("large")["state"] == "finished", "the end of the job")
        again = proxy.counts()["part"] - sent
        assert again <= whole + 1 - (sent - IN_FLIGHT), f"{again} parts were sent after {sent}"
        verified = world.json("verify", "large", "--tier", "s3", "--all")
        assert [item["intact"] for item in verified] == [True]
        agent.terminate()
        world.finish(agent)
    finally:
        proxy.close()
