"""Exports and imports of a state that is larger than the memory that the process may have."""

from __future__ import annotations

import os
import subprocess
import sys

import safetensors.torch
import torch

TENSORS, TENSOR_BYTES = 16, 8 * 2**20
ROOM_BYTES = 64 * 2**20
"""Half of the state: for a tensor or two, buffers, and small stacks of threads."""
CODE = f"""
import re, resource, threading
from pathlib import Path
import ckptd_integrations.torch.dcp_format, ckptd_integrations.torch.torch_format
from ckptd.cli.main import main
threading.stack_size(2**18)
used = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + {ROOM_BYTES},) * 2)
try:
    bytearray({TENSORS * TENSOR_BYTES})
except MemoryError:
    assert main(["import", "model.safetensors", "--job", "first", "--store", "runs"]) == 0
    for name in ("safetensors", "torch", "dcp"):
        assert main(["export", "first", "--store", "runs", "--to", name, "--format", name]) == 0
        done = main(["import", name, "--job", name, "--store", "runs"])
        if name == "torch":
            assert done == 6  # torch maps memory of its own
        else:
            assert done == 0
            assert main(["export", name, "--store", "runs", "--to", "again-" + name]) == 0
    print("within", flush=True)
"""


def test_memory_is_bounded(tmp_path):
    """A state of twice the memory there is goes out and in, every element of it; only a torch file has to fit in."""
    state = {f"w{number}": torch.randn(TENSOR_BYTES // 4) for number in range(TENSORS)}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    environ = os.environ | {"CKPTD_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # what is freed goes back, and counts no more
    ran = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.splitlines()[-1] == "within"
    assert "torch/checkpoint.pt can't be mapped" in ran.stderr
    for name in ("safetensors", "again-safetensors", "again-dcp"):
        found = safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)
