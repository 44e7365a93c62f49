"""How fast the tier over obstore sends, as a table."""

from __future__ import annotations

import pytest

from ckptd_plugins.storage_obstore import gears
from ckptd_plugins.storage_obstore.gears import GENTLE, Gear
from ckptd_plugins.storage_s3.options import S3Options

MIB = 2**20
OPTIONS = S3Options()
USUAL = Gear(16 * MIB, 4)


def test_the_usual_way_is_that_of_the_options() -> None:
    """Parts and requests in flight are what the options say, and a slow way gets the least of both."""
    assert gears.usual(OPTIONS) == USUAL
    assert GENTLE == Gear(5 * MIB, 1)


@pytest.mark.parametrize(
    ("now", "size_bytes", "seconds", "wanted"),
    [
        (USUAL, 100 * MIB, 1.0, USUAL),
        (GENTLE, 100 * MIB, 1.0, USUAL),
        (GENTLE, 100 * MIB, 15.0, USUAL),
        (GENTLE, 100 * MIB, 16.0, GENTLE),  # at 6.4 MiB/s the usual way has a third of its 30 s to spare
        (GENTLE, 100 * MIB, 1000.0, GENTLE),
        (GENTLE, 5 * MIB, 0.01, GENTLE),  # one request tells nothing
        (GENTLE, 100 * MIB, 0.0, USUAL),
        (USUAL, 100 * MIB, 1000.0, USUAL),  # it went well: only running out of time tells that it does not
    ],
)
def test_what_was_sent_decides_how_to_go_on(now: Gear, size_bytes: int, seconds: float, wanted: Gear) -> None:
    """The usual way comes back when a gentle put was fast enough for it, and is not left for a put that arrived."""
    assert gears.after_success(now, OPTIONS, size_bytes, seconds) == wanted


def test_a_way_that_is_slow_on_purpose() -> None:
    """Options that are as gentle as can be have nothing to shift to."""
    least = S3Options.of({"part_bytes": "5MiB", "parts_in_flight": 1})
    assert gears.usual(least) == GENTLE
    assert gears.after_success(GENTLE, least, 100 * MIB, 1000.0) == GENTLE
