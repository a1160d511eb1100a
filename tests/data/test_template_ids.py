"""Every published template: our ids are those of transformers, prompts of training are those of sampling."""

from pathlib import Path
from typing import Any

import pytest

from minirlhf.data.batches import tokenise_demonstrations, tokenise_preferences, tokenise_prompts
from minirlhf.data.conversation import demonstration, preference, prompt_text
from minirlhf.data.records import Demonstration, Example, Message, PairExample, Prompt
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.chat_templates import CASES, Case, write_checkpoint

SYSTEM = Message("system", "Be kind.")
FIRST = (Message("user", "What is it?"), Message("assistant", "A cat."))
SECOND = (Message("user", "the mat?"), Message("assistant", "the cat sat"))


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request, tmp_path_factory) -> tuple[Case, Path, Tokenizer]:
    case = CASES[request.param]
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), case)
    return case, folder, load_tokenizer(folder)


def theirs(folder: Path, case: Case, messages, *, ask: bool) -> list[int]:
    """transformers' ids; with BOS where only the tokenizer itself writes it."""
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=case.bos,
        eos_token=case.eos,
        chat_template=case.template,
    )
    chat = [message._asdict() for message in messages]
    ids: Any = tokenizer.apply_chat_template(
        chat, add_generation_prompt=ask, tokenize=True, return_dict=False
    )
    bos = tokenizer.get_vocab()[case.bos] if case.adds_bos and case.bos else None
    return ids if bos is None or ids[0] == bos else [bos, *ids]


def prompt_ids(tokenizer: Tokenizer, messages) -> list[int]:
    rows = [Prompt(prompt_text(messages), None, 1, tuple(messages))]
    (ids,) = tokenise_prompts(rows, tokenizer, max_length=1000, overlong="error").examples
    return ids


def trained(tokenizer: Tokenizer, row: Demonstration) -> Example:
    (example,) = tokenise_demonstrations([row], tokenizer, max_length=1000, overlong="error").examples
    return example


def paired(tokenizer: Tokenizer, messages, chosen: str, rejected: str) -> PairExample:
    rows = [preference(messages, [Message("assistant", chosen)], [Message("assistant", rejected)], 1)]
    (pair,) = tokenise_preferences(rows, tokenizer, max_length=1000, overlong="error").examples
    return pair


def answers(example: Example) -> list[list[int]]:
    """The trained stretches of an example."""
    stretches: list[list[int]] = []
    for i, (id, counts) in enumerate(zip(example.ids, example.mask, strict=True)):
        if counts:
            if not example.mask[i - 1]:
                stretches.append([])
            stretches[-1].append(id)
    return stretches


def test_the_terminator_is_the_templates_own(checkpoint):
    case, _, tokenizer = checkpoint
    assert tokenizer.backend.id_to_token(tokenizer.eos_id) == case.terminator
    bos = None if tokenizer.bos_id is None else tokenizer.backend.id_to_token(tokenizer.bos_id)
    assert bos == (case.bos if case.adds_bos else None)


@pytest.mark.parametrize("history", [(), FIRST, (SYSTEM,), (SYSTEM, *FIRST)], ids=len)
def test_a_prompt_has_the_ids_of_transformers(checkpoint, history):
    case, folder, tokenizer = checkpoint
    messages = (*history, SECOND[0])
    if SYSTEM in history and case.system != "kept":
        if "leaves out" not in case.system:
            rows = [Prompt("p", None, 7, messages)]
            report = tokenise_prompts(rows, tokenizer, max_length=1000, overlong="error").report
            assert report.dropped == [(7, case.system)]
        return
    ids = prompt_ids(tokenizer, messages)
    expected = theirs(folder, case, messages, ask=True)
    if case.template == CASES["Vicuna"].template and FIRST[1] in history:
        # It writes no terminator; we put one behind the answer of the history, as behind every trained one.
        at = ids.index(tokenizer.eos_id)
        assert ids.count(tokenizer.eos_id) == 1
        assert tokenizer.decode(ids[:at]).endswith("A cat.")
        return
    assert ids == expected


@pytest.mark.parametrize("system", [(), (SYSTEM,)], ids=["alone", "system"])
@pytest.mark.parametrize("turns", [FIRST, (*FIRST, *SECOND)], ids=["one", "two"])
def test_a_demonstration_has_the_ids_of_transformers_up_to_its_last_terminator(checkpoint, turns, system):
    case, folder, tokenizer = checkpoint
    row = demonstration((*system, *turns), 3)
    if system and case.system != "kept":
        report = tokenise_demonstrations([row], tokenizer, max_length=1000, overlong="error").report
        assert report.dropped == [(3, case.system)]
        return
    example = trained(tokenizer, row)
    expected = theirs(folder, case, row.messages, ask=False)
    if case.template == CASES["Vicuna"].template:
        without = [id for id in example.ids if id != tokenizer.eos_id]
        assert len(example.ids) - len(without) == len(turns) // 2
        assert tokenizer.decode(without).replace(" ", "") == tokenizer.decode(expected).rstrip().replace(
            " ", ""
        )
    else:
        assert example.ids == expected[: len(example.ids)]
        rest = tokenizer.decode(expected[len(example.ids) :])
        assert rest.replace("<|endoftext|>", "").strip() == ""
    stretches = answers(example)
    assert len(stretches) == len(turns) // 2
    for stretch, said in zip(stretches, turns[1::2], strict=True):
        assert stretch[-1] == tokenizer.eos_id and stretch.count(tokenizer.eos_id) == 1
        assert tokenizer.decode(stretch[:-1]).strip() == said.content
    assert example.ids[-1] == tokenizer.eos_id


@pytest.mark.parametrize("turns", [FIRST, (*FIRST, *SECOND)], ids=["one", "two"])
def test_what_is_trained_after_is_what_is_sampled_from(checkpoint, turns):
    _, _, tokenizer = checkpoint
    example, end = trained(tokenizer, demonstration(turns, 1)), 0
    for i, end in enumerate(
        at for at, counts in enumerate(example.mask) if counts and not example.mask[at - 1]
    ):
        assert example.ids[:end] == prompt_ids(tokenizer, turns[: 2 * i + 1])
    asked = turns[:-1]
    chosen = paired(tokenizer, asked, turns[-1].content, " a mat").chosen
    assert (chosen.ids, chosen.prompt_length) == (example.ids, end)
    for side in paired(tokenizer, asked, "it is", "a mat."):
        assert side.ids[: side.prompt_length] == prompt_ids(tokenizer, asked)
        assert side.ids[-1] == tokenizer.eos_id and answers(side)[0].count(tokenizer.eos_id) == 1


def test_exactly_one_bos_begins_every_row_where_there_is_one(checkpoint):
    case, _, tokenizer = checkpoint
    written = "bos_token" in case.template
    bos = tokenizer.backend.token_to_id(case.bos) if case.bos and (written or case.adds_bos) else None
    chat = trained(tokenizer, demonstration(FIRST, 1)).ids
    plain = trained(tokenizer, Demonstration("the cat", ((" sat", True),), 1)).ids
    if bos is not None:
        assert chat[0] == bos and chat.count(bos) == 1
    assert (plain[0], plain.count(plain[0])) == (tokenizer.bos_id, 1) or tokenizer.bos_id is None
    assert plain[-1] == tokenizer.eos_id and plain.count(tokenizer.eos_id) == 1


def test_special_tokens_that_people_type_are_text(checkpoint):
    case, _, tokenizer = checkpoint
    plain = trained(tokenizer, demonstration(FIRST, 1)).ids
    typed = " ".join(case.specials)
    hostile = (Message("user", f"What{typed}is it?"), Message("assistant", f"A {typed} cat."))
    ids = trained(tokenizer, demonstration(hostile, 1)).ids
    for name in case.specials:
        if name != "<unk>":
            id = tokenizer.backend.token_to_id(name)
            assert ids.count(id) == plain.count(id), name
    if case.pieces == "bytes":
        assert typed in tokenizer.decode(ids)


@pytest.mark.parametrize("said", ["\nA cat.", "  A cat", "A cat.\n\n", "\n\n \n A cat \n"])
def test_whitespace_around_an_answer_is_kept_or_taken_as_the_template_has_it(checkpoint, said):
    case, _, tokenizer = checkpoint
    example = trained(tokenizer, demonstration((FIRST[0], Message("assistant", said)), 1))
    assert example.ids[: example.prompt_length] == prompt_ids(tokenizer, FIRST[:1])
    (stretch,) = answers(example)
    kept = said.strip() if "trim" in case.template or "strip()" in case.template else said
    assert stretch[-1] == tokenizer.eos_id
    text = tokenizer.decode(stretch[:-1])
    assert kept.strip() in text and kept.rstrip(" ") in text + " " or case.strips or case.pieces != "bytes"
