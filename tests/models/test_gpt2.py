"""GPT-2 by itself: initialisation, causality, cache, context, transforms, config entries."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models import gpt2
from minirlhf.models.interface import LanguageModel, Params, aligned, scalar, with_scalar_head
from minirlhf.runs import InputError
from tests.models.plain_cache import extend_, new_cache
from tests.models.tiny import CONFIG, ragged, tiny, valid


def test_fresh_weights_have_the_standard_deviations_of_the_gpt2_recipe() -> None:
    config = gpt2.GPT2Config(vocab_size=500, n_positions=200, n_embd=128, n_layer=8, n_head=4, n_inner=320)
    params = gpt2.bind(config).init(torch.Generator().manual_seed(0))
    std, residual = 0.02, 0.02 / math.sqrt(2 * 8)
    for block in params["h"]:
        for weight, expected in (
            (block["attn"]["c_attn"]["weight"], std),
            (block["attn"]["c_proj"]["weight"], residual),
            (block["mlp"]["c_fc"]["weight"], std),
            (block["mlp"]["c_proj"]["weight"], residual),
        ):
            assert weight.std().item() == pytest.approx(expected, rel=0.03)
            assert abs(weight.mean().item()) < 5 * expected / math.sqrt(weight.numel())
        for norm in (block["ln_1"], block["ln_2"]):
            assert torch.equal(norm["weight"], torch.ones(128)) and not norm["bias"].any()
        for linear in (*block["attn"].values(), *block["mlp"].values()):
            assert not linear["bias"].any()
    assert params["wte"]["weight"].std().item() == pytest.approx(std, rel=0.03)
    assert params["wpe"]["weight"].std().item() == pytest.approx(std, rel=0.03)
    assert params["h"][0]["mlp"]["c_fc"]["weight"].shape == (128, 320)
    assert all(leaf.dtype == torch.float32 for leaf in tree_leaves(params))


def test_initialisation_depends_on_the_generator_alone() -> None:
    def fresh(seed: int) -> list[torch.Tensor]:
        return tree_leaves(gpt2.bind(CONFIG).init(torch.Generator().manual_seed(seed)))

    first = fresh(3)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, fresh(3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, fresh(4), strict=True))


def test_aligned_puts_the_state_before_a_token_at_its_slot() -> None:
    hidden = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    shifted = aligned(hidden)
    assert torch.equal(shifted[:, 1:], hidden[:, :-1])
    assert not shifted[:, 0].any()


def test_a_state_depends_on_its_own_and_earlier_tokens_only() -> None:
    model, params = tiny(dtype=torch.float64)
    tokens, _ = ragged()
    base = model.hidden(params, tokens)
    for t in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % CONFIG.vocab_size
        moved = (model.hidden(params, changed) - base).abs().amax(dim=(0, 2)) > 0
        assert not moved[:t].any()
        assert moved[t:].all()


def test_right_padding_of_any_length_and_id_changes_no_valid_state() -> None:
    model, params = tiny()
    tokens, lengths = ragged()
    base = model.hidden(params, tokens)
    other = torch.where(valid(tokens, lengths), tokens, CONFIG.eos_token_id)
    longer = torch.cat([other, torch.full((len(tokens), 4), CONFIG.eos_token_id)], dim=1)
    padded = model.hidden(params, longer)[:, : tokens.shape[1]]
    mask = valid(tokens, lengths)
    torch.testing.assert_close(padded[mask], base[mask], rtol=0, atol=1e-5)


def test_a_row_alone_has_the_states_it_has_in_a_batch() -> None:
    model, params = tiny(dtype=torch.float64)
    tokens, lengths = ragged()
    batch = model.hidden(params, tokens)
    for row, length in enumerate(lengths.tolist()):
        alone = model.hidden(params, tokens[row : row + 1, :length])[0]
        torch.testing.assert_close(batch[row, :length], alone, rtol=0, atol=1e-12)


@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=8), seed=st.integers(0, 3))
def test_cached_states_equal_uncached_for_every_chunking_of_ragged_rows(cuts: list[int], seed: int) -> None:
    model, params = tiny(seed, dtype=torch.float64)
    tokens, lengths = ragged(seed)
    expected = model.hidden(params, tokens)
    cache = new_cache(model, params, *tokens.shape)
    start = torch.zeros(len(tokens), dtype=torch.int64)
    step = 0
    while bool((start < lengths).any()):
        # Every row goes on from its own place, odd rows slower; near its end a row reads a chunk again.
        take = cuts[step % len(cuts)]
        begin = start.clamp(max=tokens.shape[1] - take)
        positions = begin[:, None] + torch.arange(take)
        got = extend_(model, params, tokens.gather(1, positions), begin, cache)
        right = expected.gather(1, positions[..., None].expand_as(got))
        torch.testing.assert_close(got, right, rtol=0, atol=1e-10)
        start = start + torch.where(torch.arange(len(tokens)) % 2 == 0, take, max(take - 1, 1))
        step += 1


def test_ragged_prefill_then_single_steps_equal_the_uncached_states() -> None:
    model, params = tiny(dtype=torch.float64)
    tokens, lengths = ragged()
    expected = model.hidden(params, tokens)
    cache = new_cache(model, params, len(tokens), CONFIG.n_positions)
    width = int(lengths.max())
    garbage = torch.where(valid(tokens, lengths), tokens, 3)
    prompt = extend_(model, params, garbage[:, :width], torch.zeros_like(lengths), cache)
    torch.testing.assert_close(
        prompt[valid(tokens, lengths)], expected[valid(tokens, lengths)], rtol=0, atol=1e-10
    )
    at, compared = lengths.clone(), 0
    for _ in range(4):  # rows go on at their own positions, over the garbage that prefill left behind
        place = at.clamp(max=tokens.shape[1] - 1)
        got = extend_(model, params, tokens.gather(1, place[:, None]), place, cache)[:, 0]
        live = at < tokens.shape[1]
        right = expected.gather(1, place[:, None, None].expand(-1, 1, got.shape[-1]))[:, 0]
        torch.testing.assert_close(got[live], right[live], rtol=0, atol=1e-10)
        at, compared = at + 1, compared + int(live.sum())
    assert compared >= 8


def test_a_sequence_longer_than_the_context_is_an_error_and_never_cropped() -> None:
    model, params = tiny()
    model.hidden(params, torch.zeros(1, 24, dtype=torch.int64))
    with pytest.raises(ValueError, match="sequence of 25 tokens exceeds the context of 24"):
        model.hidden(params, torch.zeros(1, 25, dtype=torch.int64))


def test_the_scalar_head_reads_every_position_in_at_least_fp32() -> None:
    model, params = tiny()
    tokens, _ = ragged()
    headed = with_scalar_head(model, params, generator=torch.Generator().manual_seed(1))
    states = model.hidden(headed, tokens)
    scores = scalar(headed, states)
    head = headed["score"]["weight"]
    assert scores.shape == tokens.shape and head.shape == (1, 24)
    torch.testing.assert_close(scores, torch.einsum("btd,d->bt", states, head[0]), rtol=1e-5, atol=1e-5)
    assert "score" not in params and headed["h"] is params["h"]
    half = tree_map(lambda x: x.bfloat16(), headed)
    assert scalar(half, states.bfloat16()).dtype == torch.float32
    assert scalar(headed, states.double()).dtype == torch.float64


def test_the_fresh_scalar_head_has_variance_one_over_width_plus_one() -> None:
    wide = {"wte": {"weight": torch.zeros(2, 4096)}}
    head = with_scalar_head(tiny()[0], wide, generator=torch.Generator().manual_seed(0))["score"]["weight"]
    assert head.std().item() == pytest.approx(4097**-0.5, rel=0.05)


def _score_of_last(model: LanguageModel, params: Params, tokens: torch.Tensor) -> torch.Tensor:
    return (model.hidden(params, tokens) @ model.unembedding(params).T).logsumexp(-1).mean()


def test_gradients_under_torch_func_equal_finite_differences() -> None:
    model, params = tiny(dtype=torch.float64)
    tokens, _ = ragged(rows=2, longest=6)
    gradient = torch.func.grad(lambda p: _score_of_last(model, p, tokens))(params)
    generator = torch.Generator().manual_seed(5)
    direction = tree_map(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype), params)
    step = 1e-5

    def moved(sign: float) -> torch.Tensor:
        return _score_of_last(model, tree_map(lambda x, d: x + sign * step * d, params, direction), tokens)

    slope = sum((g * d).sum() for g, d in zip(tree_leaves(gradient), tree_leaves(direction), strict=True))
    numeric = (moved(1.0) - moved(-1.0)) / (2 * step)
    torch.testing.assert_close(torch.as_tensor(slope), numeric, rtol=1e-6, atol=1e-8)
    assert all(bool((leaf != 0).any()) for leaf in tree_leaves(gradient)), "a parameter without influence"


# On CPU torch runs the fused attention of each member in turn and says so; the rest is batched.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_over_an_ensemble_of_parameters_equals_the_loop() -> None:
    models = [tiny(seed, dtype=torch.float64) for seed in range(3)]
    model, tokens = models[0][0], ragged()[0]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *(params for _, params in models))

    def value(params: Params) -> torch.Tensor:
        return _score_of_last(model, params, tokens)

    gradients, values = torch.func.vmap(torch.func.grad_and_value(value))(stacked)
    for index, (_, params) in enumerate(models):
        gradient, alone = torch.func.grad_and_value(value)(params)
        torch.testing.assert_close(values[index], alone, rtol=1e-10, atol=1e-10)
        for many, one in zip(tree_leaves(gradients), tree_leaves(gradient), strict=True):
            torch.testing.assert_close(many[index], one, rtol=1e-9, atol=1e-10)


def test_the_gradient_compiles_as_one_graph_and_is_the_same() -> None:
    model, params = tiny()
    tokens, _ = ragged()
    step = torch.func.grad(lambda p: _score_of_last(model, p, tokens))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, right in zip(tree_leaves(compiled(params)), tree_leaves(step(params)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


def test_config_entries_survive_the_way_out_and_back() -> None:
    config = gpt2.GPT2Config(
        vocab_size=11, n_positions=9, n_embd=8, n_layer=3, n_head=2, layer_norm_epsilon=1e-6,
        initializer_range=0.1, eos_token_id=4, n_inner=20,
    )  # fmt: skip
    entries = gpt2.to_huggingface(config)
    assert gpt2.from_huggingface(entries) == config
    assert entries["activation_function"] == "gelu_new" and entries["tie_word_embeddings"] is True
    assert entries["resid_pdrop"] == entries["attn_pdrop"] == entries["embd_pdrop"] == 0.0


def test_old_and_absent_names_of_the_context_length_are_understood() -> None:
    assert gpt2.from_huggingface({"n_ctx": 77}).n_positions == 77
    assert gpt2.from_huggingface({"n_ctx": 77, "n_positions": 33}).n_positions == 33
    assert gpt2.from_huggingface({}) == gpt2.GPT2Config()


@pytest.mark.parametrize(
    ("option", "value", "supported"),
    [
        ("activation_function", "relu", "'gelu_new' or 'gelu_pytorch_tanh'"),
        ("scale_attn_weights", False, "True"),
        ("scale_attn_by_inverse_layer_idx", True, "False"),
        ("reorder_and_upcast_attn", True, "False"),
        ("add_cross_attention", True, "False"),
        ("tie_word_embeddings", False, "True"),
    ],
)
def test_an_unsupported_option_is_named_with_what_came_and_what_is_supported(
    option: str, value: object, supported: str
) -> None:
    with pytest.raises(InputError) as error:
        gpt2.from_huggingface({option: value})
    assert str(error.value) == f"unsupported option {option} = {value!r}; gpt2 supports {supported}"


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"n_embd": 30, "n_head": 4}, "n_embd must be a multiple of n_head, got 30 and 4"),
        ({"n_layer": 0}, "n_layer must be a positive integer, got 0"),
        ({"n_head": "12"}, "n_head must be a positive integer, got '12'"),
        ({"n_inner": -1}, "n_inner must be a positive integer, got -1"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, got True"),
        ({"eos_token_id": None}, "eos_token_id must be one token id, got None"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon must be a positive number, got 0.0"),
        ({"initializer_range": float("nan")}, "initializer_range must be a positive number, got nan"),
    ],
)
def test_an_impossible_size_is_named(entries: dict[str, object], text: str) -> None:
    with pytest.raises(InputError) as error:
        gpt2.from_huggingface(entries)
    assert str(error.value) == text
