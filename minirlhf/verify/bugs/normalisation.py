"""Known bugs of whitening."""

import torch
from torch import Tensor

from minirlhf.verify.zoo import Bug


def whiten(x: Tensor, mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Right."""
    x = torch.where(mask, x, 0.0)
    n = mask.sum()
    mean = x.sum() / n
    centred = torch.where(mask, x - mean, 0.0)
    variance = centred.square().sum() / (n - 1)
    white = centred * torch.rsqrt(variance + epsilon)
    return white


def added_epsilon_whiten(x: Tensor, mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Right, as most loops have it."""
    tokens = x[mask]
    mean, std = tokens.mean(), tokens.std()
    white = (x - mean) / (std + epsilon)
    return torch.where(mask, white, 0.0)


def whiten_scale_only(x: Tensor, mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Right."""
    x = torch.where(mask, x, 0.0)
    n = mask.sum()
    mean = x.sum() / n
    centred = torch.where(mask, x - mean, 0.0)
    variance = centred.square().sum() / (n - 1)
    white = centred * torch.rsqrt(variance + epsilon)
    return torch.where(mask, white + mean, 0.0)


def _white(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "whiten", whiten, right, wrong, seen)


def _added(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "whiten", added_epsilon_whiten, right, wrong, seen)


def _scale(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "whiten_scale_only", whiten_scale_only, right, wrong, seen)


BUGS = (
    _white("sign flipped", "centred = torch.where(mask, x - mean, 0.0)",
           "centred = torch.where(mask, mean - x, 0.0)",
           "oracles W4"),
    _white("not centred", "white = centred * torch", "white = x * torch", "oracles 3.5"),
    _white("mean given back", "return white", "return torch.where(mask, white + mean, 0.0)",
           "torchtune: if shift_mean, where TRL has if not"),
    _white("not scaled", "white = centred * torch.rsqrt(variance + epsilon)", "white = centred"),
    _white("divided by the variance", "torch.rsqrt(variance + epsilon)",
           "torch.reciprocal(variance + epsilon)"),
    _white("multiplied by the deviation", "torch.rsqrt(variance + epsilon)",
           "torch.sqrt(variance + epsilon)"),
    _white("epsilon subtracted", "variance + epsilon", "variance - epsilon"),
    _white("padding counted", "n = mask.sum()", "n = mask.numel()", "SkyRL #1305"),
    _white("mean over the padding", "mean = x.sum() / n", "mean = x.mean()", "SkyRL #1305"),
    _white("variance over the padding", "centred = torch.where(mask, x - mean, 0.0)", "centred = x - mean",
           "OpenRLHF #1250"),
    _white("mean of each row", "mean = x.sum() / n",
           "mean = x.sum(1, keepdim=True) / mask.sum(1, keepdim=True)",
           "oracles 3.5: per-sequence centring"),
    _white("variance of each row", "centred.square().sum() / (n - 1)",
           "centred.square().sum(1, keepdim=True) / (mask.sum(1, keepdim=True) - 1).clamp(min=1)",
           "OpenRLHF #1250"),
    _white("axis not kept", "mean = x.sum() / n", "mean = x.sum(1) / mask.sum(1)", "OpenRLHF #1250"),
    _white("statistics of each column", "mean = x.sum() / n", "mean = x.sum(0) / mask.sum(0).clamp(min=1)"),
    _white("variance about 0", "variance = centred.square()", "variance = x.square()"),
    _white("n - 2 for n - 1", "(n - 1)", "(n - 2)"),
    _white("absolute deviation for the standard one", "centred.square().sum() / (n - 1)",
           "(centred.abs().sum() / n) ** 2"),
    _white("clamped afterwards", "return white", "return white.clamp(-1, 1)"),
    _added("precedence: only the mean is scaled", "(x - mean) / (std + epsilon)",
           "x - mean / (std + epsilon)",
           "pytorch-cpp-rl #14"),
    _added("mask forgotten", "tokens = x[mask]", "tokens = x", "AReaL #1346"),
    _added("median for the mean", "tokens.mean()", "tokens.median()"),
    _added("range for the deviation", "tokens.std()", "tokens.max() - tokens.min()"),
    _scale("mean not given back", "white + mean", "white", "TRL #887"),
    _scale("mean taken off twice", "white + mean", "white - mean"),
    _scale("mean scaled too", "white + mean", "white + mean * torch.rsqrt(variance + epsilon)", "oracles W6"),
    _scale("not centred before scaling", "white = centred * torch", "white = x * torch"),
    _scale("sign flipped", "white + mean", "mean - white", "oracles W4"),
    _scale("mean over the padding", "mean = x.sum() / n", "mean = x.mean()", "SkyRL #1305"),
    _scale("variance over the padding", "centred = torch.where(mask, x - mean, 0.0)", "centred = x - mean",
           "OpenRLHF #1250"),
    _scale("mean of each row", "mean = x.sum() / n",
           "mean = x.sum(1, keepdim=True) / mask.sum(1, keepdim=True)",
           "oracles 3.5"),
    _scale("divided by the variance", "torch.rsqrt(variance + epsilon)",
           "torch.reciprocal(variance + epsilon)"),
)  # fmt: skip
