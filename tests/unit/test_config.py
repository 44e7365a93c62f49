"""Settings: what can't run is refused before anything starts, with a message that names it and a hint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd import config as config_module
from ckptd.config import MAX_NPROC, AgentConfig, JobConfig, Origin, load_job_file, read_origin
from ckptd.errors import ConfigError
from ckptd.places import absolute_store
from ckptd.store_config import StoreConfig

GOOD: dict[str, Any] = {"name": "gpt", "command": ("train.py", "--steps", "10"), "stores": (StoreConfig("/runs"),)}

WRITTEN: dict[str, Any] = {"name": "gpt", "command": ["train.py", "--steps", "10"], "store": "/runs"}
"""The same as JSON and TOML say it."""


def job(**changes: Any) -> JobConfig:
    """A job's settings with some of them changed."""
    return JobConfig(**{**GOOD, **changes})


# --- jobs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": ""}, "'' can't name a job"),
        ({"name": "a/b"}, "'a/b' can't name a job"),
        ({"name": "../up"}, "'../up' can't name a job"),
        ({"name": ".hidden"}, "'.hidden' can't name a job"),
        ({"name": "x" * 129}, "can't name a job"),
        ({"name": "a\n"}, "can't name a job"),
        ({"nproc": 0}, "nproc is 0"),
        ({"nproc": -1}, "nproc is -1"),
        ({"nproc": MAX_NPROC + 1}, f"nproc is {MAX_NPROC + 1}"),
        ({"every_s": 0.0}, "every is 0 s"),
        ({"every_s": -1.0}, "every is -1 s"),
        ({"every_s": float("nan")}, "every is nan s"),
        ({"every_s": float("inf")}, "every is inf s"),
        ({"max_restarts": -1}, "max_restarts is -1"),
        ({"restart_window_s": 0.0}, "restart_window is 0 s"),
        ({"slots": 0}, "slots is 0"),
        ({"slots": 9}, "slots is 9"),
        ({"flush_max_bytes_per_s": -1}, "flush_max is -1 bytes per second"),
        ({"overlap": "maybe"}, "overlap is 'maybe'"),
        ({"overlap": ""}, "overlap is ''"),
        ({"stores": ()}, "no store is named"),
        ({"resume_step": 3}, "resume_step is 3, and no job to resume from is named"),
        ({"resume_step": 0, "resume_from": Origin("/runs", "gpt")}, "resume_step is 0"),
    ],
)
def test_a_job_that_can_not_run_is_refused(changes: dict[str, Any], says: str) -> None:
    """Each setting that can't be used is a `ConfigError` with the setting, its value and a hint."""
    with pytest.raises(ConfigError) as caught:
        job(**changes)
    assert says in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        {"nproc": 1},
        {"nproc": MAX_NPROC},
        {"max_restarts": 0},
        {"slots": 1},
        {"slots": 8},
        {"flush_max_bytes_per_s": 1},
        {"name": "a.b-c_D9"},
    ],
)
def test_the_limits_themselves_are_allowed(changes: dict[str, Any]) -> None:
    """The smallest and the largest value that make sense are taken."""
    assert job(**changes).supervised


def test_a_job_without_command_is_attached() -> None:
    """Without a command, somebody else starts the ranks."""
    assert not job(command=()).supervised


_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0="), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        JobConfig,
        name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,10}", fullmatch=True),
        command=st.lists(_TEXT, max_size=3).map(tuple),
        stores=st.lists(
            st.builds(StoreConfig, url=_TEXT.filter(lambda text: "," not in text)),
            min_size=1,
            max_size=3,
            unique_by=lambda item: item.url,
        ).map(tuple),
        nproc=st.integers(1, MAX_NPROC),
        every_s=st.floats(0.001, 1e6),
        max_restarts=st.integers(0, 100),
        restart_window_s=st.floats(0.001, 1e7),
        preload=st.lists(_TEXT, max_size=3).map(tuple),
        python=_TEXT,
        cwd=_TEXT,
        env=st.dictionaries(_TEXT, _TEXT, max_size=3),
        slots=st.integers(1, 8),
        reuse_unchanged=st.booleans(),
        flush_max_bytes_per_s=st.integers(0, 2**40),
        overlap=st.sampled_from(config_module.OVERLAPS),
        resume_from=st.none()
        | st.builds(
            Origin,
            place=st.from_regex(r"(s3://|/|)[a-z]{1,5}(/[a-z]{1,5}){0,2}", fullmatch=True),
            job=st.from_regex(r"[a-z][a-z0-9._-]{0,5}", fullmatch=True),
            options=st.dictionaries(_TEXT, _TEXT, max_size=2),
        ),
    )
)
def test_round_trip(config: JobConfig) -> None:
    """Settings that cross the socket and the journal as JSON are the same."""
    assert JobConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"nprok": 2}, "a job has no setting 'nprok'"),
        ({"nproc": "2"}, "nproc must be a whole number, not '2'"),
        ({"nproc": 2.0}, "nproc must be a whole number, not 2.0"),
        ({"nproc": True}, "nproc must be a whole number, not True"),
        ({"keep_last": 1.5}, "keep_last must be a whole number, not 1.5"),
        ({"max_restarts": "many"}, "max_restarts must be a whole number, not 'many'"),
        ({"slots": None}, "slots must be a whole number, not None"),
        ({"reuse_unchanged": 1}, "reuse_unchanged must be true or false, not 1"),
        ({"flush_max_bytes_per_s": "500MB/s"}, "flush_max_bytes_per_s must be a whole number, not '500MB/s'"),
        ({"overlap": True}, "overlap must be text, not True"),
        ({"every_s": "30s"}, "every_s must be a number of seconds, not '30s'"),
        ({"every_s": True}, "every_s must be a number of seconds, not True"),
        ({"command": "train.py"}, "command must be a list of strings"),
        ({"command": ["train.py", 7]}, "command must be a list of strings"),
        ({"preload": "torch"}, "preload must be a list of strings"),
        ({"name": 7}, "name must be text, not 7"),
        ({"store": 7}, "store must be a path, a URL, a table, or a list of them, not 7"),
        ({"python": None}, "python must be text, not None"),
        ({"cwd": []}, "cwd must be text, not []"),
        ({"env": {"OMP_NUM_THREADS": 1}}, "env must be a table of strings"),
        ({"env": ["A=1"]}, "env must be a table of strings"),
        ({"env": {"A=B": "1"}}, "env must be a table of strings, whose names have no ="),
        ({"env": {"A": "\0"}}, "env has text that no path or process can have"),
        ({"command": ["train.py", "\ud800"]}, "command has text that no path or process can have"),
        ({"halt": {"preempt_notice": "file:\0"}}, "halt has text that no path or process can have"),
        ({"store": {"url": "/a", "options": json.loads("[" * 500 + "]" * 500)}}, "store has text that no path"),
        ({"resume_from": 7}, "resume_from must be PLACE/JOB, or a table with that as its url, not 7"),
        ({"resume_from": ["/a/gpt"]}, "resume_from must be PLACE/JOB, or a table with that as its url, not"),
        ({"resume_from": {"region": "eu"}}, "names no job to resume from"),
        ({"resume_from": {"url": "/a/gpt", "keep_last": 9}}, "resume_from has no setting keep_last"),
        ({"resume_from": {"url": "/a/gpt", "max": "2TB"}}, "resume_from has no setting max_bytes"),
        ({"resume_step": "3"}, "resume_step must be a whole number, not '3'"),
    ],
)
def test_json_of_another_type_is_refused(changes: dict[str, Any], says: str) -> None:
    """A field of another type is a `ConfigError` that names it: nothing fails later, in the middle of a start."""
    with pytest.raises(ConfigError) as caught:
        JobConfig.from_json({**WRITTEN, **changes})
    assert says in caught.value.message


def test_every_setting_has_a_shape() -> None:
    """The table of what settings look like has an entry for each of them, and no other."""
    settings = {field.name for field in dataclasses.fields(JobConfig)} - {"stores"}
    assert set(config_module._SHAPES) == settings | {"store", "keep_last"}


@pytest.mark.parametrize("key", ["name", "command", "store"])
def test_a_missing_setting_is_named(key: str) -> None:
    """What has no default must be there, and the error says what is missing."""
    data = {name: value for name, value in WRITTEN.items() if name != key}
    with pytest.raises(ConfigError, match=key):
        JobConfig.from_json(data)


# --- job files --------------------------------------------------------------------------------------------------


def write(folder: Path, text: str, name: str = "job.toml") -> Path:
    """A job file."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_job_file(tmp_path: Path) -> None:
    """Everything that a job file may say is read, and its relative paths are seen from its own folder."""
    path = write(
        tmp_path,
        """
        name = "gpt"
        command = ["train.py", "--text", "ä"]
        store = "runs/../my runs"
        nproc = 2
        every = "1m30s"
        keep_last = 5
        max_restarts = 7
        restart_window = "2h"
        preload = ["torch", "numpy"]
        cwd = "sub"
        slots = 3
        reuse_unchanged = false
        flush_max = "500MB/s"
        overlap = "off"
        env = {OMP_NUM_THREADS = "1"}
        resume_from = "old runs/base"
        resume_step = 700
        """,
    )
    assert load_job_file(path) == JobConfig(
        name="gpt",
        command=("train.py", "--text", "ä"),
        stores=(StoreConfig(f"{tmp_path}/my runs", keep_last=5),),
        nproc=2,
        every_s=90.0,
        max_restarts=7,
        restart_window_s=7200.0,
        preload=("torch", "numpy"),
        cwd=f"{tmp_path}/sub",
        slots=3,
        reuse_unchanged=False,
        flush_max_bytes_per_s=500_000_000,
        overlap="off",
        env={"OMP_NUM_THREADS": "1"},
        resume_from=Origin(f"{tmp_path}/old runs", "base"),
        resume_step=700,
    )


def test_a_short_job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name defaults to the file's, the folder to its own, wherever the command is given."""
    write(tmp_path, 'command = ["train.py"]\nstore = "s3://bucket/runs"\npreload = false\n', "tiny-gpt.toml")
    monkeypatch.chdir(tmp_path)
    config = load_job_file(Path("tiny-gpt.toml"))
    assert (config.name, config.stores, config.preload) == ("tiny-gpt", (StoreConfig("s3://bucket/runs"),), ())
    assert Path(config.cwd) == tmp_path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("command = [", "is not TOML"),
        ('store = "runs"', "names no command"),
        ('command = []\nstore = "runs"', "names no command"),
        ('command = "train.py"\nstore = "runs"', "command must be a list of strings"),
        ('command = ["train.py"]', "store"),
        ('command = ["train.py"]\nstore = "runs"\nevery = "5x"', "every '5x' is no duration"),
        ('command = ["train.py"]\nstore = "runs"\nevery = 5', "every '5' is no duration"),
        ('command = ["train.py"]\nstore = "runs"\nnproc = 0', "nproc is 0"),
        ('command = ["train.py"]\nstore = "runs"\nnproc = "2"', "nproc must be a whole number"),
        ('command = ["train.py"]\nstore = "runs"\nflush_max = "fast"', "flush_max 'fast' is no size"),
        ('command = ["train.py"]\nstore = "runs"\nslots = 9', "slots is 9"),
        ('command = ["train.py"]\nstore = "runs"\nsteps = 5', "a job has no setting 'steps'"),
        ('command = ["train.py"]\nstore = "runs"\nname = "a b"', "'a b' can't name a job"),
        ('command = ["train.py"]\nstore = "runs"\npreload = true', "preload must be a list of strings"),
        ('command = ["train.py"]\nstore = "runs"\ncwd = 5', "cwd must be text"),
        ('command = ["train.py"]\nstore = 5', "store must be a path"),
        ('command = ["train.py"]\nstore = "runs"\nenv = {A = 1}', "env must be a table of strings"),
    ],
)
def test_a_job_file_that_can_not_be_used(tmp_path: Path, text: str, says: str) -> None:
    """Each mistake in a job file is one `ConfigError` that names it, never another exception."""
    with pytest.raises(ConfigError) as caught:
        load_job_file(write(tmp_path, text))
    assert says in caught.value.message


def test_a_job_file_that_can_not_be_read(tmp_path: Path) -> None:
    """A file that is missing, a folder or binary is refused with its path."""
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\0")
    for path, says in (
        (tmp_path / "none.toml", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / "binary.toml", "not TOML"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            load_job_file(path)
        assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("500MB/s", 500_000_000), ("500MB", 500_000_000), (" 1.5GiB/s ", 3 * 2**29), ("0", 0), ("64", 64)],
)
def test_a_rate(text: str, bytes_per_s: int) -> None:
    """A rate is a size, of a second if one says so or not."""
    assert config_module.parse_rate(text, "--flush-max") == bytes_per_s


@pytest.mark.parametrize(
    ("value", "origin"),
    [
        ("s3://bucket/runs/gpt", Origin("s3://bucket/runs", "gpt")),
        ("s3://bucket/gpt/", Origin("s3://bucket", "gpt")),
        ("./gpt", Origin(".", "gpt")),
        ("file:///data/runs/gpt", Origin("file:///data/runs", "gpt")),
        ("/nvme0/runs,/nvme1/runs/gpt", Origin("/nvme0/runs,/nvme1/runs", "gpt")),
        (
            {"url": "s3://bucket/runs/gpt", "region": "eu-west-1", "options": {"profile": "other"}},
            Origin("s3://bucket/runs", "gpt", {"region": "eu-west-1", "profile": "other"}),
        ),
    ],
)
def test_a_job_to_resume_from(value: object, origin: Origin) -> None:
    """A place and a job are read from one text; a table may add what the plugin that opens the place takes."""
    assert read_origin(value) == origin
    assert read_origin(origin.to_json()) == origin


@pytest.mark.parametrize("text", ["", "gpt", "/gpt", "s3://bucket", "s3://bucket/", "file:///gpt", "runs/a b", "a/.."])
def test_no_job_to_resume_from(text: str) -> None:
    """What names no job, or no place beside it, is refused with an example."""
    with pytest.raises(ConfigError) as caught:
        read_origin(text)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["fast", "-1MB/s", "5MB/min", "5/s/s", ""])
def test_no_rate(text: str) -> None:
    """What is no rate is refused by the option's name."""
    with pytest.raises(ConfigError, match="--flush-max"):
        config_module.parse_rate(text, "--flush-max")


@pytest.mark.parametrize(
    ("store", "absolute"),
    [
        ("runs", "/here/runs"),
        ("./runs/", "/here/runs"),
        ("../runs", "/runs"),
        ("/a/./b", "/a/b"),
        ("~/runs", "/home/me/runs"),
        ("s3://bucket/../x", "s3://bucket/../x"),
        ("file:///a", "file:///a"),
    ],
)
def test_a_store_means_the_same_from_everywhere(monkeypatch: pytest.MonkeyPatch, store: str, absolute: str) -> None:
    """Paths become absolute, URLs stay what they are."""
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute_store(store, Path("/here")) == absolute


# --- agents -----------------------------------------------------------------------------------------------------


def test_an_agent_without_variables() -> None:
    """The defaults are the documented ones."""
    config = AgentConfig.from_environ({"HOME": "/home/me"})
    assert config == AgentConfig(Path("/home/me/.local/state/ckptd"), Path("/home/me/.local/state/ckptd/ckptd.sock"))
    assert (config.memory_max_bytes, config.blocked_plugins, config.log_format) == (0, (), "auto")


def test_an_agent_with_all_variables() -> None:
    """Every `CKPTD_*` variable is read; a list may have blanks behind its commas."""
    environ = {
        "CKPTD_HOME": "/state",
        "CKPTD_SOCKET": "/run/c.sock",
        "CKPTD_MEMORY_MAX": "1.5GiB",
        "CKPTD_PLUGINS_BLOCK": "one, two,,three ",
        "CKPTD_LOG_FORMAT": "json",
    }
    assert AgentConfig.from_environ(environ) == AgentConfig(
        Path("/state"), Path("/run/c.sock"), 3 * 2**29, ("one", "two", "three"), "json"
    )


@pytest.mark.parametrize(
    ("name", "value"), [("CKPTD_MEMORY_MAX", "lots"), ("CKPTD_MEMORY_MAX", "-1"), ("CKPTD_LOG_FORMAT", "xml")]
)
def test_a_variable_that_can_not_be_used(name: str, value: str) -> None:
    """A variable that means nothing is a `ConfigError` that names it, with a hint."""
    with pytest.raises(ConfigError, match=f"{name} '{value}'") as caught:
        AgentConfig.from_environ({"HOME": "/home/me", name: value})
    assert caught.value.hint


def test_how_long_a_start_waits_for_its_node(tmp_path):
    """`check_wait` is a duration in a job file, survives the journal, and must be longer than nothing."""
    path = tmp_path / "job.toml"
    path.write_text('command = ["train.py"]\nstore = "runs"\ncheck_wait = "90s"\n')
    config = load_job_file(path)
    assert config.check_wait_s == 90.0
    assert JobConfig.from_json(config.to_json()).check_wait_s == 90.0
    with pytest.raises(ConfigError, match="check_wait is 0 s"):
        dataclasses.replace(config, check_wait_s=0.0)
