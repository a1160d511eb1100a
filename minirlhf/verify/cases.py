"""The inputs that a subject is tried on: drawn by Hypothesis, so that they shrink, and a few generic ones.

Drawn numbers are multiples of 1/8: exact in every dtype, short to print. The generic ones have full
mantissas, so that nothing holds by accident.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minirlhf.verify.kinds import Argument, Case, Counts, Flags, Kind, Mask, Numbers, Reals

SIZES = {"B": (1, 3), "T": (1, 4), "V": (2, 4), "P": (1, 2), "G": (2, 4), "K": (2, 4), "N": (2, 4)}
GENERIC_SIZES = (
    {"B": 3, "T": 5, "V": 4, "P": 2, "G": 4, "K": 4, "N": 6},
    {"B": 4, "T": 4, "V": 4, "P": 3, "G": 3, "K": 4, "N": 4},  # square: a wrong axis raises no error here
    {"B": 2, "T": 7, "V": 5, "P": 1, "G": 8, "K": 3, "N": 5},
    {"B": 5, "T": 3, "V": 3, "P": 4, "G": 2, "K": 2, "N": 3},
    {"B": 1, "T": 6, "V": 6, "P": 2, "G": 5, "K": 5, "N": 7},
)
_QUIET = settings(
    database=None,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
_DRAWN = 20
_ALL_FEATURES = 3  # the number of the generic case that uses every optional argument


def strategy(kind: Kind) -> st.SearchStrategy[Case]:
    """Cases of a kind, small ones first; every feature is used in about half of them."""

    @st.composite
    def case(draw: st.DrawFn) -> Case:
        size = {letter: draw(st.integers(*_range(kind, letter))) for letter in _letters(kind)}
        drawn: Case = {}
        for argument in kind.arguments:
            if argument.optional and not draw(st.booleans()):
                continue
            drawn[argument.name] = draw(_values(argument, tuple(size[a] for a in argument.shape)))
        return kind.arrange(drawn)

    return case()


def pool(kind: Kind) -> tuple[Case, ...]:
    """The cases that every law of a kind is tried on, the same in every process; drawn once."""
    if kind.name not in _POOLS:
        _POOLS[kind.name] = (*kind.extra_cases(), *generic(kind), *_drawn(kind))
    return _POOLS[kind.name]


_POOLS: dict[str, tuple[Case, ...]] = {}


def _drawn(kind: Kind) -> list[Case]:
    found: list[Case] = []

    @settings(_QUIET, max_examples=_DRAWN, phases=(Phase.generate,))
    @given(strategy(kind))
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


def generic(kind: Kind) -> list[Case]:
    """Five cases with full mantissas and fixed sizes; features are used in turn, once all together."""
    cases = []
    for number, sizes in enumerate(GENERIC_SIZES):
        generator = torch.Generator().manual_seed(1000 + number)
        case: Case = {}
        for place, argument in enumerate(kind.arguments):
            if argument.optional and (number + place) % 2 and number != _ALL_FEATURES:
                continue
            shape = tuple(_clipped(kind, letter, sizes[letter]) for letter in argument.shape)
            case[argument.name] = _generic_value(argument, shape, generator, number)
        cases.append(kind.arrange(case))
    return cases


def smallest(kind: Kind, breaks: Callable[[Case], bool], *, attempts: int) -> Case | None:
    """The smallest case that Hypothesis finds for which `breaks` is true; None where it finds none."""
    try:
        return find(
            strategy(kind),
            breaks,
            settings=settings(_QUIET, max_examples=attempts, phases=(Phase.generate, Phase.shrink)),
        )
    except (
        Exception
    ):  # NoSuchExample, or Flaky where the time ran out in between: the caller has its own best
        return None


def size_of(case: Case) -> tuple[int, float]:
    """How large a case is to a reader: numbers to read, then their digits."""
    count, digits = 0, 0.0
    for value in case.values():
        numbers = value.reshape(-1).tolist() if isinstance(value, Tensor) else [value]
        count += len(numbers)
        digits += sum(len(repr(number)) for number in numbers)
    return count, digits


def key_of(case: Case) -> str:
    """The same for equal cases, and cheap."""
    return str([(name, v.tolist() if isinstance(v, Tensor) else v) for name, v in case.items()])


def _letters(kind: Kind) -> list[str]:
    return sorted({letter for argument in kind.arguments for letter in argument.shape})


def _range(kind: Kind, letter: str) -> tuple[int, int]:
    return kind.sizes.get(letter, SIZES[letter])


def _clipped(kind: Kind, letter: str, size: int) -> int:
    """A generic size, kept at what the kind allows at least."""
    return max(size, kind.sizes[letter][0]) if letter in kind.sizes else size


def _values(argument: Argument, shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    domain, count = argument.domain, int(torch.Size(shape).numel())
    if isinstance(domain, Numbers):
        return st.sampled_from(domain.choices)
    if isinstance(domain, Mask):
        return _windows(shape)
    if isinstance(domain, Flags):
        return _tensor(st.booleans(), count, shape, torch.bool)
    if isinstance(domain, Counts):
        return _tensor(st.integers(domain.low, domain.high), count, shape, torch.int64)
    element = _eighths(domain)
    return _tensor(element, count, shape, torch.float64)


def _eighths(domain: Reals) -> st.SearchStrategy[float]:
    least, most = int(domain.low * 8), int(domain.high * 8)
    plain = st.integers(least, most).map(lambda n: n / 8)
    return plain | st.sampled_from(domain.special) if domain.special else plain


def _tensor(
    element: st.SearchStrategy[Any], count: int, shape: tuple[int, ...], dtype: torch.dtype
) -> st.SearchStrategy[Tensor]:
    values = st.lists(element, min_size=count, max_size=count)
    return values.map(lambda numbers: torch.tensor(numbers, dtype=dtype).reshape(shape))


@st.composite
def _windows(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """[B, T] bool, one window of at least one True per row."""
    *_, length = shape
    mask = torch.zeros(shape, dtype=torch.bool)
    for row in mask.reshape(-1, length):
        start = draw(st.integers(0, length - 1))
        row[start : draw(st.integers(start + 1, length))] = True
    return mask


def _generic_value(
    argument: Argument, shape: tuple[int, ...], generator: torch.Generator, number: int
) -> Any:
    domain = argument.domain
    if isinstance(domain, Numbers):
        return domain.choices[number % len(domain.choices)]
    if isinstance(domain, Mask):
        return _generic_mask(shape, generator)
    if isinstance(domain, Flags):
        return torch.rand(shape, generator=generator) < 0.5
    if isinstance(domain, Counts):
        return torch.randint(domain.low, domain.high + 1, shape, generator=generator)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    values = domain.low + (domain.high - domain.low) * uniform
    if domain.special:
        pick = torch.randint(len(domain.special), shape, generator=generator)
        special = torch.tensor(domain.special, dtype=torch.float64)[pick]
        values = torch.where(torch.rand(shape, generator=generator) < 0.25, special, values)
    return values


def _generic_mask(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Unequal windows; one row reaches the last column, one is a single token where there are three."""
    *_, length = shape
    mask = torch.zeros(shape, dtype=torch.bool)
    for number, row in enumerate(mask.reshape(-1, length)):
        start = int(torch.randint(0, max(1, length // 2), (), generator=generator))
        stop = (
            length
            if number == 0
            else start + 1 + int(torch.randint(0, length - start, (), generator=generator))
        )
        row[start : start + 1 if number == 2 else stop] = True
    return mask
