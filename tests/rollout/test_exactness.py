"""The sampler against its oracles: the uncached model, the trainer's log-probs, enumeration, itself."""

from functools import partial
from itertools import product

import pytest
import torch

from minirlhf.kernels.logprob import token_logp
from minirlhf.models.interface import LanguageModel, Params, aligned
from minirlhf.objectives.sampling import sampling_law
from minirlhf.rollout.philox import uniforms
from minirlhf.rollout.sampler import LENGTH, response_mask
from tests.rollout.known_models import LAWS, ragged_prompts, rows, sample, tiny_gpt2

every_law = pytest.mark.parametrize("options", LAWS.values(), ids=LAWS)


def uncached_rows(model: LanguageModel, params: Params, prompts, *, law, limit: int) -> list[list[int]]:
    """The same uniforms without cache, batch or tensors of state: the whole row is read for each token."""
    grown = []
    for number, prompt in enumerate(prompts):
        row = list(prompt)
        for t in range(limit):
            logits = model.hidden(params, torch.tensor([row]))[0, -1] @ model.unembedding(params).T
            cumulative = law(logits[None])[0].double().exp().cumsum(0)
            uniform = uniforms(3, torch.tensor([number]), torch.tensor([0]), t)
            row.append(int((cumulative <= uniform).sum()))
            if row[-1] == 0:
                break
        grown.append(row)
    return grown


@every_law
def test_cached_rollout_equals_the_uncached_model_row_by_row(options: dict) -> None:
    model, params = tiny_gpt2()
    prompts, _ = ragged_prompts(25)
    law = partial(sampling_law, **options)
    rollout = sample(model, params, prompts, law=law)
    expected = uncached_rows(model, params, prompts, law=law, limit=12)
    different = sum(got != want for got, want in zip(rows(rollout), expected, strict=True))
    assert different <= int(rollout.boundary_draws)
    assert len({len(row) for row in expected}) > 8, "ragged prompts and early stops"


@every_law
def test_rows_are_the_same_alone_in_a_batch_permuted_and_chunked_but_for_boundary_draws(options) -> None:
    model, params = tiny_gpt2()
    prompts, index = ragged_prompts(60)
    draw = partial(sample, model, params, law=partial(sampling_law, **options))
    together = draw(prompts)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(7))
    permuted = draw([prompts[i] for i in order.tolist()], prompt_index=index[order])
    back = order.argsort().tolist()
    others = [draw(prompts, slots=size) for size in (1, 7, 59)]
    for rollout, got in [(permuted, [rows(permuted)[i] for i in back])] + [(r, rows(r)) for r in others]:
        different = sum(one != other for one, other in zip(got, rows(together), strict=True))
        assert different <= max(int(rollout.boundary_draws), int(together.boundary_draws))
        assert different <= 1, "boundary draws are rare: about 1e-5 of the draws times the law's tokens"


def test_draws_near_a_boundary_are_counted_as_often_as_they_must_occur() -> None:
    """Each of the V - 1 inner boundaries is near for 2e-5 of all uniforms: 400 tokens, one draw in 125."""
    model, params = tiny_gpt2(vocabulary=400, spread=0.01)  # nearly uniform laws
    count = 10_000
    index = torch.arange(count)
    rollout = sample(model, params, [[1]] * count, max_new_tokens=2, stop_ids=[], prompt_index=index)
    expected = 2 * count * 399 * 2e-5  # 160, give or take 13
    assert abs(int(rollout.boundary_draws) - expected) < 5 * expected**0.5


@every_law
def test_recorded_log_probs_equal_those_that_a_trainer_recomputes(options: dict) -> None:
    model, params = tiny_gpt2()
    prompts, _ = ragged_prompts(40)
    rollout = sample(model, params, prompts, law=partial(sampling_law, **options))
    mask = response_mask(rollout)
    states = aligned(model.hidden(params, rollout.tokens))
    raw = token_logp(states, model.unembedding(params), rollout.tokens, mask)
    torch.testing.assert_close(rollout.logp, raw, atol=1e-4, rtol=0)
    law_logp = sampling_law(states @ model.unembedding(params).T, **options)
    of_law = law_logp.gather(-1, rollout.tokens[..., None])[..., 0]
    torch.testing.assert_close(rollout.sampled_logp[mask], of_law[mask], atol=1e-4, rtol=0)
    assert (rollout.logp[~mask] == 0).all() and (rollout.sampled_logp[~mask] == 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_a_tempered_law_is_what_the_kernel_gives_at_that_temperature(temperature: float) -> None:
    model, params = tiny_gpt2()
    prompts, _ = ragged_prompts(30)
    rollout = sample(model, params, prompts, law=partial(sampling_law, temperature=temperature))
    states = aligned(model.hidden(params, rollout.tokens))
    recomputed = token_logp(
        states, model.unembedding(params), rollout.tokens, response_mask(rollout), temperature=temperature
    )
    torch.testing.assert_close(rollout.sampled_logp, recomputed, atol=1e-4, rtol=0)
    same = (rollout.sampled_logp - rollout.logp).abs().max() < 1e-6
    assert bool(same) == (temperature == 1.0)


def enumerated(model: LanguageModel, params: Params, prompt: list[int], options: dict, limit: int) -> dict:
    """p(response) of every response: all that end with EOS (0), or have `limit` tokens."""
    vocabulary = model.config.vocab_size
    law: dict[tuple[int, ...], float] = {}
    for response in product(range(vocabulary), repeat=limit):
        row = torch.tensor([prompt + list(response)])
        logits = model.hidden(params, row)[0, len(prompt) - 1 : -1] @ model.unembedding(params).T
        steps = sampling_law(logits, **options).double()[torch.arange(limit), torch.tensor(response)]
        end = response.index(0) + 1 if 0 in response else limit
        law[response[:end]] = float(steps[:end].sum().exp())
    return law


@pytest.mark.parametrize("name", ["plain", "cool", "top-p"])
def test_whole_responses_follow_the_enumerated_law(name: str) -> None:
    model, params = tiny_gpt2(vocabulary=4, spread=5.0, seed=2)
    prompt, count = [1, 3], 40_000
    law = enumerated(model, params, prompt, LAWS[name], limit=3)
    assert abs(sum(law.values()) - 1) < 1e-5
    same = torch.zeros(count, dtype=torch.int64)
    rollout = sample(
        model,
        params,
        [prompt] * count,
        law=partial(sampling_law, **LAWS[name]),
        max_new_tokens=3,
        prompt_index=same,
        sample_index=torch.arange(count),
    )
    seen = dict.fromkeys(law, 0)
    for row in rows(rollout):
        seen[tuple(row[2:])] += 1
    assert all(seen[response] == 0 for response, p in law.items() if p == 0)
    cells = [(seen[response], p * count) for response, p in law.items() if p * count >= 5]
    chi_square = sum((got - expected) ** 2 / expected for got, expected in cells)
    degrees = len(cells) - 1
    assert degrees >= 5
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5, f"{chi_square:.1f} with {degrees} degrees"
    truncated = sum(p for response, p in law.items() if 0 not in response)
    share = float((rollout.stop_reason == LENGTH).double().mean())
    assert abs(share - truncated) < 5 * (truncated * (1 - truncated) / count) ** 0.5 + 1e-12
