"""The known wrong ends: each is at rest under the wrong rule of its name, and not under the right one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minirlhf.verify.goals import kl_regularised
from minirlhf.verify.optima import optimal_law
from minirlhf.verify.world import (
    World,
    expected_gradient,
    kl_of_laws,
    lengths,
    response_logp,
    small_world,
    tabulate,
    token_logp,
    token_reward,
    truncated,
)
from minirlhf.verify.wrong_optima import WrongOptimum

W, BETA = small_world(2), 0.7
GOAL = kl_regularised(W, beta=BETA)
WRONG = {wrong.name: wrong for wrong in GOAL.wrong}
REF = response_logp(W.ref_logits, W)


def to_go(reward: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Σ_k γ^k r_{t+k} of rewards [X, N, T] that are 0 under the mask."""
    total = reward.clone()
    for t in reversed(range(reward.shape[-1] - 1)):
        total[..., t] += gamma * total[..., t + 1]
    return total


def at_token(score: Tensor, place: Tensor) -> Tensor:
    """The score [X, N] on the tokens of every response at `place` [N, T], 0 on the others."""
    return torch.where(place & W.mask, score[..., None], 0.0)


def penalty(logits: Tensor, beta: float = BETA) -> Tensor:
    return -beta * (token_logp(logits, W) - token_logp(W.ref_logits, W))


def right(logits: Tensor, w: World = W, *, beta: float = BETA) -> Tensor:
    return to_go(token_reward(logits, w, beta=beta))


def paid(gold: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: right(logits, W._replace(gold=gold))


def kl_averaged(logits: Tensor) -> Tensor:
    score = W.gold - BETA * (response_logp(logits, W) - REF) / lengths(W)
    return at_token(score, W.mask)


FIRST = torch.arange(3).expand_as(W.mask) == 0
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "half_beta": lambda z: right(z, beta=BETA / 2),
    "double_beta": lambda z: right(z, beta=BETA * 2),
    "reward_sign": paid(-W.gold),
    "reference_forgotten": lambda z: to_go(
        penalty(z) - BETA * token_logp(W.ref_logits, W) + token_reward(z, W, beta=0.0)
    ),
    "kl_averaged": kl_averaged,
    "reward_on_every_token": lambda z: to_go(penalty(z) + at_token(W.gold, W.mask)),
    "reward_on_first_token": lambda z: to_go(penalty(z) + at_token(W.gold, FIRST)),
    "truncated_not_paid": paid(W.gold * ~truncated(W)),
    "truncated_penalised": paid(W.gold - truncated(W).double()),
    "gamma_0.9": lambda z: to_go(token_reward(z, W, beta=BETA), gamma=0.9),
    "next_value_forgotten": lambda z: token_reward(z, W, beta=BETA),
}


@pytest.mark.parametrize("name", RULES)
def test_a_known_wrong_end_is_at_rest_under_its_wrong_rule_alone(name: str) -> None:
    rule, logits = RULES[name], tabulate(WRONG[name].law(REF), W)
    assert float(expected_gradient(logits, rule(logits), W).abs().max()) < 1e-12
    assert float(expected_gradient(logits, right(logits), W).abs().max()) > 1e-3
    best = tabulate(GOAL.optimum, W)
    assert float(expected_gradient(best, rule(best), W).abs().max()) > 1e-3
    assert float(expected_gradient(best, right(best), W).abs().max()) < 1e-12


def test_k3_as_a_loss_is_at_rest_where_the_forward_divergence_balances_the_reward() -> None:
    logits = tabulate(WRONG["k3_as_loss"].law(REF), W).requires_grad_()
    forward = kl_of_laws(REF, response_logp(logits, W))
    (slope,) = torch.autograd.grad(forward, logits)
    reward = expected_gradient(logits, at_token(W.gold, W.mask), W)
    torch.testing.assert_close(reward, BETA * slope, rtol=0, atol=1e-12)


def test_a_trainer_that_does_nothing_ends_at_the_reference() -> None:
    assert torch.equal(WRONG["unmoved"].law(torch.zeros_like(REF)), REF)


@pytest.mark.parametrize(("name", "sign"), [("no_kl", 1), ("objective_sign", -1)])
def test_a_collapsed_policy_is_told_by_whether_it_is_better_than_the_reference(name: str, sign: int) -> None:
    wrong: WrongOptimum = WRONG[name]
    mean = (REF.exp() * W.gold).sum(1)
    for seed in range(20):
        law = torch.log_softmax(3 * torch.randn(REF.shape, generator=torch.Generator().manual_seed(seed)), 1)
        end = wrong.law(law.double())
        chosen = end.argmax(1)
        assert end.exp().max(1).values.tolist() == [1.0, 1.0]
        for x, n in enumerate(chosen.tolist()):
            assert sign * (W.gold[x, n] - mean[x]) > 0
            rivals = sign * (W.gold[x] - mean[x]) > 0
            assert law[x, n] == law[x][rivals].max()


def test_the_goal_is_the_optimal_policy_at_its_beta() -> None:
    assert torch.equal(GOAL.optimum, optimal_law(W, beta=BETA))
    assert GOAL.threshold == kl_regularised(W).threshold == 0.005
    assert kl_regularised(W, threshold=0.1).threshold == 0.1
