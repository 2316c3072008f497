"""Every dataset of Open X-Embodiment, by hand: raw steps in, seven numbers and the state out."""

import zlib

import numpy as np
import pytest

from openvla.finetune.oxe import (
    DATASETS,
    MIXTURES,
    STANDARDIZE,
    binarize_gripper,
    image_keys,
    mixture_shares,
    mixture_weights,
    quaternion_to_euler,
    relative_to_absolute_gripper,
)

RLDS = "_converted_externally_to_rlds"
WORLD = {"action/world_vector": [[1, 2, 3]] * 3, "action/rotation_delta": [[4, 5, 6]] * 3}
CLOSE_AT_1 = {"action/gripper_closedness_action": [[0], [1], [0]]}  # relative: open, closed, closed
FLAT = {"action": [[1, 2, 3, 4, 5, 6, g] for g in (-1.0, 0.25, 2.0)]}
LONGER = {"action": [[*row, 9] for row in FLAT["action"]]}
SETTLING = {"action": [[1, 2, 3, 4, 5, 6, g] for g in (1.0, 0.5, 0.0)]}
HALF_TURN = [0, 0, 1, 0]  # about z; x, y, z, w
TURNED = {"action": [[1, 2, 3, *HALF_TURN, g] for g in (-1, 0.25, 2)]}
DROID = {
    "action_dict/cartesian_velocity": [[1, 2, 3, 4, 5, 6]] * 3,
    "action_dict/gripper_position": [[0], [1], [0.25]],
}
TDROID = ["carrot_in_bowl", "pour_corn_in_pot", "flip_pot_upright", "move_object_onto_plate", "knock_object_over"]
TDROID = [f"tdroid_{task}" for task in (*TDROID, "cover_object_with_towel")]
GNM = ["berkeley_gnm_recon", "berkeley_gnm_cory_hall", "berkeley_gnm_sac_son"]
LIBERO = [f"libero_{suite}_no_noops" for suite in ("spatial", "object", "goal", "10")]
BRIDGE = {"bridge_oxe", "bridge_orig", "bridge_dataset"}
JOINTS = {f"berkeley_mvp{RLDS}", f"berkeley_rpt{RLDS}", "roboset"}


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
    **dict.fromkeys(LIBERO, (FLAT, rows([1, 0.75, 0]))),
    **dict.fromkeys(["ppgm", "ppgm_static", "ppgm_wrist", *TDROID], (SETTLING, rows([1, 0, 0]))),
    "nyu_door_opening_surprising_effectiveness": ({**WORLD, **CLOSE_AT_1}, rows([1, 0, 0])),
    "columbia_cairlab_pusht_real": (
        {**WORLD, "action/gripper_closedness_action": [-1, 0.25, 2]},
        rows([-1, 0.25, 2]),
    ),
    f"stanford_kuka_multimodal_dataset{RLDS}": (
        {"action": [[1, 2, 3, g] for g in (-1, 0.25, 2)]},
        rows([-1, 0.25, 2], (1, 2, 3, 0, 0, 0)),
    ),
    f"ucsd_pick_and_place_dataset{RLDS}": (
        {"action": [[1, 2, 3, g] for g in (-1, 0.25, 2)]},
        rows([-1, 0.25, 2], (1, 2, 3, 0, 0, 0)),
    ),
    f"nyu_rot_dataset{RLDS}": (LONGER, rows([-1, 0.25, 2])),
    f"maniskill_dataset{RLDS}": (FLAT, rows([-1, 0.25, 2])),
    f"cmu_franka_exploration_dataset{RLDS}": (LONGER, rows([-1, 0.25, 2])),
    f"utokyo_pr2_opening_fridge{RLDS}": (LONGER, rows([-1, 0.25, 2])),
    f"utokyo_pr2_tabletop_manipulation{RLDS}": (LONGER, rows([-1, 0.25, 2])),
    f"utokyo_xarm_pick_and_place{RLDS}": (FLAT, rows([-1, 0.25, 2])),
    f"utokyo_xarm_bimanual{RLDS}": ({"action": [[9] * 7 + row for row in FLAT["action"]]}, rows([-1, 0.25, 2])),
    "robo_net": (
        {"action": [[1, 2, 3, 4, g] for g in (-1, 0.25, 2)]},
        rows([-1, 0.25, 2], (1, 2, 3, 4, 0, 0)),
    ),
    f"stanford_mask_vit{RLDS}": (
        {"action": [[1, 2, 3, 4, g] for g in (-1, 0.25, 2)]},
        rows([-1, 0.25, 2], (1, 2, 3, 4, 0, 0)),
    ),
    f"kaist_nonprehensile{RLDS}": ({"action": [[1, 2, 3, 4, 5, 6] + [9] * 14] * 3}, rows([0, 0, 0])),
    f"tokyo_u_lsmo{RLDS}": (FLAT, rows([-1, 0.25, 2])),
    f"dlr_sara_pour{RLDS}": (FLAT, rows([-1, 0.25, 2])),
    f"dlr_sara_grid_clamp{RLDS}": (FLAT, rows([-1, 0.25, 2])),
    f"asu_table_top{RLDS}": (FLAT, rows([-1, 0.25, 2])),
    f"stanford_robocook{RLDS}": (FLAT, rows([-1, 0.25, 2])),
    "imperialcollege_sawyer_wrist_cam": (LONGER, rows([-1, 0.25, 2])),
    "uiuc_d3field": ({"action": [[1, 2, 3]] * 3}, rows([0, 0, 0], (1, 2, 3, 0, 0, 0))),
    "cmu_playing_with_food": (TURNED, rows([-1, 0.25, 2], (1, 2, 3, 0, 0, np.pi))),
    "cmu_play_fusion": ({"action": [[1, 2, 3, 9, 9, 4, 5, 6, g] for g in (-1, 0.25, 2)]}, rows([-1, 0.25, 2])),
    **dict.fromkeys(GNM, ({"action": [[1, 2]] * 3}, rows([0, 0, 0], (1, 2, 0, 0, 0, 0)))),
    "rh20t": (
        {"action/tcp_base": [[1, 2, 3, 4, 5, 6]] * 3, "action/gripper": [True, False, True]},
        rows([1, 0, 1]),
    ),
    f"nyu_franka_play_dataset{RLDS}": (
        {"action": [[9] * 7 + [1, 2, 3, 4, 5, 6, g, 9] for g in (-1, 0.25, 2)]},
        rows([0, 0.25, 1]),
    ),
    f"furniture_bench_dataset{RLDS}": (TURNED, rows([1, 0.75, 0], (1, 2, 3, 0, 0, np.pi))),
    f"iamlab_cmu_pickup_insert{RLDS}": (TURNED, rows([-1, 0.25, 2], (1, 2, 3, 0, 0, np.pi))),
    f"ucsd_kitchen_dataset{RLDS}": (LONGER, rows([-1, 0.25, 2])),
    "cmu_stretch": (LONGER, rows([-1, 0.25, 2])),
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
    "droid": (DROID, rows([1, 0, 0.75])),
    "droid_wipe": (DROID, rows([1, 0, 0.75])),
}

# dataset -> (one step's state as in the file, beside `observation/state`, which is 1, 2, … 15; expected state)
STATE = list(range(1, 16))
POSE_THEN_LAST = ({}, [1, 2, 3, 4, 5, 6, 0, 15])
CARTESIAN = {"observation/cartesian_position": [21, 22, 23, 24, 25, 26], "observation/gripper_position": [7]}
STATES = {
    "fractal20220817_data": (
        {"observation/base_pose_tool_reached": [21, 22, 23, 24, 25, 26, 27], "observation/gripper_closed": [7]},
        [21, 22, 23, 24, 25, 26, 27, 7],
    ),
    "taco_play": ({"observation/robot_obs": STATE}, [1, 2, 3, 4, 5, 6, 0, 8]),
    "jaco_play": ({"observation/end_effector_cartesian_pos": [1, 2, 3, 4, 5, 6, 7]}, [1, 2, 3, 4, 5, 6, 0, 7]),
    "berkeley_cable_routing": ({"observation/robot_state": [1, 2, 3, 4, 5, 6, 7]}, [1, 2, 3, 4, 5, 6, 7, 0]),
    "roboturk": ({}, [0] * 8),
    "nyu_door_opening_surprising_effectiveness": ({}, [0] * 8),
    f"cmu_franka_exploration_dataset{RLDS}": ({}, [0] * 8),
    "uiuc_d3field": ({}, [0] * 8),
    "imperialcollege_sawyer_wrist_cam": ({"observation/state": [7]}, [0, 0, 0, 0, 0, 0, 0, 7]),
    "viola": (
        {"observation/joint_states": [1, 2, 3, 4, 5, 6, 7], "observation/gripper_states": [9]},
        [1, 2, 3, 4, 5, 6, 7, 9],
    ),
    "berkeley_autolab_ur5": ({"observation/robot_state": STATE}, [7, 8, 9, 10, 11, 12, 13, 14]),
    "toto": ({"observation/state": [1, 2, 3, 4, 5, 6, 7]}, [1, 2, 3, 4, 5, 6, 7, 0]),
    "language_table": ({"observation/effector_translation": [1, 2]}, [1, 2, 0, 0, 0, 0, 0, 0]),
    "columbia_cairlab_pusht_real": ({"observation/robot_state": [1, 2]}, [1, 2, 0, 0, 0, 0, 0, 0]),
    f"stanford_kuka_multimodal_dataset{RLDS}": (
        {"observation/ee_position": [1, 2, 3], "observation/ee_orientation": [4, 5, 6, 7]},
        [1, 2, 3, 4, 5, 6, 7, 0],
    ),
    f"nyu_rot_dataset{RLDS}": POSE_THEN_LAST,
    f"stanford_hydra_dataset{RLDS}": ({}, [1, 2, 3, 8, 9, 10, 0, 13]),
    f"austin_buds_dataset{RLDS}": ({}, [1, 2, 3, 4, 5, 6, 7, 8]),
    f"nyu_franka_play_dataset{RLDS}": ({}, [10, 11, 12, 13, 14, 15, 0, 0]),
    f"maniskill_dataset{RLDS}": (
        {"observation/tcp_pose": [21, 22, 23, 24, 25, 26, 27]},
        [21, 22, 23, 24, 25, 26, 27, 8],
    ),
    f"furniture_bench_dataset{RLDS}": ({}, [1, 2, 3, 4, 5, 6, 7, 15]),
    f"ucsd_kitchen_dataset{RLDS}": ({}, [1, 2, 3, 4, 5, 6, 7, 0]),
    f"ucsd_pick_and_place_dataset{RLDS}": POSE_THEN_LAST,
    f"austin_sailor_dataset{RLDS}": ({"observation/state": [1, 2, 3, 4, 5, 6, 7, 8]}, [1, 2, 3, 4, 5, 6, 7, 8]),
    f"austin_sirius_dataset{RLDS}": ({"observation/state": [1, 2, 3, 4, 5, 6, 7, 8]}, [1, 2, 3, 4, 5, 6, 7, 8]),
    "bc_z": (
        {
            "observation/present/xyz": [1, 2, 3],
            "observation/present/axis_angle": [4, 5, 6],
            "observation/present/sensed_close": [7],
        },
        [1, 2, 3, 4, 5, 6, 0, 7],
    ),
    f"utokyo_pr2_opening_fridge{RLDS}": POSE_THEN_LAST,
    f"utokyo_pr2_tabletop_manipulation{RLDS}": POSE_THEN_LAST,
    f"utokyo_xarm_pick_and_place{RLDS}": (
        {"observation/end_effector_pose": [1, 2, 3, 4, 5, 6]},
        [1, 2, 3, 4, 5, 6, 0, 0],
    ),
    f"utokyo_xarm_bimanual{RLDS}": ({"observation/pose_r": [1, 2, 3, 4, 5, 6]}, [1, 2, 3, 4, 5, 6, 0, 0]),
    "robo_net": ({}, [1, 2, 3, 4, 0, 0, 0, 15]),
    f"kaist_nonprehensile{RLDS}": ({}, [9, 10, 11, 12, 13, 14, 15, 0]),
    f"stanford_mask_vit{RLDS}": ({"observation/end_effector_pose": [21, 22, 23, 24, 5]}, [21, 22, 23, 24, 0, 0, 0, 5]),
    f"tokyo_u_lsmo{RLDS}": POSE_THEN_LAST,
    f"dlr_sara_pour{RLDS}": ({"observation/state": [1, 2, 3, 4, 5, 6]}, [1, 2, 3, 4, 5, 6, 0, 0]),
    f"dlr_sara_grid_clamp{RLDS}": ({}, [1, 2, 3, 4, 5, 6, 0, 0]),
    f"dlr_edan_shared_control{RLDS}": ({"observation/state": [1, 2, 3, 4, 5, 6, 7]}, [1, 2, 3, 4, 5, 6, 7, 0]),
    f"asu_table_top{RLDS}": ({"ground_truth_states/EE": [21, 22, 23, 24, 25, 26]}, [21, 22, 23, 24, 25, 26, 0, 15]),
    f"stanford_robocook{RLDS}": POSE_THEN_LAST,
    f"iamlab_cmu_pickup_insert{RLDS}": ({}, [1, 2, 3, 4, 5, 6, 7, 8]),
    "utaustin_mutex": ({}, [1, 2, 3, 4, 5, 6, 7, 8]),
    "berkeley_fanuc_manipulation": ({}, [1, 2, 3, 4, 5, 6, 0, 7]),
    "cmu_playing_with_food": ({"observation/state": [1, 2, 3, 4, 5, 6]}, [1, 2, 3, 4, 5, 6, 0, 0]),
    "cmu_play_fusion": ({"observation/state": [1, 2, 3, 4, 5, 6, 7, 8]}, [1, 2, 3, 4, 5, 6, 7, 8]),
    "cmu_stretch": ({}, [1, 2, 3, 0, 0, 0, 0, 15]),
    **dict.fromkeys(GNM, ({"observation/position": [21, 22], "observation/yaw": [23]}, [21, 22, 0, 0, 0, 23, 0, 0])),
    "droid": (CARTESIAN, [21, 22, 23, 24, 25, 26, 7]),
    "droid_wipe": (CARTESIAN, [21, 22, 23, 24, 25, 26, 7]),
    "fmb_dataset": (
        {"observation/eef_pose": [1, 2, 3, 4, 5, 6, 7], "observation/state_gripper_pose": 8},
        [1, 2, 3, 4, 5, 6, 7, 8],
    ),
    "dobbe": ({"observation/state": [1, 2, 3, 4, 5, 6, 7]}, [1, 2, 3, 4, 5, 6, 7]),
    "rh20t": (
        {"observation/tcp_base": [1, 2, 3, 4, 5, 6], "observation/gripper_width": 7},
        [1, 2, 3, 4, 5, 6, 7],
    ),
    **dict.fromkeys(TDROID, (CARTESIAN, [21, 22, 23, 24, 25, 26, 0, 7])),
    **dict.fromkeys(LIBERO, ({"observation/state": [1, 2, 3, 4, 5, 6, 7, 8]}, [1, 2, 3, 4, 5, 6, 7, 8])),
}


def episode(name: str, **more: list) -> dict:
    """Three steps of the dataset, the way the reader gives them."""
    actions = CASES[name][0] if name in CASES else {"action": [[1, 2]] * 3}
    steps = {key: np.array(value) for key, value in {**actions, **more}.items()}
    return steps | {"language_instruction": ["go"] * 3}


@pytest.mark.parametrize("name", CASES)
def test_actions_by_hand(name):
    trajectory = STANDARDIZE[name](episode(name))
    np.testing.assert_allclose(trajectory.actions, CASES[name][1], atol=1e-6)
    assert trajectory.actions.dtype == np.float32 and trajectory.instructions == ["go"] * 3


@pytest.mark.parametrize("name", STATES)
def test_states_by_hand(name):
    raw, expected = STATES[name]
    state = {key: [value] * 3 for key, value in {"observation/state": STATE, **raw}.items()}
    proprio = STANDARDIZE[name](episode(name, **state)).proprio
    assert proprio.dtype == np.float32 and proprio.tolist() == [expected] * 3


def test_kuka_compresses_its_state():
    def compressed(*numbers):
        return [zlib.compress(np.array(numbers, dtype="<f4").tobytes())] * 3

    steps = episode("kuka") | {
        "observation/clip_function_input/base_pose_tool_reached": compressed(1, 2, 3, 4, 5, 6, 7),
        "observation/gripper_closed": compressed(8),
    }
    assert STANDARDIZE["kuka"](steps).proprio.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]] * 3
    with pytest.raises(ValueError, match="not ZLIB-compressed"):
        STANDARDIZE["kuka"](steps | {"observation/gripper_closed": [b"closed"] * 3})


def test_a_state_that_the_file_lacks_is_none():
    assert STANDARDIZE["taco_play"](episode("taco_play")).proprio is None
    assert STANDARDIZE["libero_10_no_noops"](episode("libero_10_no_noops")).proprio is None


def test_language_table_by_hand():
    codes = np.zeros((2, 6), dtype=np.int32)
    codes[:, :2] = [ord("g"), ord("o")]
    trajectory = STANDARDIZE["language_table"](
        {"action": np.array([[1, 2], [3, 4]]), "observation/instruction": codes}
    )
    assert trajectory.actions.tolist() == [[1, 2, 0, 0, 0, 0, 1], [3, 4, 0, 0, 0, 0, 1]]
    assert trajectory.instructions == ["go", "go"]


@pytest.mark.parametrize("name", sorted(BRIDGE))
def test_bridge_by_hand(name):
    steps = {
        "observation/state": np.outer([5, 10, 12, 17], [1, 1, 1, 1, 1, 1, 0.1]).astype(np.float32),
        "language_instruction": list("abcd"),
    }
    if name == "bridge_oxe":
        steps["action/open_gripper"] = np.array([False, True, False, False])
    else:
        steps["action"] = np.array([[0] * 7, [9] * 6 + [1.0], [9] * 6 + [0.5], [9] * 6 + [0.0]], dtype=np.float32)
    trajectory = STANDARDIZE[name](steps)
    assert trajectory.actions.tolist() == [[2.0] * 6 + [1.0], [5.0] * 6 + [0.0]]
    assert trajectory.instructions == ["b", "c"] and trajectory.first_step == 1
    np.testing.assert_allclose(trajectory.proprio, [[10] * 6 + [0, 1], [12] * 6 + [0, 1.2]], rtol=1e-6)


def test_every_dataset_is_standardised_or_rejected():
    by_hand = {*CASES, *BRIDGE, "language_table"}
    assert len(STANDARDIZE) == 73 and set(STANDARDIZE) == by_hand | JOINTS and by_hand & JOINTS == set()
    assert {name for name in DATASETS if "state" in DATASETS[name]} <= {*STATES, *BRIDGE, "kuka"}
    assert {name for name in by_hand & set(DATASETS) if DATASETS[name]["action_encoding"] != "EEF_POS"} == set()
    mixed = {name for mixture in MIXTURES for name in mixture_weights(mixture)}
    assert len(MIXTURES) == 18 and mixed <= set(STANDARDIZE) and mixed & JOINTS == {f"berkeley_rpt{RLDS}"}
    assert len(mixture_weights("oxe_magic_soup_plus")) == 27


@pytest.mark.parametrize("name", sorted(JOINTS))
def test_joint_positions_are_rejected(name):
    with pytest.raises(ValueError, match=f"{name} has joint positions; OpenVLA trains on end-effector actions"):
        STANDARDIZE[name](FLAT | {"language_instruction": ["go"] * 3})


def test_files_that_are_not_what_their_name_promises():
    with pytest.raises(ValueError, match=r"has no 'action/world_vector', which viola should have, only \['action', "):
        STANDARDIZE["viola"]({"action": np.zeros((3, 7)), "action/gripper_closedness_action": np.zeros(3)})
    with pytest.raises(ValueError, match="gives 8 action dims when read as dobbe, expected 7"):
        STANDARDIZE["dobbe"](episode("dobbe", action=LONGER["action"]))


def test_datasets_listed_twice_count_once(monkeypatch):
    twice = [name for name, _ in MIXTURES["rtx_franka"]]
    assert len(twice) == 28 and len(mixture_weights("rtx_franka")) == 24
    for name, weight in {"taco_play": 2.0, "berkeley_cable_routing": 3.0, "viola": 2.0, "toto": 1.0}.items():
        assert twice.count(name) == 2 and mixture_weights("rtx_franka")[name] == weight
    monkeypatch.setitem(MIXTURES, "twice", [["viola", 2.0], ["toto", 1.0], ["viola", 9.0]])
    assert mixture_shares("twice") == pytest.approx({"viola": 152648 / 478347, "toto": 325699 / 478347})


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
    assert image_keys("dobbe", ["wrist_image"]) == ["wrist_image"]
    assert image_keys("my_robot", ["b", "a"]) == ["b", "a"]


def test_missing_cameras_are_named():
    with pytest.raises(ValueError, match=r"bridge_orig should have .*\['image_0', 'image_1'\].* has \['front'\]"):
        image_keys("bridge_orig", ["front"])
    without = [name for name in DATASETS if not DATASETS[name]["has_primary"]]
    assert set(without) == {*GNM, *JOINTS, "nyu_door_opening_surprising_effectiveness"} - {"roboset"}
    for name in without:
        with pytest.raises(ValueError, match=rf"{name} has no main camera, only \['(hand_)?image'\]"):
            image_keys(name, DATASETS[name]["images"])
