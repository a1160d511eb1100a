"""Sampling from a model: ragged prompts in one cache, one counter-based uniform per token, inverse CDF.

Prefill reads right-padded prompts once; each decode step then feeds every live row its own last token at
its own position. A row that ends leaves the batch at once: the last live row moves into its slot. Rows are
grouped by prompt length inside and come back in the order they were given.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models.interface import Cache, LanguageModel, Params
from minirlhf.rollout.draw import check_law, inverse_cdf
from minirlhf.rollout.philox import uniforms
from minirlhf.runs import InputError

Law = Callable[[Tensor], Tensor]
"""Logits [B, V] -> normalised log-probabilities [B, V], as `partial(sampling_law, temperature=0.7)`."""

EOS, STOP, LENGTH = 0, 1, 2
"""Why a response ended, in `Rollout.stop_reason`: the first stop id, another stop id, the length limit."""

_MEMORY_BUDGET = 2**30  # bytes that the default batch size may spend on cache and workspace
_LARGEST_DEFAULT_BATCH = 512  # on a CPU core, 0.9 M parameters: as fast from 128 to 2,048 rows


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
    """

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    logp: Tensor
    sampled_logp: Tensor
    stop_reason: Tensor
    boundary_draws: Tensor


class _Responses(NamedTuple):
    """What one batch gives, written step by step; time first, so that a step writes one line.

    tokens, logp, sampled_logp: [N, B]; new_tokens, stop_reason: int64 [B]; boundary_draws: int64 [].
    """

    tokens: Tensor
    logp: Tensor
    sampled_logp: Tensor
    new_tokens: Tensor
    stop_reason: Tensor
    boundary_draws: Tensor


@torch.no_grad()
def generate(
    model: LanguageModel,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    law: Law,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    seed: int,
    prompt_index: Tensor,
    sample_index: Tensor,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Rollout:
    """Sample one response to each prompt.

    Args:
        prompts: B lists of token ids, none empty; a stop id inside a prompt is an ordinary token.
        law: what to sample from; `greedy_law` and any `sampling_law` of objectives.sampling fit.
        max_new_tokens: most tokens per response, the stop token counted.
        stop_ids: a response ends with the first of these it draws; the first of them is EOS. May be empty.
        seed, prompt_index, sample_index: int and int64 [B], [B]: together with the position they fix the
            uniform of every token. Two rows with equal indices get equal uniforms.
        batch_size: rows that share the cache; None picks what fits in about 1 GiB. It changes no uniform.
        progress: called after each step with the tokens sampled so far in this call.

    Returns:
        The responses in the order of the prompts, on the parameters' device, without autograd history.

    Raises:
        InputError: before any work: no prompts, an empty prompt, an id or stop id outside the vocabulary,
            a prompt whose length plus max_new_tokens exceeds the context.
        ValueError: indices of another shape, a limit or batch size below 1, a law that is not normalised.
    """
    _check_prompts(prompts, stop_ids, max_new_tokens, model.config)
    for name, index in (("prompt_index", prompt_index), ("sample_index", sample_index)):
        if index.shape != (len(prompts),):
            raise ValueError(f"{name} must have shape [{len(prompts)}], got {list(index.shape)}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = model.unembedding(params).device
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(prompt_lengths.max())
    rows_at_once = batch_size or default_batch_size(model, params, longest, max_new_tokens)
    order = prompt_lengths.argsort(descending=True, stable=True)  # the batch that needs most memory first
    batches = order.split(rows_at_once)
    step = torch.arange(max_new_tokens)[:, None]  # uniforms [N, B], all drawn before any work
    drawn = [uniforms(seed, prompt_index.cpu()[rows], sample_index.cpu()[rows], step) for rows in batches]
    sampled = 0

    def advance(tokens: int) -> None:
        nonlocal sampled
        sampled += tokens
        if progress is not None:
            progress(sampled)

    decode = partial(_respond, model, params, law=law, stop_ids=stop_ids, advance=advance)
    answers = []
    for rows, uniform in zip(batches, drawn, strict=True):
        padded = _right_padded([prompts[row] for row in rows.tolist()])
        answers.append(decode(padded.to(device), prompt_lengths[rows].to(device), uniform))
    return _assemble(prompts, prompt_lengths.to(device), order.to(device), answers)


def response_mask(rollout: Rollout) -> Tensor:
    """bool [B, T], True on the tokens that were sampled, the stop token included."""
    position = torch.arange(rollout.tokens.shape[1], device=rollout.tokens.device)
    return (position >= rollout.prompt_lengths[:, None]) & (position < rollout.lengths[:, None])


def responses(rollout: Rollout) -> list[list[int]]:
    """The sampled ids of each row without the stop token: what a reader or judge of the text sees."""
    ends = rollout.lengths - (rollout.stop_reason != LENGTH).long()
    spans = zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), ends.tolist(), strict=True)
    return [row[start:end] for row, start, end in spans]


def default_batch_size(model: LanguageModel, params: Params, longest_prompt: int, max_new_tokens: int) -> int:
    """Rows whose cache, prefill activations and sampling workspace fit in about 1 GiB; at least 1."""
    vocabulary, width = model.unembedding(params).shape
    capacity = longest_prompt + max_new_tokens
    cache = sum(leaf.nbytes for leaf in tree_leaves(model.new_cache(params, 1, capacity)))
    prefill = longest_prompt * (16 * width + 2 * capacity) * 4  # activations of one block, attention mask
    sampling = 48 * vocabulary  # logits, the law's intermediates, fp64 cumulative sum
    return max(1, min(_LARGEST_DEFAULT_BATCH, _MEMORY_BUDGET // (cache + prefill + sampling)))


def _respond(
    model: LanguageModel,
    params: Params,
    prompts: Tensor,
    prompt_lengths: Tensor,
    uniform: Tensor,
    *,
    law: Law,
    stop_ids: Sequence[int],
    advance: Callable[[int], None],
) -> _Responses:
    """Prefill and decode one batch: prompts [B, P] right-padded, prompt_lengths [B], uniform [N, B]."""
    limit, batch = uniform.shape
    device = prompts.device
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
    unembedding = model.unembedding(params)
    cache = model.new_cache(params, batch, prompts.shape[1] + limit - 1)  # the last token is never read
    hidden = model.extend_(params, prompts, torch.zeros_like(prompt_lengths), cache)
    row, position = torch.arange(batch, device=device), prompt_lengths  # of what each slot holds
    state = hidden[row, prompt_lengths - 1]
    out = _blank(limit, batch, device)
    for t in range(limit):
        logits = (state @ unembedding.T).float()
        law_logp = law(logits)
        if t == 0:
            check_law(law_logp, logits)
        token, near_boundary = inverse_cdf(law_logp, uniform[t])
        ended = torch.isin(token, stops)
        _record_(out, t, row, token, logits=logits, law_logp=law_logp)
        out.boundary_draws.add_(near_boundary.sum())
        advance(len(token))
        if ended.any():
            out.new_tokens[row[ended]] = t + 1
            out.stop_reason[row[ended]] = torch.where(token[ended] == stops[0], EOS, STOP)
            slot, cache = _compact_(cache, ended)
            row, token, position = row[slot], token[slot], position[slot]
            uniform = uniform[:, slot.to(uniform.device)]
        if t + 1 == limit or not len(row):
            break
        state = model.extend_(params, token[:, None], position, cache)[:, 0]
        position = position + 1
    return out


def _blank(limit: int, batch: int, device: torch.device) -> _Responses:
    """Responses before the first step; a row that no stop id ends keeps the length limit."""
    return _Responses(
        tokens=torch.zeros(limit, batch, dtype=torch.int64, device=device),
        logp=torch.zeros(limit, batch, device=device),
        sampled_logp=torch.zeros(limit, batch, device=device),
        new_tokens=torch.full((batch,), limit, device=device),
        stop_reason=torch.full((batch,), LENGTH, device=device),
        boundary_draws=torch.zeros((), dtype=torch.int64, device=device),
    )


def _record_(
    out: _Responses, t: int, row: Tensor, token: Tensor, *, logits: Tensor, law_logp: Tensor
) -> None:
    """Writes the tokens of step t and their log-probs under the raw model and under the law."""
    out.tokens[t].index_copy_(0, row, token)
    for line, logp in ((out.logp[t], logits.log_softmax(-1)), (out.sampled_logp[t], law_logp.float())):
        line.index_copy_(0, row, logp.gather(1, token[:, None])[:, 0])


def _compact_(cache: Cache, ended: Tensor) -> tuple[Tensor, Cache]:
    """Close the gaps: live rows beyond the live count move into ended slots; nothing else is copied.

    Returns:
        int64 [n], for each of the n slots left the slot its row came from, and the cache narrowed to n rows.
    """
    live = int((~ended).sum())
    gap = ended[:live].nonzero()[:, 0]
    moved = (~ended[live:]).nonzero()[:, 0] + live
    slot = torch.arange(live, device=ended.device)
    slot[gap] = moved
    if len(gap):
        for leaf in tree_leaves(cache):
            leaf[gap] = leaf[moved]
    return slot, tree_map(lambda leaf: leaf[:live], cache)


def _assemble(
    prompts: Sequence[Sequence[int]], prompt_lengths: Tensor, order: Tensor, batches: list[_Responses]
) -> Rollout:
    """Join the batches, undo the sorting and put each response behind its prompt."""
    back = order.argsort()
    lengths = prompt_lengths + torch.cat([batch.new_tokens for batch in batches])[back]
    limit = len(batches[0].tokens)
    column = prompt_lengths[:, None] + torch.arange(limit, device=order.device)
    padded = _right_padded(prompts).to(order.device)
    nothing = torch.zeros(padded.shape, device=order.device)

    def behind_prompt(parts: list[Tensor], start: Tensor) -> Tensor:  # [N, b] each -> [B, T]
        wide = torch.cat([start, start.new_zeros(len(start), limit)], dim=1)
        return wide.scatter(1, column, torch.cat(parts, dim=1).T[back])[:, : int(lengths.max())]

    return Rollout(
        tokens=behind_prompt([batch.tokens for batch in batches], padded),
        prompt_lengths=prompt_lengths,
        lengths=lengths,
        logp=behind_prompt([batch.logp for batch in batches], nothing),
        sampled_logp=behind_prompt([batch.sampled_logp for batch in batches], nothing),
        stop_reason=torch.cat([batch.stop_reason for batch in batches])[back],
        boundary_draws=torch.stack([batch.boundary_draws for batch in batches]).sum(),
    )


def _right_padded(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(list(row)) for row in rows], batch_first=True)


def _check_prompts(
    prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int, config: Any
) -> None:
    vocabulary, context = config.vocab_size, config.n_positions
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not len(prompts):
        raise InputError("no prompts to sample from")
    for stop in stop_ids:
        if not 0 <= stop < vocabulary:
            raise InputError(f"stop id {stop} is outside the vocabulary of {vocabulary}")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {number} is empty: the first response token needs one before it")
        if len(prompt) + max_new_tokens > context:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} that "
                f"exceeds the context of {context}"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise InputError(
                f"prompt {number} has ids {min(prompt)} .. {max(prompt)}, "
                f"outside the vocabulary of {vocabulary}"
            )
