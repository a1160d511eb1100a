"""Who says which response is better: never the reward that the policies were trained on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from minirlhf.data.records import RewardFn
from minirlhf.rollout.sampler import Rollout, responses
from minirlhf.training.prompt_rows import PromptRow
from minirlhf.training.reward_sources import Reward
from minirlhf.training.rewards import Decoder, Scorer, text_scorer
from minirlhf.training.workspace import Checkpoint

TextComponents = Callable[[Sequence[str], Sequence[str], Sequence[Any]], Mapping[str, Tensor]]
"""`components(prompts, responses, facts) -> {name: [B]}`: the parts that a gold score adds up."""

Components = Callable[[Rollout, Tensor], dict[str, Tensor]]
"""`components(rollout, prompt_index [B]) -> {name: [B]}`: the same, on what was sampled."""


class Judge(NamedTuple):
    """A judge of the responses to one list of prompts.

    name: for the table. score: (rollout, prompt_index [B]) -> [B], higher is better; only its order counts in
    a win rate. components: the parts of the score, where the judge can tell them apart; {} where it cannot.
    """

    name: str
    score: Scorer
    components: Components


def gold_judge(
    score: RewardFn,
    components: TextComponents,
    tokenizer: Decoder,
    prompts: Sequence[str],
    facts: Sequence[Mapping[str, Any] | None],
    *,
    name: str = "gold judge",
) -> Judge:
    """The truth of an artificial world, read off the response's text and the prompt's facts.

    Args:
        score, components: of texts, as `data.world` offers them.
        tokenizer: turns ids into the text that is judged, without the stop token.
        prompts, facts: of every prompt, in the order that prompt_index counts.
    """

    def parts(rollout: Rollout, prompt_index: Tensor) -> dict[str, Tensor]:
        rows: list[int] = prompt_index.tolist()
        texts = [tokenizer.decode(ids) for ids in responses(rollout)]
        found = components([prompts[row] for row in rows], texts, [facts[row] for row in rows])
        return {part: value.to(rollout.tokens.device) for part, value in found.items()}

    return Judge(name, text_scorer(score, tokenizer, prompts, facts), parts)


def reward_judge(
    reward: Reward, policy: Checkpoint, prompts: Sequence[PromptRow], *, max_response: int
) -> Judge:
    """Any reward as judge: a second reward model, a rule, an endpoint. Only the order of its scores counts.

    Raises:
        InputError: the reward cannot score responses to these prompts; see `reward_sources`.
    """
    model = reward.weights.get("reward_model")
    name = reward.name if model is None else f"second reward model ({model.name})"
    return Judge(name, reward.scorer(policy, prompts, max_response), _no_parts)


def _no_parts(rollout: Rollout, prompt_index: Tensor) -> dict[str, Tensor]:
    del rollout, prompt_index
    return {}
