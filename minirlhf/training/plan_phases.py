"""What a memory plan is made of: the models that are trained, by their shapes, and the phases of a run.

A stage's plan (`stage_plans`, `on_policy_plan`) says which of these come, in which order, beside what.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models.adapters import adapted_layers
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.models.opened import opened
from minirlhf.rollout.footprint import Footprint
from minirlhf.training.live_memory import Live, live_memory, without_gradient
from minirlhf.training.loop import TrainConfig
from minirlhf.training.memory_plan import Entry, Phase, bytes_of
from minirlhf.training.ppo_config import OnPolicyConfig
from minirlhf.training.rewards import SCORED_ROWS, Reader
from minirlhf.training.trained import Trained, TrainedConfig, TrainingBytes, Whole, trained, training_bytes
from minirlhf.training.update import Loss, gradient


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


def rollout_phase(
    name: str,
    model: LanguageModel,
    params: Params,
    sampled: Footprint,
    around: Sequence[Entry],
    *,
    device: torch.device,
) -> Phase:
    """A rollout at its fullest. On a CPU, packed weights and cache lie in rooms, which go back."""
    tokens = torch.zeros(sampled.rows, sampled.tokens, dtype=torch.int64)
    live = live_memory(without_gradient(model.hidden), params, tokens, device=device)
    in_rooms = device.type == "cpu"
    entries = (
        Entry("policy", "merged weights", sampled.copies.merged),
        Entry("policy", "packed weights", sampled.copies.room, in_rooms),
        Entry("policy", "8-bit weights", sampled.copies.heap),
        Entry("policy", "KV cache", sampled.cache, in_rooms),
        Entry("policy", "activations", max(live.peak, sampled.tables)),
    )
    return Phase(name, (*around, *entries))


def scoring_phase(
    reader: Reader, rows: int, width: int, around: Sequence[Entry], *, device: torch.device
) -> Phase:
    """A model reads rows of this width, as `rewards.reward_model_scorer` gives them to it."""
    rows, width = min(SCORED_ROWS, rows), min(width, reader.context)
    tokens, lengths = torch.zeros(rows, width, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    live = live_memory(without_gradient(reader.raw), reader.params, tokens, lengths, device=device)
    return forward_phase("score", "data", live, around)


def saving(learner: Learner, around: Sequence[Entry]) -> Phase:
    """A new best beside the old one, and the copy that is written: of the whole model, adapters merged."""
    merged = sum(each.weight.nbytes for each in adapted_layers(learner.kept).values())
    copies = (
        Entry(learner.owner, "merged weights", merged),
        Entry(learner.owner, "written copy", bytes_of(learner.shapes)),
    )
    return Phase("save", (*around, *copies))


def remedies_of(config: TrainConfig | OnPolicyConfig) -> tuple[str, ...]:
    """Options that take less memory than this config's."""
    found = () if config.activation_recomputation else ("--activation-recomputation",)
    return found if config.adapter_rank is not None else (*found, "--adapter-rank 8")


def assumptions(config: TrainConfig | OnPolicyConfig) -> tuple[str, ...]:
    """Lines for `Plan.assumed`: options of the config that the plan counted in, and what it does not count.

    >>> assumptions(TrainConfig(precision="bf16", adapter_rank=4))
    ('adapters of rank 4 on all-linear, computing in bf16',)
    """
    options = []
    if config.adapter_rank is not None:
        options.append(f"adapters of rank {config.adapter_rank} on {', '.join(config.adapter_targets)}")
    if config.precision != "fp32":
        options.append(f"computing in {config.precision}")
    if config.activation_recomputation:
        options.append("activations computed again in the backward pass")
    compiled = () if config.compile == "off" else ("steps that are not compiled; compiled ones keep less",)
    return (*((", ".join(options),) if options else ()), *compiled)
