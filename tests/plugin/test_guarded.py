"""A foreign tier behind its guard: it works as before, and whatever else it raises is a `StoreError`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.errors import CkptdError, DamagedError, FencedError, NotFoundError, PluginError, StoreError
from ckptd.plugin import TierFactory
from ckptd.plugin.manager import PluginManager
from ckptd.storage.local import LocalTier
from ckptd.storage.memory import MemoryTier
from ckptd.storage.tier import Entry, Tier
from ckptd.testing import TierSuite

CALLS: dict[str, Callable[[Tier], Any]] = {
    "put": lambda tier: tier.put("a", b"x"),
    "get": lambda tier: tier.get("a"),
    "size_bytes": lambda tier: tier.size_bytes("a"),
    "read_into": lambda tier: tier.read_into("a", 0, memoryview(bytearray(1))),
    "open": lambda tier: tier.open("a"),
    "list": lambda tier: list(tier.list("")),
    "delete": lambda tier: tier.delete("a"),
    "check_writable": lambda tier: tier.check_writable(),
}


def guarded(tier: Tier) -> Tier:
    """The tier as the agent gets it from the manager."""
    manager = PluginManager(lambda *_: None, found=[])
    manager.tiers = [TierFactory("mine", ("mine",), lambda url, options: tier)]
    return manager.open_tier("mine://x")


class TestGuardedTier(TierSuite):
    """Behind its guard, a tier keeps the contract as it did before."""

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Tier:
        """A guarded local tier."""
        return guarded(LocalTier(tmp_path / "store"))

    def reopen(self, tier: Tier) -> Tier:
        return guarded(LocalTier(Path(tier.url)))


class Failing(MemoryTier):
    """A tier whose every call raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def fail(self, *_: object, **__: object) -> Any:
        """Raise."""
        raise self.error

    put = get = size_bytes = read_into = open = list = delete = check_writable = fail


@pytest.mark.parametrize("call", sorted(CALLS))
@pytest.mark.parametrize("error", [RuntimeError("boom"), OSError(5, "disk"), KeyError("a"), SystemExit(3)], ids=repr)
def test_any_fault_is_a_store_error(call: str, error: BaseException) -> None:
    """Whatever a call of a foreign tier raises is a `StoreError` with the tier's name and the fault."""
    with pytest.raises(StoreError, match=f"tier mine failed to .*{type(error).__name__}"):
        CALLS[call](guarded(Failing(error)))


@pytest.mark.parametrize("call", sorted(CALLS))
@pytest.mark.parametrize("kind", [StoreError, NotFoundError, DamagedError, FencedError, PluginError])
def test_errors_of_the_contract_are_passed_on(call: str, kind: type[CkptdError]) -> None:
    """What a tier says in the contract's own words reaches the caller as it is."""
    error = kind("as it is", hint="unchanged")
    with pytest.raises(kind) as caught:
        CALLS[call](guarded(Failing(error)))
    assert caught.value is error


def test_an_interrupt_is_passed_on() -> None:
    """Ctrl-C is no fault of the tier."""
    with pytest.raises(KeyboardInterrupt):
        guarded(Failing(KeyboardInterrupt())).get("a")


def test_a_listing_that_breaks_half_way_is_a_store_error() -> None:
    """A listing is lazy, and fails where it is drawn: that is guarded too."""

    class HalfWay(MemoryTier):
        def list(self, prefix: str) -> Iterator[Entry]:
            yield Entry("a", 1, 0.0)
            raise RuntimeError("boom")

    with pytest.raises(StoreError, match="failed to list"):
        list(guarded(HalfWay()).list(""))
