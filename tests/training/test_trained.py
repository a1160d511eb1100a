"""Adapters and bf16 in the training step: what is trained, what it costs, and that the guards still hold."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models.adapters import adapted_layers, merged
from minirlhf.models.interface import Params
from minirlhf.runs import InputError
from minirlhf.training import (
    group_policy,
    group_update,
    loop,
    ppo,
    ppo_update,
    preference,
    reward_model,
    sft,
    stages,
)
from minirlhf.training import update as update_page
from minirlhf.training.group_config import GroupConfig
from minirlhf.training.guards import GuardError
from minirlhf.training.loop import TrainConfig
from minirlhf.training.ppo_sampling import objective_on
from minirlhf.training.preference import DPOConfig
from minirlhf.training.reward_model import RewardConfig
from minirlhf.training.reward_sources import critic_for, of_reward_model
from minirlhf.training.setting import ReadingConfig, Setting, ShapeConfig
from minirlhf.training.sft import SFTConfig
from minirlhf.training.trained import FULL, Whole, trained, training_bytes
from minirlhf.training.update import adamw, gradient, init_state
from minirlhf.training.workspace import load_policy, load_reference
from tests.miniature import write_files
from tests.training import ppo_setting
from tests.training.tiny import (
    EXAMPLES,
    MODEL,
    PAIRS,
    assert_trees_close,
    fresh,
    fresh_reward,
    generator,
    leaves,
    same_bits,
    snapshot,
)

ADAPTERS = {"adapter_rank": 2, "adapter_alpha": 4.0}
SMALL = {"batch_size": 4, "micro_batch_size": 2, "epochs": 6, "learning_rate": 1e-2, "evaluate_every": 2}
both = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def run_sft(params: Params, **changes: Any) -> Any:
    config = SFTConfig(**(SMALL | changes))
    return sft.train(MODEL, params, EXAMPLES, EXAMPLES, config, generator=generator())


def sft_step() -> Any:
    """(loss, micro-batches, normaliser) of a batch in three micro-batches."""
    rows = sft._rows(EXAMPLES, "training", MODEL)
    step = sft.cut(rows, torch.arange(len(EXAMPLES)), micro_batch_size=2, device=torch.device("cpu"))
    return partial(sft.loss, model=MODEL), step.micro_batches, step.normaliser


@both
@pytest.mark.parametrize("adapters", [{}, ADAPTERS])
def test_sft_learns_and_writes_to_nobody_elses_parameters(precision: str, adapters: dict[str, Any]) -> None:
    params = fresh()
    before = snapshot(params)
    result = run_sft(params, precision=precision, **adapters)
    assert same_bits(before, leaves(params))
    assert result.metrics["eval_loss"] < 0.8 * result.history[0]["eval_loss"]
    assert all(leaf.dtype == torch.float32 for leaf in tree_leaves(merged(result.params)))


def test_with_adapters_only_the_adapted_weights_become_others_and_the_rest_is_shared() -> None:
    params = fresh()
    result = run_sft(params, adapter_targets=("c_attn",), **ADAPTERS)
    layers = adapted_layers(result.params)
    assert list(layers) == ["h.0.attn.c_attn", "h.1.attn.c_attn"]
    assert all(bool(each.up.any()) for each in layers.values())
    moved = [
        not torch.equal(x, y) for x, y in zip(leaves(params), tree_leaves(merged(result.params)), strict=True)
    ]
    assert sum(moved) == 2
    assert layers["h.0.attn.c_attn"].weight is params["h"][0]["attn"]["c_attn"]["weight"]


def test_the_kept_checkpoint_is_not_what_the_optimiser_goes_on_writing_to() -> None:
    kept: list[tuple[Params, list[Tensor]]] = []

    def keep(params: Params, metrics: dict[str, float]) -> None:
        kept.append((params, snapshot(merged(params))))

    config = SFTConfig(**SMALL, **ADAPTERS)
    sft.train(MODEL, fresh(), EXAMPLES, EXAMPLES, config, generator=generator(), keep=keep)
    assert len(kept) > 2
    assert all(same_bits(then, tree_leaves(merged(params))) for params, then in kept)


def test_full_fp32_training_is_bit_for_bit_the_plain_gradient() -> None:
    loss, batches, normaliser = sft_step()
    params = fresh()
    ours, _, _ = gradient(params, batches, normaliser, loss=loss)
    by_hand = [torch.func.grad(lambda p, b=b: loss(p, b, normaliser)[0])(params) for b in batches]
    total = tree_map(lambda *parts: sum(parts[1:], parts[0]), *by_hand)
    assert same_bits(leaves(ours), leaves(total))
    assert trained(MODEL, params, TrainConfig(), generator=generator()).whole == FULL


def test_reward_model_trains_its_head_in_full_beside_the_adapters() -> None:
    params = fresh_reward()
    start = trained(MODEL, params, RewardConfig(**ADAPTERS), generator=generator())
    assert start.initial["score"]["weight"].shape == params["score"]["weight"].shape
    config = RewardConfig(**(SMALL | ADAPTERS))
    result = reward_model.train(MODEL, params, PAIRS, PAIRS, config, generator=generator())
    assert not torch.equal(result.params["score"]["weight"], params["score"]["weight"])
    assert result.metrics["eval_accuracy"] == 1.0
    assert adapted_layers(result.params)


def test_optimiser_and_gradients_are_as_small_as_the_adapters() -> None:
    params = fresh()
    full = trained(MODEL, params, TrainConfig(), generator=generator())
    small = trained(MODEL, params, TrainConfig(adapter_rank=1), generator=generator())
    a, b = training_bytes(full.initial), training_bytes(small.initial)
    state = init_state(small.initial)
    moments = [*tree_leaves(state.exp_avg), *tree_leaves(state.exp_avg_sq)]
    assert b.optimiser == sum(leaf.numel() * leaf.itemsize for leaf in moments)
    # r (in + out) numbers for each of the four layers of both blocks
    assert b.trained == 4 * 2 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16)) == b.gradients
    assert b.gradients + b.optimiser < (a.gradients + a.optimiser) / 4
    low = trained(MODEL, params, TrainConfig(precision="bf16"), generator=generator())
    assert training_bytes(low.initial, low.whole) == a._replace(copy=a.trained // 2)


# --- bf16 ---------------------------------------------------------------------------------------------------


def bf16_gradient(params: Params) -> Params:
    loss, batches, normaliser = sft_step()
    whole = trained(MODEL, params, TrainConfig(precision="bf16"), generator=generator()).whole
    return gradient(params, batches, normaliser, loss=loss, whole=whole)[0]


def test_the_bf16_gradient_is_fp32_and_near_that_of_fp32() -> None:
    loss, batches, normaliser = sft_step()
    params = fresh()
    exact, low = gradient(params, batches, normaliser, loss=loss)[0], bf16_gradient(params)
    assert all(leaf.dtype == torch.float32 for leaf in leaves(low))
    x, y = (torch.cat([leaf.flatten() for leaf in leaves(tree)]) for tree in (exact, low))
    # A rounding is 2^-9; two blocks and their backward pass have some dozens of them, of random sign.
    assert 2**-12 < float((x - y).norm() / x.norm()) < 8 * 2**-8


def test_micro_batches_in_bf16_are_added_up_in_fp32() -> None:
    loss, batches, normaliser = sft_step()
    params = fresh()
    whole = trained(MODEL, params, TrainConfig(precision="bf16"), generator=generator()).whole
    parts = [gradient(params, [b], normaliser, loss=loss, whole=whole)[0] for b in batches]
    total = tree_map(lambda *each: torch.stack(each).double().sum(0), *parts)
    assert_trees_close(bf16_gradient(params), total, share=1e-6)


def test_the_cast_is_made_once_a_step_whatever_the_number_of_micro_batches() -> None:
    loss, batches, normaliser = sft_step()
    params, casts = fresh(), []

    def cast(tree: Params) -> Params:
        casts.append(1)
        return tree_map(lambda x: x.to(torch.bfloat16), tree)

    assert len(batches) > 1
    gradient(params, batches, normaliser, loss=loss, whole=FULL._replace(cast=cast))
    assert len(casts) == 1


def test_many_tiny_steps_are_not_lost_to_rounding() -> None:
    """A hundred steps of 1e-4 on a weight of 1, of which bf16 would keep none: half its spacing is 2^-8."""
    whole = trained(MODEL, fresh(), TrainConfig(precision="bf16"), generator=generator()).whole

    def slope(params: Params, batch: Tensor, normaliser: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (params["w"].float() * batch).sum() / normaliser, {}

    state = init_state({"w": torch.ones(3)})
    for _ in range(100):
        state, _ = update_page.update(
            state,
            [torch.ones(3)],
            torch.tensor(1.0),
            loss=slope,
            optimiser=adamw,
            learning_rate=1e-4,
            max_grad_norm=torch.inf,
            whole=whole,
        )
    torch.testing.assert_close(state.params["w"], torch.full((3,), 0.99), rtol=0, atol=1e-4)
    pure = torch.ones(3, dtype=torch.bfloat16)
    for _ in range(100):
        pure = pure - 1e-4
    assert torch.equal(pure, torch.ones(3, dtype=torch.bfloat16))


@both
@pytest.mark.parametrize("adapters", [{}, ADAPTERS])
def test_dpo_starts_at_its_reference_and_learns(precision: Any, adapters: dict[str, Any]) -> None:
    params = fresh()
    config = DPOConfig(**SMALL, precision=precision, beta=0.5, **adapters)
    result = preference.train_dpo(MODEL, params, params, PAIRS, PAIRS, config, generator=generator())
    assert abs(result.history[0]["eval_loss"] - torch.log(torch.tensor(2.0)).item()) < 1e-2
    assert result.metrics["eval_loss"] < 0.8 * result.history[0]["eval_loss"]


@pytest.mark.parametrize("adapters", [{}, ADAPTERS])
def test_a_reference_in_another_precision_is_caught_where_it_shows(adapters: dict[str, Any]) -> None:
    """The frozen copy has the policy's own tensors: the same bits, not merely near ones."""
    params = fresh()
    start = trained(MODEL, params, DPOConfig(precision="bf16", **adapters), generator=generator())
    near = start.frozen(params)
    assert all(leaf.dtype == torch.bfloat16 for leaf in leaves(near))
    if adapters:
        base = adapted_layers(start.whole.computing(start.initial))["h.0.mlp.c_fc"].weight
        assert near["h"][0]["mlp"]["c_fc"]["weight"].data_ptr() == base.data_ptr()
    other = start.frozen(fresh(5))
    assert all(leaf.dtype == torch.bfloat16 for leaf in leaves(other))


# --- PPO and groups -----------------------------------------------------------------------------------------

# The setting's own model is so sharp (σ = 0.35) that bf16 alone moves single log-probs by 0.1 nats: attention
# over pages and over whole rows then round apart by more than the guard's 3e-2 at one token in a thousand.
POLICY, REFERENCE = (
    tree_map(lambda x: 0.5 * x, each) for each in (ppo_setting.POLICY, ppo_setting.REFERENCE)
)
PPO = replace(ppo_setting.CONFIG, iterations=8, batch_size=32, minibatches=4, micro_batch_size=8)


def run_ppo(**changes: Any) -> tuple[Any, list[dict[str, float]]]:
    config, logged = replace(PPO, **changes), []
    judge = objective_on(
        ppo_setting.MODEL,
        REFERENCE,
        ppo_setting.token_scorer,
        ppo_setting.PROMPTS * 8,
        config,
        seed=7,
    )
    result = ppo.train(
        ppo_setting.MODEL,
        POLICY,
        REFERENCE,
        ppo_setting.CRITIC,
        lambda rollout, index: 3 * ppo_setting.token_scorer(rollout, index),
        ppo_setting.PROMPTS,
        config,
        seed=1,
        evaluate=judge,
        log=lambda number, metrics: logged.append(metrics),
    )
    return result, logged


@both
@pytest.mark.parametrize("adapters", [{}, ADAPTERS | {"adapter_rank": 4}])
def test_ppo_keeps_its_guards_and_learns(precision: str, adapters: dict[str, Any]) -> None:
    before = snapshot(POLICY), snapshot(ppo_setting.CRITIC)
    result, logged = run_ppo(precision=precision, **adapters)
    score = [each["validation/score"] for each in result.history]
    assert max(score) > score[0] + 0.1
    assert result.best_step > 0
    gaps = [each["sampler/gap"] for each in logged if "sampler/gap" in each]
    assert gaps == [] or max(gaps) <= (1e-4 if precision == "fp32" else 3e-2)
    assert same_bits(before[0], leaves(POLICY))
    assert same_bits(before[1], leaves(ppo_setting.CRITIC))


def test_old_log_probs_of_another_precision_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampling half reads weights that were rounded otherwise than those of the learning half."""
    run_ppo(precision="bf16", iterations=1)  # as it should be: no guard stops it

    def rougher(self: Whole, tree: Params) -> Params:
        return tree_map(lambda x: x.to(torch.float8_e4m3fn).float(), tree)

    monkeypatch.setattr(Whole, "computing", rougher)
    with pytest.raises(GuardError, match="off_policy_tokens"):
        run_ppo(precision="bf16", iterations=1)


@both
def test_groups_keep_their_guards_with_adapters(precision: Any) -> None:
    config = GroupConfig(
        iterations=3,
        prompts_per_batch=4,
        samples_per_prompt=4,
        micro_batch_size=8,
        max_response=6,
        learning_rate=1e-2,
        precision=precision,
        **ADAPTERS,
    )
    result = group_policy.train_rloo(
        ppo_setting.MODEL,
        ppo_setting.POLICY,
        ppo_setting.POLICY,
        ppo_setting.token_scorer,
        ppo_setting.PROMPTS,
        config,
        seed=0,
    )
    assert all(bool(each.up.any()) for each in adapted_layers(result.params).values())


@pytest.mark.parametrize(("precision", "nats"), [("fp32", 1e-4), ("bf16", 3e-2)])
def test_guards_judge_by_the_precision_that_is_computed_in(
    precision: Any, nats: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    for page in (ppo_update, group_update):
        monkeypatch.setattr(page, "check_first_minibatch", lambda metrics, tolerance: seen.append(tolerance))
    run_ppo(precision=precision, iterations=1)
    groups = GroupConfig(iterations=1, prompts_per_batch=2, max_response=4, precision=precision)
    start = (ppo_setting.MODEL, POLICY, POLICY, ppo_setting.token_scorer, ppo_setting.PROMPTS)
    group_policy.train_rloo(*start, groups, seed=0)
    assert seen == [nats, nats]


def test_validation_and_reference_are_computed_like_the_step_and_evaluations_like_what_is_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, set[torch.dtype]] = {"measured": set(), "reference": set(), "evaluated": set()}

    def noting(name: str, params: Params) -> None:
        seen[name] |= {leaf.dtype for leaf in tree_leaves(params)}

    measured, referred = loop.measure, preference.reference_logps
    monkeypatch.setattr(loop, "measure", lambda p, *a, **k: (noting("measured", p), measured(p, *a, **k))[1])
    monkeypatch.setattr(
        preference,
        "reference_logps",
        lambda m, p, *a, **k: (noting("reference", p), referred(m, p, *a, **k))[1],
    )

    def evaluate(params: Params) -> dict[str, float]:
        noting("evaluated", params)
        return {}

    params, config = fresh(), DPOConfig(**SMALL, precision="bf16")
    preference.train_dpo(
        MODEL, params, params, PAIRS, PAIRS, config, generator=generator(), evaluate=evaluate
    )
    low, full = {torch.bfloat16}, {torch.float32}
    assert seen == {"measured": low, "reference": low, "evaluated": full}


# --- stages -------------------------------------------------------------------------------------------------

SETTING = Setting(0, "cpu", ReadingConfig(), show=lambda line: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    write_files(root / "data", rows=40)
    shape = ShapeConfig(n_layer=1, n_embd=16, n_head=2, n_positions=48)
    stages.new_model(root / "data/tokenizer.json", root / "model", shape=shape, seed=0)
    config = SFTConfig(batch_size=8, max_steps=3, learning_rate=1e-2, evaluate_every=1, **ADAPTERS)
    demonstrations = root / "data/demonstrations.jsonl"
    stages.sft(root / "model", demonstrations, root / "sft", config=config, setting=SETTING)
    return root


def test_a_stage_leaves_the_merged_model_and_the_adapter_beside_it(made: Path) -> None:
    whole = load_policy(made / "sft", SETTING)
    again = load_policy(made / "sft" / "adapter", SETTING)
    assert_trees_close(whole.params, again.params, share=1e-7)
    assert again.tokenizer.path == made / "model" / "tokenizer.json"
    assert not same_bits(leaves(whole.params), leaves(load_policy(made / "model", SETTING).params))


def test_a_reference_that_is_the_policy_shares_every_tensor(made: Path) -> None:
    start = load_policy(made / "sft", SETTING)
    near = load_reference(made / "data" / ".." / "sft", start, SETTING)
    pairs = list(zip(leaves(start.params), leaves(near.params), strict=True))
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    actor = trained(start.model, start.params, TrainConfig(**ADAPTERS), generator=generator())
    frozen = actor.frozen(near.params)
    joined = actor.whole.computing(actor.initial)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(leaves(frozen), leaves(joined), strict=True))
    other = load_reference(made / "model", start, SETTING)
    assert other.path == made / "model"


def test_an_adapter_of_a_reward_model_is_a_reward_model_and_a_critics_base_is_shared(made: Path) -> None:
    config = RewardConfig(batch_size=8, max_steps=3, learning_rate=1e-2, **ADAPTERS)
    from_setting = stages.reward.__globals__["NormaliseConfig"](rollouts=16, max_response=8)
    stages.reward(
        made / "model",
        made / "data/preferences.jsonl",
        made / "reward",
        config=config,
        normalise=from_setting,
        setting=SETTING,
    )
    merged_one, apart = (of_reward_model(made / name, SETTING) for name in ("reward", "reward/adapter"))
    assert merged_one.backbone is not None and apart.backbone is not None
    assert merged_one.backbone.normalisation == apart.backbone.normalisation
    assert_trees_close(merged_one.backbone.params, apart.backbone.params, share=1e-6)
    start = load_policy(made / "model", SETTING)
    critic = critic_for(merged_one, start, SETTING)
    valuer = trained(start.model, critic, TrainConfig(**ADAPTERS), generator=generator())
    scorer, base = merged_one.backbone.params, valuer.whole.computing(valuer.initial)
    for name in ("wte", "wpe"):
        assert base[name]["weight"].data_ptr() == scorer[name]["weight"].data_ptr()
    assert (
        base["h"][0]["mlp"]["c_fc"]["weight"].data_ptr() == scorer["h"][0]["mlp"]["c_fc"]["weight"].data_ptr()
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"precision": "fp16"}, "precision must be fp32 or bf16, got 'fp16'"),
        ({"adapter_rank": 0}, "adapter_rank must be at least 1"),
        ({"adapter_alpha": 0.0}, "adapter_alpha must be positive"),
        ({"adapter_targets": ()}, "adapter_targets: expected names"),
    ],
)
@pytest.mark.parametrize("config", [SFTConfig, GroupConfig])
def test_an_impossible_config_is_refused(config: Any, change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        config(**change)
