"""Known bugs of IPO, averaged and summed."""

import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401  a wrong text uses it
from torch import Tensor

from minirlhf.verify.zoo import Bug


def ipo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    tau: float,
) -> Tensor:
    """Right."""
    chosen = (chosen_logp - ref_chosen_logp) / chosen_length
    rejected = (rejected_logp - ref_rejected_logp) / rejected_length
    h = chosen - rejected
    target = 1 / (2 * tau)
    return (h - target) ** 2


def _ipo(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "ipo", ipo, right, wrong, seen)


def ipo_summed(
    chosen_logp: Tensor, rejected_logp: Tensor, ref_chosen_logp: Tensor, ref_rejected_logp: Tensor, tau: float
) -> Tensor:
    """Right."""
    policy_gap = chosen_logp - rejected_logp
    ref_gap = ref_chosen_logp - ref_rejected_logp
    h = policy_gap - ref_gap
    target = 1 / (2 * tau)
    return (h - target) ** 2


def _summed(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "ipo_summed", ipo_summed, right, wrong, seen)


BUGS = (
    _ipo("target is 1/tau", "1 / (2 * tau)", "1 / tau", "oracles I1"),
    _ipo("target is tau/2", "1 / (2 * tau)", "tau / 2", "oracles I1"),
    _ipo("tau inside the square", "h - target", "tau * h - 0.5", "TRL #1615: (β·lr - .5)²"),
    _ipo("target divided by the length", "h - target", "h - target / chosen_length"),
    _ipo("target forgotten", "h - target", "h"),
    _ipo("chosen and rejected swapped", "chosen - rejected\n", "rejected - chosen\n", "bugs Z05"),
    _ipo("reference forgotten on both sides", "h = chosen - rejected",
         "h = chosen_logp / chosen_length - rejected_logp / rejected_length", "Liger #405"),
    _ipo("reference forgotten on one side", "(rejected_logp - ref_rejected_logp)", "rejected_logp"),
    _ipo("reference sign flipped", "(chosen_logp - ref_chosen_logp)", "(chosen_logp + ref_chosen_logp)"),
    _ipo("only the chosen side averaged", "(rejected_logp - ref_rejected_logp) / rejected_length",
         "(rejected_logp - ref_rejected_logp)", "HALOs d8fd14f"),
    _ipo("only the policy averaged", "(chosen_logp - ref_chosen_logp) / chosen_length",
         "(chosen_logp / chosen_length - ref_chosen_logp)", "TRL #1265"),
    _ipo("averaged twice", "(chosen_logp - ref_chosen_logp) / chosen_length",
         "(chosen_logp - ref_chosen_logp) / chosen_length ** 2", "LLaMA-Factory #6722"),
    _ipo("lengths swapped", "(chosen_logp - ref_chosen_logp) / chosen_length",
         "(chosen_logp - ref_chosen_logp) / rejected_length"),
    _ipo("multiplied by the length", "(chosen_logp - ref_chosen_logp) / chosen_length",
         "(chosen_logp - ref_chosen_logp) * chosen_length"),
    _ipo("divided by the batch's mean length", "(chosen_logp - ref_chosen_logp) / chosen_length",
         "(chosen_logp - ref_chosen_logp) / chosen_length.double().mean()"),
    _ipo("divided by the padded length", "h = chosen - rejected",
         "h = (chosen * chosen_length - rejected * rejected_length) / chosen_length.max(rejected_length)"),
    _ipo("sigmoid in place of the square", "(h - target) ** 2", "-F.logsigmoid(tau * h)",
         "ms-swift #9925, #10167: ipo silently ran sigmoid"),
    _ipo("distance, not its square", "(h - target) ** 2", "(h - target).abs()"),
    _ipo("one-sided", "(h - target) ** 2", "torch.relu(target - h) ** 2",
         "a squared hinge: it overfits again"),
    _ipo("rejected side detached", "h = chosen - rejected", "h = chosen - rejected.detach()"),
    _ipo("square of the mean", "(h - target) ** 2", "(h - target).mean() ** 2", "oracles D14"),
    _ipo("loss negated", "(h - target) ** 2", "-(h - target) ** 2", "Liger-Kernel #484"),
    _summed("target is 1/tau", "1 / (2 * tau)", "1 / tau", "oracles I1"),
    _summed("target is tau/2", "1 / (2 * tau)", "tau / 2", "oracles I1"),
    _summed("tau inside the square", "h - target", "tau * h - 0.5", "TRL #1615: (β·lr - .5)²"),
    _summed("sign of the target", "h - target", "h + target"),
    _summed("target forgotten", "h - target", "h"),
    _summed("chosen and rejected swapped", "chosen_logp - rejected_logp\n", "rejected_logp - chosen_logp\n"),
    _summed("reference forgotten", "h = policy_gap - ref_gap", "h = policy_gap", "Liger #405"),
    _summed("reference sign flipped", "policy_gap - ref_gap", "policy_gap + ref_gap"),
    _summed("tau multiplies the loss", "(h - target) ** 2", "tau * (h - target) ** 2"),
    _summed("sigmoid in place of the square", "(h - target) ** 2", "-F.logsigmoid(tau * h)",
            "ms-swift #9925"),
    _summed("distance, not its square", "(h - target) ** 2", "(h - target).abs()"),
    _summed("one-sided", "(h - target) ** 2", "torch.relu(target - h) ** 2"),
    _summed("chosen side detached", "chosen_logp - rejected_logp\n",
            "chosen_logp.detach() - rejected_logp\n"),
    _summed("error clamped", "(h - target) ** 2", "(h - target).clamp(-100, 100) ** 2"),
    _summed("square of the mean", "(h - target) ** 2", "(h - target).mean() ** 2"),
    _summed("half gradient", "(h - target) ** 2", "(h - target) * (h - target).detach()"),
)  # fmt: skip
