"""Attention of a decode step over the pages of a KV cache on a GPU: one Triton program per row and head.

A program goes over the pages that its row reads and keeps a running softmax (Milakov & Gimelshein 2018,
arXiv:1805.02867), as native/attention.cpp does on a CPU. How many pages there are, and which, it reads from
the device: the launch is the same whatever the rows hold, so that a recorded step fits every length. The
newest token is taken from where the layer has left it, not from the cache that it goes into. Heads of a group
read the same pages at about the same time; the second reader finds them in the GPU's cache.
"""

# Triton knows a constant by its annotation.
# pyright: reportInvalidTypeForm=false

import functools
import importlib.util
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

try:  # it comes with torch for CUDA
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
except ImportError:
    triton = tl = cast(Any, None)

_MOST_ARENAS = 3
_EVERYTHING = 2**40  # tokens of a window that is none


class Reads(NamedTuple):
    """What the rows of a decode step read: int64 on the device.

    first: [B + 1] row b reads the entries first[b] .. first[b + 1] - 1.
    entries: [E, 3] a page: its arena, its number there, the position of its first token.
    position: [B] of the new tokens; -1 for a row that there is not, which reads and writes nothing.
    into: [B] the page of the last arena that the new token goes into.
    """

    first: Tensor
    entries: Tensor
    position: Tensor
    into: Tensor


@functools.cache
def available(device: torch.device) -> bool:
    """Whether `attend` runs there, and is right about two tokens; if it should and does not, that is said."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        right = knows_a_mean(device)
        reason = "its result is wrong"
    except Exception as error:  # of compilers and drivers: there may be none that fits
        right, reason = False, f"{type(error).__name__}: {error}".partition("\n")[0]
    if not right:
        warnings.warn(
            f"attention over the KV cache's pages goes without its Triton kernel, slower: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return right


def knows_a_mean(device: torch.device) -> bool:
    """Whether two tokens of equal keys are attended to equally, and the second is written into its page."""
    zeros = partial(torch.zeros, device=device)
    keys, values = zeros(1, 1, 16, 16), zeros(1, 1, 16, 16)
    values[0, 0, 0] = 1.0
    first, entries, position, into = ([0, 1], [[0, 0, 0]], [1], [0])
    reads = Reads(*(torch.tensor(each, device=device) for each in (first, entries, position, into)))
    q, k, v = zeros(1, 1, 1, 16), zeros(1, 1, 1, 16), torch.full((1, 1, 1, 16), 3.0, device=device)
    out = attend([keys], [values], reads, q, k, v, scale=None, window=None)
    return bool((out == 2.0).all() & (values[0, 0, 1] == 3.0).all())


def attend(
    keys: Sequence[Tensor], values: Sequence[Tensor], reads: Reads, q: Tensor, k: Tensor, v: Tensor,
    *, scale: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    """Writes k and v [B, H, 1, Dh] into the last arena, and attends to what each row sees.

    Args:
        keys, values: of each arena [pages, H, page, Dh], contiguous, three arenas at most. What lies behind a
            row's end is not read.
        q: [B, Hq, 1, Dh]; Hq / H heads share keys and values.

    Returns:
        softmax(scale q·k) v [B, Hq, 1, Dh], like q; summed in fp32, of fp64 in fp64. A row that there is not
        gets anything.
    """
    (rows, asked, _, size), (_, heads, page, _) = q.shape, keys[-1].shape
    q, k, v = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    own = len(keys) - 1
    arenas = [
        arena for each in range(_MOST_ARENAS) for arena in (keys[min(each, own)], values[min(each, own)])
    ]
    strides = [stride for each in (q, k, v, out) for stride in each.stride()[:2]]
    with torch.cuda.device_of(q):  # Triton launches on the current one
        _kernel()[rows, asked](
            q, k, v, out, *arenas, *reads, *strides, _EVERYTHING if window is None else window,
            OWN=own, HEADS=heads, GROUP=asked // heads, SIZE=size, WIDTH=1 << (size - 1).bit_length(),
            PAGE=page, WIDE=q.dtype == torch.float64, SCALE=size**-0.5 if scale is None else scale,
        )  # fmt: skip
    return out


@functools.cache
def _kernel() -> Any:
    """Compiled at its first launch, for every combination of its constants and types."""

    @triton.jit
    def attend_pages(
        q, k, v, out, keys_0, values_0, keys_1, values_1, keys_2, values_2, first, entries, position, into,
        q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, window,
        OWN: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
        WIDTH: tl.constexpr, PAGE: tl.constexpr, WIDE: tl.constexpr, SCALE: tl.constexpr,
    ):  # fmt: skip
        row, asking = tl.program_id(0).to(tl.int64), tl.program_id(1)
        head = asking // GROUP
        wide = tl.float64 if WIDE else tl.float32
        entry_of_head = tl.arange(0, WIDTH)
        inside = entry_of_head < SIZE
        at = tl.load(position + row)
        query = tl.load(q + row * q_row + asking * q_head + entry_of_head, mask=inside, other=0.0)
        query = query.to(wide) * SCALE
        new_key = tl.load(k + row * k_row + head * k_head + entry_of_head, mask=inside, other=0.0)
        new_value = tl.load(v + row * v_row + head * v_head + entry_of_head, mask=inside, other=0.0)
        most = tl.sum(query * new_key.to(wide), 0)
        total = tl.full([], 1.0, wide)
        mixed = new_value.to(wide)
        within = tl.arange(0, PAGE)
        for entry in range(tl.load(first + row), tl.load(first + row + 1)):
            arena = tl.load(entries + 3 * entry + 0 * within)  # the same number for all tokens
            page = tl.load(entries + 3 * entry + 1)
            token = tl.load(entries + 3 * entry + 2) + within
            visible = (token < at) & (token > at - window)
            place = ((page * HEADS + head) * PAGE + within)[:, None] * SIZE + entry_of_head[None, :]
            # What is masked is not read, so that two of three loads cost nothing.
            seen = (visible & (arena == 0))[:, None] & inside[None, :]
            some_keys = tl.load(keys_0 + place, mask=seen, other=0.0)
            some_values = tl.load(values_0 + place, mask=seen, other=0.0)
            if OWN > 0:
                seen = (visible & (arena == 1))[:, None] & inside[None, :]
                some_keys += tl.load(keys_1 + place, mask=seen, other=0.0)
                some_values += tl.load(values_1 + place, mask=seen, other=0.0)
            if OWN > 1:
                seen = (visible & (arena == 2))[:, None] & inside[None, :]
                some_keys += tl.load(keys_2 + place, mask=seen, other=0.0)
                some_values += tl.load(values_2 + place, mask=seen, other=0.0)
            scores = tl.sum(query[None, :] * some_keys.to(wide), 1)
            scores = tl.where(visible, scores, float("-inf"))
            higher = tl.maximum(most, tl.max(scores, 0))
            shrink = tl.exp(most - higher)
            shares = tl.exp(scores - higher)
            total = total * shrink + tl.sum(shares, 0)
            mixed = mixed * shrink + tl.sum(shares[:, None] * some_values.to(wide), 0)
            most = higher
        result = (mixed / total).to(out.dtype.element_ty)
        tl.store(out + row * out_row + asking * out_head + entry_of_head, result, mask=inside)
        if (at >= 0) & (asking % GROUP == 0):
            place = ((tl.load(into + row) * HEADS + head) * PAGE + at % PAGE) * SIZE + entry_of_head
            own_keys = keys_0 if OWN == 0 else (keys_1 if OWN == 1 else keys_2)
            own_values = values_0 if OWN == 0 else (values_1 if OWN == 1 else values_2)
            tl.store(own_keys + place, new_key.to(own_keys.dtype.element_ty), mask=inside)
            tl.store(own_values + place, new_value.to(own_values.dtype.element_ty), mask=inside)

    return attend_pages
