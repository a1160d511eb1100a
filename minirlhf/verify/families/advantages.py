"""Generalised advantage estimation.

Some libraries whiten the advantage before they return it. Their returns still give it away, A = R - V: the
laws are held against that.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from minirlhf.verify.families.recurrences import (
    BOOTSTRAP,
    BOOTSTRAPPED,
    GAMMA,
    MASK,
    REWARD,
    View,
    bootstrap_laws,
    changed_law,
    claim,
    distance,
    final,
    following,
    full_row,
    golden_row,
    impulse_law,
    linear_laws,
    long_row,
    nudged,
    powers,
    remaining,
    reward_to_go,
    time_laws,
)
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
from minirlhf.verify.laws import (
    batch_laws,
    empty_row_law,
    finite_at,
    formula,
    loosened,
    mask_laws,
    numeric_laws,
    table,
)

SCHULMAN = "Schulman et al. 2016, Eq. 16 (arXiv:1506.02438)"
VALUE = Argument(
    "value", ("B", "T"), Reals(-4.0, 4.0), "V before each token, in reward units",
    synonyms=("values", "v", "old_values", "value_preds", "vals", "critic_values", "value_estimates", "vs"),
)  # fmt: skip
LAM = Argument(
    "lam", (), Numbers((0.6, 0.95, 0.25, 1.0, 0.8, 0.0), usual=(0.95, 1.0, 0.97, 0.98, 0.9)),
    "λ, between bias (0) and variance (1)",
    synonyms=("lambda", "lambd", "lmbda", "lamda", "gae_lambda", "gae_lam", "lambda_gae", "lamb"),
)  # fmt: skip
WHITENING = Convention("whitening", {
    False: "none: it is left to the caller",
    True: "the advantage over the whole batch, after the returns (unbiased variance, ε = 1e-8 in the root)",
})  # fmt: skip
ARGUMENTS = (REWARD, VALUE, MASK, BOOTSTRAPPED, GAMMA, LAM)
INPUTS = ("reward", "value")


def _gae(case: Case, options: Options) -> Tensor:
    """A_t = Σ_{k >= t} (γλ)^(k-t) δ_k, row by row over the tokens that count."""
    advantage = _unwhitened(case)
    if not options["whitening"]:
        return advantage
    tokens = advantage[case["mask"]]
    variance = (tokens - tokens.mean()).square().sum() / (len(tokens) - 1)
    return torch.where(case["mask"], (advantage - tokens.mean()) / (variance + 1e-8).sqrt(), 0.0)


def _unwhitened(case: Case) -> Tensor:
    advantage = torch.zeros_like(case["reward"])
    for b, keep in enumerate(case["mask"]):
        r, v = case["reward"][b, keep], case["value"][b, keep]
        delta = r + case["gamma"] * torch.cat([v, final(case)[b : b + 1]])[1:] - v
        age = torch.arange(len(r))[None, :] - torch.arange(len(r))[:, None]
        decay = (case["gamma"] * case["lam"]) ** age.clamp(min=0).to(r.dtype) * (age >= 0)
        advantage[b, keep] = decay @ delta
    return advantage


def _seen(f: Probed, case: Case) -> Tensor:
    if not f.options["whitening"]:
        return f.value(case)
    return torch.where(case["mask"], f.value(case, "ret") - case["value"], 0.0)


def _claim(f: Probed, case: Case, seen: Tensor, want: Tensor, why: str) -> Claim:
    if not f.options["whitening"]:
        return Claim(case, seen, "==", want, why)
    keep = case["mask"]  # the returns are not whitened, and give the advantage away
    got, target = (seen + case["value"])[keep], (want + case["value"])[keep]
    return Claim(case, got, "==", target, why, take=f"[tensor({keep.tolist()})]", field="ret")


GAE_VIEW = View(_seen, _claim)


def _decay(case: Case) -> float:
    return case["gamma"] * case["lam"]


def _discount(case: Case) -> float:
    return case["gamma"]


def _delta(case: Case) -> Tensor:
    """δ of each token: r + γ V of the next one - V."""
    after = following(case["value"], case, final(case))
    return torch.where(case["mask"], case["reward"] + case["gamma"] * after - case["value"], 0.0)


def _returns() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        keep = case["mask"]
        advantage = _unwhitened(case) if f.options["whitening"] else f.value(case)
        got, want = f.value(case, "ret")[keep], (advantage + case["value"])[keep]
        take, why = f"[tensor({keep.tolist()})]", "the critic's target is advantage + value, not whitened"
        yield Claim(case, got, "==", want, why, take=take, field="ret")

    return Law("returns", "identity",
               "the critic's targets are advantage + value, formed before any whitening",
               "oracles GAE5, W11; cleanrl #337: values of a stale buffer", check, ("ret",))  # fmt: skip


def _value_impulse(name: str, own: bool, statement: str, source: str) -> Law:
    """The answer to one more value: of a token itself, or of a later one."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        base, (gamma, lam) = _seen(f, case), (case["gamma"], case["lam"])
        for k in range(base.shape[1]):
            age = distance(case, k)
            later = gamma * (1 - lam) * powers(gamma * lam, age - 1, case, k)
            itself = powers(1.0, -age.abs(), case, k)
            changed, keep = nudged(case, "value", k), (age == 0) if own else (age != 0)
            seen = _seen(f, changed)
            # Only the tokens that this law is about are held against it.
            want = torch.where(keep, base - itself + later, seen)
            yield _claim(f, changed, seen, want, f"{statement}, k = {k}")

    return Law(name, "gradient", statement, source, check)


def _mixture() -> Law:
    def n_step(case: Case, b: int, tokens: list[int], start: int, n: int) -> float:
        stop = min(start + n, len(tokens))
        rewards = sum(case["gamma"] ** (i - start) * case["reward"][b, tokens[i]] for i in range(start, stop))
        after = case["value"][b, tokens[stop]] if stop < len(tokens) else final(case)[b]
        return rewards + case["gamma"] ** (stop - start) * after - case["value"][b, tokens[start]]

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        lam, want = case["lam"], torch.zeros_like(case["reward"])
        for b, row in enumerate(case["mask"].tolist()):
            tokens = [t for t, counts in enumerate(row) if counts]
            for i, t in enumerate(tokens):
                last = len(tokens) - i
                parts = [(1 - lam) * lam ** (n - 1) * n_step(case, b, tokens, i, n) for n in range(1, last)]
                want[b, t] = sum(parts) + lam ** (last - 1) * n_step(case, b, tokens, i, last)
        yield claim(GAE_VIEW, f, case, want, "(1-λ) Σ λ^(n-1) A⁽ⁿ⁾, the mixture of n-step advantages")

    return Law(
        "n_step_mixture", "identity", "the geometric mixture of the n-step advantages", "oracles GAE4", check
    )


def _potential(case: Case) -> Tensor:
    return torch.where(case["mask"], (case["value"] * 1.7 + 0.3).sin() * 2, 0.0)


def _shaped(case: Case) -> Case:
    """Rewards shaped by a potential, and the values of the shaped problem."""
    phi = _potential(case)
    after = following(phi, case, torch.zeros_like(final(case)))
    return {**case, "reward": case["reward"] + case["gamma"] * after - phi, "value": case["value"] - phi}


def _cut() -> Law:
    """δ = 0 from the cut on: then the head alone, bootstrapped, is what it was."""

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        half = case["reward"].shape[1] // 2
        if not half:
            return
        whole = {**case, "mask": torch.ones_like(case["mask"])}
        exact = reward_to_go(whole, case["gamma"])
        whole["value"] = torch.cat([case["value"][:, :half], exact[:, half:]], dim=1)
        head = {name: whole[name][:, :half] for name in (*INPUTS, "mask")}
        head = {**whole, **head, BOOTSTRAP: exact[:, half]}
        why = f"the values are exact from column {half} on: cut there and bootstrapped, the head stays"
        yield claim(GAE_VIEW, f, head, _seen(f, whole)[:, :half], why)

    return Law("cut_invariance", "invariance",
               "a row cut where its values are exact, and bootstrapped, keeps its "
               "advantages", "bugs F03, A11: SB3 #185, #633", check, (BOOTSTRAP,))  # fmt: skip


def _terminal() -> Law:
    def check(f: Probed, case: Case) -> Iterator[Claim]:
        ended = {name: value for name, value in case.items() if name != BOOTSTRAP}
        last = case["mask"] & (remaining(case) == 0)
        seen = _seen(f, ended)
        want = torch.where(last, case["reward"] - case["value"], seen)
        yield _claim(
            f, ended, seen, want, "r - V at the last token that counts: what comes after it has no value"
        )

    return Law("terminal_value", "limit",
               "after the last token of a row that ended V is 0, whatever lies there",
               "oracles GAE11; ROLL #447", check)  # fmt: skip


def _guarded(law: Law, can: Callable[[Probed, Case], bool]) -> Law:
    """The law, where it applies: what is whitened sees all rows, and needs some spread. Many of those that
    whiten add 1e-8 to the count of tokens: they are held to seven digits."""
    loose = loosened(law, 30.0)

    def check(f: Probed, case: Case) -> Iterator[Claim]:
        if not f.options["whitening"]:
            yield from law.check(f, case)
        elif can(f, case):
            yield from loose.check(f, case)

    return law._replace(check=check)


def _spread(f: Probed, case: Case) -> bool:
    tokens = _unwhitened(case)[case["mask"]]
    return float(tokens.max() - tokens.min()) > 0.05


def _several(f: Probed, case: Case) -> bool:
    return int(case["mask"].sum()) > 1  # one token has no variance: verl raises


def _never(f: Probed, case: Case) -> bool:
    return False


_changed = partial(changed_law, view=GAE_VIEW)
_golden = partial(golden_row, view=GAE_VIEW)
TERMINAL: Case = {**full_row(0, 0, 1), "value": table([0.5] * 3), "gamma": 1.0, "lam": 0.95}
DISCOUNTED: Case = {
    **full_row(0, 0, 0, 1),
    "value": table([0.2, 0.4, 0.6, 0.8]),
    "gamma": 0.99,
    "lam": 0.95,
}
GAE_LAWS = (
    _returns(),
    _golden("golden_terminal_reward", TERMINAL, [0.45125, 0.475, 0.5],
            "γ = 1, λ = .95, r = (0, 0, 1), V = .5: (.45125, .475, .5)"),
    _golden("golden_discounted", DISCOUNTED, [0.714671, 0.551484, 0.3801, 0.2],
            "γ = .99, λ = .95, r = (0, 0, 0, 1), V = (.2, .4, .6, .8): (.714671, .551484, .3801, .2)"),
    impulse_law(GAE_VIEW, _decay, "∂A_t/∂r_k = (γλ)^(k-t) from k = t on", "oracles GAE8"),
    _value_impulse("own_value_impulse", True, "∂A_t/∂V_t = -1", "oracles GAE8: the baseline"),
    _value_impulse("later_value_impulse", False, "∂A_t/∂V_k = γ(1-λ)(γλ)^(k-t-1) for k > t, 0 for k < t",
                   "oracles GAE8; bugs Z07: γ and λ swapped, which no reward shows"),
    _changed("lambda_zero", "limit", "λ = 0: the temporal-difference error r + γ V' - V", "oracles GAE2",
             lambda c: {**c, "lam": 0.0}, lambda c, a: _delta(c), needs=("lam",)),
    _changed("lambda_one", "limit", "λ = 1: the discounted return less V", "oracles GAE3",
             lambda c: {**c, "lam": 1.0},
             lambda c, a: torch.where(c["mask"], reward_to_go(c, c["gamma"]) - c["value"], 0.0),
             needs=("lam",)),
    _changed("gamma_zero", "limit", "γ = 0: r - V", SCHULMAN, lambda c: {**c, "gamma": 0.0},
             lambda c, a: torch.where(c["mask"], c["reward"] - c["value"], 0.0), needs=("gamma",)),
    _changed("telescoping", "identity", "A_t - γλ A_{t+1} = δ_t", "oracles GAE7", lambda c: c,
             lambda c, a: _delta(c) + _decay(c) * following(a, c, torch.zeros_like(final(c)))),
    _mixture(),
    *linear_laws(GAE_VIEW, INPUTS),
    _changed("potential_shaping", "invariance",
             "shaping by a potential, with the values that belong to it, changes nothing",
             "oracles GAE9; Ng, Harada & Russell 1999", _shaped, lambda c, a: a),
    _changed("exact_values", "limit", "where V is what really follows, no advantage is left",
             "Bellman's equation", lambda c: {**c, "value": reward_to_go(c, c["gamma"])},
             lambda c, a: torch.zeros_like(a)),
    _terminal(),
    *bootstrap_laws(GAE_VIEW, _decay, _discount),
    _cut(),
    *time_laws(GAE_VIEW, INPUTS),
    finite_at("long_rows", "60 tokens at γλ = 5e-7: no division by a power that underflows", "oracles 1.7",
              lambda: long_row(gamma=1e-6, lam=0.5)),
    *mask_laws(ARGUMENTS, differentiable=()),
)  # fmt: skip

GAE = Kind(
    name="gae",
    title="generalised advantage estimation",
    arguments=ARGUMENTS,
    returns="(advantage, ret), both [B, T] in reward units",
    shape=("B", "T"),
    fields=("advantage", "ret"),
    oracle=_gae,
    conventions=(WHITENING,),
    mask="mask",
    laws=(
        _guarded(formula("A_t = Σ (γλ)^(k-t) δ_k over the tokens that count", SCHULMAN), _spread),
        *(_guarded(law, _several) for law in GAE_LAWS),
        *(_guarded(law, _several if law.name == "row_order" else _never) for law in batch_laws(ARGUMENTS)),
        *(_guarded(law, _spread) for law in (empty_row_law(ARGUMENTS), *numeric_laws([*INPUTS, BOOTSTRAP]))),
    ),
)

KINDS = (GAE,)
