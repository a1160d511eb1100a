"""The examples run, and show what they say."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.runs import InputError
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


@pytest.fixture(scope="module")
def many_runs() -> ModuleType:
    return load("many_runs")


def test_many_runs_trained_together_are_the_same_runs_one_after_the_other(many_runs: ModuleType) -> None:
    options = many_runs.Options(betas=(0.25, 2.0), seeds=3, steps=6, pairs=4, width=8, alone=4)
    given = many_runs.task(options.width)
    given = given._replace(reference=tree_map(torch.Tensor.double, given.reference))
    data = many_runs.batches(given, options)
    end, kept, _ = many_runs.train(given, options, data, keep_at=options.alone)
    for place in ((0, 0), (0, 2), (1, 1)):
        for together, steps in ((end, 6), (kept, 4)):
            alone, _ = many_runs.train_one(given, options, data[:steps], options.betas[place[0]], place[1])
            for stacked, single in zip(tree_leaves(together), tree_leaves(alone), strict=True):
                torch.testing.assert_close(stacked[place], single, rtol=0, atol=1e-11)
    moved = [float((leaf[0, 0] - leaf[1, 0]).abs().max()) for leaf in tree_leaves(end)]
    assert max(moved) > 1e-4, "runs of another beta go another way"
    moved = [float((leaf[0, 0] - leaf[0, 1]).abs().max()) for leaf in tree_leaves(end)]
    assert max(moved) > 1e-4, "and so do runs of another seed"


def test_many_runs_stand_between_the_reference_and_the_optimum(many_runs: ModuleType) -> None:
    given, betas = many_runs.task(16), (0.25, 1.0)
    exact = many_runs.optima(given.w, betas)
    assert exact.regret.abs().max() < 1e-12
    start = tree_map(lambda leaf: leaf.expand(2, 1, *leaf.shape), given.reference)
    at_reference = many_runs.stands(given, start, betas)
    assert at_reference.divergence.abs().max() < 1e-6
    torch.testing.assert_close(at_reference.regret, torch.ones(2, 1).double(), rtol=1e-6, atol=0)
    options = many_runs.Options(betas=betas, seeds=2, steps=100, learning_rate=3e-3, width=16)
    end, _, _ = many_runs.train(given, options, many_runs.batches(given, options), keep_at=1)
    found = many_runs.stands(given, end, betas)
    assert (found.regret > 0).all() and (found.regret < 0.5).all()
    assert (found.reward <= many_runs.frontier(found.divergence, given.w) + 1e-6).all()


def test_many_runs_draws_pairs_of_one_prompt_of_which_the_better_one_wins_more_often(
    many_runs: ModuleType,
) -> None:
    given, options = many_runs.task(8), many_runs.Options(seeds=2, steps=50, pairs=16)
    tokens = torch.stack([batch.tokens for batch in many_runs.batches(given, options)])  # [S, seeds, 2b, T]
    chosen, rejected = tokens.chunk(2, dim=2)
    assert torch.equal(chosen[..., 0], rejected[..., 0])
    assert not torch.equal(tokens[:, 0], tokens[:, 1])
    gold = {
        tuple(row): r for row, r in zip(given.tokens.tolist(), given.w.gold.flatten().tolist(), strict=True)
    }
    sides = (
        [gold[tuple(row)] for row in side.reshape(-1, side.shape[-1]).tolist()] for side in (chosen, rejected)
    )
    gap = torch.tensor(next(sides)) - torch.tensor(next(sides))
    # Bradley-Terry: of pairs with the gap +-d the better one wins with probability sigma(d).
    expected = torch.sigmoid(gap.abs())[gap != 0]
    wins = (gap > 0)[gap != 0].double()
    error = (
        float((wins - expected).mean()) / float((expected * (1 - expected)).mean().sqrt()) * len(wins) ** 0.5
    )
    assert abs(error) < 4


def test_many_runs_prints_its_table_and_draws_its_picture(
    many_runs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folder" / "picture.png"
    many_runs.main(many_runs.Options(betas=(0.5, 2.0), seeds=1, steps=4, pairs=2, width=8, alone=2, out=out))
    assert out.read_bytes().startswith(b"\x89PNG")
    said = " ".join(capsys.readouterr().out.split())
    assert "one after the other" in said and "no parameter differs by more than" in said
    largest = re.search(r"differs by more than ([\d.e-]+\d)", said)
    assert largest is not None and float(largest[1]) < 1e-4


@pytest.mark.parametrize(
    "wrong", [{"betas": ()}, {"betas": (0.5, -1.0)}, {"seeds": 0}, {"steps": 5, "alone": 6}, {"width": 7}]
)
def test_many_runs_refuses_numbers_that_make_no_run(many_runs: ModuleType, wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(reversed(wrong))):
        many_runs.Options(**wrong)
