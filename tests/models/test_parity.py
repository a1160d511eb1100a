"""Every family against transformers: what `make parity` prints, as tests, and the entries of config.json."""

import re
from typing import Any

import pytest
import torch

from minirlhf.models.families import FAMILIES
from tests.models import parity
from tests.models.cases import CASES, Case, tiny_model

try:
    LIBRARY = parity.transformers()
except ImportError as error:
    pytest.skip(f"needs transformers (pip install 'minirlhf[test]'): {error}", allow_module_level=True)

# transformers' own deprecations are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.label)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> parity.Pair:
    return parity.pair(request.param, tmp_path_factory.mktemp("case"))


@pytest.mark.parametrize("name", parity.CHECKS)
def test_a_check_of_the_table_passes(both: parity.Pair, name: str) -> None:
    check = parity.CHECKS[name]
    assert check.measure(both) <= check.limit


OLD_NAMES = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_every_entry_of_our_config_is_one_that_they_know(case: Case) -> None:
    entries = FAMILIES[case.family].to_huggingface(tiny_model(case)[0].config)
    theirs = getattr(LIBRARY, case.theirs)(**entries).to_dict()
    rope = theirs.get("rope_parameters") or {}
    for name, value in entries.items():
        if name == "rope_scaling":  # since transformers 5 within rope_parameters, as the other old names
            assert (value or {}).items() <= rope.items()
        else:
            assert (rope if name in OLD_NAMES else theirs)[OLD_NAMES.get(name, name)] == value, name


def test_a_check_that_fails_is_red_in_the_table_and_in_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(both: parity.Pair) -> float:
        return 0.5 if both.case.family == "gpt2" else 0.0

    cases = [CASES[0], next(case for case in CASES if case.family == "llama")]
    monkeypatch.setattr(parity, "CASES", cases)
    monkeypatch.setattr(parity, "CHECKS", {"logits": parity.CHECKS["logits, ragged"]})
    assert parity.main() == 0
    assert "all passed" in capsys.readouterr().out
    monkeypatch.setattr(parity, "CHECKS", {"greedy": parity.Check(wrong, 0.0)})
    assert parity.main() == 1
    printed = capsys.readouterr().out
    assert re.search(r"gpt2 .* 5\.0e-01", printed) and re.search(r"llama .* 0 ", printed)
    assert "1 failed" in printed


def test_a_difference_is_relative_and_nothing_finite_or_flat_passes() -> None:
    right = torch.tensor([1.0, -4.0, 2.0])
    assert parity.difference(right + torch.tensor([0.0, 0.0, 0.2]), right) == pytest.approx(0.05)
    unusable: list[tuple[Any, Any]] = [
        (torch.tensor([1.0, float("nan"), 2.0]), right),
        (right[:2], right),
        (torch.ones(3), torch.ones(3)),
    ]
    assert all(parity.difference(got, wanted) == float("inf") for got, wanted in unusable)
