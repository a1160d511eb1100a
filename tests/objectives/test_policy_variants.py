"""GSPO and CISPO: what their clips do to the gradient, how they meet PPO, extreme ratios, errors."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from minirlhf.objectives.masked import token_mean
from minirlhf.objectives.policy import clip_indicator, clipped_surrogate_loss, ratio
from minirlhf.objectives.policy_variants import cispo_loss, gspo_loss
from tests.objectives import oracles
from tests.objectives.assertions import close
from tests.objectives.strategies import Batch, batches, numbers

Loss = Callable[..., Tensor]
LOW, HIGH = 0.2, 0.3
WIDTHS = {"clip_low": LOW, "clip_high": HIGH}


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# GSPO


@pytest.mark.parametrize(
    ("rho", "advantage", "objective", "slope"),
    [(1.5, 1, 1.2, 0.0), (1.5, -1, -1.5, -1.5), (0.5, 1, 0.5, 0.5), (0.5, -1, -0.8, 0.0), (1.1, 2, 2.2, 2.2)],
)
def test_gspo_has_the_truth_table_of_ppo_on_the_ratio_of_the_sequence(
    rho: float, advantage: float, objective: float, slope: float
) -> None:
    # Four tokens whose log ratios average to log rho, one of them far out.
    logp = math.log(rho) + t(2.0, -1.0, -1.0, 0.0)[None]
    mask = torch.ones(1, 4, dtype=torch.bool)

    def loss(x: Tensor) -> Tensor:
        return gspo_loss(x, torch.zeros_like(x), t(advantage), mask, clip_low=0.2, clip_high=0.2).sum()

    assert -loss(logp).item() == pytest.approx(objective)
    assert (-grad(loss)(logp)[0]).tolist() == pytest.approx([slope / 4] * 4)


@given(batches(tensors=2), st.data())
def test_gspo_equals_the_scalar_oracle(batch: Batch, data: st.DataObject) -> None:
    (logp, old_logp), mask = batch.tensors, batch.mask
    advantage = data.draw(numbers(mask.shape[0]))
    got = gspo_loss(logp, old_logp, advantage, mask, **WIDTHS)
    rows = zip(logp.tolist(), old_logp.tolist(), mask.tolist(), advantage.tolist(), strict=True)
    close(got, t(*(oracles.gspo(*row, LOW, HIGH) for row in rows)))


@given(batches(tensors=2), st.data())
def test_gspo_gradient_is_the_same_on_every_token_and_dies_for_the_sequence_as_a_whole(
    batch: Batch, data: st.DataObject
) -> None:
    (logp, old_logp), mask = batch.tensors, batch.mask
    advantage = data.draw(numbers(mask.shape[0]))

    def loss(x: Tensor, old: Tensor) -> Tensor:
        return gspo_loss(x, old, advantage, mask, **WIDTHS).sum()

    count = mask.sum(dim=-1).clamp(min=1)
    s = (torch.where(mask, logp - old_logp, 0.0).sum(dim=-1) / count).exp()
    dead = ((advantage > 0) & (s > 1 + HIGH)) | ((advantage < 0) & (s < 1 - LOW))
    expected = torch.where(mask, torch.where(dead, 0.0, -s * advantage / count)[:, None], 0.0)
    by_logp, by_old = grad(loss, argnums=(0, 1))(logp, old_logp)
    close(by_logp, expected)
    close(by_old, -expected)


@given(batches(tensors=2), st.data())
def test_gspo_on_sequences_of_one_token_is_ppo(batch: Batch, data: st.DataObject) -> None:
    (logp, old_logp), mask = batch.tensors, batch.mask
    advantage = data.draw(numbers(mask.shape[0]))
    first, old_first, counts = logp[:, :1], old_logp[:, :1], mask[:, :1]
    token = clipped_surrogate_loss(first, old_first, advantage[:, None], counts, **WIDTHS)
    close(gspo_loss(first, old_first, advantage, counts, **WIDTHS), token[:, 0])


def test_gspo_gives_a_sequence_one_weight_however_long_it_is() -> None:
    logp, old, advantage = t(0.1, -0.05)[None], torch.zeros(1, 2, dtype=torch.float64), t(1.5)
    short = torch.ones(1, 2, dtype=torch.bool)
    once = gspo_loss(logp, old, advantage, short, **WIDTHS)
    tripled = gspo_loss(logp.repeat(1, 3), old.repeat(1, 3), advantage, short.repeat(1, 3), **WIDTHS)
    close(tripled, once)
    # Spread over its tokens and averaged there, the long sequence would weigh three times as much.
    mask = torch.tensor([[True, False, False], [True, True, True]])
    spread = token_mean(t(-1.0, 1.0)[:, None].expand(2, 3), mask)
    assert spread.item() == 0.5


def test_gspo_at_the_sampling_policy_is_the_mean_gradient_of_log_probs() -> None:
    logp = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask, advantage = torch.ones(3, 4, dtype=torch.bool), t(1.0, -2.0, 0.5)
    close(gspo_loss(logp, logp, advantage, mask, **WIDTHS), -advantage)
    slope = grad(lambda x: gspo_loss(x, logp, advantage, mask, **WIDTHS).sum())(logp)
    close(slope, (-advantage / 4)[:, None].expand(3, 4))


@given(batches(tensors=2), st.data())
def test_gspo_is_pessimistic_homogeneous_and_infinity_never_clips(batch: Batch, data: st.DataObject) -> None:
    (logp, old_logp), mask = batch.tensors, batch.mask
    advantage = data.draw(numbers(mask.shape[0]))
    clipped = gspo_loss(logp, old_logp, advantage, mask, **WIDTHS)
    plain = gspo_loss(logp, old_logp, advantage, mask, clip_low=math.inf, clip_high=math.inf)
    assert bool((clipped >= plain - 1e-12).all())
    count = mask.sum(dim=-1).clamp(min=1)
    s = (torch.where(mask, logp - old_logp, 0.0).sum(dim=-1) / count).exp()
    close(plain, torch.where(mask.any(dim=-1), -s * advantage, 0.0))
    close(gspo_loss(logp, old_logp, 3 * advantage, mask, **WIDTHS), 3 * clipped)
    assert not bool(gspo_loss(logp, old_logp, 0 * advantage, mask, **WIDTHS).any())


def test_the_widths_of_gspo_are_not_interchangeable() -> None:
    logp, mask = t(1.25, 0.75).log()[:, None], torch.ones(2, 1, dtype=torch.bool)
    old, advantage = torch.zeros_like(logp), t(1.0, -1.0)
    close(gspo_loss(logp, old, advantage, mask, clip_low=0.2, clip_high=0.3), t(-1.25, 0.8))
    close(gspo_loss(logp, old, advantage, mask, clip_low=0.3, clip_high=0.2), t(-1.2, 0.75))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("far", [200.0, 1e4])
def test_gspo_makes_no_nan_of_a_ratio_that_is_clipped_or_not_looked_at(
    dtype: torch.dtype, far: float
) -> None:
    log_ratio = torch.tensor([far, -far, -far, far, far], dtype=dtype)[:, None].expand(5, 3)
    advantage = torch.tensor([1.0, 1.0, -1.0, 0.0, torch.nan], dtype=dtype)
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[4] = False

    def losses(x: Tensor) -> Tensor:
        return gspo_loss(x, torch.zeros_like(x), advantage, mask, **WIDTHS)

    expected = torch.tensor([-1 - HIGH, 0, 1 - LOW, 0, 0], dtype=dtype)
    torch.testing.assert_close(losses(log_ratio), expected)
    slope = grad(lambda x: losses(x).sum())(log_ratio)
    assert bool(slope.isfinite().all()) and slope.abs().max().item() < 1e-80
    # Far up with a negative advantage nothing clips: the loss is as large as the ratio, and says so.
    runaway = gspo_loss(
        torch.full((1, 1), 200.0, dtype=torch.float64),
        torch.zeros(1, 1).double(),
        t(-1.0),
        mask[:1, :1],
        **WIDTHS,
    )
    assert runaway.item() == pytest.approx(math.exp(200))


def test_nan_where_it_counts_is_not_swallowed_by_either() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    for position in range(3):
        logp, old = torch.zeros(1, 2), torch.zeros(1, 2)
        advantage = torch.ones(1)
        (logp[0], old[0], advantage)[position][0] = torch.nan
        assert gspo_loss(logp, old, advantage, mask, **WIDTHS).isnan().tolist() == [True]
        per_token = torch.where(torch.tensor([True, False]), advantage[:, None], 1.0)
        got = cispo_loss(logp, old, per_token, mask, **WIDTHS)
        assert got.isnan().tolist() == [[True, False]]


# CISPO


@given(batches(tensors=3))
def test_cispo_equals_the_scalar_oracle(batch: Batch) -> None:
    (logp, old_logp, advantage), mask = batch.tensors, batch.mask
    got = cispo_loss(logp, old_logp, advantage, mask, **WIDTHS)[mask]
    rows = zip(logp[mask].tolist(), old_logp[mask].tolist(), advantage[mask].tolist(), strict=True)
    close(got, t(*(oracles.cispo(a, b, c, LOW, HIGH) for a, b, c in rows)))


@given(batches(tensors=3))
def test_cispo_gradient_is_the_clipped_weight_times_the_advantage_and_never_dies(batch: Batch) -> None:
    (logp, old_logp, advantage), mask = batch.tensors, batch.mask

    def loss(x: Tensor, old: Tensor) -> Tensor:
        return cispo_loss(x, old, advantage, mask, **WIDTHS).sum()

    by_logp, by_old = grad(loss, argnums=(0, 1))(logp, old_logp)
    weight = (logp - old_logp).exp().clamp(1 - LOW, 1 + HIGH)
    close(by_logp, torch.where(mask, -weight * advantage, 0.0))
    assert not bool(by_old.any())
    assert torch.equal(by_logp != 0, mask & (advantage != 0))


def test_cispo_gives_a_gradient_where_ppo_gives_none() -> None:
    rho, advantage = t(1.5, 0.5, 1.1, 0.9), t(1.0, -1.0, 1.0, -1.0)
    mask, old = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.float64)

    def slope(loss: Loss) -> Tensor:
        return grad(lambda x: loss(x, old, advantage, mask, **WIDTHS).sum())(rho.log())

    clipped = clip_indicator(rho.log(), old, advantage, mask, **WIDTHS)
    assert clipped.tolist() == [True, True, False, False]
    assert (slope(clipped_surrogate_loss) == 0).tolist() == clipped.tolist()
    close(slope(cispo_loss), -t(1.3, 0.8, 1.1, 0.9) * advantage)


@given(batches(tensors=3))
def test_cispo_without_clipping_has_the_gradient_of_the_importance_weighted_surrogate(batch: Batch) -> None:
    (logp, old_logp, advantage), mask = batch.tensors, batch.mask

    def cispo(x: Tensor) -> Tensor:
        return cispo_loss(x, old_logp, advantage, mask, clip_low=math.inf, clip_high=math.inf).sum()

    def weighted(x: Tensor) -> Tensor:
        return -(ratio(x, old_logp, mask) * torch.where(mask, advantage, 0.0)).sum()

    close(grad(cispo)(logp), grad(weighted)(logp))
    on_policy = grad(lambda x: cispo_loss(x, logp, advantage, mask, **WIDTHS).sum())(logp)
    close(on_policy, torch.where(mask, -advantage, 0.0))


def test_the_widths_of_cispo_clip_from_their_own_side_whatever_the_sign_of_the_advantage() -> None:
    rho = t(2.0, 2.0, 0.1, 0.1)
    advantage, mask = t(1.0, -1.0, 1.0, -1.0), torch.ones(4, dtype=torch.bool)

    def weights(**widths: float) -> list[float]:
        def loss(x: Tensor) -> Tensor:
            return cispo_loss(x, torch.zeros_like(x), advantage, mask, **widths).sum()

        return (-grad(loss)(rho.log()) / advantage).tolist()

    assert weights(clip_low=0.2, clip_high=0.3) == pytest.approx([1.3, 1.3, 0.8, 0.8])
    assert weights(clip_low=0.3, clip_high=0.2) == pytest.approx([1.2, 1.2, 0.7, 0.7])
    assert weights(clip_low=1.0, clip_high=0.2) == pytest.approx([1.2, 1.2, 0.1, 0.1])
    assert weights(clip_low=5.0, clip_high=9.0) == pytest.approx([2.0, 2.0, 0.1, 0.1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("far", [200.0, 1e4])
def test_cispo_does_not_overflow_at_extreme_ratios(dtype: torch.dtype, far: float) -> None:
    logp = torch.tensor([-far, -1.0, -far, -1.0], dtype=dtype)
    old_logp = torch.tensor([-1.0, -far, -1.0, -far], dtype=dtype)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=dtype)
    mask = torch.ones(4, dtype=torch.bool)

    def losses(x: Tensor) -> Tensor:
        return cispo_loss(x, old_logp, advantage, mask, **WIDTHS)

    weight = torch.tensor([1 - LOW, 1 + HIGH, 1 - LOW, 1 + HIGH], dtype=dtype)
    torch.testing.assert_close(losses(logp), -weight * advantage * logp)
    torch.testing.assert_close(grad(lambda x: losses(x).sum())(logp), -weight * advantage)


# both


def at_width(
    loss: Loss, logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, name: str, width: float | Tensor
) -> Tensor:
    return loss(logp, old, advantage, mask, **{**WIDTHS, name: width})


def test_many_widths_at_once_by_vmap_equal_numbers() -> None:
    logp = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old, mask = torch.zeros_like(logp), torch.ones(4, 3, dtype=torch.bool)
    grid = t(0.05, 0.2, 0.6)
    for loss, advantage in ((gspo_loss, t(1, -1, 2, -2)), (cispo_loss, logp.flip(0))):
        for name in ("clip_low", "clip_high"):
            call = partial(at_width, loss, logp, old, advantage, mask, name)
            looped = torch.stack([call(w) for w in grid.tolist()])
            close(vmap(call)(grid), looped)
            assert not torch.equal(looped[0], looped[-1])


@pytest.mark.parametrize("bad", [0.0, -0.2, math.nan])
@pytest.mark.parametrize("name", ["clip_low", "clip_high"])
def test_a_width_that_is_not_positive_is_refused_by_both(name: str, bad: float) -> None:
    logp, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    for loss, advantage in ((gspo_loss, torch.ones(1)), (cispo_loss, torch.ones(1, 2))):
        with pytest.raises(ValueError, match=f"{name} must be positive, got {bad}"):
            loss(logp, logp, advantage, mask, **{**WIDTHS, name: bad})


def test_an_advantage_of_the_wrong_level_is_refused() -> None:
    logp, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"advantage must have shape \[2\] .* got \[2, 3\]"):
        gspo_loss(logp, logp, torch.ones(2, 3), mask, **WIDTHS)
    with pytest.raises(ValueError, match=r"expected equal shapes, got .* advantage \[2\]"):
        cispo_loss(logp, logp, torch.ones(2), mask, **WIDTHS)
