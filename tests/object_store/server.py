"""A real S3 server for tests and benches: SeaweedFS on loopback, one per run, in a fresh folder, ended by SIGKILL.

It answers create-only puts, checksums and multipart rules as S3 does. A restart on an old folder and a polite end take
half a minute, so neither is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from tests.waiting import until

ACCESS_KEY, SECRET_KEY = "ckptd-tests", "not-a-secret-of-anybody"
REGION = "us-east-1"
_READY_DEADLINE_S = 30.0
_ANSWER_S = 3.0
_FIRST_BUCKET = "first-bucket"
_TRIES = 4


class NotReadyError(AssertionError):
    """Raised when the server found one of its ports taken, or does not come up."""


@dataclass(slots=True)
class Server:
    """A running server; `environ` is what the usual AWS variables have to be to use it."""

    endpoint: str
    process: subprocess.Popen[bytes]
    folder: Path
    ports: list[int]
    _asking: Any = None
    """A client that has little patience; making one takes 0.2 s."""

    @property
    def environ(self) -> dict[str, str]:
        """The environment of a program that uses it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, access_key: str = ACCESS_KEY, **options: object):
        """Return a botocore client, to look at the server without any of our code."""
        session = botocore.session.Session()
        config = Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}, read_timeout=30)
        return session.create_client(
            "s3",
            region_name=REGION,
            endpoint_url=self.endpoint,
            aws_access_key_id=access_key,
            aws_secret_access_key=SECRET_KEY,
            config=config.merge(Config(**options)),
        )

    def make_bucket(self) -> str:
        """Create a bucket of its own and return its name."""
        self.until_ready()
        name = f"bucket-{os.urandom(6).hex()}"
        self.client().create_bucket(Bucket=name)
        return name

    def stand_still(self) -> None:
        """Stop the process, and wait until all its threads have stopped; `go_on` ends that."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        until(lambda: all(") T " in item.read_text() for item in tasks.glob("*/stat")), "the stop of the server")

    def go_on(self) -> None:
        """Let a process that was stopped run again."""
        self.process.send_signal(signal.SIGCONT)

    def leave_upload(self, url: str, key: str) -> None:
        """Leave behind what a put below an ``s3://`` URL leaves that was killed after its first part."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        place = {"Bucket": bucket, "Key": f"{prefix}/{key}"}
        upload = self.client().create_multipart_upload(**place)
        self.client().upload_part(**place, UploadId=upload["UploadId"], PartNumber=1, Body=b"x" * 5 * 2**20)

    def until_ready(self, patience_s: float = 90.0) -> None:
        """Wait until it keeps an object.

        The part that keeps objects joins the others by itself, seconds after they answer, and on a machine with much to
        do it may leave them for a while.
        """
        if self._asking is None:
            # Another server on its port would not know the key. A request that came too early may never be answered.
            self._asking = self.client(
                self.folder.name, connect_timeout=1, read_timeout=_ANSWER_S, retries={"total_max_attempts": 1}
            )
        deadline_s = time.monotonic() + patience_s
        while self.process.poll() is None:
            try:
                self._keep_one()
            except (BotoCoreError, ClientError, ResponseParserError) as error:
                said = error
            else:
                return
            if time.monotonic() > deadline_s:
                raise NotReadyError(f"the S3 server does not answer in {patience_s:.0f} s: {said}")
            time.sleep(0.05)
        raise NotReadyError(f"the S3 server ended with {self.process.returncode}")

    def _keep_one(self) -> None:
        place = {"Bucket": _FIRST_BUCKET, "Key": "first"}
        try:
            self._asking.put_object(**place, Body=b"kept")
        except self._asking.exceptions.NoSuchBucket:
            self._asking.create_bucket(Bucket=_FIRST_BUCKET)
            self._asking.put_object(**place, Body=b"kept")

    @property
    def last_words(self) -> str:
        """The end of what it has logged."""
        return (self.folder / "log").read_text(errors="replace")[-5000:]

    def stop(self) -> None:
        """End it and remove what it kept."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        for port in self.ports:  # most of its sockets lie where no option says
            for number in (port, port + 10000):
                for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    left.unlink(missing_ok=True)


def start(parent: Path | None = None) -> Server:
    """Start a server in a new folder below `parent` and return it once it keeps an object.

    One after the other on a machine: a server takes some seconds until it has all its ports, and one that found some of
    them taken would remove the sockets of the other at its end. Programs that are none of ours may still take one.
    """
    with _alone():
        for _ in range(_TRIES - 1):
            with contextlib.suppress(NotReadyError):
                return _start(parent)
        return _start(parent)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Wait until nobody else starts a server, by a lock that leaves nothing behind."""
    folder = os.open(tempfile.gettempdir(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _start(parent: Path | None) -> Server:
    folder = Path(tempfile.mkdtemp(prefix="ckptd-s3-", dir=parent))
    (folder / "data").mkdir()
    identities = [
        {
            "name": key,
            "credentials": [{"accessKey": key, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        for key in (ACCESS_KEY, folder.name)
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    ports = _free_ports(6)
    command = [
        str(Path(sys.executable).parent / "weed"), "-logtostderr=true", "server", f"-dir={folder / 'data'}",
        "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-master.port={ports[0]}", f"-volume.port={ports[1]}", "-filer",
        f"-filer.port={ports[2]}", "-s3", f"-s3.port={ports[3]}", f"-s3.config={folder / 's3.json'}",
        "-master.telemetry=false", "-master.volumeSizeLimitMB=30000", "-volume.max=10000",
        f"-s3.port.iceberg={ports[4]}", f"-s3.port.lance={ports[5]}", f"-s3.localSocket={folder / 's3.sock'}",
        "-s3.autoCreateBucket=false",
    ]  # fmt: skip
    log = (folder / "log").open("wb")
    environ = {
        **os.environ,
        "WEED_S3_SSE_KEY": "a passphrase, so that it can encrypt what it keeps",
        # Each bucket has volumes of its own, seven unless told so: they would be used up after some dozens of buckets.
        # A volume counts as full for some seconds after a few dozens of puts, whatever their size, unless its limit is
        # high: new ones would be made all the time, and puts wait for them.
        "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1",
    }
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environ)
    log.close()
    server = Server(f"http://127.0.0.1:{ports[3]}", process, folder, ports)
    try:
        server.until_ready(_READY_DEADLINE_S)
    except BaseException:
        print(server.last_words, file=sys.stderr)
        server.stop()
        raise
    return server


def _free_ports(count: int) -> list[int]:
    """Return ports that are free, and so is each plus 10000, which SeaweedFS takes for gRPC.

    They lie below those that the kernel hands out, or anybody's connection could take one before the server does.
    """
    chance = random.SystemRandom()  # tests seed the other one
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            port = chance.randrange(11_000, 22_000)
            held = [stack.enter_context(socket.socket()) for _ in range(2)]
            with contextlib.suppress(OSError):
                held[0].bind(("127.0.0.1", port))
                held[1].bind(("127.0.0.1", port + 10_000))
                found.append(port)
    return found
