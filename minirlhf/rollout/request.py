"""What is checked before any work, and how many rows fit into memory."""

from collections.abc import Sequence
from typing import Any

from minirlhf.models.interface import LanguageModel, Params
from minirlhf.rollout.pages import PAGE, pages_for
from minirlhf.runs import InputError

MEMORY = 2**30
"""Bytes that cache and workspace of a call may take where the caller names no number of slots."""

_MOST_SLOTS = 512  # on a CPU core, 0.9 M parameters: as fast from 128 to 2,048 rows


def default_slots(
    model: LanguageModel, params: Params, longest_prompt: int, max_new_tokens: int, memory: int = MEMORY
) -> int:
    """Rows whose cache, prefill activations and sampling workspace fit in `memory` bytes.

    Raises:
        InputError: not even one row does.
    """
    unembedding = model.unembedding(params)
    vocabulary, width = unembedding.shape
    shape = model.cache
    page = 2 * shape.layers * shape.heads * shape.width * PAGE * unembedding.element_size()
    cache = pages_for(longest_prompt + max_new_tokens) * page
    prefill = longest_prompt * 16 * width * 4  # activations of one block
    sampling = 48 * vocabulary  # logits, the law's intermediates, fp64 cumulative sum
    row = cache + prefill + sampling
    if row > memory:
        raise InputError(
            f"one row of {longest_prompt} + {max_new_tokens} tokens takes {row:,} bytes of cache and "
            f"workspace, and memory is {memory:,}; allow more, or ask for shorter responses"
        )
    return min(_MOST_SLOTS, memory // row)


def check(prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], limits: list[int], config: Any) -> None:
    """Refuses what cannot be sampled, by the number of the prompt.

    Raises:
        InputError: no prompts, an empty prompt, an id or stop id outside the vocabulary, a prompt that with
            its limit exceeds the context.
    """
    vocabulary, context = config.vocab_size, config.n_positions
    if not len(prompts):
        raise InputError("no prompts to sample from")
    for stop in stop_ids:
        if not 0 <= stop < vocabulary:
            raise InputError(f"stop id {stop} is outside the vocabulary of {vocabulary}")
    for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not len(prompt):
            raise InputError(f"prompt {number} is empty: the first response token needs one before it")
        if len(prompt) + limit > context:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens; with max_new_tokens {limit} that "
                f"exceeds the context of {context}"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise InputError(
                f"prompt {number} has ids {min(prompt)} .. {max(prompt)}, "
                f"outside the vocabulary of {vocabulary}"
            )


def limits_of(max_new_tokens: int | Sequence[int], count: int) -> list[int]:
    """One limit per prompt.

    Raises:
        ValueError: another number of limits than prompts, or one below 1.
    """
    limits = [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != count:
        raise ValueError(f"max_new_tokens must be one number, or {count}, got {len(limits)}")
    if min(limits, default=max_new_tokens if isinstance(max_new_tokens, int) else 1) < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {min(limits, default=max_new_tokens)}")
    return limits
