"""A job with a disk and a bucket while the bucket fails in every way: training and local commits never wait for it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator

import pytest

from tests.end_to_end.harness import LIGHT, World, until
from tests.object_store import server
from tests.object_store.faults import Answer, Drip, Fault, Flip, Reset, Stall, Swallow
from tests.object_store.proxied import proxy_of
from tests.object_store.proxy import Proxy

JOB = "train"
COMMITS = 3
"""So many local commits are waited for while a fault lasts: they come only if nothing waits for the bucket."""
pytestmark = pytest.mark.xdist_group("object store")


class Store:
    """A proxy before a server, and a job of a daemon that uploads to it."""

    def __init__(self, world: World, running: server.Server, timeout: str) -> None:
        self.world = world
        self.server = running
        self.proxy: Proxy = proxy_of(self.server)
        self.bucket = self.server.make_bucket()
        self.client = self.server.client()
        world.env.update({**self.server.environ, "AWS_ENDPOINT_URL": self.proxy.endpoint, "CKPTD_LOG_FORMAT": "json"})
        (world.folder / "job.toml").write_text(
            f'command = ["{LIGHT}", "1000000", "0.01"]\npreload = ["ckptd"]\nname = "{JOB}"\nevery = "200ms"\n'
            f'on_agent_loss = "end"\n'
            f'[[store]]\nurl = "runs"\n[[store]]\nurl = "s3://{self.bucket}/runs"\ntimeout = "{timeout}"\n'
        )
        self.daemon = world.popen([sys.executable, "-m", "ckptd.daemon"])
        until((world.home / "ckptd.sock").exists, "the socket")
        submitted = world.ctl("submit", "job.toml")
        assert submitted.returncode == 0, submitted.stderr

    def here(self) -> int:
        """The newest step that is committed on the disk."""
        found = [int(folder.parent.name[1:]) for folder in (self.world.store / JOB).glob("g*/s*/manifest.json")]
        return max(found, default=0)

    def there(self) -> int:
        """The newest step that is committed in the bucket."""
        listed = self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"runs/{JOB}/").get("Contents", ())
        found = [re.search(r"/s(\d+)/manifest\.json$", item["Key"]) for item in listed]
        return max((int(match[1]) for match in found if match), default=0)

    def until_there(self, what: str) -> None:
        """Wait until the bucket has what the disk has now, or something newer."""
        step = self.here()
        until(lambda: self.there() >= step, f"an upload of step {step} after {what}")

    def until_commits(self, count: int = COMMITS) -> None:
        """Wait for so many further commits on the disk."""
        for _ in range(count):
            step = self.here()
            until(lambda step=step: self.here() > step, f"a local commit after step {step}")

    def said(self, since: int) -> list[dict]:
        """What the agent has logged from some character on."""
        lines = self.world.output(self.daemon)[since:].splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def suffer(self, fault: Fault, *kinds: str, event: str, words: str) -> None:
        """Let a fault happen: local commits go on, an event says what it is, and then the bucket catches up."""
        since = len(self.world.output(self.daemon))
        rule = self.proxy.add(fault, *kinds)

        def told() -> bool:
            lines = [item for item in self.said(since) if item["event"] == event]
            return any(re.search(words, str(item.get("error"))) for item in lines)

        until(told, f"an event {event!r} about {words!r}")
        self.until_commits()
        rule.end()
        self.until_there(str(fault))

    def end(self, failures: int = 0) -> None:
        """Stop the job, and look whether everything is in order: on the disk, in the bucket and in the log."""
        assert self.world.ctl("stop", JOB).returncode == 0
        until(lambda: self.world.status(JOB)["state"] == "stopped", "the end of the job")
        assert self.there() == self.here(), "the newest checkpoint is not in the bucket"
        verified = self.world.json("verify", JOB, "--tier", "s3", "--all")
        assert verified
        assert all(item["intact"] for item in verified)
        log = self.world.output(self.daemon)
        assert server.SECRET_KEY not in log
        assert "Traceback" not in log
        failed = [item for item in self.said(0) if item["event"] == "generation failed"]
        assert len(failed) == failures, "training was disturbed"
        self.daemon.send_signal(signal.SIGTERM)
        self.world.finish(self.daemon)


@pytest.fixture
def store(light: World, s3_process: server.Server, request: pytest.FixtureRequest) -> Iterator[Store]:
    """A running job, both of whose tiers have a checkpoint."""
    found = Store(light, s3_process, getattr(request, "param", "2s"))
    try:
        until(found.there, "a checkpoint in the bucket")
        yield found
    finally:
        found.proxy.close()


@pytest.mark.faults
def test_training_goes_on_while_a_bucket_fails(store: Store) -> None:
    """Bursts of 503, a bucket that is gone, credentials that expire, a server that hangs: each is named in the log,
    delays no local commit, and once it is over the newest checkpoint gets there, intact."""
    store.suffer(Answer(503, "SlowDown"), event="tier retries", words="SlowDown")
    store.suffer(Answer(404, "NoSuchBucket"), event="upload failed", words="NoSuchBucket")
    store.suffer(Answer(403, "ExpiredToken"), event="upload failed", words="ExpiredToken.*(renew|credentials)")
    store.suffer(Stall(), "put", event="upload failed", words="answer in time")
    store.end()


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("store", ["30s"], indirect=True)
def test_training_goes_on_through_every_fault(store: Store) -> None:
    """The same with a real stall of 30 s, resets, changed bytes, a clock that is wrong, and a server that lies."""
    store.suffer(Stall(), event="upload failed", words="answer in time")
    store.suffer(Reset(1000), "put", event="tier retries", words="broke off|connection failed")
    store.suffer(Flip(100), "put", event="tier retries", words="BadDigest")
    store.suffer(Answer(403, "RequestTimeTooSkewed"), event="upload failed", words="RequestTimeTooSkewed.*clock")
    store.suffer(Swallow(), "put", event="upload failed", words="was put and")
    store.suffer(Answer(500, "InternalError"), "put", "head", event="upload failed", words="InternalError|500")
    store.proxy.add(Drip(2**16), "put")
    store.until_commits()
    store.until_there("a slow way")
    store.end()


def test_a_disk_that_is_wiped_under_a_job(store: Store) -> None:
    """When the job's folder on the disk is deleted, training goes on and the next checkpoint lands there; when the
    agent is lost too, the job is restored from the bucket."""
    world = store.world
    before = store.there()
    world.wipe(world.store / JOB)
    until(lambda: store.here() > before, "a commit after the disk was wiped")
    store.until_there("the loss of the disk")
    assert not [item for item in store.said(0) if item["event"] == "generation failed"], "training was disturbed"
    os.kill(store.daemon.pid, signal.SIGKILL)
    store.daemon.wait()
    world.until_empty()
    shutil.rmtree(world.store / JOB)
    kept = store.there()
    store.daemon = world.popen([sys.executable, "-m", "ckptd.daemon"])
    until(lambda: store.here() > kept, "a commit after the restart")
    assert '"restore_tier": "s3"' in world.output(store.daemon)
    store.end(failures=1)  # the launcher that went with its agent
