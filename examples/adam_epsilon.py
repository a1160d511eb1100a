"""Where Adam adds its ε: the same two PPO epochs under PyTorch's and under TensorFlow 1's Adam.

    python examples/adam_epsilon.py            (about half a minute)

    PyTorch      θ ← θ - lr · m̂ / (√v̂ + ε)                              m̂ = m / (1 - β₁ᵗ),  v̂ = v / (1 - β₂ᵗ)
    TensorFlow   θ ← θ - lr · √(1 - β₂ᵗ) / (1 - β₁ᵗ) · m / (√v + ε)
                 = θ - lr · m̂ / (√v̂ + ε / √(1 - β₂ᵗ))

The second divides before the bias correction, so its ε counts 32 times as much at the first step and 22
times at the second: parameters with small gradients hardly move. Huang et al. 2023, "The N Implementation
Details of RLHF with PPO" (huggingface.co/blog), measured on GPT-2 124M that after two PPO epochs PyTorch's
Adam with ε = 1e-5 has 6 times the approximate KL of the original's.

Reproduced here: the direction of all four statistics, and the size of the effect as a function of the size of
the gradient, which is all that it depends on (Adam with gradients c·g and ε is Adam with g and ε/c). Not
reproduced: GPT-2 124M itself, its reward model and its data. The model below is a fresh GPT-2 of 0.2 M
parameters, the scores are noise, and the gradients of so small a batch are large; scaling the loss by c takes
them through the range in which the published factor lies. The rate is such that PyTorch's approximate KL is
about the published one. So the factor at a given gradient is a measurement; which gradient GPT-2 had is not.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models import gpt2
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.objectives.advantages import gae, whiten
from minirlhf.objectives.divergence import kl_k2, kl_shaped_reward
from minirlhf.objectives.masked import token_mean, token_variance
from minirlhf.objectives.policy import clip_indicator, clipped_surrogate_loss, ratio
from minirlhf.objectives.sampling import tempered
from minirlhf.rollout.sampler import generate, response_mask
from minirlhf.training.experience import by_rows, logp_of
from minirlhf.training.update import Optimiser, TrainState, adamw, gradient, init_state

EPSILON, RATE, CLIP, TEMPERATURE = 1e-5, 2.7e-4, 0.2, 0.7
PUBLISHED = {
    "PyTorch": (2.37e-3, 0.0202, 1.81, 5.4e-3),
    "TensorFlow": (3.75e-4, 0.0052, 1.25, 7.9e-4),
}


class Row(NamedTuple):
    """One line of the table: which Adam, the median |gradient|, and what two epochs did to the policy."""

    adam: str
    gradient: float
    approxkl: float
    clipfrac: float
    ratio_max: float
    ratio_var: float


class Batch(NamedTuple):
    """Rows to learn from, [B, T]."""

    tokens: Tensor
    mask: Tensor
    old_logp: Tensor
    advantage: Tensor


def tensorflow_adam(state: TrainState, grads: Params, learning_rate: float) -> TrainState:
    """TensorFlow 1's Adam, by PyTorch's with the ε that makes them equal at this step."""
    bias_correction = 1 - 0.999 ** (state.step + 1)
    return adamw(state, grads, learning_rate, eps=EPSILON / math.sqrt(bias_correction))


ADAMS: dict[str, Optimiser] = {"PyTorch": partial(adamw, eps=EPSILON), "TensorFlow": tensorflow_adam}


def experiment(*, responses: int, scales: tuple[float, ...]) -> list[Row]:
    """Two epochs of one minibatch from the same policy, for each gradient scale and each Adam."""
    model = gpt2.bind(gpt2.GPT2Config(1000, n_positions=32, n_embd=64, n_layer=2, n_head=2, eos_token_id=999))
    policy = model.init(torch.Generator().manual_seed(0))
    parts = rollout(model, policy, responses)
    tokens = torch.stack([part.mask.sum() for part in parts]).sum()

    def loss(params: Params, part: Batch, count: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logp = logp_of(model, params, part.tokens, part.mask, temperature=TEMPERATURE)
        clip = {"clip_low": CLIP, "clip_high": CLIP}
        return clipped_surrogate_loss(logp, *part[2:], part.mask, **clip).sum() / count, {}

    first, _, _ = gradient(policy, parts, tokens, loss=loss)
    typical = float(torch.cat([leaf.flatten() for leaf in tree_leaves(first)]).abs().median())
    rows = []
    for scale in scales:
        for name, adam in ADAMS.items():
            state = adam(init_state(policy), tree_map(lambda g, c=scale: c * g, first), RATE)
            second, _, _ = gradient(state.params, parts, tokens, loss=loss)
            state = adam(state, tree_map(lambda g, c=scale: c * g, second), RATE)
            rows.append(Row(name, scale * typical, *statistics(model, state.params, parts)))
    return rows


def rollout(model: LanguageModel, policy: Params, responses: int) -> list[Batch]:
    """Random prompts of 8 tokens, responses of up to 24, a score that is noise, λ = 0.95, no critic yet."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 999, (responses, 8), generator=generator).tolist()
    index = torch.arange(responses)
    sampled = generate(
        model,
        policy,
        prompts,
        law=partial(tempered, temperature=TEMPERATURE),
        max_new_tokens=24,
        stop_ids=[999],
        seed=0,
        prompt_index=index,
        sample_index=index,
    )
    mask = response_mask(sampled)
    read = partial(logp_of, model, policy, temperature=TEMPERATURE)
    with torch.no_grad():
        old_logp = by_rows(read, sampled, micro_batch_size=64)
    score = torch.randn(responses, generator=generator)
    reward = kl_shaped_reward(
        score, torch.zeros_like(old_logp), mask, beta=0.0
    )  # the policy is the reference
    advantage = gae(reward, torch.zeros_like(old_logp), mask, gamma=1.0, lam=0.95).advantage
    whole = Batch(sampled.tokens, mask, old_logp, whiten(advantage, mask))
    return [Batch(*fields) for fields in zip(*(field.split(64) for field in whole), strict=True)]


@torch.no_grad()
def statistics(model: LanguageModel, params: Params, parts: list[Batch]) -> tuple[float, ...]:
    """Approximate KL (½ log² ratio), clip fraction, largest ratio and its variance, over all tokens."""
    logp = [logp_of(model, params, p.tokens, p.mask, temperature=TEMPERATURE) for p in parts]
    now, (_, mask, old, advantage) = torch.cat(logp), (torch.cat(field) for field in zip(*parts, strict=True))
    clipped = clip_indicator(now, old, advantage, mask, clip_low=CLIP, clip_high=CLIP)
    rho = ratio(now, old, mask)
    found = (token_mean(kl_k2(now, old, mask), mask), token_mean(clipped.float(), mask), rho.max())
    return tuple(float(x) for x in (*found, token_variance(rho, mask)))


def main() -> None:
    """Prints the table."""
    print(
        f"{'':24}{'Adam':12}{'approxkl':>10}{'clipfrac':>10}{'ratio max':>11}{'ratio var':>11}{'factor':>8}"
    )
    rows = experiment(responses=128, scales=(1.0, 1 / 4, 1 / 12))
    for torch_row, tf_row in zip(rows[::2], rows[1::2], strict=True):
        factor = torch_row.approxkl / tf_row.approxkl
        show(f"median |g| {torch_row.gradient:.1e}", torch_row.adam, torch_row[2:], f"{factor:.1f}")
        show("", tf_row.adam, tf_row[2:], "")
    factor = PUBLISHED["PyTorch"][0] / PUBLISHED["TensorFlow"][0]
    show("published, GPT-2 124M", "PyTorch", PUBLISHED["PyTorch"], f"{factor:.1f}")
    show("", "TensorFlow", PUBLISHED["TensorFlow"], "")


def show(title: str, adam: str, values: tuple[float, ...], factor: str) -> None:
    """One line of the table."""
    kl, clipped, largest, variance = values
    print(f"{title:24}{adam:12}{kl:>10.2e}{clipped:>10.4f}{largest:>11.2f}{variance:>11.1e}{factor:>8}")


if __name__ == "__main__":
    main()
