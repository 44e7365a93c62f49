"""Who may import whom: DESIGN §4 as a table, and the code held against it."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Modules = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]

NOUNS = {"ckptd.types", "ckptd.errors", "ckptd.version"}
MAY_IMPORT: dict[str, set[str]] = {
    # the nouns
    "ckptd.version": set(),
    "ckptd.errors": set(),
    "ckptd.types": set(),
    # top-level helpers
    "ckptd.units": {"ckptd.errors"},
    "ckptd.log": {"ckptd.units"},
    "ckptd.journal": {"ckptd.errors", "ckptd.types"},
    "ckptd.places": {"ckptd.errors"},
    "ckptd.process_end": set(),
    "ckptd.store_config": {"ckptd.errors", "ckptd.units", "ckptd.places"},
    "ckptd.watch_config": {"ckptd.errors", "ckptd.units"},
    "ckptd.numbers_config": {"ckptd.errors", "ckptd.core.policy"},
    "ckptd.halt_config": {"ckptd.errors", "ckptd.units"},
    "ckptd.config": {
        "ckptd.errors",
        "ckptd.units",
        "ckptd.protocol.endpoint",
        "ckptd.storage.keys",
        "ckptd.places",
        "ckptd.store_config",
        "ckptd.watch_config",
        "ckptd.halt_config",
        "ckptd.numbers_config",
        "ckptd.core.policy",
    },
    "ckptd.tiers": {
        "ckptd.errors",
        "ckptd.core.policy",
        "ckptd.plugin",
        "ckptd.storage",
        "ckptd.places",
        "ckptd.store_config",
    },
    # the layers
    "ckptd.protocol": NOUNS,
    "ckptd.client": {*NOUNS, "ckptd.protocol", "ckptd.units", "ckptd.places"},
    "ckptd.launcher": {*NOUNS, "ckptd.protocol", "ckptd.units"},
    "ckptd.core": {"ckptd.types", "ckptd.errors"},
    "ckptd.storage": NOUNS,
    "ckptd.coordination": NOUNS,
    "ckptd.pruning": {*NOUNS, "ckptd.core.policy", "ckptd.storage"},
    "ckptd.plugin": {*NOUNS, "ckptd.storage"},
    "ckptd.testing": {*NOUNS, "ckptd.storage", "ckptd.plugin", "ckptd.coordination", "ckptd.client.framework"},
    "ckptd.daemon": {
        *NOUNS,
        "ckptd.units",
        "ckptd.log",
        "ckptd.journal",
        "ckptd.process_end",
        "ckptd.config",
        "ckptd.store_config",
        "ckptd.watch_config",
        "ckptd.halt_config",
        "ckptd.tiers",
        "ckptd.protocol",
        "ckptd.core",
        "ckptd.storage",
        "ckptd.pruning",
        "ckptd.coordination",
        "ckptd.plugin",
        "ckptd.launcher",
    },
    "ckptd.cli": {
        *NOUNS,
        "ckptd.units",
        "ckptd.log",
        "ckptd.journal",
        "ckptd.process_end",
        "ckptd.config",
        "ckptd.places",
        "ckptd.store_config",
        "ckptd.watch_config",
        "ckptd.numbers_config",
        "ckptd.halt_config",
        "ckptd.tiers",
        "ckptd.protocol",
        "ckptd.core",
        "ckptd.storage",
        "ckptd.pruning",
        "ckptd.plugin",
    },
    "ckptd.cli.run": {"ckptd.daemon"},
    # the public names, each loaded when it is asked for
    "ckptd": {"ckptd.version", "ckptd.errors", "ckptd.client"},
    # what a third party may use
    "ckptd_plugins": {
        "ckptd.plugin",
        "ckptd.types",
        "ckptd.errors",
        "ckptd.storage",
        "ckptd.client.framework",
        "ckptd.testing",
        "ckptd.units",
        "ckptd.places",
    },
    "ckptd_integrations": {
        "ckptd.plugin",
        "ckptd.types",
        "ckptd.errors",
        "ckptd.storage",
        "ckptd.client.framework",
        "ckptd.testing",
        "ckptd.units",
    },
}
"""Each layer, and what of ours it may import besides itself. The longest name that fits a module is its layer; a module
that has an entry of its own may do what its package may, and that."""

THIRD_PARTY: dict[str, set[str]] = {
    "ckptd.storage": {"xxhash"},
    "ckptd.log": {"structlog"},
    "ckptd.plugin": {"pluggy"},
    "ckptd.cli": {"rich"},
    "ckptd_integrations.torch": {"torch", "numpy"},
    "ckptd_plugins.storage_s3": {"s3fs", "botocore"},
    "ckptd_plugins.storage_obstore": {"obstore", "botocore"},
    "ckptd_plugins.storage_fsspec": {"fsspec"},
    "ckptd_plugins.check_gpu": {"pynvml"},
}
"""Which layers need something that is not in the standard library; all others need nothing."""

BANNED_IN_CORE = {
    "time",
    "random",
    "os",
    "socket",
    "threading",
    "logging",
    "asyncio",
    "datetime",
    "secrets",
    "uuid",
    "subprocess",
    "pathlib",
    "io",
    "sys",
    "sqlite3",
    "concurrent",
    "multiprocessing",
    "select",
    "tempfile",
    "shutil",
    "structlog",
}
"""Clocks, randomness and the outside world: they reach `core` in events."""
_UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
_BUILTINS_BANNED_IN_CORE = {"open", "print", "input", "exec", "eval", "__import__"}


def imports(module: Any, known: Modules, *, at_load: bool = False) -> Iterator[tuple[str, int]]:
    """The full names that a module imports, with their lines; `at_load` leaves out what happens later or never."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if at_load and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if at_load and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            yield child
            yield from walk(child)

    for node in walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.place}:{node.lineno}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in known else str(node.module)), node.lineno


def fits(name: str, layers: set[str] | dict[str, Any]) -> list[str]:
    """The entries that a module's name lies in, the longest first."""
    return sorted((layer for layer in layers if name == layer or name.startswith(f"{layer}.")), key=len, reverse=True)


def test_every_module_has_a_layer(product: Modules) -> None:
    """A new package must get its place in the table before it can be used."""
    assert not [name for name in product if fits(name, MAY_IMPORT)[:1] in ([], ["ckptd"]) and name != "ckptd"]
    real = {layer for name in product for layer in fits(name, MAY_IMPORT)}
    assert real == set(MAY_IMPORT), f"in the table, but not in the project: {sorted(set(MAY_IMPORT) - real)}"


def test_layers(product: Modules) -> None:
    """No module imports anything of ours that its layer may not."""
    wrong: list[str] = []
    for name, module in product.items():
        layers = [layer for layer in fits(name, MAY_IMPORT) if layer != "ckptd" or name == "ckptd"]
        allowed = {*layers, *(target for layer in layers for target in MAY_IMPORT[layer])}
        for target, line in imports(module, product):
            if target.partition(".")[0] not in ("ckptd", "ckptd_plugins", "ckptd_integrations"):
                continue
            if not (fits(target, allowed - {"ckptd"}) or target == name):
                wrong.append(f"{module.place}:{line}: {name} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_the_daemon(product: Modules) -> None:
    """The daemon is the outermost shell: only itself and `ckptctl run`, which embeds it, import it."""
    users = {
        name
        for name, module in product.items()
        for target, _ in imports(module, product)
        if fits(target, {"ckptd.daemon"})
    }
    assert {user for user in users if not fits(user, {"ckptd.daemon"})} <= {"ckptd.cli.run"}


def test_third_parties(product: Modules) -> None:
    """What is not in the standard library is imported only where the table says so: the training side needs nothing."""
    wrong: list[str] = []
    for name, module in product.items():
        allowed = {package for layer in fits(name, THIRD_PARTY) for package in THIRD_PARTY[layer]}
        for target, line in imports(module, product):
            top = target.partition(".")[0]
            ours = top in ("ckptd", "ckptd_plugins", "ckptd_integrations")
            if not ours and top not in sys.stdlib_module_names and top not in allowed:
                wrong.append(f"{module.place}:{line}: {name} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_core_is_pure(product: Modules) -> None:
    """`core` knows no clock, no randomness and no outside world: the same inputs give the same decisions anywhere."""
    wrong: list[str] = []
    for name, module in product.items():
        if not fits(name, {"ckptd.core"}):
            continue
        wrong += [
            f"{module.place}:{line}: {target}"
            for target, line in imports(module, product)
            if target.partition(".")[0] in BANNED_IN_CORE
        ]
        wrong += [
            f"{module.place}:{node.lineno}: {node.func.id}()"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in _BUILTINS_BANNED_IN_CORE
        ]
    assert not wrong, "\n".join(wrong)


def test_no_pickle(product: Modules) -> None:
    """No byte that was stored or sent can run code: the product has no way to unpickle anything by itself.

    The name of the exception is allowed: `torch.load(weights_only=True)` raises it for what it refuses to load.
    """
    wrong = [
        f"{module.place}:{node.lineno}: {ast.unparse(node)}"
        for module in product.values()
        for node in ast.walk(module.tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and ast.unparse(node) != "from pickle import UnpicklingError"
        and {str(getattr(node, "module", "")), *(alias.name for alias in node.names)} & _UNPICKLERS
    ]
    assert not wrong, "\n".join(wrong)


def test_no_shared_memory_of_multiprocessing(product: Modules) -> None:
    """`multiprocessing.shared_memory` destroys segments that others still use; memory here is memfd."""
    used = [
        f"{m.place}:{line}"
        for m in product.values()
        for target, line in imports(m, product)
        if "shared_memory" in target
    ]
    assert not used


def test_no_import_cycles(product: Modules) -> None:
    """Modules can be loaded in an order in which each finds what it imports complete."""
    graph = {
        name: {target for target, _ in imports(module, product, at_load=True) if target in product and target != name}
        for name, module in product.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path[path.index(name) :], name))
        if name in done:
            return
        for target in sorted(graph[name]):
            visit(target, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())
    assert done == set(product)


def test_first_party_plugins_use_the_public_door(product: Modules) -> None:
    """What ships with ckptd is registered under the entry point group that is anyone's, and in no other way."""
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["ckptd"]
    assert set(entries.values()) <= set(product)
    registering = {
        name
        for name, module in product.items()
        if any(
            isinstance(node, ast.FunctionDef) and any(ast.unparse(item) == "hookimpl" for item in node.decorator_list)
            for node in ast.walk(module.tree)
        )
    }
    assert registering == set(entries.values())
