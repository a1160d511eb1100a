"""Encoder reward models agree with transformers, see no padding, and refuse what they do not compute."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from minirlhf.models.encoder_files import is_encoder, load_encoder
from minirlhf.runs import InputError

SMALL = {"vocab_size": 61, "pad_token_id": 1, "id2label": {0: "reward"}, "label2id": {"reward": 0}}
BERT = SMALL | {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}
DISTIL = SMALL | {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40, "max_position_embeddings": 20}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", BERT),
    "bert-gelu-new-one-segment": ("Bert", BERT | {"hidden_act": "gelu_new", "type_vocab_size": 1}),
    "bert-relu-large-eps": ("Bert", BERT | {"hidden_act": "relu", "layer_norm_eps": 0.1}),
    "distilbert": ("DistilBert", DISTIL),
    "distilbert-relu": ("DistilBert", DISTIL | {"activation": "relu", "sinusoidal_pos_embds": True}),
    "roberta": ("Roberta", BERT | {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "roberta-pad-4": ("Roberta", BERT | {"type_vocab_size": 1, "pad_token_id": 4}),
}
LENGTHS = [15, 9, 1, 4, 12]


def write(folder: Path, family: str, entries: dict[str, Any], seed: int = 0) -> Any:
    """A directory as transformers writes it, with weights that matter everywhere; returns its model."""
    config = getattr(transformers, f"{family}Config")(**entries)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.2 * torch.randn(tensor.shape))
    model.save_pretrained(folder)
    return model


def batch(vocab_size: int = 61) -> tuple[Tensor, Tensor, Tensor]:
    """tokens with garbage as padding, segments that change inside each row, ragged lengths."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(5, vocab_size, (len(LENGTHS), max(LENGTHS)), generator=generator)
    lengths = torch.tensor(LENGTHS)
    segments = (torch.arange(max(LENGTHS)) >= lengths[:, None] // 2).long()
    return tokens, segments, lengths


def theirs(model: Any, tokens: Tensor, segments: Tensor, lengths: Tensor) -> Tensor:
    """transformers' score, padded as its own tokenizers pad."""
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    named = {"token_type_ids": segments} if getattr(model.config, "type_vocab_size", 0) > 1 else {}
    padded = torch.where(mask, tokens, model.config.pad_token_id)
    with torch.no_grad():
        logits = model(input_ids=padded, attention_mask=mask.long(), **named).logits
    assert logits.shape == (len(tokens), 1)
    return logits[:, 0]


@pytest.mark.parametrize("case", CASES)
def test_scores_of_ragged_batches_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    model = write(tmp_path, *CASES[case])
    assert is_encoder(tmp_path)
    encoder, params = load_encoder(tmp_path)
    expected = theirs(model, *batch())
    found = encoder.score(params, *batch())
    assert float(expected.std()) > 0.1
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("case", ["bert", "distilbert", "roberta"])
def test_a_row_alone_has_the_score_it_has_in_a_batch_whatever_stands_in_the_padding(
    tmp_path: Path, case: str
) -> None:
    write(tmp_path, *CASES[case])
    encoder, params = load_encoder(tmp_path)
    tokens, segments, lengths = batch()
    together = encoder.score(params, tokens, segments, lengths)
    other = torch.where(torch.arange(tokens.shape[1]) < lengths[:, None], tokens, 60 - tokens)
    assert torch.equal(encoder.score(params, other, segments, lengths), together)
    for row, length in enumerate(LENGTHS):
        alone = encoder.score(
            params, tokens[row : row + 1, :length], segments[row : row + 1, :length], lengths[row : row + 1]
        )
        assert float(alone) == pytest.approx(float(together[row]), abs=2e-5)


def test_bert_reads_segments_and_the_last_token_and_distilbert_no_segments(tmp_path: Path) -> None:
    tokens, segments, lengths = batch()
    for case, told in (("bert", True), ("distilbert", False), ("roberta", False)):
        write(tmp_path / case, *CASES[case])
        encoder, params = load_encoder(tmp_path / case)
        found = encoder.score(params, tokens, segments, lengths)
        assert torch.equal(found, encoder.score(params, tokens, 1 - segments, lengths)) is not told
        changed = tokens.clone()
        changed[0, -1] = 5 + (changed[0, -1] - 4) % 56
        moved = encoder.score(params, changed, segments, lengths)
        assert moved[0] != found[0] and torch.equal(moved[1:], found[1:])


def test_the_context_is_what_the_position_table_leaves_and_nothing_is_cropped(tmp_path: Path) -> None:
    for case, context in (("bert", 20), ("roberta", 18), ("roberta-pad-4", 15)):
        model = write(tmp_path / case, *CASES[case])
        encoder, params = load_encoder(tmp_path / case)
        assert encoder.config.n_positions == context
        full = torch.randint(5, 61, (2, context), generator=torch.Generator().manual_seed(0))
        lengths, segments = torch.tensor([context, 3]), torch.zeros_like(full)
        found = encoder.score(params, full, segments, lengths)
        assert torch.allclose(found, theirs(model, full, segments, lengths), atol=1e-4)
        longer = torch.zeros(1, context + 1, dtype=torch.int64)
        with pytest.raises(ValueError, match=f"{context + 1} tokens exceeds the context of {context}"):
            encoder.score(params, longer, longer, torch.tensor([context + 1]))


def test_files_of_old_and_half_precision_are_read(tmp_path: Path) -> None:
    write(tmp_path, "Bert", BERT)
    before = load_encoder(tmp_path)[1]
    file = tmp_path / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): each
        for name, each in load_file(file).items()
    }
    save_file(old | {"bert.embeddings.position_ids": torch.arange(20)}, file, metadata={"format": "pt"})
    after = load_encoder(tmp_path)[1]
    assert torch.equal(
        before["embeddings"]["LayerNorm"]["weight"], after["embeddings"]["LayerNorm"]["weight"]
    )
    half = {name: each.half() if each.is_floating_point() else each for name, each in old.items()}
    save_file(half, file, metadata={"format": "pt"})
    assert load_encoder(tmp_path)[1]["classifier"]["weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("Bert", {"is_decoder": True}, "unsupported option is_decoder = True; bert supports False"),
        ("Bert", {"add_cross_attention": True}, "unsupported option add_cross_attention"),
        ("Bert", {"hidden_act": "silu"}, "unsupported option hidden_act = 'silu'; bert supports 'gelu' or"),
        (
            "Bert",
            {"position_embedding_type": "relative_key"},
            "unsupported option position_embedding_type = 'relative_key'; bert supports 'absolute'",
        ),
        (
            "DistilBert",
            {"activation": "swish"},
            "unsupported option activation = 'swish'; distilbert",
        ),
        (
            "Bert",
            {"model_type": "deberta-v2"},
            "unsupported model_type 'deberta-v2'; .* bert, roberta, distilbert",
        ),
        ("Bert", {"architectures": ["BertForMaskedLM"]}, "expected a reward model .*found BertForMaskedLM"),
        ("Bert", {"problem_type": "multi_label_classification"}, "unsupported problem_type 'multi_label"),
        (
            "Bert",
            {"id2label": {"0": "bad", "1": "fair", "2": "good"}},
            r"expected one label, found 3 \(bad, fair, good\); an encoder reward model has one",
        ),
        ("Bert", {"num_attention_heads": 5}, "hidden_size 24 must be a multiple of the 5 heads"),
        ("Bert", {"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ("Bert", {"layer_norm_eps": "small"}, "layer_norm_eps must be a small positive number"),
        ("Roberta", {"pad_token_id": None}, "roberta counts positions from pad_token_id"),
        ("Roberta", {"pad_token_id": 30}, "max_position_embeddings 20 leaves no position, the first is 31"),
    ],
)
def test_what_the_page_does_not_compute_is_refused_by_name_before_a_tensor_is_read(
    tmp_path: Path, family: str, changes: dict[str, Any], said: str
) -> None:
    config = getattr(transformers, f"{family}Config")(**(DISTIL if family == "DistilBert" else BERT))
    entries = config.to_dict() | {"architectures": [f"{family}ForSequenceClassification"]} | changes
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match=said):  # there is no file with tensors at all
        load_encoder(tmp_path)


def test_a_head_of_several_labels_is_refused_also_where_only_the_tensors_tell(tmp_path: Path) -> None:
    three = {0: "a", 1: "b", 2: "c"}
    write(tmp_path, "Roberta", BERT | {"id2label": three, "label2id": {}})
    entries = json.loads((tmp_path / "config.json").read_text())
    del entries["id2label"]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match=r"expected one label, classifier.out_proj.weight has 3"):
        load_encoder(tmp_path)


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    write(tmp_path, "DistilBert", DISTIL)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["pre_classifier.bias"]
    tensors["distilbert.transformer.layer.1.ffn.lin1.bias"] = torch.zeros(3)
    save_file(tensors | {"extra": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(InputError) as raised:
        load_encoder(tmp_path)
    for part in (
        "tensors under BERT's names",
        "missing tensors: pooler.dense.bias [24]",
        "unknown tensors: extra [1]",
        "encoder.layer.1.intermediate.dense.bias expected [40] got [3]",
    ):
        assert part in str(raised.value)


def test_there_must_be_a_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model directory"):
        is_encoder(tmp_path / "nowhere")
