"""Stages that imitate texts: a fresh model, plain language modelling, supervised fine-tuning."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from minirlhf.data.records import Example
from minirlhf.data.spool import LazySequence
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.models import gpt2
from minirlhf.models.checkpoint import save_language_model
from minirlhf.runs import InputError
from minirlhf.training import sft as sft_page
from minirlhf.training.device import resolve
from minirlhf.training.inputs import read_plain, read_supervised
from minirlhf.training.plan_table import announce
from minirlhf.training.setting import Setting, ShapeConfig, generator_for
from minirlhf.training.sft import SFTConfig
from minirlhf.training.stage_plans import sft_plan
from minirlhf.training.stages.around import Metrics, save_policy, tell, watcher
from minirlhf.training.workspace import Checkpoint, load_policy, open_stage, refuse_existing


def new_model(tokenizer: Path, out: Path, *, shape: ShapeConfig, seed: int) -> str:
    """Writes a GPT-2 directory with fresh weights; returns one line about it.

    Raises:
        InputError: no such tokenizer, an impossible shape, or `out` is not new.
    """
    refuse_existing(out)
    text = load_tokenizer(tokenizer)
    try:
        config = gpt2.GPT2Config(vocab_size=text.vocab_size, eos_token_id=text.eos_id, **asdict(shape))
    except ValueError as error:
        raise InputError(str(error)) from None
    model = gpt2.bind(config)
    params = model.init(torch.Generator().manual_seed(seed))
    save_language_model(out, model, params, tokenizer=text.path)
    count = sum(leaf.numel() for leaf in tree_leaves(params))
    return f"{out}: GPT-2 with {count:,} parameters, {shape.n_layer} layers, vocabulary {text.vocab_size}"


def pretrain(
    policy: Path, data: Path, out: Path, *, config: SFTConfig, setting: Setting, name: str = "pretrain"
) -> Metrics:
    """Plain language modelling: every token of every text is trained, or those that the file says."""
    refuse_existing(out)
    start = load_policy(policy, setting)
    train, validation = read_plain(start, data, setting)
    openings = LazySequence(len(validation), lambda i: _opening(validation[i]))
    return _supervise(name, start, train, validation, openings, data, out, config, setting)


def _opening(example: Example) -> list[int]:
    return example.ids[: max(1, len(example.ids) // 3)]


def sft(policy: Path, data: Path, out: Path, *, config: SFTConfig, setting: Setting) -> Metrics:
    """Supervised fine-tuning on demonstrations."""
    refuse_existing(out)
    start = load_policy(policy, setting)
    parts = read_supervised(start, data, setting)
    held_out: Sequence[Example] = parts.validation
    prompts = LazySequence(len(held_out), lambda i: held_out[i].ids[: held_out[i].prompt_length])
    return _supervise("sft", start, parts.train, parts.validation, prompts, data, out, config, setting)


def _supervise(
    name: str,
    start: Checkpoint,
    train: Sequence[Example],
    validation: Sequence[Example],
    prompts: Sequence[list[int]],
    data: Path,
    out: Path,
    config: SFTConfig,
    setting: Setting,
) -> Metrics:
    device = resolve(setting.device)
    plan = sft_plan(name, start.model, start.params, train, validation, prompts, config, device=device)
    if announce(plan, setting):
        return {}
    save, files, weights = partial(save_policy, start), {"data": data}, {"policy": start.path}
    with open_stage(out, name, save, config, setting, data=files, weights=weights) as stage:
        result = sft_page.train(
            start.model,
            start.params,
            train,
            validation,
            config,
            generator=generator_for(setting, name),
            name=name,
            evaluate=watcher(name, start, prompts, stage, setting),
            log=stage.log,
            keep=stage.keep,
        )
    return tell(name, result, out, setting)
