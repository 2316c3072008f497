"""The whole way: convert, fine-tune, export, upload, and a stranger who has only transformers and torch acts.

Who that is, the environment tells (`make test-published` makes them): OPENVLA_BARE_PYTHON names interpreters without
this package, separated by colons, OPENVLA_OLAH_PYTHON one with the mirror olah, which then stands between them and the
Hub: code that nobody here wrote reads what we publish.
"""

import contextlib
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hub_server import LocalHub, mirror
from PIL import Image

import openvla
from openvla.finetune import sft
from openvla.hub_upload import convert, export

BARE = [path for path in os.environ.get("OPENVLA_BARE_PYTHON", "").split(":") if path]
OLAH = os.environ.get("OPENVLA_OLAH_PYTHON")
INSTRUCTION = "pick up the red cube"

STRANGER = """
    import json, sys, torch, transformers
    from PIL import Image
    from transformers import AutoProcessor
    try:
        import openvla
        sys.exit("this interpreter has openvla: it is no stranger")
    except ImportError:
        pass
    new = not transformers.__version__.startswith("4.")
    auto = getattr(transformers, "AutoModelForImageTextToText" if new else "AutoModelForVision2Seq")
    processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
    model = auto.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
    actions = []
    for prompt, picture in json.loads(sys.argv[2]):
        inputs = processor(prompt, Image.open(picture))
        actions.append(model.predict_action(**inputs, unnorm_key=sys.argv[3]).tolist())
    print(json.dumps(actions))
"""


def publish(folder, repo_id: str, hub) -> None:
    """As a user does, in a process of its own."""
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_write", "HF_HUB_OFFLINE": "0"}
    script = "import sys; from openvla.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "upload", repo_id, str(folder), "--public"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def act_as(interpreter: str, endpoint: str, home, repo_id: str, observations, unnorm_key: str) -> list:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [interpreter, "-c", textwrap.dedent(STRANGER), repo_id, json.dumps(observations), unnorm_key]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def fine_tuned(checkpoint, tmp_path_factory):
    """A LoRA run of two steps on a few frames, from the converted checkpoint; exported from its adapter."""
    folder = tmp_path_factory.mktemp("fine_tuned")
    convert.main([str(checkpoint), str(folder / "converted")])
    rng = np.random.default_rng(0)
    for number in range(2):
        episode = folder / "cubes" / f"episode_{number:03d}"
        (episode / "front").mkdir(parents=True)
        (episode / "episode.json").write_text(json.dumps({"instruction": INSTRUCTION, "fps": 5}))
        np.savez(episode / "episode.npz", actions=rng.uniform(-0.1, 0.1, (6, 6)).astype(np.float32))
        for step in range(6):
            picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(picture).save(episode / "front" / f"{step:03d}.png")
    options = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--validation_share", "0", "--bf16", "false"]
    options += ["--gradient_checkpointing", "false", "--learning_rate", "1e-2", "--save_strategy", "no"]
    run = ["--model", str(folder / "converted"), "--data", str(folder / "cubes"), "--output_dir", str(folder / "run")]
    sft.main([*run, *options])
    export.main([str(folder / "run" / "adapter"), str(folder / "exported"), "--data", str(folder / "cubes")])
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not BARE, reason="OPENVLA_BARE_PYTHON names no interpreter")
def test_a_stranger_acts_as_recorded_and_as_trained(checkpoint, fine_tuned, recorded, images, tmp_path):
    export.main([str(checkpoint), str(tmp_path / "exported")])
    pictures = [tmp_path / f"{number}.png" for number in range(4)]
    for picture, image in zip(pictures, images):
        image.save(picture)
    observations = [(entry["prompt"], str(path)) for entry, path in zip(recorded["inputs"], pictures)]
    expected = [entry["actions"]["bridge_orig"] for entry in recorded["inputs"][:4]]

    model, processor = openvla.load(fine_tuned / "exported", dtype=torch.float32)
    picture = fine_tuned / "cubes" / "episode_001" / "front" / "003.png"
    prompt = processor.build_prompt(INSTRUCTION)
    trained = model.predict_action(**processor(prompt, picture), unnorm_key="cubes")
    before, _ = openvla.load(fine_tuned / "converted", dtype=torch.float32)
    before.norm_stats = model.norm_stats
    assert not np.array_equal(trained, before.predict_action(**processor(prompt, picture), unnorm_key="cubes"))

    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(LocalHub(tmp_path / "hub"))
        publish(tmp_path / "exported", "lab/recorded", hub)
        publish(fine_tuned / "exported", "lab/cubes", hub)
        endpoints = [hub.endpoint]
        if OLAH:
            endpoints.append(stack.enter_context(mirror(hub, OLAH, tmp_path / "mirror")))
        for number, interpreter in enumerate(BARE):
            for endpoint in endpoints:
                home = tmp_path / f"home-{number}-{endpoint.rpartition(':')[2]}"
                home.mkdir()
                actions = act_as(interpreter, endpoint, home, "lab/recorded", observations, "bridge_orig")
                np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-12)
                actions = act_as(interpreter, endpoint, home, "lab/cubes", [(prompt, str(picture))], "cubes")
                np.testing.assert_allclose(actions, [trained], rtol=0, atol=1e-12)
        if OLAH:
            assert hub.count("paths_info") > 0  # the mirror asked, not only its clients
