"""What the best of n is worth, from scored samples, and the bound on how far it is from the policy."""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.best_of_n import BEIRAMI, DRAWS, SCORE_NAMES, best_of_n, near
from minirlhf.verify.families.exact_kl import FACTORS
from minirlhf.verify.families.one_step import kl
from minirlhf.verify.kinds import Argument, Case, Claim, Kind, Law, Numbers, Options, Probed, Reals
from minirlhf.verify.laws import (
    batch_laws,
    column,
    formula,
    golden,
    invariance,
    numeric_laws,
    relation,
    table,
)

PROMPTS = Argument(
    "score",
    ("P", "N"),
    Reals(-4.0, 4.0, special=(0.0, 1.0)),
    "scores of N independent samples of each prompt",
    synonyms=SCORE_NAMES,
)
MAXIMUM_ARGUMENTS = (PROMPTS, DRAWS)


def _drawable(case: Case) -> Case:
    """n is at most N."""
    return {**case, "n": min(int(case["n"]), case["score"].shape[1])}


def _mean_of_maxima(row: list[float], n: int) -> float:
    """Over all subsets of n samples."""
    return sum(map(max, itertools.combinations(row, n))) / math.comb(len(row), n)


def _maximum_oracle(case: Case, options: Options) -> Tensor:
    """Σ r₍ᵢ₎ C(i-1, n-1) / C(N, n): [P]."""
    n, size = int(case["n"]), case["score"].shape[1]
    weight = [math.comb(i - 1, n - 1) / math.comb(size, n) for i in range(1, size + 1)]
    return (case["score"].sort(dim=-1).values * column(*weight)).sum(-1)


def _subsets() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        if case["score"].shape[1] <= 5:
            want = column(*(_mean_of_maxima(row, int(case["n"])) for row in case["score"].tolist()))
            yield Claim(
                case, f.value(case), "==", f.reduced(want, case), "the mean of the maximum over all subsets"
            )

    return Law(
        "all_subsets",
        "value",
        "it is the mean of the maximum over all subsets of n samples",
        "Hoeffding 1948: a U-statistic",
        check,
    )


def _unbiased() -> Law:
    """Over every outcome of N draws from three scores."""
    p, values = (0.5, 0.3, 0.2), (0.0, 1.0, 3.0)

    def cases() -> list[Case]:
        outcomes = list(itertools.product(range(3), repeat=4))
        return [{"score": table(*([values[y] for y in o] for o in outcomes)), "n": n} for n in (2, 3)]

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        n, got = int(case["n"]), torch.zeros((), dtype=torch.float64)
        for row in case["score"]:
            chance = math.prod(p[values.index(score)] for score in row.tolist())
            got = got + chance * f.value({**case, "score": row[None]}).reshape(())
        want = 0.0 + 1.0 * (0.8**n - 0.5**n) + 3.0 * (1 - 0.8**n)
        why = (
            f"its mean over all outcomes of 4 draws is {got.item():.6f}, the best of {n} is worth {want:.6f}"
        )
        yield Claim(case, near(got, want), "holds", None, why)

    return Law(
        "unbiased",
        "value",
        "over every outcome of N draws its mean is the expected best of n",
        "oracles B3",
        check,
        ("n",),
        cases=cases,
    )


def _passes() -> Law:
    """Scores of 0 and 1: pass@n."""

    def cases() -> list[Case]:
        score = table([0.0, 1.0, 0.0, 0.0, 1.0], [0.0] * 5, [1.0] * 5, [0.0, 0.0, 0.0, 1.0, 0.0])
        return [{"score": score, "n": n} for n in (1, 2, 4)]

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        right, n = case["score"].sum(-1).tolist(), int(case["n"])
        want = column(*(1 - math.comb(5 - int(c), n) / math.comb(5, n) for c in right))
        yield Claim(
            case, f.value(case), "==", f.reduced(want, case), "1 - C(N - c, n)/C(N, n) with c right samples"
        )

    return Law(
        "pass_at_n",
        "identity",
        "of scores 0 and 1 it is pass@n, 1 - C(N - c, n)/C(N, n)",
        "Chen et al. 2021, Eq. 1 (arXiv:2107.03374)",
        check,
        ("n",),
        cases=cases,
    )


def _at_n(name: str, statement: str, n: Callable[[int], int], want: Callable[[Tensor], Tensor]) -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = {**case, "n": n(case["score"].shape[1])}
        yield Claim(changed, f.value(changed), "==", f.reduced(want(case["score"]), case), statement)

    return Law(name, "limit", statement, "oracles B3", check, ("n",))


def _grows() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        more = {**case, "n": case["n"] + 1}
        if more["n"] <= case["score"].shape[1]:
            yield Claim(more, f.value(more), ">=", f.value(case), "one more draw is worth no less")

    return Law("grows_with_n", "limit", "more draws are worth no less", "Fⁿ falls with n", check, ("n",))


def _between() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        got, score = f.value(case), case["score"]
        yield Claim(case, got, ">=", f.reduced(score.mean(-1), case), "at least the mean")
        yield Claim(case, got, "<=", f.reduced(score.amax(-1), case), "at most the largest")

    return Law(
        "between_mean_and_maximum", "limit", "between the mean and the largest score", "oracles B3", check
    )


EXPECTED_MAXIMUM = Kind(
    name="expected_maximum",
    title="the expected best score of n draws, from N scored samples, without bias",
    arguments=MAXIMUM_ARGUMENTS,
    returns="[P] in the units of the score",
    shape=("P",),
    oracle=_maximum_oracle,
    arrange=_drawable,
    reducible=True,
    laws=(
        formula("Σ r₍ᵢ₎ C(i-1, n-1) / C(N, n)", "Hoeffding 1948; oracles B3"),
        golden(
            "golden_maximum",
            {"score": table([0.0, 1.0, 3.0]), "n": 2},
            [7 / 3],
            "of (0, 1, 3) the best of 2 is worth 7/3",
            "all three pairs: (1 + 3 + 3)/3",
            needs=("n",),
        ),
        _subsets(),
        _unbiased(),
        _passes(),
        _at_n("one_draw", "one draw is worth the mean", lambda size: 1, lambda score: score.mean(-1)),
        _at_n(
            "all_draws",
            "all N together are worth the largest",
            lambda size: size,
            lambda score: score.amax(-1),
        ),
        _grows(),
        _between(),
        relation(
            "shift",
            "symmetry",
            "a constant added to all scores is added to it",
            "max(r + c) = max(r) + c",
            lambda c: {**c, "score": c["score"] + 2.5},
            lambda v, c, f: v + f.reduced(torch.full_like(c["score"][:, 0], 2.5), c),
        ),
        relation(
            "scale",
            "symmetry",
            "scores times 3 are worth 3 times as much",
            "max(3 r) = 3 max(r)",
            lambda c: {**c, "score": 3 * c["score"]},
            lambda v, c, f: 3 * v,
        ),
        invariance(
            "sample_order",
            "symmetry",
            "the order of the samples does not matter",
            "oracles B5",
            lambda c: {**c, "score": c["score"].flip(-1)},
        ),
        relation(
            "equal_scores",
            "limit",
            "equal scores are worth just that",
            "oracles B3",
            lambda c: {**c, "score": c["score"][:, :1].expand_as(c["score"]).clone()},
            lambda v, c, f: f.reduced(c["score"][:, 0], c),
        ),
        *batch_laws(MAXIMUM_ARGUMENTS, axis="P"),
        *numeric_laws(["score"]),
    ),
)


BOUND_DRAWS = DRAWS._replace(domain=Numbers((1, 2, 3, 4, 8, 10, 16, 64, 1024)))


def _bound_oracle(case: Case, options: Options) -> Tensor:
    n = float(case["n"])
    return torch.tensor(math.log(n) - (n - 1) / n, dtype=torch.float64)


def _golden_bound(n: int, want: float) -> Law:
    return golden(
        f"golden_{n}",
        {"n": n},
        torch.tensor(want, dtype=torch.float64),
        f"n = {n}: {want:.6f} nats",
        "oracles 3.3, 5.3",
        loose=1e2,
    )


def _above_exact() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        n, got = int(case["n"]), f.value(case)
        for size in (2, 5, 40):
            p = torch.softmax(torch.arange(size, dtype=torch.float64).sin(), 0)
            exact = kl(best_of_n(p, torch.arange(size), n).clamp(min=1e-300), p)
            yield Claim(case, got, ">=", exact, f"the exact KL of best of {n} on {size} responses")

    return Law(
        "above_the_exact_kl",
        "limit",
        "no law of responses has a best of n that is farther away",
        "oracles B2",
        check,
    )


def _approached() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        n, size = int(case["n"]), 4000
        edges = (torch.arange(size + 1, dtype=torch.float64) / size) ** n
        law = (edges[1:] - edges[:-1]).clamp(min=1e-300)
        exact = (law * (law * size).log()).sum()
        got = f.value(case)
        yield Claim(
            case, got, "<=", exact + 0.02, f"the exact KL of best of {n} on 4,000 equal responses, and .02"
        )

    return Law(
        "approached",
        "limit",
        "where no response has much probability it is nearly the KL",
        BEIRAMI,
        check,
        cases=lambda: [{"n": n} for n in (1, 2, 4, 16, 64)],
    )


def _differences() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        n = case["n"]
        twice = {**case, "n": 2 * n}
        got, want = f.value(twice), f.value(case) + math.log(2) - 1 / (2 * n)
        yield Claim(twice, got, "==", want, "twice the draws: log 2 - 1/(2n) more")

    return Law("doubling", "identity", "twice the draws add log 2 - 1/(2n)", BEIRAMI, check)


def _grows_slowly() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        n = case["n"]
        yield Claim(case, f.value(case), ">=", column(math.log(n) - 1)[0], "at least log n - 1")
        yield Claim(case, f.value(case), "<=", column(math.log(n))[0], "at most log n")

    return Law("logarithmic", "limit", "between log n - 1 and log n", BEIRAMI, check)


def _never_negative() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        yield Claim(case, f.value(case), ">=", torch.zeros((), dtype=torch.float64), "a bound on a KL")

    return Law("non_negative", "limit", "never negative", "oracles B2", check)


BEST_OF_N_KL_BOUND = Kind(
    name="best_of_n_kl_bound",
    title="log n - (n-1)/n, the most that best of n can be away from the policy",
    arguments=(BOUND_DRAWS,),
    returns="a number in nats",
    shape=(),
    oracle=_bound_oracle,
    factors=FACTORS,
    laws=(
        formula("log n - (n-1)/n", BEIRAMI),
        _golden_bound(1, 0.0),
        _golden_bound(2, 0.193147),
        _golden_bound(4, 0.636294),
        _golden_bound(64, 3.174508),
        _golden_bound(1024, 5.932448),
        _differences(),
        _above_exact(),
        _approached(),
        _grows_slowly(),
        _never_negative(),
    ),
)

KINDS = (EXPECTED_MAXIMUM, BEST_OF_N_KL_BOUND)
