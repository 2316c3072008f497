"""Runs episodes: simulators in processes of their own, one policy that answers all who wait in one batch.

A simulator's process that dies or hangs is replaced and its episode run again from the start: that is never counted as
the policy's failure, and never left out. If the same episode fails so three times, the run ends with an error.

Legend: T action chunk · A action dims.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from openvla.evaluate.envs import open_env
from openvla.evaluate.processes import run_in_processes
from openvla.serve.action_queue import ActionQueue

PATIENCE = 300.0  # seconds without an answer after which a simulator hangs; opening one takes up to 30


@dataclass(frozen=True)
class Job:
    """One episode to run. `video`: where to write its recording; None: nowhere. `asked`: another task of the suite,
    asked for in the scene of `task` (LIBERO only)."""

    suite: str
    task: int
    episode: int
    video: str | None = None
    asked: int | None = None


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
        drafts: how many answers were drafted with the one before.
        accepted: tokens of theirs that were right.
    """

    success: bool
    steps: int
    instruction: str
    cpu_seconds: dict[str, float]
    seconds: float
    replaced: int = 0
    restarts: int = 0
    drafts: int = 0
    accepted: int = 0


def run_episodes(
    jobs: Iterable[Job],
    policy,
    env_options: dict | None = None,
    num_envs: int = 1,
    execute: int | None = None,
    ensemble: float | None = None,
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
        ensemble: ask at every step, and average all dims but grippers over the chunks; see `ActionQueue`.
        action_dim: numbers of an action, to tell a policy's mistake from a simulator's; None: not checked.
        seed: of the scripted expert, and with task, episode and step of the policy's noise.
        patience: seconds after which a simulator counts as hung.
        on_outcome: called after every episode, in the order in which they end.

    Raises RuntimeError if an episode's simulator dies again and again, ValueError if it refuses an episode, and
    whatever the policy raises.
    """
    if num_envs < 1:
        raise ValueError(f"Expected at least one simulator, got {num_envs}.")
    ActionQueue(None, execute, ensemble, [])  # raises for what cannot be before a simulator is opened
    outcomes = {}

    def answer(observations: list[dict]) -> list[dict]:
        return _act(policy, observations, action_dim)

    def note(job: Job, outcome: Outcome, restarts: int) -> None:
        outcome.restarts = restarts
        outcomes[job] = outcome
        on_outcome(job, outcome)

    simulator = _Simulator(dict(env_options or {}), tuple(policy.needs), seed, execute, ensemble)
    run_in_processes(simulator, jobs, num_envs, note, answer, _name, patience)
    return outcomes


def _name(job: Job) -> str:
    return f"{job.suite} task {job.task} episode {job.episode}"


def _act(policy, observations: list[dict], action_dim: int | None) -> list[dict]:
    """Per observation the `actions` `(T, A)`, `replaced` tokens, and processor `seconds`; tokens and how many of a
    draft were `accepted`, if they are told."""
    start = time.process_time()
    results = policy.infer_batch(observations)
    share = (time.process_time() - start) / len(observations)
    for result in results:
        shape = np.shape(result["actions"])
        if len(shape) != 2 or 0 in shape or shape[1] != (action_dim or shape[1]):
            raise ValueError(f"The policy gave actions of shape {shape}, expected (T, {action_dim or 'A'}).")
        if not np.isfinite(result["actions"]).all():
            raise ValueError(f"The policy gave an action that is not finite: {result['actions']}.")
    return [
        {"actions": result["actions"], "replaced": int(np.sum(result.get("replaced", 0))), "seconds": share}
        | {name: result[name] for name in ("token_ids", "accepted") if name in result}
        for result in results
    ]


# --- In the simulators' processes ------------------------------------------------------------------------------------
class _Remote:
    """The policy, as an episode sees it, and what it has cost so far."""

    def __init__(self, ask: Callable[[dict], dict], takes_drafts: bool):
        self.ask, self.takes_drafts = ask, takes_drafts
        self.seconds, self.replaced, self.drafts, self.accepted = 0.0, 0, 0, 0

    def infer(self, observation: dict) -> dict:
        answer = self.ask(observation)
        self.seconds += answer["seconds"]
        self.replaced += answer["replaced"]
        self.drafts += "accepted" in answer
        self.accepted += int(answer.get("accepted", 0))
        return answer


class _Simulator:
    """Runs episodes; stays open while the task is the same."""

    def __init__(
        self, env_options: dict, needs: tuple[str, ...], seed: int, execute: int | None, ensemble: float | None
    ):
        self.env_options, self.needs, self.seed = env_options, needs, seed
        self.execute, self.ensemble = execute, ensemble
        self.env, self.opened, self.asked = None, None, None

    def __call__(self, job: Job, ask: Callable[[dict], dict]) -> Outcome:
        """`ask`: the policy, with an observation."""
        if self.opened != (job.suite, job.task):
            if self.env is not None:
                self.env.close()
            self.env, self.opened = open_env(job.suite, job.task, **self.env_options), (job.suite, job.task)
            self.asked = None
        env, start = self.env, time.perf_counter()
        env.stopwatch.seconds.clear()
        if job.asked != self.asked:
            env.ask(job.asked)
            self.asked = job.asked
        env.reset(job.episode)
        expert = env.expert(seed=self.seed) if "expert" in self.needs else None
        recording = Recording(env) if job.video else None
        # Names, not a policy's statistics, tell the gripper: experts have none, and the policy's dims are these.
        averaged = [name != "gripper" for name, _ in env.conventions.action_dims]
        policy = _Remote(ask, "draft" in self.needs)
        queue = ActionQueue(policy, self.execute, self.ensemble, averaged)
        steps, success = 0, False
        while not success and steps < env.max_steps:
            wanted = queue.needs_observation
            action = queue.act(self._observe(expert, (job.task, job.episode, steps)) if wanted else None)
            if recording:
                recording.add(action)
            success = env.step(action)
            steps += 1
        if recording:
            recording.write(job, success)
        seconds = time.perf_counter() - start
        spent = {**env.stopwatch.seconds, "policy": policy.seconds}
        drafts = {"drafts": policy.drafts, "accepted": policy.accepted}
        return Outcome(success, steps, env.instruction, spent, seconds, policy.replaced, **drafts)

    def _observe(self, expert, place: tuple[int, int, int]) -> dict:
        """What the policy needs. `place`: task, episode and step."""
        observation = self.env.observe() if "images" in self.needs else {"instruction": self.env.instruction}
        if "images" in observation:  # in the policy's order, whatever the simulator calls its cameras
            observation["images"] = list(observation["images"].values())
        if "place" in self.needs:
            observation["place"] = place
        if "seed" in self.needs:
            observation["seed"] = (self.seed, *place)
        if expert:
            with self.env.stopwatch.measure("expert"):
                observation["expert_action"] = expert.act()
        return observation


class Recording:
    """What an episode looked like and what the policy commanded, as a video."""

    def __init__(self, env):
        self.env, self.frames, self.actions = env, [], []

    def add(self, action: np.ndarray) -> None:
        """The scene before an action, and the action."""
        self._film()
        self.actions.append(np.array(action))

    def write(self, job: Job, success: bool) -> None:
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
