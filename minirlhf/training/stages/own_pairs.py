"""On-policy preferences: several responses of a policy to each prompt, the best and the worst by any reward.

    prompts --policy, k samples--> responses --reward--> scores --margin--> {"prompt", "chosen", "rejected"}

Pairs that the policy wrote itself put the gradient where its own probability is: pushing down what it never
says teaches little (Tajwar et al. 2024, "Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy
Data", arXiv:2404.14367). The prompts are those of the train and validation splits: the cut by prompt keeps
the test prompts for what is reported.

A response that the length limit stopped is never chosen. Rejected it may be, but then no terminator may be
taught behind it: `OwnPairs.max_length` says how to read the file so that none is.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minirlhf.data.records import Prompt
from minirlhf.objectives.sampling import tempered
from minirlhf.rollout.sampler import LENGTH, Rollout, generate, responses
from minirlhf.runs import InputError, write_text_atomic
from minirlhf.training.inputs import PromptRow, context_of, read_prompt_rows
from minirlhf.training.progress import sampling
from minirlhf.training.reward_sources import Reward
from minirlhf.training.setting import Setting, seed_for
from minirlhf.training.workspace import Checkpoint, load_policy


@dataclass(frozen=True)
class OwnPairsConfig:
    """How a policy's own responses become preferences."""

    samples: int = 4
    """Responses to each prompt; 2 or more."""
    temperature: float = 0.7
    """Divides the logits when sampling."""
    max_response: int = 64
    """Most tokens of a response, the stop token counted."""
    pairs_per_prompt: int = 1
    """Most pairs of one prompt: best and worst, then second best and second worst, and so on."""
    margin: float = 0.2
    """By how much the better response's score must exceed the worse one's, in units of the reward."""
    slots: int | None = None
    """Rows that are sampled at a time; None takes what fits the memory of `generate`."""

    def __post_init__(self) -> None:
        if self.samples < 2 or self.max_response < 1:
            raise InputError(
                f"expected samples of at least 2 and a max_response of at least 1, got {self.samples} and "
                f"{self.max_response}"
            )
        if not 1 <= self.pairs_per_prompt <= self.samples // 2:
            raise InputError(
                f"pairs_per_prompt must lie in 1..{self.samples // 2}, half of samples, "
                f"got {self.pairs_per_prompt}"
            )
        if not self.temperature > 0 or not self.margin > 0:
            raise InputError(
                f"temperature and margin must be positive, got {self.temperature} and {self.margin}"
            )


class OwnPairs(NamedTuple):
    """What was made.

    pairs: rows written. prompts: that were sampled. without: prompts without a pair, for want of a margin or
    of a response that ended. score: mean over all samples.
    max_length: `ReadingConfig(max_length=..., overlong="truncate")` cuts every rejected response that the
    length limit had stopped before the terminator that the reader adds; None where there is none.
    """

    pairs: int
    prompts: int
    without: int
    score: float
    max_length: int | None


def own_pairs(
    policy: Path, reward: Reward, data: Path, out: Path, *, config: OwnPairsConfig, setting: Setting
) -> OwnPairs:
    """Writes the policy's own best and worst responses as a preference file.

    Args:
        policy: whose responses are compared.
        reward: what compares them.
        data: prompts; those of the test split are left alone.
        out: the file to write, .jsonl; must not exist.

    Raises:
        InputError: `out` exists, the prompts cannot be read, or no prompt gave a pair.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; choose another file")
    start = load_policy(policy, setting)
    parts = read_prompt_rows(start, data, config.max_response, setting)
    prompts: list[PromptRow] = [*parts.train, *parts.validation]
    scorer = reward.scorer(start, prompts, config.max_response)
    rollout, index = _sample(start, prompts, config, seed_for(setting, "own pairs"))
    score = scorer(rollout, index).view(len(prompts), -1).cpu()
    ended = (rollout.stop_reason != LENGTH).view(len(prompts), -1).cpu()
    texts = [start.tokenizer.decode(ids) for ids in responses(rollout)]
    rows, lengths, with_pair = [], [], set()
    for i, best, worst in best_and_worst(score, ended, margin=config.margin, most=config.pairs_per_prompt):
        chosen, rejected = (texts[i * config.samples + which] for which in (best, worst))
        if not chosen.strip() or not rejected.strip():
            continue  # no response to learn from
        rows.append(_row(prompts[i].row, chosen, rejected))
        with_pair.add(i)
        if not ended[i, worst]:
            lengths.append(len(prompts[i].ids) + len(start.tokenizer.encode(rejected)))
    if not rows:
        raise InputError(
            f"{data}: expected prompts whose responses differ by {config.margin} in {reward.name}, found "
            f"none among {len(prompts)}; take more samples or a smaller margin"
        )
    write_text_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    without, mean = len(prompts) - len(with_pair), float(score.double().mean())
    setting.show(
        f"{out}: {len(rows)} pairs from {config.samples} responses to each of {len(prompts)} prompts; mean "
        f"score {mean:.3f}; {float(ended.double().mean()):.0%} ended by themselves; "
        f"{without} prompts gave none"
    )
    longest = min([*lengths, context_of(start, setting)]) if lengths else None
    return OwnPairs(len(rows), len(prompts), without, mean, longest)


def best_and_worst(
    score: Tensor, ended: Tensor, *, margin: float, most: int = 1
) -> list[tuple[int, int, int]]:
    """(prompt, better sample, worse sample): of each prompt the j-th best that ended with the j-th worst.

    Args:
        score: [P, k].
        ended: bool [P, k]; only what ended can be the better one.
        margin: > 0, in units of the score; pairs below it are left out.
        most: pairs of one prompt; no sample is in two of them.

    >>> score, ended = torch.tensor([[0.9, 0.1, 0.5], [0.5, 0.4, 0.5]]), torch.ones(2, 3, dtype=torch.bool)
    >>> best_and_worst(score, ended, margin=0.2)
    [(0, 0, 1)]
    """
    if score.shape != ended.shape or score.ndim != 2:
        raise ValueError(f"expected score and ended [P, k], got {list(score.shape)} and {list(ended.shape)}")
    if not margin > 0:
        raise ValueError(f"margin must be positive, got {margin}")
    best = score.masked_fill(~ended, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :most]
    worst = score.argsort(dim=1, stable=True)[:, :most]
    gap = score.gather(1, best) - score.gather(1, worst)
    wanted = (gap >= margin) & ended.gather(1, best)
    return [(i, int(best[i, j]), int(worst[i, j])) for i, j in wanted.nonzero().tolist()]


def _sample(
    start: Checkpoint, prompts: Sequence[PromptRow], config: OwnPairsConfig, seed: int
) -> tuple[Rollout, Tensor]:
    """k responses to each prompt, prompt by prompt, and the prompt that each row answers."""
    index = torch.arange(len(prompts)).repeat_interleave(config.samples)
    with sampling("own pairs", len(index) * config.max_response) as told:
        rollout = generate(
            start.model,
            start.params,
            [prompts[i].ids for i in index.tolist()],
            law=partial(tempered, temperature=config.temperature),
            max_new_tokens=config.max_response,
            stop_ids=start.model.stop_ids,
            seed=seed,
            prompt_index=index,
            sample_index=torch.arange(config.samples).repeat(len(prompts)),
            slots=config.slots,
            progress=told,
        )
    return rollout, index


def _row(prompt: Prompt, chosen: str, rejected: str) -> dict[str, Any]:
    """A preference in TRL's form: conversational where the prompt is, else standard."""
    if prompt.messages is None:
        return {"prompt": prompt.prompt, "chosen": chosen, "rejected": rejected}
    sides = {"chosen": chosen, "rejected": rejected}
    return {
        "prompt": [{"role": role, "content": content} for role, content in prompt.messages],
        **{name: [{"role": "assistant", "content": text}] for name, text in sides.items()},
    }
