"""Large puts that were interrupted: what has arrived is found, compared and not sent again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ckptd.errors import DamagedError, FencedError, StoreError
from ckptd.storage.tier import Tier
from ckptd_plugins.s3 import open_bucket
from tests.object_store.proxied import ENGINES
from tests.object_store.server import Server

PART_BYTES = 5 * 2**20
PARTS = {"part_bytes": PART_BYTES, "parts_in_flight": 2}
DATA = os.urandom(256) * (PART_BYTES * 5 // 256) + b"the end"
"""Five whole parts, whose bytes are the same, and a short one."""


class Upload:
    """The multipart uploads of one key, as the server tells of them."""

    def __init__(self, server: Server, tier: Tier, key: str) -> None:
        self.client = server.client()
        bucket, _, prefix = tier.url.removeprefix("s3://").partition("/")
        self.place = {"Bucket": bucket, "Key": f"{prefix}/{key}"}

    def ids(self) -> list[str]:
        found = self.client.list_multipart_uploads(Bucket=self.place["Bucket"], Prefix=self.place["Key"])
        return [item["UploadId"] for item in found.get("Uploads", ())]

    def parts(self, upload_id: str) -> dict[int, Any]:
        found = self.client.list_parts(**self.place, UploadId=upload_id)
        return {item["PartNumber"]: item for item in found.get("Parts", ())}

    def begin(self, parts: dict[int, bytes], checksum: str = "SHA256") -> str:
        upload_id = self.client.create_multipart_upload(**self.place, ChecksumAlgorithm=checksum)["UploadId"]
        for number, body in parts.items():
            self.send(upload_id, number, body, checksum)
        return upload_id

    def send(self, upload_id: str, number: int, body: bytes, checksum: str = "SHA256") -> None:
        self.client.upload_part(
            **self.place, UploadId=upload_id, PartNumber=number, Body=body, ChecksumAlgorithm=checksum
        )


class Failing:
    """A stream that is damaged from some byte on."""

    def __init__(self, good_bytes: int) -> None:
        self.size_bytes = len(DATA)
        self.good_bytes = good_bytes

    def read_into(self, offset: int, into: memoryview) -> None:
        if offset + len(into) > self.good_bytes:
            raise DamagedError("these bytes are damaged")
        into[:] = DATA[offset : offset + len(into)]


@pytest.fixture(params=ENGINES)
def tier(s3_url: str, request: pytest.FixtureRequest) -> Iterator[Tier]:
    """An empty place, over either engine, with the smallest parts that there are."""
    opened = open_bucket(s3_url, PARTS | {"engine": request.param})
    yield opened
    opened.close()


def test_a_killed_put_is_continued(tier: Tier, s3_server: Server) -> None:
    """What a process has sent before SIGKILL is not sent again by the next one that puts the object."""
    code = """
import sys, time
from ckptd_plugins.s3 import open_bucket
from tests.object_store.proxied import ENGINES
PART_BYTES = 5 * 2**20
data = sys.stdin.buffer.read()
class Stuck:
    size_bytes = len(data)
    def read_into(self, offset, into):
        if offset >= 3 * PART_BYTES:
            time.sleep(600)
        into[:] = data[offset : offset + len(into)]
open_bucket(sys.argv[1], {"part_bytes": PART_BYTES, "parts_in_flight": 2}).put("job/large", Stuck())
"""
    sender = subprocess.Popen([sys.executable, "-c", code, tier.url], stdin=subprocess.PIPE)
    try:
        assert sender.stdin is not None
        sender.stdin.write(DATA)
        sender.stdin.close()
        upload = Upload(s3_server, tier, "job/large")
        deadline_s = time.monotonic() + 60
        while not (ids := upload.ids()) or set(upload.parts(ids[0])) != {1, 2, 3}:
            assert time.monotonic() < deadline_s, "the other process sent nothing"
            assert sender.poll() is None
            time.sleep(0.05)
    finally:
        sender.send_signal(signal.SIGKILL)
        sender.wait()
    before = upload.parts(ids[0])
    asked: list[int] = []
    with pytest.raises(DamagedError, match="these bytes are damaged"):
        tier.put("job/large", Failing(5 * PART_BYTES), pace=asked.append)
    assert asked == [PART_BYTES] * 2, "more was sent than was missing"
    assert upload.ids() == ids
    after = upload.parts(ids[0])
    assert set(after) == {1, 2, 3, 4, 5}
    assert {number: after[number] for number in before} == before, "a part was sent again"
    tier.put("job/large", DATA, pace=asked.append)
    assert asked == [PART_BYTES, PART_BYTES, len(b"the end")]
    assert tier.get("job/large") == DATA
    assert not upload.ids()


def test_parts_of_other_bytes_are_sent_again(tier: Tier, s3_server: Server) -> None:
    """A part that an earlier attempt left is taken over only when it is the same bytes."""
    upload = Upload(s3_server, tier, "mixed")
    other = bytearray(DATA[:PART_BYTES])
    other[PART_BYTES // 2] ^= 1
    upload.begin({1: DATA[:PART_BYTES], 2: bytes(other), 4: bytes(other)})
    asked: list[int] = []
    tier.put("mixed", DATA, pace=asked.append)
    assert sum(asked) == len(DATA) - PART_BYTES
    assert tier.get("mixed") == DATA
    assert not upload.ids()


def test_the_size_of_parts_is_kept(tier: Tier, s3_server: Server) -> None:
    """An upload that was begun with larger parts goes on with them."""
    upload = Upload(s3_server, tier, "wide")
    wide = PART_BYTES + 2**20
    upload.begin({1: DATA[:wide], 3: DATA[2 * wide : 3 * wide]})
    asked: list[int] = []
    tier.put("wide", DATA, pace=asked.append)
    assert sum(asked) == len(DATA) - 2 * wide
    assert tier.get("wide") == DATA


def test_an_upload_that_came_to_nothing_is_continued(tier: Tier, s3_server: Server) -> None:
    """An upload without any part is taken over, so that a put that fails again and again leaves one and not many."""
    upload = Upload(s3_server, tier, "empty")
    upload.begin({})
    tier.put("empty", DATA)
    assert tier.get("empty") == DATA
    assert not upload.ids()


@pytest.mark.parametrize("parts", [{1: b"tiny"}, {9: DATA[:PART_BYTES]}, {1: DATA[:PART_BYTES], 2: b"tiny"}])
def test_what_can_not_be_continued_is_left_alone(tier: Tier, s3_server: Server, parts: dict[int, bytes]) -> None:
    """Parts that no such object is cut into are no reason to fail, and stay for a sweep."""
    upload = Upload(s3_server, tier, "odd")
    left = upload.begin(parts)
    tier.put("odd", DATA)
    assert tier.get("odd") == DATA
    assert upload.ids() == [left]


def test_an_upload_with_other_checksums_is_left_alone(tier: Tier, s3_server: Server) -> None:
    """An upload that was begun with checksums which ours don't go with does not keep the object from being put."""
    upload = Upload(s3_server, tier, "foreign")
    left = upload.begin({1: DATA[:PART_BYTES]}, "CRC32")
    tier.put("foreign", DATA)
    assert tier.get("foreign") == DATA
    assert upload.ids() == [left]


def test_the_fullest_upload_is_continued(tier: Tier, s3_server: Server) -> None:
    """Of several attempts the one that came furthest goes on."""
    upload = Upload(s3_server, tier, "thrice")
    upload.begin({1: DATA[:PART_BYTES]})
    upload.begin(dict.fromkeys((1, 2, 3), DATA[:PART_BYTES]))
    upload.begin({2: DATA[:PART_BYTES]})
    asked: list[int] = []
    tier.put("thrice", DATA, pace=asked.append)
    assert sum(asked) == len(DATA) - 3 * PART_BYTES


def test_uploads_of_longer_names_are_not_ours(tier: Tier, s3_server: Server) -> None:
    """An upload whose key only begins like the one that is put is another object's."""
    Upload(s3_server, tier, "name-2").begin({1: DATA[:PART_BYTES]})
    asked: list[int] = []
    tier.put("name", DATA, pace=asked.append)
    assert sum(asked) == len(DATA)


def test_threads_do_not_share_an_upload(tier: Tier, s3_server: Server) -> None:
    """Two puts of one key at once, with other bytes, leave the object of one of them, whole."""
    contents = [bytes([number]) * len(DATA) for number in (1, 2, 3)]
    Upload(s3_server, tier, "shared").begin({1: contents[0][:PART_BYTES]})
    threads = [threading.Thread(target=tier.put, args=("shared", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tier.get("shared") in contents


def test_an_upload_that_somebody_aborts_can_be_tried_again(tier: Tier, s3_server: Server) -> None:
    """A put whose upload goes away meanwhile fails as something that passes, and the next try succeeds."""
    upload = Upload(s3_server, tier, "aborted")

    def abort(_: int) -> None:
        for upload_id in upload.ids():
            upload.client.abort_multipart_upload(**upload.place, UploadId=upload_id)

    with pytest.raises(StoreError, match="NoSuchUpload") as caught:
        tier.put("aborted", DATA, pace=abort)
    assert caught.value.retryable
    tier.put("aborted", DATA)
    assert tier.get("aborted") == DATA


def test_a_create_only_put_continues_nobodys_upload(tier: Tier, s3_server: Server) -> None:
    """Two that complete one upload may both be told that they did; so who creates an object begins anew."""
    left = Upload(s3_server, tier, "claim")
    upload_id = left.begin(dict.fromkeys((1, 2), DATA[:PART_BYTES]))
    asked: list[int] = []
    tier.put("claim", DATA, create_only=True, pace=asked.append)
    assert sum(asked) == len(DATA)
    assert left.ids() == [upload_id]


def test_a_create_only_put_that_loses_leaves_nothing(tier: Tier, s3_server: Server) -> None:
    """Whoever is overtaken while it sends is told so, and what it has sent is removed."""
    upload = Upload(s3_server, tier, "raced")
    asked: list[int] = []

    def overtake(size_bytes: int) -> None:
        asked.append(size_bytes)
        if len(asked) == 1:
            upload.client.put_object(**upload.place, Body=b"theirs")

    with pytest.raises(FencedError):
        tier.put("raced", DATA, create_only=True, pace=overtake)
    assert tier.get("raced") == b"theirs"
    assert not upload.ids()


def test_a_sweep_knows_what_is_alive(tier: Tier, s3_server: Server) -> None:
    """A sweep removes old uploads below its prefix, and neither young ones nor those that are being continued."""
    old = Upload(s3_server, tier, "job/old")
    old.begin({1: DATA[:PART_BYTES]})
    elsewhere = Upload(s3_server, tier, "other/old")
    elsewhere.begin({})
    continued = Upload(s3_server, tier, "job/continued")
    upload_id = continued.begin({1: DATA[:PART_BYTES]})
    assert not tier.sweep("job/", 3600)
    time.sleep(6.1)
    continued.send(upload_id, 2, DATA[:PART_BYTES])
    (removed,) = tier.sweep("job/", 5.0)
    assert "job/old" in removed
    assert not old.ids()
    assert continued.ids() == [upload_id]
    swept: list[str] = []

    def sweep(_: int) -> None:
        swept.extend(tier.sweep("job/", -60))

    tier.put("job/alive", DATA, pace=sweep)
    assert tier.get("job/alive") == DATA
    assert [said for said in swept if "job/alive" in said] == []
    assert not continued.ids()
    assert len(elsewhere.ids()) == 1
