"""`ckptctl export` and `show` on a store that was written by hand: what is printed, what is left, and how they fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from ckptd.cli.main import main
from ckptd.core.events import Flush
from ckptd.daemon.job_store import JobStore
from ckptd.storage import image
from ckptd.storage.image import TensorSpec
from ckptd.storage.local import LocalTier
from ckptd.types import CheckpointId


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with two checkpoints of a job, of which the second refers to the first."""
    monkeypatch.setenv("CKPTD_HOME", str(tmp_path / "home"))
    with ThreadPoolExecutor(2) as pool:
        job = JobStore(LocalTier(tmp_path / "store"), "gpt", pool)
        assert job.claim(1, None)
        for step in (10, 20):
            layout = image.plan([TensorSpec("model.frozen", "U8", (9000,)), TensorSpec("model.w", "U8", (50,))], 2, {})
            slot = memoryview(bytearray(layout.image_bytes))
            slot[: len(layout.header)] = layout.header
            for span in layout.spans[:-1]:
                slot[span.begin : span.end] = bytes([step if span.name == "model.w" else 7]) * (span.end - span.begin)
            image.write_values(slot, layout.values, b"{}")
            job.flush(Flush(CheckpointId(1, step), None, {0: 0}, {0: len(slot)}, {"loss": 0.25}), {0: slot})
    return tmp_path / "store"


@pytest.fixture
def ckptctl(store: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a verb on the store; return exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main([*arguments, "--store", str(store)])
        return (code, *capsys.readouterr())

    return run


Verb = Callable[..., tuple[int, str, str]]


def test_export(ckptctl: Verb, tmp_path: Path) -> None:
    """The newest or a chosen step is exported whole, references included, and what was written is said."""
    for step, arguments in ((20, ()), (10, ("10",))):
        code, out, _ = ckptctl("export", "gpt", *arguments, "--to", str(tmp_path / f"out-{step}"))
        assert code == 0
        assert f"exported step {step} of generation 1 to {tmp_path}/out-{step}" in out
        assert "model.safetensors" in out
        loaded = safetensors.numpy.load_file(tmp_path / f"out-{step}" / "model.safetensors")
        assert {name: tensor.tobytes() for name, tensor in loaded.items()} == {
            "frozen": b"\7" * 9000,
            "w": bytes([step]) * 50,
        }


def test_export_for_programs(ckptctl: Verb, tmp_path: Path) -> None:
    """With --json there is one object of a stable shape."""
    code, out, _ = ckptctl("export", "gpt", "--to", str(tmp_path / "out"), "--json")
    said: dict[str, Any] = json.loads(out)
    assert code == 0
    assert set(said) == {"generation", "step", "to", "files", "tensors", "size_bytes", "notes"}
    assert (said["step"], said["tensors"], said["files"]) == (20, 2, ["model.safetensors", "checkpoint.json"])


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["gpt", "--to", "store"], 2, "is there already"),
        (["gpt", "--to", "new", "--format", "pickle"], 2, "formats: safetensors"),
        (["gpt", "30", "--to", "new"], 3, "no checkpoint of step 30"),
    ],
)
def test_export_refuses_in_one_line(
    ckptctl: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, says: str
) -> None:
    """A folder in use, an unknown format and a missing step are each an error of one line and a hint."""
    monkeypatch.chdir(tmp_path)
    found, out, error = ckptctl("export", *arguments)
    assert (found, out) == (code, "")
    assert says in error
    assert len(error.splitlines()) == 2
    assert not (tmp_path / "new").exists()


def test_show_tells_state_from_what_was_written(ckptctl: Verb) -> None:
    """`show` says how large the state is, what was written for it, and how many tensors lie elsewhere."""
    _, out, _ = ckptctl("show", "gpt", "--tensors")
    assert "1 of them in files" in out
    assert "model.frozen" in out
    _, out, _ = ckptctl("show", "gpt", "--json")
    said = json.loads(out)
    assert said["format"] == 1
    assert said["referred_tensors"] == 1
    assert said["size_bytes"] == 8192 < said["state_bytes"]
