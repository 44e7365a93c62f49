"""`ckptctl import`: what is printed, what is committed, and how it fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from ckptd.cli.main import main

Verb = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ckptctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verb:
    """Run a verb in a folder of its own; return exit code, stdout and stderr."""
    monkeypatch.setenv("CKPTD_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main([*arguments, "--store", "runs"])
        return (code, *capsys.readouterr())

    return run


def test_import_says_what_it_made(ckptctl: Verb, tmp_path: Path) -> None:
    """The checkpoint is listed, intact and exported like any other, and what has to be attached is said."""
    safetensors.numpy.save_file({"w": np.arange(3.0)}, tmp_path / "model.safetensors")
    code, out, error = ckptctl("import", "model.safetensors", "--job", "new", "--step", "30")
    assert (code, error) == (0, "")
    assert "as step 30 of job new" in out
    assert "to be attached: model" in out
    assert ckptctl("verify", "new")[0] == 0
    _, out, _ = ckptctl("ls", "new", "--json")
    assert [(item["generation"], item["step"]) for item in json.loads(out)] == [(1, 30)]
    code, out, _ = ckptctl("import", "model.safetensors", "--job", "other", "--as", "net", "--json")
    assert code == 0
    said = json.loads(out)
    assert said.pop("size_bytes") > 0
    assert said == {"job": "other", "generation": 1, "step": 0, "states": ["net"], "tensors": 1, "notes": []}
    assert ckptctl("export", "new", "--to", "out", "--max-file", "0")[0] == 0
    assert safetensors.numpy.load_file(tmp_path / "out/model.safetensors")["w"].tolist() == [0, 1, 2]
    code, _, error = ckptctl("import", "model.safetensors", "--job", "new")
    assert code == 2
    assert "has checkpoints in" in error


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["gone.pt"], 3, "there is no"),
        (["empty"], 2, "formats: safetensors (a file of tensors for each state), dcp"),
        (["both"], 2, "may be safetensors or torch"),
        (["both", "--format", "tar"], 2, "formats: safetensors"),
        (["both", "--format", "torch"], 5, "is no file that torch can load"),
        (["both", "--as", "x", "--as", "y=z"], 2, "there can be no other"),
        (["both", "--as", "=z"], 2, "can't be used"),
        (["both", "--step", "x"], 2, "is no step"),
        (["both/x.safetensors"], 5, "is no safetensors file"),
        (["both", "--job", "a/b", "--format", "safetensors"], 2, "can't name a job"),
    ],
)
def test_imports_are_refused_in_one_line(
    ckptctl: Verb, tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    """What can't be imported is an error of one line and a hint, and leaves nothing in the store."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "both").mkdir()
    (tmp_path / "both/x.safetensors").write_bytes(b"")
    (tmp_path / "both/x.pt").write_bytes(b"")
    found, out, error = ckptctl("import", *arguments, *([] if "--job" in arguments else ["--job", "new"]))
    assert (found, out) == (code, "")
    assert says in error
    assert len(error.splitlines()) <= 2
    assert not list((tmp_path / "runs").glob("*"))
