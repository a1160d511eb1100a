"""Own the loop, rollout → score → advantages → update, without a critic: a tiny GPT-2 learns to say 7."""

import sys

import torch

from minirlhf.models import gpt2
from minirlhf.objectives.advantages import discounted_return, whiten
from minirlhf.objectives.divergence import kl_k1, kl_shaped_reward
from minirlhf.objectives.policy import clipped_surrogate_loss
from minirlhf.objectives.sampling import sampling_law
from minirlhf.rollout.sampler import generate, response_mask
from minirlhf.training.experience import logp_of
from minirlhf.training.update import adamw, init_state, update

EOS, SEVEN, BETA = 0, 7, 0.02
model = gpt2.bind(gpt2.GPT2Config(16, n_positions=16, n_embd=32, n_layer=2, n_head=2, eos_token_id=EOS))
reference = model.init(torch.Generator().manual_seed(0))
state, prompts = init_state(reference), [[1], [2, 3], [4, 5, 6]] * 16
row = torch.arange(len(prompts))


def loss(params, batch, count):
    tokens, mask, old, advantage = batch
    logp = logp_of(model, params, tokens, mask, temperature=1.0)
    return clipped_surrogate_loss(logp, old, advantage, mask, clip_low=0.2, clip_high=0.2).sum() / count, {}


for i in range(int(sys.argv[1]) if len(sys.argv) > 1 else 30):  # iterations
    draw = {"seed": 0, "prompt_index": row, "sample_index": row + i * len(row), "stop_ids": [EOS]}
    rollout = generate(model, state.params, prompts, law=sampling_law, max_new_tokens=8, **draw)
    tokens, mask = rollout.tokens, response_mask(rollout)
    score = ((tokens == SEVEN) & mask).sum(1) / 8  # any rule, judge or model
    old, ref = (logp_of(model, p, tokens, mask, temperature=1.0) for p in (state.params, reference))
    reward = kl_shaped_reward(score, kl_k1(old, ref, mask), mask, beta=BETA)
    batch = (tokens, mask, old, whiten(discounted_return(reward, mask, gamma=1.0), mask))
    for _ in range(4):
        how = {"loss": loss, "optimiser": adamw, "learning_rate": 3e-3, "max_grad_norm": 1.0}
        state, _ = update(state, [batch], mask.sum(), **how)
    print(f"iteration {i:2d}  score {score.mean():.3f}  KL {(old - ref).sum(1).mean():.2f} nats")
