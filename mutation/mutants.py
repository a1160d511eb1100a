"""The mutants of a page: every operator at every node, less what compiles to the same code."""

import ast
import marshal
import types
from collections.abc import Iterator
from typing import NamedTuple

from mutation.edits import changed
from mutation.field_operators import FIELD
from mutation.kinds import FunctionNode
from mutation.operators import GENERAL
from mutation.pages import Page, read_page

OPERATORS = {**FIELD, **GENERAL}


class Mutant(NamedTuple):
    """One wrong variant of one module.

    function: where it is, `Class.method` for methods, <module> outside; line: where the change is; lines:
    first and last of its statement (of the head, for an `if`), of which a test must run one to see it;
    before, after: the changed line, on one line; code: the compiled outermost statement, to be put into the
    living module.
    """

    module: str
    function: str
    operator: str
    line: int
    lines: tuple[int, int]
    before: str
    after: str
    code: types.CodeType

    @property
    def place(self) -> str:
        return f"{self.module.replace('.', '/')}.py:{self.line}"


def mutants_of(name: str) -> list[Mutant]:
    """All mutants of an importable module."""
    return list(page_mutants(read_page(name)))


def page_mutants(page: Page) -> Iterator[Mutant]:
    """All mutants of a page, each once: two that compile to the same code are one."""
    seen: dict[ast.stmt, set[bytes]] = {}
    for node in _mutable(page):
        outer = page.outermost(node)
        known = seen.setdefault(outer, {_fingerprint(_compiled(outer, page))})
        for operator, apply in OPERATORS.items():
            for replacement in apply(node, page):
                code = _compiled_with(node, replacement, outer, page)
                fingerprint = _fingerprint(code)
                if fingerprint not in known:
                    known.add(fingerprint)
                    yield _mutant(node, replacement, operator, code, page)


def _mutable(page: Page) -> Iterator[ast.AST]:
    """The nodes that operators see: no docstring, annotation, error message, decorator, field or device."""
    pending: list[ast.AST] = [page.tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.stmt | ast.expr):
            yield node
        pending += reversed([child for child in _children(node) if not _untouched(child)])


def _children(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, FunctionNode):
        yield from [d for d in (*node.args.defaults, *node.args.kw_defaults) if d is not None]
        yield from node.body
    elif isinstance(node, ast.ClassDef):
        yield from (inner for inner in node.body if isinstance(inner, FunctionNode))
    elif isinstance(node, ast.AnnAssign):
        yield from () if node.value is None else (node.value,)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
        yield node.args[0]
    else:
        yield from ast.iter_child_nodes(node)


def _untouched(node: ast.AST) -> bool:
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    device = isinstance(node, ast.keyword) and node.arg == "device"
    return (
        text
        or device
        or isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert)
    )


def _compiled(outer: ast.stmt, page: Page) -> types.CodeType:
    return compile(ast.Module([outer], []), str(page.path), "exec", dont_inherit=True)


def _compiled_with(node: ast.AST, replacement: ast.AST, outer: ast.stmt, page: Page) -> types.CodeType:
    """The outermost statement with one node replaced: the nodes on the way are copied, none is changed."""
    for missing in ast.walk(replacement):
        if isinstance(missing, ast.expr | ast.stmt) and not hasattr(missing, "lineno"):
            ast.copy_location(missing, node)
    current, new = node, replacement
    while current is not outer:
        parent = page.parents[current]
        new = changed(parent, **_field_with(parent, current, new))
        current = parent
    assert isinstance(new, ast.stmt)
    return _compiled(new, page)


def _field_with(parent: ast.AST, child: ast.AST, new: ast.AST) -> dict[str, object]:
    for name, value in ast.iter_fields(parent):
        if value is child:
            return {name: new}
        if isinstance(value, list) and any(item is child for item in value):
            return {name: [new if item is child else item for item in value]}
    raise LookupError(f"{ast.dump(child)} is no child of its parent")


def _fingerprint(code: types.CodeType) -> bytes:
    """Equal for code that does the same, wherever its lines stand."""
    return marshal.dumps(_without_lines(code))


def _without_lines(code: types.CodeType) -> types.CodeType:
    constants = tuple(_without_lines(c) if isinstance(c, types.CodeType) else c for c in code.co_consts)
    return code.replace(co_consts=constants, co_firstlineno=0, co_linetable=b"", co_filename="")


def _mutant(node: ast.AST, replacement: ast.AST, operator: str, code: types.CodeType, page: Page) -> Mutant:
    statement = page.statement(node)
    inside_default = isinstance(statement, FunctionNode | ast.ClassDef)
    body = getattr(statement, "body", None)
    last = statement.end_lineno or statement.lineno
    if body and not inside_default:
        last = max(body[0].lineno - 1, statement.lineno)
    before, after = _lines(node, replacement, page)
    return Mutant(
        page.module.__name__,
        page.place(node),
        "default" if inside_default else operator,
        getattr(node, "lineno", statement.lineno),
        (statement.lineno, last),
        before,
        after,
        code,
    )


def _lines(node: ast.AST, replacement: ast.AST, page: Page) -> tuple[str, str]:
    """The source lines that hold a node, and the same with its replacement, each as one line."""
    first, last = _span(node)
    lines = page.source.encode().splitlines()[first[0] - 1 : last[0]]
    if isinstance(node, ast.If):  # its head alone
        lines, last = lines[:1], (first[0], len(lines[0]))
    head, tail = lines[0][: first[1]], lines[-1][last[1] :]
    before, after = b" ".join(lines).decode(), head.decode() + _text(node, replacement) + tail.decode()
    return " ".join(before.split()), " ".join(after.split())


def _span(node: ast.AST) -> tuple[tuple[int, int], tuple[int, int]]:
    if not isinstance(node, ast.stmt | ast.expr):
        raise TypeError(f"{type(node).__name__} has no place in the text")
    return (node.lineno, node.col_offset), (node.end_lineno or node.lineno, node.end_col_offset or 0)


def _text(node: ast.AST, replacement: ast.AST) -> str:
    if isinstance(node, ast.If) and isinstance(replacement, ast.If):
        return f"if {ast.unparse(replacement.test)}:"
    text = ast.unparse(replacement)
    loose = ast.BinOp | ast.BoolOp | ast.Compare | ast.IfExp | ast.UnaryOp
    return f"({text})" if isinstance(replacement, loose) and not isinstance(node, loose | ast.stmt) else text
