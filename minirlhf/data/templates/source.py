"""A checkpoint's own chat template: where it stands, and how it is rendered without trusting it.

Templates come with weights from the internet. They run in Jinja's immutable sandbox with the few helpers
that `transformers` gives them, and with bounds: every turn of a loop and every call is a step, of which a
rendering may take 100,000; it may write four million characters, and no operator, method or filter is given
more. What remains is that such a step may be slow and its result a hundred times as large: some seconds,
not for ever.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minirlhf.data.records import Message
from minirlhf.data.templates.sandbox import STEPS, Refused, Steps, bounded, open_sandbox
from minirlhf.runs import InputError

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Source(NamedTuple):
    """The text of a template, the file that it stands in, and the tokens that it may name."""

    path: Path
    text: str
    tokens: dict[str, str]


class Template(NamedTuple):
    """A compiled template.

    Attributes:
        path: the file that it stands in, for messages.
        render: (messages, add_generation_prompt) -> text. Raises Refused where the template itself refuses,
            InputError where it fails, breaks out or goes on without end.
    """

    path: Path
    render: Callable[[Sequence[Message], bool], str]


def find_template(folder: Path) -> Source | None:
    """The template of a directory: `chat_template.jinja`, else "chat_template" of `tokenizer_config.json`.

    A list of named templates means its "default".

    Raises:
        InputError: a file cannot be read, or holds something else than a template.
    """
    path = folder / "tokenizer_config.json"
    config = read_config(folder / "special_tokens_map.json") | read_config(path)
    tokens = {key: content(config.get(key)) for key in _NAMED_TOKENS}
    known = {key: token for key, token in tokens.items() if token is not None}
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return Source(alone, _read_text(alone), known)
    stated = config.get("chat_template")
    if stated is None:
        return None
    if isinstance(stated, list):
        named = {entry.get("name"): entry.get("template") for entry in stated if isinstance(entry, dict)}
        if "default" not in named:
            found = ", ".join(map(str, named)) or "none"
            raise InputError(f'{path}: expected a chat template named "default", found {found}')
        stated = named["default"]
    if not isinstance(stated, str):
        raise InputError(f'{path}: expected "chat_template" to be a text, found {type(stated).__name__}')
    return Source(path, stated, known)


def compile_template(source: Source) -> Template:
    """A template ready to be rendered.

    Raises:
        InputError: jinja2 is not installed, or the template is not valid.
    """
    try:
        import jinja2
    except ImportError:
        raise InputError(
            f"{source.path} holds a chat template, and jinja2, which renders it, is not installed; "
            "pip install 'minirlhf[data]'"
        ) from None
    steps = Steps()
    environment = open_sandbox(steps)
    try:
        compiled = environment.from_string(source.text)
    except (jinja2.TemplateError, RecursionError, ValueError, TypeError) as error:
        raise InputError(f"{source.path}: expected a chat template, found {_told(error)}") from None

    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        steps.left = STEPS
        chat = [message._asdict() for message in messages]
        try:
            pieces = compiled.generate(
                messages=chat,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **source.tokens,
            )
            return bounded(pieces)
        except Refused:
            raise
        except Exception as error:  # a template may raise whatever Python raises
            raise InputError(f"{source.path}: the chat template failed: {_told(error)}") from None

    return Template(source.path, render)


def _told(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    where = f" (line {line})" if isinstance(line, int) else ""
    return " ".join(f"{type(error).__name__}: {error}{where}".split())[:300]


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        InputError: it is unreadable, or something else.
    """
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, found none ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object, found another value")
    return config


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a readable UTF-8 file, found {error}") from None


def content(token: Any) -> str | None:
    """A token as configs write it: its text, or an object that holds it; None for null."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
