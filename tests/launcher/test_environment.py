"""The environment of jobs and ranks."""

from __future__ import annotations

import socket

from ckptd.launcher.environment import free_port, job_env, rank_env


def test_job_env_divides_the_cores_and_leaves_the_users_values():
    """Threads per rank and unbuffered output are set only where the user has not chosen."""
    environ = {"PATH": "/bin"}
    assert job_env(environ, nproc=2, cpu_count=9) == {"PATH": "/bin", "OMP_NUM_THREADS": "4", "PYTHONUNBUFFERED": "1"}
    assert environ == {"PATH": "/bin"}
    assert job_env({}, nproc=8, cpu_count=2)["OMP_NUM_THREADS"] == "1"
    chosen = {"OMP_NUM_THREADS": "3", "PYTHONUNBUFFERED": ""}
    assert job_env(chosen, nproc=2, cpu_count=9) == chosen


def test_rank_env_has_exactly_torchruns_names_and_ours():
    """A script written for torchrun finds every name that torchrun sets for a rank."""
    env = rank_env(
        job="gpt",
        socket_path="/run/ckptd.sock",
        rank=3,
        local_rank=1,
        world_size=4,
        local_world_size=2,
        master_addr="10.0.0.1",
        master_port=4321,
        generation=5,
        restarts=4,
        max_restarts=9,
        overlap="off",
        incarnation="0123",
        agent_wait_s=600.0,
        group_rank=1,
        group_world_size=2,
    )
    assert env == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "2",
        "ROLE_NAME": "default",
        "ROLE_RANK": "3",
        "ROLE_WORLD_SIZE": "4",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "4321",
        "TORCHELASTIC_RESTART_COUNT": "4",
        "TORCHELASTIC_MAX_RESTARTS": "9",
        "TORCHELASTIC_RUN_ID": "gpt",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "CKPTD_SOCKET": "/run/ckptd.sock",
        "CKPTD_JOB": "gpt",
        "CKPTD_GENERATION": "5",
        "CKPTD_OVERLAP": "off",
        "CKPTD_INCARNATION": "0123",
        "CKPTD_AGENT_WAIT": "600",
    }


def test_free_port_can_be_bound_and_is_fresh():
    """Each generation gets a port of its own that rank 0 can listen on."""
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 1
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", ports.pop()))
