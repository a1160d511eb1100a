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
    bradley_terry_fit,
    dpo_optimum,
    ipo_optimum,
    ipo_summed_optimum,
)
from minirlhf.verify.world import World, kl_of_laws, lengths, response_logp, truncated


class WrongOptimum(NamedTuple):
    """Where a known wrong objective ends: its name, what is wrong with it, and its law, log-probs [X, N]."""

    name: str
    mistake: str
    law: Tensor


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
            WrongOptimum("averaged", "log-probs are averaged over tokens", ipo_optimum(w, data, tau=tau)),
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
            WrongOptimum("summed", "log-probs are summed over tokens", ipo_summed_optimum(w, data, tau=tau)),
            *_wrong_ipo(w, data, tau, ipo_optimum),
        ),
    )


def _divergence_from(w: World, optimum: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: kl_of_laws(optimum, response_logp(logits, w))


def _wrong_rewards(w: World, beta: float) -> tuple[WrongOptimum, ...]:
    """The exact ends of wrong policy-gradient trainers."""
    ref, cut, first = response_logp(w.ref_logits, w), truncated(w), w.tokens[:, 0]
    starts = torch.nn.functional.one_hot(first, w.config.vocab_size).double()  # [N, V]
    promise = (ref.exp() * w.gold) @ starts / (ref.exp() @ starts)  # E_ref[r | first token], [X, V]
    return (
        WrongOptimum("unmoved", "the policy is still the reference: it learns nothing", ref),
        WrongOptimum(
            "no_kl",
            "nothing holds the policy to the reference: the KL term is missing, or k2, k3 or |k1| is paid as "
            "a reward, which has no such gradient",
            point_mass(w.gold),
        ),
        WrongOptimum("kl_sign", "distance from the reference is rewarded", point_mass(w.gold - beta * ref)),
        WrongOptimum("half_beta", "β is half of what it should be", optimal_law(w, beta=beta / 2)),
        WrongOptimum("double_beta", "β is twice what it should be", optimal_law(w, beta=2 * beta)),
        WrongOptimum("objective_sign", "J is minimised", point_mass(-w.gold - beta * ref)),
        WrongOptimum("reward_sign", "the reward has the wrong sign", tilted(w, -w.gold / beta)),
        WrongOptimum(
            "reference_forgotten",
            "the entropy holds the policy, not the reference",
            torch.log_softmax(w.gold / beta, dim=1),
        ),
        WrongOptimum(
            "reward_every_token", "the score is paid on every token", tilted(w, w.gold * lengths(w) / beta)
        ),
        WrongOptimum(
            "reward_on_first_token",
            "the score is paid on the first token, so later ones are not learned",
            tilted(w, promise[:, first] / beta),
        ),
        WrongOptimum(
            "truncated_not_paid",
            "a truncated response gets no reward",
            tilted(w, torch.where(cut, 0.0, w.gold) / beta),
        ),
        WrongOptimum(
            "truncated_penalised",
            "1 is subtracted from the reward of a truncated response",
            tilted(w, (w.gold - cut.double()) / beta),
        ),
        WrongOptimum(
            "gamma_0.9",
            "rewards are discounted by γ = .9 per token",
            response_logp(soft_bellman(w, beta=beta, gamma=0.9).logits, w),
        ),
        WrongOptimum(
            "next_value_not_bootstrapped",
            "the value after a token is not counted: each token is chosen for its own reward",
            response_logp(soft_bellman(w, beta=beta, gamma=0.0).logits, w),
        ),
        WrongOptimum("kl_averaged", "the KL is averaged over tokens", per_token_tilted(w, w.gold / beta)),
        WrongOptimum(
            "k3_as_loss",
            "k3 is differentiated as a loss, which is KL(π_ref‖π)",
            forward_kl_optimum(w, beta=beta),
        ),
    )


def _wrong_dpo(w: World, data: Tensor, beta: float) -> tuple[WrongOptimum, ...]:
    """The exact optima of wrong preference losses."""
    ref, reward = response_logp(w.ref_logits, w), bradley_terry_fit(data)
    return (
        WrongOptimum("unmoved", "the policy is still the reference: it learns nothing", ref),
        WrongOptimum("half_beta", "β is half of what it should be", tilted(w, 2 * reward / beta)),
        WrongOptimum("double_beta", "β is twice what it should be", tilted(w, reward / (2 * beta))),
        WrongOptimum("swapped", "chosen and rejected are swapped", tilted(w, -reward / beta)),
        WrongOptimum(
            "reference_forgotten",
            "the reference's log-probs are missing",
            torch.log_softmax(reward / beta, dim=1),
        ),
        WrongOptimum(
            "reference_sign",
            "the reference's log-probs have the wrong sign",
            torch.log_softmax(reward / beta - ref, dim=1),
        ),
        WrongOptimum(
            "averaged", "log-probs are averaged over tokens", averaged_dpo_optimum(w, data, beta=beta)
        ),
        WrongOptimum(
            "label_smoothing_0.1",
            "a tenth of the labels is taken for flipped",
            dpo_optimum(w, 0.9 * data + 0.1 * data.transpose(1, 2), beta=beta),
        ),
        WrongOptimum(
            "chosen_imitated",
            "the likelihood of the chosen responses is raised, the rejected ones are not looked at",
            data.sum(2).log(),
        ),
        WrongOptimum("ipo", "this is IPO on summed log-probs", ipo_summed_optimum(w, data, tau=beta)),
    )


def _wrong_ipo(
    w: World, data: Tensor, tau: float, optimum: Callable[..., Tensor]
) -> tuple[WrongOptimum, ...]:
    """The exact optima of wrong IPO losses, the right one being `optimum`."""
    ref = response_logp(w.ref_logits, w)
    return (
        WrongOptimum("unmoved", "the policy is still the reference: it learns nothing", ref),
        WrongOptimum("target_doubled", "the target is 1/τ, not 1/(2τ)", optimum(w, data, tau=tau / 2)),
        WrongOptimum("target_halved", "the target is 1/(4τ), not 1/(2τ)", optimum(w, data, tau=2 * tau)),
        WrongOptimum(
            "swapped",
            "chosen and rejected are swapped",
            optimum(w, data.transpose(1, 2), tau=tau),
        ),
        WrongOptimum("dpo", "this is DPO", dpo_optimum(w, data, beta=tau)),
    )
