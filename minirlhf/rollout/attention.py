"""Attention over the pages of a cache: each page by itself, then a row's pages together.

A softmax over pieces is exact: with o_i the attention within piece i and l_i its log-sum-exp,

    attention = Σ_i softmax(l)_i o_i

(Milakov & Gimelshein 2018, arXiv:1805.02867; "flash-decoding"). On a CPU in fp32 one pass of `kernels.cpu`
goes over a row's pages, on a GPU with Triton one of `kernels.paged`. Elsewhere a page is read once, in
place, by one product, whoever its readers are: a page of a shared prompt serves all samples of that prompt at
a time.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from minirlhf.kernels import cpu, paged
from minirlhf.models.interface import Attend, causal
from minirlhf.models.packing import Packing, within_rows
from minirlhf.rollout.pages import PAGE, Pages, Table, entries_by_row, table_of

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def decoding(arenas: list[Pages], position: NDArray[np.int64], device: torch.device) -> Attend:
    """`Attend` of one new token per row, which it writes into the cache first.

    Args:
        arenas: the rows' own pages last, the new tokens' among them; pages of the others are shared and full.
        position: [B] of the new tokens.
    """
    in_one_pass = device.type == "cpu" and arenas[-1].keys.dtype == torch.float32 and cpu.available()
    return (_in_one_pass if in_one_pass else _page_by_page)(arenas, position, device)


def _in_one_pass(arenas: list[Pages], position: NDArray[np.int64], device: torch.device) -> Attend:
    own = arenas[-1]
    reads = cpu.Reads(
        own.keys.shape[2], PAGE, len(arenas) - 1, **entries_by_row(arenas, len(position)),
        position=position, into=own.last_pages(len(position)),
    )  # fmt: skip

    def attend(
        layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: int | None
    ) -> Tensor:
        keys, values = [each.keys[layer] for each in arenas], [each.values[layer] for each in arenas]
        return reads.attend(keys, values, q, k, v, scale=scale, window=window)

    return attend


def paging(arenas: list[Pages], reads: paged.Reads) -> Attend:
    """`decoding` where `kernels.paged` runs: which tokens are where is written on the device."""

    def attend(
        layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: int | None
    ) -> Tensor:
        keys, values = [each.keys[layer] for each in arenas], [each.values[layer] for each in arenas]
        return paged.attend(keys, values, reads, q, k, v, scale=scale, window=window)

    return attend


def _page_by_page(arenas: list[Pages], position: NDArray[np.int64], device: torch.device) -> Attend:
    own, rows = arenas[-1], len(position)
    table, page = table_of(arenas, rows, device), torch.from_numpy(own.last_pages(rows)).to(device)
    # Nobody, the row behind the last, is at -1 and sees nothing.
    last = torch.from_numpy(np.append(position, -1)).to(device)
    offset = last[:-1] % PAGE
    masks: dict[int | None, list[Tensor | None]] = {}

    def attend(
        layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: int | None
    ) -> Tensor:
        own.keys[layer][page, :, offset] = k[:, :, 0]
        own.values[layer][page, :, offset] = v[:, :, 0]
        if window not in masks:
            masks[window] = [
                None if each is not own and window is None else _visible(start, last[readers], window)
                for each, start, readers in zip(arenas, table.start, table.readers, strict=True)
            ]
        pieces = [
            _of_pages(each, layer, q, readers, visible, scale)
            for each, readers, visible in zip(arenas, table.readers, masks[window], strict=True)
        ]
        return _joined(pieces, table, len(q))[:, :, None].to(q.dtype)

    return attend


def beginning(kept: list[tuple[Tensor, Tensor]]) -> Attend:
    """`Attend` of a row that others go on with: what it leaves behind in each layer is appended to `kept`."""

    def attend(
        layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: int | None
    ) -> Tensor:
        kept.append((k, v))
        return causal(layer, q, k, v, scale=scale, window=window)

    return attend


def prefilling(
    prompts: Packing, write: Callable[[int, Tensor, Tensor], None], prefix: list[tuple[Tensor, Tensor]]
) -> Attend:
    """`Attend` of packed prompts [1, H, N, Dh], or of what follows a prefix that all of them share.

    Args:
        write: (layer, keys, values [1, H, N, Dh]) puts them into the cache.
        prefix: per layer keys and values [1, H, C, Dh] of what lies before every row; empty for nothing.
    """
    within = within_rows(prompts, partial(_after, prefix) if prefix else causal)

    def attend(
        layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: int | None
    ) -> Tensor:
        write(layer, k, v)
        return within(layer, q, k, v, scale=scale, window=window)

    return attend


def beside(prompts: Attend, count: int, newest: Attend) -> Attend:
    """`Attend` of one sequence: of `count` tokens of prompts, then of one new token each of other rows."""

    def attend(
        layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: int | None
    ) -> Tensor:
        of_prompts = (each[:, :, :count] for each in (q, k, v))
        of_rows = (each[:, :, count:].permute(2, 1, 0, 3) for each in (q, k, v))  # [n, H, 1, Dh]
        read = prompts(layer, *of_prompts, scale=scale, window=window)
        decoded = newest(layer, *of_rows, scale=scale, window=window)
        return torch.cat([read, decoded.permute(2, 1, 0, 3)], dim=2)

    return attend


def _after(
    prefix: list[tuple[Tensor, Tensor]],
    layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    """`causal` of rows [R, H, T, Dh] behind a prefix that all of them share."""
    before = prefix[layer][0].shape[2]
    k, v = (
        torch.cat([old.expand(len(q), -1, -1, -1), new], dim=2).to(q.dtype)
        for old, new in zip(prefix[layer], (k, v), strict=True)
    )
    here, there = (torch.arange(each.shape[2], device=q.device) for each in (q, k))
    back = here[:, None] + before - there
    visible = (back >= 0) & (back < (window or k.shape[2]))
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=shared)


def _visible(start: Tensor, last: Tensor, window: int | None) -> Tensor:
    """bool [p, width, PAGE]: which tokens of pages from `start` [p] on readers at `last` [p, width] see."""
    at = (start[:, None] + torch.arange(PAGE, device=start.device))[:, None]
    visible = at <= last[..., None]
    return visible if window is None else visible & (at > last[..., None] - window)


def _of_pages(
    pages: Pages, layer: int, q: Tensor, readers: Tensor, visible: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of each page's readers within the page: [p · width, H, Dh], log-sum-exp [p · width, H]."""
    count, width = readers.shape
    keys, values = pages.keys[layer][:count].to(q.dtype), pages.values[layer][:count].to(q.dtype)
    heads, size = keys.shape[1], keys.shape[3]
    # Nobody asks with some other row's query; its answer is not read.
    asked = q[:, :, 0].index_select(0, readers.clamp(max=len(q) - 1).view(-1))
    group = asked.shape[1] // heads
    asked = asked.view(count, width, heads, group, size).transpose(1, 2).reshape(count, heads, -1, size)
    mask = None
    if visible is not None:
        rows = visible if width == 1 else visible.repeat_interleave(group, dim=1)
        mask = torch.where(rows[:, None], 0.0, -torch.inf).to(q.dtype)  # [p, 1, width (· group), PAGE]
    out, lse = _within(asked, keys, values, mask, scale)
    out = out.view(count, heads, width, group, size).transpose(1, 2).reshape(count * width, -1, size)
    lse = lse.view(count, heads, width, group).transpose(1, 2).reshape(count * width, -1)
    if visible is not None:  # a window may have left the page behind
        lse = torch.where(visible.any(-1).view(-1, 1), lse, -torch.inf)
    return out, lse


def _within(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """softmax(scale q·k + mask) v [p, H, R, Dh], and the log-sum-exp of its scores [p, H, R]."""
    if q.device.type == "cpu":
        return _flash(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    scores = (q @ k.transpose(-1, -2)).float() * (scale or q.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).nan_to_num(nan=0.0).exp()
    return weights.to(v.dtype) @ v, lse


def _joined(pieces: list[tuple[Tensor, Tensor]], table: Table, rows: int) -> Tensor:
    """[B, H, Dh] from all pages' partial results."""
    out, lse = pieces[0] if len(pieces) == 1 else [torch.cat(each) for each in zip(*pieces, strict=True)]
    if len(table.entry) != len(out):
        out, lse = out.index_select(0, table.entry), lse.index_select(0, table.entry)
    heads = out.shape[1]
    cells = lse.new_full((rows * table.most, heads), -torch.inf).index_copy_(0, table.cell, lse)
    weights = cells.view(rows, table.most, heads).softmax(1).view(-1, heads).index_select(0, table.cell)
    wide = torch.promote_types(out.dtype, weights.dtype)
    whole = out.new_zeros(rows, *out.shape[1:], dtype=wide)
    return whole.index_add_(0, table.row, out.to(wide) * weights[..., None])
