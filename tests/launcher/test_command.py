"""What a command means: pure decisions, tested with literals."""

from __future__ import annotations

import pytest

from ckptd.errors import ConfigError
from ckptd.launcher.command import Belonging, LauncherOptions, RankCommand, launcher_argv, plan_command

FILES = {
    "/job/train.py",
    "/job/tool",
    "/job/app/__main__.py",
    "/job/odd.py/__main__.py",
    "/job/app.pyz",
    "/job/bin/run",
    "/job/notes.txt",
}
PROGRAMS = {"sleep", "/job/bin/run"}


def plan(*command: str, preload: bool = True) -> RankCommand:
    return plan_command(
        command,
        preload=preload,
        python="PY",
        cwd="/job",
        is_file=lambda path: path in FILES,
        find_program=lambda name, path=None: name if name in PROGRAMS else None,
    )


@pytest.mark.parametrize(
    ("command", "preload", "expected"),
    [
        (("train.py", "--steps", "3"), True, RankCommand("script", "train.py", ("--steps", "3"))),
        (("train.py", "-m", "x"), True, RankCommand("script", "train.py", ("-m", "x"))),
        (("/job/train.py",), True, RankCommand("script", "/job/train.py", ())),
        (("train.py", "a"), False, RankCommand("exec", "PY", ("train.py", "a"))),
        (("-m", "pkg.train", "a"), True, RankCommand("module", "pkg.train", ("a",))),
        (("-m", "pkg.train", "a"), False, RankCommand("exec", "PY", ("-m", "pkg.train", "a"))),
        (("app", "a"), True, RankCommand("exec", "PY", ("app", "a"))),
        (("odd.py",), True, RankCommand("exec", "PY", ("odd.py",))),
        (("app.pyz",), True, RankCommand("exec", "PY", ("app.pyz",))),
        (("sleep", "5"), True, RankCommand("exec", "sleep", ("5",))),
        (("sleep", "5"), False, RankCommand("exec", "sleep", ("5",))),
        (("bin/run",), True, RankCommand("exec", "bin/run", ())),
    ],
)
def test_plan_chooses_how_ranks_start(command, preload, expected):
    """Only a .py file and -m are forked; everything else, and everything without preload, is a plain exec."""
    assert plan(*command, preload=preload) == expected


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ((), "there is no command to run"),
        (("",), "the command begins with ''"),
        (("-m",), "-m needs the name of a module"),
        (("-m", "--steps"), "-m needs the name of a module"),
        (("-u", "train.py"), "the command begins with '-u'"),
        (("missing.py",), "there is no script missing.py"),
        (("missing",), "there is no command missing"),
        (("./notes.txt",), "there is no command ./notes.txt"),
        (("/job/notes.txt",), "/job/notes.txt can't be executed"),
    ],
)
def test_plan_refuses_in_one_line_with_a_hint(command, message):
    """A command that can't work is refused before anything starts, with what to do about it."""
    with pytest.raises(ConfigError) as caught:
        plan(*command)
    assert caught.value.message == message
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_plan_looks_at_the_real_folder_and_path(tmp_path):
    """Without injected look-ups the job's folder and PATH decide, not the caller's."""
    (tmp_path / "train.py").write_text("")
    program = tmp_path / "prog"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert plan_command(["train.py"], preload=True, python="PY", cwd=str(tmp_path)).mode == "script"
    assert plan_command(["prog"], preload=True, python="PY", path=str(tmp_path)).mode == "exec"
    assert plan_command(["./prog"], preload=True, python="PY", cwd=str(tmp_path)).mode == "exec"
    with pytest.raises(ConfigError):
        plan_command(["prog"], preload=True, python="PY", path="/nowhere")


def test_options_survive_the_command_line():
    """What the agent composes, and what a launcher that begins anew composes, is read back unchanged."""
    options = LauncherOptions(
        control_fd=7,
        command=("train.py", "--", "--control-fd", "9"),
        preload=("torch", "torch.distributed"),
        belongs=Belonging("gpt", "0123", "/run/ckptd.sock", 600.5),
        skipped={"a.b": "starts threads: x=1, --y"},
        began_s=12.25,
    )
    assert LauncherOptions.from_argv(options.to_argv()) == options


def test_launcher_argv_is_the_documented_command():
    """The agent starts the launcher as `PYTHON -m ckptd.launcher OPTIONS -- COMMAND`."""
    belongs = Belonging("gpt", "0123", "/run/ckptd.sock", 600.5)
    argv = launcher_argv(python="PY", control_fd=5, command=["-m", "train"], preload=["torch"], belongs=belongs)
    assert argv == [
        "PY",
        "-m",
        "ckptd.launcher",
        "--control-fd=5",
        "--preload=torch",
        "--job=gpt",
        "--incarnation=0123",
        "--socket=/run/ckptd.sock",
        "--agent-wait=600.5",
        "--",
        "-m",
        "train",
    ]
