"""What the preference losses converge to, against closed forms: where DPO overfits and IPO does not.

The worked examples of Azar et al. 2023 (arXiv:2310.12036, section 5), on summed log-probs.
"""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev

from minirlhf.objectives.preference import dpo_loss, ipo_summed_loss

ZERO = torch.zeros(1, dtype=torch.float64)


def descend(loss: str, steps: int, rate: float) -> float:
    """h after gradient descent on the margin of one pair that is always labelled the same way."""
    h = ZERO.clone()
    for _ in range(steps):
        h.requires_grad_()
        if loss == "dpo":
            value = dpo_loss(h, ZERO, ZERO, ZERO, beta=0.1)
        else:
            value = ipo_summed_loss(h, ZERO, ZERO, ZERO, tau=0.1)
        (slope,) = torch.autograd.grad(value.sum(), h)
        h = h.detach() - rate * slope
    return h.item()


def test_dpo_margin_diverges_on_a_deterministic_pair() -> None:
    margins = [descend("dpo", steps, 1.0) for steps in (100, 1000, 4000)]
    assert [round(h, 1) for h in margins[:2]] == [4.4, 21.8]
    assert margins == sorted(margins)
    # The gradient flow solves βh + e^(βh) = 1 + β² t: growth like log(t)/β, without end.
    u = 0.1 * margins[2]
    assert abs((u + math.exp(u)) / (1 + 0.01 * 4000) - 1) < 0.01


def test_ipo_margin_converges_to_its_target_on_a_deterministic_pair() -> None:
    assert descend("ipo", 100, 0.1) == pytest.approx(5.0, abs=1e-8)
    assert descend("ipo", 1000, 0.1) == pytest.approx(5.0, abs=1e-12)


def summed_ipo_of_pairs(logits: Tensor, pairs: Sequence[tuple[int, int, float]], tau: float) -> Tensor:
    """Full-batch IPO of weighted (winner, loser, weight), reference uniform."""
    logp = torch.log_softmax(logits, dim=-1)
    winner = torch.tensor([w for w, _, _ in pairs])
    loser = torch.tensor([x for _, x, _ in pairs])
    weight = torch.tensor([x for _, _, x in pairs], dtype=logits.dtype)
    uniform = torch.zeros(len(pairs), dtype=logits.dtype)  # the same constant on both sides drops out
    return (weight * ipo_summed_loss(logp[winner], logp[loser], uniform, uniform, tau=tau)).sum()


def ipo_optimum(actions: int, pairs: Sequence[tuple[int, int, float]], tau: float) -> list[float]:
    """The loss is a quadratic in the logits, so one Newton step from anywhere is the optimum."""
    start = torch.zeros(actions, dtype=torch.float64)

    def loss(logits: Tensor) -> Tensor:
        return summed_ipo_of_pairs(logits, pairs, tau)

    best = start - torch.linalg.pinv(jacrev(grad(loss))(start)) @ grad(loss)(start)
    assert grad(loss)(best).abs().max().item() < 1e-9
    return torch.softmax(best, dim=-1).tolist()


TOTAL_ORDER = [(0, 1, 1.0), (1, 2, 1.0), (0, 2, 1.0)]
NEVER_LOSING = [(0, 1, 1.0), (0, 2, 1.0)]


@pytest.mark.parametrize(
    ("tau", "expected"),
    [(0.1, (0.9644, 0.0344, 0.0012)), (0.5, (0.5627, 0.2889, 0.1483)), (1.0, (0.4484, 0.3213, 0.2302))],
)
def test_ipo_on_a_total_order_stays_regularised(tau: float, expected: tuple[float, ...]) -> None:
    law = ipo_optimum(3, TOTAL_ORDER, tau)
    assert [round(p, 4) for p in law] == list(expected)
    for better, worse in ((0, 1), (1, 2)):
        assert math.log(law[better] / law[worse]) == pytest.approx(1 / (3 * tau), abs=1e-9)


@pytest.mark.parametrize(
    ("tau", "expected"),
    [(0.1, (0.9867, 0.0066, 0.0066)), (0.5, (0.5761, 0.2119, 0.2119)), (1.0, (0.4519, 0.2741, 0.2741))],
)
def test_ipo_on_an_action_that_never_loses_stays_regularised(tau: float, expected: tuple[float, ...]) -> None:
    law = ipo_optimum(3, NEVER_LOSING, tau)
    assert [round(p, 4) for p in law] == list(expected)
    assert math.log(law[0] / law[1]) == pytest.approx(1 / (2 * tau), abs=1e-9)


@pytest.mark.parametrize(("tau", "expected"), [(0.1, 0.99331), (0.5, 0.73106), (1.0, 0.62246)])
def test_ipo_on_two_actions_is_the_logistic_of_its_target(tau: float, expected: float) -> None:
    law = ipo_optimum(2, [(0, 1, 1.0)], tau)
    assert law[0] == pytest.approx(expected, abs=5e-6)
    assert law[0] == pytest.approx(1 / (1 + math.exp(-0.5 / tau)), abs=1e-12)


@pytest.mark.parametrize("pairs", [TOTAL_ORDER, NEVER_LOSING], ids=["total_order", "never_losing"])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_on_the_same_data_forgets_the_reference(pairs: list[tuple[int, int, float]], beta: float) -> None:
    winner, loser = torch.tensor([w for w, _, _ in pairs]), torch.tensor([x for _, x, _ in pairs])
    zeros = torch.zeros(len(pairs), dtype=torch.float64)

    def loss(logits: Tensor) -> Tensor:
        logp = torch.log_softmax(logits, dim=-1)
        return dpo_loss(logp[winner], logp[loser], zeros, zeros, beta=beta).sum()

    logits, best = torch.zeros(3, dtype=torch.float64), []
    for _ in range(3):
        for _ in range(150):
            logits = logits - (2.0 / beta**2) * grad(loss)(logits)
        best.append(torch.softmax(logits, dim=-1)[0].item())
    assert best[0] <= best[1] <= best[2] and best[2] > 0.99


BRADLEY_TERRY_REWARD = torch.tensor([0.3, -1.0, 0.9, 0.1], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([0.5, 0.2, -0.4, 0.0], dtype=torch.float64), dim=-1)


def all_pairs() -> tuple[Tensor, Tensor]:
    index = torch.arange(4)
    return index.repeat_interleave(4), index.repeat(4)


def test_population_dpo_has_the_optimal_policy_as_stationary_point_for_any_pair_sampler() -> None:
    first, second = all_pairs()
    preferred = torch.sigmoid(BRADLEY_TERRY_REWARD[first] - BRADLEY_TERRY_REWARD[second])
    best = torch.log_softmax(REFERENCE + BRADLEY_TERRY_REWARD / 0.3, dim=-1)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        pair_law = torch.rand(4, 4, generator=generator, dtype=torch.float64)
        pair_law = (pair_law + pair_law.T).reshape(16)

        def loss(logits: Tensor, pair_law: Tensor = pair_law) -> Tensor:
            logp = torch.log_softmax(logits, dim=-1)
            losses = dpo_loss(logp[first], logp[second], REFERENCE[first], REFERENCE[second], beta=0.3)
            return (pair_law * preferred * losses).sum()

        assert grad(loss)(best).abs().max().item() < 1e-14
        assert grad(loss)(REFERENCE).abs().max().item() > 1e-2


def test_population_ipo_has_the_tilted_reference_as_stationary_point() -> None:
    first, second = all_pairs()
    preferred = torch.sigmoid(BRADLEY_TERRY_REWARD[first] - BRADLEY_TERRY_REWARD[second])
    mu = torch.softmax(torch.tensor([0.1, 0.7, -0.2, 0.4], dtype=torch.float64), dim=-1)
    against_mu = (preferred.reshape(4, 4) * mu).sum(dim=-1)
    best = torch.log_softmax(REFERENCE + against_mu / 0.2, dim=-1)

    def loss(logits: Tensor) -> Tensor:
        logp = torch.log_softmax(logits, dim=-1)
        losses = ipo_summed_loss(logp[first], logp[second], REFERENCE[first], REFERENCE[second], tau=0.2)
        return (mu[first] * mu[second] * preferred * losses).sum()

    assert grad(loss)(best).abs().max().item() < 1e-14
    assert grad(loss)(REFERENCE).abs().max().item() > 1e-2


def test_the_first_dpo_step_climbs_the_win_rate_against_the_reference() -> None:
    first, second = all_pairs()
    preferred = torch.sigmoid(BRADLEY_TERRY_REWARD[first] - BRADLEY_TERRY_REWARD[second])
    weight = REFERENCE.exp()[first] * REFERENCE.exp()[second]

    def loss(logits: Tensor) -> Tensor:
        logp = torch.log_softmax(logits, dim=-1)
        losses = dpo_loss(logp[first], logp[second], REFERENCE[first], REFERENCE[second], beta=0.3)
        return (weight * preferred * losses).sum()

    def win_rate(logits: Tensor) -> Tensor:
        return (torch.softmax(logits, dim=-1)[first] * REFERENCE.exp()[second] * preferred).sum()

    # Every unordered pair is drawn in both orders here, so the loss counts it once where it is won.
    torch.testing.assert_close(grad(loss)(REFERENCE), -0.3 * grad(win_rate)(REFERENCE), rtol=1e-9, atol=1e-15)
