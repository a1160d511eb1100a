"""Small changes of syntax trees: each returns a new node and leaves the old one alone."""

import ast
from collections.abc import Sequence
from typing import Any, TypeVar

Node = TypeVar("Node", bound=ast.AST)


def changed(node: Node, **fields: Any) -> Node:
    """The node with some fields replaced; what is not replaced is shared."""
    kept = {name: value for name, value in ast.iter_fields(node) if name not in fields}
    return ast.copy_location(type(node)(**kept, **fields), node)


def constant(value: Any) -> ast.Constant:
    return ast.Constant(value)


def negative(node: ast.expr) -> ast.UnaryOp:
    return ast.UnaryOp(ast.USub(), node)


def method(node: ast.expr, name: str) -> ast.Call:
    """node.name()"""
    return ast.Call(ast.Attribute(node, name, ast.Load()), [], [])


def swapped(items: Sequence[Any], i: int, j: int) -> list[Any]:
    """The items with two of them exchanged."""
    result = list(items)
    result[i], result[j] = result[j], result[i]
    return result


def replaced(items: Sequence[Any], i: int, item: Any) -> list[Any]:
    """The items with another one at i."""
    return [*items[:i], item, *items[i + 1 :]]


def without(items: Sequence[Any], i: int) -> list[Any]:
    return [*items[:i], *items[i + 1 :]]


def renamed(call: ast.Call, name: str) -> ast.Call:
    """The call of a sibling: torch.f(x) → torch.name(x), x.f() → x.name(), f(x) → name(x)."""
    if isinstance(call.func, ast.Attribute):
        return changed(call, func=changed(call.func, attr=name))
    return changed(call, func=ast.Name(name, ast.Load()))
