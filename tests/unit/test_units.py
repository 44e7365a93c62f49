"""Durations and sizes: what people write is read, and what means nothing is refused by name."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import ConfigError
from ckptd.units import parse_duration, parse_size, show_duration, show_size

_DURATIONS = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_SIZES = {
    "": 1,
    "B": 1,
    "k": 2**10,
    "KiB": 2**10,
    "kB": 1000,
    "M": 2**20,
    "MiB": 2**20,
    "MB": 10**6,
    "G": 2**30,
    "GiB": 2**30,
    "GB": 10**9,
    "T": 2**40,
    "TiB": 2**40,
    "TB": 10**12,
}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5s", 5),
        ("250ms", 0.25),
        ("1m30s", 90),
        ("2h", 7200),
        ("1d", 86400),
        ("1.5h", 5400),
        ("3min", 180),
        (" 5 s ", 5),
        ("5S", 5),
        ("1h 2m 3s", 3723),
        ("0.5s", 0.5),
        ("0h1s", 1),
    ],
)
def test_durations_as_people_write_them(text: str, seconds: float) -> None:
    """The documented forms, with blanks and capitals, are read."""
    assert parse_duration(text, "every") == pytest.approx(seconds)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(sorted(_DURATIONS))), min_size=1, max_size=4))
def test_any_sum_of_parts(parts: list[tuple[int, str]]) -> None:
    """A duration is the sum of its parts, in any order and number."""
    text, seconds = "".join(f"{number}{unit}" for number, unit in parts), sum(n * _DURATIONS[u] for n, u in parts)
    if seconds == 0:
        with pytest.raises(ConfigError, match="longer than nothing"):
            parse_duration(text, "every")
    else:
        assert parse_duration(text, "every") == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "5x",
        "",
        " ",
        "5",
        "s",
        "-5s",
        "+5s",
        "5s!",
        "5,5s",
        "5 5s",
        "1m30",
        "five s",
        "5s5",
        "0x5s",
        "1e3s",
        "5ss",
        "nan",
        "inf",
        "infs",
        "∞s",
        "5 seconds",
        "--every",
        "9" * 400 + "s",
        ".s",
    ],
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    """What is no duration is a `ConfigError` that names the setting and the text, with a hint."""
    with pytest.raises(ConfigError) as caught:
        parse_duration(text, "--every")
    assert caught.value.message.startswith(f"--every {text!r} is no duration")
    assert '"5s"' in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["0s", "0ms", "0h0m0s", "0.0s"])
def test_nothing_is_no_duration(text: str) -> None:
    """A duration of nothing is refused: it would mean a checkpoint at every step."""
    with pytest.raises(ConfigError, match=r"--every .* must be longer than nothing"):
        parse_duration(text, "--every")


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=12) | st.text("0123456789.smhd -+e", max_size=12))
def test_any_text_is_a_duration_or_refused(text: str) -> None:
    """Whatever is written, it is a finite positive duration or a `ConfigError`."""
    try:
        seconds = parse_duration(text, "every")
    except ConfigError:
        return
    assert math.isfinite(seconds)
    assert seconds > 0


@pytest.mark.parametrize("unit", sorted(_SIZES))
def test_sizes_as_people_write_them(unit: str) -> None:
    """Every unit, in any case, with or without a blank, is read; i stands for powers of two."""
    for text in (f"12{unit}", f" 12 {unit} ", f"12{unit.lower()}", f"12{unit.upper()}"):
        assert parse_size(text, "memory") == 12 * _SIZES[unit]
    assert parse_size(f"1.5{unit or 'k'}", "memory") == int(1.5 * (_SIZES[unit] if unit else 1024))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**70))
def test_plain_bytes_are_exact(size: int) -> None:
    """A whole number of bytes is taken as it is, however large."""
    assert parse_size(str(size), "memory") == size


@pytest.mark.parametrize(
    "text", ["", "x", "5x", "-5", "-5MiB", "5 5", "MiB", "1e9", "5 MiB MiB", "0x10", "nan", "1..5"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    """What is no size is a `ConfigError` that names the setting and the text, with a hint."""
    with pytest.raises(ConfigError) as caught:
        parse_size(text, "CKPTD_MEMORY_MAX")
    assert caught.value.message == f"CKPTD_MEMORY_MAX {text!r} is no size"
    assert "512MiB" in (caught.value.hint or "")


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=12)
    | st.text("0123456789.kKmMgGiIbB -", max_size=12)
    | st.integers(300, 500).map(lambda n: "9" * n + ".0")
)
def test_any_text_is_a_size_or_refused(text: str) -> None:
    """Whatever is written, it is a whole number of bytes or a `ConfigError`."""
    try:
        assert parse_size(text, "memory") >= 0
    except ConfigError as error:
        assert "memory" in error.message


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (12.3 * 2**20, "12.3 MiB"),
        (5 * 2**30, "5.0 GiB"),
        (3 * 2**40, "3.0 TiB"),
        (5000 * 2**40, "5000.0 TiB"),
    ],
)
def test_sizes_are_shown(size: float, text: str) -> None:
    """Sizes are shown in the largest unit that keeps the number above 1."""
    assert show_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 ms"),
        (0.0023, "2.3 ms"),
        (0.023, "23 ms"),
        (1.42, "1.42 s"),
        (59.9, "59.90 s"),
        (185, "3m05s"),
        (3600, "1h00m00s"),
        (3599.7, "1h00m00s"),
        (90061, "25h01m01s"),
    ],
)
def test_durations_are_shown(seconds: float, text: str) -> None:
    """Durations are shown with the two or three digits that matter."""
    assert show_duration(seconds) == text


@settings(max_examples=100, deadline=None)
@given(st.floats(0.001, 10**7))
def test_what_is_shown_can_be_read(seconds: float) -> None:
    """What ckptd shows it also reads, and it means the same to within what was shown."""
    assert parse_duration(show_duration(seconds), "every") == pytest.approx(seconds, rel=0.05)
