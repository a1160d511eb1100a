"""The update step: exact accumulation, AdamW, clipping, ownership, and the stop at a number that is none."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from minirlhf.training.update import (
    NonFiniteError,
    adamw,
    constant_with_warmup,
    cosine_with_warmup,
    gradient,
    init_state,
    update,
)


def tree(seed: int, *, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "w": {"weight": torch.randn(3, 4, generator=g, dtype=dtype)},
        "h": [
            {"bias": torch.randn(4, generator=g, dtype=dtype)},
            {"bias": torch.randn(2, generator=g, dtype=dtype)},
        ],
    }


def squares(params: dict[str, Any], batch: Tensor, normaliser: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of squares of an affine map of the rows; the last bias takes no part."""
    y = batch @ params["w"]["weight"] + params["h"][0]["bias"]
    return y.square().sum() / normaliser, {"rows": torch.tensor(float(len(batch)))}


def rows(seed: int, n: int) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(params: dict[str, Any]) -> list[Tensor]:
    return [params["w"]["weight"], params["h"][0]["bias"], params["h"][1]["bias"]]


step = partial(update, loss=squares, learning_rate=0.1, max_grad_norm=math.inf)


@pytest.mark.parametrize("sizes", [[7], [1, 6], [3, 3, 1], [1] * 7])
def test_gradient_does_not_depend_on_the_split_into_micro_batches(sizes: list[int]) -> None:
    params, batch, n = tree(0), rows(1, 7), torch.tensor(7.0)
    whole, loss, _ = gradient(params, [batch], n, loss=squares)
    split, split_loss, aux = gradient(params, list(batch.split(sizes)), n, loss=squares)
    for a, b in zip(leaves(whole), leaves(split), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(loss, split_loss, rtol=1e-12, atol=0)
    assert aux["rows"] == 7


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_equals_torch_optim_adamw_on_the_same_gradients(weight_decay: float) -> None:
    state = init_state(tree(0))
    theirs = [leaf.clone().requires_grad_() for leaf in leaves(tree(0))]
    optimiser = torch.optim.AdamW(theirs, lr=1.0, betas=(0.8, 0.95), eps=1e-3, weight_decay=weight_decay)
    for k in range(5):
        grads, rate = tree(10 + k), 0.1 / (k + 1)
        for p, g in zip(theirs, leaves(grads), strict=True):
            p.grad = g.clone()
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        state = adamw(state, grads, rate, betas=(0.8, 0.95), eps=1e-3, weight_decay=weight_decay)
    for ours, p in zip(leaves(state.params), theirs, strict=True):
        torch.testing.assert_close(ours, p.detach(), rtol=1e-12, atol=1e-14)
    assert state.step == 5


def test_adamw_without_a_fused_kernel_takes_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = adamw(adamw(init_state(tree(0)), tree(1), 0.1), tree(2), 0.1)
    monkeypatch.setattr("minirlhf.training.update.FUSED_DEVICES", frozenset())
    other = adamw(adamw(init_state(tree(0)), tree(1), 0.1), tree(2), 0.1)
    for a, b in zip(leaves(fused.params), leaves(other.params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def strided(x: Tensor, how: str) -> Tensor:
    """The same numbers in another memory layout, as a product, a sum or vmap leaves them."""
    if how == "transposed":
        return x.t().contiguous().t()
    return torch.stack([x, x], -1)[..., 0]


@pytest.mark.parametrize("how", ["transposed", "every other"])
def test_adamw_reads_a_gradient_of_any_memory_layout(how: str) -> None:
    # torch's fused kernel walks through memory: given such a gradient it would update other entries.
    plain, laid_out = init_state(tree(0)), init_state(tree(0))
    for k in range(3):
        grads = tree(10 + k)
        plain = adamw(plain, grads, 0.1)
        moved = {**grads, "w": {"weight": strided(grads["w"]["weight"], how)}}
        assert not moved["w"]["weight"].is_contiguous()
        laid_out = adamw(laid_out, moved, 0.1)
    assert torch.equal(plain.params["w"]["weight"], laid_out.params["w"]["weight"])
    assert torch.equal(plain.exp_avg_sq["w"]["weight"], laid_out.exp_avg_sq["w"]["weight"])


def test_adamw_reads_a_gradient_that_is_one_number_expanded() -> None:
    state, rate = init_state(tree(0)), 0.1
    once = torch.tensor(0.5, dtype=torch.float64)
    grads = {**tree(1), "w": {"weight": once.expand(3, 4)}}
    moved = adamw(state, grads, rate).params["w"]["weight"] - tree(0)["w"]["weight"]
    torch.testing.assert_close(moved, torch.full_like(moved, -rate), rtol=1e-6, atol=0)


@pytest.mark.parametrize("how", ["transposed", "every other"])
def test_a_state_made_from_parameters_of_any_memory_layout_takes_the_same_steps(how: str) -> None:
    params = tree(0)
    moved = {**params, "w": {"weight": strided(params["w"]["weight"], how)}}
    plain, laid_out = init_state(params), init_state(moved)
    for k in range(3):
        plain, laid_out = adamw(plain, tree(10 + k), 0.1), adamw(laid_out, tree(10 + k), 0.1)
    for field in ("params", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(plain, field)["w"]["weight"], getattr(laid_out, field)["w"]["weight"])


def test_weight_decay_is_zero_unless_set() -> None:
    zero = {"w": {"weight": torch.zeros(3, 4)}, "h": [{"bias": torch.zeros(4)}, {"bias": torch.zeros(2)}]}
    params = tree(0, dtype=torch.float32)
    kept = adamw(init_state(params), zero, 0.1)
    decayed = adamw(init_state(params), zero, 0.1, weight_decay=0.5)
    for p, a, b in zip(leaves(params), leaves(kept.params), leaves(decayed.params), strict=True):
        torch.testing.assert_close(a, p, rtol=0, atol=0)
        torch.testing.assert_close(b, p * 0.95, rtol=1e-6, atol=0)


def test_training_never_writes_to_the_callers_parameters_nor_gradients() -> None:
    params, grads = tree(0), tree(1)
    copies = [x.clone() for x in leaves(params) + leaves(grads)]
    state = adamw(init_state(params), grads, 0.1)
    for now, before in zip(leaves(params) + leaves(grads), copies, strict=True):
        assert torch.equal(now, before)
    for ours, theirs in zip(leaves(state.params), leaves(params), strict=True):
        assert ours.data_ptr() != theirs.data_ptr()
        assert not torch.equal(ours, theirs)


def test_init_state_copies_tensors_that_share_storage() -> None:
    base = torch.ones(2, dtype=torch.float64)
    state = init_state({"a": base, "b": base.view(2), "c": base.expand(3, 2)})
    pointers = {state.params[name].data_ptr() for name in "abc"}
    assert len(pointers) == 3 and base.data_ptr() not in pointers
    assert state.params["c"].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_is_clipped_to_the_global_norm_in_every_dtype(dtype: torch.dtype) -> None:
    seen = {}

    def spy(state: Any, grads: Any, learning_rate: float) -> Any:
        seen["norm"] = torch.cat([g.double().flatten() for g in leaves(grads)]).norm()
        seen["direction"] = grads["w"]["weight"].double()
        return state._replace(step=state.step + 1)

    params, batch = tree(0, dtype=dtype), rows(1, 4).to(dtype)
    update_ = partial(update, loss=squares, optimiser=spy, learning_rate=0.1)
    n = torch.tensor(4.0, dtype=dtype)
    _, metrics = update_(init_state(params), [batch], n, max_grad_norm=math.inf)
    free, direction = seen["norm"], seen["direction"]
    torch.testing.assert_close(metrics["grad_norm"].double(), free, rtol=1e-5, atol=0)
    _, metrics = update_(init_state(params), [batch], n, max_grad_norm=float(free) / 3)
    slack = 1.01 if dtype == torch.bfloat16 else 1 + 1e-6
    assert free / 3 / slack <= seen["norm"] <= free / 3 * slack
    torch.testing.assert_close(metrics["grad_norm"].double(), free, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        seen["direction"] * 3, direction, rtol=1e-2 if slack == 1.01 else 1e-5, atol=1e-6
    )
    update_(init_state(params), [batch], n, max_grad_norm=float(free) * 3)
    torch.testing.assert_close(seen["norm"], free, rtol=0, atol=0)


def test_a_step_lowers_the_loss_and_counts() -> None:
    state, n = init_state(tree(0)), torch.tensor(5.0)
    losses = []
    for _ in range(4):
        state, metrics = step(state, [rows(1, 5)], n, optimiser=adamw)
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    assert state.step == 4


def test_the_same_steps_give_the_same_bits() -> None:
    def run() -> list[Tensor]:
        state = init_state(tree(0, dtype=torch.float32))
        for k in range(3):
            state, _ = step(state, [rows(k, 5).float()], torch.tensor(5.0), optimiser=adamw)
        return leaves(state.params)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_loss_stops_before_the_state_is_touched(poison: float) -> None:
    state, _ = step(init_state(tree(0)), [rows(1, 5)], torch.tensor(5.0), optimiser=adamw)
    before = [x.clone() for x in leaves(state.params) + leaves(state.exp_avg) + leaves(state.exp_avg_sq)]
    bad = rows(1, 5)
    bad[2, 1] = poison
    with pytest.raises(NonFiniteError, match=r"step 2: not finite: loss = (nan|inf); gradient of ") as error:
        step(state, [rows(2, 5), bad], torch.tensor(10.0), optimiser=adamw)
    assert error.value.step == 2 and "w.weight" in str(error.value) and "h.1" not in str(error.value)
    after = leaves(state.params) + leaves(state.exp_avg) + leaves(state.exp_avg_sq)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_non_finite_gradient_under_a_finite_loss_is_named_by_its_path() -> None:
    def root(params: dict[str, Any], batch: Tensor, n: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (params["h"][1]["bias"] * 0.0).sqrt().sum() + params["w"]["weight"].sum(), {}

    params = tree(0)
    with pytest.raises(NonFiniteError, match=r"step 1: not finite: gradient of h\.1\.bias$"):
        update(
            init_state(params),
            [None],
            torch.tensor(1.0),
            loss=root,
            optimiser=adamw,
            learning_rate=1.0,
            max_grad_norm=1.0,
        )


def test_parameters_that_were_not_finite_before_the_step_are_named_as_the_cause() -> None:
    params = tree(0)
    params["h"][0]["bias"][2] = math.nan
    with pytest.raises(
        NonFiniteError, match=r"not finite: parameters before the step: h\.0\.bias; loss = nan"
    ):
        step(init_state(params), [rows(1, 5)], torch.tensor(5.0), optimiser=adamw)
    with pytest.raises(NonFiniteError, match="not finite: loss = nan; gradient"):
        step(init_state(tree(0)), [rows(1, 5) * math.nan], torch.tensor(5.0), optimiser=adamw)


@pytest.mark.parametrize("normaliser", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_normaliser_that_counts_nothing_is_refused_before_the_state_is_touched(
    normaliser: float, dtype: torch.dtype
) -> None:
    state, said = init_state(tree(0)), f"step 1: normaliser must be positive and finite, got {normaliser:g} "
    with pytest.raises(ValueError, match=said):
        step(state, [rows(1, 5)], torch.tensor(normaliser, dtype=dtype), optimiser=adamw)
    assert all(torch.equal(a, b) for a, b in zip(leaves(state.params), leaves(tree(0)), strict=True))


def test_a_normaliser_may_be_a_count_of_tokens() -> None:
    count = torch.ones(5, dtype=torch.bool).sum()
    by_count, _ = step(init_state(tree(0)), [rows(1, 5)], count, optimiser=adamw)
    by_number, _ = step(init_state(tree(0)), [rows(1, 5)], torch.tensor(5.0), optimiser=adamw)
    assert torch.equal(by_count.params["w"]["weight"], by_number.params["w"]["weight"])


def test_update_refuses_no_micro_batch_and_a_norm_that_is_no_bound() -> None:
    with pytest.raises(ValueError, match="expected at least one micro-batch, got none"):
        step(init_state(tree(0)), [], torch.tensor(1.0), optimiser=adamw)
    for bound in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="max_grad_norm must be positive"):
            update(
                init_state(tree(0)),
                [rows(0, 1)],
                torch.tensor(1.0),
                loss=squares,
                optimiser=adamw,
                learning_rate=1.0,
                max_grad_norm=bound,
            )


def test_cosine_schedule_starts_above_zero_peaks_after_warmup_and_ends_at_the_floor() -> None:
    rate = partial(cosine_with_warmup, total=10, warmup=4, peak=2.0, floor=0.5)
    rates = [rate(s) for s in range(11)]
    assert rates[0] == pytest.approx(2.0 / 5)
    assert rates[4] == 2.0 == max(rates)
    assert rates[7] == pytest.approx(1.25)
    assert rates[9] > 0.5 and rates[10] == 0.5 == rate(99)
    assert rates[:5] == sorted(rates[:5]) and rates[4:] == sorted(rates[4:], reverse=True)


def test_schedules_without_warmup_start_at_the_peak() -> None:
    assert cosine_with_warmup(0, total=5, warmup=0, peak=1.0) == 1.0
    assert constant_with_warmup(0, warmup=0, peak=1.0) == 1.0
    assert [constant_with_warmup(s, warmup=3, peak=4.0) for s in (0, 2, 3, 100)] == [1.0, 3.0, 4.0, 4.0]


def test_schedules_refuse_a_warmup_outside_the_run() -> None:
    with pytest.raises(ValueError, match="expected 0 <= warmup <= total, got warmup 6, total 5"):
        cosine_with_warmup(0, total=5, warmup=6, peak=1.0)
    with pytest.raises(ValueError, match="expected warmup >= 0"):
        constant_with_warmup(0, warmup=-1, peak=1.0)
