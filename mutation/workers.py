"""Forked workers: each takes one unit of work after the other and reports as it goes.

A worker that dies or falls silent (an endless loop inside torch, a crash) is ended and replaced, and what it was
doing is reported as lost; the rest of its unit is done by the next one.
"""

import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

SILENCE = 120.0
"""Seconds without a word after which a worker is taken for lost; every test has a shorter limit of its own."""

MEMORY = 4 * 2**30
"""Bytes that a worker may map beyond what it began with."""

Work = Callable[[Any], Iterator[Any]]


class Done(NamedTuple):
    """What a worker says: the result of one task, or that the process doing it was lost."""

    task: int
    result: Any
    lost: bool = False


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection
    unit: list[int]  # the tasks of the unit that are not done, in order
    heard: float


def run_all(units: Sequence[Sequence[int]], work: Callable[[Sequence[int]], Iterator[Any]], count: int) -> Iterator[Done]:
    """Runs `work` on every unit in `count` forked processes; yields one Done for each task, as they finish.

    work: unit -> one result for each of its tasks, in order. It runs in the child: what it changes stays there.

    Raises:
        RuntimeError: `work` raised; a process that died or hung is no error, but a lost task.
    """
    waiting = [list(unit) for unit in units if unit]
    running: list[_Worker] = []
    try:
        while waiting or running:
            while waiting and len(running) < count:
                running.append(_start(waiting.pop(0), work))
            ready = wait([worker.pipe for worker in running], timeout=1.0)
            for worker in list(running):
                running.remove(worker)
                if worker.pipe in ready:
                    result, alive = _heard(worker)
                else:
                    result, alive = None, time.monotonic() - worker.heard < SILENCE
                if result is not None:
                    yield Done(worker.unit.pop(0), result[0])
                    worker = worker._replace(heard=time.monotonic())
                if alive and worker.unit:
                    running.append(worker)
                    continue
                if not worker.unit and waiting and alive:
                    worker.pipe.send(waiting[0])
                    running.append(worker._replace(unit=waiting.pop(0), heard=time.monotonic()))
                    continue
                _end(worker)
                if worker.unit:  # it was lost over the first of them
                    yield Done(worker.unit.pop(0), None, lost=True)
                    waiting = [worker.unit, *waiting] if worker.unit else waiting
    finally:
        for worker in running:
            _end(worker)


def _start(unit: list[int], work: Callable[[Sequence[int]], Iterator[Any]]) -> _Worker:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, ours, work), daemon=True)
    process.start()
    theirs.close()
    ours.send(unit)
    return _Worker(process, ours, list(unit), time.monotonic())


def _serve(pipe: Connection, parents: Connection, work: Callable[[Sequence[int]], Iterator[Any]]) -> None:
    parents.close()
    _limit_memory()
    while True:
        try:
            unit = pipe.recv()
        except EOFError:
            return
        try:
            for result in work(unit):
                pipe.send((result, ""))
        except BaseException:  # ours, not a mutant's: it must not pass for a lost process
            pipe.send((None, traceback.format_exc()))
            return


def _heard(worker: _Worker) -> tuple[tuple[Any] | None, bool]:
    """What the worker sent, if anything, and whether it lives."""
    try:
        result, error = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        return None, False
    if error:
        raise RuntimeError(f"a worker failed:\n{error}")
    return (result,), True


def _end(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.join(0.2)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def _limit_memory() -> None:
    try:
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not on Linux: the time limits must do
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, hard))
