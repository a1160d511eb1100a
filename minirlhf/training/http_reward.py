"""A reward behind an HTTP endpoint: texts out, one number per response back.

    POST URL  {"prompts": [...], "responses": [...], "facts": [...], "messages": [...] or null,
               "query": [...]}
    200       {"rewards": [...]}, finite numbers in the same order

`facts` has an object or null per row, `messages` the prompt's conversation as a list of {"role", "content"},
where the data set is one. `query` is prompt and response in one text: the key that OpenRLHF's remote reward
models read, which answer with the same `rewards`.

A lost connection, a timeout, 429 and 5xx are tried again, a bounded number of times, each wait twice as long
as the one before. Any other answer that is not as above stops the run and is shown.
"""

import importlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minirlhf.data.records import Prompt
from minirlhf.rollout.sampler import Rollout, responses
from minirlhf.runs import InputError
from minirlhf.training.rewards import Decoder, Scorer
from minirlhf.training.text_rewards import Say

_SHOWN = 200  # characters of an answer that an error quotes
_MOST_BYTES, _BYTES_PER_ROW = 1 << 20, 1 << 10  # of an answer; a number takes some twenty


@dataclass(frozen=True)
class RemoteConfig:
    """How an HTTP reward is asked; other rewards do not read it."""

    reward_timeout: float = 60.0
    """Seconds within which one request to an HTTP reward must be answered."""
    reward_retries: int = 5
    """How often a request that failed for a passing reason is sent again (lost connection, timeout, 5xx)."""
    reward_backoff: float = 0.5
    """Seconds before the first of these; each further wait is twice as long."""
    reward_batch: int = 64
    """Most responses of one request to an HTTP reward."""

    def __post_init__(self) -> None:
        if not (0 < self.reward_timeout < math.inf and 0 <= self.reward_backoff < math.inf):
            raise InputError(
                "reward_timeout must be positive and reward_backoff not negative, got "
                f"{self.reward_timeout} and {self.reward_backoff}"
            )
        if self.reward_retries < 0 or self.reward_batch < 1:
            raise InputError(
                "reward_retries must not be negative and reward_batch at least 1, got "
                f"{self.reward_retries} and {self.reward_batch}"
            )


class _Passing(Exception):
    """A failure that may not happen again."""


def shown(url: str) -> str:
    """The URL without user and password, for people and manifests.

    >>> shown("http://me:secret@host:8000/score")
    'http://host:8000/score'
    """
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def http_scorer(
    url: str, policy: Decoder, prompts: Sequence[Prompt], *, config: RemoteConfig, say: Say
) -> Scorer:
    """The endpoint's reward of each response, which it sees without the stop token.

    The endpoint is asked once, now: for its reward of an empty response to the first prompt.

    Args:
        policy: turns the sampled ids into text.
        prompts: in the order that prompt_index counts.
        say: told of every request that had to be sent more than once.

    Raises:
        InputError: httpx is not installed, or the endpoint does not answer as it should (also later).
    """
    _httpx()  # fails now rather than later

    def score(rollout: Rollout, prompt_index: Tensor) -> Tensor:
        texts = [policy.decode(ids) for ids in responses(rollout)]
        rewards = ask(url, [prompts[row] for row in prompt_index.tolist()], texts, config=config, say=say)
        return torch.tensor(rewards, dtype=torch.float32, device=rollout.tokens.device)

    ask(url, prompts[:1], [""], config=config, say=say)
    return score


def ask(
    url: str, prompts: Sequence[Prompt], answers: Sequence[str], *, config: RemoteConfig, say: Say
) -> list[float]:
    """One reward per answer, in order; in as many requests as `config.reward_batch` asks for.

    Raises:
        InputError: see the page; names the URL, the status and the beginning of what came.
    """
    httpx, rewards = _httpx(), []
    try:
        with httpx.Client(timeout=config.reward_timeout) as client:
            for start in range(0, len(answers), config.reward_batch):
                some = slice(start, start + config.reward_batch)
                body = json.dumps(_body(prompts[some], answers[some]), ensure_ascii=False).encode()
                rows = len(answers[some])
                rewards += _until_answered(httpx, client, url, body, rows, config=config, say=say)
    except httpx.InvalidURL as error:
        raise InputError(f"reward {shown(url)}: not a URL: {error}") from error
    return rewards


def _body(prompts: Sequence[Prompt], answers: Sequence[str]) -> dict[str, Any]:
    said = [prompt.messages for prompt in prompts]
    messages = [None if each is None else [message._asdict() for message in each] for each in said]
    return {
        "prompts": [prompt.prompt for prompt in prompts],
        "responses": list(answers),
        "facts": [prompt.facts for prompt in prompts],
        "messages": None if all(each is None for each in messages) else messages,
        "query": [prompt.prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
    }


def _until_answered(
    httpx: Any, client: Any, url: str, body: bytes, rows: int, *, config: RemoteConfig, say: Say
) -> list[float]:
    told: list[str] = []
    for attempt in range(config.reward_retries + 1):
        if attempt:
            time.sleep(config.reward_backoff * 2 ** (attempt - 1))
        try:
            rewards = _rewards(url, _once(httpx, client, url, body, rows, config.reward_timeout), rows)
        except _Passing as error:
            told.append(str(error))
            continue
        if told:
            again = f"{len(told)} more {'try' if len(told) == 1 else 'tries'}"
            say(f"reward {shown(url)}: answered after {again} ({', '.join(dict.fromkeys(told))})")
        return rewards
    reasons = ", ".join(dict.fromkeys(told))
    raise InputError(f"reward {shown(url)}: no answer in {len(told)} tries ({reasons}); is the server up?")


def _once(httpx: Any, client: Any, url: str, body: bytes, rows: int, timeout: float) -> bytes:
    """The body of a 200 answer."""
    deadline, most, found = time.monotonic() + timeout, _MOST_BYTES + _BYTES_PER_ROW * rows, b""
    headers = {"content-type": "application/json"}
    try:
        with client.stream("POST", url, content=body, headers=headers) as answer:
            for part in answer.iter_bytes():
                found += part
                if time.monotonic() > deadline:
                    raise _Passing(f"no whole answer within {timeout:g} s")
                if len(found) > most:
                    raise InputError(
                        f"reward {shown(url)}: expected at most {most} bytes for {rows} responses, got more: "
                        f"{_quoted(found)}"
                    )
            status = answer.status_code
    except httpx.TransportError as error:
        raise _Passing(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
    except httpx.DecodingError as error:
        raise InputError(f"reward {shown(url)}: an answer that cannot be decoded: {error}") from error
    if status == 429 or status >= 500:
        raise _Passing(f"status {status}: {_quoted(found)}")
    if status != 200:
        raise InputError(f"reward {shown(url)}: expected status 200, got {status}: {_quoted(found)}")
    return found


def _rewards(url: str, body: bytes, rows: int) -> list[float]:
    wanted = '{"rewards": [one finite number per response]}'
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"reward {shown(url)}: expected {wanted}, got no JSON: {_quoted(body)}") from error
    rewards = answer.get("rewards") if isinstance(answer, Mapping) else None
    if not isinstance(rewards, list):
        raise InputError(f"reward {shown(url)}: expected {wanted}, got {_quoted(body)}")
    if len(rewards) != rows:
        raise InputError(f"reward {shown(url)}: expected {rows} rewards, got {len(rewards)}: {_quoted(body)}")
    for row, reward in enumerate(rewards):
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not abs(reward) < 1e38:
            shortened = _quoted(str(reward).encode())
            raise InputError(
                f"reward {shown(url)}: the reward of response {row} is {shortened}, not a finite number"
            )
    return [float(reward) for reward in rewards]


def _quoted(body: bytes) -> str:
    """The beginning of an answer on one line, control characters escaped."""
    text = body[: 4 * _SHOWN].decode("utf-8", errors="replace")
    return repr(text[:_SHOWN]) + (" …" if len(text) > _SHOWN or len(body) > 4 * _SHOWN else "")


def _httpx() -> Any:
    try:
        return importlib.import_module("httpx")
    except ImportError as error:
        raise InputError("an HTTP reward needs httpx: pip install 'minirlhf[judge]'") from error
