"""`ckptctl`: one file per verb, one line per error, one exit code per kind of error."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword
from types import TracebackType

from ckptd.errors import CkptdError, ConfigError
from ckptd.process_end import end_without_waiting
from ckptd.version import __version__

_VERBS = (
    *("run", "submit", "status", "ls", "show", "verify", "export", "import", "tag", "prune", "incidents", "checkpoint"),
    *("restart", "stop", "halt", "chaos"),
)
"""Each is a module, which is imported when its verb is given: the whole agent takes half a second to import."""
_INTERRUPTED = 130
_EPILOG = """\
Exit codes: 0 done, 1 other error, 2 unusable arguments, 3 no such job or checkpoint, 4 store, 5 damaged data,
6 not enough memory, 7 state can't be captured or restored, 8 no agent, 9 protocol, 10 job failed, 11 fenced off by
another agent or generation, 12 plugin, 13 store is full, 14 store refuses (credentials, permissions), 75 stopped on
purpose (resumable), 130 interrupted.
Environment: CKPTD_HOME (state, default ~/.local/state/ckptd), CKPTD_SOCKET, CKPTD_MEMORY_MAX, CKPTD_LOG_FORMAT.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    return end_without_waiting(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    verb = next((word for word in given if not word.startswith("-")), None)
    parser = _parser([verb] if verb in _VERBS else _VERBS)
    options, unknown = parser.parse_known_args(given[: given.index("--")] if "--" in given else given)
    options.command_line = given[given.index("--") + 1 :] if "--" in given else []
    if not options.debug:
        sys.excepthook = _no_traceback
    try:
        if unknown:
            raise ConfigError(f"unknown arguments: {' '.join(unknown)}", hint=_of_unknown(verb, options))
        code: int = options.verb(options)
        sys.stdout.flush()
    except CkptdError as error:
        if options.debug:
            raise
        return show_error(error)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # keeps the exit from failing again
        return 0
    return code


def _of_unknown(verb: str | None, options: argparse.Namespace) -> str:
    if verb == "run" and not options.command_line:
        return "put the command behind --, like: ckptctl run --nproc 2 -- train.py"
    return "put --help behind the verb to see what it takes"


def _parser(names: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ckptctl",
        description="Run training jobs under ckptd, and see what it keeps of them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ckptd {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks, and log decisions")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name in names:
        import_module(f"ckptd.cli.{name + '_' * iskeyword(name)}").register(verbs)
    return parser


def show_error(error: CkptdError) -> int:
    """Print an error for people; return its exit code."""
    print(f"ckptctl: error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  hint: {error.hint}", file=sys.stderr)
    return error.exit_code


def _no_traceback(kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    print(f"ckptctl: internal error: {kind.__name__}: {error}", file=sys.stderr)
    print("  hint: this is a bug in ckptd; --debug before the verb shows where", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
