"""The environment of a job and of its ranks: torchrun's names, so that scripts written for it run unchanged."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping


def job_env(environ: Mapping[str, str], *, nproc: int, cpu_count: int) -> dict[str, str]:
    """Return the environment that a job's launcher starts with; what the user has set is never changed.

    OMP_NUM_THREADS: ranks that each start one thread per core fight for the cores. torchrun therefore sets it to 1;
    the cores divided by the ranks use the whole machine. It belongs here, not to a rank, because libraries read it
    when they are imported, which happens before the fork.

    PYTHONUNBUFFERED: a rank that is killed can't flush, and its last lines are those that say why.
    """
    environment = dict(environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count // max(1, nproc))))
    environment.setdefault("PYTHONUNBUFFERED", "1")
    return environment


def rank_env(
    *,
    job: str,
    socket_path: str,
    rank: int,
    local_rank: int,
    world_size: int,
    local_world_size: int,
    master_addr: str,
    master_port: int,
    generation: int,
    restarts: int,
    max_restarts: int,
    overlap: str = "auto",
    incarnation: str = "",
    agent_wait_s: float = 0.0,
    group_rank: int = 0,
    group_world_size: int = 1,
) -> dict[str, str]:
    """Return what one rank's environment has over the job's: torchrun's names, and where its agent listens.

    TORCHELASTIC_USE_AGENT_STORE is False because rank 0 hosts a new store in each generation: torchrun's reuse of
    one store is what makes its restarts stall. `incarnation` names this run of the job, `agent_wait_s` is how long it
    goes on without an agent. `group_rank` is the node's number among `group_world_size` nodes.
    """
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "GROUP_RANK": str(group_rank),
        "GROUP_WORLD_SIZE": str(group_world_size),
        "ROLE_NAME": "default",
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(master_port),
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
        "TORCHELASTIC_MAX_RESTARTS": str(max_restarts),
        "TORCHELASTIC_RUN_ID": job,
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "CKPTD_SOCKET": socket_path,
        "CKPTD_JOB": job,
        "CKPTD_GENERATION": str(generation),
        "CKPTD_OVERLAP": overlap,
        "CKPTD_INCARNATION": incarnation,
        "CKPTD_AGENT_WAIT": str(math.ceil(agent_wait_s)),
    }


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port of `host` that nobody uses now: a generation must not meet the last one's late packets.

    Somebody may take it before rank 0 listens. That fails the generation at its start, and the next one draws anew.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
