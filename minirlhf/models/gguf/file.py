"""A GGUF file, read: its metadata, and its tensors one at a time in fp32.

GGUF is llama.cpp's format: one file with weights (usually quantised), configuration and vocabulary. The
`gguf` package knows the container and every quantisation; this page adds what a user has to be told.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minirlhf.runs import InputError

_MAGIC = b"GGUF"
_PIP = "pip install 'minirlhf[data]'"


class GGUFFile:
    """An open GGUF file.

    Attributes:
        path: of the file.
        metadata: all its entries: Python numbers, strings, booleans and lists of them.
        shapes: of every tensor, in torch's order (the file keeps them reversed).
    """

    def __init__(self, path: Path) -> None:
        """Reads the metadata and the list of tensors; the tensors themselves stay in the file.

        Raises:
            InputError: no such file, not a GGUF file, or one that ends early or is broken.
        """
        self.path = Path(path)
        _check_magic(self.path)
        library = _library("gguf")
        try:
            reader = library.GGUFReader(self.path)
            self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # whatever numpy says of bytes that are not there
            raise InputError(
                f"{self.path}: broken GGUF file, perhaps an unfinished download ({error})"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(int(size) for size in reversed(tensor.shape.tolist()))
            for name, tensor in self._tensors.items()
        }

    def value(self, key: str, kind: type) -> Any:
        """The metadata entry of this name.

        Raises:
            InputError: there is none, or it is of another kind.
        """
        if key not in self.metadata:
            raise InputError(f"{self.path}: expected the metadata entry {key}, found none")
        found = self.metadata[key]
        if kind is float and isinstance(found, float | int):
            return shortest(float(found))
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            raise InputError(f"{self.path}: expected {key} to be of kind {kind.__name__}, found {found!r}")
        return found

    def tensor(self, name: str) -> Tensor:
        """One tensor, dequantised to fp32, in memory of its own.

        Raises:
            InputError: its quantisation is not one that the `gguf` package can undo.
        """
        stored = self._tensors[name]
        try:
            values = _library("gguf.quants").dequantize(stored.data, stored.tensor_type)
        except RuntimeError as error:
            raise InputError(
                f"{self.path}: tensor {name} has the type {stored.tensor_type.name}, which the gguf package "
                f"cannot dequantise; use another quantisation of this model, such as Q8_0 or F16"
            ) from error
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(self.shapes[name]))


def shortest(number: float) -> float:
    """The number that was meant by an fp32 one: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as handle:
            start = handle.read(4)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if start != _MAGIC:
        raise InputError(f"{path}: expected a GGUF file, which starts with {_MAGIC!r}, found {start!r}")


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise InputError(f"reading a GGUF file needs the gguf package: {_PIP}") from error
