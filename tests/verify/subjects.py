"""Functions of strangers, right and wrong, for the tests of `certify` itself."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_forgotten(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
) -> Tensor:
    logits = policy_chosen_logps - policy_rejected_logps
    return -F.logsigmoid(beta * logits).mean()


def scalar_dpo(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor) -> Tensor:
    """Other names, no beta, a mean."""
    return -F.logsigmoid(0.3 * ((pi_w - pi_l) - (ref_w - ref_l))).mean()


def summed_dpo(a: Tensor, b: Tensor, c: Tensor, d: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Unknown names in canonical order, a sum, and a second result."""
    h = (a - b) - (c - d)
    return -F.logsigmoid(beta * h).sum(), (h > 0).float().mean()


def single_precision_dpo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    h = (chosen_logp - rejected_logp).float() - (ref_chosen_logp - ref_rejected_logp).float()
    return -F.logsigmoid(beta * h)


def reordered(beta: float, ref: Tensor, ref_l: Tensor, pol: Tensor, pol_l: Tensor, /) -> Tensor:
    return -F.logsigmoid(beta * (pol - pol_l - ref + ref_l))


def with_extra(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
    device: str,
) -> Tensor:
    h = chosen_logp - rejected_logp - ref_chosen_logp + ref_rejected_logp
    return -F.logsigmoid(beta * h.to(device))


def always_raises(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    raise KeyError("model")


def raises_on_one_pair(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    if len(chosen_logp) == 1:
        raise IndexError("tuple index out of range")
    h = chosen_logp - rejected_logp - ref_chosen_logp + ref_rejected_logp
    return -F.logsigmoid(beta * h)


def exits(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    raise SystemExit(3)


def wrong_shape(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    return torch.zeros(len(chosen_logp), 7)


def returns_text(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> str:
    return "0.69"


def half_gradient(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    """The right value, and the gradient of the chosen side only."""
    h = chosen_logp - rejected_logp.detach() - ref_chosen_logp + ref_rejected_logp
    return -F.logsigmoid(beta * h)


def writes_to_its_input(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    h = chosen_logp - rejected_logp - ref_chosen_logp + ref_rejected_logp
    with torch.no_grad():
        ref_chosen_logp -= 1.0
    return -F.logsigmoid(beta * h)
