"""TRL's steps, through its trainers: its default setting, and the fastest one that it has on this device.

Both take the same weights, the same pairs in the same order, AdamW (torch's fused one), a constant rate, no
weight decay, no dropout (TRL's own default but for SFT; 0 in the model's config here) and fp32: bf16 is TRL's
default, and many times slower on a CPU without units for it. A step is from `on_step_begin` to `on_step_end`:
the data loader and the logs lie outside. Of PPO, which has only `on_step_end`, an iteration is from one to
the next, and its update from the first `accumulate` on.
"""

import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from machine import clock
from train_ours import Took, begin, most
from train_work import PAD, Work, demonstrations_of, pairs_of, prompts_of

from minirlhf.data.records import Example
from minirlhf.runs import tell_malloc


class Setting(NamedTuple):
    """What TRL is told.

    arguments: of every stage's config, beside what makes the runs equal.
    dpo: of DPO's.
    keep: whether the process keeps freed memory, as ours does; TRL leaves the allocator alone.
    """

    arguments: dict[str, Any]
    dpo: dict[str, Any]
    keep: bool


SETTINGS: dict[str, Setting] = {
    "TRL": Setting({}, {}, keep=False),
    "TRL, best": Setting({"gradient_checkpointing": False}, {"precompute_ref_log_probs": True}, keep=True),
}
"""What is compared of TRL's. Its losses are chunked over the vocabulary in both; Liger's kernels and batches
without padding need CUDA."""


def measure(work: Work, stage: str, setting: Setting, ppo_folder: str | None) -> Took:
    """Trains with the stage's trainer.

    Args:
        ppo_folder: where a TRL that still has `PPOTrainer` lies; None for the installed one.
    """
    if setting.keep:
        tell_malloc()
    if stage == "PPO" and ppo_folder is not None:
        sys.path.insert(0, ppo_folder)
    return STAGES[stage](work, setting)


def _sft(work: Work, setting: Setting) -> Took:
    rows = [_words(each) for each in demonstrations_of(work)]
    trl = import_module("trl")
    config = trl.SFTConfig(**_arguments(work, setting, rows=2 * work.pairs))
    trainer = trl.SFTTrainer(str(work.policy), config, train_dataset=_table(rows), **_words_of(work))
    return _train(trainer, work)


def _dpo(work: Work, setting: Setting) -> Took:
    trl = import_module("trl")
    config = trl.DPOConfig(**_arguments(work, setting, rows=work.pairs), **setting.dpo)
    trainer = trl.DPOTrainer(str(work.policy), None, config, train_dataset=_pairs(work), **_words_of(work))
    return _train(trainer, work)


def _reward(work: Work, setting: Setting) -> Took:
    trl = import_module("trl")
    config = trl.RewardConfig(**_arguments(work, setting, rows=work.pairs))
    trainer = trl.RewardTrainer(str(work.reward), config, train_dataset=_pairs(work), **_words_of(work))
    return _train(trainer, work)


def _train(trainer: Any, work: Work) -> Took:
    """Runs a `transformers.Trainer`, its clock read around each step and its losses as they are computed."""
    device, losses, one = torch.device(work.device), [], trainer.training_step

    def training_step(*given: Any, **named: Any) -> Any:
        loss = one(*given, **named)
        losses.append(loss.detach())
        return loss

    times = _times(device)
    trainer.training_step = training_step
    trainer.add_callback(times)
    trainer.train()
    seconds = [end - start for start, end in zip(times.begun, times.ended, strict=True)]
    return Took({"step": seconds}, [float(each) for each in losses], _trained(trainer.model), most(device))


def _ppo(work: Work, setting: Setting) -> Took:
    transformers, ppo = import_module("transformers"), import_module("trl.experimental.ppo")
    language, scalar = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    arguments = _arguments(work, setting, rows=work.rollouts)
    for name in ("max_steps", "train_sampling_strategy"):  # of the other trainers
        del arguments[name]
    config = ppo.PPOConfig(
        **arguments, adam_epsilon=1e-5, total_episodes=work.rollouts * work.steps,
        response_length=work.answered, num_sample_generations=0, missing_eos_penalty=1.0,
    )  # fmt: skip
    table = import_module("datasets").Dataset.from_dict({"input_ids": prompts_of(work)})
    policy, reference = (language.from_pretrained(work.policy) for _ in range(2))
    value, reward = (scalar.from_pretrained(work.reward, num_labels=1) for _ in range(2))
    trainer = ppo.PPOTrainer(
        config, model=policy, ref_model=reference, reward_model=reward, value_model=value,
        train_dataset=table, eval_dataset=table, **_words_of(work),
    )  # fmt: skip
    device, updates, accumulate = torch.device(work.device), [], trainer.accelerator.accumulate
    times = _times(device)

    def accumulating(*models: Any) -> Any:
        if len(updates) == len(times.ended) - 1:  # the iteration's first
            updates.append(clock(device))
        return accumulate(*models)

    trainer.accelerator.accumulate = accumulating
    trainer.add_callback(times)
    trainer.train()
    ends = times.ended
    seconds = {
        "iteration": [end - start for start, end in zip(ends, ends[1:], strict=False)],
        "update": [end - start for start, end in zip(updates, ends[1:], strict=True)],
    }
    return Took(seconds, [], _trained(trainer.model), most(device))


STAGES: dict[str, Callable[[Work, Setting], Took]] = {
    "SFT": _sft, "DPO": _dpo, "reward": _reward, "PPO": _ppo,
}  # fmt: skip


def _times(device: torch.device) -> Any:
    """A callback with when each step began and ended; what PPO ends first is its beginning."""

    class Times(import_module("transformers").TrainerCallback):
        begun: list[float]
        ended: list[float]

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begun, self.ended = [], [clock(device)] if hasattr(args, "num_ppo_epochs") else []
            begin(device)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begun.append(clock(device))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.ended.append(clock(device))

    return Times()


def _arguments(work: Work, setting: Setting, *, rows: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": rows, "max_steps": work.steps,
        "learning_rate": work.rate, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "optim": "adamw_torch_fused", "train_sampling_strategy": "sequential",
        "bf16": False, "use_cpu": work.device == "cpu", "dataloader_pin_memory": work.device != "cpu",
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, **setting.arguments,
    }  # fmt: skip


def _pairs(work: Work) -> Any:
    return _table([
        _words(pair.chosen, "chosen") | _words(pair.rejected, "rejected")
        for pair in pairs_of(work)
    ])  # fmt: skip


def _words(row: Example, name: str = "completion") -> dict[str, str]:
    """As text that `_words_of` reads as these ids; the EOS, which TRL adds itself, is left out."""
    words = [f" t{each}" for each in row.ids[:-1]]
    return {"prompt": "".join(words[: row.prompt_length]), name: "".join(words[row.prompt_length :])}


def _table(rows: list[dict[str, str]]) -> Any:
    return import_module("datasets").Dataset.from_list(rows)


def _words_of(work: Work) -> dict[str, Any]:
    """A tokenizer of as many words as the model has ids: t0, t1, ..."""
    library, transformers = import_module("tokenizers"), import_module("transformers")
    config = work.config
    names = {config.eos_token_id: "<|endoftext|>", PAD: "<|pad|>"}
    words = {names.get(each, f"t{each}"): each for each in range(config.vocab_size)}
    backend = library.Tokenizer(library.models.WordLevel(words, unk_token=names[PAD]))
    backend.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    end, pad = names[config.eos_token_id], names[PAD]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=pad)
    return {"processing_class": tokenizer}


def _trained(model: Any) -> int:
    """Bytes of gradients and of both moments."""
    return 3 * sum(each.numel() * each.element_size() for each in model.parameters() if each.requires_grad)
