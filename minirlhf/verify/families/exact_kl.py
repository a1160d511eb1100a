"""The exact KL(π‖π_ref) of two next-token laws, the sum over the vocabulary.

The other direction is a defect here: it is certified with its arguments named the other way round
(logits="ref_logits", ref_logits="logits").
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirlhf.verify.families import vocabulary
from minirlhf.verify.families.one_step import mask_of
from minirlhf.verify.kinds import Case, Claim, Kind, Law, Options, Probed
from minirlhf.verify.laws import (
    batch_laws,
    bounded,
    empty_row_law,
    formula,
    golden,
    mask_laws,
    numeric_laws,
    relation,
    table,
)

BOTH = ("logits", "ref_logits")
REF_LOGITS_NAMES = tuple(
    """
    reference_logits base_logits teacher_logits logits_ref ref_log_probs ref_logprobs ref_logps ref_logp
    reference_log_probs target_logits y
""".split()
)
ARGUMENTS = (
    vocabulary.argument("logits", "logits of π, the law that is sampled from", vocabulary.LOGITS_NAMES),
    vocabulary.argument("ref_logits", "logits of π_ref", REF_LOGITS_NAMES),
    mask_of("logits"),
)
FACTORS = {1.0: "nats", 1 / math.log(2): "bits (logarithms to base 2)"}


def logs(*law: float) -> list[float]:
    """Log-probs of a law."""
    return [math.log(p) if p > 0 else -math.inf for p in law]


def _position(policy: list[float], ref: list[float]) -> Case:
    """One position with these log-probs."""
    both = {
        name: torch.tensor([[z]], dtype=torch.float64) for name, z in zip(BOTH, (policy, ref), strict=True)
    }
    return {**both, "mask": torch.ones(1, 1, dtype=torch.bool)}


def _exact_kl(case: Case, options: Options) -> Tensor:
    """Position by position, over the tokens that π can draw."""
    keep = case["mask"][..., None]
    logp, ref_logp = (torch.log_softmax(torch.where(keep, case[name], 0.0), dim=-1) for name in BOTH)
    possible = logp > -math.inf
    s = torch.where(possible, logp, 0.0) - torch.where(possible, ref_logp, 0.0)
    return torch.where(case["mask"], (logp.exp() * s).sum(-1), 0.0)


def _probabilities(case: Case) -> tuple[Tensor, Tensor]:
    """(π, π_ref), [B, T, V] each, uniform where nothing counts."""
    keep = case["mask"][..., None]
    p, q = (torch.softmax(torch.where(keep, case[name], 0.0), dim=-1) for name in BOTH)
    return p, q


def _bound(per_position: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Case, Probed], Tensor]:
    """A bound that is a function of both laws; it is 0 where nothing counts, as the KL."""
    return lambda case, f: f.reduced(
        torch.where(case["mask"], per_position(*_probabilities(case)), 0.0), case
    )


def _donsker_varadhan(p: Tensor, q: Tensor) -> Tensor:
    g = torch.cos(1.3 * torch.arange(p.shape[-1], dtype=torch.float64))
    return (p * g).sum(-1) - (q * g.exp()).sum(-1).log()


def _merged(case: Case) -> Case:
    """The last two tokens become one."""
    return {
        **case,
        **{n: torch.cat([case[n][..., :-2], case[n][..., -2:].logsumexp(-1, True)], -1) for n in BOTH},
    }


def _drawn_twice(case: Case) -> Case:
    """Pairs of tokens, both drawn from the same law."""
    return {**case, **{n: (case[n][..., :, None] + case[n][..., None, :]).flatten(-2) for n in BOTH}}


def _half_the_way(case: Case) -> Case:
    """π goes half of the way to π_ref, in probability."""
    p, q = _probabilities(case)
    return {**case, "logits": torch.where(case["mask"][..., None], ((p + q) / 2).log(), case["logits"])}


def _at_most(name: str, statement: str, source: str, change: Callable[[Case], Case], share: float) -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = change(case)
        yield Claim(changed, f.value(changed), "<=", share * f.value(case), statement)

    return Law(name, "identity", statement, source, check)


def _descent() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        stepped = case["logits"] - 1e-3 * vocabulary.through_softmax(f.grad(case, "logits"), case["logits"])
        after = _exact_kl({**case, "logits": stepped}, {})
        falls = after < _exact_kl(case, {})
        yield Claim(case, falls, "holds", None, "one step against the gradient lowers the KL", wrt="logits")

    return Law(
        "descent",
        "gradient",
        "a step against the gradient lowers KL(π‖π_ref)",
        "bugs P12",
        check,
        (vocabulary.DIFFERENTIABLE,),
        cases=_apart,
    )


def _apart() -> list[Case]:
    return [
        _position(logs(0.5, 0.5), logs(0.25, 0.75)),
        _position(logs(0.6, 0.3, 0.1), logs(0.2, 0.3, 0.5)),
        _position(logs(0.05, 0.05, 0.9), logs(0.4, 0.3, 0.3)),
    ]


def _excluding() -> list[Case]:
    return [
        _position(logs(0.5, 0.5, 0.0), logs(0.25, 0.75, 0.0)),
        _position(logs(0.0, 0.2, 0.8), logs(0.3, 0.3, 0.4)),
    ]


def _extreme() -> list[Case]:
    return [
        _position([0.0, -1e4], logs(0.5, 0.5)),
        _position([-1e4, 0.0, -2e4], [-50.0, -1e3, 0.0]),
        _position(logs(0.5, 0.5), [0.0, -1e3]),
    ]


EXACT_KL = Kind(
    name="exact_kl",
    title="KL(π‖π_ref) of the next-token laws, summed over the vocabulary",
    arguments=ARGUMENTS,
    returns="[B, T] in nats",
    shape=("B", "T"),
    oracle=_exact_kl,
    differentiable=("logits",),
    arrange=vocabulary.normalised(*BOTH),
    reducible=True,
    factors=FACTORS,
    mask="mask",
    laws=(
        formula("Σ π (log π - log π_ref) at each position", "Kullback & Leibler 1951"),
        golden(
            "golden_direction",
            _apart()[0],
            table([0.143841]),
            "KL([½, ½]‖[¼, ¾]) = .143841; the other direction has .130812",
            "oracles 5.3; aprender #2153, TRL #3043: F.kl_div takes its arguments the other way round",
        ),
        vocabulary.logit_gradient(
            "logits",
            "∂KL/∂zᵥ = π(v) (s(v) - KL), or no gradient at all",
            "oracles KL4",
            unless_constant=_apart()[1],
        ),
        vocabulary.differentiable("logits", lambda: _apart()[:2]),
        _descent(),
        relation(
            "zero_where_equal",
            "limit",
            "0 where both laws agree",
            "oracles KL2, P9",
            lambda c: {**c, "ref_logits": c["logits"]},
            lambda v, c, f: torch.zeros_like(v),
        ),
        bounded(
            "non_negative",
            "limit",
            "never negative",
            "Gibbs's inequality",
            ">=",
            _bound(lambda p, q: 0 * p[..., 0]),
        ),
        bounded(
            "donsker_varadhan",
            "limit",
            "at least E_π g - log E_ref eᵍ for every g",
            "oracles KL6",
            ">=",
            _bound(_donsker_varadhan),
        ),
        bounded(
            "pinsker",
            "limit",
            "at least half the squared L1 distance of the laws",
            "oracles KL7: Pinsker",
            ">=",
            _bound(lambda p, q: (p - q).abs().sum(-1) ** 2 / 2),
        ),
        bounded(
            "below_renyi",
            "limit",
            "at most log Σ π²/π_ref",
            "van Erven & Harremoës 2014: Rényi divergences rise with their order",
            "<=",
            _bound(lambda p, q: (p * p / q).sum(-1).log()),
        ),
        *vocabulary.shift_laws(BOTH),
        vocabulary.id_permutation(BOTH),
        _at_most(
            "merged_tokens",
            "merging two tokens into one raises no KL",
            "oracles KL7: data processing",
            _merged,
            1.0,
        ),
        _at_most(
            "half_the_way",
            "half of the way to π_ref at most half of the KL is left",
            "KL is convex",
            _half_the_way,
            0.5,
        ),
        relation(
            "two_draws",
            "identity",
            "two independent draws have twice the KL of one",
            "oracles KL5: the chain rule",
            _drawn_twice,
            lambda v, c, f: 2 * v,
        ),
        *vocabulary.minus_infinity_laws("logits", _excluding, metric=True),
        vocabulary.extreme_law(_extreme),
        *mask_laws(ARGUMENTS, differentiable=("logits",)),
        empty_row_law(ARGUMENTS),
        *batch_laws(ARGUMENTS),
        *numeric_laws(BOTH),
    ),
)

KINDS = (EXACT_KL,)
