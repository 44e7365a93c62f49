"""The launcher with the real thing: torch preloaded, as every job has it."""

from __future__ import annotations

import json

from ckptd.launcher.environment import job_env
from ckptd.protocol import messages

WORKERS = """
import json, os, sys, threading
import torch
from torch.utils.data import DataLoader, Dataset

class Numbers(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        main = sys.modules["__mp_main__"]
        return index, main.__file__, main.__name__, " ".join(sys.argv), sys.path[0], type(self).__module__

if __name__ == "__main__":
    torch.manual_seed(5)
    loader = DataLoader(Numbers(), batch_size=2, num_workers=1, multiprocessing_context="spawn", shuffle=False)
    batches = [[batch[0].tolist(), *batch[1:]] for batch in loader]
    for thread in threading.enumerate()[1:]:  # an end of Python in the midst of a queue's end says that semaphores leak
        thread.join(10)
    print(json.dumps([batches, torch.get_num_threads(), torch.initial_seed(), torch.rand(2).tolist()]))
"""


def test_spawn_started_workers_find_main(start, script, tmp_path):
    """DataLoader workers started by spawn import `__main__` from its file, with its argv and path, as ever."""
    path = script(WORKERS)
    results = []
    for preload in (["torch", "torch.distributed"], []):
        agent = start(["train.py", "--steps", "3"], preload=preload, OMP_NUM_THREADS="1")
        ready = agent.expect(messages.Ready)
        assert (ready.preloaded, ready.skipped) == (preload, {}), agent.story()
        (result,) = agent.run({})
        assert (result.returncode, result.stderr) == (0, ""), agent.story()
        results.append(json.loads(result.stdout))
    assert results[0] == results[1]
    batches = results[0][0]
    assert [batch[0] for batch in batches] == [[0, 1], [2, 3]]
    assert batches[0][1][0] == str(path)


def test_torch_is_reseeded_in_each_rank(start, script):
    """torch seeds its CPU generator at import; unless they ask for a seed, two ranks must not draw the same."""
    path = script("import torch\nprint(torch.initial_seed(), torch.rand(1).item(), sep='\\n')")
    agent = start([str(path)], preload=["torch"], OMP_NUM_THREADS="1")
    drawn = [line for result in agent.run({}, {}) for line in result.stdout.split()]
    assert len(drawn) == len(set(drawn)) == 4


def test_a_torchrun_script_runs_through_two_generations(start, script, envs_of):
    """Two forked ranks meet over gloo by torchrun's variables, and again on a new port in the next generation."""
    script(
        """
        import os
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        total = torch.ones(1) * (dist.get_rank() + 1)
        dist.all_reduce(total)
        print(os.environ["CKPTD_GENERATION"], dist.get_world_size(), total.item(), torch.get_num_threads(), flush=True)
        if os.environ["CKPTD_GENERATION"] == "1" and dist.get_rank() == 1:
            os.kill(os.getpid(), 9)
        dist.barrier()
        dist.destroy_process_group()
        """
    )
    environ = job_env({"OMP_NUM_THREADS": "1"}, nproc=2, cpu_count=2)
    agent = start(["train.py"], preload=["torch", "torch.distributed", "torch._dynamo"], **environ)
    assert agent.expect(messages.Ready).skipped == {}
    first = envs_of(2, generation=1)
    for rank, env in enumerate(first):
        agent.spawn(rank, env)
    agent.wait()
    agent.kill(9)
    agent.wait()
    second = envs_of(2, generation=2)
    assert first[0]["MASTER_PORT"] != second[0]["MASTER_PORT"]
    results = agent.run(*second)
    assert [result.returncode for result in results] == [0, 0]
    assert results[0].stdout == "1 2 3.0 1\n2 2 3.0 1\n"
