"""Kinds of the policy's losses, the critic's, importance weights, reductions and log-probs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minirlhf.kernels import logprob
from minirlhf.objectives import importance, masked, policy, policy_variants, value
from minirlhf.verify import KINDS, certify
from minirlhf.verify.bugs.policy import policy_gradient
from minirlhf.verify.report import ABSENT
from tests.verify.policy_defects import WRONG
from tests.verify.policy_variants import RIGHT, Variant, trl_grpo


def aligned_logp(logits: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Our kernel with the identity as unembedding; a product with an infinite logit would be NaN."""
    states = logits.clamp(min=-1e30)
    unembedding = torch.eye(logits.shape[-1], dtype=logits.dtype)
    return logprob.token_logp(states, unembedding, tokens, mask, temperature=temperature)


def sequence_logp(logits: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    shifted = torch.cat([torch.zeros_like(logits[:, :1]), logits[:, :-1]], 1)
    return aligned_logp(shifted, tokens, mask, temperature=temperature)


def dense_logp(logits: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    unembedding = torch.eye(logits.shape[-1], dtype=logits.dtype)
    return logprob.token_logp_dense(
        logits.clamp(min=-1e30), unembedding, tokens, mask, temperature=temperature
    )


def accumulated(losses: Tensor, mask: Tensor, *, micro_batch_size: int) -> Tensor:
    """As the documentation of `scaled_sum` says it: the token count of the whole batch divides every part."""
    parts = zip(losses.split(micro_batch_size), mask.split(micro_batch_size), strict=True)
    return torch.stack([masked.scaled_sum(x, m, constant=mask.sum()) for x, m in parts]).sum()


OURS: dict[str, Callable[..., Any]] = {
    "clipped_surrogate": policy.clipped_surrogate_loss,
    "gspo": policy_variants.gspo_loss,
    "cispo": policy_variants.cispo_loss,
    "truncated_importance_weight": importance.truncated_importance_weight,
    "masked_importance_weight": importance.masked_importance_weight,
    "value_loss": value.value_loss,
    "clipped_value_loss": value.clipped_value_loss,
    "token_mean": masked.token_mean,
    "sequence_mean": masked.sequence_mean,
    "sequence_sum": masked.sequence_sum,
    "gradient_accumulation": accumulated,
    "sequence_logp": sequence_logp,
    "token_logp": aligned_logp,
}


@pytest.mark.parametrize("kind", OURS)
def test_our_own_function_is_certified_and_no_law_is_skipped(kind: str) -> None:
    report = certify(OURS[kind], kind, require=["all"], shrink_seconds=0)
    assert report, [finding.law.name for finding in report.broken]
    assert not [finding.law.name for finding in report.findings if finding.status == ABSENT]
    firsts = {c.name: next(iter(c.values.values())) for c in KINDS[kind].conventions}
    assert firsts.items() <= report.conventions.items(), "our convention is the first one"


def test_the_dense_twin_of_the_kernel_is_certified_too() -> None:
    assert certify(dense_logp, "token_logp", require=["all"], shrink_seconds=0)


def name_of(variant: Variant) -> str:
    return f"{variant.kind}: {getattr(variant.fn, '__name__', type(variant.fn).__name__)}"


@pytest.mark.parametrize("variant", RIGHT, ids=name_of)
def test_a_right_function_of_another_style_is_certified_and_its_conventions_are_found(
    variant: Variant,
) -> None:
    report = certify(variant.fn, variant.kind, shrink_seconds=0, **variant.adapter)
    assert report, [finding.law.name for finding in report.broken]
    assert variant.conventions.items() <= report.conventions.items(), report.conventions


@pytest.mark.parametrize("variant", WRONG, ids=name_of)
def test_a_wrong_function_that_nobody_listed_is_defective(variant: Variant) -> None:
    assert certify(variant.fn, variant.kind, shrink_seconds=0, **variant.adapter).verdict == "defective"


def test_each_kind_has_laws_that_do_not_repeat_its_formula() -> None:
    mine = {*OURS, "policy_gradient"}
    for kind in mine:
        families = {law.family for law in KINDS[kind].laws}
        assert {"value", "batch", "mask", "numeric"} <= families and families & {
            "limit",
            "symmetry",
            "identity",
        }
    assert sum(len(KINDS[kind].laws) for kind in mine) >= 300


def with_wrong_limit(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, eps: float) -> Tensor:
    ratio = (logp - old_logp).exp()
    cut = torch.exp((logp - old_logp).clamp(-eps, eps))
    return -torch.min(ratio * adv, cut * adv) * mask


def test_a_clip_in_log_space_breaks_the_dead_zone_and_is_named() -> None:
    report = certify(with_wrong_limit, "clipped_surrogate", shrink_seconds=0)
    assert "dead_zone" in {finding.law.name for finding in report.broken}
    assert report.nearest is not None and report.nearest.bug.name == "clipped in log space"


def maximum(per_token_logps: Tensor, old_per_token_logps: Tensor, advantages: Tensor, mask: Tensor,
            epsilon: float) -> Tensor:  # fmt: skip
    ratio = torch.exp(per_token_logps - old_per_token_logps)
    cut = ratio.clamp(1 - epsilon, 1 + epsilon)
    loss = -torch.max(ratio * advantages.unsqueeze(1), cut * advantages.unsqueeze(1))
    return ((loss * mask).sum(-1) / mask.sum(-1)).mean()


def test_reduction_and_layout_of_a_wrong_loss_are_told_from_where_it_is_still_right() -> None:
    report = certify(maximum, "clipped_surrogate", shrink_seconds=0)
    assert report.verdict == "defective"
    assert report.conventions["advantage"] == "one per sequence, [B]"
    assert report.conventions["aggregation"] == "mean over sequences of token means"
    assert "policy_gradient_at_ratio_1" in {finding.law.name for finding in report.held}
    assert report.nearest is not None and report.nearest.bug.name == "min and max swapped"


def test_a_counter_example_calls_the_subject_with_one_advantage_per_sequence() -> None:
    report = certify(maximum, "clipped_surrogate", shrink_seconds=0)
    script = report.counter_example(report.broken[0])
    (line,) = [line for line in script.splitlines() if "advantages=" in line]
    assert "[[" not in line


def test_one_parameter_for_both_widths_is_accepted_as_both() -> None:
    report = certify(trl_grpo, "clipped_surrogate", shrink_seconds=0)
    assert report.binding.names["clip_low"] == "epsilon_low"
    single = certify(with_wrong_limit, "clipped_surrogate", shrink_seconds=0)
    assert single.binding.names["clip_low"] == single.binding.names["clip_high"] == "eps"


def no_clip(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    return -(logp - old_logp).exp() * adv * mask


def test_a_surrogate_without_a_clip_is_not_one_whose_clip_is_absent() -> None:
    assert certify(no_clip, "clipped_surrogate", shrink_seconds=0).verdict == "defective"


def test_without_a_bug_the_specimen_of_reinforce_has_every_feature_but_nan_and_bf16() -> None:
    report = certify(policy_gradient, "policy_gradient", shrink_seconds=0)
    assert report and set(report.absent) == {"NaN-safe mask", "bfloat16 input"}
