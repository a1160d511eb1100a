"""Parameters in safetensors files: names, checks and reading, for any family.

A file is judged by its header (names, shapes, types) before any tensor is read, against a template: the
nested parameters of the model with the tensors on torch's meta device.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minirlhf.models.interface import Params
from minirlhf.runs import InputError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = ("F16", "BF16", "F32", "F64")


class Stored(NamedTuple):
    """One tensor in a file, not read yet. name: as in the file, which may carry a prefix."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def named(params: Params) -> dict[str, Tensor]:
    """The leaves of nested parameters under their checkpoint names, as `h.0.attn.c_attn.weight`.

    >>> list(named({"h": [{"weight": torch.zeros(1)}], "ln_f": {"bias": torch.zeros(1)}}))
    ['h.0.weight', 'ln_f.bias']
    """

    def walk(node: Any, path: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(node, Tensor):
            yield path, node
            return
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from walk(child, f"{path}.{key}" if path else str(key))

    return dict(walk(params, ""))


def nested(template: Params, tensors: Mapping[str, Tensor]) -> Params:
    """The inverse of `named`: the tensors in the structure of the template."""

    def build(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            return tensors[path]
        if isinstance(node, dict):
            return {key: build(child, f"{path}.{key}" if path else key) for key, child in node.items()}
        return [build(child, f"{path}.{index}") for index, child in enumerate(node)]

    return build(template, "")


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """What a directory's weight files hold, from their headers alone.

    Raises:
        InputError: there is no safetensors file (only a pickle, perhaps), a shard of the index is missing, or
            a file is not safetensors.
    """
    found = {}
    for file in _weight_files(directory):
        found |= stored_in(file)[0]
    return found


def stored_in(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """What one safetensors file holds and its metadata, from its header alone.

    Raises:
        InputError: it is not safetensors.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            found = {}
            for name in handle.keys():
                part = handle.get_slice(name)
                found[name] = Stored(file, name, tuple(part.get_shape()), part.get_dtype())
            return found, handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable safetensors file: {error}") from error


def _weight_files(directory: Path) -> list[Path]:
    whole, index = directory / WEIGHTS, directory / INDEX
    if whole.is_file():
        return [whole]
    if index.is_file():
        shards = read_json(index).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else set()
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise InputError(f"{index}: expected a weight_map of tensor names to file names beside it")
        missing = sorted(name for name in names if not (directory / name).is_file())
        if missing:
            raise InputError(f"{index}: names files that are not there: {listing(missing)}")
        return [directory / name for name in sorted(names)]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise InputError(
            f"{directory}: holds weights only as pickle ({listing(pickles)}), which can run code when loaded "
            f"and is not read; transformers' from_pretrained and then save_pretrained write {WEIGHTS}"
        )
    raise InputError(f"{directory}: has no {WEIGHTS}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; anything else is an InputError with the file and, for broken JSON, the line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: broken JSON: not UTF-8 text") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def require_same(
    where: object, expected: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]
) -> None:
    """Equal names and shapes; otherwise one InputError that lists all that is missing, unknown, misshapen."""
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in got]
    unknown = [f"{name} {list(shape)}" for name, shape in got.items() if name not in expected]
    misshapen = [
        f"{name} expected {list(shape)} got {list(got[name])}"
        for name, shape in expected.items()
        if name in got and got[name] != shape
    ]
    groups = {"missing tensors": missing, "unknown tensors": unknown, "misshapen tensors": misshapen}
    faults = [f"{kind}: {listing(names)}" for kind, names in groups.items() if names]
    if faults:
        raise InputError(f"{where}: {'; '.join(faults)}")


def read_tensors(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Reads every tensor as fp32 into memory of its own (not a map of the file).

    Raises:
        InputError: a tensor is not floating point, or holds NaN or infinities (after the cast).
    """
    integers = [f"{name} {each.dtype}" for name, each in stored.items() if each.dtype not in _FLOATS]
    if integers:
        raise InputError(f"{_place(stored)}: expected floating-point tensors, got {listing(integers)}")
    tensors = {}
    for file in {each.file for each in stored.values()}:
        with safe_open(file, framework="pt") as handle:
            for name, each in stored.items():
                if each.file == file:
                    tensors[name] = handle.get_tensor(each.name).to(torch.float32, copy=True)
    require_finite(_place(stored), tensors)
    return tensors


def without_memory(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """What `read_tensors` would return, on the meta device: shapes, and no byte of the files' data."""
    return {name: torch.empty(each.shape, device="meta") for name, each in stored.items()}


def require_finite(where: object, tensors: Mapping[str, Tensor]) -> None:
    """An InputError that lists the tensors with NaN or infinite entries, if any."""
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise InputError(f"{where}: not finite: {listing(bad)}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one safetensors file in fp32, marked as torch's (transformers asks for the mark)."""
    ready = {name: t.detach().to("cpu", torch.float32, copy=True).contiguous() for name, t in tensors.items()}
    save_file(ready, path, metadata={"format": "pt"})


def template(init: Callable[[torch.Generator], Params]) -> Params:
    """The parameters that `init` would make, without their memory: tensors on the meta device."""
    with torch.device("meta"):
        return init(torch.Generator("cpu"))


def listing(names: Iterable[str], *, at_most: int = 8) -> str:
    """A comma-separated list that stays one readable line."""
    names = list(names)
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _place(stored: Mapping[str, Stored]) -> str:
    files = sorted({str(each.file) for each in stored.values()})
    return files[0] if len(files) == 1 else str(Path(files[0]).parent)
