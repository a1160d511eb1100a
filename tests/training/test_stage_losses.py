"""What holds for the loss of every stage: padding, batch mates and splits do not matter; support; descent."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from minirlhf.data.records import Sequences, collate
from minirlhf.data.rows import checked_rows
from minirlhf.models.interface import Params
from minirlhf.models.packing import Packing, pack
from minirlhf.training import preference, reward_model, sft
from minirlhf.training.loop import Step, measure
from minirlhf.training.packed import PackedRows
from minirlhf.training.pair_objectives import (
    ConservativeDPOConfig,
    DPOConfig,
    IPOConfig,
    PairObjective,
    conservative_dpo,
    dpo,
    ipo,
)
from minirlhf.training.pairs import PairBatch, cut_pairs, pair_lengths, pair_rows
from minirlhf.training.update import Loss, adamw, gradient, init_state, update
from tests.training import tiny
from tests.training.tiny import EXAMPLES, MODEL, PAIRS

CPU = torch.device("cpu")
Layout = Callable[[Tensor, Tensor], Packing | None]


def as_padded_rows(tokens: Tensor, lengths: Tensor) -> None:
    return None


def as_a_pool(tokens: Tensor, lengths: Tensor) -> Packing | None:
    return pack(tokens, lengths, worth=1.0)


class Case(NamedTuple):
    """One stage's loss on the tiny data.

    cut: (indices, micro_batch_size) -> Step. metrics: summed aux -> metrics.
    """

    loss: Loss
    params: Params
    cut: Callable[[Tensor, int], Step]
    size: int
    metrics: Callable[[dict[str, Tensor]], dict[str, Tensor]]


def sft_case() -> Case:
    rows = checked_rows(EXAMPLES, vocab_size=tiny.VOCAB)

    def cut(index: Tensor, size: int) -> Step:
        return sft.cut(rows, index, micro_batch_size=size, device=CPU)

    return Case(partial(sft.loss, model=MODEL), tiny.fresh(), cut, len(EXAMPLES), dict)


def reward_case() -> Case:
    pairs = pair_rows(PAIRS, name="tiny", model=MODEL)
    pairs = pairs._replace(extra={"margin": torch.linspace(-1, 1, len(PAIRS))})
    loss = partial(reward_model.loss, model=MODEL, label_smoothing=0.1, center_rewards_coefficient=0.3)

    def cut(index: Tensor, size: int) -> Step:
        return cut_pairs(pairs, index, micro_batch_size=size, device=CPU)

    return Case(loss, tiny.fresh_reward(), cut, len(PAIRS), reward_model.metrics)


def preference_case(objective: PairObjective) -> Case:
    pairs = pair_rows(PAIRS, name="tiny", model=MODEL)
    ref = preference.reference_logps(MODEL, tiny.fresh(5), pairs.rows, micro_batch_size=3)
    pairs = pairs._replace(extra={"ref_chosen": ref[: len(PAIRS)], "ref_rejected": ref[len(PAIRS) :]})

    def cut(index: Tensor, size: int) -> Step:
        return cut_pairs(pairs, index, micro_batch_size=size, device=CPU)

    loss = partial(preference.loss, model=MODEL, objective=objective)
    return Case(loss, tiny.fresh(), cut, len(PAIRS), preference.metrics)


CASES: dict[str, Callable[[], Case]] = {
    "sft": sft_case,
    "reward": reward_case,
    "dpo": lambda: preference_case(dpo(DPOConfig(beta=0.4))),
    "cdpo": lambda: preference_case(conservative_dpo(ConservativeDPOConfig(beta=0.4, label_smoothing=0.2))),
    "ipo": lambda: preference_case(ipo(IPOConfig(tau=0.3))),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def evaluated(case: Case, step: Step) -> tuple[Params, Tensor, dict[str, Tensor]]:
    """Gradient, loss and metrics of a step."""
    grads, value, aux = gradient(case.params, step.micro_batches, step.normaliser, loss=case.loss)
    return grads, value, case.metrics(aux)


def assert_same(a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
    tiny.assert_trees_close(a[0], b[0])
    torch.testing.assert_close(a[1], b[1], rtol=1e-6, atol=0)
    assert a[2].keys() == b[2].keys()
    for name, value in a[2].items():
        torch.testing.assert_close(value, b[2][name], rtol=1e-5, atol=1e-6)


def with_rows(step: Step, change: Callable[[Sequences], Sequences], layout: Layout) -> Step:
    """The step with every micro-batch's rows changed, and laid out in this way."""

    def changed(batch: Any) -> Any:
        rows = change(batch.rows)
        return batch._replace(rows=rows, packing=layout(rows.tokens, rows.lengths))

    return step._replace(micro_batches=[changed(batch) for batch in step.micro_batches])


def test_packed_rows_have_the_gradient_loss_and_metrics_of_padded_ones(case: Case) -> None:
    step = case.cut(torch.arange(case.size), 3)
    assert all(batch.packing is not None for batch in step.micro_batches)  # the losses had something to read
    same = [with_rows(step, lambda rows: rows, layout) for layout in (as_padded_rows, as_a_pool)]
    assert_same(evaluated(case, same[0]), evaluated(case, same[1]))
    assert_same(evaluated(case, same[0]), evaluated(case, step))


@pytest.mark.parametrize("layout", [as_padded_rows, as_a_pool])
def test_ids_in_the_padding_change_nothing(case: Case, layout: Layout) -> None:
    def scribble(rows: Sequences) -> Sequences:
        padding = torch.arange(rows.tokens.shape[1]) >= rows.lengths[:, None]
        assert padding.any()
        noise = torch.randint(tiny.VOCAB, rows.tokens.shape, generator=tiny.generator(3))
        return rows._replace(tokens=torch.where(padding, noise, rows.tokens))

    step = case.cut(torch.arange(case.size), case.size)
    assert_same(evaluated(case, step), evaluated(case, with_rows(step, scribble, layout)))


@pytest.mark.parametrize("layout", [as_padded_rows, as_a_pool])
def test_more_padding_changes_nothing(case: Case, layout: Layout) -> None:
    def widen(rows: Sequences) -> Sequences:
        pad = torch.nn.functional.pad
        return rows._replace(tokens=pad(rows.tokens, (0, 3), value=tiny.EOS), mask=pad(rows.mask, (0, 3)))

    step = case.cut(torch.tensor([0, 1, 2, 4]), case.size)  # row 3 fills the context
    assert_same(evaluated(case, step), evaluated(case, with_rows(step, widen, layout)))


def test_rows_do_not_see_their_batch_mates(case: Case) -> None:
    whole = case.cut(torch.arange(case.size), case.size)
    grads, value, _ = gradient(case.params, whole.micro_batches, whole.normaliser, loss=case.loss)
    total: Any = None
    parts = 0.0
    for i in range(case.size):
        alone = case.cut(torch.tensor([i]), 1)
        one, loss, _ = gradient(case.params, alone.micro_batches, whole.normaliser, loss=case.loss)
        total = (
            tiny.leaves(one)
            if total is None
            else [a + b for a, b in zip(total, tiny.leaves(one), strict=True)]
        )
        parts += float(loss)
    tiny.assert_trees_close(total, tiny.leaves(grads))
    assert parts == pytest.approx(float(value), rel=1e-6)


def test_the_order_of_rows_does_not_matter(case: Case) -> None:
    index = torch.tensor([3, 0, 4, 2, 1])
    assert_same(
        evaluated(case, case.cut(index, case.size)),
        evaluated(case, case.cut(torch.arange(case.size), case.size)),
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gradient_loss_and_metrics_do_not_depend_on_the_micro_batches(case: Case, size: int) -> None:
    index = torch.arange(case.size)
    assert_same(evaluated(case, case.cut(index, case.size)), evaluated(case, case.cut(index, size)))


def test_doubling_the_batch_changes_neither_loss_nor_gradient(case: Case) -> None:
    index = torch.arange(case.size)
    once, twice = case.cut(index, 3), case.cut(torch.cat([index, index]), 3)
    assert_same(evaluated(case, once), evaluated(case, twice))
    assert twice.tokens == 2 * once.tokens


def test_measuring_gives_the_loss_and_metrics_of_the_gradient_pass(case: Case) -> None:
    step = case.cut(torch.arange(case.size), 2)
    _, value, metrics = evaluated(case, step)
    sums = measure(case.params, step, loss=case.loss)
    torch.testing.assert_close(sums.pop("loss"), value, rtol=1e-6, atol=0)
    for name, found in case.metrics(sums).items():
        torch.testing.assert_close(found, metrics[name], rtol=1e-5, atol=1e-6)


def test_one_step_lowers_the_loss_of_its_batch(case: Case) -> None:
    step = case.cut(torch.arange(case.size), 2)
    before = measure(case.params, step, loss=case.loss)["loss"]
    state, _ = update(
        init_state(case.params),
        step.micro_batches,
        step.normaliser,
        loss=case.loss,
        optimiser=adamw,
        learning_rate=1e-3,
        max_grad_norm=1.0,
    )
    assert measure(state.params, step, loss=case.loss)["loss"] < before


def touched(loss: Loss, params: Params, batch: Any, normaliser: float) -> list[list[int]]:
    """For each row, the positions whose states (= logits) receive gradient."""
    grads, _, _ = gradient(params, [batch], torch.tensor(normaliser), loss=loss)
    return [row.nonzero().flatten().tolist() for row in grads["states"].abs().sum(-1).bool()]


def trained_predecessors(rows: Sequences) -> list[list[int]]:
    return [[t - 1 for t in row.nonzero().flatten().tolist()] for row in rows.mask]


def test_sft_trains_exactly_the_positions_before_trained_tokens() -> None:
    rows = collate(EXAMPLES)
    model, params = tiny.free_states(rows.tokens, tiny.VOCAB)
    assert touched(partial(sft.loss, model=model), params, PackedRows(rows), 20.0) == trained_predecessors(
        rows
    )


@pytest.mark.parametrize("objective", [dpo(DPOConfig()), ipo(IPOConfig())], ids=["dpo", "ipo"])
def test_preference_losses_touch_no_prompt_logit_and_no_padding(objective: PairObjective) -> None:
    rows = collate([pair.chosen for pair in PAIRS] + [pair.rejected for pair in PAIRS])
    model, params = tiny.free_states(rows.tokens, tiny.VOCAB)
    zeros = torch.zeros(len(PAIRS))
    batch = PairBatch(
        rows, {"ref_chosen": zeros, "ref_rejected": zeros - 1}, torch.arange(len(PAIRS)), len(PAIRS)
    )
    loss = partial(preference.loss, model=model, objective=objective)
    assert touched(loss, params, batch, 5.0) == trained_predecessors(rows)


def test_the_reward_is_read_at_the_last_valid_token_only() -> None:
    rows = collate([pair.chosen for pair in PAIRS] + [pair.rejected for pair in PAIRS])
    model, params = tiny.free_states(rows.tokens, 6)
    loss = partial(reward_model.loss, model=model, label_smoothing=None, center_rewards_coefficient=None)
    batch = PairBatch(rows, {}, torch.arange(len(PAIRS)), len(PAIRS))
    assert touched(loss, params, batch, 5.0) == [[length - 1] for length in rows.lengths.tolist()]


def test_a_pair_is_as_long_as_its_longer_side_and_counts_the_tokens_of_both() -> None:
    pairs = pair_rows(PAIRS, name="tiny", model=MODEL)
    assert pair_lengths(pairs).tolist() == [4, 8, 7, 14, 6]
    step = cut_pairs(pairs, torch.tensor([3, 1]), micro_batch_size=1, device=CPU)
    assert step.tokens == 14 + 7 + 4 + 8
    assert [batch.rows.tokens.shape for batch in step.micro_batches] == [(2, 14), (2, 8)]


def test_equal_rewards_count_as_wrongly_ranked() -> None:
    chosen, rejected = torch.tensor([1.0, 2.0, 0.0, 3.0]), torch.tensor([1.0, 1.0, 0.0, 4.0])
    rewards = {"chosen_reward": chosen, "rejected_reward": rejected}
    assert reward_model.metrics(rewards)["accuracy"] == 0.25
    logps = {"chosen": chosen, "rejected": rejected}
    assert preference.metrics({**rewards, **logps})["rewards/accuracies"] == 0.25
