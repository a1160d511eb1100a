"""One-step laws of a few tokens: every expectation is a finite sum, and shows what a per-token rule does.

π and π_ref give each of V tokens a probability; a case lists the tokens as V rows of one token. With tokens
drawn from π = softmax(θ), a number w(v) that multiplies ∇log π(v) has the expected gradient

    E_π[w ∇_θ log π] = π (w - E_π w)

and that is compared with the gradient of what the rule is meant to change.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirlhf.verify.kinds import Argument, Ask, Case, Claim, Law, Mask, Numbers, Probed, Reals
from minirlhf.verify.laws import rows_of, table

LOGP_NAMES = tuple(
    """
    logprobs log_probs log_prob logprob logps per_token_logps new_logprobs policy_logprobs policy_log_probs
    policy_logps policy_logp action_log_probs log_probs_new new_logp new_log_probs new_logps newlogprob
    pi_logprobs pi_logp logp_pi cur_logp curr_logprobs lp logpi log_pi pi_lp log_p
""".split()
)
REF_NAMES = tuple(
    """
    ref_logprobs ref_log_probs ref_log_prob ref_logprob ref_logps ref_per_token_logps reference_logprobs
    reference_log_probs reference_logps reference_logp base_logprobs base_log_probs log_probs_base
    base_action_log_probs log_probs_ref logp_ref ref_lp logprobs_ref logprob_ref reference_log_prob
    reference_logprob ref_policy_log_probs logref log_pi_ref log_ref lp_ref log_q ref
""".split()
)
MASK_NAMES = tuple(
    """
    response_mask completion_mask action_mask loss_mask attention_mask masks response_masks completion_masks
    padding_masks token_mask eos_mask m
""".split()
)
BETA_NAMES = tuple(
    """
    kl_coef kl_coefficient kl_ctl kl_weight kl_penalty_coef init_kl_coef kl_beta kl_loss_coef entropy_coef
    ent_coef entropy_coeff entcoef coef coefficient weight alpha lam
""".split()
)

LOGP = Argument(
    "logp",
    ("B", "T"),
    Reals(-4.0, 0.0),
    "log π of each token in nats, of the law that the tokens were drawn from (for the approximate KL that "
    "PPO logs that is the old policy)",
    synonyms=LOGP_NAMES,
)
REF_LOGP = Argument(
    "ref_logp", ("B", "T"), Reals(-4.0, 0.0), "log π_ref of the same tokens", synonyms=REF_NAMES
)
BETA = Argument(
    "beta",
    (),
    Numbers((0.1, 0.4, 1.5)),
    "β > 0, what the result is multiplied with; 1 where it is not given",
    optional=True,
    neutral=lambda case: 1.0,
    synonyms=BETA_NAMES,
)


def everywhere(name: str) -> Callable[[Case], Tensor]:
    """The mask of a subject that takes none: every position counts."""
    return lambda case: torch.ones(case[name].shape[:2], dtype=torch.bool)


def mask_of(name: str) -> Argument:
    """The mask of the tokens, or positions, that count."""
    return Argument(
        "mask", ("B", "T"), Mask(), "True = counts", neutral=everywhere(name), synonyms=MASK_NAMES
    )


MASK = mask_of("logp")
TOKENS = (LOGP, REF_LOGP, MASK)

TANG = "Tang & Munos 2025, On a few pitfalls in KL divergence gradient estimation for RL (arXiv:2506.09477)"

# Two, three and four tokens; the last two laws are far apart.
PAIRS = tuple(
    (torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64))
    for p, q in (
        ((0.5, 0.5), (0.25, 0.75)),
        ((0.6, 0.3, 0.1), (0.2, 0.3, 0.5)),
        ((0.15, 0.2, 0.3, 0.35), (0.7, 0.05, 0.15, 0.1)),
    )
)


def wide_log_ratios(case: Case) -> Case:
    """In the widest cases s runs to both sides of every usual clamp; elsewhere it stays below 4."""
    logp = case["logp"]
    if logp.shape[1] != 7:
        return case
    s = torch.tensor([1.8, -5.5, 9.2, -12.9, 16.6, -21.0, 24.0], dtype=torch.float64).expand_as(logp).clone()
    s[1::2] *= -1
    return {**case, "ref_logp": logp - s}


def beta_of(case: Case) -> float:
    """β, 1 where it is not given."""
    return case.get("beta", 1.0)


def one_token(logp: float, ref_logp: float | None = None) -> Case:
    """A batch of one row of one token."""
    case: Case = {"logp": table([logp]), "mask": torch.ones(1, 1, dtype=torch.bool)}
    return case if ref_logp is None else {**case, "ref_logp": table([ref_logp])}


def measured_factor(*shapes: tuple[float, float, float]) -> Callable[[Ask], float | None]:
    """Reads a built-in β off values at s = 1, -1 and 2, where they are β times one of these shapes.

    Factors of ½ and 2 are not taken for a β: they are what a forgotten ½ gives.
    """

    def measure(ask: Ask) -> float | None:
        got = [ask(one_token(logp, logp - s)) for logp, s in ((-0.5, 1.0), (-2.5, -1.0), (-1.2, 2.0))]
        for shape in shapes:
            beta = got[0] / shape[0]
            fits = all(
                math.isclose(g, beta * x, rel_tol=1e-4, abs_tol=1e-12)
                for g, x in zip(got, shape, strict=True)
            )
            if fits and beta > 0 and not any(math.isclose(beta, x, rel_tol=1e-4) for x in (1.0, 2.0, 0.5)):
                return beta
        return None

    return measure


def all_tokens(policy: Tensor, ref: Tensor | None = None) -> Case:
    """Every token of a law, one per row."""
    case: Case = {"logp": policy.log()[:, None], "mask": torch.ones(len(policy), 1, dtype=torch.bool)}
    return case if ref is None else {**case, "ref_logp": ref.log()[:, None]}


def law_cases() -> list[Case]:
    """Every token of each pair of laws."""
    return [all_tokens(policy, ref) for policy, ref in PAIRS]


def laws_of(case: Case) -> tuple[Tensor, Tensor]:
    """(π, π_ref) of such a case: [V] each."""
    return case["logp"][:, 0].exp(), case["ref_logp"][:, 0].exp()


def each_value(f: Probed, case: Case) -> Tensor:
    """What the subject gives for each token, asked one by one, so that no reduction is in between: [V]."""
    return torch.stack([f.value(single).reshape(()) for single in _singles(case)])


def each_slope(f: Probed, case: Case) -> Tensor:
    """∂/∂log π(v) of each token, asked one by one: [V]."""
    return torch.stack([f.grad(single, "logp").reshape(()) for single in _singles(case)])


def score_gradient(weight: Tensor, policy: Tensor) -> Tensor:
    """E_π[w ∇_θ log π]: [V]."""
    return score_matrix(policy) @ weight


def score_matrix(policy: Tensor) -> Tensor:
    """diag π - π πᵀ, which takes w to E_π[w ∇_θ log π]: [V, V]."""
    return torch.diag(policy) - policy[:, None] * policy


def weighed(
    f: Probed, case: Case, matrix: Tensor, each: Tensor, want: Tensor, why: str, *, wrt: str | None = None
) -> Claim:
    """The claim that matrix @ each is `want`, where `each` is what the subject gave token by token.

    In a script it is one call on all tokens, where the subject keeps a result for each, as a gradient does.
    """
    got = matrix @ each.double()
    if wrt is None and not f.per_element:
        return Claim(case, close(got, want), "holds", None, why)
    weight = f.reduced(torch.ones_like(case["logp"]), case).sum() / len(case["logp"])
    take = f".double().mT @ tensor({(matrix.mT / weight).tolist()}, dtype=torch.float64)"
    return Claim(case, got[None], "==", want[None], why, wrt=wrt, take=take, loose=1e2)


def kl(policy: Tensor, ref: Tensor) -> Tensor:
    """KL(π‖π_ref) of two laws: []."""
    return (policy * (policy / ref).log()).sum()


def kl_gradient(policy: Tensor, ref: Tensor) -> Tensor:
    """∇_θ KL(π‖π_ref): [V]."""
    return score_gradient((policy / ref).log(), policy)


def moved(policy: Tensor, direction: Tensor, step: float = 1e-3) -> Tensor:
    """The law whose logits went a small step in a direction: [V]."""
    return torch.softmax(policy.log() + step * direction, dim=0)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Elementwise, loose enough for single precision."""
    return (got.double() - want).abs() <= tolerance * (1 + want.abs().max())


def rounded(x: Tensor) -> list[float]:
    """For a sentence."""
    return [round(value, 6) for value in x.reshape(-1).tolist()]


def slope_token_order() -> Law:
    """Of a loss whose gradient counts, and not its value."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        per_token = [name for name in ("logp", "ref_logp", "mask") if name in case]
        changed = case | {name: case[name].flip(1) for name in per_token}
        got, want = f.grad(changed, "logp"), f.grad(case, "logp").flip(1)
        yield Claim(changed, got, "==", want, "the tokens of every row reversed", wrt="logp")

    statement = "a token's gradient depends on that token alone"
    return Law("token_order", "symmetry", statement, "each token by itself", check)


def slope_linear_in_beta() -> Law:
    """Likewise."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        if "beta" in case:
            changed = {**case, "beta": 3 * case["beta"]}
            got, want = f.grad(changed, "logp"), 3 * f.grad(case, "logp")
            yield Claim(changed, got, "==", want, "three times β", wrt="logp")

    statement = "three times β, three times the gradient"
    return Law("linear_in_beta", "symmetry", statement, "it is a coefficient", check, ("beta",))


def _singles(case: Case) -> list[Case]:
    return [rows_of(TOKENS, case, torch.tensor([row])) for row in range(len(case["logp"]))]
