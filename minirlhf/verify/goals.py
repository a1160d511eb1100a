"""What a trainer must reach in an enumerable world, and where the known wrong ones end instead.

A goal is a value: the world, the exact optimum, the statistic that measures the way to it, and the threshold.
β is 1 unless told otherwise: at a small β the policy without any KL term is nearly as good as the best one
(regret fraction .002 at β = .1, 1.48 at β = 1), so a trainer that forgets the KL would pass.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from minirlhf.verify.optima import optimal_law, regret_fraction
from minirlhf.verify.preferences import (
    bradley_terry,
    comparisons,
    dpo_optimum,
    ipo_optimum,
    ipo_summed_optimum,
    uniform_pairs,
)
from minirlhf.verify.world import World, kl_of_laws, response_logp, small_world
from minirlhf.verify.wrong_optima import WrongOptimum, wrong_dpo, wrong_end, wrong_ipo, wrong_rewards


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
        wrong=wrong_rewards(w, beta),
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
        wrong=wrong_dpo(w, data, beta),
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
            wrong_end("averaged", "log-probs are averaged over tokens", ipo_optimum(w, data, tau=tau)),
            *wrong_ipo(w, data, tau, ipo_summed_optimum),
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
            wrong_end("summed", "log-probs are summed over tokens", ipo_summed_optimum(w, data, tau=tau)),
            *wrong_ipo(w, data, tau, ipo_optimum),
        ),
    )


def _divergence_from(w: World, optimum: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: kl_of_laws(optimum, response_logp(logits, w))


def _uniform_bradley_terry(w: World) -> Tensor:
    return comparisons(uniform_pairs(w), bradley_terry(w))


GOALS: dict[str, Callable[[], Goal]] = {
    "trainer-kl": lambda: kl_regularised(small_world()),
    "trainer-dpo": lambda: dpo_population(small_world(), _uniform_bradley_terry(small_world())),
    "trainer-ipo": lambda: ipo_population(small_world(), _uniform_bradley_terry(small_world())),
    "trainer-ipo-summed": lambda: ipo_summed_population(small_world(), _uniform_bradley_terry(small_world())),
}
"""The goals of the command line: W_small, and for preferences every pair alike, labelled by Bradley-Terry."""
