"""What every objective asks of its inputs: equal shapes, floating point, bool masks, sane hyperparameters.

Only shapes, dtypes and Python numbers are looked at, so every check survives `vmap`, `grad` and
`torch.compile(fullgraph=True)`; the *values* of tensors are checked where batches are built. An error names
the argument, what was expected and what came.
"""

import math

import torch
from torch import Tensor

Scalar = float | Tensor
"""A hyperparameter: a Python number, or a tensor [] where many values run at once under `vmap`."""


def widen(x: Tensor) -> Tensor:
    """x in fp32 if it came in bf16 or fp16; fp32 and fp64 stay as they are.

    >>> widen(torch.ones(2, dtype=torch.bfloat16))
    tensor([1., 1.])
    """
    return x if x.dtype == torch.float64 else x.float()  # which is itself in fp32


def check_floating(**tensors: Tensor) -> None:
    """Refuses what is not a floating-point tensor.

    >>> check_floating(reward=torch.tensor([1]))
    Traceback (most recent call last):
        ...
    ValueError: reward must be a floating-point tensor, got torch.int64
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def check_same_shape(**tensors: Tensor) -> None:
    """Refuses tensors of different shapes: nothing is broadcast, so [B] never meets [B, 1].

    >>> check_same_shape(logp=torch.zeros(3), ref_logp=torch.zeros(3, 1))
    Traceback (most recent call last):
        ...
    ValueError: expected equal shapes, got logp [3], ref_logp [3, 1]
    """
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    first = next(iter(shapes.values()))
    if any(shape != first for shape in shapes.values()):
        raise ValueError("expected equal shapes, got " + ", ".join(f"{n} {s}" for n, s in shapes.items()))


def check_mask(mask: Tensor) -> None:
    """Refuses a mask that is not bool: 0/1 numbers would be multiplied somewhere, and 0 · NaN = NaN.

    >>> check_mask(torch.ones(2, 3))
    Traceback (most recent call last):
        ...
    ValueError: mask must be a bool tensor (True = counts), got torch.float32
    """
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask must be a bool tensor (True = counts), got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be a bool tensor (True = counts), got {mask.dtype}")


def check_tokens(mask: Tensor, **tensors: Tensor) -> None:
    """Refuses all but floating-point tensors and a bool mask of one shape, [B, T] (or [T], under `vmap`)."""
    check_floating(**tensors)
    check_mask(mask)
    check_same_shape(**tensors, mask=mask)
    if mask.ndim == 0:
        raise ValueError("mask must have a token axis, got shape []")


def check_per_sequence(name: str, tensor: Tensor, mask: Tensor) -> None:
    """Refuses a tensor that is not one floating-point number for each row of `mask`.

    >>> check_per_sequence("score", torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    Traceback (most recent call last):
        ...
    ValueError: score must have shape [2] (one per row of mask [2, 3]), got [2, 3]
    """
    check_floating(**{name: tensor})
    if tensor.shape != mask.shape[:-1]:
        raise ValueError(
            f"{name} must have shape {list(mask.shape[:-1])} (one per row of mask {list(mask.shape)}), "
            f"got {list(tensor.shape)}"
        )


def check_positive(**values: Scalar) -> None:
    """Refuses a number that is not positive and finite (NaN included)."""
    for name, value in values.items():
        if _is_number(name, value) and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_non_negative(**values: Scalar) -> None:
    """Refuses a number that is negative, infinite or NaN."""
    for name, value in values.items():
        if _is_number(name, value) and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def check_width(**values: Scalar) -> None:
    """Refuses a clipping width that is not positive; infinity is a width (nothing is clipped)."""
    for name, value in values.items():
        if _is_number(name, value) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def check_fraction(**values: Scalar) -> None:
    """Refuses a number outside [0, 1] (NaN included)."""
    for name, value in values.items():
        if _is_number(name, value) and not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_label_smoothing(label_smoothing: Scalar) -> None:
    """Refuses a share of flipped labels outside [0, 0.5): from one half on, the labels say nothing or lie."""
    if _is_number("label_smoothing", label_smoothing) and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")


def _is_number(name: str, value: Scalar) -> bool:
    """True for a number, False for a tensor [] (no check may read its value); refuses anything else."""
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(f"{name} must be a number or a tensor [], got shape {list(value.shape)}")
        return False
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {type(value).__name__}")
    return True
