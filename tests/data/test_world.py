"""The world's text: prompts hold their facts, defects come as often as said, drills teach what is true."""

import random

import pytest

from minirlhf.data import world


def plans(count: int, defects: world.Defects) -> list[tuple[dict[str, str], world.Plan]]:
    rng = random.Random(0)
    facts = [world.draw_facts(rng) for _ in range(count)]
    return [(truth, world.draw_plan(truth, rng, defects)) for truth in facts]


def test_a_prompt_names_each_detail_once_and_asks_for_its_intent() -> None:
    rng = random.Random(0)
    for _ in range(200):
        facts = world.draw_facts(rng)
        prompt = world.write_prompt(facts, rng)
        assert all(prompt.count(facts[detail]) == 1 for detail in world.DETAILS)
        assert any(ask in prompt for ask in world.INTENTS[facts["intent"]].asks)
        assert prompt.endswith("\n") and prompt.count("\n") == 1


def test_no_ask_belongs_to_two_intents_and_no_word_to_two_details() -> None:
    asks = [ask for intent in world.INTENTS.values() for ask in intent.asks]
    words = [word for pool in world.POOLS.values() for word in pool]
    assert len(set(asks)) == len(asks) and len(set(words)) == len(words) == len(world.KIND_OF)
    for name, intent in world.INTENTS.items():
        others = [other for key, other in world.INTENTS.items() if key != name]
        assert all(intent.keyword in text for text in (intent.answer, intent.answer_without_order))
        assert not any(intent.keyword in other.answer for other in others)


@pytest.mark.parametrize("detail", world.DETAILS)
def test_details_are_wrong_and_missing_as_often_as_said(detail: str) -> None:
    drawn = plans(4000, world.Defects(wrong=0.3, missing=0.1))
    wrong = sum(plan.details[detail] not in (facts[detail], None) for facts, plan in drawn) / len(drawn)
    missing = sum(plan.details[detail] is None for _, plan in drawn) / len(drawn)
    assert wrong == pytest.approx(0.3, abs=0.03)
    assert missing == pytest.approx(0.0 if detail == "item" else 0.1, abs=0.02)


def test_a_flawless_plan_has_no_defect() -> None:
    for facts, plan in plans(200, world.FLAWLESS):
        assert plan.details == {detail: facts[detail] for detail in world.DETAILS}
        assert (plan.intent, plan.tone) == (facts["intent"], "kind")
        assert (plan.fillers, plan.repeat, plan.closing, plan.cut) == ((), False, None, None)


def test_a_minimal_pair_differs_in_one_property_and_half_of_the_time_in_a_detail() -> None:
    rng, changes = random.Random(1), []
    for facts, plan in plans(600, world.Defects()):
        other = world.change_one(plan, facts, rng, world.Defects())
        fields = [name for name in plan._fields if getattr(plan, name) != getattr(other, name)]
        assert len(fields) == 1
        changes.append(fields[0])
    assert 0.4 < changes.count("details") / len(changes) < 0.75
    assert set(changes) == set(world.Plan._fields)


def test_a_cut_answer_is_a_beginning_of_the_whole_one() -> None:
    for _, plan in plans(200, world.Defects(cut=1.0)):
        whole = world.write_response(plan._replace(cut=None), random.Random(5))
        part = world.write_response(plan, random.Random(5))
        assert whole.startswith(part) and part.startswith(" ")


def test_proofreading_marks_each_detail_and_changes_nothing_else() -> None:
    facts = {"name": "Irene", "item": "lamp", "order": "34", "intent": "refund"}
    text = " Dear Bruno, thank you for writing. We have refunded the lamp from order 43."
    assert world.proofread(text, facts) == (
        " Dear Bruno wrong, thank you for writing. We have refunded the lamp ok from order 43 wrong."
    )


def test_a_drill_trains_only_what_its_request_decides() -> None:
    rng = random.Random(0)
    for _ in range(100):
        facts = world.draw_facts(rng)
        spans = world.write_drill(facts, rng, recitals=4, checks=6)
        text = [piece.strip() for piece, _ in spans]
        trained = [i for i, (_, learnt) in enumerate(spans) if learnt]
        assert len(trained) == 4 + 6
        for i in trained[:4]:
            assert text[i] == facts[text[i - 1]]  # the recited detail, after its kind
        for i in trained[4:]:
            right = facts[world.KIND_OF[text[i - 1]]] == text[i - 1]
            assert text[i] == ("ok" if right else "wrong")


def test_about_half_of_a_drills_checks_are_ok() -> None:
    rng, marks = random.Random(0), []
    for _ in range(200):
        spans = world.write_drill(world.draw_facts(rng), rng, recitals=0, checks=15)
        marks += [piece for piece, trained in spans if trained]
    assert marks.count(" ok") / len(marks) == pytest.approx(0.5, abs=0.06)
