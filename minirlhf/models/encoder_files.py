"""Encoder reward models from Hugging Face directories: config.json, model.safetensors, tokenizer.json.

They are read, not written: nothing here trains an encoder. Tensors get BERT's names, whatever the family.
What the page does not compute is refused by name, before any tensor is read.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minirlhf.models.adapter_files import is_adapter
from minirlhf.models.encoder import EncoderConfig, EncoderModel, bind, init_params
from minirlhf.models.interface import Params
from minirlhf.models.tensor_files import (
    Stored,
    named,
    nested,
    read_json,
    read_tensors,
    require_same,
    stored_tensors,
    template,
)
from minirlhf.runs import InputError


class _Family(NamedTuple):
    """How a family's directories look.

    fields: our option -> theirs, and the value that transformers gives where it is absent.
    supported: options that would change the computation, with what is computed here.
    renames: from their names of tensors to BERT's, applied in order.
    positions_after_pad: they are counted from pad_token_id + 1.
    """

    scalar_class: str
    fields: dict[str, tuple[str, Any]]
    head_act: str
    supported: dict[str, tuple[Any, ...]]
    renames: tuple[tuple[str, str], ...]
    positions_after_pad: bool = False


_BERT_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 30522),
    "max_position_embeddings": ("max_position_embeddings", 512),
    "hidden_size": ("hidden_size", 768),
    "num_hidden_layers": ("num_hidden_layers", 12),
    "num_attention_heads": ("num_attention_heads", 12),
    "intermediate_size": ("intermediate_size", 3072),
    "layer_norm_eps": ("layer_norm_eps", 1e-12),
    "type_vocab_size": ("type_vocab_size", 2),
    "hidden_act": ("hidden_act", "gelu"),
}
_BERT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu"),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}
_OLD_NAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
_ONE_LABEL = "an encoder reward model has one, whose logit is the score (problem_type regression, or none)"
# What a family without the option computes.
_FIXED = {"layer_norm_eps": 1e-12, "type_vocab_size": 0, "first_position": 0}
_FAMILIES = {
    "bert": _Family(
        "BertForSequenceClassification",
        _BERT_FIELDS,
        "tanh",
        _BERT_SUPPORTED,
        ((r"^bert\.", ""), *_OLD_NAMES),
    ),
    "roberta": _Family(
        "RobertaForSequenceClassification",
        _BERT_FIELDS | {"vocab_size": ("vocab_size", 50265)},
        "tanh",
        _BERT_SUPPORTED,
        (
            (r"^roberta\.", ""),
            (r"^classifier\.dense\.", "pooler.dense."),
            (r"^classifier\.out_proj\.", "classifier."),
        ),
        positions_after_pad=True,
    ),
    "distilbert": _Family(
        "DistilBertForSequenceClassification",
        {
            "vocab_size": ("vocab_size", 30522),
            "max_position_embeddings": ("max_position_embeddings", 512),
            "hidden_size": ("dim", 768),
            "num_hidden_layers": ("n_layers", 6),
            "num_attention_heads": ("n_heads", 12),
            "intermediate_size": ("hidden_dim", 3072),
            "hidden_act": ("activation", "gelu"),
        },
        "relu",
        {"activation": ("gelu", "relu")},
        (
            (r"^distilbert\.", ""),
            (r"^transformer\.", "encoder."),
            (r"\.attention\.([qkv])_lin\.", r".attention.self.\1."),
            (r"\.self\.q\.", ".self.query."),
            (r"\.self\.k\.", ".self.key."),
            (r"\.self\.v\.", ".self.value."),
            (r"\.attention\.out_lin\.", ".attention.output.dense."),
            (r"\.sa_layer_norm\.", ".attention.output.LayerNorm."),
            (r"\.ffn\.lin1\.", ".intermediate.dense."),
            (r"\.ffn\.lin2\.", ".output.dense."),
            (r"\.output_layer_norm\.", ".output.LayerNorm."),
            (r"^pre_classifier\.", "pooler.dense."),
        ),
    ),
}


def is_encoder(directory: Path) -> bool:
    """Whether a model directory's config.json names a family of this page; that of an adapter has none.

    Raises:
        InputError: there is no such directory, or its config.json is missing or broken.
    """
    if is_adapter(directory):
        return False
    return _entries(directory).get("model_type") in _FAMILIES


def load_encoder(directory: Path) -> tuple[EncoderModel, Params]:
    """Reads an encoder reward model.

    Returns:
        The model bound to its config, and its parameters in fp32 on the CPU.

    Raises:
        InputError: the directory or a file is missing or broken, the architecture or an option is not
            supported, it has another number of labels than one or a head for another problem, or tensors are
            missing, unknown, misshapen or not finite. Nothing is guessed.
    """
    directory = Path(directory)
    entries, place = _entries(directory), directory / "config.json"
    kind = entries.get("model_type")
    if kind not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise InputError(f"{place}: unsupported model_type {kind!r}; encoder reward models are of {known}")
    family = _FAMILIES[kind]
    _check_head(place, entries, family)
    try:
        config = from_huggingface(entries)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error

    stored = _renamed(directory, stored_tensors(directory), family)
    head = stored.get("classifier.weight")
    if head is not None and len(head.shape) == 2 and head.shape[0] != 1:
        labels = head.shape[0]
        raise InputError(f"{directory}: expected one label, {head.name} has {labels}; {_ONE_LABEL}")
    expected = template(lambda generator: init_params(generator, config=config))
    shapes = {name: tuple(tensor.shape) for name, tensor in named(expected).items()}
    where = directory if kind == "bert" else f"{directory} (tensors under BERT's names)"
    require_same(where, shapes, {name: each.shape for name, each in stored.items()})
    return bind(config), nested(expected, read_tensors(stored))


def from_huggingface(entries: Mapping[str, Any]) -> EncoderConfig:
    """The config that a `config.json` describes; absent entries have transformers' defaults.

    Raises:
        InputError: an option asks for what the page does not compute, or a size is impossible.

    >>> from_huggingface({"model_type": "distilbert", "n_layers": 2, "dropout": 0.1}).num_hidden_layers
    2
    """
    kind = entries["model_type"]
    family = _FAMILIES[kind]
    for option, supported in family.supported.items():
        value = entries.get(option, supported[0])
        if value not in supported:
            names = " or ".join(repr(each) for each in supported)
            raise InputError(f"unsupported option {option} = {value!r}; {kind} supports {names}")
    values = {ours: entries.get(theirs, default) for ours, (theirs, default) in family.fields.items()}
    if family.positions_after_pad:
        pad = entries.get("pad_token_id", 1)
        if not isinstance(pad, int) or pad < 0:
            raise InputError(f"{kind} counts positions from pad_token_id: expected a token id, got {pad!r}")
        values["first_position"] = pad + 1
    try:
        return EncoderConfig(**{**_FIXED, **values}, head_act=family.head_act)
    except ValueError as error:
        raise InputError(str(error)) from error


def _entries(directory: Path) -> dict[str, Any]:
    if not Path(directory).is_dir():
        raise InputError(f"{directory}: no such model directory")
    return read_json(Path(directory) / "config.json")


def _check_head(place: Path, entries: Mapping[str, Any], family: _Family) -> None:
    classes = entries.get("architectures") or [family.scalar_class]
    if classes[0] != family.scalar_class:
        raise InputError(f"{place}: expected a reward model ({family.scalar_class}), found {classes[0]}")
    labels = entries.get("id2label")
    if labels is not None and len(labels) != 1:
        names = ", ".join(map(str, labels.values() if isinstance(labels, dict) else labels))
        raise InputError(f"{place}: expected one label, found {len(labels)} ({names}); {_ONE_LABEL}")
    problem = entries.get("problem_type")
    if problem not in (None, "regression"):
        raise InputError(f"{place}: unsupported problem_type {problem!r}; {_ONE_LABEL}")


def _renamed(directory: Path, stored: Mapping[str, Stored], family: _Family) -> dict[str, Stored]:
    """The tensors under BERT's names, buffers left out."""
    plain: dict[str, Stored] = {}
    for name, each in stored.items():
        ours = name
        for pattern, replacement in family.renames:
            ours = re.sub(pattern, replacement, ours)
        if ours in plain:
            raise InputError(f"{directory}: holds {ours} twice, as {plain[ours].name} and as {name}")
        if not ours.endswith(("embeddings.position_ids", "embeddings.token_type_ids")):
            plain[ours] = each
    return plain
