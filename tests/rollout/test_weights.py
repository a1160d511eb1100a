"""What a rollout multiplies by: packed weights are the weights, 8-bit ones are what their equation says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.kernels import cpu, library
from minirlhf.kernels.memory import Room
from minirlhf.models import gpt2
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.objectives.sampling import sampling_law
from minirlhf.rollout import weights
from minirlhf.rollout.sampler import Rollout, generate, response_mask
from minirlhf.rollout.weights import Int8, Packed, Reordered, as_they_are, fastest, int8
from tests.models.cases import CASES, Case, tiny_model
from tests.rollout.known_models import rows


def matrix(out: int, width: int, *, seed: int = 0) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def eight(weight: Tensor) -> Any:
    """Not a tensor, but torch's products take it for one."""
    return Int8(weight)


def packed(weight: Tensor) -> Any:
    return Packed(weight, room=Room("test", 0))


def reordered(weight: Tensor) -> Any:
    return Reordered(weight, rows=8)


def by_the_equation(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """fp64: round(x / s_x) and round(w / s_w) as numbers, then the product, then the scales."""
    sx, sw = x.abs().amax(1, keepdim=True) / 127, weight.abs().amax(1, keepdim=True) / 127
    sx = torch.where(sx > 0, sx, 1.0)
    product = (x / sx).round().double() @ (weight / sw).round().double().T
    return product * sx.double() * sw.double().T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("rows_", [1, 3, 8, 33])
@pytest.mark.parametrize("biased", [True, False])
def test_8_bit_products_are_those_of_the_equation_in_both_orientations(rows_: int, biased: bool) -> None:
    weight, x = matrix(70, 52), matrix(rows_, 52, seed=1) * 3
    x[0] = 0.0 if rows_ > 1 else x[0]
    bias = matrix(1, 70, seed=2)[0] if biased else None
    expected = by_the_equation(x, weight, bias)
    torch.testing.assert_close(F.linear(x, eight(weight), bias).double(), expected, rtol=0, atol=1e-4)
    if bias is not None:
        got = torch.addmm(bias, x, eight(weight.T.contiguous()))
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)


def test_a_row_is_quantised_by_itself() -> None:
    weight, x = eight(matrix(64, 40)), matrix(5, 40, seed=1)
    together = F.linear(x, weight)
    x[1:] *= 1000
    assert torch.equal(F.linear(x, weight)[0], together[0])


@pytest.mark.parametrize("packed", [packed, reordered])
def test_packed_products_are_the_plain_ones_but_for_rounding(packed: Callable[[Tensor], Any]) -> None:
    weight, x, bias = matrix(300, 200), matrix(9, 200, seed=1), matrix(1, 300, seed=2)[0]
    expected = F.linear(x.double(), weight.double(), bias.double())
    for product in (
        F.linear(x, packed(weight), bias),
        torch.addmm(bias, x, packed(weight.T.contiguous())),
        F.linear(x.view(3, 3, 200), packed(weight), bias).view(9, 300),
    ):
        torch.testing.assert_close(product.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [eight, packed, reordered])
def test_elsewhere_a_replaced_weight_is_the_weight(kind: Callable[[Tensor], Any]) -> None:
    weight = matrix(30, 20)
    replaced, ids = kind(weight), torch.tensor([[3, 29]])
    assert torch.equal(F.embedding(ids, replaced), weight[ids])
    assert replaced.shape == weight.shape and replaced.dtype == weight.dtype


def wide_model(case: Case | None = None) -> tuple[LanguageModel, Params]:
    """Small, and yet of products that are replaced, since the limit is lowered below."""
    if case is not None:
        return tiny_model(case)
    model = gpt2.bind(
        gpt2.GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=0)
    )
    return model, model.init(torch.Generator().manual_seed(0))


def draw(model: LanguageModel, params: Params, kind: weights.Weights, **changed: int) -> Rollout:
    prompts = [[1, 2, 3], [4], [5, 6], [1, 2, 3], [9, 8], [7]]
    index = torch.arange(len(prompts))
    settings: dict[str, Any] = {"max_new_tokens": 18, "slots": 6} | changed
    return generate(
        model, params, prompts, law=sampling_law, stop_ids=[], seed=3, prompt_index=index, sample_index=index,
        weights=kind, **settings,
    )  # fmt: skip


@pytest.fixture(params=["our kernels", "torch's operations"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """With and without a C++ compiler: what packs the weights then."""
    if request.param == "our kernels":
        assert cpu.available(), "no C++ compiler here"
        return Packed
    monkeypatch.setattr(library, "_library", lambda: None)
    return Reordered


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_every_family_samples_the_same_with_packed_weights_and_its_law_moves_little_with_8_bits(
    case: Case, products: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_SMALLEST", 1)
    used, multiply = [], products.multiply
    monkeypatch.setattr(products, "multiply", lambda *given: used.append(1) or multiply(*given))
    model, params = wide_model(case)
    plain, fast = draw(model, params, as_they_are), draw(model, params, fastest)
    assert len(used) >= 18 * (4 * model.cache.layers + 1), "products that were not packed"
    same = (plain.tokens == fast.tokens).all(1)
    assert (~same).sum() <= plain.boundary_draws <= 1
    torch.testing.assert_close(fast.logp[same], plain.logp[same], atol=1e-4, rtol=0)
    rounded = draw(model, params, int8)
    logits = torch.log_softmax(model.hidden(params, rounded.tokens) @ model.unembedding(params).T, -1)
    exact = logits[:, :-1].gather(-1, rounded.tokens[:, 1:, None])[..., 0]
    gap = (exact - rounded.logp[:, 1:])[response_mask(rounded)[:, 1:]].abs()
    assert 1e-6 < gap.max() < 1.0


def test_what_is_recorded_is_the_8_bit_law_and_not_the_parameters_law(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "_SMALLEST", 1)
    model, params = wide_model()
    rollout = draw(model, params, int8)
    replaced = int8(params, 6, 18)
    states = model.hidden(replaced, rollout.tokens)
    logp = torch.log_softmax(F.linear(states, replaced["wte"]["weight"]), -1)
    recorded = logp[:, :-1].gather(-1, rollout.tokens[:, 1:, None])[..., 0]
    mask = response_mask(rollout)[:, 1:]
    torch.testing.assert_close(rollout.sampled_logp[:, 1:][mask], recorded[mask], atol=1e-4, rtol=0)


def test_new_parameters_are_used_at_once_and_parameters_are_left_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "_SMALLEST", 1)
    model, params = wide_model()
    for kind in (fastest, int8):
        before = draw(model, params, kind)
        with torch.no_grad():  # in place, as an optimiser writes
            params["wte"]["weight"].mul_(3)
        after = draw(model, params, kind)
        fresh = draw(model, {**params, "wte": {"weight": params["wte"]["weight"].clone()}}, kind)
        assert rows(after) == rows(fresh) != rows(before)
        assert isinstance(params["wte"]["weight"], Tensor)


@pytest.mark.parametrize(
    ("changed", "why"),
    [({"slots": 1}, "one row"), ({"max_new_tokens": 8}, "too short to earn it back")],
)
def test_where_packing_does_not_pay_the_weights_stay(
    changed: dict[str, int], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError(why)

    monkeypatch.setattr(weights, "_SMALLEST", 1)
    monkeypatch.setattr(Packed, "prepare", never)
    model, params = wide_model()
    draw(model, params, fastest, **changed)
    with pytest.raises(AssertionError, match=why):
        draw(model, params, fastest)
