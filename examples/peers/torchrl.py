"""TorchRL: advantage estimators of `torchrl.objectives.value`, losses of `torchrl.objectives.llm`."""

from typing import Any

import torch
from torch import Tensor

from peers.frame import Page, Subject, load, with_attributes

VALUE = Page("torchrl.objectives.value.functional")
GRPO = Page("torchrl.objectives.llm.grpo")
DISTILLATION = Page("torchrl.objectives.llm.distillation")


def _episodes(
    reward: Tensor, value: Tensor, mask: Tensor, bootstrap_value: Tensor | None
) -> dict[str, Tensor]:
    """A row of tokens as its collector would have stored it: cut after the last token that counts."""
    kept, slot = mask.bool(), torch.arange(mask.shape[1])
    done = kept & (slot == (slot * kept).amax(1, keepdim=True))
    after = torch.zeros_like(reward[:, 0]) if bootstrap_value is None else bootstrap_value
    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], dim=1)
    columns = {
        "state_value": torch.where(kept, value, 0.0),
        "next_state_value": torch.where(done, after.unsqueeze(1), torch.where(kept, following, 0.0)),
        "reward": torch.where(kept, reward, 0.0),
        "done": done | ~kept,
        "terminated": (done if bootstrap_value is None else torch.zeros_like(done)) | ~kept,
    }
    return {name: column.unsqueeze(-1) for name, column in columns.items()}


def _advantages(name: str) -> Any:
    def estimate(
        reward: Tensor,
        value: Tensor,
        mask: Tensor,
        gamma: float,
        lam: float,
        bootstrap_value: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        theirs = getattr(load(VALUE), name)
        advantage, target = theirs(gamma, lam, **_episodes(reward, value, mask, bootstrap_value))
        return advantage.squeeze(-1), target.squeeze(-1)

    return estimate


def generalized_advantage_estimate(
    reward: Tensor,
    value: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loop over time."""
    return _advantages("generalized_advantage_estimate")(reward, value, mask, gamma, lam, bootstrap_value)


def vec_generalized_advantage_estimate(
    reward: Tensor,
    value: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The convolution."""
    return _advantages("vec_generalized_advantage_estimate")(reward, value, mask, gamma, lam, bootstrap_value)


def _td_lambda(name: str, reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    episodes = _episodes(reward, value, mask, None)
    state_value = episodes.pop("state_value")
    return (getattr(load(VALUE), name)(gamma, lam, **episodes) - state_value).squeeze(-1)


def td_lambda_return_estimate(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float
) -> Tensor:
    """TD(λ) returns less the values, which is GAE."""
    return _td_lambda("td_lambda_return_estimate", reward, value, mask, gamma, lam)


def vec_td_lambda_return_estimate(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float
) -> Tensor:
    """The same, vectorised."""
    return _td_lambda("vec_td_lambda_return_estimate", reward, value, mask, gamma, lam)


def reward2go(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted rewards to go, in single precision: its series leaves out what is below 1e-7."""
    episodes = _episodes(reward.float(), torch.zeros_like(reward), mask, None)
    return load(VALUE).reward2go(episodes["reward"], episodes["done"], gamma).squeeze(-1)


def _objective(
    name: str, logp: Tensor, old_logp: Tensor, advantage: Tensor, low: float, high: float
) -> Tensor:
    """`_compute_policy_objective`, which reads the limits of its loss."""
    limits = (torch.tensor(-low, dtype=logp.dtype).log1p(), torch.tensor(high, dtype=logp.dtype).log1p())
    loss = with_attributes(_clip_bounds=limits)
    theirs = getattr(load(GRPO), name)._compute_policy_objective
    return theirs(loss, (logp - old_logp).unsqueeze(-1), advantage.unsqueeze(-1))[0].squeeze(-1)


def grpo_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """`GRPOLoss`, per token."""
    return _objective("GRPOLoss", logp, old_logp, advantage, clip_low, clip_high)


def cispo_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """`CISPOLoss`, per token."""
    return _objective("CISPOLoss", logp, old_logp, advantage, clip_low, clip_high)


def kl_to_ref(logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float = 1.0) -> Tensor:
    """`GRPOLoss._kl_to_ref`, the penalty beside the loss."""
    page = load(GRPO)
    loss = with_attributes(kl_to_ref_coeff=beta)
    stored = page.TensorDict({"_cur_log_prob": logp}, batch_size=[])
    return page.GRPOLoss._kl_to_ref(loss, stored, ref_log_prob=ref_logp, mask=mask.bool())[0]


def aggregate_loss_value(x: Tensor, mask: Tensor) -> Tensor:
    """`GRPOLoss._aggregate_loss_value` by prompt."""
    loss = with_attributes(aggregation="prompt_mean", reduction="mean")
    return load(GRPO).GRPOLoss._aggregate_loss_value(loss, x.unsqueeze(-1), mask.bool()).squeeze(-1)


def _subject(function: str, kind: str, page: Page, call: Any = None, **adapter: Any) -> Subject:
    return Subject("torchrl", function, kind, page, call, adapter)


_DISCOUNTED: dict[str, Any] = {"gamma": 0.99, "lam": 0.95, "fixed": {"gamma": 0.99, "lam": 0.95}}

SUBJECTS = (
    _subject("generalized_advantage_estimate", "gae", VALUE, generalized_advantage_estimate),
    _subject("vec_generalized_advantage_estimate", "gae", VALUE, vec_generalized_advantage_estimate),
    _subject("vec_generalized_advantage_estimate at γ = .99, λ = .95", "gae", VALUE,
             vec_generalized_advantage_estimate, **_DISCOUNTED),
    _subject("td_lambda_return_estimate", "gae", VALUE, td_lambda_return_estimate),
    _subject("vec_td_lambda_return_estimate", "gae", VALUE, vec_td_lambda_return_estimate),
    _subject("vec_td_lambda_return_estimate at γ = .99, λ = .95", "gae", VALUE, vec_td_lambda_return_estimate,
             **_DISCOUNTED),
    _subject("reward2go", "discounted_return", VALUE, reward2go),
    _subject("reward2go at γ = .99", "discounted_return", VALUE, reward2go, gamma=0.99,
             fixed={"gamma": 0.99}),
    _subject("GRPOLoss, objective", "clipped_surrogate", GRPO, grpo_loss),
    _subject("CISPOLoss, objective", "cispo", GRPO, cispo_loss),
    _subject("GRPOLoss, KL to the reference", "kl_loss", GRPO, kl_to_ref),
    _subject("GRPOLoss, prompt_mean", "sequence_mean", GRPO, aggregate_loss_value),
    _subject("k3_kl_token_estimate", "kl_estimator", DISTILLATION, logp="log_prob",
             ref_logp="target_log_prob"),
)  # fmt: skip
