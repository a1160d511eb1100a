"""How the stages lay out a micro-batch: which rows go together, how they are packed, and what that saves.

Padding and shared prompts cost time and nothing else, so there is no option: rows are packed where it pays
(`models.packing`), and the metrics say what was computed in vain and what was saved:

    perf/padding_waste   padding positions / positions computed
    perf/shared_tokens   tokens that are not computed again, because another row has them / tokens read

both of the layers that see one token at a time; attention runs on padded rows.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minirlhf.data.records import Sequences
from minirlhf.models.packing import Packing, pack
from minirlhf.training.device import move
from minirlhf.training.gradients import ComputeConfig

Pack = Callable[[Tensor, Tensor], Packing | None]
"""(tokens [R, T], lengths [R]) -> their packing; None: as padded rows."""
METRICS = ("perf/padding_waste", "perf/shared_tokens")


class Rows(Protocol):
    """What the account reads of rows [R, T]."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def lengths(self) -> Tensor: ...


class Prompted(Rows, Protocol):
    """Rows that begin with prompts: a rollout, an experience."""

    @property
    def prompt_lengths(self) -> Tensor: ...


class PackedRows(NamedTuple):
    """A micro-batch of rows, and how to compute them; None: as padded rows."""

    rows: Sequences
    packing: Packing | None = None


class Batch(Protocol):
    """A micro-batch of `PackedRows`, or of pairs."""

    @property
    def rows(self) -> Sequences: ...
    @property
    def packing(self) -> Packing | None: ...


class Ids(NamedTuple):
    """What decides how N rows are laid out, on the host: the device is waited for once, and not per part.

    tokens: int64 [N, T]. prompt_lengths, lengths: int64 [N].
    """

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor


class Part(NamedTuple):
    """Some of N rows, which go through a model together.

    rows: int64 [b] which, on the device of the N. width: tokens of the longest. packing: of their first
        `width` tokens; None: as padded rows.
    """

    rows: Tensor
    width: int
    packing: Packing | None


def packed(rows: Sequences, *, pack: Pack = pack) -> PackedRows:
    """The rows, packed where that pays."""
    return PackedRows(rows, pack(rows.tokens, rows.lengths))


def pack_for(config: ComputeConfig) -> Pack:
    """How a stage packs: where steps may be compiled always, and in one block, since each other form is
    another graph, which costs more than padding does."""
    return pack if config.compile == "off" else partial(pack, worth=1.0, blocks=1)


def together(tokens: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """An order [N] of the rows for cutting micro-batches: rows of one prompt side by side, long ones first.

    Prompts come by falling length of their longest row, so that neighbours differ little in length.

    >>> tokens = torch.tensor([[5, 1, 0, 0], [6, 1, 1, 1], [5, 2, 2, 0]])
    >>> together(tokens, torch.tensor([1, 1, 1]), torch.tensor([2, 4, 3]))
    tensor([1, 2, 0])
    """
    sizes: list[int] = lengths.tolist()
    prompts = [tuple(row[:size]) for row, size in zip(tokens.tolist(), prompt_lengths.tolist(), strict=True)]
    longest: dict[tuple[int, ...], int] = {}
    for prompt, size in zip(prompts, sizes, strict=True):
        longest[prompt] = max(size, longest.get(prompt, 0))
    order = sorted(range(len(sizes)), key=lambda row: (-longest[prompts[row]], prompts[row], -sizes[row]))
    return torch.tensor(order, device=tokens.device)


def ids_of(rows: Prompted) -> Ids:
    """The rows' ids, copied to the host."""
    return Ids(*(each.cpu() for each in (rows.tokens, rows.prompt_lengths, rows.lengths)))


def part_of(ids: Ids, index: Tensor, *, device: torch.device, pack: Pack = pack) -> Part:
    """The rows at `index` [b], on the host, of a set on `device`."""
    lengths = ids.lengths[index]
    width = int(lengths.max())
    packing = pack(ids.tokens[index, :width], lengths)
    return Part(index.to(device), width, move(packing, device))


def parts_of(rows: Prompted, *, size: int) -> list[Part]:
    """All rows, `size` at a time, in the order of `together`."""
    ids, device = ids_of(rows), rows.tokens.device
    return [part_of(ids, index, device=device) for index in together(*ids).split(size)]


def in_order(found: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """What was found for the rows of each part [b, ...], as the rows were: [N, ...]."""
    table = torch.cat(list(found))
    return torch.empty_like(table).index_copy(0, torch.cat([part.rows for part in parts]), table)


def layout_metrics(batches: Iterable[Batch]) -> dict[str, Tensor]:
    """`METRICS` of a step, from all its micro-batches; waits for no device."""
    return account((batch.rows, batch.packing) for batch in batches)


def account(batches: Iterable[tuple[Rows, Packing | None]]) -> dict[str, Tensor]:
    """`METRICS` of rows and their packings, taken together."""
    counts = torch.stack([_counts(rows, packing) for rows, packing in batches]).sum(0)
    computed, padding, read, saved = counts.unbind()
    return dict(zip(METRICS, (padding / computed, saved / read), strict=True))


def _counts(rows: Rows, packing: Packing | None) -> Tensor:
    """Positions computed, padding among them, tokens read, and tokens not computed again."""
    read, positions = rows.lengths.sum(), rows.tokens.numel()
    if packing is None:
        return torch.stack([torch.full_like(read, positions), positions - read, read, 0 * read])
    computed = len(packing.tokens)
    return torch.stack([torch.full_like(read, computed), 0 * read, read, read - computed])
