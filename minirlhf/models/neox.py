"""GPT-NeoX (Pythia) from scratch: pure functions of (params, config).

Black et al. 2022, "GPT-NeoX-20B" (arXiv:2204.06745). Rotary positions (Su et al. 2021, arXiv:2104.09864) turn
the front of every head; attention and feed-forward read the same state and are added together. Names and
[out, in] weights are the checkpoint's. Logits, greedy continuations and directories agree with transformers'
GPTNeoXForCausalLM. No dropout: the same tokens give the same states.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.kernels import products
from minirlhf.kernels.activations import gelu_tanh
from minirlhf.models.interface import Attend, CacheShape, LanguageModel, Params, RunBlock, directly
from minirlhf.runs import InputError

_ACTIVATIONS = {"gelu": F.gelu, "gelu_new": gelu_tanh, "gelu_fast": gelu_tanh, "relu": F.relu}
# Names within transformers 5's `rope_parameters`; versions before it read the old names alone.
_ROPE_PARAMETERS = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}


@dataclass(frozen=True)
class GPTNeoXConfig:
    """Shape of a GPT-NeoX, under the names of its `config.json`; the defaults are those of transformers.

    max_position_embeddings: the longest sequence, prompt and response together, in tokens.
    rotary_pct: the part of a head, from its front, that is turned; rotary_emb_base: see `_turns`.
    use_parallel_residual: x + attention(x) + mlp(x); if False the mlp reads x + attention(x).
    attention_bias: that of query_key_value and dense.
    tie_word_embeddings: the unembedding is `embed_in`; if False `embed_out`.
    initializer_range: σ of fresh weights. eos_token_id: ends a response. bos_token_id: only handed on.
    """

    vocab_size: int = 50432
    max_position_embeddings: int = 2048
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    rotary_pct: float = 0.25
    rotary_emb_base: float = 10000.0
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    eos_token_id: int = 2
    bos_token_id: int | None = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is int and not (type(value) is int and value >= (name != "eos_token_id")):
                raise InputError(f"{name} must be a positive integer or token id, got {value!r}")
            if field.type is float and not (type(value) in (int, float) and 0 < value < float("inf")):
                raise InputError(f"{name} must be a positive number, got {value!r}")
            if field.type is bool and type(value) is not bool:
                raise InputError(f"{name} must be true or false, got {value!r}")
        if self.hidden_act not in tuple(_ACTIVATIONS):
            supported = f"gpt_neox supports {' or '.join(map(repr, _ACTIVATIONS))}"
            raise InputError(f"unsupported option hidden_act = {self.hidden_act!r}; {supported}")
        width, heads = self.hidden_size, self.num_attention_heads
        if width % heads:
            raise InputError(f"hidden_size must be a multiple of num_attention_heads, got {width}, {heads}")
        if not 0 < self.n_turned <= width // heads or self.n_turned % 2:
            turned = f"{self.n_turned} of {width // heads}"
            raise InputError(f"rotary_pct must turn an even number of a head's entries, got {turned}")

    @property
    def n_positions(self) -> int:
        return self.max_position_embeddings

    @property
    def n_turned(self) -> int:
        return int(self.hidden_size // self.num_attention_heads * self.rotary_pct)


def init_params(generator: torch.Generator, *, config: GPTNeoXConfig) -> Params:
    """Fresh fp32 parameters as transformers draws them: weights N(0, σ²), biases 0, norms 1."""
    width, inner, bias = config.hidden_size, config.intermediate_size, config.attention_bias

    def weight(*shape: int) -> Params:
        return {"weight": torch.randn(*shape, generator=generator) * config.initializer_range}

    def linear(fan_in: int, fan_out: int, bias: bool = True) -> Params:
        return weight(fan_out, fan_in) | ({"bias": torch.zeros(fan_out)} if bias else {})

    def norm() -> Params:
        return {"weight": torch.ones(width), "bias": torch.zeros(width)}

    def layer() -> Params:
        return {
            "input_layernorm": norm(),
            "attention": {
                "query_key_value": linear(width, 3 * width, bias),
                "dense": linear(width, width, bias),
            },
            "post_attention_layernorm": norm(),
            "mlp": {"dense_h_to_4h": linear(width, inner), "dense_4h_to_h": linear(inner, width)},
        }

    head = {} if config.tie_word_embeddings else {"embed_out": weight(config.vocab_size, width)}
    return head | {
        "embed_in": weight(config.vocab_size, width),
        "layers": [layer() for _ in range(config.num_hidden_layers)],
        "final_layer_norm": norm(),
    }


def _linear(params: Params, x: Tensor) -> Tensor:
    return products.linear(x, params["weight"], params.get("bias"))


def _norm(params: Params, x: Tensor, config: GPTNeoXConfig) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], params["weight"], params["bias"], config.layer_norm_eps)


def _turns(positions: Tensor, config: GPTNeoXConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position · base^(-2i/R) for the R turned entries of a head: [..., T] -> [..., T, R].

    Entry i turns with entry i + R/2, so the R/2 angles stand twice. Angles are at least fp32.
    """
    wide, size = torch.promote_types(dtype, torch.float32), config.n_turned
    twice_i = torch.arange(size, device=positions.device) * 2 % size  # 0, 2, ..., R - 2, 0, 2, ..., R - 2
    angles = positions[..., None].to(wide) / config.rotary_emb_base ** (twice_i.to(wide) / size)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _heads(params: Params, x: Tensor, turns: tuple[Tensor, Tensor], config: GPTNeoXConfig) -> list[Tensor]:
    # The fused rows are q, k, v of head 0, then q, k, v of head 1, ...
    fused = _linear(params["query_key_value"], x).unflatten(-1, (config.num_attention_heads, 3, -1))
    qk, v = fused.permute(3, 0, 2, 1, 4).split([2, 1])  # [2, B, H, T, Dh], [1, B, H, T, Dh]
    turned, kept = qk[..., : config.n_turned], qk[..., config.n_turned :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * turns[0] + torch.cat([-second, first], dim=-1) * turns[1]
    return [*torch.cat([turned, kept], dim=-1), *v]


def _add(layer: Params, x: Tensor, attended: Tensor, config: GPTNeoXConfig) -> Tensor:
    """The residual stream after attention and feed-forward, by the parallel or the sequential form."""
    after = x + _linear(layer["attention"]["dense"], attended.transpose(1, 2).flatten(2))
    read = _norm(layer["post_attention_layernorm"], x if config.use_parallel_residual else after, config)
    inner = _ACTIVATIONS[config.hidden_act](_linear(layer["mlp"]["dense_h_to_4h"], read))
    return after + _linear(layer["mlp"]["dense_4h_to_h"], inner)


def _block(
    layer: Params,
    x: Tensor,
    attend: Attend,
    number: int,
    turns: tuple[Tensor, Tensor],
    *,
    config: GPTNeoXConfig,
) -> Tensor:
    q, k, v = _heads(layer["attention"], _norm(layer["input_layernorm"], x, config), turns, config)
    return _add(layer, x, attend(number, q, k, v, scale=None, window=None), config)


def states(
    params: Params,
    tokens: Tensor,
    positions: Tensor,
    attend: Attend,
    *,
    config: GPTNeoXConfig,
    run: RunBlock = directly,
) -> Tensor:
    """States after each token, final norm applied: tokens [B, T] at positions [T] or [B, T] -> [B, T, D].

    Nothing here knows whether the tokens before are part of this call or lie in a cache: `attend` does.
    """
    x = F.embedding(tokens, params["embed_in"]["weight"])
    turns = _turns(positions[..., None, :], config, x.dtype)  # the same for all heads
    of_config = partial(_block, config=config)
    for number, layer in enumerate(params["layers"]):
        x = run(of_config, layer, x, attend, number, turns)
    return _norm(params["final_layer_norm"], x, config)


def unembedding(params: Params) -> Tensor:
    """[V, D]: `embed_out`, or the token embedding where the two are tied."""
    return params.get("embed_out", params["embed_in"])["weight"]


def bind(config: GPTNeoXConfig) -> LanguageModel:
    """The functions of this page, bound to one config."""
    return LanguageModel(
        config=config,
        init=partial(init_params, config=config),
        states=partial(states, config=config),
        unembedding=unembedding,
        cache=CacheShape(
            config.num_hidden_layers,
            config.num_attention_heads,
            config.hidden_size // config.num_attention_heads,
        ),
        stop_ids=(config.eos_token_id,),
        head=None if config.tie_word_embeddings else "embed_out",
    )


def from_huggingface(entries: Mapping[str, Any]) -> GPTNeoXConfig:
    """The config that a GPT-NeoX `config.json` describes; absent entries have transformers' defaults.

    Rotary entries are read from transformers 5's `rope_parameters`, else under their old names. Entries that
    change nothing here (dropout, `use_cache`, ...) are passed over. What this page does not compute, or an
    impossible size, is an InputError.

    >>> from_huggingface({"rope_parameters": {"partial_rotary_factor": 0.5}}).rotary_pct
    0.5
    """
    rope = entries.get("rope_scaling") or entries.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"rope_parameters must be an object, got {rope!r}")
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise InputError(f"unsupported option rope_type = {kind!r}; gpt_neox supports 'default'")
    known = {field.name: entries[field.name] for field in fields(GPTNeoXConfig) if field.name in entries}
    known |= {old: rope[new] for old, new in _ROPE_PARAMETERS.items() if new in rope}
    return GPTNeoXConfig(**known)


def to_huggingface(config: GPTNeoXConfig) -> dict[str, Any]:
    """The entries of `config.json`, with dropout 0 since the parameters were trained without."""
    rope = {"rope_type": "default"} | {new: getattr(config, old) for old, new in _ROPE_PARAMETERS.items()}
    dropout = dict.fromkeys(("attention_dropout", "hidden_dropout", "classifier_dropout"), 0.0)
    return {"model_type": "gpt_neox"} | asdict(config) | {"rope_parameters": rope} | dropout
