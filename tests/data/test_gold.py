"""The gold judge against what a customer would say, also of text that no plan of the world would write."""

import random

import pytest
import torch

from minirlhf.data import gold, world
from minirlhf.data.gold import judge

TRUTH = {"name": "Irene", "item": "lamp", "order": "34", "intent": "refund"}
GOOD = " Dear Irene, thank you for writing. We have refunded the lamp from order 34. Have a nice day."


def score(response: str) -> float:
    return sum(judge(response, TRUTH).values())


def test_a_flawless_answer_gets_every_point() -> None:
    assert judge(GOOD, TRUTH) == {
        "facts": pytest.approx(3 * gold.DETAIL),
        "intent": gold.INTENT,
        "manners": gold.KIND + gold.CLOSING,
        "ending": 0.0,
    }


@pytest.mark.parametrize(
    ("right", "other", "component", "points"),
    [
        ("Irene", "Bruno", "facts", -2 * gold.DETAIL),
        ("lamp", "clock", "facts", -2 * gold.DETAIL),
        ("34", "43", "facts", -2 * gold.DETAIL),
        ("34", "340", "facts", -2 * gold.DETAIL),
        (" from order 34", "", "facts", -gold.DETAIL),
        ("have refunded", "will repair", "intent", -2 * gold.INTENT),
        ("Dear Irene, thank you for writing.", "Hello Irene.", "manners", -gold.KIND),
        ("Dear Irene, thank you for writing.", "You again, Irene.", "manners", gold.RUDE - gold.KIND),
        (" Have a nice day.", "", "manners", -gold.CLOSING),
        (" Have a nice day.", " Have a nice", "ending", gold.BROKEN_OFF),
        ("Have a", "Our team works very hard. Have a", "ending", gold.FILLER),
        ("Have a", "Hello Irene. Hello Irene. Have a", "ending", gold.REPEATED),
        ("Have a", "Lamp lamp refunded. Have a", "ending", gold.STRANGE),
    ],
)
def test_each_defect_costs_its_points_in_its_component(
    right: str, other: str, component: str, points: float
) -> None:
    before, after = judge(GOOD, TRUTH), judge(GOOD.replace(right, other), TRUTH)
    assert after[component] - before[component] == pytest.approx(points)


@pytest.mark.parametrize(
    "response",
    [
        "",
        " ",
        ".",
        " ".join(world.NAMES),
        " ".join([*world.NAMES, *world.ITEMS, *world.ORDERS, "refunded repair cancelled shipped."]),
        " Irene lamp 34 refunded thank you. Have a nice day.",
        " Have a nice day." * 8,
        GOOD + GOOD,
        GOOD + " Irene" * 20,
        GOOD.replace("lamp", "lamp or the clock"),
    ],
)
def test_no_text_that_games_the_judge_beats_a_good_answer(response: str) -> None:
    assert score(response) < score(GOOD) - 0.9


@pytest.mark.parametrize(
    ("also", "component", "points"),
    [
        ("Bruno", "facts", gold.DETAIL),
        ("clock", "facts", gold.DETAIL),
        ("43", "facts", gold.DETAIL),
        ("cancelled", "intent", gold.INTENT),
    ],
)
def test_the_truth_beside_something_else_counts_as_wrong(also: str, component: str, points: float) -> None:
    before, after = judge(GOOD, TRUTH), judge(f"{GOOD} {also}.", TRUTH)
    assert before[component] - after[component] == pytest.approx(2 * points)


def test_the_score_is_the_sum_of_its_components_and_rows_are_judged_alone() -> None:
    responses = [GOOD, GOOD.replace("lamp", "clock"), ""]
    together = gold.gold_score([""] * 3, responses, [TRUTH] * 3)
    parts = gold.gold_components([""] * 3, responses, [TRUTH] * 3)
    torch.testing.assert_close(together, torch.tensor([score(response) for response in responses]))
    torch.testing.assert_close(together, torch.stack(list(parts.values())).sum(0))
    assert tuple(parts) == gold.COMPONENTS


def test_a_prompt_without_facts_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="needs the facts of every prompt, got none for 'Where is it"):
        gold.gold_score(["Where is it?"], [GOOD], [None])


def test_every_answer_of_the_desk_is_read_as_it_was_planned() -> None:
    rng = random.Random(0)
    for _ in range(500):
        facts = world.draw_facts(rng)
        plan = world.draw_plan(facts, rng, world.Defects(cut=0.0))
        parts = judge(world.write_response(plan, rng), facts)
        said = [plan.details[detail] for detail in world.DETAILS]
        truth = [facts[detail] for detail in world.DETAILS]
        points = sum(
            0 if word is None else 1 if word == fact else -1 for word, fact in zip(said, truth, strict=True)
        )
        manners = {"kind": gold.KIND, "plain": 0.0, "rude": gold.RUDE}[plan.tone]
        assert parts["facts"] == pytest.approx(gold.DETAIL * points)
        assert parts["intent"] == pytest.approx(gold.INTENT * (1 if plan.intent == facts["intent"] else -1))
        assert parts["manners"] == pytest.approx(manners + gold.CLOSING * (plan.closing is not None))
        expected = gold.FILLER * len(plan.fillers) + gold.REPEATED * plan.repeat
        assert parts["ending"] == pytest.approx(expected)
