"""The kinds of advantages and rewards: ours are certified, known bugs are not, right ones of others are."""

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minirlhf.objectives.advantages import discounted_return, gae, whiten, whiten_scale_only
from minirlhf.objectives.divergence import KLController, adapt_kl, kl_k1, kl_shaped_reward
from minirlhf.objectives.group_advantages import (
    group_centred_advantage,
    group_normalised_advantage,
    rloo_advantage,
)
from minirlhf.verify import KINDS, SubjectError, certify
from minirlhf.verify.bugs import advantages, groups, normalisation, shaped_reward
from minirlhf.verify.zoo import Bug
from tests.verify import advantage_variants, reward_variants
from tests.verify.preference_variants import Variant


def shaped_by_k1(score: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float) -> Tensor:
    return kl_shaped_reward(score, kl_k1(logp, ref_logp, mask), mask, beta=beta)


def adapted(coefficient: Tensor, kl: Tensor, target: float, horizon: float, n_steps: float) -> Tensor:
    state = adapt_kl(KLController(coefficient), kl, target=target, horizon=horizon, n_steps=n_steps)
    return state.coefficient


OURS: dict[str, Callable[..., Any]] = {
    "gae": gae,
    "discounted_return": discounted_return,
    "whiten": whiten,
    "whiten_scale_only": whiten_scale_only,
    "rloo": rloo_advantage,
    "group_centred": group_centred_advantage,
    "group_normalised": group_normalised_advantage,
    "kl_shaped_reward": kl_shaped_reward,
    "kl_shaped_reward_from_logps": shaped_by_k1,
    "adaptive_kl": adapted,
}
ZOO: tuple[Bug, ...] = tuple(
    b for page in (advantages, normalisation, groups, shaped_reward) for b in page.BUGS
)
SPECIMENS = {bug.specimen: bug.kind for bug in ZOO}
RIGHT = [*advantage_variants.RIGHT, *reward_variants.RIGHT]
WRONG = [*advantage_variants.WRONG, *reward_variants.WRONG]


@pytest.mark.parametrize("kind", OURS)
def test_our_function_keeps_every_law_of_its_kind(kind: str) -> None:
    report = certify(OURS[kind], kind, require=["all"])
    assert report, str(report)
    assert len(report.held) == len(report.findings) >= 20
    assert not report.absent


@pytest.mark.parametrize("kind", OURS)
def test_our_function_has_the_first_convention_of_its_kind(kind: str) -> None:
    found = certify(OURS[kind], kind).conventions
    assert found == {c.name: next(iter(c.values.values())) for c in KINDS[kind].conventions}


def test_the_biased_deviation_of_ours_is_a_convention() -> None:
    report = certify(group_normalised_advantage, "group_normalised", fixed={"correction": 0}, require=["all"])
    assert report and report.conventions["standard deviation"] == "biased, n"


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda fn: fn.__name__)
def test_a_specimen_is_right(specimen: Callable[..., Any]) -> None:
    report = certify(specimen, SPECIMENS[specimen])
    assert report, str(report)
    assert set(report.absent) <= {"bfloat16 input", "a single token", "NaN-safe mask", "interior masks"}


@pytest.mark.parametrize("variant", RIGHT, ids=lambda v: f"{v.kind}-{v.fn.__name__}")
def test_a_right_function_of_another_style_is_certified_and_described(variant: Variant) -> None:
    report = certify(variant.fn, variant.kind, **variant.adapter)
    assert report, str(report)
    assert {name: report.conventions.get(name) for name in variant.conventions} == variant.conventions


@pytest.mark.parametrize(("kind", "fn"), WRONG, ids=lambda x: getattr(x, "__name__", x))
def test_a_wrong_function_that_nobody_listed_is_defective(kind: str, fn: Callable[..., Any]) -> None:
    assert not certify(fn, kind, shrink_seconds=0)


@pytest.mark.parametrize("kind", OURS)
def test_the_counter_examples_fail_when_they_are_run(kind: str) -> None:
    bug = next(bug for bug in ZOO if bug.kind == kind)
    report = certify(bug.plant(), kind, shrink_seconds=0.3)
    for finding in report.broken:
        assert finding.claim is not None
        if finding.claim.relation == "holds":
            continue
        script = report.counter_example(finding).replace(f"import {bug.specimen.__name__}", "import *")
        names = {bug.specimen.__name__: bug.plant(), "__name__": "counter_example"}
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(AssertionError):
            exec(script.replace(f"from {bug.specimen.__module__} import *", ""), names)


def test_a_leak_of_the_padding_is_told_by_its_law() -> None:
    """ROLL #447: the critic's values after the end enter the last advantage."""
    (bug,) = [bug for bug in ZOO if bug.name == "values of the padding leak"]
    broken = {finding.law.name for finding in certify(bug.plant(), "gae", shrink_seconds=0).broken}
    assert {"terminal_value", "garbage_under_mask", "padding_amount"} <= broken


def test_gamma_and_lambda_exchanged_are_told_by_a_value_and_not_by_a_reward() -> None:
    (bug,) = [bug for bug in ZOO if bug.name == "lambda in place of gamma"]
    broken = {finding.law.name for finding in certify(bug.plant(), "gae", shrink_seconds=0).broken}
    assert "later_value_impulse" in broken and "reward_impulse" not in broken


def test_an_ignored_bootstrap_value_is_a_defect_unless_it_is_declared_absent() -> None:
    (bug,) = [bug for bug in ZOO if (bug.kind, bug.name) == ("gae", "cut row ends")]
    assert not certify(bug.plant(), "gae", shrink_seconds=0)
    assert certify(bug.plant(), "gae", without=["bootstrap_value"])


def test_a_required_bootstrap_value_is_given_as_0_to_rows_that_ended() -> None:
    def estimate(rewards: Tensor, values: Tensor, next_value: Tensor, gamma: float, lam: float) -> Tensor:
        values = torch.cat([values, next_value[:, None]], dim=1)
        return advantage_variants.gae_with_one_more_value(rewards, values, gamma, lam)

    report = certify(estimate, "gae")
    assert report, str(report)
    assert "bootstrap_value" not in report.absent


def test_a_score_in_the_padding_is_lost_and_named() -> None:
    """TRL #1893: paid in the last column, whoever ends before it."""
    (bug,) = [bug for bug in ZOO if bug.name == "score in the last column"]
    report = certify(bug.plant(), "kl_shaped_reward", shrink_seconds=0)
    assert [finding.law.name for finding in report.broken] == ["score_is_somewhere"]
    assert report.nearest is not None and report.nearest.bug == bug


def test_equal_rewards_that_give_nan_are_a_defect() -> None:
    (bug,) = [bug for bug in ZOO if bug.name == "equal rewards give NaN"]
    broken = {
        finding.law.name for finding in certify(bug.plant(), "group_normalised", shrink_seconds=0).broken
    }
    assert "equal_rewards" in broken


LACKS = {
    ("gae", advantage_variants.gae_of_masked_inputs): {
        "bootstrap_value", "interior masks", "zeros under the mask", "NaN-safe mask", "bfloat16 input"},
    ("discounted_return", advantage_variants.returns_reset_after_the_end): {
        "bootstrap_value", "interior masks", "zeros under the mask", "NaN-safe mask", "bfloat16 input"},
    ("whiten", advantage_variants.masked_whiten): {
        "a single token", "epsilon", "zeros under the mask", "NaN-safe mask", "bfloat16 input"},
    ("whiten", advantage_variants.whiten_without_epsilon): {
        "a single token", "constant input", "epsilon", "bfloat16 input"},
    ("whiten", advantage_variants.whiten_by_moments): {
        "epsilon", "numbers far from 0", "NaN-safe mask", "bfloat16 input"},
    ("kl_shaped_reward", reward_variants.shaped_by_scatter): {"zeros under the mask", "bfloat16 input"},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "fn"), LACKS, ids=lambda x: getattr(x, "__name__", x))
def test_what_a_right_function_lacks_is_absent_and_a_defect_only_where_it_is_required(
    kind: str, fn: Callable[..., Any]
) -> None:
    report = certify(fn, kind)
    assert report and set(report.absent) == LACKS[kind, fn]
    for behaviour in set(report.absent) & set(KINDS[kind].behaviours):
        assert not certify(fn, kind, require=[behaviour], shrink_seconds=0), behaviour


def test_a_group_of_one_may_keep_its_reward() -> None:
    report = certify(reward_variants.rloo_by_index, "rloo", **reward_variants.BY_INDEX)
    assert report and "groups of one" in report.absent


def test_what_a_derived_parameter_reads_is_not_absent() -> None:
    report = certify(
        reward_variants.centred_without_the_unscored, "group_centred", **reward_variants.RIGHT[7].adapter
    )
    assert "mask" not in report.absent
    assert "mask" in certify(reward_variants.centred_rows, "group_centred").absent


def test_a_derived_parameter_that_raises_is_explained() -> None:
    with pytest.raises(SubjectError, match=r"derived\['rewards'\] raises KeyError: 'scores'"):
        certify(
            reward_variants.centred_rows, "group_centred", derived={"rewards": lambda case: case["scores"]}
        )


def test_laws_are_named_once_and_sourced() -> None:
    for kind in OURS:
        laws = KINDS[kind].laws
        assert len({law.name for law in laws}) == len(laws)
        assert all(law.source and law.statement for law in laws)
    assert sum(len(KINDS[kind].laws) for kind in OURS) >= 250
