"""Laws that many kinds share, each made for one kind by a function of what differs.

A law yields claims about one case. What it compares with is the oracle, or the subject itself on a changed
case: then it holds for every convention, and says more about what went wrong.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from minirlhf.verify.kinds import Argument, Case, Check, Claim, Counts, Law, Mask, Probed, Reals

Change = Callable[[Case], Case]
NAN_SAFE = "NaN-safe mask"
EMPTY_ROWS = "empty rows"
BFLOAT16 = "bfloat16 input"
ZEROS = "zeros under the mask"


def formula(statement: str, source: str) -> Law:
    """The value is the paper's formula, under the conventions found."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        yield Claim(case, f.value(case), "==", f.expected(case), statement)

    return Law("formula", "value", statement, source, check)


def gradient(argument: str, statement: str, source: str, *, needs: tuple[str, ...] = ()) -> Law:
    """The gradient with respect to one argument is the formula's."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        if argument in case:
            got, want = f.grad(case, argument), f.expected_grad(case, argument)
            yield Claim(case, got, "==", want, statement, wrt=argument)

    return Law(f"gradient_of_{argument}", "gradient", statement, source, check, needs)


def golden(
    name: str,
    case: Case,
    want: Sequence[float] | Tensor,
    statement: str,
    source: str,
    *,
    needs: tuple[str, ...] = (),
    loose: float = 1e3,
) -> Law:
    """A published number; `want` is the canonical result per element, to about six digits."""
    target = want if isinstance(want, Tensor) else torch.tensor(want, dtype=torch.float64)

    def check(f: Probed, given: Case) -> Iterator[Claim]:
        yield Claim(given, f.value(given), "==", f.reduced(target, given), statement, loose=loose)

    return Law(name, "value", statement, source, check, needs, cases=lambda: [case])


def invariance(
    name: str,
    family: str,
    statement: str,
    source: str,
    change: Change,
    *,
    needs: tuple[str, ...] = (),
    gradients: Sequence[str] = (),
    loose: float = 1.0,
) -> Law:
    """The value (and the gradients named) is the same on the changed case."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = change(case)
        yield Claim(changed, f.value(changed), "==", f.value(case), statement, loose=loose)
        for wrt in gradients:
            want = f.grad(case, wrt)
            yield Claim(changed, f.grad(changed, wrt), "==", want, statement, wrt=wrt, loose=loose)

    return Law(name, family, statement, source, check, needs)


def relation(
    name: str,
    family: str,
    statement: str,
    source: str,
    change: Change,
    result: Callable[[Tensor, Case, Probed], Tensor],
    *,
    needs: tuple[str, ...] = (),
    loose: float = 1.0,
) -> Law:
    """The value on the changed case follows from the value on the case itself."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = change(case)
        want = result(f.value(case), case, f)
        yield Claim(changed, f.value(changed), "==", want, statement, loose=loose)

    return Law(name, family, statement, source, check, needs)


def bounded(
    name: str,
    family: str,
    statement: str,
    source: str,
    sign: str,
    bound: Callable[[Case, Probed], Tensor],
    *,
    needs: tuple[str, ...] = (),
) -> Law:
    """The value is at least (">=") or at most ("<=") a bound of the case."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        got = f.value(case)
        yield Claim(case, got, sign, bound(case, f).expand_as(got), statement)

    return Law(name, family, statement, source, check, needs)


def loosened(law: Law, times: float) -> Law:
    """The law, with at least so many times the usual tolerance."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        yield from (claim._replace(loose=max(claim.loose, times)) for claim in law.check(f, case))

    return law._replace(check=check)


def _descending(f: Probed, case: Case) -> Iterator[Claim]:
    if f.ascending_loss:
        why = "the loss, as it is minimised; a function that gives its negative is not called a loss"
        yield Claim(case, -f.value(case), "==", f.value(case), why)


DESCENDING = Law(
    "a_loss_descends",
    "gradient",
    "what is called a loss is to be minimised: it falls where the objective rises",
    "Liger-Kernel #484: DPO's loss, double-negated, was maximised in four releases",
    _descending,
)
"""Of kinds whose negative, an objective to maximise, is legitimate: then it must not be called a loss."""


def rows_of(arguments: Sequence[Argument], case: Case, index: Tensor, *, axis: str = "B") -> Case:
    """The case with these rows of the batch, in this order."""
    batched = {a.name for a in arguments if a.shape[:1] == (axis,)}
    return {name: value[index] if name in batched else value for name, value in case.items()}


def _row_count(arguments: Sequence[Argument], case: Case, axis: str) -> int:
    name = next(a.name for a in arguments if a.shape[:1] == (axis,) and a.name in case)
    return len(case[name])


def batch_laws(arguments: Sequence[Argument], *, axis: str = "B") -> tuple[Law, ...]:
    """Rows do not see each other: alone, reordered and repeated they give the same."""

    def alone(f: Probed, case: Case) -> Iterator[Claim]:
        if not f.by_row:
            return
        together = f.value(case)
        for row in range(_row_count(arguments, case, axis)):
            single = rows_of(arguments, case, torch.tensor([row]), axis=axis)
            why = f"row {row} of the batch, alone, gives what it gives in the batch"
            yield Claim(single, f.value(single), "==", together[row : row + 1], why)

    def reordered(f: Probed, case: Case) -> Iterator[Claim]:
        order = torch.arange(_row_count(arguments, case, axis)).flip(0)
        changed, value = rows_of(arguments, case, order, axis=axis), f.value(case)
        want = value[order] if f.by_row else value
        yield Claim(changed, f.value(changed), "==", want, "the same rows in reverse order")

    def repeated(f: Probed, case: Case) -> Iterator[Claim]:
        index = torch.arange(_row_count(arguments, case, axis)).repeat(2)
        changed, value = rows_of(arguments, case, index, axis=axis), f.value(case)
        # A mean stays, a sum doubles: the oracle, reduced alike, says which.
        want = value[index] if f.by_row else _resized(f, value, case, changed)
        yield Claim(changed, f.value(changed), "==", want, "every row twice: a mean stays, a sum doubles")

    source = "property of every loss that is a function of its own row"
    return (
        Law("row_alone", "batch", "a row gives alone what it gives in a batch", source, alone),
        Law("row_order", "batch", "reordering the rows reorders the result, and changes no mean", source,
            reordered),
        Law("row_repeated", "batch", "repeating the batch changes no row and no mean",
            "HALOs e8c4e34: sum for mean", repeated),
    )  # fmt: skip


def mask_laws(
    arguments: Sequence[Argument],
    *,
    differentiable: Sequence[str],
    zeros: str | None = ZEROS,
    along: str = "T",
) -> tuple[Law, ...]:
    """What lies under the mask does not matter, whatever it is; zeros: the behaviour that nonzero results
    under the mask disprove, None where they are a defect."""
    mask = next(a.name for a in arguments if isinstance(a.domain, Mask))
    masked = [
        a.name for a in arguments if isinstance(a.domain, Reals) and a.shape[:2] == _shape_of(arguments, mask)
    ]

    def poisoned(garbage: Callable[[Tensor], Tensor], why: str) -> Check:
        def check(f: Probed, case: Case) -> Iterator[Claim]:
            changed = _with_garbage(case, garbage, masked, mask)
            yield Claim(changed, f.value(changed), "==", f.value(case), why)
            for wrt in differentiable:
                if wrt in case:
                    want = f.grad(case, wrt)
                    yield Claim(
                        changed, f.grad(changed, wrt), "==", want, why + ", in the gradient too", wrt=wrt
                    )

        return check

    def padded(f: Probed, case: Case) -> Iterator[Claim]:
        changed = case | {a.name: _widened(a, case[a.name], along) for a in arguments if a.name in case}
        value, length = f.value(case), case[mask].shape[-1]
        take = f"[..., :{length}]" if value.ndim == case[mask].ndim else ""
        got = f.value(changed)[..., :length] if take else f.value(changed)
        why = "two more columns of padding change nothing"
        want = value if value.ndim else _resized(f, value, case, changed)
        yield Claim(changed, got, "==", want, why, take=take)

    def exactly_zero(f: Probed, case: Case) -> Iterator[Claim]:
        if f.per_element:
            outside = f.raw(case).masked_fill(case[mask], 0.0)
            take = f".masked_fill(tensor({case[mask].tolist()}), 0.0)"
            why = "0 where the mask is False"
            yield Claim(case, outside, "==", torch.zeros_like(outside), why, take=take, raw=True)

    return (
        Law("garbage_under_mask", "mask", "finite numbers under the mask change neither value nor gradient",
            "AReaL #1346, ROLL #447, SkyRL #1305", poisoned(_other_numbers, "other numbers under the mask"),
            (mask,)),
        Law("nan_under_mask", "mask", "NaN under the mask changes neither value nor gradient",
            "OpenRLHF #1240, verl #2377: NaN · 0 is NaN", poisoned(lambda x: torch.full_like(x, torch.nan),
                                                                 "NaN under the mask"), (mask,),
            proves=NAN_SAFE),
        Law("padding_amount", "mask", "more padding changes nothing", "TRL #6809, open-instruct #535", padded,
            (mask,)),
        Law("zero_under_mask", "mask", "the result is exactly 0 where the mask is False", "verl #1527",
            exactly_zero, (mask,), proves=zeros),
    )  # fmt: skip


def _with_garbage(case: Case, garbage: Callable[[Tensor], Tensor], names: Sequence[str], mask: str) -> Case:
    """The case with something else in these tensors, wherever the mask is False."""
    changed = dict(case)
    for name in names:
        if name in case:
            keep = case[mask].reshape(*case[mask].shape, *(1,) * (case[name].ndim - case[mask].ndim))
            changed[name] = torch.where(keep, case[name], garbage(case[name]))
    return changed


def _other_numbers(x: Tensor) -> Tensor:
    return (torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape) * 7.3 + 1).sin() * 5


def empty_row_law(arguments: Sequence[Argument]) -> Law:
    """A row in which nothing counts adds nothing and breaks nothing."""
    mask = next(a.name for a in arguments if isinstance(a.domain, Mask))

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        rows = len(case[mask])
        index = torch.cat([torch.arange(rows), torch.tensor([0])])
        changed = rows_of(arguments, case, index, axis=_shape_of(arguments, mask)[0])
        changed[mask] = changed[mask].clone()
        changed[mask][-1] = False
        got = f.value(changed)
        yield Claim(changed, got, "finite", None, "a row in which nothing counts is legal")
        if f.by_row:
            yield Claim(changed, got[:rows], "==", f.value(case), "the other rows stay", take=f"[:{rows}]")

    return Law("empty_row", "mask", "a row in which nothing counts is finite and changes no other row",
               "open-instruct #1685, verl #782, TRL #5662", check, (mask,), proves=EMPTY_ROWS)  # fmt: skip


def numeric_laws(tensors: Sequence[str], *, loose: float = 5e4) -> tuple[Law, ...]:
    """fp32 is close to fp64, bf16 is computed in fp32, and inputs are left alone.

    loose: how many times 1e-8, relative, single precision may be off.
    """

    def in_dtype(case: Case, dtype: torch.dtype) -> Case:
        return {n: v.to(dtype) if n in tensors and isinstance(v, Tensor) else v for n, v in case.items()}

    def single(f: Probed, case: Case) -> Iterator[Claim]:
        changed = in_dtype(case, torch.float32)
        exact = f.value(in_dtype(changed, torch.float64))
        yield Claim(changed, f.value(changed), "==", exact, "fp32 in, the fp64 result to 5e-4", loose=loose)

    def half(f: Probed, case: Case) -> Iterator[Claim]:
        changed = in_dtype(case, torch.bfloat16)
        exact = f.value(in_dtype(changed, torch.float64))
        why = "bf16 in, computed in fp32: the fp64 result of the rounded inputs to 5e-4"
        yield Claim(changed, f.value(changed), "==", exact, why, loose=loose)

    def pure(f: Probed, case: Case) -> Iterator[Claim]:
        yield Claim(case, f.value(case), "==", f.value(case), "a second call gives the same")
        written = f.written_to(case)
        yield Claim(case, torch.tensor(not written), "holds", None, f"written to: {', '.join(written)}")

    return (
        Law("single_precision", "numeric", "fp32 inputs give the fp64 result to single precision",
            "oracles in fp64", single),
        Law("bfloat16", "numeric", "bf16 inputs are computed in fp32",
            "NeMo-RL, verl: log-probs upcast first", half, proves=BFLOAT16),
        Law("pure", "numeric", "inputs are left alone, and a second call gives the same",
            "purity: TRL #3337", pure),
    )  # fmt: skip


def finite_at(
    name: str,
    statement: str,
    source: str,
    cases: Callable[[], list[Case]],
    *,
    gradients: Sequence[str] = (),
    needs: tuple[str, ...] = (),
) -> Law:
    """Value and gradients stay finite, and right, on extreme cases."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        yield Claim(case, f.value(case), "==", f.expected(case), statement)
        for wrt in gradients:
            yield Claim(case, f.grad(case, wrt), "==", f.expected_grad(case, wrt), statement, wrt=wrt)

    return Law(name, "numeric", statement, source, check, needs, cases=cases)


def column(*values: float) -> Tensor:
    """A fp64 tensor [B]."""
    return torch.tensor(values, dtype=torch.float64)


def table(*rows: Sequence[float]) -> Tensor:
    """A fp64 tensor [B, T]."""
    return torch.tensor(rows, dtype=torch.float64)


def _resized(f: Probed, value: Tensor, case: Case, changed: Case) -> Tensor:
    """A scalar for the changed batch, if all that changes it is how many elements are reduced."""
    before, after = f.expected(case), f.expected(changed)
    return value * (after / before) if bool(before.abs() > 1e-9) else value + after - before


def _shape_of(arguments: Sequence[Argument], name: str) -> tuple[str, ...]:
    return next(a.shape for a in arguments if a.name == name)


def _widened(argument: Argument, value: object, along: str) -> object:
    """Two more columns at the end of the axis `along`: False in a mask, other numbers elsewhere."""
    if not isinstance(value, Tensor) or along not in argument.shape:
        return value
    axis = argument.shape.index(along)
    more = value.narrow(axis, 0, 1).expand(*(2 if i == axis else s for i, s in enumerate(value.shape)))
    filler = torch.zeros_like(more) if isinstance(argument.domain, Mask | Counts) else more * 0.5 + 1.25
    return torch.cat([value, filler], dim=axis)
