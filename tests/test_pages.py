"""Pages in a real browser: upload, ask, and the numbers on the page are `predict_action`'s.

OPENVLA_BROWSER_PYTHON names an interpreter with playwright; /usr/bin/chromium is there (`make test-pages`).
"""

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from served import Served, wait_for

from openvla import OpenVLAForActionPrediction
from openvla.serve import app
from openvla.serve.policy import OpenVLAPolicy

pytestmark = pytest.mark.skipif("OPENVLA_BROWSER_PYTHON" not in os.environ, reason="see `make test-pages`")
SCRIPTS = Path(__file__).parent / "clients"


def browse(script: str, tmp_path, *args) -> dict:
    """What the script found. OPENVLA_SCREENSHOTS names a folder for its picture of the page."""
    out, shots = tmp_path / "found.json", Path(os.environ.get("OPENVLA_SCREENSHOTS", tmp_path))
    command = [os.environ["OPENVLA_BROWSER_PYTHON"], SCRIPTS / script, *args[:2], out, shots / args[2], *args[3:]]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads(out.read_text())


def test_the_page_of_the_server(model, processor, recorded, images, tmp_path):
    entry = recorded["inputs"][0]
    images[0].save(tmp_path / "picture.png")
    policy = OpenVLAPolicy(model, processor, "bridge_orig", clamp=True)
    with Served(policy, tokens=("secret",)) as served:
        options = ("--token", "secret", "--unnorm-key", "toy_robot")
        picture = tmp_path / "picture.png"
        found = browse("browse_page.py", tmp_path, served.url, entry["instruction"], "page.png", picture, *options)
    numbers = np.array(found["numbers"], dtype=float)  # (A, T)
    np.testing.assert_allclose(numbers[:, 0], entry["actions"]["toy_robot"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.array(found["shown"], dtype=float), numbers, atol=5e-5)
    assert found["drawing"][0] > found["drawing"][1] > 0 and float(found["camera"]) != numbers[0, 0]
    assert "1 to 2000 characters" in found["problem"] and found["hidden"]
    refused = [line for line in found["problems"] if "401" not in line and "422" not in line]
    assert not refused and {host for host in found["hosts"] if host not in ("data", "")} == {
        f"127.0.0.1:{served.port}"
    }


def test_the_page_of_a_policy_with_two_cameras_and_a_state(oft_policy, oft_recorded, oft_golden, tmp_path):
    entry = oft_recorded["inputs"][0]
    pictures = [tmp_path / f"{camera}.png" for camera in ("primary", "wrist")]
    for picture in pictures:
        Image.fromarray(oft_golden[f"00.{picture.stem}_u8"].numpy()).save(picture)
    instruction = entry["prompt"].split("robot take to ")[1].removesuffix("?\nOut:")
    with Served(OpenVLAPolicy(*oft_policy(), unnorm_key="toy_robot"), "toy_robot") as served:
        state = " ".join(map(repr, entry["state"]))
        found = browse(
            "browse_page.py", tmp_path, served.url, instruction, "page_chunks.png", *pictures, f"--state={state}"
        )
    numbers = np.array(found["numbers"], dtype=float).T  # (T, A)
    np.testing.assert_allclose(numbers, entry["actions_l1_proprio_fp32"], rtol=0, atol=2e-5)


@pytest.mark.skipif("OPENVLA_GRADIO_PYTHON" not in os.environ, reason="see `make test-pages`")
def test_the_page_of_the_space(checkpoint, processor, recorded, images, tmp_path):
    for name in ("app.py", "drawing.py"):
        shutil.copy(Path(app.__file__).with_name(name), tmp_path / name)
    policy = OpenVLAForActionPrediction.from_pretrained(checkpoint, dtype=torch.float32)
    policy.config.norm_stats = policy.norm_stats = {"bridge_orig": policy.norm_stats["bridge_orig"]}
    policy.save_pretrained(tmp_path / "policy")
    processor.save_pretrained(tmp_path / "policy")
    entry = recorded["inputs"][0]
    images[0].save(tmp_path / "picture.png")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [os.environ["OPENVLA_GRADIO_PYTHON"], "app.py", "--model", "policy", "--port", str(port)]
    page = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, 120)
        url = f"http://127.0.0.1:{port}"
        found = browse("browse_gradio.py", tmp_path, url, entry["instruction"], "space.png", tmp_path / "picture.png")
    finally:
        page.terminate()
        page.wait(30)
    values = [float(row[-1]) for row in found["rows"] if len(row) >= 3][:7]
    np.testing.assert_allclose(values, entry["actions"]["bridge_orig"], atol=1e-6)
    assert not found["problems"]
