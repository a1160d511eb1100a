"""Known bugs of best of n."""

import math

from torch import Tensor

from minirlhf.verify.zoo import Bug


def best_of_n_law(logp: Tensor, score: Tensor, n: int) -> Tensor:
    """Right: probabilities."""
    p = logp.exp()
    at_most = (score[None, :] <= score[:, None]).to(p.dtype) @ p
    below = (score[None, :] < score[:, None]).to(p.dtype) @ p
    return (at_most**n - below**n) * p / (at_most - below)


def expected_maximum(score: Tensor, n: int) -> Tensor:
    """Right."""
    size = score.shape[-1]
    ordered = score.sort(dim=-1).values
    weight = [math.comb(i - 1, n - 1) / math.comb(size, n) for i in range(1, size + 1)]
    return (ordered * score.new_tensor(weight)).sum(-1)


def best_of_n_kl_bound(n: int) -> float:
    """Right."""
    return math.log(n) - (n - 1) / n


def _law(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "best_of_n_law", best_of_n_law, right, wrong, seen)


def _maximum(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "expected_maximum", expected_maximum, right, wrong, seen)


def _bound(name: str, right: str, wrong: str, seen: str = "common") -> Bug:
    return Bug(name, "best_of_n_kl_bound", best_of_n_kl_bound, right, wrong, seen)


_WEIGHT = "math.comb(i - 1, n - 1) / math.comb(size, n) for i in range(1, size + 1)"
_BOUND = "math.log(n) - (n - 1) / n"

BUGS = (
    _law("worst of n", "score[None, :] <= score[:, None]", "score[None, :] >= score[:, None]"),
    _law("worst of n, both sides", "p = logp.exp()", "p, score = logp.exp(), -score"),
    _law("n - 1 draws", "(at_most**n - below**n)", "(at_most ** (n - 1) - below ** (n - 1))"),
    _law("n + 1 draws", "(at_most**n - below**n)", "(at_most ** (n + 1) - below ** (n + 1))"),
    _law("density n F^(n-1) p of a continuous score", "(at_most**n - below**n) * p / (at_most - below)",
         "n * at_most ** (n - 1) * p"),
    _law("distribution function for the law", "(at_most**n - below**n) * p / (at_most - below)",
         "at_most**n"),
    _law("mass below not subtracted", "(at_most**n - below**n) * p", "at_most**n * p"),
    _law("ties counted for each response", "(at_most**n - below**n) * p / (at_most - below)",
         "at_most**n - below**n"),
    _law("n times for the power", "(at_most**n - below**n)", "(n * at_most - n * below)"),
    _law("log-probs not exponentiated", "p = logp.exp()", "p = logp"),
    _law("not normalised after tilting by n", "(at_most**n - below**n) * p / (at_most - below)",
         "(p * (n * score).exp()) / (p * (n * score).exp()).sum()",
         "Best-of-n taken for a tilted policy, oracles B4"),
    _law("comparison transposed", "(score[None, :] < score[:, None])", "(score[None, :] > score[:, None])"),
    _law("uniform draws", "p = logp.exp()", "p = logp * 0 + 1 / len(logp)"),
    _maximum("largest of all samples", "(ordered * score.new_tensor(weight)).sum(-1)", "ordered[..., -1]",
             "best of N reported as best of n"),
    _maximum("largest of the first n", "(ordered * score.new_tensor(weight)).sum(-1)",
             "score[..., :n].amax(-1)"),
    _maximum("mean of the n largest", "(ordered * score.new_tensor(weight)).sum(-1)",
             "ordered[..., -n:].mean(-1)"),
    _maximum("expected minimum", "score.sort(dim=-1)", "score.sort(dim=-1, descending=True)"),
    _maximum("not sorted", "score.sort(dim=-1).values", "score"),
    _maximum("sorted over the prompts", "score.sort(dim=-1)", "score.sort(dim=0)"),
    _maximum("drawn with replacement", _WEIGHT, "(i / size) ** n - ((i - 1) / size) ** n for i in range(1, "
             "size + 1)",
             "the biased V-statistic"),
    _maximum("place off by one", "math.comb(i - 1, n - 1)", "math.comb(i, n - 1)"),
    _maximum("draws off by one", "math.comb(i - 1, n - 1) / math.comb(size, n)",
             "math.comb(i - 1, n) / math.comb(size, n + 1) if n < size else i == size"),
    _maximum("weights over ordered tuples", "math.comb(size, n)", "math.perm(size, n)"),
    _maximum("mean of the samples", "(ordered * score.new_tensor(weight)).sum(-1)", "score.mean(-1)"),
    _bound("last term forgotten", _BOUND, "math.log(n)"),
    _bound("last term added", _BOUND, "math.log(n) + (n - 1) / n"),
    _bound("last term inverted", _BOUND, "math.log(n) - n / (n - 1) if n > 1 else 0.0"),
    _bound("one over n", _BOUND, "math.log(n) - 1 / n"),
    _bound("bits and nats mixed", _BOUND, "math.log2(n) - (n - 1) / n"),
    _bound("logarithm to base 10", _BOUND, "math.log10(n) - (n - 1) / n"),
    _bound("one for the last term", _BOUND, "math.log(n) - 1"),
    _bound("logarithm of n - 1", _BOUND, "math.log(max(1, n - 1)) - (n - 1) / n"),
    _bound("square root of n", _BOUND, "math.sqrt(2 * (math.log(n) - (n - 1) / n))",
           "the distance of Gao et al. 2022"),
    _bound("negated", _BOUND, "(n - 1) / n - math.log(n)"),
)  # fmt: skip
