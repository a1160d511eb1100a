"""Group-normalised advantages: over the deviation of the group, or of the batch."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirlhf.verify.families.groups import (
    EIGHT,
    GROUP_SIZE,
    MASK,
    ONE,
    REWARD,
    arranged,
    at,
    by_outcome,
    centred_rewards,
    each_group,
    shared_laws,
)
from minirlhf.verify.kinds import Argument, Case, Claim, Convention, Kind, Law, Numbers, Options, Probed
from minirlhf.verify.laws import formula, relation

SHAO = "Shao et al. 2024, section 4.1.2 (arXiv:2402.03300)"
EPSILON = Argument("epsilon", (),
                   Numbers((1e-4, 0.25, 1e-2, 1e-6), usual=(1e-4, 1e-6, 1e-8, 0.0, 1e-5, 1e-9, 1e-7)),
                   "ε >= 0, beside the standard deviation",
                   synonyms=("eps", "advantage_eps", "std_eps", "epsilon_std",
                             "variance_epsilon"))  # fmt: skip
ARGUMENTS = (REWARD, MASK, EPSILON)
CONVENTIONS = (
    Convention("standard deviation", {"unbiased": "unbiased, n - 1", "biased": "biased, n"}),
    Convention("taken over", {
        "group": "the samples of the prompt",
        "batch": "the rewards of the whole batch",
        "centred": "the whole batch, after each group was centred",
    }),
    Convention("place of epsilon",
               {"outside": "added to the deviation", "inside": "added to the variance, in the root"}),
)  # fmt: skip


def _spread(deviations: Tensor, case: Case, options: Options) -> Tensor:
    """What deviations from a mean are divided by; infinite where they do not vary."""
    n = len(deviations) - (options["standard deviation"] == "unbiased")
    variance = deviations.square().sum() / max(n, 1)
    if float(variance) == 0:
        return torch.full_like(variance, torch.inf)
    if options["place of epsilon"] == "inside":
        return (variance + case["epsilon"]).sqrt()
    return variance.sqrt() + case["epsilon"]


def _normalised(case: Case, options: Options) -> Tensor:
    centred = centred_rewards(case, options)
    if options["taken over"] == "group":
        return each_group({**case, "reward": centred}, lambda d: d / _spread(d, case, options))
    tokens = (case["reward"] if options["taken over"] == "batch" else centred)[case["mask"]]
    return centred / _spread(tokens - tokens.sum() / max(len(tokens), 1), case, options)


def _equal_beside_unequal(**numbers: float) -> list[Case]:
    reward = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    return [{"reward": reward, "mask": torch.ones_like(reward).bool(), **numbers}]


def _outcomes(rights: int, n: int) -> Callable[[Case, Options], tuple[float, float]]:
    """Closed form for rewards 1 and 0 of one prompt."""

    def values(case: Case, options: Options) -> tuple[float, float]:
        q = rights / n
        variance = q * (1 - q) * n / (n - (options["standard deviation"] == "unbiased"))
        inside = options["place of epsilon"] == "inside"
        divisor = (variance + case["epsilon"]) ** 0.5 if inside else variance**0.5 + case["epsilon"]
        return (1 - q) / divisor, -q / divisor

    return values


def _divided_by(case: Case, options: Options) -> Tensor:
    """What each prompt's deviations were divided by, over their deviation: [P, 1]; 1 where they are equal."""
    ratio = torch.ones(len(case["reward"]), 1, dtype=torch.float64)
    for p, (row, keep) in enumerate(zip(centred_rewards(case, options), case["mask"], strict=True)):
        with_epsilon = _spread(row[keep], case, options)
        if bool(with_epsilon.isfinite()):
            ratio[p] = with_epsilon / _spread(row[keep], {**case, "epsilon": 0.0}, options)
    return ratio


def _unit_variance() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        if f.options["taken over"] != "group":
            return
        got, n = f.value(case), case["mask"].sum(-1, keepdim=True)
        degrees = n - int(f.options["standard deviation"] == "unbiased")
        norm = got.square().sum(-1, keepdim=True).sqrt()
        target = degrees.double().sqrt() / _divided_by(case, f.options)
        want = torch.where(norm > 0, got / norm * target, 0.0)
        yield Claim(case, got, "==", want, "the squares sum to n - 1 (unbiased) or n (biased), less for ε")

    return Law("sum_of_squares", "identity",
               "the squares of a prompt's advantages sum to n - 1, or n, but for ε",
               "oracles R5", check)  # fmt: skip


def _bounded() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        if f.options["taken over"] != "group":
            return
        got, n = f.value(case), case["mask"].sum(-1, keepdim=True).double()
        unbiased = f.options["standard deviation"] == "unbiased"
        most = ((n - 1) / n.sqrt() if unbiased else (n - 1).sqrt()).expand_as(got)
        yield Claim(case, got, "<=", most, "one right among n - 1 wrong has the largest advantage there is")
        yield Claim(case, got, ">=", -most, "one wrong among n - 1 right has the smallest there is")

    return Law(
        "bounds",
        "limit",
        "no advantage is beyond (n-1)/√n (unbiased) or √(n-1) (biased)",
        "oracles R5",
        check,
    )


def _unit() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        power = 2 if f.options["place of epsilon"] == "inside" else 1
        changed = {**case, "reward": 4 * case["reward"], "epsilon": 4**power * case["epsilon"]}
        yield Claim(changed, f.value(changed), "==", f.value(case), "rewards and ε in another unit: the same")

    return Law("unit", "symmetry", "the advantage has no unit", "oracles R5", check, ("epsilon",))


def _lone_success(case: Case, options: Options) -> list[float]:
    right, wrong = _outcomes(1, 4)(case, options)
    return [right, wrong, wrong, wrong]


NORMALISED = Kind(
    name="group_normalised",
    title="group-normalised advantages",
    last_axis=GROUP_SIZE,
    arguments=ARGUMENTS,
    returns="[P, G] without unit",
    shape=("P", "G"),
    oracle=_normalised,
    arrange=arranged,
    conventions=CONVENTIONS,
    extra_cases=lambda: _equal_beside_unequal(epsilon=1e-4),
    mask="mask",
    sizes={"P": (1, 3), "G": (2, 4)},
    laws=(
        formula("(r_i - μ)/(σ + ε) with mean and deviation of the samples of its prompt", SHAO),
        at("golden_eight",
            "3 of 8 right: 1.207615 and -.724569 (unbiased), 1.290994 and -.774597 (biased), but for ε",
            "oracles 5.3; Relax #174", EIGHT, lambda c, o: by_outcome(*_outcomes(3, 8)(c, o))),
        at("golden_pair", "1 and 0: ±.707107 (unbiased) or ±1 (biased), but for ε", "oracles 1.2",
            [[1.0, 0.0]],
            lambda c, o: list(_outcomes(1, 2)(c, o))),
        at("lone_success",
            "one right of four: 1.5 and -.5 (unbiased), 1.732051 and -.577350 (biased), but for ε",
            "oracles 1.2, 5.4 (13)", [[1.0, 0.0, 0.0, 0.0]], _lone_success),
        relation("negation", "symmetry", "rewards times -1: the advantage times -1", "oracles R5",
                 lambda c: {**c, "reward": -c["reward"]}, lambda v, c, f: -v),
        _unit(),
        _unit_variance(),
        _bounded(),
        at("single_sample", "a prompt with one sample gives 0",
            "bugs F08: the deviation of one number is NaN",
            [[2.5]], lambda c, o: [0.0], family="limit", proves=ONE),
        *shared_laws(ARGUMENTS),
    ),
)  # fmt: skip

KINDS = (NORMALISED,)
