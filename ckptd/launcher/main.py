"""The launcher from its start to its end: read the options, preload, say ready, serve."""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from ckptd.errors import CkptdError
from ckptd.launcher.command import LauncherOptions, plan_command
from ckptd.launcher.control import Control
from ckptd.launcher.learning import Learner
from ckptd.launcher.preload import preload, shadowed
from ckptd.launcher.processes import adopt_orphans, close_descriptors, current_folder, end_descendants
from ckptd.launcher.rank import RankStart, script_folder, signal_dispositions
from ckptd.launcher.report import show_refusal
from ckptd.launcher.server import Launcher
from ckptd.launcher.stdio import flush_streams
from ckptd.protocol.messages import Ready

_CLEAN_DEADLINE_S = 2.0


def main(arguments: Sequence[str]) -> RankStart | int:
    """Run the launcher; return its exit code, or in a forked child what that child is to become."""
    dispositions = signal_dispositions()
    adopt_orphans()
    options = LauncherOptions.from_argv(arguments)
    if options.began_s is None:
        options = replace(options, began_s=time.monotonic())
    try:
        command = plan_command(options.command, preload=bool(options.preload), python=sys.executable)
    except CkptdError as error:
        show_refusal(error)
        return error.exit_code
    os.set_inheritable(options.control_fd, False)
    control = Control(socket.socket(fileno=options.control_fd))
    beginning = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
    folder = current_folder()

    def leave_out(name: str, reason: str) -> NoReturn:
        _start_over(replace(options, skipped={**options.skipped, name: reason}), beginning, folder)

    loaded: list[str] = []
    missing: dict[str, str] = {}
    if command.mode != "exec":
        loaded, missing = preload([name for name in options.preload if name not in options.skipped], leave_out)
        hidden = shadowed(script_folder(command), list(sys.modules))
        if hidden:
            # Which module a rank gets must not depend on how it was started, so these ranks get a plain exec.
            reason = f"the script's folder has its own {', '.join(hidden)}, which it would hide"
            skipped = {**options.skipped, **missing, **dict.fromkeys(loaded, reason)}
            _start_over(replace(options, preload=(), skipped=skipped), beginning, folder)
    # What is frozen is left out of every collection, in the ranks too: their first one would touch, and so copy,
    # each page that they share with the launcher.
    gc.collect()
    gc.freeze()
    launcher = Launcher(
        control,
        command,
        belongs=options.belongs,
        learner=Learner(frozenset(name.partition(".")[0] for name in loaded), script_folder(command)),
        dispositions=dispositions,
        interpreter=tuple(beginning[:-2]),
    )
    launcher.prepare()
    began_s = time.monotonic() if options.began_s is None else options.began_s
    control.send(Ready(time.monotonic() - began_s, loaded, {**options.skipped, **missing}))
    return launcher.serve() or 0


def _start_over(options: LauncherOptions, beginning: Sequence[str], folder: str) -> NoReturn:
    """Replace this process by a new launcher with other options: an import can't be undone in place."""
    if current_folder() != folder:
        os.chdir(folder)
    # What it started goes on across an exec, and what it opened may too.
    end_descendants(_CLEAN_DEADLINE_S)
    close_descriptors(but=options.control_fd)
    os.set_inheritable(options.control_fd, True)
    flush_streams()
    os.execv(sys.executable, [sys.executable, *beginning[1:], *options.to_argv()])  # noqa: S606
