"""The S3 tier on a real server: the conformance suite, and what it promises beyond."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from ckptd.errors import FencedError, NotFoundError
from ckptd.storage.tier import Tier
from ckptd.testing import TierSuite, race
from ckptd_plugins.storage_s3 import open_s3
from tests.object_store.server import Server

PART_BYTES = 5 * 2**20
PARTS = {"part_bytes": PART_BYTES}


@pytest.fixture
def tier(s3_url: str) -> Iterator[Tier]:
    """An empty S3 tier with the smallest parts that there are."""
    opened = open_s3(s3_url, PARTS)
    yield opened
    opened.close()


class TestS3Tier(TierSuite):
    """The S3 tier keeps the contract, its create-only put between processes too."""

    racers = 4  # the server lets a loser wait for its turn, a second at a time

    @pytest.fixture
    def tier(self, s3_url: str, s3_server: Server) -> Iterator[Tier]:
        """An empty S3 tier, where an object of a few MiB is a large one."""
        self.server = s3_server
        self.opened = [open_s3(s3_url, PARTS)]
        yield self.opened[0]
        for opened in self.opened:
            opened.close()

    def reopen(self, tier: Tier) -> Tier:
        self.opened.append(open_s3(tier.url, PARTS))
        return self.opened[-1]

    def litter(self, tier: Tier) -> bool:
        self.server.leave_upload(tier.url, "job/s2/a")
        return True

    @pytest.mark.parametrize(("size", "turns"), [(1000, 10), (PART_BYTES + 1, 3)])
    def test_create_only_has_one_winner_among_processes(self, tier: Tier, size: int, turns: int) -> None:
        """Of several real processes that claim a key at once, with a small or a large object, one wins."""
        code = """
from ckptd.errors import FencedError
from ckptd_plugins.storage_s3 import open_s3
number, url, size, turns = sys.argv[1:]
tier = open_s3(url, {"part_bytes": 5 * 2**20})
list(tier.list("job/nothing"))
ready()
for turn in range(int(turns)):
    try:
        tier.put(f"job/claim-{turn}", number.encode() * int(size), create_only=True)
        print(turn)
    except FencedError:
        pass
tier.close()
"""
        won = [said.split() for said in race(code, 4, tier.url, str(size), str(turns))]
        for turn in range(turns):
            winners = [number for number, ours in enumerate(won) if str(turn) in ours]
            assert len(winners) == 1, f"{winners} won claim {turn}"
            assert tier.get(f"job/claim-{turn}") == str(winners[0]).encode() * size


def test_a_listing_has_more_than_one_page(tier: Tier) -> None:
    """A listing goes on behind the 1,000 keys that the server gives at once."""
    wanted = {f"many/{number:05}": number % 3 for number in range(1050)}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: tier.put(key, b"x" * wanted[key]), wanted))
    found = list(tier.list("many/"))
    assert len(found) == len(wanted)
    assert {entry.key: entry.size_bytes for entry in found} == wanted


def test_keys_of_any_characters(tier: Tier) -> None:
    """What a key is made of is nobody's syntax on the way."""
    keys = {"a b/c+d", "percent%20/%", "über/☃", "quote'\"<&>", "tilde~2/star*", "question?x=1", "hash#1"}
    for key in keys:
        tier.put(key, key.encode())
    assert {entry.key for entry in tier.list("")} == keys
    for key in keys:
        assert tier.get(key) == key.encode()
        tier.delete(key)
    assert not list(tier.list(""))


def test_a_prefix_keeps_tiers_of_one_bucket_apart(tier: Tier) -> None:
    """Two tiers whose prefixes begin alike see nothing of each other."""
    tier.put("ours", b"1")
    neighbour = open_s3(f"{tier.url}-2")
    try:
        assert not list(neighbour.list(""))
        neighbour.put("theirs", b"2")
        assert [entry.key for entry in tier.list("")] == ["ours"]
        with pytest.raises(NotFoundError):
            tier.get("theirs")
    finally:
        neighbour.close()


def test_what_is_sent_carries_a_checksum_that_the_server_keeps(tier: Tier, s3_server: Server) -> None:
    """Both kinds of put leave the SHA-256 of their bytes with the object."""
    bucket, _, prefix = tier.url.removeprefix("s3://").partition("/")
    data = os.urandom(PART_BYTES + 7)
    tier.put("small", data[:1000])
    tier.put("large", data)

    def kept(key: str) -> str:
        return s3_server.client().head_object(Bucket=bucket, Key=f"{prefix}/{key}", ChecksumMode="ENABLED")[
            "ChecksumSHA256"
        ]

    assert kept("small") == _sha256(data[:1000])
    digests = b"".join(hashlib.sha256(part).digest() for part in (data[:PART_BYTES], data[PART_BYTES:]))
    assert kept("large") == f"{_sha256(digests)}-2"


def test_the_server_compares_checksums(tier: Tier, s3_server: Server) -> None:
    """Bytes that are not those of their checksum are refused, whole objects and parts alike."""
    bucket, _, prefix = tier.url.removeprefix("s3://").partition("/")
    client, wrong = s3_server.client(), _sha256(b"others")
    with pytest.raises(ClientError, match="BadDigest"):
        client.put_object(Bucket=bucket, Key=f"{prefix}/x", Body=b"these", ChecksumSHA256=wrong)
    upload = client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/x", ChecksumAlgorithm="SHA256")
    with pytest.raises(ClientError, match="BadDigest"):
        client.upload_part(
            Bucket=bucket, Key=f"{prefix}/x", UploadId=upload["UploadId"], PartNumber=1, Body=b"1", ChecksumSHA256=wrong
        )
    assert not list(tier.list(""))


def test_encryption_and_class_are_passed_on(s3_url: str, s3_server: Server) -> None:
    """What the options say of keeping objects reaches the server with small and with large ones."""
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    tier = open_s3(s3_url, {**PARTS, "sse": "AES256", "storage_class": "STANDARD_IA", "requester_pays": True})
    try:
        for key, size in (("small", 10), ("large", PART_BYTES + 1)):
            tier.put(key, b"x" * size)
            found = s3_server.client().head_object(Bucket=bucket, Key=f"{prefix}/{key}")
            assert (found["ServerSideEncryption"], found["StorageClass"]) == ("AES256", "STANDARD_IA")
            assert tier.get(key) == b"x" * size
    finally:
        tier.close()


def test_large_reads_are_one_object(tier: Tier) -> None:
    """A read in several pieces beside puts of the key gives the bytes of one object, or says that it was replaced."""
    size = 20 * 2**20
    contents = [bytes([number]) * size for number in (1, 2)]
    tier.put("busy", contents[0])
    over = threading.Event()

    def write() -> None:
        for turn in range(4):
            tier.put("busy", contents[turn % 2])
        over.set()

    writer = threading.Thread(target=write)
    writer.start()
    whole = 0
    while not over.is_set() or not whole:
        into = memoryview(bytearray(size))
        try:
            tier.read_into("busy", 0, into)
        except Exception as error:
            assert "was replaced" in str(error)
            continue
        assert bytes(into) in contents
        whole += 1
    writer.join()


def test_large_create_only_put_of_a_taken_key_sends_nothing(tier: Tier) -> None:
    """Whether a key is taken is asked before gigabytes go, and nothing stays open."""
    tier.put("taken", b"first")
    asked: list[int] = []
    with pytest.raises(FencedError):
        tier.put("taken", b"x" * (PART_BYTES * 3), create_only=True, pace=asked.append)
    assert not asked
    assert not tier.sweep("", -60)


def test_close_ends_connections_and_threads(s3_url: str) -> None:
    """After `close` no thread and no socket of the tier is left, and closing twice is no error."""
    before = (threading.active_count(), _sockets())
    for _ in range(3):
        tier = open_s3(s3_url, PARTS)
        tier.put("x", b"1" * (PART_BYTES * 2))
        assert _sockets() > before[1]
        tier.close()
        tier.close()
    deadline_s = time.monotonic() + 5
    while (threading.active_count(), _sockets()) != before and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert (threading.active_count(), _sockets()) == before


def test_objects_outlive_a_killed_process(tier: Tier) -> None:
    """What a process put stays when it is killed right after."""
    code = """
import os, signal
from ckptd_plugins.storage_s3 import open_s3
tier = open_s3(sys.argv[2], {"part_bytes": 5 * 2**20})
ready()
tier.put("job/small", b"x" * 2**10)
tier.put("job/large", b"x" * 2**23)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with pytest.raises(AssertionError, match="ended with -9"):
        race(code, 1, tier.url)
    assert tier.get("job/small") == b"x" * 2**10
    assert tier.get("job/large") == b"x" * 2**23


def test_a_program_that_does_not_close_ends(s3_url: str) -> None:
    """An interpreter ends by itself, quickly and without a word, though a tier is still open."""
    code = f"""
from ckptd_plugins.storage_s3 import open_s3
tier = open_s3({s3_url!r})
tier.put("x", b"1")
"""
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (end.returncode, end.stdout, end.stderr) == (0, "", "")


def _sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def _sockets() -> int:
    found = 0
    for item in Path("/proc/self/fd").iterdir():
        try:
            found += os.readlink(item).startswith("socket:")
        except FileNotFoundError:
            continue
    return found
