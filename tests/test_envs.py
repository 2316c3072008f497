"""What of the environments needs no simulator: conventions, and how actions and orientations are converted."""

import numpy as np
import pytest

from openvla.evaluate.envs.libero import CONVENTIONS, axis_angle, from_simulator, to_simulator


@pytest.mark.parametrize(
    "quaternion, expected",
    [
        ([0, 0, 0, 1], [0, 0, 0]),
        ([0, 0, np.sin(0.25), np.cos(0.25)], [0, 0, 0.5]),
        ([np.sin(2.0), 0, 0, np.cos(2.0)], [4.0, 0, 0]),  # beyond π: not -2.28
        ([-np.sin(2.0), 0, 0, -np.cos(2.0)], [4.0 - 2 * np.pi, 0, 0]),  # the same rotation, told otherwise
    ],
)
def test_axis_angle(quaternion, expected):
    np.testing.assert_allclose(axis_angle(np.array(quaternion)), expected, atol=1e-12)


def test_the_gripper_is_rounded_and_turned_round():
    motion = [0.1, -0.2, 0.3, 0.0, 1.0, -1.0]
    actions = np.array([[*motion, gripper] for gripper in (1.0, 0.51, 0.49, 0.0)])
    commands = to_simulator(actions)
    assert commands[:, 6].tolist() == [-1, -1, 1, 1]  # open, open, closed, closed
    np.testing.assert_array_equal(commands[:, :6], [motion] * 4)
    np.testing.assert_array_equal(to_simulator(actions[0]), commands[0])
    assert actions[:, 6].tolist() == [1.0, 0.51, 0.49, 0.0]  # the policy's own are left alone
    assert from_simulator(commands)[:, 6].tolist() == [1, 1, 0, 0]
    np.testing.assert_allclose(from_simulator(commands)[:, :6], [motion] * 4)


NAMES = [name for name, _ in CONVENTIONS.action_dims]


def declare(**changes) -> dict:
    dims = [{"name": name, "unit": "dataset units", "low": -0.9, "high": 0.9} for name in NAMES]
    dims[6] |= {"unit": "1 = open", "low": 0.0, "high": 1.0}
    return {"unnorm_key": "libero_spatial_no_noops", "action_dims": dims, "num_cameras": 1} | changes


def test_what_published_policies_declare_fits():
    CONVENTIONS.check(declare())
    CONVENTIONS.check(declare(control_frequency=20.0, num_cameras=2, proprio_dim=8))
    CONVENTIONS.check(declare(proprio_dim=0))
    guesses = [{"name": f"{name}?", "unit": ""} for name in NAMES]
    CONVENTIONS.check(declare(action_dims=guesses))


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"action_dims": declare()["action_dims"][:4]}, "actions have 4 numbers, the simulator wants 7"),
        ({"control_frequency": 5.0}, "acts 5 times a second, the simulator 20"),
        ({"num_cameras": 3}, "needs 3 cameras"),
        ({"proprio_dim": 7}, "takes 7 numbers of the robot's state, the simulator gives 8"),
        ({"unnorm_key": "taco_play"}, "its actions are in units of taco_play's own"),
        ({"dim": (0, {"unit": "m"})}, "x is in units of 'm', in the simulator '1 = 0.05 m'"),
        ({"dim": (0, {"name": "y"})}, "number 0 is 'y', in the simulator 'x'"),
        ({"dim": (6, {"unit": "1 = closed"})}, "gripper is in units of '1 = closed'"),
        ({"dim": (6, {"low": -1.0})}, "gripper goes from -1 to 1, expected 0 to 1"),
    ],
)
def test_what_does_not_fit_is_told(changes, problem):
    metadata = declare(**{key: value for key, value in changes.items() if key != "dim"})
    if "dim" in changes:
        place, change = changes["dim"]
        metadata["action_dims"][place] |= change
    with pytest.raises(ValueError, match=f"do not speak the same language: .*{problem}"):
        CONVENTIONS.check(metadata)
