"""What a stage is rewarded by, as a user names it: a reward model, a function, an HTTP endpoint.

    DIR or hub name      a reward model: on the policy's ids where tokenizer and template are the same,
                         else on text (`text_rewards`)
    module:function      a rule (prompts, responses, facts) -> tensor [B]; also path/to/file.py:function
    http(s)://host/path  an endpoint (`http_reward`)

Scores are used as given; only a reward model of ours carries a normalisation. Before anything is sampled,
every prompt is checked against a reward model's context, and a rule or endpoint is asked for its reward of an
empty response to the first prompt. A score that is not finite stops the run and names source and row.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from minirlhf.data.records import RewardFn
from minirlhf.models.encoder_files import is_encoder
from minirlhf.models.interface import Params, with_scalar_head
from minirlhf.models.sources import resolve_model
from minirlhf.rollout.sampler import Rollout
from minirlhf.runs import InputError
from minirlhf.training.device import move, resolve
from minirlhf.training.http_reward import RemoteConfig, http_scorer, shown
from minirlhf.training.offload import waiting, where_it_waits
from minirlhf.training.prompt_rows import PromptRow
from minirlhf.training.rewards import (
    Reader,
    Scorer,
    critic_from_reward_model,
    reader_of,
    reward_model_scorer,
    text_scorer,
)
from minirlhf.training.setting import Setting, generator_for
from minirlhf.training.text_rewards import (
    encoder_reader,
    encoder_scorer,
    load_encoder_reward,
    text_model_scorer,
    why_text,
)
from minirlhf.training.workspace import Checkpoint, load_policy, load_reward_model
from minirlhf.verify.subject import SubjectError
from minirlhf.verify.target import load

FORMS = "a reward model's directory or name, module:function, or http(s)://host/path"


class Reward(NamedTuple):
    """A reward that has yet to meet its prompts.

    name: for messages, tables and manifests.
    scorer: (policy, prompts, max_response) -> score of responses to these prompts, counted in this order.
    weights, data: what it consists of, for the manifest: a file, or a record of what is none.
    backbone: a reward model that may be a critic's starting point; None where there is none.
    reader: the model that scores, for memory plans; None where a rule or an endpoint does.
    """

    name: str
    scorer: Callable[[Checkpoint, Sequence[PromptRow], int], Scorer]
    weights: dict[str, Path]
    data: dict[str, Path | Mapping[str, str]]
    backbone: Checkpoint | None = None
    reader: Reader | None = None


def the_one_reward(
    reward_model: str | Path | None,
    reward: str | None,
    setting: Setting,
    *,
    remote: RemoteConfig | None = None,
) -> Reward:
    """The reward that was named, by either of two flags that mean the same.

    Raises:
        InputError: both or neither were; or see `open_reward`.
    """
    if (reward is None) == (reward_model is None):
        raise InputError(
            f"expected one reward, --reward SOURCE ({FORMS}) or --reward-model DIR, "
            f"got {'neither' if reward is None else 'both'}"
        )
    return open_reward(str(reward if reward is not None else reward_model), setting, remote=remote)


def open_reward(source: str, setting: Setting, *, remote: RemoteConfig | None = None) -> Reward:
    """The reward that a user named.

    Args:
        source: see the page.
        remote: how an endpoint is asked.

    Raises:
        InputError: there is no such thing; or see `of_reward_model`, `of_encoder`, `of_rule`.
    """
    if source.startswith(("http://", "https://")):
        return of_url(source, setting, remote or RemoteConfig())
    if ":" in source and not Path(source).exists():
        return of_rule(source)
    try:
        path = resolve_model(source)
    except InputError as error:
        raise InputError(f"reward: expected {FORMS}; {error}") from error
    return of_encoder(path, setting) if is_encoder(path) else of_reward_model(path, setting)


def of_reward_model(path: Path, setting: Setting) -> Reward:
    """The normalised score of a reward model with a language model's backbone.

    Raises:
        InputError: there is no such model; from `scorer`: a prompt leaves no room in its context.
    """
    return _of_judge(load_reward_model(path, where_it_waits(setting)), setting)


def of_untrained(policy: Path, path: Path, setting: Setting) -> Reward:
    """The reward model that will be trained from this policy and written to `path`, before it is: its shapes.

    Raises:
        InputError: there is no such policy.
    """
    start = load_policy(policy, setting)
    params = with_scalar_head(start.model, start.params, generator=generator_for(setting, "reward"))
    return _of_judge(start._replace(path=path, params=params), setting)


def _of_judge(judge: Checkpoint, setting: Setting) -> Reward:
    path, told, device = judge.path, set[Path](), resolve(setting.device)

    def scorer(policy: Checkpoint, prompts: Sequence[PromptRow], max_response: int) -> Scorer:
        why = why_text(policy, judge)
        if why is None:
            _require_room(judge, prompts, max_response)
            params = waiting(judge.params, device) if setting.offload else judge.params
            return reward_model_scorer(judge.model, params, judge.normalisation)
        if policy.path not in told:  # once, not for every part of the prompts
            setting.show(f"reward model {path} reads text: {why} from that of {policy.path}")
            told.add(policy.path)
        asked = [row.row for row in prompts]
        here = judge._replace(params=move(judge.params, device)) if setting.offload else judge
        return text_model_scorer(here, policy.tokenizer, asked, say=setting.show)

    name = f"reward model {path}"
    reader = reader_of(judge.model, judge.params)
    return Reward(name, _finite(name, scorer), {"reward_model": path}, {}, judge, reader)


def of_encoder(path: Path, setting: Setting) -> Reward:
    """The raw score of an encoder reward model, which reads text.

    Raises:
        InputError: there is no such model; from `scorer`: a prompt leaves no room in its context.
    """
    judge, told = load_encoder_reward(path, setting), set[Path]()

    def scorer(policy: Checkpoint, prompts: Sequence[PromptRow], max_response: int) -> Scorer:
        del max_response  # in the policy's tokens, which the encoder does not have
        if policy.path not in told:
            setting.show(f"reward model {path} reads text: it is an encoder with a tokenizer of its own")
            told.add(policy.path)
        return encoder_scorer(judge, policy.tokenizer, [row.row for row in prompts], say=setting.show)

    name, reader = f"reward model {path}", encoder_reader(judge)
    return Reward(name, _finite(name, scorer), {"reward_model": path}, {}, reader=reader)


def of_rule(place: str) -> Reward:
    """A `RewardFn` by its place, module:function; it gets the prompts' texts and facts, and the responses.

    Raises:
        InputError: see `load_rule`; from `scorer` and from the score: the rule raised, or did not return a
            tensor [B].
    """
    rule, file = load_rule(place)

    def checked(
        prompts: Sequence[str], responses: Sequence[str], facts: Sequence[Mapping[str, Any] | None]
    ) -> Tensor:
        try:
            given = rule(prompts, responses, facts)
        except Exception as error:
            raise InputError(f"the reward {place} raised {type(error).__name__}: {error}") from error
        if not isinstance(given, Tensor) or given.shape != (len(responses),):
            got = f"shape {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise InputError(
                f"the reward {place} must return a tensor [{len(responses)}], one per response, got {got}"
            )
        return given

    def scorer(policy: Checkpoint, prompts: Sequence[PromptRow], max_response: int) -> Scorer:
        del max_response
        texts, facts = [row.row.prompt for row in prompts], [row.row.facts for row in prompts]
        probe = checked(texts[:1], [""], facts[:1])
        _require_finite(f"the reward {place}", probe, [prompts[0].row.line])
        return text_scorer(checked, policy.tokenizer, texts, facts)

    data = {"path": "not known"} if file is None else file
    name = f"the reward {place}"
    return Reward(name, _finite(name, scorer), {}, {f"reward {place}": data})


def of_url(url: str, setting: Setting, remote: RemoteConfig) -> Reward:
    """An HTTP endpoint; see `http_reward`.

    Raises:
        InputError: from `scorer`: httpx is not installed, or the endpoint does not answer as it should.
    """

    def scorer(policy: Checkpoint, prompts: Sequence[PromptRow], max_response: int) -> Scorer:
        del max_response
        asked = [row.row for row in prompts]
        return http_scorer(url, policy.tokenizer, asked, config=remote, say=setting.show)

    name = f"reward {shown(url)}"
    return Reward(name, _finite(name, scorer), {}, {"reward": {"url": shown(url)}})


def load_rule(place: str) -> tuple[RewardFn, Path | None]:
    """The function at module:function or path/to/file.py:function, and the file that it was found in.

    Raises:
        InputError: no such module or function, the module raises, or what stands there cannot be called.
    """
    try:
        rule = load(place)
    except SubjectError as error:
        raise InputError(f"reward {place}: {error}") from error
    name = place.rpartition(":")[0]
    file = name if name.endswith(".py") else getattr(sys.modules.get(name), "__file__", None)
    return rule, None if file is None else Path(file)


def critic_for(reward: Reward, policy: Checkpoint, setting: Setting) -> Params:
    """A critic's starting point: the reward model, where the policy's functions can read it.

    Else it is the policy's own backbone with a fresh scalar head, and that is said.
    """
    judge = reward.backbone
    if judge is not None and why_text(policy, judge) is None and _same_shape(policy, judge):
        return critic_from_reward_model(judge.params, judge.normalisation)
    setting.show(
        f"critic: the policy's backbone with a fresh head, since {reward.name} has none of the same shape "
        "and tokenizer"
    )
    return with_scalar_head(policy.model, policy.params, generator=generator_for(setting, "critic"))


def _same_shape(policy: Checkpoint, judge: Checkpoint) -> bool:
    """One model's functions read both. Which ids end a response is no matter of shape."""
    ours, theirs = policy.model.config, judge.model.config
    if type(ours) is not type(theirs):
        return False
    return dataclasses.replace(theirs, eos_token_id=ours.eos_token_id) == ours


def _require_room(judge: Checkpoint, prompts: Sequence[PromptRow], max_response: int) -> None:
    context = judge.model.config.n_positions
    for row in prompts:
        if len(row.ids) + max_response > context:
            raise InputError(
                f"reward model {judge.path}: its context of {context} tokens does not hold the prompt of "
                f"line {row.row.line} ({len(row.ids)} tokens) and a response of {max_response}; take such "
                f"prompts out of the data or lower max_response"
            )


def _finite(
    name: str, scorer: Callable[[Checkpoint, Sequence[PromptRow], int], Scorer]
) -> Callable[[Checkpoint, Sequence[PromptRow], int], Scorer]:
    """The same, with every score checked where its source is still known."""

    def checked(policy: Checkpoint, prompts: Sequence[PromptRow], max_response: int) -> Scorer:
        score, lines = scorer(policy, prompts, max_response), [row.row.line for row in prompts]

        def check(rollout: Rollout, prompt_index: Tensor) -> Tensor:
            given = score(rollout, prompt_index)
            _require_finite(name, given, [lines[row] for row in prompt_index.tolist()])
            return given

        return check

    return checked


def _require_finite(name: str, given: Tensor, lines: Sequence[int]) -> None:
    wrong = ~given.isfinite()
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise InputError(
            f"{name}: the score of response {row} (to the prompt of line {lines[row]}) is "
            f"{float(given[row])}, not a finite number"
        )
