"""The source of the project, parsed once for all tests of its architecture."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = {
    "ckptd": ROOT / "ckptd",
    "ckptd_plugins": ROOT / "plugins/ckptd_plugins",
    "ckptd_integrations": ROOT / "integrations/ckptd_integrations",
}
OTHERS = ("tests", "examples")


@dataclass(frozen=True)
class Module:
    """One parsed module: its dotted name, where it is from the project's root, its text and tree."""

    name: str
    place: str
    text: str
    tree: ast.Module


def _module(path: Path, name: str) -> Module:
    text = path.read_text(encoding="utf-8")
    return Module(name, str(path.relative_to(ROOT)), text, ast.parse(text))


@pytest.fixture(scope="session")
def product() -> dict[str, Module]:
    """The modules that are installed, by dotted name."""
    found: dict[str, Module] = {}
    for folder in PRODUCT.values():
        for path in sorted(folder.rglob("*.py")):
            name = ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
            found[name] = _module(path, name)
    assert len(found) > 80, "the search for modules finds hardly any"
    return found


@pytest.fixture(scope="session")
def everything(product: dict[str, Module]) -> list[Module]:
    """The modules of the product, its tests and examples."""
    others = [path for folder in OTHERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [*product.values(), *(_module(path, str(path.relative_to(ROOT))) for path in others)]
