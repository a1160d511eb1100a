"""How a stage trains, through the command line: adapters, precision, recomputation, compiling, a dry run."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minirlhf import cli
from minirlhf.models.adapters import adapted_layers
from minirlhf.models.interface import Params, aligned, scalar
from minirlhf.training import compiling, gradients, group_policy, ppo, preference, reward_model, sft
from minirlhf.training.setting import ReadingConfig, Setting
from minirlhf.training.workspace import Checkpoint, load_policy, load_reward_model
from tests.test_cli import arguments, command
from tests.test_cli import made as made  # noqa: PLC0414 - the fixture: data/, model/, sft/, reward/

SETTING = Setting(0, "cpu", ReadingConfig(), show=lambda line: None)
PAGES: dict[str, tuple[Any, str]] = {
    "sft": (sft, "train"),
    "reward": (reward_model, "train"),
    "dpo": (preference, "train_referred"),
    "ppo": (ppo, "train"),
    "group": (group_policy, "train"),
}
ADAPTERS = ("--adapter-rank", 2, "--adapter-alpha", 4, "--adapter-targets", "c_attn", "mlp.c_proj")
MORE = {  # so that the best checkpoint is not the one to start from
    "reward": ("--metric-for-best-model", "eval_loss", "--max-steps", 4),
    "ppo": (
        "--max-steps",
        4,
        "--kl-coefficient",
        0,
        "--epochs",
        2,
        "--batch-size",
        16,
        "--learning-rate",
        0.01,
    ),
    "group": ("--max-steps", 3, "--kl-coefficient", 0),
}
SUPERVISED = ("sft", "reward", "dpo")


class Ended(NamedTuple):
    """A stage that was run: its directory, the parameters that its page returned, and what it said aside."""

    out: Path
    params: Params
    said: str


Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def run(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a stage with flags, each once."""

    @cache
    def once(name: str, *flags: object) -> Ended:
        out, returned, said = tmp_path_factory.mktemp(name) / "out", [], io.StringIO()
        page, function = PAGES[name]
        train = getattr(page, function)

        def noting(*given: Any, **more: Any) -> Any:
            returned.append(train(*given, **more))
            return returned[-1]

        rate = ("--learning-rate", 0.02, "--evaluate-every", 1, *MORE.get(name, ()))
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
            patch.setattr(page, function, noting)
            assert command(name, out, *arguments(name, made), *rate, *flags) == 0
        return Ended(out, returned[0].params, said.getvalue())

    return once


IDS = torch.tensor([[9, 40, 7, 7, 120, 33, 2, 81], [1, 2, 3, 250, 5, 6, 77, 8]])


def read(start: Checkpoint, params: Params) -> Tensor:
    """What the model is for, on fixed ids: rewards of a reward model, else log-probs."""
    hidden = start.model.hidden(params, IDS)
    if "score" in params:
        return scalar(params, hidden)
    logp = (aligned(hidden) @ start.model.unembedding(params).T).log_softmax(-1)
    return logp.gather(-1, IDS[..., None])[:, 1:, 0]


def opened(name: str, path: Path) -> Checkpoint:
    return (load_reward_model if name == "reward" else load_policy)(path, SETTING)


def started(name: str, made: Path) -> Path:
    return made / ("model" if name == "sft" else "sft")


@pytest.mark.parametrize("name", PAGES)
def test_what_a_stage_trained_with_adapters_is_what_both_its_directories_give(
    made: Path, run: Run, name: str
) -> None:
    ended = run(name, *ADAPTERS)
    layers = {f"h.0.{each}" for each in ("attn.c_attn", "mlp.c_proj")}
    assert adapted_layers(ended.params).keys() == layers  # it is these that were trained
    whole, apart = opened(name, ended.out), opened(name, ended.out / "adapter")
    trained = read(whole, ended.params)
    for again in (whole, apart):
        torch.testing.assert_close(read(again, again.params), trained, rtol=1e-5, atol=1e-5)
    assert whole.normalisation == apart.normalisation
    start = load_policy(started(name, made), SETTING)
    frozen = start.params["h"][0]["mlp"]["c_fc"]["weight"]
    assert torch.equal(whole.params["h"][0]["mlp"]["c_fc"]["weight"], frozen)
    moved = (
        whole.params["h"][0]["attn"]["c_attn"]["weight"] - start.params["h"][0]["attn"]["c_attn"]["weight"]
    )
    assert float(moved.abs().max()) > 1e-4
    assert int(torch.linalg.matrix_rank(moved, rtol=1e-4)) <= 2
    imported = ended.out.parent / f"imported-{len(list(ended.out.parent.iterdir()))}"
    assert command("import", imported, ended.out / "adapter") == 0
    again = opened(name, imported)
    torch.testing.assert_close(read(again, again.params), trained, rtol=1e-5, atol=1e-5)
    config = json.loads((ended.out / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert len(config["target_modules"]) == 2
    assert Path(config["base_model_name_or_path"]).samefile(started(name, made))
    names = load_file(ended.out / "adapter/adapter_model.safetensors").keys()
    found = {re.sub(r".*(h\.0\..*)\.lora_[AB]\.weight", r"\1", each) for each in names if "lora" in each}
    assert found == layers and len(names) == 4 + (name == "reward")


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_an_adapter_beside_a_wrong_base_is_refused_in_one_line(
    made: Path, run: Run, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(run(name, *ADAPTERS).out / "adapter", adapter)
    shutil.copytree(started(name, made), base)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    stage, flag = ("ppo", "--reward-model") if name == "reward" else ("dpo", "--policy")
    given = [*arguments(stage, made), flag, adapter]

    def refused(expected: str) -> None:
        capsys.readouterr()
        assert command(stage, tmp_path / "out", *given) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and re.search(expected, lines[0]), lines
        assert not (tmp_path / "out").exists()

    opened(name, adapter)  # a copy of the base is as good as the base
    tensors = load_file(base / "model.safetensors")
    tensors["transformer.ln_f.bias" if "transformer.ln_f.bias" in tensors else "ln_f.bias"][3] += 1e-3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    refused("another base")
    shutil.rmtree(base)
    refused("adapter_config.json: base_model_name_or_path: .*base: no such model")
    shape = ("--n-layer", 1, "--n-embd", 8, "--n-head", 2, "--n-positions", 48)
    command("model", base, "--tokenizer", made / "data/tokenizer.json", *shape)
    refused("another base|misshapen tensors")


def weights(ended: Ended) -> dict[str, Tensor]:
    return load_file(ended.out / "model.safetensors")


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Mean over all entries of |a - b|."""
    return float(torch.cat([(a[name] - b[name]).flatten() for name in a]).abs().mean())


@pytest.mark.parametrize("name", PAGES)
def test_bf16_trains_near_fp32_and_keeps_fp32_masters(made: Path, run: Run, name: str) -> None:
    plain, low = weights(run(name)), weights(run(name, "--precision", "bf16"))
    assert all(each.dtype == torch.float32 for each in low.values())
    assert any(not torch.equal(each, each.bfloat16().float()) for each in low.values())
    assert distance(plain, low) > 0  # it was computed in another precision
    if name in SUPERVISED:
        start = load_file(started(name, made) / "model.safetensors")
        both = {each: low[each] for each in low if each in start}
        assert distance(both, plain) < 0.3 * distance(both, start)


@pytest.mark.parametrize("name", PAGES)
def test_recomputed_activations_change_no_weight(
    run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recomputing, calls = gradients.recomputing, []
    monkeypatch.setattr(gradients, "recomputing", lambda model: (calls.append(name), recomputing(model))[1])
    plain, again = run(name), run(name, "--activation-recomputation")
    assert calls
    torch.testing.assert_close(weights(again), weights(plain), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_auto_says_why_a_tiny_model_is_not_compiled_and_trains_the_same(run: Run, name: str) -> None:
    plain, auto = run(name), run(name, "--compile", "auto")
    assert re.search(rf"{name}.*: steps are not compiled: over [\d,]+ passes of", " ".join(auto.said.split()))
    assert "compiled" not in plain.said
    assert distance(weights(plain), weights(auto)) == 0


def test_on_compiles_the_step_and_says_what_it_cost(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run("dpo")  # traced as ever, and run as it is: what inductor makes is tests/training's
    monkeypatch.setattr(gradients, "Compiler", partial(compiling.Compiler, backend="eager"))
    compiled = run("dpo", "--compile", "on")
    assert re.search(r"dpo: graph 1 of a step compiled in \d+\.\d s", " ".join(compiled.said.split()))
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", PAGES)
def test_a_dry_run_counts_the_options_and_writes_nothing(
    made: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*ADAPTERS, "--precision", "bf16", "--activation-recomputation", "--compile", "on")
    assert command(name, tmp_path / "out", *arguments(name, made), *options, "--dry-run") == 0
    said = capsys.readouterr()
    assert not list(tmp_path.iterdir())
    assert (
        "adapters of rank 2 on c_attn, mlp.c_proj, computing in bf16, activations computed again" in said.out
    )
    assert "steps that are not compiled" in said.out
    assert re.search(r"policy: base in bf16", said.out)
    assert said.out.splitlines()[-1].count("planned peak of memory") == 1


def mistakes(made: Path) -> dict[str, tuple[str, tuple[object, ...], str]]:
    """Name -> (stage, flags, what the line must say)."""
    either: dict[str, tuple[str, tuple[object, ...], str]] = {
        f"{stage}: {name}": (stage, flags, said)
        for stage in ("sft", "ppo")
        for name, flags, said in (
            ("rank 0", ("--adapter-rank", 0), "adapter_rank must be at least 1"),
            ("rank too large", ("--adapter-rank", 17), r"adapter_rank must lie in 1\.\.16 for h\.0"),
            ("rank no number", ("--adapter-rank", "eight"), "--adapter-rank.*eight"),
            ("alpha", ("--adapter-rank", 2, "--adapter-alpha", "nan"), "adapter_alpha must be positive"),
            (
                "target",
                ("--adapter-rank", 2, "--adapter-targets", "q_proj"),
                "called 'q_proj'; known: .*c_attn",
            ),
            (
                "precision",
                ("--precision", "fp16"),
                "^minirlhf: Invalid choice invalid choice 'fp16' for argument '--precision'",
            ),
            ("compile", ("--compile", "maybe"), "invalid choice 'maybe' for argument '--compile'"),
        )
    }
    offload = "--offload moves .* computes on cpu; leave it out"
    return either | {
        "ppo offload": ("ppo", ("--device", "cpu", "--offload"), offload),
        "group offload": ("group", ("--device", "cpu", "--offload"), offload),
        "planned offload": ("ppo", ("--device", "cpu", "--offload", "--dry-run"), offload),
        "sft offload": ("sft", ("--offload",), "unknown flag --offload"),
    }


def test_every_mistake_is_one_line_exit_code_2_and_leaves_nothing(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = []
    for name, (stage, flags, expected) in mistakes(made).items():
        capsys.readouterr()
        code = cli.main([stage, "--out", str(tmp_path / "out"), *map(str, (*arguments(stage, made), *flags))])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        if code != 2 or len(lines) != 1 or not re.search(expected, lines[0]):
            wrong.append(f"{name}: exit code {code}, {lines}")
        if list(tmp_path.iterdir()):
            wrong.append(f"{name}: left something")
    assert not wrong, "\n".join(wrong)
