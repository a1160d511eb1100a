"""Discounted returns: the sum of the rewards from each token on."""

from collections.abc import Callable

import torch
from torch import Tensor

from minirlhf.verify.families.recurrences import (
    BOOTSTRAP,
    BOOTSTRAPPED,
    GAMMA,
    MASK,
    PLAIN,
    REWARD,
    bootstrap_laws,
    changed_law,
    final,
    following,
    full_row,
    golden_row,
    impulse_law,
    linear_laws,
    long_row,
    remaining,
    time_laws,
)
from minirlhf.verify.kinds import Case, Kind, Law, Options
from minirlhf.verify.laws import batch_laws, empty_row_law, finite_at, formula, mask_laws, numeric_laws

SUTTON = "Sutton & Barto 2018, Eq. 3.9"
ARGUMENTS = (REWARD, MASK, BOOTSTRAPPED, GAMMA)


def _discount(case: Case) -> float:
    return case["gamma"]


def _discounted(case: Case, options: Options) -> Tensor:
    """G_t = Σ_{k >= t} γ^(k-t) r_k, and γ to the number of tokens left times the bootstrap value."""
    result = torch.zeros_like(case["reward"])
    for b, keep in enumerate(case["mask"]):
        r = torch.cat([case["reward"][b, keep], final(case)[b : b + 1]])
        age = torch.arange(len(r))[None, :] - torch.arange(len(r))[:, None]
        decay = case["gamma"] ** age.clamp(min=0).to(r.dtype) * (age >= 0)
        result[b, keep] = (decay @ r)[:-1]
    return result


def _sum_left(case: Case) -> Tensor:
    """Of each row from each column on, and the bootstrap value."""
    counted = torch.where(case["mask"], case["reward"], 0.0)
    return counted.flip(-1).cumsum(-1).flip(-1) + final(case)[:, None]


def _only_last(case: Case) -> Case:
    """2.5 at the last token that counts, nothing elsewhere and nothing after it."""
    last = case["mask"] & (remaining(case) == 0)
    ended = {name: value for name, value in case.items() if name != BOOTSTRAP}
    return {**ended, "reward": torch.where(last, torch.full_like(case["reward"], 2.5), 0.0)}


def _return_law(name: str, statement: str, source: str, change: Callable[[Case], Case],
                want: Callable[[Case, Tensor], Tensor], *, needs: tuple[str, ...] = ()) -> Law:  # fmt: skip
    return changed_law(name, "limit", statement, source, change, want, view=PLAIN, needs=needs)


DISCOUNTED_RETURN = Kind(
    name="discounted_return",
    title="the discounted sum of the rewards from each token on",
    arguments=ARGUMENTS,
    returns="[B, T] in reward units",
    shape=("B", "T"),
    oracle=_discounted,
    mask="mask",
    laws=(
        formula("G_t = Σ γ^(k-t) r_k over the tokens that count, from t on", SUTTON),
        golden_row("golden_terminal_reward", {**full_row(0, 0, 1), "gamma": 0.5}, [0.25, 0.5, 1.0],
                "γ = .5, r = (0, 0, 1): (.25, .5, 1)", view=PLAIN),
        golden_row("golden_ones", {**full_row(1, 1, 1), "gamma": 0.9}, [2.71, 1.9, 1.0],
                "γ = .9, r = (1, 1, 1): (2.71, 1.9, 1)", view=PLAIN),
        impulse_law(PLAIN, _discount, "∂G_t/∂r_k = γ^(k-t) from k = t on", SUTTON),
        _return_law("recursion", "G_t = r_t + γ G_{t+1}", SUTTON, lambda c: c, lambda c, g: torch.where(
            c["mask"], c["reward"] + c["gamma"] * following(g, c, final(c)), 0.0)),
        _return_law("gamma_zero", "γ = 0: the reward itself", SUTTON, lambda c: {**c, "gamma": 0.0},
                    lambda c, g: torch.where(c["mask"], c["reward"], 0.0), needs=("gamma",)),
        _return_law("gamma_one", "γ = 1: the plain sum of what is left", SUTTON,
                    lambda c: {**c, "gamma": 1.0},
                    lambda c, g: torch.where(c["mask"], _sum_left(c), 0.0), needs=("gamma",)),
        _return_law("one_reward_at_the_end",
                    "only the last token is paid: the payment, discounted by the distance",
                    "oracles GAE14; bugs F05: the last reward lost", lambda c: _only_last(c),
                    lambda c, g: torch.where(c["mask"], 2.5 * c["gamma"] ** remaining(c), 0.0)),
        *linear_laws(PLAIN, ("reward",)),
        *bootstrap_laws(PLAIN, _discount, _discount),
        *time_laws(PLAIN, ("reward",)),
        finite_at("long_rows", "60 tokens at γ = 1e-6: no division by a power that underflows", "oracles 1.7",
                  lambda: [{n: x for n, x in long_row(gamma=1e-6)[0].items() if n != "value"}]),
        *batch_laws(ARGUMENTS),
        *mask_laws(ARGUMENTS, differentiable=()),
        empty_row_law(ARGUMENTS),
        *numeric_laws(["reward", BOOTSTRAP]),
    ),
)  # fmt: skip

KINDS = (DISCOUNTED_RETURN,)
