"""The enumerable world against brute force, its published constants, and the identities of its laws."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from minirlhf.verify.optima import (
    best_objective,
    best_of_n_law,
    expected_group_gradient,
    falling_root,
    forward_kl_optimum,
    frontier,
    optimal_law,
    per_token_tilted,
    point_mass,
    regret,
    regret_fraction,
    soft_bellman,
    tilted,
)
from minirlhf.verify.world import (
    World,
    big_world,
    draw,
    entropy,
    expectation,
    expected_gradient,
    expected_reward,
    kl,
    kl_of_laws,
    lengths,
    objective,
    policy_gradient,
    prefix_number,
    response_logp,
    small_world,
    standard_world,
    state_value,
    tabulate,
    token_logp,
    token_reward,
    truncated,
    visits,
    world,
)

SMALL, STANDARD = small_world(), standard_world()
WORLDS = pytest.mark.parametrize("w", [SMALL, small_world(2), STANDARD], ids=["small", "two", "standard"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def another_policy(w: World, seed: int = 0, *, size: float = 1.0) -> Tensor:
    noise = torch.randn(w.ref_logits.shape, generator=generator(seed), dtype=torch.float64)
    return w.ref_logits + size * noise


def gradient_of(f: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    free = logits.clone().requires_grad_()
    return torch.autograd.grad(f(free), free)[0]


def close(a: Tensor, b: Tensor | float, *, atol: float = 1e-12) -> None:
    expected = torch.as_tensor(b, dtype=torch.float64)
    torch.testing.assert_close(a, expected.expand_as(a), rtol=0, atol=atol)


# The enumeration, by brute force.


def all_responses(w: World) -> list[tuple[int, ...]]:
    """Grown one token at a time, in any order."""
    found, open_ = [], [()]
    while open_:
        prefix = open_.pop()
        if prefix and (prefix[-1] == 0 or len(prefix) == w.config.length):
            found.append(prefix)
        else:
            open_ += [(*prefix, token) for token in range(w.config.vocab_size)]
    return found


def logp_by_hand(logits: Tensor, w: World, x: int, response: tuple[int, ...]) -> float:
    """One token after another, prefixes found in their list."""
    words = range(1, w.config.vocab_size)
    prefixes = [p for n in range(w.config.length) for p in product(words, repeat=n)]
    total = 0.0
    for t, token in enumerate(response):
        row = logits[x, prefixes.index(response[:t])].tolist()
        total += row[token] - math.log(sum(math.exp(z) for z in row))
    return total


@pytest.mark.parametrize(
    ("w", "responses", "prefixes"), [(SMALL, 15, 7), (STANDARD, 121, 40), (big_world(), 1093, 364)]
)
def test_every_response_is_listed_once(w: World, responses: int, prefixes: int) -> None:
    assert sorted(w.responses) == sorted(all_responses(w))
    assert len(w.responses) == w.config.responses == w.gold.shape[1] == responses
    assert w.config.prefixes == w.ref_logits.shape[1] == prefixes


@WORLDS
def test_a_response_has_the_number_of_its_words(w: World) -> None:
    for n, response in enumerate(w.responses):
        assert prefix_number(response, w.config.vocab_size) == n
        assert tuple(w.tokens[n, w.mask[n]].tolist()) == response
        assert float(lengths(w)[n]) == len(response)
        assert bool(truncated(w)[n]) == (response[-1] != 0)


@WORLDS
def test_the_log_prob_of_a_response_is_that_of_its_tokens(w: World) -> None:
    logits = another_policy(w)
    logp = response_logp(logits, w)
    for x, n in product(range(w.config.prompts), range(0, w.config.responses, 7)):
        assert float(logp[x, n]) == pytest.approx(logp_by_hand(logits, w, x, w.responses[n]), abs=1e-12)


@WORLDS
def test_the_probabilities_of_all_responses_sum_to_one(w: World) -> None:
    for seed in range(5):
        close(response_logp(another_policy(w, seed, size=3), w).exp().sum(1), 1.0)


def test_a_world_can_be_one_token_long_and_have_no_word_but_one() -> None:
    w = world(vocab_size=2, length=1)
    assert w.responses == ((0,), (1,))
    close(response_logp(w.ref_logits, w), torch.log_softmax(w.ref_logits[:, 0], dim=-1))
    assert world(vocab_size=2, length=4).config.responses == 5


def test_half_precision_logits_are_computed_in_fp64() -> None:
    logits = another_policy(SMALL).float()
    assert response_logp(logits, SMALL).dtype == torch.float64
    close(response_logp(logits, SMALL), response_logp(logits.double(), SMALL))


@WORLDS
def test_a_table_can_be_made_of_any_law_and_gives_it_back(w: World) -> None:
    for seed in range(3):
        law = torch.log_softmax(3 * torch.randn(w.gold.shape, generator=generator(seed)).double(), dim=1)
        close(response_logp(tabulate(law, w), w), law)
    logits = another_policy(w)
    close(torch.log_softmax(tabulate(response_logp(logits, w), w), dim=-1), torch.log_softmax(logits, dim=-1))


@WORLDS
def test_prefixes_are_visited_as_often_as_responses_pass_through_them(w: World) -> None:
    logits = another_policy(w)
    law, found = response_logp(logits, w).exp(), visits(logits, w)
    close(found[:, 0], 1.0)
    for k in (1, w.config.prefixes // 2, w.config.prefixes - 1):
        through = [bool(((w.states[n] == k) & w.mask[n]).any()) for n in range(len(w.responses))]
        close(found[:, k], law[:, through].sum(1))


def test_draws_follow_the_law() -> None:
    w, count = small_world(2), 50_000
    logits = another_policy(w)
    numbers = draw(logits, w, count=count, generator=generator())
    assert numbers.shape == (2, count)
    for x, expected in enumerate(count * response_logp(logits, w).exp()):
        seen = numbers[x].bincount(minlength=15).double()
        statistic = ((seen - expected) ** 2 / expected).sum()
        assert float(torch.special.gammaincc(torch.tensor(7.0).double(), statistic / 2)) > 1e-6
    again = draw(logits, w, count=count, generator=generator())
    assert torch.equal(numbers, again)


# Published constants.


def test_the_standard_world_has_its_published_constants() -> None:
    assert float(best_objective(STANDARD, beta=0.3)) == pytest.approx(1.4022126332831828, rel=1e-12)
    assert float(objective(STANDARD.ref_logits, STANDARD, beta=0.3)) == pytest.approx(
        0.3771013070816243, rel=1e-12
    )


def test_the_small_world_has_its_published_constants() -> None:
    assert float(expected_reward(SMALL.ref_logits, SMALL)) == pytest.approx(0.6605679064980368, rel=1e-12)
    assert float(objective(SMALL.ref_logits, SMALL, beta=7.0)) == pytest.approx(0.6605679064980368, rel=1e-12)
    assert float(entropy(SMALL.ref_logits, SMALL)) == pytest.approx(1.7159072075, rel=1e-10)
    assert float(best_objective(SMALL, beta=0.3)) == pytest.approx(1.5444693764848674, rel=1e-12)
    assert float(best_objective(SMALL, beta=1.0)) == pytest.approx(1.0619373206795808, rel=1e-12)


@pytest.mark.parametrize(
    ("beta", "best", "divergence", "spread"),
    [
        (0.05, None, 1.485, 0.024),
        (0.1, 1.8171, 1.445, 0.103),
        (0.3, 1.5445, 1.2409, 0.429),
        (0.5, 1.3343, 0.861, 0.829),
        (1.0, 1.0619, 0.333, 1.303),
        (2.0, 0.8791, 0.100, 1.518),
        (5.0, None, 0.018, 1.636),
    ],
)
def test_a_smaller_beta_drifts_further_and_collapses(
    beta: float, best: float | None, divergence: float, spread: float
) -> None:
    logits = soft_bellman(SMALL, beta=beta).logits
    assert float(kl(logits, SMALL.ref_logits, SMALL)) == pytest.approx(divergence, abs=6e-4)
    assert float(entropy(logits, SMALL)) == pytest.approx(spread, abs=6e-4)
    if best is not None:
        assert float(best_objective(SMALL, beta=beta)) == pytest.approx(best, abs=6e-5)


def test_the_fixed_point_of_k3_as_a_loss_has_its_published_constants() -> None:
    law = forward_kl_optimum(SMALL, beta=0.3)
    reward = float((law.exp() * SMALL.gold).sum())
    assert reward == pytest.approx(1.745907, abs=5e-7)
    assert float(kl_of_laws(law, response_logp(SMALL.ref_logits, SMALL))) == pytest.approx(0.865237, abs=5e-7)
    # β π_ref / (λ - r) with the published λ
    by_hand = 0.3 * response_logp(SMALL.ref_logits, SMALL).exp() / (2.045906604011768 - SMALL.gold)
    close(law.exp(), by_hand, atol=1e-11)
    assert 2.045906604011768 - 0.3 == pytest.approx(reward, abs=1e-12)


# Expectations and gradients.


def test_the_policy_gradient_is_the_slope_of_the_objective() -> None:
    logits, step = another_policy(SMALL), 1e-6
    slope = policy_gradient(logits, SMALL, beta=0.7)
    for k, v in product(range(7), range(3)):
        nudge = torch.zeros_like(logits)
        nudge[0, k, v] = step
        rise = objective(logits + nudge, SMALL, beta=0.7) - objective(logits - nudge, SMALL, beta=0.7)
        assert float(rise) / (2 * step) == pytest.approx(float(slope[0, k, v]), abs=1e-8)


@WORLDS
def test_the_rewards_of_the_tokens_add_up_to_reward_less_kl(w: World) -> None:
    logits, beta = another_policy(w), 0.7
    total = token_reward(logits, w, beta=beta).sum(-1)
    close(total, w.gold - beta * (response_logp(logits, w) - response_logp(w.ref_logits, w)))
    close(expectation(logits, total, w), objective(logits, w, beta=beta))


def advantage_estimate(reward: Tensor, value: Tensor, w: World, lam: float) -> Tensor:
    """Σ_k λ^k δ_{t+k}, δ_t = r_t + V_{t+1} - V_t, the value after the end being 0: all [X, N, T]."""
    before = torch.where(w.mask, value[:, w.states], 0.0)
    after = torch.cat([before[..., 1:], torch.zeros_like(before[..., :1])], dim=-1)
    delta = reward + after - before
    advantage = torch.zeros_like(delta)
    for t in range(w.config.length):
        for k in range(t, w.config.length):
            advantage[..., t] += lam ** (k - t) * torch.where(w.mask[:, k], delta[..., k], 0.0)
    return advantage


@WORLDS
def test_advantage_estimates_are_unbiased_with_lambda_one_or_the_right_values(w: World) -> None:
    logits, beta = another_policy(w), 0.7
    reward, right = token_reward(logits, w, beta=beta), state_value(logits, w, beta=beta)
    wrong = torch.randn(right.shape, generator=generator(3), dtype=torch.float64)
    slope = policy_gradient(logits, w, beta=beta)
    for value, lam in ((wrong, 1.0), (0 * wrong, 1.0), (right, 0.0), (right, 0.5), (right, 0.95)):
        close(expected_gradient(logits, advantage_estimate(reward, value, w, lam), w), slope)
    for lam in (0.0, 0.5, 0.95):
        biased = expected_gradient(logits, advantage_estimate(reward, wrong, w, lam), w)
        assert float((biased - slope).norm() / slope.norm()) > 0.01


@WORLDS
def test_the_value_of_the_empty_prefix_is_the_objective(w: World) -> None:
    logits = another_policy(w)
    close(state_value(logits, w, beta=0.7)[:, 0].mean(), objective(logits, w, beta=0.7))


@WORLDS
def test_divergence_and_entropy_are_sums_over_the_prefixes_visited(w: World) -> None:
    logits = another_policy(w)
    seen, law, ref = visits(logits, w), torch.log_softmax(logits, -1), torch.log_softmax(w.ref_logits, -1)
    close((seen * (law.exp() * (law - ref)).sum(-1)).sum(1).mean(), kl(logits, w.ref_logits, w))
    close((seen * -(law.exp() * law).sum(-1)).sum(1).mean(), entropy(logits, w))


@WORLDS
def test_the_divergence_bounds_what_it_must(w: World) -> None:
    logits = another_policy(w)
    law, ref = response_logp(logits, w), response_logp(w.ref_logits, w)
    divergence = float(kl(logits, w.ref_logits, w))
    for seed in range(20):  # Donsker-Varadhan
        f = 2 * torch.randn(law.shape, generator=generator(seed), dtype=torch.float64)
        assert float(((law.exp() * f).sum(1) - torch.logsumexp(ref + f, 1)).mean()) <= divergence
    f = law - ref
    assert float(((law.exp() * f).sum(1) - torch.logsumexp(ref + f, 1)).mean()) == pytest.approx(divergence)
    per_prompt = (law.exp() * f).sum(1)
    assert ((law.exp() - ref.exp()).abs().sum(1) / 2 <= (per_prompt / 2).sqrt()).all()  # Pinsker
    first, ref_first = torch.log_softmax(logits[:, 0], -1), torch.log_softmax(w.ref_logits[:, 0], -1)
    assert ((first.exp() * (first - ref_first)).sum(-1) <= per_prompt).all()  # data processing
    assert divergence > 0 and float(kl(logits, logits, w)) == 0


def test_the_divergence_from_a_law_with_zeros_is_finite_and_to_it_infinite() -> None:
    ref, only = response_logp(SMALL.ref_logits, SMALL), point_mass(SMALL.gold)
    assert float(kl_of_laws(only, ref)) == pytest.approx(float(-ref[0, SMALL.gold[0].argmax()]))
    assert float(kl_of_laws(ref, only)) == math.inf


Estimator = Callable[[Tensor], Tensor]


def k1(s: Tensor) -> Tensor:
    return s


def k2(s: Tensor) -> Tensor:
    return s**2 / 2


def k3(s: Tensor) -> Tensor:
    return torch.expm1(-s) + s


def test_what_each_kl_estimator_does_as_a_reward_and_as_a_loss() -> None:
    w, logits = SMALL, another_policy(SMALL)
    ref, law = response_logp(w.ref_logits, w), response_logp(logits, w)
    reverse = gradient_of(lambda z: kl(z, w.ref_logits, w), logits)
    forward = gradient_of(lambda z: kl_of_laws(ref, response_logp(z, w)), logits)
    squared = gradient_of(lambda z: expectation(z, (response_logp(z, w) - ref) ** 2 / 2, w), logits)

    def as_reward(k: Estimator) -> Tensor:
        return expected_gradient(logits, k(law - ref)[..., None].expand(-1, -1, 3), w)

    def as_loss(k: Estimator) -> Tensor:
        return gradient_of(lambda z: (law.exp() * k(response_logp(z, w) - ref)).sum(), logits)

    close(as_reward(k1), reverse)
    close(as_reward(k2), squared - reverse)
    close(as_reward(k3), reverse - forward)
    close(as_loss(k1), 0.0)
    close(as_loss(k2), reverse)
    close(as_loss(k3), forward)
    assert min(float(g.norm()) for g in (reverse, forward, reverse - forward, squared - reverse)) > 0.05
    near = w.ref_logits + 0.01 * (logits - w.ref_logits)
    vanishing = expected_gradient(near, k3(response_logp(near, w) - ref)[..., None].expand(-1, -1, 3), w)
    assert float(vanishing.norm()) < 0.03 * float(gradient_of(lambda z: kl(z, w.ref_logits, w), near).norm())


@pytest.mark.parametrize("estimator", [k2, k3])
def test_kl_losses_summed_over_tokens_drop_the_future(estimator: Estimator) -> None:
    w, logits = STANDARD, another_policy(STANDARD)
    law, ref = token_logp(logits, w), token_logp(w.ref_logits, w)
    weight = law.sum(-1).exp() / 2  # prompts
    slope = gradient_of(
        lambda z: (weight[..., None] * estimator(token_logp(z, w) - ref)).sum(),
        logits,
    )
    right = gradient_of(lambda z: kl(z, w.ref_logits, w), logits)
    assert float((slope - right).norm() / right.norm()) > 0.1


# The KL-regularised optimum.


@WORLDS
@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0, 5.0])
def test_soft_bellman_is_the_closed_form(w: World, beta: float) -> None:
    found = soft_bellman(w, beta=beta)
    law = optimal_law(w, beta=beta)
    close(response_logp(found.logits, w), law, atol=1e-11)
    close(found.value[:, 0].mean(), best_objective(w, beta=beta))
    if beta >= 1:  # at a small one some prefixes are hardly ever visited
        close(state_value(found.logits, w, beta=beta), found.value, atol=1e-9)
    log_z = torch.logsumexp(response_logp(w.ref_logits, w) + w.gold / beta, dim=1)
    close(law, response_logp(w.ref_logits, w) + w.gold / beta - log_z[:, None], atol=1e-11)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9])
def test_soft_bellman_discounts_what_a_word_leads_to(gamma: float) -> None:
    w, beta = small_world(2), 0.7
    found = soft_bellman(w, beta=beta, gamma=gamma)

    def value(x: int, prefix: tuple[int, ...]) -> float:
        k = prefix_number(prefix, 3)
        base = torch.log_softmax(w.ref_logits[x, k], dim=-1).tolist()
        total = 0.0
        for token in range(3):
            response = (*prefix, token)
            if response in w.responses:
                q = float(w.gold[x, w.responses.index(response)])
            else:
                q = gamma * value(x, response)
            assert float(found.logits[x, k, token]) == pytest.approx(base[token] + q / beta, abs=1e-12)
            total += math.exp(base[token] + q / beta)
        return beta * math.log(total)

    for x in range(2):
        assert float(found.value[x, 0]) == pytest.approx(value(x, ()), abs=1e-12)


@WORLDS
def test_regret_is_beta_times_the_divergence_from_the_optimum(w: World) -> None:
    for seed, beta in product(range(5), (0.2, 1.0, 3.0)):
        logits = another_policy(w, seed)
        divergence = kl_of_laws(response_logp(logits, w), optimal_law(w, beta=beta))
        close(regret(logits, w, beta=beta), float(beta * divergence))
        assert float(regret(logits, w, beta=beta)) > 0


@WORLDS
def test_the_gradient_is_zero_at_the_optimum_and_the_regret_fraction_runs_from_one_to_zero(w: World) -> None:
    best = soft_bellman(w, beta=1.0).logits
    close(policy_gradient(best, w, beta=1.0), 0.0)
    assert float(policy_gradient(w.ref_logits, w, beta=1.0).norm()) > 0.05
    close(regret_fraction(best, w, beta=1.0), 0.0)
    close(regret_fraction(w.ref_logits, w, beta=1.0), 1.0)


def test_forgetting_the_kl_is_nearly_free_at_a_small_beta_and_ruinous_at_one() -> None:
    greedy = tabulate(point_mass(SMALL.gold), SMALL).clamp(min=-60)
    assert float(regret_fraction(greedy, SMALL, beta=0.1)) == pytest.approx(0.002, abs=5e-4)
    assert float(regret_fraction(greedy, SMALL, beta=1.0)) == pytest.approx(1.48, abs=5e-3)


def test_the_wrong_betas_and_discounts_cost_what_was_published() -> None:
    for law, expected in (
        (optimal_law(SMALL, beta=0.5), 0.396),
        (optimal_law(SMALL, beta=2.0), 0.20),
        (response_logp(soft_bellman(SMALL, beta=1.0, gamma=0.9).logits, SMALL), 0.010),
    ):
        found = float(regret_fraction(tabulate(law, SMALL), SMALL, beta=1.0))
        assert found == pytest.approx(expected, rel=0.05)


def test_along_the_tilted_family_reward_rises_by_beta_for_each_nat() -> None:
    def at(t: float) -> tuple[float, float]:
        law = tilted(SMALL, t * SMALL.gold)
        return float((law.exp() * SMALL.gold).sum()), float(
            kl_of_laws(law, response_logp(SMALL.ref_logits, SMALL))
        )

    for beta in (0.5, 1.3, 3.0):
        (low, near), (high, far) = at(1 / beta - 1e-5), at(1 / beta + 1e-5)
        assert (high - low) / (far - near) == pytest.approx(beta, rel=1e-6)


def test_a_wrong_reward_costs_what_the_jeffreys_divergence_says() -> None:
    beta, wrong = 0.7, SMALL._replace(gold=SMALL.gold.flip(1))
    law, best = optimal_law(wrong, beta=beta), optimal_law(SMALL, beta=beta)
    jeffreys = beta * (kl_of_laws(law, best) + kl_of_laws(best, law))
    close(jeffreys, float(((law.exp() - best.exp()) * (wrong.gold - SMALL.gold)).sum()))


def test_the_forward_kl_optimum_is_where_its_gradient_is_zero() -> None:
    for w, beta in product((SMALL, small_world(2)), (0.05, 0.3, 2.0)):
        ref = response_logp(w.ref_logits, w)

        def value(z: Tensor, w: World = w, beta: float = beta, ref: Tensor = ref) -> Tensor:
            return expected_reward(z, w) - beta * kl_of_laws(ref, response_logp(z, w))

        law = forward_kl_optimum(w, beta=beta)
        close(law.exp().sum(1), 1.0)
        close(gradient_of(value, tabulate(law, w)), 0.0, atol=1e-10)


@WORLDS
def test_a_per_token_tilt_is_normalised_and_linear_in_the_length(w: World) -> None:
    exponent = torch.randn(w.gold.shape, generator=generator(), dtype=torch.float64)
    law = per_token_tilted(w, exponent)
    close(law.exp().sum(1), 1.0)
    constant = (law - response_logp(w.ref_logits, w)) / lengths(w) - exponent
    close(constant, constant[:, :1].expand_as(constant), atol=1e-11)


def test_a_point_mass_is_shared_by_ties() -> None:
    law = point_mass(torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 1.0, 1.0, 1.0]]))
    assert law.exp().tolist() == [[0.0, 0.5, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]]


def test_bisection_finds_the_root_of_a_falling_function() -> None:
    target = torch.tensor([0.5, 2.0]).double()
    found = falling_root(lambda x: target - x**3, torch.zeros(2).double(), torch.full((2,), 9.0).double())
    close(found**3, target)


# The reward-KL frontier.


@pytest.mark.parametrize("prompts", [1, 2])
def test_no_policy_lies_above_the_frontier(prompts: int) -> None:
    w = small_world(prompts)
    policies = [another_policy(w, seed, size=0.05 + 0.004 * seed) for seed in range(1000)]
    divergence = torch.stack([kl(logits, w.ref_logits, w) for logits in policies])
    reward = torch.stack([expected_reward(logits, w) for logits in policies])
    gap = frontier(divergence, w) - reward
    assert float(gap.min()) > 0
    assert float(divergence.min()) < 0.01 and float(divergence.max()) > 1.5


@WORLDS
def test_the_tilted_laws_are_the_frontier(w: World) -> None:
    laws = [optimal_law(w, beta=beta) for beta in (0.05, 0.3, 1.0, 4.0)]
    ref = response_logp(w.ref_logits, w)
    divergence = torch.stack([kl_of_laws(law, ref) for law in laws])
    reward = torch.stack([(law.exp() * w.gold).sum(1).mean() for law in laws])
    close(frontier(divergence, w), reward, atol=1e-9)
    close(frontier(torch.tensor([0.0, 50.0]), w)[0], expected_reward(w.ref_logits, w), atol=1e-7)
    close(frontier(torch.tensor([0.0, 50.0]), w)[1], w.gold.max(1).values.mean(), atol=1e-9)
    curve = frontier(torch.linspace(0.05, 1.2, 24), w)
    assert (curve.diff() > 0).all() and (curve.diff().diff() < 0).all()
    assert frontier(torch.tensor([[0.1, 0.2], [0.3, 0.4]]), w).shape == (2, 2)


def test_a_divergence_below_zero_is_refused() -> None:
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match="divergence must be at least 0 nats"):
            frontier(torch.tensor([0.1, bad]), SMALL)


# Best of n.


@pytest.mark.parametrize(
    ("n", "divergence", "bound", "wins"),
    [
        (2, 0.18796, 0.19315, 0.66068),
        (4, 0.60374, 0.63629, 0.78614),
        (8, 1.14323, 1.20444, 0.87582),
        (16, 1.75046, 1.83509, 0.93033),
        (64, 2.34794, 3.17451, 0.95264),
        (1024, 2.35918, 5.93245, 0.95275),
    ],
)
def test_best_of_n_has_its_published_constants(n: int, divergence: float, bound: float, wins: float) -> None:
    w = standard_world(1)
    ref = response_logp(w.ref_logits, w)
    law = best_of_n_law(ref, w.gold, n=n)
    close(law.exp().sum(1), 1.0)
    assert float(kl_of_laws(law, ref)) == pytest.approx(divergence, abs=5e-6)
    assert math.log(n) - (n - 1) / n == pytest.approx(bound, abs=5e-6)
    order = (w.gold[:, :, None] > w.gold[:, None, :]).double()
    order += (w.gold[:, :, None] == w.gold[:, None, :]) / 2
    found = float(torch.einsum("xn,xnm,xm->", law.exp(), order, ref.exp()))
    assert found == pytest.approx(wins, abs=5e-6) and found < n / (n + 1)
    assert float((law.exp() * w.gold).sum()) <= float(frontier(kl_of_laws(law, ref), w))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_is_the_law_of_the_best_of_all_draws_with_ties(n: int) -> None:
    score = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0]]).double()
    law = torch.log_softmax(torch.tensor([[0.3, -0.4, 1.0, 0.2, -2.0]]).double(), dim=1)
    expected = torch.zeros(5).double()
    for drawn in product(range(5), repeat=n):
        top = max(float(score[0, i]) for i in drawn)
        best = [i for i in drawn if float(score[0, i]) == top]
        for i in best:  # a uniform one of the best draws
            expected[i] += float(law[0, list(drawn)].sum().exp()) / len(best)
    close(best_of_n_law(law, score, n=n).exp()[0], expected)


def test_best_of_many_is_the_best_and_a_response_of_no_probability_stays_one() -> None:
    law = torch.tensor([[0.5, 0.5, 0.0]]).double().log()
    found = best_of_n_law(law, torch.tensor([[1.0, 2.0, 3.0]]).double(), n=4000)
    assert found.exp().tolist() == [[0.0, 1.0, 0.0]]
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        best_of_n_law(law, law, n=0)


# Groups.


def leave_one_out(reward: Tensor) -> Tensor:
    size = reward.shape[-1]
    return (size * reward - reward.sum(-1, keepdim=True)) / (size - 1)


def normalised(reward: Tensor) -> Tensor:
    return (reward - reward.mean(-1, keepdim=True)) / (reward.std(-1, keepdim=True) + 1e-4)


@pytest.mark.parametrize("size", [2, 3])
def test_the_expectation_over_groups_is_the_policy_gradient_for_leave_one_out(size: int) -> None:
    w = small_world(2)
    logits = another_policy(w)
    slope = gradient_of(lambda z: expected_reward(z, w), logits)
    close(expected_group_gradient(logits, w, w.gold, leave_one_out, size=size), slope)
    centred = expected_group_gradient(logits, w, w.gold, lambda r: r - r.mean(-1, keepdim=True), size=size)
    close(centred, (size - 1) / size * slope)
    shifted = w.gold + torch.tensor([[3.0], [-8.0]])
    close(expected_group_gradient(logits, w, shifted, leave_one_out, size=size), slope)


def test_the_expectation_over_groups_is_the_mean_over_drawn_groups() -> None:
    logits = another_policy(SMALL)
    exact = expected_group_gradient(logits, SMALL, SMALL.gold, normalised, size=3)
    groups = draw(logits, SMALL, count=30_000, generator=generator())[0].view(-1, 3)
    advantage = normalised(SMALL.gold[0, groups]) / 3
    sampled = gradient_of(
        lambda z: (advantage * response_logp(z, SMALL)[0, groups]).sum() / len(groups), logits
    )
    assert float((sampled - exact).abs().max()) < 0.02 and float(exact.abs().max()) > 0.1


def test_normalised_advantages_have_another_gradient_but_the_same_fixed_point() -> None:
    w, logits, beta = SMALL, another_policy(SMALL), 0.7

    def shaped(logits: Tensor) -> Tensor:
        return w.gold - beta * (response_logp(logits, w) - response_logp(w.ref_logits, w))

    slope = policy_gradient(logits, w, beta=beta).flatten()
    found = expected_group_gradient(logits, w, shaped(logits), normalised, size=3).flatten()
    cosine = float(slope @ found / slope.norm() / found.norm())
    assert 0.5 < cosine < 0.999
    best = soft_bellman(w, beta=beta).logits
    # The shaped reward is the same up to rounding, which the division by the deviation makes visible.
    close(expected_group_gradient(best, w, shaped(best), normalised, size=3), 0.0, atol=1e-9)


# What is refused.


def test_tensors_of_another_world_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"logits must have shape \[X, K, V\] = \[1, 7, 3\], got \[2, 40, 4\]"
    ):
        response_logp(STANDARD.ref_logits, SMALL)
    with pytest.raises(ValueError, match=r"law must have shape \[X, N\] = \[1, 15\], got \[1, 7, 3\]"):
        tabulate(SMALL.ref_logits, SMALL)


@pytest.mark.parametrize("solve", [soft_bellman, optimal_law, best_objective, forward_kl_optimum])
def test_a_beta_that_is_not_positive_is_refused(solve: Callable[..., object]) -> None:
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="beta must be positive"):
            solve(SMALL, beta=beta)


def test_a_world_without_a_word_a_token_or_a_prompt_is_refused() -> None:
    for size in ({"vocab_size": 1}, {"length": 0}, {"prompts": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(size))} must be at least"):
            world(**{"vocab_size": 3, "length": 3, "prompts": 1, **size})
