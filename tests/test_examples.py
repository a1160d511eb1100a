"""The examples run, and show what they say."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from minirlhf.training.update import init_state

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    """Runs the example as an import does: a script from top to bottom, a `main` not at all."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_loop_has_at_most_forty_lines_and_its_score_rises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = EXAMPLES / "own_loop.py"
    assert len(script.read_text().splitlines()) <= 40
    monkeypatch.setattr("sys.argv", [str(script), "8"])
    load("own_loop")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    scores = [float(found[1]) for line in lines if (found := re.search(r"score ([\d.]+)", line))]
    assert scores[-1] > scores[0] + 0.2
    assert abs(float(lines[0].split("KL ")[1].split()[0])) < 1e-6


@pytest.fixture(scope="module")
def adam_epsilon() -> ModuleType:
    return load("adam_epsilon")


def test_tensorflow_adam_is_its_own_formula_over_three_steps(adam_epsilon: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, generator=generator)
    grads = [10.0 ** -torch.arange(1, 6) * torch.randn(5, generator=generator) for _ in range(3)]
    state = init_state({"x": start})
    x, m, v = start.double(), torch.zeros(5).double(), torch.zeros(5).double()
    for t, grad in enumerate(grads, start=1):
        state = adam_epsilon.tensorflow_adam(state, {"x": grad}, 0.1)
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        rate = 0.1 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        x = x - rate * m / (v.sqrt() + 1e-5)
        assert torch.allclose(state.params["x"].double(), x, rtol=1e-5, atol=1e-6)


def test_pytorch_adam_moves_the_policy_further_and_the_more_so_the_smaller_the_gradient(
    adam_epsilon: ModuleType,
) -> None:
    rows = adam_epsilon.experiment(responses=16, scales=(1.0, 1 / 12))
    assert [row.adam for row in rows] == ["PyTorch", "TensorFlow"] * 2
    assert rows[2].gradient == pytest.approx(rows[0].gradient / 12)
    factors = [rows[i].approxkl / rows[i + 1].approxkl for i in (0, 2)]
    assert 1 < factors[0] < factors[1]
    assert factors[1] > 2
    for pytorch, tensorflow in (rows[:2], rows[2:]):
        assert pytorch.ratio_var > tensorflow.ratio_var
        assert pytorch.ratio_max > tensorflow.ratio_max > 1
        assert pytorch.clipfrac >= tensorflow.clipfrac
