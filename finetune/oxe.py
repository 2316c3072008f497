"""Open X-Embodiment: which camera is the main one, and how each dataset's actions become OpenVLA's convention.

The convention: deltas of the end effector (x, y, z, roll, pitch, yaw), then the gripper as an absolute command with
1 = open and 0 = closed. Source: the original's `rlds/oxe/{configs,transforms}.py`; a name that is not in `STANDARDIZE`
is taken as it is.
"""

from dataclasses import dataclass

import numpy as np

# name -> image keys, the main camera first
_IMAGE_KEYS = {
    "bridge_orig": ["image_0", "image_1", "image_2", "image_3"],
    "bridge_dataset": ["image_0", "image_1", "image_2", "image_3"],
    "fractal20220817_data": ["image"],
}
_IMAGE_KEYS |= {f"libero_{suite}_no_noops": ["image", "wrist_image"] for suite in ("spatial", "object", "goal", "10")}


def image_keys(name: str, available: list[str]) -> list[str]:
    """The dataset's cameras, the main one first; for unknown datasets whatever there is, in the order of the file."""
    return [key for key in _IMAGE_KEYS.get(name, available) if key in available]


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
    for place in ("language_instruction", "observation/natural_language_instruction"):
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


def standardize_fractal(steps: dict) -> Trajectory:
    """RT-1's robot: gripper commands are relative, +1 closes."""
    gripper = relative_to_absolute_gripper(steps["action/gripper_closedness_action"][:, 0])
    parts = [steps["action/world_vector"], steps["action/rotation_delta"], gripper[:, None]]
    actions = np.concatenate(parts, axis=1).astype(np.float32)
    return Trajectory(actions, None, _instructions(steps))


def standardize_libero(steps: dict) -> Trajectory:
    """LIBERO's gripper is -1 open, +1 closed."""
    actions = steps["action"].astype(np.float32)
    gripper = invert_gripper(np.clip(actions[:, 6:], 0.0, 1.0))
    actions = np.concatenate([actions[:, :6], gripper], axis=1)
    return Trajectory(actions, _state(steps), _instructions(steps))


STANDARDIZE = {
    "bridge_orig": standardize_bridge,
    "bridge_dataset": standardize_bridge,
    "fractal20220817_data": standardize_fractal,
}
STANDARDIZE |= {f"libero_{suite}_no_noops": standardize_libero for suite in ("spatial", "object", "goal", "10")}
