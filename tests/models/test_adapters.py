"""Low-rank adapters are W + (α/r) B A, by value and by gradient, in every family."""

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models.adapters import adapted_layers, adapter_params, joined, linear_layers, merged, targeted
from minirlhf.models.families import FAMILIES, family_of
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.models.tensor_files import named
from minirlhf.rollout.weights import Weights, as_they_are, fastest, int8
from minirlhf.runs import InputError
from tests.models.cases import CASES, Case, tiny_model
from tests.models.tiny import ragged

TOKENS, _ = ragged()
RANK, SCALE = 3, 1.7
ONE_PER_FAMILY = [next(case for case in CASES if case.family == family) for family in FAMILIES]
families = pytest.mark.parametrize("case", ONE_PER_FAMILY, ids=lambda case: case.family)


def fresh(model: LanguageModel, base: Params, *targets: str) -> Params:
    generator = torch.Generator().manual_seed(3)
    return adapter_params(model, base, rank=RANK, targets=targets or ("all-linear",), generator=generator)


def noisy(adapters: Params, seed: int = 5) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return tree_map(lambda x: x + 0.1 * torch.randn(x.shape, generator=generator).to(x), adapters)


def join(model: LanguageModel, base: Params, adapters: Params) -> Params:
    return joined(base, adapters, scale=SCALE, outputs_first=family_of(model).outputs_first)


def dense(case: Case, base: Params, adapters: Params) -> Params:
    """The oracle: W + scale · B A, written out; GPT-2 alone stores the transpose."""
    parts = named(adapters)

    def of(name: str, weight: Tensor) -> Tensor:
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" not in parts:
            return weight
        delta = SCALE * parts[f"{layer}.lora_B.weight"] @ parts[f"{layer}.lora_A.weight"]
        return weight + (delta.T if case.family == "gpt2" else delta)

    names = iter(named(base))
    return tree_map(lambda leaf: of(next(names), leaf), base)


def value(model: LanguageModel, params: Params, tokens: Tensor = TOKENS) -> Tensor:
    return model.hidden(params, tokens).sin().sum()


@families
def test_adapters_are_the_dense_change_by_value_and_gradient(case: Case) -> None:
    model, base = tiny_model(case, dtype=torch.float64)
    adapters = noisy(fresh(model, base))
    ours = torch.func.grad_and_value(lambda a: value(model, join(model, base, a)))(adapters)
    chain = torch.func.grad_and_value(lambda a: value(model, dense(case, base, a)))(adapters)
    for x, y in zip(tree_leaves(ours), tree_leaves(chain), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    assert len(tree_leaves(ours[0])) == 2 * len(linear_layers(base)) > 0
    assert all(bool((leaf != 0).any()) for leaf in tree_leaves(ours[0]))


@families
def test_merging_is_the_dense_change_and_shares_all_else(case: Case) -> None:
    model, base = tiny_model(case, dtype=torch.float64)
    adapters = noisy(fresh(model, base))
    whole = merged(join(model, base, adapters))
    for (name, x), y, b in zip(
        named(whole).items(), tree_leaves(dense(case, base, adapters)), tree_leaves(base), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        assert (x.data_ptr() == b.data_ptr()) == (name.removesuffix(".weight") not in linear_layers(base))


@families
def test_fresh_adapters_change_nothing_and_a_is_as_pefts(case: Case) -> None:
    model, base = tiny_model(case)
    adapters = fresh(model, base)
    assert torch.equal(
        model.hidden(join(model, base, adapters), TOKENS),
        model.hidden(base, TOKENS),
    )
    for name, leaf in named(adapters).items():
        if "lora_A" in name:  # uniform within ±1/√in: variance 1/(3 in)
            assert float(leaf.abs().max()) <= leaf.shape[1] ** -0.5
            assert 0.5 < float(leaf.square().mean()) * 3 * leaf.shape[1] < 1.6
        else:
            assert not leaf.any()


@families
def test_per_example_gradients_by_vmap_are_those_of_a_loop(case: Case) -> None:
    model, base = tiny_model(case, dtype=torch.float64)
    adapters = noisy(fresh(model, base))
    one = torch.func.grad(lambda a, row: value(model, join(model, base, a), row[None]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attention has no batching rule on the CPU, and says so
        together = torch.func.vmap(one, in_dims=(None, 0))(adapters, TOKENS)
    for i, row in enumerate(TOKENS):
        for x, y in zip(tree_leaves(together), tree_leaves(one(adapters, row)), strict=True):
            torch.testing.assert_close(x[i], y, rtol=1e-10, atol=1e-10)


def test_many_adapters_at_once_by_vmap_are_those_of_a_loop() -> None:
    model, base = tiny_model(CASES[0], dtype=torch.float64)
    several = [noisy(fresh(model, base), seed) for seed in range(3)]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *several)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.func.vmap(lambda a: value(model, join(model, base, a)))(stacked)
    loop = torch.stack([value(model, join(model, base, each)) for each in several])
    torch.testing.assert_close(found, loop, rtol=1e-10, atol=1e-10)


@families
def test_a_compiled_step_takes_adapters_as_one_graph(case: Case) -> None:
    model, base = tiny_model(case)
    adapters = noisy(fresh(model, base))
    outputs_first = family_of(model).outputs_first  # no question for a compiler
    step = torch.func.grad(lambda a: value(model, joined(base, a, scale=SCALE, outputs_first=outputs_first)))
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(adapters)
    for x, y in zip(tree_leaves(compiled), tree_leaves(step(adapters)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_targets_are_pefts_names_and_unknown_ones_are_said() -> None:
    model, base = tiny_model(CASES[0])
    blocks = range(2)
    assert targeted(base, ["c_proj"]) == [f"h.{i}.{part}.c_proj" for i in blocks for part in ("attn", "mlp")]
    assert targeted(base, ["mlp.c_proj"]) == [f"h.{i}.mlp.c_proj" for i in blocks]
    assert targeted(base, ["h.1.attn.c_attn"]) == ["h.1.attn.c_attn"]
    assert set(targeted(base, ["all-linear"])) == set(linear_layers(base))
    assert list(adapted_layers(join(model, base, fresh(model, base, "c_fc")))) == [
        "h.0.mlp.c_fc",
        "h.1.mlp.c_fc",
    ]
    for unknown in ("q_proj", "wte", "proj", "ln_1"):
        with pytest.raises(InputError, match=f"{unknown}.*known: all-linear, c_attn, c_proj, c_fc"):
            targeted(base, ["c_attn", unknown])
    with pytest.raises(InputError, match="adapter_rank must lie in 1..24 for h.0.attn.c_attn, got 25"):
        adapter_params(model, base, rank=25, targets=["c_attn"], generator=torch.Generator())


@pytest.mark.parametrize("kind", [as_they_are, fastest, int8])
def test_whatever_a_rollout_multiplies_by_has_the_adapters_in_it(kind: Weights) -> None:
    """Weights that are packed or rounded without them would sample from the base."""
    model, base = tiny_model(CASES[0])
    big = tree_map(lambda x: x.clone(), base)
    big["wte"]["weight"] = big["wte"]["weight"][:, :24]
    params = join(model, big, noisy(fresh(model, big)))
    sampled = kind(params, 8, 64)
    near = model.hidden(merged(params), TOKENS)
    torch.testing.assert_close(model.hidden(sampled, TOKENS), near, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("weights", "allowed"), [(fastest, 1e-4), (int8, 0.5)])
def test_large_weights_are_packed_and_rounded_with_their_adapters(weights: Weights, allowed: float) -> None:
    model = FAMILIES["gpt2"].bind(
        FAMILIES["gpt2"].from_huggingface(
            {"vocab_size": 61, "n_positions": 24, "n_embd": 512, "n_layer": 1, "n_head": 2, "eos_token_id": 7}
        )
    )
    base = model.init(torch.Generator().manual_seed(0))
    params = join(model, base, noisy(fresh(model, base)))
    hidden = partial(model.hidden, tokens=TOKENS)
    wanted, plain = hidden(merged(params)), hidden(base)
    gap = float((hidden(weights(params, 8, 64)) - wanted).abs().max())
    assert gap < allowed * float((plain - wanted).abs().max())
