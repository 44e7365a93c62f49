"""A launcher that learns from its ranks what else to preload."""

from __future__ import annotations

from pathlib import Path

from tests.end_to_end.harness import LIGHT, World
from tests.waiting import until


def test_ranks_of_a_restart_are_forked_with_what_the_first_ones_imported(light: World, tmp_path: Path) -> None:
    """A part of a preloaded package is imported by the ranks of the first generation, and by no rank after that."""
    package = tmp_path / "packages" / "lazy_package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "part.py").write_text("import os\n\nIMPORTED_BY = os.getpid()\n")
    paths = f"{package.parent}:{light.env.get('PYTHONPATH', '')}"
    options = ("--name", "train", "--preload", "ckptd,lazy_package")
    run = light.run("lazy.py", LIGHT, 400, 0.01, options=options, PYTHONPATH=paths)
    light.until_training("train", 5, committed=True)
    until(lambda: '"launcher learned"' in light.output(run), "a launcher that has learned")
    light.kill_rank("train", 0)
    output = light.finish(run)
    assert output.count("part was imported here") == 2, output
    assert output.count("part was imported before") == 2
