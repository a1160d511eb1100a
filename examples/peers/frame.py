"""What the pages share: what a subject is, and how a page of a library is loaded."""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import io
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Page(NamedTuple):
    """A module of a library.

    unused: what the page imports and the functions that are called here do not use (a package for GPUs, a
        logger): where the page does not import, something empty stands in for it while it is imported again.
    skipped: packages whose own code is passed over then: pages whose package needs a GPU are loaded alone.
    """

    name: str
    unused: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


class Subject(NamedTuple):
    """One function of theirs, and what to say to `certify` about it.

    library: the distribution. function: its name on the page; further words after a space or comma say which
        of its modes or results is meant.
    call: a function of ours that calls it as its library does, in the arguments of the kind; None: it is
        certified itself.
    adapter: further keywords of `certify`.
    """

    library: str
    function: str
    kind: str
    page: Page
    call: Callable[..., Any] | None = None
    adapter: Mapping[str, Any] = {}


class Unavailable(Exception):
    """A subject that cannot be had here: why."""


def found(subject: Subject) -> Callable[..., Any]:
    """The function to certify.

    Raises:
        Unavailable: the library is not installed, does not import, or has no such function.
    """
    theirs: Any = load(subject.page)
    for part in re.split("[ ,]", subject.function)[0].split("."):
        theirs = getattr(theirs, part, None)
    if theirs is None:
        raise Unavailable(OTHER_RELEASE)
    return subject.call or theirs


NOT_INSTALLED, OTHER_RELEASE = "not installed", "not in this release"
_LOADED: dict[str, types.ModuleType | Unavailable] = {}


def load(page: Page) -> Any:
    """The module of a page, imported once: as usual, else without what it does not use, else alone.

    Raises:
        Unavailable: it could not be imported; the message is that of the usual import.
    """
    if page.name not in _LOADED:
        _LOADED[page.name] = _imported(page)
    module = _LOADED[page.name]
    if isinstance(module, Unavailable):
        raise module
    return module


def _imported(page: Page) -> types.ModuleType | Unavailable:
    top = page.name.partition(".")[0]
    if sys.modules.get(top) is None and importlib.util.find_spec(top) is None:
        return Unavailable(NOT_INSTALLED)
    complaint: BaseException | None = None
    for unused, skipped in dict.fromkeys([((), ()), (page.unused, ()), (page.unused, page.skipped)]):
        try:
            with _standing_in(unused), _passing_over(skipped), _quiet():
                return importlib.import_module(page.name)
        except (Exception, SystemExit) as error:  # of a stranger's module
            complaint = complaint or error
            if isinstance(error, ModuleNotFoundError) and f"{page.name}.".startswith(f"{error.name}."):
                return Unavailable(OTHER_RELEASE)
    lines = str(complaint).strip().splitlines() or [""]
    return Unavailable(f"does not import here: {type(complaint).__name__}: {lines[0]}")


@contextlib.contextmanager
def _passing_over(packages: tuple[str, ...]) -> Iterator[None]:
    """These packages are empty, but their modules can be imported."""
    paths = {}
    for package in packages:
        top, *parts = package.split(".")
        spec = importlib.util.find_spec(top)
        assert spec is not None and spec.submodule_search_locations is not None
        paths[package] = [str(Path(spec.submodule_search_locations[0], *parts))]
    with _registered(paths):
        yield


@contextlib.contextmanager
def _standing_in(names: tuple[str, ...]) -> Iterator[None]:
    """Something empty, of which any name can be imported, for these modules."""
    with _registered({name: [] for name in names}):
        for name in names:
            sys.modules[name].__getattr__ = _anything
        yield


def _anything(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return object


@contextlib.contextmanager
def _registered(paths: Mapping[str, list[str]]) -> Iterator[None]:
    """Empty packages of these names and paths, for a while, in place of what is imported under the names."""
    before = {name: sys.modules.get(name) for name in paths}
    for name, path in paths.items():
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.modules[name].__path__ = path
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What they print while they are imported is about them."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):
            yield


def with_attributes(**attributes: Any) -> types.SimpleNamespace:
    """An object that only has these: the `self` or `config` of a method that reads nothing else."""
    return types.SimpleNamespace(**attributes)


def by_group(estimate: Callable[[Tensor, Tensor, Any], Tensor], reward: Tensor, mask: Tensor) -> Tensor:
    """Advantages [P, G] from an estimator of responses in one list, each with the number of its prompt.

    estimate: (rewards [N, 1], mask [N, 1], prompt numbers [N]) -> advantages [N, 1]; a response is one token.
    Unscored samples are left out of the list.
    """
    prompt = torch.arange(len(reward)).unsqueeze(1).expand_as(reward)[mask]
    listed = reward[mask].unsqueeze(1)
    advantage = torch.zeros_like(reward)
    advantage[mask] = estimate(listed, torch.ones_like(listed), prompt.numpy()).squeeze(1).to(reward.dtype)
    return advantage


def placed_on_last(score: Tensor, mask: Tensor) -> Tensor:
    """The score [B] of each sequence on the last of its tokens that count, [B, T]: 0 elsewhere."""
    slot = torch.arange(mask.shape[1])
    last = (slot * mask).amax(1)
    return torch.where((slot == last.unsqueeze(1)) & mask.bool(), score.unsqueeze(1), 0.0)


def right_aligned(mask: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """(to, back): moves columns so that the last token that counts is in the last column, and back.

    For estimators of libraries that pad on the left only.
    """
    slot, width = torch.arange(mask.shape[1]), mask.shape[1]
    free = width - 1 - (slot * mask).amax(1, keepdim=True).long()
    return (
        lambda x: x.gather(1, (slot - free) % width),
        lambda x: x.gather(1, (slot + free) % width),
    )
