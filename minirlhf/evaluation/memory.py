"""The memory plan of an evaluation: all policies at once, one rollout after the other, and who reads them.

Responses are taken to be as long as they may be, to the longest prompts, and rows to share nothing: the plan
is an upper bound.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from minirlhf.evaluation.compare import SFT, EvaluationConfig
from minirlhf.evaluation.divergence import KL_ROWS, kl_of_tokens
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.rollout.footprint import footprint
from minirlhf.training import plan_phases
from minirlhf.training.live_memory import live_memory
from minirlhf.training.memory_plan import Entry, Plan, base_of, bytes_of
from minirlhf.training.rewards import Reader


def evaluation_plan(
    model: LanguageModel,
    sft: Params,
    policies: Mapping[str, Params],
    readers: Mapping[str, Reader],
    prompts: Sequence[Sequence[int]],
    config: EvaluationConfig,
    *,
    device: torch.device,
) -> Plan:
    """Of `compare.compare` on these prompts, read by a reward model and a judge where these are models."""
    models = [(SFT, sft), *policies.items(), *((owner, each.params) for owner, each in readers.items())]
    held = [Entry(owner, "start", bytes_of(params)) for owner, params in models]
    asked = [ids for ids in prompts for _ in range(config.samples)]
    sampled = footprint(model, sft, asked, max_new_tokens=config.max_response, device=device)
    rollout = plan_phases.rollout_phase("sample", model, sft, sampled, held, device=device)
    # The rooms of a rollout wait for the next one while its responses are read.
    around = [*held, *(entry for entry in rollout.entries if entry.returned)]
    width, rows = max(len(ids) for ids in prompts) + config.max_response, len(asked)
    phases = [plan_phases.loading([(entry.owner, entry.size) for entry in held]), rollout]
    if policies:
        part = min(KL_ROWS, rows)
        tokens = torch.zeros(part, width, dtype=torch.int64)
        place = torch.zeros(part * config.max_response, dtype=torch.int64)
        live = live_memory(partial(kl_of_tokens, model), sft, sft, tokens, place, device=device)
        phases.append(plan_phases.forward_phase("KL", "data", live, around))
    score = partial(plan_phases.scoring_phase, rows=rows, width=width, around=around, device=device)
    phases += [score(each) for each in readers.values()]
    assumed = (
        f"{rows} rows of {width} tokens: the longest prompts, and responses of {config.max_response}",
        f"{sampled.slots} rows are sampled at a time",
    )
    base = base_of(device, *(params for _, params in models))
    return Plan("evaluation", device, base, tuple(phases), assumed)
