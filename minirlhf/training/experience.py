"""From a scored rollout to what PPO learns from: log-probs, rewards, values, advantages, returns.

Everything is [N, T], aligned with the token that it scores, and computed once per iteration by the parameters
that sampled, without autograd history: old log-probs, rewards and advantages receive no gradient by law.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.kernels.logprob import token_logp
from minirlhf.models.interface import LanguageModel, Params, aligned, scalar
from minirlhf.models.packing import Packing, hidden
from minirlhf.objectives.advantages import gae, whiten
from minirlhf.objectives.divergence import kl_k1, kl_shaped_reward
from minirlhf.objectives.masked import select
from minirlhf.rollout.sampler import LENGTH, Rollout, response_mask
from minirlhf.runs import InputError
from minirlhf.training.offload import Lendable, using
from minirlhf.training.packed import Part, Prompted, in_order, parts_of


class PolicyRows(Prompted, Protocol):
    """What the policy's side reads of an experience, PPO's or a group's; the fields are those below."""

    @property
    def mask(self) -> Tensor: ...
    @property
    def old_logp(self) -> Tensor: ...
    @property
    def ref_logp(self) -> Tensor: ...
    @property
    def score(self) -> Tensor: ...
    @property
    def advantage(self) -> Tensor: ...
    @property
    def packing(self) -> Packing | None: ...


Rows = TypeVar("Rows", bound=PolicyRows)
"""A NamedTuple of tensors, [N, T] or [N] each, and the packing."""


class Experience(NamedTuple):
    """One iteration's N responses, ready to be cut into minibatches.

    tokens: int64 [N, T] prompt and response; mask: bool [N, T], True on response tokens.
    prompt_lengths, lengths: int64 [N].
    old_logp: [N, T] log π_old(token), tempered as it was sampled; ref_logp: [N, T] the reference's, likewise.
    old_value: [N, T] the critic's V before each token, in units of the score.
    score: [N] the reward of the response, less the missing-EOS penalty.
    reward: [N, T] -β k1, and the score on the last valid token.
    advantage: [N, T] whitened over all N rows; ret: [N, T] the critic's target, formed before whitening.
    packing: how these rows are computed, once they are a micro-batch; None: as padded rows.
    """

    tokens: Tensor
    mask: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    old_value: Tensor
    score: Tensor
    reward: Tensor
    advantage: Tensor
    ret: Tensor
    packing: Packing | None = None


class Sampled(NamedTuple):
    """What one iteration sampled.

    prompt_index: int64 [N] the prompt of each row; rollout: as sampled; experience: what is made of it.
    sampler_gap: the largest |recorded - recomputed| log-prob of a sampled token, in nats.
    """

    prompt_index: Tensor
    rollout: Rollout
    experience: Experience
    sampler_gap: float


@torch.no_grad()
def collect(
    model: LanguageModel,
    policy: Params,
    reference: Lendable,
    critic: Params,
    rollout: Rollout,
    score: Tensor,
    *,
    temperature: float,
    kl_coefficient: float,
    missing_eos_penalty: float,
    gamma: float,
    lam: float,
    micro_batch_size: int,
) -> Experience:
    """Scores every token of a rollout by all three models and forms rewards, advantages and returns.

    The length limit is part of the task: a truncated response is scored on its last token, pays the
    missing-EOS penalty, and bootstraps 0. The KL reward compares both laws at the sampling temperature.

    Args:
        score: [N] one number per response, as the scorer gave it.
        kl_coefficient: β, score units per nat of log π/π_ref on a sampled token.
        missing_eos_penalty: subtracted from the score of a response that no stop token ended.
        micro_batch_size: rows per forward pass.

    Raises:
        InputError: score has another shape than [N]; or a score, a log-prob or a value is not finite.
    """
    mask = response_mask(rollout)
    law = partial(logp_of, model, temperature=temperature)
    old_logp = by_rows(partial(law, policy), rollout, micro_batch_size=micro_batch_size)
    ref_logp = using(
        reference, lambda near: by_rows(partial(law, near), rollout, micro_batch_size=micro_batch_size)
    )
    old_value = by_rows(partial(value_of, model, critic), rollout, micro_batch_size=micro_batch_size)
    check_finite(policy=old_logp, reference=ref_logp, critic=old_value)
    penalised = penalised_score(score, rollout, missing_eos_penalty=missing_eos_penalty)
    reward = kl_shaped_reward(penalised, kl_k1(old_logp, ref_logp, mask), mask, beta=kl_coefficient)
    estimate = gae(reward, old_value, mask, gamma=gamma, lam=lam)
    return Experience(
        tokens=rollout.tokens,
        mask=mask,
        prompt_lengths=rollout.prompt_lengths,
        lengths=rollout.lengths,
        old_logp=old_logp,
        ref_logp=ref_logp,
        old_value=old_value,
        score=penalised,
        reward=reward,
        advantage=whiten(estimate.advantage, mask),
        ret=estimate.ret,
    )


def logp_of(
    model: LanguageModel,
    params: Params,
    tokens: Tensor,
    mask: Tensor,
    packing: Packing | None = None,
    *,
    temperature: float,
) -> Tensor:
    """log π(tokens[b, t] | tokens[b, :t]) of the tempered law where the mask is True, else 0: [B, T] nats."""
    states = aligned(hidden(model, params, tokens, packing))
    return token_logp(states, model.unembedding(params), tokens, mask, temperature=temperature)


def value_of(
    model: LanguageModel, params: Params, tokens: Tensor, mask: Tensor, packing: Packing | None = None
) -> Tensor:
    """V *before* token t, from the state that predicts it, where the mask is True, else 0: [B, T]."""
    return select(scalar(params, aligned(hidden(model, params, tokens, packing))), mask)


def take_rows(experience: Rows, part: Part) -> Rows:
    """The part's rows of every field alike, trimmed to the longest of them, packed as the part says."""
    fields: Any = experience
    taken = {
        name: field[part.rows, : part.width] if field.ndim == 2 else field[part.rows]
        for name, field in fields._asdict().items()
        if name != "packing"
    }
    return type(fields)(**taken, packing=part.packing)


def by_rows(
    read: Callable[[Tensor, Tensor, Packing | None], Tensor], rollout: Rollout, *, micro_batch_size: int
) -> Tensor:
    """read(tokens [b, t], response mask [b, t], packing) -> [b, t], a few rows of like length or of one
    prompt at a time: [N, T], 0 in what was trimmed."""
    mask, width, found = response_mask(rollout), rollout.tokens.shape[1], []
    parts = parts_of(rollout, size=micro_batch_size)
    for rows, longest, packing in parts:
        part = read(rollout.tokens[rows, :longest], mask[rows, :longest], packing)
        found.append(F.pad(part, (0, width - longest)))
    return in_order(found, parts)


def check_finite(**tables: Tensor) -> None:
    """Refuses a model's [N, T] numbers, under its name, where one of them is NaN or infinite.

    >>> check_finite(critic=torch.tensor([[0.0, torch.nan]]))
    Traceback (most recent call last):
        ...
    minirlhf.runs.files.InputError: the critic gives nan at row 0, position 1, not a finite number
    """
    for name, table in tables.items():
        wrong = ~table.isfinite()
        if bool(wrong.any()):
            row, position = wrong.nonzero()[0].tolist()
            raise InputError(
                f"the {name} gives {float(table[row, position])} at row {row}, position {position}, "
                f"not a finite number"
            )


def penalised_score(score: Tensor, rollout: Rollout, *, missing_eos_penalty: float) -> Tensor:
    """The score [N], less the penalty wherever the length limit, and no stop token, ended the response.

    Raises:
        InputError: score has another shape than [N], or is not finite.
    """
    _check_score(score, len(rollout.tokens))
    return score - missing_eos_penalty * (rollout.stop_reason == LENGTH)


def _check_score(score: Tensor, rows: int) -> None:
    if score.shape != (rows,):
        raise InputError(f"expected the score of {rows} responses, got shape {list(score.shape)}")
    if not bool(score.isfinite().all()):
        row = int((~score.isfinite()).nonzero()[0, 0])
        raise InputError(f"the score of response {row} is {float(score[row])}, not a finite number")
