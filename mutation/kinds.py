"""What each expression of a page is: a tensor with a gradient, a mask, a number. The operators go by it.

Kinds come from the annotations, from the shapes that the docstrings name (`mask: [B, T] bool`), and from
propagation through one function at a time. A wrong guess costs a mutant that is equivalent or missing; it
never makes a mutant that is silently right.
"""

import ast
import enum
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Kind(enum.IntEnum):
    """Ordered: an operation on two kinds has the larger one."""

    OTHER = 0
    FLAG = 1  # a Python bool
    NUMBER = 2  # a Python number
    SCALAR = 3  # a number or a tensor []
    MASK = 4  # a bool tensor
    INDEX = 5  # an integer tensor
    FIXED = 6  # a floating-point tensor without a gradient
    FLOAT = 7  # a floating-point tensor


Shape = Kind | tuple[Kind, ...]
"""What an expression is, or each element of a tuple."""

TO_MASK = {"isfinite", "isnan", "isinf", "any", "all", "bool", "logical_and", "logical_or", "logical_not"}
TO_INDEX = {"argmax", "argmin", "argsort", "nonzero", "long", "int", "searchsorted", "arange", "bincount"}
TO_FIXED = {
    "detach",
    "ones_like",
    "zeros_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "zeros",
    "ones",
    "full",
}
TO_FIXED |= {
    "new_full",
    "new_tensor",
    "new_empty",
    "rand",
    "randn",
    "rand_like",
    "randn_like",
    "eye",
    "tensor",
}
TO_NUMBER = {"size", "numel", "dim", "item", "len", "int", "float", "abs", "sum", "max", "min", "range"}
TO_FLAG = {"isinstance", "is_floating_point", "any", "all", "bool", "hasattr"}
COUNTS = {"sum", "cumsum"}
SIZES = {"ndim", "inf", "nan", "pi", "tiny", "eps"}
NO_TENSOR = {"shape", "dtype", "device", *SIZES}
# Methods and functions through whose arguments no gradient flows.
FLAT = {"detach", "sign", *TO_MASK, *TO_INDEX, *TO_FIXED}
MASK_NAMES = {"mask", "kept"}
INDEX_NAMES = {"token", "tokens", "ids"}

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Known(NamedTuple):
    """A function that a page can call.

    returned: its kind; carrying: the parameters from which a gradient flows to it; reading: those of which
    more than shape and type is looked at. None where that is not known.
    """

    returned: Shape
    parameters: tuple[str, ...] = ()
    carrying: frozenset[str] | None = None
    reading: frozenset[str] | None = None

    def passes(self, names: frozenset[str] | None, call: ast.Call) -> Iterator[ast.expr]:
        """The arguments of a call that go to one of the named parameters; all where these are not known."""
        for i, argument in enumerate(call.args):
            if names is None or i >= len(self.parameters) or self.parameters[i] in names:
                yield argument
        for keyword in call.keywords:
            if names is None or keyword.arg not in self.parameters or keyword.arg in names:
                yield keyword.value


ANY = Known(Kind.OTHER)
"""A function of which nothing is known."""


def called_name(call: ast.Call) -> str:
    """`f` of f(x), torch.f(x) and x.f()."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def receiver(call: ast.Call) -> ast.expr | None:
    """x of x.f(), None for f(x), torch.f(x) and F.f(x)."""
    if not isinstance(call.func, ast.Attribute):
        return None
    base = call.func.value
    return None if isinstance(base, ast.Name) and base.id in ("torch", "F", "math") else base


def annotated(
    annotation: ast.expr | None, name: str = "", doc: str = "", before: Shape = Kind.OTHER
) -> Shape:
    """The kind that an annotation names; for a tensor, refined by its line in the docstring.

    before: the kind of the parameter before it, which is what a line with "likewise" means.
    """
    if annotation is None:
        return Kind.OTHER
    text = ast.unparse(annotation).removesuffix(" | None")
    if text.startswith("tuple[") and isinstance(annotation, ast.Subscript):
        parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        kinds = [annotated(part) for part in parts]
        return tuple(kind if isinstance(kind, Kind) else Kind.OTHER for kind in kinds)
    if text == "Tensor":
        return _tensor(name, doc, before)
    plain = {"Scalar": Kind.SCALAR, "bool": Kind.FLAG, "int": Kind.NUMBER, "float": Kind.NUMBER}
    return Kind.FLOAT if text == "list[Tensor]" else plain.get(text, Kind.OTHER)


def _tensor(name: str, doc: str, before: Shape) -> Kind:
    line = re.search(rf"^\s*{re.escape(name)}: (.*)$", doc, re.MULTILINE) if name else None
    said = line[1] if line else ""
    if name in MASK_NAMES or re.search(r"\bbool\b", said):
        return Kind.MASK
    if (
        name in INDEX_NAMES
        or name.endswith(("_length", "_lengths", "_index"))
        or re.search(r"\bids\b|\bint64\b|any number type|\blengths?\b", said)
    ):
        return Kind.INDEX
    return Kind.INDEX if "likewise" in said and before == Kind.INDEX else Kind.FLOAT


class Inference:
    """The kinds of all expressions in one function, and which of them carry a gradient to what it returns."""

    def __init__(
        self, function: FunctionNode, globals_: Mapping[str, Shape], known: Mapping[str, Known]
    ) -> None:
        self.kinds: dict[ast.expr, Shape] = {}
        self.carries: set[ast.expr] = set()
        self.returned: Shape = Kind.OTHER
        self._known = known
        self._names: dict[str, Shape] = dict(globals_)
        self._function(function)
        arguments = function.args
        parameters = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        carrying, reading = frozenset(self._gradients(function)), frozenset(self._read(function))
        self.signature = Known(self.returned, tuple(parameters), carrying, reading)

    def kind(self, node: ast.AST) -> Kind:
        shape = self.kinds.get(node, Kind.OTHER) if isinstance(node, ast.expr) else Kind.OTHER
        return shape if isinstance(shape, Kind) else Kind.OTHER

    def _function(self, function: FunctionNode) -> None:
        doc = ast.get_docstring(function, clean=False) or ""
        arguments = function.args
        before: Shape = Kind.OTHER
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            before = annotated(argument.annotation, argument.arg, doc, before)
            self._names[argument.arg] = before
        for default in [*arguments.defaults, *arguments.kw_defaults]:
            if default is not None:
                self._infer(default)
        self._block(function.body)

    def _block(self, body: list[ast.stmt]) -> None:
        for statement in body:
            if isinstance(statement, FunctionNode):
                outer = self.returned
                self._function(statement)
                self.returned = outer
                continue
            for expression in _own_expressions(statement):
                self._infer(expression)
            if isinstance(statement, ast.Assign):
                for target in statement.targets:
                    self._bind(target, self.kinds.get(statement.value, Kind.OTHER))
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                self._names[statement.target.id] = annotated(statement.annotation, statement.target.id)
            elif isinstance(statement, ast.For):
                self._bind(statement.target, self.kinds.get(statement.iter, Kind.OTHER))
            elif isinstance(statement, ast.Return) and statement.value is not None:
                self.returned = _larger(self.returned, self.kinds[statement.value])
            for inner in _blocks(statement):
                self._block(inner)

    def _bind(self, target: ast.expr, shape: Shape) -> None:
        self.kinds[target] = shape
        if isinstance(target, ast.Name):
            self._names[target.id] = shape
        elif isinstance(target, ast.Tuple | ast.List):
            parts = shape if isinstance(shape, tuple) else (shape,) * len(target.elts)
            for element, part in zip(target.elts, parts, strict=False):
                self._bind(element, part)

    def _infer(self, node: ast.expr) -> Kind:
        shape = self._shape(node)
        self.kinds[node] = shape
        return shape if isinstance(shape, Kind) else max(shape, default=Kind.OTHER)

    def _shape(self, node: ast.expr) -> Shape:
        inner = {
            child: self._infer(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)
        }
        match node:
            case ast.Constant(value=bool()):
                return Kind.FLAG
            case ast.Constant(value=int() | float()):
                return Kind.NUMBER
            case ast.Name():
                return self._names.get(node.id, Kind.OTHER)
            case ast.Attribute():
                return Kind.NUMBER if node.attr in SIZES else self._attribute(node, inner[node.value])
            case ast.UnaryOp(op=ast.Not()) | ast.BoolOp():
                return Kind.FLAG
            case ast.UnaryOp():
                return inner[node.operand]
            case ast.BinOp():
                kind = max(inner[node.left], inner[node.right])
                counts = kind == Kind.INDEX and isinstance(node.op, ast.Div)
                return Kind.FIXED if counts else kind
            case ast.Compare(ops=[ast.Is() | ast.IsNot() | ast.In() | ast.NotIn(), *_]):
                return Kind.FLAG
            case ast.Compare():
                return Kind.MASK if max(inner.values()) > Kind.SCALAR else Kind.FLAG
            case ast.IfExp():
                return max(inner[node.body], inner[node.orelse])
            case ast.Subscript():
                sizes = isinstance(node.value, ast.Attribute) and node.value.attr == "shape"
                return Kind.NUMBER if sizes else inner[node.value]
            case ast.Tuple() | ast.List():
                return tuple(inner[element] for element in node.elts)
            case ast.Call():
                return self._call(node, inner)
        return Kind.OTHER

    def _attribute(self, node: ast.Attribute, base: Kind) -> Kind:
        if node.attr in NO_TENSOR:
            return Kind.OTHER
        return Kind.INDEX if node.attr == "indices" else base

    def _call(self, node: ast.Call, inner: Mapping[ast.expr, Kind]) -> Shape:
        name, base = called_name(node), receiver(node)
        given = [self._infer(argument.value) for argument in node.keywords]
        given += [inner[argument] for argument in node.args]
        if isinstance(node.func, ast.Name) and name in self._known:
            return self._known[name].returned
        operand = inner[node.func] if base is not None else max(given, default=Kind.OTHER)
        tensors = operand > Kind.SCALAR or isinstance(node.func, ast.Attribute)
        if not tensors:
            return Kind.FLAG if name in TO_FLAG else Kind.NUMBER if name in TO_NUMBER else Kind.OTHER
        if name in TO_FIXED:
            return Kind.INDEX if operand == Kind.INDEX else Kind.FIXED
        if name in TO_MASK | TO_INDEX:
            return Kind.MASK if name in TO_MASK else Kind.INDEX
        if name in {"size", "numel", "dim", "item"}:
            return Kind.NUMBER
        if name == "where":  # the condition chooses, it is not what comes out
            kind = max((inner[branch] for branch in node.args[1:]), default=Kind.OTHER)
            return kind if kind > Kind.SCALAR else Kind.FIXED
        if name in COUNTS and operand == Kind.MASK:
            return Kind.INDEX
        if name in {"float", "double"}:
            return max(operand, Kind.FIXED)
        return operand if name in {"gather", "index_select", "topk"} else max([operand, *given])

    def _gradients(self, function: FunctionNode) -> set[str]:
        """Marks what a gradient flows through, from what is returned backwards; returns the names in it."""
        names: set[str] = set()
        while True:
            before = len(names)
            for statement in _statements(function.body):
                if isinstance(statement, ast.Return) and statement.value is not None:
                    self._carry(statement.value, names)
                elif isinstance(statement, ast.Assign | ast.AugAssign):
                    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                    if names & {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}:
                        self._carry(statement.value, names)
            if len(names) == before:
                return names

    def _carry(self, node: ast.expr, names: set[str]) -> None:
        if isinstance(node, ast.Compare) or Kind.OTHER < self.kind(node) < Kind.FLOAT:
            return
        if isinstance(node, ast.Attribute) and node.attr in NO_TENSOR:
            return
        if self.kind(node) == Kind.FLOAT:
            self.carries.add(node)
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Subscript):
            self._carry(node.value, names)
        elif isinstance(node, ast.IfExp):
            self._carry(node.body, names)
            self._carry(node.orelse, names)
        elif isinstance(node, ast.Call) and called_name(node) in FLAT:
            return
        elif isinstance(node, ast.Call):
            for part in self._carrying_parts(node):
                self._carry(part, names)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self._carry(child, names)

    def _carrying_parts(self, call: ast.Call) -> Iterator[ast.expr]:
        """The parts of a call from which a gradient flows to its result."""
        yield call.func
        known = self._known.get(call.func.id, ANY) if isinstance(call.func, ast.Name) else ANY
        parts = list(known.passes(known.carrying, call))
        yield from parts[1:] if called_name(call) == "where" else parts

    def _read(self, function: FunctionNode) -> Iterator[str]:
        """The names of which a function looks at the value."""
        shapes = {
            id(n.value) for n in ast.walk(function) if isinstance(n, ast.Attribute) and n.attr in NO_TENSOR
        }
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                known = self._known.get(call.func.id, ANY)
                given = [*call.args, *(keyword.value for keyword in call.keywords)]
                read = {id(argument) for argument in known.passes(known.reading, call)}
                shapes |= {id(argument) for argument in given if id(argument) not in read}
        for name in ast.walk(function):
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load) and id(name) not in shapes:
                yield name.id


def _larger(one: Shape, other: Shape) -> Shape:
    if isinstance(one, Kind) and isinstance(other, Kind):
        return max(one, other)
    return other if isinstance(other, tuple) else one


def _blocks(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        yield getattr(statement, name, [])


def _own_expressions(statement: ast.stmt) -> Iterator[ast.expr]:
    """The expressions of a statement that do not belong to a statement inside it."""
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, ast.expr):
            yield child


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        for inner in _blocks(statement):
            yield from _statements(inner)
