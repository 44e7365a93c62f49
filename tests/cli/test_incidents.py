"""`ckptctl incidents JOB N`: short, true and harmless to a terminal, whatever an incident holds."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.cli.incident_text import innermost, restored, shorten, tell
from ckptd.types import Incident, RaisedException

TRACEBACK = """Traceback (most recent call last):
  File "/home/me/train.py", line 88, in <module>
    main()
  File "/home/me/train.py", line 41, in main
    loss = model(x)
           ^^^^^^^^
  File "/opt/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1751, in _call_impl
    return forward_call(*args, **kwargs)
  File "/home/me/model.py", line 17, in forward
    raise ValueError(
  File "/opt/venv/lib/python3.11/site-packages/torch/x.py", line 3, in inner
    return 1 / 0
ValueError: loss is nan
at layer 3
"""


def incident(**facts: Any) -> dict[str, Any]:
    """Return the JSON of an incident that went well, but for what is given."""
    known: dict[str, Any] = {
        "number": 3,
        "job": "gpt",
        "generation": 2,
        "cause": "rank 1 was killed by SIGKILL",
        "kind": "signal",
        "rank": 1,
        "signal": 9,
        "returncode": -9,
        "failed_at": 1.8e9,
        "failed_step": 4210,
        "lost_steps": 3,
        "restored": {"step": 4207, "tier": "memory", "generation": 2},
        "seconds": {
            "detect": 0.002, "kill": 0.03, "decide": 0.001, "start": 0.12, "restore": 0.1, "first_step": 0.15,
            "total": 0.403,
        },
        "decision": "restart the whole job",
        "reasons": ("restart 1 of at most 100 within 1 d",),
        "consequences": ("rank 0 lost its connection to rank 1",),
        "evidence_path": "/var/lib/ckptd/jobs/gpt/incidents/3",
        "closed": True,
    }  # fmt: skip
    return Incident(**{**known, **facts}).to_json()


def test_a_death_reads_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves word for word what somebody reads who was woken by a killed rank."""
    monkeypatch.setattr("ckptd.cli.incident_text.when", lambda _, **__: "2027-01-15 08:00:00 CET")
    assert tell(incident()) == [
        "incident  3 of job gpt (closed: the job has a checkpoint since)",
        "when      2027-01-15 08:00:00 CET, at step 4210 of generation 2",
        "cause     rank 1 was killed by SIGKILL",
        "then      rank 0 lost its connection to rank 1",
        "decision  restart the whole job",
        "because   restart 1 of at most 100 within 1 d",
        "cost      3 steps to do again; it went on from step 4207 from memory",
        "took      403 ms from the failure to the first step: seen after 2.0 ms, ranks ended 30 ms, decided 1.0 ms,",
        "          ranks started 120 ms, restored 100 ms, first step 150 ms",
        "evidence  /var/lib/ckptd/jobs/gpt/incidents/3",
    ]


def test_what_a_job_that_was_given_up_has_left() -> None:
    """The incident that has ended a job says what there is to go on with, one that has not does not."""
    given_up = incident(lost_steps=None, restored=None)
    told = tell(given_up, left="the newest checkpoint is step 4207 on local")
    assert "cost      nothing was started again; the newest checkpoint is step 4207 on local" in told
    assert "cost      nothing was started again" in tell(given_up)


def test_an_exception_is_shortened_to_the_users_frames() -> None:
    """The user's innermost frames are shown with their source, and no frame of a library."""
    exception = RaisedException("ValueError", "loss is nan\nat layer 3", TRACEBACK)
    lines = tell(incident(cause="rank 1 raised ValueError: loss is nan", exception=exception, last_lines=("noise",)))
    place = lines.index("raised    ValueError: loss is nan")
    assert lines[place + 1 : place + 4] == [
        "          /home/me/train.py:88 in <module>: main()",
        "          /home/me/train.py:41 in main: loss = model(x)",
        "          /home/me/model.py:17 in forward: raise ValueError(",
    ]
    assert not any("noise" in line or "site-packages" in line for line in lines)


def test_frames_of_a_real_traceback() -> None:
    """A traceback that this very interpreter writes is read: the last exception of a chain counts."""

    def fails() -> None:
        try:
            {}["first"]
        except KeyError:
            raise ValueError("second") from None

    try:
        fails()
    except ValueError as error:
        text = "".join(traceback.format_exception(error))
    assert [frame.partition(" in ")[2] for frame in innermost(text)] == [
        "test_frames_of_a_real_traceback: fails()", 'fails: raise ValueError("second") from None',
    ]  # fmt: skip


def test_frames_of_a_chain_are_those_of_the_last_exception() -> None:
    """What was raised while another exception was handled is what ended the rank."""
    other = TRACEBACK.replace("/home/me/model.py", "/home/me/first.py")
    text = f"{other}\nDuring handling of the above exception, another exception occurred:\n\n{TRACEBACK}"
    assert not any("first.py" in frame for frame in innermost(text))


def test_a_traceback_without_a_frame_of_the_users() -> None:
    """When only libraries are in it their innermost frames are shown: better than none."""
    text = TRACEBACK.replace("/home/me/", "/usr/lib/python3.11/")
    assert innermost(text, 1) == ["/opt/venv/lib/python3.11/site-packages/torch/x.py:3 in inner: return 1 / 0"]
    assert innermost("no traceback at all") == []


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"lost_steps": 0}, "cost      no step; it went on from step 4207 from memory"),
        ({"lost_steps": 1}, "cost      1 step to do again; it went on from step 4207 from memory"),
        ({"lost_steps": 50, "restored": None}, "cost      50 steps to do again; it began afresh"),
        ({"lost_steps": None, "restored": None}, "cost      nothing was started again"),
        ({"lost_steps": None, "restored": None, "closed": False}, "cost      not known yet"),
        ({"decision": "", "closed": False}, "decision  none yet"),
        ({"evidence_path": None}, "evidence  none was gathered"),
        ({"closed": False}, "incident  3 of job gpt (open)"),
        ({"closed": True, "restored": None, "lost_steps": None}, "incident  3 of job gpt (closed)"),
        ({"last_lines": ("one", "", "two", "three", "four")}, "stderr    two"),
        (
            {"consequences": tuple(f"ckptd ended rank {rank}" for rank in (0, 2, 3, 4, 7))},
            "then      ckptd ended ranks 0, 2-4, 7",
        ),
        (
            {"consequences": tuple(f"rank {rank} lost its connection to rank 9" for rank in range(8))},
            "then      ranks 0-7 lost their connection to rank 9",
        ),
        ({"consequences": ("rank 0 raised OSError",)}, "then      rank 0 raised OSError"),
        ({"seconds": {"detect": 0.1}}, "took      seen after 100 ms"),
        ({"seconds": {"detect": 0.0, "kill": 0.02}}, "took      ranks ended 20 ms"),
        ({"decision": "give up: it is the third: rank 1 was killed by SIGKILL"}, "decision  give up: it is the third"),
        ({"decision": "give up: rank 1 was killed by SIGKILL"}, "decision  give up"),
    ],
)
def test_lines_that_tell_what_happened(facts: dict[str, Any], line: str) -> None:
    """Proves the words for what an incident may lack or have much of."""
    assert line in tell(incident(**facts))


TEXT = st.text(max_size=400) | st.sampled_from(["x" * 5000, "a\nb\nc" * 50, "\x1b[31mred\x1b[0m", "rank 3 " * 100])
TEXTS = st.lists(TEXT, max_size=30).map(tuple)


@given(
    cause=TEXT,
    consequences=TEXTS,
    reasons=TEXTS,
    decision=TEXT,
    last_lines=TEXTS,
    exception=st.none() | st.builds(RaisedException, TEXT, TEXT, TEXT | st.just(TRACEBACK * 40)),
    seconds=st.dictionaries(st.sampled_from(["detect", "kill", "decide", "start", "total", "odd"]), st.floats(0, 1e9)),
    lost_steps=st.none() | st.integers(0, 10**12),
    closed=st.booleans(),
    width=st.integers(60, 110),
)
def test_every_incident_is_told_in_less_than_twenty_lines(width: int, **facts: Any) -> None:
    """Whatever an incident holds, it is told in few lines of bounded width that can't harm a terminal."""
    lines = tell(incident(evidence_path="/x", **facts), width)
    assert len(lines) < 20
    for line in lines:
        assert len(line) <= width
        assert line.isprintable() or all(char.isprintable() or ord(char) > 127 for char in line)
        assert len(line.splitlines()) == 1
        line.encode()


def test_what_is_long_gets_the_room_that_others_leave() -> None:
    """On a narrow terminal a long cause is told whole, as long as there are lines for it."""
    cause = "rank 1 is busy (100% of the time, and holds the GIL), in end (train.py:26: while True: pass); " * 3
    lines = tell(incident(cause=cause), 80)
    assert len(lines) < 20
    assert " ".join(" ".join(lines[2:]).split()).startswith(f"cause {cause.strip()} then rank 0")
    assert max(map(len, lines)) <= 80


def test_a_restart_on_purpose_is_no_failure() -> None:
    """The time of a restart that somebody wanted counts from the request."""
    lines = tell(incident(kind="requested", cause="a restart from step 7 or before it was asked for"))
    assert "403 ms from the request to the first step: seen after" in "\n".join(lines)


def test_a_path_is_not_cut() -> None:
    """The folder of the evidence is shown whole, since somebody will copy it."""
    path = "/var/lib/" + "ckptd/" * 60
    assert tell(incident(evidence_path=path))[-1] == f"evidence  {path}"


def test_the_list_shows_one_line_each() -> None:
    """A cause with line breaks and colours stays in its column."""
    assert shorten("a\nb\x1b[31mc" + "d" * 100, 20) == "a bc" + "d" * 15 + "…"
    assert restored(incident()) == "step 4207 from memory"
