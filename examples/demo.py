"""The demo: train a small GPT on two ranks, SIGKILL one, watch ckptd bring the job back, and compare the weights.

Run it with `make demo`. Everything that it writes lies in a temporary folder, which it removes.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors import safe_open

HERE = Path(__file__).resolve().parent
CKPTCTL = [sys.executable, "-m", "ckptd.cli.main"]
STEPS, EVERY, KILL_AT = 240, "3s", 110


def say(text=""):
    mark = "\x1b[1;34m" if sys.stdout.isatty() else ""
    for line in text.splitlines() or [""]:
        print(f"{mark}{line}\x1b[0m" if mark else line, flush=True)


def start(name, env):
    command = ["run", "--nproc", "2", "--every", EVERY, "--store", "runs", "--name", name, "--log-format", "console"]
    shown = f"ckptctl {' '.join(command)} -- examples/gpt.py --steps {STEPS}"
    say(f"\n$ {shown}")
    training = [str(HERE / "gpt.py"), "--steps", str(STEPS)]
    return subprocess.Popen([*CKPTCTL, *command, "--", *training], env=env, cwd=env["DEMO"])


def status(name, env):
    result = subprocess.run([*CKPTCTL, "status", name, "--json"], env=env, capture_output=True, text=True)
    return json.loads(result.stdout) if result.returncode == 0 else None


def kill_rank(run, env):
    """SIGKILL rank 1 somewhere between two checkpoints, once enough has been trained."""
    while run.poll() is None:
        now = status("gpt", env)
        if now and now["last_committed"] and now["step"] >= KILL_AT:
            victim = now["ranks"][1]
            say(f"\n>>> kill -9 {victim['pid']}: rank 1, in the middle of step {now['step'] + 1}\n")
            os.kill(victim["pid"], signal.SIGKILL)
            return
        time.sleep(0.2)


def digest(job, env):
    """Return the SHA-256 of weights and optimizer in a job's last checkpoint, read with json and safetensors alone."""
    newest = max(Path(env["DEMO"]).glob(f"runs/{job}/g*/s*/manifest.json"))
    manifest = json.loads(newest.read_text())
    result = {}
    for part, prefix in (("weights", "model."), ("optimizer", "optimizer.")):
        total = hashlib.sha256()
        for shard in manifest["shards"]:
            with safe_open(newest.parent / shard["file"], "pt") as file:
                for name in sorted(file.keys()):
                    if name.startswith(prefix):
                        values = file.get_tensor(name).contiguous().view(-1)
                        total.update(name.encode() + values.numpy().tobytes())
        result[part] = total.hexdigest()
    return manifest["step"], result


def main():
    folder = Path(tempfile.mkdtemp(prefix="ckptd-demo-"))
    env = {**os.environ, "CKPTD_HOME": str(folder / "home"), "DEMO": str(folder)}
    run = None
    try:
        say("1. Train on two ranks, with a checkpoint every few seconds, and kill one rank on the way.")
        run = start("gpt", env)
        kill_rank(run, env)
        if run.wait() != 0:
            sys.exit(f"demo: the run ended with {run.returncode}")
        say("\n$ ckptctl incidents gpt 1")
        subprocess.run([*CKPTCTL, "incidents", "gpt", "1"], env=env, check=True)
        say("\n$ ckptctl ls gpt")
        subprocess.run([*CKPTCTL, "ls", "gpt"], env=env, check=True)

        say("\n2. The same training again, uninterrupted.")
        run = start("gpt-uninterrupted", env)
        if run.wait() != 0:
            sys.exit(f"demo: the uninterrupted run ended with {run.returncode}")

        (step, killed), (other_step, whole) = digest("gpt", env), digest("gpt-uninterrupted", env)
        incidents = json.loads(
            subprocess.run([*CKPTCTL, "incidents", "gpt", "--json"], env=env, capture_output=True, check=True).stdout
        )
        say(f"\n3. SHA-256 after step {step} of the killed run, and step {other_step} of the uninterrupted one:")
        for part in killed:
            same = "identical" if killed[part] == whole[part] else "DIFFERENT"
            print(f"   {part}\n     killed         {killed[part]}\n     uninterrupted  {whole[part]}   {same}")
        if killed != whole or step != other_step:
            sys.exit("demo: FAILED: the two runs do not end in the same state")
        if len(incidents) != 1:
            sys.exit(f"demo: FAILED: {len(incidents)} incidents instead of one")
        say("\nBit-identical, though one run was killed on the way. Try next:")
        print(
            "   source .venv/bin/activate\n"
            "   ckptctl run --nproc 2 --every 5s --store ./runs -- examples/gpt.py --steps 300\n"
            "     (kill a rank, press Ctrl-C, or kill -9 ckptctl itself; the same command goes on where it was)\n"
            "   ckptctl status gpt; ckptctl ls gpt; ckptctl show gpt; ckptctl verify gpt --all; ckptctl incidents gpt"
        )
    finally:
        if run is not None and run.poll() is None:
            run.terminate()
            run.wait()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
