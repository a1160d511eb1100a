"""Known bugs of advantages within groups."""

import torch
from torch import Tensor

from minirlhf.verify.zoo import Bug


def rloo(reward: Tensor, mask: Tensor) -> Tensor:
    """Right."""
    scored = mask.to(reward.dtype)
    reward = torch.where(mask, reward, 0.0)
    n = scored.sum(1, keepdim=True)
    others = reward.sum(1, keepdim=True) - reward
    baseline = others / (n - 1).clamp(min=1)
    return (reward - baseline) * scored * (n > 1)


def group_centred(reward: Tensor, mask: Tensor) -> Tensor:
    """Right."""
    scored = mask.to(reward.dtype)
    reward = torch.where(mask, reward, 0.0)
    n = scored.sum(1, keepdim=True).clamp(min=1)
    baseline = reward.sum(1, keepdim=True) / n
    return (reward - baseline) * scored


def group_normalised(reward: Tensor, mask: Tensor, epsilon: float = 1e-4) -> Tensor:
    """Right."""
    scored = mask.to(reward.dtype)
    reward = torch.where(mask, reward, 0.0)
    n = scored.sum(1, keepdim=True)
    mean = reward.sum(1, keepdim=True) / n.clamp(min=1)
    centred = (reward - mean) * scored
    variance = centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)
    std = variance.sqrt()
    return (reward - mean) / (std + epsilon) * scored


def _rloo(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "rloo", rloo, right, wrong, seen)


def _centred(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "group_centred", group_centred, right, wrong, seen)


def _normalised(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "group_normalised", group_normalised, right, wrong, seen)


BUGS = (
    _rloo("baseline includes the sample", "(n - 1).clamp(min=1)", "n", "bugs Z09"),
    _rloo("own reward in the others' mean", "reward.sum(1, keepdim=True) - reward",
          "reward.sum(1, keepdim=True)",
          "bugs Z09"),
    _rloo("mean of all as the baseline", "baseline = others / (n - 1).clamp(min=1)",
          "baseline = reward.sum(1, keepdim=True) / n.clamp(min=1)", "bugs Z09"),
    _rloo("sign flipped", "(reward - baseline)", "(baseline - reward)"),
    _rloo("baseline added", "(reward - baseline)", "(reward + baseline)"),
    _rloo("baseline forgotten", "(reward - baseline)", "reward"),
    _rloo("baseline alone", "(reward - baseline)", "baseline"),
    _rloo("unscored counts as 0", "n = scored.sum(1, keepdim=True)",
          "n = torch.full_like(reward[:, :1], mask.shape[1])",
          "TRL #5902"),
    _rloo("garbage of unscored samples", "reward = torch.where(mask, reward, 0.0)",
          "reward = reward + 0 * scored",
          "TRL #5902"),
    _rloo("samples of all prompts in one baseline", "reward.sum(1, keepdim=True) - reward",
          "reward.sum() - reward"),
    _rloo("compared across prompts", "others = reward.sum(1, keepdim=True) - reward",
          "others = (reward.sum(0, keepdim=True) - reward) * (n - 1) / max(len(reward) - 1, 1)",
          "oracles R11: repeat for repeat_interleave"),
    _rloo("axis not kept", "reward.sum(1, keepdim=True) - reward", "reward.sum(1) - reward",
          "OpenRLHF #1250"),
    _rloo("n - 1 for n - 2", "(n - 1).clamp(min=1)", "(n - 2).clamp(min=1)"),
    _rloo("divided by the deviation", "(reward - baseline)", "(reward - baseline) / (reward.std() + 1e-4)"),
    _rloo("best of the others as the baseline", "baseline = others / (n - 1).clamp(min=1)",
          "baseline = torch.where(mask, reward, -torch.inf).max(1, keepdim=True).values"),
    _centred("leave-one-out", "baseline = reward.sum(1, keepdim=True) / n",
             "baseline = (reward.sum(1, keepdim=True) - reward) / (n - 1).clamp(min=1)", "oracles R3, R4"),
    _centred("mean of the batch", "baseline = reward.sum(1, keepdim=True) / n",
             "baseline = reward.sum() / n.sum()"),
    _centred("sign flipped", "(reward - baseline)", "(baseline - reward)"),
    _centred("not centred", "(reward - baseline)", "reward"),
    _centred("unscored counts as 0", "n = scored.sum(1, keepdim=True).clamp(min=1)", "n = mask.shape[1]",
             "TRL #5902"),
    _centred("garbage of unscored samples", "reward = torch.where(mask, reward, 0.0)",
             "reward = reward + 0 * scored",
             "TRL #5902"),
    _centred("axis not kept", "baseline = reward.sum(1, keepdim=True) / n",
             "baseline = reward.sum(1) / n[:, 0]",
             "OpenRLHF #1250"),
    _centred("unscored samples get the baseline", "(reward - baseline) * scored", "reward - baseline"),
    _centred("median for the mean", "reward.sum(1, keepdim=True) / n",
             "reward.median(1, keepdim=True).values"),
    _centred("best sample as the baseline", "reward.sum(1, keepdim=True) / n",
             "reward.max(1, keepdim=True).values"),
    _centred("mean across prompts", "reward.sum(1, keepdim=True) / n",
             "reward.sum(0, keepdim=True) / scored.sum(0, keepdim=True).clamp(min=1)",
             "oracles R11: repeat for repeat_interleave"),
    _centred("divided by the deviation", "(reward - baseline)", "(reward - baseline) / (reward.std() + 1e-4)",
             "the bias that Dr. GRPO removes"),
    _normalised("deviation forgotten", "(reward - mean) / (std + epsilon)", "(reward - mean)"),
    _normalised("divided by the variance", "std = variance.sqrt()", "std = variance"),
    _normalised("multiplied by the deviation", "(reward - mean) / (std", "(reward - mean) * (std"),
    _normalised("precedence: only the mean is scaled", "(reward - mean) / (std + epsilon)",
                "(reward - mean / (std + epsilon))", "pytorch-cpp-rl #14"),
    _normalised("not centred", "return (reward - mean)", "return reward"),
    _normalised("sign flipped", "return (reward - mean)", "return (mean - reward)"),
    _normalised("leave-one-out mean beside the deviation of all", "return (reward - mean)",
                "return (reward - (reward.sum(1, keepdim=True) - reward) / (n - 1).clamp(min=1))",
                "NeMo-RL #1519"),
    _normalised("mean of the batch", "mean = reward.sum(1, keepdim=True) / n.clamp(min=1)",
                "mean = reward.sum() / n.sum()"),
    _normalised("axis not kept", "mean = reward.sum(1, keepdim=True) / n.clamp(min=1)",
                "mean = reward.sum(1) / n[:, 0].clamp(min=1)", "OpenRLHF #1250"),
    _normalised("variance about 0", "variance = centred.square()", "variance = reward.square()"),
    _normalised("n - 2 for n - 1", "(n - 1).clamp(min=1)", "(n - 2).clamp(min=1)"),
    _normalised("equal rewards give NaN", "(reward - mean) / (std + epsilon)",
                "(reward - mean) / std * (std / (std + epsilon))", "TRL #4662, SB3 #325"),
    _normalised("epsilon subtracted", "std + epsilon", "std - epsilon"),
    _normalised("unscored counts as 0", "n = scored.sum(1, keepdim=True)",
                "scored = torch.ones_like(scored); n = scored.sum(1, keepdim=True)", "TRL #5902"),
    _normalised("garbage of unscored samples", "reward = torch.where(mask, reward, 0.0)",
                "reward = reward + 0 * scored", "TRL #5902"),
    _normalised("largest deviation for the standard one", "std = variance.sqrt()",
                "std = centred.abs().max(1, keepdim=True).values"),
    _normalised("clamped", "(reward - mean) / (std + epsilon)",
                "((reward - mean) / (std + epsilon)).clamp(-1, 1)"),
    _normalised("normalised across prompts",
                "variance = centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)",
                "variance = centred.square().sum(0, keepdim=True) / (len(mask) - 1 + (len(mask) == 1))"),
)  # fmt: skip
