"""An encoder reward model from scratch: BERT, RoBERTa or DistilBERT with one score, read at the first token.

Devlin et al. 2019, "BERT" (arXiv:1810.04805); Liu et al. 2019, "RoBERTa" (arXiv:1907.11692); Sanh et al.
2019, "DistilBERT" (arXiv:1910.01108). One computation serves all three: they differ in the names of their
tensors and options (`encoder_files`), in where positions start, and in the activation of the head. Scores
agree with transformers' …ForSequenceClassification. An encoder only judges: no cache, no unembedding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.kernels import products
from minirlhf.kernels.activations import gelu_tanh
from minirlhf.models.interface import Params

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": F.relu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder, under BERT's names.

    max_position_embeddings: rows of the position table, of which `first_position` are not used.
    type_vocab_size: kinds of segment that the model tells apart; 0 or 1 where it tells none.
    hidden_act, head_act: of the feed-forward layers, and of the layer before the score.
    """

    vocab_size: int
    max_position_embeddings: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float
    type_vocab_size: int
    hidden_act: str
    head_act: str
    first_position: int

    def __post_init__(self) -> None:
        for name in (
            "vocab_size max_position_embeddings hidden_size num_hidden_layers num_attention_heads "
            "intermediate_size"
        ).split():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not isinstance(self.layer_norm_eps, float) or not 0 < self.layer_norm_eps < 1:
            raise ValueError(f"layer_norm_eps must be a small positive number, got {self.layer_norm_eps!r}")
        if self.n_positions < 1:
            table, first = self.max_position_embeddings, self.first_position
            raise ValueError(f"max_position_embeddings {table} leaves no position, the first is {first}")
        if self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of the {heads} heads")

    @property
    def n_positions(self) -> int:
        """The context: most tokens of prompt, response and separators together."""
        return self.max_position_embeddings - self.first_position


class EncoderModel(NamedTuple):
    """An encoder bound to its config.

    config: see there. score: (params, tokens [B, T], segments [B, T], lengths [B]) -> [B], raw reward units.
    """

    config: EncoderConfig
    score: Callable[[Params, Tensor, Tensor, Tensor], Tensor]


def init_params(generator: torch.Generator, *, config: EncoderConfig) -> Params:
    """Fresh fp32 parameters under BERT's names: weights N(0, 0.02²), biases 0, norms 1."""
    width, inner = config.hidden_size, config.intermediate_size

    def table(rows: int) -> Params:
        return {"weight": 0.02 * torch.randn(rows, width, generator=generator)}

    def linear(fan_in: int, fan_out: int) -> Params:
        weight = 0.02 * torch.randn(fan_out, fan_in, generator=generator)
        return {"weight": weight, "bias": torch.zeros(fan_out)}

    def norm() -> Params:
        return {"weight": torch.ones(width), "bias": torch.zeros(width)}

    def layer() -> Params:
        queries = {name: linear(width, width) for name in ("query", "key", "value")}
        return {
            "attention": {
                "self": queries,
                "output": {"dense": linear(width, width), "LayerNorm": norm()},
            },
            "intermediate": {"dense": linear(width, inner)},
            "output": {"dense": linear(inner, width), "LayerNorm": norm()},
        }

    segments = {"token_type_embeddings": table(config.type_vocab_size)} if config.type_vocab_size else {}
    return {
        "embeddings": {
            "word_embeddings": table(config.vocab_size),
            "position_embeddings": table(config.max_position_embeddings),
            **segments,
            "LayerNorm": norm(),
        },
        "encoder": {"layer": [layer() for _ in range(config.num_hidden_layers)]},
        "pooler": {"dense": linear(width, width)},
        "classifier": linear(width, 1),
    }


def bind(config: EncoderConfig) -> EncoderModel:
    """The function of this page, bound to one config."""
    return EncoderModel(config, partial(score, config=config))


def score(
    params: Params, tokens: Tensor, segments: Tensor, lengths: Tensor, *, config: EncoderConfig
) -> Tensor:
    """The score of each row, from the state of its first token: [B], in raw reward units.

    Args:
        tokens: int64 [B, T], right-padded; every valid position sees every valid one, and no padding.
        segments: int64 [B, T], 0 on the prompt's side and 1 on the response's, as the tokenizer said.
        lengths: int64 [B] valid tokens of each row, at least 1.

    Raises:
        ValueError: T exceeds the context. Nothing is cropped.
    """
    time = tokens.shape[1]
    if time > config.n_positions:
        raise ValueError(f"sequence of {time} tokens exceeds the context of {config.n_positions}")
    visible = torch.arange(time, device=tokens.device) < lengths[:, None]  # [B, T]
    x = _embed(params["embeddings"], tokens, segments, config)
    for layer in params["encoder"]["layer"]:
        attended = _attend(layer["attention"]["self"], x, visible, config)
        x = _add_and_norm(layer["attention"]["output"], attended, x, config)
        inner = _ACTIVATIONS[config.hidden_act](_linear(layer["intermediate"]["dense"], x))
        x = _add_and_norm(layer["output"], inner, x, config)
    pooled = _ACTIVATIONS[config.head_act](_linear(params["pooler"]["dense"], x[:, 0]))
    return _linear(params["classifier"], pooled)[:, 0]


def _embed(params: Params, tokens: Tensor, segments: Tensor, config: EncoderConfig) -> Tensor:
    places = slice(config.first_position, config.first_position + tokens.shape[1])
    x = F.embedding(tokens, params["word_embeddings"]["weight"])
    x = x + params["position_embeddings"]["weight"][places]
    if config.type_vocab_size:
        kinds = params["token_type_embeddings"]["weight"]
        x = x + F.embedding(segments if config.type_vocab_size > 1 else torch.zeros_like(segments), kinds)
    return _norm(params["LayerNorm"], x, config)


def _attend(params: Params, x: Tensor, visible: Tensor, config: EncoderConfig) -> Tensor:
    batch, time, width = x.shape

    def heads(name: str) -> Tensor:
        return _linear(params[name], x).view(batch, time, config.num_attention_heads, -1).transpose(1, 2)

    q, k, v = heads("query"), heads("key"), heads("value")  # each [B, H, T, Dh]
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None, :])
    return attended.transpose(1, 2).reshape(batch, time, width)


def _add_and_norm(params: Params, update: Tensor, x: Tensor, config: EncoderConfig) -> Tensor:
    """The norm stands after the sum, as in the first transformers."""
    return _norm(params["LayerNorm"], x + _linear(params["dense"], update), config)


def _norm(params: Params, x: Tensor, config: EncoderConfig) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], params["weight"], params["bias"], config.layer_norm_eps)


def _linear(params: Params, x: Tensor) -> Tensor:
    return products.linear(x, params["weight"], params["bias"])
