"""What every number of a whole next-token law has in common: logits count up to a constant, ids are names.

The cases hold normalised log-probs, which are logits too, so that a function of log-probs can be tried; that
unnormalised logits are understood is a law of its own.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from minirlhf.verify.kinds import Argument, Case, Claim, Law, Probed, Reals
from minirlhf.verify.laws import finite_at, invariance

UNNORMALISED = "unnormalised logits"
MINUS_INFINITY = "-inf logits"
MINUS_INFINITY_GRADIENT = "gradient with -inf logits"
EXTREME = "extreme logits"
DIFFERENTIABLE = "differentiable"
LOGITS_NAMES = tuple(
    """
    logit policy_logits shift_logits pi_logits student_logits log_probs logprobs logps logp policy_log_probs
    all_log_probs full_logprobs scores z x
""".split()
)


def argument(name: str, meaning: str, synonyms: Sequence[str]) -> Argument:
    """Logits [B, T, V]."""
    return Argument(name, ("B", "T", "V"), Reals(-3.0, 3.0), meaning, synonyms=tuple(synonyms))


def normalised(*names: str) -> Callable[[Case], Case]:
    """Brings the logits of these names into the form of log-probs."""
    return lambda case: {**case, **{name: torch.log_softmax(case[name], dim=-1) for name in names}}


def wants_log_probs(f: Probed, name: str) -> bool:
    """Whether the subject says by the name of its parameter that it wants log-probs, not logits."""
    theirs = f.named(name).lower()
    return "logit" not in theirs and ("log" in theirs or theirs == "lp")


def through_softmax(gradient: Tensor, logits: Tensor) -> Tensor:
    """The gradient by logits of a function of their log-softmax; a function of logits has it already."""
    p = torch.softmax(logits, dim=-1)
    return gradient - p * torch.where(p > 0, gradient, 0.0).sum(dim=-1, keepdim=True)


def shift_laws(names: Sequence[str]) -> tuple[Law, Law]:
    """A constant added to the logits of a position changes nothing."""

    def shifted(case: Case) -> Case:
        changed = dict(case)
        for place, name in enumerate(names):
            rows, length, _ = case[name].shape
            constant = torch.arange(rows * length, dtype=torch.float64).reshape(rows, length, 1)
            changed[name] = case[name] + (1.5 - constant / 4) * (-1) ** place
        return changed

    statement = "a constant added to all logits of a position changes nothing"
    law = invariance("unnormalised_logits", "symmetry", statement, "softmax(z + c) = softmax(z)", shifted)

    def unless_named(f: Probed, case: Case) -> Iterator[Claim]:
        if not wants_log_probs(f, names[0]):
            yield from law.check(f, case)

    return (
        Law(
            "shift_of_logits",
            "symmetry",
            f"{statement}, unless the parameter is called a log-prob",
            "oracles SL12: logits taken for log-probs",
            unless_named,
        ),
        law._replace(proves=UNNORMALISED),
    )


def id_permutation(names: Sequence[str]) -> Law:
    """Token ids are names."""
    return invariance(
        "vocabulary_permutation",
        "symmetry",
        "renaming the token ids changes nothing",
        "oracles SL11",
        lambda c: {**c, **{n: c[n].flip(-1) for n in names}},
    )


def logit_gradient(name: str, statement: str, source: str, *, unless_constant: Case | None = None) -> Law:
    """The gradient through a softmax is the formula's. Where the subject gives none in the case
    `unless_constant`, in which the right one is not 0, it may be a constant, as under no_grad."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        got = through_softmax(f.grad(case, name), case[name])
        constant = unless_constant is not None and not bool(f.grad(unless_constant, name).any())
        want = torch.zeros_like(got) if constant else f.expected_grad(case, name)
        yield Claim(case, got, "==", want, statement, wrt=name)

    return Law(f"gradient_of_{name}", "gradient", statement, source, check)


def differentiable(name: str, cases: Callable[[], list[Case]]) -> Law:
    """That there is a gradient, where right implementations may have none."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        why = "the gradient is 0 everywhere: the result is a constant"
        yield Claim(case, f.grad(case, name).any(), "holds", None, why, wrt=name)

    return Law(
        "differentiable",
        "gradient",
        "the result can be differentiated",
        "bugs P12",
        check,
        proves=DIFFERENTIABLE,
        cases=cases,
    )


def minus_infinity_laws(name: str, cases: Callable[[], list[Case]], *, metric: bool) -> tuple[Law, Law]:
    """Excluded tokens, logits of -inf, have probability 0. metric: it is often not differentiated, so that a
    gradient is a feature; otherwise a value that hides a wrong gradient is a defect."""

    def value(f: Probed, case: Case) -> Iterator[Claim]:
        yield Claim(
            case, f.value(case), "==", f.expected(case), "a token of probability 0 adds 0 · log 0 = 0"
        )

    def gradient(f: Probed, case: Case) -> Iterator[Claim]:
        got = f.grad(case, name)
        yield Claim(case, got, "finite", None, "0 · log 0 has the gradient 0, not NaN", wrt=name)
        if not metric or bool(got.any()):
            got, want = through_softmax(got, case[name]), f.expected_grad(case, name)
            yield Claim(case, got, "==", want, "the gradient of the tokens that are left", wrt=name)

    return (
        Law(
            "excluded_tokens",
            "numeric",
            "a token with logit -inf counts as impossible",
            "bugs L01: TRL #7221, #7252",
            value,
            proves=MINUS_INFINITY,
            cases=cases,
        ),
        Law(
            "gradient_with_excluded_tokens",
            "numeric",
            "where a logit is -inf the gradient is finite, and right",
            "bugs L01: nan_to_num hides only the forward pass",
            gradient,
            (MINUS_INFINITY,),
            proves=MINUS_INFINITY_GRADIENT if metric else None,
            cases=cases,
        ),
    )


def extreme_law(cases: Callable[[], list[Case]]) -> Law:
    """Log-probs whose probabilities are 0 in every precision."""
    law = finite_at(
        "extreme_logits",
        "at log-probs from -1,000 to -20,000 the value is finite and right",
        "bugs P21",
        cases,
    )
    return law._replace(proves=EXTREME)
