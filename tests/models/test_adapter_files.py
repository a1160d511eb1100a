"""Adapters as PEFT's directories: what PEFT wrote is read, PEFT reads what is written, errors are said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.models.adapter_files import (
    fingerprint,
    open_adapter,
    read_language_model,
    read_scalar_model,
    save_adapter,
)
from minirlhf.models.adapters import adapter_params, joined, merged
from minirlhf.models.checkpoint import Normalisation, load_language_model, save_language_model
from minirlhf.models.interface import Params, scalar, with_scalar_head
from minirlhf.runs import InputError
from tests.models.tiny import ragged, tiny

MODEL, BASE = tiny()
TOKENS, _ = ragged()
RANK, ALPHA = 3, 6.0


def noisy(adapters: Params) -> Params:
    generator = torch.Generator().manual_seed(5)
    return tree_map(lambda x: x + 0.1 * torch.randn(x.shape, generator=generator), adapters)


def adapted(base: Params, *targets: str) -> Params:
    """A model whose adapters do something."""
    generator = torch.Generator().manual_seed(4)
    fresh = adapter_params(MODEL, base, rank=RANK, targets=targets or ("all-linear",), generator=generator)
    return joined(base, noisy(fresh), scale=ALPHA / RANK, outputs_first=False)


def write_peft(folder: Path, base: Path, tensors: dict[str, Tensor], **options: Any) -> Path:
    """A directory such as PEFT's save_pretrained leaves."""
    folder.mkdir()
    config = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": str(base),
        "bias": "none",
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": True,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 4,
        "lora_dropout": 0.05,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": 2,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["c_attn"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_language_model(tmp_path / "base", MODEL, BASE, tokenizer=None)
    return tmp_path / "base"


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """A and B of c_attn in both blocks, fixed numbers under PEFT's names."""
    found = {}
    for i in range(2):
        name = f"base_model.model.transformer.h.{i}.attn.c_attn"
        found[f"{name}.lora_A.weight"] = torch.arange(48).view(2, 24).remainder(5).float() / 10 - 0.2
        found[f"{name}.lora_B.weight"] = torch.arange(144).view(72, 2).remainder(7).float() / 20 - 0.1 * i
    return found


@pytest.mark.parametrize(("options", "scale"), [({}, 2.0), ({"use_rslora": True}, 4 / 2**0.5)])
def test_a_peft_directory_means_w_plus_scale_b_a(
    tmp_path: Path, base: Path, tensors: dict[str, Tensor], options: dict[str, Any], scale: float
) -> None:
    folder = write_peft(tmp_path / "adapter", base, tensors, **options)
    dense = tree_map(torch.clone, BASE)
    for i in range(2):
        name = f"base_model.model.transformer.h.{i}.attn.c_attn"
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        dense["h"][i]["attn"]["c_attn"]["weight"] += scale * (b @ a).T  # Conv1D stores [in, out]
    model, params = read_language_model(folder)
    torch.testing.assert_close(
        model.hidden(params, TOKENS), MODEL.hidden(dense, TOKENS), rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(model.hidden(params, TOKENS), MODEL.hidden(BASE, TOKENS), atol=1e-2)


def test_targets_may_be_whole_names_or_a_pattern(
    tmp_path: Path, base: Path, tensors: dict[str, Tensor]
) -> None:
    names = [f"transformer.h.{i}.attn.c_attn" for i in range(2)]
    forms = (["c_attn"], names, ["attn.c_attn"], r".*\.c_attn")
    read = [
        read_language_model(write_peft(tmp_path / f"{i}", base, tensors, target_modules=form))[1]
        for i, form in enumerate(forms)
    ]
    assert len({fingerprint(each) for each in read}) == 1


def test_a_base_may_stand_beside_its_adapter(tmp_path: Path, base: Path, tensors: dict[str, Tensor]) -> None:
    folder = write_peft(tmp_path / "adapter", Path("../base"), tensors)
    assert open_adapter(folder).base.resolve() == base.resolve()


@pytest.mark.parametrize("targets", [(), ("c_attn",), ("mlp.c_proj",), ("c_fc", "attn.c_proj")])
def test_what_is_written_is_read_as_the_merged_model(
    tmp_path: Path, base: Path, targets: tuple[str, ...]
) -> None:
    params = adapted(BASE, *targets)
    save_adapter(tmp_path / "adapter", MODEL, params, base=base, base_params=BASE)
    _, again = read_language_model(tmp_path / "adapter")
    for x, y in zip(tree_leaves(merged(params)), tree_leaves(again), strict=True):
        assert torch.equal(x, y)


def test_a_reward_models_adapter_keeps_head_and_normalisation(tmp_path: Path, base: Path) -> None:
    start = with_scalar_head(MODEL, BASE, generator=torch.Generator().manual_seed(1))
    params = adapted(start)
    where = {"base": base, "base_params": BASE}
    save_adapter(tmp_path / "a", MODEL, params, **where, normalisation=Normalisation(0.25, 1.5))
    _, again, normalisation = read_scalar_model(tmp_path / "a")
    assert normalisation == Normalisation(0.25, 1.5)
    theirs, ours = (scalar(each, MODEL.hidden(each, TOKENS)) for each in (merged(params), again))
    assert torch.equal(theirs, ours)
    with pytest.raises(InputError, match="expected an adapter of a language model .* found a reward model"):
        read_language_model(tmp_path / "a")


def test_files_have_pefts_names_and_no_key_that_it_would_warn_of(tmp_path: Path, base: Path) -> None:
    save_adapter(tmp_path / "a", MODEL, adapted(BASE, "c_attn"), base=base, base_params=BASE)
    found = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {name: list(each.shape) for name, each in found.items()} == {
        f"base_model.model.transformer.h.{i}.attn.c_attn.lora_{part}.weight": shape
        for i in range(2)
        for part, shape in (("A", [3, 24]), ("B", [72, 3]))
    }
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 6, ["c_attn"])
    assert config["fan_in_fan_out"] and config["task_type"] == "CAUSAL_LM"
    assert Path(config["base_model_name_or_path"]).samefile(base)
    assert "minirlhf" not in config


def test_another_base_of_the_same_shape_is_refused(tmp_path: Path, base: Path) -> None:
    save_adapter(tmp_path / "a", MODEL, adapted(BASE), base=base, base_params=BASE)
    other = tree_map(torch.clone, BASE)
    other["ln_f"]["bias"][3] += 1e-3
    save_language_model(base, MODEL, other, tokenizer=None)
    with pytest.raises(InputError, match="another base"):
        read_language_model(tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "all"}, "bias = 'all'; supported: 'none'"),
        ({"alpha_pattern": {"c_attn": 3}}, "alpha_pattern"),
        ({"rank_pattern": {"c_attn": 3}}, "rank_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"some_option_of_tomorrow": 1}, "some_option_of_tomorrow = 1"),
        ({"modules_to_save": ["wte"]}, r"modules_to_save \['wte'\]"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "SEQ_2_SEQ_LM"),
        ({"r": 3}, r"misshapen tensors: .*lora_A.weight expected \[3, 24\] got \[2, 24\]"),
        ({"r": 0}, "rank r of at least 1"),
        ({"target_modules": ["c_attn", "c_fc"]}, "missing tensors: .*c_fc.lora_A"),
        ({"target_modules": ["c_fc"]}, "missing tensors: .*unknown tensors: .*c_attn"),
        ({"target_modules": ["q_proj"]}, "no linear layer of the blocks is called 'q_proj'; known: .*c_attn"),
        ({"target_modules": "wte"}, "matches no linear layer"),
        ({"target_modules": []}, "target_modules must name layers"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path must say"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "base_model_name_or_path: .*no such model"),
    ],
)
def test_what_cannot_be_meant_is_an_error_that_names_it(
    tmp_path: Path, base: Path, tensors: dict[str, Tensor], options: dict[str, Any], message: str
) -> None:
    folder = write_peft(tmp_path / "adapter", base, tensors, **options)
    with pytest.raises(InputError, match=message):
        read_language_model(folder)


def test_broken_files_are_errors(tmp_path: Path, base: Path, tensors: dict[str, Tensor]) -> None:
    nan = {name: each * torch.nan for name, each in tensors.items()}
    with pytest.raises(InputError, match="not finite"):
        read_language_model(write_peft(tmp_path / "nan", base, nan))
    folder = write_peft(tmp_path / "none", base, tensors)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="has no adapter_model.safetensors"):
        read_language_model(folder)
    with pytest.raises(InputError, match="expected a whole model, found an adapter"):
        load_language_model(folder)
    chain = write_peft(tmp_path / "chain", write_peft(tmp_path / "one", base, tensors), tensors)
    with pytest.raises(InputError, match="is an adapter itself"):
        read_language_model(chain)


def test_nothing_adapted_is_a_mistake_of_the_programmer(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ValueError, match="one rank and scale, got none"):
        save_adapter(tmp_path / "a", MODEL, BASE, base=base, base_params=BASE)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_computes_what_we_compute(tmp_path: Path, base: Path) -> None:
    """In both directions, with PEFT itself where it is installed."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    params = adapted(BASE, "c_attn", "mlp.c_proj")
    save_adapter(tmp_path / "ours", MODEL, params, base=base, base_params=BASE)

    def fresh() -> Any:
        return transformers.GPT2LMHeadModel.from_pretrained(base)

    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path / "ours")(TOKENS).logits
        ours = MODEL.hidden(params, TOKENS) @ BASE["wte"]["weight"].T
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(fresh(), lora)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimiser.step()
    model.save_pretrained(tmp_path / "theirs")
    bound, read = read_language_model(tmp_path / "theirs")
    with torch.no_grad():
        logits = bound.hidden(read, TOKENS) @ bound.unembedding(read).T
        torch.testing.assert_close(logits, model.eval()(TOKENS).logits, rtol=1e-4, atol=1e-4)
