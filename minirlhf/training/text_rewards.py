"""Reward models that read text, because their tokenizer, template or architecture is not the policy's.

    response ids → text (policy's tokenizer, without the stop token)
                 → the reward model's own ids → score at its own last token, or first token of an encoder

A language-model backbone reads prompt and response as in its own training: by its own chat template where it
has one and the prompt is a conversation, and with its own terminator behind a response that ended. A response
that the length limit stopped gets none. An encoder reads [CLS] prompt [SEP] response [SEP] of the plain text
and cannot see whether the response ended.

What is too long for the reward model's context: a prompt is an error before anything is sampled; of a
response the end is left out, which is counted and said every time.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.data.batches import tokenise_prompts
from minirlhf.data.conversation import content_of
from minirlhf.data.pair_tokenizer import PairTokenizer, load_pair_tokenizer
from minirlhf.data.records import Prompt, collate
from minirlhf.data.templates.source import find_template
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.models.encoder import EncoderModel
from minirlhf.models.encoder_files import load_encoder
from minirlhf.models.interface import Params
from minirlhf.rollout.sampler import LENGTH, Rollout, responses
from minirlhf.runs import InputError
from minirlhf.training.device import move, resolve
from minirlhf.training.packed import packed
from minirlhf.training.rewards import Decoder, Reader, Scorer, raw_score
from minirlhf.training.setting import Setting
from minirlhf.training.workspace import Checkpoint

Say = Callable[[object], None]


class EncoderCheckpoint(NamedTuple):
    """The directory of an encoder reward model, read: parameters on the device. Its score is raw."""

    path: Path
    model: EncoderModel
    params: Params
    tokenizer: PairTokenizer


class Read(NamedTuple):
    """The ids that a reward model reads for one response. cut: whether the response's end was left out."""

    ids: list[int]
    cut: bool


def load_encoder_reward(path: Path, setting: Setting) -> EncoderCheckpoint:
    """Reads an encoder reward model and its tokenizer.

    Raises:
        InputError: see `load_encoder` and `load_pair_tokenizer`; or the tokenizer knows ids that the model
            has no row for.
    """
    device = resolve(setting.device)
    model, params = load_encoder(path)
    tokenizer = load_pair_tokenizer(path, context=model.config.n_positions)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} ids, its model a vocabulary of only "
            f"{model.config.vocab_size}"
        )
    return EncoderCheckpoint(path, model, move(params, device), tokenizer)


def why_text(policy: Checkpoint, judge: Checkpoint) -> str | None:
    """Why a reward model cannot read the policy's ids; None where it can.

    The same ids must mean the same tokens, end a response in the same way and come from the same rendering of
    a conversation. Where they do, ids are better: decoding and encoding again is not the identity.
    """
    ours, theirs = policy.tokenizer, judge.tokenizer
    if ours.backend.get_vocab() != theirs.backend.get_vocab():
        return "its tokenizer differs"
    if _template(ours) != _template(theirs):
        return "its chat template differs"
    if (ours.bos_id, ours.eos_id) != (theirs.bos_id, theirs.eos_id):
        return "the tokens that begin or end its texts differ"
    return None


def _template(tokenizer: Tokenizer) -> str | None:
    source = None if tokenizer.template is None else find_template(tokenizer.path.parent)
    return None if source is None else source.text


def text_model_scorer(
    judge: Checkpoint,
    policy: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    say: Say,
    micro_batch_size: int = 64,
) -> Scorer:
    """A reward model with a language model's backbone, on text; the score as its directory normalises it.

    Args:
        policy: turns the sampled ids into text.
        prompts: in the order that prompt_index counts; they are tokenised once, now.
        say: told of responses that were too long.
        micro_batch_size: rows per forward pass; it changes the memory, not the scores.

    Raises:
        InputError: a prompt has no tokens, or leaves no room for a response; names its line.
    """
    reader = ModelReader(judge, policy, prompts)
    count = _Count(f"reward model {judge.path}", judge.model.config.n_positions, say)

    def score(rollout: Rollout, prompt_index: Tensor) -> Tensor:
        rows = reader.read(rollout, prompt_index)
        count.add(sum(row.cut for row in rows), of=len(rows))
        device, raw = rollout.tokens.device, []
        for start in range(0, len(rows), micro_batch_size):
            batch = collate((row.ids, []) for row in rows[start : start + micro_batch_size])
            (tokens, _, _, lengths), packing = move(packed(batch), device)
            raw.append(raw_score(judge.model, judge.params, tokens, lengths, packing))
        return (torch.cat(raw) - judge.normalisation.shift) / judge.normalisation.scale

    return torch.no_grad()(score)


class ModelReader:
    """What a reward model with a language model's backbone reads: ids as in its own training.

    Raises:
        InputError: a prompt has no tokens, or leaves no room for a response; names its line.
    """

    def __init__(self, judge: Checkpoint, policy: Tokenizer, prompts: Sequence[Prompt]) -> None:
        self.judge, self.policy, self.prompts = judge, policy, prompts
        self.context, self.openings = judge.model.config.n_positions, _openings(judge, prompts)

    def read(self, rollout: Rollout, prompt_index: Tensor) -> list[Read]:
        """A row of ids for each response; one that is cut at the context has no terminator."""
        rows, terminator = prompt_index.tolist(), [self.judge.tokenizer.eos_id]
        texts = [self.policy.decode(ids) for ids in responses(rollout)]
        said = [self._said(self.prompts[row], text) for row, text in zip(rows, texts, strict=True)]
        ended = (rollout.stop_reason != LENGTH).tolist()
        whole = [
            self.openings[row] + ids + (terminator if end else [])
            for row, ids, end in zip(rows, self.judge.tokenizer.encode_all(said), ended, strict=True)
        ]
        return [Read(ids[: self.context], len(ids) > self.context) for ids in whole]

    def _said(self, prompt: Prompt, text: str) -> str:
        """The response as it stands behind the reward model's own rendering of the prompt.

        In a transcript an answer begins with a space, which belongs to no message of a conversation.
        """
        ours, theirs = self.policy.template is None, self.judge.tokenizer.template is None
        if prompt.messages is None or ours == theirs:
            return text
        return content_of(text) if ours else f" {text}"


def encoder_scorer(
    judge: EncoderCheckpoint,
    policy: Decoder,
    prompts: Sequence[Prompt],
    *,
    say: Say,
    micro_batch_size: int = 64,
) -> Scorer:
    """An encoder reward model, on the pair of prompt and response; its raw score.

    Arguments are those of `text_model_scorer`.

    Raises:
        InputError: a prompt leaves no room for a response; names its line.
    """
    texts, tokenizer = [prompt.prompt for prompt in prompts], judge.tokenizer
    for prompt, length in zip(prompts, tokenizer.prompt_lengths(texts), strict=True):
        if length > tokenizer.longest_prompt:
            raise _prompt_too_long(judge.path, prompt.line, length, tokenizer.longest_prompt)
    count = _Count(f"reward model {judge.path}", tokenizer.context, say)

    def score(rollout: Rollout, prompt_index: Tensor) -> Tensor:
        said = [policy.decode(ids) for ids in responses(rollout)]
        rows = tokenizer.encode_all([texts[row] for row in prompt_index.tolist()], said)
        count.add(sum(row.cut for row in rows), of=len(rows))
        device, raw = rollout.tokens.device, []
        for start in range(0, len(rows), micro_batch_size):
            some = rows[start : start + micro_batch_size]
            tokens = collate((row.ids, []) for row in some)
            segments = collate((row.segments, []) for row in some)  # 0 in the padding
            read = (each.to(device) for each in (tokens.tokens, segments.tokens, tokens.lengths))
            raw.append(judge.model.score(judge.params, *read))
        return torch.cat(raw)

    return torch.no_grad()(score)


def encoder_reader(judge: EncoderCheckpoint) -> Reader:
    """An encoder reward model, for a plan: its rows are taken to be as long as the policy's."""

    score = judge.model.score  # a plan may not close over parameters

    def raw(params: Params, tokens: Tensor, lengths: Tensor) -> Tensor:
        return score(params, tokens, torch.zeros_like(tokens), lengths)

    return Reader(judge.params, raw, judge.tokenizer.context, waits=False)


class _Count:
    """Responses that were too long so far; says so whenever there are more."""

    def __init__(self, name: str, context: int, say: Say) -> None:
        self.name, self.context, self.say, self.cut, self.seen = name, context, say, 0, 0

    def add(self, cut: int, *, of: int) -> None:
        self.cut, self.seen = self.cut + cut, self.seen + of
        if cut:
            self.say(
                f"{self.name}: {cut} of {of} responses did not fit its context of {self.context} tokens and "
                f"were scored without their end ({self.cut} of {self.seen} so far)"
            )


def _openings(judge: Checkpoint, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Each prompt as the reward model reads it, with room for a token and a terminator behind it."""
    longest = judge.model.config.n_positions - 2
    try:
        found = tokenise_prompts(prompts, judge.tokenizer, max_length=longest, overlong="drop")
    except InputError as error:
        raise InputError(f"reward model {judge.path}: {error}") from error
    if found.report.dropped:
        line, why = found.report.dropped[0]
        raise InputError(
            f"reward model {judge.path} cannot read the prompt of line {line} ({why}, so that a response has "
            f"room in its context); take such prompts out of the data"
        )
    return found.examples


def _prompt_too_long(path: Path, line: int, length: int, longest: int) -> InputError:
    return InputError(
        f"reward model {path} cannot read the prompt of line {line}: expected at most {longest} tokens, so "
        f"that a response has room in its context, found {length}; take such prompts out of the data"
    )
