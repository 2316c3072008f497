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
from safetensors.torch import load_file, save_file

import openvla

FIXTURES = Path(__file__).parent / "fixtures"
sys.path.insert(0, str(FIXTURES))

from assemble import assemble, assemble_oft  # noqa: E402


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


@pytest.fixture(scope="session")
def liven():
    """`liven(model)` has a policy of `small_checkpoint` choose among actions, and what it sees, reads and has chosen
    before matter to it."""

    def change(model):
        start, end = model.action_tokenizer.vocab_start, model.action_tokenizer.vocab_end
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim == 2 and ".layers." in name:
                    weight *= 6
                elif weight.ndim == 2 and "projector" in name:
                    weight *= 3
            model.get_input_embeddings().weight *= 5
            model.lm_head.weight[:start] *= 0.01
            model.lm_head.weight[end:] *= 0.01
        return model

    return change


@pytest.fixture(scope="session")
def small_checkpoint(processor, tmp_path_factory):
    """A folder with a random policy of the released structure on 28-pixel images."""
    folder = tmp_path_factory.mktemp("policy") / "small"
    tower = {"embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32064, "pad_token_id": 32000}
    config = openvla.OpenVLAConfig(
        "small",
        llm_backbone_id="llama2-7b-pure",
        image_resize_strategy="resize-naive",
        timm_model_ids=["dino", "siglip"],
        image_sizes=[28, 28],
        timm_model_args={
            "dino": {**tower, "reg_tokens": 1, "no_embed_class": True, "init_values": 0.1},
            "siglip": {**tower, "class_token": False},
        },
        text_config=text,
    )
    torch.manual_seed(0)
    openvla.OpenVLAForActionPrediction(config).save_pretrained(folder)
    settings = {**processor.image_processor.to_dict(), "input_sizes": [(3, 28, 28)] * 2}
    image_processor = openvla.OpenVLAImageProcessor(**settings)
    template = processor.prompt_template
    openvla.OpenVLAProcessor(image_processor, processor.tokenizer, template, 29871, num_patches=4).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def oft_recorded() -> dict:
    """`oft_tiny.json`: per observation prompt, state and actions of each kind of policy; one training batch."""
    return json.loads((FIXTURES / "oft_tiny.json").read_text())


@pytest.fixture(scope="session")
def oft_golden() -> dict[str, torch.Tensor]:
    """Recorded tensors of OpenVLA-OFT, `{"00.primary_u8": …, "film.00.hs": …}`."""
    return load_file(FIXTURES / "oft_tiny.safetensors") | load_file(FIXTURES / "oft_extra.safetensors")


@pytest.fixture(scope="session")
def oft_folder(tmp_path_factory):
    """`oft_folder(head="l1", film=False, proprio=True)`: as OpenVLA-OFT's training leaves a policy. Do not write."""
    folders = {}

    def folder(head: str = "l1", film: bool = False, proprio: bool = True) -> Path:
        kind = (head, film, proprio)
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("oft") / f"{head}{'-film' * film}{'-proprio' * proprio}"
            assemble_oft(folders[kind], *kind)
        return folders[kind]

    return folder


@pytest.fixture(scope="session")
def oft_policy(oft_folder):
    """`oft_policy(…, cameras=2)`: model (fp32) and processor, shared by all tests: do not change them."""
    policies = {}

    def policy(head: str = "l1", film: bool = False, proprio: bool = True, cameras: int = 2):
        kind = (head, film, proprio, cameras)
        if kind not in policies:
            told = {"action_chunk": 8, "num_cameras": cameras}
            policies[kind] = openvla.load(oft_folder(head, film, proprio), dtype=torch.float32, **told)
        return policies[kind]

    return policy


@pytest.fixture
def write_old_adapter():
    return _write_old_adapter


def _write_old_adapter(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA adapter as peft 0.11 saved it for the original model. Returns the full-rank updates by released name."""
    shapes = {
        "vision_backbone.featurizer.blocks.0.attn.qkv": (384, 128),
        "vision_backbone.featurizer.blocks.1.mlp.fc1": (512, 128),
        "vision_backbone.fused_featurizer.blocks.2.attn.proj": (144, 144),
        "vision_backbone.featurizer.blocks.3.attn.qkv": (384, 128),  # in the block that nobody uses
        "projector.fc2": (128, 1088),
        "language_model.model.layers.1.self_attn.q_proj": (128, 128),
        "language_model.model.layers.2.mlp.down_proj": (128, 344),
        "language_model.lm_head": (32064, 128),
    }
    generator, tensors, updates = torch.Generator().manual_seed(seed), {}, {}
    for name, (rows, columns) in shapes.items():
        a, b = torch.randn(4, columns, generator=generator) * 0.1, torch.randn(rows, 4, generator=generator) * 0.1
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        updates[f"{name}.weight"] = 0.5 * b @ a  # alpha / r = 2 / 4
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    towers = "vision_backbone.featurizer.blocks", "vision_backbone.fused_featurizer.blocks"
    targets = [f"{towers[0]}.0.attn.qkv", f"{towers[0]}.1.mlp.fc1", f"{towers[1]}.2.attn.proj", "lm_head"]
    targets += [f"{towers[0]}.3.attn.qkv", "projector.fc2", "layers.1.self_attn.q_proj", "layers.2.mlp.down_proj"]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": targets, "task_type": None}
    config |= {"base_model_name_or_path": "openvla/openvla-7b", "inference_mode": True, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return updates


@pytest.fixture
def captured(monkeypatch):
    """Acting compiled captures graphs, which must not break; but PyTorch runs them without generating code first."""
    from openvla import compiled_actions

    torch._dynamo.reset()
    compile_with = torch.compile

    def capture(function, mode, **options):
        return compile_with(function, backend="eager", **options)

    monkeypatch.setattr(compiled_actions.torch, "compile", capture)
