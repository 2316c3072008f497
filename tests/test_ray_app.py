"""A fleet of two replicas: the same protocols, the same actions, and one that dies. Needs Ray: `make test-fleet`."""

import json
import os
import socket
import time

import numpy as np
import pytest
from websockets.sync.client import connect

ray = pytest.importorskip("ray")

from ray import serve  # noqa: E402
from ray.util import list_named_actors  # noqa: E402
from test_server import message, packed, post  # noqa: E402

from openvla.serve.client import ActClient  # noqa: E402
from openvla.serve.ray_app import app  # noqa: E402
from openvla.serve.wire import read_msgpack  # noqa: E402

with socket.create_server(("127.0.0.1", 0)) as free:
    PORT = free.getsockname()[1]
URL = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def fleet(checkpoint):
    os.environ["OPENVLA_TOKEN"] = "secret"
    ray.init(num_cpus=3, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    options = {"checkpoint": str(checkpoint), "dtype": "float32", "self_check": "false", "unnorm_key": "bridge_orig"}
    serve.run(app({**options, "min_replicas": "2", "max_replicas": "2", "num_cpus": "0.5"}))
    ActClient(URL).wait(120)
    yield
    serve.shutdown()
    ray.shutdown()
    del os.environ["OPENVLA_TOKEN"]


@pytest.fixture
def scene(recorded, images):
    entry = recorded["inputs"][0]
    return {"images": np.array(images[0].convert("RGB")), "instruction": entry["instruction"]}, entry["actions"]


def test_the_same_actions_over_every_protocol(fleet, scene):
    observation, actions = scene
    client = ActClient(URL, "toy_robot", token="secret")
    assert client.metadata()["unnorm_key"] == "toy_robot"
    for _ in range(4):
        np.testing.assert_allclose(client.infer(observation)["actions"], [actions["toy_robot"]], atol=1e-12)
    picture, instruction = observation["images"], observation["instruction"]
    headers = {"Authorization": "Bearer secret"}
    with connect(f"ws://127.0.0.1:{PORT}/", additional_headers=headers) as openpi:
        assert read_msgpack(openpi.recv(), 0)["unnorm_key"] == "bridge_orig"
        openpi.send(packed(picture, instruction))
        answer = read_msgpack(openpi.recv(), 0)
        np.testing.assert_allclose(answer["actions"], [actions["bridge_orig"]], atol=1e-12)
        openpi.send(packed(picture, ""))
        assert openpi.recv().startswith("422")
    with connect(f"ws://127.0.0.1:{PORT}/vla-eval", additional_headers=headers) as harness:
        harness.send(message("observation", {"images": {"front": picture}, "task_description": instruction}))
        answer = read_msgpack(harness.recv(), 0)["payload"]["actions"]
        np.testing.assert_allclose(answer[:6], np.float32(actions["bridge_orig"][:6]))


def test_what_is_refused(fleet, scene):
    assert post(URL, b"{}")[0] == 401
    status, answer = post(URL, b"{}", {"Authorization": "Bearer secret"})
    assert status == 422 and "Traceback" not in json.dumps(answer)


def test_a_replica_that_dies_is_replaced(fleet, scene):
    observation, actions = scene
    replicas = [actor for actor in list_named_actors(all_namespaces=True) if "#Replica#" in actor["name"]]
    assert len(replicas) == 2
    ray.kill(ray.get_actor(replicas[0]["name"], namespace=replicas[0]["namespace"]), no_restart=True)
    client, answered, end = ActClient(URL, token="secret"), 0, time.monotonic() + 90
    while answered < 10 and time.monotonic() < end:
        try:
            result = client.infer(observation)
        except RuntimeError as error:  # what the dead one had
            assert "answered 50" in str(error) and "Traceback" not in str(error)
            continue
        np.testing.assert_allclose(result["actions"], [actions["bridge_orig"]], atol=1e-12)
        answered += 1
    assert answered == 10


@pytest.mark.parametrize(
    "options, problem",
    [
        ({}, "Say which policy"),
        ({"checkpoint": "x", "gpus": "1"}, "gpus"),
        ({"checkpoint": "x", "clamp": "ture"}, "clamp=true or clamp=false, got 'ture'"),
        ({"checkpoint": "x", "max_batch": "two"}, "two"),
        ({"checkpoint": "x", "without_token": "false"}, "OPENVLA_TOKEN=secret"),
    ],
)
def test_options(options, problem, monkeypatch):
    monkeypatch.delenv("OPENVLA_TOKEN", raising=False)
    with pytest.raises(ValueError, match=problem):
        app(options)
