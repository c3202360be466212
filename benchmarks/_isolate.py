"""Work in processes of its own: with a time limit, a memory limit and its last word kept.

A benchmark over a zoo of models must survive the model that hangs, crashes or eats the memory.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

Row = dict[str, Any]
Report = Callable[[Row], None]
Work = Callable[[Any, Report], None]

# A forked process shares the imported libraries; a spawned one would import them every time.
_METHOD = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"


def first_line(error: BaseException | str) -> str:
    """The first line of what an error says, with its type."""
    lines = str(error).strip().splitlines()
    line = lines[0][:300] if lines else ""
    return line if isinstance(error, str) else f"{type(error).__name__}: {line}"


def isolated(
    work: Work, tasks: Iterable[Any], *, seconds: float, gigabytes: float = 8.0, jobs: int = 1
) -> Iterator[tuple[Any, Row]]:
    """Run `work(task, report)` for every task in a process of its own.

    Args:
        work: Calls `report` with its row as often as it likes; the last one counts.
        tasks: What to work on; must be picklable where processes are spawned.
        seconds: Time limit of one task.
        gigabytes: Memory limit of one task, on top of what it shares with this process.
        jobs: How many run at the same time.

    Yields:
        Task and row, as they finish. A row has a `failure` if the work raised, was stopped, or
        died.
    """
    waiting, running = list(tasks)[::-1], []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_Run.start(work, waiting.pop(), seconds, gigabytes))
        wait([run.pipe for run in running], timeout=max(0, min(r.left for r in running)))
        for run in list(running):
            if run.finished():
                running.remove(run)
                yield run.task, run.row


@dataclass
class _Run:
    task: Any
    process: BaseProcess
    pipe: Connection
    deadline: float
    row: Row = field(default_factory=dict)

    @classmethod
    def start(cls, work: Work, task: Any, seconds: float, gigabytes: float) -> _Run:
        context = multiprocessing.get_context(_METHOD)
        pipe, end = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(work, task, end, gigabytes))
        process.start()
        end.close()
        return cls(task, process, pipe, time.monotonic() + seconds)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def finished(self) -> bool:
        """Take in what the process says; whether that was its last word."""
        try:
            while self.pipe.poll():
                self.row = self.pipe.recv()
        except EOFError:
            self.process.join()
            if self.process.exitcode:
                self.row["failure"] = f"the process died (exit code {self.process.exitcode})"
            return True
        if self.left > 0:
            return False
        self.process.kill()
        self.process.join()
        self.row["failure"] = "time limit"
        return True


def _work(work: Work, task: Any, pipe: Connection, gigabytes: float) -> None:
    _limit_memory(gigabytes)
    row: Row = {}

    def report(news: Row) -> None:
        row.update(news)
        pipe.send(row)

    try:
        work(task, report)
    except Exception as error:
        report({"failure": first_line(error)})
    pipe.close()


def _limit_memory(gigabytes: float) -> None:
    """Let allocations fail beyond a limit, where the system can."""
    try:
        import resource
    except ImportError:
        return
    used = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit = used + int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
