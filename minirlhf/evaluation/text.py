"""What responses look like, without a judge: length, variety, repetition. Words stand between spaces."""

from collections.abc import Sequence


def mean_length(responses: Sequence[Sequence[object]]) -> float:
    """Mean number of items per response: tokens for lists of ids, words for split texts.

    >>> mean_length([[5, 6, 7], []])
    1.5
    """
    _check_some(responses)
    return sum(len(response) for response in responses) / len(responses)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams of words among all n-grams of all texts (Li et al. 2016, arXiv:1510.03055).

    It falls with the amount of text, so compare only equal numbers of responses of similar length. 0 where no
    text has n words.

    >>> distinct_n(["the red lamp", "the red chair"], 2)
    0.75
    """
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(texts: Sequence[str], n: int) -> float:
    """Share of n-grams that occurred before in the same response, averaged over responses.

    A response of fewer than n words repeats nothing.

    >>> repetition(["yes yes yes yes", "no"], 1)
    0.375
    """
    _check_some(texts)
    shares = []
    for text in texts:
        grams = _ngrams(text, n)
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _check_some(responses: Sequence[object]) -> None:
    if not responses:
        raise ValueError("expected at least one response, got none")
