"""Low-rank adapters: a linear layer learns a matrix of rank r beside its weight, which stays as it is.

    y = x W + b + (α/r) (x Aᵀ) Bᵀ        A [r, in] random, B [out, r] = 0: at first nothing changes

Hu et al. 2021, "LoRA" (arXiv:2106.09685), section 4.1. The adapters are parameters of their own, nested like
the model's; `joined` puts them beside the weights of a base, as a pure function of both. W + ΔW is never
formed in training (that would cost the full-size copies and gradients that adapters save): an adapted weight
is a stand-in that computes its product in two parts. There is no dropout before A: log-probs are compared.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from minirlhf.kernels import products
from minirlhf.models.families import family_of
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.models.stand_in import StandIn
from minirlhf.models.tensor_files import listing, named
from minirlhf.runs import InputError

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer of the blocks."""

DOWN, UP, SCORE = "lora_A", "lora_B", "score"


class Adapted(StandIn):
    """A weight W with ΔW = scale · B A beside it.

    down: A [r, in]. up: B [out, r]. outputs_first: whether W is stored [out, in].
    """

    def __init__(self, weight: Tensor, down: Tensor, up: Tensor, scale: float, outputs_first: bool) -> None:
        super().__init__(weight)
        self.down, self.up, self.scale, self.outputs_first = down, up, scale, outputs_first

    def product(self, x: Tensor, bias: Tensor | None, *, outputs_first: bool) -> Tensor:
        assert outputs_first == self.outputs_first, "a family's page multiplies as its family stores"
        if outputs_first:
            y = products.linear(x, self.weight, bias)
        else:
            assert bias is not None
            y = products.addmm(bias, x, self.weight)
        low = x.reshape(-1, x.shape[-1]) @ self.down.T  # [N, r]
        return torch.addmm(y.reshape(len(low), -1), low, self.up.T, alpha=self.scale).view(y.shape)

    def dense(self) -> Tensor:
        """W + ΔW in the layout of W; added in at least fp32."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        up, down = self.up.to(wide), self.down.to(wide)
        factors = (up, down) if self.outputs_first else (down.T, up.T)
        return torch.addmm(self.weight.to(wide), *factors, alpha=self.scale).to(self.weight.dtype)


def linear_layers(params: Params) -> list[str]:
    """The linear layers of the blocks by their names, as `h.0.attn.c_attn`: all that adapters can go to."""
    found = []
    for name, leaf in named(params).items():
        if leaf.ndim == 2 and name.endswith(".weight") and re.search(r"\.\d+\.", name):
            found.append(name.removesuffix(".weight"))
    return found


def targeted(params: Params, targets: Sequence[str], *, prefix: str = "") -> list[str]:
    """The linear layers that `targets` name, by PEFT's rule: a layer's whole name, or the end of it.

    Args:
        targets: such as "c_attn" or "mlp.c_proj"; or "all-linear".
        prefix: what a whole name may begin with, as "transformer.".

    Raises:
        InputError: a target names no linear layer; lists those that there are.
    """
    layers = linear_layers(params)
    found: set[str] = set()
    for target in targets:
        hit = {
            layer for layer in layers if target == ALL_LINEAR or f".{prefix}{layer}".endswith(f".{target}")
        }
        if not hit:
            known = dict.fromkeys(layer.rpartition(".")[2] for layer in layers)
            raise InputError(
                f"adapter targets: no linear layer of the blocks is called {target!r}; known: "
                f"{ALL_LINEAR}, {listing(known)}"
            )
        found |= hit
    return [layer for layer in layers if layer in found]


def adapter_params(
    model: LanguageModel, params: Params, *, rank: int, targets: Sequence[str], generator: torch.Generator
) -> Params:
    """Fresh adapters for these parameters: A ~ U(±1/√in), as PEFT draws it, B = 0.

    A scalar head, where there is one, is copied: it is trained in full beside the adapters.

    Args:
        params: with [in, out] or [out, in] weights, as the model's family has them.
        rank: r, at least 1.
        targets: which linear layers; see `targeted`.
        generator: CPU generator of A; advanced.

    Returns:
        Nested like `params`, with `lora_A.weight` [r, in] and `lora_B.weight` [out, r] in each adapted layer.

    Raises:
        InputError: a target names no layer, or the rank exceeds a layer's width.
    """
    chosen = set(targeted(params, targets))

    def of(node: Any, path: str) -> Any:
        if isinstance(node, list):
            return [of(child, f"{path}.{i}") for i, child in enumerate(node)]
        if path in chosen:
            return _fresh(node["weight"], path)
        inner = {key: of(child, f"{path}.{key}" if path else key) for key, child in _branches(node)}
        return {key: child for key, child in inner.items() if child}

    def _fresh(weight: Tensor, path: str) -> Params:
        out, width = weight.shape if family_of(model).outputs_first else reversed(weight.shape)
        if not 1 <= rank <= min(out, width):
            raise InputError(f"adapter_rank must lie in 1..{min(out, width)} for {path}, got {rank}")
        down = (2 * torch.rand(rank, width, generator=generator) - 1) / width**0.5
        return {DOWN: {"weight": down.to(weight)}, UP: {"weight": weight.new_zeros(out, rank)}}

    adapters = of(params, "")
    return adapters | {SCORE: tree_map(torch.clone, params[SCORE])} if SCORE in params else adapters


def joined(base: Params, adapters: Params, *, scale: float, outputs_first: bool) -> Params:
    """The parameters of a model whose weights are the base's and whose adapters are these.

    Nothing is copied: adapted weights become `Adapted`, all others are the base's own tensors.

    Args:
        adapters: nested as `adapter_params` makes them; a tensor in them takes the place of the base's.
        scale: α/r.
        outputs_first: whether the family stores linear weights as [out, in].
    """

    def of(node: Any, part: Any) -> Any:
        if isinstance(part, Tensor):
            return part
        if isinstance(part, list):
            return [of(child, more) for child, more in zip(node, part, strict=True)]
        if DOWN in part:
            a, b = part[DOWN]["weight"], part[UP]["weight"]
            return node | {"weight": Adapted(node["weight"], a, b, scale, outputs_first)}
        return node | {key: of(node.get(key, {}), more) for key, more in part.items()}

    return of(base, adapters)


def merged(params: Params) -> Params:
    """The same model without adapters: every `Adapted` weight is W + ΔW; all other tensors are shared."""
    return tree_map(lambda leaf: leaf.dense() if isinstance(leaf, Adapted) else leaf, params)


def adapted_layers(params: Params) -> dict[str, Adapted]:
    """The adapted weights of joined parameters by the names of their layers; {} where there is none."""

    def walk(node: Any, path: str) -> Iterator[tuple[str, Adapted]]:
        if isinstance(node, Adapted):
            yield path.removesuffix(".weight"), node
        elif isinstance(node, dict | list):
            for key, child in node.items() if isinstance(node, dict) else enumerate(node):
                yield from walk(child, f"{path}.{key}" if path else str(key))

    return dict(walk(params, ""))


def _branches(node: Params) -> list[tuple[str, Any]]:
    return [(key, child) for key, child in node.items() if isinstance(child, dict | list)]
