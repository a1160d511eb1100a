"""TRL from 1.0 on: what each trainer computes from log-probs, and the helpers beside them.

The losses are methods of trainers that read little else: they are called on an object that has only that,
with a model that answers with the log-probs of the case.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from peers.frame import Page, Subject, load, with_attributes

GRPO, DPO, KTO, RLOO, REWARD = (
    Page(f"trl.trainer.{name}_trainer") for name in ("grpo", "dpo", "kto", "rloo", "reward")
)
ORPO, CPO = (Page(f"trl.experimental.{name}.{name}_trainer") for name in ("orpo", "cpo"))
HELPERS = Page("trl.trainer.utils")


def _accelerator() -> Any:
    """One process."""
    same = {name: lambda x, **_: x for name in ("gather", "gather_for_metrics", "reduce")}
    return with_attributes(device=torch.device("cpu"), num_processes=1, **same)


def trainer(training: bool = False, **attributes: Any) -> Any:
    """What every trainer has."""
    return with_attributes(
        accelerator=_accelerator(),
        model=with_attributes(training=training),
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        **attributes,
    )


def _grpo(
    logp: Tensor, advantage: Tensor, mask: Tensor, old: Tensor | None, ref: Tensor, **how: Any
) -> Tensor:
    """`GRPOTrainer._compute_loss` on prompts of one token."""
    args = with_attributes(use_bias_correction_kl=how.pop("corrected", False), delta=how.pop("delta", None),
                           steps_per_generation=1)  # fmt: skip
    usual = {"beta": 0.0, "loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2,
             "importance_sampling_level": "token"}  # fmt: skip
    theirs = trainer(
        True, args=args, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1,
        max_completion_length=logp.shape[1], _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
        **(usual | how),
    )  # fmt: skip
    zeros, completion = torch.zeros(len(logp), 1, dtype=torch.long), torch.zeros_like(logp, dtype=torch.long)
    inputs = {"prompt_ids": zeros, "prompt_mask": zeros + 1, "completion_ids": completion,
              "completion_mask": mask.to(logp.dtype), "advantages": advantage, "ref_per_token_logps": ref,
              "old_per_token_logps": old, "num_items_in_batch": mask.sum()}  # fmt: skip
    return load(GRPO).GRPOTrainer._compute_loss(theirs, None, inputs)


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    *,
    loss_type: str,
) -> Tensor:
    """`GRPOTrainer` without a reference; its delta is the dual clip."""
    limits = {"epsilon_low": clip_low, "epsilon_high": clip_high, "delta": dual_clip}
    return _grpo(logp, advantage, mask, old_logp, old_logp, loss_type=loss_type, **limits)


def gspo_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """`GRPOTrainer` with a ratio per sequence."""
    limits = {"epsilon_low": clip_low, "epsilon_high": clip_high}
    return _grpo(logp, advantage, mask, old_logp, old_logp, importance_sampling_level="sequence", **limits)


def cispo_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip_high: float) -> Tensor:
    """`GRPOTrainer` of type cispo."""
    return _grpo(logp, advantage, mask, old_logp, old_logp, loss_type="cispo", epsilon_high=clip_high)


def grpo_kl_term(
    logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float = 1.0, *, corrected: bool
) -> Tensor:
    """The KL term of `GRPOTrainer`: what is left without advantages."""
    no_advantage, how = torch.zeros_like(logp[:, 0]), {"loss_type": "bnpo", "corrected": corrected}
    return _grpo(logp, no_advantage, mask, None, ref_logp, beta=beta, **how)


def rloo_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """`RLOOTrainer`, whose action is the whole completion: here each is one token."""
    new = logp.reshape(-1, 1)
    theirs = trainer(
        epsilon_low=clip_low, epsilon_high=clip_high,
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
    )  # fmt: skip
    ids, old = torch.zeros(len(new), 1, dtype=torch.long), old_logp.flatten()
    inputs = {"prompt_ids": ids, "prompt_mask": ids + 1, "completion_ids": ids,
              "completion_mask": torch.ones_like(new), "advantages": advantage.flatten(),
              "old_logps": old}  # fmt: skip
    return load(RLOO).RLOOTrainer._compute_loss(theirs, None, inputs)


class _Answer(dict[str, Any]):
    """A model's outputs, by name or as attributes."""

    __getattr__ = dict.__getitem__


def _answer(log_probs: Tensor) -> Any:
    """A model that answers with these log-probs."""
    zero = torch.zeros_like(log_probs)
    outputs = with_attributes(log_probs=log_probs, entropy=zero, mean_logits=zero, is_top1=zero.bool())
    return lambda **_: outputs


def _completions(logp: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs [B, L], completion mask [B, L + 1]) of completions of these lengths and sums."""
    log_probs = torch.zeros(len(logp), int(length.max()), dtype=logp.dtype)
    log_probs = torch.cat([logp.unsqueeze(1), log_probs[:, 1:]], dim=1)
    slot = torch.arange(log_probs.shape[1] + 1)
    return log_probs, ((slot > 0) & (slot <= length.unsqueeze(1))).long()


def preference_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
    *,
    loss_type: str,
) -> Tensor:
    """`DPOTrainer._compute_loss`."""
    one = torch.ones_like(chosen_logp, dtype=torch.long)
    lengths = [one if length is None else length for length in (chosen_length, rejected_length)]
    log_probs, mask = _completions(torch.cat([chosen_logp, rejected_logp]), torch.cat(lengths))
    theirs = trainer(
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[loss_type],
        loss_weights=[1.0], beta=beta, label_smoothing=label_smoothing, use_weighting=False,
        _total_train_tokens=0,
    )  # fmt: skip
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask),
              "completion_mask": mask, "ref_chosen_logps": ref_chosen_logp,
              "ref_rejected_logps": ref_rejected_logp}  # fmt: skip
    return load(DPO).DPOTrainer._compute_loss(theirs, _answer(log_probs), inputs, False)


def unpaired_loss(
    logp: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """`KTOTrainer._compute_loss`."""
    log_probs, mask = _completions(logp, torch.ones_like(logp, dtype=torch.long))
    theirs = trainer(
        calculate_KL=True, precompute_ref_logps=True, loss_type="kto", beta=beta,
        desirable_weight=desirable_weight, undesirable_weight=undesirable_weight, _total_train_tokens=0,
        _compute_kl_logps=lambda model, batch: kl.expand(len(logp)),
    )  # fmt: skip
    batch = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask),
             "completion_mask": mask, "label": desirable, "ref_logps": ref_logp,
             "ref_KL_logps": torch.zeros_like(logp)}  # fmt: skip
    return load(KTO).KTOTrainer._compute_loss(theirs, _answer(log_probs), batch, False)


def reward_loss(chosen_reward: Tensor, rejected_reward: Tensor, margin: Tensor | None = None) -> Tensor:
    """`RewardTrainer.compute_loss`: one batch of both since 0.20, two calls of the model before."""
    ids = {"input_ids_chosen": torch.zeros(1), "input_ids_rejected": torch.zeros(1)}
    rest = {"attention_mask_chosen": None, "attention_mask_rejected": None}

    def model(input_ids: Tensor | None = None, **_: Any) -> Any:
        both = torch.cat([chosen_reward, rejected_reward])
        one = chosen_reward if input_ids is ids["input_ids_chosen"] else rejected_reward
        return _Answer(logits=(both if input_ids is None else one).unsqueeze(1))

    theirs = trainer(args=with_attributes(center_rewards_coefficient=None), use_reward_data_collator=True,
                     _total_train_tokens=0)  # fmt: skip
    inputs = ids | rest if margin is None else {**ids, **rest, "margin": margin}
    return load(REWARD).RewardTrainer.compute_loss(theirs, model, inputs)


def odds_ratio_loss(
    chosen_logp: Tensor, rejected_logp: Tensor, weight: float, *, page: Page = ORPO
) -> Tensor:
    """`odds_ratio_loss` of averaged log-probs; its trainer subtracts it from the likelihood's loss."""
    theirs = load(page).ORPOTrainer.odds_ratio_loss
    return -theirs(trainer(beta=weight), chosen_logp, rejected_logp)[0]


def simpo_loss(
    chosen_logp: Tensor, rejected_logp: Tensor, beta: float, gamma: float, *, page: Page = CPO
) -> Tensor:
    """`cpo_loss` of type simpo, of averaged log-probs."""
    how = {"loss_type": "simpo", "simpo_gamma": gamma, "label_smoothing": 0.0, "alpha": 0.0}
    return load(page).CPOTrainer.cpo_loss(trainer(beta=beta, **how), chosen_logp, rejected_logp)[0]


def _subject(function: str, kind: str, page: Page, call: Any = None, **adapter: Any) -> Subject:
    return Subject("trl", function, kind, page, call, adapter)


SUBJECTS = (
    *(_subject(f"GRPOTrainer._compute_loss {name}", "clipped_surrogate", GRPO, grpo_loss,
               fixed={"loss_type": name}) for name in ("grpo", "bnpo", "dr_grpo", "dapo")),
    _subject("GRPOTrainer._compute_loss sequence", "gspo", GRPO, gspo_loss),
    _subject("GRPOTrainer._compute_loss cispo", "cispo", GRPO, cispo_loss),
    _subject("GRPOTrainer._compute_loss, KL", "kl_loss", GRPO, grpo_kl_term, fixed={"corrected": False}),
    _subject("GRPOTrainer._compute_loss, KL corrected", "kl_loss", GRPO, grpo_kl_term,
             fixed={"corrected": True}),
    _subject("RLOOTrainer._compute_loss", "clipped_surrogate", RLOO, rloo_loss),
    *(_subject(f"DPOTrainer._compute_loss {name}", kind, DPO, preference_loss, fixed={"loss_type": name})
      for name, kind in (("sigmoid", "dpo"), ("hinge", "hinge"), ("robust", "robust_dpo"))),
    _subject("DPOTrainer._compute_loss ipo", "ipo", DPO, preference_loss, tau="beta",
             fixed={"loss_type": "ipo"}),
    _subject("KTOTrainer._compute_loss", "kto", KTO, unpaired_loss),
    _subject("RewardTrainer.compute_loss", "bradley_terry", REWARD, reward_loss),
    _subject("ORPOTrainer.odds_ratio_loss", "orpo", ORPO, odds_ratio_loss),
    _subject("CPOTrainer.cpo_loss simpo", "simpo", CPO, simpo_loss),
    _subject("ORPOTrainer.get_batch_logps", "sequence_logp", ORPO),
    _subject("selective_log_softmax", "token_logp", HELPERS, tokens="index"),
    _subject("entropy_from_logits", "entropy", HELPERS),
)  # fmt: skip
