"""The recorded checkpoint, put together from `fixtures/`, and what the original code gave for it."""

import io
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import openvla

FIXTURES = Path(__file__).parent / "fixtures"
sys.path.insert(0, str(FIXTURES))

from assemble import assemble  # noqa: E402


@pytest.fixture(scope="session")
def recorded() -> dict:
    """`openvla_tiny.json`: per input prompt, token ids and actions; one training batch; versions."""
    return json.loads((FIXTURES / "openvla_tiny.json").read_text())


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """Recorded tensors, `{"00.projected": …}`."""
    return load_file(FIXTURES / "openvla_tiny.safetensors")


@pytest.fixture(scope="session")
def images(recorded, golden) -> list[Image.Image]:
    pngs = (golden[f"{entry['index']:02d}.image_png"] for entry in recorded["inputs"])
    return [Image.open(io.BytesIO(png.numpy().tobytes())) for png in pngs]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """`tiny-openvla` as the original's converter writes it: two bf16 shards, index, dead `auto_map`. Do not write."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-openvla"
    assemble(folder)
    return folder


@pytest.fixture(scope="session")
def processor(checkpoint) -> openvla.OpenVLAProcessor:
    return openvla.OpenVLAProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def model(checkpoint) -> openvla.OpenVLAForActionPrediction:
    """fp32, shared by all tests: do not change it."""
    return openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture
def fresh_model(checkpoint) -> openvla.OpenVLAForActionPrediction:
    """fp32, one per test: change it as you like."""
    return openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, dtype=torch.float32).eval()
