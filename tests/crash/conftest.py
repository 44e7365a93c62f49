"""Benches for the tests of this folder: one per process that runs tests, and a world for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.matrix import Bench
from tests.crash.world import World
from tests.object_store.server import Server


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A fork server and templates, without a bucket."""
    made = Bench(tmp_path_factory.mktemp("bench"), None)
    yield made
    made.close()


@pytest.fixture(scope="session")
def bucket_bench(tmp_path_factory: pytest.TempPathFactory, s3_process: Server) -> Iterator[Bench]:
    """The same, with a gate before a real S3 server."""
    made = Bench(tmp_path_factory.mktemp("bucket-bench"), s3_process)
    yield made
    made.close()


@pytest.fixture
def world(bench: Bench, tmp_path: Path) -> Iterator[World]:
    """A world without anything in it; no process of it may be left at its end."""
    made = World(tmp_path / "world", bench.server)
    yield made
    if not made.is_running:
        made.until_empty()
    made.end()
