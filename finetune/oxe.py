"""Open X-Embodiment: which camera is the main one, and how each dataset's actions become OpenVLA's convention.

The convention: deltas of the end effector (x, y, z, roll, pitch, yaw), then the gripper as an absolute command with
1 = open and 0 = closed. Source: the original's `rlds/oxe/{configs,transforms}.py`; a name that is not in `STANDARDIZE`
is taken as it is.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_TABLES = json.loads((Path(__file__).parent / "oxe.json").read_text())
DATASETS, MIXTURES = _TABLES["datasets"], _TABLES["mixtures"]
_RLDS = "_dataset_converted_externally_to_rlds"


def image_keys(name: str, available: list[str]) -> list[str]:
    """The dataset's cameras, the main one first; for unknown datasets whatever there is, in the order of the file."""
    known = DATASETS[name]["images"] if name in DATASETS else []
    return [key for key in known if key in available] or available


def mixture_shares(mixture: str) -> dict[str, float]:
    """Share of the steps that each dataset of a mixture contributes: weight × size, normalised.

    Raises KeyError that lists the mixtures, or names datasets whose size is not known.
    """
    if mixture not in MIXTURES:
        raise KeyError(f"Unknown mixture {mixture!r}; known: {sorted(MIXTURES)}.")
    if unsized := [name for name, _ in MIXTURES[mixture] if "steps" not in DATASETS[name]]:
        raise KeyError(f"The sizes of {unsized} are not known.")
    mass = {name: weight * DATASETS[name]["steps"] for name, weight in MIXTURES[mixture]}
    return {name: value / sum(mass.values()) for name, value in mass.items()}


@dataclass
class Trajectory:
    """What training needs of an episode, step by step; `first_step` is how many steps were dropped at its start."""

    actions: np.ndarray
    proprio: np.ndarray | None
    instructions: list[str]
    first_step: int = 0

    @classmethod
    def from_steps(cls, steps: dict) -> "Trajectory":
        """Takes `action` and `observation/state` as they are."""
        if not isinstance(steps.get("action"), np.ndarray):
            keys = sorted(key for key in steps if key.startswith("action"))
            raise ValueError(f"has no array 'action' (only {keys}), and its dataset's convention is not known")
        actions = steps["action"].astype(np.float32)
        return cls(actions, _state(steps), _instructions(steps))


def _state(steps: dict) -> np.ndarray | None:
    state = steps.get("observation/state")
    return state.astype(np.float32) if isinstance(state, np.ndarray) and state.ndim == 2 else None


def _instructions(steps: dict) -> list[str]:
    for place in ("language_instruction", "observation/natural_language_instruction", "observation/instruction"):
        if place in steps:
            return [text.decode() if isinstance(text, bytes) else str(text) for text in steps[place]]
    raise ValueError(f"has no instruction among {sorted(steps)}")


# --- Grippers: (N,) -> (N,), 1 = open --------------------------------------------------------------------------------
def binarize_gripper(gripper: np.ndarray) -> np.ndarray:
    """Above 0.95 open, below 0.05 closed; in between, whatever the next settled step is (the raw value if none)."""
    result, settled = np.empty_like(gripper), gripper[-1]
    for step in range(len(gripper) - 1, -1, -1):
        if gripper[step] > 0.95 or gripper[step] < 0.05:
            settled = float(gripper[step] > 0.95)
        result[step] = settled
    return result


def relative_to_absolute_gripper(gripper: np.ndarray) -> np.ndarray:
    """+1 closes, -1 opens, 0 keeps: the state since the last command; before the first one, its opposite."""
    command = np.where(gripper < -0.1, 1, np.where(gripper > 0.1, -1, 0))
    moves = np.flatnonzero(command)
    state = -command[moves[0]] if len(moves) else 1
    result = np.empty(len(gripper), dtype=np.float32)
    for step, move in enumerate(command):
        state = move or state
        result[step] = state / 2 + 0.5
    return result


def invert_gripper(gripper: np.ndarray) -> np.ndarray:
    """1 = closed -> 1 = open."""
    return 1.0 - gripper


# --- Datasets --------------------------------------------------------------------------------------------------------
def standardize_bridge(steps: dict) -> Trajectory:
    """Drops the first step (all zeros), binarises the gripper, and replaces motions by the differences of the states
    reached, which the last step does not have."""
    actions, state = steps["action"][1:].astype(np.float32), steps["observation/state"][1:].astype(np.float32)
    gripper = binarize_gripper(actions[:, 6])
    reached = state[1:, :6] - state[:-1, :6]
    instructions = _instructions(steps)[1:-1]
    return Trajectory(np.concatenate([reached, gripper[:-1, None]], axis=1), state[:-1], instructions, first_step=1)


def _world_deltas(steps: dict, gripper: np.ndarray, rotation: bool = True) -> Trajectory:
    """World vector, rotation delta (or zeros) and a gripper `(N,)` that is already absolute."""
    motion = steps["action/world_vector"]
    turn = steps["action/rotation_delta"] if rotation else np.zeros_like(motion)
    return _trajectory(steps, motion, turn, gripper)


def _trajectory(steps: dict, *parts: np.ndarray) -> Trajectory:
    """Columns of the action, side by side; `(N,)` counts as one column."""
    columns = [np.asarray(part, dtype=np.float32).reshape(len(part), -1) for part in parts]
    return Trajectory(np.concatenate(columns, axis=1), _state(steps), _instructions(steps))


def _closedness(steps: dict) -> np.ndarray:
    """`(N,)`, relative or 1 = closed, depending on the dataset."""
    values = steps["action/gripper_closedness_action"]
    return values.reshape(len(values), -1)[:, 0]


def _clip(gripper: np.ndarray) -> np.ndarray:
    return np.clip(gripper, 0.0, 1.0)


def quaternion_to_euler(quaternion: np.ndarray) -> np.ndarray:
    """`(N, 4)` x, y, z, w -> `(N, 3)` roll, pitch, yaw in rad, for the rotation Rz · Ry · Rx."""
    x, y, z, w = (quaternion / np.linalg.norm(quaternion, axis=1, keepdims=True)).T
    roll = np.arctan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y))
    pitch = np.arcsin(np.clip(2 * (w * y - z * x), -1.0, 1.0))
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return np.stack([roll, pitch, yaw], axis=1)


def standardize_language_table(steps: dict) -> Trajectory:
    """Two dims in the plane; the instruction is an array of character codes, ended by 0."""
    actions = np.zeros((len(steps["action"]), 7), dtype=np.float32)
    actions[:, :2], actions[:, 6] = steps["action"], 1.0
    codes = steps["observation/instruction"]
    instructions = ["".join(map(chr, row[: list(row).index(0)] if 0 in row else row)) for row in codes]
    return Trajectory(actions, _state(steps), instructions)


def _relative_gripper(steps: dict) -> Trajectory:
    return _world_deltas(steps, relative_to_absolute_gripper(_closedness(steps)))


def _closed_gripper(steps: dict) -> Trajectory:
    return _world_deltas(steps, invert_gripper(_clip(_closedness(steps))))


def _closed_last(steps: dict) -> Trajectory:
    a = steps["action"]
    return _trajectory(steps, a[:, :6], invert_gripper(_clip(a[:, -1])))


def _inverted_last(steps: dict) -> Trajectory:
    a = steps["action"]
    return _trajectory(steps, a[:, :6], invert_gripper(a[:, -1]))


def _without_last(steps: dict) -> Trajectory:
    return _trajectory(steps, steps["action"][:, :-1])


def _quaternion_then(gripper: Callable) -> Callable[[dict], Trajectory]:
    def standardize(steps: dict) -> Trajectory:
        a = steps["action"]
        return _trajectory(steps, a[:, :3], quaternion_to_euler(a[:, 3:7]), gripper(a))

    return standardize


def standardize_bc_z(steps: dict) -> Trajectory:
    """Ten future steps are predicted; the first one is kept."""
    motion, turn = steps["action/future/xyz_residual"][:, :3], steps["action/future/axis_angle_residual"][:, :3]
    return _trajectory(
        steps, motion, turn, invert_gripper(steps["action/future/target_close"][:, :1].astype(np.float32))
    )


def standardize_droid(steps: dict) -> Trajectory:
    """Cartesian velocities; the gripper's position is 1 = closed. (The original also swaps the two outside cameras at
    random.)"""
    gripper = steps["action_dict/gripper_position"].reshape(-1)
    return _trajectory(steps, steps["action_dict/cartesian_velocity"], invert_gripper(gripper))


STANDARDIZE = {
    "bridge_orig": standardize_bridge,
    "bridge_dataset": standardize_bridge,
    "fractal20220817_data": _relative_gripper,
    "kuka": _relative_gripper,
    "taco_play": lambda steps: _trajectory(
        steps, steps["action/rel_actions_world"][:, :6], _clip(steps["action/rel_actions_world"][:, 6])
    ),
    "jaco_play": lambda steps: _world_deltas(steps, relative_to_absolute_gripper(_closedness(steps)), rotation=False),
    "berkeley_cable_routing": lambda steps: _world_deltas(steps, np.zeros(len(steps["action/world_vector"]))),
    "roboturk": _closed_gripper,
    "viola": _closed_gripper,
    "berkeley_autolab_ur5": _relative_gripper,
    "toto": lambda steps: _world_deltas(steps, steps["action/open_gripper"].reshape(-1)),
    "language_table": standardize_language_table,
    f"stanford_hydra{_RLDS}": _inverted_last,
    f"austin_buds{_RLDS}": _closed_last,
    f"nyu_franka_play{_RLDS}": lambda steps: _trajectory(
        steps, steps["action"][:, -8:-2], _clip(steps["action"][:, -2])
    ),
    f"furniture_bench{_RLDS}": _quaternion_then(lambda a: invert_gripper(_clip(a[:, -1]))),
    f"ucsd_kitchen{_RLDS}": _without_last,
    f"austin_sailor{_RLDS}": _closed_last,
    f"austin_sirius{_RLDS}": _closed_last,
    f"dlr_edan_shared_control{_RLDS.removeprefix('_dataset')}": _inverted_last,
    f"iamlab_cmu_pickup_insert{_RLDS.removeprefix('_dataset')}": _quaternion_then(lambda a: a[:, 7]),
    "utaustin_mutex": _closed_last,
    "berkeley_fanuc_manipulation": lambda steps: _trajectory(
        steps, steps["action"], invert_gripper(steps["observation/state"][:, 6])
    ),
    "cmu_stretch": _without_last,
    "bc_z": standardize_bc_z,
    "fmb_dataset": Trajectory.from_steps,
    "dobbe": Trajectory.from_steps,
    "droid": standardize_droid,
    **{f"libero_{suite}_no_noops": _closed_last for suite in ("spatial", "object", "goal", "10")},
}
