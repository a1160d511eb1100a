"""A planted mutant is seen by whoever imported the function, and is gone afterwards."""

import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mutation.mutants import Mutant, page_mutants
from mutation.pages import page_of
from mutation.patch import planted

SOURCE = """
import functools

LIMIT = 3


def double(x, *, times=2):
    return x * times


def below(x):
    return x < LIMIT


def wrapped(function):
    @functools.wraps(function)
    def inner(*args):
        return function(*args) + 0

    return inner


@wrapped
def decorated(x):
    return x - 1


class Box:
    @staticmethod
    def opened(x):
        return x + 1

    def closed(self, x):
        return x + 2


def broken(x):
    return [x for _ in range(LIMIT)][1]
"""


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    made = types.ModuleType("planting_ground")
    exec(compile(SOURCE, "planting_ground.py", "exec"), vars(made))
    sys.modules["planting_ground"] = made
    yield made
    del sys.modules["planting_ground"]


def mutant(module: types.ModuleType, after: str) -> Mutant:
    found = [m for m in page_mutants(page_of(module, Path("planting_ground.py"), SOURCE)) if after in m.after]
    assert found, f"no mutant has {after!r}"
    return found[0]


def state(module: types.ModuleType) -> list[Any]:
    """Everything that planting could leave behind."""
    functions = [
        module.double,
        module.below,
        inspect.unwrap(module.decorated),
        module.Box.opened,
        module.Box.closed,
    ]
    fields = [(f.__code__, f.__defaults__, f.__kwdefaults__) for f in functions]
    return [dict(vars(module)), dict(vars(module.Box)), fields]


@pytest.mark.parametrize(
    ("after", "call", "right", "wrong"),
    [
        ("times=3", lambda m: m.double(5), 10, 15),
        ("LIMIT = 4", lambda m: m.below(3), False, True),
        ("return x <= LIMIT", lambda m: m.below(3), False, True),
        ("return x - 2", lambda m: m.decorated(5), 4, 3),
        ("return x + 0", lambda m: m.Box.opened(5), 6, 5),
        ("return x + 3", lambda m: m.Box().closed(5), 7, 8),
        ("[0]", lambda m: m.broken(5), 5, 5),
    ],
)
def test_a_mutant_is_what_runs_inside_the_block_only(
    module: types.ModuleType, after: str, call: Any, right: Any, wrong: Any
) -> None:
    before = state(module)
    assert call(module) == right
    with planted(mutant(module, after)):
        assert call(module) == wrong
    assert call(module) == right and state(module) == before


def test_who_imported_the_function_before_sees_the_mutant_too(module: types.ModuleType) -> None:
    imported = module.below
    with planted(mutant(module, "return x <= LIMIT")):
        assert imported(3) is True
        assert imported is module.below
    assert imported(3) is False


def test_the_module_is_restored_when_a_test_raises(module: types.ModuleType) -> None:
    before = state(module)
    with pytest.raises(KeyError), planted(mutant(module, "times=3")):
        raise KeyError
    assert state(module) == before


def test_our_own_modules_are_restored_by_every_kind_of_mutant() -> None:
    from minirlhf.rollout import draw
    from mutation.mutants import mutants_of

    def pictures() -> list[Any]:
        functions = (draw.inverse_cdf, draw.check_law, draw._first_total)
        return [dict(vars(draw)), [(f.__code__, f.__defaults__, f.__kwdefaults__) for f in functions]]

    before = pictures()
    for each in mutants_of("minirlhf.rollout.draw"):
        with planted(each):
            assert pictures() != before
        assert pictures() == before
