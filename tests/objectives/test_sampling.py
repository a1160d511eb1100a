"""The laws of the sampler against exact definitions: support, order of filters, ties, limits, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from minirlhf.objectives.sampling import greedy_law, min_p, sampling_law, tempered, top_k, top_p
from tests.objectives import oracles
from tests.objectives.strategies import numbers

logit_rows = st.integers(1, 8).flatmap(lambda v: numbers(v, v))  # square: a wrong axis shows
temperatures = st.sampled_from([0.3, 0.7, 1.0, 1.7])
# Not on a boundary that a sum of eight probabilities can hit exactly, except 1.
masses = st.sampled_from([0.1234567, 0.5234567, 0.8765432, 0.9876543, 1.0])
leasts = st.sampled_from([0.0, 0.0512345, 0.3123456, 1.0])


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def is_law(logp: Tensor) -> bool:
    return torch.allclose(logp.logsumexp(dim=-1), torch.zeros(logp.shape[:-1], dtype=logp.dtype), atol=1e-6)


@given(
    logit_rows,
    temperatures,
    st.none() | st.integers(1, 9),
    st.none() | masses,
    st.none() | leasts,
)
def test_the_sampling_law_equals_the_scalar_oracle(
    logits: Tensor, temperature: float, k: int | None, mass: float | None, least: float | None
) -> None:
    got = sampling_law(logits, temperature=temperature, top_k=k, top_p=mass, min_p=least)
    expected = t(*sum((oracles.law(row, temperature, k, mass, least) for row in logits.tolist()), []))
    expected = expected.reshape(logits.shape)
    assert torch.equal(got == -math.inf, expected == 0), "off the support the log-prob is exactly -inf"
    torch.testing.assert_close(got.exp(), expected, rtol=1e-9, atol=1e-12)
    assert is_law(got)


@given(logit_rows)
def test_the_default_law_is_the_model_and_its_limits_filter_nothing(logits: Tensor) -> None:
    plain = torch.log_softmax(logits, dim=-1)
    size = logits.shape[-1]
    for law in (
        sampling_law(logits),
        sampling_law(logits, temperature=1.0, top_k=size, top_p=1.0, min_p=0.0),
        tempered(logits, temperature=1.0),
        top_k(logits, k=size + 5),
        top_p(logits, p=1.0),
        min_p(logits, p=0.0),
    ):
        torch.testing.assert_close(law, plain, rtol=1e-12, atol=1e-12)


@given(logit_rows, masses)
def test_the_nucleus_is_the_smallest_set_that_reaches_the_mass(logits: Tensor, mass: float) -> None:
    probabilities = logits.softmax(dim=-1)
    kept = top_p(logits, p=mass) > -math.inf
    held = (probabilities * kept).sum(dim=-1)
    least_probable = torch.where(kept, probabilities, math.inf).amin(dim=-1)
    assert bool((held >= mass - 1e-12).all())
    if mass < 1:
        assert bool((held - least_probable < mass + 1e-12).all()), "without its last token it falls short"
    assert bool(kept.any(dim=-1).all())


def test_the_nucleus_includes_the_token_that_crosses() -> None:
    logp = t(0.5, 0.3, 0.2).log()
    assert (top_p(logp, p=0.6) > -math.inf).tolist() == [True, True, False]
    assert (top_p(logp, p=0.01) > -math.inf).tolist() == [True, False, False]
    assert (top_p(logp, p=0.81) > -math.inf).tolist() == [True, True, True]
    torch.testing.assert_close(top_p(logp, p=0.6).exp(), t(0.625, 0.375, 0.0))


def test_a_nucleus_that_holds_exactly_the_mass_takes_no_further_token() -> None:
    assert (top_p(t(0, 0), p=0.5) > -math.inf).tolist() == [True, False]
    assert (top_p(t(0, 0), p=0.5000001) > -math.inf).tolist() == [True, True]


def test_min_p_is_relative_to_the_most_probable_token() -> None:
    logp = t(0.4, 0.25, 0.19, 0.1, 0.06).log()
    assert (min_p(logp, p=0.5) > -math.inf).tolist() == [True, True, False, False, False]
    assert (min_p(t(0.1, 0.1, 0.05).log(), p=0.9) > -math.inf).tolist() == [True, True, False]
    assert (min_p(torch.zeros(3), p=1.0).exp()).tolist() == pytest.approx([1 / 3] * 3)


def test_ties_are_broken_by_the_lower_token_id() -> None:
    flat = torch.zeros(2, 5)
    assert (top_k(flat, k=2) > -math.inf).tolist() == [[True, True, False, False, False]] * 2
    assert (top_p(flat, p=0.5) > -math.inf).tolist() == [[True, True, True, False, False]] * 2
    mixed = torch.tensor([1.0, 2.0, 1.0, 1.0])
    assert (top_k(mixed, k=2) > -math.inf).tolist() == [True, True, False, False]
    assert greedy_law(torch.tensor([1.0, 3.0, 3.0])).tolist() == [-math.inf, 0.0, -math.inf]


def test_the_filters_are_applied_in_the_stated_order() -> None:
    logits = t(0.5, 0.3, 0.1, 0.06, 0.04).log()
    # Top-p after temperature: the sharper law needs fewer tokens.
    assert (sampling_law(logits, temperature=0.5, top_p=0.75) > -math.inf).sum().item() == 2
    assert (sampling_law(logits, temperature=2.0, top_p=0.75) > -math.inf).sum().item() == 3
    # Top-p after top-k: two tokens hold 0.889 of the three, but 0.8 of all five.
    assert (sampling_law(logits, top_k=3, top_p=0.85) > -math.inf).sum().item() == 2
    assert (top_k(top_p(logits, p=0.85), k=3) > -math.inf).sum().item() == 3
    # Temperature before min-p: heat lifts the tail over the bar.
    assert (sampling_law(logits, temperature=2.0, min_p=0.5) > -math.inf).sum().item() == 2
    assert (sampling_law(logits, temperature=4.0, min_p=0.5) > -math.inf).sum().item() == 5


@given(logit_rows, temperatures, st.integers(-3, 3))
def test_a_law_does_not_see_a_constant_added_to_the_logits(
    logits: Tensor, temperature: float, shift: int
) -> None:
    keywords = {"temperature": temperature, "top_k": 3, "top_p": 0.8765432, "min_p": 0.0512345}
    law = sampling_law(logits, **keywords)
    torch.testing.assert_close(sampling_law(logits + shift, **keywords), law, rtol=1e-9, atol=1e-12)


@given(logit_rows)
def test_permuting_the_vocabulary_permutes_the_law_where_nothing_ties(logits: Tensor) -> None:
    size = logits.shape[-1]
    distinct = logits + torch.arange(size, dtype=torch.float64) / 1000
    order = torch.arange(size - 1, -1, -1)
    for law in (lambda x: top_k(x, k=3), lambda x: top_p(x, p=0.7654321), greedy_law):
        torch.testing.assert_close(law(distinct[:, order]), law(distinct)[:, order])


@given(logit_rows, st.integers(1, 9), masses, leasts)
def test_each_filter_keeps_its_own_law_and_top_k_keeps_exactly_k(
    logits: Tensor, k: int, mass: float, least: float
) -> None:
    assert bool(((top_k(logits, k=k) > -math.inf).sum(dim=-1) == min(k, logits.shape[-1])).all())
    for law in (lambda x: top_k(x, k=k), lambda x: min_p(x, p=least)):
        torch.testing.assert_close(law(law(logits)), law(logits), rtol=1e-9, atol=1e-12)
    nested = top_p(logits, p=mass) > -math.inf
    assert bool((nested <= (top_p(logits, p=1.0) > -math.inf)).all())


def test_a_small_temperature_tends_to_the_greedy_law_without_nan() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.1, 0.3, 0.2], [5.0, -math.inf, 4.0]])
    for temperature in (1e-3, 1e-30, 1.2e-38):
        law = tempered(logits, temperature=temperature)
        torch.testing.assert_close(law.exp(), greedy_law(logits).exp())
    assert bool(tempered(logits, temperature=1e30).exp()[:2].sub(1 / 3).abs().max() < 1e-6)


def test_tokens_that_the_model_excludes_stay_excluded() -> None:
    logits = torch.tensor([0.3, -math.inf, 0.2, -math.inf])
    for law in (
        sampling_law(logits, temperature=0.7, top_k=3, top_p=0.99, min_p=0.01),
        top_k(logits, k=3),
        top_p(logits, p=1.0),
        greedy_law(logits),
    ):
        assert law[1].item() == law[3].item() == -math.inf and is_law(law)


def test_the_nucleus_of_a_large_vocabulary_is_exact_to_the_token() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50_257, generator=generator)
    ordered = torch.log_softmax(logits, -1).sort(descending=True).values.double().exp()
    for mass in (0.5, 0.9, 0.999):
        exact = int((ordered.cumsum(0) < mass).sum()) + 1
        assert (top_p(logits, p=mass) > -math.inf).sum().item() == exact


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_gradient_of_a_law_is_that_of_its_softmax(temperature: float) -> None:
    logits = t(0.3, -0.2, 1.0, 0.1)

    def chosen(z: Tensor) -> Tensor:
        return sampling_law(z, temperature=temperature, top_k=3)[2]

    slope = grad(chosen)(logits)
    law = sampling_law(logits, temperature=temperature, top_k=3).exp()
    expected = (torch.nn.functional.one_hot(torch.tensor(2), 4) - law) / temperature
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-12)
    assert abs(slope[1].item()) < 1e-15, "an excluded token gets no gradient"
    assert not bool(grad(lambda z: greedy_law(z)[2])(logits).any())


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_laws_work_under_vmap_compile_and_in_half_precision(options: dict[str, float]) -> None:
    torch._dynamo.reset()
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))

    def law(z: Tensor) -> Tensor:
        return sampling_law(z, temperature=0.8, **options)  # pyright: ignore[reportArgumentType]

    torch.testing.assert_close(vmap(law)(logits), law(logits))
    torch.testing.assert_close(torch.compile(law, fullgraph=True, backend="aot_eager")(logits), law(logits))
    assert law(logits.double()).dtype == torch.float64
    assert torch.equal(law(logits.bfloat16()), law(logits.bfloat16().float()))
    torch.testing.assert_close(vmap(greedy_law)(logits), greedy_law(logits))
    assert greedy_law(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e-40, True])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"temperature must be positive and finite \(0 is greedy_law\), got"):
        sampling_law(torch.zeros(3), temperature=bad)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_a_count_that_is_not_a_positive_integer_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=f"k must be an integer of at least 1, got {bad}"):
        sampling_law(torch.zeros(3), top_k=bad)


def test_a_mass_outside_its_interval_is_refused() -> None:
    for bad in (0.0, -0.1, 1.1, math.nan, True):
        with pytest.raises(ValueError, match=rf"p must lie in \(0, 1\], got {bad}"):
            top_p(torch.zeros(3), p=bad)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=rf"p must lie in \[0, 1\], got {bad}"):
            min_p(torch.zeros(3), p=bad)


def test_logits_that_are_no_rows_of_numbers_are_refused() -> None:
    for law in (greedy_law, sampling_law, lambda x: top_k(x, k=1), lambda x: top_p(x, p=1.0)):
        with pytest.raises(ValueError, match=r"logits must have a vocabulary axis, got shape \[\]"):
            law(torch.tensor(1.0))
        with pytest.raises(ValueError, match="logits must be a floating-point tensor, got torch.int64"):
            law(torch.tensor([1, 2]))
