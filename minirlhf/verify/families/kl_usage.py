"""The KL put to use as a loss that is differentiated: what counts is its expected gradient.

s = log π - log π_ref of a token that was drawn from π. The loss reaches the policy through its own log-probs,
with the tokens held fixed: E[∂loss/∂log π · ∇log π]. As a reward: `kl_reward`.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.divergence import (
    CLAMPS,
    LEVELS,
    NO_DEAD_GRADIENT,
    estimate,
    held,
    log_ratio,
    sequences,
    shared,
)
from minirlhf.verify.families.one_step import (
    BETA,
    LOGP,
    MASK,
    REF_LOGP,
    TANG,
    TOKENS,
    beta_of,
    close,
    each_slope,
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
    slope_linear_in_beta,
    slope_token_order,
    weighed,
    wide_log_ratios,
)
from minirlhf.verify.kinds import Case, Claim, Convention, Kind, Law, Options, Probed
from minirlhf.verify.laws import (
    batch_laws,
    empty_row_law,
    gradient,
    mask_laws,
    numeric_laws,
)

FORMS = {
    "k2": "that of KL(π‖π_ref): ∂loss/∂log π = s, as k2, sg(s) log π and ρ k3 have it",
    "k3": "that of KL(π_ref‖π), the other direction: ∂loss/∂log π = 1 - e⁻ˢ, as k3 has it; "
    "under a reward r its optimum is π ∝ π_ref β/(λ - r), not π_ref e^(r/β)",
    "rho k1": "that of KL(π‖π_ref), with noise that stays at π_ref: ∂loss/∂log π = s + 1, as ρ k1 has it",
}
QUIET = "no noise at the reference"
ARGUMENTS = (LOGP, REF_LOGP, MASK, BETA)


def _loss(case: Case, options: Options) -> Tensor:
    s = log_ratio(case, options)
    under_ratio = options["gradient"] == "rho k1"
    loss = torch.exp(s - s.detach()) * s if under_ratio else estimate(s, options["gradient"])
    return beta_of(case) * shared(held(loss, options), case, options)


def _named_gradient(f: Probed) -> tuple[str, str]:
    """Which KL the loss is to descend, as far as `FORMS` says: its key, its name."""
    forward = f.options["gradient"] == "k3"
    return ("k3", "KL(π_ref‖π)") if forward else ("k2", "KL(π‖π_ref)")


def _expected_gradient() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        policy, ref = laws_of(case)
        slopes = each_slope(f, case)
        got = score_gradient(slopes, policy)
        form, name = _named_gradient(f)
        want = beta_of(case) * (policy - ref if form == "k3" else kl_gradient(policy, ref))
        if not bool(got.abs().max() > 1e-9):
            why = "over all tokens the gradient is 0: as a loss it does nothing"
        elif bool((got * want).sum() < 0):
            why = "over all tokens the gradient raises the KL"
        else:
            why = f"over all tokens the gradient is {rounded(got)}, ∇{name} is {rounded(want)}"
        yield weighed(f, case, score_matrix(policy), slopes, want, why, wrt="logp")

    return Law(
        "expected_gradient",
        "gradient",
        "over all tokens, with their probabilities, the gradient is that of a KL",
        f"{TANG}; bugs E15: open-instruct #534, NeMo-RL #2506",
        check,
        cases=law_cases,
    )


def _pulls_back() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        policy, ref = laws_of(case)
        after = kl(moved(policy, -score_gradient(each_slope(f, case), policy)), ref)
        why = (
            f"one step of descent takes KL(π‖π_ref) from {rounded(kl(policy, ref))[0]} to {rounded(after)[0]}"
        )
        yield Claim(case, after < kl(policy, ref) - 1e-9, "holds", None, why, wrt="logp")

    return Law(
        "pulls_back",
        "gradient",
        "a step of descent brings the policy nearer to its reference",
        "bugs P12, E08: KL subtracted from a loss",
        check,
        cases=law_cases,
    )


def _still_at_reference() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        policy, _ = laws_of(case)
        at = {**case, "ref_logp": case["logp"]}
        why = "π = π_ref is a stationary point"
        slopes, want = each_slope(f, at), torch.zeros_like(policy)
        yield weighed(f, at, score_matrix(policy), slopes, want, why, wrt="logp")

    return Law(
        "stationary_at_reference",
        "gradient",
        "at the reference the expected gradient is 0",
        "oracles KL4",
        check,
        cases=law_cases,
    )


def _quiet() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        at = {**case, "ref_logp": case["logp"]}
        got = f.grad(at, "logp")
        yield Claim(
            at, got, "==", torch.zeros_like(got), "at the reference no token has a gradient", wrt="logp"
        )

    return Law(
        "quiet_at_reference",
        "gradient",
        "at the reference every token's gradient is 0",
        "oracles KL3",
        check,
        proves=QUIET,
    )


def _golden_slope() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        s = (case["logp"] - case["ref_logp"]).item()
        values = {"k2": s, "k3": 0.5 if s > 0 else -1.0, "rho k1": s + 1}
        want = torch.full_like(case["logp"], beta_of(case) * values[f.options["gradient"]])
        why = "∂loss/∂log π at s = ±ln 2: ±.693147 for KL(π‖π_ref), .5 and -1 for KL(π_ref‖π)"
        yield Claim(case, f.grad(case, "logp"), "==", want, why, wrt="logp", loose=1e2)

    ln2 = math.log(2)
    return Law(
        "golden_slope",
        "gradient",
        "∂loss/∂log π at s = ±ln 2 is ±.693147 (KL(π‖π_ref)), or .5 and -1 (KL(π_ref‖π))",
        "oracles KL3",
        check,
        cases=lambda: [one_token(-1.0, -1.0 - s) for s in (ln2, -ln2)],
    )


def _common_shift() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = {**case, "logp": case["logp"] - 1.5, "ref_logp": case["ref_logp"] - 1.5}
        why = "both log-probs 1.5 lower: the same gradient"
        yield Claim(changed, f.grad(changed, "logp"), "==", f.grad(case, "logp"), why, wrt="logp", loose=10.0)

    return Law(
        "common_shift",
        "symmetry",
        "only the difference of the log-probs counts",
        "s = log π - log π_ref",
        check,
    )


def _states_held() -> Law:
    """Token losses add up to E Σ over states of the KL of the next token, the states being given."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        law, ref = case["logp"].exp(), case["ref_logp"].exp()
        weight = law[:, 0] * law[:, 1]  # the second is 1 where there is no second token
        got, want = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
        # (row, place, token): EOS or a in the first state, and again in the second, which is after a.
        for row, t, token in ((0, 0, 0), (1, 0, 1), (2, 0, 1), (1, 1, 0), (2, 1, 1)):
            single = one_token(case["logp"][row, t].item(), case["ref_logp"][row, t].item())
            policy = torch.stack([law[0, 0], law[1, 0]]) if t == 0 else law[1:, 1]
            score = torch.eye(2, dtype=torch.float64)[token] - policy
            got[t] += weight[row] * f.grad(single, "logp").item() * score
        for t, reached in ((0, beta_of(case)), (1, beta_of(case) * law[1, 0])):
            p, q = (torch.stack([x[0, 0], x[1, 0]]) if t == 0 else x[1:, 1] for x in (law, ref))
            want[t] = reached * (p - q if _named_gradient(f)[0] == "k3" else kl_gradient(p, q))
        why = f"the two states' logits get {rounded(got)}, the gradients of their KLs are {rounded(want)}"
        yield Claim(case, close(got, want), "holds", None, why, wrt="logp")

    return Law(
        "each_state",
        "gradient",
        "over all sequences, each state's logits get the gradient of that state's KL",
        "oracles KL4: token-level sums",
        check,
        cases=sequences,
    )


def _no_dead_gradient() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        why = "at |s| = 12 and 25 there is still a gradient"
        yield Claim(case, f.grad(case, "logp").abs() > 1e-9, "holds", None, why, wrt="logp")

    return Law(
        "no_dead_gradient",
        "gradient",
        "far from the reference the loss still pulls",
        "oracles KL10",
        check,
        proves=NO_DEAD_GRADIENT,
        cases=lambda: [one_token(-1.0, -1.0 - s) for s in (12.0, -12.0, 25.0, -25.0)],
    )


def _clamp_is_safe() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        if f.options["clamp"] != "none":
            got = f.grad(case, "logp")
            yield Claim(case, got, "finite", None, "clamped after the exponential: ∞ · 0 is NaN", wrt="logp")

    return Law(
        "clamp_is_safe",
        "numeric",
        "what is clamped has a finite gradient at any log-ratio",
        "bugs E14: OpenRLHF #525, TRL #3015",
        check,
        cases=lambda: [one_token(-1.0, -1.0 - s) for s in (1000.0, -1000.0)],
    )


_HELD = {name: CLAMPS[name] for name in ("none", "value 10", "ratio 10", "ratio 20")}

KL_LOSS = Kind(
    name="kl_loss",
    title="a KL penalty as a loss, differentiated through the log-probs of sampled tokens",
    arguments=ARGUMENTS,
    returns="[B, T]; only its gradient counts",
    shape=("B", "T"),
    oracle=_loss,
    differentiable=("logp",),
    arrange=wide_log_ratios,
    conventions=(Convention("gradient", FORMS), Convention("level", LEVELS), Convention("clamp", _HELD)),
    reducible=True,
    mask="mask",
    measure={
        "beta": measured_factor(
            (0.5, 0.5, 2.0), (math.exp(-1), math.e - 2, math.exp(-2) + 1), (1.0, -1.0, 2.0)
        )
    },
    fit_by="logp",
    laws=(
        gradient("logp", "∂loss/∂log π is s (KL(π‖π_ref)), or 1 - e⁻ˢ (KL(π_ref‖π)), or s + 1", TANG),
        _expected_gradient(),
        _pulls_back(),
        _still_at_reference(),
        _quiet(),
        _golden_slope(),
        _states_held(),
        _common_shift(),
        slope_token_order(),
        slope_linear_in_beta(),
        _no_dead_gradient(),
        _clamp_is_safe(),
        *mask_laws(TOKENS, differentiable=("logp",)),
        empty_row_law(TOKENS),
        *batch_laws(ARGUMENTS),
        *numeric_laws(["logp", "ref_logp"]),
    ),
)

KINDS = (KL_LOSS,)
