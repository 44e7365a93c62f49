"""House rules that a reader relies on: small modules and functions, no broad excepts, documented names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

MODULE_LINES = 400
FUNCTION_LINES = 70
BROAD_EXCEPT_ALLOWED = {"ckptd/client/guard.py", "ckptd/plugin/manager.py"}
"""The two places where foreign or user code must not bring down what surrounds it."""
_BROAD = {"Exception", "BaseException"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def test_modules_are_small(everything: list[Any]) -> None:
    """No module is longer than 400 lines: what does not fit is two things."""
    long = {module.place: len(module.text.splitlines()) for module in everything}
    assert not {place: lines for place, lines in long.items() if lines > MODULE_LINES}


def test_functions_are_small(everything: list[Any]) -> None:
    """No function is longer than 70 lines."""
    long = {
        f"{module.place}:{node.lineno} {node.name}": lines
        for module in everything
        for node in ast.walk(module.tree)
        if isinstance(node, _Function) and (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES
    }
    assert not long


def _caught(handler: ast.ExceptHandler) -> set[str]:
    if handler.type is None:
        return {"BaseException"}
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {ast.unparse(kind).rpartition(".")[2] for kind in kinds}


def _raises_again(handler: ast.ExceptHandler) -> bool:
    """Whether every way through the handler that the eye can follow ends in a bare `raise`."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def _broad_excepts(module: Any) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.ExceptHandler) or not _caught(node) & _BROAD:
            continue
        if "BaseException" in _caught(node) and node.type is not None and _raises_again(node):
            continue  # cleaning up on the way out
        yield f"{module.place}:{node.lineno}: except {', '.join(sorted(_caught(node)))}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            if {ast.unparse(argument) for argument in node.args} & _BROAD:
                yield f"{module.place}:{node.lineno}: {ast.unparse(node)}"


def test_no_broad_excepts(product: dict[str, Any]) -> None:
    """Errors are caught by type. A handler of everything is allowed in two places, and where it raises again."""
    wrong = [
        found
        for module in product.values()
        if module.place not in BROAD_EXCEPT_ALLOWED
        for found in _broad_excepts(module)
    ]
    assert not wrong, "\n".join(wrong)


def _public(tree: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """The public classes, functions and methods below a module or a public class."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            if any(ast.unparse(item).rpartition(".")[2] in ("overload", "setter") for item in node.decorator_list):
                continue
            yield f"{name}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from _public(node, f"{name}.{node.name}")
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _public(node, name)


def test_public_names_are_documented(product: dict[str, Any]) -> None:
    """Every public module, class, function and method says in its docstring what it is for."""
    silent = [name for name, module in product.items() if not ast.get_docstring(module.tree)]
    silent += [
        name
        for module_name, module in product.items()
        for name, node in _public(module.tree, module_name)
        if not ast.get_docstring(node)  # type: ignore[arg-type]
    ]
    assert not silent, "\n".join(silent)


def test_every_test_says_what_it_proves(everything: list[Any]) -> None:
    """Every test has a docstring."""
    silent = [
        f"{module.place}:{node.lineno} {node.name}"
        for module in everything
        if module.place.startswith(("tests/", "ckptd/testing/"))
        for node in ast.walk(module.tree)
        if isinstance(node, _Function) and node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert not silent, "\n".join(silent)


def test_no_plain_assert_in_the_product(product: dict[str, Any]) -> None:
    """The product uses `invariant()`, which stays under `python -O`.

    Allowed are `assert x is not None`, which tells a type checker what the next line would crash on anyway, and the
    suites for plugin authors.
    """
    found = [
        f"{module.place}:{node.lineno}"
        for module in product.values()
        if not module.place.startswith("ckptd/testing/")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Assert) and not ast.unparse(node.test).endswith("is not None")
    ]
    assert not found
