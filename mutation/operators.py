"""The mutation operators that any program knows, typed: constants, comparisons, operands, statements.

An operator takes a node and the page that it stands on, and yields what may stand there instead. Those of
this field are in `field_operators.py`.
"""

import ast
from collections.abc import Callable, Iterator

from mutation.edits import changed, constant, negative, replaced, swapped, without
from mutation.kinds import FunctionNode, Kind, called_name
from mutation.pages import Page

Operator = Callable[[ast.AST, Page], Iterator[ast.AST]]

TENSORS = (Kind.INDEX, Kind.FIXED, Kind.FLOAT)
NUMERIC = (Kind.NUMBER, Kind.SCALAR, *TENSORS)
LOGICAL = (Kind.FLAG, Kind.MASK)

EXCHANGED: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
}
# The neighbour at the boundary, then the negation.
COMPARED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
CLAMPS = {"clamp", "clip"}
EVEN = {"square", "abs", "token_variance", "var", "std"}
ODD = {"kl_k1", "log_ratio"}  # f(a, b) = -f(b, a)
SYMMETRIC = {
    "maximum",
    "minimum",
    "logaddexp",
    "max",
    "min",
    "logical_and",
    "logical_or",
    "broadcast_tensors",
}


def arithmetic(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """+ ↔ -, · ↔ /, and the like."""
    if isinstance(node, ast.BinOp) and page.kind(node) in NUMERIC:
        for other in EXCHANGED.get(type(node.op), ()):
            yield changed(node, op=other())


def dropped_operand(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """A factor or a term is forgotten: a · b → a, b; a + b → a, b; a - b → a, -b; a / b → a."""
    if not isinstance(node, ast.BinOp) or page.kind(node) not in NUMERIC:
        return
    if isinstance(node.op, ast.Add | ast.Mult | ast.MatMult):
        yield node.left
        yield node.right
    elif isinstance(node.op, ast.Sub):
        yield node.left
        yield negative(node.right)
    elif isinstance(node.op, ast.Div | ast.Pow | ast.FloorDiv | ast.LShift | ast.RShift):
        yield node.left


def swapped_operands(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """a - b → b - a, a / b → b / a; of like kinds f(a, b) → f(b, a), (a, b) → (b, a), f(x=a, y=b)."""
    if isinstance(node, ast.BinOp) and page.kind(node) in NUMERIC:
        if isinstance(node.op, ast.Sub) and sign_is_lost(node, page):
            return
        if isinstance(node.op, ast.Sub | ast.Div | ast.Pow | ast.FloorDiv | ast.LShift | ast.RShift):
            yield changed(node, left=node.right, right=node.left)
    elif isinstance(node, ast.Call) and not is_check(node):
        if called_name(node) in SYMMETRIC or called_name(node) in ODD and sign_is_lost(node, page):
            return
        first = 1 if called_name(node) in CLAMPS else 0  # min(max(v, low), high): v and low are alike
        for i in range(first, len(node.args) - 1):
            if _alike(node.args[i], node.args[i + 1], page):
                yield changed(node, args=swapped(node.args, i, i + 1))
        for i in range(len(node.keywords) - 1):
            one, other = node.keywords[i], node.keywords[i + 1]
            if _alike(one.value, other.value, page):
                exchanged = [changed(one, value=other.value), changed(other, value=one.value)]
                yield changed(node, keywords=[*node.keywords[:i], *exchanged, *node.keywords[i + 2 :]])
    elif isinstance(node, ast.Tuple) and not isinstance(page.parents[node], ast.Subscript | ast.Compare):
        literal = isinstance(node.ctx, ast.Store) and isinstance(_assigned(node, page), ast.Tuple)
        for i in range(0 if literal else len(node.elts) - 1):  # the value's own swap is the same mutant
            if _alike(node.elts[i], node.elts[i + 1], page):
                yield changed(node, elts=swapped(node.elts, i, i + 1))


def _assigned(target: ast.Tuple, page: Page) -> ast.expr | None:
    statement = page.parents[target]
    return statement.value if isinstance(statement, ast.Assign) else None


def _alike(one: ast.expr, other: ast.expr, page: Page) -> bool:
    kinds = {page.kind(one), page.kind(other)}
    tensors = kinds <= {Kind.FIXED, Kind.FLOAT} or kinds == {Kind.INDEX} or kinds == {Kind.MASK}
    numbers = kinds <= {Kind.NUMBER, Kind.SCALAR} or kinds == {Kind.FLAG}
    return (tensors or numbers) and ast.dump(one) != ast.dump(other)


def changed_constant(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """Another number: n ± 1 for integers, 0 and twice the value for others; ∞ → -∞; True ↔ False."""
    if isinstance(node, ast.Attribute) and node.attr == "inf":
        if not isinstance(page.parents[node], ast.UnaryOp):
            yield negative(node)
        return
    if not isinstance(node, ast.Constant):
        return
    if isinstance(node.value, bool):
        yield constant(not node.value)
    elif isinstance(node.value, int) and not is_axis(node, page):
        yield constant(node.value + 1)
        yield constant(node.value - 1) if node.value > 0 else negative(constant(1))
    elif isinstance(node.value, float):
        yield constant(2 * node.value if node.value else 1.0)
        if node.value:
            yield constant(0.0)


def comparison(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """< ↔ <=, > ↔ >=, == ↔ !=, is ↔ is not, in ↔ not in; and the negation."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in COMPARED[type(op)]:
                yield changed(node, ops=replaced(node.ops, i, other()))


def logic(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """and ↔ or, & ↔ |, an operand of either dropped, `not` and ~ dropped."""
    if isinstance(node, ast.BoolOp):
        yield changed(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for i in range(len(node.values)):
            rest = without(node.values, i)
            yield changed(node, values=rest) if len(rest) > 1 else rest[0]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr | ast.BitXor):
        if page.kind(node) in (Kind.MASK, Kind.INDEX, Kind.FLOAT, Kind.NUMBER):
            yield changed(node, op=ast.BitAnd() if isinstance(node.op, ast.BitOr) else ast.BitOr())
            yield node.left
            yield node.right
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        yield node.operand


def sign(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """A minus is dropped, or put before what is returned or named."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        if not (isinstance(node.operand, ast.Constant) and is_axis(node.operand, page)):
            yield node.operand
    elif isinstance(node, ast.expr) and page.kind(node) in (Kind.FLOAT, Kind.FIXED):
        whole = isinstance(page.parents[node], ast.Return | ast.Assign)
        zero = isinstance(node, ast.Call) and "zeros" in called_name(node)
        if whole and isinstance(node, ast.Call | ast.BinOp) and not zero and not sign_is_lost(node, page):
            yield negative(node)


def branch(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """A condition is ignored: the branch never taken, or always; a refusal never made."""
    if isinstance(node, ast.If):
        yield changed(node, test=constant(False))
        if not isinstance(node.body[0], ast.Raise):
            yield changed(node, test=constant(True))
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse


def removed_statement(node: ast.AST, page: Page) -> Iterator[ast.AST]:
    """A check is forgotten, or the second assignment of a name, or a change in place."""
    if isinstance(node, ast.AugAssign) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        if node.targets[0].id in _known_before(node, page):
            yield ast.Pass()


def _known_before(statement: ast.Assign, page: Page) -> set[str]:
    """The parameters, and the names that the function has assigned above a statement."""
    function = next((n for n in page.above(statement) if isinstance(n, FunctionNode)), None)
    if function is None:
        return set()
    return {argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)} | {
        name.id
        for name in ast.walk(function)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store) and name.lineno < statement.lineno
    }


def sign_is_lost(node: ast.expr, page: Page) -> bool:
    """Whether an expression only enters even functions: (a - b).square(), var(a - b), d = a - b; d.abs()."""
    around = page.parents[node]
    if isinstance(around, ast.Attribute):
        return around.attr in EVEN
    if (
        isinstance(around, ast.Assign)
        and len(around.targets) == 1
        and isinstance(around.targets[0], ast.Name)
    ):
        name = around.targets[0].id
        function = next((n for n in page.above(node) if isinstance(n, FunctionNode)), page.tree)
        uses = [
            n
            for n in ast.walk(function)
            if isinstance(n, ast.Name) and n.id == name and n not in around.targets
        ]
        return bool(uses) and all(isinstance(n.ctx, ast.Load) and sign_is_lost(n, page) for n in uses)
    if isinstance(around, ast.Call) and around.args[:1] == [node]:
        through = called_name(around) == "select" and sign_is_lost(around, page)
        return through or called_name(around) in EVEN
    return False


def is_check(call: ast.Call) -> bool:
    return called_name(call).lstrip("_").startswith("check")


# The axis is the first argument of these methods; of others it is the keyword `dim`.
BY_AXIS = {"sum", "mean", "amax", "amin", "logsumexp", "cumsum", "flip", "unbind", "any", "all", "argmax"}
BY_AXIS |= {"gather", "index_select", "size", "std", "var", "prod", "unsqueeze", "squeeze"}


def is_axis(node: ast.Constant, page: Page) -> bool:
    """Whether a number says along which axis: dim=-1, x.sum(-1)."""
    around = page.parents[node]
    place: ast.AST = node
    if isinstance(around, ast.UnaryOp):
        place, around = around, page.parents[around]
    if isinstance(around, ast.keyword):
        return around.arg == "dim"
    if isinstance(around, ast.Call) and isinstance(around.func, ast.Attribute):
        return called_name(around) in BY_AXIS and around.args[:1] == [place]
    return False


GENERAL: dict[str, Operator] = {
    "arithmetic": arithmetic,
    "dropped operand": dropped_operand,
    "swapped operands": swapped_operands,
    "constant": changed_constant,
    "comparison": comparison,
    "logic": logic,
    "sign": sign,
    "branch": branch,
    "removed statement": removed_statement,
}
