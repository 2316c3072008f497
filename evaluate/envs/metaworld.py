"""Meta-World's fifty tasks (MT50; Yu et al. 2019, arXiv:1910.10897; packages 3.0.0 and 3.1.1): a Sawyer arm, xyz only.

Nobody has published an OpenVLA policy for them, so there is no evaluation to reproduce; what was chosen instead:

- Episode N is the N-th of the fifty placements of Meta-World's own benchmark `MT1(task, seed=0)`.
- The gripper of a policy is 1 = open, 0 = closed; Meta-World's is a force from -1 = open to +1 = closed. It is not
  rounded: Meta-World's experts close with 0.1 to 1 of the force. With all of it the tasks they solve fall from 0.98 to
  0.87, and to none of assembly, basketball, pick-out-of-hole and peg-unplug-side.
- The corner cameras hang upside down; their pictures are turned by 180 degrees, which makes them upright and not
  mirrored. "corner4", the main one, is Meta-World 3.1's: corner2 moved to where objects are twice as large.
- No JPEG before the resize: it imitates how the published datasets were stored, and there is none for these tasks.
- Goals that are not an object's own end (a closed drawer, a pressed button) are shown by a small coloured sphere, as
  Meta-World renders it: 7 to 110 pixels of corner4's picture. At the start the arm can hide it: in `hand-insert` in 2
  of 10 placements, in `pick-out-of-hole` in 1. The place beside the table to which `sweep` sweeps has none. In
  `plate-slide-side` and `plate-slide-back` the sphere moves from placement to placement, and the net does not.
"""

import functools

import numpy as np

from openvla.evaluate.envs import Conventions, Stopwatch, render_off_screen
from openvla.tf_image_ops import lanczos3_resize

# In MT50's order. Scenes repeat (faucet-open and -close, push and pick-place …), so the words must tell them apart.
INSTRUCTIONS = {
    "assembly-v3": "put the ring of the wrench over the peg",
    "basketball-v3": "put the basketball into the hoop",
    "bin-picking-v3": "move the cube from the red bin into the blue bin",
    "box-close-v3": "put the lid onto the box",
    "button-press-topdown-v3": "press the button down from above",
    "button-press-topdown-wall-v3": "reach over the wall and press the button down from above",
    "button-press-v3": "press the button from the front",
    "button-press-wall-v3": "reach over the wall and press the button from the front",
    "coffee-button-v3": "press the button of the coffee machine",
    "coffee-pull-v3": "pull the mug away from the coffee machine to the goal",
    "coffee-push-v3": "push the mug under the coffee machine",
    "dial-turn-v3": "turn the dial by half a turn",
    "disassemble-v3": "take the ring of the wrench off the peg",
    "door-close-v3": "close the door",
    "door-lock-v3": "lock the door by turning the lock clockwise",
    "door-open-v3": "open the door",
    "door-unlock-v3": "unlock the door by turning the lock counterclockwise",
    "hand-insert-v3": "put the block into the hole in the table",
    "drawer-close-v3": "close the drawer",
    "drawer-open-v3": "open the drawer",
    "faucet-open-v3": "open the faucet by turning it counterclockwise",
    "faucet-close-v3": "close the faucet by turning it clockwise",
    "hammer-v3": "drive the nail into the box with the hammer",
    "handle-press-side-v3": "press the handle down from the side",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the handle up from the side",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "pull the lever up",
    "pick-place-wall-v3": "pick up the puck and carry it over the wall to the goal",
    "pick-out-of-hole-v3": "pick the puck out of the hole and lift it to the goal",
    "pick-place-v3": "pick up the puck and carry it to the goal",
    "plate-slide-v3": "slide the plate forward into the net",
    "plate-slide-side-v3": "slide the plate sideways into the net",
    "plate-slide-back-v3": "slide the plate back out of the net to the goal",
    "plate-slide-back-side-v3": "slide the plate sideways out of the net to the goal",
    "peg-insert-side-v3": "insert the peg into the hole from the side",
    "peg-unplug-side-v3": "pull the peg out of the hole sideways",
    "soccer-v3": "push the soccer ball into the net",
    "stick-push-v3": "take the stick and push the thermos to the goal with it",
    "stick-pull-v3": "take the stick and pull the thermos to the goal with it",
    "push-v3": "push the puck to the goal",
    "push-wall-v3": "push the puck around the wall to the goal",
    "push-back-v3": "pull the block back to the goal",
    "reach-v3": "reach the goal with the gripper",
    "reach-wall-v3": "reach over the wall to the goal with the gripper",
    "shelf-place-v3": "put the block onto the shelf",
    "sweep-into-v3": "sweep the block into the hole in the table",
    "sweep-v3": "sweep the block off the table",
    "window-open-v3": "slide the window open",
    "window-close-v3": "slide the window closed",
}
TASKS = tuple(INSTRUCTIONS)
CORNER4 = (0.75, 0.075, 0.7)  # metres; the rest is corner2's
UPSIDE_DOWN = ("corner4", "corner2", "corner3", "corner")
CONVENTIONS = Conventions(
    action_dims=(("x", "1 = 0.01 m"), ("y", "1 = 0.01 m"), ("z", "1 = 0.01 m"), ("gripper", "1 = open")),
    action_range=((-1.0, 1.0),) * 3 + ((0.0, 1.0),),
    control_frequency=80.0,
    cameras=(*UPSIDE_DOWN, "topview", "behindGripper", "gripperPOV"),
    proprio_dim=4,
)
BENCHMARK_SEED, MAX_STEPS = 0, 500
RENDER_SIZE, IMAGE_SIZE = 256, 224
RENDERERS = ("official", "fast")


def list_tasks(suite: str) -> list[str]:
    """The fifty instructions, in the order of MT50; Meta-World itself has names only."""
    return list(INSTRUCTIONS.values())


def max_steps(suite: str) -> int:
    """Meta-World's own limit, 6.25 s."""
    return MAX_STEPS


def open_env(suite: str, task: int, **options) -> "MetaWorldEnv":
    return MetaWorldEnv(suite, task, **options)


class MetaWorldEnv:
    """One task of Meta-World. Takes half a second to make and again for the first picture, 0.5 ms per step.

    Args:
        suite: "metaworld".
        task: its number in `TASKS`.
        cameras: of `CONVENTIONS.cameras`, in the order in which the policy wants them.
        renderer: "official", bit-equal to the simulator's own; or "fast", without antialiasing and reflections, with
            coarse shadows: a quarter of the time without a GPU, and pictures that differ by 1 of 255 in the mean.
    """

    def __init__(
        self, suite: str, task: int, cameras: list[str] | tuple[str, ...] = ("corner4",), renderer="official"
    ):
        if unknown := [camera for camera in cameras if camera not in CONVENTIONS.cameras]:
            raise ValueError(f"Meta-World has no cameras {unknown}; it has {list(CONVENTIONS.cameras)}.")
        if renderer not in RENDERERS:
            raise ValueError(f"renderer must be one of {RENDERERS}, got {renderer!r}.")
        self.suite, self.task, self.cameras, self.renderer = suite, task, list(cameras), renderer
        self.conventions = CONVENTIONS
        self.max_steps = max_steps(suite)
        self.instruction = INSTRUCTIONS[TASKS[task]]
        self.stopwatch = Stopwatch()
        simulator_class, placements = _benchmark(TASKS[task])
        self.simulator = simulator_class()
        self.simulator.set_task(placements[0])  # once: it also shows the goal to the expert
        self.simulator.max_path_length = 10**9  # the limit of steps is ours
        self.placements = [self._placement(placement) for placement in placements]
        self._pictures = None
        self._recent = np.zeros(0)  # what Meta-World calls an observation, `(39,)`

    @property
    def num_episodes(self) -> int:
        """Placements of the benchmark; beyond them there are random ones."""
        return len(self.placements)

    def reset(self, episode: int, state: np.ndarray | None = None, randomize: bool = False) -> None:
        """Puts the scene into an initial state.

        Args:
            episode: number of the benchmark's placement of objects and goal.
            state: `get_state()` of this task to continue from instead; it has its placement in it.
            randomize: place objects and goal at random, by the task's own rules; `episode` is the seed then.
        """
        if not randomize and not 0 <= episode < self.num_episodes:
            raise ValueError(
                f"{self.suite} task {self.task} has placements 0 to {self.num_episodes - 1}, got {episode}; others "
                "are random ones."
            )
        with self.stopwatch.measure("physics"):
            if state is not None:
                self._restore(np.asarray(state, dtype=np.float64))
            else:
                self._place(self._random_placement(episode) if randomize else self.placements[episode])

    def step(self, action: np.ndarray) -> bool:
        """One control step of 12.5 ms.

        Args:
            action: `(4,)`: x y z in [-1, 1], 1 = 1 cm, and the gripper's force in [0, 1]: 1 opens and 0 closes with
                all of it, 0.5 is none. Clipped.

        Returns whether the task is done.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"Expected 4 finite numbers as an action, got {action.tolist()}.")
        with self.stopwatch.measure("physics"):
            command = np.clip(np.append(action[:3], 1.0 - 2.0 * action[3]), -1.0, 1.0)
            self._recent, _, _, _, info = self.simulator.step(command)
            if unstable := self.data.warning.number[_unstable()].sum():
                raise RuntimeError(
                    f"The simulation of {TASKS[self.task]} became unstable {unstable} times and MuJoCo started it "
                    "anew: this episode says nothing about the policy."
                )
            return bool(info["success"] == 1.0)

    def observe(self) -> dict:
        """What a policy gets: `images` (per camera `(224, 224, 3)` uint8), `proprio` `(4,)`, `instruction`."""
        images = {camera: self.prepare(self.render(camera)) for camera in self.cameras}
        return {"images": images, "proprio": self.proprio(), "instruction": self.instruction}

    def render(self, camera: str) -> np.ndarray:
        """The scene now, `(256, 256, 3)` uint8, upright."""
        with self.stopwatch.measure("render"):
            if self._pictures is None:
                self._pictures = _Pictures(self.model, self.renderer)
            return self._pictures.render(self.data, camera)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """A rendered picture as a policy gets it: by TensorFlow's Lanczos3 to 224."""
        with self.stopwatch.measure("render"):
            return lanczos3_resize(image, IMAGE_SIZE, IMAGE_SIZE)

    def proprio(self) -> np.ndarray:
        """`(4,)`: the hand's position (m), and how far the fingers are apart (1 = 0.1 m)."""
        return self._recent[:4].copy()

    def get_state(self) -> np.ndarray:
        """Placement, Meta-World's observation and all that MuJoCo integrates, flat float64."""
        return np.concatenate([self.simulator._last_rand_vec, self._recent, self._get_physics()])

    def expert(self, seed: int = 0, noise: float = 0.0):
        """Meta-World's scripted expert for this task from the present state on; see `experts/metaworld.py`."""
        from openvla.evaluate.experts.metaworld import MetaWorldExpert

        return MetaWorldExpert(TASKS[self.task], lambda: self._recent, np.random.default_rng(seed), noise)

    @property
    def model(self):
        """The `mujoco.MjModel`."""
        return self.simulator.model

    @property
    def data(self):
        """The `mujoco.MjData`."""
        return self.simulator.data

    def close(self) -> None:
        if self._pictures is not None:
            self._pictures.close()
        self._pictures = None
        self.simulator.close()

    def _placement(self, placement) -> np.ndarray:
        self.simulator.set_task(placement)
        return np.array(self.simulator._last_rand_vec)

    def _random_placement(self, seed: int) -> np.ndarray:
        simulator = self.simulator
        simulator._freeze_rand_vec, simulator.seeded_rand_vec = False, True
        simulator.seed(10_000 + seed)
        simulator.reset()
        return np.array(simulator._last_rand_vec)

    def _place(self, placement: np.ndarray) -> None:
        self.simulator._freeze_rand_vec, self.simulator._last_rand_vec = True, placement.copy()
        self._recent, _ = self.simulator.reset()
        self._set_physics(self._get_physics())  # Meta-World moves the goal's sphere last, and does not look again

    def _restore(self, state: np.ndarray) -> None:
        sizes = np.cumsum([len(self.placements[0]), self.simulator.observation_space.shape[0]])
        expected = sizes[-1] + len(self._get_physics())
        if state.shape != (expected,):
            raise ValueError(
                f"Expected {expected} numbers as a state of {TASKS[self.task]}, got {state.shape}. Is it of another "
                "task?"
            )
        placement, recent, physics = np.split(state, sizes)
        self._place(placement)
        self._set_physics(physics)
        self._recent, self.simulator._prev_obs = recent.copy(), recent[:18].copy()

    def _get_physics(self) -> np.ndarray:
        import mujoco

        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.empty(mujoco.mj_stateSize(self.model, kind))
        mujoco.mj_getState(self.model, self.data, physics, kind)
        return physics

    def _set_physics(self, physics: np.ndarray) -> None:
        import mujoco

        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        mujoco.mj_setState(self.model, self.data, physics, kind)
        mujoco.mj_forward(self.model, self.data)  # what follows from it: where everything is
        mujoco.mj_setState(self.model, self.data, physics, kind)  # MuJoCo 3.3.0 warms its solver up in between


class _Pictures:
    """Renders with MuJoCo alone: the same pictures as Meta-World's renderer, with less around them."""

    def __init__(self, model, renderer: str):
        import mujoco

        fast = renderer == "fast"
        if fast:
            model.vis.quality.offsamples = 0  # read when the context is made
            model.vis.quality.shadowsize = 512  # without shadows pictures would be brighter by 8 of 255
        self._renderer = mujoco.Renderer(model, RENDER_SIZE, RENDER_SIZE)
        self._corner2 = model.camera("corner2").id
        flags = mujoco.mjtRndFlag
        self._switched_off = (flags.mjRND_REFLECTION,) if fast else ()

    def render(self, data, camera: str) -> np.ndarray:
        place = data.cam_xpos[self._corner2].copy()
        if camera == "corner4":  # not in the models of Meta-World 3.0
            data.cam_xpos[self._corner2] = CORNER4
        self._renderer.update_scene(data, camera="corner2" if camera == "corner4" else camera)
        data.cam_xpos[self._corner2] = place
        for flag in self._switched_off:  # the scene's update switches them on again
            self._renderer.scene.flags[flag] = 0
        image = self._renderer.render()
        return np.ascontiguousarray(image[::-1, ::-1] if camera in UPSIDE_DOWN else image)

    def close(self) -> None:
        self._renderer.close()


@functools.cache
def _benchmark(name: str) -> tuple[type, list]:
    """The simulator's class and the benchmark's placements; takes 0.7 s."""
    benchmark = _import_metaworld().MT1(name, seed=BENCHMARK_SEED)
    return benchmark.train_classes[name], benchmark.train_tasks


@functools.cache
def _unstable() -> list[int]:
    """MuJoCo's warnings after which it has put the state back to the model's default."""
    import mujoco

    kinds = mujoco.mjtWarning
    return [int(kind) for kind in (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC)]


@functools.cache
def _import_metaworld():
    """Meta-World; rendering off screen is set up before anything imports OpenGL."""
    render_off_screen()
    try:
        import metaworld
    except ImportError as error:
        raise ImportError(f"Meta-World is not installed ({error}): pip install 'openvla[sim]'.") from error
    return metaworld
