"""Forked workers: each takes one unit of work after the other and reports as it goes.

A worker that dies or falls silent (an endless loop inside torch, a crash) is ended and replaced, and what it
was doing is reported as lost; the rest of its unit is done by the next one.
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
"""Seconds without a word after which a worker is taken for lost."""

MEMORY = 4 * 2**30
"""Bytes that a worker may map beyond what it began with."""

Pulse = Callable[[], None]
"""Called by work that goes on without a result, to say that it lives."""

Work = Callable[[Sequence[int], Pulse], Iterator[Any]]
"""(unit, pulse) -> one result for each task of the unit, in order. Runs in the child: changes stay there."""


class Done(NamedTuple):
    """The result of one task, or that the process doing it was lost."""

    task: int
    result: Any
    lost: bool = False


class _Worker(NamedTuple):
    """unit: its tasks that are not done, in order; heard: when it last said something."""

    process: BaseProcess
    pipe: Any  # a Connection, whose class depends on the platform
    unit: list[int]
    heard: float


def run_all(units: Sequence[Sequence[int]], work: Work, count: int) -> Iterator[Done]:
    """Runs `work` on every unit in `count` forked processes; yields one Done for each task, as they finish.

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
                said = _said(worker) if worker.pipe in ready else _ALIVE
                if said[0] == "result":
                    yield Done(worker.unit.pop(0), said[1])
                if worker.pipe in ready:
                    worker = worker._replace(heard=time.monotonic())
                if said[0] == "gone" or time.monotonic() - worker.heard > SILENCE:
                    _end(worker)
                    if worker.unit:  # it was lost over the first of them
                        yield Done(worker.unit.pop(0), None, lost=True)
                        waiting.insert(0, worker.unit)
                        waiting = [unit for unit in waiting if unit]
                elif worker.unit:
                    running.append(worker)
                elif waiting:
                    worker.pipe.send(waiting[0])
                    running.append(worker._replace(unit=waiting.pop(0)))
                else:
                    _end(worker)
    finally:
        for worker in running:
            _end(worker)


_ALIVE = ("alive", None)


def _start(unit: list[int], work: Work) -> _Worker:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, ours, work), daemon=True)
    process.start()
    theirs.close()
    ours.send(unit)
    return _Worker(process, ours, unit, time.monotonic())


def _serve(pipe: Connection, parents: Connection, work: Work) -> None:
    parents.close()
    _limit_memory()
    while True:
        try:
            unit = pipe.recv()
        except EOFError:
            return
        try:
            for result in work(unit, lambda: pipe.send(_ALIVE)):
                pipe.send(("result", result))
        except BaseException:  # ours, not a mutant's: it must not pass for a lost process
            pipe.send(("error", traceback.format_exc()))
            return


def _said(worker: _Worker) -> tuple[str, Any]:
    """What the worker sent; ("gone", None) where it ended without a word."""
    try:
        said = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        return "gone", None
    if said[0] == "error":
        raise RuntimeError(f"a worker failed:\n{said[1]}")
    return said


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
