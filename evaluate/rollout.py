"""Runs episodes: simulators in processes of their own, one policy that answers all who wait in one batch.

A simulator's process that dies or hangs is replaced and its episode run again from the start: that is never counted as
the policy's failure, and never left out. If the same episode fails so three times, the run ends with an error.

Legend: T action chunk · A action dims.
"""

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import wait

import numpy as np

ATTEMPTS = 3  # of an episode whose simulator dies
PATIENCE = 300.0  # seconds without an answer after which a simulator hangs; opening one takes up to 30


@dataclass(frozen=True)
class Job:
    """One episode to run. `video`: where to write its recording; None: nowhere."""

    suite: str
    task: int
    episode: int
    video: str | None = None


@dataclass
class Outcome:
    """How an episode ended.

    Args:
        success: whether the simulator says that the task is done.
        steps: control steps taken, settling not counted.
        instruction: what the policy was told.
        cpu_seconds: processor time of `render` and `physics` in the simulator, `policy` here (shared by its batch).
        seconds: from reset to end, by the clock.
        replaced: tokens that were no actions, for which the best action was taken.
        restarts: how often its simulator had to be replaced.
    """

    success: bool
    steps: int
    instruction: str
    cpu_seconds: dict[str, float]
    seconds: float
    replaced: int = 0
    restarts: int = 0


@dataclass(eq=False)  # each is itself: keys of dicts
class _Worker:
    process: multiprocessing.Process
    connection: multiprocessing.connection.Connection
    job: Job | None = None
    asked: float = 0.0  # time of the last message to it
    policy_seconds: float = 0.0
    replaced: int = 0


def run_episodes(
    jobs: Iterable[Job],
    policy,
    env_options: dict | None = None,
    num_envs: int = 1,
    execute: int | None = None,
    action_dim: int | None = None,
    seed: int = 0,
    patience: float = PATIENCE,
    on_outcome: Callable[[Job, Outcome], None] = lambda job, outcome: None,
) -> dict[Job, Outcome]:
    """Runs all jobs, in this order as far as several simulators allow.

    Args:
        jobs: sorted by task, because to change the task a simulator has to be built anew.
        policy: `OpenVLAPolicy` or one of the baselines: `infer_batch(observations)`, `needs`.
        env_options: for `open_env`: `cameras`, `renderer`.
        num_envs: simulators at a time; the policy answers those that wait, all at once.
        execute: how many actions of a chunk are carried out before the policy is asked again; None: all.
        action_dim: numbers of an action, to tell a policy's mistake from a simulator's; None: not checked.
        seed: of the scripted expert.
        patience: seconds after which a simulator counts as hung.
        on_outcome: called after every episode, in the order in which they end.

    Raises RuntimeError if an episode's simulator dies again and again, and whatever the policy raises.
    """
    if num_envs < 1 or (execute is not None and execute < 1):
        raise ValueError(f"Expected at least one simulator and one action of a chunk, got {num_envs} and {execute}.")
    pending, outcomes = deque(jobs), {}
    settings = {"env_options": dict(env_options or {}), "needs": tuple(policy.needs), "seed": seed}
    workers = [_start_worker(settings) for _ in range(min(num_envs, len(pending)))]
    restarts: dict[Job, int] = {}
    try:
        while pending or any(worker.job for worker in workers):
            for worker in workers:
                if worker.job is None and pending:
                    _assign(worker, pending.popleft())
            waiting = _collect(workers, patience)
            # 1. Who ended, who died
            for worker, (kind, content) in list(waiting.items()):
                if kind == "observation":
                    continue
                waiting.pop(worker)
                job = worker.job
                if kind == "outcome":
                    content.restarts, content.replaced = restarts.get(job, 0), worker.replaced
                    content.cpu_seconds["policy"] = worker.policy_seconds
                    outcomes[job] = content
                    worker.job = None
                    on_outcome(job, content)
                    continue
                restarts[job] = restarts.get(job, 0) + 1
                if restarts[job] >= ATTEMPTS:
                    raise RuntimeError(
                        f"The simulator of {job.suite} task {job.task} episode {job.episode} failed {ATTEMPTS} times, "
                        f"which is not the policy's failure, so there is no result. The last time: {content}"
                    )
                _stop(worker)
                fresh = _start_worker(settings)
                workers[workers.index(worker)] = fresh
                _assign(fresh, job)
            # 2. What the others should do
            if waiting:
                asking = {worker: content for worker, (_, content) in waiting.items()}
                _act(policy, asking, execute, action_dim)
    finally:
        for worker in workers:
            _stop(worker)
    return outcomes


def _assign(worker: _Worker, job: Job) -> None:
    worker.job, worker.policy_seconds, worker.replaced = job, 0.0, 0
    _send(worker, ("run", job))


def _act(policy, observations: dict[_Worker, dict], execute: int | None, action_dim: int | None) -> None:
    start = time.process_time()
    results = policy.infer_batch(list(observations.values()))
    share = (time.process_time() - start) / len(observations)
    for worker, result in zip(observations, results):
        shape = np.shape(result["actions"])
        if len(shape) != 2 or 0 in shape or shape[1] != (action_dim or shape[1]):
            raise ValueError(f"The policy gave actions of shape {shape}, expected (T, {action_dim or 'A'}).")
        if not np.isfinite(result["actions"]).all():
            raise ValueError(f"The policy gave an action that is not finite: {result['actions']}.")
        worker.policy_seconds += share
        worker.replaced += int(np.sum(result.get("replaced", 0)))
        _send(worker, ("act", result["actions"][:execute]))


def _send(worker: _Worker, message: tuple) -> None:
    worker.asked = time.monotonic()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # if it died, `_collect` finds out
        worker.connection.send(message)


def _collect(workers: list[_Worker], patience: float) -> dict[_Worker, tuple]:
    """At least one message: ("observation", dict), ("outcome", Outcome), or ("failed", reason)."""
    busy = [worker for worker in workers if worker.job is not None]
    while True:
        timeout = max(0.0, min(worker.asked for worker in busy) + patience - time.monotonic())
        ready = set(wait([worker.connection for worker in busy], timeout))
        found = {}
        for worker in busy:
            if worker.connection in ready:
                found[worker] = _receive(worker)
            elif time.monotonic() - worker.asked > patience:
                found[worker] = ("failed", f"no answer for {patience:g} s")
        if found:
            return found


def _receive(worker: _Worker) -> tuple:
    try:
        return worker.connection.recv()
    except (EOFError, OSError):  # OSError: it died while it was sending
        worker.process.join(timeout=10)
        return ("failed", f"its process ended with status {worker.process.exitcode}")


# --- Processes -------------------------------------------------------------------------------------------------------
def _start_worker(settings: dict) -> _Worker:
    context = multiprocessing.get_context("spawn")  # forked, a simulator would share the policy's CUDA and threads
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, settings), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _stop(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.join(timeout=0.0 if worker.job else 5.0)  # one that waits for a job ends by itself
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def _work(connection, settings: dict) -> None:
    """A simulator's process: runs the episodes that it is told to, until nobody listens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends us
    os.environ["OMP_NUM_THREADS"] = "1"
    simulator = _Simulator(connection, settings)
    try:
        while True:
            message, job = connection.recv()
            assert message == "run", message
            connection.send(("outcome", simulator.run(job)))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent has ended
        pass
    except Exception:  # whatever a simulator raises: it is told, and this process is replaced
        connection.send(("failed", traceback.format_exc()))
    finally:
        simulator.close()


class _Simulator:
    def __init__(self, connection, settings: dict):
        self.connection, self.settings = connection, settings
        self.env, self.opened = None, None

    def run(self, job: Job) -> Outcome:
        from openvla.evaluate.envs import open_env

        if self.opened != (job.suite, job.task):
            self.close()
            self.env = open_env(job.suite, job.task, **self.settings["env_options"])
            self.opened = (job.suite, job.task)
        env, start = self.env, time.perf_counter()
        env.stopwatch.seconds.clear()
        env.reset(job.episode)
        expert = env.expert(seed=self.settings["seed"]) if "expert" in self.settings["needs"] else None
        recording = Recording(env) if job.video else None
        steps, success = 0, False
        while not success and steps < env.max_steps:
            for action in self._ask(expert, (job.task, job.episode, steps)):
                if recording:
                    recording.add(action)
                success = env.step(action)
                steps += 1
                if success or steps == env.max_steps:
                    break
        if recording:
            recording.write(job, success, steps)
        seconds = time.perf_counter() - start
        return Outcome(success, steps, env.instruction, dict(env.stopwatch.seconds), seconds)

    def _ask(self, expert, place: tuple[int, int, int]) -> np.ndarray:
        """The policy's next actions `(T, A)`. `place`: task, episode and step."""
        observation = {"instruction": self.env.instruction}
        if "images" in self.settings["needs"]:
            observation = self.env.observe()
        if "place" in self.settings["needs"]:
            observation["place"] = place
        if expert:
            with self.env.stopwatch.measure("expert"):
                observation["expert_action"] = expert.act()
        self.connection.send(("observation", observation))
        message, actions = self.connection.recv()
        assert message == "act", message
        return actions

    def close(self) -> None:
        if self.env is not None:
            self.env.close()
        self.env = self.opened = None


class Recording:
    """What an episode looked like and what the policy commanded, as a video."""

    def __init__(self, env):
        self.env, self.frames, self.actions = env, [], []

    def add(self, action: np.ndarray) -> None:
        """The scene before an action, and the action."""
        self._film()
        self.actions.append(np.array(action))

    def write(self, job: Job, success: bool, steps: int) -> None:
        from openvla.evaluate.videos import write_episode

        self._film()
        title = f"{job.suite} · task {job.task} · episode {job.episode}"
        conventions = self.env.conventions
        write_episode(
            job.video, self.frames, np.stack(self.actions), conventions, title, self.env.instruction, success
        )

    def _film(self) -> None:
        """Its time is not the policy's: what filming costs is not counted as rendering."""
        seconds = self.env.stopwatch.seconds
        before = dict(seconds)
        self.frames.append(self.env.render(self.env.cameras[0]))
        seconds.clear()
        seconds.update(before)
