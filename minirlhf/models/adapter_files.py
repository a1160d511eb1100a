"""Adapters as PEFT's directories, both ways: adapter_config.json and adapter_model.safetensors.

A directory holds A and B of each adapted layer, a reward model's head in full, and where its base is. PEFT
reads what is written here, and this page reads what PEFT writes; an option that would change what is computed
and that this package does not compute is refused by its name. What is ours (a fingerprint of the base, a
reward model's normalisation) stands in the metadata of the safetensors file: PEFT warns of unknown keys in
its config.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from minirlhf.models.adapters import (
    ALL_LINEAR,
    DOWN,
    SCORE,
    UP,
    adapted_layers,
    joined,
    linear_layers,
    merged,
    targeted,
)
from minirlhf.models.checkpoint import (
    ADAPTER_CONFIG,
    Normalisation,
    Read,
    load_language_model,
    load_scalar_model,
    normalisation_of,
)
from minirlhf.models.families import family_of
from minirlhf.models.interface import LanguageModel, Params, without_head
from minirlhf.models.sources import resolve_model
from minirlhf.models.tensor_files import (
    named,
    read_json,
    read_tensors,
    require_finite,
    require_same,
    stored_in,
)
from minirlhf.runs import InputError, atomic_directory

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OURS = "minirlhf"  # our key in the metadata of the weights
_LANGUAGE, _SCALAR = "CAUSAL_LM", "SEQ_CLS"  # PEFT's task types

# Options that are read elsewhere, or say how adapters were trained and change nothing of what they compute.
# Layouts (fan_in_fan_out) are the family's, as in PEFT, which corrects the option.
_IGNORED = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "lora_alpha"),
        *("lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version", "r", "revision"),
        *("qalora_group_size", "target_modules", "task_type", "use_rslora", "layers_pattern"),
    }
)
# These may be set, to one of these values. Other ways to begin (PiSSA, OLoRA, LoftQ) change the base.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}


class Adapter(NamedTuple):
    """An adapter directory, read up to its tensors.

    base: the directory of its base. rank, scale: r and what B A is multiplied by.
    targets: PEFT's target_modules. scalar: whether it makes a reward model of the base.
    """

    directory: Path
    base: Path
    rank: int
    scale: float
    targets: list[str] | str
    scalar: bool


def is_adapter(directory: Path) -> bool:
    """Whether this directory holds an adapter, which has a base elsewhere."""
    return (directory / ADAPTER_CONFIG).is_file()


def read_language_model(directory: Path, *, read: Read = read_tensors) -> tuple[LanguageModel, Params]:
    """`load_language_model`, also of an adapter's directory: its base with the adapter merged.

    A base that is read without memory is not held to the adapter's fingerprint of it.

    Raises:
        InputError: also where an option is not supported, the base is not found or is another one than the
            adapter was made for, or tensors are missing, unknown, misshapen or not finite.
    """
    if not is_adapter(directory):
        return load_language_model(directory, read=read)
    adapter = open_adapter(directory)
    _require_kind(adapter, scalar=False)
    model, base = load_language_model(adapter.base, read=read)
    return model, merged(_joined(adapter, model, base, base, read)[0])


def read_scalar_model(
    directory: Path, *, read: Read = read_tensors
) -> tuple[LanguageModel, Params, Normalisation]:
    """`load_scalar_model`, likewise. The base is the language model that the reward model was made of."""
    if not is_adapter(directory):
        return load_scalar_model(directory, read=read)
    adapter = open_adapter(directory)
    _require_kind(adapter, scalar=True)
    model, base = load_language_model(adapter.base, read=read)
    params, ours = _joined(adapter, model, base, without_head(model, base), read)
    stated = {name: ours[name] for name in ("reward_shift", "reward_scale") if name in ours}
    return model, merged(params), normalisation_of(directory / WEIGHTS, stated or None)


def open_adapter(directory: Path) -> Adapter:
    """Reads an adapter's config.

    Raises:
        InputError: it is not LoRA, an option is not supported, or its base is not found.
    """
    path = directory / ADAPTER_CONFIG
    entries = read_json(path)
    _require_supported(path, entries)
    rank, alpha = entries.get("r", 8), entries.get("lora_alpha", 8)
    if not (_is_number(rank) and rank == int(rank) and rank >= 1 and _is_number(alpha)):
        raise InputError(
            f"{path}: expected a rank r of at least 1 and a number lora_alpha, got {rank!r}, {alpha!r}"
        )
    targets = entries.get("target_modules")
    named_targets = isinstance(targets, list) and all(isinstance(each, str) for each in targets)
    if not (named_targets and targets) and not isinstance(targets, str):
        raise InputError(f"{path}: target_modules must name layers, got {targets!r}")
    scale = alpha / rank**0.5 if entries.get("use_rslora") else alpha / rank
    base = _base_of(path, entries)
    return Adapter(directory, base, int(rank), scale, targets, entries.get("task_type") == _SCALAR)


def save_adapter(
    directory: Path,
    model: LanguageModel,
    params: Params,
    *,
    base: Path,
    base_params: Params,
    normalisation: Normalisation | None = None,
) -> None:
    """Writes the adapters of joined parameters so that PEFT reads them; replaces what stood there.

    Args:
        params: with `Adapted` weights, all of one rank and scale, and with a scalar head where they are a
            reward model's.
        base: where the base's directory is; written down as an absolute path.
        base_params: the base's parameters, of which a fingerprint is written down.
        normalisation: of a reward model.

    Raises:
        ValueError: no weight is adapted, or ranks and scales differ.
        InputError: a tensor is not finite.
    """
    layers = adapted_layers(params)
    kinds = {(len(each.down), each.scale) for each in layers.values()}
    if len(kinds) != 1:
        raise ValueError(f"expected adapters of one rank and scale, got {sorted(kinds) or 'none'}")
    (rank, scale), scalar = kinds.pop(), SCORE in params
    prefix = _PREFIX + family_of(model).prefix
    tensors = {}
    for name, each in layers.items():
        tensors |= {f"{prefix}{name}.{DOWN}.weight": each.down, f"{prefix}{name}.{UP}.weight": each.up}
    if scalar:
        tensors[f"{_PREFIX}{SCORE}.weight"] = params[SCORE]["weight"]
    ready = {
        name: each.detach().to("cpu", torch.float32, copy=True).contiguous() for name, each in tensors.items()
    }
    require_finite(directory, ready)
    ours: dict[str, Any] = {"base_sha256": fingerprint(base_params)}
    if normalisation is not None:
        ours |= {"reward_shift": normalisation.shift, "reward_scale": normalisation.scale}
    entries = {
        "peft_type": "LORA",
        "task_type": _SCALAR if scalar else _LANGUAGE,
        "base_model_name_or_path": str(base.resolve()),
        "r": rank,
        "lora_alpha": _whole_number(scale * rank),
        "target_modules": _shortest(list(layers), linear_layers(base_params)),
        "fan_in_fan_out": not family_of(model).outputs_first,
        "modules_to_save": [SCORE] if scalar else None,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with atomic_directory(directory) as folder:
        (folder / ADAPTER_CONFIG).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
        save_file(ready, folder / WEIGHTS, metadata={"format": "pt", _OURS: json.dumps(ours)})


def fingerprint(params: Params) -> str:
    """SHA-256 of names, shapes and fp32 numbers of parameters, in the order of the names."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named(params).items()):
        digest.update(f"{name} {list(leaf.shape)}\n".encode())
        numbers: Any = leaf.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(numbers)
    return digest.hexdigest()


def _joined(
    adapter: Adapter, model: LanguageModel, base: Params, backbone: Params, read: Read
) -> tuple[Params, dict[str, Any]]:
    """The backbone with the adapter's tensors, and what the file says in our key."""
    file = adapter.directory / WEIGHTS
    if not file.is_file():
        raise InputError(f"{adapter.directory}: has no {WEIGHTS} (pickles are not read: they can run code)")
    stored, metadata = stored_in(file)
    ours = _ours(file, metadata)
    computed = all(not leaf.is_meta for leaf in tree_leaves(base))
    if computed and ours.get("base_sha256") not in (None, fingerprint(base)):
        raise InputError(
            f"{adapter.directory}: was made for another base than {adapter.base} holds now (the fingerprint "
            f"in {WEIGHTS} differs); adapters act on the very weights that they were trained beside"
        )
    layers = _layers(adapter, model, base)
    require_same(
        file, _expected(adapter, model, base, layers), {name: each.shape for name, each in stored.items()}
    )
    return _beside(adapter, model, backbone, layers, read(stored)), ours


def _layers(adapter: Adapter, model: LanguageModel, base: Params) -> list[str]:
    prefix = family_of(model).prefix
    try:
        if isinstance(adapter.targets, list):
            return targeted(base, adapter.targets, prefix=prefix)
        if adapter.targets == ALL_LINEAR:
            return linear_layers(base)
        found = [each for each in linear_layers(base) if re.fullmatch(adapter.targets, prefix + each)]
    except (InputError, re.error) as error:
        raise InputError(f"{adapter.directory / ADAPTER_CONFIG}: target_modules: {error}") from error
    if not found:
        raise InputError(
            f"{adapter.directory / ADAPTER_CONFIG}: target_modules {adapter.targets!r} matches no linear "
            f"layer of the blocks of {adapter.base}"
        )
    return found


def _expected(
    adapter: Adapter, model: LanguageModel, base: Params, layers: list[str]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the config announces for this base."""
    weights, family, shapes = named(base), family_of(model), {}
    for layer in layers:
        shape = weights[f"{layer}.weight"].shape
        out, width = shape if family.outputs_first else reversed(shape)
        name = _PREFIX + family.prefix + layer
        shapes[f"{name}.{DOWN}.weight"] = (adapter.rank, width)
        shapes[f"{name}.{UP}.weight"] = (out, adapter.rank)
    if adapter.scalar:
        shapes[f"{_PREFIX}{SCORE}.weight"] = (1, model.unembedding(base).shape[1])
    return shapes


def _beside(
    adapter: Adapter, model: LanguageModel, backbone: Params, layers: list[str], tensors: Mapping[str, Tensor]
) -> Params:
    chosen, family = set(layers), family_of(model)

    def of(node: Any, path: str) -> Any:
        if path in chosen:
            name = _PREFIX + family.prefix + path
            return {part: {"weight": tensors[f"{name}.{part}.weight"]} for part in (DOWN, UP)}
        if isinstance(node, list):
            return [of(child, f"{path}.{i}") for i, child in enumerate(node)]
        branches = {key: child for key, child in node.items() if isinstance(child, dict | list)}
        return {key: of(child, f"{path}.{key}" if path else key) for key, child in branches.items()}

    adapters = of(backbone, "")
    if adapter.scalar:
        adapters[SCORE] = {"weight": tensors[f"{_PREFIX}{SCORE}.weight"]}
    return joined(backbone, adapters, scale=adapter.scale, outputs_first=family.outputs_first)


def _require_supported(path: Path, entries: Mapping[str, Any]) -> None:
    kind, task = entries.get("peft_type", "LORA"), entries.get("task_type")
    if kind != "LORA" or task not in (None, _LANGUAGE, _SCALAR):
        raise InputError(
            f"{path}: unsupported peft_type {kind!r} with task_type {task!r}; supported: LORA with "
            f"{_LANGUAGE} or {_SCALAR}"
        )
    for option, value in entries.items():
        neutral = value in _NEUTRAL[option] if option in _NEUTRAL else not value
        if option not in _IGNORED and not neutral:
            supported = " or ".join(map(repr, _NEUTRAL.get(option, (None,))))
            raise InputError(f"{path}: unsupported option {option} = {value!r}; supported: {supported}")
    saved = entries.get("modules_to_save") or []
    unknown = [each for each in saved if task != _SCALAR or each not in (SCORE, "classifier")]
    if unknown:  # PEFT names both heads of its families; ours have `score`
        raise InputError(
            f"{path}: unsupported modules_to_save {unknown}; supported: a reward model's {SCORE}"
        )


def _require_kind(adapter: Adapter, *, scalar: bool) -> None:
    if adapter.scalar != scalar:
        kinds = {False: f"a language model ({_LANGUAGE})", True: f"a reward model ({_SCALAR})"}
        raise InputError(
            f"{adapter.directory}: expected an adapter of {kinds[scalar]}, found {kinds[adapter.scalar]}"
        )


def _base_of(path: Path, entries: Mapping[str, Any]) -> Path:
    """The base's directory: beside the adapter, from the working directory or root, or on the hub."""
    name, revision = entries.get("base_model_name_or_path"), entries.get("revision")
    if not isinstance(name, str) or not name:
        raise InputError(f"{path}: base_model_name_or_path must say where the base is, got {name!r}")
    beside = path.parent / name  # an absolute name stays one
    try:
        base = beside if beside.is_dir() else resolve_model(f"{name}@{revision}" if revision else name)
    except InputError as error:
        raise InputError(f"{path}: base_model_name_or_path: {error}") from error
    if is_adapter(base):
        raise InputError(f"{path}: its base {base} is an adapter itself; merge that one into its base first")
    return base


def _ours(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        ours = json.loads(metadata.get(_OURS, "{}"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: broken metadata {_OURS!r}: {error}") from error
    if not isinstance(ours, dict):
        raise InputError(f"{file}: metadata {_OURS!r} must be an object, got {ours!r}")
    return ours


def _shortest(layers: list[str], known: list[str]) -> list[str]:
    """The shortest names by which PEFT finds these layers, and none of the others."""
    found = dict.fromkeys(_ending(layer, 1) for layer in layers)
    ambiguous = {name for name in found if any(_ending(each, 1) == name for each in set(known) - set(layers))}
    return sorted({layer if _ending(layer, 1) in ambiguous else _ending(layer, 1) for layer in layers})


def _ending(layer: str, parts: int) -> str:
    return ".".join(layer.split(".")[-parts:])


def _whole_number(value: float) -> float | int:
    near = round(value)  # α / r · r may miss α by rounding
    return near if abs(value - near) < 1e-9 else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
