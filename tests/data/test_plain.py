"""Plain text for pretraining."""

from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers

from minirlhf.data.plain import read_texts, tokenise_texts
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.runs import InputError


def letters() -> Tokenizer:
    vocabulary = {"<|endoftext|>": 0} | {letter: i + 1 for i, letter in enumerate("abcdefgh")}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return Tokenizer(Path("letters.json"), 0, len(vocabulary), backend)


def test_every_token_but_the_first_is_trained_and_eos_ends_the_text() -> None:
    (example,) = tokenise_texts([[("abc", True)]], letters(), max_length=8)
    assert example.ids == [1, 2, 3, 0]
    assert example.mask == [False, True, True, True]
    assert example.prompt_length == 1


def test_a_bos_stands_once_in_front_of_a_text_and_is_only_read() -> None:
    (example,) = tokenise_texts([[("abc", True)]], replace(letters(), bos_id=8), max_length=8)
    assert example.ids == [8, 1, 2, 3, 0]
    assert example.mask == [False, True, True, True, True]


@pytest.mark.parametrize("max_length", [2, 3, 4, 5, 6, 9])
def test_windows_of_a_long_text_train_every_token_but_the_first_exactly_once(max_length: int) -> None:
    text = "abcdefgh"
    examples = tokenise_texts([[(text, True)]], letters(), max_length=max_length)
    trained = [id_ for e in examples for id_, counts in zip(e.ids, e.mask, strict=True) if counts]
    assert trained == [*range(2, 9), 0]
    assert all(len(e.ids) <= max_length for e in examples)
    assert all(sum(e.mask) == len(e.ids) - 1 > 0 for e in examples)


def test_texts_do_not_run_into_each_other() -> None:
    examples = tokenise_texts([[("ab", True)], [("cd", True)]], letters(), max_length=8)
    assert [e.ids for e in examples] == [[1, 2, 0], [3, 4, 0]]


def test_a_window_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2, got 1"):
        tokenise_texts([[("ab", True)]], letters(), max_length=1)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ('{"txt": "a"}', "no such key"),
        ('{"text": ""}', "an empty one"),
        ('{"text": 3}', "a number"),
        ('{"spans": "a"}', "a string"),
        ('{"spans": []}', "an empty one"),
        ('{"spans": [["a", 1]]}', "found ..a., 1"),
        ('{"spans": [["", true]]}', "found"),
        ('{"spans": [["a", false]]}', "none that is trained"),
    ],
)
def test_a_row_without_text_is_named_by_file_and_line(tmp_path: Path, row: str, found: str) -> None:
    file = tmp_path / "plain.jsonl"
    file.write_text('{"text": "good"}\n' + row + "\n")
    with pytest.raises(InputError, match=f"plain.jsonl:2: .*{found}"):
        list(read_texts(file))


def test_texts_come_back_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "plain.jsonl"
    file.write_text('{"text": " a\\n"}\n{"text": "b"}\n')
    assert list(read_texts(file)) == [[(" a\n", True)], [("b", True)]]


def test_only_the_spans_that_say_so_are_trained() -> None:
    spans = [("ab", False), ("cd", True), ("e", False), ("f", True)]
    (example,) = tokenise_texts([spans], letters(), max_length=9)
    assert example.ids == [1, 2, 3, 4, 5, 6, 0]
    assert example.mask == [False, False, True, True, False, True, True]


def test_eos_is_trained_only_after_a_trained_span() -> None:
    (example,) = tokenise_texts([[("ab", True), ("c", False)]], letters(), max_length=9)
    assert example.ids[-1] == 0 and example.mask == [False, True, False, False]


def test_a_window_in_which_nothing_is_trained_is_left_out() -> None:
    spans = [("abcdef", False), ("gh", True)]
    examples = tokenise_texts([spans], letters(), max_length=4)
    assert [e.ids for e in examples] == [[4, 5, 6, 7], [7, 8, 0]]
    assert [e.mask for e in examples] == [[False, False, False, True], [False, True, True]]


def test_spans_come_back_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "plain.jsonl"
    file.write_text('{"spans": [["a", false], ["b", true]]}\n{"text": "c"}\n')
    assert list(read_texts(file)) == [[("a", False), ("b", True)], [("c", True)]]
