"""Best of n: the law of the best is the theory's, the first of equals wins, the estimate averages subsets."""

from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from minirlhf.evaluation.best_of_n import BestOfN, best_of_n
from minirlhf.objectives.best_of_n import best_of_n_law
from minirlhf.objectives.sampling import sampling_law
from minirlhf.rollout.sampler import Rollout, response_mask
from minirlhf.runs import InputError
from tests.rollout.known_models import ragged_prompts, rows, tiny_gpt2

MODEL, PARAMS = tiny_gpt2(vocabulary=6, spread=6.0)


def by_tokens(rollout: Rollout, prompt_index: Tensor) -> Tensor:
    """A reward with ties: how many different ids a response has."""
    mask = response_mask(rollout)
    return torch.tensor(
        [float(len(set(row[kept].tolist()))) for row, kept in zip(rollout.tokens, mask, strict=True)]
    )


def best(prompts: list[list[int]], scorer: Any = by_tokens, **changed: Any) -> BestOfN:
    settings = {"n": 4, "law": sampling_law, "max_new_tokens": 5, "stop_ids": [0], "seed": 3} | changed
    return best_of_n(MODEL, PARAMS, prompts, scorer, **settings)


def test_the_best_row_of_each_prompt_comes_back_whole_and_the_first_of_equals() -> None:
    prompts, _ = ragged_prompts(7, vocabulary=6)
    seen: list[Rollout] = []

    def scorer(rollout: Rollout, prompt_index: Tensor) -> Tensor:
        seen.append(rollout)
        assert prompt_index.tolist() == [p for p in range(7) for _ in range(4)]
        return by_tokens(rollout, prompt_index)

    got = best(prompts, scorer)
    everything, scores = rows(seen[0]), by_tokens(seen[0], torch.zeros(28)).view(7, 4)
    assert torch.equal(got.scores, scores)
    for number, row in enumerate(rows(got.rollout)):
        first = scores[number].tolist().index(float(scores[number].max()))
        assert row == everything[number * 4 + first]
        assert float(got.score[number]) == float(scores[number].max())
    assert got.rollout.tokens.shape[1] == int(got.rollout.lengths.max())
    assert (got.rollout.logp[response_mask(got.rollout)] < 0).all()


def test_one_token_responses_have_the_law_of_best_of_n() -> None:
    prompt, n, count = [2, 4], 3, 4000
    value = torch.tensor([0.3, -1.0, 2.0, 0.3, 5.0, 1.0])

    def scorer(rollout: Rollout, prompt_index: Tensor) -> Tensor:
        return value[rollout.tokens[:, 2]]

    logits = MODEL.hidden(PARAMS, torch.tensor([prompt]))[0, -1] @ MODEL.unembedding(PARAMS).T
    law = best_of_n_law(logits.log_softmax(-1), value, n=n).exp()
    got = best([prompt] * count, scorer, n=n, max_new_tokens=1)
    seen = torch.bincount(got.rollout.tokens[:, 2], minlength=6)
    expected = law * count
    likely = expected > 5
    chi2 = float(((seen - expected)[likely] ** 2 / expected[likely]).sum())
    assert chi2 < 25, "5 degrees of freedom: above 20.5 once in a thousand"


def test_the_expected_best_is_the_mean_over_all_subsets_and_rises_with_n() -> None:
    prompts, _ = ragged_prompts(5, vocabulary=6)
    got = best(prompts)
    for draws in range(1, 5):
        subsets = [got.scores[:, list(each)].amax(1) for each in combinations(range(4), draws)]
        assert float(got.expected_best[draws - 1]) == pytest.approx(float(torch.stack(subsets).mean()))
    assert (got.expected_best.diff() >= 0).all()
    assert float(got.expected_best[-1]) == pytest.approx(float(got.score.mean()))


@pytest.mark.parametrize(("n", "bound"), [(1, 0.0), (2, 0.1931), (4, 0.6363), (64, 3.1745)])
def test_the_bound_is_that_of_the_paper(n: int, bound: float) -> None:
    assert best([[1]], n=n).kl_bound == pytest.approx(bound, abs=1e-4)


def test_any_law_and_any_number_of_slots() -> None:
    prompts, _ = ragged_prompts(6, vocabulary=6)
    law = partial(sampling_law, temperature=0.5)
    assert rows(best(prompts, law=law, slots=3).rollout) == rows(best(prompts, law=law).rollout)


def test_what_cannot_be_scored_or_sampled_is_refused() -> None:
    with pytest.raises(ValueError, match="n must be an integer of at least 1, got 0"):
        best([[1]], n=0)
    with pytest.raises(InputError, match="no prompts"):
        best([])
    with pytest.raises(InputError, match=r"expected 8 finite scores, got shape \[8\] with 1 that are not"):
        best([[1], [2]], lambda rollout, index: torch.tensor([torch.nan] + [0.0] * 7))
    with pytest.raises(InputError, match=r"expected 8 finite scores, got shape \[2\]"):
        best([[1], [2]], lambda rollout, index: torch.zeros(2))
