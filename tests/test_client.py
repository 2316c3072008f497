"""Against a server on loopback that answers as the original's deploy.py does."""

import base64
import http.client
import json
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from act_server import ActServer, as_json_numpy

from openvla.serve import client as client_module
from openvla.serve.client import ActClient, Prefetch

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
        ((200, {"__numpy__": "", "shape": [7]}), "an array that is none .*dtype"),
        ((200, as_json_numpy(ACTION) | {"shape": [8]}), "an array that is none .*reshape"),
        ((200, as_json_numpy(ACTION) | {"dtype": "<q9"}), "an array that is none"),
        ((200, "{ an action"), "no JSON"),
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


def test_more_cameras_and_the_state_of_the_robot(server):
    client = ActClient(server.url, session="arm", max_age_ms=200)
    client.infer({"images": [IMAGE, IMAGE + 1], "instruction": "go", "proprio": [0.5, 1]})
    client.infer({"images": {"front": IMAGE, "wrist": IMAGE + 1}, "instruction": "go"})
    in_order, named = (body for _, _, body in server.asked)
    expected = [base64.b64encode(image.tobytes()).decode() for image in (IMAGE, IMAGE + 1)]
    assert [image["__numpy__"] for image in in_order["images"]] == expected and "image" not in in_order
    assert in_order["session"] == "arm" and in_order["max_age_ms"] == 200
    assert np.frombuffer(base64.b64decode(in_order["proprio"]["__numpy__"])).tolist() == [0.5, 1]
    assert [named["images"][name]["__numpy__"] for name in ("front", "wrist")] == expected and "proprio" not in named


@pytest.mark.parametrize("image", [IMAGE.astype(float), IMAGE[0], "frame.png", None])
def test_what_is_no_picture_is_not_sent(server, image):
    with pytest.raises(ValueError, match="Expected images as uint8 arrays"):
        ActClient(server.url).infer({"images": image, "instruction": "go"})
    assert not server.asked


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ws://127.0.0.1", "http://"])
def test_an_address_that_is_none(url):
    with pytest.raises(ValueError, match="Expected a server as http"):
        ActClient(url)


def test_a_server_that_comes_back():
    """It is asked again until it is there: over the broken connection, and while nobody listens."""
    with ActServer((200, as_json_numpy(ACTION))) as first:
        client = ActClient(first.url, patience=20)
        observation = {"images": IMAGE, "instruction": "go"}
        client.infer(observation)
        port = client._parts.port
    results = []
    asking = threading.Thread(target=lambda: results.append(client.infer(observation)))
    asking.start()
    time.sleep(0.3)
    assert not results
    with ActServer((200, as_json_numpy(2 * ACTION)), port):
        asking.join(20)
    np.testing.assert_array_equal(results[0]["actions"], 2 * ACTION[None])
    assert results[0]["timing"]["round_trip_ms"] > 250


def test_an_observation_that_is_old_before_it_is_sent_is_not_sent(server, monkeypatch):
    """It takes time to connect, as after a gap of the radio, and there is no second try on a connection that broke."""
    client, observation = ActClient(server.url, max_age_ms=2000), {"images": IMAGE, "instruction": "go"}
    connect = http.client.HTTPConnection.connect

    def slow(self):
        time.sleep(0.1)
        connect(self)

    monkeypatch.setattr(http.client.HTTPConnection, "connect", slow)
    client.infer(observation)
    assert server.asked[0][2]["age_ms"] >= 100
    client.close()
    monkeypatch.setattr(http.client.HTTPConnection, "connect", lambda self: time.sleep(2) or connect(self))
    with pytest.raises(OSError, match="older than 2000 ms before"):
        client.infer(observation)
    assert len(server.asked) == 1


# --- Chunks ahead of their time ---
class Slow:
    """A policy whose chunks hold the number of the step they were asked at, and of the step they are for."""

    def __init__(self, length: int, seconds: float = 0.0):
        self.length, self.seconds, self.asked = length, seconds, []

    def infer(self, observation: dict) -> dict:
        self.asked.append(observation["step"])
        time.sleep(self.seconds)
        steps = observation["step"] + np.arange(self.length)
        return {"actions": np.stack([np.full(self.length, observation["step"]), steps], axis=1)}


def play(policy, lead: int, steps: int) -> tuple[list, float]:
    with Prefetch(policy, lead) as chunks:
        return [chunks.act(lambda step=step: {"step": step}).tolist() for step in range(steps)], chunks.waited


@pytest.mark.parametrize("lead, asked", [(0, [0, 8, 16]), (3, [0, 5, 10, 15]), (7, [0, 1, 9, 10, 18])])
def test_every_action_is_the_one_for_its_step(lead, asked):
    policy = Slow(8)
    actions, _ = play(policy, lead, 20)
    assert [action[1] for action in actions] == list(range(20))
    assert policy.asked == asked


def test_asking_ahead_saves_the_wait():
    """What is measured is who waits, not how long: the answer is there, or it is not."""
    answered, answer = threading.Event(), Slow(4)

    class Policy:
        def infer(self, observation):
            if observation["step"]:
                assert answered.wait(10)
            return answer.infer(observation)

    with Prefetch(Policy(), lead=2) as chunks:
        first = [chunks.act(lambda step=step: {"step": step}) for step in range(4)]  # plays on while the policy thinks
        answered.set()
        fifth = chunks.act(lambda: {"step": 4})
    assert [action[1] for action in first] == [0, 1, 2, 3] and fifth.tolist() == [2, 4]


def test_nothing_is_observed_while_an_abandoned_question_is_answered():
    answer, asked, observed = threading.Event(), [], []

    class Policy:
        def infer(self, observation):
            asked.append(observation)
            assert answer.wait(10)
            return {"actions": np.full((2, 7), observation)}

    with Prefetch(Policy(), lead=1) as chunks:
        answer.set()
        chunks.act(lambda: 0)
        answer.clear()
        chunks.act(lambda: 1)  # of the first chunk; the next is asked for
        chunks.reset()
        acted = threading.Thread(target=lambda: observed.append(chunks.act(lambda: observed.append("looked") or 2)))
        acted.start()
        time.sleep(0.1)
        assert not observed
        answer.set()
        acted.join(10)
    assert asked == [0, 1, 2] and observed[0] == "looked" and observed[1].tolist() == [2] * 7


def test_chunks_that_fail_leave_no_action():
    class Policy:
        asked = 0

        def infer(self, observation):
            self.asked += 1
            if self.asked == 2:
                raise RuntimeError("out of memory")
            return {"actions": np.zeros((2, 7))}

    with Prefetch(Policy(), lead=1) as chunks:
        for _ in range(2):
            chunks.act(dict)
        with pytest.raises(RuntimeError, match="out of memory"):
            chunks.act(dict)
        assert chunks.act(dict).shape == (7,)  # of another question
        chunks.reset()
        assert chunks.act(dict).shape == (7,)
    shrinking = Slow(8)
    with Prefetch(shrinking, lead=5) as chunks, pytest.raises(ValueError, match="too short to ask 5 steps ahead"):
        for step in range(9):
            chunks.act(lambda step=step: {"step": step})
            shrinking.length = 2
    with pytest.raises(ValueError, match="0 or more"):
        Prefetch(Slow(2), lead=-1)


def test_one_file_is_enough_on_a_robot(tmp_path):
    """Copied alone, and without torch."""
    shutil.copy(client_module.__file__, tmp_path / "client.py")
    code = "import sys; sys.modules['torch'] = None; import client; print(client.ActClient('http://h:1').url)"
    ran = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
    )
    assert ran.stdout.strip() == "http://h:1", ran.stderr
