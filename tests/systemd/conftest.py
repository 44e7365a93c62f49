"""A container with the service for each test; nothing of it may be left, whatever has happened in it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.systemd.container import Container, why_not
from tests.systemd.service import Service


@pytest.fixture(scope="session")
def _bootable() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def serve(_bootable: None, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Service]]:
    """Return what boots a container with the service; a failing test shows what the service has logged."""
    state = tmp_path / "state"
    state.mkdir()
    container = Container(tmp_path, state)
    service = None

    def boot(settings: str = "") -> Service:
        nonlocal service
        service = Service(container, state, settings=settings)
        container.boot()
        return service

    try:
        yield boot
    finally:
        if service is not None:
            with contextlib.suppress(AssertionError, OSError):
                sys.stdout.write(service.said())
        container.close()
