"""Best of n: the law of the best of n draws.

F is the distribution function of the score under the policy: the best of n has Fⁿ.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.one_step import kl
from minirlhf.verify.kinds import (
    Argument,
    Case,
    Claim,
    Convention,
    Kind,
    Law,
    Numbers,
    Options,
    Probed,
    Reals,
)
from minirlhf.verify.laws import column, formula, invariance, numeric_laws

BEIRAMI = "Beirami et al. 2024, section 3 (arXiv:2401.01879)"
OUTPUTS = {"logp": "log-probs", "p": "probabilities"}
TIES = "ties shared in proportion"
RARE = "rare responses"
IMPOSSIBLE = "impossible responses"

N_NAMES = ("num_samples", "n_samples", "k", "best_of", "best_of_n", "num_candidates", "num_draws", "draws")
SCORE_NAMES = ("scores", "reward", "rewards", "r", "values", "utilities")
LOGP = Argument(
    "logp",
    ("N",),
    Reals(-3.0, 3.0),
    "log-probs of all N responses in nats, normalised",
    synonyms=("logps", "log_probs", "logprobs", "ref_logp", "ref_logprobs", "policy_logp"),
)
SCORE = Argument("score", ("N",), Reals(-4.0, 4.0), "the score of each response", synonyms=SCORE_NAMES)
DRAWS = Argument(
    "n",
    (),
    Numbers((1, 2, 3, 5, 16), usual=(2, 4, 8, 16, 32)),
    "how many draws, an integer >= 1",
    synonyms=N_NAMES,
)
LAW_ARGUMENTS = (LOGP, SCORE, DRAWS)


CODE = {"logp": ".exp()", "p": ""}
"""From what the subject returns to probabilities."""


def _untied(case: Case) -> Case:
    """Normalised log-probs, and no two equal scores."""
    score = case["score"]
    if len(score.unique()) < len(score):
        score = score + torch.arange(len(score), dtype=torch.float64) / 64
    return {**case, "logp": torch.log_softmax(case["logp"], dim=0), "score": score}


def best_of_n(p: Tensor, score: Tensor, n: int) -> Tensor:
    """[F(y)ⁿ - F⁻(y)ⁿ] p(y) / [F(y) - F⁻(y)], response by response: [N]."""
    law = []
    for y in range(len(p)):
        tied, below = p[score == score[y]].sum(), p[score < score[y]].sum()
        mass = (below + tied) ** n - below**n
        law.append(mass * p[y] / tied if tied > 0 else 0 * p[y])
    return torch.stack(law)


def _law_oracle(case: Case, options: Options) -> Tensor:
    law = best_of_n(case["logp"].exp(), case["score"], int(case["n"]))
    return law.log() if options["output"] == "logp" else law


def _law_of(f: Probed, case: Case) -> Tensor:
    """The subject's law as probabilities: [N]."""
    got = f.value(case).double()
    return got.exp() if f.options["output"] == "logp" else got


def _law_is(f: Probed, case: Case, want: Tensor, why: str) -> Claim:
    """The claim that the law is that one, to six digits."""
    return Claim(case, _law_of(f, case), "==", want, why, take=CODE[f.options["output"]], loose=1e2)


def _holds(name: str, family: str, statement: str, source: str,
           claim: Callable[[Probed, Case, Tensor], Tensor]) -> Law:  # fmt: skip
    """Something is true of the law."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        law = _law_of(f, case)
        why = f"{statement}; the law is {[round(p, 6) for p in law.tolist()]}"
        yield Claim(case, claim(f, case, law), "holds", None, why)

    return Law(name, family, statement, source, check)


def near(got: Tensor, want: Tensor | float) -> Tensor:
    """Equal to five digits, as probabilities of a subject in single precision are."""
    return (got - want).abs() < 1e-5


def _extremes(f: Probed, case: Case, law: Tensor) -> Tensor:
    p, n = case["logp"].exp(), case["n"]
    best, worst = case["score"].argmax(), case["score"].argmin()
    return near(law[best], 1 - (1 - p[best]) ** n) & near(law[worst], p[worst] ** n)


def _dominates(f: Probed, case: Case, law: Tensor) -> Tensor:
    """No distribution function of the score rises: the best of n is at least as good, for every threshold."""
    order = case["score"].argsort()
    return (law[order].cumsum(0) <= case["logp"].exp()[order].cumsum(0) + 1e-6).all()


def _bounded_kl(f: Probed, case: Case, law: Tensor) -> Tensor:
    n = case["n"]
    safe = law.clamp(min=1e-300)
    return kl(safe, case["logp"].exp()) <= math.log(n) - (n - 1) / n + 1e-5


def _single_draw() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        one = {**case, "n": 1}
        if case["n"] == 1:
            want = case["logp"] if f.options["output"] == "logp" else case["logp"].exp()
            yield Claim(one, f.value(one), "==", want, "the best of one draw is the draw")

    return Law("one_draw", "identity", "best of 1 is the policy itself", "oracles B1", check, ("n",))


def _enumerated() -> Law:
    """Over all n-tuples of responses."""

    def cases() -> list[Case]:
        logp, score = column(0.5, 0.3, 0.2).log(), column(0.3, -1.0, 2.0)
        return [{"logp": logp, "score": score, "n": n} for n in (2, 3, 4)]

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        p, score = case["logp"].exp().tolist(), case["score"].tolist()
        want = torch.zeros(len(p), dtype=torch.float64)
        for draws in itertools.product(range(len(p)), repeat=int(case["n"])):
            want[max(draws, key=lambda y: score[y])] += math.prod(p[y] for y in draws)
        yield _law_is(f, case, want, f"the best of all {case['n']}-tuples, each with its probability")

    return Law(
        "enumerated",
        "value",
        "the best of every n-tuple, weighted with its probability",
        "oracles B1",
        check,
        ("n",),
        cases=cases,
    )


def _golden_law() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        yield _law_is(f, case, column(0.25, 0.3125, 0.4375), "(.25, .3125, .4375)")

    logp = column(0.5, 0.25, 0.25).log()
    case: Case = {"logp": logp, "score": column(0.0, 1.0, 2.0), "n": 2}
    return Law(
        "golden_law",
        "value",
        "best of 2 of (.5, .25, .25), worst first, is (.25, .3125, .4375)",
        BEIRAMI,
        check,
        ("n",),
        cases=lambda: [case],
    )


def _nested() -> Law:
    """F^(nm) = (Fⁿ)ᵐ."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        inner = _law_of(f, {**case, "n": 2})
        if bool((inner < 1e-9).any()):
            return  # its log would be what a subject rounds
        outer = {**case, "logp": inner.log(), "n": 3}
        want = _law_of(f, {**case, "n": 6})
        yield _law_is(f, outer, want, "the best of 3 draws from best of 2 is the best of 6")

    return Law(
        "best_of_best",
        "identity",
        "the best of m draws from the best of n is the best of m·n",
        BEIRAMI,
        check,
        ("n",),
    )


def _many_draws() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        many = {**case, "n": 5000}
        best = case["score"].argmax()
        if case["logp"][best] > math.log(0.01):
            got, take = _law_of(f, many)[best], f"{CODE[f.options['output']]}[{int(best)}]"
            why = "of 5,000 draws the best is the best"
            yield Claim(many, got, "==", torch.ones_like(got), why, take=take, loose=1e2)

    return Law(
        "many_draws",
        "limit",
        "with many draws the best response is all but certain",
        "oracles B1",
        check,
        ("n",),
    )


def _reordered() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = {**case, "logp": case["logp"].flip(0), "score": case["score"].flip(0)}
        yield Claim(
            changed, f.value(changed), "==", f.value(case).flip(0), "the responses in reverse", loose=10.0
        )

    return Law(
        "response_order",
        "symmetry",
        "the order in which responses are listed does not matter",
        "oracles B5",
        check,
    )


def _tie_laws() -> tuple[Law, Law]:
    def cases() -> list[Case]:
        logp = column(0.4, 0.3, 0.1, 0.2).log()
        score = column(1.0, 0.0, 1.0, 0.0)
        return [{"logp": logp, "score": score, "n": n} for n in (2, 3)]

    def total(f: Probed, case: Case) -> Iterator[Claim]:
        law, code = _law_of(f, case), CODE[f.options["output"]]
        why = "the first and the third tie for the best; at least one of them is drawn"
        want = column(1 - 0.5 ** case["n"])[0]
        yield Claim(case, law[[0, 2]].sum(), "==", want, why, take=f"{code}[[0, 2]].sum()", loose=1e2)
        why = "the probabilities add up to 1"
        yield Claim(case, law.sum(), "==", column(1.0)[0], why, take=f"{code}.sum()", loose=1e2)

    def shared(f: Probed, case: Case) -> Iterator[Claim]:
        want = best_of_n(case["logp"].exp(), case["score"], int(case["n"]))
        yield _law_is(f, case, want, "equal scores share as their probabilities")

    return (
        Law(
            "tied_total",
            "limit",
            "equal scores together have Fⁿ - F⁻ⁿ, and all probabilities add up to 1",
            "oracles B1",
            total,
            ("n",),
            cases=cases,
        ),
        Law(
            "ties",
            "limit",
            "equal scores share in proportion to their probabilities",
            f"oracles B1; {BEIRAMI}",
            shared,
            ("n",),
            proves=TIES,
            cases=cases,
        ),
    )


def _rare() -> Law:
    def cases() -> list[Case]:
        logp = column(-60.0, math.log(0.5), math.log(0.5))
        return [{"logp": logp, "score": column(*s), "n": 4} for s in ((3.0, 1.0, 2.0), (1.5, 1.0, 2.0))]

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        above = case["score"][0] > 2
        want = 4 * math.exp(-60.0) * (1.0 if above else 0.5**3)
        got = _law_of(f, case)[0].item()
        why = f"p = e⁻⁶⁰ becomes n F^(n-1) p = {want:.4e}; got {got:.4e}"
        yield Claim(case, torch.tensor(math.isclose(got, want, rel_tol=1e-3)), "holds", None, why)

    return Law(
        "rare_responses",
        "numeric",
        "the probability of a very rare response is right relative to itself",
        "F - F⁻ cancels",
        check,
        ("n",),
        proves=RARE,
        cases=cases,
    )


def _impossible() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        yield _law_is(f, case, column(0.0, 0.25, 0.75), "what is never drawn is never the best")

    logp = column(0.0, 0.5, 0.5).log()
    case: Case = {"logp": logp, "score": column(5.0, 1.0, 2.0), "n": 2}
    return Law(
        "impossible_responses",
        "numeric",
        "a response of probability 0 keeps it",
        "oracles B1",
        check,
        ("n",),
        proves=IMPOSSIBLE,
        cases=lambda: [case],
    )


def _stretched(case: Case) -> Case:
    return {**case, "score": case["score"].exp() - 7.0}


BEST_OF_N_LAW = Kind(
    name="best_of_n_law",
    title="the law of the best of n draws",
    arguments=LAW_ARGUMENTS,
    returns="[N] log-probs",
    shape=("N",),
    oracle=_law_oracle,
    arrange=_untied,
    conventions=(Convention("output", OUTPUTS),),
    laws=(
        formula("[F(y)ⁿ - F⁻(y)ⁿ] p(y) / [F(y) - F⁻(y)]", BEIRAMI),
        _golden_law(),
        _enumerated(),
        _holds(
            "normalised",
            "value",
            "the probabilities add up to 1",
            "oracles B1",
            lambda f, c, p: near(p.sum(), 1.0),
        ),
        _holds(
            "best_and_worst", "value", "the best response has 1 - (1 - p)ⁿ, the worst pⁿ", BEIRAMI, _extremes
        ),
        _single_draw(),
        _nested(),
        _many_draws(),
        _holds(
            "dominates",
            "limit",
            "at every threshold the best of n is at least as likely to be above it",
            "Fⁿ <= F",
            _dominates,
        ),
        _holds(
            "kl_bound",
            "limit",
            "its KL from the policy is at most log n - (n-1)/n",
            "oracles B2",
            _bounded_kl,
        ),
        invariance(
            "order_of_scores", "symmetry", "only the order of the scores counts", "oracles B5", _stretched
        ),
        _reordered(),
        *_tie_laws(),
        _rare(),
        _impossible(),
        *numeric_laws(["logp", "score"]),
    ),
)

KINDS = (BEST_OF_N_LAW,)
