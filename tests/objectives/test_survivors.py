"""What wrong variants have asked for: each claim refuses a mutant that all other tests let through."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, jacrev, vmap

from minirlhf.objectives import (
    advantages,
    best_of_n,
    divergence,
    group_advantages,
    importance,
    inputs,
    kl_usage,
    masked,
    policy,
    policy_variants,
    preference,
    ranking,
    reference_free,
    sampling,
    supervised,
    value,
)
from tests.objectives.assertions import close
from tests.objectives.catalogue import CASES, EXAMPLE_MASK, Case, example

MASKED_PAGES = (
    masked,
    policy,
    value,
    advantages,
    divergence,
    supervised,
    ranking,
    group_advantages,
    policy_variants,
    importance,
    kl_usage,
)
MASKED = [
    function
    for page in MASKED_PAGES
    for name, function in inspect.getmembers(page, inspect.isfunction)
    if function.__module__ == page.__name__
    and not name.startswith("_")
    and "mask" in inspect.signature(function).parameters
]
every_masked = pytest.mark.parametrize("function", MASKED, ids=lambda function: function.__name__)
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])

LAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "tempered": lambda x: sampling.tempered(x, temperature=0.7),
    "top_k": lambda x: sampling.top_k(x, k=3),
    "top_k of all": lambda x: sampling.top_k(x, k=9),
    "top_p": lambda x: sampling.top_p(x, p=0.8),
    "top_p of all": lambda x: sampling.top_p(x, p=1.0),
    "min_p": lambda x: sampling.min_p(x, p=0.3),
    "min_p of all": lambda x: sampling.min_p(x, p=0.0),
    "top_k, top_p and min_p": lambda x: sampling.sampling_law(x, top_k=4, top_p=0.95, min_p=0.05),
}
every_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def call(function: Callable[..., Any], **other: Any) -> Any:
    """A call with valid arguments by name, [2, 3] for tokens and [2] for sequences, but for `other`."""
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            continue
        sequence = name in ("score", "bootstrap_value") or name == "advantage" and "gspo" in function.__name__
        if name == "mask":
            given[name] = torch.ones(2, 3, dtype=torch.bool)
        elif parameter.annotation is Tensor:
            shape = (2, 3, 4) if "logits" in name else (2,) if sequence else (2, 3)
            given[name] = torch.zeros(shape, dtype=torch.float64)
        else:
            given[name] = 2.0 if name in ("cap", "high") else 0.25
    return function(**(given | other))


def tensor_parameters(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters
    return [n for n, p in parameters.items() if n != "mask" and p.annotation in (Tensor, Tensor | None)]


# Errors name the argument as the caller knows it, and come before anything is broadcast.


@every_masked
def test_a_tensor_of_integers_is_refused_under_its_own_name(function: Callable[..., Any]) -> None:
    call(function)
    for name in tensor_parameters(function):
        shape = (2, 3, 4) if "logits" in name else (2, 3)
        with pytest.raises(ValueError, match=f"^{name} must be a floating-point tensor, got torch.int64"):
            call(function, **{name: torch.zeros(shape, dtype=torch.long)})


@every_masked
def test_every_tensor_of_another_shape_is_refused_not_broadcast(function: Callable[..., Any]) -> None:
    for name in tensor_parameters(function):
        trailing = (
            name == "x" and function is masked.select or "logits" in name
        )  # these have axes behind the mask's
        for shape in ((2, 1), (1, 3), (), *(() if trailing else ((2, 3, 1),))):
            with pytest.raises(ValueError, match="shape|mask"):
                call(function, **{name: torch.zeros(shape, dtype=torch.float64)})


@every_masked
def test_a_mask_that_is_no_tensor_is_refused_by_its_type(function: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"^mask must be a bool tensor \(True = counts\), got list$"):
        call(function, mask=[True, False])


def test_logits_without_an_axis_are_refused_by_every_law() -> None:
    for law in LAWS.values():
        with pytest.raises(ValueError, match=r"logits must have a vocabulary axis, got shape \[\]"):
            law(torch.tensor(1.0))


def test_the_controller_names_the_tensor_that_is_not_floating_point() -> None:
    settings = {"target": 6.0, "horizon": 100.0, "n_steps": 10.0}
    with pytest.raises(ValueError, match="^kl must be a floating-point tensor"):
        divergence.adapt_kl(divergence.KLController(torch.tensor(0.2)), torch.tensor(1), **settings)
    with pytest.raises(ValueError, match="^coefficient must be a floating-point tensor"):
        divergence.adapt_kl(divergence.KLController(torch.tensor(1)), torch.tensor(1.0), **settings)


# Zeros are plain zeros.


@every_case
def test_what_the_mask_excludes_is_plain_zero_and_not_minus_zero(case: Case) -> None:
    result = case.call(*example(case), EXAMPLE_MASK)
    if result.shape == EXAMPLE_MASK.shape and not case.boolean:
        assert not bool(result[~EXAMPLE_MASK].signbit().any())


# Half precision.


@every_case
def test_gradients_reach_half_precision_input(case: Case) -> None:
    if case.boolean:
        return
    exact = example(case, dtype=torch.float32)

    def total(*tensors: Tensor) -> Tensor:
        result = case.call(*tensors, EXAMPLE_MASK)
        return (result * torch.arange(1, result.numel() + 1).reshape(result.shape)).sum()

    wide = grad(total, argnums=tuple(range(case.tensors)))(*exact)
    half = grad(total, argnums=tuple(range(case.tensors)))(*(x.bfloat16() for x in exact))
    for one, other in zip(wide, half, strict=True):
        assert bool(other.isfinite().all()) and bool(other.any()) == bool(one.any())


@every_law
def test_a_law_alone_is_computed_and_returned_in_fp32(law: Callable[[Tensor], Tensor]) -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert law(logits).dtype == torch.float32
    assert torch.equal(law(logits), law(logits.float()))


# Gradients.


@every_law
def test_the_gradient_of_every_law_is_that_of_the_softmax_on_what_it_keeps(
    law: Callable[[Tensor], Tensor],
) -> None:
    logits = t(0.9, -0.4, 1.3, 0.2, -1.1)
    temperature = 0.7 if law is LAWS["tempered"] else 1.0
    kept = law(logits) > -math.inf

    def expected(x: Tensor) -> Tensor:
        return torch.log_softmax(torch.where(kept, x / temperature, -math.inf), dim=-1)[kept]

    weight = torch.linspace(0.5, 2.0, int(kept.sum()), dtype=torch.float64)
    slope = grad(lambda x: (law(x)[kept] * weight).sum())(logits)
    close(slope, grad(lambda x: (expected(x) * weight).sum())(logits))
    assert bool(slope[kept].any())


def test_advantages_and_returns_are_differentiable_in_the_discounts_and_in_the_bootstrap_value() -> None:
    reward, values = t(0.5, -1.0, 2.0, 0.3, 9.0)[None], t(0.1, 0.4, -0.2, 0.7, 9.0)[None]
    mask = torch.tensor([[True, True, False, True, False]])
    inputs_ = tuple(
        x.requires_grad_() for x in (torch.tensor(0.9).double(), torch.tensor(0.6).double(), t(0.8))
    )

    def both(gamma: Tensor, lam: Tensor, bootstrap: Tensor) -> tuple[Tensor, Tensor]:
        return advantages.gae(reward, values, mask, gamma=gamma, lam=lam, bootstrap_value=bootstrap)

    def returns(gamma: Tensor, lam: Tensor, bootstrap: Tensor) -> Tensor:
        return lam * advantages.discounted_return(reward, mask, gamma=gamma, bootstrap_value=bootstrap)

    assert gradcheck(both, inputs_) and gradcheck(returns, inputs_)


def test_the_slope_in_the_bootstrap_value_is_the_discount_to_it() -> None:
    reward, values, mask = (
        torch.zeros(1, 3).double(),
        torch.zeros(1, 3).double(),
        torch.ones(1, 3, dtype=torch.bool),
    )

    def first(bootstrap: Tensor, lam: float) -> Tensor:
        return advantages.gae(reward, values, mask, gamma=0.5, lam=lam, bootstrap_value=bootstrap).advantage[
            0, 0
        ]

    close(grad(first)(t(1.0), 1.0), t(0.125))
    close(grad(first)(t(1.0), 0.5), t(0.03125))


def test_the_shaped_reward_is_paid_out_of_the_score_and_of_the_kl() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    score, kl = t(1.5, -0.5).requires_grad_(), torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda s, k: divergence.kl_shaped_reward(s, k, mask, beta=0.3), (score, kl))
    slope = grad(lambda s: divergence.kl_shaped_reward(s, kl.detach(), mask, beta=0.3)[0, 1])(score.detach())
    close(slope, t(1.0, 0.0))


def test_the_controller_is_differentiable_in_its_measurement_inside_the_clip() -> None:
    def next_coefficient(kl: Tensor) -> Tensor:
        state = divergence.KLController(torch.tensor(0.2, dtype=torch.float64))
        return divergence.adapt_kl(state, kl, target=4.0, horizon=100.0, n_steps=10.0).coefficient

    slope = vmap(grad(next_coefficient))(t(4.4, 9.0))
    close(slope, t(0.2 * 10 / 100 / 4, 0.0))


def test_the_sequence_loss_is_differentiable_in_the_advantage() -> None:
    logp, mask = t(0.1, -0.2)[None], torch.tensor([[True, True]])

    def loss(advantage: Tensor) -> Tensor:
        return policy_variants.gspo_loss(
            logp, torch.zeros_like(logp), advantage, mask, clip_low=0.2, clip_high=0.2
        )[0]

    close(grad(loss)(t(1.0)), -t(math.exp(-0.05)))


# Curvature: where a slope is missing that is zero to first order.


def test_the_curvature_of_the_kl_at_the_reference_is_the_fisher_matrix() -> None:
    logits, mask = t(0.3, -0.7, 1.1, 0.0), torch.tensor([[True]])
    p = logits.softmax(-1)
    fisher = torch.diag(p) - p[:, None] * p

    def kl(x: Tensor) -> Tensor:
        return divergence.exact_kl(x[None, None], logits[None, None], mask).sum()

    close(jacrev(grad(kl))(logits), fisher)


def test_the_curvature_of_the_entropy_at_the_uniform_law_is_minus_the_fisher_matrix() -> None:
    p = torch.full((4,), 0.25, dtype=torch.float64)
    fisher = torch.diag(p) - p[:, None] * p

    def entropy(x: Tensor) -> Tensor:
        return divergence.entropy(x[None, None], torch.tensor([[True]])).sum()

    close(jacrev(grad(entropy))(torch.zeros(4, dtype=torch.float64)), -fisher)


def test_the_curvature_of_the_variance_is_the_centring_matrix() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    curvature = jacrev(grad(lambda x: masked.token_variance(x[None], mask)))(t(0.4, -1.0, 2.0, 0.3))
    close(curvature, (torch.eye(4).double() - 0.25) * 2 / 3)


# Hyperparameters as tensors, many at once.


def test_a_hyperparameter_that_is_a_tensor_is_not_looked_at() -> None:
    kl, score, mask = torch.tensor([[0.2, -0.5]]), torch.tensor([1.0]), torch.tensor([[True, True]])
    betas = torch.tensor([0.0, 0.5])
    rewards = vmap(lambda beta: divergence.kl_shaped_reward(score, kl, mask, beta=beta))(betas)
    torch.testing.assert_close(rewards[1], torch.tensor([[-0.1, 1.25]]))
    chosen, rejected = torch.tensor([1.0]), torch.tensor([0.0])
    losses = vmap(lambda e: ranking.bradley_terry_loss(chosen, rejected, label_smoothing=e))(
        torch.tensor([0.0, 0.1])
    )
    torch.testing.assert_close(losses[1] - losses[0], torch.tensor([0.1]))
    widths = vmap(lambda c: value.clipped_value_loss(kl, kl - 1, kl + 1, mask, clip=c))(
        torch.tensor([0.5, 2.0])
    )
    torch.testing.assert_close(widths, torch.tensor([[[1.125, 1.125]], [[0.5, 0.5]]]))


def test_the_controller_takes_tensors_for_its_horizon_and_its_steps() -> None:
    state, kl = divergence.KLController(torch.tensor(0.2)), torch.tensor(9.0)

    def after(horizon: Any, n_steps: Any) -> Tensor:
        return divergence.adapt_kl(state, kl, target=6.0, horizon=horizon, n_steps=n_steps).coefficient

    horizons, steps = torch.tensor([100.0, 200.0]), torch.tensor([10.0, 20.0])
    torch.testing.assert_close(vmap(lambda h: after(h, 10))(horizons), torch.tensor([0.204, 0.202]))
    torch.testing.assert_close(vmap(lambda n: after(100, n))(steps), torch.tensor([0.204, 0.208]))
    torch.testing.assert_close(vmap(after)(horizons, steps), torch.tensor([0.204, 0.204]))


# Boundaries and golden numbers.


def test_a_ratio_exactly_on_a_bound_is_not_yet_clipped() -> None:
    for log_rho, sign in ((0.5, 1.0), (-0.5, -1.0)):
        logp, mask = t(log_rho)[None], torch.tensor([[True]])
        rho = logp.exp().item()
        width = abs(rho - 1)
        assert 1 + math.copysign(width, log_rho) == rho, "the bound is the ratio, to the last bit"
        arguments = (logp, torch.zeros_like(logp), t(sign)[None], mask)
        widths = {"clip_low": width, "clip_high": width}
        assert not bool(policy.clip_indicator(*arguments, **widths))
        slope = grad(
            lambda x, rest=arguments[1:], w=widths: policy.clipped_surrogate_loss(x, *rest, **w).sum()
        )(logp)
        close(slope, -sign * logp.exp())


def test_a_ratio_exactly_on_the_dual_clip_is_not_yet_clipped() -> None:
    logp, zeros, mask = t(1.5)[None], t(0.0)[None], torch.tensor([[True]])

    def loss(x: Tensor) -> Tensor:
        widths: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": logp.exp().item()}
        return policy.clipped_surrogate_loss(x, zeros, t(-1.0)[None], mask, **widths).sum()

    close(grad(loss)(logp), logp.exp())


def test_a_dual_clip_just_above_one_is_taken() -> None:
    mask = torch.tensor([[True]])
    loss = policy.clipped_surrogate_loss(
        t(1.0)[None], t(0.0)[None], t(-1.0)[None], mask, clip_low=0.2, clip_high=0.2, dual_clip=1.25
    )
    close(loss, t(1.25)[None])


def test_the_smallest_normal_number_of_fp32_is_a_temperature() -> None:
    law = sampling.tempered(torch.tensor([0.0, 1.0]), temperature=torch.finfo(torch.float32).tiny)
    assert law.exp().tolist() == [0.0, 1.0]


def test_the_whole_mass_keeps_tokens_too_rare_for_the_cumulative_sum() -> None:
    logits = t(0.0, -60.0, -80.0)
    close(sampling.top_p(logits, p=1.0), torch.log_softmax(logits, -1))


def test_the_mass_of_a_nucleus_is_summed_in_fp64() -> None:
    # Behind one token of about one half come tokens of 2⁻²⁶, less than fp32 can tell apart there.
    logits = torch.cat([torch.tensor([0.5]), torch.full((4000,), 2.0**-26)]).log()
    ordered = torch.log_softmax(logits, -1).exp().double()
    before = ordered.cumsum(0) - ordered
    for place in (7, 100, 1001, 2002):
        mass = float((before[place] + before[place + 1]) / 2)
        assert int((sampling.top_p(logits, p=mass) > -math.inf).sum()) == place + 1


def test_epsilon_is_what_it_says_where_the_variance_is_small() -> None:
    x, mask = t(-1e-4, 0.0, 1e-4)[None], torch.ones(1, 3, dtype=torch.bool)  # variance 1e-8 as well
    scale = 1 / math.sqrt(2e-8)
    close(advantages.whiten(x, mask), x * scale)
    close(advantages.whiten_scale_only(x, mask), x * scale)


def test_equal_rewards_of_a_row_with_unscored_samples_have_no_advantage_to_the_last_bit() -> None:
    mask = torch.tensor([[True, True, True, False, False, True, True]])
    for reward in (0.1, 0.7, 1 / 3, -12.3, 1e-9):
        rewards = torch.where(mask, torch.tensor(reward), torch.nan)
        assert not bool(group_advantages.group_centred_advantage(rewards, mask).any())
        assert not bool(group_advantages.group_normalised_advantage(rewards, mask, epsilon=0.0).any())


def test_widening_keeps_fp32_and_fp64_and_changes_all_else() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert inputs.widen(torch.ones(2, dtype=dtype)).dtype == torch.float32
    assert inputs.widen(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


# Responses that the policy excludes, or all but excludes.


def test_the_law_of_the_best_has_its_gradient_where_responses_are_excluded_or_all_but() -> None:
    score = torch.tensor([[0.0, 1.0, 2.0, 2.0], [3.0, 0.0, 1.0, 1.0]]).double()
    logp = torch.tensor([[0.1, -math.inf, 0.3, -0.2], [-50.0, 0.4, -0.3, -math.inf]]).double()

    def finite(x: Tensor) -> Tensor:
        law = best_of_n.best_of_n_law(torch.where(logp > -math.inf, x, -math.inf), score, n=3)
        return law[logp > -math.inf]

    base = torch.where(logp > -math.inf, logp, 0.0)
    assert gradcheck(finite, (base.clone().requires_grad_(),))
    slopes = grad(lambda x: torch.where(logp > -math.inf, best_of_n.best_of_n_law(x, score, n=3), 0.0).sum())(
        logp
    )
    assert bool(slopes.isfinite().all())
    law = best_of_n.best_of_n_law(logp, score, n=3)
    for row in range(2):
        close(law[row], best_of_n.best_of_n_law(logp[row], score[row], n=3))
    assert torch.equal(law == -math.inf, logp == -math.inf)


def test_the_pair_losses_are_differentiable_in_every_log_prob_at_every_order_of_arguments() -> None:
    logps = tuple(t(x).requires_grad_() for x in (-1.0, -2.5, -0.5, -3.0))
    assert gradcheck(lambda a, b, c, d: preference.ipo_loss(a, b, c, d, t(3.0), t(2.0), tau=0.3), logps)
    assert gradcheck(
        lambda a, b: reference_free.simpo_loss(a, b, t(3.0), t(2.0), beta=0.5, gamma=0.1), logps[:2]
    )
