"""Demonstrations one by one: how an episode is played by the scripted expert, and the file it becomes.

A part is an episode that has ended, well or not: `task_003_episode_0012.npz`, written under another name first. A
command that is stopped finds its parts again, and all that a dataset holds comes from them.

Legend: N steps of an episode · A action dims · P proprioception dims · S numbers of a simulator's state.
"""

import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from openvla.evaluate.envs import Conventions, open_env
from openvla.evaluate.report import tell_differences, write_json
from openvla.serve.action_queue import ActionQueue

NO_OP = 1e-4  # length of an action's motion, in [-1, 1], up to which it is none
MOST_PUSHES = 3  # before the first steps that alone are recorded


@dataclass(frozen=True)
class Settings:
    """All that decides what the demonstrations are.

    Args:
        episodes: numbers of the benchmark's initial states; with `randomize` of random placements.
        seed: of the noise.
        noise: of the expert, metres per step; see there.
        cameras: None: the main one.
        keep_no_ops: carry out and record actions that do nothing, too.
        extra_steps: steps to go on after success; the task must be done at the end still.
        other_share: of the episodes, those in which the scene is asked for another task of the suite.
        push: probability per step that the arm is pushed off its way, which is not recorded.
        lead: fingerprint of a policy that acts at the start and in place of pushes.
        lead_steps: the most that it acts at a time.
        shuffle: things change places, too; with `randomize`.
        first: of an episode only so many steps are played and recorded, done or not; None: all. It begins where a
            lead, or none to three pushes, got to.
    """

    suite: str
    tasks: list[int]
    episodes: list[int]
    randomize: bool
    seed: int
    noise: float
    cameras: list[str] | None
    renderer: str
    keep_no_ops: bool
    extra_steps: int
    other_share: float = 0.0
    push: float = 0.0
    lead: str | None = None
    lead_steps: int = 120
    shuffle: bool = False
    first: int | None = None


# --- Playing ---------------------------------------------------------------------------------------------------------
def is_no_op(action: np.ndarray, previous: np.ndarray | None) -> bool:
    """Whether an action `(A,)` neither moves nor changes the gripper, its last number. As the first one, whatever the
    gripper. Source: regenerate_libero_dataset.py of the original, which made the published `no_noops` datasets."""
    still = bool(np.linalg.norm(action[:-1]) < NO_OP)
    return still and (previous is None or bool(action[-1] == previous[-1]))


def expert_seed(seed: int, task: int, episode: int) -> int:
    """Other noise in every episode, the same in every run."""
    return int(np.random.SeedSequence([seed, task, episode]).generate_state(1)[0])


def play(env, settings: Settings, episode: int, seed: int, policy=None) -> tuple[dict, dict[str, np.ndarray]]:
    """Plays one episode. What is stored of a step is what was there before its action, and the action carried out.

    Args:
        policy: with `infer`, which leads where `settings` want it to; see `lead`.

    Returns facts (`success`: the task was done, or all of the `first` steps were; `steps`, `no_ops`, and `alone` if
    the policy did the task before the expert had done anything, which shows nothing and counts as no success), and
    arrays: `actions` `(N, A)` float32, `proprio` `(N, P)`, `states` `(N, S)`, LIBERO's `joints` `(N, 7)`, the
    cameras' frames as PNG files, end to end, and `starts`: the first steps of its pieces, a new one after every push
    or lead.
    """
    cameras = env.conventions.cameras[:1] if settings.cameras is None else settings.cameras
    if unknown := [camera for camera in cameras if camera not in env.conventions.cameras]:
        raise ValueError(f"{settings.suite} has no cameras {unknown}; it has {list(env.conventions.cameras)}.")
    env.reset(episode, randomize=settings.randomize, **({"shuffle": True} if settings.shuffle else {}))
    pushes, starts = np.random.default_rng([seed, 1]), {0}
    if policy is not None and lead(env, policy, pushes, settings.lead_steps):
        return {"success": False, "steps": 0, "no_ops": 0, "alone": True}, {}
    if policy is None and settings.first and settings.push:
        for _ in range(pushes.integers(MOST_PUSHES + 1)):
            _push(env, pushes, 1.0)
    expert = env.expert(seed=seed, noise=settings.noise)
    rows = {"actions": [], "proprio": [], "states": []} | ({"joints": []} if hasattr(env, "joints") else {})
    frames = {camera: [] for camera in cameras}
    limit, no_ops, reached, done = settings.first or env.max_steps, 0, False, False
    while len(rows["actions"]) < limit and no_ops < env.max_steps:
        if settings.push and not settings.first and pushes.random() < settings.push and not reached:
            starts.add(len(rows["actions"]))
            if policy is None:
                _push(env, pushes, rows["actions"][-1][-1] if rows["actions"] else 1.0)
            elif done := lead(env, policy, pushes, settings.lead_steps):
                break
            else:
                expert = env.expert(seed=seed, noise=settings.noise)
        with env.stopwatch.measure("expert"):
            action = np.asarray(expert.act(), dtype=np.float32)
        if not settings.keep_no_ops and is_no_op(action, rows["actions"][-1] if rows["actions"] else None):
            no_ops += 1
            continue
        for camera in cameras:
            frames[camera].append(_png(env.render(camera)))
        rows["proprio"].append(env.proprio())
        rows["states"].append(env.get_state())
        if "joints" in rows:
            rows["joints"].append(env.joints())
        rows["actions"].append(action)
        done = env.step(action)
        if done and not reached:
            reached, limit = True, len(rows["actions"]) + settings.extra_steps
    if done and not rows["actions"]:
        return {"success": False, "steps": 0, "no_ops": no_ops, "alone": True}, {}
    arrays = {name: np.array(values) for name, values in rows.items()}
    arrays["starts"] = np.array(sorted(starts))
    for camera, files in frames.items():
        arrays[f"frames/{camera}"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"ends/{camera}"] = np.cumsum([len(file) for file in files])
    kept = done or len(rows["actions"]) == settings.first
    return {"success": kept, "steps": len(rows["actions"]), "no_ops": no_ops}, arrays


def _push(env, rng: np.random.Generator, gripper: float) -> None:
    for action in draw_push(rng, gripper):
        env.step(action)


def draw_push(rng: np.random.Generator, gripper: float) -> np.ndarray:
    """`(2 to 6, 7)` actions of LIBERO: one way for a tenth to a third of a second, a few centimetres. One push in
    five opens the fingers that `gripper` had closed, or closes them: what is carried falls."""
    action = np.zeros(7, np.float32)
    way = rng.normal(size=3)
    action[:3] = way / np.linalg.norm(way) * rng.uniform(0.2, 0.8)
    action[3:6] = rng.uniform(-0.15, 0.15, 3)
    action[6] = 1.0 - gripper if rng.random() < 0.2 else gripper
    return np.repeat(action[None], rng.integers(2, 7), axis=0)


def lead(env, policy, rng: np.random.Generator, most: int) -> bool:
    """The policy acts for 1 to `most` steps, chunk by chunk, and gets to where policies get to, as in DAgger (Ross et
    al. 2011, arXiv:1011.0686). Returns whether that did the task."""
    queue = ActionQueue(policy)
    for _ in range(rng.integers(most) + 1):
        observation = None
        if queue.needs_observation:
            observation = env.observe()
            observation["images"] = list(observation["images"].values())
        if env.step(queue.act(observation)):
            return True
    return False


class Recorder:
    """Plays episodes and writes their parts; the simulator stays open while the task is the same.

    Args:
        folder: of the parts.
        cameras: of the policy that leads, if one does, in its order.
    """

    def __init__(self, settings: Settings, folder: Path, cameras: list[str] | None = None):
        self.settings, self.folder = settings, folder
        self.options = {"renderer": settings.renderer} | ({"cameras": cameras} if cameras else {})
        self._env, self._task = None, None

    def __call__(self, job: tuple[int, int], ask: Callable[[dict], dict] | None = None) -> dict:
        """`job`: task and episode; `ask`: the policy that leads, with an observation. Returns the part's facts."""
        task, episode = job
        settings, start = self.settings, time.process_time()
        if self._task != task:
            if self._env is not None:
                self._env.close()
            self._env, self._task = open_env(settings.suite, task, **self.options), task
        env, opened = self._env, time.process_time()
        env.stopwatch.seconds.clear()
        seed = expert_seed(settings.seed, task, episode)
        asked = self._choose_other(task, np.random.default_rng([seed, 2]))
        if settings.other_share:
            env.ask(asked)
        played, arrays = play(env, settings, episode, seed, ask and SimpleNamespace(infer=ask))
        facts = {"task": task, "episode": episode, "seed": seed, "instruction": env.instruction, **played}
        facts |= {} if asked is None else {"asked": asked}
        facts |= {"conventions": asdict(env.conventions)}
        if settings.suite.startswith("libero"):  # for its HDF5 files
            simulator = env.simulator
            facts["problem"] = {"problem_name": simulator.problem_name, "domain_name": simulator.domain_name}
            facts["environment"] = type(simulator.env).__name__
            facts["bddl"] = Path(simulator.env.bddl_file_name).name
            facts["physics_size"] = env.initial_states.shape[1]  # of a state: what MuJoCo and LIBERO call one
        seconds = {**env.stopwatch.seconds, "opening": opened - start}
        seconds["other"] = time.process_time() - start - sum(seconds.values())
        facts["cpu_seconds"] = seconds
        write_part(self.folder, facts, arrays if played["success"] else {})
        return facts

    def _choose_other(self, task: int, rng: np.random.Generator) -> int | None:
        from openvla.evaluate.envs.libero import others

        if not self.settings.other_share or rng.random() >= self.settings.other_share:
            return None
        found = list(others(self.settings.suite, task))
        return int(rng.choice(found)) if found else None


# --- Parts -----------------------------------------------------------------------------------------------------------
class Part:
    """An episode that has ended. The arrays of one that failed are not kept."""

    def __init__(self, path: Path):
        self.path = path
        with np.load(path) as data:  # allow_pickle is off
            self.facts = json.loads(data["facts"].tobytes())

    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path) as data:
            return {name: data[name] for name in data.files if name != "facts"}

    def pieces(self) -> list[tuple[int, int]]:
        """(first step, step after the last) of what lies between pushes."""
        with np.load(self.path) as data:
            starts, count = data["starts"].tolist(), len(data["actions"])
        return [(start, stop) for start, stop in zip(starts, [*starts[1:], count]) if start < stop]

    def initial_states(self) -> np.ndarray:
        """`(pieces, S)`."""
        with np.load(self.path) as data:  # frames stay on disk
            return data["states"][[start for start, _ in self.pieces()]]

    @property
    def conventions(self) -> Conventions:
        return Conventions(**{name: _tuples(value) for name, value in self.facts["conventions"].items()})

    @property
    def cameras(self) -> list[str]:
        with np.load(self.path) as data:
            return [name.removeprefix("ends/") for name in data.files if name.startswith("ends/")]


def frame(arrays: dict[str, np.ndarray], camera: str, step: int) -> np.ndarray:
    """A part's picture `(H, W, 3)` uint8."""
    ends = arrays[f"ends/{camera}"]
    file = arrays[f"frames/{camera}"][ends[step - 1] if step else 0 : ends[step]]
    return np.asarray(Image.open(io.BytesIO(file.tobytes())))


def _tuples(value):
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def write_part(folder: Path, facts: dict, arrays: dict[str, np.ndarray]) -> None:
    path = folder / part_name(facts["task"], facts["episode"])
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        np.savez(file, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def part_name(task: int, episode: int) -> str:
    return f"task_{task:03d}_episode_{episode:04d}.npz"


def open_parts(folder: Path, settings: dict) -> None:
    """Makes the folder of parts, or goes on in it; ValueError if it is another command's."""
    file = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not any(folder.glob("task_*.npz")):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
        return
    before = json.loads(file.read_text())
    if before != settings:
        raise ValueError(
            f"{folder} holds episodes of other settings ({tell_differences(before, settings)}): go on with those, "
            "choose another --out, or remove the folder."
        )
