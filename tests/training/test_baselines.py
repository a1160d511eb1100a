"""Baselines that a reward model must beat."""

import pytest

from minirlhf.data.records import PairExample, join
from minirlhf.training import baselines
from minirlhf.training.baselines import bag_of_words_accuracy, length_only_accuracy


def pair(chosen: list[int], rejected: list[int], prompt: tuple[int, ...] = (1,)) -> PairExample:
    return PairExample(join(prompt, chosen), join(prompt, rejected))


LONGER = [pair([2, 3, 0], [2, 0]), pair([4, 5, 6, 0], [3, 0])]


def test_length_alone_is_right_where_length_decides() -> None:
    assert length_only_accuracy(LONGER, LONGER) == 1.0


def test_length_alone_learns_its_direction_from_training_and_may_be_wrong_on_test() -> None:
    shorter = [PairExample(p.rejected, p.chosen) for p in LONGER]
    assert length_only_accuracy(shorter, shorter) == 1.0
    assert length_only_accuracy(shorter, LONGER) == 0.0


def test_equal_lengths_count_half() -> None:
    assert length_only_accuracy(LONGER, [pair([2, 0], [3, 0])]) == 0.5


def test_a_bag_of_words_finds_the_word_that_decides() -> None:
    train = [pair([7, 2, 0], [8, 2, 0]), pair([3, 7, 0], [8, 3, 0])]
    test = [pair([5, 5, 7, 0], [5, 8, 5, 0])]
    assert bag_of_words_accuracy(train, test, vocab_size=9) == 1.0


def test_a_bag_of_words_cannot_see_order_or_prompt() -> None:
    order = [pair([2, 3, 0], [3, 2, 0])]
    assert bag_of_words_accuracy(order, order, vocab_size=9) == 0.5
    train = [pair([7, 0], [8, 0], prompt=(7,)), pair([8, 0], [7, 0], prompt=(8,))]
    assert bag_of_words_accuracy(train, train, vocab_size=9) == pytest.approx(0.5)


def test_a_bag_of_words_is_the_same_however_its_pairs_are_cut_and_stops_at_a_stated_number(
    monkeypatch,
) -> None:
    train = [pair([2 + i % 7, 5, 0], [9 - i % 5, 3, 0]) for i in range(23)]
    test = [pair([i, j, 0], [j, 4, 0]) for i in range(2, 9) for j in range(5, 9)]
    whole = bag_of_words_accuracy(train, test, vocab_size=10)
    monkeypatch.setattr(baselines, "_PAIRS_AT_ONCE", 3)
    assert bag_of_words_accuracy(train, test, vocab_size=10) == whole
    monkeypatch.setattr(baselines, "FITTED_PAIRS", 4)
    assert bag_of_words_accuracy(train, test, vocab_size=10) == bag_of_words_accuracy(
        train[:4], test, vocab_size=10
    )
    assert bag_of_words_accuracy(train[:4], test, vocab_size=10) != whole
