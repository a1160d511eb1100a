"""Sampling from a model: what a caller sees. The loop is `engine`, the cache is `pages`.

Any number of prompts in one call. Rows with the same prompt read it once, and so do all rows what all prompts
begin with. Each token is drawn by the inverse CDF from one counter-based uniform.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, NotRequired, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from minirlhf.kernels import paged
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.rollout.cache import CacheUse
from minirlhf.rollout.engine import Answers, Engine, Law
from minirlhf.rollout.parts import common_beginning, parts_of
from minirlhf.rollout.philox import uniforms
from minirlhf.rollout.recorded import RecordingEngine
from minirlhf.rollout.request import MEMORY, check, default_slots, limits_of
from minirlhf.rollout.weights import Weights, fastest

EOS, STOP, LENGTH = 0, 1, 2
"""Why a response ended, in `Rollout.stop_reason`: the first stop id, another stop id, the length limit."""


class Rollout(NamedTuple):
    """Sampled responses; row b is [prompt][response][padding 0], all [B, T] aligned with the token scored.

    tokens: int64 [B, T], T the longest row.
    prompt_lengths, lengths: int64 [B]; the response is prompt_lengths[b] .. lengths[b] - 1, stop included.
    logp: fp32 [B, T] log-prob under the raw model at temperature 1, in nats; 0 outside the response.
    sampled_logp: fp32 [B, T] likewise, under the law that the token was drawn from.
    stop_reason: int64 [B], one of EOS, STOP, LENGTH. A stop id drawn at the limit is a stop, not a length.
    boundary_draws: int64 [], draws whose uniform lay within 1e-5 of the law's boundary with another token:
        only these can differ between batch sizes, where logits differ by rounding (a law that jumps, as
        greedy and filters do at a tie, can also differ there).
    cache: what the KV cache held when it was fullest; None where no sampler made this rollout.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    logp: Tensor
    sampled_logp: Tensor
    stop_reason: Tensor
    boundary_draws: Tensor
    cache: CacheUse | None = None


class Finished(NamedTuple):
    """One response, as soon as it has ended: the number of its prompt; the rest as in `Rollout`, [N] each."""

    prompt: int
    tokens: Tensor
    logp: Tensor
    sampled_logp: Tensor
    stop_reason: int


class Sampling(TypedDict):
    """What `generate` and `stream` are told about sampling.

    law: what to sample from; `greedy_law` and any `sampling_law` of objectives.sampling fit.
    max_new_tokens: most tokens per response, the stop token counted; one number, or one per prompt.
    stop_ids: a response ends with the first of these it draws; the first of them is EOS. May be empty.
    seed, prompt_index, sample_index: int and int64 [B], [B]: together with the position they fix the uniform
        of every token. Two rows with equal indices get equal uniforms.
    slots: rows that are live at a time; None, the default, for what `memory` allows. It changes no uniform.
    memory: bytes of KV cache and workspace that choose `slots`; `request.MEMORY` unless given.
    weights: what the products of the rollout use, see `rollout.weights`; `fastest` unless given.
    """

    law: Law
    max_new_tokens: int | Sequence[int]
    stop_ids: Sequence[int]
    seed: int
    prompt_index: Tensor
    sample_index: Tensor
    slots: NotRequired[int | None]
    memory: NotRequired[int]
    weights: NotRequired[Weights]


def generate(
    model: LanguageModel,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    progress: Callable[[int], None] | None = None,
    **sampling: Unpack[Sampling],
) -> Rollout:
    """Sample one response to each prompt.

    Args:
        prompts: B lists of token ids, none empty; a stop id inside a prompt is an ordinary token. For n
            samples of a prompt give it n times: it is read once.
        progress: called after each round with the tokens sampled so far in this call.
        sampling: see `Sampling`.

    Returns:
        The responses in the order of the prompts, on the parameters' device, without autograd history.

    Raises:
        InputError: before any work: no prompts, an empty prompt, an id or stop id outside the vocabulary,
            a prompt whose length plus max_new_tokens exceeds the context, memory for not even one row.
        ValueError: indices of another shape, a limit or slots below 1, a law that is not normalised.
    """
    engine = _engine(model, params, prompts, **sampling)
    for _ in engine.run():
        if progress is not None:
            progress(engine.sampled)
    return _assemble(prompts, engine.answers)._replace(cache=engine.cache.use)


def stream(
    model: LanguageModel, params: Params, prompts: Sequence[Sequence[int]], **sampling: Unpack[Sampling]
) -> Iterator[Finished]:
    """`generate`, whose responses come as they finish. A bad request raises at the call."""
    engine = _engine(model, params, prompts, **sampling)

    def finished() -> Iterator[Finished]:
        answers = engine.answers
        for rows in engine.run():
            for row in rows.tolist():
                end = int(answers.lengths[row])
                parts = (
                    each[row, :end].clone() for each in (answers.tokens, answers.logp, answers.sampled_logp)
                )
                yield Finished(row, *parts, stop_reason=int(answers.stop[row]))

    return finished()


def response_mask(rollout: Rollout) -> Tensor:
    """bool [B, T], True on the tokens that were sampled, the stop token included."""
    position = torch.arange(rollout.tokens.shape[1], device=rollout.tokens.device)
    return (position >= rollout.prompt_lengths[:, None]) & (position < rollout.lengths[:, None])


def responses(rollout: Rollout) -> list[list[int]]:
    """The sampled ids of each row without the stop token: what a reader or judge of the text sees."""
    ends = rollout.lengths - (rollout.stop_reason != LENGTH).long()
    spans = zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), ends.tolist(), strict=True)
    return [row[start:end] for row, start, end in spans]


def _engine(
    model: LanguageModel,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    law: Law,
    max_new_tokens: int | Sequence[int],
    stop_ids: Sequence[int],
    seed: int,
    prompt_index: Tensor,
    sample_index: Tensor,
    slots: int | None = None,
    memory: int = MEMORY,
    weights: Weights = fastest,
) -> Engine:
    """Checks everything about a request, then sets up the engine for it."""
    limits = limits_of(max_new_tokens, len(prompts))
    check(prompts, stop_ids, limits, model.config)
    for name, index in (("prompt_index", prompt_index), ("sample_index", sample_index)):
        if index.shape != (len(prompts),):
            raise ValueError(f"{name} must have shape [{len(prompts)}], got {list(index.shape)}")
    if slots is not None and slots < 1:
        raise ValueError(f"slots must be at least 1, got {slots}")
    longest, batch, most = max(len(prompt) for prompt in prompts), len(prompts), max(limits)
    slots = min(slots or default_slots(model, params, longest, most, memory), batch)
    device = model.unembedding(params).device
    positions = torch.arange(most)
    answers = Answers(
        tokens=torch.zeros(batch, most, dtype=torch.int64, device=device),
        logp=torch.zeros(batch, most, device=device),
        sampled_logp=torch.zeros(batch, most, device=device),
        lengths=torch.zeros(batch, dtype=torch.int64, device=device),
        stop=torch.zeros(batch, dtype=torch.int64, device=device),
        boundary=torch.zeros((), dtype=torch.int64, device=device),
    )
    parts = parts_of(prompts, slots)
    return (RecordingEngine if paged.available(device) else Engine)(
        model,
        weights(params, slots, most),
        parts,
        common_beginning(parts),
        law=law,
        slots=slots,
        limits=np.array(limits),
        uniform=uniforms(seed, prompt_index.cpu()[:, None], sample_index.cpu()[:, None], positions),
        stops=torch.tensor(list(stop_ids), dtype=torch.int64, device=device),
        answers=answers,
    )


def _assemble(prompts: Sequence[Sequence[int]], answers: Answers) -> Rollout:
    """Puts each response behind its prompt."""
    device = answers.tokens.device
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    lengths = prompt_lengths + answers.lengths
    column = prompt_lengths[:, None] + torch.arange(answers.tokens.shape[1], device=device)
    padded = _right_padded(prompts).to(device)
    nothing = torch.zeros(padded.shape, device=device)

    def behind_prompt(part: Tensor, start: Tensor) -> Tensor:  # [B, N] -> [B, T]
        wide = torch.cat([start, torch.zeros_like(part, dtype=start.dtype)], dim=1)
        return wide.scatter(1, column, part)[:, : int(lengths.max())]

    return Rollout(
        tokens=behind_prompt(answers.tokens, padded),
        prompt_lengths=prompt_lengths,
        lengths=lengths,
        logp=behind_prompt(answers.logp, nothing),
        sampled_logp=behind_prompt(answers.sampled_logp, nothing),
        stop_reason=answers.stop,
        boundary_draws=answers.boundary,
    )


def _right_padded(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(list(row)) for row in rows], batch_first=True)
