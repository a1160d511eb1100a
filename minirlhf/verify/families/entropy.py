"""The entropy of the next-token law, the whole sum, and the bonus that is made of it."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirlhf.verify.families import vocabulary
from minirlhf.verify.families.exact_kl import FACTORS, logs
from minirlhf.verify.families.one_step import BETA, mask_of
from minirlhf.verify.kinds import Ask, Case, Claim, Kind, Law, Options, Probed
from minirlhf.verify.laws import (
    batch_laws,
    bounded,
    empty_row_law,
    formula,
    mask_laws,
    numeric_laws,
    relation,
)

SHANNON = "Shannon 1948, A Mathematical Theory of Communication"
MNIH = "Mnih et al. 2016, section 4 (arXiv:1602.01783)"
LOGITS = vocabulary.argument("logits", "logits of π; -inf excludes a token", vocabulary.LOGITS_NAMES)
ARGUMENTS = (LOGITS, mask_of("logits"))


def _position(law: list[float]) -> Case:
    """One position with these log-probs."""
    return {"logits": torch.tensor([[law]], dtype=torch.float64), "mask": torch.ones(1, 1, dtype=torch.bool)}


def _entropy(case: Case, options: Options) -> Tensor:
    """Position by position, over the tokens that can be drawn."""
    logp = torch.log_softmax(torch.where(case["mask"][..., None], case["logits"], 0.0), dim=-1)
    possible = torch.where(logp > -math.inf, logp, 0.0)
    return torch.where(case["mask"], -(logp.exp() * possible).sum(-1), 0.0)


def _loss(case: Case, options: Options) -> Tensor:
    return -case.get("beta", 1.0) * _entropy(case, options)


def _probabilities(case: Case) -> Tensor:
    return torch.softmax(torch.where(case["mask"][..., None], case["logits"], 0.0), dim=-1)


def _bound(per_position: Callable[[Tensor], Tensor], scale: float = 1.0) -> Callable[[Case, Probed], Tensor]:
    """A bound that is a function of the law, times β where there is one; 0 where nothing counts."""

    def bound(case: Case, f: Probed) -> Tensor:
        inside = torch.where(case["mask"], per_position(_probabilities(case)), 0.0)
        return f.reduced(scale * case.get("beta", 1.0) * inside, case)

    return bound


def _log_size(p: Tensor) -> Tensor:
    return torch.full_like(p[..., 0], math.log(p.shape[-1]))


def _golden(name: str, law: tuple[float, ...], want: float, sign: int) -> Law:
    shown = ", ".join(f"{p:g}" for p in law)

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        got = f.value(case)
        target = torch.full_like(got, sign * case.get("beta", 1.0) * want, dtype=torch.float64)
        yield Claim(case, got, "==", target, f"the law ({shown}) has {want:.6f} nats", loose=1e2)

    return Law(
        name,
        "value",
        f"the law ({shown}) has {want:.6f} nats",
        SHANNON,
        check,
        cases=lambda: [_position(logs(*law))],
    )


def _uniform(case: Case) -> Case:
    return {**case, "logits": torch.full_like(case["logits"], -math.log(case["logits"].shape[-1]))}


def _flat_at_uniform() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = _uniform(case)
        got = vocabulary.through_softmax(f.grad(changed, "logits"), changed["logits"])
        yield Claim(changed, got, "==", torch.zeros_like(got), "the uniform law is the maximum", wrt="logits")

    return Law("flat_at_uniform", "gradient", "at the uniform law the gradient is 0", "oracles H1", check)


def _step(name: str, statement: str, source: str, sign: int, needs: tuple[str, ...]) -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        step = vocabulary.through_softmax(f.grad(case, "logits"), case["logits"])
        after = _entropy({**case, "logits": case["logits"] + sign * 1e-3 * step}, {})
        yield Claim(case, after > _entropy(case, {}), "holds", None, statement, wrt="logits")

    return Law(name, "gradient", statement, source, check, needs, cases=_uneven)


def _uneven() -> list[Case]:
    return [_position(logs(*law)) for law in ((0.7, 0.3), (0.6, 0.3, 0.1), (0.1, 0.2, 0.3, 0.4))]


def _excluding() -> list[Case]:
    return [_position(logs(0.6, 0.4, 0.0)), _position(logs(0.0, 0.2, 0.3, 0.5))]


def _extreme() -> list[Case]:
    return [
        _position([0.0, -1e4]),
        _position([-2e4, 0.0, -1e4]),
        _position([-1e3 - math.log(2)] + [-math.log(2)] * 2),
    ]


def _at_least(name: str, statement: str, source: str, change: Callable[[Case], Case]) -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = change(case)
        yield Claim(changed, f.value(changed), ">=", f.value(case), statement)

    return Law(name, "identity", statement, source, check)


def _hotter(case: Case) -> Case:
    return {**case, "logits": torch.log_softmax(case["logits"] / 2, dim=-1)}


def _mixed(case: Case) -> Case:
    """Half of the law, half of the uniform one."""
    p = torch.softmax(case["logits"], dim=-1)
    return {**case, "logits": (p / 2 + 0.5 / p.shape[-1]).log()}


def _split(case: Case) -> Case:
    """The last token becomes two, equally likely ones."""
    z = case["logits"]
    half = z[..., -1:] - math.log(2)
    return {**case, "logits": torch.cat([z[..., :-1], half, half], dim=-1)}


def _split_result(value: Tensor, case: Case, f: Probed) -> Tensor:
    last = torch.where(case["mask"], _probabilities(case)[..., -1], 0.0)
    return value + f.reduced(last * math.log(2), case)


def _drawn_twice(case: Case) -> Case:
    z = case["logits"]
    return {**case, "logits": (z[..., :, None] + z[..., None, :]).flatten(-2)}


ENTROPY = Kind(
    name="entropy",
    title="entropy of the next-token law, summed over the vocabulary",
    arguments=ARGUMENTS,
    returns="[B, T] in nats",
    shape=("B", "T"),
    oracle=_entropy,
    differentiable=("logits",),
    arrange=vocabulary.normalised("logits"),
    reducible=True,
    factors=FACTORS,
    mask="mask",
    laws=(
        formula("-Σ π log π at each position", SHANNON),
        _golden("golden_three", (0.5, 0.25, 0.25), 1.0397208, 1),
        _golden("golden_two", (0.25, 0.75), 0.5623351, 1),
        vocabulary.logit_gradient(
            "logits",
            "∂H/∂zᵥ = -π(v) (log π(v) + H), or no gradient at all",
            "oracles H1",
            unless_constant=_uneven()[1],
        ),
        vocabulary.differentiable("logits", _uneven),
        _step(
            "ascent",
            "a step along the gradient raises the entropy",
            "bugs F10, P12",
            1,
            (vocabulary.DIFFERENTIABLE,),
        ),
        relation(
            "uniform",
            "limit",
            "the uniform law has log V nats",
            "oracles H1",
            _uniform,
            lambda v, c, f: _bound(_log_size)(c, f),
        ),
        _flat_at_uniform(),
        bounded(
            "non_negative",
            "limit",
            "never negative",
            "bugs B18: TRL #2022, #2281",
            ">=",
            _bound(lambda p: 0 * p[..., 0]),
        ),
        bounded("at_most_log_size", "limit", "at most log V", "bugs P21", "<=", _bound(_log_size)),
        bounded(
            "above_collision_entropy",
            "limit",
            "at least -log Σ π²",
            "Rényi 1961: entropies fall with their order",
            ">=",
            _bound(lambda p: -(p * p).sum(-1).log()),
        ),
        bounded(
            "below_support_bound",
            "limit",
            "at most 2 log Σ √π",
            "Rényi 1961: entropies fall with their order",
            "<=",
            _bound(lambda p: 2 * p.sqrt().sum(-1).log()),
        ),
        *vocabulary.shift_laws(("logits",)),
        vocabulary.id_permutation(("logits",)),
        relation(
            "split_token",
            "identity",
            "a token split into two equal ones of its probability adds π log 2",
            f"{SHANNON}: grouping",
            _split,
            _split_result,
        ),
        relation(
            "two_draws",
            "identity",
            "two independent draws have twice the entropy",
            f"{SHANNON}: additivity",
            _drawn_twice,
            lambda v, c, f: 2 * v,
        ),
        _at_least(
            "hotter", "a higher temperature lowers no entropy", "softmax laws: dH/dT = Var(z)/T³", _hotter
        ),
        _at_least(
            "mixed_with_uniform", "mixing with the uniform law lowers no entropy", "H is concave", _mixed
        ),
        *vocabulary.minus_infinity_laws("logits", _excluding, metric=True),
        vocabulary.extreme_law(_extreme),
        *mask_laws(ARGUMENTS, differentiable=("logits",)),
        empty_row_law(ARGUMENTS),
        *batch_laws(ARGUMENTS),
        *numeric_laws(["logits"]),
    ),
)


def _measured_beta(ask: Ask) -> float | None:
    """A built-in coefficient, where two laws show the same one."""
    beta, again = (
        abs(ask(_position(logs(p, 1 - p)))) / h for p, h in ((0.5, math.log(2)), (0.25, 0.5623351))
    )
    usual = any(math.isclose(beta, x, rel_tol=1e-4) for x in (0.0, 1.0, 2.0, 0.5, 1 / math.log(2)))
    return beta if math.isclose(beta, again, rel_tol=1e-4) and not usual else None


def _linear_in_beta() -> Law:
    return relation(
        "linear_in_beta",
        "symmetry",
        "three times β, three times the loss",
        "it is a coefficient",
        lambda c: {**c, "beta": 3 * c["beta"]} if "beta" in c else c,
        lambda v, c, f: 3 * v if "beta" in c else v,
        needs=("beta",),
    )


ENTROPY_LOSS = Kind(
    name="entropy_loss",
    title="the entropy bonus as a loss: -β H of the next-token law, summed over the vocabulary",
    arguments=(*ARGUMENTS, BETA),
    returns="[B, T] in nats, at most 0",
    shape=("B", "T"),
    oracle=_loss,
    differentiable=("logits",),
    arrange=vocabulary.normalised("logits"),
    reducible=True,
    signed=True,
    mask="mask",
    measure={"beta": _measured_beta},
    laws=(
        formula("β Σ π log π at each position", MNIH),
        _golden("golden_three", (0.5, 0.25, 0.25), 1.0397208, -1),
        vocabulary.logit_gradient("logits", "∂loss/∂zᵥ = β π(v) (log π(v) + H)", "oracles H1"),
        _step(
            "descent",
            "a step against the gradient raises the entropy",
            "bugs F10, P12: the policy collapses",
            -1,
            (),
        ),
        relation(
            "uniform",
            "limit",
            "the uniform law has the least loss, -β log V",
            "oracles H1",
            _uniform,
            lambda v, c, f: _bound(_log_size, -1.0)(c, f),
        ),
        _flat_at_uniform(),
        bounded(
            "at_least_minus_log_size", "limit", "at least -β log V", "bugs P21", ">=", _bound(_log_size, -1.0)
        ),
        bounded("non_positive", "limit", "at most 0", "bugs B18", "<=", _bound(lambda p: 0 * p[..., 0])),
        *vocabulary.shift_laws(("logits",)),
        vocabulary.id_permutation(("logits",)),
        relation(
            "two_draws",
            "identity",
            "two independent draws have twice the entropy",
            f"{SHANNON}: additivity",
            _drawn_twice,
            lambda v, c, f: 2 * v,
        ),
        _linear_in_beta(),
        *vocabulary.minus_infinity_laws("logits", _excluding, metric=False),
        vocabulary.extreme_law(_extreme),
        *mask_laws(ARGUMENTS, differentiable=("logits",)),
        empty_row_law(ARGUMENTS),
        *batch_laws((*ARGUMENTS, BETA)),
        *numeric_laws(["logits"]),
    ),
)

KINDS = (ENTROPY, ENTROPY_LOSS)
