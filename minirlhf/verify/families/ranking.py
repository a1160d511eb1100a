"""Plackett-Luce: rankings of any number of responses by reward, each chosen among those that are left."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.pair_laws import never_negative
from minirlhf.verify.families.pairs import FACTORS, REWARDS, softplus
from minirlhf.verify.kinds import Argument, Case, Claim, Kind, Law, Mask, Options, Probed, Reals
from minirlhf.verify.laws import (
    batch_laws,
    bounded,
    empty_row_law,
    finite_at,
    formula,
    golden,
    gradient,
    invariance,
    mask_laws,
    numeric_laws,
    relation,
    rows_of,
    table,
)

PLACKETT = "Plackett 1975, Luce 1959; Rafailov et al. 2023, appendix A.3 (arXiv:2305.18290)"
GAPS = "items missing in the middle"
_ARGUMENTS = (
    Argument("reward", ("B", "K"), Reals(), "rewards of the responses to one prompt, from best to worst",
             synonyms=("rewards", "scores", "score", "logits", "utilities", "utility", "values",
                       "ranked_rewards", "r")),
    Argument("mask", ("B", "K"), Mask(), "True = there is an item",
             neutral=lambda case: torch.ones_like(case["reward"], dtype=torch.bool),
             synonyms=("masks", "valid", "valid_mask", "item_mask", "attention_mask", "is_item")),
)  # fmt: skip


def _plackett_luce(case: Case, options: Options) -> Tensor:
    losses = []
    for reward, mask in zip(case["reward"], case["mask"], strict=True):
        items = reward[mask]
        stages = [torch.logsumexp(items[k:], dim=0) - items[k] for k in range(len(items))]
        losses.append(torch.stack(stages).sum() if stages else items.sum())
    return torch.stack(losses)


def _packed(case: Case) -> Case:
    """Rankings of unequal length, their padding last."""
    return case | {"mask": case["mask"].long().sort(dim=-1, descending=True).values.bool()}


def _ranked(*rows: tuple[float, ...]) -> Case:
    """Rankings without padding."""
    return {"reward": table(*rows), "mask": torch.ones(len(rows), len(rows[0]), dtype=torch.bool)}


def _full(case: Case) -> Case:
    return case | {"mask": torch.ones_like(case["mask"])}


def _columns(case: Case, index: list[int]) -> Case:
    """These items of each ranking, in this order."""
    return case | {name: case[name][:, index] for name in ("reward", "mask")}


def _widened(case: Case, reward: float, *, front: bool) -> Case:
    """One more item in each ranking."""
    item, there = torch.full_like(case["reward"][:, :1], reward), torch.ones_like(case["mask"][:, :1])
    order = slice(None, None, 1 if front else -1)
    return case | {
        "reward": torch.cat([item, case["reward"]][order], dim=1),
        "mask": torch.cat([there, case["mask"]][order], dim=1),
    }


def _two_items() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        pair = _columns(_full(case), [0, 1])
        first, second = pair["reward"].unbind(dim=1)
        yield Claim(pair, f.value(pair), "==", f.reduced(softplus(second - first), pair), "-log σ(r₁ - r₂)")

    return Law("bradley_terry_of_two", "identity", "two items are Bradley-Terry", "oracles BT13", check)


def _chain_rule() -> Law:
    """The best among all, then the rest among themselves."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        rest = _full(case)
        full = _widened(rest, 0.5, front=True)
        first = -torch.log_softmax(full["reward"], dim=1)[:, 0]
        why = "-log softmax(r)₁ for the best, and the loss of the others' ranking"
        yield Claim(full, f.value(full), "==", f.reduced(first, full) + f.value(rest), why)

    statement = "L(r₁, ..., r_K) = -log softmax(r)₁ + L(r₂, ..., r_K)"
    return Law("chain_rule", "identity", statement, PLACKETT, check)


def _last_pair() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        full = _full(case)
        count = full["reward"].shape[1]
        other = _columns(full, [*range(count - 2), count - 1, count - 2])
        better, worse = full["reward"][:, -2:].unbind(dim=1)
        want = f.value(full) + f.reduced(better - worse, full)
        yield Claim(other, f.value(other), "==", want, "the last two exchanged: greater by their difference")

    statement = "the last two exchanged add r_(K-1) - r_K"
    return Law("last_pair_exchanged", "symmetry", statement, "oracles BT4", check)


def _equal_rewards() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        equal = case | {"reward": torch.full_like(case["reward"], 0.75)}
        orders = torch.lgamma(case["mask"].sum(dim=1).double() + 1)
        yield Claim(equal, f.value(equal), "==", f.reduced(orders, case), "log n!: every order is as likely")

    return Law("equal_rewards", "limit", "log n! where n items have equal rewards", PLACKETT, check)


def _probability(f: Probed, case: Case) -> float:
    """e^-L of one ranking, which any reduction leaves as it is."""
    return math.exp(-min(700.0, float(f.value(case).sum())))


def _orders(case: Case) -> list[tuple[int, ...]]:
    return list(itertools.permutations(range(case["reward"].shape[1])))


def _few_items() -> list[Case]:
    return [_ranked((1.0, 0.25, -0.75)), _ranked((0.5, 2.0, -1.25, 0.0))]


def _sums_to_one() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        total = sum(_probability(f, _columns(case, list(order))) for order in _orders(case))
        why = f"the probabilities e^-L of all orders of these items sum to {total:.6f}"
        yield Claim(case, torch.tensor(abs(total - 1) < 1e-5), "holds", None, why)

    statement = "e^-L over all orders sums to 1"
    return Law("sums_to_one", "identity", statement, "oracles BT13", check, cases=_few_items)


def _marginals() -> Law:
    """Who is before whom follows Bradley-Terry, whatever the others are."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        chances = {order: _probability(f, _columns(case, list(order))) for order in _orders(case)}
        reward = case["reward"][0]
        for i, j in itertools.combinations(range(len(reward)), 2):
            before = sum(p for order, p in chances.items() if order.index(i) < order.index(j))
            want = float(torch.sigmoid(reward[i] - reward[j]))
            why = f"P(item {i} before item {j}) = σ(r_{i} - r_{j}) = {want:.6f}, and the orders give "
            why += f"{before:.6f}"
            yield Claim(case, torch.tensor(abs(before - want) < 1e-5), "holds", None, why)

    return Law("pairwise_marginals", "identity", "item i comes before item j with probability σ(r_i - r_j)",
               "oracles BT13", check, cases=_few_items)  # fmt: skip


def _population_optimum() -> Law:
    """The expected gradient over all orders of three items with their true probabilities."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        total = torch.zeros(3, dtype=torch.float64)
        for order in _orders(case):
            left = REWARDS[list(order)]
            chance = torch.softmax(left, dim=0)[0] * torch.softmax(left[1:], dim=0)[0]
            total[list(order)] += chance * f.grad(_columns(case, list(order)), "reward")[0]
        why = f"at the true rewards the expected gradient is {[round(g, 6) for g in total.tolist()]}"
        yield Claim(case, total.abs() < 1e-6, "holds", None, why)

    return Law("population_optimum", "limit",
               "the maximum-likelihood rewards of all orders are the true ones", "oracles BT12", check,
               cases=lambda: [_ranked(tuple(REWARDS.tolist()))])  # fmt: skip


def _gradients_cancel() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        slope = f.grad(case, "reward")
        total = slope.sum(dim=1)
        why = f"the gradients of a ranking sum to 0, and these to {[round(x, 6) for x in total.tolist()]}"
        yield Claim(case, total.abs() < 1e-4, "holds", None, why)
        first = torch.zeros_like(slope[:, 0])
        yield Claim(case, slope[:, 0], "<=", first, "the best item is pushed up", wrt="reward", take="[:, 0]")

    return Law("gradients_cancel", "gradient",
               "a ranking's gradients sum to 0, the best item's pushing it up",
               "oracles BT14", check)  # fmt: skip


def _absent_items() -> Law:
    """Masked items take no part, neither chosen nor left over."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        for row in range(len(case["reward"])):
            single = rows_of(_ARGUMENTS, case, torch.tensor([row]))
            short = _columns(single, list(range(max(2, int(single["mask"].sum())))))
            why = "the ranking with its masked items is the ranking without them"
            yield Claim(single, f.value(single), "==", f.value(short), why)

    statement = "a masked item is as if it were not there"
    return Law("masked_items_are_absent", "mask", statement, "P2, P23", check, ("mask",))


def _gaps() -> Law:
    """A mask that is False between two items."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        full = _columns(case, [0, 0, *range(1, case["reward"].shape[1])])
        gap = full | {"mask": full["mask"].clone()}
        gap["mask"][:, 1] = False
        why = "an item that is missing in the middle changes nothing"
        yield Claim(gap, f.value(gap), "==", f.value(case), why)

    return Law("gap_in_the_ranking", "mask", "an item may be missing in the middle of a ranking", "P23",
               check, ("mask",), proves=GAPS)  # fmt: skip


def _extreme() -> list[Case]:
    return [
        _ranked((1e4, 0.0, -1e4), (-1e4, 1e4, 0.0), (-1e4, -1e4, -1e4), (1e4, 1e4, 1e4), (800.0, -800.0, 0.0))
    ]


def _first_choice(case: Case) -> Tensor:
    """-log of the probability that the best is chosen among all."""
    there = case["reward"].masked_fill(~case["mask"], -torch.inf)
    return torch.logsumexp(there, dim=1) - there[:, 0]


_MASKED = tuple(
    law
    for law in mask_laws(_ARGUMENTS, differentiable=("reward",), along="K")
    if law.name != "zero_under_mask"  # the result has no item axis
)
PLACKETT_LUCE = Kind(
    name="plackett_luce",
    title="Plackett-Luce, Σₖ [log Σ_{j >= k} e^(rⱼ) - rₖ]",
    arguments=_ARGUMENTS,
    returns="[B] losses in nats",
    shape=("B",),
    oracle=_plackett_luce,
    differentiable=("reward",),
    arrange=_packed,
    reducible=True,
    factors=FACTORS,
    mask="mask",
    extra_cases=lambda: [_ranked((0.5, 0.5, -1.0, -1.0)), _ranked((3.0, -2.0, 1.0), (12.0, 11.0, -12.0))],
    laws=(
        formula("the loss of each ranking is Σₖ [log Σ_{j >= k} e^(rⱼ) - rₖ] over its items", PLACKETT),
        golden("golden_ranking", _ranked((2.0, 1.0, 0.0)), [0.720868],
               "rewards 2, 1, 0: .407606 + .313262 = .720868", "oracles 5.1 for its last stage"),
        golden("golden_pair", _ranked((4.0, 0.0), (0.0, 4.0)), [0.018150, 4.018150],
               "rewards (4, 0) and (0, 4): .018150, 4.018150", "oracles 5.1"),
        gradient("reward", "∂L/∂rᵢ = Σ_{k <= i} pₖ(i) - 1, pₖ(i) the probability of i at stage k", PLACKETT),
        _two_items(),
        _chain_rule(),
        _last_pair(),
        _equal_rewards(),
        _sums_to_one(),
        _marginals(),
        _population_optimum(),
        _gradients_cancel(),
        invariance("prompt_constant", "symmetry",
                   "a constant of each prompt added to its rewards changes nothing", "oracles BT13",
                   lambda c: c | {"reward": c["reward"] + torch.arange(len(c["reward"]))[:, None] - 1.5},
                   gradients=("reward",)),
        relation("hopeless_item_last", "limit", "a last item of reward -10,000 adds nothing", PLACKETT,
                 lambda c: _widened(_full(c), -1e4, front=False), lambda v, c, f: f.value(_full(c))),
        relation("certain_item_first", "limit", "a first item of reward 10,000 adds nothing", PLACKETT,
                 lambda c: _widened(_full(c), 1e4, front=True), lambda v, c, f: f.value(_full(c))),
        never_negative(),
        bounded("at_least_the_first_choice", "limit", "the loss is at least that of choosing the best",
                PLACKETT, ">=", lambda c, f: f.reduced(_first_choice(c), c)),
        _absent_items(),
        *_MASKED,
        _gaps(),
        empty_row_law(_ARGUMENTS),
        finite_at("stable", "rewards of ±10,000 give the right loss and gradient", "oracles BT8", _extreme,
                  gradients=("reward",)),
        *batch_laws(_ARGUMENTS),
        *numeric_laws(("reward",)),
    ),
)  # fmt: skip

KINDS = (PLACKETT_LUCE,)
