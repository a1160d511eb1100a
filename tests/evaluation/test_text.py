"""Length, variety and repetition by counting."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.evaluation.text import distinct_n, mean_length, repetition

texts = st.lists(st.lists(st.sampled_from("abc"), max_size=7).map(" ".join), min_size=1, max_size=5)


@given(texts=texts, n=st.integers(1, 4))
def test_distinct_and_repetition_match_a_count_by_hand(texts: list[str], n: int) -> None:
    seen: set[str] = set()
    total = new = 0
    shares = []
    for text in texts:
        words, here, repeated = text.split(), set(), 0
        for i in range(max(0, len(words) - n + 1)):
            gram = " ".join(words[i : i + n])
            total, new = total + 1, new + (gram not in seen)
            repeated += gram in here
            seen.add(gram)
            here.add(gram)
        shares.append(repeated / max(1, len(words) - n + 1))
    assert distinct_n(texts, n) == pytest.approx(new / total if total else 0.0)
    assert repetition(texts, n) == pytest.approx(sum(shares) / len(texts))


def test_one_looping_response_is_repetitive_and_many_equal_ones_are_only_not_distinct() -> None:
    assert repetition(["go on " * 50], 2) > 0.9
    assert repetition(["a b c d"] * 50, 2) == 0
    assert distinct_n(["a b c d"] * 50, 2) == 3 / 150


def test_mean_length_counts_items_of_ids_and_words() -> None:
    assert mean_length([[1, 2, 3], [4]]) == 2
    assert mean_length(["two words".split(), []]) == 1


def test_nothing_to_measure_is_refused() -> None:
    for measure in (mean_length, lambda none: repetition(none, 1)):
        with pytest.raises(ValueError, match="at least one response"):
            measure([])
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        distinct_n(["a"], 0)
    assert distinct_n(["a"], 2) == 0
