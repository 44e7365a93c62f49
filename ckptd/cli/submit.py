"""`ckptctl submit`: hand a job to the running agent."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ckptd.cli.common import ask
from ckptd.config import AgentConfig, load_job_file
from ckptd.protocol.messages import Submit


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "submit",
        help="hand a job to the running daemon",
        description="Read a job from a TOML file and start it under the daemon. Keys: command (list), store, nproc, "
        "every, name, keep_last, max_restarts, restart_window, preload (list, or false), python, cwd, env (table), "
        "slots, reuse_unchanged, flush_max, overlap, resume_from, resume_step, on_agent_loss, agent_wait, check_wait, "
        "chaos, hang (table, or false), straggler (table), numbers (text, or a table), halt (table).",
    )
    parser.add_argument("file", metavar="JOB.toml")
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Submit the job."""
    config = load_job_file(Path(options.file))
    result = ask(AgentConfig.from_environ(os.environ).socket, Submit(config.to_json()))
    print(f"job {result['job']} started; watch it with: ckptctl status {result['job']}")
    return 0
