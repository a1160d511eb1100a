"""Laws of losses with one number per token or per sequence: what weighs how much, and who sees whom."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from minirlhf.verify.kinds import Argument, Case, Claim, Law, Probed, Reals
from minirlhf.verify.laws import NAN_SAFE, rows_of


def counted(x: Tensor, case: Case) -> Tensor:
    """x where the mask is True, 0 elsewhere; [B, T]."""
    return torch.where(case["mask"], x, torch.zeros_like(x))


def per_token(case: Case) -> Tensor:
    """What a result per token is weighed on: zeros [B, T]."""
    return torch.zeros(case["mask"].shape, dtype=torch.float64)


def per_row(case: Case) -> Tensor:
    """What a result per sequence is weighed on: zeros [B]."""
    return torch.zeros(len(case["mask"]), dtype=torch.float64)


def weights(f: Probed, case: Case, elements: Callable[[Case], Tensor] = per_token) -> Tensor:
    """How much each element counts in the sum of the subject's result: 1 where it reduces nothing."""
    x = elements(case).requires_grad_()
    inside = counted(x, case) if x.shape == case["mask"].shape else x
    (weight,) = torch.autograd.grad(f.reduced(inside, case).sum(), x)
    return weight


def micro_batches(arguments: Sequence[Argument], elements: Callable[[Case], Tensor] = per_token) -> Law:
    """A scalar is the sum of its parts, each weighed with its share of the whole."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        count = len(case["mask"])
        if f.by_row or count < 2:  # a result per row has no shares: then the law is that a row stands alone
            return
        total = torch.zeros((), dtype=torch.float64)
        for index in (torch.arange(1), torch.arange(1, count)):
            part, inside = rows_of(arguments, case, index), elements(case)
            inside[index] = 1.0
            inside = counted(inside, case) if inside.shape == case["mask"].shape else inside
            ones = torch.ones_like(elements(part))
            ones = counted(ones, part) if ones.shape == part["mask"].shape else ones
            share = f.reduced(inside, case) / f.reduced(ones, part)
            total = total + share * f.value(part)
        why = "the first row and the others, each weighed with its share, give the whole"
        yield Claim(case, f.value(case), "==", total, why)

    return Law("micro_batches", "batch",
               "the loss of a batch is the weighed sum of its micro-batches' losses",
               "oracles P13; bugs H02, H05: means of means", check)  # fmt: skip


def token_order(arguments: Sequence[Argument], *, gradients: Sequence[str] = ()) -> Law:
    """Which place a token has in its sequence does not matter."""
    along = {a.name: a.shape.index("T") for a in arguments if "T" in a.shape}

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = {n: v.flip(along[n]) if n in along else v for n, v in case.items()}
        value, why = f.value(case), "the tokens of every row in reverse order"
        want = value.flip(-1) if value.shape == case["mask"].shape else value
        yield Claim(changed, f.value(changed), "==", want, why)
        for wrt in gradients:
            want = f.grad(case, wrt).flip(along[wrt])
            yield Claim(changed, f.grad(changed, wrt), "==", want, why, wrt=wrt)

    return Law("token_order", "symmetry",
               "reordering the tokens of a row reorders the result, and no sum or mean",
               "property of a loss that is a sum over tokens", check)  # fmt: skip


def token_repeated(
    arguments: Sequence[Argument], result: Callable[[Tensor], Tensor], statement: str, source: str
) -> Law:
    """Every token of every sequence twice; result: the value then, from the value now."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = case | {
            a.name: case[a.name].repeat_interleave(2, a.shape.index("T"))
            for a in arguments
            if a.name in case and "T" in a.shape
        }
        yield Claim(changed, f.value(changed), "==", result(f.value(case)), statement)

    return Law("token_repeated", "symmetry", statement, source, check)


def no_gradient(argument: str, source: str, *, proves: str | None = None) -> Law:
    """The argument is a constant of the equation (its stop-gradient).

    proves: the behaviour that a gradient disproves, for what is recorded data and gets none anyway.
    """
    statement = f"no gradient reaches {argument}"

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        none = torch.zeros_like(case[argument])
        yield Claim(case, f.grad(case, argument), "==", none, statement, wrt=argument)

    return Law(f"no_gradient_of_{argument}", "gradient", statement, source, check, proves=proves)


def nan_not_passed_on(arguments: Sequence[Argument]) -> Law:
    """What `mask_laws` cannot see, since it looks under the mask only where nothing is poisoned."""
    tokens = [a.name for a in arguments if isinstance(a.domain, Reals) and a.shape == ("B", "T")]

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        if f.per_element:
            poisoned = case | {n: case[n].masked_fill(~case["mask"], torch.nan) for n in tokens if n in case}
            why = "a number everywhere, under the mask too, though NaN lies there"
            yield Claim(poisoned, f.raw(poisoned), "finite", None, why, raw=True)

    return Law("nan_not_passed_on", "mask", "NaN under the mask does not come out again", "OpenRLHF #1240",
               check,
               ("mask",), proves=NAN_SAFE)  # fmt: skip


def without(laws: Sequence[Law], *names: str) -> tuple[Law, ...]:
    """The laws, but for those of these names."""
    return tuple(law for law in laws if law.name not in names)
