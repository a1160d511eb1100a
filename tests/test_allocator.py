"""Freed memory is kept where glibc's malloc is, and nothing is touched where the user has set it."""

import os
import subprocess
import sys

import pytest

# Page faults of the third of three equal rounds of blocks, as a training step's activations are.
_FAULTS = """
import resource, sys
from minirlhf.runs import keep_freed_memory, tell_malloc
print({"kept": keep_freed_memory, "told": tell_malloc, "as it is": lambda: None}[sys.argv[1]]())
import torch
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.empty(size * 2**18).fill_(1.0) for size in (8, 40, 8, 100, 3, 8, 60, 8, 3, 40)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _run(mode: str, **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS, mode],
        env={**clean, "THP_MEM_ALLOC_ENABLE": "0", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    said, faults = done.stdout.split()
    return said, int(faults)


def _glibc() -> bool:
    return sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names


@pytest.mark.skipif(not _glibc(), reason="the allocator is not glibc's")
@pytest.mark.parametrize("mode", ["kept", "told"])
def test_a_round_of_blocks_that_was_freed_costs_the_next_one_hardly_a_page_fault(mode: str) -> None:
    said, kept = _run(mode)
    _, mapped = _run("as it is")
    assert said in {"kept": ("arena", "malloc"), "told": ("True",)}[mode]
    assert kept < mapped / 3, (kept, mapped)


@pytest.mark.skipif(not _glibc(), reason="the allocator is not glibc's")
def test_where_nothing_is_compiled_malloc_keeps_what_is_freed() -> None:
    assert _run("kept", MINIRLHF_KERNELS="0")[0] == "malloc"


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_an_environment_that_sets_malloc_is_left_alone(name: str) -> None:
    value = "131072" if name.startswith("MALLOC") else "glibc.malloc.hugetlb=0"
    assert _run("kept", **{name: value})[0] == "None"
    assert _run("told", **{name: value})[0] == "False"
