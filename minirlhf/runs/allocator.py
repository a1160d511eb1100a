"""Memory of a training step, kept between steps: by an arena of our own, or by glibc's malloc told to.

glibc maps every block above 32 MB afresh and unmaps it when freed, so each step pays again for the kernel
zeroing all of its activations, page by page. Kept on the heap, and in huge pages, a gradient of SmolLM2-135M
on 800 tokens took 3.84 s instead of 5.58 s on two cores, at 2 % more peak memory (7.28 instead of 7.12 GB).
The price is fragmentation, which `arena` is without: malloc is told where there can be no arena.
"""

import ctypes
import os
import sys
from typing import Literal

from minirlhf.runs.arena import use_arena

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt's names for them, malloc.h
_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> Literal["arena", "malloc"] | None:
    """Tells this process's allocator to keep what is freed. Call it before torch allocates anything large.

    Does nothing where the environment sets malloc itself.

    Returns:
        Which allocator does: `arena.use_arena`, else malloc; None where neither can.
    """
    if any(name in os.environ for name in _SETTINGS):
        return None
    if use_arena():
        return "arena"
    return "malloc" if tell_malloc() else None


def tell_malloc() -> bool:
    """Tells glibc's malloc to keep what is freed; whether it took effect.

    Does nothing where malloc is not glibc's, or where the environment sets malloc itself.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another libc
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first allocation
    never_map, never_trim = mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)
    return bool(never_map and never_trim)
