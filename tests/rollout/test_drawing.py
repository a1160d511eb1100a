"""Drawing from logits at a temperature, in one pass, is drawing from the law that is written down."""

from functools import partial

import pytest
import torch

from minirlhf.kernels import library
from minirlhf.objectives.sampling import greedy_law, sampling_law, tempered
from minirlhf.rollout.drawing import drawn, temperature_of
from tests.rollout.known_models import LAWS, ragged_prompts, rows, sample, tiny_gpt2


@pytest.mark.parametrize("kernels", ["our kernels", "torch's operations"])
@pytest.mark.parametrize("options", LAWS.values(), ids=LAWS)
def test_a_law_known_by_name_is_drawn_from_as_one_that_is_only_asked(
    options: dict, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "torch's operations":
        monkeypatch.setattr(library, "_library", lambda: None)
    named = partial(sampling_law, **options)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 613, generator=generator) * 5 + 50
    uniform = torch.rand(500, generator=generator, dtype=torch.float64)
    got, asked = drawn(logits, named, uniform), drawn(logits, lambda z: named(z), uniform)
    either = got.near_boundary | asked.near_boundary
    assert ((got.token == asked.token) | either).all() and either.sum() < 20
    same = got.token == asked.token
    for one, other in zip(got[2:], asked[2:], strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one[same], other[same], rtol=0, atol=1e-5)


def test_a_tempered_rollout_is_the_rollout_of_a_law_that_is_only_asked() -> None:
    model, params = tiny_gpt2()
    prompts, _ = ragged_prompts(40)
    by_kernel = sample(model, params, prompts, law=partial(tempered, temperature=0.7))
    by_law = sample(model, params, prompts, law=lambda z: tempered(z, temperature=0.7))
    different = sum(one != other for one, other in zip(rows(by_kernel), rows(by_law), strict=True))
    assert different <= int(by_kernel.boundary_draws)
    if not different:
        torch.testing.assert_close(by_kernel.logp, by_law.logp, rtol=0, atol=1e-5)
        torch.testing.assert_close(by_kernel.sampled_logp, by_law.sampled_logp, rtol=0, atol=1e-5)


def test_only_a_softmax_at_a_temperature_has_one() -> None:
    assert temperature_of(sampling_law) == temperature_of(partial(sampling_law, top_p=None)) == 1
    assert temperature_of(partial(tempered, temperature=2)) == 2
    assert temperature_of(partial(partial(sampling_law, top_k=4), top_k=None, temperature=0.5)) == 0.5
    for name, value in (("top_k", 5), ("top_p", 0.9), ("top_p", 1.0), ("min_p", 0.0)):
        assert temperature_of(partial(sampling_law, temperature=0.5, **{name: value})) is None
    others = greedy_law, partial(greedy_law), lambda z: tempered(z, temperature=1.0), torch.log_softmax
    assert all(temperature_of(law) is None for law in others)
