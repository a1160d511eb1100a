"""The mutation operators of this field: masks, reductions, gradients, axes, clips, logarithms.

Each is a kind of bug that implementations of RLHF have had. The kinds of the operands decide where an
operator applies, so that no sum of a mask becomes a mean and nothing without a gradient is detached.
"""

import ast
from collections.abc import Iterator

from mutation.edits import changed, constant, method, negative, renamed, replaced, without
from mutation.kinds import ANY, Kind, called_name, receiver
from mutation.operators import Operator, is_axis, is_check
from mutation.pages import Page

EXTREMA = {
    "maximum": "minimum",
    "amax": "amin",
    "max": "min",
    "argmax": "argmin",
    "fmax": "fmin",
    "cummax": "cummin",
}
EXTREMA |= {other: one for one, other in EXTREMA.items()}

REDUCTIONS = {"sum": "mean", "mean": "sum"}
NAMED_REDUCTIONS = {"token_sum": "token_mean", "sequence_sum": "sequence_mean"}
NAMED_REDUCTIONS |= {other: one for one, other in NAMED_REDUCTIONS.items()}

FUNCTIONS = {
    "exp": ("expm1",),
    "expm1": ("exp",),
    "log": ("log1p",),
    "log1p": ("log",),
    "logsigmoid": ("softplus", "sigmoid"),
    "softplus": ("logsigmoid",),
    "sigmoid": ("logsigmoid",),
    "log_softmax": ("softmax",),
    "softmax": ("log_softmax",),
    "square": ("abs",),
    "abs": ("square",),
    "sqrt": ("rsqrt",),
    "rsqrt": ("sqrt", "reciprocal"),
    "ones_like": ("zeros_like",),
    "zeros_like": ("ones_like",),
    "any": ("all",),
    "all": ("any",),
    "floor": ("ceil",),
    "ceil": ("floor",),
}
# f(x) → x: the function is forgotten.
FORGOTTEN = {
    "exp",
    "log",
    "expm1",
    "log1p",
    "square",
    "abs",
    "sqrt",
    "softmax",
    "log_softmax",
    "sigmoid",
    "logsigmoid",
}
FORGOTTEN |= {"widen", "float", "double", "flip", "cumsum", "clamp", "sort", "reshape", "expand", "to"}

DTYPES = {"float32": "float64", "float64": "float32"}
# Keywords whose value is the default of the function.
DEFAULTS = {("sort", "dim", "-1"), ("topk", "dim", "-1"), ("argsort", "dim", "-1")}


def extremum(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """min ↔ max; a clamp from below ↔ from above, and one of its bounds forgotten."""
    if not isinstance(node, ast.Call):
        return
    name = called_name(node)
    if name in EXTREMA:
        yield renamed(node, EXTREMA[name])
    if name not in ("clamp", "clip", "clamp_min", "clamp_max"):
        return
    bounds = [keyword for keyword in node.keywords if keyword.arg in ("min", "max")]
    first = 0 if receiver(node) is not None else 1
    if len(bounds) == 1 and len(node.args) == first:
        other = "max" if bounds[0].arg == "min" else "min"
        yield changed(node, keywords=[changed(bounds[0], arg=other)])
    for i in range(len(bounds) if len(bounds) == 2 else 0):
        yield changed(node, keywords=without(node.keywords, node.keywords.index(bounds[i])))
    if len(node.args) == first + 2:
        for i in (first, first + 1):
            yield changed(node, args=replaced(node.args, i, constant(None)))


def reduction(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """sum ↔ mean, of what has a mean; an axis forgotten, so that everything is reduced."""
    if not isinstance(node, ast.Call):
        return
    name = called_name(node)
    known = vars(page.module)
    if name in NAMED_REDUCTIONS and NAMED_REDUCTIONS[name] in known:
        yield renamed(node, NAMED_REDUCTIONS[name])
    base = receiver(node)
    if base is not None and name in REDUCTIONS and page.kind(base) in (Kind.FIXED, Kind.FLOAT):
        yield renamed(node, REDUCTIONS[name])


def dropped_mask(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """All counts: f(x, mask) → f(x, mask | True), select(x, mask) → x; where(c, a, b) → a, b and swapped."""
    if not isinstance(node, ast.Call) or is_check(node):
        return
    name = called_name(node)
    if name == "where" and len(node.args) == 3:
        condition, one, other = node.args
        yield changed(node, args=[condition, other, one])
        yield from (part for part in (one, other) if page.kind(part) > Kind.SCALAR)
        return
    if name == "masked_fill":
        base = receiver(node)
        yield from () if base is None else (base,)
    if name == "select":
        yield node.args[0]
    known = page.known.get(name, ANY)
    read = list(known.passes(known.reading, node))
    for i, argument in enumerate(node.args):
        if page.kind(argument) == Kind.MASK and argument in read:
            everything = ast.BinOp(argument, ast.BitOr(), constant(True))
            yield changed(node, args=replaced(node.args, i, everything))


def detach(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """A stop-gradient is put where a gradient flows, or taken away."""
    if isinstance(node, ast.Call) and called_name(node) == "detach":
        base = receiver(node)
        yield from () if base is None else (base,)
    elif isinstance(node, ast.expr) and node in page.carries:
        around = page.parents[node]
        called = isinstance(around, ast.Call) and around.func is node
        named = isinstance(node, ast.Name | ast.Attribute) and not called
        if named or isinstance(around, ast.Return):
            yield method(node, "detach")


def shifted_index(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """[a:] ↔ [:-a], [:a] → [a:]; an index of the axes moved: [..., None] → [None], [..., i] → [i]."""
    if isinstance(node, ast.Slice):
        if node.lower is not None and node.upper is None:
            yield changed(node, lower=None, upper=_opposite(node.lower))
        elif node.upper is not None and node.lower is None:
            yield changed(node, lower=_opposite(node.upper), upper=None)
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):
        rest = [e for e in node.slice.elts if not (isinstance(e, ast.Constant) and e.value is Ellipsis)]
        if len(rest) < len(node.slice.elts):
            yield changed(node, slice=changed(node.slice, elts=rest) if len(rest) > 1 else rest[0])


def _opposite(bound: ast.expr) -> ast.expr:
    return (
        bound.operand
        if isinstance(bound, ast.UnaryOp) and isinstance(bound.op, ast.USub)
        else negative(bound)
    )


def function(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """exp ↔ expm1, log ↔ log1p, logsigmoid ↔ softplus and the like; a function forgotten: f(x) → x."""
    if not isinstance(node, ast.Call):
        return
    name = called_name(node)
    for other in FUNCTIONS.get(name, ()):
        yield renamed(node, other)
    base = receiver(node)
    operand = base if base is not None else node.args[0] if node.args else None
    moved = name == "to" and all("device" in ast.unparse(argument) for argument in node.args)
    if name in FORGOTTEN and not moved and operand is not None and page.kind(operand) > Kind.SCALAR:
        yield operand


def axis(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """The last axis for the first: dim=-1 → 0."""
    if (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.operand, ast.Constant)
        and is_axis(node.operand, page)
    ):
        yield constant(0)
    elif isinstance(node, ast.Constant) and is_axis(node, page):
        if not isinstance(page.parents[node], ast.UnaryOp):
            yield negative(constant(1)) if node.value == 0 else constant(0)


def dropped_keyword(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """An option of a tensor function forgotten: keepdim, dim, right, descending, dtype."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return
    if called_name(node) in ("clamp", "clip"):  # `extremum` knows better
        return
    for i, keyword in enumerate(node.keywords):
        flipped = isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool)
        default = (called_name(node), keyword.arg, ast.unparse(keyword.value)) in DEFAULTS
        if keyword.arg != "device" and not flipped and not default:
            yield changed(node, keywords=without(node.keywords, i))


def precision(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """torch.float64 ↔ torch.float32."""
    if isinstance(node, ast.Attribute) and node.attr in DTYPES:
        yield changed(node, attr=DTYPES[node.attr])


FIELD: dict[str, Operator] = {
    "extremum": extremum,
    "reduction": reduction,
    "mask": dropped_mask,
    "detach": detach,
    "index": shifted_index,
    "function": function,
    "axis": axis,
    "keyword": dropped_keyword,
    "precision": precision,
}
