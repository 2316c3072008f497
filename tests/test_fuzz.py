"""Ten thousand broken messages on each protocol: each is refused with words, none gets an action, the server stays.

Whether a message that got an action deserved it, another reader decides than the server's own.
"""

import base64
import copy
import http.client
import io
import json
import math
import subprocess

import msgpack
import numpy as np
import pytest
from PIL import Image
from test_server import start
from test_wire import png_of_size
from websockets.sync.client import connect

MESSAGES = 10_000
GROWTH = 16 * 2**20  # bytes that the process may grow by after the first tenth
EVIL_SIMPLE = [None, True, -1, 2**63, 1e308, "", " ", "x" * 5000, [], {}, [[[]]], "\ud800", "../../etc/passwd", "\x00"]
EVIL_ARRAYS = [
    ("|O", [1], bytes(8)),
    ("|u1", [2**31, 2**31, 3], b""),
    ("|u1", [4, 4, 3], bytes(47)),
    ("<f4", [4, 4, 3], bytes(192)),
    ("<f8", [7], np.full(7, np.nan).tobytes()),
    ("|u1", [0, 0, 3], b""),
    ("|V4", [4], bytes(16)),
    ("|u1", [-4, -4, 3], bytes(48)),
    ("<U4", [1], bytes(16)),
    ("", [], b""),
]
BOMB = png_of_size(30000, 30000)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(checkpoint):
    process, port = start(checkpoint, "--dtype", "float32", "--max-body-mb", "2")
    yield process, port
    process.terminate()
    process.wait(30)


def resident(process: subprocess.Popen) -> int:
    """Bytes of memory that the process holds."""
    with open(f"/proc/{process.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


# --- Breaking messages -----------------------------------------------------------------------------------------------
def break_bytes(message: bytes, rng: np.random.Generator) -> bytes:
    kind, data = rng.integers(5), bytearray(message)
    places = rng.integers(0, len(data), 1 + rng.integers(8))
    if kind == 0:
        return message[: places[0]]
    if kind == 1:
        for place in places:
            data[place] ^= 1 << rng.integers(8)
    elif kind == 2:
        data[places[0] : places[0]] = rng.bytes(1 + rng.integers(64))
    elif kind == 3:
        data = bytearray(rng.bytes(rng.integers(2000)))
    else:  # where the names are, rather than the pixels
        data[rng.integers(0, min(len(data), 120))] = rng.integers(256)
    return bytes(data)


def break_content(content: dict, evil: list, rng: np.random.Generator) -> dict:
    content = copy.deepcopy(content)
    inside = [content] + [value for value in content.values() if isinstance(value, dict)]
    target = inside[rng.integers(len(inside))]
    name = list(target)[rng.integers(len(target))]
    if rng.integers(4) == 0:
        del target[name]
    else:
        target[name] = evil[rng.integers(len(evil))]
    return content


# --- Another reader --------------------------------------------------------------------------------------------------
def is_picture(value, data: str, dtype: str, shape: str) -> bool:
    """Of a map that stands for an array."""
    if not isinstance(value, dict):
        return False
    try:
        raw = value[data] if isinstance(value[data], bytes) else base64.b64decode(value[data])
        sizes = list(value[shape])
        sides = sizes[:2] if sizes[0] != 3 else sizes[1:]
        right = len(sizes) == 3 and 3 in (sizes[0], sizes[2]) and min(sides) > 0
        return right and np.dtype(value[dtype]) == np.uint8 and math.prod(sizes) == len(raw)
    except (KeyError, TypeError, ValueError, IndexError):
        return False


def is_whole(content, is_image) -> bool:
    """Whether one picture and an instruction are there."""
    if not isinstance(content, dict):
        return False
    flat = dict(content)
    for value in content.values():
        if isinstance(value, dict):
            flat |= {name: each for name, each in value.items() if isinstance(name, str)}
    words = [flat[name] for name in ("instruction", "prompt", "task_description", "task") if name in flat]
    said = len(words) == 1 and isinstance(words[0], str) and len(words[0].strip()) > 0 and len(words[0]) <= 2000
    return said and any(is_image(value) for value in flat.values()) and flat.get("unnorm_key") != "nobody"


def is_refusal(text: str) -> bool:
    return bool(text) and "Traceback" not in text and 'File "' not in text


def check(process, port: int, rng, make, ask) -> None:
    """ask(message) -> (whether it got an action, the words of a refusal)."""
    acted, start_size = 0, 0
    for number in range(MESSAGES):
        message, deserves = make()
        got_action, words = ask(message)
        if got_action:
            acted += 1
            assert deserves(message), message[:2000]
        else:
            assert is_refusal(words), words
        if number == MESSAGES // 10:
            start_size = resident(process)
    assert process.poll() is None and 0 < acted < MESSAGES / 5
    assert resident(process) - start_size < GROWTH
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200


def test_rest(server, small_scene):
    process, port = server
    picture, instruction = small_scene
    rng = np.random.default_rng(0)
    arrays = [{"__numpy__": base64.b64encode(data).decode(), "dtype": d, "shape": s} for d, s, data in EVIL_ARRAYS]
    evil = [*EVIL_SIMPLE, *arrays, base64.b64encode(BOMB).decode(), math.nan, math.inf, "R0lGODlh"]
    image = {"__numpy__": base64.b64encode(picture.tobytes()).decode(), "dtype": "|u1", "shape": list(picture.shape)}
    valid = {"image": image, "instruction": instruction, "unnorm_key": "bridge_orig"}

    def make():
        if rng.integers(2):
            broken = break_content(valid, evil, rng)
            body = json.dumps({"encoded": json.dumps(broken)} if rng.integers(4) == 0 else broken).encode()
        else:
            body = break_bytes(json.dumps(valid).encode(), rng)
        return body, deserves

    def deserves(body: bytes) -> bool:
        content = json.loads(body)
        content = json.loads(content["encoded"]) if "encoded" in content else content
        return is_whole(content, lambda value: is_picture(value, "__numpy__", "dtype", "shape"))

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(body: bytes):
        connection.request("POST", "/act", body)
        answer = connection.getresponse()
        content = json.loads(answer.read())
        assert answer.status == 200 or 400 <= answer.status < 500, content
        return answer.status == 200, "" if answer.status == 200 else content["error"]

    check(process, port, rng, make, ask)


@pytest.mark.parametrize("protocol", ["openpi", "vla-eval"])
def test_websockets(server, small_scene, protocol):
    process, port = server
    picture, instruction = small_scene
    rng = np.random.default_rng(1)
    name = (lambda text: text.encode()) if protocol == "openpi" else (lambda text: text)

    def as_map(dtype, shape, data):
        return {name("__ndarray__"): True, name("data"): data, name("dtype"): dtype, name("shape"): shape}

    evil = [value for value in EVIL_SIMPLE if value != "\ud800"]
    evil += [as_map(*array) for array in EVIL_ARRAYS] + [msgpack.ExtType(5, b"x"), math.nan, b"\xff" * 9]
    evil += [
        {"__image__": True, "format": "png", "data": data, "shape": [1, 1, 3]} for data in (BOMB, b"GIF8", "x", None)
    ]
    image = as_map("|u1", list(picture.shape), picture.tobytes())
    if protocol == "openpi":
        valid, path = {"observation/image": image, "prompt": instruction}, "/"
    else:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        image = {"__image__": True, "format": "png", "data": file.getvalue(), "shape": list(picture.shape)}
        valid = {"images": {"front": image}, "task_description": instruction}
        path = "/vla-eval"

    def wrap(payload):
        if protocol == "openpi":
            return payload
        whole = {"type": "observation", "payload": payload, "seq": 3, "timestamp": 0.0}
        return break_content(whole, evil, rng) if rng.integers(8) == 0 else whole

    def make():
        if rng.integers(2):
            return msgpack.packb(wrap(break_content(valid, evil, rng))), deserves
        return break_bytes(msgpack.packb(wrap(valid)), rng), deserves

    def is_image(value) -> bool:
        if not isinstance(value, dict):
            return False
        if "__image__" in value:
            return value.get("format") != "raw" and Image.open(io.BytesIO(value["data"])).size[0] < 4096
        return any(is_picture(value, *(key(each) for each in ("data", "dtype", "shape"))) for key in (str, str.encode))

    def deserves(message: bytes) -> bool:
        content = msgpack.unpackb(message, strict_map_key=False)
        if protocol == "vla-eval":
            if content["type"] != "observation":
                return content["type"] == "hello"
            content = content["payload"]
        inner = [value for value in content.values() if isinstance(value, dict)]
        whole = content if any(map(is_image, content.values())) else {**content, **(inner[0] if inner else {})}
        return is_whole(whole, is_image)

    with connect(f"ws://127.0.0.1:{port}{path}", max_size=None) as client:
        if protocol == "openpi":
            client.recv()

        def ask(message: bytes):
            client.send(message)
            if protocol == "vla-eval" and is_silent(message):
                return False, "none is due"
            answer = client.recv(timeout=60)
            if protocol == "openpi":
                return not isinstance(answer, str), answer if isinstance(answer, str) else ""
            content = msgpack.unpackb(answer)
            return content["type"] != "error", content["payload"].get("error", "")

        check(process, port, rng, make, ask)


def is_silent(message: bytes) -> bool:
    """Whether the protocol has no answer to it: the end or the start of an episode, by chance."""
    try:
        content = msgpack.unpackb(message, strict_map_key=False)
        fields = isinstance(content.get("payload"), dict) and isinstance(content.get("seq"), int)
        return fields and content["type"] in ("episode_start", "episode_end")
    except (ValueError, TypeError, AttributeError, KeyError, msgpack.UnpackException):
        return False


@pytest.fixture
def small_scene() -> tuple[np.ndarray, str]:
    """Small enough for bits that flip to hit names and numbers often."""
    return np.random.default_rng(3).integers(0, 256, (16, 24, 3), dtype=np.uint8), "pick up the cup"
