"""Clients that nobody here wrote act through a real server, as `predict_action` does.

They live in an environment of their own (`make test-clients` makes it), which OPENVLA_CLIENTS_PYTHON names.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from served import Served

from openvla import OpenVLAForActionPrediction
from openvla.serve.policy import OpenVLAPolicy

pytestmark = pytest.mark.skipif("OPENVLA_CLIENTS_PYTHON" not in os.environ, reason="see `make test-clients`")
SCRIPTS = Path(__file__).parent / "clients"
FARTHEST = np.array([0.05] * 3 + [0.25] * 3 + [1.0])  # the WidowX plug-in's own limits


@pytest.fixture(scope="module")
def policy(checkpoint, processor, liven):
    model = OpenVLAForActionPrediction.from_pretrained(checkpoint, dtype=torch.float32).eval()
    liven(model)  # what it sees matters
    return OpenVLAPolicy(model, processor, "bridge_orig", clamp=True)


@pytest.fixture
def run_client(tmp_path):
    def run(script: str, *args) -> dict[str, np.ndarray]:
        out = tmp_path / "out.npz"
        command = [os.environ["OPENVLA_CLIENTS_PYTHON"], SCRIPTS / script, str(args[0]), out, *map(str, args[1:])]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        return dict(np.load(out))

    return run


def expect(policy, observation: dict, unnorm_key: str) -> np.ndarray:
    """What the model itself says, without any of the server."""
    prompt = policy.processor.build_prompt(observation["instruction"])
    inputs = policy.processor(prompt, observation["images"][0])
    return policy.model.predict_action(**inputs, unnorm_key=unnorm_key)


def test_inspect_robots_on_a_widowx(policy, run_client):
    with Served(policy, "bridge_orig") as served:
        found = run_client("inspect_robots_acts.py", served.port)
    asked = [observation for batch in served.asked for observation in batch]
    assert (found["rest_status"], found["openpi_status"], len(asked)) == ("success", "success", 8)
    assert [each["images"][0].shape for each in asked] == [(256, 256, 3)] * 4 + [(224, 224, 3)] * 4
    expected = [np.clip(expect(policy, each, "bridge_orig"), -FARTHEST, FARTHEST) for each in asked]
    expected = np.clip(expected, [-1] * 6 + [0], 1)
    np.testing.assert_array_equal(found["rest"], expected[:4])
    np.testing.assert_array_equal(found["openpi"], expected[4:])
    assert len(np.unique(expected, axis=0)) > 4


def test_openpi_client(policy, run_client):
    with Served(policy, "bridge_orig", tokens=("other", "secret")) as served:
        found = run_client("openpi_acts.py", served.port, "secret")
    expected = expect(policy, {"instruction": "pick up the cup", "images": [found["picture"]]}, "bridge_orig")
    for name in ("libero", "aloha", "after"):
        np.testing.assert_array_equal(found[name], expected[None])
    assert found["unnorm_key"] == "bridge_orig"
    assert "Expected one instruction" in str(found["error"]) and "Traceback" not in str(found["error"])


def test_vla_eval(policy, run_client):
    with Served(policy, "toy_robot") as served:
        found = run_client("vla_eval_acts.py", f"ws://127.0.0.1:{served.port}/vla-eval?unnorm_key=bridge_orig")
    asked = [observation for batch in served.asked for observation in batch]
    assert found["steps"].tolist() == [3, 3] and found["success"].all() and found["protocol"] == 1
    assert not len(found["mismatches"])
    expected = np.array([expect(policy, each, "bridge_orig") for each in asked])
    expected[:, 6] = np.where(expected[:, 6] > 0.5, -1, 1)
    np.testing.assert_array_equal(found["actions"], expected.astype(np.float32))
    assert len(asked) == 6
