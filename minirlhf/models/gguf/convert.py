"""A GGUF file -> a model directory: config.json, model.safetensors in fp32, the tokenizer's two files.

What quantisation took away does not come back: the directory holds the numbers that llama.cpp computes
with, in fp32. Everything about the file is checked before the first tensor is read.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minirlhf.models.gguf.config import config_of
from minirlhf.models.gguf.file import GGUFFile
from minirlhf.models.gguf.tokenizer import special_id, tokenizer_config, tokenizer_json
from minirlhf.models.gguf.weights import architecture_of, names_of
from minirlhf.models.tensor_files import WEIGHTS
from minirlhf.runs import InputError, atomic_directory


def convert_gguf(path: Path, out: Path, *, tokenizer: Path | None = None) -> None:
    """Writes the model directory of a GGUF file; replaces what stood there, as a whole.

    Args:
        path: the file.
        out: the directory, to appear when everything is written.
        tokenizer: the model's own tokenizer.json, or a directory that has one, for a file whose tokenizer
            we cannot rebuild; None rebuilds it.

    Raises:
        InputError: it is no GGUF file, is broken, or of an architecture, quantisation or tokenizer that we
            do not read; names what.
    """
    file = GGUFFile(Path(path))
    config = {**config_of(file), "torch_dtype": "float32", **_special_ids(file)}
    names = names_of(file, layers=file.value(f"{file.value('general.architecture', str)}.block_count", int))
    stops = _stop_ids(file)
    files: dict[str, Any] = {"config.json": config, "tokenizer_config.json": tokenizer_config(file)}
    if tokenizer is None:
        files["tokenizer.json"] = tokenizer_json(file)
    if len(stops) > 1:
        files["generation_config.json"] = {"eos_token_id": stops}
    with atomic_directory(Path(out)) as folder:
        for name, content in files.items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            _copy_tokenizer(tokenizer, folder)
        save_file(_tensors(file, names, config), folder / WEIGHTS, metadata={"format": "pt"})


def _tensors(file: GGUFFile, names: dict[str, tuple[str, str]], config: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors in the layout of the model's own directory, each held once."""
    architecture = architecture_of(file)
    tensors: dict[str, Tensor] = {}
    for theirs, (ours, short) in names.items():
        tensor = file.tensor(theirs)
        if short in architecture.layouts:
            tensor = architecture.layouts[short](tensor, config)
        tensors[ours] = tensor.contiguous()
    return _without_repeated_head(file, tensors, config)


def _without_repeated_head(
    file: GGUFFile, tensors: dict[str, Tensor], config: dict[str, Any]
) -> dict[str, Tensor]:
    """GPT-2's head is its embedding; llama.cpp keeps a copy, which must not have been quantised apart."""
    head = architecture_of(file).head
    if not config["tie_word_embeddings"] or head not in tensors:
        return tensors
    embedding = tensors[architecture_of(file).outside["token_embd.weight"]]
    if not torch.equal(tensors[head], embedding):
        raise InputError(
            f"{file.path}: output.weight differs from token_embd.weight, of which it was a copy (quantised "
            f"differently); use a file of this model that is F16, F32 or quantised alike"
        )
    return {name: tensor for name, tensor in tensors.items() if name != head}


def _special_ids(file: GGUFFile) -> dict[str, int]:
    """`bos_token_id` and its like for config.json."""
    ids = {
        "bos_token_id": special_id(file, "bos_token_id"),
        "eos_token_id": special_id(file, "eos_token_id"),
        "pad_token_id": special_id(file, "padding_token_id"),
    }
    if ids["eos_token_id"] is None:
        raise InputError(f"{file.path}: expected the metadata entry tokenizer.ggml.eos_token_id, found none")
    return {name: number for name, number in ids.items() if number is not None}


def _stop_ids(file: GGUFFile) -> list[int]:
    """What ends a response: EOS, then the end of a turn or message where the file names them apart."""
    ids = [special_id(file, name) for name in ("eos_token_id", "eot_token_id", "eom_token_id")]
    return list(dict.fromkeys(number for number in ids if number is not None))


def _copy_tokenizer(source: Path, folder: Path) -> None:
    source = source / "tokenizer.json" if source.is_dir() else source
    try:
        shutil.copyfile(source, folder / "tokenizer.json")
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}") from error
