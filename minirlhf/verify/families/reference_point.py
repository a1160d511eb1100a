"""The reference point of KTO: an estimate of KL(π‖π_ref) from mismatched prompts and responses, detached."""

from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.pairs import shifted
from minirlhf.verify.families.preference import RESPONSE
from minirlhf.verify.kinds import Case, Claim, Kind, Law, Options, Probed
from minirlhf.verify.laws import (
    bounded,
    column,
    finite_at,
    formula,
    golden,
    invariance,
    numeric_laws,
    relation,
)

ETHAYARAJH = "Ethayarajh et al. 2024, section 4.1 (arXiv:2402.01306)"


def _point(case: Case, options: Options) -> Tensor:
    drift = sum(a - b for a, b in zip(case["logp"].tolist(), case["ref_logp"].tolist(), strict=True))
    return torch.tensor(max(0.0, drift / len(case["logp"])), dtype=torch.float64)


def _detached() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        for name in ("logp", "ref_logp"):
            yield Claim(
                case, f.grad(case, name), "==", torch.zeros_like(case[name]), "z₀ is detached", wrt=name
            )

    return Law(
        "detached", "gradient", "neither policy nor reference gets a gradient through z₀", "oracles K2", check
    )


def _closer(case: Case) -> Case:
    """Policy and reference exchanged."""
    return {"logp": case["ref_logp"], "ref_logp": case["logp"]}


def _one_sided() -> Law:
    """max(0, x) and max(0, -x)."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        other = _closer(case)
        drift = (case["logp"] - case["ref_logp"]).mean()
        yield Claim(
            case,
            f.value(case),
            "==",
            drift + f.value(other),
            "z₀ - z₀ of the exchanged pair is the mean of s",
        )

    return Law(
        "exchanged", "symmetry", "z₀(π, π_ref) - z₀(π_ref, π) is the mean log-ratio", "oracles K2", check
    )


def _repeated(case: Case) -> Case:
    return {name: value.repeat(2) for name, value in case.items()}


def _reversed(case: Case) -> Case:
    return {name: value.flip(0) for name, value in case.items()}


def _mixed() -> list[Case]:
    """Log-ratios of both signs, of which the mean is clamped and not the terms."""
    return [
        {"logp": column(-10.0, -12.0), "ref_logp": column(-11.0, -11.5)},
        {"logp": column(-3.0, -5.0), "ref_logp": column(-2.0, -4.5)},
        {"logp": column(-254.3, -87.1), "ref_logp": column(-251.9, -95.6)},
    ]


KTO_REFERENCE_POINT = Kind(
    name="kto_reference_point",
    title="Reference point of KTO, max(0, mean of log π(y'|x) - log π_ref(y'|x)), detached",
    arguments=RESPONSE,
    returns="[] z₀ in nats",
    shape=(),
    oracle=_point,
    extra_cases=_mixed,
    laws=(
        formula("z₀ is the mean of the log-ratios of mismatched pairs, at least 0", ETHAYARAJH),
        golden("golden_pair", _mixed()[0], torch.tensor(0.25, dtype=torch.float64),
               "log-ratios 1 and -.5: .25", "oracles K2"),
        _detached(),
        bounded("at_least_zero", "limit", "z₀ is never negative", "oracles K2", ">=",
                lambda c, f: torch.zeros((), dtype=torch.float64)),
        bounded("at_least_the_mean", "limit", "z₀ is at least the mean log-ratio", "oracles K2", ">=",
                lambda c, f: (c["logp"] - c["ref_logp"]).mean()),
        relation("zero_at_reference", "limit", "0 where the policy is the reference", ETHAYARAJH,
                 lambda c: c | {"logp": c["ref_logp"]}, lambda v, c, f: torch.zeros_like(v)),
        relation("shift", "symmetry", "every log-prob of the policy greater by 20: z₀ is 20 + the mean",
                 "oracles K2", lambda c: shifted(c, -20.0, "ref_logp"),
                 lambda v, c, f: 20 + (c["logp"] - c["ref_logp"]).mean()),
        relation("proportional", "symmetry", "every log-prob twice: z₀ twice", "oracles K2",
                 lambda c: {name: 2 * value for name, value in c.items()}, lambda v, c, f: 2 * v),
        _one_sided(),
        invariance("shifted_with_reference", "symmetry", "policy and reference shifted alike change nothing",
                   "Liger #405: reference ignored", lambda c: shifted(c, -1.25, "logp", "ref_logp")),
        invariance("repeated_batch", "batch", "every pair twice: the same, as of a mean", "P4", _repeated),
        invariance("reordered_batch", "batch", "the order of the batch does not matter", "P3", _reversed),
        finite_at("stable", "a drift of 10,000 nats is reported as it is",
                  "TRL #3015, #5984: KL overflow and clamp", lambda: [{"logp": column(-1.0, -2.0),
                                                                       "ref_logp": column(-1e4, -1e4)}]),
        *numeric_laws(("logp", "ref_logp")),
    ),
)  # fmt: skip

KINDS = (KTO_REFERENCE_POINT,)
