"""Object stores: what an upload and a download cost with each client, beside our tiers, against one real S3 server.

`python -m tests.bench.object_store [--size MIB] [--repeat N] [--dir FOLDER] [--only PART-OF-A-NAME] [--json FILE]`

Contenders take turns, round by round, each in a process of its own. The server runs on the same cores, so its work is
most of the wall time: CPU seconds of the client are the steadier figure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import xxhash

from tests.bench import machine, measure, probes
from tests.bench.object_clients import CLIENTS, MIB, OURS, Client

OBJECTS = 2
SMALL_BYTES, SMALL_COUNT = 4096, 100
LARGE_BYTES = 4 * 2**30
LARGE_BOUND_MIB = 300
_DEADLINE_S = 900.0


class Repeated:
    """A stream of one block over and over: large, with nothing behind it that takes memory."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._block = os.urandom(MIB)

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill `into`; where it begins does not matter here."""
        del offset
        for at in range(0, len(into), MIB):
            part = into[at : at + MIB]
            part[:] = memoryview(self._block)[: len(part)]


@contextmanager
def timed(found: dict[str, Any], name: str) -> Iterator[None]:
    """Add seconds, and CPU seconds of this process."""
    wall_s, cpu_s = time.monotonic(), time.process_time()
    yield
    found[f"{name}_s"] = time.monotonic() - wall_s
    found[f"{name}_cpu_s"] = time.process_time() - cpu_s


@contextmanager
def watched(found: dict[str, Any], name: str) -> Iterator[None]:
    """Add this process's peak memory over what it had before, without pages of files; watching costs time."""
    probes.trim()
    before = _anonymous_bytes(probes.memory(os.getpid()))
    with probes.Watch(list) as watch:
        yield
    found[f"{name}_peak_mib"] = max(0, _anonymous_bytes(watch.own) - before) / MIB


def _anonymous_bytes(memory: probes.Memory) -> int:
    return memory.private_bytes + memory.shared_bytes


Measure = Callable[[dict[str, Any], str], AbstractContextManager[None]]


def run_child(name: str, bucket: str, folder: Path, mark: str, measured: Measure) -> dict[str, Any]:
    """Measure one contender in this process; every byte that comes back is compared with what was sent."""
    files = sorted(folder.glob("source-*"))
    client = CLIENTS[name](bucket, files, folder)
    client.prepare()
    client.put_small(f"{mark}/warm", b"warm")
    assert client.get_small(f"{mark}/warm") == b"warm"
    found: dict[str, Any] = {}
    with measured(found, "put"):
        for number in range(len(files)):
            client.put(number, f"{mark}/{number}")
    with measured(found, "get"):
        for number in range(len(files)):
            client.get(number, f"{mark}/{number}")
    for number, path in enumerate(files):
        wanted = xxhash.xxh3_128_hexdigest(path.read_bytes())
        assert xxhash.xxh3_128_hexdigest(client.got(number)) == wanted, f"{name}: object {number} came back changed"
        client.target(number).unlink(missing_ok=True)
    _small(client, mark, found)
    return found


def _small(client: Client, mark: str, found: dict[str, Any]) -> None:
    data = os.urandom(SMALL_BYTES)
    for name, act in (
        ("put", lambda key: client.put_small(key, data)),
        ("get", client.get_small),
    ):
        wall_s, cpu_s = time.monotonic(), time.process_time()
        for number in range(SMALL_COUNT):
            act(f"{mark}/small/{number}")
        found[f"small_{name}_ms"] = (time.monotonic() - wall_s) / SMALL_COUNT * 1000
        found[f"small_{name}_cpu_ms"] = (time.process_time() - cpu_s) / SMALL_COUNT * 1000


def run_large(name: str, bucket: str, folder: Path, mark: str) -> dict[str, Any]:
    """Upload one object of 4 GiB through one of our tiers, for its memory."""
    tier = CLIENTS[name](bucket, [], folder).tier  # type: ignore[attr-defined]
    tier.put(f"{mark}/warm", b"warm")
    found: dict[str, Any] = {}
    with watched(found, "put"), timed(found, "put"):
        tier.put(f"{mark}/large", Repeated(LARGE_BYTES))
    assert tier.size_bytes(f"{mark}/large") == LARGE_BYTES
    tier.delete(f"{mark}/large")
    return found


def child(kind: str, name: str, bucket: str, folder: Path, mark: str, environ: dict[str, str]) -> dict[str, Any]:
    """Run one contender in a new process."""
    command = [sys.executable, "-m", "tests.bench.object_store", "--child", kind, name, bucket, str(folder), mark]
    done = subprocess.run(
        command, env=os.environ | environ, stdout=subprocess.PIPE, text=True, timeout=_DEADLINE_S, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rows(
    measurements: dict[str, list[dict[str, Any]]], memory: dict[str, dict[str, Any]], way: str, size_mib: int
) -> list[dict[str, str]]:
    """Return the table of uploads ("put") or downloads ("get"); ratios are to the least of the same round."""
    return [
        {
            "contender": name,
            "MB/s": measure.show(measure.spread(size_mib * MIB / 1e6 / each[f"{way}_s"] for each in found), digits=0),
            "time, ratio": measure.show(_ratios(measurements, name, f"{way}_s")),
            "CPU s": measure.show(measure.spread(each[f"{way}_cpu_s"] for each in found)),
            "CPU, ratio": measure.show(_ratios(measurements, name, f"{way}_cpu_s"), digits=1),
            "memory MiB": f"{memory[name][f'{way}_peak_mib']:.0f}",
            "4 KiB ms": measure.show(measure.spread(each[f"small_{way}_ms"] for each in found), digits=1),
            "4 KiB CPU ms": measure.show(measure.spread(each[f"small_{way}_cpu_ms"] for each in found), digits=1),
        }
        for name, found in measurements.items()
    ]


def _ratios(measurements: dict[str, list[dict[str, Any]]], name: str, key: str) -> measure.Spread | None:
    least = [min(each[key] for each in turn) for turn in zip(*measurements.values(), strict=True)]
    return measure.spread(each[key] / best for each, best in zip(measurements[name], least, strict=True))


def bench(arguments: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything against one server."""
    from tests.object_store import server as s3

    for number in range(OBJECTS):
        _make_source(folder / f"source-{number}", arguments.size * MIB // OBJECTS)
    names = [name for name in CLIENTS if arguments.only.lower() in name.lower()]
    server = s3.start(folder)
    try:
        bucket = server.make_bucket()
        measurements: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        large = {}
        for turn in range(arguments.repeat):
            order = names[turn % len(names) :] + names[: turn % len(names)]
            for name in order:
                mark = f"{turn}-{names.index(name)}"
                measurements[name].append(child("transfer", name, bucket, folder, mark, server.environ))
                say(f"round {turn + 1} of {arguments.repeat}: {name}")
        memory = {name: child("memory", name, bucket, folder, "memory", server.environ) for name in names}
        for name in [name for name in OURS if name in names and not arguments.no_large]:
            large[name] = child("large", name, bucket, folder, "large", server.environ)
    finally:
        server.stop()
    return {"transfer": measurements, "memory": memory, "large": large}


def _make_source(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        for _ in range(0, size_bytes, MIB):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())


def main() -> int:
    """Measure, print the table, keep the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="MiB, in two objects")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="the disk of sources, downloads and the server's data")
    parser.add_argument("--only", default="", help="contenders whose name has this in it")
    parser.add_argument("--no-large", action="store_true", help="leave out the upload of 4 GiB")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", nargs=5, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        kind, name, bucket, folder, mark = arguments.child
        if kind == "large":
            found = run_large(name, bucket, Path(folder), mark)
        else:
            found = run_child(name, bucket, Path(folder), mark, timed if kind == "transfer" else watched)
        print(json.dumps(found))
        return 0
    with tempfile.TemporaryDirectory(prefix="ckptd-object-bench-", dir=arguments.dir) as made:
        begin = probes.machine()
        found = bench(arguments, Path(made), lambda text: print(text, file=sys.stderr, flush=True))
        wall_s, busy_s = (after - before for after, before in zip(probes.machine(), begin, strict=True))
    print(f"{machine.line()}; busy {busy_s / wall_s:.1f} cores, the bench's own among them\n")
    for way, title in (("put", "Upload"), ("get", "Download")):
        print(f"{title} of {arguments.size} MiB in {OBJECTS} objects\n")
        print(measure.markdown(rows(found["transfer"], found["memory"], way, arguments.size)) + "\n")
    for name, large in found["large"].items():
        peak = large["put_peak_mib"]
        holds = "yes" if peak < LARGE_BOUND_MIB else "no"
        print(f"{name}: 4 GiB take {peak:.0f} MiB (< {LARGE_BOUND_MIB}: {holds}), {large['put_cpu_s']:.1f} s of CPU")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
