"""What is trained is, id for id, the prompt, the response and one EOS; what is lost is counted and listed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.data.batches import (
    epoch_order,
    tokenise_demonstrations,
    tokenise_preferences,
    tokenise_prompts,
    validate,
    validate_pairs,
)
from minirlhf.data.records import (
    Demonstration,
    PairExample,
    Pairs,
    Preference,
    Prompt,
    collate,
    collate_pairs,
    join,
)
from minirlhf.runs import InputError

text = st.text("abc <|endoftxf>\n", max_size=30)
words = text.filter(lambda s: s.strip())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(prompt=words, response=words)
def test_a_demonstration_is_prompt_ids_then_response_ids_then_one_eos(tokenizer, prompt, response):
    row = Demonstration(prompt, ((response, True),), 1)
    (example,) = tokenise_demonstrations([row], tokenizer, max_length=1000, overlong="error").examples
    head, tail = tokenizer.encode(prompt), tokenizer.encode(response)
    assert example.ids == [*head, *tail, tokenizer.eos_id]
    assert example.ids.count(tokenizer.eos_id) == 1
    assert example.mask == [False] * len(head) + [True] * (len(tail) + 1)
    assert example.prompt_length == len(head)
    # The prompt that was trained after is the prompt that is sampled from.
    (sampled,) = tokenise_prompts(
        [Prompt(prompt, None, 1)], tokenizer, max_length=1000, overlong="error"
    ).examples
    assert sampled == example.ids[: example.prompt_length]


def test_eos_ends_each_trained_turn_of_a_chat_and_no_other(tokenizer):
    segments = ((" it", True), ("\n\nHuman: a\n\nAssistant:", False), (" cat", True))
    rows = [Demonstration("Human:", segments, 1)]
    (example,) = tokenise_demonstrations(rows, tokenizer, max_length=100, overlong="error").examples
    trained = [i for i, counts in zip(example.ids, example.mask, strict=True) if counts]
    eos = tokenizer.eos_id
    assert trained == [*tokenizer.encode(" it"), eos, *tokenizer.encode(" cat"), eos]
    untrained = [i for i, counts in zip(example.ids, example.mask, strict=True) if not counts]
    assert tokenizer.decode(untrained) == "Human:\n\nHuman: a\n\nAssistant:"


@given(prompt=words, chosen=words, rejected=words, max_length=st.integers(3, 40))
def test_truncated_pairs_fit_are_slices_and_are_neither_empty_nor_identical(
    tokenizer, prompt, chosen, rejected, max_length
):
    whole = [
        [*tokenizer.encode(prompt), *tokenizer.encode(side), tokenizer.eos_id] for side in (chosen, rejected)
    ]
    head = len(tokenizer.encode(prompt))
    cut = [ids[:max_length] for ids in whole]
    usable = head < max_length and cut[0] != cut[1]
    # A row that always survives: by itself an unusable one would be an error.
    rows = [Preference(prompt, chosen, rejected, 1), Preference("a", "b", "c", 2)]
    result = tokenise_preferences(rows, tokenizer, max_length=max_length, overlong="truncate")
    assert result.kept == ([0, 1] if usable else [1])
    assert [line for line, _ in result.report.dropped] == ([] if usable else [1])
    if usable:
        pair = result.examples[0]
        assert [pair.chosen.ids, pair.rejected.ids] == cut
        assert any(pair.chosen.mask) and any(pair.rejected.mask)
        for side, ids in zip(pair, whole, strict=True):
            assert (side.ids[-1] == tokenizer.eos_id) == (len(ids) <= max_length)
            assert side.mask == [t >= head for t in range(len(side.ids))]
        # Batched as alone.
        validate_pairs(collate_pairs(result.examples), vocab_size=tokenizer.vocab_size)
    assert result.report.truncated == ([1] if usable and any(len(ids) > max_length for ids in whole) else [])


@given(
    prompt=words,
    response=words,
    max_length=st.integers(3, 40),
    overlong=st.sampled_from(["drop", "truncate"]),
)
def test_an_over_long_demonstration_is_dropped_or_cut_as_chosen(
    tokenizer, prompt, response, max_length, overlong
):
    rows = [Demonstration(prompt, ((response, True),), 7), Demonstration("a", (("b", True),), 8)]
    result = tokenise_demonstrations(rows, tokenizer, max_length=max_length, overlong=overlong)
    ids = [*tokenizer.encode(prompt), *tokenizer.encode(response), tokenizer.eos_id]
    kept = len(ids) <= max_length or (overlong == "truncate" and len(tokenizer.encode(prompt)) < max_length)
    assert result.kept == ([0, 1] if kept else [1])
    assert [line for line, _ in result.report.dropped] == ([] if kept else [7])
    assert result.report.truncated == ([7] if kept and len(ids) > max_length else [])
    if kept:
        assert result.examples[0].ids == ids[:max_length]
        assert len(result.examples[0].mask) == len(result.examples[0].ids)


def test_over_long_rows_stop_when_that_was_chosen(tokenizer):
    length = len(tokenizer.encode("a")) + len(tokenizer.encode("bcd")) + 1
    demonstration, preference = Demonstration("a", (("bcd", True),), 5), Preference("a", "b", "bcd", 6)
    complaint = rf"expected at most {length - 1} tokens, found {length}"
    with pytest.raises(InputError, match=f"line 5: {complaint}"):
        tokenise_demonstrations([demonstration], tokenizer, max_length=length - 1, overlong="error")
    with pytest.raises(InputError, match=f"line 6: {complaint}"):
        tokenise_preferences([preference], tokenizer, max_length=length - 1, overlong="error")
    with pytest.raises(InputError, match="line 7: expected at most 1 tokens, found 3"):
        tokenise_prompts([Prompt("zzz", None, 7)], tokenizer, max_length=1, overlong="error")
    assert tokenise_preferences([preference], tokenizer, max_length=length, overlong="error").kept == [0]


def test_prompts_that_do_not_fit_are_dropped_and_never_cut(tokenizer):
    rows = [Prompt("zzzz", None, 1), Prompt("zz", None, 2), Prompt("zzz", None, 3)]
    result = tokenise_prompts(rows, tokenizer, max_length=3, overlong="drop")
    assert result.examples == [tokenizer.encode("zz"), tokenizer.encode("zzz")]
    assert result.kept == [1, 2]
    assert str(result.report) == "dropped 1 of 3: longer than 3 tokens (line 1)"
    with pytest.raises(ValueError, match='"drop" or "error", got \'truncate\''):
        tokenise_prompts(rows, tokenizer, max_length=3, overlong="truncate")  # pyright: ignore[reportArgumentType]


def test_an_unknown_choice_for_over_long_rows_is_refused(tokenizer):
    with pytest.raises(ValueError, match="expected overlong to be one of .*, got 'cut'"):
        tokenise_demonstrations([], tokenizer, max_length=3, overlong="cut")  # pyright: ignore[reportArgumentType]


def test_where_no_row_is_left_the_report_says_why(tokenizer):
    rows = [Demonstration("a", (("bcd", True),), 5)]
    result = tokenise_demonstrations(rows, tokenizer, max_length=2, overlong="drop")
    assert result.examples == []
    assert str(result.report) == "dropped 1 of 1: longer than 2 tokens (line 5)"
    result = tokenise_prompts([Prompt("zzz", None, 7)], tokenizer, max_length=1, overlong="drop")
    assert str(result.report) == "dropped 1 of 1: longer than 1 tokens (line 7)"


def test_rows_without_tokens_are_dropped_and_their_eos_is_not_trained(tokenizer):
    demonstrations = [Demonstration("a", (("", True),), 1), Demonstration("", (("b", True),), 2)]
    demonstrations.append(Demonstration("a", (("b", True),), 3))
    result = tokenise_demonstrations(demonstrations, tokenizer, max_length=9, overlong="error")
    assert result.report.dropped == [(1, "a response has no tokens"), (2, "the prompt has no tokens")]
    preferences = [Preference("a", "b", "b", 1), Preference("a", "b", "", 2), Preference("a", "b", "c", 3)]
    pairs = tokenise_preferences(preferences, tokenizer, max_length=9, overlong="error")
    assert pairs.report.dropped == [
        (1, "both responses have the same tokens"),
        (2, "a response has no tokens"),
    ]
    prompts = tokenise_prompts(
        [Prompt("", None, 1), Prompt("a", None, 2)], tokenizer, max_length=9, overlong="drop"
    )
    assert prompts.report.dropped == [(1, "the prompt has no tokens")] and prompts.kept == [1]


def test_the_report_counts_what_was_truncated(tokenizer):
    rows = [Demonstration("a", (("zzzzzz", True),), 1), Demonstration("a", (("z", True),), 2)]
    report = tokenise_demonstrations(rows, tokenizer, max_length=3, overlong="truncate").report
    assert str(report) == "dropped 0 of 2; truncated 1"


BATCH = collate([([5, 6], [7, 8]), ([5], [7])])


def test_a_sound_batch_passes_validation_unchanged():
    assert validate(BATCH, vocab_size=9) is BATCH
    interior = BATCH._replace(mask=torch.tensor([[False, False, False, True], [False, True, False, False]]))
    assert validate(interior, vocab_size=9) is interior


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tokens": torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0]])}, r"row 1 .*vocabulary 0\.\.8"),
        ({"tokens": torch.tensor([[5, 6, 7, 8], [5, 7, -1, 0]])}, r"row 1 .*vocabulary 0\.\.8"),
        ({"mask": torch.zeros(2, 4, dtype=torch.bool)}, "row 0 .*found an empty mask"),
        ({"mask": BATCH.mask.clone().index_fill_(1, torch.tensor([2]), True)}, "row 1 .*found True outside"),
        ({"mask": BATCH.mask.clone().index_fill_(1, torch.tensor([0]), True)}, "row 0 .*found True outside"),
        ({"mask": BATCH.mask.long()}, "a bool mask of one shape"),
        ({"mask": BATCH.mask[:, :3]}, r"a bool mask of one shape \[B, T\], got \[2, 4\] and \[2, 3\]"),
        ({"prompt_lengths": torch.tensor([2, 0])}, "row 1 .*a prompt of at least one token"),
        ({"lengths": torch.tensor([1, 2])}, "row 0 .*a length not below the prompt's"),
        ({"lengths": torch.tensor([4, 5])}, "row 1 .*a length within the batch's width"),
        ({"lengths": torch.tensor([4])}, r"prompt_lengths and lengths \[2\], got \[2\] and \[1\]"),
    ],
)
def test_validation_names_the_row_that_is_wrong(change, complaint):
    with pytest.raises(InputError, match=complaint):
        validate(BATCH._replace(**change), vocab_size=9)


def test_validation_refuses_pairs_of_two_prompts_or_of_one_response():
    sound = PairExample(join([1], [2]), join([1], [3]))
    validate_pairs(collate_pairs([sound]), vocab_size=9)
    with pytest.raises(InputError, match="pair 1 of the batch: expected one prompt, found two"):
        validate_pairs(collate_pairs([sound, PairExample(join([1], [2]), join([4], [2]))]), vocab_size=9)
    with pytest.raises(
        InputError, match="pair 1 of the batch: expected two responses, found the same one twice"
    ):
        validate_pairs(collate_pairs([sound, PairExample(join([1], [2]), join([1], [2]))]), vocab_size=9)
    with pytest.raises(InputError, match="expected as many chosen as rejected, got 1, 2"):
        validate_pairs(Pairs(collate([([1], [2])]), collate([([1], [3])] * 2)), vocab_size=9)
    with pytest.raises(InputError, match="row 0 .*vocabulary"):
        validate_pairs(collate_pairs([sound]), vocab_size=3)


@given(n=st.integers(1, 40), batch_size=st.integers(1, 12), seed=st.integers(0, 99))
def test_an_epoch_visits_each_index_once_and_keeps_the_last_partial_batch(n, batch_size, seed):
    batches = list(epoch_order(n, batch_size=batch_size, generator=seeded(seed)))
    assert sorted(torch.cat(batches).tolist()) == list(range(n))
    assert len(batches) == -(-n // batch_size)
    assert list(map(len, batches))[:-1] == [batch_size] * (len(batches) - 1)


def test_an_epoch_is_repeated_by_its_generator_and_differs_from_the_next():
    def epochs(generator):
        return [
            torch.cat(list(epoch_order(50, batch_size=8, generator=generator))).tolist() for _ in range(2)
        ]

    first, second = epochs(seeded(0))
    assert [first, second] == epochs(seeded(0))
    assert first != second != list(range(50)) != first


def test_an_epoch_can_be_restarted_in_its_middle_and_the_next_is_the_same():
    whole, restarted = seeded(4), seeded(4)
    expected = [*epoch_order(50, batch_size=8, generator=whole)][3:]
    expected += epoch_order(50, batch_size=8, generator=whole)
    got = [
        *epoch_order(50, batch_size=8, generator=restarted, skip=3),
        *epoch_order(50, batch_size=8, generator=restarted),
    ]
    assert len(expected) == len(got) and all(map(torch.equal, expected, got))


def test_the_generator_advances_when_the_epoch_is_made_and_not_when_it_is_read():
    generator = seeded(0)
    epoch_order(10, batch_size=2, generator=generator)  # never read
    second = [*epoch_order(10, batch_size=2, generator=generator)]
    read = seeded(0)
    _ = [*epoch_order(10, batch_size=2, generator=read)]
    assert all(map(torch.equal, second, epoch_order(10, batch_size=2, generator=read)))


@pytest.mark.parametrize("change", [{"n": 0}, {"batch_size": 0}, {"skip": -1}])
def test_an_order_of_nothing_is_refused(change):
    arguments = {"n": 3, "batch_size": 2, "skip": 0, **change}
    with pytest.raises(ValueError, match="expected n >= 1, batch_size >= 1, skip >= 0"):
        epoch_order(**arguments, generator=seeded(0))
