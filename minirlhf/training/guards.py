"""Stop when the trainer and the sampler disagree about the law that they share.

At the first minibatch of an iteration the policy has not moved, so the ratio must be 1 on every token; and
the log-probs that the sampler recorded must be those that the trainer computes. Nothing else that PPO logs
can tell a wrong temperature, a leaking mask or dropout from honest learning, and each still "trains".
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from minirlhf.models.interface import Params

SAMPLER_CAUSES = (
    "the trainer's temperature is not the sampler's",
    "the parameters changed between sampling and training (a stale copy, an update in place)",
    "a filter (top-k, top-p, min-p) or a penalty shapes the sampled law only",
    "log-probs are off by one position, or read the padding",
    "the cached forward pass differs from the full one (positions, mask, cache reuse)",
)
FIRST_MINIBATCH_CAUSES = (
    "dropout, or another source of randomness, is on in the training forward pass",
    "old_logp was not computed from the parameters that are now trained",
    "rows of old_logp and of tokens were permuted or trimmed apart",
    "the loss uses another temperature, mask or dtype than the pass that computed old_logp",
)


_TAIL = 0.05
"""Share of the tokens that may be off by more than the tolerance in 16 bits; see `measure_for`."""


class GuardError(RuntimeError):
    """The on-policy identities do not hold; the message says by how much, where, and what usually does it."""


Measure = Callable[[Tensor, Tensor], Tensor]
"""(gaps [B, T], at least 0; mask) -> one number that is held to a tolerance."""


def largest(gap: Tensor, mask: Tensor) -> Tensor:
    """The largest gap under the mask."""
    return torch.where(mask, gap, 0.0).max()


def root_mean_square(gap: Tensor, mask: Tensor) -> Tensor:
    """√ of the mean square of the gaps under the mask."""
    return (torch.where(mask, gap, 0.0).square().sum() / mask.sum()).sqrt()


def tolerance_for(params: Params) -> float:
    """How far two log-probs may differ by rounding, in nats: 1e-4, or 3e-2 for 16-bit parameters.

    Two forward passes of one fp32 model differ by about 2e-6 between batch shapes, with or without cache.
    """
    return 3e-2 if _in_16_bits(params) else 1e-4


def measure_for(params: Params) -> Measure:
    """What is held to the tolerance: the largest gap, or for 16-bit parameters the root mean square.

    In 16 bits rounding has a long tail: of two honest passes over a sharp law, single tokens differed by
    0.06 nats and all of them by 1e-3 in the mean. A wrong temperature, mask or position moves most tokens, or
    some by whole nats, and the mean square with them.
    """
    return root_mean_square if _in_16_bits(params) else largest


def _in_16_bits(params: Params) -> bool:
    return any(leaf.dtype in (torch.bfloat16, torch.float16) for leaf in tree_leaves(params))


def check_sampler(
    recorded_logp: Tensor,
    recomputed_logp: Tensor,
    mask: Tensor,
    *,
    tolerance: float,
    measure: Measure = largest,
) -> float:
    """The largest |log π_sampler - log π_trainer| over the sampled tokens, in nats, if it is tolerable.

    Args:
        recorded_logp: [B, T] under the law sampled from, as the sampler wrote it down.
        recomputed_logp: [B, T] by the trainer's forward pass.
        mask: [B, T] True on sampled tokens.
        tolerance: what `measure` of the gaps may be at most, in nats.

    Raises:
        GuardError: the gaps exceed the tolerance, or one is NaN.
    """
    gap = torch.where(mask, (recorded_logp - recomputed_logp).abs(), 0.0)
    most = float(gap.max())
    if not float(measure(gap, mask)) <= tolerance:  # also refuses NaN
        row, position = divmod(int(gap.nan_to_num(nan=torch.inf).argmax()), gap.shape[1])
        raise GuardError(
            f"the sampler recorded log-prob {float(recorded_logp[row, position]):.6f} for the token at row "
            f"{row}, position {position}; the trainer computes {float(recomputed_logp[row, position]):.6f} "
            f"(largest gap {most:.3g} nats, tolerance of the {measure.__name__} gap {tolerance:g})."
            + _listed(SAMPLER_CAUSES)
        )
    return most


def check_first_minibatch(metrics: Mapping[str, float], *, tolerance: float) -> None:
    """Ratio 1, approximate KL 0 and clip fraction 0, before the policy has moved.

    Args:
        metrics: token means over the minibatch: `guard/off_policy_tokens` (share of tokens whose |log ratio|
            exceeds the tolerance), `val/ratio`, `policy/approxkl_avg`, `policy/clipfrac_avg`.

    Raises:
        GuardError: one of them is not what it must be.
    """
    allowed = {  # name: (what it must be, by how much rounding may move it)
        "guard/off_policy_tokens": (0.0, 0.0 if tolerance < 1e-2 else _TAIL),
        "val/ratio": (1.0, tolerance),
        "policy/approxkl_avg": (0.0, tolerance**2),
        "policy/clipfrac_avg": (0.0, 0.0),
    }
    wrong = [
        f"{name} = {metrics[name]:.6g} instead of {value:g}"
        for name, (value, rounding) in allowed.items()
        if not abs(metrics[name] - value) <= rounding  # also refuses NaN
    ]
    if wrong:
        raise GuardError(
            "the policy has not been updated yet, but at the first minibatch "
            + ", ".join(wrong)
            + "."
            + _listed(FIRST_MINIBATCH_CAUSES)
        )


def _listed(causes: tuple[str, ...]) -> str:
    return " Usual causes:" + "".join(f"\n  - {cause}" for cause in causes)
