"""`certify` itself: matching arguments, finding conventions, verdicts, counter-examples."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minirlhf.objectives.preference import dpo_loss
from minirlhf.verify import SubjectError, certify
from minirlhf.verify.catalogue import kind_named
from minirlhf.verify.report import ABSENT, BROKEN
from tests.verify import subjects

ROOT = Path(__file__).resolve().parents[2]


def test_our_dpo_keeps_every_law_with_every_feature_required() -> None:
    report = certify(dpo_loss, "dpo", require=["all"])
    assert report and not report.absent
    assert report.conventions == {"aggregation": "one value per element", "factor": "nats"}


def test_a_forgotten_reference_is_found_named_and_shown() -> None:
    report = certify(subjects.reference_forgotten, "dpo")
    assert report.verdict == "defective" and not report
    broken = {finding.law.name for finding in report.broken}
    assert {"formula", "chosen_shifted_with_reference", "rejected_shifted_with_reference"} <= broken
    assert report.nearest is not None and report.nearest.bug.name == "reference forgotten"
    assert report.nearest.share == 1.0
    assert "nearest known bug: reference forgotten" in str(report)


def test_other_names_a_mean_and_a_built_in_beta_are_conventions() -> None:
    report = certify(subjects.scalar_dpo, "dpo")
    assert report
    assert report.conventions["aggregation"] == "mean over the batch"
    assert report.conventions["beta"] == "0.3, built in"
    assert "beta" in report.absent


def test_unknown_names_are_matched_by_position_and_the_first_result_is_taken() -> None:
    report = certify(subjects.summed_dpo, "dpo")
    assert report and report.conventions["aggregation"] == "sum over the batch"
    assert report.binding.names["ref_rejected_logp"] == "d"


def test_single_precision_inside_is_a_convention() -> None:
    report = certify(subjects.single_precision_dpo, "dpo")
    assert report and report.conventions["precision"] == "single, whatever the input"


def test_positional_only_parameters_are_reached_by_order() -> None:
    order = ("beta", "ref_chosen_logp", "ref_rejected_logp", "chosen_logp", "rejected_logp")
    assert certify(subjects.reordered, "dpo", order=order)
    assert not certify(subjects.reordered, "dpo", order=(*order[:3], "rejected_logp", "chosen_logp"))


def test_a_rename_wins_over_the_name() -> None:
    swapped: dict[str, Any] = {"chosen_logp": "rejected_logp", "rejected_logp": "chosen_logp"}
    assert certify(dpo_loss, "dpo", **swapped).nearest is not None


def test_a_built_in_number_that_is_not_usual_is_measured_and_can_be_stated() -> None:
    def odd(chosen_logp: Any, rejected_logp: Any, ref_chosen_logp: Any, ref_rejected_logp: Any) -> Any:
        return dpo_loss(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=0.137)

    assert certify(odd, "dpo").conventions["beta"] == "0.137, built in"
    assert certify(odd, "dpo", beta=0.137)
    assert not certify(odd, "dpo", beta=0.2)


def test_parameters_that_the_kind_does_not_know_are_fixed_or_asked_for() -> None:
    assert certify(subjects.with_extra, "dpo", fixed={"device": "cpu"})
    with pytest.raises(SubjectError, match="asks for device"):
        certify(subjects.with_extra, "dpo")


@pytest.mark.parametrize("pick", ["loss", lambda result: result["loss"]], ids=["by name", "by a function"])
def test_the_result_is_picked_from_a_dict(pick: str | Callable[[Any], Any]) -> None:
    def with_metrics(**inputs: Any) -> dict[str, Any]:
        return {"accuracy": torch.tensor(0.5), "loss": dpo_loss(**inputs)}

    names: dict[str, Any] = {a.name: a.name for a in kind_named("dpo").arguments}
    assert certify(with_metrics, "dpo", output=pick, **names)
    assert not certify(lambda **x: with_metrics(**x)["accuracy"], "dpo", **names)


def test_a_gradient_that_is_missing_is_a_defect_though_every_value_is_right() -> None:
    broken = {finding.law.name for finding in certify(subjects.half_gradient, "dpo").broken}
    assert "gradient_of_rejected_logp" in broken and "formula" not in broken


def test_writing_to_an_input_is_a_defect() -> None:
    assert "pure" in {finding.law.name for finding in certify(subjects.writes_to_its_input, "dpo").broken}


def test_raising_on_a_legal_input_is_a_defect_with_the_call_that_raises() -> None:
    report = certify(subjects.raises_on_one_pair, "dpo")
    finding = next(f for f in report.broken if f.law.name == "golden_pair")
    assert "# raises IndexError: tuple index out of range" in report.counter_example(finding)


@pytest.mark.parametrize(
    "fn, message",
    [
        (subjects.always_raises, "always_raises raises on every input: KeyError: 'model'"),
        (subjects.exits, "exits raises on every input: SystemExit: 3"),
        (subjects.wrong_shape, "expected a result of shape"),
        (subjects.returns_text, "must return a tensor"),
        (3, "must be callable"),
    ],
)
def test_what_cannot_be_tried_says_why(fn: Any, message: str) -> None:
    with pytest.raises(SubjectError, match=message):
        certify(fn, "dpo")


def test_wrong_names_are_refused_with_the_right_ones() -> None:
    with pytest.raises(SubjectError, match="no kind 'dpoo'; expected one of dpo"):
        certify(dpo_loss, "dpoo")
    with pytest.raises(SubjectError, match="dpo has no argument 'chosen'"):
        certify(dpo_loss, "dpo", chosen="chosen_logp")
    with pytest.raises(SubjectError, match="no parameter 'pi'"):
        certify(dpo_loss, "dpo", chosen_logp="pi")
    with pytest.raises(SubjectError, match="no feature 'nan'"):
        certify(dpo_loss, "dpo", without=["nan"])
    with pytest.raises(SubjectError, match="lacks beta, which was required"):
        certify(subjects.scalar_dpo, "dpo", require=["beta"])


def test_an_absent_feature_becomes_a_defect_only_when_it_is_required() -> None:
    assert "bfloat16 input" in certify(subjects.scalar_dpo, "dpo").absent
    required = certify(subjects.scalar_dpo, "dpo", require=["bfloat16 input"])
    assert [finding.law.name for finding in required.broken] == ["bfloat16"]
    declared = certify(dpo_loss, "dpo", without=["bfloat16 input"])
    assert declared and [f.law.name for f in declared.findings if f.status == ABSENT] == ["bfloat16"]


def test_the_verdict_is_the_same_every_time() -> None:
    first, second = (certify(subjects.reference_forgotten, "dpo", shrink_seconds=0) for _ in range(2))
    for report in (first, second):
        assert [f.status for f in report.findings] == [f.status for f in first.findings]


def test_a_counter_example_fails_as_a_script_and_passes_once_the_function_is_right(tmp_path: Path) -> None:
    wrong = (ROOT / "tests/verify/subjects.py").read_text()
    file = tmp_path / "my_losses.py"
    file.write_text(wrong)
    code = (
        "import sys, json\nfrom minirlhf.verify import certify\nfrom minirlhf.verify.target import load\n"
        f"report = certify(load({str(file)!r} + ':reference_forgotten'), 'dpo')\n"
        "print(json.dumps([report.counter_example(f) for f in report.broken]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    scripts = json.loads(done.stdout)
    assert len(scripts) > 4
    script = scripts[0]
    failing = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert failing.returncode == 1 and "AssertionError" in failing.stderr
    file.write_text(wrong.replace("logits = policy_chosen_logps - policy_rejected_logps", RIGHT))
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


RIGHT = """logits = (policy_chosen_logps - policy_rejected_logps) - (
        reference_chosen_logps - reference_rejected_logps
    )"""


def test_counter_examples_are_made_small() -> None:
    report = certify(subjects.reference_forgotten, "dpo", shrink_seconds=20)
    claim = report.broken[0].claim
    assert claim is not None and len(claim.case["chosen_logp"]) == 1
    numbers = [float(v) for n, v in claim.case.items() if n.endswith("logp")]
    assert sum(number != -0.125 for number in numbers) == 1, "one of the four has to differ from the others"


def test_the_report_as_json_has_everything() -> None:
    found = json.loads(json.dumps(certify(subjects.reference_forgotten, "dpo").as_dict()))
    assert found["verdict"] == "defective" and found["kind"] == "dpo"
    assert found["nearest_known_bug"]["name"] == "reference forgotten"
    assert found["arguments"]["chosen_logp"] == "policy_chosen_logps"
    statuses = {law["status"] for law in found["laws"]}
    assert statuses == {"holds", "broken", "absent"}
    assert all("counter_example" in law for law in found["laws"] if law["status"] == BROKEN)


def test_random_state_default_dtype_and_thread_count_are_left_alone() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # not the one that certify itself works with
    certify(lambda chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta: F.softplus(
        -beta * (chosen_logp - rejected_logp - ref_chosen_logp + ref_rejected_logp)), "dpo")  # fmt: skip
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32
    left = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert left == threads + 1


class Module(torch.nn.Module):
    """As torchtune has it: the parameters are those of forward, and the numbers are its own."""

    def __init__(self, beta: float = 0.2) -> None:
        super().__init__()
        self.beta = beta

    def forward(
        self,
        policy_chosen_logps: torch.Tensor,
        policy_rejected_logps: torch.Tensor,
        reference_chosen_logps: torch.Tensor,
        reference_rejected_logps: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
        return {"accuracy": torch.tensor(0.5), "loss": dpo_loss(*logps, beta=self.beta).mean()}


def test_a_module_or_its_class_is_a_subject_and_its_loss_the_result() -> None:
    assert certify(Module(0.7), "dpo").conventions["beta"] == "0.7, built in"
    assert certify(Module, "dpo").conventions["beta"] == "0.2, built in"
    with pytest.raises(SubjectError, match=r"date\(\) raises TypeError"):
        certify(__import__("datetime").date, "dpo")


def test_a_subject_that_takes_single_precision_only_is_given_it() -> None:
    def picky(
        chosen_logp: Any, rejected_logp: Any, ref_chosen_logp: Any, ref_rejected_logp: Any, beta: Any
    ) -> Any:
        assert chosen_logp.dtype == torch.float32
        return dpo_loss(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta)

    report = certify(picky, "dpo")
    assert report and report.conventions["precision"] == "single, whatever the input"


def test_rewards_come_flattened_where_the_size_of_a_group_is_asked_for() -> None:
    def trl_style(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
        grouped = rewards.view(-1, num_generations)
        normalised = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
        return normalised.flatten()

    def mixed(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
        grouped = rewards.view(num_generations, -1).T
        return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).T.flatten()

    assert certify(trl_style, "group_normalised").conventions["epsilon"] == "0.0001, built in"
    assert not certify(mixed, "group_normalised")
