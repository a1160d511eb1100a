"""The metrics file: one JSON line per logged step of every stage, readable while the run goes on."""

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minirlhf.runs.files import InputError

Report = Callable[[str], None]
"""Takes one line of text for the user; the default prints it on stderr."""


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


class MetricsWriter:
    """Appends one JSON line per call, flushed, so that a run which is cut off loses at most its last line."""

    def __init__(self, path: Path, *, report: Report = _to_stderr) -> None:
        """Goes on where the file ends; a half-written last line of an earlier run is reported and removed."""
        self.path = Path(path)
        _drop_half_line(self.path, report)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Writes {"step", "stage", metric: number, …}; NaN and infinity as "nan", "inf" and "-inf"."""
        clash = {"step", "stage"} & metrics.keys()
        if clash:
            raise ValueError(f"metrics must not be called {', '.join(sorted(clash))}")
        values = {name: float(value) for name, value in metrics.items()}
        line = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "stage": stage, **line}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file; writing afterwards is an error."""
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: Path, *, report: Report = _to_stderr) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order. A half-written last line is reported and left out.

    Raises:
        InputError: there is no such file, or a line before the last is not a JSON object.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines):  # what follows the last newline: nothing, or half a line
            if line:
                report(f"{path}:{number}: left out a half-written line: {line.decode(errors='replace')}")
            break
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            text = line[:80].decode(errors="replace")
            raise InputError(f"{path}:{number}: expected a JSON object, found {text!r}")
        rows.append({name: _number(name, value) for name, value in row.items()})
    return rows


def _number(name: str, value: Any) -> Any:
    return float(value) if name != "stage" and value in ("nan", "inf", "-inf") else value


def _drop_half_line(path: Path, report: Report) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    kept = content.rfind(b"\n") + 1
    if kept < len(content):
        half = content[kept:].decode(errors="replace")
        report(f"{path}:{content.count(bytes([10])) + 1}: removed a half-written line: {half}")
        with path.open("r+b") as file:
            file.truncate(kept)
