"""A language of 15 sequences, small enough to take every expectation exactly.

Tokens 0 = EOS, 1, 2; a sequence ends at its first EOS or is cut at 3 tokens. A policy is a table of logits,
one row for each of the 7 prefixes. Logits and rewards have closed forms.
"""

import itertools
import math

import torch
from torch import Tensor

LENGTH, VOCABULARY = 3, 3


def _sequences() -> list[tuple[int, ...]]:
    words = [
        prefix + (0,) for n in range(LENGTH) for prefix in itertools.product(range(1, VOCABULARY), repeat=n)
    ]
    return words + list(itertools.product(range(1, VOCABULARY), repeat=LENGTH))


PREFIXES = [p for n in range(LENGTH) for p in itertools.product(range(1, VOCABULARY), repeat=n)]
SEQUENCES = _sequences()
MASK = torch.tensor([[t < len(s) for t in range(LENGTH)] for s in SEQUENCES])
TOKENS = torch.tensor([[*s, *[0] * (LENGTH - len(s))] for s in SEQUENCES])
STATES = torch.tensor(
    [[PREFIXES.index(s[:t]) if t < len(s) else 0 for t in range(LENGTH)] for s in SEQUENCES]
)
"""[15, 3] which prefix stands before each token (0 under the mask)."""

REWARD = torch.tensor(
    [1.5 * math.sin(1.7 * i) + 0.5 * math.cos(0.3 * i * i) for i in range(len(SEQUENCES))],
    dtype=torch.float64,
)
REFERENCE = torch.tensor(
    [[0.8 * math.sin(0.7 + 1.3 * k + 2.1 * v) for v in range(VOCABULARY)] for k in range(len(PREFIXES))],
    dtype=torch.float64,
)
"""[7, 3] logits of the reference policy."""


def another_policy() -> Tensor:
    """[7, 3] logits of a policy well away from the reference."""
    shift = [[1.2 * math.cos(1.1 * k + 1.7 * v) for v in range(VOCABULARY)] for k in range(len(PREFIXES))]
    return REFERENCE + torch.tensor(shift, dtype=torch.float64)


def token_logp(logits: Tensor) -> Tensor:
    """[15, 3] log π of each token of each sequence (of some token where the mask is False)."""
    return torch.log_softmax(logits, dim=-1)[STATES, TOKENS]


def sequence_logp(logits: Tensor) -> Tensor:
    """[15] log π of each sequence."""
    return torch.where(MASK, token_logp(logits), 0.0).sum(dim=-1)
