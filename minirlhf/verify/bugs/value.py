"""Known bugs of the critic's losses."""

import torch
from torch import Tensor

from minirlhf.verify.zoo import Bug


def value_loss(value: Tensor, ret: Tensor, mask: Tensor) -> Tensor:
    """Right."""
    error = torch.where(mask, value - ret, 0.0)
    return 0.5 * error**2


def value_loss_token_mean(value: Tensor, ret: Tensor, mask: Tensor) -> Tensor:
    """Right: averaged over the tokens."""
    error = torch.where(mask, value - ret, 0.0)
    return 0.5 * (error**2).sum() / mask.sum()


def clipped_value_loss(value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, *, clip: float) -> Tensor:
    """Right."""
    near = old_value + torch.clamp(value - old_value, -clip, clip)
    worse = torch.maximum((value - ret) ** 2, (near - ret) ** 2)
    return torch.where(mask, 0.5 * worse, 0.0)


def clipped_value_loss_token_mean(value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, *,
                                  clip: float) -> Tensor:  # fmt: skip
    """Right: averaged over the tokens."""
    near = torch.clamp(value, old_value - clip, old_value + clip)
    plain, clipped = (value - ret) ** 2, (near - ret) ** 2
    total = torch.where(mask, torch.maximum(plain, clipped), 0.0).sum()
    return 0.5 * total / mask.sum()


def _plain(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "value_loss", value_loss, right, wrong, seen)


def _mean(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "value_loss", value_loss_token_mean, right, wrong, seen)


def _clip(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "clipped_value_loss", clipped_value_loss, right, wrong, seen)


def _clip_mean(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "clipped_value_loss", clipped_value_loss_token_mean, right, wrong, seen)


BUGS = (
    _plain("sign of the return", "value - ret", "value + ret"),
    _plain("not squared", "error**2", "error.abs()"),
    _plain("signed error", "error**2", "error"),
    _plain("value detached", "value - ret", "value.detach() - ret", "RLlib #22171: zero gradient"),
    _plain("target is one's own value", "value - ret", "value - (value + ret)", "cleanrl #337: stale buffer"),
    _plain("error clamped", "value - ret", "(value - ret).clamp(-1, 1)"),
    _plain("target shifted by one", "value - ret", "value - ret.roll(1, -1)", "DS-Chat #672"),
    _plain("returns normalised inside", "value - ret", "value - (ret - ret[mask].mean())"),
    _plain("error relative to the return", "0.5 * error**2", "0.5 * (error / (1 + ret.abs())) ** 2"),
    _plain("mean error squared", "0.5 * error**2",
           "0.5 * mask * ((error.sum(-1) / mask.sum(-1).clamp(min=1)) ** 2)[:, None]"),
    _mean("mean over the padding too, sum over the masked twice", "/ mask.sum()",
          "/ mask.sum() * mask.float().mean() ** 2"),
    _mean("square of the sum", "(error**2).sum()", "error.sum() ** 2"),
    _mean("unmasked", "torch.where(mask, value - ret, 0.0)", "value - ret", "DS-Chat #316"),
    _mean("root of the mean", "0.5 * (error**2).sum() / mask.sum()",
          "0.5 * ((error**2).sum() / mask.sum()).sqrt()"),
    _mean("first token dropped", "(error**2).sum()", "(error**2)[:, 1:].sum()", "verl #3287"),
    _clip("min for max", "torch.maximum", "torch.minimum", "cleanrl d6fd21b4, RLlib #2233, verl #2016"),
    _clip("clipped error only", "torch.maximum((value - ret) ** 2, (near - ret) ** 2)", "(near - ret) ** 2",
          "RLlib #22171: zero gradient"),
    _clip("clipped around itself, which is no clip",
          "old_value + torch.clamp(value - old_value, -clip, clip)",
          "torch.maximum(torch.minimum(value, value + clip), value - clip)",
          "lm-human-preference-details 36b8f56, tf-agents #352; around the return: ksim #3"),
    _clip("clipped around zero", "old_value + torch.clamp(value - old_value, -clip, clip)",
          "torch.clamp(value, -clip, clip)"),
    _clip("only the step is left", "near = old_value + torch.clamp", "near = torch.clamp"),
    _clip("clipped from above only", "torch.clamp(value - old_value, -clip, clip)",
          "torch.clamp(value - old_value, max=clip)", "oracles 1.4: one-sided clip"),
    _clip("clipped from below only", "torch.clamp(value - old_value, -clip, clip)",
          "torch.clamp(value - old_value, min=-clip)", "oracles 1.4: one-sided clip"),
    _clip("clip relative to the old value", "-clip, clip)",
          "-(clip * old_value.abs()), clip * old_value.abs())"),
    _clip("half the width", "-clip, clip)", "-clip / 2, clip / 2)"),
    _clip("value detached in the plain error", "(value - ret) ** 2", "(value.detach() - ret) ** 2"),
    _clip("clip lets the gradient through", "near = old_value + torch.clamp(value - old_value, -clip, clip)",
          "near = value + (old_value + torch.clamp(value - old_value, -clip, clip) - value).detach()"),
    _clip("sum of both errors", "torch.maximum((value - ret) ** 2, (near - ret) ** 2)",
          "0.5 * ((value - ret) ** 2 + (near - ret) ** 2)"),
    _clip("old value and return exchanged", "torch.maximum((value - ret) ** 2, (near - ret) ** 2)",
          "torch.maximum((value - old_value) ** 2, (near - old_value) ** 2)"),
    _clip_mean("maximum of the rows", "torch.where(mask, torch.maximum(plain, clipped), 0.0).sum()",
               "torch.maximum((mask * plain).sum(-1), (mask * clipped).sum(-1)).sum()"),
    _clip_mean("unmasked", "torch.where(mask, torch.maximum(plain, clipped), 0.0).sum()",
               "torch.maximum(plain, clipped).sum()", "DS-Chat #316"),
    _clip_mean("last token dropped", "torch.where(mask, torch.maximum(plain, clipped), 0.0).sum()",
               "torch.where(mask, torch.maximum(plain, clipped), 0.0)[:, :-1].sum()", "trlx #401"),
)  # fmt: skip
