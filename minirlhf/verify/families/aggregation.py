"""Masked reductions: over all tokens, over each sequence, and over a batch that is cut into micro-batches."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.ratios import MASK_NAMES
from minirlhf.verify.kinds import (
    Argument,
    Case,
    Claim,
    Convention,
    Kind,
    Law,
    Mask,
    Numbers,
    Options,
    Probed,
    Reals,
)
from minirlhf.verify.laws import (
    BFLOAT16,
    batch_laws,
    empty_row_law,
    formula,
    golden,
    gradient,
    mask_laws,
    numeric_laws,
    relation,
    rows_of,
    table,
)
from minirlhf.verify.probe import Raised
from minirlhf.verify.token_laws import micro_batches, per_row, token_order, token_repeated, without

LIU = "Liu et al. 2025, section 3.1 (arXiv:2503.20783)"
X = Argument("x", ("B", "T"), Reals(-3.0, 3.0, special=(0.0,)), "one number per token",
             synonyms=("values", "value", "tensor", "xs", "data", "input", "inputs", "loss", "losses",
                       "loss_mat",
                       "per_token_loss", "per_token_losses", "token_losses", "logps", "logp",
                       "per_token_logps",
                       "log_probs", "scores"))  # fmt: skip
MASK = Argument("mask", ("B", "T"), Mask(), "True = counts", synonyms=MASK_NAMES)
TOKENS = (X, MASK)
_GOLDEN: Case = {"x": table([1.0, 2.0, 7.0], [4.0, 8.0, 16.0]),
                 "mask": torch.tensor([[True, True, False], [True, False, False]])}  # fmt: skip
Canonical = Callable[[Tensor], Tensor]
"""From [B, T] to the shape of the result, by some reduction (amin, amax): [] or [B]."""


def _row_sums(x: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([row[counts].sum() for row, counts in zip(x, mask, strict=True)])


def _row_means(x: Tensor, mask: Tensor) -> Tensor:
    return _row_sums(x, mask) / mask.sum(-1).clamp(min=1)


def linear_laws(x: str) -> tuple[Law, ...]:
    """A weighted sum of x, with weights that only the mask decides."""

    def additive(f: Probed, case: Case) -> Iterator[Claim]:
        other = {**case, x: (3 * case[x]).sin()}
        both = {**case, x: case[x] + other[x]}
        yield Claim(both, f.value(both), "==", f.value(case) + f.value(other), "f(x + y) = f(x) + f(y)")

    def same_weights(f: Probed, case: Case) -> Iterator[Claim]:
        changed = {**case, x: case[x].square() - 3.0}
        why = "the weights are those of the mask, whatever is weighed"
        yield Claim(changed, f.grad(changed, x), "==", f.grad(case, x), why, wrt=x)

    def support(f: Probed, case: Case) -> Iterator[Claim]:
        got, take = f.grad(case, x).abs().gt(1e-12).double(), ".abs().gt(1e-12).double()"
        why = "1 where there is a gradient: exactly where a token counts"
        yield Claim(case, got, "==", case["mask"].double(), why, wrt=x, take=take)

    return (
        Law("additive", "symmetry", "f(x + y) = f(x) + f(y)", "a weighted sum", additive),
        relation("homogeneous", "symmetry", "x times -2.5: f times -2.5", "a weighted sum",
                 lambda c: {**c, x: -2.5 * c[x]}, lambda v, c, f: -2.5 * v),
        Law("weights_of_the_mask", "gradient", "the gradient does not depend on x",
            "bugs B10: mask=advantages",
            same_weights),
        Law("support", "gradient", "the gradient is nonzero exactly where the mask is True",
            "bugs P5: support", support),
    )  # fmt: skip


def _mean_laws(shape: Callable[[Case], Tensor], least: Canonical, most: Canonical) -> tuple[Law, ...]:
    def between(f: Probed, case: Case) -> Iterator[Claim]:
        low = least(case["x"].masked_fill(~case["mask"], torch.inf))
        high = most(case["x"].masked_fill(~case["mask"], -torch.inf))
        yield Claim(case, f.value(case), ">=", f.reduced(low, case), "at least the smallest element")
        yield Claim(case, f.value(case), "<=", f.reduced(high, case), "at most the largest element")

    def many(f: Probed, case: Case) -> Iterator[Claim]:
        half = {**case, "x": case["x"].bfloat16()}
        want = f.reduced(torch.full_like(shape(case), 0.75), case)
        yield Claim(
            half, f.value(half), "==", want, "3,001 tokens are counted exactly, in bf16 too", loose=5e4
        )

    crowd: Case = {"x": torch.full((1, 3001), 0.75).double(), "mask": torch.ones(1, 3001, dtype=torch.bool)}
    return (
        relation("constant", "limit", "the mean of a constant is the constant", "a mean",
                 lambda c: {**c, "x": torch.full_like(c["x"], 1.75)},
                 lambda v, c, f: f.reduced(torch.full_like(shape(c), 1.75), c)),
        Law("between", "limit", "a mean lies between the smallest and the largest element", "a mean",
            between),
        Law("many_tokens", "numeric", "tokens are counted in a type that holds their number",
            "bf16 counts to 256",
            many, proves=BFLOAT16, cases=lambda: [crowd]),
    )  # fmt: skip


def _shared_laws(elements: Callable[[Case], Tensor]) -> tuple[Law, ...]:
    return (
        *linear_laws("x"),
        token_order(TOKENS, gradients=("x",)),
        *batch_laws(TOKENS),
        *without(mask_laws(TOKENS, differentiable=("x",)), "zero_under_mask"),
        empty_row_law(TOKENS),
        *numeric_laws(("x",)),
    )


def _equal_weights(f: Probed, case: Case) -> Iterator[Claim]:
    want = case["mask"] / case["mask"].sum()
    yield Claim(
        case, f.grad(case, "x"), "==", want.double(), "every token weighs 1/N, N of the whole batch", wrt="x"
    )


def _across_rows(f: Probed, case: Case) -> Iterator[Claim]:
    changed = {name: v.flatten().roll(1).reshape(v.shape) for name, v in case.items()}
    why = "all tokens moved on by one place, the last of a row into the next row"
    yield Claim(changed, f.value(changed), "==", f.value(case), why)


def _partition(f: Probed, case: Case) -> Iterator[Claim]:
    mask = case["mask"]
    odd = mask & (mask.flatten().cumsum(0).reshape(mask.shape) % 2 == 1)
    even = mask & ~odd
    if not bool(even.any()):
        return
    parts = [f.value({**case, "mask": part}) * part.sum() for part in (odd, even)]
    want = (parts[0] + parts[1]) / mask.sum()
    yield Claim(
        case, f.value(case), "==", want, "every second token and the others, each weighed with their number"
    )


def _scalar(case: Case) -> Tensor:
    return torch.zeros((), dtype=torch.float64)


TOKEN_MEAN = Kind(
    name="token_mean",
    title="the mean over all tokens that count, Σ m x / Σ m",
    arguments=TOKENS,
    returns="[] in units of x",
    shape=(),
    oracle=lambda case, options: case["x"][case["mask"]].mean(),
    differentiable=("x",),
    mask="mask",
    laws=(
        formula("the sum over the tokens that count, divided by their number", LIU),
        gradient("x", "∂f/∂x = 1/N for each of the N tokens that count", LIU),
        golden("golden_rows", _GOLDEN, torch.tensor(7 / 3).double(), "(1, 2), (4): 7/3", "arithmetic",
               loose=1e2),
        Law("equal_weights", "gradient", "every token weighs the same, whatever the length of its sequence",
            LIU,
            _equal_weights),
        Law("across_rows", "symmetry", "which row a token is in does not matter", LIU, _across_rows),
        Law("partition", "symmetry", "N f = N₁ f₁ + N₂ f₂ for two halves of the mask",
            "bugs H02: mean of means",
            _partition),
        token_repeated(TOKENS, lambda v: v, "every token twice: the same mean", "bugs P19: length law"),
        *_mean_laws(_scalar, lambda x: x.amin(), lambda x: x.amax()),
        *without(_shared_laws(_scalar), "row_alone"),
    ),
)  # fmt: skip


def _rows_weigh_the_same(f: Probed, case: Case) -> Iterator[Claim]:
    got = f.grad(case, "x").sum(-1)
    yield Claim(case, got, "==", got[:1].expand_as(got), "every sequence has the same weight in sum", wrt="x",
                take=".sum(-1)")  # fmt: skip


def _concatenation(f: Probed, case: Case) -> Iterator[Claim]:
    # A mean over sequences may leave out those in which nothing counts: no part is to become one.
    case = rows_of(TOKENS, case, (case["mask"].sum(-1) >= 2).nonzero().flatten())
    if not len(case["mask"]):
        return
    first = case["mask"] & (case["mask"].cumsum(-1) % 2 == 1)
    parts = [{**case, "mask": part} for part in (first, case["mask"] & ~first)]
    want = f.value(parts[0]) + f.value(parts[1])
    yield Claim(case, f.value(case), "==", want, "every second token and the others add up to the whole")


SEQUENCE_MEAN = Kind(
    name="sequence_mean",
    title="the mean over the tokens of each sequence, Σ m x / Σ m per row",
    arguments=TOKENS,
    returns="[B] in units of x",
    shape=("B",),
    oracle=lambda case, options: _row_means(case["x"], case["mask"]),
    differentiable=("x",),
    reducible=True,
    mask="mask",
    laws=(
        formula("the sum over the tokens of the sequence that count, divided by their number", LIU),
        gradient("x", "∂f/∂x = 1/n for each of the n tokens of the sequence that count", LIU),
        golden("golden_rows", _GOLDEN, [1.5, 4.0], "(1, 2), (4): 1.5 and 4", "arithmetic"),
        Law("rows_weigh_the_same", "gradient", "a sequence weighs the same whatever its length", LIU,
            _rows_weigh_the_same),
        token_repeated(TOKENS, lambda v: v, "every token twice: the same mean", "bugs P19, H10: length ≡ 1"),
        micro_batches(TOKENS, per_row),
        *_mean_laws(per_row, lambda x: x.amin(-1), lambda x: x.amax(-1)),
        *_shared_laws(per_row),
    ),
)  # fmt: skip

SEQUENCE_SUM = Kind(
    name="sequence_sum",
    title="the sum over the tokens of each sequence, Σ m x per row",
    arguments=TOKENS,
    returns="[B] in units of x",
    shape=("B",),
    oracle=lambda case, options: _row_sums(case["x"], case["mask"]),
    differentiable=("x",),
    reducible=True,
    mask="mask",
    laws=(
        formula("the sum over the tokens of the sequence that count", "log π(y|x) = Σ log π(yₜ|x, y₍<t₎)"),
        gradient("x", "∂f/∂x = 1 for each token that counts", LIU),
        golden("golden_rows", _GOLDEN, [3.0, 4.0], "(1, 2), (4): 3 and 4", "arithmetic"),
        Law("concatenation", "symmetry", "the sum over a sequence is the sum over its parts",
            "oracles SL3; bugs P19, I02: averaged where DPO needs a sum", _concatenation),
        token_repeated(TOKENS, lambda v: 2 * v, "every token twice: twice the sum", "bugs P19: length law"),
        micro_batches(TOKENS, per_row),
        *_shared_laws(per_row),
    ),
)  # fmt: skip

LOSSES = X._replace(name="losses", meaning="one loss per token", synonyms=("x", *X.synonyms))
MICRO = Argument("micro_batch_size", (), Numbers((2, 1, 3), usual=(2,)),
                 "rows per micro-batch, the last may be smaller",
                 synonyms=("mini_batch_size", "microbatch_size", "micro_bs", "chunk_size", "batch_size",
                           "mbs",
                           "per_device_batch_size", "accumulation_steps", "gradient_accumulation_steps",
                           "num_chunks",
                           "grad_accum_steps", "num_micro_batches", "n_micro_batches", "size"))  # fmt: skip
BATCH = (LOSSES, MASK._replace(neutral=lambda case: torch.ones_like(case["losses"], dtype=torch.bool)), MICRO)
EQUALS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "token mean": ("the token mean of the whole batch", lambda x, m: x[m].mean()),
    "sequence mean": ("the mean over sequences of token means", lambda x, m: _row_means(x, m).mean()),
    "sequence sum": ("the mean over sequences of token sums", lambda x, m: _row_sums(x, m).mean()),
    "token sum": ("the token sum of the whole batch", lambda x, m: x[m].sum()),
    "padded mean": ("the token sum over batch size × padded length", lambda x, m: x[m].sum() / x.numel()),
}


def _accumulated(case: Case, options: Options) -> Tensor:
    return EQUALS[options["equals"]][1](case["losses"], case["mask"])


def _sized(case: Case, size: int) -> Case:
    return {**case, "micro_batch_size": size}


def _any_size(f: Probed, case: Case) -> Iterator[Claim]:
    rows = len(case["losses"])
    whole = _sized(case, rows)
    value, gradient = f.value(whole), f.grad(whole, "losses")
    for size in (n for n in range(1, rows) if rows % n == 0):
        cut = _sized(case, size)
        why = f"micro-batches of {size} give what the whole batch of {rows} gives"
        yield Claim(cut, f.value(cut), "==", value, why)
        yield Claim(cut, f.grad(cut, "losses"), "==", gradient, why + ", in the gradient too", wrt="losses")


def _uneven(f: Probed, case: Case) -> Iterator[Claim]:
    why = "the last micro-batch is smaller, and its rows count as much as the others"
    try:
        value, gradient = f.value(case), f.grad(case, "losses")
    except Raised:  # a subject may refuse a batch that it cannot cut evenly, but not get it wrong
        return
    yield Claim(case, value, "==", f.expected(case), why)
    yield Claim(case, gradient, "==", f.expected_grad(case, "losses"), why, wrt="losses")


def _uneven_cases() -> list[Case]:
    cases = []
    for rows, size in ((3, 2), (5, 3), (5, 2), (4, 3)):
        losses = torch.arange(1.0, 2 * rows + 1).double().reshape(rows, 2).sin()
        cases.append(
            {"losses": losses, "mask": torch.ones(rows, 2, dtype=torch.bool), "micro_batch_size": size}
        )
    return cases


def _divisor(case: Case) -> Case:
    """The largest micro-batch size that is not above the drawn one and cuts the batch evenly."""
    rows = len(case["losses"])
    return _sized(case, max(n for n in range(1, int(case["micro_batch_size"]) + 1) if rows % n == 0))


def _larger(f: Probed, case: Case) -> Iterator[Claim]:
    changed = _sized(case, len(case["losses"]) + 3)
    yield Claim(
        changed, f.value(changed), "==", f.expected(case), "a micro-batch that holds more than the batch"
    )


def _influence(f: Probed, case: Case) -> Iterator[Claim]:
    take = ".abs().sum(-1).gt(1e-12).double()"
    got = f.grad(case, "losses").abs().sum(-1).gt(1e-12).double()
    why = "1 where a row has some influence: everywhere, in the last micro-batch too"
    yield Claim(case, got, "==", torch.ones_like(got), why, wrt="losses", take=take)


GRADIENT_ACCUMULATION = Kind(
    name="gradient_accumulation",
    title="the loss of a batch, accumulated over micro-batches of its rows",
    arguments=BATCH,
    returns="[] in units of the losses",
    shape=(),
    oracle=_accumulated,
    differentiable=("losses",),
    arrange=_divisor,
    mask="mask",
    conventions=(Convention("equals", {name: text for name, (text, _) in EQUALS.items()}),),
    anchor=lambda case: _sized(case, len(case["losses"])),
    laws=(
        formula("what is accumulated is one reduction of the whole batch", "oracles P13"),
        gradient("losses", "so is its gradient", "oracles P13"),
        Law("any_micro_batch_size", "batch", "neither value nor gradient depends on the micro-batch size",
            "oracles P13, O2; bugs P4, H02, H05: mean of means", _any_size, ("micro_batch_size",)),
        Law("uneven_micro_batches", "batch", "a smaller last micro-batch counts in full, or is refused",
            "bugs H14: TRL #563, the last is dropped; H05: weighed like the others", _uneven,
            cases=_uneven_cases),
        Law("every_row_counts", "gradient", "every row of the batch influences the step",
            "bugs H08: only the last micro-batch counts; H14: the last is dropped", _influence),
        Law("larger_than_the_batch", "batch", "one micro-batch that is larger than the batch is the batch",
            "bugs H09",
            _larger, ("micro_batch_size",), proves="micro-batches larger than the batch"),
        *linear_laws("losses"),
        token_order(BATCH, gradients=("losses",)),
        *without(batch_laws(BATCH), "row_alone"),
        *without(mask_laws(BATCH, differentiable=("losses",)), "zero_under_mask"),
        empty_row_law(BATCH),
        *numeric_laws(("losses",)),
    ),
)  # fmt: skip

KINDS = (TOKEN_MEAN, SEQUENCE_MEAN, SEQUENCE_SUM, GRADIENT_ACCUMULATION)
