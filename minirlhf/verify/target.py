"""Where a subject comes from: `module:function`, `path/to/file.py:function`, or a function at hand."""

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minirlhf.verify.subject import SubjectError

_PREFIX = "minirlhf_subject_"


def load(target: str) -> Callable[..., Any]:
    """The function that a target names.

    Raises:
        SubjectError: as `named`, or it is no function.
    """
    found = named(target)
    if not callable(found):
        raise SubjectError(f"{target} is a {type(found).__name__}, expected a function")
    return found


def named(target: str) -> Any:
    """Whatever a target names.

    Raises:
        SubjectError: the target is malformed, the file or module is missing or fails to import, or there is
            no such name in it; it says what, and at which line of the user's file.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise SubjectError(f"expected module:function or path/to/file.py:function, got {target!r}")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_name(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else f"; it has {', '.join(known) or 'no functions'}"
            raise SubjectError(f"{place} has no {name!r}{hint}")
        found = getattr(found, part)
    return found


def importing(fn: Callable[..., Any]) -> str:
    """Lines that bind the function to a name in a fresh interpreter, and, as the last line, that name."""
    name, module = getattr(fn, "__qualname__", ""), getattr(fn, "__module__", None) or ""
    if not name or "<" in name or not module or module == "__main__":
        return (
            f"# {name or 'subject'} = ...  the function that was certified, which cannot be imported\nsubject"
        )
    top = name.split(".")[0]
    if module.startswith(_PREFIX):
        path = Path(inspect.getfile(sys.modules[module])).resolve()
        return f"import sys\nsys.path.insert(0, {str(path.parent)!r})\nfrom {path.stem} import {top}\n{name}"
    return f"from {module} import {top}\n{name}"


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise SubjectError(f"{path}: no such file")
    name = _PREFIX + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))  # its own neighbours, as when it is run
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # also SystemExit: a script that was not meant to be imported
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise SubjectError(_import_failure(str(path), error)) from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _from_name(name: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; the console script would not
    try:
        return importlib.import_module(name)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise SubjectError(_import_failure(name, error)) from error
    finally:
        sys.path.remove(str(Path.cwd()))


def _import_failure(place: str, error: BaseException) -> str:
    """What stopped the import, and the innermost line of the user's own code."""
    line, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "importlib" not in file and not file.startswith("<") and "minirlhf/verify" not in file:
            line = f" (line {trace.tb_lineno} of {file})"
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        line = f" (line {error.lineno} of {error.filename})"
    return f"importing {place} failed: {type(error).__name__}: {error}{line}"
