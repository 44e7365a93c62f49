"""The tier over obstore against a real S3 server: the contract, what it does to memory, and how it fails."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckptd.errors import DamagedError, FencedError, NotFoundError
from ckptd.storage.tier import Tier
from ckptd.testing import TierSuite
from ckptd_plugins.storage_obstore import open_obstore
from ckptd_plugins.storage_obstore.tier import ObstoreTier
from ckptd_plugins.storage_s3.options import Place
from tests.object_store import server as s3
from tests.object_store.obstore_tier import MIB, PART, Drawn, drawn, opened


@pytest.fixture
def tier(place: Place) -> Iterator[ObstoreTier]:
    """A tier with the smallest parts that S3 takes, so that little data makes many."""
    tier = opened(place, part_bytes=PART, timeout=20)
    yield tier
    tier.close()


class TestContract(TierSuite):
    """What every tier promises."""

    racers = 4  # the server lets a loser wait for its turn, a second at a time

    @pytest.fixture
    def tier(self, place: Place, s3_server: s3.Server) -> Iterator[Tier]:
        """A tier in an empty place."""
        self.server = s3_server
        tier = opened(place, part_bytes=PART)
        yield tier
        tier.close()

    def reopen(self, tier: Tier) -> Tier | None:
        """Open the same place again."""
        return open_obstore(tier.url)

    def litter(self, tier: Tier) -> bool:
        self.server.leave_upload(tier.url, "job/s2/a")
        return True


def uploads(server: s3.Server, place: Place) -> list[str]:
    """Return the keys of the open uploads there."""
    found = server.client().list_multipart_uploads(Bucket=place.bucket, Prefix=place.prefix)
    return [upload["Key"].removeprefix(place.prefix) for upload in found.get("Uploads", ())]


# --- large objects ------------------------------------------------------------------------------------------------


def test_a_stream_goes_in_parts_and_comes_back(tier: ObstoreTier) -> None:
    """A stream of many parts is read once, part by part, and every way to read gives its bytes."""
    size = 7 * PART + 1234
    data = Drawn(size)
    tier.put("job/large", data)
    assert sorted(data.reads) == [(at, min(PART, size - at)) for at in range(0, size, PART)]
    assert tier.get("job/large") == drawn(0, size)
    into = memoryview(bytearray(size - 77))
    tier.read_into("job/large", 77, into)
    assert into == drawn(77, size - 77)
    descriptor = tier.open("job/large")
    assert os.pread(descriptor, size + 1, 0) == drawn(0, size)
    os.close(descriptor)


def test_the_server_keeps_checksums(tier: ObstoreTier, s3_server: s3.Server, place: Place) -> None:
    """Every object is kept with the checksum that it was sent with, whichever way it went."""
    for key, size, checksum in (
        ("small", 100, "ChecksumCRC64NVME"),
        ("middle", 2 * MIB, "ChecksumSHA256"),
        ("large", 3 * PART, "ChecksumSHA256"),
    ):
        tier.put(key, Drawn(size))
        kept = s3_server.client().head_object(Bucket=place.bucket, Key=f"{place.prefix}{key}", ChecksumMode="ENABLED")
        assert kept.get(checksum), f"{key} object has no checksum"


def test_what_a_stream_raises_comes_out(tier: ObstoreTier) -> None:
    """Damage found while a put reads is raised as it is, and there is no object."""
    for size, fails_at in ((6 * PART, 4 * PART), (1000, 10)):
        with pytest.raises(DamagedError, match="weight of rank-0"):
            tier.put("job/damaged", Drawn(size, fails_at))
        with pytest.raises(NotFoundError):
            tier.size_bytes("job/damaged")


def test_memory_of_an_upload_is_bounded(place: Place) -> None:
    """A stream of 400 MiB is sent with little more memory than the parts in flight."""
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from tests.object_store.obstore_tier import Drawn, opened, MIB\n"
        "from pathlib import Path\n"
        "def peak(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) // 1024\n"
        "tier = opened(sys.argv[1]); tier.put('warm', b'1'); before = peak()\n"
        "tier.put('large', Drawn(400 * MIB)); print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, place.url, *sys.path], check=True, capture_output=True, text=True, timeout=120
    )
    assert int(done.stdout) < 180, f"an upload took {done.stdout.strip()} MiB"


def test_a_read_behind_the_end_in_pieces_is_damage(tier: ObstoreTier) -> None:
    """An object that ends in the middle of a large range is damaged, and the error says where, whatever else failed."""
    tier.put("job/short", Drawn(2 * PART + 100))
    with pytest.raises(DamagedError, match=rf"ends (at byte {2 * PART + 100}|before)"):
        tier.read_into("job/short", 0, memoryview(bytearray(12 * PART)))


def test_encryption_and_class_are_passed_on(place: Place, s3_server: s3.Server) -> None:
    """What the options say of keeping objects reaches the server, whichever way an object went."""
    tier = opened(place, part_bytes=PART, storage_class="STANDARD_IA", sse="AES256", requester_pays=True)
    for key, size in (("small", 10), ("middle", 2 * MIB), ("large", 2 * PART)):
        tier.put(key, Drawn(size))
        found = s3_server.client().head_object(Bucket=place.bucket, Key=f"{place.prefix}{key}")
        assert (found["ServerSideEncryption"], found["StorageClass"]) == ("AES256", "STANDARD_IA")
        assert tier.get(key) == drawn(0, size)


# --- many objects, many processes ------------------------------------------------------------------------------------


def test_lists_more_than_a_page(tier: ObstoreTier) -> None:
    """A listing of more than 1,000 objects, which is several pages of S3, names each of them once."""
    wanted = {f"job/many/{number:04}" for number in range(1050)}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: tier.put(key, b"x"), wanted))
    assert sorted(entry.key for entry in tier.list("job/many/")) == sorted(wanted)
    assert len(list(tier.list("job/many/00"))) == 100


def _create(url: str, number: int, found: multiprocessing.Queue[int]) -> None:
    try:
        opened(url).put("job/claimed", b"%d" % number, create_only=True)
    except FencedError:
        found.put(-1)
    else:
        found.put(number)


def test_create_only_has_one_winner_among_processes(tier: ObstoreTier, place: Place) -> None:
    """Of processes that race for a key one wins, and the object is its own."""
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[int] = context.Queue()
    racers = [context.Process(target=_create, args=(place.url, number, found)) for number in range(4)]
    for racer in racers:
        racer.start()
    results = [found.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    (winner,) = [number for number in results if number >= 0]
    assert tier.get("job/claimed") == b"%d" % winner


def test_a_killed_upload_is_swept(tier: ObstoreTier, s3_server: s3.Server, place: Place) -> None:
    """A put that was killed leaves an open upload, which a sweep of its prefix ends when it is old enough."""
    script = (
        "import sys, time; sys.path[:0] = sys.argv[2:]\n"
        "from tests.object_store.obstore_tier import Drawn, opened, PART\n"
        "asked = []\n"
        "def pace(count):\n"
        "    asked.append(count)\n"
        "    if len(asked) == 3: print('half', flush=True); time.sleep(60)\n"
        "opened(sys.argv[1], part_bytes=PART).put('job/killed', Drawn(6 * PART), pace=pace)\n"
    )
    victim = subprocess.Popen([sys.executable, "-c", script, place.url, *sys.path], stdout=subprocess.PIPE)
    assert victim.stdout is not None
    assert victim.stdout.readline() == b"half\n"
    victim.kill()
    victim.communicate()
    assert uploads(s3_server, place) == ["job/killed"]
    tier.put("job/kept", b"x")
    assert tier.sweep("other/", 0) == []
    assert tier.sweep("job/", 3600) == []
    (removed,) = tier.sweep("job/", -60)
    assert removed.startswith(f"open upload of {place.url}/job/killed, begun at ")
    assert uploads(s3_server, place) == []
    assert tier.get("job/kept") == b"x"
