"""Work shared out to processes that may die: a simulator that crashes is replaced, and its job done again."""

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable
from multiprocessing.connection import wait

ATTEMPTS = 3  # at a job whose process dies
PATIENCE = 900.0  # seconds for an episode: 520 steps with two cameras of the official renderer take some 300


def run_in_workers(
    work: Callable,
    jobs: Iterable[Hashable],
    num_workers: int,
    on_result: Callable,
    name: Callable = str,
    patience: float = PATIENCE,
) -> None:
    """Calls `work(job)` for every job in one of several processes, and `on_result(job, result)` here as they end.

    Jobs are given out in their order, one at a time, so neighbours may end in another order. After an error, or
    Ctrl-C, no process is left.

    Args:
        work: is copied into every process, and stays there: what it opens for one job can serve the next.
        name: of a job, for errors.
        patience: seconds after which a job's process counts as hung, and is replaced like one that died.

    Raises ValueError of whatever `work` raises as ValueError, KeyError or ImportError: that does not go away. After
    other errors, and when a process dies, another one tries again; RuntimeError if a job came to nothing three times.
    """
    pending, failures = deque(jobs), Counter()
    workers = [_Worker(work) for _ in range(min(num_workers, len(pending)))]
    try:
        while True:
            for worker in workers:
                if worker.job is None and pending:
                    worker.give(pending.popleft())
            busy = {worker.connection: worker for worker in workers if worker.job is not None}
            if not busy:
                return
            oldest = min(worker.since for worker in busy.values())
            ready = wait(list(busy), max(0.0, oldest + patience - time.monotonic()))
            for connection, worker in busy.items():
                if connection in ready:
                    kind, content = worker.receive()
                elif time.monotonic() - worker.since > patience:
                    kind, content = "failed", f"no answer for {patience:g} s"
                else:
                    continue
                job, worker.job = worker.job, None
                if kind == "done":
                    on_result(job, content)
                    continue
                if kind == "refused":
                    raise ValueError(f"{name(job)}: {content}")
                failures[job] += 1
                if failures[job] == ATTEMPTS:
                    raise RuntimeError(f"{name(job)} came to nothing {ATTEMPTS} times; the last time: {content}")
                worker.kill()
                workers[workers.index(worker)] = _Worker(work)
                pending.appendleft(job)
    finally:
        for worker in workers:
            worker.kill()


class _Worker:
    """A process that does one job at a time."""

    def __init__(self, work: Callable):
        context = multiprocessing.get_context("spawn")  # a forked one would share OpenGL's contexts
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()
        self.job, self.since = None, 0.0

    def give(self, job) -> None:
        self.job, self.since = job, time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # if it died, `receive` finds out
            self.connection.send(job)

    def receive(self) -> tuple[str, object]:
        """("done", result), ("refused", message) or ("failed", reason)."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):  # OSError: it died while it was sending
            self.process.join(timeout=10)
            return "failed", f"its process ended with status {self.process.exitcode}"

    def kill(self) -> None:
        self.process.kill()  # there is nothing to save, and leaving politely, OpenGL prints its complaints
        self.process.join()
        self.connection.close()


def _serve(connection, work: Callable) -> None:
    """A worker's life: ends when nobody listens any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends us
    os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            job = connection.recv()
            try:
                result = work(job)
            except (ValueError, KeyError, ImportError) as error:
                connection.send(("refused", f"{error.args[0] if error.args else error}"))
            except Exception:  # whatever a simulator raises: it is told, and this process is replaced
                connection.send(("failed", traceback.format_exc()))
            else:
                connection.send(("done", result))
