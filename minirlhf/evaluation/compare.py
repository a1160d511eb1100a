"""Every policy on the same held-out prompts, against SFT: sampled, scored, judged; one row of numbers each.

    sample -> Answers (raw material, [P, n]) -> row (every number of the table, by a tested function of those)

All policies use the same uniforms; the SFT samples that they are compared with use others, so that they are
independent. The SFT row is a second sample of SFT against those, and should win half.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.evaluation.divergence import kl_to_reference
from minirlhf.evaluation.judges import Judge
from minirlhf.evaluation.statistics import (
    Estimate,
    detectable_win_rate_gain,
    mean_difference,
    mean_over_prompts,
    win_rate,
)
from minirlhf.evaluation.text import distinct_n, mean_length, repetition
from minirlhf.evaluation.verdict import REFERENCE, Verdict, judged_verdict, verdict
from minirlhf.models.interface import LanguageModel, Params
from minirlhf.objectives.sampling import tempered
from minirlhf.rollout.sampler import LENGTH, Rollout, generate, responses
from minirlhf.runs import InputError
from minirlhf.training.progress import sampling
from minirlhf.training.rewards import Decoder, Scorer

SFT = "sft"


@dataclass(frozen=True)
class EvaluationConfig:
    """How policies are compared."""

    prompts: int = 256
    """Most held-out prompts; the intervals are over prompts."""
    samples: int = 4
    """Responses per prompt, of each policy and of the SFT model that it is compared with."""
    temperature: float = 1.0
    """Of the responses that are judged; the KL is always that of temperature 1."""
    max_response: int = 64
    """Most tokens of a response."""
    examples: int = 3
    """Prompts whose responses are shown side by side."""

    def __post_init__(self) -> None:
        if self.prompts < 2:
            raise InputError(
                f"prompts must be at least 2 (an interval needs their spread), got {self.prompts}"
            )
        for name in ("samples", "max_response"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise InputError(f"temperature must be positive, got {self.temperature}")
        if self.examples < 0:
            raise InputError(f"examples must not be negative, got {self.examples}")


class Answers(NamedTuple):
    """What one policy answered to P prompts, n times each, and what was said of it.

    texts, ids: [P][n], without the stop token. ended: bool [P, n], whether a stop id ended it.
    proxy: [P, n] the score that was trained on, None where no reward is named. judged: [P, n] the judge's.
    components: {name: [P, n]}.
    kl: [P, k] nats per response to SFT, of temperature-1 responses.
    """

    texts: list[list[str]]
    ids: list[list[list[int]]]
    ended: Tensor
    proxy: Tensor | None
    judged: Tensor
    components: dict[str, Tensor]
    kl: Tensor


@dataclass(frozen=True)
class Row:
    """One policy's line of the table. Gains are over SFT, paired by prompt; intervals are over prompts."""

    policy: str
    score: Estimate | None
    """The reward that was trained on; of a reward model of ours, 0 and 1 are mean and standard deviation of
    SFT responses. None where no reward is named."""
    score_gain: Estimate | None
    win_rate: Estimate
    """Against SFT by the judge, ties one half."""
    detectable: float
    """Difference from one half that these prompts would show four times in five."""
    kl: Estimate
    """To SFT, nats per sequence, temperature 1."""
    tokens: float
    """Mean response length, without the stop token."""
    words: float
    distinct_1: float
    distinct_2: float
    repetition: float
    """Share of 3-grams that occurred before in the same response."""
    eos_rate: float
    judge_score: Estimate
    judge_gain: Estimate
    components: dict[str, float]
    """Means of the parts of the judge's score."""
    component_gains: dict[str, Estimate]
    verdict: Verdict


class Comparison(NamedTuple):
    """The table and all that it was computed from.

    judge: name. prompts: P texts. answers: by policy, SFT's second sample first. opponent: the SFT answers
    that every row is compared with.
    """

    rows: list[Row]
    judge: str
    prompts: list[str]
    answers: dict[str, Answers]
    opponent: Answers
    config: EvaluationConfig


def compare(
    model: LanguageModel,
    sft: Params,
    policies: Mapping[str, Params],
    prompts: Sequence[Sequence[int]],
    texts: Sequence[str],
    *,
    proxy: Scorer | None,
    judge: Judge,
    tokenizer: Decoder,
    config: EvaluationConfig,
    seed: int,
    say: Callable[[str], None],
) -> Comparison:
    """Samples, scores and judges SFT and every policy on the same prompts.

    Args:
        model: the functions of all of them.
        sft: the reference of every comparison and of the KL.
        policies: parameters by name; "sft" is taken.
        prompts, texts: P prompts as ids and as text, in the order in which proxy and judge count them.
        proxy: the reward that the policies were trained on; None leaves its column out of the table.
        judge: an independent one.
        seed: of the responses; the same seed gives the same table.
        say: told what is being done.

    Raises:
        InputError: no policy but SFT has that name, or fewer than two prompts.
    """
    if SFT in policies:
        raise InputError(f"no policy may be called {SFT!r}: that is the row of the reference")
    if len(prompts) < 2:
        raise InputError(f"expected at least 2 held-out prompts, got {len(prompts)}")
    if len(prompts) != len(texts):
        raise ValueError(f"expected one text per prompt, got {len(texts)} for {len(prompts)}")
    answer = partial(
        _answers,
        model,
        prompts,
        sft=sft,
        proxy=proxy,
        judge=judge,
        tokenizer=tokenizer,
        config=config,
        seed=seed,
    )
    say(
        f"sampling {config.samples} responses to each of {len(prompts)} prompts "
        f"from SFT, SFT once more and {len(policies)} policies"
    )
    opponent = answer(sft, first_sample=config.samples)
    answers = {SFT: answer(sft, first_sample=0)}
    for name, params in policies.items():
        answers[name] = answer(params, first_sample=0)
        say(f"{name}: done")
    rows = [row(name, given, opponent) for name, given in answers.items()]
    return Comparison(rows, judge.name, list(texts), answers, opponent, config)


def row(name: str, answers: Answers, opponent: Answers) -> Row:
    """Every number of one policy's line, from raw answers alone."""
    every = [text for texts in answers.texts for text in texts]
    won = win_rate(answers.judged, opponent.judged)
    score, gain = _score(answers, opponent)
    detectable = detectable_win_rate_gain(answers.judged, opponent.judged)
    parts = answers.components
    return Row(
        policy=name,
        score=score,
        score_gain=gain,
        win_rate=won,
        detectable=detectable,
        kl=mean_over_prompts(answers.kl),
        tokens=mean_length([ids for of_prompt in answers.ids for ids in of_prompt]),
        words=mean_length([text.split() for text in every]),
        distinct_1=distinct_n(every, 1),
        distinct_2=distinct_n(every, 2),
        repetition=repetition(every, 3),
        eos_rate=float(answers.ended.double().mean()),
        judge_score=mean_over_prompts(answers.judged),
        judge_gain=mean_difference(answers.judged, opponent.judged),
        components={part: float(value.double().mean()) for part, value in parts.items()},
        component_gains={part: mean_difference(parts[part], opponent.components[part]) for part in parts},
        verdict=REFERENCE if name == SFT else _verdict(gain, won, detectable),
    )


def _score(answers: Answers, opponent: Answers) -> tuple[Estimate | None, Estimate | None]:
    """Mean score by the reward that was trained on, and its gain over SFT."""
    if answers.proxy is None or opponent.proxy is None:
        return None, None
    return mean_over_prompts(answers.proxy), mean_difference(answers.proxy, opponent.proxy)


def _verdict(gain: Estimate | None, won: Estimate, detectable: float) -> Verdict:
    if gain is None:
        return judged_verdict(won, detectable=detectable)
    return verdict(gain, won, detectable=detectable)


def _answers(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    params: Params,
    *,
    sft: Params,
    proxy: Scorer | None,
    judge: Judge,
    tokenizer: Decoder,
    config: EvaluationConfig,
    seed: int,
    first_sample: int,
) -> Answers:
    sample = partial(_sample, model, params, prompts, max_response=config.max_response, seed=seed)
    rollout, index = sample(samples=config.samples, first_sample=first_sample, temperature=config.temperature)
    ids = _by_prompt(responses(rollout), len(prompts))
    if params is sft:
        kl = torch.zeros(len(prompts), 1)
    else:
        plain = rollout
        if config.temperature != 1:
            plain, _ = sample(samples=1, first_sample=first_sample, temperature=1.0)
        kl = kl_to_reference(model, params, sft, plain).view(len(prompts), -1).cpu()

    def table(values: Tensor) -> Tensor:
        return values.view(len(prompts), config.samples).cpu()

    return Answers(
        texts=[[tokenizer.decode(one) for one in of_prompt] for of_prompt in ids],
        ids=ids,
        ended=table(rollout.stop_reason != LENGTH),
        proxy=None if proxy is None else table(proxy(rollout, index)),
        judged=table(judge.score(rollout, index)),
        components={part: table(value) for part, value in judge.components(rollout, index).items()},
        kl=kl,
    )


def _sample(
    model: LanguageModel,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    first_sample: int,
    temperature: float,
    max_response: int,
    seed: int,
) -> tuple[Rollout, Tensor]:
    """`samples` responses to each prompt, prompt by prompt, and the prompt that each row answers."""
    index = torch.arange(len(prompts)).repeat_interleave(samples)
    with sampling("evaluation", len(index) * max_response) as told:
        rollout = generate(
            model,
            params,
            [prompts[i] for i in index.tolist()],
            law=partial(tempered, temperature=temperature),
            max_new_tokens=max_response,
            stop_ids=model.stop_ids,
            seed=seed,
            prompt_index=index,
            sample_index=first_sample + torch.arange(samples).repeat(len(prompts)),
            progress=told,
        )
    return rollout, index


def _by_prompt(rows: list[list[int]], prompts: int) -> list[list[list[int]]]:
    samples = len(rows) // prompts
    return [rows[start : start + samples] for start in range(0, len(rows), samples)]
