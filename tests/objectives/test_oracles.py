"""The oracles are independent of the code they judge, and give the published numbers themselves."""

import ast
import math
from pathlib import Path

import pytest

from tests.objectives import oracles

HERE = Path(__file__).parent


def test_oracles_know_neither_torch_nor_the_package() -> None:
    tree = ast.parse((HERE / "oracles.py").read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert imported == {"math", "collections"}


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (oracles.bradley_terry(4, 0), 0.018150),
        (oracles.bradley_terry(0, 4), 4.018150),
        (oracles.dpo(-10, -12, -15, -11, 0.1), 0.437488),
        (oracles.conservative_dpo(-10, -12, -15, -11, 0.1, 0.1), 0.497488),
        (oracles.ipo(-10, -12, -15, -11, 0.1), 1.0),
        (oracles.robust_dpo(-10, -12, -15, -11, 0.1, 0.1), 0.362488),
        (oracles.hinge(-10, -12, -15, -11, 0.1), 0.4),
        (oracles.plackett_luce([4, 0]), 0.018150),
        (oracles.plackett_luce([7, 7, 7]), math.log(6)),
        (oracles.simpo(-0.8, -1.0, 1, 1, 2, 1), 1.037488),
        (oracles.orpo(-0.7, -1.1, 1, 1, 0.1), 0.740934),
        (oracles.kto(-10, -15, True, 0.2, 0.1), 0.382252),
        (oracles.kto(-10, -15, False, 0.2, 0.1), 0.617748),
        (oracles.leave_one_out([1, 1, 1, 0, 0, 0, 0, 0], [True] * 8)[0], 0.714286),
        (oracles.group_centred([1, 1, 1, 0, 0, 0, 0, 0], [True] * 8)[-1], -0.375),
        (oracles.group_normalised([1, 1, 1, 0, 0, 0, 0, 0], [True] * 8, 0, 1)[0], 1.207615),
        (oracles.group_normalised([1, 1, 1, 0, 0, 0, 0, 0], [True] * 8, 0, 0)[-1], -0.774597),
        (oracles.gspo([math.log(2), math.log(0.5), 9], [0, 0, 0], [True, True, False], 3, 0.2, 0.2), -3.0),
        (oracles.cispo(-1, -9, 2, 0.2, 0.2), 2.4),
        (oracles.best_of_n([0.5, 0.25, 0.25], [0, 1, 1], 2)[2], 0.375),
        (oracles.expected_maximum([0, 1, 3], 2), 7 / 3),
        (oracles.surrogate(0.5, -1, 0.2, 0.2), -0.8),
        (oracles.surrogate(5, -1, 0.2, 0.2, 3), -3.0),
        (oracles.clipped_value(0.5, 0, -1, 0.2), 1.125),
        (oracles.k3(math.log(2), 0), 0.193147),
        (oracles.kl([0, 0], [math.log(0.25), math.log(0.75)]), 0.143841),
        (oracles.adapted(0.2, 6.3, 6, 10_000, 256), 0.200256),
        (oracles.gae([0, 0, 1], [0.5] * 3, [True] * 3, 1, 0.95)[0][0], 0.45125),
        (oracles.law([0.0, 0.0, 0.0], k=2)[1], 0.5),
    ],
)
def test_oracles_give_the_golden_numbers(got: float, expected: float) -> None:
    assert got == pytest.approx(expected, abs=5e-7)


def test_no_tolerance_in_these_tests_is_loose() -> None:
    limits = {"rtol": 1e-6, "rel": 1e-6, "atol": 1e-5, "abs": 1e-5}
    loose = []
    for page in sorted(HERE.glob("test_*.py")):
        for node in ast.walk(ast.parse(page.read_text())):
            if isinstance(node, ast.keyword) and node.arg in limits and isinstance(node.value, ast.Constant):
                if isinstance(node.value.value, float) and node.value.value > limits[node.arg]:
                    loose.append(f"{page.name}:{node.value.lineno} {node.arg}={node.value.value}")
    assert not loose
