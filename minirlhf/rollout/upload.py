"""What the host knows of a decode step, sent to the device in one piece: one copy a step, not one per table.

It always goes to the same memory, so a step that was recorded on a GPU finds there what is true now.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minirlhf.kernels.paged import Reads
from minirlhf.rollout.pages import Entries

_FIELDS = 5  # columns of length `slots`: position, into, row, drawn, uniform
_Ints = NDArray[np.int64]


class Said(NamedTuple):
    """Of a step of B rows, on the device: some of them may be no rows, whose position is -1.

    token: int64 [B] the newest ones, which the device itself has drawn: they are written here, not sent.
    reads: their positions, and what their rows read. where: int64 [2, B] of which answer which token comes
    next. uniform: fp64 [B].
    """

    token: Tensor
    reads: Reads
    where: Tensor
    uniform: Tensor


class Upload:
    """The memory of one call: on the host, where it is filled, and on the device.

    Args:
        entries: most pages that all rows read together, one read by several counted for each.
    """

    def __init__(self, slots: int, entries: int, device: torch.device) -> None:
        self.slots, size = slots, _FIELDS * slots + slots + 1 + 3 * entries
        self.host = torch.zeros(size, dtype=torch.int64)
        if device.type == "cuda":
            self.host = self.host.pin_memory()  # from other memory a copy would wait
        self.there = torch.zeros(size, dtype=torch.int64, device=device)
        self.token = torch.zeros(slots, dtype=torch.int64, device=device)

    def send(
        self, entries: Entries, *, position: _Ints, into: _Ints, row: _Ints, drawn: _Ints,
        uniform: NDArray[np.float64],
    ) -> None:  # fmt: skip
        """Fills and sends; the last of these copies must have been made, as it has once a token was read."""
        count, slots, numbers = len(position), self.slots, self.host.numpy()
        columns = numbers[: _FIELDS * slots].reshape(_FIELDS, slots)
        columns[0] = -1
        for column, values in zip(columns, (position, into, row, drawn, uniform.view(np.int64)), strict=True):
            column[:count] = values
        total, start = len(entries["at"]), _FIELDS * slots
        numbers[start : start + count + 1] = entries["first"]
        numbers[start + count + 1 : start + slots + 1] = total
        start += slots + 1
        table = numbers[start : start + 3 * total].reshape(total, 3)
        for column, name in enumerate(("arena", "at", "start")):
            table[:, column] = entries[name]
        used = start + 3 * total
        self.there[:used].copy_(self.host[:used], non_blocking=True)

    def said(self, rows: int) -> Said:
        """What was sent, of the first so many slots: views of the same memory after every `send`."""
        columns, rest = self.there[: _FIELDS * self.slots], self.there[_FIELDS * self.slots :]
        columns = columns.view(_FIELDS, self.slots)[:, :rows]
        position, into, uniform = columns[0], columns[1], columns[4].view(torch.float64)
        first, entries = rest[: rows + 1], rest[self.slots + 1 :].view(-1, 3)
        return Said(self.token[:rows], Reads(first, entries, position, into), columns[2:4], uniform)
