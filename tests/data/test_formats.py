"""Chats, trees and their like: what each format gives, what it drops, and what it asks before it guesses."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.data.conversation import demonstration_of, messages_of, prompt_of, prompt_text
from minirlhf.data.formats.detect import DEMONSTRATIONS, KEYS, PREFERENCES, PROMPTS
from minirlhf.data.readers import (
    open_demonstrations,
    read_demonstrations,
    read_preferences,
    read_prompts,
    row_of,
)
from minirlhf.data.records import Demonstration, Message, Preference, Prompt
from minirlhf.runs import InputError

USER, BOT = Message("user", "hi"), Message("assistant", "ho")
PROMPT = "\n\nHuman: hi\n\nAssistant:"


def said(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


HI, HO, NO = said(("user", "hi")), said(("assistant", "ho")), said(("assistant", "no"))
PAIR = Preference(PROMPT, " ho", " no", 1, (USER,))
ANSWER = Demonstration(PROMPT, ((" ho", True),), 1, (USER, BOT))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": HI + HO},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "x"}, *HO]},
        {"prompt": HI, "completion": HO},
        {"prompt": HI, "completion": HO, "label": True},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"conversations": [{"from": "user", "value": "hi"}, {"from": "chatgpt", "value": "ho"}]},
        {
            "conversations": [{"from": "human", "value": "hi"}, {"from": "bard", "value": "ho"}],
            "system": None,
        },
        {"prompt": {"role": "prompter", "text": "hi", "replies": [{"role": "assistant", "text": "ho"}]}},
    ],
)
def test_every_chat_format_gives_the_same_demonstration(jsonl, row):
    assert read_demonstrations(jsonl(row)).rows == [ANSWER]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": HI, "chosen": HO, "rejected": NO},
        {"prompt": HI, "chosen": HI + HO, "rejected": HI + NO},
        {"chosen": HI + HO, "rejected": HI + NO},
        {"prompt": None, "chosen": HI + HO, "rejected": HI + NO},
        {"prompt": "hi", "prompt_id": "7", "chosen": HI + HO, "rejected": HI + NO, "score_chosen": 9.0},
        {"prompt": "hi", "messages": HI + HO, "chosen": HI + HO, "rejected": HI + NO},
        {"chosen": PROMPT + " ho", "rejected": PROMPT + " no"},
        {
            "conversations": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "ho"},
            "rejected": {"from": "gpt", "value": "no"},
        },
    ],
)
def test_every_preference_format_gives_the_same_pair_demonstration_and_prompt(jsonl, row):
    path = jsonl(row)
    assert read_preferences(path).rows == [PAIR]
    assert read_demonstrations(path).rows == [ANSWER]
    assert read_prompts(path).rows == [Prompt(PROMPT, None, 1, (USER,))]


def test_of_a_transcripts_answer_only_the_space_after_its_marker_is_not_said(jsonl):
    path = jsonl({"chosen": PROMPT + "  two\n", "rejected": PROMPT + "none"})
    (pair,), (shown,) = read_preferences(path).rows, read_demonstrations(path).rows
    assert (pair.chosen, pair.rejected) == ("  two\n", "none")
    assert shown.messages == (USER, Message("assistant", " two\n"))


def test_the_implicit_prompt_is_all_that_both_sides_begin_with(jsonl):
    turns = said(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    (pair,) = read_preferences(jsonl({"chosen": turns + HO, "rejected": turns + NO})).rows
    assert [message.content for message in pair.messages or ()] == ["s", "a", "b", "c"]
    assert pair.prompt == "\n\nSystem: s\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


def test_of_a_conversational_completion_only_the_completion_trains(jsonl):
    row = {"prompt": HI + HO + HI, "completion": NO + HI + HO}
    (demonstration,) = read_demonstrations(jsonl(row)).rows
    assert demonstration.prompt == PROMPT + " ho" + PROMPT
    assert demonstration.segments == ((" no", True), (PROMPT, False), (" ho", True))
    assert demonstration.messages is not None and len(demonstration.messages) == 6


def test_a_system_text_of_sharegpt_is_the_first_message(jsonl):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    (row,) = read_demonstrations(jsonl({"conversations": turns, "system": "s"})).rows
    assert row.messages == (Message("system", "s"), USER, BOT)


def test_unpaired_rows_train_where_the_label_is_true_and_are_no_preferences(jsonl):
    rows = [{"prompt": "p", "completion": "c", "label": label} for label in (True, False, None)]
    loaded = read_demonstrations(jsonl(*rows))
    assert loaded.rows == [Demonstration("p", (("c", True),), 1)]
    assert loaded.dropped == [(2, "labelled false"), (3, 'null "label"')]
    assert [row.prompt for row in read_prompts(jsonl(*rows)).rows] == ["p"] * 3
    with pytest.raises(InputError, match="expected two responses to each prompt, .* which are unpaired"):
        read_preferences(jsonl(*rows))


def test_plain_text_is_sent_to_pretraining(jsonl):
    with pytest.raises(InputError, match="plain text has no prompt; `minirlhf pretrain` trains on it"):
        read_demonstrations(jsonl({"text": "t"}))


def node(role: str, text: str, *replies: dict, **more: object) -> dict:
    return {"role": role, "text": text, "replies": list(replies), **more}


TREE = node(
    "prompter",
    "hi",
    node("assistant", "worst", rank=2),
    node("assistant", "best", node("prompter", "more?", node("assistant", "yes", rank=None)), rank=0),
    node("assistant", "middle", rank=1),
    node("assistant", "even", rank=1),
    node("assistant", "unranked", rank=None),
    node("assistant", "gone", rank=-1, deleted=True),
    node("assistant", "failed", rank=-2, review_result=False),
)


def table(tree: dict) -> list[dict]:
    """The tree as OpenAssistant's table of messages, children before their parents."""
    rows: list[dict] = []

    def add(at: dict, parent: str | None) -> None:
        name = at["text"]
        for reply in at["replies"]:
            add(reply, name)
        rest = {key: value for key, value in at.items() if key != "replies"}
        rows.append({"message_id": name, "parent_id": parent, "message_tree_id": "t", **rest})

    add(tree, None)
    return rows


@pytest.mark.parametrize(
    "rows", [[{"message_tree_id": "t", "prompt": TREE}], table(TREE)], ids=["tree", "table"]
)
def test_a_tree_gives_its_best_path_and_every_ranked_pair(jsonl, rows):
    path = jsonl(*rows)
    (row,) = read_demonstrations(path).rows
    assert [message.content for message in row.messages or ()] == ["hi", "best", "more?", "yes"]
    assert [text for text, trained in row.segments if trained] == [" best", " yes"]
    pairs = {(pair.chosen, pair.rejected) for pair in read_preferences(path).rows}
    better = [("best", "middle"), ("best", "even"), ("best", "worst"), ("middle", "worst"), ("even", "worst")]
    assert pairs == {(f" {first}", f" {second}") for first, second in better}
    assert [prompt.prompt for prompt in read_prompts(path).rows] == [PROMPT]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"parent_id": "nowhere"}, '"parent_id" to be null or the "message_id" of a row'),
        ({"parent_id": "yes"}, "a longer one, or a circle"),
        ({"message_id": "best"}, "found the same"),
        ({"message_id": 3}, '"message_id" to be a string'),
    ],
)
def test_a_table_whose_messages_hang_in_the_air_is_refused(jsonl, change, complaint):
    rows = [row | change if row["message_id"] == "more?" else row for row in table(TREE)]
    with pytest.raises(InputError, match=complaint):
        read_demonstrations(jsonl(*rows))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": said(("user", "hi"), ("tool", "x"), ("assistant", "ho"))}, "a message of a tool"),
        (
            {"messages": [*HI, {"role": "assistant", "content": None, "tool_calls": [1]}]},
            "a message of a tool",
        ),
        ({"messages": [*HI, {"role": "assistant", "content": None}]}, 'null "content"'),
        ({"messages": None}, 'null "messages"'),
        ({"messages": HO + HI + HO}, "the conversation begins with an assistant turn"),
        ({"messages": said(("user", " ")) + HO}, "empty user turn"),
        ({"messages": HI + HO + said(("user", "")) + HO}, "empty user turn"),
        ({"messages": HI + said(("assistant", "\n"))}, "empty assistant turn"),
        ({"messages": said(("system", "s")) + HO}, "the conversation begins with an assistant turn"),
        ({"messages": HI}, "no assistant turn"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, *HO]},
            "a part of a message is not text",
        ),
    ],
)
def test_what_cannot_be_used_is_dropped_with_its_reason(jsonl, row, why):
    loaded = read_demonstrations(jsonl({"messages": HI + HO}, row))
    assert (len(loaded.rows), loaded.dropped) == (1, [(2, why)])


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"chosen": HI + HO, "rejected": HI + HO}, "chosen and rejected are the same text"),
        ({"chosen": HI + HO, "rejected": HI + NO + HI}, "the rejected side is not one assistant turn"),
        ({"chosen": HI + HO, "rejected": said(("user", "x")) + NO}, "no user turn"),
        ({"chosen": HI + HO, "rejected": HI + said(("assistant", " "))}, "empty rejected response"),
    ],
)
def test_a_pair_of_chats_that_cannot_be_compared_is_dropped(jsonl, row, why):
    loaded = read_preferences(jsonl({"chosen": HI + HO, "rejected": HI + NO}, row))
    assert len(loaded.rows) == 1 and loaded.dropped[0][1].startswith(why)


def test_the_prompt_of_ultrafeedback_must_be_one_of_its_turns(jsonl):
    rows = [{"prompt": prompt, "chosen": HI + HO, "rejected": HI + NO} for prompt in ("hi\n", "other")]
    loaded = read_preferences(jsonl(*rows))
    assert len(loaded.rows) == 1
    assert loaded.dropped == [(2, "the prompt is none of the user turns that both sides begin with")]


def test_consecutive_turns_of_one_role_and_a_last_question_are_kept_or_left_out_as_said(jsonl):
    turns = said(
        ("system", ""), ("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"), ("user", "e")
    )
    loaded = read_demonstrations(jsonl({"messages": turns}))
    (row,) = loaded.rows
    assert row.prompt == "\n\nSystem: \n\nHuman: a\n\nHuman: b\n\nAssistant:"
    assert row.segments == ((" c", True), ("\n\nAssistant:", False), (" d", True))
    assert "what follows the last one is left out" in loaded.decision


@pytest.mark.parametrize(
    ("read", "row", "question"),
    [
        (
            read_demonstrations,
            {"messages": HI + HO, "prompt": "p", "completion": "c"},
            r'which is meant\? --format messages reads {"messages"} .*; --format completion reads',
        ),
        (
            read_demonstrations,
            {"messages": HI + HO, "text": "t"},
            'one of "text" and "messages", found both; which is meant',
        ),
        (
            read_preferences,
            {"prompt": PROMPT, "chosen": PROMPT + " ho", "rejected": PROMPT + " no"},
            'both say "prompt" again; which is meant.*--format transcripts.*--format preferences',
        ),
        (
            read_preferences,
            {"prompt": "hi", "chosen": PROMPT + " ho", "rejected": PROMPT + " no"},
            'both say "prompt" again; which is meant',
        ),
        (
            read_preferences,
            {"chosen": "The sky is blue", "rejected": "The sky is green"},
            "found no such turn in neither; what is the prompt.*--format common-prefix",
        ),
        (
            read_preferences,
            {"chosen": PROMPT + " ho", "rejected": "no"},
            "found no such turn in one of them; what is the prompt",
        ),
        (
            read_prompts,
            {"prompt": "p", "messages": HI + HO},
            "--format prompts reads .*--format messages reads",
        ),
        (
            read_demonstrations,
            {"messages": HI + NO, "chosen": HI + HO, "rejected": HI + NO},
            "--format messages reads .*--format implicit reads",
        ),
    ],
)
def test_where_two_readings_differ_the_question_is_asked(jsonl, read, row, question):
    path = jsonl(row)
    with pytest.raises(InputError, match=question) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}:1: expected ")


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("transcripts", {"prompt": "hi", "chosen": PROMPT + " ho", "rejected": PROMPT + " no"}, PAIR),
        (
            "preferences",
            {"prompt": "hi", "chosen": "hi ho", "rejected": "hi no"},
            Preference("hi", "hi ho", "hi no", 1),
        ),
        (
            "common-prefix",
            {"chosen": "The sky is blue", "rejected": "The sky is green"},
            Preference("The sky is", " blue", " green", 1),
        ),
        (
            "common-prefix",
            {"chosen": "The sky is grey", "rejected": "The sky is green"},
            Preference("The sky is gre", "y", "en", 1),
        ),
    ],
)
def test_the_choice_answers_the_question(jsonl, format, row, expected):
    loaded = read_preferences(jsonl(row), format=format)
    assert loaded.rows == [expected]
    assert f"because --format {format} says so" in loaded.decision


@pytest.mark.parametrize(
    ("format", "complaint"),
    [
        ("alpaca", "expected a format of preferences .*, and that gives none"),
        ("yaml", "expected a format of preferences .*common-prefix.*, and that is no format"),
        (
            "preferences",
            r'expected {"prompt", "chosen", "rejected"} for --format preferences, found {"chosen"',
        ),
        (
            "implicit",
            r'of the kinds that --format implicit reads, found {"chosen": "text", "rejected": "text"}',
        ),
    ],
)
def test_a_choice_that_does_not_fit_says_why(jsonl, format, complaint):
    with pytest.raises(InputError, match=complaint):
        read_preferences(jsonl({"chosen": PROMPT + " ho", "rejected": PROMPT + " no"}), format=format)


def test_the_kinds_of_values_are_told_where_the_columns_are_known_and_their_values_are_not(jsonl):
    with pytest.raises(InputError, match=r'of text or messages, found {"prompt": "text"}'):
        read_preferences(jsonl({"prompt": "p"}))


def test_every_format_can_be_chosen_by_one_name():
    for purpose in (DEMONSTRATIONS, PREFERENCES, PROMPTS):
        keys = [found.key for found in purpose.formats]
        assert len(keys) == len(set(keys)) and set(keys) <= set(KEYS)


def test_rows_are_read_only_as_they_are_asked_for(jsonl):
    opened = open_demonstrations(jsonl({"prompt": "p", "completion": "c"}, "{", name="a.jsonl"))
    assert next(opened.rows) == Demonstration("p", (("c", True),), 1)
    with pytest.raises(InputError, match="a.jsonl:2: expected one JSON object"):
        next(opened.rows)


words = st.text(st.sampled_from("ab \n:é"), max_size=8)
spoken = words.filter(lambda text: text.strip())
role_pairs = st.lists(st.tuples(spoken, spoken), max_size=2)
chats = st.builds(
    lambda system, pairs, last: (
        *([] if system is None else [Message("system", system)]),
        *(
            Message(role, text)
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ),
        Message("user", last),
    ),
    st.none() | words,
    role_pairs,
    spoken,
)
facts = st.none() | st.dictionaries(words, st.integers())


@given(messages=chats)
def test_a_transcript_and_its_messages_say_the_same(messages):
    assert messages_of(prompt_text(messages)) == messages


def read_back(read, record, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(json.dumps(row_of(record)) + "\n", encoding="utf-8")
    loaded = read(path)
    assert len(loaded.rows) == 1, loaded.dropped
    return replace(loaded.rows[0], line=record.line)


@given(messages=st.none() | chats, prompt=spoken, chosen=spoken, rejected=spoken, facts=facts)
def test_a_record_read_from_its_row_is_the_same_record(
    tmp_path_factory, messages, prompt, chosen, rejected, facts
):
    text = prompt if messages is None else prompt_text(messages)
    if chosen == rejected:
        return
    # An HH response need not begin with a space, and survives also then.
    pair = Preference(text, chosen, rejected, 7, messages)
    assert read_back(read_preferences, pair, tmp_path_factory) == pair
    shown = demonstration_of(pair)
    assert read_back(read_demonstrations, shown, tmp_path_factory) == shown
    asked = replace(prompt_of(pair), facts=facts)
    assert read_back(read_prompts, asked, tmp_path_factory) == asked


def test_responses_that_say_the_prompt_again_are_read_back_without_a_question(tmp_path_factory):
    pair = Preference("hi", "hi ho", "hi no", 7)
    assert read_back(read_preferences, pair, tmp_path_factory) == pair


def test_a_demonstration_of_several_answers_is_read_back(jsonl, tmp_path_factory):
    (row,) = read_demonstrations(jsonl({"messages": HI + HO + HI + NO})).rows
    assert read_back(read_demonstrations, row, tmp_path_factory) == row
    with pytest.raises(ValueError, match="one segment, or one with messages"):
        row_of(Demonstration("p", (("a", True), ("b", False)), 1))


def test_messages_that_contradict_their_transcript_are_refused(jsonl):
    row = row_of(PAIR) | {"prompt_messages": said(("user", "other"))}
    with pytest.raises(
        InputError, match='"prompt_messages" to be the messages of the transcript in "prompt"'
    ):
        read_preferences(jsonl(row))
