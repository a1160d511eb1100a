"""What every family keeps to, by itself: causality, padding, cache, context, transforms, heads, entries.

On the tiny configurations of tests/models/cases.py; what is special about a family is tested beside it.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models.families import FAMILIES
from minirlhf.models.interface import LanguageModel, Params, with_scalar_head, without_head
from minirlhf.models.tensor_files import named
from tests.models.cases import CASES, Case, tiny_model
from tests.models.plain_cache import extend_, new_cache
from tests.models.tiny import ragged, valid

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
# The slow transforms run on one configuration of each page, the last one.
one_of_each = pytest.mark.parametrize(
    "case", {FAMILIES[case.family].bind: case for case in CASES}.values(), ids=lambda case: case.label
)


def test_every_family_has_a_case() -> None:
    assert {case.family for case in CASES} == set(FAMILIES)


@every_case
def test_a_state_depends_on_its_own_and_not_on_later_tokens(case: Case) -> None:
    model, params = tiny_model(case, dtype=torch.float64)
    tokens, _ = ragged(rows=2, longest=12)
    base = model.hidden(params, tokens)
    for t in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 61
        moved = (model.hidden(params, changed) - base).abs().amax(dim=(0, 2)) > 0
        assert not moved[:t].any() and moved[t]


@every_case
def test_right_padding_of_any_length_and_id_changes_no_valid_state(case: Case) -> None:
    model, params = tiny_model(case)
    tokens, lengths = ragged()
    mask = valid(tokens, lengths)
    other = torch.where(mask, tokens, 7)
    longer = torch.cat([other, torch.full((len(tokens), 4), 7)], dim=1)
    padded, base = model.hidden(params, longer)[:, : tokens.shape[1]], model.hidden(params, tokens)
    torch.testing.assert_close(padded[mask], base[mask], rtol=0, atol=1e-5)


@every_case
def test_a_row_alone_has_the_states_it_has_in_a_batch(case: Case) -> None:
    model, params = tiny_model(case, dtype=torch.float64)
    tokens, lengths = ragged()
    batch = model.hidden(params, tokens)
    for row, length in enumerate(lengths.tolist()):
        alone = model.hidden(params, tokens[row : row + 1, :length])[0]
        torch.testing.assert_close(batch[row, :length], alone, rtol=0, atol=1e-12)


@every_case
@pytest.mark.parametrize("cuts", [[1], [5, 1, 3], [17]], ids=str)
def test_cached_states_equal_uncached_for_chunks_of_ragged_rows(case: Case, cuts: list[int]) -> None:
    model, params = tiny_model(case, 1, dtype=torch.float64)
    tokens, lengths = ragged(1)
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


@every_case
def test_what_exceeds_the_context_is_an_error(case: Case) -> None:
    model, params = tiny_model(case)
    assert model.config.n_positions == 24
    model.hidden(params, torch.zeros(1, 24, dtype=torch.int64))
    with pytest.raises(ValueError, match="sequence of 25 tokens exceeds the context of 24"):
        model.hidden(params, torch.zeros(1, 25, dtype=torch.int64))


def score(model: LanguageModel, params: Params, tokens: torch.Tensor) -> torch.Tensor:
    return (model.hidden(params, tokens) @ model.unembedding(params).T).logsumexp(-1).mean()


@every_case
def test_gradients_under_torch_func_equal_finite_differences(case: Case) -> None:
    model, params = tiny_model(case, dtype=torch.float64)
    tokens, _ = ragged(rows=2, longest=9)
    gradient = torch.func.grad(lambda p: score(model, p, tokens))(params)
    generator = torch.Generator().manual_seed(5)
    direction = tree_map(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype), params)
    step = 1e-6

    def moved(sign: float) -> torch.Tensor:
        return score(model, tree_map(lambda x, d: x + sign * step * d, params, direction), tokens)

    slope = sum((g * d).sum() for g, d in zip(tree_leaves(gradient), tree_leaves(direction), strict=True))
    numeric = (moved(1.0) - moved(-1.0)) / (2 * step)
    torch.testing.assert_close(torch.as_tensor(slope), numeric, rtol=1e-6, atol=1e-7)
    still = [name for name, leaf in named(gradient).items() if not bool((leaf != 0).any())]
    assert not still, "parameters without influence"


# On CPU torch runs the fused attention of each member in turn and says so; the rest is batched.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@one_of_each
def test_vmap_over_an_ensemble_of_parameters_equals_the_loop(case: Case) -> None:
    models = [tiny_model(case, seed, dtype=torch.float64) for seed in range(3)]
    model, tokens = models[0][0], ragged()[0]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *(params for _, params in models))

    def value(params: Params) -> torch.Tensor:
        return score(model, params, tokens)

    gradients, values = torch.func.vmap(torch.func.grad_and_value(value))(stacked)
    for index, (_, params) in enumerate(models):
        gradient, alone = torch.func.grad_and_value(value)(params)
        torch.testing.assert_close(values[index], alone, rtol=1e-10, atol=1e-10)
        for many, one in zip(tree_leaves(gradients), tree_leaves(gradient), strict=True):
            torch.testing.assert_close(many[index], one, rtol=1e-9, atol=1e-10)


@one_of_each
def test_the_gradient_compiles_as_one_graph_and_is_the_same(case: Case) -> None:
    model, params = tiny_model(case)
    tokens, _ = ragged()
    step = torch.func.grad(lambda p: score(model, p, tokens))
    torch._dynamo.reset()  # else a page's second config is compiled for sizes of any value, which takes long
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, right in zip(tree_leaves(compiled(params)), tree_leaves(step(params)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


@every_case
def test_initialisation_depends_on_the_generator_alone_and_is_fp32(case: Case) -> None:
    model, _ = tiny_model(case)
    first = tree_leaves(model.init(torch.Generator().manual_seed(3)))
    torch.manual_seed(99)
    again = tree_leaves(model.init(torch.Generator().manual_seed(3)))
    other = tree_leaves(model.init(torch.Generator().manual_seed(4)))
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@every_case
def test_the_unembedding_is_the_head_or_the_embedding_and_a_scalar_head_replaces_it(case: Case) -> None:
    model, params = tiny_model(case)
    embedding = named(params)[FAMILIES[case.family].embedding]
    head = embedding if model.head is None else params[model.head]["weight"]
    assert model.unembedding(params) is head and head.shape == (61, 24)
    headed = with_scalar_head(model, params, generator=torch.Generator().manual_seed(0))
    assert set(headed) == set(params) - {model.head} | {"score"}
    tokens, _ = ragged()
    states = model.hidden(without_head(model, params), tokens)
    assert torch.equal(model.hidden(headed, tokens), states)


@every_case
def test_config_entries_survive_the_way_out_and_back(case: Case) -> None:
    family, config = FAMILIES[case.family], tiny_model(case)[0].config
    entries = family.to_huggingface(config)
    assert entries["model_type"] == case.family
    assert family.from_huggingface(entries) == config
    assert family.from_huggingface(entries | {"eos_token_id": 9}) == replace(config, eos_token_id=9)
