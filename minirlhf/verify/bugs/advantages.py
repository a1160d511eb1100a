"""Known bugs of advantages and returns."""

import torch
from torch import Tensor

from minirlhf.verify.zoo import Bug


def gae(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float,
        bootstrap_value: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Right: the loop of most libraries, tokens that do not count stepped over."""
    kept = mask.to(reward.dtype)
    reward, value = torch.where(mask, reward, 0.0), torch.where(mask, value, 0.0)
    after = torch.zeros_like(reward[:, 0]) if bootstrap_value is None else bootstrap_value
    carried = torch.zeros_like(reward[:, 0])
    advantage = torch.zeros_like(reward)
    for t in reversed(range(reward.shape[1])):
        delta = reward[:, t] + gamma * after - value[:, t]
        now = delta + gamma * lam * carried
        carried = torch.where(mask[:, t], now, carried)
        after = torch.where(mask[:, t], value[:, t], after)
        advantage[:, t] = now
    ret = (advantage + value) * kept
    return advantage * kept, ret


def padded_gae(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float,
               bootstrap_value: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Right where only padding is masked: rewards and values are 0 there, and the loop sees no mask."""
    length = reward.shape[1]
    reward = reward * mask
    if bootstrap_value is not None:  # as a reward after the last token
        last_token = mask.long().cumsum(1).argmax(1, keepdim=True)
        reward = reward.scatter_add(1, last_token, gamma * bootstrap_value[:, None])
    value = value * mask
    last, advantages = 0.0, []
    for t in reversed(range(length)):
        next_value = value[:, t + 1] if t < length - 1 else 0.0
        delta = reward[:, t] + gamma * next_value - value[:, t]
        last = delta + gamma * lam * last
        advantages.append(last)
    advantage = torch.stack(advantages[::-1], dim=1)
    return advantage * mask, (advantage + value) * mask


def discounted_return(reward: Tensor, mask: Tensor, gamma: float,
                      bootstrap_value: Tensor | None = None) -> Tensor:  # fmt: skip
    """Right."""
    reward = torch.where(mask, reward, 0.0)
    running = torch.zeros_like(reward[:, 0]) if bootstrap_value is None else bootstrap_value
    result = torch.zeros_like(reward)
    for t in reversed(range(reward.shape[1])):
        now = reward[:, t] + gamma * running
        running = torch.where(mask[:, t], now, running)
        result[:, t] = running
    return torch.where(mask, result, 0.0)


def _gae(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "gae", gae, right, wrong, seen)


def _padded(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "gae", padded_gae, right, wrong, seen)


def _returns(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "discounted_return", discounted_return, right, wrong, seen)


BUGS = (
    _gae("lambda in place of gamma", "+ gamma * after", "+ lam * after", "bugs Z07"),
    _gae("lambda forgotten", "gamma * lam * carried", "gamma * carried", "bugs Z07"),
    _gae("gamma forgotten in the trace", "gamma * lam * carried", "lam * carried", "bugs Z07"),
    _gae("nothing carried back", "delta + gamma * lam * carried", "delta"),
    _gae("loop runs forwards", "reversed(range(reward.shape[1]))", "range(reward.shape[1])", "bugs Z08"),
    _gae("next value forgotten", "+ gamma * after - value[:, t]", "- value[:, t]", "rlhf-book #216"),
    _gae("own value as the next one", "gamma * after", "gamma * value[:, t]", "SB3 #185"),
    _gae("next value not discounted", "+ gamma * after", "+ after"),
    _gae("reward discounted", "reward[:, t] + gamma * after", "gamma * (reward[:, t] + after)"),
    _gae("baseline added", "- value[:, t]", "+ value[:, t]"),
    _gae("baseline forgotten", "+ gamma * after - value[:, t]", "+ gamma * after"),
    _gae("last value bootstraps an ended row", "after = torch.zeros_like(reward[:, 0])",
         "after = value[:, -1]",
         "DeepSpeedExamples #672"),
    _gae("cut row ends", "if bootstrap_value is None", "if True", "SB3 #633, cleanrl #198, skrl #449"),
    _gae("bootstrap value as an advantage", "carried = torch.zeros_like(reward[:, 0])", "carried = after"),
    _gae("mask ignored", "kept = mask.to(reward.dtype)",
         "mask = torch.ones_like(mask); kept = mask.to(reward.dtype)", "TRL #7024"),
    _gae("steps weighted by 1 - lambda", "now = delta", "now = (1 - lam) * delta"),
    _gae("one token late", "advantage[:, t] = now", "advantage[:, t - 1] = now"),
    _gae("returns of the reward", "ret = (advantage + value)", "ret = (reward + value)", "rlhf-book #216"),
    _gae("returns from an empty buffer", "ret = (advantage + value)", "ret = (0 * advantage + value)",
         "cleanrl #337"),
    _gae("returns less the value", "ret = (advantage + value)", "ret = (advantage - value)"),
    _gae("whitened, mean given back", "return advantage * kept, ret",
         "m = advantage[mask].mean(); return ((advantage - m) / advantage[mask].std() + m) * kept, ret",
         "torchtune: if shift_mean, where TRL has if not"),
    _gae("returns of whitened advantages", "ret = (advantage + value)",
         "ret = ((advantage - advantage.mean()) / (advantage.std() + 1e-8) + value)", "oracles W11"),
    _gae("advantages centred in each row", "return advantage * kept",
         "return (advantage - (advantage * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)) * kept"),
    _padded("values of the padding leak", "value = value * mask", "value = value + 0 * mask", "ROLL #447"),
    _padded("rewards of the padding leak", "reward = reward * mask", "reward = reward + 0 * mask",
            "DeepSpeedExamples #672"),
    _padded("last reward never bootstrapped from", "if t < length - 1 else 0.0",
            "if t < length - 2 else 0.0"),
    _padded("first advantages last", "advantages[::-1]", "advantages"),
    _padded("value after next", "value[:, t + 1] if t < length - 1", "value[:, t + 2] if t < length - 2"),
    _returns("not discounted", "gamma * running", "running"),
    _returns("sum not carried", "reward[:, t] + gamma * running", "reward[:, t]"),
    _returns("reward discounted", "reward[:, t] + gamma * running", "gamma * (reward[:, t] + running)"),
    _returns("last reward lost", "result[:, t] = running",
             "result[:, t] = (running - reward[:, t]) / max(gamma, 1e-9)",
             "HALOs e7e5b05"),
    _returns("loop runs forwards", "reversed(range(reward.shape[1]))", "range(reward.shape[1])", "bugs Z08"),
    _returns("padding counts", "reward = torch.where(mask, reward, 0.0)",
             "mask = torch.ones_like(mask)", "TRL #7024, rlhf-book #216"),
    _returns("cut row ends", "if bootstrap_value is None", "if True", "SB3 #633"),
    _returns("bootstrap value not discounted", "now = reward[:, t] + gamma * running",
             "now = reward[:, t] + (running if t == reward.shape[1] - 1 else gamma * running)"),
    _returns("rewards clipped", "reward = torch.where(mask, reward, 0.0)",
             "reward = torch.where(mask, reward, 0.0).clamp(-2, 2)"),
    _returns("decayed by position", "result[:, t] = running", "result[:, t] = running * gamma**t"),
    _returns("averaged over the steps left", "result[:, t] = running",
             "result[:, t] = running / (reward.shape[1] - t)"),
    _returns("summed over the batch", "gamma * running", "gamma * running.mean()"),
)  # fmt: skip
