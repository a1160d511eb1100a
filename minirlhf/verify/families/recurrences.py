"""What GAE and discounted returns share: linear recurrences, backwards over the tokens that count.

Their subjects often run without autograd, or as loops over numbers. Since they are affine in rewards and
values, their derivatives are finite differences, exactly: f(x + e) - f(x).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.verify.kinds import Argument, Case, Claim, Law, Mask, Numbers, Probed, Reals
from minirlhf.verify.laws import table

INTERIOR = "interior masks"
BOOTSTRAP = "bootstrap_value"

REWARD = Argument(
    "reward", ("B", "T"), Reals(-4.0, 4.0, special=(0.0,)), "the reward after each token",
    synonyms=("rewards", "r", "token_level_rewards", "token_rewards", "per_token_rewards", "reward_seq",
              "rew"),
)  # fmt: skip
MASK = Argument(
    "mask", ("B", "T"), Mask(), "True = the token counts",
    neutral=lambda c: torch.ones_like(c["reward"]).bool(),
    synonyms=("masks", "response_mask", "response_masks", "action_mask", "action_masks", "loss_mask",
              "eos_mask",
              "completion_mask", "attention_mask", "valid_mask", "token_mask"),
)  # fmt: skip
GAMMA = Argument(
    "gamma", (), Numbers((0.9, 1.0, 0.75, 0.99, 0.5, 0.0), usual=(1.0, 0.99, 0.95, 0.9)),
    "γ, the discount per token",
    synonyms=("discount", "discount_factor", "gam", "discount_rate"),
)  # fmt: skip
BOOTSTRAPPED = Argument(
    BOOTSTRAP, ("B",), Reals(-4.0, 4.0, special=(0.0,)),
    "V after the last token of a row that was cut although the episode went on; 0 for rows that ended",
    optional=True, neutral=lambda c: torch.zeros_like(c["reward"][:, 0]),
    synonyms=("last_value", "last_values", "next_value", "next_values", "final_value", "final_values",
              "bootstrap",
              "bootstrap_values", "last_val"),
)  # fmt: skip


class View(NamedTuple):
    """How a law sees the estimate of a subject, whatever the subject still does to it.

    value: the estimate [B, T], 0 under the mask; claims: on a case and its value, what it should be, and why.
    """

    value: Callable[[Probed, Case], Tensor]
    claims: Callable[[Probed, Case, Tensor, Tensor, str], Claim]


PLAIN = View(
    lambda f, case: f.value(case), lambda f, case, seen, want, why: Claim(case, seen, "==", want, why)
)


def claim(view: View, f: Probed, case: Case, want: Tensor, why: str) -> Claim:
    """That the estimate on a case is so much, and why."""
    return view.claims(f, case, view.value(f, case), want, why)


def backwards(case: Case, step: Callable[[int, int, float], float]) -> Tensor:
    """x_t = step(row, t, x of the next token that counts), from the bootstrap value on; 0 under the mask."""
    result = torch.zeros_like(case["reward"])
    for b, (row, carried) in enumerate(zip(case["mask"].tolist(), final(case).tolist(), strict=True)):
        for t in reversed(range(len(row))):
            if row[t]:
                carried = result[b, t] = step(b, t, carried)
    return result


def final(case: Case) -> Tensor:
    """The value after the last token: [B]."""
    given = case.get(BOOTSTRAP)
    return torch.zeros_like(case["reward"][:, 0]) if given is None else given


def reward_to_go(case: Case, gamma: float) -> Tensor:
    """The discounted sum of the rewards from each token on, and of the bootstrap value."""
    return backwards(case, lambda b, t, after: case["reward"][b, t] + gamma * after)


def following(x: Tensor, case: Case, last: Tensor) -> Tensor:
    """x of the next token that counts, `last` [B] at the last one; 0 under the mask."""
    result = torch.zeros_like(x)
    for b, row in enumerate(case["mask"].tolist()):
        after = last[b]
        for t in reversed(range(len(row))):
            if row[t]:
                result[b, t], after = after, x[b, t]
    return result


def distance(case: Case, column: int) -> Tensor:
    """How many tokens that count lie from each one to that of the column, negative after it: [B, T]."""
    rank = case["mask"].cumsum(-1).double()
    return rank[:, column : column + 1] - rank


def remaining(case: Case) -> Tensor:
    """How many tokens of the row that count come after each column: [B, T]."""
    return (case["mask"].sum(-1, keepdim=True) - case["mask"].cumsum(-1)).double()


def powers(decay: float, age: Tensor, case: Case, column: int) -> Tensor:
    """decay^age where age >= 0 between two tokens that count, else 0."""
    both = case["mask"] & case["mask"][:, column : column + 1] & (age >= 0)
    return torch.where(both, decay ** age.clamp(min=0), 0.0)


def scaled(case: Case, factor: float, *names: str) -> Case:
    """These tensors, where the case has them, times a factor."""
    return {**case, **{name: factor * case[name] for name in names if name in case}}


def nudged(case: Case, name: str, column: int) -> Case:
    """One more in one column."""
    changed = case[name].clone()
    changed[:, column] += 1
    return {**case, name: changed}


def with_columns(case: Case, names: tuple[str, ...], at: int, count: int) -> Case:
    """Columns inserted that do not count, with garbage in them."""
    changed = dict(case)
    for place, name in enumerate((*names, "mask")):
        x = case[name]
        filler = torch.full_like(x[:, :1], False if name == "mask" else 5.5 - 2 * place).expand(-1, count)
        changed[name] = torch.cat([x[:, :at], filler, x[:, at:]], dim=1)
    return changed


def inserted_zeros(x: Tensor, at: int, count: int) -> Tensor:
    """The result that belongs to `with_columns`."""
    return torch.cat([x[:, :at], x.new_zeros(len(x), count), x[:, at:]], dim=1)


def impulse_law(view: View, decay: Callable[[Case], float], statement: str, source: str) -> Law:
    """The answer to one more reward after one token."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        base = view.value(f, case)
        for k in range(base.shape[1]):
            answer = powers(decay(case), distance(case, k), case, k)
            yield claim(view, f, nudged(case, "reward", k), base + answer, f"{statement}, k = {k}")

    return Law("reward_impulse", "gradient", statement, source, check)


def linear_laws(view: View, tensors: tuple[str, ...]) -> tuple[Law, ...]:
    """Scaling and superposition; tensors: the arguments in which it is linear."""
    every = (*tensors, BOOTSTRAP)

    def scales(f: Probed, case: Case) -> Iterator[Claim]:
        want = -1.5 * view.value(f, case)
        yield claim(view, f, scaled(case, -1.5, *every), want, "all inputs times -1.5: the result times -1.5")

    def adds(f: Probed, case: Case) -> Iterator[Claim]:
        even = torch.arange(case["reward"].shape[1]) % 2 == 0
        one = {**case, "reward": torch.where(even, case["reward"], 0.0)}
        other = {**scaled(case, 0.0, *every), "reward": torch.where(even, 0.0, case["reward"])}
        want = view.value(f, one) + view.value(f, other)
        yield claim(view, f, case, want, "the sum of the results for even and for odd columns of the rewards")

    return (
        Law("homogeneous", "symmetry", "all inputs times a factor: the result times it", "oracles GAE6",
            scales),
        Law("additive", "symmetry", "the results of two parts of the rewards add up", "oracles GAE6: affine",
            adds),
    )  # fmt: skip


def time_laws(view: View, tensors: tuple[str, ...]) -> tuple[Law, ...]:
    """What comes before does not matter, nor where a row begins, nor what stands between its tokens."""

    def causal(f: Probed, case: Case) -> Iterator[Claim]:
        half = case["reward"].shape[1] // 2
        changed = dict(case)
        for name in tensors:
            changed[name] = torch.cat([case[name][:, :half] * -0.5 + 3, case[name][:, half:]], dim=1)
        want = torch.cat([view.value(f, changed)[:, :half], view.value(f, case)[:, half:]], dim=1)
        yield claim(view, f, changed, want, f"what comes before column {half} changes nothing from there on")

    def prompted(f: Probed, case: Case) -> Iterator[Claim]:
        changed, want = with_columns(case, tensors, 0, 2), inserted_zeros(view.value(f, case), 0, 2)
        yield claim(
            view, f, changed, want, "two columns that do not count before the first one change nothing"
        )

    def stepped_over(f: Probed, case: Case) -> Iterator[Claim]:
        half = case["reward"].shape[1] // 2
        changed, want = with_columns(case, tensors, half, 1), inserted_zeros(view.value(f, case), half, 1)
        why = f"column {half} does not count: the row is as if it had been written without it, no decay"
        yield claim(view, f, changed, want, why)

    return (
        Law("causality", "invariance", "the past does not matter: nothing before a token changes its result",
            "bugs Z08: the loop runs forwards", causal),
        Law("prompt_length", "mask", "columns that do not count before a row change nothing",
            "bugs A13, B19: prompt and pads counted", prompted, ("mask",)),
        Law("interior_mask", "mask",
            "a token between two others that does not count is stepped over, undecayed",
            "oracles GAE13; verl #2337, miles #1827", stepped_over, ("mask",), proves=INTERIOR),
    )  # fmt: skip


def bootstrap_laws(
    view: View, decay: Callable[[Case], float], gamma: Callable[[Case], float]
) -> tuple[Law, ...]:
    """A row that was cut goes on with the value after its last token; a row that ended does not."""

    def slope(f: Probed, case: Case) -> Iterator[Claim]:
        given = {**case, BOOTSTRAP: final(case)}
        more = {**case, BOOTSTRAP: final(case) + 1}
        answer = torch.where(case["mask"], gamma(case) * decay(case) ** remaining(case), 0.0)
        why = "one more value after the last token arrives discounted, as the next value of that token"
        yield claim(view, f, more, view.value(f, given) + answer, why)

    def nothing(f: Probed, case: Case) -> Iterator[Claim]:
        without = {name: value for name, value in case.items() if name != BOOTSTRAP}
        ended = {**case, BOOTSTRAP: torch.zeros_like(final(case))}
        yield claim(
            view, f, ended, view.value(f, without), "a bootstrap value of 0 is that of a row that ended"
        )

    return (
        Law("bootstrap_impulse", "gradient",
            "the value after the last token enters discounted, in its own row",
            "oracles GAE12; bugs F03: truncation is not termination", slope, (BOOTSTRAP,)),
        Law("bootstrap_of_ended_rows", "limit", "a bootstrap value of 0 is none", "oracles GAE11, GAE12",
            nothing,
            (BOOTSTRAP,)),
    )  # fmt: skip


def changed_law(
    name: str,
    family: str,
    statement: str,
    source: str,
    change: Callable[[Case], Case],
    want: Callable[[Case, Tensor], Tensor],
    *,
    view: View = PLAIN,
    needs: tuple[str, ...] = (),
) -> Law:
    """On the changed case the estimate is want(changed case, estimate of the case)."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        changed = change(case)
        yield claim(view, f, changed, want(changed, view.value(f, case)), statement)

    return Law(name, family, statement, source, check, needs)


def golden_row(name: str, case: Case, want: list[float], statement: str, *, view: View = PLAIN) -> Law:
    """A published row, to about six digits."""

    def check(f: Probed, given: Case) -> Iterator[Claim]:
        yield claim(view, f, given, table(want), statement)._replace(loose=1e3)

    return Law(name, "value", statement, "oracles 5.3", check, cases=lambda: [case])


def long_row(**numbers: float) -> list[Case]:
    """One row, longer than small powers last."""
    t = torch.arange(60, dtype=torch.float64)[None]
    mask = torch.ones(1, 60, dtype=torch.bool)
    return [{"reward": (t * 1.3).sin(), "value": (t * 0.7).cos(), "mask": mask, **numbers}]


def full_row(*rewards: float) -> Case:
    """One row of these rewards, all counted."""
    return {"reward": table(rewards), "mask": torch.ones(1, len(rewards), dtype=torch.bool)}
