"""Models as Hugging Face directories, both ways: config.json, model.safetensors, tokenizer.json.

A language model is written as its `…LMHeadModel` or `…ForCausalLM` (a tied head is not repeated), a reward
model as its `…ForSequenceClassification` with one label, whose only logit is the *raw* score. The
normalisation of that score stands in config.json under our own key, which other readers pass over. Always
fp32, never pickle.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch

from minirlhf.models.families import FAMILIES, Family, family_of, with_stop_ids
from minirlhf.models.interface import LanguageModel, Params, without_head
from minirlhf.models.tensor_files import (
    WEIGHTS,
    Stored,
    named,
    nested,
    read_json,
    read_tensors,
    require_finite,
    require_same,
    stored_tensors,
    template,
    write_tensors,
)
from minirlhf.runs import InputError, atomic_directory

CONFIG = "config.json"
GENERATION = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER = "tokenizer.json"
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What may stand beside a tokenizer and belongs to it: its special tokens' names, its chat template."""
_OURS = "minirlhf"  # our key in config.json
_HEAD = "score.weight"


Read = Callable[[Mapping[str, Stored]], dict[str, torch.Tensor]]
"""What the files' headers say -> the tensors."""


class Normalisation(NamedTuple):
    """Raw score -> reward: (raw - shift) / scale. The identity unless measured."""

    shift: float = 0.0
    scale: float = 1.0


def load_language_model(directory: Path, *, read: Read = read_tensors) -> tuple[LanguageModel, Params]:
    """Reads a policy.

    Args:
        directory: with config.json and model.safetensors (or the shards of its index).
        read: how tensors are read; `tensor_files.without_memory` gives their shapes alone.

    Returns:
        The model bound to its config, and its parameters in fp32 on the CPU.

    Raises:
        InputError: the directory or a file is missing or broken, an option is not supported, it holds a
            reward model, or tensors are missing, unknown, misshapen or not finite. Nothing is guessed.
    """
    model, params, _ = _load(Path(directory), scalar=False, read=read)
    return model, params


def load_scalar_model(
    directory: Path, *, read: Read = read_tensors
) -> tuple[LanguageModel, Params, Normalisation]:
    """Reads a reward model: the backbone, `params["score"]`, and how to normalise its raw score.

    A directory that says nothing about normalisation gets the identity. Raises as `load_language_model`
    does, also for a directory that holds a language model without a head, or a head of several labels.
    """
    model, params, entries = _load(Path(directory), scalar=True, read=read)
    return model, params, normalisation_of(Path(directory) / CONFIG, entries.get(_OURS))


def save_language_model(
    directory: Path, model: LanguageModel, params: Params, *, tokenizer: Path | None
) -> None:
    """Writes a policy that `GPT2LMHeadModel.from_pretrained` reads; replaces what stood there, as a whole.

    Args:
        directory: to appear when everything is written.
        tokenizer: a tokenizer.json, or a directory that has one, to be copied; None for none.

    Raises:
        InputError: the parameters are not this model's or not finite, or there is no such tokenizer.
    """
    family = family_of(model)
    entries = {"architectures": [family.language_classes[0]], **family.to_huggingface(model.config)}
    _save(Path(directory), model, params, entries, _tokenizer_file(tokenizer), scalar=False)


def save_scalar_model(
    directory: Path,
    model: LanguageModel,
    params: Params,
    *,
    tokenizer: Path | None,
    normalisation: Normalisation,
) -> None:
    """Writes a reward model that `GPT2ForSequenceClassification` reads, with the same raw score per row.

    transformers reads the score at the last token that is not `pad_token_id` (older versions: at the token
    before the first one that is). We read it at lengths - 1, which is usually the EOS; so the pad id written
    here is one that no text contains. There, pad with it: `tokenizer.pad_token_id = config.pad_token_id`.

    Arguments and errors are those of `save_language_model`; a scale that is not positive is an error.
    """
    family = family_of(model)
    shift, scale = (float(value) for value in normalisation)
    _check_normalisation(directory, shift, scale)
    file = _tokenizer_file(tokenizer)
    entries = {
        "architectures": [family.scalar_class],
        **family.to_huggingface(model.config),
        "id2label": {"0": "reward"},  # transformers counts the labels here
        "label2id": {"reward": 0},
        "problem_type": "regression",
        "pad_token_id": _unused_id(model.config.vocab_size, model.config.eos_token_id, file),
        _OURS: {"reward_shift": shift, "reward_scale": scale},
    }
    _save(Path(directory), model, params, entries, file, scalar=True)


def _load(directory: Path, *, scalar: bool, read: Read) -> tuple[LanguageModel, Params, dict[str, Any]]:
    if not directory.is_dir():
        raise InputError(f"{directory}: no such model directory")
    if (directory / ADAPTER_CONFIG).is_file() and not (directory / CONFIG).is_file():
        raise InputError(f"{directory}: expected a whole model, found an adapter ({ADAPTER_CONFIG})")
    entries = read_json(directory / CONFIG)
    family = _family_named(directory, entries)
    _check_kind(directory, entries, family, scalar)
    _check_unquantised(directory / CONFIG, entries)
    try:
        stop_ids = _stop_ids(directory, entries)
        one = {"eos_token_id": stop_ids[0]} if stop_ids else {}
        model = family.bind(family.from_huggingface(entries | one))
    except InputError as error:
        raise InputError(f"{directory / CONFIG}: {error}") from error
    if stop_ids:
        model = with_stop_ids(model, stop_ids)

    stored = _without_prefix(directory, stored_tensors(directory), family)
    if scalar != (_HEAD in stored):
        raise InputError(
            f"{directory}: expected a reward model, found no {_HEAD} in {WEIGHTS}"
            if scalar
            else f"{directory}: expected a language model, found a reward model ({_HEAD} in {WEIGHTS})"
        )
    expected = _expected(model, scalar)
    shapes = {name: tuple(tensor.shape) for name, tensor in named(expected).items()}
    head, embedding = family.head, family.embedding
    repeated = not scalar and head in stored and head not in shapes
    if repeated:
        shapes[head] = shapes[embedding]
    require_same(directory, shapes, {name: each.shape for name, each in stored.items()})
    tensors = read(stored)
    known = repeated and not tensors[head].is_meta
    if known and not torch.equal(tensors[head], tensors[embedding]):
        raise InputError(
            f"{directory}: {head} differs from {embedding}, but its config says that the head is tied"
        )
    return model, nested(expected, tensors), entries


def _without_prefix(directory: Path, stored: dict[str, Stored], family: Family) -> dict[str, Stored]:
    """The tensors under the backbone's own names, buffers left out."""
    plain: dict[str, Stored] = {}
    for name, each in stored.items():
        short = name.removeprefix(family.prefix)
        if short in plain:
            raise InputError(f"{directory}: holds {short} twice, with and without {family.prefix!r}")
        if not family.ignored.fullmatch(short):
            plain[short] = each
    return plain


def _save(
    directory: Path,
    model: LanguageModel,
    params: Params,
    entries: dict[str, Any],
    tokenizer: Path | None,
    *,
    scalar: bool,
) -> None:
    expected, tensors = named(_expected(model, scalar)), named(params)
    shapes = [{name: tuple(each.shape) for name, each in part.items()} for part in (expected, tensors)]
    require_same(directory, *shapes)
    require_finite(directory, tensors)
    prefix = family_of(model).prefix
    if len(model.stop_ids) > 1:
        entries = entries | {"eos_token_id": list(model.stop_ids)}
    with atomic_directory(directory) as folder:
        (folder / CONFIG).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
        outside = (_HEAD, family_of(model).head)
        names = {name: name if name in outside else prefix + name for name in tensors}
        write_tensors(folder / WEIGHTS, {names[name]: tensor for name, tensor in tensors.items()})
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / TOKENIZER)
            for file in (tokenizer.with_name(name) for name in BESIDE):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)


def _expected(model: LanguageModel, scalar: bool) -> Params:
    params = template(model.init)
    if not scalar:
        return params
    width = model.unembedding(params).shape[1]
    return {**without_head(model, params), "score": {"weight": torch.empty(1, width, device="meta")}}


def _family_named(directory: Path, entries: Mapping[str, Any]) -> Family:
    kind = entries.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(
            f"{directory / CONFIG}: unsupported model_type {kind!r}; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def _stop_ids(directory: Path, entries: Mapping[str, Any]) -> tuple[int, ...]:
    """Every id that config.json or generation_config.json names as an end, in that order; () for none."""
    generation = directory / GENERATION
    more = read_json(generation).get("eos_token_id") if generation.is_file() else None
    found: list[int] = []
    for stated in (entries.get("eos_token_id"), more):
        each = stated if isinstance(stated, list) else [] if stated is None else [stated]
        for one in each:
            if isinstance(one, bool) or not isinstance(one, int) or one < 0:
                raise InputError(f"eos_token_id must be a token id or a list of them, got {stated!r}")
            found.append(one)
    return tuple(dict.fromkeys(found))


def _check_kind(directory: Path, entries: Mapping[str, Any], family: Family, scalar: bool) -> None:
    """Refuses a reward model for a policy and the other way round, if config.json says which it is."""
    wanted = (family.scalar_class,) if scalar else family.language_classes
    found = entries.get("architectures") or [wanted[0]]
    if not isinstance(found, list) or found[0] in wanted:
        return
    kinds = dict.fromkeys(family.language_classes, "a language model") | {
        family.scalar_class: "a reward model"
    }
    raise InputError(
        f"{directory}: expected {kinds[wanted[0]]} ({' or '.join(wanted)}), "
        f"found {kinds.get(found[0], 'something else')} ({found[0]})"
    )


def _check_unquantised(path: Path, entries: Mapping[str, Any]) -> None:
    """Packed integers are no parameters of any family, whatever the method was."""
    quantised = entries.get("quantization_config")
    if quantised is not None:
        raise InputError(
            f"{path}: unsupported option quantization_config = {quantised!r}; supported: weights in floating "
            "point, as transformers' dequantize and save_pretrained write them"
        )


def normalisation_of(path: Path, ours: Any) -> Normalisation:
    """What a file says in our key about a reward model's score; the identity where it says nothing."""
    if ours is None:
        return Normalisation()
    try:
        shift, scale = float(ours["reward_shift"]), float(ours["reward_scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: {_OURS!r} must hold the numbers reward_shift and reward_scale, got {ours!r}"
        ) from error
    _check_normalisation(path, shift, scale)
    return Normalisation(shift, scale)


def _check_normalisation(where: object, shift: float, scale: float) -> None:
    if not (abs(shift) < float("inf") and 0 < scale < float("inf")):
        raise InputError(
            f"{where}: normalisation needs a finite shift and a scale > 0, got {shift} and {scale}"
        )


def _tokenizer_file(tokenizer: Path | None) -> Path | None:
    if tokenizer is None:
        return None
    file = Path(tokenizer) / TOKENIZER if Path(tokenizer).is_dir() else Path(tokenizer)
    if not file.is_file():
        raise InputError(f"{file}: no such tokenizer")
    return file


def _unused_id(vocab_size: int, eos: int, tokenizer: Path | None) -> int:
    """An id other than EOS that no text contains, as far as the tokenizer tells.

    First choice a row of the embedding beyond the tokenizer's ids; then, in a byte-level vocabulary, the byte
    0xFF (written ÿ), which UTF-8 never uses. Else the last id: the latest and so the rarest merge of a BPE.
    """
    if tokenizer is not None:
        try:
            content = tokenizers.Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{tokenizer}: not a readable tokenizer: {error}") from error
        ids = content.get_vocab(with_added_tokens=True)
        free = set(range(vocab_size)) - set(ids.values()) - {eos}
        if free:
            return min(free)
        byte_level = "ByteLevel" in json.dumps(json.loads(content.to_str())["pre_tokenizer"])
        if byte_level and ids.get("ÿ", eos) != eos:
            return ids["ÿ"]
    return vocab_size - 1 if eos != vocab_size - 1 else vocab_size - 2
