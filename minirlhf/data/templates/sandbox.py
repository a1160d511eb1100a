"""The sandbox in which a checkpoint's chat template runs: what it may call, and how much it may do.

Bounded are the turns of loops and the calls of a rendering, the characters that it writes, and what every
operator, method and filter is given.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

STEPS = 100_000
CHARACTERS = 4_000_000
_WIDE = re.compile(r"[0-9]{7}")


class Refused(Exception):
    """A template's own `raise_exception`: this conversation is none that it can write; the text says why."""


class Steps:
    """How much a rendering may still do."""

    left = STEPS

    def take(self) -> None:
        """One step; raises OverflowError where there were too many."""
        self.left -= 1
        if self.left < 0:
            raise OverflowError(f"more than {STEPS} steps")

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values, one step each."""
        for value in values:
            self.take()
            yield value


def open_sandbox(steps: Steps) -> Any:
    """A Jinja environment whose renderings use up `steps`; whoever renders refills them.

    Its helpers are those of `transformers` (utils/chat_template_utils.py): tojson, raise_exception,
    strftime_now, loop controls, the generation tag, and a dict and a namespace that lead nowhere.
    """
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what a model wrote; here that is known from the messages."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    bounds = _bounds()

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            steps.take()
            unwrapped = getattr(function, "__wrapped__", function)
            owner = getattr(unwrapped, "__self__", None)
            _check_sizes([owner, *args, *kwargs.values()])
            if getattr(unwrapped, "__name__", "").startswith("format"):
                _check_width(owner)
            return super().call(context, function, *args, **kwargs)

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            return bounds.visit(super()._parse(source, name, filename))

    environment = Bounded(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
        optimized=False,
    )
    environment.filters = {name: _with_checks(function) for name, function in environment.filters.items()}
    environment.filters |= {"tojson": _to_json, "each_step": steps.each, "in_one_text": _in_one_text}
    today = datetime.datetime.now()  # of one day for the whole run: ids must not change at midnight
    environment.globals |= {"raise_exception": _refuse, "strftime_now": today.strftime}
    environment.globals |= {"dict": lambda *args, **kwargs: dict(*args, **kwargs), "namespace": _namespace()}
    return environment


def _namespace() -> Any:
    """Jinja's namespace without names that Python itself reads."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class Closed(Namespace):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()
            for name, value in dict(*args, **kwargs).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace with {name!r}")
            super().__setitem__(name, value)

    return Closed


def _bounds() -> Any:
    """The visitor that sends what loops go over, and what `~` joins, through the filters that count."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    class Bounds(NodeTransformer):
        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = nodes.Filter(node.iter, "each_step", [], [], None, None, lineno=node.lineno)
            return node

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            listed = nodes.List(node.nodes, lineno=node.lineno)
            return nodes.Filter(listed, "in_one_text", [], [], None, None, lineno=node.lineno)

    return Bounds()


def bounded(pieces: Iterable[str]) -> str:
    """The pieces joined; raises OverflowError where they grow too long."""
    written, size = [], 0
    for piece in pieces:
        size += len(piece)
        _check_size(size)
        written.append(piece)
    return "".join(written)


def _check_size(size: int) -> None:
    if size > CHARACTERS:
        raise OverflowError(f"more than {CHARACTERS} characters")


def _check_sizes(values: Sequence[Any]) -> None:
    """What a filter, method or function is given: its result may be as large as the product of these."""
    product = 1
    for value in values:
        if isinstance(value, int):
            _check_size(value)
        elif isinstance(value, str):
            product *= max(len(value), 1)
        elif isinstance(value, list | tuple):
            _check_size(sum(len(text) for text in value if isinstance(text, str)))
    _check_size(product // 100)


def _check_width(pattern: Any) -> None:
    if isinstance(pattern, str) and _WIDE.search(pattern):
        raise OverflowError("a number of seven digits in a format")


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "**":
        raise OverflowError("a power")
    if operator == "*":
        size = max((len(side) for side in (left, right) if isinstance(side, str | list | tuple)), default=0)
        _check_size(size * max((side for side in (left, right) if isinstance(side, int)), default=0))
    elif operator == "%":
        _check_width(left)
    elif isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        _check_size(len(left) + len(right))


def _with_checks(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_sizes([*args, *kwargs.values()])
        if function.__name__ == "do_format":
            _check_width(args[0])
        return function(*args, **kwargs)

    return checked


def _in_one_text(values: Sequence[Any]) -> str:
    texts = [str(value) for value in values]
    _check_sizes([texts])
    return "".join(texts)


def _refuse(message: object) -> NoReturn:
    raise Refused(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # As transformers writes it; Jinja's own escapes for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
