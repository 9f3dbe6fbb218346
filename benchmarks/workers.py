"""Work in processes of their own: what crashes, hangs, or leaves its GPU unusable, takes nothing else with it.

    with Worker(prepare, False) as worker:
        answer = worker.ask(60.0, function, argument)     # done, raised, died or late

A process serves until something goes wrong in it, and then another takes its place: after an illegal memory access
every later call on that GPU fails in the process that made it, and memory that ran out may stay taken. Functions and
arguments travel by pickle. No torch here: the one that asks need not have seen a GPU.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

_pipe: Any = None  # in a worker: where its answers go


class Answer(NamedTuple):
    """kind: done (value is the result), raised, died or late (value says what happened); said: the last `tell`."""

    kind: str
    value: Any
    said: str = ""


def tell(text: str) -> None:
    """What is being done now, so that it is known when nothing more is heard."""
    if _pipe is not None:
        _pipe.send(("says", text))


def serve(pipe: Any, prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """What runs in the process."""
    global _pipe
    _pipe = pipe
    prepare(*arguments)
    while True:
        try:
            function, given = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("done", function(*given))
        except Exception as problem:
            answer = ("raised", f"{type(problem).__name__}: {problem}"[:400])
        pipe.send(answer)


class Worker:
    """One process at a time, started when first asked; `prepare` runs in each before anything else."""

    def __init__(self, prepare: Callable[..., None], *arguments: Any) -> None:
        self.prepare, self.arguments = prepare, arguments
        self.process: Any = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ask(self, seconds: float, function: Callable[..., Any], *given: Any) -> Answer:
        """The answer, or what became of it; `seconds` is how long nothing at all may be heard."""
        if seconds <= 0:
            return Answer("late", "not begun")
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs, self.prepare, self.arguments), daemon=False)
            self.process.start()
            theirs.close()
        said = ""
        try:
            self.pipe.send((function, given))
            while self.pipe.poll(seconds):
                kind, value = self.pipe.recv()
                if kind == "says":
                    said = value
                    continue
                if kind == "raised":
                    self.stop()
                return Answer(kind, value, said)
        except (EOFError, OSError):
            process = self.process
            self.stop()
            return Answer("died", f"its process ended with exit code {process.exitcode}", said)
        self.stop()
        return Answer("late", f"nothing heard for {seconds:.0f} s", said)

    def stop(self) -> None:
        if self.process is not None:
            self.pipe.close()
            self.process.join(2)  # an idle one ends by itself
            if self.process.is_alive():
                self.process.kill()
                self.process.join(10)  # a driver may hold it longer
            self.process = None


def spread(
    jobs: int, items: Sequence[Any], seconds: Callable[[], float], function: Callable[..., Any], prepare, *arguments
) -> Iterator[tuple[Any, Answer]]:
    """function(item) for every item in `jobs` workers, as they come; `seconds` says how long each may take."""
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    workers = [Worker(prepare, *arguments) for _ in range(jobs)]
    for worker in workers:
        idle.put(worker)

    def one(item: Any) -> tuple[Any, Answer]:
        worker = idle.get()
        try:
            return item, worker.ask(seconds(), function, item)
        finally:
            idle.put(worker)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            for done in concurrent.futures.as_completed([pool.submit(one, item) for item in items]):
                yield done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for worker in workers:
                worker.stop()
