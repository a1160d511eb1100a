"""Llama and its kin from scratch: pure functions of (params, config).

Touvron et al. 2023, "Llama 2" (arXiv:2307.09288), and what others changed: Llama 3 and SmolLM2 (stretched
positions, grouped queries, a tied head), Mistral (a sliding window), Qwen2 (biases, windows in some layers).
Names and [out, in] weights are the checkpoint's; llama_config.py reads its config. Logits, greedy
continuations and directories agree with transformers (tests/models/parity.py). There is no dropout.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.kernels import products
from minirlhf.models.interface import Attend, CacheShape, LanguageModel, Params, RunBlock, directly
from minirlhf.models.llama_config import FULL, SLIDING, LlamaConfig, RopeParameters


def init_params(generator: torch.Generator, *, config: LlamaConfig) -> Params:
    """Fresh fp32 parameters: weights N(0, σ²), biases 0, norms 1, as transformers draws them."""
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    biased = config.attention_bias or config.model_type == "qwen2"

    def linear(fan_in: int, fan_out: int, bias: bool = False) -> Params:
        weight = torch.randn(fan_out, fan_in, generator=generator) * config.initializer_range
        return {"weight": weight, "bias": torch.zeros(fan_out)} if bias else {"weight": weight}

    def block() -> Params:
        return {
            "input_layernorm": {"weight": torch.ones(width)},
            "self_attn": {
                "q_proj": linear(width, q, biased),
                "k_proj": linear(width, kv, biased),
                "v_proj": linear(width, kv, biased),
                "o_proj": linear(q, width, config.attention_bias),
            },
            "post_attention_layernorm": {"weight": torch.ones(width)},
            "mlp": {
                "gate_proj": linear(width, inner, config.mlp_bias),
                "up_proj": linear(width, inner, config.mlp_bias),
                "down_proj": linear(inner, width, config.mlp_bias),
            },
        }

    params: Params = {"embed_tokens": linear(width, config.vocab_size)}
    params["layers"] = [block() for _ in range(config.num_hidden_layers)]
    params["norm"] = {"weight": torch.ones(width)}
    return params if config.tie_word_embeddings else params | {"lm_head": linear(width, config.vocab_size)}


def _linear(params: Params, x: Tensor) -> Tensor:
    return products.linear(x, params["weight"], params.get("bias"))


def _norm(params: Params, x: Tensor, config: LlamaConfig) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares overflow and vanish in half precision
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + config.rms_norm_eps)
    return params["weight"] * wide.to(x.dtype)


def frequencies(rope: RopeParameters, width: int, *, device: torch.device) -> Tensor:
    """Radians per position of each pair of dimensions, [width / 2]: θ^(-2i/width), then stretched.

    Su et al. 2021, "RoFormer" (arXiv:2104.09864). In fp32 and by the operations of transformers: at position
    8,000 the last bit of a frequency is 5e-4 radians, and checkpoints were trained with these.
    """
    plain = 1.0 / rope.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    return _STRETCH[rope.rope_type](plain, rope)


def _unstretched(plain: Tensor, rope: RopeParameters) -> Tensor:
    """As trained. Also dynamic NTK up to max_position_embeddings, which is where every context here ends."""
    return plain


def _linear_stretch(plain: Tensor, rope: RopeParameters) -> Tensor:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595)."""
    return plain / rope.factor


def _llama3_stretch(plain: Tensor, rope: RopeParameters) -> Tensor:
    """Llama 3.1: slow pairs interpolated, fast ones kept, in between a blend of both."""
    turns = rope.original_max_position_embeddings / (2 * math.pi / plain)  # within the original context
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = (1 - kept) * plain / rope.factor + kept * plain
    slow = torch.where(turns < rope.low_freq_factor, plain / rope.factor, blend)
    return torch.where(turns > rope.high_freq_factor, plain, slow)


def _yarn_stretch(plain: Tensor, rope: RopeParameters) -> Tensor:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp over the pairs from kept to interpolated."""
    pairs = len(plain)

    def pair_that_turns(times: float) -> float:
        period = rope.original_max_position_embeddings / (times * 2 * math.pi)
        return 2 * pairs * math.log(period) / (2 * math.log(rope.rope_theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    steps = torch.arange(pairs, dtype=torch.float32, device=plain.device)
    kept = 1 - ((steps - first) / (last - first or 0.001)).clamp(0, 1)
    return plain / rope.factor * (1 - kept) + plain * kept


_STRETCH = {
    "default": _unstretched,
    "dynamic": _unstretched,
    "linear": _linear_stretch,
    "llama3": _llama3_stretch,
    "yarn": _yarn_stretch,
}


def _rotations(positions: Tensor, like: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions [..., T], once for all layers: each [..., T, Dh / 2]."""
    scale = config.rope_parameters.attention_factor
    turns = frequencies(config.rope_parameters, config.head_dim, device=positions.device)
    angles = positions[..., None].float() * turns
    return (angles.cos() * scale).to(like.dtype), (angles.sin() * scale).to(like.dtype)


def _rotate(x: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotations
    first, second = x.chunk(2, dim=-1)  # pair i is (x[i], x[i + Dh / 2]) in these checkpoints
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _heads(params: Params, x: Tensor, rotations: tuple[Tensor, Tensor], config: LlamaConfig) -> list[Tensor]:
    """Queries [B, H, T, Dh], keys and values [B, H_kv, T, Dh]; queries and keys are rotated."""
    split = (*x.shape[:2], -1, config.head_dim)
    names = ("q_proj", "k_proj", "v_proj")
    q, k, v = (_linear(params[name], x).view(split).transpose(1, 2) for name in names)
    return [_rotate(q, rotations), _rotate(k, rotations), v]


def _merge(params: Params, attended: Tensor) -> Tensor:
    return _linear(params["o_proj"], attended.transpose(1, 2).flatten(2))


def _mlp(params: Params, x: Tensor) -> Tensor:
    gated = F.silu(_linear(params["gate_proj"], x)) * _linear(params["up_proj"], x)  # SwiGLU
    return _linear(params["down_proj"], gated)


def _block(
    params: Params,
    x: Tensor,
    attend: Attend,
    layer: int,
    window: int | None,
    rotations: tuple[Tensor, Tensor],
    *,
    config: LlamaConfig,
) -> Tensor:
    q, k, v = _heads(params["self_attn"], _norm(params["input_layernorm"], x, config), rotations, config)
    x = x + _merge(params["self_attn"], attend(layer, q, k, v, scale=None, window=window))
    return x + _mlp(params["mlp"], _norm(params["post_attention_layernorm"], x, config))


def states(
    params: Params,
    tokens: Tensor,
    positions: Tensor,
    attend: Attend,
    *,
    config: LlamaConfig,
    run: RunBlock = directly,
) -> Tensor:
    """States after each token, final norm applied: tokens [B, T] at positions [T] or [B, T] -> [B, T, D].

    Nothing here knows whether the tokens before are part of this call or lie in a cache: `attend` does.
    """
    x = F.embedding(tokens, params["embed_tokens"]["weight"])
    rotations = _rotations(positions[..., None, :], x, config)  # the same for all heads
    windows, of_config = {FULL: None, SLIDING: config.sliding_window}, partial(_block, config=config)
    for layer, (block, kind) in enumerate(zip(params["layers"], config.layer_types, strict=True)):
        x = run(of_config, block, x, attend, layer, windows[kind], rotations)
    return _norm(params["norm"], x, config)


def unembedding(params: Params, *, config: LlamaConfig) -> Tensor:
    """[V, D]: the token embedding where the head is tied to it."""
    return params["embed_tokens" if config.tie_word_embeddings else "lm_head"]["weight"]


def bind(config: LlamaConfig) -> LanguageModel:
    """The functions of this page, bound to one config."""
    return LanguageModel(
        config=config,
        init=partial(init_params, config=config),
        states=partial(states, config=config),
        unembedding=partial(unembedding, config=config),
        cache=CacheShape(config.num_hidden_layers, config.num_key_value_heads, config.head_dim),
        stop_ids=(config.eos_token_id,),
        head=None if config.tie_word_embeddings else "lm_head",
    )
