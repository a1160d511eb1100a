"""Which gradient each use of a KL estimator and of the entropy has in expectation: every claim enumerated."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.func import grad

from minirlhf.objectives.advantages import discounted_return
from minirlhf.objectives.divergence import entropy, exact_kl, kl_k1, kl_k2, kl_k3, kl_shaped_reward
from minirlhf.objectives.kl_usage import (
    entropy_loss,
    entropy_reward,
    k1_loss,
    k1_reward,
    k2_loss,
    k2_reward,
    k3_loss,
    k3_ratio_loss,
    k3_reward,
    sampled_entropy_loss,
)
from tests.objectives.assertions import close
from tests.objectives.enumeration import (
    MASK,
    REFERENCE,
    REWARD,
    SEQUENCES,
    STATES,
    another_policy,
    sequence_logp,
    token_logp,
)
from tests.objectives.strategies import Batch, batches

Use = Callable[..., Tensor]
WHOLE = torch.ones(len(SEQUENCES), dtype=torch.bool)
REF_LOGP = sequence_logp(REFERENCE)
POLICY = another_policy()
ONE = torch.ones(1, dtype=torch.bool)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def between(share: float) -> Tensor:
    """Logits of a policy on the line from the reference to the other policy."""
    return REFERENCE + share * (POLICY - REFERENCE)


# what they should be


def reverse(logits: Tensor) -> Tensor:
    """KL(π‖π_ref) of whole sequences."""
    logp = sequence_logp(logits)
    return (logp.exp() * (logp - REF_LOGP)).sum()


def forward(logits: Tensor) -> Tensor:
    """KL(π_ref‖π) of whole sequences."""
    return (REF_LOGP.exp() * (REF_LOGP - sequence_logp(logits))).sum()


def half_square(logits: Tensor) -> Tensor:
    """E_π[½ s²] of whole sequences."""
    logp = sequence_logp(logits)
    return (logp.exp() * 0.5 * (logp - REF_LOGP).square()).sum()


def whole_entropy(logits: Tensor) -> Tensor:
    logp = sequence_logp(logits)
    return -(logp.exp() * logp).sum()


def nothing(logits: Tensor) -> Tensor:
    return 0.0 * logits.sum()


def of_states(value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Σₜ E of a value of the next-token law [15, 3], the states visited by the other policy held fixed."""

    def total(logits: Tensor) -> Tensor:
        visits = sequence_logp(POLICY).exp()[:, None] * MASK
        return (visits * value(logits[STATES])).sum()

    return total


LOCAL_REVERSE = of_states(lambda z: exact_kl(z, REFERENCE[STATES], MASK))
LOCAL_FORWARD = of_states(lambda z: exact_kl(REFERENCE[STATES], z, MASK))
LOCAL_ENTROPY = of_states(lambda z: entropy(z, MASK))


# what they are


def ascent(use: Use, logits: Tensor, *reference: Tensor) -> Tensor:
    """E[reward · ∇log π] over whole sequences sampled from the policy."""
    logp = sequence_logp(logits)
    reward = use(logp, *reference, WHOLE)
    return grad(lambda z: (logp.exp() * reward * sequence_logp(z)).sum())(logits)


def descent(use: Use, logits: Tensor, *reference: Tensor) -> Tensor:
    """E[∇loss] over whole sequences sampled from the policy and held fixed."""
    weight = sequence_logp(logits).exp()
    return grad(lambda z: (weight * use(sequence_logp(z), *reference, WHOLE)).sum())(logits)


def token_ascent(use: Use, *reference: Tensor) -> Tensor:
    """E[Σₜ ∇log πₜ · (rewards from t on)], token by token."""
    weight, logp = sequence_logp(POLICY).exp()[:, None], token_logp(POLICY)
    to_go = discounted_return(use(logp, *reference, MASK), MASK, gamma=1.0)
    return grad(lambda z: (weight * to_go * torch.where(MASK, token_logp(z), 0.0)).sum())(POLICY)


def token_descent(use: Use, *reference: Tensor) -> Tensor:
    """E[Σₜ ∇lossₜ], token by token, sequences held fixed."""
    weight = sequence_logp(POLICY).exp()[:, None]
    return grad(lambda z: (weight * use(token_logp(z), *reference, MASK)).sum())(POLICY)


def test_the_gradients_to_tell_apart_differ_from_each_other() -> None:
    known = [
        grad(f)(POLICY)
        for f in (
            reverse, forward, half_square, whole_entropy, nothing, LOCAL_REVERSE, LOCAL_FORWARD, LOCAL_ENTROPY
        )
    ]  # fmt: skip
    for i, one in enumerate(known):
        assert all((one - other).norm().item() > 0.03 for other in known[:i])


@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize(
    ("use", "law"),
    [
        (k1_reward, {reverse: -1}),
        (k2_reward, {reverse: 1, half_square: -1}),
        (k3_reward, {forward: 1, reverse: -1}),
    ],
)
def test_the_policy_gradient_of_each_penalty_in_the_reward(
    use: Use, law: dict[Callable[[Tensor], Tensor], int], share: float
) -> None:
    logits = between(share)
    expected = sum((sign * grad(f)(logits) for f, sign in law.items()), torch.zeros_like(logits))
    close(ascent(use, logits, REF_LOGP), expected)


@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize(
    ("use", "law"), [(k1_loss, nothing), (k2_loss, reverse), (k3_loss, forward), (k3_ratio_loss, reverse)]
)
def test_the_expected_gradient_of_each_estimator_as_a_loss_of_whole_sequences(
    use: Use, law: Callable[[Tensor], Tensor], share: float
) -> None:
    logits = between(share)
    close(descent(use, logits, REF_LOGP), grad(law)(logits))


def test_entropy_in_the_reward_has_the_gradient_of_the_entropy_and_as_a_sampled_loss_none() -> None:
    close(ascent(entropy_reward, POLICY), grad(whole_entropy)(POLICY))
    close(token_ascent(entropy_reward), grad(whole_entropy)(POLICY))
    close(descent(sampled_entropy_loss, POLICY), torch.zeros_like(POLICY))
    close(token_descent(sampled_entropy_loss), torch.zeros_like(POLICY))


def test_token_by_token_k1_in_the_reward_still_has_the_whole_gradient() -> None:
    close(token_ascent(k1_reward, token_logp(REFERENCE)), -grad(reverse)(POLICY))


@pytest.mark.parametrize(
    ("use", "law"),
    [(k1_loss, nothing), (k2_loss, LOCAL_REVERSE), (k3_loss, LOCAL_FORWARD), (k3_ratio_loss, LOCAL_REVERSE)],
    ids=["k1", "k2", "k3", "k3_ratio"],
)
def test_token_by_token_each_loss_is_local_and_takes_the_states_for_given(
    use: Use, law: Callable[[Tensor], Tensor]
) -> None:
    got = token_descent(use, token_logp(REFERENCE))
    close(got, grad(law)(POLICY))
    assert (got - grad(reverse)(POLICY)).norm().item() > 0.03, "what a token does to later states is missing"


def test_the_entropy_loss_is_exact_for_each_state_and_local_too() -> None:
    weight = sequence_logp(POLICY).exp()[:, None]
    got = grad(lambda z: (weight * entropy_loss(z[STATES], MASK)).sum())(POLICY)
    close(got, -grad(LOCAL_ENTROPY)(POLICY))
    assert (got + grad(whole_entropy)(POLICY)).norm().item() > 0.05
    assert torch.equal(entropy_loss(POLICY[STATES], MASK), -entropy(POLICY[STATES], MASK))


# what follows from it


def climbed(use: Use, steps: int, logits: Tensor) -> float:
    """KL(π‖π_ref) after gradient ascent on a penalty in the reward and nothing else."""
    for _ in range(steps):
        logits = logits + 0.2 * ascent(use, logits, REF_LOGP)
    return reverse(logits).item()


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_of_the_penalties_in_the_reward_only_k1_brings_the_policy_back(share: float) -> None:
    start = between(share)
    at_start = reverse(start).item()
    assert climbed(k1_reward, 100, start) < 0.3 * at_start
    for use in (k2_reward, k3_reward):
        repelled = (ascent(use, start, REF_LOGP) * grad(reverse)(start)).sum().item()
        assert repelled > 0
        assert at_start < climbed(use, 50, start) < climbed(use, 100, start)


def test_k3_in_the_reward_does_next_to_nothing_near_the_reference() -> None:
    strengths = []
    for share in (0.3, 0.1, 0.03):
        pull, wanted = ascent(k3_reward, between(share), REF_LOGP), grad(reverse)(between(share))
        strengths.append((pull.norm() / wanted.norm()).item())
    assert strengths == sorted(strengths, reverse=True) and strengths[-1] < 0.02


def test_under_a_reward_k3_as_a_loss_has_a_rational_optimum_and_k2_and_the_ratio_the_exponential_one() -> (
    None
):
    """Over laws on the 15 sequences: π ∝ π_ref β/(λ - r) against π ∝ π_ref e^(r/β)."""
    beta = 0.3
    low, high = REWARD.max().item() + 1e-12, REWARD.max().item() + 10
    for _ in range(200):
        middle = (low + high) / 2
        mass = (beta * REF_LOGP.exp() / (middle - REWARD)).sum().item()
        low, high = (middle, high) if mass > 1 else (low, middle)
    rational = (beta * REF_LOGP.exp() / (low - REWARD)).log()
    assert low == pytest.approx(2.045906604011768, abs=1e-9)
    assert (rational.exp() * REWARD).sum().item() == pytest.approx(1.745907, abs=5e-7)
    assert (rational.exp() * (rational - REF_LOGP)).sum().item() == pytest.approx(0.865237, abs=5e-7)
    exponential = torch.log_softmax(REF_LOGP + REWARD / beta, dim=-1)

    def slope(use: Use, law: Tensor) -> float:
        weight = torch.softmax(law, dim=-1)

        def objective(z: Tensor) -> Tensor:
            logp = torch.log_softmax(z, dim=-1)
            return (weight * (REWARD * logp - beta * use(logp, REF_LOGP, WHOLE))).sum()

        return grad(objective)(law).abs().max().item()

    assert slope(k3_loss, rational) < 1e-9 < 1e-2 < slope(k3_loss, exponential)
    for use in (k2_loss, k3_ratio_loss):
        assert slope(use, exponential) < 1e-12 < 1e-2 < slope(use, rational)
    greedy = torch.where(REWARD == REWARD.max(), 0.0, -40.0).double()
    assert slope(k1_loss, greedy) < 1e-12, "k1 as a loss leaves the unregularised optimum where it is"


# values and pointwise derivatives


@pytest.mark.parametrize(
    ("s", "k1", "k2", "k3"),
    [(math.log(2), 0.693147, 0.240227, 0.193147), (-math.log(2), -0.693147, 0.240227, 0.306853)],
)
def test_golden_values_as_reward_and_as_loss(s: float, k1: float, k2: float, k3: float) -> None:
    for use, value in (
        (k1_reward, -k1), (k2_reward, -k2), (k3_reward, -k3),
        (k1_loss, k1), (k2_loss, k2), (k3_loss, k3), (k3_ratio_loss, k3),
    ):  # fmt: skip
        assert use(t(s), t(0.0), ONE).item() == pytest.approx(value, abs=5e-7)


@given(batches(tensors=2))
def test_rewards_are_minus_the_estimators_and_losses_the_estimators(batch: Batch) -> None:
    logp, ref_logp = batch.tensors
    for estimator, reward, loss in (
        (kl_k1, k1_reward, k1_loss),
        (kl_k2, k2_reward, k2_loss),
        (kl_k3, k3_reward, k3_loss),
    ):
        value = estimator(logp, ref_logp, batch.mask)
        assert torch.equal(reward(logp, ref_logp, batch.mask), -value)
        assert torch.equal(loss(logp, ref_logp, batch.mask), value)
    assert torch.equal(k3_ratio_loss(logp, ref_logp, batch.mask), kl_k3(logp, ref_logp, batch.mask))
    assert torch.equal(entropy_reward(logp, batch.mask), torch.where(batch.mask, -logp, 0.0))
    assert torch.equal(sampled_entropy_loss(logp, batch.mask), torch.where(batch.mask, logp, 0.0))


@given(batches(tensors=2))
def test_k1_and_entropy_rewards_add_up_to_known_rewards(batch: Batch) -> None:
    logp, ref_logp = batch.tensors
    no_score = torch.zeros(len(batch.mask), dtype=torch.float64)
    shaped = kl_shaped_reward(no_score, kl_k1(logp, ref_logp, batch.mask), batch.mask, beta=1.0)
    close(k1_reward(logp, ref_logp, batch.mask), shaped)
    close(
        entropy_reward(logp, batch.mask) - entropy_reward(ref_logp, batch.mask),
        k1_reward(logp, ref_logp, batch.mask),
    )


@pytest.mark.parametrize("s", [-20.0, -6.0, -1.0, -0.01, 0.0, 0.5, 3.0, 20.0])
def test_pointwise_derivatives_of_the_losses(s: float) -> None:
    for use, slope in ((k1_loss, 1.0), (k2_loss, s), (k3_loss, -math.expm1(-s)), (k3_ratio_loss, s)):
        got = grad(lambda x, f=use: f(x, t(0.0), ONE).sum())(t(s)).item()
        assert got == pytest.approx(slope, rel=1e-12, abs=1e-12)
    by_ref = grad(lambda x: k3_ratio_loss(t(s), x, ONE).sum())(t(0.0)).item()
    assert by_ref == pytest.approx(math.expm1(-s), rel=1e-12, abs=1e-12)


def test_the_ratio_form_is_the_product_that_it_stands_for() -> None:
    s = torch.linspace(-3, 3, 13, dtype=torch.float64)
    mask, zero = torch.ones(13, dtype=torch.bool), torch.zeros_like(s)

    def product(logp: Tensor, ref_logp: Tensor) -> Tensor:
        return ((logp - logp.detach()).exp() * kl_k3(logp, ref_logp, mask)).sum()

    def ours(logp: Tensor, ref_logp: Tensor) -> Tensor:
        return k3_ratio_loss(logp, ref_logp, mask).sum()

    for function in (product, ours):
        close(function(s, zero), kl_k3(s, zero, mask).sum())
    close(grad(ours, argnums=(0, 1))(s, zero), grad(product, argnums=(0, 1))(s, zero))


def test_the_gradient_of_the_ratio_form_keeps_its_digits_where_the_product_loses_them() -> None:
    s = torch.tensor([-200.0, -88.0, -20.0, -10.0, 10.0, 88.0, 200.0])
    mask, zero = torch.ones(7, dtype=torch.bool), torch.zeros_like(s)

    def product(x: Tensor) -> Tensor:
        return ((x - x.detach()).exp() * kl_k3(x, zero, mask)).sum()

    torch.testing.assert_close(grad(lambda x: k3_ratio_loss(x, zero, mask).sum())(s), s, rtol=1e-6, atol=1e-6)
    lost = grad(product)(s)
    assert lost[0].isnan().item() and abs(lost[2].item() + 20) > 1


def test_rewards_are_constants() -> None:
    logp, ref_logp, mask = t(-1.0, -2.0), t(-1.5, -1.0), torch.tensor([True, True])
    for use in (k1_reward, k2_reward, k3_reward):
        for slope in grad(lambda a, b, f=use: f(a, b, mask).sum(), argnums=(0, 1))(logp, ref_logp):
            assert not bool(slope.any())
        leaf = logp.clone().requires_grad_()
        assert not use(leaf, ref_logp, mask).requires_grad
    assert not entropy_reward(logp.clone().requires_grad_(), mask).requires_grad


def test_the_entropy_loss_is_least_for_the_uniform_law_and_flat_there() -> None:
    flat = torch.zeros(1, 4, dtype=torch.float64)
    assert entropy_loss(flat, ONE).item() == pytest.approx(-math.log(4))
    assert grad(lambda z: entropy_loss(z, ONE).sum())(flat).abs().max().item() < 1e-15
    logits = t(0.3, -0.5, 1.0)[None]
    p, logp = logits.softmax(-1), logits.log_softmax(-1)
    close(grad(lambda z: entropy_loss(z, ONE).sum())(logits), p * (logp - (p * logp).sum()))
    assert entropy_loss(t(0.3, -math.inf)[None], ONE).item() == 0.0
