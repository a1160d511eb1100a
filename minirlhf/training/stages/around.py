"""What every stage does around its page: save its kind of model, watch samples, say how it ended."""

from collections.abc import Callable, Sequence
from pathlib import Path

from minirlhf.data.records import PairExample
from minirlhf.data.spool import LazySequence
from minirlhf.models.adapter_files import save_adapter
from minirlhf.models.adapters import adapted_layers, merged
from minirlhf.models.checkpoint import Normalisation, save_language_model, save_scalar_model
from minirlhf.models.interface import Params
from minirlhf.training.loop import StageResult
from minirlhf.training.samples import sample_watcher
from minirlhf.training.setting import Setting, seed_for
from minirlhf.training.workspace import Checkpoint, Stage

Metrics = dict[str, float]

ADAPTER = "adapter"
"""The directory beside a merged model in which its adapters lie in PEFT's format."""


def save_policy(start: Checkpoint, folder: Path, params: Params) -> None:
    """How a stage keeps a policy: with the tokenizer that it started from, adapters merged and also apart."""
    save_language_model(folder, start.model, merged(params), tokenizer=start.tokenizer.path)
    if adapted_layers(params):
        save_adapter(folder / ADAPTER, start.model, params, base=start.path, base_params=start.params)


def save_scalar(start: Checkpoint, normalisation: Normalisation, folder: Path, params: Params) -> None:
    """How a stage keeps a reward model: likewise, with what its scores are normalised by."""
    save_scalar_model(
        folder, start.model, merged(params), tokenizer=start.tokenizer.path, normalisation=normalisation
    )
    if adapted_layers(params):
        base = {"base": start.path, "base_params": start.params}
        save_adapter(folder / ADAPTER, start.model, params, **base, normalisation=normalisation)


def prompts_of(pairs: Sequence[PairExample]) -> Sequence[list[int]]:
    """The prompts' ids, one for each pair."""
    return LazySequence(len(pairs), lambda i: pairs[i].chosen.ids[: pairs[i].chosen.prompt_length])


def watcher(
    name: str, start: Checkpoint, prompts: Sequence[Sequence[int]], stage: Stage, setting: Setting
) -> Callable[[Params], Metrics]:
    """Responses to the same few prompts at every evaluation, with uniforms of the stage's own."""
    seed = seed_for(setting, f"{name} samples")
    return sample_watcher(start.model, start.tokenizer, prompts, stage.folder, stage=name, seed=seed)


def tell(name: str, result: StageResult, out: Path, setting: Setting) -> Metrics:
    """Says how a stage ended, and gives its metrics back."""
    told = ", ".join(
        f"{key} {value:.4g}" for key, value in result.metrics.items() if isinstance(value, float)
    )
    setting.show(f"{name}: best after step {result.best_step}: {told}; written to {out}")
    return result.metrics
