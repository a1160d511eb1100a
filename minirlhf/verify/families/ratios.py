"""What losses of a probability ratio share: their arguments, cases on both sides of each limit, the reading
of limits off a subject that has them built in, and the laws that hold for every such loss.

ρ = π/π_old of a token (or of a sequence), A its advantage. Cases draw log ρ in the place of log π, with codes
for "just inside the upper limit" and the like, which `arranged` puts where the limits of the case are.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from minirlhf.verify.kinds import Argument, Ask, Case, Claim, Dialect, Law, Mask, Numbers, Probed, Reals
from minirlhf.verify.token_laws import counted, per_token, weights

STRATA = tuple(float(code) for code in range(10, 18))
NEAR = 3e-3  # nearer than e^-ε is to 1 - ε for any ε >= 0.1, so that a clip of log ρ is seen

LOGP_NAMES = ("new_logp", "new_log_probs", "new_logprobs", "newlogprob", "new_logps", "log_probs", "logprobs",
              "log_prob", "logprob", "logps", "per_token_logps", "policy_logps", "policy_log_probs",
              "policy_logprobs", "current_logprobs", "current_logps", "curr_logprobs", "curr_log_probs",
              "cur_logp",
              "pi_logprobs", "pi_logps", "log_pi", "action_log_probs", "logp_new", "logprobs_new",
              "log_probs_new",
              "new_per_token_logps", "target_logprobs", "logpi")  # fmt: skip
OLD_NAMES = ("old_log_probs", "old_logprobs", "old_log_prob", "old_logprob", "oldlogprob", "old_logps",
             "old_per_token_logps", "old_action_log_probs", "logp_old", "logprobs_old", "log_probs_old",
             "pi_old_logprobs", "pi_old_logps", "old_log_pi", "prev_logprobs", "prev_logps", "mb_logprobs",
             "b_logprobs", "behaviour_logp", "behavior_logp", "behavior_log_probs", "rollout_logprobs",
             "rollout_log_probs", "sampling_logprobs", "generation_logprobs", "old_policy_logps", "old_lp",
             "lp_old", "mu_logp")  # fmt: skip
MASK_NAMES = ("response_mask", "completion_mask", "action_mask", "loss_mask", "token_mask", "attention_mask",
              "masks",
              "padding_masks", "eos_mask", "response_masks", "sample_mask", "valid_mask")  # fmt: skip

LOGP = Argument("logp", ("B", "T"), Reals(-1.5, 1.5, special=(0.0, *STRATA)), "log π of each token in nats",
                synonyms=LOGP_NAMES)  # fmt: skip
OLD = Argument("old_logp", ("B", "T"), Reals(-6.0, -2.0), "log π_old of the same tokens, which π_old sampled",
               synonyms=OLD_NAMES)  # fmt: skip
ADVANTAGE_NAMES = ("advantages", "adv", "advs", "mb_advantages", "b_advantages", "advantage_estimates",
                   "token_advantages", "gae", "scaled_advantages", "norm_advantages")  # fmt: skip
ADVANTAGE = Argument("advantage", ("B", "T"), Reals(-3.0, 3.0, special=(0.0, 1.0, -1.0)),
                     "A of each token, in reward units or whitened", synonyms=ADVANTAGE_NAMES)  # fmt: skip
MASK = Argument("mask", ("B", "T"), Mask(), "True = counts", synonyms=MASK_NAMES,
                neutral=lambda case: torch.ones_like(case["logp"], dtype=torch.bool))  # fmt: skip
_ONE_WIDTH = ("clip_range", "cliprange", "clip_eps", "eps_clip", "clip_epsilon", "clip_coef", "clip_ratio",
              "clip_param", "clip_width", "ppo_clip", "ppo_eps", "policy_clip", "clip", "eps",
              "epsilon")  # fmt: skip


def _one_side(*words: str) -> tuple[str, ...]:
    stems = ("clip", "epsilon", "eps", "clip_eps", "eps_clip", "cliprange", "clip_range", "clip_ratio",
             "clip_coef",
             "clip_epsilon")  # fmt: skip
    return (*(f"{stem}_{word}" for word in words for stem in stems), *(f"{word}_clip" for word in words))


_USUAL = (0.2, 0.1, 0.3, 0.28)
CLIP_LOW = Argument("clip_low", (), Numbers((0.2, 0.1, 0.3), usual=_USUAL),
                    "ε_low > 0: ρ is cut at 1 - ε_low",
                    synonyms=(*_one_side("low", "lower", "min", "lo"), *_ONE_WIDTH))  # fmt: skip
CLIP_HIGH = Argument("clip_high", (), Numbers((0.28, 0.4, 0.15), usual=_USUAL),
                     "ε_high > 0: ρ is cut at 1 + ε_high",
                     synonyms=(*_one_side("high", "higher", "upper", "max", "hi"), *_ONE_WIDTH))  # fmt: skip


def arranged(case: Case) -> Case:
    """log π from the drawn log ρ: the codes become ratios on both sides of every limit."""
    return case | {"logp": case["old_logp"] + log_ratios(case["logp"], edges(case))}


def log_ratios(codes: Tensor, ratios: Sequence[float]) -> Tensor:
    """log ρ of drawn numbers, some of them codes for these ratios."""
    out = codes
    for code, ratio in zip(STRATA, ratios, strict=False):
        out = torch.where(codes == code, math.log(ratio), out)
    return out


def edges(case: Case) -> tuple[float, ...]:
    """Ratios just outside and inside of each limit, and far off."""
    low, high = 1 - case.get("clip_low", 0.2), 1 + case.get("clip_high", 0.2)
    dual = case.get("dual_clip", 3.0)
    return (high + NEAR, high - NEAR, low - NEAR, low + NEAR, dual + 0.05, dual - 0.05, 8.0, 0.15)


def _first_counted(case: Case) -> Tensor:
    """The advantage at the first token of each row that counts: [B]."""
    first = case["mask"].int().argmax(-1) if "mask" in case else torch.zeros(len(case["advantage"])).long()
    return case["advantage"].gather(-1, first[:, None])[:, 0]


PER_SEQUENCE = Dialect(
    "advantage",
    "one per sequence, [B]",
    say=_first_counted,
    project=lambda case: {**case, "advantage": _first_counted(case)[:, None].expand_as(case["logp"]).clone()},
)


def point(log_ratio: float, advantage: float) -> Case:
    """One token, whose log π is always the same."""
    one = torch.ones(1, 1, dtype=torch.float64)
    return {
        "logp": -one,
        "old_logp": -one - log_ratio,
        "advantage": one * advantage,
        "mask": one.bool(),
        "clip_low": 0.2,
        "clip_high": 0.2,
    }


def saturation(make: Callable[[float], Case], ask: Ask, far: float) -> float | None:
    """The result far off, in units of that at ratio 1, if it no longer changes there."""
    one, there, further = (ask(make(x)) for x in (0.0, far, 1.2 * far))
    return there / one if one != 0 and abs(there - further) <= 1e-6 * abs(there) else None


def measured_limit(advantage: float, far: float, shift: float, sign: float) -> Callable[[Ask], float | None]:
    """Reads off the answers shift + sign · ρ, with ρ where the loss of this advantage stops changing."""

    def measure(ask: Ask) -> float | None:
        limit = saturation(lambda x: point(x, advantage), ask, far)
        return None if limit is None else shift + sign * limit

    return measure


def ratio(case: Case) -> Tensor:
    """ρ of each token: [B, T]."""
    return (case["logp"] - case["old_logp"]).exp()


def at_old(case: Case) -> Case:
    """The policy that is about to make its first step: ratio 1 everywhere."""
    return {**case, "logp": case["old_logp"].clone()}


def limits(case: Case) -> tuple[float, float, float]:
    """(1 - ε_low, 1 + ε_high, dual clip or infinity)."""
    return 1 - case["clip_low"], 1 + case["clip_high"], case.get("dual_clip", math.inf)


def grid(case: Case, ratios: Sequence[float], advantages: Sequence[float]) -> Case:
    """Every ratio with every advantage, one token each, with the numbers of the case."""
    rho, advantage = (x.reshape(-1, 1) for x in torch.meshgrid(
        torch.tensor(ratios, dtype=torch.float64), torch.tensor(advantages, dtype=torch.float64),
        indexing="ij"))  # fmt: skip
    numbers = {name: value for name, value in case.items() if not isinstance(value, Tensor)}
    old = torch.full_like(rho, -2.0)
    mask = torch.ones_like(rho, dtype=torch.bool)
    return {"logp": old + rho.log(), "old_logp": old, "advantage": advantage, "mask": mask, **numbers}


def near_limits(case: Case) -> list[float]:
    """Ratios on both sides of the limits, at 1 and far off."""
    low, high, dual = limits(case)
    around = [x + d for x in (low, high, dual) if x < 100 for d in (-NEAR, NEAR)]
    return [1.0, 0.05, 20.0, *(x for x in around if x > 0)]


def scaled_advantage() -> tuple[Law, Law]:
    """Positive homogeneity, and 0 at 0."""

    def homogeneous(f: Probed, case: Case) -> Iterator[Claim]:
        changed = {**case, "advantage": 2.5 * case["advantage"]}
        yield Claim(
            changed, f.value(changed), "==", 2.5 * f.value(case), "advantages times 2.5: the loss times 2.5"
        )

    def nothing(f: Probed, case: Case) -> Iterator[Claim]:
        changed = {**case, "advantage": torch.zeros_like(case["advantage"])}
        value, gradient = f.value(changed), f.grad(changed, "logp")
        yield Claim(changed, value, "==", torch.zeros_like(value), "no advantage, no loss")
        yield Claim(
            changed, gradient, "==", torch.zeros_like(gradient), "no advantage, no gradient", wrt="logp"
        )

    return (
        Law("homogeneous_in_advantage", "symmetry", "advantages times c > 0: the loss times c", "oracles P6",
            homogeneous),
        Law("nothing_without_advantage", "limit", "advantages of 0 give neither loss nor gradient",
            "oracles P7", nothing),
    )  # fmt: skip


def additive_at_old() -> Law:
    """What homogeneity cannot see: a mask or a normaliser made of advantages."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        start = at_old(case) if "old_logp" in case else case
        other = {**start, "advantage": start["advantage"].square() - 0.5}
        both = {**start, "advantage": start["advantage"] + other["advantage"]}
        yield Claim(both, f.value(both), "==", f.value(start) + f.value(other), "L(A + A') = L(A) + L(A')")

    return Law("additive_at_ratio_1", "symmetry", "at ratio 1 the loss is additive in the advantages",
               "bugs B10, P17: verl #2506, mask=advantages", check)  # fmt: skip


def policy_gradient_at_old(elements: Callable[[Case], Tensor] = per_token,
                           shares: Callable[[Case], Tensor] | None = None) -> tuple[Law, Law]:  # fmt: skip
    """At the policy that sampled: value -A and gradient -A, weighed as the subject weighs.

    shares: what part of an element's gradient each token gets; None: the elements are tokens.
    """

    def value(f: Probed, case: Case) -> Iterator[Claim]:
        start = at_old(case)
        minus = -start["advantage"]
        want = f.reduced(counted(minus, start) if elements is per_token else minus, start)
        yield Claim(start, f.value(start), "==", want, "-A where the policy is the one that sampled")

    def gradient(f: Probed, case: Case) -> Iterator[Claim]:
        start = at_old(case)
        want = -start["advantage"] * weights(f, start, elements)
        want = want if shares is None else want[:, None] * shares(start)
        yield Claim(start, f.grad(start, "logp"), "==", want, "-A ∇log π where ρ = 1", wrt="logp")

    return (
        Law("value_at_ratio_1", "limit", "at ratio 1 the loss is -A", "oracles P1", value),
        Law("policy_gradient_at_ratio_1", "limit",
            "at ratio 1 its gradient is the policy gradient, -A ∇log π",
            "oracles P2, bugs P9", gradient),
    )  # fmt: skip
