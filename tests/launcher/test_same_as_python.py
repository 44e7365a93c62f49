"""A forked rank is what `python script.py` would be: each script here runs preloaded and by plain exec."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from ckptd.protocol import messages

DUMP = """
import gc, io, json, os, resource, signal, sys, threading

def stream(file):
    raw = getattr(file.buffer, "raw", file.buffer)
    return [
        type(file).__name__, type(file.buffer).__name__, type(raw).__name__, file.encoding, file.errors,
        file.line_buffering, file.write_through, file.mode, file.name, file.buffer.name, raw.name, raw.mode,
        raw.closefd, file.newlines, file.isatty(), file.fileno(), file.seekable(), file.readable(), file.writable(),
    ]

def lines(path, beginnings):
    with open(path) as file:
        return [line for line in file if line.startswith(beginnings)]

def descriptors():
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        flags = lines(f"/proc/self/fdinfo/{name}", "flags")
        found[name] = [os.path.basename(target), flags]
    return found

main = sys.modules["__main__"]
facts = {
    "argv": sys.argv,
    "orig_argv": sys.orig_argv[1:],
    "name": __name__,
    "file": __file__,
    "code_file": descriptors.__code__.co_filename,
    "globals": sorted(globals()),
    "package": __package__,
    "cached": __cached__,
    "spec": __spec__ and [__spec__.name, __spec__.origin],
    "loader": [type(__loader__).__name__, __loader__.name, __loader__.path],
    "builtins": type(__builtins__).__name__,
    "annotations": repr(__annotations__),
    "main": [vars(main) is globals(), main.__name__, repr(main)],
    "path": sys.path,
    "flags": repr(sys.flags),
    "executable": sys.executable,
    "signals": {str(number): repr(signal.getsignal(number)) for number in signal.valid_signals()},
    "mask": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    "wakeup": signal.set_wakeup_fd(-1),
    "masks_of_kernel": lines("/proc/self/status", ("SigBlk", "SigIgn", "SigCgt", "Threads")),
    "descriptors": descriptors(),
    "stdin": stream(sys.stdin),
    "stdout": stream(sys.stdout),
    "stderr": stream(sys.stderr),
    "standard": [sys.stdin is sys.__stdin__, sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__],
    "read": sys.stdin.read(),
    "environment": dict(os.environ),
    "leads": [os.getpgid(0) == os.getpid(), os.getsid(0) == os.getppid()],
    "cwd": os.getcwd(),
    "hooks": [sys.excepthook is sys.__excepthook__, sys.displayhook is sys.__displayhook__, sys.exc_info()[0]],
    "threads": [thread.name for thread in threading.enumerate()],
    "main_thread": threading.main_thread().native_id == os.getpid(),
    "gc": [gc.isenabled(), gc.get_threshold()],
    "limits": [sys.getrecursionlimit(), resource.getrlimit(resource.RLIMIT_NOFILE)],
    "umask": oct(os.umask(0o22)),
}
with open(os.environ["DUMP"], "w") as file:
    json.dump(facts, file)
"""


def both(start, command, *envs, **options):
    """Run the same ranks preloaded and by plain exec."""
    results = []
    for preload in (["json", "threading", "multiprocessing", "logging"], []):
        agent = start(command, preload=preload, **options)
        assert agent.expect(messages.Ready).preloaded == preload
        results.append(agent.run(*envs))
    return results


def assert_same_facts(start, tmp_path: Path, command, **options) -> dict:
    facts = []
    for preload in (["json", "threading", "multiprocessing", "logging"], []):
        agent = start(command, preload=preload, **options)
        assert agent.expect(messages.Ready).preloaded == preload
        target = tmp_path / "dump.json"
        (result,) = agent.run({"DUMP": str(target), "RANK": "0", "WHO": "rank"})
        assert (result.returncode, result.stderr) == (0, "")
        facts.append(json.loads(target.read_text()))
    preloaded, plain = facts
    assert preloaded.keys() == plain.keys()
    assert {key: (preloaded[key], plain[key]) for key in plain if preloaded[key] != plain[key]} == {}
    return preloaded


@pytest.mark.parametrize("given", ["train.py", "./train.py", "sub/../train.py", "link.py", "absolute"])
def test_script_sees_the_same_world(start, script, tmp_path, given):
    """`__main__`, argv, path, flags, signals, descriptors, streams and environment equal those of plain Python."""
    path = script(DUMP)
    (path.parent / "sub").mkdir()
    (path.parent / "sub" / "real.py").write_text(DUMP)
    (path.parent / "link.py").symlink_to("sub/real.py")
    word = str(path) if given == "absolute" else given
    facts = assert_same_facts(start, tmp_path, [word, "--steps", "3", ""])
    assert facts["argv"] == [word, "--steps", "3", ""]
    assert facts["name"] == "__main__"
    assert facts["path"][0] == str(path.parent / "sub" if given == "link.py" else path.parent)
    assert set(facts["descriptors"]) <= {"0", "1", "2", "3"}
    assert facts["descriptors"]["0"][0] == "null"
    assert facts["environment"]["WHO"] == "rank"


def test_module_sees_the_same_world(start, script, tmp_path):
    """`-m NAME` gives what `python -m NAME` gives, from the current folder."""
    path = script(DUMP, "pkg/train.py")
    script("", "pkg/__init__.py")
    facts = assert_same_facts(start, tmp_path, ["-m", "pkg.train", "a"], cwd=path.parent.parent)
    assert facts["argv"] == [str(path), "a"]
    assert facts["package"] == "pkg"


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONUNBUFFERED": "1"},
        {"PYTHONUNBUFFERED": ""},
        {"PYTHONIOENCODING": "latin-1:replace"},
        {"PYTHONIOENCODING": ":ignore"},
        {"PYTHONUTF8": "1", "LC_ALL": "C"},
        {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
        {"PYTHONSAFEPATH": "1"},
        {"PYTHONDEVMODE": "1"},
    ],
    ids=lambda env: ",".join(f"{name}={value}" for name, value in env.items()),
)
def test_interpreter_variables_have_the_same_effect(start, script, tmp_path, env):
    """Buffering, encodings and modes that the job's environment asks for reach a forked rank as well."""
    script(DUMP)
    assert_same_facts(start, tmp_path, ["train.py"], **env)


def test_stream_variables_of_one_rank_count(start, script):
    """A rank's own PYTHONUNBUFFERED and PYTHONIOENCODING decide how it writes, although the launcher had others."""
    script("import os, signal\nprint('\\N{EURO SIGN}')\nos.kill(os.getpid(), signal.SIGKILL)")
    envs = [
        {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
        {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "ascii:xmlcharrefreplace"},
        {"PYTHONUNBUFFERED": ""},
    ]
    for results in both(start, ["train.py"], *envs, PYTHONUNBUFFERED=""):
        assert [result.stdout for result in results] == ["\N{EURO SIGN}\n", "&#8364;\n", ""]
        assert {result.returncode for result in results} == {-signal.SIGKILL}


ENDS = {
    "end": "pass",
    "zero": "sys.exit(0)",
    "none": "sys.exit(None)",
    "code": "sys.exit(3)",
    "large": "sys.exit(300)",
    "negative": "sys.exit(-1)",
    "text": "sys.exit('what went wrong')",
    "object": "sys.exit([1, 2])",
    "subclass": "class Stop(SystemExit): pass\n    raise Stop(9)",
    "error": "raise ValueError('bad')",
    "chained": "try:\n        {}['x']\n    except KeyError as e:\n        raise ValueError('bad') from e",
    "context": "try:\n        {}['x']\n    except KeyError:\n        raise ValueError('bad')",
    "group": "raise ExceptionGroup('two', [ValueError(1), TypeError(2)])",
    "base": "class Odd(BaseException): pass\n    raise Odd('odd')",
    "syntax": "compile('a b', 'text', 'exec')",
    "recursion": "def f(): f()\n    f()",
    "interrupt": "raise KeyboardInterrupt",
    "sigint": "os.kill(os.getpid(), signal.SIGINT)",
    "sigterm": "os.kill(os.getpid(), signal.SIGTERM)",
    "sigkill": "os.kill(os.getpid(), signal.SIGKILL)",
    "abort": "os.abort()",
    "immediate": "os._exit(7)",
    "hook": "sys.excepthook = lambda kind, error, trace: print('hook', error, trace.tb_lineno)\n"
    "    raise ValueError('bad')",
    "last": "atexit.register(lambda: print(repr(sys.last_value), sys.last_traceback.tb_frame.f_code.co_name))\n"
    "    raise ValueError('bad')",
    "atexit_error": "atexit.register(lambda: 1 / 0)",
    "atexit_exit": "atexit.register(lambda: sys.exit(4))",
    "thread": "threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()",
    "thread_error": "t = threading.Thread(target=lambda: 1 / 0, name='t')\n    t.start()\n    t.join()",
    "daemon": "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "thread_and_error": "threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()\n"
    "    raise ValueError('bad')",
    "finalizer": "class Late:\n        def __del__(self): print('deleted')\n    globals()['kept'] = Late()",
    "unflushed": "sys.stdout.write('no newline')",
    "closed": "os.close(1)\n    print('lost')",
    "full": "sys.stdout = open('/dev/full', 'w')\n    print('lost')",
    "warning": "import warnings\n    warnings.warn('careful')",
    "forked": "pid = os.fork()\n    if pid == 0: print('child')\n    else: os.waitpid(pid, 0)",
    "forked_error": "pid = os.fork()\n    if pid == 0: raise ValueError('child')\n    os.waitpid(pid, 0)",
}


def test_every_way_to_end_is_the_same(start, script):
    """Exit codes, signals, tracebacks, exit handlers, threads and flushing: as the interpreter does it on its own."""
    text = "import atexit, os, signal, sys, threading, time\natexit.register(print, 'atexit')\nprint('begin')\n"
    text += "def main(case):\n" + "".join(f"  if case == {name!r}:\n    {code}\n" for name, code in ENDS.items())
    script(text + "\nmain(os.environ['CASE'])\n")
    envs = [{"CASE": case} for case in ENDS]
    preloaded, plain = both(start, ["train.py"], *envs, PYTHONUNBUFFERED="", PYTHONWARNINGS="default")
    for case, ours, theirs in zip(ENDS, preloaded, plain, strict=True):
        for result in (ours, theirs):
            result.stderr = result.stderr.replace(str(result.pid), "PID")
            result.stderr = re.sub(r"0x[0-9a-f]+", "0x", result.stderr)
            # The frames that the launcher's `-m` stands on count against the limit of recursion.
            result.stderr = re.sub(r"repeated 9\d\d more times", "repeated", result.stderr)
            result.pid = 0
        assert (case, ours) == (case, theirs)
    by_case = dict(zip(ENDS, preloaded, strict=True))
    assert by_case["text"].stderr == "what went wrong\n"
    assert by_case["interrupt"].returncode == -signal.SIGINT
    assert by_case["closed"].returncode == 120
    assert by_case["error"].stderr.splitlines()[1].split('"')[1].endswith("/work/train.py")
    assert "ckptd" not in "".join(result.stderr for result in preloaded)


@pytest.mark.parametrize(
    ("name", "content", "command"),
    [
        ("train.py", "def f(:\n", ["train.py"]),
        ("train.py", "# -*- coding: latin-1 -*-\nprint(ascii('\u00e9'))\n".encode("latin-1"), ["train.py"]),
        ("train.py", b"\xef\xbb\xbfprint('bom')", ["train.py"]),
        ("train.py", "x: int = 1\nprint(__annotations__)\n1/0\n", ["train.py"]),
        ("pkg/bad.py", "def f(:\n", ["-m", "pkg.bad"]),
        ("pkg/fails.py", "raise ValueError('bad')\n", ["-m", "pkg.fails"]),
        ("pkg/stops.py", "raise KeyboardInterrupt\n", ["-m", "pkg.stops"]),
        ("pkg/__init__.py", "", ["-m", "pkg"]),
        ("pkg/__main__.py", "print(__name__, __spec__.name)", ["-m", "pkg"]),
        ("other.py", "", ["-m", "missing"]),
    ],
)
def test_bad_and_odd_sources_are_the_same(start, tmp_path, name, content, command):
    """Source that doesn't compile, encodings, and modules that aren't there: the same output and exit code."""
    path = tmp_path / "work" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (ours,), (theirs,) = both(start, command, {})
    assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)


def test_a_script_that_vanished_is_the_same(start, script):
    """A script that is deleted after the launcher has started fails as Python would, with exit code 2."""
    results = []
    for preload in (["json"], []):
        path = script("")
        agent = start(["train.py"], preload=preload)
        agent.expect(messages.Ready)
        path.unlink()
        results += agent.run({})
    assert [result.returncode for result in results] == [2, 2]
    assert results[0].stderr == results[1].stderr


def test_an_edited_script_and_its_modules_are_read_anew(start, script):
    """Each generation runs the files as they are then, as a new Python would."""
    script("import helper\nprint('one', helper.text)")
    script("text = 'a'", "helper.py")
    agent = start(["train.py"])
    assert agent.run({})[0].stdout == "one a\n"
    script("import helper, second\nprint('two', helper.text)")
    script("text = 'longer'", "helper.py")
    script("", "second.py")
    assert agent.run({})[0].stdout == "one a\ntwo longer\n"


def test_log_handlers_of_preloaded_modules_write_to_the_ranks_stderr(start, modules, script):
    """A handler that a module made at import holds the rank's stderr, not the launcher's."""
    (modules / "noisy.py").write_text("import logging\nhandler = logging.StreamHandler()\n")
    script(
        """
        import logging, noisy, sys
        logging.getLogger("x").addHandler(noisy.handler)
        logging.getLogger("x").warning("heard")
        print(noisy.handler.stream is sys.stderr)
        """
    )
    agent = start(["train.py"], preload=["noisy"])
    (result,) = agent.run({})
    assert (result.stdout, result.stderr) == ("True\n", "heard\n")


def test_what_a_preload_printed_appears_once_and_not_in_a_rank(start, modules, script):
    """Text that the launcher had buffered, in Python or in libc, is not written again by each child."""
    (modules / "chatty.py").write_text("import ctypes\nprint('import')\nctypes.CDLL(None).printf(b'in C\\n')\n")
    script("import chatty\nprint('rank')")
    agent = start(["train.py"], preload=["chatty"], PYTHONUNBUFFERED="")
    assert [result.stdout for result in agent.run({}, {})] == ["rank\n", "rank\n"]
    agent.close()
    assert sorted((agent.folder / "launcher.out").read_text().split("\n")) == ["", "import", "in C"]


def test_each_rank_leads_its_own_group_and_gets_signals_itself(start, script, until):
    """Ranks are groups of their own, and a signal has its default effect, not the launcher's."""
    script("import os, time\nprint(os.getpgid(0) == os.getpid(), flush=True)\ntime.sleep(600)")
    agent = start(["train.py"])
    first, second = agent.spawn(0), agent.spawn(1)
    assert len({os.getpgid(pid) for pid in (first, second, agent.process.pid)}) == 3
    until(lambda: agent.output(0, "out") == agent.output(1, "out") == "True\n", "both ranks run")
    agent.kill(signal.SIGTERM)
    assert {result.returncode for result in agent.wait(2).values()} == {-signal.SIGTERM}
    assert agent.process.poll() is None


def test_a_signal_right_after_the_fork_is_the_ranks_own(start, script):
    """A rank that is killed while it is still becoming one doesn't stop its launcher."""
    script("import time\ntime.sleep(600)")
    agent = start(["train.py"])
    agent.expect(messages.Ready)
    for rank in range(20):
        agent.order(rank)
        agent.kill(signal.SIGTERM)
    assert {result.returncode for result in agent.wait(20).values()} == {-signal.SIGTERM}
    assert agent.process.poll() is None
