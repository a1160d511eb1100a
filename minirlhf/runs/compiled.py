"""C++ that is compiled on first use with the user's compiler, and kept in the user's cache."""

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def compiler() -> list[str]:
    """The command of the C++ compiler: `CXX`, or `c++`.

    Raises:
        OSError: there is none.
    """
    command = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(command[0]) is None:
        raise OSError(f"there is no C++ compiler {command[0]!r}")
    return command


def kept_library(
    name: str, steps: Sequence[Sequence[str]], sources: Sequence[Path], *, also: str = ""
) -> Path:
    """The shared library that these commands make, made if it is not in the cache yet.

    Args:
        name: what its file's name begins with. The last step writes to a file of this name.
        steps: commands, which run in a folder of their own.
        sources: whose text the result depends on.
        also: what else it depends on.

    Raises:
        OSError: the cache cannot be written to.
        subprocess.CalledProcessError: a command failed; its stderr says why.
    """
    recipe = [*(" ".join(step) for step in steps), *(each.read_text() for each in sources), also]
    key = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minirlhf"
    target = folder / f"{name}-{key}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as room:
        for step in steps:
            subprocess.run(step, cwd=room, capture_output=True, text=True, check=True)
        (Path(room) / name).replace(target)
    return target
