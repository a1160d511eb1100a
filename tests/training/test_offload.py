"""Parameters that wait elsewhere: moved when they are used, gone afterwards, and the numbers are the same."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf import cli
from minirlhf.models.checkpoint import Normalisation
from minirlhf.models.interface import Params
from minirlhf.runs import InputError
from minirlhf.training import ppo
from minirlhf.training.offload import Waiting, using, waiting, where_it_waits
from minirlhf.training.ppo_sampling import objective_on
from minirlhf.training.rewards import reward_model_scorer
from minirlhf.training.setting import ReadingConfig, Setting
from tests.training.ppo_setting import CONFIG, CRITIC, MODEL, POLICY, PROMPTS, REFERENCE, TASK, token_scorer

CPU = torch.device("cpu")


class Lender:
    """Counts the copies that were made, and how many of them are still alive."""

    def __init__(self) -> None:
        self.copies: list[weakref.ref[Tensor]] = []
        self.made = 0

    def __call__(self, params: Params, device: torch.device) -> Params:
        assert not self.alive(), "the copy before is still there"
        copy = tree_map(torch.clone, params)
        self.made += 1
        self.copies += [weakref.ref(leaf) for leaf in tree_leaves(copy)]
        return copy

    def alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self.copies)


def test_a_copy_is_made_for_the_use_and_is_gone_afterwards() -> None:
    lender = Lender()
    waits = Waiting({"w": torch.arange(3.0)}, CPU, lender)
    assert float(using(waits, lambda params: params["w"].sum())) == 3.0
    assert (lender.made, lender.alive()) == (1, 0)


def test_what_does_not_wait_is_used_as_it_is() -> None:
    params = {"w": torch.ones(1)}
    assert using(params, lambda given: given) is params


def test_an_exception_in_the_use_leaves_no_copy() -> None:
    lender = Lender()

    def fails(params: Params) -> None:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="luck"):
        using(Waiting({"w": torch.ones(1)}, CPU, lender), fails)
    assert lender.alive() == 0


def test_an_iteration_of_ppo_with_a_waiting_reference_has_the_same_numbers_and_one_copy() -> None:
    lender = Lender()
    waiting_task = TASK._replace(reference=Waiting(REFERENCE, CPU, lender))
    plain, lent = (
        ppo.iteration(task, ppo.begin(POLICY, CRITIC, CONFIG), CONFIG, seed=0)
        for task in (TASK, waiting_task)
    )
    for ours, theirs in zip(tree_leaves(lent.state.learners), tree_leaves(plain.state.learners), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
    assert torch.equal(lent.sampled.experience.ref_logp, plain.sampled.experience.ref_logp)
    assert (lender.made, lender.alive()) == (1, 0)


def test_an_evaluation_borrows_the_reference_once() -> None:
    lender = Lender()
    found = [
        objective_on(MODEL, reference, token_scorer, PROMPTS, CONFIG, seed=5)(POLICY)
        for reference in (REFERENCE, Waiting(REFERENCE, CPU, lender))
    ]
    assert found[0] == found[1]
    assert (lender.made, lender.alive()) == (1, 0)


def test_a_waiting_reward_model_is_borrowed_once_for_all_micro_batches() -> None:
    lender, sampled = Lender(), ppo.iteration(TASK, ppo.begin(POLICY, CRITIC, CONFIG), CONFIG, seed=0).sampled
    scores = [
        reward_model_scorer(MODEL, params, Normalisation(0.5, 2.0), micro_batch_size=5)(
            sampled.rollout, sampled.prompt_index
        )
        for params in (CRITIC, Waiting(CRITIC, CPU, lender))
    ]
    assert torch.equal(*scores)
    assert (lender.made, lender.alive()) == (1, 0)


def test_on_the_cpu_there_is_nothing_to_move_and_that_is_said() -> None:
    setting = Setting(0, "cpu", ReadingConfig())
    assert where_it_waits(setting) is setting
    with pytest.raises(InputError, match=r"--offload .* computes on cpu; leave it out"):
        where_it_waits(setting._replace(offload=True))


def test_waiting_on_the_cpu_locks_no_pages() -> None:
    params = {"w": torch.ones(2)}
    assert waiting(params, CPU).params["w"] is params["w"]


def test_the_command_refuses_it_before_it_reads_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = "tests.training.ppo_setting:token_scorer"
    given = ["--policy", "nowhere", "--data", "nowhere", "--out", str(tmp_path / "out"), "--reward", rule]
    assert cli.main(["ppo", *given, "--device", "cpu", "--offload"]) == 2
    assert "--offload" in capsys.readouterr().err
