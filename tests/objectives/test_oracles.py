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
