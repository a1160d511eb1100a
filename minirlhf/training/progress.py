"""What a running stage shows: a bar on a terminal, now and then a plain line elsewhere; both on stderr."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

Row = TypeVar("Row")
_LOOK_EVERY = 1000


class Advance(Protocol):
    """Tells the display that one more step is done."""

    def __call__(self, tokens: int, metrics: Mapping[str, float] | None = None) -> None:
        """`tokens` were read in this step; `metrics` replace those shown, None leaves them."""
        ...


def note(text: str) -> None:
    """One line about the run, on stderr."""
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(
    title: str, total: int, *, console: Console | None = None, plain_every: float = 10.0
) -> Iterator[Advance]:
    """A display of `total` steps: done, rate in tokens/s, time left, key metrics.

    Args:
        title: the stage's name.
        total: steps; the stage may stop earlier.
        console: where to write; stderr by default, so that stdout holds results only.
        plain_every: seconds between two lines where there is no terminal; the last step always shows.
    """
    console = console or Console(stderr=True)
    meter = _Meter(title, total)
    if not console.is_terminal:
        yield _plain(meter, console, plain_every)
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console, refresh_per_second=4) as bar:
        task = bar.add_task(title, total=total, text="")

        def advance(tokens: int, metrics: Mapping[str, float] | None = None) -> None:
            meter.count(tokens, metrics)
            bar.update(task, advance=1, text=meter.text())

        yield advance


def counting(
    rows: Iterable[Row], title: str, *, console: Console | None = None, after: float = 2.0
) -> Iterator[Row]:
    """The same rows, as they are asked for; once it takes long, how many were read and how fast is shown.

    Args:
        rows: a source of unknown length.
        title: what it is.
        console: where to write; stderr by default. On a terminal the line renews itself.
        after: seconds before the first line; each further one waits twice as long, on a terminal a second.
    """
    console = console or Console(stderr=True)
    start, due, count = time.perf_counter(), after, 0
    for count, row in enumerate(rows, 1):
        yield row
        if count % _LOOK_EVERY == 0 and (spent := time.perf_counter() - start) >= due:
            due = spent + 1 if console.is_terminal else 2 * spent
            text = f"{title}: {count:,} rows read, {count / max(spent, 1e-9):,.0f} rows/s"
            end = "\r" if console.is_terminal else "\n"
            console.print(text, end=end, highlight=False, markup=False, soft_wrap=True)
    if due > after and console.is_terminal:
        console.print(f"{title}: {count:,} rows read", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def sampling(
    title: str, most: int, *, console: Console | None = None, after: float = 5.0
) -> Iterator[Callable[[int], None]]:
    """A display for `rollout.sampler.generate(progress=...)`, once it takes long: tokens, rate, time left.

    Args:
        title: whose responses.
        most: tokens, if every response has the greatest length; those that end sooner make it end sooner.
        console: where to write; stderr by default. On a terminal the line renews itself.
        after: seconds before the first line; each further one waits twice as long, on a terminal a second.
    """
    console = console or Console(stderr=True)
    start, due = time.perf_counter(), after

    def told(tokens: int) -> None:
        nonlocal due
        if (spent := time.perf_counter() - start) < due:
            return
        due = spent + 1 if console.is_terminal else 2 * spent
        rate = tokens / max(spent, 1e-9)
        left = int((most - tokens) / rate)
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        text = (
            f"{title}: {tokens:,} of at most {most:,} tokens sampled, {rate:,.0f} tokens/s, "
            f"ETA {clock} or less"
        )
        end = "\r" if console.is_terminal else "\n"
        console.print(text, end=end, highlight=False, markup=False, soft_wrap=True)

    yield told
    if due > after and console.is_terminal:
        console.print()


def _plain(meter: "_Meter", console: Console, plain_every: float) -> Advance:
    said = -plain_every

    def advance(tokens: int, metrics: Mapping[str, float] | None = None) -> None:
        nonlocal said
        meter.count(tokens, metrics)
        due = meter.seconds() - said >= plain_every and meter.metrics
        if due or meter.done == meter.total:
            said = meter.seconds()
            console.print(f"{meter.title} {meter.text()}", highlight=False, markup=False, soft_wrap=True)

    return advance


class _Meter:
    """Counts steps and tokens since it was made; only the display that made it writes to it."""

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self.start = time.perf_counter()
        self.done = 0
        self.tokens = 0
        self.metrics: dict[str, float] = {}

    def count(self, tokens: int, metrics: Mapping[str, float] | None) -> None:
        self.done += 1
        self.tokens += tokens
        if metrics is not None:
            self.metrics = dict(metrics)

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def text(self) -> str:
        spent = max(self.seconds(), 1e-9)
        left = int(spent / self.done * (self.total - self.done))
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        shown = "  ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        return f"{self.done}/{self.total}  {self.tokens / spent:,.0f} tokens/s  ETA {clock}  {shown}".rstrip()
