"""Limits of actions, against hand-computed cases."""

import json

import numpy as np
import pytest

from openvla.action_tokenizer import ActionStats
from openvla.serve.policy import OpenVLAPolicy
from openvla.serve.safety import Forbidden, Limits, limits_of_statistics, read_limits

NAMES = ["x", "gripper"]
STATS = {
    "q01": [-1, 0.1],
    "q99": [2, 0.9],
    "min": [-5, 0],
    "max": [5, 1],
    "mask": [True, False],
    "mean": [0, 0],
    "std": [3, 3],
}


def test_clamped_and_told():
    limits = Limits(np.array([-1.0, 0.0]), np.array([1.0, 1.0]), NAMES, "arm.json")
    actions = np.array([[0.5, 0.2], [-1.5, 1.0], [-3.0, 0.0]])
    clamped, changed = limits.apply(actions)
    assert clamped.tolist() == [[0.5, 0.2], [-1.0, 1.0], [-1.0, 0.0]]
    assert changed == [{"dim": "x", "wanted": -3.0, "bound": -1.0, "steps": 2, "limits": "arm.json"}]
    assert limits.apply(actions[:1])[1] == [] and actions[2, 0] == -3.0


def test_refused():
    limits = Limits(np.array([-1.0, -np.inf]), np.array([1.0, np.inf]), NAMES, "arm.json", refuse=True)
    with pytest.raises(Forbidden, match=r"arm.json\): x -3 beyond -1"):
        limits.apply(np.array([[-3.0, 900.0]]))
    assert limits.apply(np.array([[1.0, 900.0]]))[0].tolist() == [[1.0, 900.0]]


@pytest.mark.parametrize(
    "scheme, low, high", [("q99", [-1, 0], [2, 1]), ("min_max", [-5, 0], [5, 1]), ("mean_std", [-5, 0], [5, 1])]
)
def test_the_range_of_the_statistics(scheme, low, high):
    stats = ActionStats.from_norm_stats({"robot": {"action": STATS}}, "robot", scheme)
    limits = limits_of_statistics(stats, STATS, NAMES)
    assert (limits.low.tolist(), limits.high.tolist()) == (low, high)


def test_a_file_of_limits(tmp_path):
    file = tmp_path / "arm.json"
    file.write_text(json.dumps({"dims": {"gripper": [0, 1]}, "beyond": "refuse"}))
    limits = read_limits(file, NAMES)
    assert (limits.low.tolist(), limits.high.tolist(), limits.refuse) == ([-np.inf, 0], [np.inf, 1], True)


@pytest.mark.parametrize(
    "content, problem",
    [
        ("{", "is no JSON"),
        ("[]", "expected {"),
        ('{"dims": [1]}', "expected {"),
        ('{"dims": {"y": [0, 1]}}', r"\['y'\] are not known; the policy's action dims are \['x', 'gripper'\]"),
        ('{"dims": {}, "speed": 1}', r"\['speed'\] are not known"),
        ('{"dims": {}, "beyond": "warn"}', "clamp.*refuse.*'warn'"),
        ('{"dims": {"x": [1, 0]}}', r"x as \[low, high\], got \[1, 0\]"),
        ('{"dims": {"x": 1}}', r"x as \[low, high\]"),
        ('{"dims": {"x": [0, NaN]}}', r"x as \[low, high\]"),
        ('{"dims": {"x": [0, true]}}', r"x as \[low, high\]"),
    ],
)
def test_a_file_that_is_none(tmp_path, content, problem):
    (tmp_path / "arm.json").write_text(content)
    with pytest.raises(ValueError, match=problem):
        read_limits(tmp_path / "arm.json", NAMES)


def test_a_policy_with_limits(model, processor, recorded, images, tmp_path):
    expected = np.array(recorded["inputs"][0]["actions"]["bridge_orig"])
    observation = {"images": images[0], "instruction": recorded["inputs"][0]["instruction"]}
    clamped = OpenVLAPolicy(model, processor, "bridge_orig", clamp=True)
    result = clamped.infer(observation)
    np.testing.assert_allclose(result["actions"][0], expected, atol=1e-12)
    assert result["clamped"] == [] and clamped.metadata["limits"] == ["statistics"]

    file, bound = tmp_path / "arm.json", float(expected[0]) - 0.01
    file.write_text(json.dumps({"dims": {"x": [-9, bound]}}))
    result = OpenVLAPolicy(model, processor, "bridge_orig", limits=file).infer(observation)
    assert result["actions"][0, 0] == bound and result["clamped"][0]["wanted"] == pytest.approx(expected[0])
    np.testing.assert_allclose(result["actions"][0, 1:], expected[1:], atol=1e-12)


def test_other_statistics_of_the_same_policy(model, processor, recorded, images):
    policy = OpenVLAPolicy(model, processor, "bridge_orig", clamp=True)
    other = policy.with_statistics("toy_robot")
    observation = {"images": images[0], "instruction": recorded["inputs"][0]["instruction"]}
    for each, key in ((policy, "bridge_orig"), (other, "toy_robot")):
        np.testing.assert_allclose(
            each.infer(observation)["actions"][0], recorded["inputs"][0]["actions"][key], atol=1e-12
        )
        assert each.metadata["unnorm_key"] == key and each.limits[0].source == "statistics"
    assert other.limits[0].high.tolist() != policy.limits[0].high.tolist()
