"""What a stage is rewarded by: the directory of a reward model, or a rule on text that the user names."""

import difflib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

from torch import Tensor

from minirlhf.data.records import RewardFn
from minirlhf.runs import InputError
from minirlhf.training.inputs import PromptRow
from minirlhf.training.rewards import Scorer, reward_model_scorer, text_scorer
from minirlhf.training.setting import Setting
from minirlhf.training.workspace import Checkpoint, load_reward_model, require_same_model


class Reward(NamedTuple):
    """A reward that has yet to meet its prompts.

    scorer: (policy, prompts) -> score of responses to these prompts, counted in this order.
    weights, data: what it consists of, for the manifest.
    """

    scorer: Callable[[Checkpoint, Sequence[PromptRow]], Scorer]
    weights: dict[str, Path]
    data: dict[str, Path]


def the_one_reward(reward_model: Path | None, rule: str | None, setting: Setting) -> Reward:
    """The reward that was named, a directory or a place.

    Raises:
        InputError: both or neither were; or see `of_reward_model` and `of_rule`.
    """
    if rule is None and reward_model is not None:
        return of_reward_model(reward_model, setting)
    if rule is not None and reward_model is None:
        return of_rule(rule)
    raise InputError(
        "expected one reward, --reward-model DIR or --reward module:function, "
        f"got {'neither' if rule is None else 'both'}"
    )


def of_reward_model(path: Path, setting: Setting) -> Reward:
    """The normalised score of a reward model.

    Raises:
        InputError: there is no such model; from `scorer`: it has another shape or tokenizer than the policy.
    """
    judge = load_reward_model(path, setting)

    def scorer(policy: Checkpoint, prompts: Sequence[PromptRow]) -> Scorer:
        del prompts  # they are in the ids
        require_same_model(policy, judge)
        return reward_model_scorer(judge.model, judge.params, judge.normalisation)

    return Reward(scorer, {"reward_model": path}, {})


def of_rule(place: str) -> Reward:
    """A `RewardFn` by its place, module:function; it gets the prompts' texts and facts, and the responses.

    Raises:
        InputError: see `load_rule`; from the score: the rule raised, or did not return a tensor [B].
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

    def scorer(policy: Checkpoint, prompts: Sequence[PromptRow]) -> Scorer:
        texts, facts = [row.row.prompt for row in prompts], [row.row.facts for row in prompts]
        return text_scorer(checked, policy.tokenizer, texts, facts)

    return Reward(scorer, {}, {} if file is None else {f"reward {place}": file})


def load_rule(place: str) -> tuple[RewardFn, Path | None]:
    """The function at module:function, and its module's file; modules of the working directory are found too.

    Raises:
        InputError: no such module or function, the module raises, or what stands there cannot be called.
    """
    name, colon, attribute = place.partition(":")
    if not (name and colon and attribute):
        raise InputError(f"reward: expected module:function, such as my_rules:score, got {place!r}")
    module = _import(name, place)
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"reward {place}: module {name} has no {attribute!r}{hint}")
    rule = getattr(module, attribute)
    if not callable(rule):
        raise InputError(f"reward {place}: expected a function, got {type(rule).__name__}")
    file = getattr(module, "__file__", None)
    return cast(RewardFn, rule), None if file is None else Path(file)


def _import(name: str, place: str) -> ModuleType:
    here = str(Path.cwd())
    sys.path.insert(0, here)  # a console script has its own directory there instead
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise InputError(f"reward {place}: there is no module {name}, here or installed") from error
        raise InputError(f"reward {place}: {name} cannot be imported: {error}") from error
    except (Exception, SystemExit) as error:
        told = f"{type(error).__name__}: {error}"
        raise InputError(f"reward {place}: {name} cannot be imported: {told}") from error
    finally:
        sys.path.remove(here)
