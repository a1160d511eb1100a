"""Scorers: the reward model reads the last valid token of the ids; text rewards see what a reader sees."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from minirlhf.models.checkpoint import Normalisation
from minirlhf.models.interface import scalar
from minirlhf.rollout.sampler import EOS, LENGTH, STOP, Rollout
from minirlhf.training.rewards import critic_from_reward_model, reward_model_scorer, text_scorer
from tests.training.ppo_setting import CRITIC, MODEL

ROWS = [[5, 1, 2, 3], [5, 7], [4, 4, 6], [1, 2, 3, 4, 5, 6]]
PROMPT_LENGTHS = [1, 1, 2, 3]
REASONS = [EOS, LENGTH, STOP, LENGTH]
NORMALISATION = Normalisation(shift=0.25, scale=0.5)


def rollout(pad: int = 0, extra: int = 0) -> Rollout:
    lengths = [len(row) for row in ROWS]
    tokens = torch.full((len(ROWS), max(lengths) + extra), pad, dtype=torch.int64)
    for b, row in enumerate(ROWS):
        tokens[b, : len(row)] = torch.tensor(row)
    blank = torch.zeros(tokens.shape)
    prompt_lengths, reasons = torch.tensor(PROMPT_LENGTHS), torch.tensor(REASONS)
    return Rollout(tokens, prompt_lengths, torch.tensor(lengths), blank, blank, reasons, torch.tensor(0))


INDEX = torch.tensor([2, 0, 1, 2])


def test_reward_model_scores_the_state_after_the_last_valid_token_of_each_row_alone() -> None:
    found = reward_model_scorer(MODEL, CRITIC, NORMALISATION)(rollout(), INDEX)
    for b, row in enumerate(ROWS):
        raw = scalar(CRITIC, MODEL.hidden(CRITIC, torch.tensor([row]))[0, -1])
        assert float(found[b]) == pytest.approx((float(raw) - 0.25) / 0.5, abs=1e-5)
    assert len({round(x, 4) for x in found.tolist()}) == 4


@pytest.mark.parametrize(("pad", "extra", "micro_batch_size"), [(3, 0, 64), (8, 4, 64), (0, 0, 1), (0, 2, 3)])
def test_reward_model_score_ignores_padding_and_micro_batches(
    pad: int, extra: int, micro_batch_size: int
) -> None:
    expected = reward_model_scorer(MODEL, CRITIC, NORMALISATION)(rollout(), INDEX)
    score = reward_model_scorer(MODEL, CRITIC, NORMALISATION, micro_batch_size=micro_batch_size)
    assert torch.allclose(score(rollout(pad, extra), INDEX), expected, atol=1e-5)


def test_reward_model_score_carries_no_gradient() -> None:
    params = {**CRITIC, "score": {"weight": CRITIC["score"]["weight"].clone().requires_grad_()}}
    assert not reward_model_scorer(MODEL, params, NORMALISATION)(rollout(), INDEX).requires_grad


class Letters:
    """Token i is the i-th letter."""

    def decode(self, ids: Sequence[int], /) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


def test_text_reward_gets_prompt_words_response_without_stop_token_and_the_right_facts() -> None:
    seen: list[tuple[list[str], list[str], list[Any]]] = []

    def reward(
        prompts: Sequence[str], responses: Sequence[str], facts: Sequence[Mapping[str, Any] | None]
    ) -> Tensor:
        seen.append((list(prompts), list(responses), list(facts)))
        return torch.tensor([float(len(text)) for text in responses], dtype=torch.float64)

    scorer = text_scorer(reward, Letters(), ["zero", "one", "two"], [{"n": 0}, None, {"n": 2}])
    score = scorer(rollout(), INDEX)
    (call,) = seen
    assert call == (
        ["two", "zero", "one", "two"],
        ["bc", "h", "", "efg"],
        [{"n": 2}, {"n": 0}, None, {"n": 2}],
    )
    assert score.tolist() == [2, 1, 0, 3]
    assert score.dtype == torch.float32


def test_text_reward_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="one facts entry per prompt, got 1 for 2"):
        text_scorer(lambda *_: torch.zeros(1), Letters(), ["a", "b"], [None])
    scorer = text_scorer(lambda *_: torch.zeros(4, 1), Letters(), ["a"] * 3, [None] * 3)
    with pytest.raises(ValueError, match=r"reward of 4 responses, got shape \[4, 1\]"):
        scorer(rollout(), INDEX)


def test_the_critic_starts_as_the_reward_model_in_units_of_the_normalised_score() -> None:
    critic = critic_from_reward_model(CRITIC, NORMALISATION)
    hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(scalar(critic, hidden), scalar(CRITIC, hidden) / 0.5)
    assert critic["h"] is CRITIC["h"]
