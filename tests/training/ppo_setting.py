"""A tiny GPT-2 with ragged prompts, and what the tests of PPO ask about it."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models import gpt2
from minirlhf.models.interface import Params, with_scalar_head
from minirlhf.rollout.sampler import Rollout, response_mask
from minirlhf.training.experience import Rows, take_rows
from minirlhf.training.packed import ids_of, part_of
from minirlhf.training.ppo import Task
from minirlhf.training.ppo_config import PPOConfig

EOS = 3
MODEL = gpt2.bind(
    gpt2.GPT2Config(
        vocab_size=9, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.35, eos_token_id=EOS
    )
)
PROMPTS = [[5], [1, 2], [7, EOS, 4, 6], [2, 2, 8], [6, 1, 1, 1, 0]]  # one holds an EOS
CONFIG = PPOConfig(
    iterations=3,
    batch_size=12,
    epochs=2,
    minibatches=3,
    micro_batch_size=5,
    max_response=6,
    temperature=0.7,
    kl_coefficient=0.3,
    missing_eos_penalty=0.8,
    gamma=0.97,
    lam=0.9,
    learning_rate=1e-2,
    critic_learning_rate=1e-2,
    evaluate_every=1,
)


def fresh(seed: int) -> Params:
    return MODEL.init(torch.Generator().manual_seed(seed))


def moved(params: Params, *, by: float, seed: int = 9) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return tree_map(lambda x: x + by * torch.randn(x.shape, generator=generator), params)


POLICY = fresh(0)
REFERENCE = moved(POLICY, by=0.05)
CRITIC = with_scalar_head(MODEL, fresh(1), generator=torch.Generator().manual_seed(2))


def taken(experience: Rows, index: Tensor) -> Rows:
    """The rows at `index`, as a minibatch takes them."""
    return take_rows(experience, part_of(ids_of(experience), index, device=experience.tokens.device))


def token_scorer(rollout: Rollout, prompt_index: Tensor) -> Tensor:
    """A rule: the share of token 4 in the response, plus something that depends on the prompt."""
    mask = response_mask(rollout)
    share = ((rollout.tokens == 4) & mask).sum(1) / mask.sum(1)
    return share + 0.1 * prompt_index.to(share)


TASK = Task(MODEL, REFERENCE, token_scorer, PROMPTS, (EOS,))


def identical(a: Params, b: Params) -> bool:
    """Bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


def distance(a: Params, b: Params) -> float:
    """The largest difference of two parameters."""
    return max(float((x - y).abs().max()) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))
