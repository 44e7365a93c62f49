"""What a launcher learns from its ranks: modules that they have imported of what is preloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_DRIVER = """
import json, os, select, sys
sys.path.insert(0, sys.argv[1])
from ckptd.launcher.learning import Learner
names = sys.argv[2].split(",")
learner = Learner(frozenset(["lazy"]), sys.argv[3])
result, trials = None, 0
learner.begin(names)
while learner.trial is not None:
    trials += 1
    select.select([learner.trial], [], [])
    result = learner.end()
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
loaded = sorted(name for name in sys.modules if name.startswith(("lazy.", "other")))
print(json.dumps({"loaded": loaded, "trials": trials, "skipped": result.skipped if result else None,
                  "descriptors": len(os.listdir("/proc/self/fd"))}))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with parts of every kind: plain ones, and each that a fork would break."""
    parts = {
        "__init__": "",
        "plain": "from lazy import below",
        "below": "",
        "thread": "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "uses_thread": "from lazy import thread",
        "file": "keep = open(__file__)",
        "broken": "raise RuntimeError('no GPU here')",
        "deadly": "import os; os._exit(3)",
    }
    (tmp_path / "lazy").mkdir()
    for name, code in parts.items():
        (tmp_path / "lazy" / f"{name}.py").write_text(code)
    (tmp_path / "other.py").write_text("")
    (tmp_path / "script").mkdir()
    return tmp_path


def learn(package: Path, *names: str) -> dict[str, Any]:
    """Learn `names` in a process of its own."""
    arguments = [sys.executable, "-c", _DRIVER, str(package), ",".join(names), str(package / "script")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def test_what_ranks_have_imported_is_imported_after_a_trial(package: Path) -> None:
    """Proves the plain case: one trial, and the module is loaded with what it imports; other packages are left."""
    result = learn(package, "lazy.plain", "other")
    assert (result["loaded"], result["trials"], result["skipped"]) == (["lazy.below", "lazy.plain"], 1, {})
    assert result["descriptors"] == learn(package, "other")["descriptors"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("lazy.thread", "starts threads"), ("lazy.file", "leaves descriptors open"), ("lazy.broken", "import failed")],
)
def test_what_a_fork_would_break_is_left_to_the_ranks(package: Path, name: str, reason: str) -> None:
    """Proves that the trial finds it, that the launcher never imports it, and that everything else is learned."""
    result = learn(package, name, "lazy.plain")
    assert result["loaded"] == ["lazy.below", "lazy.plain"]
    assert list(result["skipped"]) == [name]
    assert result["skipped"][name].startswith(reason)


def test_what_brings_jemalloc_along_is_learned(package: Path) -> None:
    """Proves that an allocator's thread that runs on in the launcher spoils neither its module nor later ones."""
    (package / "lazy" / "allocator.py").write_text(
        "import _thread, ctypes, time\n"
        "def purge():\n"
        "    ctypes.CDLL(None).prctl(15, b'jemalloc_bg_thd', 0, 0, 0)\n"
        "    time.sleep(60)\n"
        "_thread.start_new_thread(purge, ())\n"
    )
    (package / "lazy" / "uses_allocator.py").write_text("from lazy import allocator")
    result = learn(package, "lazy.allocator", "lazy.uses_allocator", "lazy.thread", "lazy.plain")
    assert result["loaded"] == ["lazy.allocator", "lazy.below", "lazy.plain", "lazy.uses_allocator"]
    assert result["skipped"] == {"lazy.thread": "starts threads: Thread-1 (sleep)"}


def test_what_imports_something_unfit_is_unfit_too(package: Path) -> None:
    """Proves that a module which starts no thread by itself is tried again without the one that did, and left too."""
    result = learn(package, "lazy.thread", "lazy.uses_thread", "lazy.plain")
    assert result["loaded"] == ["lazy.below", "lazy.plain"]
    assert set(result["skipped"]) == {"lazy.thread", "lazy.uses_thread"}
    assert result["trials"] == 3


def test_what_comes_before_many_unfit_modules_is_learned(package: Path) -> None:
    """Proves that a package most of which is unfit costs a bounded number of trials, and not what is fit of it."""
    users = [f"uses_thread{number}" for number in range(12)]
    for name in users:
        (package / "lazy" / f"{name}.py").write_text("from lazy import thread")
    result = learn(package, "lazy.plain", "lazy.thread", *(f"lazy.{name}" for name in users))
    assert result["loaded"] == ["lazy.below", "lazy.plain"]
    assert result["trials"] == len(result["skipped"]) == 8


def test_what_was_learned_before_a_trial_that_dies_is_told(package: Path) -> None:
    """Proves that the modules of an earlier trial stay, and count, when a later one dies."""
    result = learn(package, "lazy.plain", "lazy.thread", "lazy.deadly")
    assert result["loaded"] == ["lazy.below", "lazy.plain"]
    assert (list(result["skipped"]), result["trials"]) == (["lazy.thread"], 2)


def test_a_failed_import_teaches_nothing_that_would_hide_a_module_of_the_script(package: Path) -> None:
    """Proves that what was imported before the failure is looked at as well."""
    (package / "lazy" / "uses_other.py").write_text("import other")
    (package / "script" / "other.py").write_text("")
    result = learn(package, "lazy.uses_other", "lazy.broken")
    assert result["loaded"] == []
    assert list(result["skipped"]) == ["*"]


def test_a_trial_that_dies_teaches_nothing(package: Path) -> None:
    """Proves that a module which ends its process costs the trial alone."""
    result = learn(package, "lazy.deadly", "lazy.plain")
    assert (result["loaded"], result["skipped"]) == ([], None)


def test_nothing_is_learned_that_would_hide_a_module_of_the_script(package: Path) -> None:
    """Proves that a rank gets the module of its own folder whether its launcher has learned or not."""
    (package / "lazy" / "uses_other.py").write_text("import other")
    (package / "script" / "other.py").write_text("")
    result = learn(package, "lazy.uses_other", "lazy.plain")
    assert result["loaded"] == []
    assert result["skipped"] == {"*": "the script's folder has its own other, which they would hide"}


def test_what_can_be_imported_only_once_is_left_to_the_ranks(package: Path) -> None:
    """Proves that a module that fails in the launcher after its trial, while ranks live, does it no harm."""
    (package / "lazy" / "once.py").write_text("import os\nos.mkdir(__file__ + '.cache')")
    result = learn(package, "lazy.once", "lazy.plain")
    assert result["loaded"] == ["lazy.below", "lazy.plain"]
    assert result["skipped"]["lazy.once"].startswith("import failed: FileExistsError")
