"""The demo page: its function on every machine, the page itself where gradio is installed.

OPENVLA_GRADIO_PYTHON names the interpreter of an environment with torch, transformers and gradio 6.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import openvla
from openvla.serve import app

SERVE = Path(app.__file__).parent


@pytest.fixture(scope="module")
def two_steps(checkpoint):
    return openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, action_chunk=2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def space(checkpoint, processor, tmp_path_factory):
    """A folder as a Space has it: the demo's two files, and beside them which model to show."""
    folder = tmp_path_factory.mktemp("space")
    for name in ("app.py", "drawing.py"):
        shutil.copy(SERVE / name, folder / name)
    model = openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(folder / "policy")
    processor.save_pretrained(folder / "policy")
    (folder / "model_id.txt").write_text(f"{folder / 'policy'}\n")
    return folder


def run_in_the_space(python: str, script: str, space: Path, picture: Path, instruction: str) -> dict:
    """Runs a script where `import openvla` fails and `app` is the Space's; returns the JSON of its last line."""
    script = "import sys; sys.modules['openvla'] = None\n" + textwrap.dedent(script)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment |= {"HF_MODULES_CACHE": str(space / "modules"), "GRADIO_TEMP_DIR": str(space / "uploads")}
    environment |= {"PICTURE": str(picture), "INSTRUCTION": instruction}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, "-c", script], cwd=space, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


# --- The function ---
def test_recorded_actions(model, processor, images, recorded):
    for entry, image in zip(recorded["inputs"][:4], images):
        found = app.act(model, processor, [image], entry["instruction"], "bridge_orig")
        assert found["actions"].shape == (1, 7) and found["token_ids"] == entry["action_ids"]
        np.testing.assert_allclose(found["actions"][0], entry["actions"]["bridge_orig"], rtol=0, atol=1e-12)
        expected = model.action_tokenizer.decode(np.array([entry["action_ids"]]))
        np.testing.assert_allclose(found["normalized"], expected, atol=1e-6)
        assert found["unnorm_key"] == "bridge_orig" and found["milliseconds"] > 0


def test_a_table_of_one_step(model, processor, images, recorded):
    found = app.act(model, processor, [images[0]], recorded["inputs"][0]["instruction"], "bridge_orig")
    assert app.headers(1) == ["dim", "unit", "value"]
    rows = app.tabulate(found)
    values = recorded["inputs"][0]["actions"]["bridge_orig"]
    assert rows[0] == ["x", "m", f"{values[0]:.6f}"] and rows[6] == ["gripper", "1 = open", f"{values[6]:.6f}"]
    assert "⚠" not in app.remark(found) and "**bridge_orig**" in app.remark(found)


def test_a_chunk(two_steps, processor, images):
    found = app.act(two_steps, processor, [images[0]], "go", "bridge_orig")
    inputs = processor(processor.build_prompt("go"), images[0])
    expected = two_steps.predict_action(**inputs, unnorm_key="bridge_orig", return_dict=True)
    assert np.array_equal(found["actions"], expected["actions"]) and found["actions"].shape == (2, 7)
    assert app.headers(2) == ["dim", "unit", "step 0", "step 1"]
    assert app.tabulate(found)[2] == ["z", "m", *(f"{value:.6f}" for value in expected["actions"][:, 2])]
    points = app.trace(found)
    assert len(points) == 14 and [point[2] for point in points[:3]] == ["x", "y", "z"]
    assert points[7] == (1, found["normalized"][1, 0], "x")
    replaced = int(expected["replaced"].sum())
    assert replaced > 0 and f"no action at {replaced} of 14 places" in app.remark(found)


@pytest.mark.parametrize(
    "picture, instruction, unnorm_key, message",
    [
        (None, "go", "bridge_orig", r"needs 1 image\(s\); number 1 is missing"),
        (0, "", "bridge_orig", "Expected an instruction such as"),
        (0, "go", None, r"unnorm_key is needed: .*'bridge_orig'"),
        (0, "go", "bridge", "Unknown unnorm_key 'bridge'"),
    ],
)
def test_what_cannot_be_answered_is_refused(picture, instruction, unnorm_key, message, model, processor, images):
    picture = None if picture is None else images[picture]
    with pytest.raises((ValueError, KeyError), match=message):
        app.act(model, processor, [picture], instruction, unnorm_key)


def test_a_chunk_of_a_policy_that_takes_the_robots_state(oft_policy, oft_recorded, oft_golden):
    model, processor = oft_policy()
    entry = oft_recorded["inputs"][3]
    pictures = [Image.fromarray(oft_golden[f"03.{name}_u8"].numpy()) for name in ("primary", "wrist")]
    instruction = re.search(r"take to (.*)\?\nOut:", entry["prompt"])[1]
    typed = ", ".join(map(repr, entry["state"]))
    for state in (entry["state"], typed, typed.replace(",", "\n")):
        found = app.act(model, processor, pictures, instruction, "toy_robot", state)
        np.testing.assert_allclose(found["actions"], entry["actions_l1_proprio_fp32"], rtol=0, atol=1e-5)
    assert "token_ids" not in found and "⚠" not in app.remark(found)
    assert len(app.trace(found)) == 56 and app.headers(8)[-1] == "step 7"
    reachable = np.clip(found["normalized"], -1, 1)
    assert np.array_equal(found["normalized"], reachable)  # as the plot's axis has it
    for state, message in (
        (None, "takes 8 finite numbers of the robot's state, got none"),
        ("0, 1", "got 2: '0, 1'"),
        (f"{typed[:-1]}x", "must be numbers such as 0.1, 0.25"),
        ("nan " * 8, "takes 8 finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            app.act(model, processor, pictures, "go", "toy_robot", state)
    with pytest.raises(ValueError, match=r"needs 2 image\(s\); number 2 is missing"):
        app.act(model, processor, [pictures[0], None], "go", "toy_robot", typed)
    plain, alone = oft_policy(proprio=False)
    with pytest.raises(ValueError, match="takes no finite numbers of the robot's state, got 8"):
        app.act(plain, alone, pictures, "go", "toy_robot", typed)


def test_a_state_to_begin_with(oft_policy):
    model, _ = oft_policy()
    assert app.usual_state(model, ["bridge_orig", "toy_robot"]) == ""
    mean = model.norm_stats["toy_robot"]["proprio"]["mean"]
    assert app.usual_state(model, ["toy_robot"]) == ", ".join(f"{value:.4g}" for value in mean)
    assert app._read_state(app.usual_state(model, ["toy_robot"]), 8) == pytest.approx(mean, rel=1e-3)


def test_a_space_acts_without_this_package(space, images, recorded, tmp_path):
    images[0].save(tmp_path / "picture.png")
    script = """
        import json, os
        import app
        from PIL import Image
        model, processor = app.load("policy")
        picture = Image.open(os.environ["PICTURE"])
        found = app.act(model, processor, [picture], os.environ["INSTRUCTION"], "bridge_orig")
        print(json.dumps([found["actions"].tolist(), type(model).__module__]))
    """
    instruction = recorded["inputs"][0]["instruction"]
    actions, module = run_in_the_space(sys.executable, script, space, tmp_path / "picture.png", instruction)
    assert module.startswith("transformers_modules.")
    expected = recorded["inputs"][0]["actions"]["bridge_orig"]
    np.testing.assert_allclose(actions, [expected], rtol=0, atol=1e-12)


def test_it_asks_for_a_model(capsys):
    with pytest.raises(SystemExit):
        app.main([])
    assert "which model? Pass --model, or write its Hub id into" in capsys.readouterr().err


# --- The page ---
def gradio_python() -> str:
    python = os.environ.get("OPENVLA_GRADIO_PYTHON") or (
        sys.executable if importlib.util.find_spec("gradio") else None
    )
    if python is None:
        pytest.skip("gradio is not installed, and OPENVLA_GRADIO_PYTHON names no python that has it")
    return python


ASK_THE_PAGE = """
import json, os, socket, threading, time
import app
from gradio_client import Client, handle_file
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
threading.Thread(target=app.main, args=(["--port", str(port)],), daemon=True).start()
while True:  # until the page is there; the test's own limit is 120 s
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            break
    time.sleep(0.2)
client = Client(f"http://127.0.0.1:{port}", verbose=False)
picture = handle_file(os.environ["PICTURE"])
"""


@pytest.mark.slow
def test_the_page_answers(space, images, recorded, tmp_path):
    python = gradio_python()
    images[0].save(tmp_path / "picture.png")
    script = ASK_THE_PAGE + textwrap.dedent("""
        drawn, note, table, exact = client.predict(picture, os.environ["INSTRUCTION"], "bridge_orig", api_name="/act")
        errors = []
        for arguments in ((None, "go", "bridge_orig"), (picture, "go", None), (picture, "", "bridge_orig")):
            try:
                client.predict(*arguments, api_name="/act")
            except Exception as error:
                errors.append(str(error))
        from PIL import Image
        print(json.dumps([Image.open(drawn).size, note, table, exact, errors]))
    """)
    instruction = recorded["inputs"][0]["instruction"]
    answer = run_in_the_space(python, script, space, tmp_path / "picture.png", instruction)
    size, note, table, exact, errors = answer
    expected = recorded["inputs"][0]["actions"]["bridge_orig"]
    np.testing.assert_allclose(exact["actions"], [expected], rtol=0, atol=1e-12)
    assert exact["token_ids"] == recorded["inputs"][0]["action_ids"] and "**bridge_orig**" in note
    assert table["headers"] == ["dim", "unit", "value"]
    assert [row[2] for row in table["data"]] == [f"{value:.6f}" for value in expected]
    assert size[0] > images[0].width and size[1] == images[0].height  # the picture, and the bars beside it
    assert "number 1 is missing" in errors[0] and "unnorm_key is needed" in errors[1]
    assert "Expected an instruction such as" in errors[2]


@pytest.mark.slow
def test_the_page_of_a_policy_with_two_cameras_and_a_state(space, oft_policy, oft_recorded, oft_golden, tmp_path):
    python, entry = gradio_python(), oft_recorded["inputs"][3]
    folder = tmp_path / "space"
    folder.mkdir()
    for name in ("app.py", "drawing.py"):
        shutil.copy(SERVE / name, folder / name)
    model, processor = oft_policy()
    model.save_pretrained(folder / "policy")
    processor.save_pretrained(folder / "policy")
    (folder / "model_id.txt").write_text("policy\n")
    for name in ("primary", "wrist"):
        Image.fromarray(oft_golden[f"03.{name}_u8"].numpy()).save(folder / f"{name}.png")
    script = ASK_THE_PAGE + textwrap.dedent(f"""
        state = {", ".join(map(repr, entry["state"]))!r}
        question = (picture, handle_file("wrist.png"), os.environ["INSTRUCTION"], "toy_robot")
        drawn, note, table, plot, exact = client.predict(*question, state, api_name="/act")
        try:
            client.predict(*question, "0, 1", api_name="/act")
        except Exception as error:
            print(json.dumps([table, exact, "gripper" in json.dumps(plot), str(error)]))
    """)
    instruction = re.search(r"take to (.*)\?\nOut:", entry["prompt"])[1]
    table, exact, is_plotted, error = run_in_the_space(python, script, folder, folder / "primary.png", instruction)
    np.testing.assert_allclose(exact["actions"], entry["actions_l1_proprio_fp32"], rtol=0, atol=1e-5)
    assert table["headers"][2:] == [f"step {step}" for step in range(8)]
    assert [row[9] for row in table["data"]] == [f"{value:.6f}" for value in exact["actions"][7]]
    assert is_plotted and "takes 8 finite numbers of the robot's state, got 2" in error
