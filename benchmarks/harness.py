"""What the benchmarks share while they measure: a process for each row, peaks of memory, what was asked for.

What becomes of the rows is in `record`.
"""

import dataclasses
import importlib.metadata
import json
import re
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch


def in_a_process(script: str, given: list[Any]) -> dict[str, Any]:
    """What `script --worker GIVEN` prints last, as JSON; or {"failed": how it failed}."""
    command = [sys.executable, script, "--worker", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode < 0:  # by the system, when memory is short
        return {"failed": f"failed: killed by {signal.Signals(-done.returncode).name}"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"failed": f"failed: {last[0][:100]}"}
    return json.loads(done.stdout.splitlines()[-1])


def worker_arguments() -> list[Any] | None:
    """What `in_a_process` has given, in that process."""
    return json.loads(sys.argv[2]) if sys.argv[1:2] == ["--worker"] else None


def for_worker(options: Any) -> dict[str, Any]:
    """A benchmark's options as JSON takes them; paths, which only the parent needs, are left empty."""
    asked = dataclasses.asdict(options)
    return {name: "" if isinstance(value, Path) else value for name, value in asked.items()}


def refuse(message: str) -> NoReturn:
    """Ends the benchmark with one line."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {message}")


def check_place(device: str) -> None:
    """Refuses a device that is not here, and a system whose peaks of memory cannot be read."""
    if sys.platform != "linux":
        refuse(f"peaks of memory are read from /proc, which is Linux's; this is {sys.platform}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        refuse(f"--device: expected cpu, cuda or cuda:N, got {device!r}")
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        refuse(f"--device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices")


def check_names(flag: str, asked: Iterable[str], known: Collection[str]) -> None:
    """Refuses a name that is not known, and none at all."""
    asked = list(asked)
    wrong = [each for each in asked if each not in known]
    if wrong or not asked:
        got = repr(wrong[0]) if wrong else "nothing"
        refuse(f"{flag}: expected any of {', '.join(map(repr, known))}, got {got}")


def check_counts(options: Any, *names: str) -> None:
    """Refuses what is less than 1 where something is counted."""
    for name in names:
        value = getattr(options, name)
        if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
            refuse(f"--{name.replace('_', '-')}: expected at least 1, got {value}")


def installed(system: str, package: str | None) -> bool:
    """Whether what a system needs is there; says so if not. None: it needs nothing."""
    missing = package is not None and version(package) is None
    if missing:
        print(f"{system}: {package} is not installed, left out")
    return not missing


def version(package: str) -> str | None:
    """Of an installed package; torch's own word names its build, too."""
    if package == "torch":
        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def forget_peak() -> int:
    """Bytes resident now; from here on `peak` counts (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak() -> int:
    """Most bytes that were resident since `forget_peak`, or since the process began."""
    return _resident("VmHWM")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
