"""The endpoint's handler, as its service runs it: from the policy's folder, in a process without this package."""

import ast
import base64
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import textwrap
import urllib.error
import urllib.parse
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import openvla
from openvla.serve import handler

HANDLER = Path(handler.__file__)
NAMES = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
UNITS = ["m"] * 3 + ["rad"] * 3 + ["1 = open"]

# What the service does around the handler: bodies of type image/* become PIL images, queries become parameters, and
# any exception becomes status 400 with its text.
SERVICE = """
    import sys
    sys.modules["openvla"] = None
    import importlib.util, io, json, os
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from urllib.parse import parse_qsl, urlsplit
    from PIL import Image

    handlers = {}
    for name in os.listdir(os.environ["FOLDER"]):
        folder = os.path.join(os.environ["FOLDER"], name)
        spec = importlib.util.spec_from_file_location("handler", os.path.join(folder, "handler.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        handlers["/" + name] = module.EndpointHandler(folder)

    class Service(BaseHTTPRequestHandler):
        def do_POST(self):
            url, body = urlsplit(self.path), self.rfile.read(int(self.headers["Content-Length"]))
            try:
                is_image = self.headers["Content-Type"].startswith("image/")
                data = {"inputs": Image.open(io.BytesIO(body)).convert("RGB")} if is_image else json.loads(body)
                if url.query:
                    booleans = {"true": True, "false": False}
                    data["parameters"] = {key: booleans.get(value, value) for key, value in parse_qsl(url.query)}
                status, reply = 200, handlers[url.path](data)
            except Exception as error:
                status, reply = 400, {"error": str(error)}
            content = json.dumps(reply, allow_nan=False).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    print(server.server_port, flush=True)
    server.serve_forever()
"""


def start(script: str, **environment) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def export(model, processor, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    shutil.copy(HANDLER, folder / "handler.py")
    return folder


@pytest.fixture(scope="module")
def two_cameras(checkpoint):
    """A policy of two cameras and two steps; the weights are the same. Returns `(model, processor)`."""
    options = {"num_cameras": 2, "action_chunk": 2, "dtype": torch.float32}
    model = openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, **options).eval()
    return model, openvla.OpenVLAProcessor.from_pretrained(checkpoint, num_cameras=2)


@pytest.fixture(scope="module")
def service(checkpoint, processor, two_cameras, oft_policy, tmp_path_factory):
    """Address of a service: `/one`, `/two` (two cameras), and of OpenVLA-OFT `/l1`, `/diffusion` and `/token`."""
    folder = tmp_path_factory.mktemp("policies")
    as_released = openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, dtype=torch.bfloat16)
    export(as_released, processor, folder / "one")
    export(*two_cameras, folder / "two")
    for head in ("l1", "diffusion", "token"):
        export(*oft_policy(head, proprio=head != "token"), folder / head)
    process = start(SERVICE, FOLDER=str(folder), HF_MODULES_CACHE=str(tmp_path_factory.mktemp("modules")))
    try:
        port = process.stdout.readline().strip()
        assert port, "the service did not start: see the captured stderr"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def ask(service):
    """`ask(inputs, policy="one", **parameters)` -> `(status, reply)`; bytes go as a body of type image/png."""

    def ask(inputs, policy: str = "one", **parameters):
        body, kind, query = inputs, "image/png", "?" + urllib.parse.urlencode(parameters)
        if not isinstance(inputs, bytes):
            body = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
            kind, query = "application/json", ""
        request = urllib.request.Request(f"{service}/{policy}{query}", body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    return ask


@pytest.fixture(scope="module")
def observations(recorded, golden) -> list[dict]:
    """The recorded inputs as observations of a request; the last has an empty instruction, which is refused."""
    return [
        {
            "image": encode(golden[f"{entry['index']:02d}.image_png"].numpy().tobytes()),
            "instruction": entry["instruction"],
        }
        for entry in recorded["inputs"][:-1]
    ]


def encode(content: bytes) -> str:
    return base64.b64encode(content).decode()


def expected(recorded, index: int, key: str = "bridge_orig") -> list[float]:
    return recorded["inputs"][index]["actions"][key]


# --- Actions ---
def test_recorded_actions(ask, observations, recorded):
    for index, observation in enumerate(observations):
        status, reply = ask(observation, unnorm_key="bridge_orig")
        assert status == 200
        np.testing.assert_allclose(reply["action"], expected(recorded, index), rtol=0, atol=1e-12)


def test_everything_in_a_reply(ask, observations, recorded):
    status, reply = ask(observations[0], unnorm_key="bridge_orig")
    assert status == 200 and reply.pop("milliseconds") > 0
    np.testing.assert_allclose(reply.pop("action"), expected(recorded, 0), rtol=0, atol=1e-12)
    assert reply == {
        "unnorm_key": "bridge_orig",
        "dims": [{"name": name, "unit": unit} for name, unit in zip(NAMES, UNITS)],
        "token_ids": recorded["inputs"][0]["action_ids"],
        "replaced": [False] * 7,
    }


def test_a_batch_is_answered_in_order(ask, observations, recorded):
    status, replies = ask(observations, unnorm_key="toy_nomask_6d")
    assert status == 200 and len(replies) == len(observations)
    for index, reply in enumerate(replies):
        np.testing.assert_allclose(reply["action"], expected(recorded, index, "toy_nomask_6d"), rtol=0, atol=1e-12)
    status, replies = ask(observations[:1], unnorm_key="bridge_orig")
    assert status == 200 and isinstance(replies, list)
    np.testing.assert_allclose(replies[0]["action"], expected(recorded, 0), rtol=0, atol=1e-12)


def test_a_bare_image_takes_its_instruction_from_the_parameters(ask, observations, recorded):
    png, instruction = base64.b64decode(observations[1]["image"]), observations[1]["instruction"]
    status, reply = ask(png, instruction=instruction, unnorm_key="bridge_orig", strict="true")
    assert status == 200
    np.testing.assert_allclose(reply["action"], expected(recorded, 1), rtol=0, atol=1e-12)


def test_data_urls(ask, observations, recorded):
    observation = {**observations[2], "image": "data:image/png;base64," + observations[2]["image"]}
    status, reply = ask(observation, unnorm_key="bridge_orig")
    assert status == 200
    np.testing.assert_allclose(reply["action"], expected(recorded, 2), rtol=0, atol=1e-12)


def test_sampling_parameters_arrive(ask, observations, recorded):
    _, narrow = ask(observations[0], unnorm_key="bridge_orig", do_sample=True, top_p=1e-9)
    assert narrow["token_ids"] == recorded["inputs"][0]["action_ids"]
    _, hot = ask(observations[0], unnorm_key="bridge_orig", do_sample=True, temperature=1000)
    assert hot["token_ids"] != recorded["inputs"][0]["action_ids"]


def test_two_cameras_and_two_steps(ask, observations, images, two_cameras):
    model, processor = two_cameras
    observation = {"images": [observations[3]["image"], observations[0]["image"]], "instruction": "go"}
    status, reply = ask(observation, "two", unnorm_key="bridge_orig")
    inputs = processor(processor.build_prompt("go"), [images[3], images[0]])
    result = model.predict_action(**inputs, unnorm_key="bridge_orig", return_dict=True)
    assert status == 200 and np.shape(reply["action"]) == (2, 7) and any(reply["replaced"])
    np.testing.assert_allclose(reply["action"], result["actions"], rtol=0, atol=1e-12)
    assert reply["replaced"] == result["replaced"][0].tolist()
    status, reply = ask(observation, "two", unnorm_key="bridge_orig", strict=True)
    assert status == 400 and "preferred a token that is not an action" in reply["error"]


def observe(recorded, golden, index: int, name: str = "proprio") -> dict:
    """A recorded observation of OpenVLA-OFT, as JSON."""
    entry, images = recorded["inputs"][index], []
    for camera in ("primary", "wrist"):
        file = io.BytesIO()
        Image.fromarray(golden[f"{index:02d}.{camera}_u8"].numpy()).save(file, "PNG")
        images.append(encode(file.getvalue()))
    instruction = re.search(r"take to (.*)\?\nOut:", entry["prompt"])[1]
    return {"images": images, "instruction": instruction, name: entry["state"]}


def test_chunks_of_policies_that_take_the_robots_state(ask, oft_recorded, oft_golden):
    entries = oft_recorded["inputs"]
    observations = [observe(oft_recorded, oft_golden, index, name) for index, name in ((0, "proprio"), (7, "state"))]
    status, replies = ask(observations, "l1", unnorm_key="toy_robot")
    assert status == 200, replies
    for index, reply in zip((0, 7), replies):
        assert np.shape(reply["action"]) == (8, 7) and set(reply) == {"action", "unnorm_key", "dims", "milliseconds"}
        np.testing.assert_allclose(reply["action"], entries[index]["actions_l1_proprio_fp32"], rtol=0, atol=2e-5)
    _, alone = ask(observations[1], "l1", unnorm_key="toy_robot")
    np.testing.assert_allclose(alone["action"], entries[7]["actions_l1_proprio_fp32"], rtol=0, atol=1e-5)


def test_noise_has_a_seed(ask, oft_policy, oft_recorded, oft_golden):
    observation, options = observe(oft_recorded, oft_golden, 0), {"unnorm_key": "toy_robot", "num_denoising_steps": 5}
    answers = [ask(observation, "diffusion", **options, seed=seed)[1]["action"] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    model, processor = oft_policy("diffusion")
    images = [Image.open(io.BytesIO(base64.b64decode(image))) for image in observation["images"]]
    inputs = processor(processor.build_prompt(observation["instruction"]), images, observation["proprio"])
    noise = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 8, 7), np.float32))
    expected = model.predict_action(**inputs, unnorm_key="toy_robot", noise=noise, num_denoising_steps=5)
    np.testing.assert_allclose(answers[0], expected, rtol=0, atol=1e-4)
    _, replies = ask([observation] * 2, "diffusion", **options, seed=1)  # whoever else is asked about
    np.testing.assert_allclose([reply["action"] for reply in replies], [answers[0]] * 2, rtol=0, atol=1e-4)
    for steps in (7, 0, -1, -5):
        status, reply = ask(observation, "diffusion", unnorm_key="toy_robot", num_denoising_steps=steps)
        assert status == 400 and f"a divisor of 50; got {steps}" in reply["error"]
    status, reply = ask(observation, "diffusion", unnorm_key="toy_robot", seed=-1)
    assert status == 400 and "A seed is an integer from 0" in reply["error"]


def test_tokens_of_a_chunk_decoded_in_parallel(ask, oft_recorded, oft_golden):
    observation = observe(oft_recorded, oft_golden, 0)
    observation.pop("proprio")
    status, reply = ask(observation, "token", unnorm_key="toy_robot")
    assert status == 200 and np.shape(reply["action"]) == (8, 7)
    assert len(reply["token_ids"]) == len(reply["replaced"]) == 56
    assert all(31744 <= token < 32000 for token in reply["token_ids"])


@pytest.mark.parametrize(
    "state, message",
    [
        ({}, r"takes the robot's state as \"proprio\", 8 finite numbers .* got 0 of \['proprio', 'state'\]"),
        ({"proprio": [0.0] * 8, "state": [0.0] * 8}, "got 2 of"),
        ({"proprio": [0.0] * 7}, "8 finite numbers in the units of its dataset, got 7 entries: "),
        ({"state": [0.0] * 7 + [None]}, "got 8 entries: .*None"),
        ({"state": [0.0] * 7 + [True]}, "got 8 entries: .*True"),
        ({"state": [0.0] * 7 + [float("nan")]}, "got 8 entries: .*nan"),
        ({"state": "0 0 0 0 0 0 0 0"}, "got '0 0 0 0 0 0 0 0'"),
    ],
)
def test_states_that_are_refused(state, message, ask, oft_recorded, oft_golden):
    observation = observe(oft_recorded, oft_golden, 0)
    observation.pop("proprio")
    status, reply = ask(observation | state, "l1", unnorm_key="toy_robot")
    assert status == 400
    with pytest.raises(ValueError, match=message):
        raise ValueError(reply["error"])


def test_one_image_is_not_enough_for_two_cameras(ask, oft_recorded, oft_golden):
    observation = observe(oft_recorded, oft_golden, 0)
    observation["images"].pop()
    status, reply = ask(observation, "l1", unnorm_key="toy_robot")
    assert status == 400 and "looks at 2 image(s) per observation, got 1" in reply["error"]


# --- Refusals ---
def png(width: int, height: int) -> bytes:
    """A black PNG of one bit per pixel: 30000 x 30000 take 109 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    compressor, row = zlib.compressobj(9), bytes(width // 8 + 1)
    pixels = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "inputs, message",
    [
        ("iVBORw0KGgo=", "Expected an observation .* got 'iVBORw0KGgo='"),
        ([], "Expected 1 to 16 observations in a request, got 0"),
        ([{}] * 17, "Expected 1 to 16 observations in a request, got 17"),
        ({"instruction": "go"}, 'An observation needs either "image" or'),
        ({"image": "", "images": [], "instruction": "go"}, 'An observation needs either "image" or'),
        ({"image": "", "instruction": "go", "pose": [0.0]}, r"Unknown keys \['pose'\] in an observation"),
        ({"image": "", "instruction": "go", "state": [0.0]}, "does not take the robot's state: leave 'state' out"),
        ({"images": ["", ""], "instruction": "go"}, r"looks at 1 image\(s\) per observation, got 2"),
        ({"images": "", "instruction": "go"}, r"looks at 1 image\(s\) per observation, got ''"),
        ({"image": "GOOD"}, "Expected an instruction such as 'pick up the cup', got None"),
        ({"image": "GOOD", "instruction": 5}, "Expected an instruction such as 'pick up the cup', got 5"),
        ({"image": "GOOD", "instruction": " "}, "Expected an instruction such as 'pick up the cup', got ' '"),
        ({"image": "GOOD", "instruction": "a" * 2001}, "may have 2000 characters, got 2001"),
        ({"image": "GOOD", "instruction": "go <image>"}, r"control tokens \['<image>'\]"),
        ({"image": "http://169.254.169.254/latest", "instruction": "go"}, "URLs and paths are not read"),
        ({"image": "/etc/passwd", "instruction": "go"}, "URLs and paths are not read"),
        ({"image": "etc/hostname", "instruction": "go"}, "Expected a PNG, JPEG or WebP file, got 9 bytes"),
        ({"image": "GO\nOD", "instruction": "go"}, "base64 without line breaks, got 'GO"),
        (
            {"image": "data:image/gif;base64,GOOD", "instruction": "go"},
            "base64 without line breaks, got 'data:image/gif",
        ),
        ({"image": "", "instruction": "go"}, "Expected a PNG, JPEG or WebP file, got 0 bytes"),
        ({"image": None, "instruction": "go"}, "base64 of a PNG, JPEG or WebP file, got None"),
        ({"image": [[0, 0, 0]], "instruction": "go"}, "base64 of a PNG, JPEG or WebP file, got list"),
        ({"image": encode(b"GIF89a" + bytes(50)), "instruction": "go"}, "Expected a PNG, JPEG or WebP file, got 56 b"),
        (
            {"image": encode(png(30000, 30000)), "instruction": "go"},
            "may have 16777216 pixels, got far more: .*900000000",
        ),
        ({"image": encode(png(4097, 4096)), "instruction": "go"}, "may have 16777216 pixels, got 4097x4096"),
        ({"image": encode(png(64, 64)[:50]), "instruction": "go"}, "The image of 64x64 pixels is damaged"),
    ],
)
def test_observations_that_are_refused(inputs, message, ask, observations):
    if isinstance(inputs, dict) and inputs.get("image") == "GOOD":
        inputs = {**inputs, "image": observations[0]["image"]}
    status, reply = ask(inputs, unnorm_key="bridge_orig")
    assert status == 400
    with pytest.raises(ValueError, match=message):
        raise ValueError(reply["error"])


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({}, r"unnorm_key is needed: this checkpoint has statistics for \['bridge_orig', 'toy_nomask_6d', 'toy_rob"),
        ({"unnorm_key": "bridge"}, r"Unknown unnorm_key 'bridge': this checkpoint has statistics for \['bridge_orig'"),
        ({"unnorm_key": ["bridge_orig"]}, "Parameter 'unnorm_key' must be a str, got list"),
        ({"max_new_tokens": 7}, r"Unknown parameters \['max_new_tokens'\]; known: \['do_sample'"),
        ({"strict": "yes"}, "Parameter 'strict' must be a bool, got 'yes'"),
        ({"temperature": "hot"}, "Parameter 'temperature' must be a finite number, got 'hot'"),
        ({"temperature": True}, "Parameter 'temperature' must be a finite number, got True"),
        ({"temperature": float("inf")}, "Parameter 'temperature' must be a finite number, got inf"),
        ({"unnorm_key": "bridge_orig", "top_p": 0.9}, r"\['top_p'\] have no effect without do_sample: true"),
        ({"unnorm_key": "bridge_orig", "seed": 1}, r"\['seed'\] are for heads that denoise, which this policy does"),
        ({"unnorm_key": "bridge_orig", "seed": True}, "Parameter 'seed' must be a int, got True"),
        ({"unnorm_key": "bridge_orig", "do_sample": True, "temperature": -1}, "Sampling needs temperature > 0"),
    ],
)
def test_parameters_that_are_refused(parameters, message, ask, observations):
    status, reply = ask(observations[0], **parameters)
    assert status == 400
    with pytest.raises(ValueError, match=message):
        raise ValueError(reply["error"])


def test_parameters_beside_the_inputs_are_not_overlooked():
    with pytest.raises(ValueError, match=r"Unknown keys \['strict', 'unnorm_key'\] in a request"):
        handler.EndpointHandler.__call__(None, {"inputs": {}, "unnorm_key": "toy_robot", "strict": True})


def test_a_bare_image_needs_an_instruction(ask, observations):
    status, reply = ask(base64.b64decode(observations[0]["image"]), unnorm_key="bridge_orig")
    assert status == 400 and 'parameters["instruction"]' in reply["error"]


def test_encoded_images_are_measured_before_they_are_decoded():
    with pytest.raises(ValueError, match="may have 12582912 characters of base64, got 12582913"):
        handler.decode_image("!" * (handler.MAX_ENCODED + 1))


def test_pictures_are_turned_upright():
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    exif, file = lying.getexif(), io.BytesIO()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    lying.save(file, "PNG", exif=exif)
    assert np.array_equal(handler.decode_image(encode(file.getvalue())), upright)


def test_policies_that_do_not_see_or_have_no_units_do_not_start(fresh_model, processor, tmp_path):
    fresh_model.norm_stats = None
    export(fresh_model, processor, tmp_path / "unitless")
    fresh_model.norm_stats = {"robot": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}}
    torch.nn.init.zeros_(fresh_model.model.projector.fc3.weight)
    export(fresh_model, processor, tmp_path / "blind")
    script = """
        import sys
        sys.modules["openvla"] = None
        import os
        sys.path.insert(0, os.path.join(os.environ["FOLDER"], "blind"))
        from handler import EndpointHandler
        for name in ("unitless", "blind"):
            try:
                EndpointHandler(os.path.join(os.environ["FOLDER"], name))
            except (KeyError, RuntimeError) as error:
                print(type(error).__name__, error.args[0])
    """
    process = start(script, FOLDER=str(tmp_path), HF_MODULES_CACHE=str(tmp_path / "modules"))
    printed, _ = process.communicate(timeout=120)
    first, second = printed.splitlines()
    assert first.startswith("KeyError This checkpoint has no action statistics")
    assert second.startswith("RuntimeError Another image changes the state behind the action by 0.0e+00")


def test_it_imports_only_what_a_checkpoint_may_rely_on():
    allowed = {"numpy", "torch", "PIL", "transformers"} | set(sys.stdlib_module_names)
    for node in ast.walk(ast.parse(HANDLER.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module in allowed
