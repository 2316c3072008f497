"""Jobs shared out to processes that may die: one that crashes or hangs is replaced, and its job done again.

Simulators run so, for evaluation and for demonstrations. What one of them raises or is killed by is never a job's
result, and no job is left out.
"""

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
PATIENCE = 900.0  # seconds: a demonstration of 520 steps with two cameras of the official renderer takes some 300


def run_in_processes(
    work: Callable,
    jobs: Iterable[Hashable],
    num_processes: int,
    on_result: Callable[[Hashable, object, int], None],
    answer: Callable[[list], list] | None = None,
    name: Callable[[Hashable], str] = str,
    patience: float = PATIENCE,
) -> None:
    """Does every job in one of several processes, and calls `on_result(job, result, restarts)` here as they end.

    Jobs are given out in their order, one at a time, so neighbours may end in another order. `restarts` counts the
    processes that were lost at this job before. After an error, or Ctrl-C, no process is left.

    Args:
        work: `work(job)`, or with `answer` `work(job, ask)`, gives the result. It is copied into every process, and
            stays there: what it opens for one job can serve the next.
        answer: answers what the processes ask by `ask(question)`: the questions of all that wait, at once.
        name: of a job, for errors.
        patience: seconds without a word after which a job's process counts as hung, and is replaced like one that
            died.

    Raises ValueError of whatever `work` raises as ValueError, KeyError or ImportError: that does not go away. After
    other errors, and when a process dies, another one tries again; RuntimeError if a job came to nothing three times.
    What `answer` and `on_result` raise ends all.
    """
    pending, restarts = deque(jobs), Counter()
    workers = [_Worker(work, answer is not None) for _ in range(min(num_processes, len(pending)))]
    try:
        while True:
            for worker in workers:
                if worker.job is None and pending:
                    worker.job = pending.popleft()
                    worker.send(worker.job)
            busy = [worker for worker in workers if worker.job is not None]
            if not busy:
                return
            asking = []
            for worker, (kind, content) in _receive(busy, patience):
                job = worker.job
                if kind == "question":
                    asking.append((worker, content))
                    continue
                worker.job = None
                if kind == "result":
                    on_result(job, content, restarts[job])
                    continue
                if kind == "refused":
                    message, trace = content
                    raise ValueError(f"{name(job)}: {message}") from RuntimeError(trace)
                restarts[job] += 1
                if restarts[job] == ATTEMPTS:
                    raise RuntimeError(f"{name(job)} came to nothing {ATTEMPTS} times; the last time: {content}")
                worker.kill()
                workers[workers.index(worker)] = _Worker(work, answer is not None)
                pending.appendleft(job)
            if asking:
                answers = answer([question for _, question in asking])
                for (worker, _), content in zip(asking, answers):
                    worker.send(content)
    finally:
        for worker in workers:
            worker.kill()


class _Worker:
    """A process that does one job at a time."""

    def __init__(self, work: Callable, asks: bool):
        context = multiprocessing.get_context("spawn")  # forked, it would share OpenGL's contexts, CUDA and threads
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, asks), daemon=True)
        with _one_thread():
            self.process.start()
        theirs.close()
        self.job, self.told = None, 0.0

    def send(self, message) -> None:
        self.told = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # if it died, `receive` finds out
            self.connection.send(message)

    def receive(self) -> tuple[str, object]:
        """("question", what), ("result", what), ("refused", (message, traceback)) or ("failed", reason)."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):  # OSError: it died while it was sending
            self.process.join(timeout=10)
            return "failed", f"its process ended with status {self.process.exitcode}"

    def kill(self) -> None:
        self.process.kill()  # there is nothing to save, and leaving politely, OpenGL prints its complaints
        self.process.join()
        self.connection.close()


def _receive(busy: list[_Worker], patience: float) -> list[tuple[_Worker, tuple[str, object]]]:
    """What those say who have something to say: at least one, which may be that it hangs."""
    while True:
        oldest = min(worker.told for worker in busy)
        ready = wait([worker.connection for worker in busy], max(0.0, oldest + patience - time.monotonic()))
        found = []
        for worker in busy:
            if worker.connection in ready:
                found.append((worker, worker.receive()))
            elif time.monotonic() - worker.told > patience:
                found.append((worker, ("failed", f"no answer for {patience:g} s")))
        if found:
            return found


@contextlib.contextmanager
def _one_thread():
    """A process started meanwhile computes with one thread: how many is decided when numpy and torch are loaded, which
    is before the process can say so itself."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _serve(connection, work: Callable, asks: bool) -> None:
    """A process's life: ends when nobody listens any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends us

    def ask(question):
        connection.send(("question", question))
        return connection.recv()

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            job = connection.recv()
            try:
                result = work(job, ask) if asks else work(job)
            except (ValueError, KeyError, ImportError) as error:
                message = str(error.args[0] if error.args else error)
                connection.send(("refused", (message, traceback.format_exc())))
            except Exception:  # whatever a simulator raises: it is told, and this process is replaced
                connection.send(("failed", traceback.format_exc()))
            else:
                connection.send(("result", result))
