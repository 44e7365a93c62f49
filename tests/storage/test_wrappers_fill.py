"""A tier that is told to be full: room comes from what is deleted, everything can be read, and it passes."""

from __future__ import annotations

import pytest

from ckptd.errors import FullError
from ckptd.storage.memory import MemoryTier
from ckptd.storage.wrappers import FillableTier


def test_full_for_a_while() -> None:
    """While it is full nothing new is put and everything can be read; what is deleted makes room, byte for byte."""
    now_s = [100.0]
    tier = FillableTier(MemoryTier(), clock=lambda: now_s[0])
    tier.put("job/a", b"x" * 1000)
    tier.fill(10.0)
    with pytest.raises(FullError, match="chaos"):
        tier.put("job/b", b"y")
    with pytest.raises(FullError):
        tier.check_writable()
    assert tier.get("job/a") == b"x" * 1000
    tier.delete("job/never")
    tier.delete("job/a")
    tier.put("job/b", [b"y" * 600, b"z" * 300])
    tier.put("job/c", b"y" * 100)
    with pytest.raises(FullError):
        tier.put("job/d", b"y")
    now_s[0] += 10.0
    tier.put("job/d", b"y" * 5000)
    tier.check_writable()
    assert sorted(entry.key for entry in tier.list("job")) == ["job/b", "job/c", "job/d"]


def test_being_filled_again_takes_the_room_that_was_made() -> None:
    """Each `fill` begins without room, also beside a full time that has not passed."""
    tier = FillableTier(MemoryTier(), clock=lambda: 0.0)
    tier.put("job/a", b"x" * 1000)
    tier.fill(10.0)
    tier.delete("job/a")
    tier.fill(10.0)
    with pytest.raises(FullError):
        tier.put("job/b", b"y")
