"""From rows to results: each is measured, kept as JSON and Markdown at once, and in the end all are drawn."""

import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from harness import refuse, version

from minirlhf.runs import write_text_atomic

HERE = Path(__file__).resolve().parent
Record = dict[str, Any]
"""What NAME.json holds: date, commit, python, versions, options, and `results`, one dict per row."""


@dataclass(frozen=True)
class Output:
    """Where a benchmark's results go: what its options begin with."""

    out: Path = HERE / "results"
    """Where the table, the picture and the JSON go."""
    name: str = platform.node()
    """Their name."""
    add: bool = False
    """Add to the results that are there under this name, instead of beginning anew."""


class Row(NamedTuple):
    """One line of the table.

    labels: which one; a row that is measured again takes the place of the one with the same labels.
    measure: () -> what was found, {"failed": why} if it could not be.
    """

    labels: dict[str, Any]
    measure: Callable[[], dict[str, Any]]


class Benchmark(NamedTuple):
    """What is made of rows.

    packages: those whose versions belong to the results.
    report: the table, as Markdown.
    said: a row in a few words, for who waits.
    picture: a module beside this one, with `draw(record, path of the PNG)`.
    choices: options that say which rows are measured, not how; the others must stay when rows are added.
    """

    packages: tuple[str, ...]
    report: Callable[[Record], str]
    said: Callable[[dict[str, Any]], str]
    picture: str
    choices: tuple[str, ...]


def run(options: Output, rows: Iterable[Row], benchmark: Benchmark) -> None:
    """Measures the rows in their order, prints the table, writes NAME.json, NAME.md and NAME.png.

    Files are written after each row, so that an hour's work is not lost, and from the first row on that could
    be measured: where none can, what was there before stays, and the exit code is 1.
    """
    file, record = options.out / f"{options.name}.json", None
    results = _there(file, options, benchmark) if options.add and file.exists() else []
    failed, commit = [], _commit()  # before the first file is written, which git would see
    for labels, measure in rows:
        started = time.perf_counter()
        got = labels | measure()
        which = ", ".join(f"{name} {value}" for name, value in labels.items())
        said = got.get("failed") or benchmark.said(got)
        print(f"{which}: {said} ({time.perf_counter() - started:.0f} s)", flush=True)
        results = [each for each in results if not labels.items() <= each.items()] + [got]
        failed.append("failed" in got)
        if not all(failed):
            record = _record(options, benchmark.packages, results) | {"commit": commit}
            _save(record, benchmark.report(record), file)
    if record is None:
        refuse("no row could be measured; nothing is written")
    print(benchmark.report(record), end="")
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed, no picture is drawn")
    else:
        import_module(benchmark.picture).draw(record, file.with_suffix(".png"))


def head(title: str, record: Record, explained: str) -> list[str]:
    """A report's lines above its table: title, where it comes from, what the columns are."""
    return [f"# {title}", "", where(record), "", explained, ""]


def where(record: Record) -> str:
    """The line under a table's title: machine, threads, type, its limits where measured, versions."""
    machine = machine_of(record)
    limits = ""
    if "gflops" in machine:
        limits = f": {machine['gflops']:.0f} GFLOP/s in a large product, {machine['gbytes']:.0f} GB/s read"
    versions = [f"{name} {number}" for name, number in record["versions"].items() if number]
    commit = [f"commit {record['commit']}"] if record.get("commit") else []
    return (
        f"{record['date']}; {machine['name']}, {machine['threads']} threads, {machine['dtype']}{limits}; "
        f"{', '.join([*commit, *versions])}."
    )


def machine_of(record: Record) -> dict[str, Any]:
    """The machine as the first row that could be measured has found it: `machine.Named`, or `Machine`."""
    return next(each["machine"] for each in record["results"] if "machine" in each)


def measured(record: Record) -> list[dict[str, Any]]:
    """The rows that did not fail."""
    return [each for each in record["results"] if "failed" not in each]


def _record(options: Output, packages: tuple[str, ...], results: list[dict[str, Any]]) -> Record:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {each: version(each) for each in packages},
        "options": _as_json(options),
        "results": results,
    }


def _there(file: Path, options: Output, benchmark: Benchmark) -> list[dict[str, Any]]:
    """The rows that others are added to; refuses those that were measured in another way."""
    record = json.loads(file.read_text())
    free = {*benchmark.choices, *vars(Output())}
    for name, value in _as_json(options).items():
        then = record["options"].get(name, value)
        if name not in free and then != value:
            refuse(f"--add: the rows in {file} are of --{name.replace('_', '-')} {then}, not {value}")
    return record["results"]


def _as_json(options: Output) -> dict[str, Any]:
    return json.loads(json.dumps(vars(options), default=str))


def _save(record: Record, table: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(file, json.dumps(record, indent=1) + "\n")
    write_text_atomic(file.with_suffix(".md"), table)


def _commit() -> str | None:
    """Of the code, "-dirty" if that was changed since; None where it lies in no repository."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None
