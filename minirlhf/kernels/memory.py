"""Memory for what one call needs and the next call needs again: a rollout's packed weights and its cache.

A page of memory that is new to the process costs the system several times what writing it costs us: 154 MB
took 240 ms the first time and 9 ms when written again (a virtual machine with two cores). So a call takes its
large pieces from a room of huge pages, and leaves the room to the next call.
"""

import mmap
import weakref

import torch
from torch import Tensor

_ALIGNMENT = 64
_idle: dict[str, Tensor] = {}


class Room:
    """`size` bytes on the CPU for as long as this object lives: keep it beside what was taken from it.

    Args:
        kind: what the room is for; it is left to the next one of its kind.
    """

    def __init__(self, kind: str, size: int) -> None:
        whole = _idle.pop(kind, None)
        if whole is None or whole.numel() < size:
            del whole
            whole = _huge_pages(size)
        self._whole, self._taken = whole, 0
        weakref.finalize(self, _idle.__setitem__, kind, whole).atexit = False

    def take(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor; ordinary memory where the room is full."""
        first, size = self._taken, dtype.itemsize * torch.Size(shape).numel()
        if first + size > self._whole.numel():
            return torch.empty(shape, dtype=dtype)
        self._taken += -(-size // _ALIGNMENT) * _ALIGNMENT
        return self._whole[first : first + size].view(dtype).view(shape)


def release_rooms() -> None:
    """Gives memory that no call is using back to the system."""
    _idle.clear()


def _huge_pages(size: int) -> Tensor:
    size = max(size, mmap.PAGESIZE)
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return torch.empty(size, dtype=torch.uint8)
    room = mmap.mmap(-1, size)
    room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=torch.uint8)
