"""The manifest: what a run was made from, and on."""

import dataclasses
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minirlhf import __version__
from minirlhf.runs.files import sha256_of

_VERSIONED = ("numpy", "safetensors", "tokenizers", "rich", "tyro")


def manifest(
    config: Any,
    seed: int,
    data: Mapping[str, Path | Mapping[str, str]],
    weights: Mapping[str, Path],
    *,
    device: str = "cpu",
) -> dict[str, Any]:
    """What a run was made from and on: everything that one would have to set equal to make it again.

    Args:
        config: the frozen dataclass of the run's settings.
        seed: that every generator of the run was derived from.
        data: files that were read, by name; each is recorded with its SHA-256. What is no file comes with its
            own record, which should say where it was and which version of it.
        weights: model files or directories, likewise.
        device: what the tensors lived on, as torch names it.
    """
    cuda = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return {
        "seed": seed,
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "data": {name: _file(p) if isinstance(p, Path) else dict(p) for name, p in data.items()},
        "weights": {name: _file(p) for name, p in weights.items()},
        "versions": {
            "minirlhf": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # it names the build, which its package does not always
            **{name: _version(name) for name in _VERSIONED},
        },
        "platform": platform.platform(),
        "machine": platform.machine(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if cuda else platform.processor() or "unknown",
        "threads": torch.get_num_threads(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _file(path: Path) -> dict[str, str]:
    return {"path": str(path), "sha256": sha256_of(path)}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
