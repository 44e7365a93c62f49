"""Traps of importing before the fork."""

from __future__ import annotations

import json
import os

import pytest

from ckptd.launcher.environment import job_env
from ckptd.protocol import messages


def test_job_environment_is_set_before_the_preload(start, modules, script):
    """A library that reads OMP_NUM_THREADS when it is imported reads the job's, not the daemon's."""
    (modules / "reader.py").write_text("import os\nthreads = os.environ.get('OMP_NUM_THREADS')\npid = os.getpid()\n")
    path = script("import os, reader\nprint(reader.threads, reader.pid == os.getpid())")
    environ = {name: value for name, value in os.environ.items() if name not in {"OMP_NUM_THREADS", "PYTHONPATH"}}
    agent = start([str(path)], preload=["reader"], **job_env(environ, nproc=2, cpu_count=6))
    ready = agent.expect(messages.Ready)
    assert (ready.preloaded, ready.skipped) == (["reader"], {})
    # The module was executed in another process: it is the preloaded one that the rank sees.
    assert agent.run({})[0].stdout == "3 False\n"


UNFIT = {
    "threaded": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(3600,), daemon=True, name='beat').start()",
        "starts threads: beat",
    ),
    "native": ("import _thread, time\n_thread.start_new_thread(time.sleep, (3600,))", "starts threads: "),
    "opened": ("import os\nfd = os.open('/dev/zero', os.O_RDONLY)", "leaves descriptors open: /dev/zero"),
    "child": ("import subprocess\nprocess = subprocess.Popen(['sleep', '3600'])", "starts processes"),
    "broken": ("import nothing_of_that_name", "import failed: ModuleNotFoundError: No module named 'nothing_of"),
    "raising": ("raise RuntimeError('two\\nlines')", "import failed: RuntimeError: two"),
    "leaving": ("raise SystemExit('bye')", "import failed: SystemExit: bye"),
}


def test_unfit_modules_are_left_out_with_their_reason_and_ranks_run(start, modules, script):
    """What starts threads or processes, holds descriptors or fails is not preloaded; ranks import it themselves."""
    for name, (text, _) in UNFIT.items():
        (modules / f"{name}.py").write_text(text)
    path = script(
        """
        import json, os, sys
        shared = [name for name in sys.argv[1:] if name in sys.modules]
        import threaded, native, threading
        print(json.dumps([shared, len(os.listdir("/proc/self/task")), "fine" in sys.modules]))
        """
    )
    (modules / "fine.py").write_text("")
    agent = start([str(path), *UNFIT, "absent"], preload=[*UNFIT, "absent", "absent.part", "fine"])
    ready = agent.expect(messages.Ready)
    assert ready.preloaded == ["fine"]
    assert {name: ready.skipped.pop(name) for name in ("absent", "absent.part")} == {
        "absent": "no module named absent",
        "absent.part": "no module named absent",
    }
    assert ready.skipped.keys() == UNFIT.keys()
    for name, (_, reason) in UNFIT.items():
        assert ready.skipped[name].startswith(reason)
        assert "\n" not in ready.skipped[name]
    assert ready.seconds > 0
    # Nothing of the modules that were left out is in a rank, and there they start their threads.
    assert json.loads(agent.run({})[0].stdout) == [[], 3, True]


def test_a_module_that_initialises_cuda_is_left_out(start, modules, script):
    """A CUDA context does not survive a fork, so whatever makes one must be imported by each rank."""
    (modules / "torch" / "cuda").mkdir(parents=True)
    (modules / "torch" / "__init__.py").write_text("")
    (modules / "torch" / "cuda" / "__init__.py").write_text("def is_initialized(): return True\n")
    agent = start([str(script("print('ran')"))], preload=["torch", "torch.cuda"])
    ready = agent.expect(messages.Ready)
    assert (ready.preloaded, ready.skipped) == (["torch"], {"torch.cuda": "initialises CUDA"})
    assert agent.run({})[0].stdout == "ran\n"


def test_threads_that_end_before_a_fork_do_no_harm(start, script):
    """OpenBLAS keeps a thread per core and ends them before a fork, so NumPy may be preloaded."""
    path = script(
        "import os, numpy\nprint(len(os.listdir('/proc/self/task')), (numpy.ones((300, 300)) @ numpy.ones(300))[0])"
    )
    agent = start([str(path)], preload=["numpy"], OMP_NUM_THREADS="2", OPENBLAS_NUM_THREADS="2")
    assert agent.expect(messages.Ready).preloaded == ["numpy"]
    assert agent.run({})[0].stdout == "1 300.0\n"


@pytest.mark.parametrize(
    ("thread", "preloaded"), [("jemalloc_bg_thd", ["allocator", "later"]), ("jemalloc", ["later"])]
)
def test_the_thread_of_jemalloc_does_no_harm(start, modules, script, thread, preloaded):
    """jemalloc holds its locks across a fork, so its thread is no reason to leave a module out; any other one is.

    Python may warn of a fork beside a thread, and here any warning is an error: ranks start all the same, without it.
    """
    (modules / "later.py").write_text("")
    (modules / "allocator.py").write_text(
        "import _thread, ctypes, time\n"
        "def purge():\n"
        f"    ctypes.CDLL(None).prctl(15, b'{thread}', 0, 0, 0)\n"
        "    time.sleep(3600)\n"
        "_thread.start_new_thread(purge, ())\n"
    )
    path = script("import os, warnings\nprint(len(os.listdir('/proc/self/task')), warnings.filters[0][0])")
    agent = start([str(path)], preload=["allocator", "later"], PYTHONWARNINGS="error")
    ready = agent.expect(messages.Ready)
    assert ready.preloaded == preloaded
    assert ready.skipped in ({}, {"allocator": f"starts threads: {thread}"})
    assert {result.stdout for result in agent.run({}, {})} == {"1 error\n"}


def test_numpy_is_reseeded_in_each_rank(start, script):
    """NumPy's global generator is copied by a fork; two ranks, and two generations, must not draw the same."""
    path = script("import random, numpy\nprint(numpy.random.random(), random.random(), sep='\\n')")
    agent = start([str(path)], preload=["numpy.random"])
    assert agent.expect(messages.Ready).preloaded == ["numpy.random"]
    drawn = [line for result in agent.run({}, {}, {}) for line in result.stdout.split()]
    assert len(drawn) == len(set(drawn)) == 6


def test_multiprocessing_keys_are_not_shared(start, script):
    """The key that guards multiprocessing's connections is drawn per process, as under plain Python."""
    path = script("import multiprocessing\nprint(multiprocessing.current_process().authkey.hex())")
    agent = start([str(path)], preload=["multiprocessing"])
    keys = {result.stdout for result in agent.run({}, {})}
    assert len(keys) == 2


@pytest.mark.parametrize("preload", [["threadless"], []])
def test_the_jobs_folder_does_not_shadow_the_preload(start, modules, script, preload):
    """A file in the job's current folder takes no module's place in the launcher, and neither in a script elsewhere."""
    (modules / "threadless.py").write_text("where = 'modules'")
    path = script("import threadless\nprint(threadless.where)", "src/train.py")
    script("where = 'cwd'", "threadless.py")
    script("raise RuntimeError('shadowed')", "selectors.py")
    agent = start([str(path)], preload=preload)
    assert agent.expect(messages.Ready).preloaded == preload
    assert agent.run({})[0].stdout == "modules\n"


def test_a_module_of_the_scripts_own_folder_wins(start, script):
    """A script beside its own `queue.py` imports that one: such a job is started by exec, with the reason."""
    path = script("import queue\nprint(queue.mine)")
    script("mine = True", "queue.py")
    script("", "json.txt")
    agent = start([str(path)], preload=["queue", "colorsys"])
    ready = agent.expect(messages.Ready)
    assert ready.preloaded == []
    assert ready.skipped == dict.fromkeys(
        ["queue", "colorsys"], "the script's folder has its own queue, which it would hide"
    )
    assert agent.run({})[0].stdout == "True\n"
