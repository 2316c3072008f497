"""Open X-Embodiment: which camera is the main one, and how each dataset's actions become OpenVLA's convention.

The convention: deltas of the end effector (x, y, z, roll, pitch, yaw), then the gripper as an absolute command with
1 = open and 0 = closed. Source: the original's `rlds/oxe/{configs,transforms,materialize}.py` and
`rlds/oxe/utils/droid_utils.py`; a name that is not in `STANDARDIZE` is taken as it is. What is odd in the original
stays odd: some datasets give poses rather than deltas, or leave their gripper as it was recorded.

Legend: N steps of an episode.
"""

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

_TABLES = json.loads((Path(__file__).parent / "oxe.json").read_text())
DATASETS, MIXTURES = _TABLES["datasets"], _TABLES["mixtures"]
_RLDS = "_converted_externally_to_rlds"


def image_keys(name: str, available: list[str]) -> list[str]:
    """The dataset's cameras, the main one first; for unknown datasets whatever there is, in the order of the file.

    Raises ValueError for a known dataset that has no main camera, or whose file has none of its cameras.
    """
    if name not in DATASETS:
        return available
    known = DATASETS[name]["images"]
    if not DATASETS[name]["has_primary"]:
        raise ValueError(f"{name} has no main camera, only {known}: OpenVLA would be trained on black images.")
    found = [key for key in known if key in available]
    if not found:
        raise ValueError(f"{name} should have the cameras {known}, but the file has {available}.")
    return found


def mixture_weights(mixture: str) -> dict[str, float]:
    """Weight of each dataset of a mixture. Of datasets listed twice the first entry counts, as in the original.

    Raises KeyError that lists the mixtures.
    """
    if mixture not in MIXTURES:
        raise KeyError(f"Unknown mixture {mixture!r}; known: {sorted(MIXTURES)}.")
    weights = {}
    for name, weight in MIXTURES[mixture]:
        weights.setdefault(name, weight)
    return weights


def mixture_shares(mixture: str) -> dict[str, float]:
    """Share of the steps that each dataset of a mixture contributes: weight × size, normalised.

    Raises KeyError that lists the mixtures, or names datasets whose size is not known.
    """
    weights = mixture_weights(mixture)
    if unsized := [name for name in weights if "steps" not in DATASETS[name]]:
        raise KeyError(f"The sizes of {unsized} are not known.")
    mass = {name: weight * DATASETS[name]["steps"] for name, weight in weights.items()}
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
            return [_text(value) for value in steps[place]]
    raise ValueError(f"has no instruction among {sorted(steps)}")


def _text(value: str | bytes | np.ndarray) -> str:
    """Language-Table writes arrays of character codes, ended by 0."""
    if isinstance(value, np.ndarray):
        return "".join(map(chr, value)).split("\0")[0]
    return value.decode() if isinstance(value, bytes) else str(value)


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


def quaternion_to_euler(quaternion: np.ndarray) -> np.ndarray:
    """`(N, 4)` x, y, z, w -> `(N, 3)` roll, pitch, yaw in rad, for the rotation Rz · Ry · Rx."""
    x, y, z, w = (quaternion / np.linalg.norm(quaternion, axis=1, keepdims=True)).T
    roll = np.arctan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y))
    pitch = np.arcsin(np.clip(2 * (w * y - z * x), -1.0, 1.0))
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return np.stack([roll, pitch, yaw], axis=1)


# --- Datasets: steps -> columns of the action, side by side; (N,) counts as one column -------------------------------
Columns = tuple[np.ndarray, ...]


def _world(steps: dict, gripper: np.ndarray) -> Columns:
    return steps["action/world_vector"], steps["action/rotation_delta"], gripper


def _closedness(steps: dict) -> np.ndarray:
    """`(N,)`, relative or 1 = closed, depending on the dataset."""
    values = steps["action/gripper_closedness_action"]
    return values.reshape(len(values), -1)[:, 0]


def _relative_closedness(steps: dict) -> Columns:
    return _world(steps, relative_to_absolute_gripper(_closedness(steps)))


def _absolute_closedness(steps: dict) -> Columns:
    return _world(steps, invert_gripper(_clip(_closedness(steps))))


def _clip(gripper: np.ndarray) -> np.ndarray:
    return np.clip(gripper, 0.0, 1.0)


def _zeros(steps: dict, count: int) -> np.ndarray:
    return np.zeros((len(steps["action"]), count), dtype=np.float32)


def _bridge(steps: dict, gripper: np.ndarray) -> Columns:
    """Motions are replaced by differences of the states reached, which the last step does not have; the first step,
    all zeros, is dropped."""
    reached = steps["observation/state"][1:, :6].astype(np.float32)
    return reached[1:] - reached[:-1], gripper[1:-1]


def _as_it_is(steps: dict) -> Columns:
    return (steps["action"],)


def _without_last(steps: dict) -> Columns:
    return (steps["action"][:, :-1],)


def _inverted_last(steps: dict) -> Columns:
    return steps["action"][:, :6], invert_gripper(steps["action"][:, -1])


def _closed_last(steps: dict) -> Columns:
    return steps["action"][:, :6], invert_gripper(_clip(steps["action"][:, -1]))


def _binarized_last(steps: dict) -> Columns:
    return steps["action"][:, :6], binarize_gripper(steps["action"][:, -1].astype(np.float32))


def _padded(motion: int) -> Callable[[dict], Columns]:
    """The first `motion` dims of six, then the last one."""
    return lambda steps: (steps["action"][:, :motion], _zeros(steps, 6 - motion), steps["action"][:, -1])


def _pose(gripper: Callable) -> Callable[[dict], Columns]:
    """Position, quaternion, and what `gripper` makes of the action."""
    return lambda steps: (
        steps["action"][:, :3],
        quaternion_to_euler(steps["action"][:, 3:7]),
        gripper(steps["action"]),
    )


def _taco_play(steps: dict) -> Columns:
    actions = steps["action/rel_actions_world"]
    return actions[:, :6], _clip(actions[:, -1])


def _bc_z(steps: dict) -> Columns:
    """Ten future steps are predicted; the first one is kept."""
    motion, turn = steps["action/future/xyz_residual"], steps["action/future/axis_angle_residual"]
    return motion[:, :3], turn[:, :3], invert_gripper(steps["action/future/target_close"][:, 0])


def _droid(steps: dict) -> Columns:
    """Cartesian velocities; the gripper's position is 1 = closed. (For `droid` the original also swaps the two outside
    cameras at random.)"""
    return steps["action_dict/cartesian_velocity"], invert_gripper(steps["action_dict/gripper_position"])


ACTIONS: dict[str, Callable[[dict], Columns]] = {
    "bridge_oxe": lambda steps: _bridge(steps, steps["action/open_gripper"]),
    **dict.fromkeys(("bridge_orig", "bridge_dataset"), lambda steps: _bridge(steps, _binarized_last(steps)[1])),
    **dict.fromkeys(("ppgm", "ppgm_static", "ppgm_wrist"), _binarized_last),
    "fractal20220817_data": _relative_closedness,
    "kuka": _relative_closedness,
    "taco_play": _taco_play,
    "jaco_play": lambda steps: (
        steps["action/world_vector"],
        np.zeros_like(steps["action/world_vector"]),
        relative_to_absolute_gripper(_closedness(steps)),
    ),
    "berkeley_cable_routing": lambda steps: _world(steps, np.zeros(len(steps["action/world_vector"]))),
    "roboturk": _absolute_closedness,
    "nyu_door_opening_surprising_effectiveness": _relative_closedness,
    "viola": _absolute_closedness,
    "berkeley_autolab_ur5": _relative_closedness,
    "toto": lambda steps: _world(steps, steps["action/open_gripper"]),
    "language_table": lambda steps: (steps["action"], _zeros(steps, 4), _zeros(steps, 1) + 1),
    "columbia_cairlab_pusht_real": lambda steps: _world(steps, _closedness(steps)),
    f"stanford_kuka_multimodal_dataset{_RLDS}": _padded(motion=3),
    f"nyu_rot_dataset{_RLDS}": lambda steps: (steps["action"][:, :7],),
    f"stanford_hydra_dataset{_RLDS}": _inverted_last,
    f"austin_buds_dataset{_RLDS}": _closed_last,
    f"nyu_franka_play_dataset{_RLDS}": lambda steps: (steps["action"][:, -8:-2], _clip(steps["action"][:, -2])),
    f"maniskill_dataset{_RLDS}": _as_it_is,
    f"furniture_bench_dataset{_RLDS}": _pose(lambda action: invert_gripper(_clip(action[:, -1]))),
    f"cmu_franka_exploration_dataset{_RLDS}": _without_last,
    f"ucsd_kitchen_dataset{_RLDS}": _without_last,
    f"ucsd_pick_and_place_dataset{_RLDS}": _padded(motion=3),
    f"austin_sailor_dataset{_RLDS}": _closed_last,
    f"austin_sirius_dataset{_RLDS}": _closed_last,
    "bc_z": _bc_z,
    f"utokyo_pr2_opening_fridge{_RLDS}": _without_last,
    f"utokyo_pr2_tabletop_manipulation{_RLDS}": _without_last,
    f"utokyo_xarm_pick_and_place{_RLDS}": _as_it_is,
    f"utokyo_xarm_bimanual{_RLDS}": lambda steps: (steps["action"][:, -7:],),  # the right arm
    "robo_net": _padded(motion=4),
    f"kaist_nonprehensile{_RLDS}": lambda steps: (steps["action"][:, :6], _zeros(steps, 1)),
    f"stanford_mask_vit{_RLDS}": _padded(motion=4),
    f"tokyo_u_lsmo{_RLDS}": _as_it_is,
    f"dlr_sara_pour{_RLDS}": _as_it_is,
    f"dlr_sara_grid_clamp{_RLDS}": _as_it_is,
    f"dlr_edan_shared_control{_RLDS}": _inverted_last,
    f"asu_table_top{_RLDS}": _as_it_is,
    f"stanford_robocook{_RLDS}": _as_it_is,
    "imperialcollege_sawyer_wrist_cam": _without_last,
    f"iamlab_cmu_pickup_insert{_RLDS}": _pose(lambda action: action[:, 7]),
    "uiuc_d3field": lambda steps: (steps["action"], _zeros(steps, 4)),
    "utaustin_mutex": _closed_last,
    "berkeley_fanuc_manipulation": lambda steps: (
        steps["action"],
        invert_gripper(steps["observation/state"][:, 6]),
    ),
    "cmu_playing_with_food": _pose(lambda action: action[:, -1]),
    "cmu_play_fusion": lambda steps: (steps["action"][:, :3], steps["action"][:, -4:]),
    "cmu_stretch": _without_last,
    **{
        f"berkeley_gnm_{place}": lambda steps: (steps["action"], _zeros(steps, 5))
        for place in ("recon", "cory_hall", "sac_son")
    },
    "droid": _droid,
    "droid_wipe": _droid,
    "fmb_dataset": _as_it_is,
    "dobbe": _as_it_is,
    "rh20t": lambda steps: (steps["action/tcp_base"], steps["action/gripper"]),
    **{name: _binarized_last for name in DATASETS if name.startswith("tdroid_")},
    **{f"libero_{suite}_no_noops": _closed_last for suite in ("spatial", "object", "goal", "10")},
}


def _standardize(name: str, steps: dict) -> Trajectory:
    """Actions as `ACTIONS` says, state as the tables say.

    Raises ValueError if the original refuses the dataset, or if the file is not what its name promises.
    """
    if name in DATASETS and DATASETS[name]["action_encoding"] == "JOINT_POS":
        raise ValueError(f"{name} has joint positions; OpenVLA trains on end-effector actions")
    try:
        actions = np.concatenate([_column(part) for part in ACTIONS[name](steps)], axis=1)
    except KeyError as error:
        raise ValueError(f"has no {error}, which {name} should have, only {sorted(steps)}") from error
    if actions.shape[1] != 7:
        raise ValueError(f"gives {actions.shape[1]} action dims when read as {name}, expected 7")
    kept = slice(1, -1) if name.startswith("bridge_") else slice(None)  # see _bridge
    instructions = _instructions(steps)
    state = _known_state(name, steps, len(instructions))
    return Trajectory(actions, None if state is None else state[kept], instructions[kept], first_step=kept.start or 0)


def _known_state(name: str, steps: dict, length: int) -> np.ndarray | None:
    """`(N, columns)` in the original's layout, or None if the file lacks a part: not every policy takes the state.

    LIBERO stays as it is: the original would put a zero between pose and fingers (9 columns, which nothing was trained
    on), OpenVLA-OFT takes the 8 of the file.
    """
    if "state" not in DATASETS.get(name, {}):
        return _state(steps)
    columns = []
    for part in DATASETS[name]["state"]:
        if isinstance(part, int):
            columns.append(np.zeros((length, part), dtype=np.float32))
            continue
        key, start, stop = re.fullmatch(r"([^[]+)(?:\[(-?\d*):(-?\d*)\])?", part).groups()
        values = steps.get(f"observation/{key}", steps.get(key))
        if values is None:
            return None
        columns.append(_column(values)[:, slice(int(start) if start else None, int(stop) if stop else None)])
    return np.concatenate(columns, axis=1)


def _column(values: np.ndarray | list[bytes]) -> np.ndarray:
    """`(N,)`, `(N, …)` or, in Kuka, N times ZLIB-compressed float32 -> `(N, columns)` float32."""
    if isinstance(values, list):
        try:
            values = np.stack([np.frombuffer(zlib.decompress(value), "<f4") for value in values])
        except zlib.error as error:
            raise ValueError(f"has bytes that are not ZLIB-compressed numbers: {error}") from error
    return np.asarray(values, dtype=np.float32).reshape(len(values), -1)


STANDARDIZE: dict[str, Callable[[dict], Trajectory]] = {
    name: partial(_standardize, name) for name in {**ACTIONS, **DATASETS}
}
