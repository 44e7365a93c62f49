"""What ranks print: whole lines behind their rank, whatever the bytes, and a bounded tail for incidents."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.daemon.output import OutputFollower, last_lines, output_paths
from tests.daemon.harness import open_descriptors


class Screen:
    """A follower, what it shows on stdout and stderr, and the files that two ranks write."""

    def __init__(self, folder: Path, *, colors: bool = False) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        self.follower = OutputFollower(self.out, self.err, colors=colors)
        self._folder = folder
        for rank in range(2):
            for path in output_paths(folder, rank):
                self.follower.follow(path, rank)

    def write(self, data: bytes, rank: int = 0, *, err: bool = False) -> None:
        """Write what a rank prints."""
        with output_paths(self._folder, rank)[err].open("ab") as file:
            file.write(data)

    def shown(self, *, final: bool = False) -> str:
        """Pump, and return what was shown on stdout since the last time."""
        self.follower.pump(final=final)
        text = self.out.getvalue()
        self.out.seek(0)
        self.out.truncate()
        return text


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Screen]:
    """A follower without colours; it lets go of its files."""
    before = open_descriptors()
    screen = Screen(tmp_path)
    yield screen
    screen.follower.close()
    assert open_descriptors() == before


def test_each_line_stands_behind_its_rank(screen: Screen) -> None:
    """Lines of each rank go to the stream that it wrote them to, with its number before each."""
    screen.write(b"a\nb\n")
    screen.write(b"c\n", rank=1)
    screen.write(b"wrong\n", rank=1, err=True)
    assert screen.shown() == "[0] a\n[0] b\n[1] c\n"
    assert screen.err.getvalue() == "[1] wrong\n"
    assert screen.shown() == ""


def test_a_line_that_comes_in_pieces_is_one_line(screen: Screen) -> None:
    """What a rank has not ended with a newline waits for its rest, over any number of pumps; empty lines are lines."""
    screen.write(b"begin")
    assert screen.shown() == ""
    screen.write(b"ning ")
    assert screen.shown() == ""
    screen.write(b"end\n\nnext")
    assert screen.shown() == "[0] beginning end\n[0] \n"
    screen.write(b"\n")
    assert screen.shown() == "[0] next\n"


def test_a_last_line_without_newline_is_shown_at_the_end(screen: Screen) -> None:
    """The last words of a rank are shown once, even without a newline behind them."""
    screen.write(b"done\nbye")
    assert screen.shown() == "[0] done\n"
    assert screen.shown(final=True) == "[0] bye\n"
    assert screen.shown(final=True) == ""


def test_closing_shows_the_rest(tmp_path: Path) -> None:
    """`close` passes on what was written since the last pump."""
    screen = Screen(tmp_path)
    screen.write(b"one\ntwo")
    screen.follower.close()
    assert screen.out.getvalue() == "[0] one\n[0] two\n"


def test_characters_that_are_cut_or_wrong(screen: Screen) -> None:
    """A character whose bytes come in two pieces is whole; bytes that are no UTF-8 are marked and harm nothing."""
    data = "größe\n".encode()
    screen.write(data[:3])
    assert screen.shown() == ""
    screen.write(data[3:])
    screen.write(b"bad \xff\xfe byte\n\x00\n")
    assert screen.shown() == "[0] größe\n[0] bad \ufffd\ufffd byte\n[0] \x00\n"


def test_a_terminal_that_knows_few_characters(tmp_path: Path) -> None:
    """On an ASCII terminal a line with other characters is shown with marks for them, not lost."""
    raw = io.BytesIO()
    target = io.TextIOWrapper(raw, encoding="ascii", newline="\n")
    follower = OutputFollower(target, target, colors=False)
    path, _ = output_paths(tmp_path, 0)
    follower.follow(path, 0)
    path.write_bytes("größe → 3\nplain\n".encode())
    follower.close()
    assert raw.getvalue() == b"[0] gr??e ? 3\n[0] plain\n"


class Gone(io.StringIO):
    """A pipe whose reader has gone, as in `ckptctl run … | head -1`."""

    def write(self, _: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_that_has_gone_harms_nothing(tmp_path: Path) -> None:
    """When nobody reads our output any more, following goes on in silence."""
    follower = OutputFollower(Gone(), Gone(), colors=False)
    path, _ = output_paths(tmp_path, 0)
    follower.follow(path, 0)
    path.write_bytes(b"a\nb")
    follower.pump()
    follower.close()


def test_what_was_there_before_is_not_shown_again(tmp_path: Path) -> None:
    """Following begins at the present end of a file; one that isn't there is made."""
    path, _ = output_paths(tmp_path, 0)
    path.write_bytes(b"old\n")
    screen = Screen(tmp_path)
    screen.write(b"new\n")
    assert screen.shown() == "[0] new\n"
    screen.follower.close()


def test_colors_tell_ranks_apart(tmp_path: Path) -> None:
    """On a terminal each rank's prefix has a colour, and only the prefix."""
    screen = Screen(tmp_path, colors=True)
    screen.write(b"a\n")
    screen.write(b"b\n", rank=1)
    first, second = screen.shown().splitlines()
    assert first.endswith("[0]\x1b[0m a")
    assert second.endswith("[1]\x1b[0m b")
    assert first[:5] != second[:5]
    screen.follower.close()


def test_a_rank_that_prints_without_end_does_not_hold_the_agent(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pump passes on a bounded part of what a rank prints faster than anybody reads, and later the rest, whole."""
    lines = 0

    def endless(descriptor: int, size: int, read: Callable[[int, int], bytes] = os.read) -> bytes:
        nonlocal lines
        if lines < 3000:  # else this test would never end if the promise were broken
            screen.write(b"0123456789" * 1000 + b"\n")
            lines += 1
        return read(descriptor, size)

    monkeypatch.setattr("ckptd.daemon.output.os.read", endless)
    shown = len(screen.shown())
    monkeypatch.undo()
    assert lines < 1000
    shown += len(screen.shown(final=True))
    assert shown == lines * len("[0] " + "0123456789" * 1000 + "\n")


def test_a_line_without_end_is_not_kept(screen: Screen) -> None:
    """A progress bar that never ends its line is passed on in long pieces; the agent does not keep it all."""
    bar = b"\r50%" * 1000
    for _ in range(100):
        screen.write(bar)
        screen.follower.pump()
        assert sum(len(rest) for _, _, rest in screen.follower._files.values()) <= 128 * 1024
    text = screen.shown(final=True)
    assert text.replace("[0] ", "").replace("\n", "").encode() == bar * 100


# --- the tail for incidents ---------------------------------------------------------------------------------------


def test_last_lines(tmp_path: Path) -> None:
    """The last lines are those asked for, in order; fewer when there are fewer."""
    path = tmp_path / "err"
    path.write_text("".join(f"line {number}\n" for number in range(50)))
    assert last_lines(path, 3) == ("line 47", "line 48", "line 49")
    assert last_lines(path)[0] == "line 30"
    path.write_text("one\ntwo")
    assert last_lines(path) == ("one", "two")
    path.write_text("")
    assert last_lines(path) == ()


def test_last_lines_of_a_file_that_can_not_be_read(tmp_path: Path) -> None:
    """A rank that never printed has no file, and that is no error."""
    assert last_lines(tmp_path / "missing") == ()
    assert last_lines(tmp_path) == ()


def test_last_lines_are_bounded(tmp_path: Path) -> None:
    """However long a line and however wrong its bytes, an incident keeps at most 16 KiB of it."""
    path = tmp_path / "err"
    path.write_bytes(b"x" * 10_000_000 + b"\nlast \xff\n")
    lines = last_lines(path)
    assert lines[-1] == "last \ufffd"
    assert sum(len(line) for line in lines) <= 16 * 1024
    path.write_bytes("ä".encode() * 100_000)
    assert set(last_lines(path)[0].strip("\ufffd")) == {"ä"}
