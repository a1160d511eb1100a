"""A memory plan: what is live in each phase of a run, whose it is, and the peak, before anything is trained.

    phase = Σ entries          an entry: bytes of one kind that one model (or the data) has in that phase
    peak  = base + max over phases t of (max over s before t of heap_s  +  returned_t)

On a CPU the heap keeps what is freed (`runs.allocator`), so it stays as large as it ever was; what comes from
the system directly (rollout rooms, files being read) goes back. All phases but the first, in which models are
loaded, come again and again, so all of them are before each other. `base` is what the process has without
tensors, measured when the plan is made. Elsewhere the peak is that of live tensors on the device: the
device's own context, its libraries and its allocator's fragments come on top and are not planned.

Sizes come from shapes and from `live_memory`; there is no correction factor in this page.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models.adapters import adapted_layers
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.models.opened import opened
from minirlhf.training.live_memory import Live, live_memory
from minirlhf.training.loop import TrainConfig
from minirlhf.training.ppo_config import OnPolicyConfig
from minirlhf.training.trained import Trained, TrainedConfig, TrainingBytes, Whole, trained, training_bytes
from minirlhf.training.update import Loss, gradient


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
    remedies: options that would make it less, and are not in use.
    """

    stage: str
    device: torch.device
    base: int
    phases: tuple[Phase, ...]
    assumed: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()

    @property
    def totals(self) -> list[int]:
        """What each phase takes of the machine, the base and the heap's former size included."""
        returned = [sum(entry.size for entry in phase.entries if entry.returned) for phase in self.phases]
        heap = [phase.size - back for phase, back in zip(self.phases, returned, strict=True)]
        if self.device.type == "cpu":
            heap = [heap[0], *(max(heap) for _ in heap[1:])]
        return [self.base + live + back for live, back in zip(heap, returned, strict=True)]

    @property
    def peak(self) -> int:
        """Most bytes at once."""
        return max(self.totals)

    @property
    def fullest(self) -> Phase:
        """The phase that has the peak; of several, the one in which most is live."""
        return max(zip(self.totals, self.phases, strict=True), key=lambda each: (each[0], each[1].size))[1]


class Learner(NamedTuple):
    """A model that is trained, by its shapes.

    owner: its name in the plan. shapes: the parameters that it starts from, on no device.
    start: their bytes, which the caller goes on holding; 0 where somebody else's entry has them.
    trained: what is trained of them (with adapters these alone, and the start is their base).
    size: bytes that training takes. base: of the adapters' base in the precision that is computed in, where
        that is a copy.
    """

    owner: str
    shapes: Params
    start: int
    trained: Trained
    size: TrainingBytes
    base: int

    def held(self, *, bests: int = 1) -> tuple[Entry, ...]:
        """While it is trained. bests: copies of the best checkpoint, two at the moment of a new one."""
        return (
            Entry(self.owner, "start", self.start),
            Entry(self.owner, "base in bf16", self.base),
            Entry(self.owner, "parameters", self.size.trained),
            Entry(self.owner, "moments", self.size.optimiser),
            *((Entry(self.owner, "best checkpoint", bests * self.size.trained),) if bests else ()),
        )

    @property
    def computing(self) -> Params:
        """What the model computes with, by shapes."""
        return self.trained.whole.computing(self.trained.initial)

    @property
    def kept(self) -> Params:
        """What is evaluated and saved, by shapes."""
        return self.trained.whole.kept(self.trained.initial)

    @property
    def copy(self) -> Entry:
        """What the trained tree is rounded to, while something is computed with it."""
        return Entry(self.owner, "copy in bf16", self.size.copy)

    def frozen(self, params: Params | None) -> tuple[Params, int]:
        """A model that is not trained (None: this one's start) as it is computed with, by shapes, and the
        bytes that are made for it."""
        shapes = self.shapes if params is None else shapes_of(params)
        computed = self.trained.frozen(shapes)
        there = {id(leaf) for leaf in (*tree_leaves(shapes), *opened(self.trained.whole).tensors)}
        return computed, bytes_of([leaf for leaf in tree_leaves(computed) if id(leaf) not in there])


def learner(
    owner: str, model: LanguageModel, params: Params, config: TrainedConfig, *, shared: bool = False
) -> Learner:
    """What training these parameters takes by this config; nothing is computed, and nothing drawn that
    anybody sees.

    Args:
        shared: whether another model's entry has the parameters.
    """
    shapes = shapes_of(params)
    made = trained(model, shapes, config, generator=torch.Generator())
    size, known = training_bytes(made.initial, made.whole), {id(leaf) for leaf in tree_leaves(shapes)}
    base = bytes_of([leaf for leaf in opened(made.whole).tensors if id(leaf) not in known])
    return Learner(owner, shapes, 0 if shared else bytes_of(shapes), made, size, base)


def shapes_of(params: Params) -> Params:
    """The same parameters without their memory."""
    return tree_map(lambda leaf: torch.empty_like(leaf, device="meta"), params)


def remedies_of(config: TrainConfig | OnPolicyConfig) -> tuple[str, ...]:
    """Options that take less memory than this config's."""
    found = () if config.activation_recomputation else ("--activation-recomputation",)
    return found if config.adapter_rank is not None else (*found, "--adapter-rank 8")


def uncompiled(config: TrainConfig | OnPolicyConfig) -> tuple[str, ...]:
    """A line for `Plan.assumed` where steps may be compiled, which is not traced."""
    return () if config.compile == "off" else ("steps that are not compiled; compiled ones keep less",)


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


def gradient_phases(
    learner: Learner,
    loss: Loss,
    parts: Sequence[Any],
    normaliser: Tensor,
    around: Sequence[Entry],
    *,
    names: tuple[str, str],
    device: torch.device,
) -> list[Phase]:
    """A minibatch's gradient, at the moment when most is live, and its optimiser step, which is in place.

    Args:
        parts: its micro-batches. Of more than two, the first two are traced: each later one needs what the
            second does, a gradient beside the sum so far.
    """

    def work(whole: Whole, params: Params, parts: Sequence[Any], normaliser: Tensor) -> Any:
        return gradient(params, parts, normaliser, loss=loss, whole=whole)

    whole, initial, owner = learner.trained.whole, learner.trained.initial, learner.owner
    live = live_memory(work, whole, initial, list(parts[:2]), normaliser, device=device)
    of_gradient = (
        *around,
        learner.copy,
        Entry(owner, "gradients", live.kept_at_peak),
        Entry(owner, "activations", live.passing - live.inside - learner.copy.size),
        Entry(owner, "log-prob pieces", live.inside),
    )
    gradients = Entry(owner, "gradients", live.kept)
    return [Phase(names[0], of_gradient), Phase(names[1], (*around, gradients))]


def forward_phase(name: str, owner: str, live: Live, around: Sequence[Entry]) -> Phase:
    """A forward pass without a gradient."""
    return Phase(name, (*around, Entry(owner, "activations", live.peak)))


def saving(learner: Learner, around: Sequence[Entry]) -> Phase:
    """A new best beside the old one, and the copy that is written: of the whole model, adapters merged."""
    merged = sum(each.weight.nbytes for each in adapted_layers(learner.kept).values())
    copies = (
        Entry(learner.owner, "merged weights", merged),
        Entry(learner.owner, "written copy", bytes_of(learner.shapes)),
    )
    return Phase("save", (*around, *copies))


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
