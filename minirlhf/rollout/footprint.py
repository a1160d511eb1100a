"""Memory of a rollout before it is made: what `sampler.generate` will hold for these prompts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from minirlhf.kernels import cpu
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.rollout.cache import bytes_of_page, capacity_of
from minirlhf.rollout.engine import PREFILL_TOKENS
from minirlhf.rollout.parts import common_beginning, parts_of
from minirlhf.rollout.request import default_slots
from minirlhf.rollout.weights import Copies, Weights, copies_of, fastest

_LOGITS = 3  # tables [slots, V] in fp32 at a time: logits, these over the temperature, the law
_DRAW = 2  # tables [slots, V] in fp64 beside them, where torch and no kernel of ours draws


class Footprint(NamedTuple):
    """Bytes, and the shape of the largest forward pass, whose activations depend on the family.

    slots: rows that are live at a time. copies: of the weights. cache: keys and values, all pages of the
    worst case. tables: what is as long as the vocabulary. rows, tokens: of the largest forward pass, as rows
    of the longest prompt: it reads prompts without padding, and the newest tokens of live rows beside them.
    """

    slots: int
    copies: Copies
    cache: int
    tables: int
    rows: int
    tokens: int


def footprint(
    model: LanguageModel,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    device: torch.device,
    slots: int | None = None,
    weights: Weights = fastest,
) -> Footprint:
    """Of `sampler.generate` with these arguments on this device; of `params` only shapes and types are read.

    Raises:
        InputError: as `generate`: not even one row fits into its memory.
    """
    longest = max(len(prompt) for prompt in prompts)
    slots = min(slots or default_slots(model, params, longest, max_new_tokens), len(prompts))
    parts = parts_of(prompts, slots)
    before, matrix = len(common_beginning(parts)), model.unembedding(params)
    pages = sum(capacity_of(parts, before, slots, np.full(len(prompts), max_new_tokens)))
    in_fp64 = 0 if device.type == "cpu" and matrix.dtype == torch.float32 and cpu.available() else _DRAW
    read = [len(part.prompt) - before for part in parts[:slots]]  # the longest come first
    tokens = min(sum(read), max(read[0], PREFILL_TOKENS) + slots)
    return Footprint(
        slots=slots,
        copies=copies_of(weights, params, slots, max_new_tokens, device),
        cache=pages * bytes_of_page(model.cache, matrix.dtype),
        tables=slots * len(matrix) * (4 * _LOGITS + 8 * in_fp64),
        rows=-(-tokens // read[0]),
        tokens=read[0],
    )
