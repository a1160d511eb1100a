"""What an expression is, is read off annotations, docstrings and what was done to it."""

import ast

import pytest

from mutation.kinds import Kind
from mutation.mutants import mutants_of, page_mutants
from mutation.pages import Page, read_page
from tests.mutation.snippets import HEAD, page


def kind_of(expression: str) -> Kind:
    made = page(f"{HEAD}    return {expression}\n")
    (returned,) = [node for node in ast.walk(made.tree) if isinstance(node, ast.Return)]
    return made.kind(returned.value)


@pytest.mark.parametrize(
    ("expression", "kind"),
    [
        ("x", Kind.FLOAT),
        ("mask", Kind.MASK),
        ("tokens", Kind.INDEX),
        ("n", Kind.NUMBER),
        ("x * n", Kind.FLOAT),
        ("x > y", Kind.MASK),
        ("n > 1", Kind.FLAG),
        ("x is None", Kind.FLAG),
        ("~(x > 0) & mask", Kind.MASK),
        ("mask.sum(dim=-1)", Kind.INDEX),
        ("mask.sum() / n", Kind.FIXED),
        ("tokens - 1", Kind.INDEX),
        ("x / mask.sum()", Kind.FLOAT),
        ("x.argmax(dim=-1)", Kind.INDEX),
        ("x.isfinite().all()", Kind.MASK),
        ("x.detach() * n", Kind.FIXED),
        ("torch.ones_like(x)", Kind.FIXED),
        ("torch.where(mask, x, 0.0)", Kind.FLOAT),
        ("torch.where(mask, 1.0, 0.0)", Kind.FIXED),
        ("torch.where(mask, tokens, 0)", Kind.INDEX),
        ("torch.cat([x, y])", Kind.FLOAT),
        ("x.shape[0]", Kind.NUMBER),
        ("x.ndim", Kind.NUMBER),
        ("x.gather(-1, tokens)", Kind.FLOAT),
        ("x.sort().values", Kind.FLOAT),
        ("x.sort().indices", Kind.INDEX),
        ("torch.inf", Kind.NUMBER),
        ("x.dtype", Kind.OTHER),
    ],
)
def test_the_kind_of_an_expression(expression: str, kind: Kind) -> None:
    assert kind_of(expression) == kind


def names(made: Page) -> dict[str, Kind]:
    stored = (n for n in ast.walk(made.tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return {name.id: made.kind(name) for name in stored}


def test_names_take_the_kind_of_what_they_are_given_also_by_unpacking_and_by_calls() -> None:
    source = (
        "def inner(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:\n    return x * 2, mask & (x > 0)\n\n\n"
        f"{HEAD}    u, v = inner(x, mask)\n    w, z = x.shape[0], v.sum()\n    return u\n"
    )
    assert names(page(source)) == {"u": Kind.FLOAT, "v": Kind.MASK, "w": Kind.NUMBER, "z": Kind.INDEX}


def test_the_docstring_says_which_tensors_are_bool_or_ids() -> None:
    source = (
        "def f(logp: Tensor, desirable: Tensor, place: Tensor, rejected_length: Tensor) -> Tensor:\n"
        '    """Line.\n\n    logp: [B] nats.\n    desirable: [B] bool.\n    place: [B] ids.\n    """\n'
        "    a, b, c, d = logp, desirable, place, rejected_length\n    return logp\n"
    )
    assert list(names(page(source)).values()) == [Kind.FLOAT, Kind.MASK, Kind.INDEX, Kind.INDEX]


def carried(body: str, *, before: str = "") -> set[str]:
    """The names in a function through which a gradient flows to its result."""
    made = page(before + HEAD + "".join(f"    {line}\n" for line in body.splitlines()))
    function = made.tree.body[-1]
    return {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and n in made.carries}


def test_a_gradient_is_followed_from_what_is_returned_backwards() -> None:
    assert carried("u = x * y\nunused = y + 1\nreturn u") == {"u", "x", "y"}
    assert carried("return torch.where(x > 0, y, 0.0)") == {"y"}
    assert carried("u = x.detach()\nreturn u * y") == {"y"}
    assert carried("return torch.zeros(x.shape)") == set()
    assert carried("return x > y") == set()


def test_a_gradient_is_followed_into_a_function_by_the_parameters_that_it_uses() -> None:
    before = "def g(x: Tensor, like: Tensor) -> Tensor:\n    return x.expand(like.shape)\n\n\n"
    assert carried("return g(x, y)", before=before) == {"x"}
    assert carried("return g(like=x, x=y)", before=before) == {"y"}


def test_a_mask_is_not_dropped_where_only_its_shape_is_looked_at() -> None:
    before = "def g(x: Tensor, mask: Tensor) -> Tensor:\n    return x.expand({})\n\n\n"
    for used, dropped in (("mask.shape", False), ("mask", True)):
        made = page(before.format(used) + HEAD + "    return g(x, mask)\n")
        changes = {mutant.after for mutant in page_mutants(made)}
        assert ("return g(x, mask | True)" in changes) == dropped


def test_the_kinds_of_our_own_pages_are_found() -> None:
    divergence = names(read_page("minirlhf.objectives.divergence"))
    assert divergence["possible"] == divergence["last"] == Kind.MASK
    assert divergence["counted_from_here"] == Kind.INDEX
    assert divergence["terminal"] == divergence["error"] == Kind.FLOAT
    sampling = names(read_page("minirlhf.objectives.sampling"))
    assert (sampling["kept"], sampling["above"], sampling["x"]) == (Kind.INDEX, Kind.MASK, Kind.FLOAT)


def test_our_own_pages_have_mutants_of_every_operator() -> None:
    made = {
        m.operator
        for name in ("masked", "advantages", "sampling")
        for m in mutants_of(f"minirlhf.objectives.{name}")
    }
    assert {
        "mask",
        "detach",
        "extremum",
        "reduction",
        "index",
        "axis",
        "function",
        "keyword",
        "default",
    } <= made
