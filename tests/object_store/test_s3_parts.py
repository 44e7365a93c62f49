"""The arithmetic of multipart uploads."""

from __future__ import annotations

import base64
import hashlib

import pytest

from ckptd_plugins.storage_s3 import parts
from ckptd_plugins.storage_s3.parts import MAX_PARTS, MIN_PART_BYTES, Part

MIB = 2**20


@pytest.mark.parametrize("size", [1, 16 * MIB, 16 * MIB + 1, 156 * 2**30, 157 * 2**30, 5 * 2**40])
def test_ten_thousand_parts_suffice(size: int) -> None:
    """Parts grow with an object, so that it never has more of them than S3 takes, and cover it without a gap."""
    part_bytes = parts.part_bytes_for(size, 16 * MIB)
    count = parts.count_of(size, part_bytes)
    assert part_bytes >= 16 * MIB
    assert part_bytes % MIB == 0
    assert 1 <= count <= MAX_PARTS
    assert parts.range_of(1, size, part_bytes)[0] == 0
    assert parts.range_of(count, size, part_bytes)[1] == size
    for number in range(1, min(count, 100)):
        assert parts.range_of(number, size, part_bytes)[1] == parts.range_of(number + 1, size, part_bytes)[0]


def _part(number: int, size_bytes: int) -> Part:
    return Part(number, size_bytes, "etag")


@pytest.mark.parametrize(
    ("found", "part_bytes"),
    [
        ([], 5 * MIB),
        ([_part(1, 8 * MIB)], 8 * MIB),
        ([_part(3, 8 * MIB), _part(1, 8 * MIB)], 8 * MIB),
        ([_part(2, 8 * MIB), _part(4, 6 * MIB)], 8 * MIB),
        ([_part(1, 8 * MIB), _part(4, 7 * MIB)], None),
        ([_part(1, 8 * MIB), _part(2, 7 * MIB)], None),
        ([_part(5, 8 * MIB)], None),
        ([_part(1, MIN_PART_BYTES - 1)], None),
        ([_part(1, 40 * MIB)], None),
        ([_part(1, 30 * MIB)], 30 * MIB),
    ],
)
def test_parts_tell_how_they_were_cut(found: list[Part], part_bytes: int | None) -> None:
    """The size of an earlier attempt's parts is found from any of them, unless they can't be parts of this object."""
    assert parts.resumed_part_bytes(30 * MIB, 5 * MIB, found) == part_bytes


def test_a_cut_into_too_many_parts_is_not_continued() -> None:
    """An upload whose parts are too small for the object can't be completed, so it isn't continued."""
    assert parts.resumed_part_bytes(MAX_PARTS * MIN_PART_BYTES + 1, MIB, [_part(1, MIN_PART_BYTES)]) is None


def test_the_same_bytes_are_known_by_sha256_or_md5() -> None:
    """A part is the same when its size and its strongest listed checksum are; an ETag that is no MD5 proves nothing."""
    data = memoryview(b"some bytes")
    sha256, md5 = parts.sha256_of(data), hashlib.md5(data).hexdigest()
    assert parts.is_same(Part(1, 10, "anything", sha256), data, sha256)
    assert parts.is_same(Part(1, 10, f'"{md5}"'), data, sha256)
    assert not parts.is_same(Part(1, 11, f'"{md5}"', sha256), data, sha256)
    assert not parts.is_same(Part(1, 10, f'"{md5}"', parts.sha256_of(memoryview(b"other"))), data, sha256)
    assert not parts.is_same(Part(1, 10, f'"{"0" * 32}"'), data, sha256)
    assert not parts.is_same(Part(1, 10, f'"{md5}-1"'), data, sha256)


def test_the_checksum_of_parts_is_that_of_their_checksums() -> None:
    """The checksum of a composed object is the one that S3 documents."""
    each = [parts.sha256_of(memoryview(data)) for data in (b"a", b"b")]
    whole = hashlib.sha256(hashlib.sha256(b"a").digest() + hashlib.sha256(b"b").digest()).digest()
    assert parts.sha256_of_parts(each) == f"{base64.b64encode(whole).decode()}-2"
