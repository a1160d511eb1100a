"""Weights for tokens that another policy sampled: the ratio, cut at a cap or masked outside of a band."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.ratios import LOGP, LOGP_NAMES, MASK, NEAR, OLD, OLD_NAMES, log_ratios
from minirlhf.verify.kinds import Argument, Ask, Case, Claim, Convention, Kind, Law, Numbers, Options, Probed
from minirlhf.verify.laws import (
    batch_laws,
    bounded,
    empty_row_law,
    formula,
    golden,
    invariance,
    mask_laws,
    numeric_laws,
    table,
)
from minirlhf.verify.token_laws import counted, nan_not_passed_on, no_gradient, token_order

IONIDES = "Ionides 2008, Truncated Importance Sampling; Yao et al. 2025, off-policy RL training"
ICEPOP = "Ling Team 2025, IcePop (arXiv:2510.18855)"
BEHAVIOUR_NAMES = ("behavior_logp", "behaviour_log_probs", "behavior_log_probs", "behaviour_logprobs",
                   "behavior_logprobs", "rollout_log_probs", "rollout_log_prob", "rollout_logprobs",
                   "rollout_logps",
                   "sampling_logps", "sampling_per_token_logps", "sampling_logprobs", "sampler_logprobs",
                   "generation_logprobs", "inference_logprobs", "inference_logp", "vllm_logprobs",
                   "vllm_logps",
                   "actor_logprobs", "mu_logp", "mu_logprobs", "logp_mu", "b_logp")  # fmt: skip
TRAINED = LOGP._replace(synonyms=(*LOGP_NAMES, "trainer_logprobs", "training_logprobs", *OLD_NAMES))
BEHAVIOUR = OLD._replace(name="behaviour_logp",
                         meaning="log π_behaviour of the same tokens, which it sampled",
                         synonyms=(*BEHAVIOUR_NAMES, *OLD_NAMES))  # fmt: skip
TOKENS = (TRAINED, BEHAVIOUR, MASK)
CAP = Argument("cap", (), Numbers((2.0, 1.5, 4.0), usual=(2.0, 5.0, 1.0)), "C > 0, the largest weight",
               synonyms=("tis_cap", "tis_imp_ratio_cap", "importance_sampling_cap",
                         "vllm_importance_sampling_cap",
                         "imp_ratio_cap", "is_cap", "max_weight", "max_ratio", "truncation", "threshold",
                         "is_threshold",
                         "rollout_is_threshold", "rho_max", "c_max", "clip_max", "clip", "upper",
                         "max_is"))  # fmt: skip
LOW = Argument("low", (), Numbers((0.5, 0.25, 0.8), usual=(0.5, 0.8, 0.0)), "the smallest ratio that is kept",
               synonyms=("lower", "lower_bound", "min_ratio", "min_weight", "low_threshold", "threshold_low",
                         "mask_low",
                         "rollout_is_threshold_lower", "icepop_low", "alpha", "clip_low", "ratio_low",
                         "low_bound"))  # fmt: skip
HIGH = Argument("high", (), Numbers((2.0, 3.0, 1.25), usual=(2.0, 5.0, 1.2)),
                "the largest ratio that is kept",
                synonyms=("upper", "upper_bound", "max_ratio", "max_weight", "high_threshold",
                          "threshold_high",
                          "mask_high", "rollout_is_threshold", "icepop_high", "beta", "clip_high",
                          "ratio_high",
                          "high_bound", "cap", "threshold"))  # fmt: skip
LEVELS = {
    "token": "the ratio of each token",
    "product": "the ratio of the whole sequence, on each of its tokens",
    "mean": "the geometric mean over the sequence, on each of its tokens",
}


def _log_ratio(case: Case) -> Tensor:
    return counted(case["logp"], case) - counted(case["behaviour_logp"], case)


def _of_level(case: Case, level: str) -> Tensor:
    """The ratio that a level looks at, [B, T]."""
    log_rho = _log_ratio(case)
    if level == "token":
        return log_rho.exp()
    total = log_rho.sum(-1, keepdim=True).expand_as(log_rho)
    return (total if level == "product" else total / case["mask"].sum(-1, keepdim=True).clamp(min=1)).exp()


def _truncated(case: Case, options: Options) -> Tensor:
    return counted(_of_level(case, options["level"]).clamp(max=case["cap"]), case).detach()


def _kept(case: Case, options: Options) -> Tensor:
    """Whether each token is in the band, [B, T] bool."""
    looked_at = _of_level(case, options["band"])
    return case["mask"] & (looked_at >= case["low"]) & (looked_at <= case["high"])


def _masked(case: Case, options: Options) -> Tensor:
    weight = _of_level(case, "token" if options["band"] == "token" else options["level"])
    weight = torch.ones_like(weight) if options["level"] == "one" else weight
    return torch.where(_kept(case, options), weight, 0.0).detach()


def _arranged(*names: str) -> Callable[[Case], Case]:
    """log π from the drawn log ρ; codes become ratios on both sides of the limits of these names."""

    def arrange(case: Case) -> Case:
        near = [case.get(name, 2.0) * (1 + d) for name in names for d in (NEAR, -NEAR)]
        codes = torch.where(case["logp"] >= 10 + len(near), 1.0, case["logp"])
        return case | {"logp": case["behaviour_logp"] + log_ratios(codes, near)}

    return arrange


def _shifted(case: Case) -> Case:
    return {**case, "logp": case["logp"] + 0.75, "behaviour_logp": case["behaviour_logp"] + 0.75}


def _at_behaviour(case: Case) -> Case:
    return {**case, "logp": case["behaviour_logp"].clone()}


def _one(cap_name: str) -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        same = _at_behaviour(case)
        most = case[cap_name] if cap_name == "cap" else math.inf
        want = counted(torch.full_like(case["logp"], min(1.0, most)), case)
        yield Claim(same, f.value(same), "==", want, "the policies agree: a weight of 1")

    return Law(
        "one_where_policies_agree",
        "limit",
        "1 where both policies give the same probability",
        "oracles T3",
        check,
    )


def _single(rho: Tensor, **numbers: float) -> Case:
    """One token per row with these ratios."""
    old = torch.full((len(rho), 1), -2.0, dtype=torch.float64)
    mask = torch.ones_like(old, dtype=torch.bool)
    return {"logp": old + rho.log()[:, None], "behaviour_logp": old, "mask": mask, **numbers}


_GRID = torch.tensor([0.02, 0.3, 0.7, 1.0, 1.1, 1.9, 2.6, 40.0], dtype=torch.float64)


def _single_tokens(f: Probed, case: Case) -> Iterator[Claim]:
    near = torch.tensor([case["cap"] * (1 - NEAR), case["cap"] * (1 + NEAR)], dtype=torch.float64)
    rho = torch.cat([_GRID, near])
    there = _single(rho, cap=case["cap"])
    want = torch.minimum(rho, torch.tensor(case["cap"]).double())[:, None]
    yield Claim(there, f.value(there), "==", want, "on a single token every level is the same: min(ρ, C)")


def _increasing(f: Probed, case: Case) -> Iterator[Claim]:
    more = {**case, "logp": case["logp"] + 0.25}
    yield Claim(more, f.value(more), ">=", f.value(case), "a token that became likelier weighs no less")


def _wider(f: Probed, case: Case) -> Iterator[Claim]:
    wide = case | {"cap": 1e12}
    rho = counted(_of_level(case, f.options["level"]), case)
    yield Claim(wide, f.value(wide), "==", rho, "a cap out of reach: the plain importance ratio")
    yield Claim(wide, f.value(wide), ">=", f.value(case), "a larger cap gives no smaller weight")


def _unbiased(cap: float | None) -> Callable[[Probed, Case], Iterator[Claim]]:
    """Over the tokens of a small vocabulary: E_behaviour[ρ] = 1, and a cap only takes away."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        mean = (f.value(case)[:, 0] * case["behaviour_logp"][:, 0].exp()).sum()
        why = "the expected weight under the policy that sampled"
        if cap is None:
            yield Claim(case, (mean - 1).abs() < 1e-6, "holds", None, f"{why} is 1")
        else:
            yield Claim(case, (mean <= 1 + 1e-6) & (mean > 0.5), "holds", None, f"{why} is at most 1")

    return check


def _vocabulary(**numbers: float) -> Case:
    policy = torch.log_softmax(torch.tensor([2.0, 0.1, -1.0, 0.4], dtype=torch.float64), 0)
    behaviour = torch.log_softmax(torch.tensor([0.0, 0.3, 1.0, -0.4], dtype=torch.float64), 0)
    mask = torch.ones(4, 1, dtype=torch.bool)
    return {"logp": policy[:, None], "behaviour_logp": behaviour[:, None], "mask": mask, **numbers}


def _stable(size: float) -> Callable[[Probed, Case], Iterator[Claim]]:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        for log_ratio in (size, -size):
            there = {**case, "logp": case["behaviour_logp"] + log_ratio}
            yield Claim(
                there, f.value(there), "==", f.expected(there), f"at log ratios of ±{size:g} as anywhere"
            )

    return check


def _numeric() -> tuple[Law, Law]:
    return (
        Law("stable", "numeric", "right at log ratios of ±19", "bugs P21", _stable(19.0)),
        Law("no_overflow", "numeric", "right at log ratios of ±800",
            "bugs E14: exp overflows, inf · 0 is NaN",
            _stable(800.0), proves="log ratios of ±800"),
    )  # fmt: skip


def _measured_cap(ask: Ask) -> float | None:
    far, further = (ask(_single(torch.tensor([math.exp(x)]).double())) for x in (4.0, 5.0))
    return far if abs(far - further) < 1e-6 * abs(far) else None


def _measured_end(inside: float, outside: float) -> Callable[[Ask], float | None]:
    """The ratio between these logarithms from which on the weight is 0, by bisection."""

    def measure(ask: Ask) -> float | None:
        def kept(x: float) -> bool:
            return ask(_single(torch.tensor([math.exp(x)]).double())) != 0

        if not kept(inside) or kept(outside):
            return None
        a, b = inside, outside
        for _ in range(50):
            a, b = ((a + b) / 2, b) if kept((a + b) / 2) else (a, (a + b) / 2)
        return math.exp(a)

    return measure


TRUNCATED = Kind(
    name="truncated_importance_weight",
    title="truncated importance sampling, sg(min(ρ, C))",
    arguments=(*TOKENS, CAP),
    returns="[B, T] weights without unit",
    shape=("B", "T"),
    oracle=_truncated,
    arrange=_arranged("cap"),
    mask="mask",
    conventions=(Convention("level", LEVELS),),
    measure={"cap": _measured_cap},
    laws=(
        formula("the weight of each token is min(ρ, C)", IONIDES),
        golden("golden_weights", {"logp": table([0.0], [0.0], [-1.0]),
                                  "behaviour_logp": table([-0.5], [-3.0], [0.0]),
                                  "mask": torch.ones(3, 1, dtype=torch.bool), "cap": 2.0},
               table([1.648721], [2.0], [0.367879]), "log ratios .5, 3, -1 at C = 2", IONIDES),
        no_gradient("logp", "oracles T3: the weight is detached"),
        no_gradient("behaviour_logp", "oracles T3: the weight is detached", proves="detached behaviour_logp"),
        bounded("at_most_the_cap", "limit", "no weight exceeds C",
                "oracles T2: kills a mask of sequences for a cap",
                "<=", lambda c, f: torch.tensor(c["cap"]).double()),
        bounded("not_negative", "limit", "no weight is negative", "a ratio of probabilities", ">=",
                lambda c, f: torch.zeros((), dtype=torch.float64)),
        _one("cap"),
        Law("single_tokens", "limit", "on sequences of one token: min(ρ, C), near the cap too",
            "oracles T5: token and sequence weight agree there", _single_tokens, ("cap",)),
        Law("increasing", "symmetry", "a likelier token weighs no less", "min(·, C) is monotone",
            _increasing),
        Law("without_cap", "limit", "as C grows, the importance ratio", "oracles T3: TIS(C = inf) = IS",
            _wider, ("cap",)),
        Law("expected_weight", "identity", "without a cap the expected weight is 1", "oracles T1, T5",
            _unbiased(None),
            cases=lambda: [_vocabulary(cap=1e6)]),
        Law("expected_truncated", "identity", "with a cap the expected weight is at most 1", "oracles T2",
            _unbiased(1.0),
            cases=lambda: [_vocabulary(cap=1.5)]),
        invariance("shift_of_both", "symmetry", "a constant added to both log-probs changes nothing",
                   "oracles P9",
                   _shifted),
        *_numeric(),
        token_order(TOKENS),
        *batch_laws(TOKENS),
        *mask_laws(TOKENS, differentiable=()),
        nan_not_passed_on(TOKENS),
        empty_row_law(TOKENS),
        *numeric_laws(("logp", "behaviour_logp")),
    ),
)  # fmt: skip


def _band_of_single_tokens(f: Probed, case: Case) -> Iterator[Claim]:
    low, high = case["low"], case["high"]
    near = [x * (1 + d) for x in (low, high) for d in (-NEAR, NEAR) if x > 0]
    rho = torch.cat([_GRID, torch.tensor(near, dtype=torch.float64)])
    there = _single(rho, low=low, high=high)
    weight = torch.ones_like(rho) if f.options["level"] == "one" else rho
    want = torch.where((rho >= low) & (rho <= high), weight, 0.0)[:, None]
    yield Claim(
        there, f.value(there), "==", want, "inside of [low, high] the ratio, outside 0; not the limit"
    )


_GOLDEN_BAND: Case = {
    "logp": table([0.0], [0.0], [-1.0], [0.0]),
    "behaviour_logp": table([-0.5], [-3.0], [0.0], [0.2]),
    "mask": torch.ones(4, 1, dtype=torch.bool),
    "low": 0.5,
    "high": 2.0,
}


def _golden_band(f: Probed, case: Case) -> Iterator[Claim]:
    ratios = (1.0, 1.0) if f.options["level"] == "one" else (1.648721, 0.818731)
    want = table([ratios[0]], [0.0], [0.0], [ratios[1]])
    yield Claim(case, f.value(case), "==", want, "the ratio inside of the band, 0 outside", loose=1e3)


def _zero_or_ratio(f: Probed, case: Case) -> Iterator[Claim]:
    got = f.value(case)
    ratios = counted(_masked(case | {"low": 0.0, "high": 1e12}, f.options), case)
    either = (got.abs() < 1e-6) | ((got - ratios).abs() <= 1e-4 * ratios.abs().clamp(min=1))
    yield Claim(case, either, "holds", None, "a weight is 0 or the whole ratio, never something between")


def _open_band(f: Probed, case: Case) -> Iterator[Claim]:
    wide = case | {"low": 0.0, "high": 1e12}
    want = _masked(wide, f.options)
    yield Claim(wide, f.value(wide), "==", want, "a band without limits: the plain importance ratio")


def _narrower(f: Probed, case: Case) -> Iterator[Claim]:
    wide = case | {"low": case["low"] / 2, "high": case["high"] * 2}
    yield Claim(wide, f.value(wide), ">=", f.value(case), "a wider band keeps all that a narrower one keeps")


def _inside(case: Case, f: Probed) -> Tensor:
    return torch.tensor(1.0 if f.options["level"] == "one" else case["high"]).double()


def _bounded(f: Probed, case: Case) -> Iterator[Claim]:
    if f.options["band"] == "token":
        got = f.value(case)
        yield Claim(case, got, "<=", _inside(case, f).expand_as(got), "no weight exceeds the upper limit")


MASKED = Kind(
    name="masked_importance_weight",
    title="masked importance sampling, sg(ρ where low <= ρ <= high, else 0)",
    arguments=(*TOKENS, LOW, HIGH),
    returns="[B, T] weights without unit",
    shape=("B", "T"),
    oracle=_masked,
    arrange=_arranged("low", "high"),
    mask="mask",
    conventions=(
        Convention("band", {"token": "it is each token's ratio that must be in the band",
                            "mean": "it is the geometric mean over the sequence that must be in the band",
                            "product": "it is the ratio of the whole sequence that must be in the band"}),
        Convention("level", {"token": "what is kept weighs the ratio of the token",
                             "one": "what is kept weighs 1",
                             "mean": "what is kept weighs the geometric mean over the sequence",
                             "product": "what is kept weighs the ratio of the whole sequence"}),
    ),
    measure={"low": _measured_end(0.0, -12.0), "high": _measured_end(0.0, 12.0)},
    laws=(
        formula("the weight of each token is ρ if low <= ρ <= high, else 0", ICEPOP),
        Law("golden_weights", "value",
            "log ratios .5, 3, -1, -.2 in [.5, 2]: 1.6487, 0, 0, .8187 (or 1, 0, 0, 1)",
            ICEPOP, _golden_band, cases=lambda: [_GOLDEN_BAND]),
        no_gradient("logp", "oracles T3: the weight is detached"),
        no_gradient("behaviour_logp", "oracles T3: the weight is detached", proves="detached behaviour_logp"),
        Law("band_of_single_tokens", "limit", "on sequences of one token: ρ inside of the band, 0 outside",
            "oracles T4", _band_of_single_tokens, ("low", "high")),
        Law("zero_or_ratio", "limit", "a weight is 0 or the whole ratio",
            "oracles T4: icepop weight in {0, ρ}",
            _zero_or_ratio),
        Law("at_most_high", "limit", "where tokens are looked at, no weight exceeds the upper limit", ICEPOP,
            _bounded),
        bounded("not_negative", "limit", "no weight is negative", "a ratio of probabilities", ">=",
                lambda c, f: torch.zeros((), dtype=torch.float64)),
        _one("high"),
        Law("open_band", "limit", "with a band without limits, the importance ratio", "oracles T3",
            _open_band,
            ("low", "high")),
        Law("wider_band", "symmetry", "a wider band keeps no less", ICEPOP, _narrower, ("low", "high")),
        Law("expected_weight", "identity", "in a band that holds all ratios the expected weight is 1",
            "oracles T1, T5",
            lambda f, c: _unbiased(None)(f, c) if f.options["level"] != "one" else iter(()),
            cases=lambda: [_vocabulary(low=1e-6, high=1e6)]),
        invariance("shift_of_both", "symmetry", "a constant added to both log-probs changes nothing",
                   "oracles P9",
                   _shifted),
        *_numeric(),
        token_order(TOKENS),
        *batch_laws(TOKENS),
        *mask_laws(TOKENS, differentiable=()),
        nan_not_passed_on(TOKENS),
        empty_row_law(TOKENS),
        *numeric_laws(("logp", "behaviour_logp")),
    ),
)  # fmt: skip

KINDS = (TRUNCATED, MASKED)
