"""The pairs that help and harm most, as a table and a file."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minirlhf.data.records import PairExample
from minirlhf.runs import atomic_directory, write_json_atomic, write_text_atomic
from minirlhf.training import preference, reward_model
from minirlhf.training.device import device_of
from minirlhf.training.influence import Influence, influence
from minirlhf.training.inputs import Parts, read_pairs
from minirlhf.training.pair_objectives import DPOConfig, dpo
from minirlhf.training.pairs import PairRows, cut_all, pair_rows
from minirlhf.training.setting import Setting
from minirlhf.training.update import Loss
from minirlhf.training.workspace import (
    Checkpoint,
    load_policy,
    load_reward_model,
    refuse_existing,
    require_same_model,
)

_SHOWN = 90  # characters of a text in the table
_AT_ONCE = 8  # pairs per forward pass over the validation set


class Subject(NamedTuple):
    """Whose loss it is about: a checkpoint, the loss, and its pairs."""

    checkpoint: Checkpoint
    loss: Loss
    train: PairRows
    validation: PairRows


def of_reward_model(path: Path, data: Path, out: Path, *, top: int, setting: Setting) -> Influence:
    """Influence on a reward model's Bradley-Terry loss."""
    refuse_existing(out)
    model = load_reward_model(path, setting)
    parts = read_pairs(model, data, setting)
    loss = partial(
        reward_model.loss, model=model.model, label_smoothing=None, center_rewards_coefficient=None
    )
    rows = [pair_rows(part, name=name, model=model.model) for part, name in _named(parts)]
    return _tell(Subject(model, loss, *rows), parts.train, out, top=top, setting=setting)


def of_policy(
    path: Path, reference: Path, data: Path, out: Path, *, beta: float, top: int, setting: Setting
) -> Influence:
    """Influence on a policy's DPO loss against a reference."""
    refuse_existing(out)
    policy, near = load_policy(path, setting), load_policy(reference, setting)
    require_same_model(policy, near)
    parts = read_pairs(policy, data, setting)
    rows = [
        preference.with_reference(
            policy.model,
            near.params,
            pair_rows(part, name=name, model=policy.model),
            micro_batch_size=_AT_ONCE,
        )
        for part, name in _named(parts)
    ]
    loss = partial(preference.loss, model=policy.model, objective=dpo(DPOConfig(beta=beta)))
    return _tell(Subject(policy, loss, *rows), parts.train, out, top=top, setting=setting)


def _named(parts: Parts) -> tuple[tuple[Sequence[PairExample], str], ...]:
    return (parts.train, "training"), (parts.validation, "validation")


def _tell(
    subject: Subject, pairs: Sequence[PairExample], out: Path, *, top: int, setting: Setting
) -> Influence:
    """Measures, writes OUT/influence.jsonl and OUT/summary.json, shows the extremes."""
    device = device_of(subject.checkpoint.params)
    validation = cut_all(subject.validation, micro_batch_size=_AT_ONCE, device=device)
    measured = influence(subject.checkpoint.params, subject.train, validation, loss=subject.loss)
    order = measured.influence.argsort(descending=True).tolist()
    lines = [_line(subject.checkpoint, pairs[i], i, measured) for i in order]
    noise = measured.noise
    summary = {
        "training_pairs": len(pairs),
        "validation_pairs": len(subject.validation.rows.lengths) // 2,
        "gradient_noise_scale": noise.scale,
        "gradient_variance": noise.variance,
        "gradient_signal": noise.signal,
        "harmful_share": float((measured.influence < 0).double().mean()),
    }
    with atomic_directory(out) as folder:
        write_text_atomic(folder / "influence.jsonl", "".join(json.dumps(each) + "\n" for each in lines))
        write_json_atomic(folder / "summary.json", summary)
    console = Console()
    console.print(_table("Pairs that lower the validation loss most", lines[:top]))
    console.print(_table("The other end, harmful or least helpful: look at the labels", lines[::-1][:top]))
    setting.show(
        f"gradient noise scale: {noise.scale:.3g} pairs (in a batch of so many, noise and signal are equal); "
        f"{summary['harmful_share']:.0%} of {len(pairs)} training pairs pull against "
        f"{summary['validation_pairs']} held-out ones; written to {out}"
    )
    return measured


def _line(checkpoint: Checkpoint, pair: PairExample, number: int, measured: Influence) -> dict[str, object]:
    decode, start = checkpoint.tokenizer.decode, pair.chosen.prompt_length
    return {
        "pair": number,
        "influence": float(measured.influence[number]),
        "cosine": float(measured.cosine[number]),
        "gradient_norm": float(measured.gradient_norm[number]),
        "loss": float(measured.loss[number]),
        "prompt": decode(pair.chosen.ids[:start]),
        "chosen": decode(pair.chosen.ids[start:]),
        "rejected": decode(pair.rejected.ids[start:]),
    }


def _table(title: str, lines: list[dict[str, object]]) -> Table:
    table = Table(title=title, title_justify="left", show_lines=True)
    for name, side in (("pair", "right"), ("influence", "right"), ("cosine", "right"), ("loss", "right")):
        table.add_column(name, justify=side)  # pyright: ignore[reportArgumentType]
    table.add_column("prompt, chosen (+), rejected (-)")
    for each in lines:
        texts = (
            f"{sign} {_short(str(each[name]))}"
            for sign, name in ((" ", "prompt"), ("+", "chosen"), ("-", "rejected"))
        )
        numbers = f"{each['influence']:.3g}", f"{each['cosine']:+.3f}", f"{each['loss']:.3f}"
        table.add_row(str(each["pair"]), *numbers, escape("\n".join(texts)))
    return table


def _short(text: str) -> str:
    """One line, its end where it is long: prompts end with what was asked."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"…{line[1 - _SHOWN :]}"
