"""Advantages of several samples of one prompt: leave-one-out, centred, normalised.

`reward` is [P, G], one row for each prompt. A subject that asks for the size of a group, by one of the names
in GROUP_SIZE, gets them flattened.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirlhf.verify.kinds import Argument, Case, Claim, Kind, Law, Mask, Options, Probed, Reals
from minirlhf.verify.laws import batch_laws, empty_row_law, formula, mask_laws, numeric_laws, relation

KOOL = "Kool et al. 2019; Ahmadian et al. 2024 (arXiv:2402.14740)"
LIU = "Liu et al. 2025, section 3.2 (arXiv:2503.20783)"
ONE = "groups of one"

REWARD = Argument("reward", ("P", "G"), Reals(-4.0, 4.0, special=(0.0, 1.0)),
                  "the reward of each sample of a prompt",
                  synonyms=("rewards", "r", "scores", "score", "group_rewards", "outcome_rewards", "returns",
                            "sequence_rewards", "grouped_rewards"))  # fmt: skip
MASK = Argument("mask", ("P", "G"), Mask(), "True = the sample was scored",
                neutral=lambda c: torch.ones_like(c["reward"]).bool(),
                synonyms=("masks", "scored", "valid", "valid_mask", "is_valid", "reward_mask",
                          "sample_mask"))  # fmt: skip
PLAIN = (REWARD, MASK)


def arranged(case: Case) -> Case:
    """At least two scored samples of each prompt, not always neighbours; now and then of a small spread."""
    mask = case["mask"].clone()
    mask[mask.sum(-1) < 2] = True
    size = mask.shape[1]
    mask[1::2] = mask[1::2][:, torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])]
    small = "epsilon" in case and float(case["reward"][0, 0]) > 1
    return {**case, "mask": mask, "reward": case["reward"] / 1024 if small else case["reward"]}


def each_group(case: Case, row: Callable[[Tensor], Tensor]) -> Tensor:
    """The rewards of each prompt that were scored, through `row`; 0 elsewhere."""
    result = torch.zeros_like(case["reward"])
    for p, keep in enumerate(case["mask"]):
        if bool(keep.any()):
            result[p, keep] = row(case["reward"][p, keep])
    return result


def _rloo(case: Case, options: Options) -> Tensor:
    def leave_one_out(r: Tensor) -> Tensor:
        others = [torch.cat([r[:i], r[i + 1 :]]) for i in range(len(r))]
        return torch.stack([x - o.mean() if len(o) else x * 0 for x, o in zip(r, others, strict=True)])

    return each_group(case, leave_one_out)


def centred_rewards(case: Case, options: Options) -> Tensor:
    return each_group(case, lambda r: r - r.sum() / len(r))


def _given(reward: list[list[float]], case: Case) -> Case:
    """These rewards, all scored, with the numbers of the case."""
    x = torch.tensor(reward, dtype=torch.float64)
    return {**case, "reward": x, "mask": torch.ones_like(x).bool()}


def at(name: str, statement: str, source: str, reward: list[list[float]],
        want: Callable[[Case, Options], list[float]], *, family: str = "value",
        proves: str | None = None) -> Law:  # fmt: skip
    """The value on these rewards."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        given = _given(reward, case)
        target = torch.tensor(want(given, f.options), dtype=torch.float64).expand_as(given["reward"])
        yield Claim(given, f.value(given), "==", target, statement, loose=1e2)

    return Law(name, family, statement, source, check, proves=proves)


def _slopes(own: Callable[[Tensor], Tensor], cross: Callable[[Tensor], Tensor], source: str,
            words: tuple[str, str]) -> tuple[Law, ...]:  # fmt: skip
    """The answer to one more reward of one sample, exactly, since all are linear. own, cross: of n [P, 1]."""

    def law(name: str, itself: bool, statement: str) -> Law:
        def check(f: Probed, case: Case) -> Iterator[Claim]:
            base, n = f.value(case), case["mask"].sum(-1, keepdim=True).double()
            for k in range(base.shape[1]):
                reward = case["reward"].clone()
                reward[:, k] += 1
                changed = {**case, "reward": reward}
                here = torch.arange(base.shape[1]) == k
                answer = torch.where(here, own(n), cross(n)) * case["mask"] * case["mask"][:, k : k + 1]
                got = f.value(changed)
                want = torch.where(here == itself, base + answer, got)
                yield Claim(changed, got, "==", want, f"{statement}, sample {k}")

        return Law(name, "gradient", statement, source, check)

    return law("own_slope", True, words[0]), law("cross_slope", False, words[1])


def _sum_zero() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        got, n = f.value(case), case["mask"].sum(-1, keepdim=True)
        want = torch.where(case["mask"], got - got.sum(-1, keepdim=True) / n, 0.0)
        yield Claim(case, got, "==", want, "the advantages of a prompt sum to 0")

    return Law("sum_zero", "identity", "the advantages of a prompt sum to 0", "oracles R1; bugs P16", check)


def _per_prompt(case: Case) -> Tensor:
    """Another constant for each prompt: [P, 1]."""
    return 1.5 * torch.arange(len(case["reward"]), dtype=case["reward"].dtype)[:, None] + 0.75


def _shifts() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        # The spread of the raw rewards of a batch depends on how far its prompts are apart.
        constant = _per_prompt(case) if f.options.get("taken over") != "batch" else torch.tensor(2.5).double()
        changed = {**case, "reward": case["reward"] + constant}
        yield Claim(changed, f.value(changed), "==", f.value(case), "a constant for each prompt cancels")

    return Law("prompt_shift", "symmetry", "a constant added to the rewards of a prompt changes nothing",
               "oracles R1, BT16; bugs P16", check)  # fmt: skip


def _samples_permuted() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = {**case, "reward": case["reward"].flip(-1), "mask": case["mask"].flip(-1)}
        yield Claim(changed, f.value(changed), "==", f.value(case).flip(-1), "the samples in reverse order")

    return Law("sample_order", "symmetry",
               "the samples of a prompt in another order: the same, in that order",
               "oracles R1, R11: repeat for repeat_interleave", check)  # fmt: skip


def _ordered() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        got, r, both = f.value(case), case["reward"], case["mask"][:, :, None] & case["mask"][:, None, :]
        above = both & (r[:, :, None] > r[:, None, :])
        rises = torch.where(above, got[:, :, None] - got[:, None, :], 1.0) > 0
        yield Claim(
            case, rises, "holds", None, "of two samples of a prompt the better has the larger advantage"
        )

    return Law("better_is_larger", "symmetry", "the order of a prompt's rewards is kept", "oracles W4", check)


def _equal() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        # The mean of three 0.1 is not 0.1: what is left is rounding, which ε has to keep small.
        for level, loose in ((1.0, 1.0), (0.0, 1.0), (-2.5, 1.0), (0.1, 1e6)):
            given = {**case, "reward": torch.full_like(case["reward"], level)}
            why = "equal rewards: nothing to compare, advantage 0"
            yield Claim(given, f.value(given), "==", torch.zeros_like(case["reward"]), why, loose=loose)

    return Law("equal_rewards", "limit", "where all rewards of a prompt are equal the advantage is 0",
               "oracles R1, R5; bugs F08: TRL #4662, NeMo-RL #1519", check)  # fmt: skip


def _linear_laws() -> tuple[Law, ...]:
    def adds(f: Probed, case: Case) -> Iterator[Claim]:
        even = torch.arange(case["reward"].shape[1]) % 2 == 0
        one = {**case, "reward": torch.where(even, case["reward"], 0.0)}
        other = {**case, "reward": torch.where(even, 0.0, case["reward"])}
        yield Claim(case, f.value(case), "==", f.value(one) + f.value(other), "the sum of those of two parts")

    return (
        relation("homogeneous", "symmetry", "rewards times a factor: the advantage times it", "oracles R1",
                 lambda c: {**c, "reward": -1.5 * c["reward"]}, lambda v, c, f: -1.5 * v),
        Law("additive", "symmetry", "the advantages of two parts of the rewards add up", "oracles R1", adds),
    )  # fmt: skip


def shared_laws(arguments: tuple[Argument, ...]) -> tuple[Law, ...]:
    return (
        _sum_zero(),
        _shifts(),
        _samples_permuted(),
        _ordered(),
        _equal(),
        *(_within_groups(law) for law in batch_laws(arguments, axis="P")),
        *mask_laws(arguments, differentiable=(), zeros=None, along="G"),
        empty_row_law(arguments),
        *numeric_laws(["reward"]),
    )


def _within_groups(law: Law) -> Law:
    """The law, for subjects in which prompts do not see each other."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        if law.name == "row_order" or f.options.get("taken over", "group") == "group":
            yield from law.check(f, case)

    return law._replace(name=law.name.replace("row", "prompt"), check=check)


EIGHT = [[1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]]


def by_outcome(right: float, wrong: float) -> list[float]:
    return [right if r else wrong for r in EIGHT[0]]


GROUP_SIZE = ("num_generations", "group_size", "samples_per_prompt", "n_samples_per_prompt", "num_samples",
              "num_return_sequences", "rloo_k", "k", "n", "g")  # fmt: skip
"""What other libraries call G, and ask for where rewards come flattened."""

RLOO = Kind(
    name="rloo",
    title="leave-one-out advantages",
    last_axis=GROUP_SIZE,
    arguments=PLAIN,
    returns="[P, G] in reward units",
    shape=("P", "G"),
    oracle=_rloo,
    arrange=arranged,
    mask="mask",
    sizes={"P": (1, 3), "G": (2, 4)},
    laws=(
        formula("r_i less the mean of the other samples of its prompt", KOOL),
        at("golden_eight", "3 of 8 right: 5/7 and -3/7", "oracles 5.3", EIGHT,
            lambda c, o: by_outcome(5 / 7, -3 / 7)),
        at("golden_pair", "two samples: the difference, both ways", "oracles R4", [[2.0, 0.5]],
            lambda c, o: [1.5, -1.5]),
        *_slopes(torch.ones_like, lambda n: -1 / (n - 1),
                 "oracles R1; bugs Z09: the baseline includes the sample",
                 ("∂A_i/∂r_i = 1: the baseline does not know its own sample", "∂A_i/∂r_j = -1/(n-1)")),
        *_linear_laws(),
        at("single_sample", "a prompt with one sample gives 0", "bugs F08, P22", [[2.5]], lambda c, o: [0.0],
            family="limit", proves=ONE),
        *shared_laws(PLAIN),
    ),
)  # fmt: skip

CENTRED = Kind(
    name="group_centred",
    title="group-centred advantages, no standard deviation",
    last_axis=GROUP_SIZE,
    arguments=PLAIN,
    returns="[P, G] in reward units",
    shape=("P", "G"),
    oracle=centred_rewards,
    arrange=arranged,
    mask="mask",
    sizes={"P": (1, 3), "G": (2, 4)},
    laws=(
        formula("r_i less the mean of all samples of its prompt", LIU),
        at("golden_eight", "3 of 8 right: .625 and -.375", "oracles 5.3; Relax #174", EIGHT,
            lambda c, o: by_outcome(0.625, -0.375)),
        at("golden_pair", "two samples: half the difference, both ways", "oracles R3", [[2.0, 0.5]],
            lambda c, o: [0.75, -0.75]),
        *_slopes(lambda n: 1 - 1 / n, lambda n: -1 / n, "oracles R3",
                 ("∂A_i/∂r_i = 1 - 1/n: the sample is part of its baseline", "∂A_i/∂r_j = -1/n")),
        *_linear_laws(),
        at("single_sample", "a prompt with one sample gives 0", "bugs F08, P22", [[2.5]], lambda c, o: [0.0],
            family="limit", proves=ONE),
        *shared_laws(PLAIN),
    ),
)  # fmt: skip


KINDS = (RLOO, CENTRED)
