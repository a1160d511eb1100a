"""Conversations -> ids by a checkpoint's own chat template: the prompts of training are those of sampling.

Special tokens are recognised in the template's text and nowhere else. To the tokenizer's copy that is used
here an alias is added for every special token, made of private-use characters; the template's own tokens
are written as aliases, all else is ordinary text, and the library cuts and merges exactly as it does around
the real ones. So the ids are those of `transformers`' apply_chat_template wherever no message spells a
special token.

Every answer is encoded together with its prompt, and again the prompt alone: where the ids of the prompt
alone are how the whole begins, the rest is the answer. Where text would merge across that border (an answer
that begins with a line break, after a prompt that ends with one) the answer is encoded apart, as it would
be sampled.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import tokenizers

from minirlhf.data.records import Message
from minirlhf.data.templates.layout import MARK, Layout, Turn, lay_out, probe, require_prefix, turns
from minirlhf.data.templates.source import Source, Template, compile_template
from minirlhf.runs import InputError

_CUT = f"{MARK}cut{MARK}"


class Said(NamedTuple):
    """A piece of a conversation: what is read, then an answer with its terminator (none yet at the end)."""

    read: list[int]
    answer: list[int]


@dataclass(frozen=True)
class ChatTemplate:
    """A template bound to its tokenizer.

    Attributes:
        path: the file that it stands in.
        terminator: the token that ends an answer.
        bos_id: what the tokenizer itself puts in front of a text; put there where the template does not.
        template: renders.
        backend: the tokenizer's copy with the aliases; inside a text special tokens are text.
        controls: finds the special tokens in the template's own text.
        ids: of all added tokens.
        guarded: ids that no text may be encoded to.
        aliases: id of an alias -> id of the special token that it stands for.
    """

    path: Path
    terminator: str
    bos_id: int | None
    template: Template = field(repr=False)
    backend: tokenizers.Tokenizer = field(repr=False)
    controls: re.Pattern[str] = field(repr=False)
    ids: dict[str, int] = field(repr=False)
    guarded: frozenset[int] = field(repr=False)
    aliases: dict[int, int] = field(repr=False)

    def encode(self, messages: Sequence[Message], *, ask: bool, trained: int = 0) -> list[Said]:
        """The ids of a conversation, a piece for each answer, and for what is asked at the end.

        Args:
            messages: the turns.
            ask: whether an answer is asked for: the generation prompt ends the last piece's `read`.
            trained: how many of the last assistant turns will be trained; each must be a piece.

        Raises:
            Unfit: the template refuses the conversation or does not keep a message as it is.
            InputError: an answer to be trained does not follow its generation prompt; the template fails.
        """
        layout = lay_out(self.template, messages, add_generation_prompt=ask)
        found = turns(self.template, messages, layout, controls=self.controls, terminator=self.terminator)
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        for i in answers[len(answers) - trained :]:
            if i not in found:
                self._refuse(messages, layout, i)
        pieces, start, lead = [], 0, ""
        for turn in found.values():
            pieces.append(self._said(layout, turn, lead))
            start, lead = turn.end, self._alias(self.terminator)
        if ask:
            asked = lead + self._write(layout, start, len(layout.marked))
            pieces.append(Said(self._ids(asked, skip=bool(lead)), []))
        return self._with_bos(pieces)

    def _said(self, layout: Layout, turn: Turn, lead: str) -> Said:
        read = lead + self._write(layout, turn.start, turn.answer)
        answer = self._write(layout, turn.answer, turn.end)
        answer += "" if turn.closed else self._alias(self.terminator)
        asked, whole = (self._ids(text, skip=bool(lead)) for text in (read, read + answer))
        if whole[: len(asked)] == asked:
            return Said(asked, whole[len(asked) :])
        return Said(asked, self._ids(_CUT + answer, skip=True))

    def _write(self, layout: Layout, start: int, end: int) -> str:
        """Text with aliases where the template's own text names special tokens."""
        return "".join(
            self.controls.sub(lambda found: self._alias(found.group()), piece) if own else piece
            for piece, own in layout.parts(start, end)
        )

    def _alias(self, token: str) -> str:
        return f"{MARK}{self.ids[token]}{MARK}"

    def _ids(self, text: str, *, skip: bool) -> list[int]:
        """Ids of a text; `skip` leaves out an alias in front, which only says a special token was there."""
        ids = self.backend.encode(text, add_special_tokens=False).ids[int(skip) :]
        if not self.guarded.isdisjoint(ids):
            raise InputError(
                f"{self.path}: expected no text to be encoded as a special token, found one that is"
            )
        return [self.aliases.get(id, id) for id in ids]

    def _with_bos(self, pieces: list[Said]) -> list[Said]:
        if self.bos_id is None or not pieces or pieces[0].read[:1] == [self.bos_id]:
            return pieces
        return [Said([self.bos_id, *pieces[0].read], pieces[0].answer), *pieces[1:]]

    def _refuse(self, messages: Sequence[Message], layout: Layout, answer: int) -> None:
        asked = lay_out(self.template, messages[:answer], add_generation_prompt=True)
        require_prefix(self.template, asked, layout)
        raise InputError(
            f"{self.path}: expected each answer behind its generation prompt, found one elsewhere"
        )


def bind_template(
    source: Source, backend: tokenizers.Tokenizer, *, eos: Callable[[], str], bos_id: int | None
) -> ChatTemplate:
    """A checkpoint's template on its tokenizer.

    Args:
        source: the template.
        backend: a copy of the tokenizer that is only used here, in which special tokens in a text are text.
        eos: finds the token that ends an answer where the template writes none.
        bos_id: what the tokenizer puts in front of a text.

    Raises:
        InputError: the template is not valid, cannot write a question and its answer, or its generation
            prompt is not the beginning of what it writes for the answer; or `eos` finds none.
    """
    template = compile_template(source)
    # Runs of spaces that some vocabularies add as tokens are ordinary text, also in a template.
    added = {t.content: (id, t) for id, t in backend.get_added_tokens_decoder().items() if t.content.strip()}
    names = sorted(added, key=len, reverse=True)
    controls = re.compile("|".join(map(re.escape, names)) or r"(?!)")
    written, terminator = probe(template, controls)
    if terminator is None:
        terminator = eos()
    guarded = {*written, terminator, *(name for name in names if name in source.text)}
    for name in sorted(guarded):
        if name in added and not added[name][1].special:  # else a text could spell it
            backend.add_special_tokens([name])
    aliases = {}
    for id, token in added.values():
        alias = tokenizers.AddedToken(
            f"{MARK}{id}{MARK}",
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized,
        )
        backend.add_tokens([alias])
        aliases[backend.token_to_id(alias.content)] = id
    backend.add_tokens([tokenizers.AddedToken(_CUT, normalized=False)])
    ids = {name: id for name, (id, _) in added.items()}
    return ChatTemplate(
        source.path,
        terminator,
        bos_id,
        template,
        backend,
        controls,
        ids,
        frozenset(ids[name] for name in guarded),
        aliases,
    )
