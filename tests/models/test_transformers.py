"""GPT-2 against transformers: logits, greedy continuations, directories both ways, reward models."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from minirlhf.models import gpt2
from minirlhf.models.checkpoint import (
    Normalisation,
    load_language_model,
    load_scalar_model,
    save_language_model,
    save_scalar_model,
)
from minirlhf.models.interface import LanguageModel, Params, scalar, with_scalar_head
from tests.models.plain_cache import extend_, new_cache
from tests.models.tiny import ragged, tiny, valid

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
except ImportError as error:
    pytest.skip(f"needs transformers (pip install 'minirlhf[test]'): {error}", allow_module_level=True)

# transformers' own deprecations are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")

# No progress bars, no advice; both are settings of that library alone.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SHAPES = {
    "plain": {},
    "one head, one layer": {"n_layer": 1, "n_head": 1},
    "wide feed-forward": {"n_inner": 100},
    "narrow feed-forward, other epsilon": {"n_inner": 10, "layer_norm_epsilon": 1e-3},
    "deep": {"n_layer": 6, "n_embd": 32, "n_head": 8, "vocab_size": 200},
}
shapes = pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())


def theirs(kind: str, changes: dict[str, Any], *, seed: int = 0, **options: Any) -> Any:
    """Their model in evaluation mode, with every parameter drawn at random."""
    config = asdict(tiny(**changes)[0].config)
    config = transformers.GPT2Config(**config, bos_token_id=config["eos_token_id"], **options)
    model = getattr(transformers, kind)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def saved(directory: Path, kind: str, changes: dict[str, Any], **options: Any) -> Any:
    model = theirs(kind, changes, **options)
    model.save_pretrained(directory)
    return model


def logits(model: LanguageModel, params: Params, tokens: Tensor) -> Tensor:
    return model.hidden(params, tokens) @ model.unembedding(params).T


def assert_close_to_the_largest(got: Tensor, right: Tensor) -> None:
    """Within 1e-5 of the largest |logit|."""
    assert got.dtype == right.dtype == torch.float32
    assert (got - right).abs().max() <= 1e-5 * right.abs().max()


@shapes
def test_logits_of_ragged_batches_equal_theirs(changes: dict[str, Any], tmp_path: Path) -> None:
    reference = saved(tmp_path, "GPT2LMHeadModel", changes)
    model, params = load_language_model(tmp_path)
    tokens, lengths = ragged(vocab_size=model.config.vocab_size)
    mask = valid(tokens, lengths)
    with torch.no_grad():
        right = reference(input_ids=tokens, attention_mask=mask.long()).logits
    assert right[mask].std() > 0.5, "logits too flat to tell models apart"
    assert_close_to_the_largest(logits(model, params, tokens)[mask], right[mask])


@shapes
def test_greedy_continuations_equal_theirs_with_and_without_cache(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    reference = saved(tmp_path, "GPT2LMHeadModel", changes)
    model, params = load_language_model(tmp_path)
    tokens, lengths = ragged(1, longest=8, vocab_size=model.config.vocab_size)
    new = 12
    expected = []
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        prompt = row[None, :length]
        out = reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        expected.append(out[0, length:].tolist())

    uncached = []
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        ids = row[None, :length]
        for _ in range(new):
            ids = torch.cat([ids, logits(model, params, ids)[:, -1:].argmax(-1)], dim=1)
        uncached.append(ids[0, length:].tolist())
    assert uncached == expected

    cache = new_cache(model, params, len(tokens), tokens.shape[1] + new)
    states = extend_(model, params, tokens, torch.zeros_like(lengths), cache)
    last = states[torch.arange(len(tokens)), lengths - 1]
    drawn: list[Tensor] = []
    for step in range(new):
        drawn.append((last @ model.unembedding(params).T).argmax(-1))
        last = extend_(model, params, drawn[-1][:, None], lengths + step, cache)[:, 0]
    assert torch.stack(drawn, dim=1).tolist() == expected


@shapes
def test_a_directory_we_wrote_gives_the_same_logits_there(changes: dict[str, Any], tmp_path: Path) -> None:
    model, params = tiny(**changes)
    save_language_model(tmp_path / "out", model, params, tokenizer=None)
    load: Any = transformers.GPT2LMHeadModel.from_pretrained
    reference, report = load(tmp_path / "out", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert not set(report["missing_keys"]) - {"lm_head.weight"}, "the tied head alone may be absent"
    tokens, _ = ragged(vocab_size=model.config.vocab_size)
    with torch.no_grad():
        assert_close_to_the_largest(logits(model, params, tokens), reference.eval()(tokens).logits)


def test_what_they_write_from_our_directory_we_read_back_bit_by_bit(tmp_path: Path) -> None:
    model, params = tiny(n_inner=40)
    save_language_model(tmp_path / "ours", model, params, tokenizer=None)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again, reread = load_language_model(tmp_path / "theirs")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(reread), tree_leaves(params), strict=True))


def test_a_backbone_without_the_prefix_loads(tmp_path: Path) -> None:
    reference = saved(tmp_path, "GPT2Model", {})
    model, params = load_language_model(tmp_path)
    tokens, _ = ragged()
    with torch.no_grad():
        right = reference(tokens).last_hidden_state
    assert_close_to_the_largest(model.hidden(params, tokens), right)


def test_shards_with_an_index_load(tmp_path: Path) -> None:
    reference = theirs("GPT2LMHeadModel", {})
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    model, params = load_language_model(tmp_path)
    tokens, _ = ragged()
    with torch.no_grad():
        assert_close_to_the_largest(logits(model, params, tokens), reference(tokens).logits)


def byte_level_tokenizer(path: Path) -> Path:
    """61 ids, as the model: EOS first (id 0), 59 bytes among which 0xFF is, and one merge."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    kept = alphabet[: 61 - 3] + ["ÿ"]
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *kept, '!"'])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("!", '"')]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
    return path


def raw_scores(model: LanguageModel, params: Params, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Ours: the head at every row's last valid token."""
    return scalar(params, model.hidden(params, tokens)[torch.arange(len(tokens)), lengths - 1])


def test_a_reward_model_gives_the_same_raw_scores_there_also_where_rows_end_in_eos(tmp_path: Path) -> None:
    model, params = tiny(eos_token_id=0)
    params = with_scalar_head(model, params, generator=torch.Generator().manual_seed(1))
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer.json")
    save_scalar_model(
        tmp_path / "rm", model, params, tokenizer=tokenizer, normalisation=Normalisation(3.0, 0.5)
    )
    reference = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    assert reference.config.num_labels == 1
    pad = reference.config.pad_token_id
    assert pad == 59 and pad != reference.config.eos_token_id == 0  # the byte 0xFF, which no text contains

    tokens, lengths = ragged(vocab_size=59)
    tokens[torch.arange(5), lengths - 1] = 0  # EOS is the last valid token, and stands elsewhere too
    tokens[0, 3] = 0
    mask = valid(tokens, lengths)
    ours = raw_scores(model, params, tokens, lengths)
    with torch.no_grad():
        right = reference(torch.where(mask, tokens, pad), attention_mask=mask.long()).logits[:, 0]
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-5 * right.abs().max().item())


def test_their_reward_model_gives_the_same_raw_scores_here(tmp_path: Path) -> None:
    reference = saved(tmp_path, "GPT2ForSequenceClassification", {}, num_labels=1, pad_token_id=60)
    model, params, normalisation = load_scalar_model(tmp_path)
    assert normalisation == Normalisation(0.0, 1.0)
    tokens, lengths = ragged(2, vocab_size=60)
    mask = valid(tokens, lengths)
    with torch.no_grad():
        right = reference(torch.where(mask, tokens, 60), attention_mask=mask.long()).logits[:, 0]
    ours = raw_scores(model, params, tokens, lengths)
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-5 * right.abs().max().item())


def test_every_entry_of_our_config_is_one_that_they_know() -> None:
    entries = gpt2.to_huggingface(tiny()[0].config)
    theirs = json.loads(transformers.GPT2Config(**entries).to_json_string(use_diff=False))
    assert {name: theirs[name] for name in entries} == entries
