"""A memory plan: what is live in each phase of a run, whose it is, and the peak, before anything is trained.

    phase = Σ entries          an entry: bytes of one kind that one model (or the data) has in that phase
    peak  = base + max over phases t of (max over s before t of heap_s  +  returned_t)

On a CPU the heap keeps what is freed (`runs.allocator`), so it stays as large as it ever was; what comes from
the system directly (rollout rooms, files being read) goes back. All phases but the first, in which models are
loaded, come again and again, so all of them are before each other. `base` is what the process has without
tensors, measured when the plan is made. Of several stages in one process, each finds the heap as large as
those before it left it (`after`). Elsewhere the peak is that of live tensors on the device: the device's own
context, its libraries and its allocator's fragments come on top and are not planned.

Sizes come from shapes and from `live_memory`; there is no correction factor in this page.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Entry(NamedTuple):
    """Bytes of one kind.

    owner: policy, reference, critic, reward model, data. what: parameters, gradients, moments, ...
    returned: whether the system has them back when the phase ends.
    """

    owner: str
    what: str
    size: int
    returned: bool = False


class Phase(NamedTuple):
    """What is live at the fullest moment of a part of the run."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Bytes of all entries."""
        return sum(entry.size for entry in self.entries)

    @property
    def returned(self) -> int:
        """Of these, bytes that the system has back when the phase ends."""
        return sum(entry.size for entry in self.entries if entry.returned)


class Plan(NamedTuple):
    """A run's memory.

    stage: its name. device: where the entries lie. base: bytes of the process without them; 0 off the CPU.
    phases: in the order in which they come. assumed: what the numbers stand on, one line each.
    remedies: options that would make it less, and are not in use.
    left: bytes of the heap that stages before it in the same process left; 0 where it is the first.
    """

    stage: str
    device: torch.device
    base: int
    phases: tuple[Phase, ...]
    assumed: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()
    left: int = 0

    @property
    def totals(self) -> list[int]:
        """What each phase takes of the machine, the base and the heap's former size included."""
        heap = [phase.size - phase.returned for phase in self.phases]
        if self.device.type == "cpu":
            heap = [max(self.left, heap[0]), *(self.heap for _ in heap[1:])]
        return [self.base + live + phase.returned for live, phase in zip(heap, self.phases, strict=True)]

    @property
    def heap(self) -> int:
        """Bytes of the heap when the stage is done; off the CPU nothing stays."""
        if self.device.type != "cpu":
            return 0
        return max(self.left, *(phase.size - phase.returned for phase in self.phases))

    @property
    def peak(self) -> int:
        """Most bytes at once."""
        return max(self.totals)

    @property
    def fullest(self) -> Phase:
        """The phase that has the peak; of several, the one in which most is live."""
        return max(zip(self.totals, self.phases, strict=True), key=lambda each: (each[0], each[1].size))[1]


def after(plan: Plan, former: Sequence[Plan]) -> Plan:
    """The plan of a stage in a process in which stages with these plans ran before."""
    return plan._replace(left=max((each.heap for each in former), default=0))


def bytes_of(tree: Any) -> int:
    """Of all tensors of a tree; those that share memory count once, unless they are on no device.

    >>> bytes_of({"a": torch.zeros(3), "b": [torch.zeros(2, dtype=torch.bfloat16)]})
    16
    """
    leaves = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
    real = {leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes() for leaf in leaves.values()}
    return sum(real.values())


def base_of(device: torch.device, *loaded: Any) -> int:
    """What this process has besides these trees of tensors: Python, torch, libraries, data; 0 off the CPU."""
    in_memory = [leaf for leaf in tree_leaves(loaded) if isinstance(leaf, Tensor) and not leaf.is_meta]
    return 0 if device.type != "cpu" else max(0, resident() - bytes_of(in_memory))


def resident() -> int:
    """Bytes of this process that are in memory now; 0 where the system does not say (no /proc)."""
    return _status("VmRSS")


def most_resident() -> int:
    """The most that ever were; 0 likewise."""
    return _status("VmHWM")


def available(device: torch.device) -> int | None:
    """Bytes that this process can have on the device, what it has already included; None: not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    found = _lines(Path("/proc/meminfo")).get("MemAvailable") if device.type == "cpu" else None
    if found is None:
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    return min(found + resident(), int(allowed) if allowed.isdigit() else found + resident())


def _status(name: str) -> int:
    return _lines(Path("/proc/self/status")).get(name, 0)


def _lines(file: Path) -> dict[str, int]:
    """The entries "Name:  number kB" of a file of /proc, in bytes."""
    if not file.is_file():
        return {}
    rows = [line.split() for line in file.read_text().splitlines()]
    return {row[0].rstrip(":"): 1024 * int(row[1]) for row in rows if len(row) == 3 and row[2] == "kB"}
