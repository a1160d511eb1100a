"""A broken claim as a few lines of Python that a user can run: it fails until the subject is right."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minirlhf.verify.fit import FP64
from minirlhf.verify.kinds import Claim
from minirlhf.verify.probe import Probe


def counter_example(claim: Claim, probe: Probe, *, importing: str) -> str:
    """The script: the subject is imported, called on the case, and asserted on.

    importing: the lines that bind the subject to a name, and that name, separated by the last newline; see
        `target.importing`.
    """
    lines, name = importing.rsplit("\n", 1) if "\n" in importing else ("", importing)
    head = ["import torch", "from torch import nan, inf, tensor", *lines.splitlines(), ""]
    return "\n".join([*head, *_body(claim, probe, name)])


def _body(claim: Claim, probe: Probe, name: str) -> list[str]:
    positional, named = probe.binding.arguments(claim.case)
    parameter = _parameter(probe, claim.wrt)
    text = {key: literal(value) for key, value in named.items()}
    texts = [literal(value) for value in positional]
    before: list[str] = []
    if claim.wrt is not None:
        before = [f"x = {literal(claim.case[claim.wrt])}.requires_grad_()"]
        if isinstance(parameter, int):
            texts[parameter] = "x"
        elif parameter is not None:
            text[parameter] = "x"
    call = [f"got = {name}("]
    call += [f"    {value}," for value in texts]
    call += [f"    {key}={value}," for key, value in text.items()]
    call += [")"]
    if isinstance(claim.got, BaseException):
        message = str(claim.got).strip().splitlines() or [""]
        return [*before, *call, f"# raises {type(claim.got).__name__}: {message[0][:90]}", f"# {claim.why}"]
    return [*before, *call, *_picked(probe, claim), *_asserted(claim, probe)]


def _parameter(probe: Probe, wrt: str | None) -> str | int | None:
    if wrt is None:
        return None
    return probe.binding.names.get(wrt, probe.binding.positions.get(wrt))


def _picked(probe: Probe, claim: Claim) -> list[str]:
    """From the returned object to the number that the claim is about."""
    lines = []
    if probe.binding.pick is not None:
        lines.append("got = pick(got)  # the adapter's choice of result")
    elif isinstance(returned := probe.binding.call(claim.case), int | float):
        lines.append("got = tensor(got, dtype=torch.float64)")
    elif not isinstance(returned, Tensor):
        place = probe.binding.kind.fields.index(claim.field) if claim.field else 0
        lines.append(f"got = got[{place}]")
    if probe.binding.derived:
        lines.append(f"got = got.reshape({list(probe.raw(claim.case).shape)})")
    if probe.binding.layout is not None:
        lines.append(probe.binding.layout.code)
    kind = probe.binding.kind
    mask = kind.mask if kind.mask in claim.case and kind.argument(kind.mask).shape == kind.shape else None
    if mask is not None and probe.per_element and not (claim.field or claim.raw):
        lines.append(f"got = got.where({literal(claim.case[mask])}, 0.0)")
    if claim.wrt is not None:
        lines.append("(got,) = torch.autograd.grad(got.sum(), x)")
    if claim.take:
        lines.append(f"got = got{claim.take}")
    return lines


def _asserted(claim: Claim, probe: Probe) -> list[str]:
    got = claim.got
    assert isinstance(got, Tensor)
    if claim.relation == "holds":
        return [f"# the law: {claim.why}"]
    scale = 1.0 if claim.field else probe.scale
    lines = [f"# got {literal(_shown(got * scale))}", f"# the law: {claim.why}"]
    if claim.relation == "finite":
        return [*lines, "assert got.isfinite().all()"]
    assert claim.want is not None
    lines.append(f"want = {literal(_shown(claim.want * scale))}")
    slack = f"{10 * max(probe.variant.tolerance, FP64 * claim.loose):.0e}"
    if claim.relation == "==":
        return [*lines, f"torch.testing.assert_close(got.double(), want, rtol={slack}, atol={slack})"]
    relation = claim.relation if scale > 0 else {">=": "<=", "<=": ">="}[claim.relation]
    return [*lines, f"assert (got {relation} want {'-' if relation == '>=' else '+'} {slack}).all()"]


def _shown(x: Tensor) -> Tensor:
    """Rounded where that loses nothing a reader wants."""
    rounded = x.double().mul(1e9).round().div(1e9)
    return torch.where(x.isfinite() & (x.abs() > 1e-6), rounded, x.double())


def literal(value: Any) -> str:
    """Python source of a tensor or number; fp64 tensors carry their dtype."""
    if not isinstance(value, Tensor):
        return value.__name__ if isinstance(value, Callable) else repr(value)  # type: ignore[arg-type]
    dtype = f", dtype={value.dtype}" if value.dtype in (torch.float64, torch.bfloat16, torch.float16) else ""
    return f"tensor({value.detach().tolist()!r}{dtype})"
