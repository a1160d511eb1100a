"""Every number of the table is a function of raw answers, against independent SFT samples."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minirlhf.evaluation.compare import Comparison, EvaluationConfig, compare
from minirlhf.evaluation.divergence import kl_to_reference
from minirlhf.evaluation.judges import gold_judge, reward_judge
from minirlhf.evaluation.statistics import mean_difference, mean_over_prompts, win_rate
from minirlhf.evaluation.verdict import verdict
from minirlhf.models.checkpoint import Normalisation
from minirlhf.models.interface import with_scalar_head
from minirlhf.rollout.sampler import Rollout
from minirlhf.runs import InputError
from minirlhf.training.reward_sources import Reward
from minirlhf.training.rewards import reward_model_scorer
from tests.evaluation import world

PROMPTS = [[1, 2], [4, 5, 3, 1], [9], [2, 2, 6]] * 3
TEXTS = [world.Words().decode(ids) for ids in PROMPTS]
FACTS = [{"item": "lamp" if i % 2 else "chair"} for i in range(len(PROMPTS))]
CONFIG = EvaluationConfig(prompts=12, samples=3, max_response=6)


def proxy(rollout: Rollout, prompt_index: Tensor) -> Tensor:
    """Counts the word "you", less a tenth of the prompt's number."""
    count = (rollout.tokens == 7).sum(1).float()
    return count - 0.1 * prompt_index


def judge() -> Any:
    return gold_judge(world.gold_score, world.gold_components, world.Words(), TEXTS, FACTS)


def compared(
    config: EvaluationConfig = CONFIG, *, seed: int = 0, policies: tuple[str, ...] = ("ppo", "dpo")
) -> Comparison:
    seeds = {"ppo": 2, "dpo": 3, "same": 1}
    return compare(
        world.model(),
        world.policy(1),
        {name: world.policy(seeds[name]) for name in policies},
        PROMPTS,
        TEXTS,
        proxy=proxy,
        judge=judge(),
        tokenizer=world.Words(),
        config=config,
        seed=seed,
        say=lambda line: None,
    )


@pytest.fixture(scope="module")
def done() -> Comparison:
    return compared()


def test_every_number_of_a_row_is_recomputed_from_texts_and_scores(done: Comparison) -> None:
    assert [row.policy for row in done.rows] == ["sft", "ppo", "dpo"]
    for row in done.rows:
        given, against = done.answers[row.policy], done.opponent
        assert given.proxy is not None and against.proxy is not None and row.score_gain is not None
        texts = [text for of_prompt in given.texts for text in of_prompt]
        facts = [fact for fact in FACTS for _ in range(3)]
        gold = world.gold_score(texts, texts, facts).view(12, 3)
        parts = world.gold_components(texts, texts, facts)
        assert torch.equal(gold, given.judged)
        assert row.win_rate == win_rate(gold, against.judged)
        assert row.score == mean_over_prompts(given.proxy)
        assert row.score_gain == mean_difference(given.proxy, against.proxy)
        assert row.judge_score == mean_over_prompts(gold)
        assert row.judge_gain == mean_difference(gold, against.judged)
        assert row.components == pytest.approx({name: float(part.mean()) for name, part in parts.items()})
        assert row.component_gains == {
            name: mean_difference(part.view(12, 3), against.components[name]) for name, part in parts.items()
        }
        lengths = [len(text.split()) for text in texts]
        assert row.tokens == row.words == pytest.approx(sum(lengths) / 36)
        grams = [gram for text in texts for gram in zip(text.split(), text.split()[1:], strict=False)]
        assert row.distinct_2 == pytest.approx(len(set(grams)) / len(grams))
        assert row.distinct_1 == pytest.approx(len({w for t in texts for w in t.split()}) / sum(lengths))
        triples = [list(zip(*(t.split()[i:] for i in range(3)), strict=False)) for t in texts]
        repeated = [1 - len(set(of_text)) / max(1, len(of_text)) if of_text else 0 for of_text in triples]
        assert row.repetition == pytest.approx(sum(repeated) / 36)
        assert row.eos_rate == pytest.approx(sum(bool(e) for e in given.ended.flatten()) / 36)
        if row.policy != "sft":
            assert row.verdict == verdict(row.score_gain, row.win_rate, detectable=row.detectable)
    assert done.rows[0].verdict.finding == "reference"


def test_texts_are_the_ids_without_the_stop_token(done: Comparison) -> None:
    for given in done.answers.values():
        for p in range(12):
            for i in range(3):
                ids = given.ids[p][i]
                assert given.texts[p][i] == world.Words().decode(ids) and 0 not in ids
                assert len(ids) <= (5 if given.ended[p, i] else 6)
                assert given.ended[p, i] or len(ids) == 6


def test_the_proxy_sees_each_rows_own_prompt(done: Comparison) -> None:
    given = done.answers["ppo"]
    count = torch.tensor([[float(ids.count(7)) for ids in of_prompt] for of_prompt in given.ids])
    asked = torch.tensor([float(prompt.count(7)) for prompt in PROMPTS])[:, None]
    torch.testing.assert_close(given.proxy, count + asked - 0.1 * torch.arange(12.0)[:, None])


def test_the_opponent_is_independent_and_policies_share_their_uniforms() -> None:
    done = compared(policies=("same",))
    assert done.answers["same"].ids == done.answers["sft"].ids, (
        "the same weights and uniforms: the same texts"
    )
    together = zip(done.answers["sft"].ids, done.opponent.ids, strict=True)
    equal = sum(a == b for mine, theirs in together for a, b in zip(mine, theirs, strict=True))
    assert equal < 12, "SFT is compared with samples of its own"
    assert done.rows[1].kl.mean == pytest.approx(0, abs=1e-6)


def test_samples_of_one_prompt_differ_and_prompts_do_not_share_uniforms(done: Comparison) -> None:
    ids = done.answers["ppo"].ids
    assert sum(len({tuple(one) for one in of_prompt}) > 1 for of_prompt in ids) > 6
    assert ids[0:4] != ids[4:8], "the same words asked again are another draw"


def test_sft_against_itself_wins_about_half() -> None:
    config = replace(CONFIG, samples=40)
    own = compared(config, policies=()).rows[0]
    assert own.win_rate.low < 0.5 < own.win_rate.high
    assert own.kl.mean == 0


def test_the_same_seed_gives_the_same_table_and_another_seed_another(done: Comparison) -> None:
    again = compared()
    assert again.rows == done.rows and again.answers["dpo"].texts == done.answers["dpo"].texts
    assert compared(seed=1).rows != done.rows


def test_a_policys_row_does_not_depend_on_the_other_policies(done: Comparison) -> None:
    assert compared(policies=("dpo",)).rows[1] == done.rows[2]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_kl_is_that_of_temperature_one_whatever_the_responses_were_sampled_at(temperature: float) -> None:
    kl = compared(replace(CONFIG, temperature=temperature), policies=("ppo",)).answers["ppo"].kl
    assert kl.shape == (12, 3 if temperature == 1 else 1)
    plain = compared(policies=("ppo",)).answers["ppo"].kl
    torch.testing.assert_close(kl, plain[:, : kl.shape[1]], rtol=1e-4, atol=1e-5)
    assert kl.mean() > 0.05


def test_the_kl_column_is_the_tested_function_on_the_shown_responses(done: Comparison) -> None:
    given = done.answers["ppo"]
    rows = [
        prompt + ids + [0] * bool(e)
        for prompt, of_prompt, ended in zip(PROMPTS, given.ids, given.ended, strict=True)
        for ids, e in zip(of_prompt, ended, strict=True)
    ]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    zero = torch.zeros(tokens.shape)
    asked = torch.tensor([len(prompt) for prompt in PROMPTS]).repeat_interleave(3)
    rollout = Rollout(tokens, asked, lengths, zero, zero, torch.zeros(36), torch.tensor(0))
    kl = kl_to_reference(world.model(), world.policy(2), world.policy(1), rollout).view(12, 3)
    torch.testing.assert_close(kl, given.kl, rtol=1e-4, atol=1e-5)
    assert done.rows[1].kl == mean_over_prompts(given.kl)


def test_a_second_reward_model_judges_the_sampled_ids_and_has_no_components() -> None:
    params = with_scalar_head(world.model(), world.policy(5), generator=torch.Generator().manual_seed(0))
    normalisation = Normalisation(0.3, 2.0)
    scorer = reward_model_scorer(world.model(), params, normalisation)
    reward = Reward("by path", lambda policy, prompts, room: scorer, {"reward_model": Path("a/judge")}, {})
    policy: Any = None  # the scorer reads the sampled ids alone
    second = reward_judge(reward, policy, [], max_response=2)
    rollout = Rollout(
        torch.tensor([[1, 2, 3, 0], [4, 5, 9, 9]]),
        torch.tensor([1, 2]),
        torch.tensor([4, 3]),
        torch.zeros(2, 4),
        torch.zeros(2, 4),
        torch.tensor([0, 2]),
        torch.tensor(0),
    )
    index = torch.arange(2)
    assert torch.equal(second.score(rollout, index), scorer(rollout, index))
    assert second.components(rollout, index) == {} and second.name == "second reward model (judge)"
    assert scorer(rollout, index).unique().numel() == 2


def test_what_cannot_be_compared_is_refused() -> None:
    arguments: dict[str, Any] = {
        "proxy": proxy,
        "judge": judge(),
        "tokenizer": world.Words(),
        "config": CONFIG,
        "seed": 0,
        "say": lambda line: None,
    }
    one = world.policy(1)
    with pytest.raises(InputError, match="no policy may be called 'sft'"):
        compare(world.model(), one, {"sft": one}, PROMPTS, TEXTS, **arguments)
    with pytest.raises(InputError, match="at least 2 held-out prompts, got 1"):
        compare(world.model(), one, {}, PROMPTS[:1], TEXTS[:1], **arguments)
    with pytest.raises(ValueError, match="one text per prompt, got 11 for 12"):
        compare(world.model(), one, {}, PROMPTS, TEXTS[:11], **arguments)
    wrongs: list[dict[str, Any]] = [
        {"prompts": 1},
        {"samples": 0},
        {"max_response": 0},
        {"temperature": 0.0},
        {"examples": -1},
    ]
    for wrong in wrongs:
        with pytest.raises(InputError, match=f"{next(iter(wrong))} must"):
            EvaluationConfig(**wrong)
