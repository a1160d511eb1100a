"""Freed memory is kept where glibc's malloc is, and nothing is touched where the user has set it."""

import os
import subprocess
import sys

import pytest

# Page faults of the second of two equal blocks: none, where the first one's pages were kept.
_FAULTS = """
import resource, sys
from minirlhf.runs import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "kept" else None)
import torch
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.empty(64 * 2**20).fill_(1.0)
    del block
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
def test_a_freed_block_of_256_mb_costs_no_second_page_fault() -> None:
    said, kept = _run("kept")
    _, mapped = _run("as it is")
    assert said == "True"
    assert kept < 1_000 < 10_000 < mapped, (kept, mapped)


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_an_environment_that_sets_malloc_is_left_alone(name: str) -> None:
    said, _ = _run("kept", **{name: "131072" if name.startswith("MALLOC") else "glibc.malloc.hugetlb=0"})
    assert said == "False"
