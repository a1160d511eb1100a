"""Puts a mutant into the living module, and takes it out again.

Not the names are replaced but what the functions run: whoever has imported a function runs the mutant too.
"""

import contextlib
import importlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

from mutation.mutants import Mutant


@contextlib.contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """The module behaves as the mutant inside the block, and as before after it."""
    module = importlib.import_module(mutant.module)
    namespace = dict(vars(module))
    exec(mutant.code, namespace)  # defines the one function, class or constant that the mutant changes
    undo: list[tuple[Any, str, Any]] = []
    try:
        for name, new in namespace.items():
            if name == "__builtins__" or vars(module).get(name) is new:
                continue
            _replace(module, name, new, undo)
        yield
    finally:
        for owner, name, old in reversed(undo):
            setattr(owner, name, old)


def _replace(owner: Any, name: str, new: Any, undo: list[tuple[Any, str, Any]]) -> None:
    old = vars(owner).get(name)
    if isinstance(old, type) and isinstance(new, type):
        for inner, value in vars(new).items():
            if _plain(value) is not None and _plain(vars(old).get(inner)) is not None:
                _replace(old, inner, value, undo)
    elif (living := _plain(old)) is not None and (wrong := _plain(new)) is not None:
        for field in ("__code__", "__defaults__", "__kwdefaults__"):
            undo.append((living, field, getattr(living, field)))
            setattr(living, field, getattr(wrong, field))
    else:
        undo.append((owner, name, old))
        setattr(owner, name, new)


def _plain(value: Any) -> types.FunctionType | None:
    """The function below static methods, class methods and decorators that say what they wrap."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, types.FunctionType) else None
