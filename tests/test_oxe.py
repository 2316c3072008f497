"""Every dataset of OpenVLA's mixture, by hand: raw steps in, seven numbers out."""

import numpy as np
import pytest

from openvla.finetune.oxe import (
    DATASETS,
    MIXTURES,
    STANDARDIZE,
    binarize_gripper,
    image_keys,
    mixture_shares,
    quaternion_to_euler,
    relative_to_absolute_gripper,
    standardize_bridge,
)

RLDS = "_converted_externally_to_rlds"
WORLD = {"action/world_vector": [[1, 2, 3]] * 3, "action/rotation_delta": [[4, 5, 6]] * 3}
CLOSE_AT_1 = {"action/gripper_closedness_action": [[0], [1], [0]]}  # relative: open, closed, closed
FLAT = {"action": [[1, 2, 3, 4, 5, 6, g] for g in (-1.0, 0.25, 2.0)]}
HALF_TURN = [0, 0, 1, 0]  # about z; x, y, z, w


def rows(gripper, motion=(1, 2, 3, 4, 5, 6)) -> list[list[float]]:
    return [[*motion, value] for value in gripper]


# dataset -> (raw steps, expected actions)
CASES = {
    "fractal20220817_data": ({**WORLD, **CLOSE_AT_1}, rows([1, 0, 0])),
    "kuka": ({**WORLD, **CLOSE_AT_1}, rows([1, 0, 0])),
    "berkeley_autolab_ur5": (
        {**WORLD, "action/gripper_closedness_action": [0, 1, 0]},
        rows([1, 0, 0]),
    ),
    "jaco_play": ({**WORLD, **CLOSE_AT_1}, rows([1, 0, 0], (1, 2, 3, 0, 0, 0))),
    "taco_play": ({"action/rel_actions_world": FLAT["action"]}, rows([0, 0.25, 1])),
    "berkeley_cable_routing": (WORLD, rows([0, 0, 0])),
    "roboturk": ({**WORLD, "action/gripper_closedness_action": [[-1], [0.25], [2]]}, rows([1, 0.75, 0])),
    "viola": ({**WORLD, "action/gripper_closedness_action": [-1, 0.25, 2]}, rows([1, 0.75, 0])),
    "toto": ({**WORLD, "action/open_gripper": [[True], [False], [True]]}, rows([1, 0, 1])),
    f"stanford_hydra_dataset{RLDS}": (FLAT, rows([2, 0.75, -1])),
    f"dlr_edan_shared_control{RLDS}": (FLAT, rows([2, 0.75, -1])),
    f"austin_buds_dataset{RLDS}": (FLAT, rows([1, 0.75, 0])),
    f"austin_sailor_dataset{RLDS}": (FLAT, rows([1, 0.75, 0])),
    f"austin_sirius_dataset{RLDS}": (FLAT, rows([1, 0.75, 0])),
    "utaustin_mutex": (FLAT, rows([1, 0.75, 0])),
    "libero_spatial_no_noops": (FLAT, rows([1, 0.75, 0])),
    f"nyu_franka_play_dataset{RLDS}": (
        {"action": [[9] * 7 + [1, 2, 3, 4, 5, 6, g, 9] for g in (-1, 0.25, 2)]},
        rows([0, 0.25, 1]),
    ),
    f"furniture_bench_dataset{RLDS}": (
        {"action": [[1, 2, 3, *HALF_TURN, g] for g in (-1, 0.25, 2)]},
        rows([1, 0.75, 0], (1, 2, 3, 0, 0, np.pi)),
    ),
    f"iamlab_cmu_pickup_insert{RLDS}": (
        {"action": [[1, 2, 3, *HALF_TURN, g] for g in (-1, 0.25, 2)]},
        rows([-1, 0.25, 2], (1, 2, 3, 0, 0, np.pi)),
    ),
    f"ucsd_kitchen_dataset{RLDS}": ({"action": [[*row, 9] for row in FLAT["action"]]}, rows([-1, 0.25, 2])),
    "cmu_stretch": ({"action": [[*row, 9] for row in FLAT["action"]]}, rows([-1, 0.25, 2])),
    "berkeley_fanuc_manipulation": (
        {"action": [[1, 2, 3, 4, 5, 6]] * 3, "observation/state": [[0] * 6 + [g] for g in (0, 1, 0.25)]},
        rows([1, 0, 0.75]),
    ),
    "bc_z": (
        {
            "action/future/xyz_residual": [[1, 2, 3] + [9] * 27] * 3,
            "action/future/axis_angle_residual": [[4, 5, 6] + [9] * 27] * 3,
            "action/future/target_close": [[0] + [1] * 9, [1] * 10, [0] * 10],
        },
        rows([1, 0, 1]),
    ),
    "fmb_dataset": (FLAT, rows([-1, 0.25, 2])),
    "dobbe": (FLAT, rows([-1, 0.25, 2])),
    "droid": (
        {
            "action_dict/cartesian_velocity": [[1, 2, 3, 4, 5, 6]] * 3,
            "action_dict/gripper_position": [[0], [1], [0.25]],
        },
        rows([1, 0, 0.75]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_actions_by_hand(name):
    raw, expected = CASES[name]
    steps = {key: np.array(value) for key, value in raw.items()} | {"language_instruction": ["go"] * 3}
    trajectory = STANDARDIZE[name](steps)
    np.testing.assert_allclose(trajectory.actions, expected, atol=1e-6)
    assert trajectory.actions.dtype == np.float32 and trajectory.instructions == ["go"] * 3


def test_language_table_by_hand():
    codes = np.zeros((2, 6), dtype=np.int32)
    codes[:, :2] = [ord("g"), ord("o")]
    trajectory = STANDARDIZE["language_table"](
        {"action": np.array([[1, 2], [3, 4]]), "observation/instruction": codes}
    )
    assert trajectory.actions.tolist() == [[1, 2, 0, 0, 0, 0, 1], [3, 4, 0, 0, 0, 0, 1]]
    assert trajectory.instructions == ["go", "go"]


def test_bridge_by_hand():
    steps = {
        "action": np.array([[0] * 7, [9] * 6 + [1.0], [9] * 6 + [0.5], [9] * 6 + [0.0]], dtype=np.float32),
        "observation/state": np.outer([5, 10, 12, 17], np.ones(7)).astype(np.float32),
        "language_instruction": list("abcd"),
    }
    trajectory = standardize_bridge(steps)
    assert trajectory.actions.tolist() == [[2.0] * 6 + [1.0], [5.0] * 6 + [0.0]]
    assert trajectory.proprio[:, 0].tolist() == [10, 12] and trajectory.instructions == ["b", "c"]
    assert trajectory.first_step == 1


def test_every_dataset_of_the_mixture_is_known():
    names = {name for name, _ in MIXTURES["oxe_magic_soup_plus"]}
    assert len(names) == 27 and names <= set(STANDARDIZE) and names <= set(DATASETS)
    assert names - {"bridge_orig", "language_table"} <= set(CASES)
    assert all(DATASETS[name]["action_encoding"] == "EEF_POS" for name in names)


def test_grippers_by_hand():
    assert binarize_gripper(np.array([0.5, 1.0, 0.5, 0.5, 0.0, 0.96, 0.3])).tolist() == [1, 1, 0, 0, 0, 1, 0.3]
    relative = np.array([0.0, 0.0, 1.0, 0.0, -1.0, 0.05, 0.0])  # closes at 2, opens at 4
    assert relative_to_absolute_gripper(relative).tolist() == [1, 1, 0, 0, 1, 1, 1]
    assert relative_to_absolute_gripper(np.zeros(3)).tolist() == [1, 1, 1]


def test_euler_angles_rebuild_the_rotation():
    quaternions = np.random.default_rng(0).normal(size=(20, 4))
    x, y, z, w = (quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)).T
    first_column = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w)], axis=1)
    roll, pitch, yaw = quaternion_to_euler(quaternions).T
    rebuilt = np.stack([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), -np.sin(pitch)], axis=1)
    np.testing.assert_allclose(rebuilt, first_column, atol=1e-12)
    np.testing.assert_allclose(np.tan(roll), 2 * (y * z + x * w) / (1 - 2 * (x * x + y * y)), rtol=1e-9)


def test_shares_are_those_of_the_paper():
    # arXiv:2406.09246, Table 3, in percent
    paper = {"fractal20220817_data": 12.7, "kuka": 12.7, "bridge_orig": 13.3, "taco_play": 3.0, "jaco_play": 0.4}
    paper |= {"berkeley_cable_routing": 0.2, "roboturk": 2.3, "viola": 0.9, "berkeley_autolab_ur5": 1.2, "toto": 2.0}
    paper |= {"language_table": 4.4, f"stanford_hydra_dataset{RLDS}": 4.4, f"austin_buds_dataset{RLDS}": 0.2}
    paper |= {f"nyu_franka_play_dataset{RLDS}": 0.8, f"furniture_bench_dataset{RLDS}": 2.4, "utaustin_mutex": 2.2}
    paper |= {f"austin_sailor_dataset{RLDS}": 2.2, f"austin_sirius_dataset{RLDS}": 1.7, "cmu_stretch": 0.2}
    paper |= {f"iamlab_cmu_pickup_insert{RLDS}": 0.9, "berkeley_fanuc_manipulation": 0.7, "bc_z": 7.5}
    paper |= {"fmb_dataset": 7.1, "dobbe": 1.4, "droid": 10.0}
    shares = mixture_shares("oxe_magic_soup_plus")
    assert sum(shares.values()) == pytest.approx(1.0)
    for name, percent in paper.items():
        assert abs(100 * shares[name] - percent) < 1.0, name
    with pytest.raises(KeyError, match="Unknown mixture 'soup'.*oxe_magic_soup"):
        mixture_shares("soup")


def test_the_main_camera_comes_first():
    assert image_keys("taco_play", ["rgb_gripper", "rgb_static"]) == ["rgb_static", "rgb_gripper"]
    assert image_keys("my_robot", ["b", "a"]) == ["b", "a"]
    assert image_keys("bridge_orig", ["front"]) == ["front"]  # renamed cameras: better what there is than nothing
