"""The server as robots meet it: real sockets, the recorded checkpoint, answers equal to `predict_action`."""

import asyncio
import base64
import io
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import msgpack
import numpy as np
import pytest
from PIL import Image
from served import Served, wait_for
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from openvla.serve import guard, server
from openvla.serve.client import ActClient
from openvla.serve.policy import OpenVLAPolicy
from openvla.serve.wire import read_msgpack, write_json_numpy, write_msgpack

LARGEST = 4 * 2**20
TOKEN = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def policy(model, processor):
    return OpenVLAPolicy(model, processor, "bridge_orig", clamp=True)


@pytest.fixture(scope="module")
def served(policy):
    with Served(policy, "bridge_orig") as served:
        yield served


@pytest.fixture(scope="module")
def guarded(policy):
    with Served(policy, tokens=("other", "secret"), max_body=LARGEST, max_queue=2, max_age_ms=60_000.0) as served:
        yield served


@pytest.fixture
def scene(recorded, images):
    """`(picture, instruction, actions by unnorm_key)` of a recorded input."""
    entry = recorded["inputs"][0]
    return np.array(images[0].convert("RGB")), entry["instruction"], entry["actions"]


def post(url: str, body, headers: dict | None = None, path: str = "/act") -> tuple[int, object]:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, body, headers or {})
    request.add_unredirected_header("Content-type", (headers or {}).get("Content-Type", ""))
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def get(url: str, headers: dict | None = None) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def array(content: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(content["__numpy__"]), content["dtype"]).reshape(content["shape"])


def as_png(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def packed(picture: np.ndarray, instruction: str, **more) -> bytes:
    return write_msgpack({"observation/image": picture, "prompt": instruction, **more}, bytes_keys=True)


# --- POST /act -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("content_type", ["", "application/json", "text/plain", "application/x-www-form-urlencoded"])
def test_the_original(served, scene, content_type):
    picture, instruction, actions = scene
    request = {"image": write_json_numpy(picture), "instruction": instruction, "unnorm_key": "toy_robot"}
    status, answer = post(served.url, request, {"Content-Type": content_type})
    assert status == 200 and array(answer).shape == (7,) and array(answer).dtype == np.float64
    np.testing.assert_allclose(array(answer), actions["toy_robot"], atol=1e-12)


def test_encoded_twice(served, scene):
    picture, instruction, actions = scene
    request = {"image": write_json_numpy(picture), "instruction": instruction}
    status, answer = post(served.url, {"encoded": json.dumps(request)})
    assert status == 200 and isinstance(answer, str)
    np.testing.assert_allclose(array(json.loads(answer)), actions["bridge_orig"], atol=1e-12)


def test_as_openvla_oft_asks(served, scene):
    picture, instruction, actions = scene
    request = {
        "full_image": write_json_numpy(picture),
        "state": write_json_numpy(np.zeros(8)),
        "instruction": instruction,
    }
    status, answer = post(served.url, request)
    assert status == 200 and len(answer) == 1
    np.testing.assert_allclose(array(answer[0]), actions["bridge_orig"], atol=1e-12)


def test_everybody_gets_their_own(served, recorded, images):
    """In one batch, with the statistics of two robots."""
    keys, entries = ("toy_robot", "bridge_orig", "toy_robot", "bridge_orig"), recorded["inputs"][:4]
    assert len({tuple(entry["actions"]["toy_robot"]) for entry in entries}) == 4
    observations = [
        {"images": images[index].convert("RGB"), "instruction": entry["instruction"], "unnorm_key": key}
        for index, (key, entry) in enumerate(zip(keys, entries))
    ]
    answers = served.backend.infer_batch(observations)
    expected = [[entry["actions"][key]] for key, entry in zip(keys, entries)]
    np.testing.assert_allclose([answer["actions"] for answer in answers], expected, atol=1e-12)


def test_plain_json(served, scene):
    picture, instruction, actions = scene
    for image in ({"image": as_png(picture)}, {"images": [f"data:image/png;base64,{as_png(picture)}"]}):
        status, answer = post(served.url, {**image, "instruction": instruction, "draw": True})
        assert status == 200
        np.testing.assert_allclose(answer["actions"], [actions["bridge_orig"]], atol=1e-12)
        assert answer["unnorm_key"] == "bridge_orig" and answer["clamped"] == []
        assert answer["dims"][0] == {"name": "x", "unit": "m"} and answer["timing"]["batch_size"] == 1
        drawing = Image.open(io.BytesIO(base64.b64decode(answer["drawing"])))
        assert drawing.format == "PNG" and drawing.width > drawing.height


def test_our_client(served, scene):
    picture, instruction, actions = scene
    client = ActClient(served.url, "toy_robot", session="arm", max_age_ms=60_000)
    assert client.metadata()["unnorm_key"] == "toy_robot"
    for _ in range(2):
        result = client.infer({"images": {"front": picture}, "instruction": instruction, "proprio": np.zeros(3)})
        np.testing.assert_allclose(result["actions"], [actions["toy_robot"]], atol=1e-12)
        assert result["timing"]["round_trip_ms"] > 0
    assert asyncio.run(client.infer_async({"images": picture, "instruction": instruction}))["actions"].shape == (1, 7)
    with pytest.raises(RuntimeError, match="answered 422: .*Unknown unnorm_key"):
        ActClient(served.url, "nobody").infer({"images": picture, "instruction": instruction})


@pytest.mark.parametrize(
    "change, status, problem",
    [
        ({"image": None}, 422, "no picture"),
        ({"image": "no base64"}, 422, "base64"),
        ({"image": {"__numpy__": "", "dtype": "|O", "shape": [1]}}, 422, "dtype"),
        ({"instruction": None}, 422, "instruction"),
        ({"unnorm_key": "nobody"}, 422, "bridge_orig"),
        ({"unnorm_key": ["toy_robot"]}, 422, "Unknown unnorm_key"),
        ({"session": 7}, 422, "session"),
        ({"max_age_ms": -1}, 422, "max_age_ms"),
        ({"timestamp": "now"}, 422, "timestamp"),
        ({"timestamp": 1e11}, 422, "in the future"),
        ({"timestamp": time.time() + 10**5, "max_age_ms": 100}, 422, "in the future"),
        ({"draw": "false"}, 422, "Expected draw as true or false"),
        ({"draw": write_json_numpy(np.zeros(2))}, 422, "Expected draw as true or false"),
        ({"observation": {"unnorm_key": "toy_robot"}}, 422, "Nobody looks at 'observation/unnorm_key'"),
        ({"timestamp": 1e300}, 422, "Expected timestamp"),
        ({"timestamp": 10**400}, 422, "timestamp"),
        ({"max_age_ms": 10**400}, 422, "max_age_ms"),
        ({"timestamp": 0, "max_age_ms": 100}, 410, "ms old, 100 are allowed"),
        ({"age_ms": 101, "max_age_ms": 100}, 410, "ms old, 100 are allowed"),
        ({"seed": "x"}, 422, "seed"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_request_that_is_none(served, scene, change, status, problem):
    picture, instruction, _ = scene
    request = {"image": write_json_numpy(picture), "instruction": instruction, **change}
    found, answer = post(served.url, {name: value for name, value in request.items() if value is not None})
    assert found == status and problem in answer["error"] and "Traceback" not in answer["error"]


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b'"text"', b'{"encoded": 7}', b'{"encoded": "{"}', b"\x00" * 99]
)
def test_a_body_that_is_none(served, body):
    status, answer = post(served.url, body)
    assert status == 422 and list(answer) == ["error"]


def test_other_paths(served):
    assert post(served.url, b"", path="/reset") == (200, {"status": "ok"})
    assert get(served.url + "/act")[0] == 405 and get(served.url + "/nothing")[0] == 404
    assert get(served.url + "/health") == (200, b'{"status":"ok"}') and get(served.url + "/healthz") == (200, b"OK\n")
    status, metadata = get(served.url + "/metadata?unnorm_key=toy_robot")
    assert status == 200 and json.loads(metadata)["unnorm_key"] == "toy_robot"
    assert "bridge_orig" in json.loads(metadata)["unnorm_keys"]
    assert get(served.url + "/metadata?unnorm_key=nobody")[0] == 422
    assert b"<title>OpenVLA" in get(served.url)[1] and b"describe()" in get(served.url + "/page.js")[1]


def test_metrics_count(policy, scene):
    picture, instruction, _ = scene
    with Served(policy, "bridge_orig") as served:
        request = {"image": write_json_numpy(picture), "instruction": instruction}
        statuses = [post(served.url, each)[0] for each in (request, request, {**request, "unnorm_key": "nobody"}, b"")]
        text = served.get("/metrics").decode()
    assert statuses == [200, 200, 422, 422]
    assert 'openvla_answers_total{outcome="ok",protocol="rest"} 2.0' in text
    assert 'openvla_answers_total{outcome="Malformed",protocol="rest"} 2.0' in text
    assert "openvla_batch_size_sum 2.0" in text and "openvla_in_flight 0.0" in text and "openvla_ready 1.0" in text


# --- Websockets ------------------------------------------------------------------------------------------------------
def test_openpi_over_a_websocket(served, scene):
    picture, instruction, actions = scene
    with connect(f"ws://127.0.0.1:{served.port}/?unnorm_key=toy_robot") as client:
        assert read_msgpack(client.recv(), 0)["unnorm_key"] == "toy_robot"
        for wrong in ("text", b"\xc1", packed(picture, ""), msgpack.packb([1]), packed(picture, "go", unnorm_key=7)):
            client.send(wrong)
            error = client.recv()
            assert isinstance(error, str) and error.startswith("422: ")
        client.send(packed(picture, instruction))
        np.testing.assert_allclose(read_msgpack(client.recv(), 0)["actions"], [actions["toy_robot"]], atol=1e-12)
        client.send(packed(picture, instruction, unnorm_key=None))
        before = read_msgpack(client.recv(), 0)
        np.testing.assert_allclose(before["actions"], [actions["toy_robot"]], atol=1e-12)
        client.send(packed(picture, instruction, age_ms=101, max_age_ms=100))
        assert client.recv().startswith("410: ")
        client.send(packed(picture, instruction, unnorm_key="bridge_orig"))
        answer = read_msgpack(client.recv(), 0)
        np.testing.assert_allclose(answer["actions"], [actions["bridge_orig"]], atol=1e-12)
        assert answer["server_timing"]["prev_total_ms"] > before["policy_timing"]["infer_ms"]


def test_without_a_key_openpi_is_told_so(guarded, scene):
    picture, instruction, _ = scene
    with connect(f"ws://127.0.0.1:{guarded.port}", additional_headers={"Authorization": "Api-Key secret"}) as client:
        assert "bridge_orig" in read_msgpack(client.recv(), 0)["unnorm_keys"]
        client.send(packed(picture, instruction))
        assert "422: Say whose actions you want" in client.recv()


def message(kind: str, payload, seq=1) -> bytes:
    return write_msgpack({"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}, bytes_keys=False)


def test_vla_eval_over_a_websocket(served, scene):
    picture, instruction, actions = scene
    with connect(f"ws://127.0.0.1:{served.port}/vla-eval") as client:
        client.send(message("hello", {"protocol_version": 1}, 5))
        hello = read_msgpack(client.recv(), 0)
        assert (hello["type"], hello["seq"], hello["payload"]["protocol_version"]) == ("hello", 5, 1)
        client.send(message("episode_start", {"task": {}}))
        client.send(message("observation", {"images": {"agentview": picture}, "task_description": instruction}, 7))
        answer = read_msgpack(client.recv(), 0)
        expected = np.array(actions["bridge_orig"])
        expected[6] = -1 if expected[6] > 0.5 else 1
        assert (answer["type"], answer["seq"]) == ("action", 7)
        np.testing.assert_array_equal(answer["payload"]["actions"], expected.astype(np.float32))
        wrong = ["text", b"\xc1", message("nonsense", {}), message("observation", {}), message("action", {}), b"\x80"]
        for each in (*wrong, message("hello", None), message("hello", {}, "x")):
            client.send(each)
            error = read_msgpack(client.recv(), 0)
            assert error["type"] == "error" and error["payload"]["error"].startswith("422: ")


def test_chunks_over_vla_eval(oft_policy, oft_recorded, oft_golden):
    """One action per observation; the policy is asked at the ends of chunks, and after an episode's start."""
    model, processor = oft_policy()
    told = model.norm_stats["toy_robot"]["action"]
    policy, entry = OpenVLAPolicy(model, processor, unnorm_key="toy_robot"), oft_recorded["inputs"][0]
    with Served(policy, "toy_robot") as served, connect(f"ws://127.0.0.1:{served.port}/vla-eval") as client:
        for each in ("hello", "observation"):  # which way its gripper closes nobody knows
            client.send(message(each, {}))
            assert "do not say what the gripper's numbers mean" in read_msgpack(client.recv(), 0)["payload"]["error"]
    told |= {"names": ["x", "y", "z", "roll", "pitch", "yaw", "gripper"], "units": [""] * 6 + ["1 = open"]}
    chunk = np.array(entry["actions_l1_proprio_fp32"])
    names = {name: oft_golden[f"00.{camera}_u8"].numpy() for name, camera in (("front", "primary"), ("hand", "wrist"))}
    instruction = entry["prompt"].split("robot take to ")[1].removesuffix("?\nOut:")
    payload = {"images": names, "task_description": instruction, "states": np.array(entry["state"])}
    with Served(policy, "toy_robot") as served, connect(f"ws://127.0.0.1:{served.port}/vla-eval") as client:
        client.send(message("hello", {}))
        asked_for = read_msgpack(client.recv(), 0)["payload"]["observation_params"]
        assert asked_for["send_wrist_image"] and asked_for["send_state"]

        def act(**change) -> np.ndarray:
            client.send(message("observation", {**payload, **change}))
            return read_msgpack(client.recv(), 0)["payload"]["actions"]

        steps = [act() for _ in range(len(chunk) + 1)]
        asked = [len(served.asked)]
        client.send(message("episode_start", {}))
        again = act()
        asked.append(len(served.asked))
        act(task_description="wave")  # amid a chunk, something else to do
        asked.append(len(served.asked))
        for wrong in ({"images": {}}, {"unnorm_key": "toy_robot"}, {"age_ms": 9, "max_age_ms": 5}):
            client.send(message("observation", {**payload, **wrong}))  # amid a chunk, too
            assert read_msgpack(client.recv(), 0)["type"] == "error"
            act()  # and the chunk is over
            asked.append(len(served.asked))
    expected = chunk.astype(np.float32)
    expected[:, -1] = np.where(chunk[:, -1] > 0.5, -1, 1)
    np.testing.assert_allclose(steps, [*expected, expected[0]], atol=2e-5)
    np.testing.assert_allclose(again, expected[0], atol=2e-5)
    assert asked == [2, 3, 4, 5, 6, 7]


# --- Who may ask, and how much ---------------------------------------------------------------------------------------
def test_tokens(guarded, scene):
    picture, instruction, actions = scene
    request = {"image": write_json_numpy(picture), "instruction": instruction, "unnorm_key": "toy_robot"}
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "secret"},
        {"Authorization": "Basic secret"},
    ):
        assert post(guarded.url, request, headers)[0] == 401
        assert get(guarded.url + "/metadata", headers)[0] == get(guarded.url + "/metrics", headers)[0] == 401
        for path in ("/", "/vla-eval"):
            with pytest.raises(InvalidStatus, match="401"):
                connect(f"ws://127.0.0.1:{guarded.port}{path}", additional_headers=headers)
    for headers in (TOKEN, {"Authorization": "Api-Key other"}):
        status, answer = post(guarded.url, request, headers)
        assert status == 200
        np.testing.assert_allclose(array(answer), actions["toy_robot"], atol=1e-12)
    assert get(guarded.url + "/ready")[0] == get(guarded.url + "/")[0] == 200
    assert ActClient(guarded.url, token="secret").metadata()["unnorm_keys"]


def test_other_web_pages_may_not_ask(served, scene):
    picture, instruction, _ = scene
    request = {"image": write_json_numpy(picture), "instruction": instruction}
    for origin in ("https://example.com", "null", "http://["):
        assert post(served.url, request, {"Origin": origin})[0] == 403
    assert post(served.url, request, {"Origin": served.url})[0] == 200
    assert post(served.url, request, {"Host": "example.com:8000"})[0] == 403  # a name that leads to 127.0.0.1
    for host in ("localhost:8000", "127.0.0.5", "[::1]:8000"):
        assert post(served.url, request, {"Host": host})[0] == 200
    with pytest.raises(InvalidStatus, match="403"):
        connect(f"ws://127.0.0.1:{served.port}", origin="https://example.com")


def test_bodies_that_are_too_large(guarded):
    status, answer = post(guarded.url, bytes(LARGEST + 1), TOKEN)
    assert status == 413 and f"{LARGEST} bytes" in answer["error"]
    with socket.create_connection(("127.0.0.1", guarded.port)) as client:  # a gigabyte is refused before it comes
        client.sendall(
            b"POST /act HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: 1073741824\r\n\r\n"
        )
        assert client.recv(1000).startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", guarded.port)) as client:  # or in pieces whose sum nobody tells
        client.sendall(
            b"POST /act HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                client.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
    with connect(f"ws://127.0.0.1:{guarded.port}", additional_headers=TOKEN) as client:
        client.recv()
        client.send(bytes(LARGEST + 1))
        assert client.recv().startswith("413: A message may have")
        with pytest.raises(ConnectionClosed):
            client.send(bytes(2 * LARGEST + 1))
            client.recv()
    assert get(guarded.url + "/health")[0] == 200


def test_pictures_that_are_too_large(served, scene):
    from test_wire import png_of_size

    bomb = png_of_size(30000, 30000)
    assert len(bomb) < 1000
    status, answer = post(served.url, {"image": base64.b64encode(bomb).decode(), "instruction": "go"})
    assert status == 422 and "pixels" in answer["error"]
    with connect(f"ws://127.0.0.1:{served.port}/vla-eval") as client:
        image = {"__image__": True, "format": "png", "data": bomb, "shape": [30000, 30000, 3]}
        client.send(message("observation", {"images": {"front": image}, "task_description": "go"}))
        assert "pixels" in read_msgpack(client.recv(), 0)["payload"]["error"]


def test_slow_requests(policy, monkeypatch):
    monkeypatch.setattr(guard, "HEADERS_S", 0.5)
    monkeypatch.setattr(guard, "BODY_S", 0.5)
    with Served(policy, "bridge_orig") as served:
        slow = []
        for start in (b"", b"POST /act HT", b"POST /act HTTP/1.1\r\nHost: x\r\n"):
            slow.append(socket.create_connection(("127.0.0.1", served.port)))
            slow[-1].sendall(start)
        body = socket.create_connection(("127.0.0.1", served.port))
        body.sendall(b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        with connect(f"ws://127.0.0.1:{served.port}") as client:  # which may be silent as long as it likes
            client.recv()
            for each in slow:
                each.settimeout(5)
                assert each.recv(1000) == b""
            body.settimeout(5)
            assert body.recv(1000).startswith(b"HTTP/1.1 408")
            client.send("text")
            assert client.recv().startswith("422")
        for each in (*slow, body):
            each.close()


def test_open_paths_read_no_body(guarded, scene):
    """Nor do they take the place of those who may ask."""
    picture, instruction, actions = scene
    slow = []
    for _ in range(40):  # more than may be read at a time
        slow.append(socket.create_connection(("127.0.0.1", guarded.port)))
        slow[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        slow[-1].settimeout(5)
        assert slow[-1].recv(1000).startswith(b"HTTP/1.1 200")
    request = {"image": write_json_numpy(picture), "instruction": instruction, "unnorm_key": "toy_robot"}
    assert post(guarded.url, request, TOKEN)[0] == 200
    assert post(guarded.url, b"{}", path="/health")[0] == 401  # what brings a body needs a token
    for each in slow:
        each.close()


def test_vanished_clients_are_noticed(served):
    with connect(f"ws://127.0.0.1:{served.port}") as client:
        client.recv()
        (connection,) = [each for each in served.server.server_state.connections if hasattr(each, "frames")]
        socket_of_it = connection.transport.get_extra_info("socket")
        assert socket_of_it.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert socket_of_it.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == guard.KEEPALIVE["TCP_KEEPIDLE"]


def test_a_message_has_to_come_to_its_end(policy, monkeypatch, scene):
    monkeypatch.setattr(guard, "BODY_S", 0.5)
    with Served(policy, "bridge_orig") as served, connect(f"ws://127.0.0.1:{served.port}") as client:
        client.recv()
        client.socket.sendall(b"\x82\xfe\x10\x00")  # the head of a frame of 4096 bytes
        with pytest.raises(ConnectionClosed, match="come within 0.5 s"):
            client.recv(timeout=5)


def test_idle_connections_are_kept(served, monkeypatch, scene):
    """A robot that asks now and then does so over one connection."""
    monkeypatch.setattr(guard, "HEADERS_S", 0.3)
    picture, instruction, _ = scene
    client = ActClient(served.url)
    client.infer({"images": picture, "instruction": instruction})
    connection = client._connection.sock
    time.sleep(0.6)
    client.infer({"images": picture, "instruction": instruction})
    assert client._connection.sock is connection


def test_too_many_at_once(policy, scene):
    picture, instruction, _ = scene
    request = {"image": write_json_numpy(picture), "instruction": instruction}
    with Served(policy, "bridge_orig", max_queue=1, max_batch=1) as served:
        free, started = threading.Event(), threading.Event()
        answer = served.backend.infer_batch
        served.backend.batcher.infer_batch = lambda observations: (
            started.set() or free.wait(20) and answer(observations)
        )
        statuses = []
        threads = [threading.Thread(target=lambda: statuses.append(post(served.url, request)[0])) for _ in range(5)]
        threads[0].start()
        assert started.wait(10)  # nobody waits any more
        for thread in threads[1:]:
            thread.start()
        wait_for(lambda: len(statuses) >= 3, 10)
        free.set()
        for thread in threads:
            thread.join()
    assert sorted(statuses) == [200, 200, 503, 503, 503]


def test_a_policy_that_is_not_fit_does_not_become_ready(checkpoint, processor):
    from openvla import OpenVLAForActionPrediction

    blind = OpenVLAForActionPrediction.from_pretrained(checkpoint).float().eval()
    blind.get_image_features = None  # a policy that cannot even look
    policy = OpenVLAPolicy(blind, processor, "bridge_orig")
    policy.model.lm_head.weight.data[0, 0] = np.nan
    from openvla.serve.service import LocalPolicy, Service, Settings

    service = Service(LocalPolicy(policy, Settings()), Settings())
    asyncio.run(service.start())
    assert not service.ready and "not fit to act" in service.problem and "NaN" in service.problem


@pytest.mark.parametrize("script, scheme", [("robot_over_rest.py", "http"), ("robot_over_websocket.py", "ws")])
def test_the_examples_move_an_arm_that_is_none(served, script, scheme):
    example = Path(server.__file__).parents[1] / "examples" / script
    url = f"{scheme}://127.0.0.1:{served.port}"
    asked = len(served.asked)
    command = [sys.executable, example, "--url", url, "--steps", "3"]
    unsure = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert unsure.returncode and "does not say how many steps a second" in unsure.stderr
    ran = subprocess.run([*command, "--rate", "5"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("3 steps") and "'gripper': " in ran.stdout and len(served.asked) - asked == 3


def test_who_leaves_is_not_asked_for(policy, scene):
    """Over real sockets: what was waiting is not even tried."""
    picture, instruction, _ = scene
    body = json.dumps({"image": write_json_numpy(picture), "instruction": instruction}).encode()
    with Served(policy, "bridge_orig", max_batch=1) as served:
        free, started = threading.Event(), threading.Event()
        served.backend.batcher.infer_batch = lambda observations: (
            started.set()
            or served.asked.append(observations)
            or free.wait(20)
            and served.backend.infer_batch(observations)
        )
        statuses = []
        first = threading.Thread(target=lambda: statuses.append(post(served.url, body)[0]))
        first.start()
        assert started.wait(10)
        rest = socket.create_connection(("127.0.0.1", served.port))
        rest.sendall(b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        with connect(f"ws://127.0.0.1:{served.port}") as client:
            client.recv()
            client.send(packed(picture, instruction))
            wait_for(lambda: len(served.backend.batcher.waiting) == 2, 10)
        rest.close()
        wait_for(lambda: not served.backend.batcher.waiting, 10)
        free.set()
        first.join()
        assert statuses == [200] and len(served.asked) == 1
        assert 'outcome="Left",protocol="rest"} 1.0' in served.get("/metrics").decode()


def test_age_counts_from_the_first_byte(served, scene):
    picture, instruction, _ = scene
    request = {"image": write_json_numpy(picture), "instruction": instruction, "max_age_ms": 300}
    body = json.dumps(request).encode()
    with socket.create_connection(("127.0.0.1", served.port)) as slow:
        slow.sendall(b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body))
        time.sleep(0.5)
        slow.sendall(body)
        assert slow.recv(1000).startswith(b"HTTP/1.1 410")


def test_age_counts_from_the_first_byte_over_websockets(served, scene):
    picture, instruction, actions = scene
    with connect(f"ws://127.0.0.1:{served.port}") as client:
        client.recv()
        for pause, problem in ((0.0, None), (1.2, "410: ")):
            time.sleep(1.2)  # silence before it is nobody's age
            content = packed(picture, instruction, max_age_ms=1000)
            head, masked = content[: len(content) // 2], content[len(content) // 2 :]
            client.send([head, masked]) if not pause else client.send(slowly([head, masked], pause))
            answer = client.recv()
            if problem:
                assert answer.startswith(problem)
            else:
                np.testing.assert_allclose(read_msgpack(answer, 0)["actions"], [actions["bridge_orig"]], atol=1e-12)


def slowly(parts: list[bytes], pause: float):
    for part in parts:
        yield part
        time.sleep(pause)


def test_messages_sent_at_once_are_as_old_as_they_are(policy, scene):
    """And more than two ahead of their answers are too many."""
    picture, instruction, _ = scene
    with Served(policy, "bridge_orig") as served, connect(f"ws://127.0.0.1:{served.port}") as client:
        client.recv()
        answer = served.backend.infer_batch

        def slow(observations):
            time.sleep(1.0)
            return answer(observations)

        served.backend.batcher.infer_batch = slow
        for _ in range(8):
            client.send(packed(picture, instruction, max_age_ms=1500))
        answers = [client.recv() for _ in range(8)]
    told = [each[:3] if isinstance(each, str) else "ok" for each in answers]
    assert told == ["ok", "ok", "410", *["503"] * 5]


def test_messages_in_one_piece_of_data_are_answered_in_turn(served):
    with connect(f"ws://127.0.0.1:{served.port}") as client:
        client.recv()
        for _ in range(2):
            client.protocol.send_binary(b"x" * 10)
        client.socket.sendall(b"".join(client.protocol.data_to_send()))
        assert [client.recv()[:3] for _ in range(2)] == ["422"] * 2


def test_a_client_that_never_waits_is_cut_off(served):
    async def flood():  # in one thread: a sender that never lets go would keep another from reading why
        async with connect_async(f"ws://127.0.0.1:{served.port}") as client:
            await client.recv()
            for _ in range(10_000):
                await client.send(b"x" * 1000)
            while True:
                await client.recv()

    with pytest.raises(ConnectionClosed, match="without waiting for answers"):
        asyncio.run(flood())


def test_a_policy_that_fails_again_and_again_is_not_ready(policy, scene):
    picture, instruction, _ = scene
    request = {"image": write_json_numpy(picture), "instruction": instruction}
    with Served(policy, "bridge_orig") as served:
        answer = served.backend.infer_batch
        broken = True

        def infer(observations):
            if broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return answer(observations)

        served.backend.batcher.infer_batch = infer
        states = []
        for _ in range(5):
            states.append(get(served.url + "/ready")[0])
            status, told = post(served.url, request)
            assert status == 500 and "CUDA" not in told["error"]
        assert states == [200] * 5
        status, told = get(served.url + "/ready")
        assert status == 503 and "failed 5 times in a row" in json.loads(told)["problem"]
        assert "openvla_ready 0.0" in served.get("/metrics").decode()
        broken = False
        assert post(served.url, request)[0] == 200 and get(served.url + "/ready")[0] == 200


def test_what_was_clamped_is_told(model, processor, scene, tmp_path):
    picture, instruction, actions = scene
    bound = actions["bridge_orig"][0] - 0.01
    (tmp_path / "arm.json").write_text(json.dumps({"dims": {"x": [-9, bound]}}))
    (tmp_path / "no.json").write_text(json.dumps({"dims": {"x": [-9, bound]}, "beyond": "refuse"}))
    observation = {"images": picture, "instruction": instruction}
    with Served(OpenVLAPolicy(model, processor, "bridge_orig", limits=tmp_path / "arm.json"), only=True) as served:
        result = ActClient(served.url).infer(observation)
        assert result["actions"][0, 0] == bound and result["clamped"][0]["dim"] == "x"
        assert json.loads(get(served.url + "/metadata")[1])["unnorm_keys"] == ["bridge_orig"]
        with pytest.raises(RuntimeError, match="422: .*Unknown unnorm_key 'toy_robot'"):
            ActClient(served.url, "toy_robot").infer(observation)
    strict = OpenVLAPolicy(model, processor, "bridge_orig", limits=tmp_path / "no.json")
    refused = pytest.raises(RuntimeError, match="500: .*outside of the robot's limits")
    with Served(strict, only=True) as served, refused:  # it became ready, though
        ActClient(served.url).infer(observation)


# --- The process -----------------------------------------------------------------------------------------------------
def start(checkpoint, *options) -> tuple[subprocess.Popen, int]:
    """`openvla serve` in a process of its own, when it is ready; its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = "import sys, torch; torch.set_num_threads(1); from openvla.cli import main; main(sys.argv[1:])"
    command = [
        sys.executable,
        "-c",
        code,
        "serve",
        checkpoint,
        "--port",
        port,
        "--unnorm-key",
        "bridge_orig",
        "--no-check",
    ]
    process = subprocess.Popen(list(map(str, [*command, "--device", "cpu", *options])), stderr=subprocess.DEVNULL)
    ActClient(f"http://127.0.0.1:{port}").wait(120)
    return process, port


def test_sigterm_and_kill_under_load(checkpoint, scene):
    """What is asked is answered, who comes later is refused; after a kill clients go on by themselves."""
    picture, instruction, actions = scene
    process, port = start(checkpoint, "--dtype", "float32", "--max-batch", "2")
    url, counts, refused = f"http://127.0.0.1:{port}", {"ok": 0}, []
    observation = {"images": picture, "instruction": instruction}

    def ask_until_refused() -> None:
        client = ActClient(url, timeout=60)
        try:
            while True:
                np.testing.assert_allclose(client.infer(observation)["actions"][0], actions["bridge_orig"], atol=1e-12)
                counts["ok"] += 1
        except (OSError, RuntimeError) as error:
            refused.append(error)

    def ask_openpi_until_closed() -> None:
        with connect(f"ws://127.0.0.1:{port}") as client:
            client.recv()
            try:
                while True:
                    client.send(packed(picture, instruction))
                    answer = client.recv()
                    if isinstance(answer, str):
                        refused.append(RuntimeError(answer))
                        return
                    np.testing.assert_allclose(
                        read_msgpack(answer, 0)["actions"], [actions["bridge_orig"]], atol=1e-12
                    )
                    counts["ok"] += 1
            except ConnectionClosed as error:
                refused.append(error)

    threads = [threading.Thread(target=each) for each in [ask_until_refused] * 4 + [ask_openpi_until_closed] * 2]
    for thread in threads:
        thread.start()
    wait_for(lambda: counts["ok"] > 10, 60)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    assert process.wait(30) in (0, -signal.SIGTERM)
    assert len(refused) == 6
    for error in refused:  # refused with words, found nobody, or a clean close: never cut off while it waited
        words = str(error)
        clean = isinstance(error, ConnectionClosed) and error.rcvd is not None and error.rcvd.code in (1001, 1012)
        assert "503" in words or isinstance(error, ConnectionRefusedError) or clean, repr(error)

    process, port = start(checkpoint, "--dtype", "float32")
    client = ActClient(f"http://127.0.0.1:{port}", patience=120)
    impatient = ActClient(client.url, patience=120, max_age_ms=300)  # whose observation is worthless by then
    client.infer(observation)
    process.kill()
    process.wait()
    for gone in (ActClient(client.url), impatient):
        with pytest.raises(OSError):
            gone.infer(observation)
    code = [sys.executable, "-c", "from openvla.cli import main; import sys; main(sys.argv[1:])"]
    options = ["serve", str(checkpoint), "--port", str(port), "--unnorm-key", "bridge_orig", "--no-check"]
    process = subprocess.Popen([*code, *options, "--dtype", "float32", "--device", "cpu"], stderr=subprocess.DEVNULL)
    try:
        result = client.infer(observation)  # waits until it is there, and has warmed up
        np.testing.assert_allclose(result["actions"][0], actions["bridge_orig"], atol=1e-12)
    finally:
        process.terminate()
        process.wait(30)


# --- The command -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, problem",
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets others ask: give --token-file"),
        (["--max-batch", "0"], "max_batch must be above 0, got 0"),
        (["--max-age-ms", "-5"], "max_age_ms must be above 0"),
        (["--execute", "2"], "--execute 2: this policy's chunks have 1 steps"),
        (["--host", "127.evil.example"], "lets others ask"),
        (["--limits", "nothing.json"], "nothing.json"),
    ],
)
def test_options(checkpoint, options, problem, monkeypatch):
    monkeypatch.delenv("OPENVLA_TOKEN", raising=False)
    with pytest.raises((ValueError, OSError), match=problem):
        server.main([str(checkpoint), "--unnorm-key", "bridge_orig", "--device", "cpu", *options])


def test_tokens_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENVLA_TOKEN", "one")
    assert server.read_tokens(None) == ("one",)
    (tmp_path / "tokens").write_text("two\n\n three \n")
    assert server.read_tokens(tmp_path / "tokens") == ("two", "three")
    (tmp_path / "tokens").write_text("\n")
    with pytest.raises(ValueError, match="holds no token"):
        server.read_tokens(tmp_path / "tokens")


def test_logs_as_json():
    record = logging.LogRecord("openvla.serve", logging.INFO, "f", 1, "rest %s", ("ok",), None)
    record.ms = 2.5
    line = json.loads(server.JsonLines().format(record))
    assert line["message"] == "rest ok" and line["ms"] == 2.5 and line["level"] == "INFO" and "args" not in line
