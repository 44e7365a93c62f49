"""One short look at the service under a real systemd, for `make test`; `make systemd` runs the long ones."""

from __future__ import annotations

from collections.abc import Callable

from tests.systemd.service import Service
from tests.waiting import until


def test_a_job_runs_under_the_service(serve: Callable[..., Service]) -> None:
    """The service is active when it listens; systemd holds slots and pages while a job runs, and nothing after it."""
    service = serve()
    assert service.show("ActiveState") == "active"
    service.submit("job", 150, 0.02)
    until(lambda: int(service.show("NFileDescriptorStore")) == 6, "two slots and a page of each rank in the store")
    service.until_state("job", "finished")
    until(lambda: int(service.show("NFileDescriptorStore")) == 0, "an empty store")
    for rank in (0, 1):
        assert service.steps(rank) == [(1, step) for step in range(1, 151)]
