"""One incident in words, for somebody who was woken by it: what, why, what it cost and where to look. Pure, and short.

Whatever an incident holds, these are fewer than 20 lines of at most `width` columns, but for a path, which stays whole.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckptd.cli.common import when
from ckptd.units import show_duration

WIDTH = 110
"""How wide lines are where nobody says how much room there is."""
_LABEL = 10
_MOST_LINES = 19
_NOTHING_S = 5e-5
"""What is shorter shows as 0.0 ms, and is not worth saying."""
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+)(?:, in (?P<name>.+))?$')
_LIBRARY = re.compile(
    r"/(?:site|dist)-packages/|/lib(?:64)?/python\d|^<|/ckptd_integrations/|/ckptd/(?:client|launcher)/"
)
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_ONE_RANK = re.compile(r"^(?P<before>.*?)\brank (?P<rank>\d+)(?P<after>.*)$")
_PHASES = {
    "detect": "seen after", "kill": "ranks ended", "decide": "decided", "start": "ranks started",
    "restore": "restored", "first_step": "first step",
}  # fmt: skip
"""What the phases of `seconds` are called here, in their order."""
_SHORT = ("raised", "stderr")
"""What has one line for each of its own, however much room there is."""
_Field = tuple[str, Sequence[str], int]
"""A label, its texts, and the lines that it has at least."""


def tell(item: Mapping[str, Any], width: int = WIDTH, *, left: str = "") -> list[str]:
    """Return the lines that tell an incident, in the shape of `ckptctl incidents --json`.

    `left` says what a job that it has ended can go on with.
    """
    state = "closed: the job has a checkpoint since" if item["closed"] and item["restored"] else "closed"
    moment = f"{when(item['failed_at'], zone=True)}, at step {item['failed_step']} of generation {item['generation']}"
    raised = item["exception"]
    words = _raised(raised) if raised is not None else ("stderr", _said(item["last_lines"]), 3)
    fields = [
        ("incident", [f"{item['number']} of job {item['job']} ({state if item['closed'] else 'open'})"], 1),
        ("when", [moment], 1),
        ("cause", [item["cause"]], 2),
        ("then", ["; ".join(_together(item["consequences"]))], 2),
        words,
        ("decision", [item["decision"].removesuffix(f": {item['cause']}") or "none yet"], 2),
        ("because", ["; ".join(item["reasons"])], 3),
        ("cost", [_cost(item, left)], 1),
        ("took", [_took(item)], 2),
    ]
    path = item.get("evidence_path")
    told = _fit(fields, width, _MOST_LINES - 1)
    return [*told, f"{'evidence':<{_LABEL}}{_clean(path)}" if path else f"{'evidence':<{_LABEL}}none was gathered"]


def restored(item: Mapping[str, Any]) -> str:
    """Say what the generation after an incident began with."""
    source = item["restored"]
    if source is not None:
        return f"step {source['step']} from {source['tier']}"
    return "-" if item["lost_steps"] is None else "fresh start"


def shorten(text: str, width: int) -> str:
    """Return text in one line of at most `width` columns, without what would move a terminal's cursor."""
    clean = _clean(text)
    return clean if len(clean) <= width else f"{clean[: width - 1]}…"


def innermost(traceback: str, count: int = 3) -> list[str]:
    """Return the innermost frames of the user's own code, outermost first, each as one line: place, function, source.

    Of several exceptions in one traceback the last one counts; without a frame of the user's, all frames do.
    """
    frames: list[tuple[str, str]] = []
    for line in traceback.splitlines():
        if line.startswith("Traceback (most recent call last)"):
            frames = []
        elif (found := _FRAME.match(line)) is not None:
            name = "" if found["name"] is None else f" in {found['name']}"
            frames.append((found["file"], f"{found['file']}:{found['line']}{name}"))
        elif frames and line.startswith("    ") and line.strip(" ^~") and ": " not in frames[-1][1]:
            frames[-1] = (frames[-1][0], f"{frames[-1][1]}: {line.strip()}")
    theirs = [text for file, text in frames if not _LIBRARY.search(file)]
    return (theirs or [text for _, text in frames])[-count:]


def _raised(exception: Mapping[str, Any]) -> _Field:
    first = next(iter(exception["message"].strip().splitlines()), "")
    head = f"{exception['type']}: {first}" if first else exception["type"]
    return "raised", [head, *innermost(exception["traceback"])], 4


def _said(last_lines: Sequence[str]) -> list[str]:
    """Return the end of what the rank wrote to stderr."""
    return [line for line in last_lines if _clean(line).strip()][-3:]


def _cost(item: Mapping[str, Any], left: str) -> str:
    if item["lost_steps"] is None:
        return "not known yet" if not item["closed"] else "; ".join(filter(None, ("nothing was started again", left)))
    steps = item["lost_steps"]
    words = "no step" if steps == 0 else f"{steps} step{'s' if steps != 1 else ''} to do again"
    return f"{words}; it {'began afresh' if item['restored'] is None else f'went on from {restored(item)}'}"


def _took(item: Mapping[str, Any]) -> str:
    spans = {name: seconds for name, seconds in item["seconds"].items() if seconds >= _NOTHING_S}
    parts = ", ".join(f"{words} {show_duration(spans[name])}" for name, words in _PHASES.items() if name in spans)
    if "total" in spans:
        begin = "the request" if item["kind"] == "requested" else "the failure"
        return f"{show_duration(spans['total'])} from {begin} to the first step: {parts}"
    return parts


def _together(texts: Iterable[str]) -> list[str]:
    """Say what several ranks have in common once: "ckptd ended ranks 0, 2-7"."""
    groups: dict[tuple[str, str], list[int]] = {}
    for text in texts:
        found = _ONE_RANK.match(text)
        key = (text, "") if found is None else (found["before"], found["after"])
        groups.setdefault(key, [])
        if found is not None:
            groups[key].append(int(found["rank"]))
    return [before if not ranks else _of_ranks(before, ranks, after) for (before, after), ranks in groups.items()]


def _of_ranks(before: str, ranks: Sequence[int], after: str) -> str:
    several = len(set(ranks)) > 1
    return f"{before}{_ranks(ranks)}{after.replace(' its ', ' their ', 1) if several else after}"


def _ranks(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank {words}" if words.isdecimal() else f"ranks {words}"


def _fit(fields: Sequence[_Field], width: int, most: int) -> list[str]:
    """Return the fields' lines. What was cut gets the room that others leave, the first ones first."""
    told = [_field(field, width) for field in fields]
    for place, (label, texts, lines) in enumerate(fields):
        spare = most - sum(map(len, told))
        if spare > 0 and label not in _SHORT:
            told[place] = _field((label, texts, lines + spare), width)
    return [line for part in told for line in part]


def _field(field: _Field, width: int) -> list[str]:
    """Return a label and its texts, wrapped, in at most that many lines; none when there is nothing to say."""
    label, texts, most = field
    wrapped = [
        part
        for text in texts
        for part in textwrap.wrap(
            _clean(text), width - _LABEL, max_lines=max(1, most - len(texts) + 1), placeholder=" …"
        )
    ]
    return [f"{label if not place else '':<{_LABEL}}{part}" for place, part in enumerate(wrapped[:most])]


def _clean(text: str) -> str:
    return _CONTROL.sub(lambda found: " " if found[0] in "\t\n\r\x0b\x0c\x85\u2028\u2029" else "", text)
