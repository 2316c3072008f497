"""The recorded checkpoint, put together from `fixtures/`, and what the original code gave for it."""

import io
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import openvla

FIXTURES = Path(__file__).parent / "fixtures"


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
    parts, folder = FIXTURES / "tiny-openvla", tmp_path_factory.mktemp("checkpoint") / "tiny-openvla"
    shutil.copytree(parts, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    llm = load_file(parts / "llm.safetensors")
    rows, values = llm.pop("embed_tokens.rows"), llm.pop("embed_tokens.values")
    head = torch.cat([load_file(parts / f"lm_head_{part}.safetensors")["values"] for part in (0, 1)])
    table = torch.zeros_like(head)
    table[rows] = values
    towers = load_file(parts / "featurizer_projector.safetensors") | load_file(parts / "fused_featurizer.safetensors")
    llm |= {"language_model.model.embed_tokens.weight": table, "language_model.lm_head.weight": head}
    weight_map = {}
    for number, shard in enumerate((towers, llm), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    size = sum(tensor.nbytes for tensor in (towers | llm).values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
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
