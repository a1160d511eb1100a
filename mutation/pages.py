"""A module under mutation: its text, its tree, and what each expression in it is."""

import ast
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from mutation.kinds import FunctionNode, Inference, Kind, Known, Shape, annotated

PACKAGE = "minirlhf"


class Page(NamedTuple):
    """kinds: of the expressions in functions; carries: those through which a gradient flows to a result."""

    module: ModuleType
    path: Path
    source: str
    tree: ast.Module
    parents: dict[ast.AST, ast.AST]
    kinds: dict[ast.expr, Shape]
    carries: set[ast.expr]
    known: dict[str, Known]

    def kind(self, node: ast.AST | None) -> Kind:
        shape = self.kinds.get(node, Kind.OTHER) if isinstance(node, ast.expr) else Kind.OTHER
        return shape if isinstance(shape, Kind) else Kind.OTHER

    def above(self, node: ast.AST) -> Iterator[ast.AST]:
        """The nodes around a node, from the inside out."""
        while node in self.parents:
            node = self.parents[node]
            yield node

    def statement(self, node: ast.AST) -> ast.stmt:
        """The innermost statement that holds a node, or is it."""
        return next(n for n in (node, *self.above(node)) if isinstance(n, ast.stmt))

    def outermost(self, node: ast.AST) -> ast.stmt:
        """The statement of the module that holds a node, or is it."""
        found = next(n for n in (node, *self.above(node)) if isinstance(self.parents.get(n), ast.Module))
        assert isinstance(found, ast.stmt)
        return found

    def place(self, node: ast.AST) -> str:
        """The function that holds a node, `Class.method` for a method; <module> outside of all."""
        named = [n.name for n in (node, *self.above(node)) if isinstance(n, FunctionNode | ast.ClassDef)]
        return ".".join(reversed(named)) or "<module>"


def read_page(name: str) -> Page:
    """The page of an importable module."""
    module = importlib.import_module(name)
    path = Path(module.__file__ or "")
    return page_of(module, path, path.read_text(encoding="utf-8"))


def page_of(module: ModuleType, path: Path, source: str) -> Page:
    """The page of a module with the given text."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    kinds: dict[ast.expr, Shape] = {}
    carries: set[ast.expr] = set()
    inferences, known = _inferences(tree)
    for inference in inferences.values():
        kinds |= inference.kinds
        carries |= inference.carries
    for node in ast.walk(tree):  # numbers in module constants and in defaults of classes
        if isinstance(node, ast.Constant) and node not in kinds and isinstance(node.value, int | float):
            kinds[node] = Kind.FLAG if isinstance(node.value, bool) else Kind.NUMBER
    return Page(module, path, source, tree, parents, kinds, carries, known)


def _inferences(tree: ast.Module) -> tuple[dict[str, Inference], dict[str, Known]]:
    """The inference of every function and method of a module, and what is known of all that it can call."""
    known: dict[str, Known] = {}
    constants: dict[str, Shape] = {}
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith(f"{PACKAGE}."):
            exported = _exported(statement.module or "")
            known |= {a.asname or a.name: exported.get(a.name, Known(Kind.OTHER)) for a in statement.names}
        elif isinstance(statement, ast.ClassDef):
            known[statement.name] = Known(Kind.OTHER)
        elif isinstance(statement, FunctionNode):
            known[statement.name] = Known(annotated(statement.returns))
        elif isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            number = isinstance(statement.value.value, int | float)
            constants |= {t.id: Kind.NUMBER for t in statement.targets if isinstance(t, ast.Name) and number}
    found: dict[str, Inference] = {}
    for _ in range(2):  # the second time with what the functions of the page were found to return
        for name, function in _functions(tree):
            found[name] = Inference(function, constants, known)
            tensors = "Tensor" in ast.unparse(function.returns or ast.Constant(0))
            signature = found[name].signature
            found_out = tensors and signature.returned != Kind.OTHER
            said = annotated(function.returns)
            known[name] = signature if found_out else signature._replace(returned=said)
    return found, known


@functools.cache
def _exported(name: str) -> dict[str, Known]:
    """What is known of the functions of another module of the package."""
    path = importlib.import_module(name).__file__ or ""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return _inferences(tree)[1]


def _functions(tree: ast.Module) -> Iterator[tuple[str, FunctionNode]]:
    for statement in tree.body:
        if isinstance(statement, FunctionNode):
            yield statement.name, statement
        elif isinstance(statement, ast.ClassDef):
            for inner in statement.body:
                if isinstance(inner, FunctionNode):
                    yield f"{statement.name}.{inner.name}", inner
