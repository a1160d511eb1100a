"""The kinds of preference losses: ours are certified, known bugs are not, other people's right ones are."""

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.objectives.preference import (
    conservative_dpo_loss,
    dpo_loss,
    hinge_loss,
    implicit_reward,
    ipo_loss,
    ipo_summed_loss,
    robust_dpo_loss,
)
from minirlhf.objectives.ranking import bradley_terry_loss, plackett_luce_loss
from minirlhf.objectives.reference_free import orpo_loss, simpo_loss
from minirlhf.objectives.unpaired import kto_loss, kto_reference_point
from minirlhf.verify import KINDS, certify
from minirlhf.verify.catalogue import bugs_of
from tests.verify.preference_variants import EACH, RIGHT, SUMMED, WRONG, Variant

OURS: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo_loss,
    "hinge": hinge_loss,
    "implicit_reward": implicit_reward,
    "conservative_dpo": conservative_dpo_loss,
    "robust_dpo": robust_dpo_loss,
    "ipo": ipo_loss,
    "ipo_summed": ipo_summed_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
    "kto": kto_loss,
    "kto_reference_point": kto_reference_point,
    "bradley_terry": bradley_terry_loss,
    "plackett_luce": plackett_luce_loss,
}


@pytest.mark.parametrize("kind", OURS)
def test_our_function_keeps_every_law_of_its_kind_and_has_its_first_conventions(kind: str) -> None:
    report = certify(OURS[kind], kind, require=["all"])
    assert report, str(report)
    assert len(report.held) == len(report.findings) >= 16
    assert not report.absent
    for convention in KINDS[kind].conventions:
        assert report.conventions[convention.name] == next(iter(convention.values.values()))
    assert report.conventions.get("aggregation", EACH) == EACH
    assert report.conventions.get("factor", "nats") in ("nats", "squared error")


@pytest.mark.parametrize("variant", RIGHT, ids=lambda v: f"{v.kind}-{v.fn.__name__}")
def test_a_right_function_of_another_style_is_certified_and_described(variant: Variant) -> None:
    report = certify(variant.fn, variant.kind, **variant.adapter)
    assert report, str(report)
    assert {name: report.conventions.get(name) for name in variant.conventions} == variant.conventions


@pytest.mark.parametrize(("kind", "fn"), WRONG, ids=lambda x: getattr(x, "__name__", x))
def test_a_wrong_function_that_nobody_listed_is_defective(kind: str, fn: Callable[..., Any]) -> None:
    assert not certify(fn, kind, shrink_seconds=0)


def forgetful(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
              reference_rejected_logps: Tensor, beta: float = 0.1) -> Tensor:  # fmt: skip
    return -F.logsigmoid(beta * (policy_chosen_logps - policy_rejected_logps)).mean()


def test_a_forgotten_reference_is_named_and_its_counter_example_fails() -> None:
    report = certify(forgetful, "dpo")
    assert report.nearest is not None and report.nearest.bug.name == "reference forgotten"
    broken = {finding.law.name: finding for finding in report.broken}
    assert {"chosen_shifted_with_reference", "value_at_reference", "population_optimum"} <= set(broken)
    script = report.counter_example(broken["formula"])
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(AssertionError):
        exec(script, {"__name__": "counter_example"})


def test_a_loss_without_a_reference_argument_is_not_dpo() -> None:
    def loss(chosen_logp: Tensor, rejected_logp: Tensor, beta: float) -> Tensor:
        return -F.logsigmoid(beta * (chosen_logp - rejected_logp))

    report = certify(loss, "dpo", shrink_seconds=0)
    assert report.nearest is not None and report.nearest.bug.name == "reference forgotten"


def test_an_unstable_loss_is_right_but_for_its_range() -> None:
    (bug,) = [bug for bug in bugs_of("dpo") if bug.name == "log(sigmoid) overflows"]
    assert [finding.law.name for finding in certify(bug.plant(), "dpo").broken] == ["stable"]


def test_a_length_that_is_never_used_is_reported() -> None:
    """HALOs d8fd14f: log-probs are never above 0, so every length was 1."""

    def loss(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, len_w: Tensor, len_l: Tensor,
             tau: float) -> Tensor:  # fmt: skip
        ones = (pi_w > 0).sum().clamp(min=1)
        return ((pi_w - ref_w) / ones - (pi_l - ref_l) / ones - 0.5 / tau) ** 2

    report = certify(loss, "ipo")
    assert report and report.conventions["normalisation"] == SUMMED


def test_smoothing_that_is_left_on_is_a_defect_of_dpo_and_no_defect_of_conservative_dpo() -> None:
    def loss(
        pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float, label_smoothing: float = 0.1
    ) -> Tensor:
        logits = beta * (pi_w - pi_l - ref_w + ref_l)
        return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)

    as_dpo = certify(loss, "dpo", shrink_seconds=0)
    assert as_dpo.nearest is not None and as_dpo.nearest.bug.name == "label smoothing left on"
    assert certify(loss, "dpo", fixed={"label_smoothing": 0.0})
    assert certify(loss, "conservative_dpo")


def test_a_dead_margin_is_a_defect_unless_it_is_declared_absent() -> None:
    def loss(chosen_reward: Tensor, rejected_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        return -F.logsigmoid(chosen_reward - rejected_reward).mean()

    assert not certify(loss, "bradley_terry", shrink_seconds=0)
    assert certify(loss, "bradley_terry", without=["margin"])


def test_a_reference_point_that_gets_a_gradient_is_a_defect_where_detaching_is_required() -> None:
    def loss(logp: Tensor, ref_logp: Tensor, desirable: Tensor, kl: Tensor, beta: float) -> Tensor:
        return torch.sigmoid(torch.where(desirable, -1.0, 1.0) * beta * (logp - ref_logp - kl))

    feature = "detached reference point"
    report = certify(loss, "kto", shrink_seconds=0)
    assert report and feature in report.absent
    report = certify(loss, "kto", require=[feature], shrink_seconds=0)
    assert [finding.law.name for finding in report.broken] == ["no_gradient_to_the_reference_point"]


@pytest.mark.parametrize("kind", OURS)
def test_every_kind_has_a_dozen_known_bugs_and_more_laws(kind: str) -> None:
    assert len(bugs_of(kind)) >= 12
    assert len(KINDS[kind].laws) >= 16
