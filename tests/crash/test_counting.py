"""That the matrix misses no call: what it counts is held against what the kernel saw."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash import calls
from tests.crash.judge import lines_of
from tests.crash.world import Forkserver, World

_TRACED = (
    "openat,open,creat,write,pwrite64,writev,pwritev,pwritev2,pread64,preadv,fsync,fdatasync,sync_file_range,"
    "syncfs,rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,ftruncate,"
    "truncate,fallocate,utimensat,fchmod,fchmodat,chmod,copy_file_range,sendfile,splice,flock,execve,clone,clone3,vfork"
)
_NAMES = {
    "openat": "open", "pwrite64": "pwrite", "linkat": "link", "unlinkat": "unlink", "renameat": "rename",
    "renameat2": "rename", "mkdirat": "mkdir", "utimensat": "utime", "pread64": "pread", "preadv": "preadv",
}  # fmt: skip
_LINE = re.compile(r"^(?P<pid>\d+)\s+(?P<call>\w+)\((?P<rest>.*)$")
_RESUMED = re.compile(r"^(?P<pid>\d+)\s+<\.\.\. (?P<call>\w+) resumed>(?P<rest>.*)$")
_RESULT = re.compile(r"\)\s+= (-?\d+)")


def kernel_calls(trace: Path, root: str) -> Iterator[tuple[str, str]]:
    """Yield calls and paths below `root` of the first traced process and its threads, not of what it has started."""
    foreign: set[str] = set()
    begun: dict[str, str] = {}
    executed = False
    for line in trace.read_text(errors="replace").splitlines():
        resumed = _RESUMED.match(line)
        if resumed is not None:
            line = begun.pop(resumed["pid"], "") + resumed["rest"]
        elif line.endswith("<unfinished ...>"):
            begun[line.split()[0]] = line.removesuffix("<unfinished ...>")
            continue
        match = _LINE.match(line)
        if match is None:
            continue
        pid, call, rest = match["pid"], match["call"], match["rest"]
        result = _RESULT.search(rest)
        if call == "execve" and executed:
            foreign.add(pid)
        executed = executed or call == "execve"
        if call in ("clone", "clone3", "vfork") and result and pid in foreign:
            foreign.add(result[1])
        paths = re.findall(rf"[<\"]({re.escape(root)}[^>\"]*)[>\"]", rest.partition(") = ")[0])
        if pid in foreign or not paths:
            continue
        yield _NAMES.get(call, call), paths[0]


def test_no_call_of_the_storage_layer_is_missed(tmp_path: Path) -> None:
    """Of a whole run, every open, write, fsync, rename and the like that strace sees was counted, path for path."""
    if shutil.which("strace") is None:
        pytest.skip("there is no strace here")
    server = Forkserver(tmp_path / "plugins")
    server.close()  # only its environment is needed
    world = World(tmp_path / "world", server)
    trace = tmp_path / "trace"
    counted = calls.to_json([str(world.store)], str(tmp_path / "calls"), calls.Harm())
    command = ["strace", "-f", "-y", "-s", "0", "-e", f"trace={_TRACED}", "-o", str(trace)]
    done = subprocess.run(
        [*command, sys.executable, "-m", "tests.crash.agent", counted, *world.command(60)],
        env=world.environ, cwd=world.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "ptrace" in done.stderr.lower():
        pytest.skip(f"tracing is not allowed here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr[-4000:]
    seen = Counter(kernel_calls(trace, str(world.store)))
    noted = Counter(
        (_as_kernel(line["call"]), line["paths"][0] or line["paths"][-1])
        for line in lines_of(tmp_path / "calls")
        if line.get("begin") and line["call"] not in ("stat", "lstat", "statfs", "fcntl", "fstat")
    )
    assert sum(seen.values()) > 100, "strace saw hardly anything"
    assert seen == noted, f"missed: {seen - noted}\nnot real: {noted - seen}"


def _as_kernel(call: str) -> str:
    return {"create": "open", "scandir": "open", "listdir": "open", "remove": "unlink", "replace": "rename"}.get(
        call, call
    )
