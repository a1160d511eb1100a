"""The reward account, the alignment and the recursion of PPO's experience, against loops over single rows."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minirlhf.models.interface import scalar
from minirlhf.models.packing import Packing
from minirlhf.rollout.sampler import EOS as AT_EOS
from minirlhf.rollout.sampler import LENGTH, STOP, Rollout, response_mask
from minirlhf.runs import InputError
from minirlhf.training import ppo_sampling
from minirlhf.training.experience import Experience, by_rows, collect, logp_of, value_of
from tests.training.ppo_setting import CONFIG, CRITIC, EOS, MODEL, POLICY, PROMPTS, REFERENCE, TASK, taken


def sampled(**changes: Any) -> ppo_sampling.Sampled:
    config = replace(CONFIG, **changes)
    return ppo_sampling.sample(
        MODEL,
        POLICY,
        REFERENCE,
        CRITIC,
        TASK.scorer,
        PROMPTS,
        config,
        episode=0,
        kl_coefficient=config.kl_coefficient,
        seed=3,
        stop_ids=[EOS],
    )


@pytest.fixture(scope="module")
def made() -> ppo_sampling.Sampled:
    return sampled()


def row_logp(params: Any, tokens: list[int], prompt_length: int, temperature: float) -> list[float]:
    """log π of each response token of one row, alone, in float64 from logits."""
    hidden = MODEL.hidden(params, torch.tensor([tokens]))[0]
    logits = (hidden @ MODEL.unembedding(params).T).double() / temperature
    return [float(logits[t - 1].log_softmax(0)[tokens[t]]) for t in range(prompt_length, len(tokens))]


def rows_of(experience: Experience) -> list[tuple[list[int], int]]:
    e = experience
    spans = zip(e.tokens.tolist(), e.lengths.tolist(), e.prompt_lengths.tolist(), strict=True)
    return [(tokens[:length], prompt) for tokens, length, prompt in spans]


def test_the_batch_is_ragged_and_holds_finished_and_truncated_rows(made: ppo_sampling.Sampled) -> None:
    reasons = set(made.rollout.stop_reason.tolist())
    assert {AT_EOS, LENGTH} <= reasons
    assert len(set(made.experience.lengths.tolist())) > 2
    assert len(set(made.experience.prompt_lengths.tolist())) > 2


def test_log_probs_are_those_of_each_row_alone_at_the_sampling_temperature(
    made: ppo_sampling.Sampled,
) -> None:
    e = made.experience
    for b, (tokens, start) in enumerate(rows_of(e)):
        span = slice(start, len(tokens))
        old = row_logp(POLICY, tokens, start, CONFIG.temperature)
        ref = row_logp(REFERENCE, tokens, start, CONFIG.temperature)
        assert e.old_logp[b, span].tolist() == pytest.approx(old, abs=1e-5)
        assert e.ref_logp[b, span].tolist() == pytest.approx(ref, abs=1e-5)
        assert not e.old_logp[b, :start].any() and not e.old_logp[b, len(tokens) :].any()


def test_reward_account_sums_to_penalised_score_less_beta_kl_paid_on_the_last_token(
    made: ppo_sampling.Sampled,
) -> None:
    e, rollout = made.experience, made.rollout
    raw = TASK.scorer(rollout, made.prompt_index)
    for b, (tokens, start) in enumerate(rows_of(e)):
        old = row_logp(POLICY, tokens, start, CONFIG.temperature)
        ref = row_logp(REFERENCE, tokens, start, CONFIG.temperature)
        score = float(raw[b]) - (0.8 if tokens[-1] != EOS else 0.0)
        shaped = [-0.3 * (p - q) for p, q in zip(old, ref, strict=True)]
        shaped[-1] += score
        assert e.reward[b, start : len(tokens)].tolist() == pytest.approx(shaped, abs=1e-5)
        assert float(e.reward[b].sum()) == pytest.approx(sum(shaped), abs=1e-5)
        assert float(e.score[b]) == pytest.approx(score, abs=1e-6)


def test_advantages_and_returns_follow_the_recursion_and_are_whitened_over_the_whole_batch(
    made: ppo_sampling.Sampled,
) -> None:
    e, flat, place = made.experience, [], []
    for b, (tokens, start) in enumerate(rows_of(e)):
        carried, following = 0.0, 0.0  # A and V after the last token: truncated or not, 0
        row = []
        for t in reversed(range(start, len(tokens))):
            delta = float(e.reward[b, t]) + CONFIG.gamma * following - float(e.old_value[b, t])
            carried = delta + CONFIG.gamma * CONFIG.lam * carried
            following = float(e.old_value[b, t])
            row.append(carried)
            assert float(e.ret[b, t]) == pytest.approx(carried + following, abs=1e-5)
        flat += row[::-1]
        place += [float(e.advantage[b, t]) for t in range(start, len(tokens))]
    advantage = torch.tensor(flat).double()
    whitened = (advantage - advantage.mean()) / advantage.std()
    assert place == pytest.approx(whitened.tolist(), abs=1e-4)
    assert not e.advantage[~e.mask].any()


def test_the_value_of_a_token_is_read_before_it() -> None:
    tokens = torch.tensor([[5, 1, 2, 6, 7]])
    mask = torch.tensor([[False, True, True, True, True]])
    value = value_of(MODEL, CRITIC, tokens, mask)
    states = MODEL.hidden(CRITIC, tokens)
    assert torch.allclose(value[0, 1:], scalar(CRITIC, states[0, :-1]))
    assert float(value[0, 0]) == 0
    for t in range(1, 5):
        edited = tokens.clone()
        edited[0, t] = 8
        other = value_of(MODEL, CRITIC, edited, mask)
        assert torch.allclose(other[0, : t + 1], value[0, : t + 1])
        assert t == 4 or not torch.allclose(other[0, t + 1 :], value[0, t + 1 :])


def rollout_of(rows: list[list[int]], prompt_lengths: list[int], reasons: list[int]) -> Rollout:
    lengths = [len(row) for row in rows]
    tokens = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = torch.tensor(row)
    blank = torch.zeros(tokens.shape)
    return Rollout(
        tokens,
        torch.tensor(prompt_lengths),
        torch.tensor(lengths),
        blank,
        blank,
        torch.tensor(reasons),
        torch.tensor(0),
    )


def tensors(experience: Experience) -> dict[str, Tensor]:
    """The fields by name, but the packing."""
    return {name: field for name, field in experience._asdict().items() if name != "packing"}


def collected(rollout: Rollout, score: Tensor, **changes: Any) -> Experience:
    settings: dict[str, Any] = {
        "temperature": 1.0,
        "kl_coefficient": 0.0,
        "missing_eos_penalty": 1.0,
        "gamma": 1.0,
        "lam": 1.0,
        "micro_batch_size": 2,
    }
    return collect(MODEL, POLICY, REFERENCE, CRITIC, rollout, score, **settings | changes)


def test_missing_eos_penalty_hits_exactly_the_rows_that_no_stop_token_ended() -> None:
    # EOS at the very limit; another stop token; the limit; the limit, with an EOS inside the prompt.
    rows = [[5, 1, 1, EOS], [5, 1, 7], [5, 1, 1, 1], [EOS, 5, 1, 0]]
    rollout = rollout_of(rows, [1, 1, 1, 2], [AT_EOS, STOP, LENGTH, LENGTH])
    e = collected(rollout, torch.full((4,), 2.0))
    assert e.score.tolist() == [2.0, 2.0, 1.0, 1.0]
    assert e.reward.tolist() == [[0, 0, 0, 2], [0, 0, 2, 0], [0, 0, 0, 1], [0, 0, 0, 1]]


def test_what_stands_in_the_padding_changes_nothing() -> None:
    rows = [[5, 1, 1, EOS], [5, 7], [5, 1, 4]]
    rollout = rollout_of(rows, [1, 1, 2], [AT_EOS, LENGTH, LENGTH])
    rubbish = rollout._replace(tokens=torch.where(rollout.tokens == 0, 8, rollout.tokens))
    assert not torch.equal(rubbish.tokens, rollout.tokens)
    score = torch.tensor([0.5, -1.0, 2.0])
    one, other = collected(rollout, score), collected(rubbish, score, micro_batch_size=1)
    for name in tensors(one).keys() - {"tokens"}:
        assert torch.allclose(tensors(one)[name].float(), tensors(other)[name].float(), atol=1e-5)


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (torch.tensor([1.0, torch.nan]), "response 1 is nan"),
        (torch.tensor([torch.inf, 0.0]), "response 0 is inf"),
        (torch.zeros(2, 1), "score of 2 responses"),
    ],
)
def test_a_score_that_is_no_finite_number_per_response_is_refused(score: Tensor, said: str) -> None:
    with pytest.raises(InputError, match=said):
        collected(rollout_of([[5, 1], [5, 7]], [1, 1], [LENGTH, LENGTH]), score)


@pytest.mark.parametrize(
    ("name", "poisoned"), [("policy", POLICY), ("reference", REFERENCE), ("critic", CRITIC)]
)
def test_a_model_whose_numbers_are_not_finite_is_named(name: str, poisoned: Any) -> None:
    bad = {**poisoned, "ln_f": {**poisoned["ln_f"], "bias": poisoned["ln_f"]["bias"] * torch.nan}}
    given = (bad if poisoned is each else each for each in (POLICY, REFERENCE, CRITIC))
    policy, reference, critic = given
    rollout = rollout_of([[5, 1], [5, 7]], [1, 1], [LENGTH, LENGTH])
    numbers = {
        "temperature": 1.0,
        "kl_coefficient": 0.1,
        "missing_eos_penalty": 0.0,
        "gamma": 1.0,
        "lam": 1.0,
    }
    with pytest.raises(InputError, match=f"the {name} gives nan at row 0, position 1, not a finite number"):
        collect(MODEL, policy, reference, critic, rollout, torch.zeros(2), **numbers, micro_batch_size=2)


def test_experience_carries_no_gradient_even_from_parameters_that_ask_for_one() -> None:
    policy = {**POLICY, "wte": {"weight": POLICY["wte"]["weight"].clone().requires_grad_()}}
    critic = {**CRITIC, "score": {"weight": CRITIC["score"]["weight"].clone().requires_grad_()}}
    rollout = rollout_of([[5, 1, 4], [5, 7, 1]], [1, 1], [LENGTH, LENGTH])
    e = collect(
        MODEL,
        policy,
        policy,
        critic,
        rollout,
        torch.ones(2),
        temperature=1.0,
        kl_coefficient=0.1,
        missing_eos_penalty=1.0,
        gamma=1.0,
        lam=1.0,
        micro_batch_size=2,
    )
    assert not any(field.requires_grad for field in tensors(e).values())


def test_rows_are_taken_from_every_field_alike_and_trimmed_to_their_longest(
    made: ppo_sampling.Sampled,
) -> None:
    e = made.experience
    index = e.lengths.argsort()[:3]
    part = taken(e, index)
    width = int(e.lengths[index].max())
    assert width < e.tokens.shape[1]
    for name, whole in tensors(e).items():
        expected = whole[index][:, :width] if whole.ndim == 2 else whole[index]
        assert torch.equal(tensors(part)[name], expected), name


def test_forward_passes_do_not_depend_on_how_the_rows_are_cut(made: ppo_sampling.Sampled) -> None:
    rollout = made.rollout

    packed = []

    def logp(tokens: Tensor, mask: Tensor, packing: Packing | None) -> Tensor:
        packed.append(packing is not None)
        return logp_of(MODEL, POLICY, tokens, mask, packing, temperature=0.7)

    whole = logp(rollout.tokens, response_mask(rollout), None)
    for size in (1, 5, 12, 100):
        assert torch.allclose(by_rows(logp, rollout, micro_batch_size=size), whole, atol=1e-5)
    assert set(packed) == {True, False}  # a row alone has nothing to save


def test_prompts_come_in_passes_and_each_episode_has_its_own_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[list[int], list[int]]] = []
    generate = ppo_sampling.generate

    def spy(*args: Any, **named: Any) -> Rollout:
        seen.append((named["prompt_index"].tolist(), named["sample_index"].tolist()))
        assert args[2] == [PROMPTS[row] for row in named["prompt_index"].tolist()]
        return generate(*args, **named)

    monkeypatch.setattr(ppo_sampling, "generate", spy)
    sampled()
    (prompts, episodes) = seen[0]
    assert episodes == list(range(12))
    assert sorted(prompts[:5]) == sorted(prompts[5:10]) == [0, 1, 2, 3, 4]
    assert prompts[:5] != prompts[5:10]
    later = ppo_sampling.prompts_of(torch.arange(7, 12), 5, seed=3)
    assert later.tolist() == prompts[7:12]
    assert ppo_sampling.prompts_of(torch.arange(50), 5, seed=4).tolist() != (
        ppo_sampling.prompts_of(torch.arange(50), 5, seed=3).tolist()
    )


def test_seeded_streams_differ_by_seed_purpose_and_number() -> None:
    draws = {
        float(torch.rand((), generator=ppo_sampling.seeded(seed, purpose, number)))
        for seed in (0, 1)
        for purpose in ("a", "b")
        for number in (0, 1)
    }
    assert len(draws) == 8


def test_validation_objective_is_score_less_beta_kl_on_the_same_uniforms_each_time() -> None:
    evaluate = ppo_sampling.objective_on(
        MODEL, REFERENCE, TASK.scorer, PROMPTS, CONFIG, seed=5, stop_ids=[EOS]
    )
    at_reference = evaluate(REFERENCE)
    assert at_reference["validation/kl"] == 0
    assert at_reference["validation/objective"] == at_reference["validation/score"]
    found = evaluate(POLICY)
    assert found == evaluate(POLICY)
    expected = found["validation/score"] - 0.3 * found["validation/kl"]
    assert found["validation/objective"] == pytest.approx(expected, abs=1e-6)
    assert found["validation/kl"] != 0
    assert 1 <= found["validation/response_length"] <= 6
    free = replace(CONFIG, missing_eos_penalty=0.0)
    without = ppo_sampling.objective_on(MODEL, REFERENCE, TASK.scorer, PROMPTS, free, seed=5)(POLICY)
    assert without["validation/score"] > found["validation/score"]
