"""The demo with a bucket: train on two ranks, kill one, wipe the disk, and restore from the bucket.

Run it with `make demo-s3`: it starts a real S3 server (SeaweedFS) on loopback. Everything that it writes lies in a
temporary folder, which it removes.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from examples.demo import CKPTCTL, HERE, say, status
from tests.object_store import server


def start(place, steps, env):
    """Start the job whose only store is the bucket."""
    command = ["run", "--nproc", "2", "--every", "2s", "--store", place, "--name", "gpt", "--log-format", "console"]
    say(f"\n$ ckptctl {' '.join(command)} -- examples/gpt.py --steps {steps}")
    training = [str(HERE / "gpt.py"), "--steps", str(steps)]
    return subprocess.Popen([*CKPTCTL, *command, "--", *training], env=env, cwd=env["DEMO"])


def show(env, *arguments):
    say(f"\n$ ckptctl {' '.join(arguments)}")
    subprocess.run([*CKPTCTL, *arguments], env=env, check=True)


def kill_rank(run, env):
    while run.poll() is None:
        now = status("gpt", env)
        if now and now["last_committed"] and now["step"] >= 40:
            say(f"\n>>> kill -9 {now['ranks'][1]['pid']}: rank 1\n")
            os.kill(now["ranks"][1]["pid"], signal.SIGKILL)
            return
        time.sleep(0.2)


def main():
    folder = Path(tempfile.mkdtemp(prefix="ckptd-demo-s3-"))
    bucket = server.start(folder)
    try:
        env = {**os.environ, **bucket.environ, "CKPTD_HOME": str(folder / "home"), "DEMO": str(folder)}
        place = f"s3://{bucket.make_bucket()}/runs"
        run = start(place, 100, env)
        kill_rank(run, env)
        if run.wait():
            sys.exit("the first run failed")
        show(env, "ls", "gpt")
        say("\n>>> the node is lost: no disk, no journal")
        shutil.rmtree(folder / "home")
        if start(place, 140, env).wait():
            sys.exit("the second run failed")
        show(env, "verify", "gpt", "--all")
        show(env, "ls", f"{place}/gpt")
        say("\nWhat the bucket had was enough: the second run began where the first had ended.")
    finally:
        bucket.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
