"""What a user may name for a model: a directory, a GGUF file, or a name on the Hugging Face hub.

Whatever it was, a directory comes back, so that nothing behind this page knows of the other two. A GGUF file
is converted once, into $MINIRLHF_CACHE (~/.cache/minirlhf unless set); a name is looked up in the hub's own
cache and downloaded where there is a network.
"""

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

from minirlhf.models.gguf import convert_gguf
from minirlhf.runs import InputError, sha256_of

_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>[\w./-]+))?", re.ASCII)
_FILES = [  # no pickles, no second format of the same weights, nothing in folders
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]
_CONVERTED = "1"  # of the conversion: one more whenever it writes something else


def resolve_model(source: Path | str) -> Path:
    """The directory of the model that a user named.

    Args:
        source: a directory, which is returned as it is; a .gguf file; or a hub name such as
            `HuggingFaceTB/SmolLM2-135M-Instruct`, with `@revision` where it should be a certain one.

    Raises:
        InputError: there is no such thing; says where it was looked for, and what to do.
    """
    path, text = Path(source).expanduser(), str(source)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return _converted(path)
        raise InputError(
            f"{path}: expected a model directory, a .gguf file or a name on the hub, found a file"
        )
    name = _HUB_NAME.fullmatch(text)
    if name is None or text.lower().endswith(".gguf") or ("/" in text and path.parent.is_dir()):
        raise InputError(f"{path}: no such model {'file' if text.lower().endswith('.gguf') else 'directory'}")
    return _from_hub(name["name"], name["revision"])


def _converted(file: Path) -> Path:
    """The directory of a GGUF file, named after its contents: a changed file is converted again."""
    root = Path(os.environ.get("MINIRLHF_CACHE") or "~/.cache/minirlhf").expanduser()
    folder = root / "gguf" / f"{file.stem}-{sha256_of(file)[:16]}-{_CONVERTED}"
    if not folder.is_dir():
        convert_gguf(file, folder)
        print(f"converted {file} into {folder}, which later runs use again", file=sys.stderr)
    return folder


def _from_hub(name: str, revision: str | None) -> Path:
    """A model's files in the hub's cache, downloaded first where that is possible."""
    hub: Any = _hub_library(name)
    try:
        folder = Path(
            # "*/*": many models keep other formats of themselves in folders
            hub.snapshot_download(name, revision=revision, allow_patterns=_FILES, ignore_patterns=["*/*"])
        )
    except Exception as error:  # of the library's own, of its HTTP client's, of the file system
        raise InputError(_why_not(hub, name, revision, error)) from error
    if not any(folder.glob("model*.safetensors")):
        raise InputError(
            f"{name}: has no model.safetensors on the hub or in the cache ({folder}); weights that are only "
            f"pickles can run code when loaded and are not read: transformers' from_pretrained and then "
            f"save_pretrained write safetensors"
        )
    return folder


def _hub_library(name: str) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        raise InputError(
            f"{name}: no such model directory; to get a model by its name on the hub: "
            f"pip install 'minirlhf[data]'"
        ) from error


def _why_not(hub: Any, name: str, revision: str | None, error: Exception) -> str:
    """One line: what was looked for, why it is not there, how to go on."""
    page, errors, wanted = f"https://huggingface.co/{name}", hub.errors, f"@{revision}" if revision else ""
    start = f"{name}{wanted}: no such model directory, and"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{start} the model of this name on the hub is gated: accept its terms at {page}, then "
            f"`hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{start} the model of this name on the hub has no revision {revision}; see {page}/tree/main"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{start} no model of this name on the hub ({page}); if it is private: `hf auth login` or set "
            f"HF_TOKEN"
        )
    elsewhere = (
        f"where there is a network, `hf download {name}{f' --revision {revision}' if revision else ''} "
        f"--local-dir DIR`, bring DIR here and name it instead"
    )
    if type(error).__name__ == "IncompleteSnapshotError":
        return f"{start} only a part of it is in the cache ({hub.constants.HF_HUB_CACHE}); {elsewhere}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = "HF_HUB_OFFLINE is set" if hub.constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        return f"{start} not in the cache ({hub.constants.HF_HUB_CACHE}), and {reason}; {elsewhere}"
    return f"{start} the hub did not give it ({type(error).__name__}: {error}); {elsewhere}"
