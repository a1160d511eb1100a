"""A page made of a few lines, and what the operators make of it."""

import types
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mutation.mutants import Mutant, page_mutants
from mutation.pages import Page, page_of

HEAD = "def f(x: Tensor, y: Tensor, mask: Tensor, tokens: Tensor, n: int, a: float) -> Tensor:\n"


def page(source: str) -> Page:
    """The page of a module that nobody has imported."""
    module = types.ModuleType("snippet")
    vars(module).update(torch=torch, Tensor=Tensor, F=F, token_sum=None, token_mean=None)
    exec(source, vars(module))
    return page_of(module, Path("snippet.py"), source)


def mutants(source: str) -> list[Mutant]:
    return list(page_mutants(page(source)))


def changes(body: str, operator: str, *, head: str = HEAD) -> set[str]:
    """What an operator makes of the statements of a function: the changed lines."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return {mutant.after for mutant in mutants(head + lines) if mutant.operator == operator}
