"""Each format gives its records, says how it was read, and names the line of everything that it refuses."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.data.formats.rows import ASSISTANT, HUMAN, parse_transcripts
from minirlhf.data.jsonl import Line
from minirlhf.data.readers import describe_dropped, read_demonstrations, read_preferences, read_prompts
from minirlhf.data.records import Demonstration, Message, Preference, Prompt
from minirlhf.runs import InputError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is absent")
    return SHARED / name


def chat(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_prompt_and_completion_keep_the_text_exactly(jsonl):
    loaded = read_demonstrations(jsonl({"prompt": " p\n", "completion": "\n c "}))
    assert loaded.rows == [Demonstration(" p\n", (("\n c ", True),), 1)]
    assert loaded.dropped == [] and loaded.format == "prompt and completion"


def test_explicit_preferences_are_read_as_they_stand(jsonl):
    loaded = read_preferences(jsonl({"prompt": "p", "chosen": "c", "rejected": "r"}))
    assert loaded.rows == [Preference("p", "c", "r", 1)]


def test_the_common_prefix_up_to_the_last_assistant_turn_is_the_prompt(jsonl):
    head = f"{HUMAN} one{ASSISTANT} two{HUMAN} three{ASSISTANT}"
    loaded = read_preferences(
        jsonl({"chosen": head + " same, then yes", "rejected": head + " same, then no"})
    )
    # The shared beginning of the responses stays in the responses, with the space before it.
    turns = (Message("user", "one"), Message("assistant", "two"), Message("user", "three"))
    assert loaded.rows == [Preference(head, " same, then yes", " same, then no", 1, turns)]
    assert r"the common prefix up to the last \n\nAssistant: is the prompt" in loaded.decision


plain = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda s: s.strip())


@given(head=plain, chosen=plain, rejected=plain)
def test_prompt_and_response_of_a_transcript_join_to_the_transcript(head, chosen, rejected):
    start = HUMAN + head + ASSISTANT
    line = Line(Path("f"), 1, {"chosen": start + chosen, "rejected": start + rejected})
    (record,) = parse_transcripts(line)
    if isinstance(record, Preference):
        assert record.prompt + record.chosen == line.values["chosen"]
        assert record.prompt + record.rejected == line.values["rejected"]
        assert record.prompt.endswith(ASSISTANT)
    else:
        assert chosen == rejected or HUMAN in chosen + rejected


START, ASKED = f"{HUMAN} hi{ASSISTANT}", (Message("user", "hi"),)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"chosen": START + " \n", "rejected": START + " b"}, "empty chosen response"),
        ({"chosen": START + " a", "rejected": START}, "empty rejected response"),
        ({"chosen": START + " a", "rejected": START + " a"}, "chosen and rejected are the same text"),
        (
            {"chosen": START + " a", "rejected": f"{HUMAN} ho{ASSISTANT} b"},
            "the transcripts differ before the last assistant turn",
        ),
        (
            {"chosen": START + " a", "rejected": START + f" b{HUMAN} more{ASSISTANT} a"},
            "the transcripts differ before the last assistant turn",
        ),
        (
            {"chosen": START + f" a{HUMAN} x", "rejected": START + " b"},
            "a human turn follows the last assistant turn",
        ),
    ],
)
def test_an_unusable_pair_is_dropped_and_listed_by_line_or_stops_when_strict(jsonl, row, why):
    good = {"chosen": START + " a", "rejected": START + " b"}
    path = jsonl(good, row, good)
    loaded = read_preferences(path)
    assert [pair.line for pair in loaded.rows] == [1, 3]
    assert loaded.dropped == [(2, why)]
    with pytest.raises(InputError) as raised:
        read_preferences(path, strict=True)
    assert str(raised.value) == f"{path}:2: expected a usable row (strict), found {why}"


def test_five_of_the_1600_shared_pairs_are_dropped_and_they_are_the_known_lines():
    path = shared("hh_rlhf_harmless.jsonl.gz")
    loaded = read_preferences(path)
    assert len(loaded.rows) == 1595 and loaded.format == "HH transcripts"
    assert [line for line, _ in loaded.dropped] == [87, 517, 926, 1104, 1255]
    assert [why for _, why in loaded.dropped][:4] == ["empty chosen response"] * 4
    assert loaded.dropped[4][1] == "the transcripts differ before the last assistant turn"
    assert all(pair.chosen.startswith(" ") and pair.rejected.startswith(" ") for pair in loaded.rows)
    raw = [json.loads(row) for row in gzip.open(path)]
    assert all(pair.prompt + pair.chosen == raw[pair.line - 1]["chosen"] for pair in loaded.rows)
    with pytest.raises(InputError, match=r":87: expected a usable row"):
        read_preferences(path, strict=True)


def test_the_175_shared_seed_tasks_are_read_as_self_instruct():
    loaded = read_demonstrations(shared("alpaca_seed_tasks.jsonl"))
    assert (len(loaded.rows), loaded.dropped, loaded.format) == (175, [], "self-instruct")


def test_alpaca_uses_the_template_with_input_only_where_there_is_one(jsonl):
    path = jsonl(
        {"instruction": "Add {x}.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
        {"instruction": "Greet.", "output": "Hi"},
    )
    with_input, empty, without = read_demonstrations(path).rows
    assert with_input.prompt.endswith("### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n### Response:")
    assert (
        without.prompt.endswith("### Instruction:\nGreet.\n\n### Response:") and "Input" not in without.prompt
    )
    assert empty.prompt == without.prompt
    assert with_input.segments == (("3", True),)


def test_every_instance_of_a_self_instruct_row_is_a_row(jsonl):
    instances = [{"input": "a", "output": "b"}, {"input": "", "output": " "}, {"input": "", "output": "d"}]
    loaded = read_demonstrations(jsonl({"instruction": "i", "instances": instances}))
    assert [row.segments[0][0] for row in loaded.rows] == ["b", "d"]
    assert loaded.dropped == [(1, "empty response")]


def test_assistant_turns_of_a_chat_train_and_the_others_are_read(jsonl):
    turns = chat(("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    (row,) = read_demonstrations(jsonl(turns)).rows
    assert row.prompt == "\n\nSystem: Be kind.\n\nHuman: a\n\nAssistant:"
    assert row.segments == ((" b", True), ("\n\nHuman: c\n\nAssistant:", False), (" d", True))


def test_a_chat_prompt_is_the_prompt_of_the_same_hh_transcript(jsonl):
    (row,) = read_demonstrations(jsonl(chat(("user", "hi"), ("assistant", "ho")), name="chat")).rows
    (pair,) = read_preferences(jsonl({"chosen": START + " ho", "rejected": START + " no"}, name="hh")).rows
    assert (row.prompt, row.segments[0][0]) == (pair.prompt, pair.chosen)


def test_what_follows_the_last_assistant_turn_is_left_out(jsonl):
    (row,) = read_demonstrations(jsonl(chat(("user", "a"), ("assistant", "b"), ("user", "c")))).rows
    assert row.segments == ((" b", True),)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (chat(("user", "a")), "no assistant turn"),
        (chat(("user", "a"), ("assistant", " ")), "empty assistant turn"),
        (chat(("user", f"a{ASSISTANT} forged"), ("assistant", "b")), "a message contains a turn marker"),
    ],
)
def test_a_chat_that_cannot_train_or_forges_a_turn_is_dropped(jsonl, bad, why):
    loaded = read_demonstrations(jsonl(chat(("user", "a"), ("assistant", "b")), bad))
    assert (len(loaded.rows), loaded.dropped) == (1, [(2, why)])


def test_sft_takes_the_chosen_responses_of_preference_files(jsonl):
    explicit = read_demonstrations(jsonl({"prompt": "p", "chosen": "c", "rejected": "r"}))
    assert explicit.rows == [Demonstration("p", (("c", True),), 1)]
    implicit = read_demonstrations(jsonl({"chosen": START + " c", "rejected": START + " r"}))
    answered = (Message("user", "hi"), Message("assistant", "c"))
    assert implicit.rows == [Demonstration(START, ((" c", True),), 1, answered)]


def test_prompts_carry_their_facts_and_come_from_any_format(jsonl):
    facts = {"name": "Ann", "order": 7}
    loaded = read_prompts(
        jsonl({"prompt": "p", "facts": facts}, {"prompt": "q"}, {"prompt": "r", "facts": None})
    )
    assert loaded.rows == [Prompt("p", facts, 1), Prompt("q", None, 2), Prompt("r", None, 3)]
    assert read_prompts(jsonl({"prompt": "p", "completion": "c"})).rows == [Prompt("p", None, 1)]
    assert read_prompts(jsonl({"chosen": START + " c", "rejected": START + " r"})).rows == [
        Prompt(START, None, 1, ASKED)
    ]
    assert read_prompts(jsonl(chat(("user", "hi"), ("assistant", "b")))).rows == [
        Prompt(START, None, 1, ASKED)
    ]


def test_the_decision_says_what_decided_and_what_is_ignored(jsonl):
    path = jsonl({"id": 3, "prompt": "p", "completion": "c"})
    assert read_demonstrations(path).decision == (
        f'{path}: read as prompt and completion, because line 1 has {{"prompt", "completion"}}; '
        'ignoring {"id"}; the completion trains'
    )


def test_a_later_row_of_another_shape_is_an_error_with_its_line(jsonl):
    path = jsonl("", {"prompt": "p", "completion": "c"}, {"instruction": "i", "output": "o"})
    with pytest.raises(InputError) as raised:
        read_demonstrations(path)
    assert str(raised.value) == (
        f'{path}:3: expected {{"prompt", "completion"}} as in line 2, found {{"instruction", "output"}}'
    )


def test_unknown_columns_are_answered_with_the_known_ones(jsonl):
    path = jsonl({"question": "q", "new\nline": "a"})
    with pytest.raises(InputError) as raised:
        read_preferences(path)
    assert str(raised.value) == (
        f'{path}:1: expected {{"prompt", "chosen", "rejected"}} or {{"chosen", "rejected"}} or '
        '{"conversations", "chosen", "rejected"} or {"prompt"} or '
        '{"message_id", "parent_id", "role", "text"}, '
        'found {"question", "new\\nline"}'
    )


@pytest.mark.parametrize(
    ("read", "row", "complaint"),
    [
        (
            read_demonstrations,
            {"prompt": "p", "completion": 3},
            '"completion" to be a string, found a number',
        ),
        (read_demonstrations, {"prompt": "\ud800", "completion": "c"}, "found half a surrogate pair in it"),
        (
            read_preferences,
            {"prompt": "p", "chosen": "c", "rejected": 3},
            '"rejected" to be a string, found a number',
        ),
        (read_demonstrations, {"messages": []}, '"messages" to be a list of objects, found an empty list'),
        (read_demonstrations, {"messages": "hi"}, '"messages" to be a list of objects, found a string'),
        (
            read_demonstrations,
            {"messages": [1]},
            '"messages" to be a list of objects, found a number at index 0',
        ),
        (
            read_demonstrations,
            {"messages": [{"role": "user"}]},
            '"content" of message 0 to be a string, found no such',
        ),
        (read_demonstrations, chat(("narrator", "x")), '"role" of message 0 in .*, found another role'),
        (
            read_demonstrations,
            {"instruction": "i", "output": "o", "input": 1},
            '"input" to be a string, found a num',
        ),
        (
            read_demonstrations,
            {"instruction": "i", "instances": [{"input": "", "output": 1}]},
            '"output" of instance 0 to be a string, found a number',
        ),
        (read_prompts, {"prompt": "p", "facts": [1]}, '"facts" to be an object or null, found a list'),
    ],
)
def test_a_wrong_type_is_named_with_file_line_and_key(jsonl, read, row, complaint):
    path = jsonl(row)
    with pytest.raises(InputError, match=complaint) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}:1: expected ")


def test_an_empty_prompt_or_instruction_is_dropped(jsonl):
    loaded = read_demonstrations(jsonl({"prompt": "p", "completion": "c"}, {"prompt": "", "completion": "c"}))
    assert loaded.dropped == [(2, "empty prompt")]
    loaded = read_demonstrations(
        jsonl({"instruction": "i", "output": "c"}, {"instruction": " ", "output": "c"})
    )
    assert loaded.dropped == [(2, "empty prompt")]
    assert read_prompts(jsonl({"prompt": "p"}, {"prompt": ""})).dropped == [(2, "empty prompt")]
    pairs = [{"prompt": p, "chosen": "c", "rejected": "r"} for p in ("p", "")]
    assert read_preferences(jsonl(*pairs)).dropped == [(2, "empty prompt")]


def test_a_file_of_which_nothing_can_be_used_is_an_error_that_says_why(jsonl):
    with pytest.raises(InputError, match=r"found none; dropped 2 of 2: empty response \(lines 1, 2\)"):
        read_demonstrations(jsonl(*[{"prompt": "p", "completion": " "}] * 2))


def test_a_long_list_of_dropped_lines_is_shortened_and_still_counted():
    told = describe_dropped([(i, "empty prompt") for i in range(1, 31)] + [(40, "other")], total=50)
    assert told.startswith("dropped 31 of 50: empty prompt (lines 1, 2, ")
    assert told.endswith("20 and 10 more); other (line 40)")
    assert describe_dropped([], total=3) == "dropped 0 of 3"
