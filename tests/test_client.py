"""Against a server on loopback that answers as the original's deploy.py does."""

import base64
import json

import numpy as np
import pytest
from act_server import ActServer, as_json_numpy

from openvla.serve.client import ActClient

IMAGE = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
ACTION = np.array([0.01, -0.02, 0.03, 0.1, 0.0, -0.1, 1.0])


@pytest.fixture
def server():
    with ActServer((200, as_json_numpy(ACTION))) as server:
        yield server


def ask(url: str, **options) -> np.ndarray:
    return ActClient(url, **options).infer({"images": {"front": IMAGE}, "instruction": "pick up the cup"})["actions"]


def test_one_observation(server):
    np.testing.assert_array_equal(ask(server.url, unnorm_key="bridge_orig", token="secret"), ACTION[None])
    ((path, headers, body),) = server.asked
    assert path == "/act" and headers["Authorization"] == "Bearer secret"
    assert body["instruction"] == "pick up the cup" and body["unnorm_key"] == "bridge_orig"
    assert body["image"]["shape"] == [5, 4, 3] and body["image"]["dtype"] in ("uint8", "|u1")
    assert base64.b64decode(body["image"]["__numpy__"]) == IMAGE.tobytes()


def test_answers_may_be_encoded_twice_and_be_chunks(server):
    chunk = np.stack([ACTION, 2 * ACTION]).astype(np.float32)
    server.answer = (200, json.dumps(as_json_numpy(chunk)))
    np.testing.assert_array_equal(ask(f"{server.url}/act"), chunk.astype(np.float64))


@pytest.mark.parametrize(
    "answer, problem",
    [
        ((200, "error"), "answered 'error' instead of an action"),
        ((500, {"detail": "out of memory"}), "answered 500: .*out of memory"),
        ((200, as_json_numpy(np.full(7, np.nan))), "no finite"),
        ((200, as_json_numpy(np.array(["x"]))), "not of numbers"),
        ((200, [0.0] * 7), "instead of an action"),
    ],
)
def test_a_failure_is_never_an_action(server, answer, problem):
    server.answer = answer
    with pytest.raises(RuntimeError, match=problem):
        ask(server.url)


def test_a_server_that_is_not_there():
    with pytest.raises(OSError, match="refused"):
        ask("http://127.0.0.1:9")


def test_metadata_if_the_server_tells_it(server):
    assert ActClient(server.url).metadata() is None
    server.metadata = (200, {"unnorm_key": "bridge_orig"})
    assert ActClient(server.url).metadata() == {"unnorm_key": "bridge_orig"}


def test_two_cameras_are_refused(server):
    with pytest.raises(ValueError, match="no more cameras"):
        ActClient(server.url).infer({"images": [IMAGE, IMAGE], "instruction": "pick up the cup"})
    assert not server.asked
