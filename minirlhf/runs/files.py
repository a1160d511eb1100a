"""Files and directories that appear whole or not at all, and their fingerprints."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """A mistake of the user's: a file, flag, column or checkpoint. The command line prints it as one line."""


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields an empty directory beside `path`, which takes the place of `path` when the block ends well.

    When the block raises, `path` is as it was before and nothing is left beside it. When the process dies,
    `path` is still as it was (or, in the instant between two renames, stands beside it as `.NAME.old-…`).

    Raises:
        InputError: `path` is a file, holds the working directory, or its parent cannot be written.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: expected a directory to write, found a file")
    if Path.cwd().is_relative_to(path):
        raise InputError(f"{path}: would replace the working directory or one above it; name a new directory")
    missing = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush_to_disk(file)
        _replace_directory(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()  # only if still empty
        raise


def write_text_atomic(path: Path, text: str) -> None:
    """Writes a UTF-8 file under another name and renames it, so that no reader ever sees half of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_text_atomic` of indented JSON. A number that is not finite is an error: JSON has none."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _flush_to_disk(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _replace_directory(source: Path, target: Path) -> None:
    if not target.exists():
        os.rename(source, target)
        return
    old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
    os.rename(target, old)
    try:
        os.rename(source, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, or of a directory: of its files' relative names and digests, in sorted order."""
    path = Path(path)
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_of(file)}\n".encode())
        return digest.hexdigest()
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
