"""A tiny GPT-2, ragged examples and pairs, and slow independent oracles, for the tests of the stages."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from minirlhf.data.records import Example, PairExample, join
from minirlhf.models import gpt2
from minirlhf.models.interface import LanguageModel, Params, with_scalar_head

EOS = 3
VOCAB = 11
MODEL = gpt2.bind(
    gpt2.GPT2Config(
        vocab_size=VOCAB,
        n_positions=14,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        eos_token_id=EOS,
    )
)

# Unequal prompts and responses; an EOS inside a prompt; one row that breaks off; one at the full context.
EXAMPLES = [
    join([5], [EOS]),
    join([1, 2], [4, 6, 7, EOS]),
    join([7, EOS, 4, 6], [2, 2]),
    join([6, 1, 1, 1, 0], [9, 8, 10, 0, 1, 2, 4, 5, EOS]),
    Example([8, 2, 7, 1, 4, 9, EOS], [False, True, True, False, False, True, True], 1),
]
PAIRS = [
    PairExample(join([5], [4, 6, EOS]), join([5], [EOS])),
    PairExample(join([1, 2], [4, EOS]), join([1, 2], [6, 7, 8, 9, 10, 0])),
    PairExample(join([7, EOS, 4, 6], [2]), join([7, EOS, 4, 6], [0, 2, EOS])),
    PairExample(join([6, 1, 1, 1, 0], [9, 8, 10, 0, 1, 2, 4, 5, EOS]), join([6, 1, 1, 1, 0], [9, EOS])),
    PairExample(join([2, 2, 8], [10, 1, EOS]), join([2, 2, 8], [1, 10, EOS])),
]


def fresh(seed: int = 0) -> Params:
    return MODEL.init(torch.Generator().manual_seed(seed))


def fresh_reward(seed: int = 0) -> Params:
    return with_scalar_head(MODEL, fresh(seed), generator=torch.Generator().manual_seed(seed + 1))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaves(params: Params) -> list[Tensor]:
    return pytree.tree_leaves(params)


def snapshot(params: Params) -> list[Tensor]:
    return [leaf.clone() for leaf in leaves(params)]


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_trees_close(a: Any, b: Any, *, share: float = 1e-6) -> None:
    """Equal up to `share` of the largest entry of either tree."""
    x, y = (torch.cat([leaf.flatten().double() for leaf in pytree.tree_leaves(tree)]) for tree in (a, b))
    assert float((x - y).abs().max()) <= share * max(float(x.abs().max()), float(y.abs().max()))


def token_logps(params: Params, example: Example) -> list[float]:
    """log π of each token under the mask: one row, no padding, one scalar loop over positions."""
    hidden = MODEL.hidden(params, torch.tensor([example.ids]))[0].double()
    logits = (hidden @ MODEL.unembedding(params).double().T).tolist()
    found = []
    for t, counts in enumerate(example.mask):
        if counts:
            row = logits[t - 1]
            top = max(row)
            found.append(row[example.ids[t]] - top - math.log(sum(math.exp(x - top) for x in row)))
    return found


def logp(params: Params, example: Example) -> float:
    return sum(token_logps(params, example))


def reward(params: Params, example: Example) -> float:
    """The head on the state after the last token: one row, no padding."""
    state = MODEL.hidden(params, torch.tensor([example.ids]))[0, -1]
    return sum(h * w for h, w in zip(state.tolist(), params["score"]["weight"][0].tolist(), strict=True))


def free_states(tokens: Tensor, dim: int) -> tuple[LanguageModel, Params]:
    """A model whose hidden states are its parameters and and its logits too: ∂/∂states = ∂/∂logits."""
    states = torch.randn(*tokens.shape, dim, generator=generator(7))
    model = MODEL._replace(
        states=lambda params, tokens, at, attend: params["states"], unembedding=lambda params: torch.eye(dim)
    )
    return model, {"states": states, "score": {"weight": torch.ones(1, dim)}}
