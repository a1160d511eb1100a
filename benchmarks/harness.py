"""What the benchmarks share: a process for each measurement, peaks of memory, results as files."""

import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from minirlhf.runs import write_text_atomic


def in_a_process(script: str, given: list[Any], labels: dict[str, Any]) -> dict[str, Any]:
    """What `script --worker GIVEN` prints last, as JSON; or the labels, and how it failed."""
    command = [sys.executable, script, "--worker", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return labels | {"failed": f"failed: {last[0][:100]}"}
    return labels | json.loads(done.stdout.splitlines()[-1])


def worker_arguments() -> list[Any] | None:
    """What `in_a_process` has given, in that process."""
    return json.loads(sys.argv[2]) if sys.argv[1:2] == ["--worker"] else None


def forget_peak() -> int:
    """Bytes resident now; from here on `peak` counts (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak() -> int:
    """Most bytes that were resident since `forget_peak`, or since the process began."""
    return _resident("VmHWM")


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def record_of(options: Any, packages: tuple[str, ...], results: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that a result has to say about where it comes from, and the result."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {each: version(each) for each in packages},
        "options": json.loads(json.dumps(vars(options), default=str)),
        "results": results,
    }


def save(record: dict[str, Any], table: str, folder: Path, name: str) -> None:
    """NAME.json and NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
    write_text_atomic(folder / f"{name}.md", table)


def where(record: dict[str, Any]) -> str:
    """The line under a table's title: machine, threads, type, versions."""
    machine = next(each["machine"] for each in record["results"] if "machine" in each)
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    return (
        f"{record['date']}; {machine['name']}, {machine['threads']} threads, {machine['dtype']}: "
        f"{machine['gflops']:.0f} GFLOP/s in a large product, {machine['gbytes']:.0f} GB/s read; {versions}."
    )


def head(title: str, record: dict[str, Any], explained: str) -> list[str]:
    """A report's lines above its table: title, where it comes from, what the columns are."""
    return [f"# {title}", "", where(record), "", explained, ""]


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
