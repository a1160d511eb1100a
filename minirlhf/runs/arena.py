"""An allocator for torch's large tensors on the CPU, in the place of malloc: `native/arena.cpp`.

torch asks malloc for aligned memory, and glibc looks for it in holes that are larger by the alignment: a hole
that a tensor left never serves the next one of its size. A DPO step of GPT-2 124M whose tensors take 2.2 GB
at most peaked at 2.8 to 3.2 GB so. The arena fits blocks as they are: 2.2 GB, in the same time or less. What
is freed stays with the process, in huge pages, for the next step; a page that is new to a process costs
several times what writing it does.

It is compiled on first use, in seconds, against the headers that torch brings, and kept.
"""

import ctypes
import functools
import os
import subprocess
import sys
from pathlib import Path

from minirlhf.runs.compiled import compiler, kept_library

_SOURCE = Path(__file__).with_name("native") / "arena.cpp"
_COMPILE = ("-O2", "-std=gnu++20", "-fPIC", "-shared")


@functools.cache
def use_arena() -> bool:
    """Gives torch the arena, for the rest of the process; tensors that are there keep their memory.

    Returns:
        Whether it took effect. It does not without Linux, a C++ compiler (`CXX`, or `c++`) or the addresses
        (`ulimit -v`), nor where `MINIRLHF_KERNELS=0` asks for nothing compiled.
    """
    if sys.platform != "linux" or os.environ.get("MINIRLHF_KERNELS") == "0":
        return False
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.CalledProcessError):  # no compiler, no headers, a folder that is read-only
        return False
    library.use_arena.argtypes = [ctypes.c_size_t]
    return bool(library.use_arena(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))


def _build() -> Path:
    import torch  # here: what only reads a run directory needs none

    home = Path(torch.__file__).parent
    command = [*compiler(), *_COMPILE, f"-I{home / 'include'}", str(_SOURCE), f"-L{home / 'lib'}", "-lc10"]
    return kept_library("arena", [[*command, "-o", "arena"]], [_SOURCE], also=torch.__version__)
