"""No prompt is in two splits, and where a prompt goes depends on nothing but the seed and the prompt."""

import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minirlhf.data.records import Demonstration, Preference, Prompt
from minirlhf.data.splits import split_by_prompt
from minirlhf.runs import InputError

FRACTIONS = (0.8, 0.1, 0.1)


def prompts(texts) -> list[Prompt]:
    return [Prompt(text, None, line) for line, text in enumerate(texts, 1)]


@given(
    texts=st.lists(st.sampled_from([f"p{i}" for i in range(12)]), min_size=30, max_size=60),
    seed=st.integers(0, 9),
)
def test_splits_share_no_prompt_and_lose_no_row(texts, seed):
    assume(len(set(texts)) >= 3)
    rows = prompts(texts)
    splits = split_by_prompt(rows, fractions=FRACTIONS, seed=seed)
    assert sorted((row for part in splits for row in part), key=lambda row: row.line) == rows
    sets = [{row.prompt for row in part} for part in splits]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert all(sets)


def test_a_split_is_repeated_by_its_seed_and_changed_by_another():
    rows = prompts(f"p{i}" for i in range(200))
    first, again, other = (split_by_prompt(rows, fractions=FRACTIONS, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert {row.prompt for row in first.test} != {row.prompt for row in other.test}


def test_demonstrations_and_preferences_of_one_prompt_land_in_the_same_split():
    texts = [f"p{i}" for i in range(300)]
    random.Random(0).shuffle(texts)
    demonstrations = [Demonstration(text, (("a", True),), 1) for text in texts[:200]]
    preferences = [Preference(text, "c", "r", 1) for text in texts[100:]]
    one = split_by_prompt(demonstrations, fractions=FRACTIONS, seed=3)
    two = split_by_prompt(preferences, fractions=FRACTIONS, seed=3)
    for mine, part in enumerate(one):
        for other, rival in enumerate(two):
            shared = {row.prompt for row in part} & {row.prompt for row in rival}
            assert not shared or mine == other


def test_rows_keep_their_order_within_a_split():
    rows = prompts(f"p{i}" for i in range(100))
    splits = split_by_prompt(rows, fractions=FRACTIONS, seed=0)
    assert all([row.line for row in part] == sorted(row.line for row in part) for part in splits)


def test_sizes_are_those_of_fair_coin_tosses():
    splits = split_by_prompt(prompts(f"p{i}" for i in range(4000)), fractions=(0.5, 0.2, 0.3), seed=0)
    for part, fraction in zip(splits, (0.5, 0.2, 0.3), strict=True):
        deviation = (4000 * fraction * (1 - fraction)) ** 0.5
        assert abs(len(part) - 4000 * fraction) < 4 * deviation


@pytest.mark.parametrize("fractions", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.0, 0.5)])
@pytest.mark.parametrize("n", [2, 50])
def test_a_split_of_fraction_zero_is_empty_and_the_others_are_not(fractions, n):
    splits = split_by_prompt(prompts(f"p{i}" for i in range(n)), fractions=fractions, seed=0)
    assert [bool(part) for part in splits] == [fraction > 0 for fraction in fractions]


@given(seed=st.integers(0, 50))
def test_in_a_tiny_file_every_split_still_gets_a_prompt(seed):
    splits = split_by_prompt(prompts(["a", "b", "c", "a"]), fractions=FRACTIONS, seed=seed)
    assert [len({row.prompt for row in part}) for part in splits] == [1, 1, 1]


def test_too_few_prompts_to_split_are_an_error():
    with pytest.raises(InputError, match="expected at least 3 different prompts to split, found 2"):
        split_by_prompt(prompts(["a", "b", "a"]), fractions=FRACTIONS, seed=0)


@pytest.mark.parametrize(
    "fractions", [(0.5, 0.5, 0.5), (1.2, -0.1, -0.1), (float("nan"), 0.5, 0.5), (0.5, 0.5)]
)
def test_fractions_that_are_none_are_refused(fractions):
    with pytest.raises(ValueError, match="three fractions >= 0 that sum to 1"):
        split_by_prompt(prompts("abc"), fractions=fractions, seed=0)
