"""A memory plan: what is live in each phase of a run, whose it is, and the peak, before anything is trained.

    phase = Σ entries          an entry: bytes of one kind that one model (or the data) has in that phase
    peak  = base + max over phases t of (max over s ≤ t of heap_s  +  returned_t)

On a CPU the heap keeps what is freed (`runs.allocator`), so it stays as large as it ever was; what comes from
the system directly (rollout rooms, files being read) goes back. `base` is what the process has without
tensors, measured when the plan is made. Elsewhere the peak is that of live tensors on the device: the
device's own context, its libraries and its allocator's fragments come on top and are not planned.

Sizes come from shapes and from `live_memory`; there is no correction factor in this page.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from minirlhf.training.live_memory import Live


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


class Plan(NamedTuple):
    """A run's memory.

    stage: its name. device: where the entries lie. base: bytes of the process without them; 0 off the CPU.
    phases: in the order in which they come. assumed: what the numbers stand on, one line each.
    """

    stage: str
    device: torch.device
    base: int
    phases: tuple[Phase, ...]
    assumed: tuple[str, ...] = ()

    @property
    def totals(self) -> list[int]:
        """What each phase takes of the machine, the base and the heap's former size included."""
        heap, totals = 0, []
        for phase in self.phases:
            returned = sum(entry.size for entry in phase.entries if entry.returned)
            live = phase.size - returned
            heap = max(heap, live) if self.device.type == "cpu" else live
            totals.append(self.base + heap + returned)
        return totals

    @property
    def peak(self) -> int:
        """Most bytes at once."""
        return max(self.totals)

    @property
    def fullest(self) -> Phase:
        """The first phase that has the peak."""
        return self.phases[self.totals.index(self.peak)]


class Trained(NamedTuple):
    """A model that is trained: bytes of the parameters that it starts from and that its caller goes on
    holding (0 where somebody else's entry has them), and of what the optimiser owns a copy of.

    With adapters `start` is the base and `trained` the adapters alone.
    """

    owner: str
    start: int
    trained: int

    def held(self, *, bests: int = 1) -> tuple[Entry, ...]:
        """While it is trained. bests: copies of the best checkpoint, two at the moment of a new one."""
        return (
            Entry(self.owner, "start", self.start),
            Entry(self.owner, "parameters", self.trained),
            Entry(self.owner, "moments", 2 * self.trained),
            *((Entry(self.owner, "best checkpoint", bests * self.trained),) if bests else ()),
        )


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


def loading(models: Sequence[tuple[str, int]]) -> Phase:
    """Models (owner, bytes) are read one after the other; a file's pages are in memory until it is closed."""
    entries = tuple(Entry(owner, "start", size) for owner, size in models)
    return Phase("load", (*entries, Entry("data", "file", max(size for _, size in models), returned=True)))


def gradient_phase(name: str, owner: str, live: Live, around: Sequence[Entry]) -> Phase:
    """Forward and backward, at the moment when most is live."""
    return Phase(
        name,
        (
            *around,
            Entry(owner, "gradients", live.kept_at_peak),
            Entry(owner, "activations", live.passing - live.inside),
            *((Entry(owner, "log-prob pieces", live.inside),) if live.inside else ()),
        ),
    )


def optimiser_phase(name: str, trained: Trained, live: Live, around: Sequence[Entry]) -> Phase:
    """The step: where the norm is over the limit, the clipped gradients stand beside the gradients."""
    return Phase(name, (*around, Entry(trained.owner, "gradients", live.kept + trained.trained)))


def forward_phase(name: str, owner: str, live: Live, around: Sequence[Entry]) -> Phase:
    """A forward pass without a gradient."""
    return Phase(name, (*around, Entry(owner, "activations", live.peak)))


def saving(trained: Trained, around: Sequence[Entry]) -> Phase:
    """A new best beside the old one, and the copy that is written."""
    return Phase("save", (*around, Entry(trained.owner, "written copy", trained.trained)))


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
