"""What `kernels.paged.attend` has to equal: every row against every page, masked; shapes never change."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minirlhf.kernels.paged import Reads


def attend(
    keys: Sequence[Tensor], values: Sequence[Tensor], reads: Reads, q: Tensor, k: Tensor, v: Tensor,
    *, scale: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    """As `kernels.paged.attend`, by torch's operations."""
    (first, entries, position, into), page, heads = reads, keys[-1].shape[2], k.shape[1]
    arena, at, start = entries.unbind(1)
    number = torch.arange(len(entries), device=q.device)
    token = start[:, None] + torch.arange(page, device=q.device)  # [E, page]
    here, last = (
        ((number >= first[:-1, None]) & (number < first[1:, None]))[..., None],
        position[:, None, None],
    )
    seen = here & (token < last)
    if window is not None:
        seen = seen & (token > last - window)
    seen = seen.flatten(1)  # [B, E · page]

    def together(arenas: Sequence[Tensor], new: Tensor) -> Tensor:  # [B, H, E · page + 1, Dh]
        pages = [each[torch.where(arena == mine, at, 0)] for mine, each in enumerate(arenas)]
        some = pages[0]
        for mine, each in enumerate(pages):
            some = torch.where((arena == mine)[:, None, None, None], each, some)
        flat = some.transpose(0, 1).flatten(1, 2)  # [H, E · page, Dh]
        flat = torch.where(seen.any(0)[:, None], flat, 0.0)
        return torch.cat([flat.expand(len(q), -1, -1, -1), new], dim=2).double()

    group = q.shape[1] // heads
    every, mixed = (together(*each).repeat_interleave(group, dim=1) for each in ((keys, k), (values, v)))
    scores = q.double() @ every.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)[:, None, None]
    out = (torch.where(mask, scores, -torch.inf).softmax(-1) @ mixed).to(q.dtype)
    for row in range(len(q)):  # one by one: a row that there is not writes what stands there
        there, offset, real = into[row : row + 1], position[row : row + 1] % page, position[row] >= 0
        for own, new in ((keys[-1], k), (values[-1], v)):
            own[there, :, offset] = torch.where(real, new[row, :, 0].to(own.dtype), own[there, :, offset])
    return out
