"""Each operator makes the wrong variants that it is for, and none where its kind of operand is missing."""

import pytest

from mutation.mutants import OPERATORS
from tests.mutation.snippets import HEAD, changes, mutants


@pytest.mark.parametrize(
    ("operator", "before", "after"),
    [
        ("extremum", "torch.maximum(x, y)", {"torch.minimum(x, y)"}),
        ("extremum", "x.amin(dim=-1)", {"x.amax(dim=-1)"}),
        ("extremum", "mask.sum().clamp(min=1)", {"mask.sum().clamp(max=1)"}),
        ("extremum", "x.clamp(-a, a)", {"x.clamp(None, a)", "x.clamp(-a, None)"}),
        ("extremum", "torch.clamp(x, min=-a, max=a)", {"torch.clamp(x, max=a)", "torch.clamp(x, min=-a)"}),
        ("reduction", "x.sum(dim=-1)", {"x.mean(dim=-1)"}),
        ("reduction", "(x - y).mean()", {"(x - y).sum()"}),
        ("reduction", "token_sum(x, mask)", {"token_mean(x, mask)"}),
        ("mask", "select(x, mask)", {"x", "select(x, mask | True)"}),
        ("mask", "g(x, mask)", {"g(x, mask | True)"}),
        ("mask", "torch.where(mask, x, y)", {"torch.where(mask, y, x)", "x", "y"}),
        ("mask", "torch.where(mask, x, 0.0)", {"torch.where(mask, 0.0, x)", "x"}),
        ("detach", "x * a", {"(x * a).detach()", "x.detach() * a"}),
        ("detach", "y.detach() * x", {"(y.detach() * x).detach()", "y * x", "y.detach() * x.detach()"}),
        ("index", "x[1:]", {"x[:-1]"}),
        ("index", "x[:-1]", {"x[1:]"}),
        ("index", "x[:n]", {"x[-n:]"}),
        ("index", "x[..., None]", {"x[None]"}),
        ("function", "x.exp()", {"x.expm1()", "x"}),
        ("function", "torch.expm1(-x)", {"torch.exp(-x)", "-x"}),
        ("function", "torch.log1p(x)", {"torch.log(x)", "x"}),
        ("function", "F.logsigmoid(x)", {"F.softplus(x)", "F.sigmoid(x)", "x"}),
        ("function", "x.square()", {"x.abs()", "x"}),
        ("axis", "x.sum(dim=-1)", {"x.sum(dim=0)"}),
        ("axis", "x.flip(-1)", {"x.flip(0)"}),
        ("axis", "x.gather(1, tokens)", {"x.gather(0, tokens)"}),
        ("keyword", "x.amax(dim=-1)", {"x.amax()"}),
        ("precision", "x.to(torch.float64)", {"x.to(torch.float32)"}),
        ("arithmetic", "x + y", {"x - y"}),
        ("arithmetic", "x / y", {"x * y"}),
        ("dropped operand", "x * y", {"x", "y"}),
        ("dropped operand", "x - y", {"x", "-y"}),
        ("dropped operand", "x / n", {"x"}),
        ("swapped operands", "x - y", {"y - x"}),
        ("swapped operands", "n / a", {"a / n"}),
        ("swapped operands", "g(x, y, n, a)", {"g(y, x, n, a)", "g(x, y, a, n)"}),
        ("swapped operands", "g(one=x, other=y)", {"g(one=y, other=x)"}),
        ("swapped operands", "(x, y)", {"(y, x)"}),
        ("constant", "x * 0.5", {"x * 1.0", "x * 0.0"}),
        ("constant", "x[1]", {"x[2]", "x[0]"}),
        ("constant", "x + torch.inf", {"x + -torch.inf"}),
        ("constant", "x.sum(dim=-1, keepdim=True)", {"x.sum(dim=-1, keepdim=False)"}),
        ("comparison", "x < y", {"x <= y", "x >= y"}),
        ("comparison", "x == y", {"x != y"}),
        ("comparison", "x if n is None else y", {"x if n is not None else y"}),
        ("logic", "mask & (x > 0)", {"mask | (x > 0)", "mask", "(x > 0)"}),
        ("logic", "n > 0 and a > 0", {"n > 0 or a > 0", "a > 0", "n > 0"}),
        ("logic", "~mask", {"mask"}),
        ("sign", "-x", {"x"}),
        ("sign", "x * y", {"-(x * y)"}),
        ("branch", "x if n else y", {"x", "y"}),
    ],
)
def test_what_an_operator_makes_of_an_expression(operator: str, before: str, after: set[str]) -> None:
    plain = {change.replace("(", "").replace(")", "") for change in changes(f"return {before}", operator)}
    assert plain == {f"return {each}".replace("(", "").replace(")", "") for each in after}


def test_what_the_operators_make_of_statements() -> None:
    body = "check_positive(a=a)\nif n < 1:\n    raise ValueError(n)\nx = x * n\nx += 1\nreturn x"
    assert changes(body, "removed statement") == {"pass"}
    assert len([m for m in mutants(_function(body)) if m.operator == "removed statement"]) == 3
    assert changes(body, "branch") == {"if False:"}
    assert changes(body, "comparison") == {"if n <= 1:", "if n >= 1:"}
    assert changes("if n:\n    x = y\nreturn x", "branch") == {"if False:", "if True:"}


def test_a_default_is_changed_under_its_own_name() -> None:
    head = "def f(x: Tensor, *, epsilon: float = 0.5, flag: bool = True) -> Tensor:\n"
    source = head + "    return x * epsilon if flag else x\n"
    found = [mutant for mutant in mutants(source) if mutant.operator == "default"]
    assert len(found) == 3 and all(mutant.lines == (1, 2) for mutant in found)
    assert any("epsilon: float = 1.0" in mutant.after for mutant in found)
    assert any("flag: bool = False" in mutant.after for mutant in found)


def test_the_fields_of_a_result_and_the_names_of_an_unpacking_are_exchanged() -> None:
    record = "class R(NamedTuple):\n    one: Tensor\n    other: Tensor\n\n\n"
    source = "from typing import NamedTuple\n" + record + HEAD + "    return R(one=x, other=y)\n"
    assert "return R(one=y, other=x)" in {mutant.after for mutant in mutants(source)}
    assert "(v, u) = g(x)" in changes("u, v = g(x)\nreturn u - v", "swapped operands")
    # The value's own exchange is the same mutant.
    assert changes("u, v = x, y\nreturn u / v", "swapped operands") == {"u, v = (y, x)", "return v / u"}


@pytest.mark.parametrize(
    ("operator", "body"),
    [
        ("reduction", "return mask.sum()"),  # a mask has no mean
        ("reduction", "return tokens.sum()"),  # nor have ids
        ("detach", "return mask & (x > 0)"),  # a comparison has no gradient
        ("detach", "return x.detach()\n"),  # it already is: only the removal remains, tested above
        ("detach", "return tokens + 1"),
        ("detach", "return n * a"),
        ("swapped operands", "return (x - y).square()"),  # the sign is lost
        ("swapped operands", "d = x - y\nreturn d.abs()"),
        ("swapped operands", "return torch.maximum(x, y)"),  # symmetric
        ("swapped operands", "return kl_k1(x, y, mask).square()"),
        ("swapped operands", "return g(x, mask, n)"),  # of unlike kinds
        ("swapped operands", "check_same(x, y)\nreturn x"),
        ("sign", "d = x - y\nreturn d.square().sum() * n if n else None"),
        ("sign", "z = torch.zeros(n)\nreturn None"),
        (
            "keyword",
            "return x.sort(dim=-1, descending=True).values",
        ),  # the default; True is another operator's
        ("constant", "raise ValueError(f'n must be 1, got {n:.3f}')"),
        ("constant", "x: Tensor = x\nreturn x"),
        ("precision", "return torch.zeros(n, device=x.device)"),
        ("function", "return x.to(x.device)"),
        ("mask", "check_mask(mask)\nreturn x"),
    ],
)
def test_equivalent_and_senseless_mutants_are_not_made(operator: str, body: str) -> None:
    made = changes(body, operator)
    assert not made or (operator, body.strip()) == ("detach", "return x.detach()") and made == {"return x"}


def test_docstrings_annotations_and_error_messages_are_left_alone() -> None:
    source = '"""A page of 1 line."""\n\nLIMIT: int = 3\n\n\ndef f(n: "int | 2" = 0) -> int:\n'
    source += '    """Returns 1."""\n'
    source += "    if n:\n        raise ValueError('3' if n > 4 else f'{n + 5}')\n    return n\n"
    made = [mutant.after for mutant in mutants(source)]
    assert "LIMIT: int = 4" in made
    assert not [line for line in made if "page" in line or "Returns" in line or "raise" in line]
    assert all("int | 2" in line for line in made if "def f" in line)


def test_no_mutant_compiles_to_the_same_code_as_the_original_or_as_another() -> None:
    source = _function("if n:\n    x = x * 1\nreturn x + (2 + 3)")
    codes = [mutant.code.co_consts for mutant in mutants(source)]
    assert codes and "return x + 5" not in {mutant.after for mutant in mutants(source)}
    assert len({(m.after, m.line, m.operator) for m in mutants(source)}) == len(mutants(source))


def test_a_mutant_says_where_it_is_and_which_lines_run_it() -> None:
    source = _function("if n:\n    return g(\n        x,\n        y - x,\n    )\nreturn y")
    (mutant,) = [m for m in mutants(source) if m.after == "y + x,"]
    assert (mutant.function, mutant.line, mutant.lines, mutant.before) == ("f", 5, (3, 6), "y - x,")
    (head,) = [m for m in mutants(source) if m.after == "if False:"]
    assert (head.line, head.lines, head.before) == (2, (2, 2), "if n:")


def test_every_operator_is_tried_here() -> None:
    tried = set()
    for function in (
        test_what_an_operator_makes_of_an_expression,
        test_equivalent_and_senseless_mutants_are_not_made,
    ):
        (mark,) = function.pytestmark  # pyright: ignore[reportFunctionMemberAccess]
        tried |= {case[0] for case in mark.args[1]}
    assert set(OPERATORS) - {"removed statement"} <= tried


def _function(body: str) -> str:
    return HEAD + "".join(f"    {line}\n" for line in body.splitlines())
