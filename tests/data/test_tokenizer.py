"""Ids are exactly those of the text: nothing added, nothing cut, and no text can spell EOS."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.runs import InputError

GPT2 = Path(__file__).resolve().parents[3] / "shared" / "data" / "gpt2_tokenizer.json"
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def settings_of(tokenizer) -> dict:
    return json.loads(tokenizer.path.read_text(encoding="utf-8"))


def written(directory: Path, settings: dict | tokenizers.Tokenizer) -> Path:
    raw = settings if isinstance(settings, dict) else json.loads(settings.to_str())
    (directory / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return directory


def renamed_eos(tokenizer, name: str) -> dict:
    settings = settings_of(tokenizer)
    settings["added_tokens"][0]["content"] = name
    settings["model"]["vocab"][name] = settings["model"]["vocab"].pop("<|endoftext|>")
    return settings


def word_level(vocab: dict[str, int]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


@given(text=text)
def test_decoding_what_was_encoded_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(before=text, after=text)
def test_an_eos_typed_by_a_user_is_text_and_never_the_eos_id(tokenizer, before, after):
    typed = f"{before}<|endoftext|>{after}"
    ids = tokenizer.encode(typed)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == typed


def test_an_eos_that_is_added_as_an_ordinary_token_cannot_be_typed_either(tokenizer, tmp_path):
    settings = settings_of(tokenizer)
    settings["added_tokens"][0]["special"] = False
    loaded = load_tokenizer(written(tmp_path, settings))
    assert loaded.eos_id not in loaded.encode("a<|endoftext|>b")


def test_other_ordinary_added_tokens_are_still_found_in_text(tokenizer, tmp_path):
    settings = settings_of(tokenizer)
    new_id = tokenizer.vocab_size
    spaces = {**settings["added_tokens"][0], "id": new_id, "content": "    ", "special": False}
    settings["added_tokens"].append(spaces)
    loaded = load_tokenizer(written(tmp_path, settings))
    assert new_id in loaded.encode("a    b")
    assert loaded.vocab_size == new_id + 1


def test_a_tokenizer_whose_words_include_eos_is_refused_with_advice(tmp_path):
    path = written(tmp_path, word_level({"?": 0, "a": 1, "<eos>": 2}))
    with pytest.raises(
        InputError, match="never to be encoded as the EOS id 2.*declare EOS as a special added token"
    ):
        load_tokenizer(path)


def test_truncation_padding_and_templates_of_the_file_are_switched_off(tokenizer, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.eos_id)]
    )
    loaded = load_tokenizer(written(tmp_path, backend))
    assert loaded.encode("the cat sat on the mat") == tokenizer.encode("the cat sat on the mat")
    assert loaded.encode_all(["the cat", ""]) == [tokenizer.encode("the cat"), []]


def test_many_texts_at_once_are_the_texts_one_by_one(tokenizer):
    texts = [f"the cat {i}" for i in range(2500)]
    assert tokenizer.encode_all(texts) == [tokenizer.encode(some) for some in texts]


def test_decoding_shows_special_tokens(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("it"), tokenizer.eos_id]) == "it<|endoftext|>"


def test_a_directory_and_the_file_in_it_are_the_same_tokenizer(tokenizer):
    again = load_tokenizer(tokenizer.path.parent)
    assert (again.path, again.eos_id, again.vocab_size) == (
        tokenizer.path,
        tokenizer.eos_id,
        tokenizer.vocab_size,
    )


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "<eos>"])
def test_eos_is_found_by_its_usual_names(tokenizer, tmp_path, name):
    loaded = load_tokenizer(written(tmp_path, renamed_eos(tokenizer, name)))
    assert loaded.backend.id_to_token(loaded.eos_id) == name


@pytest.mark.parametrize(("stated", "expected"), [(0, 0), (7, 7), ([9, 3], 9)])
def test_the_config_beside_the_tokenizer_decides_on_eos(tokenizer, tmp_path, stated, expected):
    settings = settings_of(tokenizer)
    for i in (7, 9):  # as ordinary letters they could be typed
        token = next(t for t, at in settings["model"]["vocab"].items() if at == i)
        settings["added_tokens"].append({**settings["added_tokens"][0], "id": i, "content": f"<{i}>"})
        settings["model"]["vocab"][f"<{i}>"] = settings["model"]["vocab"].pop(token)
    written(tmp_path, settings)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": stated}))
    assert load_tokenizer(tmp_path).eos_id == expected
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == expected


def test_an_eos_id_of_zero_in_the_config_counts_although_it_is_falsy(tokenizer, tmp_path):
    settings = renamed_eos(tokenizer, "<stop>")  # id 0
    new = {**settings["added_tokens"][0], "id": tokenizer.vocab_size, "content": "<|endoftext|>"}
    settings["added_tokens"].append(new)
    written(tmp_path, settings)
    assert load_tokenizer(tmp_path).eos_id == tokenizer.vocab_size
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    assert load_tokenizer(tmp_path).eos_id == 0


def test_a_config_without_eos_leaves_it_to_the_name(tokenizer, tmp_path):
    written(tmp_path, settings_of(tokenizer))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    assert load_tokenizer(tmp_path).eos_id == tokenizer.eos_id


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ('{"eos_token_id": 9999}', "expected eos_token_id to be in tokenizer.json, found 9999"),
        ('{"eos_token_id": "</s>"}', "expected eos_token_id to be an integer, found '</s>'"),
        ('{"eos_token_id": true}', "expected eos_token_id to be an integer, found True"),
        ("{", "config.json: expected JSON, found none"),
    ],
)
def test_a_wrong_eos_in_the_config_is_named(tokenizer, tmp_path, config, complaint):
    written(tmp_path, settings_of(tokenizer))
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=complaint):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_eos_is_an_error_that_says_what_to_do(tokenizer, tmp_path):
    path = written(tmp_path, renamed_eos(tokenizer, "<stop>"))
    with pytest.raises(InputError, match=r'found none; name its id as "eos_token_id" in .*config\.json'):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "found no JSON"),
        (b"\xff", "found no JSON"),
        (b"[]", 'expected a tokenizer.json with "model"'),
        (b'{"model": {"type": "?"}}', "found one that does not load"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content, complaint):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_words_is_named(tmp_path):
    with pytest.raises(InputError, match="expected an end-of-text token"):
        load_tokenizer(written(tmp_path, tokenizers.Tokenizer(models.BPE())))


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match="expected a tokenizer.json or a directory with one"):
        load_tokenizer(tmp_path)


def test_gpt2_keeps_the_space_after_the_assistant_marker_in_the_response():
    if not GPT2.exists():
        pytest.skip(f"{GPT2} is absent")
    gpt2 = load_tokenizer(GPT2)
    assert (gpt2.eos_id, gpt2.vocab_size) == (50256, 50257)
    prompt, response = "\n\nHuman: hi\n\nAssistant:", " Yes<|endoftext|>"
    # " Yes" is one token of GPT-2; without its space it would be another.
    assert gpt2.encode(response)[0] == gpt2.encode(" Yes")[0] != gpt2.encode("Yes")[0]
    assert gpt2.decode(gpt2.encode(prompt) + gpt2.encode(response)) == prompt + response
    assert gpt2.eos_id not in gpt2.encode(response)
