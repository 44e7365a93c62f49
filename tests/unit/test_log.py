"""Logs: JSON for machines, a console line for people, and no event that nobody has heard of."""

from __future__ import annotations

import ast
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from ckptd.log import EVENTS, get_logger, set_up

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("debug", "info", "warning", "error", "critical", "exception")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    """Leave structlog as it was found."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


def logged(stream: io.StringIO, log_format: str = "auto", *, debug: bool = False) -> str:
    """What a line of each level looks like on a stream."""
    set_up(log_format, stream=stream, debug=debug)
    log = get_logger(job="gpt")
    log.debug("capture announced", step=4)
    log.info(
        "checkpoint committed",
        step=4,
        size_bytes=3 * 2**20,
        flush_s=0.0234,
        loss=1.23456789,
        path=Path("/a"),
        none=None,
    )
    return stream.getvalue()


@pytest.mark.parametrize(("stream", "log_format"), [(io.StringIO, "auto"), (io.StringIO, "json"), (Terminal, "json")])
def test_json_when_piped_or_asked_for(stream: type[io.StringIO], log_format: str) -> None:
    """Each line is one JSON object with event, level, time in UTC, context and the plain numbers."""
    (line,) = logged(stream(), log_format).splitlines()
    record = json.loads(line)
    assert record.pop("timestamp").endswith("Z")
    assert record == {
        "event": "checkpoint committed",
        "level": "info",
        "job": "gpt",
        "step": 4,
        "size_bytes": 3 * 2**20,
        "flush_s": 0.0234,
        "loss": 1.23456789,
        "path": "/a",
        "none": None,
    }


@pytest.mark.parametrize(
    ("stream", "log_format"), [(Terminal, "auto"), (Terminal, "console"), (io.StringIO, "console")]
)
def test_a_line_for_people_on_a_terminal(stream: type[io.StringIO], log_format: str) -> None:
    """People see sizes and durations with their units, few digits, and no fields without a value."""
    (line,) = logged(stream(), log_format).splitlines()
    with pytest.raises(ValueError, match=r"Expecting value|Extra data"):
        json.loads(line)
    plain = line if stream is io.StringIO else _without_colours(line)
    assert ("\x1b[" in line) == (stream is Terminal)
    for part in ("checkpoint committed", "job=gpt", "step=4", "size=3.0MiB", "flush=23ms", "loss=1.23457", "path="):
        assert part in plain
    assert "none" not in plain
    assert "size_bytes" not in plain


def _without_colours(line: str) -> str:
    import re

    return re.sub(r"\x1b\[[0-9;]*m", "", line)


def test_fields_with_a_form_of_their_own() -> None:
    """The phases of an incident and what was restored read as a sentence would."""
    stream = io.StringIO()
    set_up("console", stream=stream)
    get_logger().info(
        "job recovered",
        seconds={"detect": 0.002, "total": 1.5},
        restored={"generation": 1, "step": 40, "tier": "memory"},
        lost_steps=3,
    )
    assert "seconds='detect 2.0ms, total 1.50s'" in stream.getvalue()
    assert "restored='step 40 from memory'" in stream.getvalue()
    assert "lost_steps=3" in stream.getvalue()


def test_debug_shows_decisions() -> None:
    """Lines of level debug come only when asked for."""
    assert "capture announced" not in logged(io.StringIO())
    assert "capture announced" in logged(io.StringIO(), debug=True)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", float("nan"), "ä\n\x1b[0m", {"a": object()}])
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_any_value_can_be_logged(value: object, log_format: str) -> None:
    """A log line never fails because of what is in it."""
    stream = io.StringIO()
    set_up(log_format, stream=stream)
    get_logger().info("agent started", value=value)
    assert "agent started" in stream.getvalue()


def test_it_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a stream the log goes to stderr: stdout belongs to what a command was asked for."""
    set_up("json")
    get_logger().info("agent started")
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["event"] == "agent started"


# --- event names ------------------------------------------------------------------------------------------------


def _is_logger(node: ast.expr) -> bool:
    return "log" in ast.unparse(node).lower().rpartition(".")[2]


def _events(path: Path) -> Iterator[tuple[str, ast.expr]]:
    """Where a module logs, and the expression of the event's name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        logs = name in LEVELS and isinstance(function, ast.Attribute) and _is_logger(function.value)
        first = node.args[0] if node.args else node.keywords[0].value if node.keywords else None
        # getattr(self._log, level)("an event"), where the level varies; the shell passes on the names of effects so.
        by_level = isinstance(function, ast.Call) and ast.unparse(function).startswith("getattr(self._log")
        # report("an event", {…}) from the threads of storage, which know no logger.
        reports = name in ("report", "_report") and len(node.args) == 2 and isinstance(node.args[1], ast.Dict)
        if first is not None and (logs or reports or name == "Log" or (by_level and isinstance(first, ast.Constant))):
            yield f"{path.relative_to(ROOT)}:{node.lineno}", first


def _used() -> dict[str, list[str]]:
    used: dict[str, list[str]] = {}
    for folder in ("ckptd", "plugins", "integrations"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for where, event in _events(path):
                assert isinstance(event, ast.Constant), f"{where}: the name of an event must be a literal"
                assert isinstance(event.value, str), f"{where}: the name of an event must be text"
                used.setdefault(event.value, []).append(where)
    return used


def test_every_event_is_listed_and_every_listed_one_is_used() -> None:
    """`log.EVENTS` is the complete list of what ckptd logs: nothing else is logged, and nothing in it is dead."""
    used = _used()
    assert len(used) > 10, "the search for events finds nothing any more"
    unlisted = {event: where for event, where in used.items() if event not in EVENTS}
    assert not unlisted, f"logged, but not in log.EVENTS: {unlisted}"
    dead = sorted(EVENTS - set(used))
    assert not dead, f"in log.EVENTS, but logged nowhere: {dead}"


def test_event_names_read_alike() -> None:
    """Event names are a few lower-case words without punctuation: they are searched for."""
    for event in EVENTS:
        assert event == event.lower().strip()
        assert all(word.isalpha() for word in event.split(" ")), event


def test_no_logger_on_the_training_side() -> None:
    """The client has no logger: importing one would cost every rank."""
    for path in sorted((ROOT / "ckptd/client").rglob("*.py")):
        assert list(_events(path)) == []
    assert sys.modules["ckptd.log"].__file__ == str(ROOT / "ckptd/log.py")
