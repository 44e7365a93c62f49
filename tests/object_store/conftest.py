"""Fixtures of tests that need the real S3 server."""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from ckptd_plugins.storage_s3.options import Place
from tests.object_store import server
from tests.object_store.proxied import ENGINES, Bucket, proxy_of


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to the report of a failure what the server has logged, and what fsspec's own loop is waiting for."""
    report = yield
    if report.failed and isinstance(found := getattr(item, "funcargs", {}).get("s3_process"), server.Server):
        report.sections += [("the S3 server", found.last_words), ("fsspec's tasks", _fsspec_tasks())]
    return report


def _fsspec_tasks() -> str:
    loop = getattr(sys.modules.get("fsspec.asyn"), "loop", [None])[0]
    said = io.StringIO()
    with contextlib.suppress(RuntimeError):  # tasks come and go meanwhile
        for task in asyncio.all_tasks(loop) if loop is not None else ():
            task.print_stack(file=said)
    return said.getvalue()


@pytest.fixture
def s3_server(s3_process: server.Server, monkeypatch: pytest.MonkeyPatch) -> server.Server:
    """The running server, and an environment in which it is the one that is used."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    for name, value in s3_process.environ.items():
        monkeypatch.setenv(name, value)
    s3_process.until_ready()
    return s3_process


@pytest.fixture(scope="session")
def shared_bucket(s3_process: server.Server) -> str:
    """A bucket that tests share, each below a prefix of its own."""
    return s3_process.make_bucket()


@pytest.fixture
def s3_url(s3_server: server.Server, shared_bucket: str, request: pytest.FixtureRequest) -> str:
    """An empty place of a test's own on the server, which the environment leads to."""
    return f"s3://{shared_bucket}/{abs(hash(request.node.nodeid)):x}"


@pytest.fixture
def place(s3_url: str) -> Place:
    """That place, taken apart."""
    return Place.of(s3_url)


@pytest.fixture(scope="session")
def s3_client(s3_process: server.Server) -> Any:
    """A client of the server that none of our code is in; making one takes 0.2 s."""
    return s3_process.client()


@pytest.fixture(params=ENGINES)
def bucket(
    s3_server: server.Server,
    s3_client: Any,
    s3_url: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Bucket]:
    """An empty place behind a proxy without faults, for either engine."""
    proxy = proxy_of(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    found = Bucket(proxy, Place.of(s3_url), request.param, s3_client)
    try:
        yield found
    finally:
        proxy.clear()
        for tier in found.opened:
            tier.close()
        proxy.close()
