"""KL to the reference in nats per sequence: exact in expectation, never of another law, in bounded memory."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from minirlhf.evaluation import divergence
from minirlhf.evaluation.divergence import kl_to_reference
from minirlhf.models import gpt2
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.objectives.sampling import tempered
from minirlhf.rollout.sampler import EOS, LENGTH, Rollout, generate

LIMIT = 3


def tiny(vocab_size: int = 3) -> LanguageModel:
    config = gpt2.GPT2Config(
        vocab_size=vocab_size,
        n_positions=16,
        n_embd=8,
        n_layer=1,
        n_head=2,
        eos_token_id=0,
        initializer_range=0.6,
    )
    return gpt2.bind(config)


def two_policies(model: LanguageModel) -> tuple[Params, Params]:
    return model.init(torch.Generator().manual_seed(1)), model.init(torch.Generator().manual_seed(2))


def rollout_of(rows: list[list[int]], prompt: list[int], *, temperature_one: bool = True) -> Rollout:
    """Given responses as a rollout; its recorded log-probs are invented, only their agreement is read."""
    lengths = torch.tensor([len(prompt) + len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for b, row in enumerate(rows):
        tokens[b, : lengths[b]] = torch.tensor(prompt + row)
    logp = torch.zeros(tokens.shape)
    return Rollout(
        tokens=tokens,
        prompt_lengths=torch.full((len(rows),), len(prompt)),
        lengths=lengths,
        logp=logp,
        sampled_logp=logp if temperature_one else logp - 0.1,
        stop_reason=torch.tensor([EOS if row[-1] == 0 else LENGTH for row in rows]),
        boundary_draws=torch.tensor(0),
    )


def log_prob(model: LanguageModel, params: Params, prompt: list[int], row: list[int]) -> float:
    """log π(row | prompt), one prefix at a time."""
    total = 0.0
    for t, token in enumerate(row):
        hidden = model.hidden(params, torch.tensor([prompt + row[:t]]))[0, -1]
        total += float((hidden @ model.unembedding(params).T).double().log_softmax(-1)[token])
    return total


def test_its_expectation_is_the_kl_of_the_enumerated_sequences() -> None:
    model = tiny()
    params, reference = two_policies(model)
    prompt = [1, 2]
    every = [
        list(row)
        for length in range(1, LIMIT + 1)
        for row in itertools.product(range(3), repeat=length)
        if 0 not in row[:-1] and (row[-1] == 0 or length == LIMIT)
    ]
    logp = torch.tensor([log_prob(model, params, prompt, row) for row in every])
    ref_logp = torch.tensor([log_prob(model, reference, prompt, row) for row in every])
    assert float(logp.exp().sum()) == pytest.approx(1, abs=1e-6)
    exact = float((logp.exp() * (logp - ref_logp)).sum())
    estimates = kl_to_reference(model, params, reference, rollout_of(every, prompt))
    assert float((logp.exp() * estimates).sum()) == pytest.approx(exact, rel=1e-5)
    assert exact > 0.1 and bool((estimates > 0).all())
    swapped = kl_to_reference(model, reference, params, rollout_of(every, prompt))
    assert float((logp.exp() * swapped).sum()) != pytest.approx(exact, rel=0.05)


def sampled(model: LanguageModel, params: Params, rows: int, temperature: float = 1.0) -> Rollout:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 5, (rows,), generator=generator).tolist()
    return generate(
        model,
        params,
        [torch.randint(0, 3, (n,), generator=generator).tolist() for n in lengths],
        law=partial(tempered, temperature=temperature),
        max_new_tokens=8,
        stop_ids=[0],
        seed=0,
        prompt_index=torch.arange(rows),
        sample_index=torch.zeros(rows, dtype=torch.int64),
    )


def test_it_varies_less_than_the_sum_of_log_ratios_and_has_the_same_mean() -> None:
    model = tiny()
    params, reference = two_policies(model)
    rollout = sampled(model, params, 600)
    kl = kl_to_reference(model, params, reference, rollout)
    spans = zip(
        rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True
    )
    k1 = torch.tensor(
        [
            log_prob(model, params, row[:p], row[p:n]) - log_prob(model, reference, row[:p], row[p:n])
            for row, p, n in itertools.islice(spans, 150)
        ]
    )
    assert kl.std() < 0.7 * k1.std()
    assert float(k1.mean()) == pytest.approx(float(kl[:150].mean()), abs=3 * float(k1.std()) / 150**0.5)


@pytest.mark.parametrize("rows_at_once", [1, 5, 64])
@pytest.mark.parametrize("logits_at_once", [1, 7, 2**22])
def test_chunks_change_nothing(
    rows_at_once: int, logits_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    params, reference = two_policies(model)
    rollout = sampled(model, params, 13)
    whole = kl_to_reference(model, params, reference, rollout)
    monkeypatch.setattr(divergence, "_LOGITS", logits_at_once)
    chunked = kl_to_reference(model, params, reference, rollout, micro_batch_size=rows_at_once)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


def grouped(model: LanguageModel, params: Params) -> Rollout:
    """Three samples of each of four ragged prompts, in an order that keeps no prompt together."""
    prompts = [[1, 2, 1, 1, 2, 1], [2], [2, 1, 1, 1], [1, 1, 2]] * 3
    return generate(
        model,
        params,
        prompts,
        law=partial(tempered, temperature=1.0),
        max_new_tokens=8,
        stop_ids=[0],
        seed=0,
        prompt_index=torch.arange(12) % 4,
        sample_index=torch.arange(12) // 4,
    )


def test_packed_rows_have_the_values_of_rows_read_alone_and_compute_no_token_twice() -> None:
    model = tiny()
    params, reference = two_policies(model)
    rollout, read = grouped(model, params), []

    def states(params: Params, tokens: Tensor, *rest: Any) -> Tensor:
        read.append(tokens.numel())
        return model.states(params, tokens, *rest)

    packed = kl_to_reference(model._replace(states=states), params, reference, rollout)
    rows = [row[:n] for row, n in zip(rollout.tokens.tolist(), rollout.lengths.tolist(), strict=True)]
    distinct = {tuple(row[: t + 1]) for row in rows for t in range(len(row))}
    assert read == [len(distinct)] * 2 and len(distinct) < 0.7 * sum(map(len, rows))
    for b, (row, start) in enumerate(zip(rows, rollout.prompt_lengths.tolist(), strict=True)):
        logp, ref_logp = (
            (model.hidden(each, torch.tensor([row]))[0] @ model.unembedding(each).T).double().log_softmax(-1)
            for each in (params, reference)
        )
        exact = (logp.exp() * (logp - ref_logp)).sum(-1)[start - 1 : -1].sum()
        assert float(packed[b]) == pytest.approx(float(exact), rel=1e-4)


def test_logits_are_held_for_few_tokens_where_the_vocabulary_is_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny(50_257)
    params, reference = two_policies(model)
    sizes: list[int] = []
    exact = divergence.exact_kl

    def watched(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
        sizes.append(logits.numel())
        return exact(logits, ref_logits, mask)

    monkeypatch.setattr(divergence, "exact_kl", watched)
    rows = [[5, 6, 7, 8, 9, 10]] * 20
    kl = kl_to_reference(model, params, reference, rollout_of(rows, [3]))
    assert max(sizes) <= 2**22 and sum(sizes) == 120 * 50_257
    assert torch.equal(kl, kl[:1].expand(20)) or kl.std() < 1e-4


def test_a_policy_is_at_no_distance_from_itself_and_padding_is_never_read() -> None:
    model = tiny()
    params, reference = two_policies(model)
    rollout = sampled(model, params, 9)
    assert kl_to_reference(model, params, params, rollout).abs().max() < 1e-6
    beyond = torch.arange(rollout.tokens.shape[1]) >= rollout.lengths[:, None]
    assert beyond.any()
    other = rollout._replace(tokens=torch.where(beyond, 2, rollout.tokens))
    torch.testing.assert_close(
        kl_to_reference(model, params, reference, other), kl_to_reference(model, params, reference, rollout)
    )


def test_responses_of_another_law_are_refused() -> None:
    model = tiny()
    params, reference = two_policies(model)
    with pytest.raises(ValueError, match="sampled at temperature 1, unfiltered"):
        kl_to_reference(model, params, reference, sampled(model, params, 5, temperature=0.7))
    with pytest.raises(ValueError, match="sampled at temperature 1, unfiltered"):
        kl_to_reference(model, params, reference, rollout_of([[1]], [1], temperature_one=False))
