"""The directory that a whole run fills, stage by stage, or in a dry run a folder that is gone in the end.

A run's data are its own: made or cut before the first stage, so that no stage sees another's test prompts.
"""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from minirlhf.data.source import fingerprint
from minirlhf.runs import (
    InputError,
    MetricsWriter,
    RunLayout,
    atomic_directory,
    dump_config,
    manifest,
    write_json_atomic,
    write_text_atomic,
)
from minirlhf.training.device import resolve
from minirlhf.training.memory_plan import Plan, after
from minirlhf.training.plan_table import summary_of
from minirlhf.training.setting import ReadingConfig, Setting
from minirlhf.training.workspace import refuse_existing


@contextmanager
def open_run(
    out: Path,
    config: Any,
    device: str,
    write_data: Callable[[Path], None],
    *,
    sources: dict[str, Path],
) -> Iterator[tuple[RunLayout, Setting]]:
    """The run directory with its data and config; the stages fill it one by one, each whole.

    A mistake that is found before a model stands in it removes it again.

    Args:
        out: as `refuse_existing` wants it.
        config: of the run, with its seed and how it reads; goes into config.toml.
        device: by name.
        write_data: writes the run's data files into a folder.
        sources: what they were made of; recorded in the manifest.
    """
    refuse_existing(out)
    run, where = RunLayout(out), str(resolve(device))
    started = time.perf_counter()
    with atomic_directory(run.root) as folder:
        data = RunLayout(folder).data
        data.mkdir()
        write_data(data)
        write_text_atomic(RunLayout(folder).config, dump_config(config))
    files: dict[str, Path | dict[str, str]] = {
        **{path.name: path for path in sorted(run.data.iterdir()) if path.is_file()},
        **{name: fingerprint(source) for name, source in sources.items()},
    }
    record = manifest(config, config.seed, files, {}, device=where)
    write_json_atomic(run.manifest, record)
    plans: list[Plan] = []

    def planned(plan: Plan) -> Plan:
        # What the stages before freed is resident, too; only the first base is without it.
        plans.append(after(plan, plans)._replace(base=min(each.base for each in (plan, *plans))))
        return plans[-1]

    try:
        with MetricsWriter(run.metrics) as writer:
            log = partial(_log, writer)
            yield run, Setting(config.seed, device, _of_own_files(config), log=log, planned=planned)
    except InputError:
        if not any((run.root / name / "manifest.json").exists() for name in _models(run)):
            shutil.rmtree(run.root)
        raise
    weights = {name: run.model(name) for name in _models(run)}
    seconds = time.perf_counter() - started
    write_json_atomic(
        run.manifest, {**manifest(config, config.seed, files, weights, device=where), "seconds": seconds}
    )
    print(f"done in {seconds / 60:.1f} minutes; everything is in {run.root}")


@contextmanager
def plan_run(
    out: Path,
    config: Any,
    device: str,
    write_data: Callable[[Path], None],
    *,
    sources: dict[str, Path],
) -> Iterator[tuple[RunLayout, Setting]]:
    """The same for a dry run: data lie in a folder that is gone in the end, and nothing is written to `out`.

    Each plan counts what the stages before leave in the process; at the end the peak over all is said.
    """
    del sources  # which no manifest records
    refuse_existing(out)
    resolve(device)
    plans: list[Plan] = []

    def planned(plan: Plan) -> Plan:
        plans.append(after(plan, plans))
        return plans[-1]

    with _temporary_folder() as folder:

        def said(line: object) -> str:  # of the run, not of the place where it is planned
            return str(line).replace(str(folder), str(out))

        setting = Setting(config.seed, device, _of_own_files(config), dry_run=True, planned=planned)
        run = RunLayout(folder)
        try:
            run.data.mkdir()
            write_data(run.data)
            yield run, setting._replace(show=lambda line: print(said(line)))
        except InputError as error:
            raise InputError(said(error)) from error
    print(summary_of(plans))


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="minirlhf-")
    except OSError as error:
        raise InputError(f"TMPDIR: expected a folder to write to: {error.strerror}") from error
    with folder as name:
        yield Path(name)


def _of_own_files(config: Any) -> ReadingConfig:
    """The run's own files are in our own format, whatever the user's were in."""
    return dataclasses.replace(config.reading, format="auto")


def _models(run: RunLayout) -> list[str]:
    return [path.name for path in sorted(run.root.iterdir()) if (path / "model.safetensors").exists()]


def _log(writer: MetricsWriter, step: int, stage: str, metrics: dict[str, float]) -> None:
    writer.write(step, stage, metrics)
