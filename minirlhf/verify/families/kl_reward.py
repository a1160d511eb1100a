"""The KL put to use as a reward, which is not differentiated: it reaches the policy by the score function.

s = log π - log π_ref of a token that was drawn from π; the expected gradient is E[reward · ∇log π].
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.divergence import CLAMPS, held, log_ratio
from minirlhf.verify.families.one_step import (
    BETA,
    LOGP,
    MASK,
    REF_LOGP,
    TANG,
    TOKENS,
    beta_of,
    each_value,
    kl,
    kl_gradient,
    law_cases,
    laws_of,
    measured_factor,
    moved,
    one_token,
    rounded,
    score_gradient,
    score_matrix,
    weighed,
    wide_log_ratios,
)
from minirlhf.verify.kinds import Case, Claim, Convention, Kind, Law, Options, Probed
from minirlhf.verify.laws import (
    batch_laws,
    empty_row_law,
    finite_at,
    formula,
    invariance,
    mask_laws,
    numeric_laws,
    relation,
    table,
)

DETACHED = "detached"
ARGUMENTS = (LOGP, REF_LOGP, MASK, BETA)


def _reward(case: Case, options: Options) -> Tensor:
    return -beta_of(case) * held(log_ratio(case, options), options)


def _expected_policy_gradient() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        policy, ref = laws_of(case)
        values = each_value(f, case)
        got, want = score_gradient(values, policy), -beta_of(case) * kl_gradient(policy, ref)
        repels = " (it pushes the policy away)" if bool((got * want).sum() <= 0) else ""
        why = f"over all tokens E[reward ∇log π] is {rounded(got)}{repels}, -∇KL(π‖π_ref) is {rounded(want)}"
        yield weighed(f, case, score_matrix(policy), values, want, why)

    return Law(
        "expected_policy_gradient",
        "gradient",
        "over all tokens E[reward · ∇log π] = -∇KL(π‖π_ref)",
        f"{TANG}; oracles 0.3, KL4",
        check,
        cases=law_cases,
    )


def _reward_pulls_back() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        policy, ref = laws_of(case)
        after = kl(moved(policy, score_gradient(each_value(f, case), policy)), ref)
        why = (
            f"one step of ascent takes KL(π‖π_ref) from {rounded(kl(policy, ref))[0]} to {rounded(after)[0]}"
        )
        yield Claim(case, after < kl(policy, ref) - 1e-9, "holds", None, why)

    return Law(
        "pulls_back",
        "gradient",
        "a step of policy gradient on this reward alone brings the policy nearer",
        "oracles 0.3: with k3, k2 or |s| as the reward the KL grows",
        check,
        cases=law_cases,
    )


def _golden_row() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        want = beta_of(case) * table([-0.2, 0.5, 0.0])
        yield Claim(
            case, f.value(case), "==", f.reduced(want, case), "β (-.2, .5, 0), where β is 1 if there is none"
        )

    mask = torch.ones(1, 3, dtype=torch.bool)
    case: Case = {"logp": table([-1.0, -2.0, -0.5]), "ref_logp": table([-1.2, -1.5, -0.5]), "mask": mask}
    return Law(
        "golden_row",
        "value",
        "log-probs (-1, -2, -.5), reference (-1.2, -1.5, -.5): β (-.2, .5, 0)",
        "oracles 5.3",
        check,
        cases=lambda: [case],
    )


def _adds_up() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        want = _reward(case, f.options).sum()
        why = "summed over all tokens: -β log π(y)/π_ref(y) of every row"
        yield Claim(case, f.value(case).sum(), "==", want, why, take=".sum()")

    return Law(
        "adds_up",
        "value",
        "the rewards of a row add up to -β log π(y)/π_ref(y), however long it is",
        "oracles KL11",
        check,
    )


def _tilted() -> Law:
    """π* ∝ π_ref e^r is where r - s is the same for every token."""
    rewards = table([1.0], [0.0], [-0.7])
    ref = table([0.5], [0.3], [0.2]).log()
    optimum = torch.log_softmax(ref + rewards, dim=0)

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        values = each_value(f, case)
        total = rounded(rewards[:, 0] + values / beta_of(case))
        want = -beta_of(case) * (rewards[:, 0] - (ref + rewards)[:, 0].logsumexp(0))
        why = f"score and penalty together are {total}, at the optimum they are the same for all"
        yield weighed(f, case, torch.eye(3, dtype=torch.float64), values, want, why)

    return Law(
        "optimum",
        "limit",
        "at π ∝ π_ref e^r, with β = 1, score and penalty together are the same for every token",
        "oracles R9, 3.2",
        check,
        cases=lambda: [{"logp": optimum, "ref_logp": ref, "mask": torch.ones(3, 1, dtype=torch.bool)}],
    )


def _homogeneous() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        if case["logp"].shape[1] == 7 and f.options["clamp"] != "none":
            return  # there the clamp acts
        changed = {**case, "logp": 2 * case["logp"], "ref_logp": 2 * case["ref_logp"]}
        yield Claim(
            changed, f.value(changed), "==", 2 * f.value(case), "twice the log-ratio, twice the penalty"
        )

    return Law(
        "linear_in_log_ratio",
        "symmetry",
        "twice the log-ratio costs twice as much, on either side",
        "k1 is the log-ratio itself",
        check,
    )


def _detached() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        got = f.grad(case, "logp")
        yield Claim(case, got, "==", torch.zeros_like(got), "a reward is a constant", wrt="logp")

    return Law(
        "detached", "gradient", "no gradient goes through the reward", "oracles P19", check, proves=DETACHED
    )


def _swapped(case: Case) -> Case:
    return {**case, "logp": case["ref_logp"], "ref_logp": case["logp"]}


_HELD = {name: CLAMPS[name] for name in ("none", "value 10", "value 20")}

KL_REWARD = Kind(
    name="kl_reward",
    title="the KL penalty as a reward of each token: -β s",
    arguments=ARGUMENTS,
    returns="[B, T] in reward units",
    shape=("B", "T"),
    oracle=_reward,
    arrange=wide_log_ratios,
    conventions=(Convention("clamp", _HELD),),
    reducible=True,
    mask="mask",
    measure={"beta": measured_factor((-1.0, 1.0, -2.0))},
    laws=(
        formula(
            "the reward of each token is -β (log π - log π_ref)",
            "Ziegler et al. 2019, Eq. 2 (arXiv:1909.08593)",
        ),
        _expected_policy_gradient(),
        _reward_pulls_back(),
        _golden_row(),
        _adds_up(),
        _tilted(),
        relation(
            "zero_at_reference",
            "limit",
            "0 where policy and reference agree",
            "bugs P9",
            lambda c: {**c, "ref_logp": c["logp"]},
            lambda v, c, f: torch.zeros_like(v),
        ),
        relation(
            "other_direction",
            "symmetry",
            "policy and reference exchanged: the opposite reward",
            "oracles KL2",
            _swapped,
            lambda v, c, f: -v,
        ),
        _homogeneous(),
        relation(
            "linear_in_beta",
            "symmetry",
            "three times β, three times the reward",
            "it is a coefficient",
            lambda c: {**c, "beta": 3 * c["beta"]} if "beta" in c else c,
            lambda v, c, f: 3 * v if "beta" in c else v,
            needs=("beta",),
        ),
        invariance(
            "common_shift",
            "symmetry",
            "only the difference of the log-probs counts",
            "s = log π - log π_ref",
            lambda c: {**c, "logp": c["logp"] - 1.5, "ref_logp": c["ref_logp"] - 1.5},
            loose=10.0,
        ),
        _detached(),
        finite_at(
            "large_log_ratios",
            "at log-ratios of ±20 and ±1,000 the reward is right",
            "bugs P21",
            lambda: [one_token(-1.0, -1.0 - s) for s in (20.5, -20.5, 1e3, -1e3)],
        ),
        *mask_laws(TOKENS, differentiable=()),
        empty_row_law(TOKENS),
        *batch_laws(ARGUMENTS),
        *numeric_laws(["logp", "ref_logp"]),
    ),
)

KINDS = (KL_REWARD,)
