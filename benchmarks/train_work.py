"""What every trainer is given: the same weights, pairs and prompts; and the flops that a step needs."""

from pathlib import Path
from typing import NamedTuple

import torch

from minirlhf.data.records import Example, PairExample
from minirlhf.models import gpt2
from minirlhf.models.checkpoint import Normalisation, save_language_model, save_scalar_model
from minirlhf.models.interface import with_scalar_head

PAD = 0  # in no text: transformers reads a reward at the last token that is not this one
AS_IT_IS = "minirlhf"  # ours, with nothing switched off: what other curves are compared with

SIZES = {
    "124m": gpt2.GPT2Config(),
    "tiny": gpt2.GPT2Config(vocab_size=2003, n_positions=256, n_embd=64, n_layer=2, n_head=2,
                            eos_token_id=2002),
}  # fmt: skip


class Work(NamedTuple):
    """One measurement's task.

    policy, reward: model directories, of one backbone. size: see `SIZES`.
    steps: how many, the ones before counting starts among them. device: cpu or cuda.
    pairs: preferences a step; SFT takes both sides of each as demonstrations.
    prompt, response: tokens of each, the response's last is the EOS.
    rollouts, asked, answered: PPO's episodes an iteration, tokens of their prompts and of their responses.
    rate: of learning, constant.
    ragged: prompts and responses are of all lengths up to these.
    """

    policy: Path
    reward: Path
    size: str
    steps: int
    device: str
    pairs: int
    prompt: int
    response: int
    rollouts: int
    asked: int
    answered: int
    rate: float
    ragged: bool = False

    @property
    def config(self) -> gpt2.GPT2Config:
        return SIZES[self.size]


def save_models(folder: Path, size: str) -> None:
    """FOLDER/policy and FOLDER/reward: fresh weights, which cost what trained ones do."""
    model = gpt2.bind(SIZES[size])
    draw = torch.Generator().manual_seed(0)
    params = model.init(draw)
    save_language_model(folder / "policy", model, params, tokenizer=None)
    params = with_scalar_head(model, params, generator=draw)
    plain = Normalisation(0.0, 1.0)
    save_scalar_model(folder / "reward", model, params, tokenizer=None, normalisation=plain)


def pairs_of(work: Work) -> list[PairExample]:
    """Those of all steps, in their order."""
    vocabulary, end = work.config.vocab_size, work.config.eos_token_id
    draw = torch.Generator().manual_seed(1)

    def length(most: int) -> int:
        return int(torch.randint(2, most + 1, (), generator=draw)) if work.ragged else most

    def ids(count: int) -> list[int]:
        return torch.randint(vocabulary // 50, vocabulary - 1, (count,), generator=draw).tolist()

    def pair() -> PairExample:
        prompt = ids(length(work.prompt))
        return PairExample(*(side(prompt, ids(length(work.response) - 1) + [end]) for _ in range(2)))

    def side(prompt: list[int], response: list[int]) -> Example:
        return Example(prompt + response, [False] * len(prompt) + [True] * len(response), len(prompt))

    return [pair() for _ in range(work.pairs * work.steps)]


def demonstrations_of(work: Work) -> list[Example]:
    """Both sides of every pair."""
    return [side for pair in pairs_of(work) for side in pair]


def prompts_of(work: Work) -> list[list[int]]:
    """PPO's, as many as an iteration has episodes."""
    draw, vocabulary = torch.Generator().manual_seed(2), work.config.vocab_size
    shape = (work.rollouts, work.asked)
    return torch.randint(vocabulary // 50, vocabulary - 1, shape, generator=draw).tolist()


def tokens(work: Work, stage: str) -> int:
    """Read in a step, padding not."""
    if stage == "PPO":
        return work.rollouts * (work.asked + work.answered)
    return 2 * work.pairs * (work.prompt + work.response)


def flops(work: Work, stage: str, epochs: int = 4) -> dict[str, float]:
    """Of the matrix products that a step needs, by part ("step"; "iteration" and "update" for PPO).

        forward(rows of T tokens, y of them scored) = rows · (2 B T + 4 L D T (T + 1) / 2 + 2 V D y)

    B: entries of the blocks' matrices; attention is causal. Forward and backward are 3 × forward. What a
    trainer computes twice, scores without need or pads is not counted; nor is DPO's reference, which can be
    known before, nor the old log-probs of PPO, which the sampler has.
    """
    config = work.config
    width, layers = config.n_embd, config.n_layer
    blocks = layers * (4 * width**2 + 2 * width * (config.n_inner or 4 * width))

    def forward(rows: int, length: int, scored: int) -> float:
        attention = 4 * layers * width * length * (length + 1) / 2
        return rows * (2.0 * blocks * length + attention + 2.0 * config.vocab_size * width * scored)

    if stage != "PPO":
        scored = 0 if stage == "reward" else work.response
        return {"step": 3 * forward(2 * work.pairs, work.prompt + work.response, scored)}
    whole, rows = work.asked + work.answered, work.rollouts
    policy, critic = forward(rows, whole, work.answered), forward(rows, whole, 0)
    update = epochs * 3 * (policy + critic)
    sampled = forward(rows, whole - 1, work.answered)
    reference_value_reward = policy + 2 * critic
    return {"iteration": sampled + reference_value_reward + update, "update": update}
