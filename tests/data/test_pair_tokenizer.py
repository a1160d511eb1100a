"""A pair of texts is joined as transformers joins it, and cut where it cuts only the second."""

from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from minirlhf.data.pair_tokenizer import load_pair_tokenizer
from minirlhf.runs import InputError

WORDS = ["<s>", "</s>", "<unk>", "[CLS]", "[SEP]", "red", "lamp", "a", "want", "no", "."]
PROMPTS = ["a red lamp", "want", "", "a </s> lamp", "no . " * 2]
RESPONSES = ["no .", "", "lamp", "red <s> lamp", "a lamp a red lamp . " * 3]
PROCESSORS = {
    "template": processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 3), ("[SEP]", 4)],
    ),
    "bert": processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3)),
    "roberta": processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=False),
}


def write(path: Path, kind: str | None) -> None:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(WORDS[:5])
    if kind is not None:
        backend.post_processor = PROCESSORS[kind]
    # settings of a file that would change data unseen
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(path))


@pytest.mark.parametrize("kind", PROCESSORS)
def test_rows_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "tokenizer.json", kind)
    context = 12
    ours = load_pair_tokenizer(tmp_path, context=context)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    theirs.backend_tokenizer.encode_special_tokens = True
    assert ours.vocab_size == len(WORDS)
    rows = ours.encode_all(PROMPTS, RESPONSES)
    assert [row.cut for row in rows] == [False, False, False, False, True]
    # as a batch: called with a single empty second text, transformers takes it for none
    wanted = theirs(
        PROMPTS,
        RESPONSES,
        truncation="only_second",
        max_length=context,
        padding=False,
        return_token_type_ids=True,
    )
    assert [row.ids for row in rows] == wanted["input_ids"]
    assert [row.segments for row in rows] == wanted["token_type_ids"]
    assert [len(row.ids) == context for row in rows] == [row.cut for row in rows]


def test_a_prompt_may_leave_room_for_one_token_and_no_less(tmp_path: Path) -> None:
    write(tmp_path / "tokenizer.json", "template")
    ours = load_pair_tokenizer(tmp_path / "tokenizer.json", context=8)
    assert ours.longest_prompt == 4 and ours.prompt_lengths(["a red lamp .", "", "a " * 9]) == [4, 0, 9]
    (row,) = ours.encode_all(["a red lamp ."], ["no no"])
    assert row.ids == [3, 7, 5, 6, 10, 4, 9, 4] and row.cut
    with pytest.raises(ValueError, match="a prompt of 5 tokens leaves no room for a response"):
        ours.encode_all(["a red lamp . a"], [""])


def test_a_tokenizer_that_joins_nothing_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "tokenizer.json", None)
    with pytest.raises(InputError, match="expected a post-processor that joins two texts"):
        load_pair_tokenizer(tmp_path, context=8)
