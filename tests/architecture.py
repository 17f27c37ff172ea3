"""What a Python package imports, read from its source without importing it.

`read_package` turns a folder into `Module`s; the rules over them are in `test_architecture.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Import", "Module", "cycle", "module_called", "read_package"]


@dataclass(frozen=True)
class Import:
    """One imported name: `from a.b import c` is the target `a.b.c`, whether `c` is a module or not."""

    target: str
    line: int
    in_function: bool = False
    typing_only: bool = False

    def reaches(self, module: str) -> bool:
        """Whether this imports `module` or something inside it."""
        return f"{self.target}.".startswith(f"{module}.")


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module
    imports: tuple[Import, ...]

    def calls(self, *functions: str) -> Iterator[ast.Call]:
        """The calls of any of these functions by their bare name."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
                yield node


def read_package(folder: Path) -> dict[str, Module]:
    """Every module below a package's folder, by its dotted name."""
    paths = sorted(folder.rglob("*.py"))
    return {module.name: module for module in (read_module(path, folder.parent) for path in paths)}


def read_module(path: Path, root: Path) -> Module:
    parts = path.relative_to(root).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    name = ".".join(parts[:-1] if is_package else parts)
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    reader = ImportReader(name if is_package else name.rpartition(".")[0])
    reader.visit(tree)
    return Module(name, path, tree, tuple(reader.imports))


class ImportReader(ast.NodeVisitor):
    """Collects the imports of a module, those by `importlib.import_module("...")` included."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.imports: list[Import] = []
        self.in_function = False
        self.typing_only = False

    def add(self, target: str, node: ast.AST) -> None:
        line = getattr(node, "lineno", 0)
        self.imports.append(Import(target, line, self.in_function, self.typing_only))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = [self.package.rsplit(".", node.level - 1)[0]] if node.level else []
        source = ".".join(base + ([node.module] if node.module else []))
        for alias in node.names:
            self.add(source if alias.name == "*" else f"{source}.{alias.name}", node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function in ("import_module", "__import__") and node.args:
            # a computed name could be anything; no rule here allows one, so it is recorded as just that
            name = node.args[0]
            self.add(str(name.value) if isinstance(name, ast.Constant) else "<computed>", node)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)
            return
        self.typing_only, before = True, self.typing_only
        for statement in node.body:
            self.visit(statement)
        self.typing_only = before
        for statement in node.orelse:
            self.visit(statement)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        self.in_function, before = True, self.in_function
        self.generic_visit(node)
        self.in_function = before

    visit_AsyncFunctionDef = visit_FunctionDef
    visit_Lambda = visit_FunctionDef


def module_called(target: str, names: Collection[str]) -> str | None:
    """The module that an import of `target` loads: `a.b.c` is `a.b` where `c` is a name inside it."""
    while target and target not in names:
        target = target.rpartition(".")[0]
    return target or None


def cycle(modules: Mapping[str, Module]) -> list[str]:
    """One cycle of imports as a path that ends where it starts, or an empty list.

    Imports inside functions count: they hide a cycle, they do not undo it. Imports for type checkers do not:
    two types may well mention each other.
    """
    finished: set[str] = set()
    path: list[str] = []

    def search(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return []
        path.append(name)
        for target in sorted(imported_modules(modules[name], modules)):
            if found := search(target):
                return found
        finished.add(path.pop())
        return []

    return next((found for name in modules if (found := search(name))), [])


def imported_modules(module: Module, modules: Mapping[str, Module]) -> set[str]:
    targets = (module_called(found.target, modules) for found in module.imports if not found.typing_only)
    return {target for target in targets if target and target != module.name}
