"""Training where the parameters lie on another device: the same numbers, no mixture, and how often one waits.

The device is `tests.second_device`'s. A host that waits for a device leaves it idle afterwards, until the
next operation arrives; so the waits of a step are counted, and what they may depend on is stated.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from minirlhf.evaluation.divergence import kl_to_reference
from minirlhf.kernels.logprob import token_logp_and_entropy
from minirlhf.models.adapters import merged
from minirlhf.models.checkpoint import Normalisation, save_language_model
from minirlhf.models.interface import Params, aligned
from minirlhf.models.packing import hidden, pack
from minirlhf.models.recompute import recomputing
from minirlhf.objectives.sampling import sampling_law
from minirlhf.rollout.sampler import generate
from minirlhf.training import group_policy, influence, ppo, preference, reward_model, sft
from minirlhf.training.device import device_of, numbers
from minirlhf.training.group_experience import GROUP_NORMALISED, RLOO, GroupObjective
from minirlhf.training.offload import waiting
from minirlhf.training.pair_objectives import DPOConfig, IPOConfig, dpo
from minirlhf.training.pairs import cut_pairs, pair_rows
from minirlhf.training.ppo_sampling import objective_on
from minirlhf.training.ppo_update import optimise
from minirlhf.training.rewards import reward_model_scorer
from minirlhf.training.update import adamw, init_state, update
from tests.models.cases import CASES, Case, tiny_model
from tests.second_device import CUDA, Device, There, host, moved, second_device
from tests.training import ppo_setting, tiny
from tests.training.test_group_policy import CONFIG as GROUP
from tests.training.test_ppo import experience_of

SMOOTH = 1e-2  # Adam's ε: with a small one, the sign of a gradient near 0 is a whole step
SIZES: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 2, "max_steps": 2, "learning_rate": 1e-3}
PPO = replace(ppo_setting.CONFIG, adam_epsilon=SMOOTH)
ROOMS = ("training", "kernels", "models", "evaluation")  # all but the rollout's

# How often a step on token log-probs waits for the device, whatever the model's size: in each micro-batch for
# the number of its tokens, where they are, whether their ids are known, and where they are once more going
# backward; and once for loss and gradient norm. Without a gradient a forward pass waits twice.
PER_STEP, PER_MICRO_BATCH, PER_FORWARD = 1, 4, 2


def both(work: Callable[..., Any], *given: Any) -> tuple[Any, Any, Device]:
    """What work(*given) returns here and, with all tensors of `given` there, there; and the device."""
    right = work(*given)
    with second_device() as device:
        found = work(*moved(given))
    return right, found, device


def assert_same(found: Any, right: Any, *, atol: float = 2e-6) -> None:
    """The same numbers up to rounding; kernels differ, since those of the CPU serve the CPU alone."""
    for one, other in zip(tree_leaves(host(found)), tree_leaves(right), strict=True):
        if isinstance(other, Tensor):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=atol)
        elif other is not None:  # a number
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_metrics_are_read_in_one_piece_and_counts_are_not_rounded_by_it() -> None:
    values = {"mean": torch.tensor(0.1), "wide": torch.tensor(0.1).double(), "count": torch.tensor(2**24 + 1)}
    right = {name: float(value) for name, value in values.items()} | {"known": 0.1}
    with second_device() as device:
        assert numbers({**moved(values), "known": 0.1}) == right
        assert device.waits() == 2


def test_a_tensor_of_the_host_inside_a_gradient_is_noticed() -> None:
    mask = torch.tensor([True, False])
    with second_device(), pytest.raises(RuntimeError, match="expected all tensors on one device"):
        torch.func.grad(lambda x: torch.where(mask, x, 0.0).sum())(moved(torch.ones(2)))


STAGES: dict[str, tuple[Callable[..., Any], Any, bool]] = {
    "sft": (sft.train, sft.SFTConfig, False),
    "reward": (reward_model.train, reward_model.RewardConfig, False),
    "dpo": (preference.train_dpo, DPOConfig, True),
    "ipo": (preference.train_ipo, IPOConfig, True),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_learns_the_same_and_waits_as_often_as_it_says(name: str) -> None:
    train, config, referred = STAGES[name]
    data = tiny.EXAMPLES if name == "sft" else tiny.PAIRS
    logged: list[dict[str, float]] = []

    def work(params: Params) -> Params:
        logged.clear()
        reference = [params] if referred else []
        settings = config(**SIZES, adam_epsilon=SMOOTH, log_every=2, evaluate_every=2)
        result = train(
            tiny.MODEL, params, *reference, data, data, settings, generator=tiny.generator(),
            log=lambda step, metrics: logged.append(metrics),
        )  # fmt: skip
        return result.params

    right, found, device = both(work, tiny.fresh_reward() if name == "reward" else tiny.fresh())
    assert all(type(leaf) is There for leaf in tree_leaves(found))
    assert_same(found, right)
    assert len(logged) == 3  # two evaluations, and the metrics of both steps
    steps, micro_batches, passes = 2, 3, 2 * 3  # 4 + 1 rows, two at a time; five rows are evaluated in three
    unembedded = 0 if name == "reward" else PER_MICRO_BATCH * micro_batches + PER_FORWARD * passes
    # The reference's log-probs of both sets, pair by pair; and the check that it is the policy.
    once = 2 * (PER_FORWARD * 5 + 1) + PER_FORWARD * 2 + 2 if referred else 0
    assert device.waits() == PER_STEP * steps + len(logged) + unembedded + once


CHANGES: dict[str, tuple[dict[str, Any], float]] = {  # how it trains, and to what precision that is the same
    "adapters": ({"adapter_rank": 2}, 2e-6),
    "bf16": ({"precision": "bf16"}, 2e-4),
    "adapters on bf16": ({"adapter_rank": 2, "precision": "bf16"}, 2e-4),
    "recomputed": ({"activation_recomputation": True}, 2e-6),
}


@pytest.mark.parametrize("name", CHANGES)
def test_adapters_precision_and_recomputation_stay_on_the_device(name: str) -> None:
    changes, atol = CHANGES[name]

    def work(params: Params) -> Params:
        config = sft.SFTConfig(**SIZES, **changes, adam_epsilon=1.0)
        data = tiny.EXAMPLES
        result = sft.train(tiny.MODEL, params, data, data, config, generator=tiny.generator())
        return merged(result.params)

    right, found, _ = both(work, tiny.fresh())
    assert all(type(leaf) is There and leaf.dtype == torch.float32 for leaf in tree_leaves(found))
    assert_same(found, right, atol=atol)


ONE_OF_EACH = {case.family: case for case in reversed(CASES)} | {"llama": CASES[3]}


@pytest.mark.parametrize("case", ONE_OF_EACH.values(), ids=lambda case: case.label)
def test_every_family_has_the_same_gradient_packed_and_recomputed(case: Case) -> None:
    model, params = tiny_model(case)
    tokens = torch.randint(0, model.config.vocab_size, (4, 7), generator=tiny.generator())
    tokens[:, :3] = tokens[0, :3]
    lengths = torch.tensor([7, 4, 5, 6])
    mask = (torch.arange(7) < lengths[:, None]) & (torch.arange(7) >= 2)

    def work(params: Params, tokens: Tensor, lengths: Tensor, mask: Tensor, run: Any, share: bool) -> Params:
        packing = pack(tokens, lengths) if share else None

        def loss(params: Params) -> Tensor:
            states = aligned(hidden(run, params, tokens, packing))
            logp, entropy = token_logp_and_entropy(states, model.unembedding(params), tokens, mask)
            return (logp + entropy).sum()

        return torch.func.grad(loss)(params)

    for run, share in ((model, False), (recomputing(model), True)):
        right, found, _ = both(work, params, tokens, lengths, mask, run, share)
        assert_same(found, right, atol=1e-4)


def test_a_step_waits_no_more_often_for_a_larger_model() -> None:
    loss = partial(sft.loss, model=tiny.MODEL)
    rows = sft.checked_rows(tiny.EXAMPLES, vocab_size=tiny.VOCAB)
    for micro_batch_size, count in ((5, 1), (2, 3)):
        with second_device() as device:
            state = init_state(moved(tiny.fresh()))
            step = sft.cut(rows, torch.arange(5), micro_batch_size=micro_batch_size, device=CUDA)
            micro_batches = list(step.micro_batches)
            assert device.waits() == 0  # what is cut on the host is only sent
            update(
                state, micro_batches, step.normaliser, loss=loss, optimiser=adamw, learning_rate=1e-3,
                max_grad_norm=1e-3,
            )  # fmt: skip
        assert len(tree_leaves(state.params)) > device.waits() == PER_STEP + PER_MICRO_BATCH * count


def test_an_iteration_of_ppo_learns_the_same() -> None:
    def work(policy: Params, reference: Params, critic: Params) -> tuple[Any, Mapping[str, float]]:
        task = ppo_setting.TASK._replace(reference=reference)
        round = ppo.iteration(task, ppo.begin(policy, critic, PPO), PPO, seed=0)
        timed = {"eps", "perf/tokens_per_second", "guard/sampler_gap"}
        metrics = {name: value for name, value in round.metrics.items() if name not in timed}
        return (round.state.learners, round.sampled.experience), metrics

    right, found, device = both(work, ppo_setting.POLICY, ppo_setting.REFERENCE, ppo_setting.CRITIC)
    assert_same(found, right, atol=1e-5)
    learned = PPO.epochs * PPO.minibatches * (2 * (PER_STEP + 1) + PER_MICRO_BATCH)  # as below
    read = 3 * 3 + 2 * 3 * PER_FORWARD  # three models read the ids; two unembed, in three micro-batches each
    checked = 3 + 1 + 2  # log-probs and values are finite, scores are, and the sampler's law is the trainer's
    metrics = 2 + 1  # in one piece each; and a count, of EOS
    assert device.waits(*ROOMS) == learned + 3 + read + checked + metrics


def test_learning_from_an_experience_waits_once_for_its_ids_and_twice_a_step() -> None:
    config, given = replace(PPO, minibatches=2, micro_batch_size=3), experience_of()

    def work(policy: Params, critic: Params, given: Any) -> Any:
        learners = ppo.Learners(init_state(policy), init_state(critic))
        order = torch.Generator().manual_seed(0)
        return optimise(ppo_setting.MODEL, learners, given, config, rate=1.0, generator=order)[:2]

    right, found, device = both(work, ppo_setting.POLICY, ppo_setting.CRITIC, given)
    assert_same(found, right, atol=1e-5)
    steps = config.epochs * config.minibatches
    micro_batches = steps * -(-len(given.tokens) // config.minibatches // config.micro_batch_size)
    assert device.waits() == 3 + steps * 2 * (PER_STEP + 1) + micro_batches * PER_MICRO_BATCH


@pytest.mark.parametrize("objective", [RLOO, GROUP_NORMALISED], ids=lambda each: each.name)
def test_an_iteration_by_groups_learns_the_same(objective: GroupObjective) -> None:
    config = replace(GROUP, adam_epsilon=SMOOTH)

    def work(policy: Params, reference: Params) -> Any:
        task = ppo_setting.TASK._replace(reference=reference)
        round = group_policy.iteration(task, group_policy.begin(policy), config, objective, seed=0)
        return round.state.policy, round.sampled.experience

    right, found, _ = both(work, ppo_setting.POLICY, ppo_setting.REFERENCE)
    assert_same(found, right, atol=1e-5)


def test_what_waits_is_page_locked_on_the_host_and_comes_back_for_its_use() -> None:
    locked: list[Tensor] = []

    def work(policy: Params, critic: Params) -> tuple[Params, dict[str, float]]:
        device = device_of(policy)
        reference, reward = (waiting(each, device) for each in (ppo_setting.REFERENCE, ppo_setting.CRITIC))
        locked[:] = tree_leaves((reference.params, reward.params))
        scorer = reward_model_scorer(ppo_setting.MODEL, reward, Normalisation(0.5, 2.0))
        evaluate = objective_on(ppo_setting.MODEL, reference, scorer, ppo_setting.PROMPTS, PPO, seed=5)
        config = replace(PPO, iterations=1, critic_pretraining=1, kl_target=0.1)
        result = ppo.train(
            ppo_setting.MODEL, policy, reference, critic, scorer, ppo_setting.PROMPTS, config, seed=0,
            evaluate=evaluate,
        )  # fmt: skip
        return result.params, result.metrics

    right, found, _ = both(work, ppo_setting.POLICY, ppo_setting.CRITIC)
    before = tree_leaves((ppo_setting.REFERENCE, ppo_setting.CRITIC))
    assert not any(one is other or type(one) is There for one, other in zip(locked, before, strict=True))
    assert_same(found, right, atol=1e-5)


@pytest.mark.parametrize("name", ["reward", "dpo"])
def test_influence_is_the_same_and_its_waits_do_not_grow_with_the_parameters(name: str) -> None:
    pairs = pair_rows(tiny.PAIRS, name="training", model=tiny.MODEL)
    loss: Any = partial(
        reward_model.loss, model=tiny.MODEL, label_smoothing=None, center_rewards_coefficient=None
    )
    if name == "dpo":
        pairs = preference.with_reference(tiny.MODEL, tiny.fresh(1), pairs, micro_batch_size=2)
        loss = partial(preference.loss, model=tiny.MODEL, objective=dpo(DPOConfig(beta=0.4)))

    def work(params: Params) -> Any:
        step = cut_pairs(pairs, torch.tensor([1, 3]), micro_batch_size=2, device=device_of(params))
        return influence.influence(params, pairs, step, loss=loss)[:4]

    right, found, device = both(work, tiny.fresh_reward() if name == "reward" else tiny.fresh())
    assert_same(found, right, atol=1e-4)
    each_pair = PER_MICRO_BATCH * (len(tiny.PAIRS) + 1) if name == "dpo" else 0  # vmap takes one by one
    assert device.waits() <= 6 + each_pair


def test_the_evaluations_kl_is_the_same() -> None:
    prompts = ppo_setting.PROMPTS
    index = torch.arange(len(prompts))

    def work(policy: Params, reference: Params) -> Tensor:
        rollout = generate(
            ppo_setting.MODEL, policy, prompts, law=sampling_law, max_new_tokens=6,
            stop_ids=[ppo_setting.EOS], seed=0, prompt_index=index, sample_index=torch.zeros_like(index),
        )  # fmt: skip
        return kl_to_reference(ppo_setting.MODEL, policy, reference, rollout, micro_batch_size=2)

    right, found, _ = both(work, ppo_setting.POLICY, ppo_setting.REFERENCE)
    assert_same(found, right, atol=1e-5)


def test_a_directory_saved_from_the_device_is_the_one_saved_from_the_host(tmp_path: Path) -> None:
    params = tiny.fresh()
    save_language_model(tmp_path / "host", tiny.MODEL, params, tokenizer=None)
    with second_device():
        save_language_model(tmp_path / "device", tiny.MODEL, moved(params), tokenizer=None)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("host", "device")]
    assert written[0] == written[1]
