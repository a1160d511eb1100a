"""What a trainer must reach in an enumerable world, and where the known wrong ones end instead.

A goal is a value: the world, the exact optimum, the statistic that measures the way to it, and the threshold.
β is 1 unless told otherwise: at a small β the policy without any KL term is nearly as good as the best one
(regret fraction .002 at β = .1, 1.48 at β = 1), so a trainer that forgets the KL would pass.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.verify.optima import (
    forward_kl_optimum,
    optimal_law,
    per_token_tilted,
    point_mass,
    regret_fraction,
    soft_bellman,
    tilted,
)
from minirlhf.verify.preferences import (
    averaged_dpo_optimum,
    bradley_terry,
    bradley_terry_fit,
    comparisons,
    dpo_optimum,
    ipo_optimum,
    ipo_summed_optimum,
    uniform_pairs,
)
from minirlhf.verify.world import World, kl_of_laws, response_logp, small_world, truncated


class WrongOptimum(NamedTuple):
    """Where a known wrong objective ends.

    name: of the mistake; mistake: in words.
    law: the law of a policy -> the law that the wrong objective ends in, log-probs [X, N]; of several, the
        one nearest to the policy.
    """

    name: str
    mistake: str
    law: Callable[[Tensor], Tensor]


class Goal(NamedTuple):
    """What a trainer must reach.

    name: of the goal; claim: the law in one line; source: where it is from.
    world: in which it is tried.
    optimum: the law to reach, log-probs [X, N].
    measure: what `statistic` measures; statistic: logits [X, K, V] -> [], 0 at the optimum.
    threshold: reached where the statistic is not above it.
    wrong: where known wrong objectives end, for the diagnosis.
    """

    name: str
    claim: str
    source: str
    world: World
    optimum: Tensor
    measure: str
    statistic: Callable[[Tensor], Tensor]
    threshold: float
    wrong: tuple[WrongOptimum, ...]


def kl_regularised(w: World, *, beta: float = 1.0, threshold: float = 0.005) -> Goal:
    """The maximum of J(π) = E r - β KL(π‖π_ref), by the regret fraction (J* - J) / (J* - J(π_ref)).

    It is the fixed point of every trainer that pays the reward less β log π/π_ref:

    * PPO and RLOO: their expected gradient is ∂J, up to a positive factor, and in the table of all policies
      ∂J is 0 nowhere but at π* and on the border.
    * Group-normalised advantages: at π* the KL-shaped reward r - β log π*/π_ref = β log Z is the same for
      each response, so the advantages are 0 in *every* group, whatever they are divided by. Elsewhere
      E[A | y] still grows with the shaped reward of y, so the gradient points to π*.

    A trainer with a mean of half a percent of the possible gain to go is accepted; a right PPO has .0001, and
    the nearest wrong one (γ = .9) .011.
    """
    return Goal(
        name=f"KL-regularised optimum at β = {beta:g}",
        claim="E r - β KL(π‖π_ref) has its maximum at π* ∝ π_ref e^(r/β), whatever finds it",
        source="Ziegler et al. 2019 (arXiv:1909.08593), Eq. 2; the optimum: Rafailov et al. 2023, Eq. 4",
        world=w,
        optimum=optimal_law(w, beta=beta),
        measure="regret fraction",
        statistic=lambda logits: regret_fraction(logits, w, beta=beta),
        threshold=threshold,
        wrong=_wrong_rewards(w, beta),
    )


def dpo_population(w: World, data: Tensor, *, beta: float = 1.0, threshold: float = 1e-6) -> Goal:
    """The optimum of DPO, or of a Bradley-Terry reward model and the best policy for it, on all data at once.

    Args:
        data: `preferences.comparisons` [X, N, N]. Labelled by Bradley-Terry on the world's reward, by pairs
            of any law that shows all of them, the optimum is π*.
    """
    optimum = dpo_optimum(w, data, beta=beta)
    return Goal(
        name=f"DPO's optimum at β = {beta:g}",
        claim="the Bradley-Terry likelihood of β log π/π_ref has its maximum at π ∝ π_ref e^(r/β)",
        source="Rafailov et al. 2023 (arXiv:2305.18290), Theorem 1",
        world=w,
        optimum=optimum,
        measure="KL(π*‖π)",
        statistic=_divergence_from(w, optimum),
        threshold=threshold,
        wrong=_wrong_dpo(w, data, beta),
    )


def ipo_summed_population(w: World, data: Tensor, *, tau: float = 1.0, threshold: float = 1e-6) -> Goal:
    """The optimum of IPO on summed log-probs: π ∝ π_ref e^(p(y ≻ μ)/τ) where pairs are drawn from μ."""
    optimum = ipo_summed_optimum(w, data, tau=tau)
    return Goal(
        name=f"summed IPO's optimum at τ = {tau:g}",
        claim="E (h - 1/(2τ))², h summed over tokens, has its minimum at π_ref e^u, u by least squares",
        source="Azar et al. 2023 (arXiv:2310.12036), Theorem 1",
        world=w,
        optimum=optimum,
        measure="KL(π*‖π)",
        statistic=_divergence_from(w, optimum),
        threshold=threshold,
        wrong=(
            _wrong("averaged", "log-probs are averaged over tokens", ipo_optimum(w, data, tau=tau)),
            *_wrong_ipo(w, data, tau, ipo_summed_optimum),
        ),
    )


def ipo_population(w: World, data: Tensor, *, tau: float = 1.0, threshold: float = 1e-6) -> Goal:
    """The optimum of IPO on log-probs averaged per token, π_ref e^(|y| (u + c))."""
    optimum = ipo_optimum(w, data, tau=tau)
    return Goal(
        name=f"averaged IPO's optimum at τ = {tau:g}",
        claim="E (h - 1/(2τ))², h averaged over tokens, has its minimum at π_ref e^(|y| (u + c))",
        source="Azar et al. 2023 (arXiv:2310.12036), Eq. 17, per token",
        world=w,
        optimum=optimum,
        measure="KL(π*‖π)",
        statistic=_divergence_from(w, optimum),
        threshold=threshold,
        wrong=(
            _wrong("summed", "log-probs are summed over tokens", ipo_summed_optimum(w, data, tau=tau)),
            *_wrong_ipo(w, data, tau, ipo_optimum),
        ),
    )


def _wrong(name: str, mistake: str, law: Tensor) -> WrongOptimum:
    return WrongOptimum(name, mistake, lambda _: law)


def _unmoved(ref: Tensor) -> WrongOptimum:
    return _wrong("unmoved", "the policy is still the reference: it learns nothing", ref)


def _divergence_from(w: World, optimum: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: kl_of_laws(optimum, response_logp(logits, w))


def _wrong_rewards(w: World, beta: float) -> tuple[WrongOptimum, ...]:
    """The exact ends of wrong policy-gradient trainers."""
    ref, cut, first = response_logp(w.ref_logits, w), truncated(w), w.tokens[:, 0]
    starts = torch.nn.functional.one_hot(first, w.config.vocab_size).double()  # [N, V]
    promise = (ref.exp() * w.gold) @ starts / (ref.exp() @ starts)  # E_ref[r | first token], [X, V]
    better = w.gold > (ref.exp() * w.gold).sum(1, keepdim=True)
    return (
        _unmoved(ref),
        WrongOptimum(
            "no_kl",
            "nothing holds the policy to the reference, so that it collapses onto one good response: the KL "
            "term is missing or has the wrong sign, or k2, k3 or |k1| is paid as a reward",
            # Without a KL each of the better responses alone is a local optimum, and no prompt minds another.
            lambda law: point_mass(torch.where(better, law, -torch.inf)),
        ),
        WrongOptimum(
            "objective_sign",
            "the policy collapses onto one bad response: the advantage, or the loss, has the wrong sign, or "
            "the ratio is inverted",
            lambda law: point_mass(torch.where(better, -torch.inf, law)),
        ),
        _wrong("reward_sign", "the reward has the wrong sign", tilted(w, -w.gold / beta)),
        _wrong("half_beta", "β is half of what it should be", optimal_law(w, beta=beta / 2)),
        _wrong("double_beta", "β is twice what it should be", optimal_law(w, beta=2 * beta)),
        _wrong(
            "reference_forgotten",
            "the entropy holds the policy, not the reference",
            torch.log_softmax(w.gold / beta, dim=1),
        ),
        _wrong("kl_averaged", "the KL is averaged over tokens", per_token_tilted(w, w.gold / beta)),
        _wrong(
            "k3_as_loss",
            "k3 is differentiated as a loss, which is KL(π_ref‖π)",
            forward_kl_optimum(w, beta=beta),
        ),
        _wrong("reward_on_every_token", "the score is paid on every token", _paid_on_every_token(w, beta)),
        _wrong(
            "reward_on_first_token",
            "the score is paid on the first token, so that no later one is learned",
            tilted(w, promise[:, first] / beta),
        ),
        _wrong(
            "truncated_not_paid",
            "a truncated response gets no reward",
            tilted(w, torch.where(cut, 0.0, w.gold) / beta),
        ),
        _wrong(
            "truncated_penalised",
            "1 is subtracted from the reward of a truncated response",
            tilted(w, (w.gold - cut.double()) / beta),
        ),
        _wrong(
            "gamma_0.9",
            "rewards are discounted by γ = .9 per token",
            response_logp(soft_bellman(w, beta=beta, gamma=0.9).logits, w),
        ),
        _wrong(
            "next_value_forgotten",
            "the value after a token does not count: each token is chosen for its own reward",
            response_logp(soft_bellman(w, beta=beta, gamma=0.0).logits, w),
        ),
    )


def _paid_on_every_token(w: World, beta: float) -> Tensor:
    """Where rewards to go end if each token is paid the score of the whole response: log-probs [X, N].

    What was paid before a token does not count for it, although it depends on it. So a state after t tokens
    is best for r · (|y| - t), given what the later states, which see fewer tokens to be paid, will do.
    """
    words, base = w.config.vocab_size - 1, torch.log_softmax(w.ref_logits, dim=-1)
    logits, end = torch.empty_like(base), w.config.prefixes
    value = score = w.gold[:, end:]  # after each word: what is still to be paid; the score to expect
    for depth in reversed(range(w.config.length)):
        here = slice(end - words**depth, end)
        q, r = (
            torch.cat([w.gold[:, here, None], after.unflatten(1, (-1, words))], dim=-1)
            for after in (value, score)
        )
        logits[:, here] = base[:, here] + q / beta
        score = (torch.softmax(logits[:, here], dim=-1) * r).sum(-1)
        value = beta * torch.logsumexp(logits[:, here], dim=-1) + score
        end = here.start
    return response_logp(logits, w)


def _wrong_dpo(w: World, data: Tensor, beta: float) -> tuple[WrongOptimum, ...]:
    """The exact optima of wrong preference losses."""
    ref, reward = response_logp(w.ref_logits, w), bradley_terry_fit(data)
    return (
        _unmoved(ref),
        _wrong("half_beta", "β is half of what it should be", tilted(w, 2 * reward / beta)),
        _wrong("double_beta", "β is twice what it should be", tilted(w, reward / (2 * beta))),
        _wrong("swapped", "chosen and rejected are swapped", tilted(w, -reward / beta)),
        _wrong(
            "reference_forgotten",
            "the reference's log-probs are missing",
            torch.log_softmax(reward / beta, dim=1),
        ),
        _wrong(
            "reference_sign",
            "the reference's log-probs have the wrong sign",
            torch.log_softmax(reward / beta - ref, dim=1),
        ),
        _wrong("averaged", "log-probs are averaged over tokens", averaged_dpo_optimum(w, data, beta=beta)),
        _wrong(
            "label_smoothing_0.1",
            "a tenth of the labels is taken for flipped",
            dpo_optimum(w, 0.9 * data + 0.1 * data.transpose(1, 2), beta=beta),
        ),
        _wrong(
            "chosen_imitated",
            "the likelihood of the chosen responses is raised, the rejected ones are not looked at",
            data.sum(2).log(),
        ),
        _wrong("ipo", "this is IPO on summed log-probs", ipo_summed_optimum(w, data, tau=beta)),
    )


def _wrong_ipo(
    w: World, data: Tensor, tau: float, optimum: Callable[..., Tensor]
) -> tuple[WrongOptimum, ...]:
    """The exact optima of wrong IPO losses, the right one being `optimum`."""
    ref = response_logp(w.ref_logits, w)
    return (
        _unmoved(ref),
        _wrong("target_doubled", "the target is 1/τ, not 1/(2τ)", optimum(w, data, tau=tau / 2)),
        _wrong("target_halved", "the target is 1/(4τ), not 1/(2τ)", optimum(w, data, tau=2 * tau)),
        _wrong(
            "swapped",
            "chosen and rejected are swapped",
            optimum(w, data.transpose(1, 2), tau=tau),
        ),
        _wrong("dpo", "this is DPO", dpo_optimum(w, data, beta=tau)),
    )


def _uniform_bradley_terry(w: World) -> Tensor:
    return comparisons(uniform_pairs(w), bradley_terry(w))


GOALS: dict[str, Callable[[], Goal]] = {
    "trainer-kl": lambda: kl_regularised(small_world()),
    "trainer-dpo": lambda: dpo_population(small_world(), _uniform_bradley_terry(small_world())),
    "trainer-ipo": lambda: ipo_population(small_world(), _uniform_bradley_terry(small_world())),
    "trainer-ipo-summed": lambda: ipo_summed_population(small_world(), _uniform_bradley_terry(small_world())),
}
"""The goals of the command line: W_small, and for preferences every pair alike, labelled by Bradley-Terry."""
