"""The kinds about KL, entropy, sampling and best of n: what is certified, what is not, what is said of it."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minirlhf.objectives import divergence, kl_usage
from minirlhf.objectives.best_of_n import best_of_n_kl_bound, best_of_n_law, expected_maximum
from minirlhf.objectives.sampling import min_p, sampling_law, tempered, top_k, top_p
from minirlhf.verify import KINDS, certify
from minirlhf.verify.bugs import best_of_n as best_of_n_bugs
from minirlhf.verify.bugs import divergence as divergence_bugs
from minirlhf.verify.bugs import entropy as entropy_bugs
from minirlhf.verify.bugs import kl_usage as kl_usage_bugs
from minirlhf.verify.bugs import sampling as sampling_bugs
from minirlhf.verify.cases import generic
from minirlhf.verify.families.sampling import ORDERS, SAMPLING_LAW
from tests.verify import divergence_subjects as subjects
from tests.verify.divergence_subjects import RIGHT, WRONG, Subject

OURS: tuple[tuple[Callable[..., Any], str], ...] = (
    (divergence.kl_k1, "kl_estimator"),
    (divergence.kl_k2, "kl_estimator"),
    (divergence.kl_k3, "kl_estimator"),
    (divergence.exact_kl, "exact_kl"),
    (divergence.entropy, "entropy"),
    (kl_usage.k2_loss, "kl_loss"),
    (kl_usage.k3_ratio_loss, "kl_loss"),
    (kl_usage.k1_reward, "kl_reward"),
    (kl_usage.entropy_loss, "entropy_loss"),
    (kl_usage.entropy_reward, "entropy_reward"),
    (sampling_law, "sampling_law"),
    (best_of_n_law, "best_of_n_law"),
    (expected_maximum, "expected_maximum"),
    (best_of_n_kl_bound, "best_of_n_kl_bound"),
)
HERE = sorted({kind for _, kind in OURS} | {subject.kind for subject in (*RIGHT, *WRONG)})
PAGES = (divergence_bugs, kl_usage_bugs, entropy_bugs, sampling_bugs, best_of_n_bugs)
SPECIMENS = {(bug.kind, bug.specimen.__name__): bug.specimen for page in PAGES for bug in page.BUGS}


def all_but_beta(kind: str) -> list[str]:
    """Ours leave the coefficient to the caller."""
    return [feature for feature in KINDS[kind].features if feature != "beta"]


def named(subject: Subject) -> str:
    return f"{subject.kind}: {subject.fn.__name__}"


@pytest.mark.parametrize("fn, kind", OURS, ids=lambda x: getattr(x, "__name__", x))
def test_ours_keep_every_law_with_every_feature(fn: Callable[..., Any], kind: str) -> None:
    report = certify(fn, kind, require=all_but_beta(kind))
    assert report, [finding.law.name for finding in report.broken]
    assert set(report.absent) <= {"beta"}
    skipped = {finding.law.name for finding in report.findings if finding.status == "absent"}
    assert skipped <= {"linear_in_beta"}


@pytest.mark.parametrize(
    "fn, kind",
    [
        (lambda logp, ref_logp, mask, beta: beta * kl_usage.k2_loss(logp, ref_logp, mask), "kl_loss"),
        (lambda logp, ref_logp, mask, beta: beta * kl_usage.k1_reward(logp, ref_logp, mask), "kl_reward"),
        (lambda logits, mask, beta: beta * kl_usage.entropy_loss(logits, mask), "entropy_loss"),
        (lambda logp, mask, beta: beta * kl_usage.entropy_reward(logp, mask), "entropy_reward"),
    ],
    ids=["k2_loss", "k1_reward", "entropy_loss", "entropy_reward"],
)
def test_ours_with_a_coefficient_in_front_lack_nothing(fn: Callable[..., Any], kind: str) -> None:
    report = certify(fn, kind, require=["all"])
    assert report and not report.absent


@pytest.mark.parametrize(
    "fn, kind, bug",
    [
        (kl_usage.k1_loss, "kl_loss", "k1 as a loss does nothing"),
        (kl_usage.k2_reward, "kl_reward", "k2 as a reward"),
        (kl_usage.k3_reward, "kl_reward", "k3 as a reward"),
        (kl_usage.sampled_entropy_loss, "sampled_entropy_loss", "log π as a loss does nothing"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_our_docstrings_warn_of_is_defective(fn: Callable[..., Any], kind: str, bug: str) -> None:
    report = certify(fn, kind, shrink_seconds=0)
    assert report.verdict == "defective"
    assert report.nearest is not None and report.nearest.bug.name == bug and report.nearest.share == 1.0


def test_k3_as_a_loss_is_reported_with_the_direction_that_it_really_has() -> None:
    report = certify(kl_usage.k3_loss, "kl_loss")
    assert report
    assert report.conventions["gradient"].startswith("that of KL(π_ref‖π), the other direction")
    assert "not π_ref e^(r/β)" in report.conventions["gradient"]


def test_the_broken_law_says_what_the_function_really_does() -> None:
    def why(fn: Callable[..., Any], kind: str, law: str) -> str:
        findings = certify(fn, kind, shrink_seconds=0).findings
        claim = next(finding.claim for finding in findings if finding.law.name == law)
        assert claim is not None
        return claim.why

    assert "does nothing" in why(kl_usage.k1_loss, "kl_loss", "expected_gradient")
    assert "raises the KL" in why(subjects.subtracted_k2, "kl_loss", "expected_gradient")
    before, after = re.findall(r"\d\.\d+", why(kl_usage.k3_reward, "kl_reward", "pulls_back"))
    assert float(after) > float(before)


@pytest.mark.parametrize("subject", RIGHT, ids=named)
def test_right_variants_are_certified_and_their_conventions_reported(subject: Subject) -> None:
    report = certify(subject.fn, subject.kind, shrink_seconds=0, **subject.adapter)
    assert report, [finding.law.name for finding in report.broken]
    for name, start in subject.conventions.items():
        assert report.conventions[name].startswith(start), (name, report.conventions)


@pytest.mark.parametrize("subject", WRONG, ids=named)
def test_wrong_variants_that_nobody_listed_are_defective(subject: Subject) -> None:
    assert not certify(subject.fn, subject.kind, shrink_seconds=0, **subject.adapter)


def test_every_kind_here_has_at_least_eight_bugs_eleven_laws_and_subjects_of_both_sorts() -> None:
    bugs = [bug for page in PAGES for bug in page.BUGS]
    for kind in HERE:
        assert sum(bug.kind == kind for bug in bugs) >= 8, kind
        assert len(KINDS[kind].laws) >= 11, kind
        assert any(subject.kind == kind for subject in RIGHT), kind
        assert any(subject.kind == kind for subject in WRONG), kind


def test_the_other_direction_is_a_defect_unless_the_arguments_are_named_so() -> None:
    fn = subjects.distillation_forward
    wrong = certify(fn, "exact_kl", logits="student_logits", ref_logits="teacher_logits")
    assert wrong.nearest is not None and wrong.nearest.bug.name == "direction swapped"
    assert certify(fn, "exact_kl", logits="teacher_logits", ref_logits="student_logits")


def test_k3_of_the_other_direction_comes_with_a_warning() -> None:
    report = certify(subjects.reversed_k3, "kl_estimator")
    assert report and "beware: it estimates KL(π_ref‖π)" in report.conventions["estimator"]


@pytest.mark.parametrize(
    "limit, shown",
    [(10.0, "the log-ratio is held within ±10"), (20.0, "the log-ratio is held within ±20"), (None, "none")],
    ids=str,
)
def test_the_clamp_of_an_estimate_is_found(limit: float | None, shown: str) -> None:
    def k2(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
        s = logp - ref_logp
        return 0.5 * (s if limit is None else s.clamp(-limit, limit)) ** 2

    report = certify(k2, "kl_estimator")
    assert report and report.conventions["clamp"].startswith(shown)
    assert ("gradient far from the reference" in report.absent) == (limit is not None)


def test_a_clamp_that_nobody_uses_is_a_defect() -> None:
    assert not certify(lambda logp, ref_logp: (logp - ref_logp).clamp(-5, 5), "kl_estimator")


def test_naive_k3_is_right_but_lacks_precision_near_zero() -> None:
    assert "precise near zero" in certify(subjects.trl_k3, "kl_estimator").absent
    assert "precise near zero" not in certify(divergence.kl_k3, "kl_estimator").absent
    assert not certify(subjects.trl_k3, "kl_estimator", require=["precise near zero"])


def test_log_probs_taken_for_logits_are_a_defect_unless_the_parameter_says_log_probs() -> None:
    assert certify(subjects.entropy_of_log_probs, "entropy").absent.count("unnormalised logits") == 1
    report = certify(subjects.entropy_of_exponentials, "entropy")
    assert [finding.law.name for finding in report.broken] == ["shift_of_logits"]


def test_a_value_that_hides_a_nan_gradient_at_excluded_tokens() -> None:
    """A metric may lack the gradient, a loss may not."""
    assert "gradient with -inf logits" in certify(subjects.special_entropy, "entropy").absent

    def loss(logits: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, torch.nan_to_num(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1), 0.0)

    broken = [finding.law.name for finding in certify(loss, "entropy_loss").broken]
    assert broken == ["gradient_with_excluded_tokens"]


def test_a_bonus_that_is_called_a_loss_is_a_defect() -> None:
    assert certify(subjects.entropy_bonus, "entropy_loss")
    broken = [
        finding.law.name for finding in certify(subjects.entropy_loss_upside_down, "entropy_loss").broken
    ]
    assert broken == ["a_loss_descends"]


@pytest.mark.parametrize(
    "filters", [("top_k", "top_p"), ("top_p", "min_p"), ("top_k", "top_p", "min_p")], ids="+".join
)
def test_the_generic_cases_tell_the_orders_of_the_filters_apart(filters: tuple[str, ...]) -> None:
    """Top-k and min-p keep the same in either order; without top-k, jointly is as one after the other."""
    same = {("ours", "min-p first")} if "min_p" not in filters else set()
    same |= {("ours", "joint")} if "top_k" not in filters else set()
    kept = ("logits", "temperature", *filters)
    cases = [{name: case[name] for name in kept if name in case} for case in generic(SAMPLING_LAW)]
    for pair in itertools.combinations(ORDERS, 2):
        laws = [[SAMPLING_LAW.oracle(c, {"output": "p", "order": order}) for c in cases] for order in pair]
        differ = any(not torch.allclose(a, b) for a, b in zip(*laws, strict=True))
        assert differ == (pair not in same), pair


def test_our_filters_are_certified_one_by_one() -> None:
    assert certify(lambda logits, temperature: tempered(logits, temperature=temperature), "sampling_law")
    assert certify(lambda logits, k: top_k(logits, k=k), "sampling_law", require=["k beyond the vocabulary"])
    assert certify(lambda logits, p: top_p(logits, p=p), "sampling_law")
    assert certify(lambda logits, min_p_: min_p(logits, p=min_p_), "sampling_law", min_p="min_p_")


def test_a_sampler_that_writes_to_its_logits_lacks_only_that() -> None:
    report = certify(subjects.in_place_top_k, "sampling_law")
    assert report and "inputs left alone" in report.absent


def test_ties_are_a_feature_and_not_a_defect() -> None:
    assert "ties broken by the lowest id" in certify(subjects.huggingface, "sampling_law").absent
    assert "ties shared in proportion" in certify(subjects.sorted_law, "best_of_n_law").absent


def test_a_built_in_coefficient_is_read_off_and_a_forgotten_half_is_not_taken_for_one() -> None:
    report = certify(lambda logp, ref_logp, mask: 0.37 * kl_usage.k2_loss(logp, ref_logp, mask), "kl_loss")
    assert report and report.conventions["beta"] == "0.37, built in"
    twice = certify(lambda logp, ref_logp, mask: 2 * kl_usage.k2_loss(logp, ref_logp, mask), "kl_loss")
    assert twice.nearest is not None and twice.nearest.bug.name == "half forgotten"


@pytest.mark.parametrize("fn, kind, law", [
    (subjects.mistaken_k3, "kl_estimator", "formula"),
    (subjects.plain_k1, "kl_loss", "gradient_of_logp"),
    (subjects.plain_k1, "kl_loss", "expected_gradient"),
    (subjects.k3_penalty, "kl_reward", "expected_policy_gradient"),
    (subjects.k3_penalty, "kl_reward", "optimum"),
    (subjects.penalty_of_the_mean, "kl_reward", "adds_up"),
    (subjects.kl_of_logits, "exact_kl", "shift_of_logits"),
    (subjects.nucleus_without_the_crossing_token, "sampling_law", "nucleus_mass"),
    (subjects.tilted_law, "best_of_n_law", "enumerated"),
    (subjects.bound_off_by_one, "best_of_n_kl_bound", "golden_4"),
], ids=lambda x: getattr(x, "__name__", x))  # fmt: skip
def test_the_counter_example_is_a_script_that_fails(fn: Callable[..., Any], kind: str, law: str) -> None:
    report = certify(fn, kind, shrink_seconds=0.3)
    finding = next(finding for finding in report.broken if finding.law.name == law)
    with pytest.raises(AssertionError):
        exec(report.counter_example(finding), {})
