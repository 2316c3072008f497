"""Against recordings of TensorFlow 2.21 on three 256 × 256 images."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from openvla.tf_image_ops import center_crop, jpeg_round_trip, lanczos3_resize

RECORDED = load_file(Path(__file__).parent / "fixtures" / "tf_preproc.safetensors")
NAMES = ("scene", "ramp", "waves")


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


@pytest.mark.parametrize("name", NAMES)
def test_lanczos3_is_within_one_level_and_only_at_rounding_ties(name):
    image, expected = RECORDED[f"{name}.input_256"], RECORDED[f"{name}.lanczos3_no_jpeg_224"]
    apart = difference(lanczos3_resize(image, 224, 224), expected)
    assert apart.max() <= 1
    # 2,492 of 150,528 values in the smooth ramp, where every second value is a tie; 28 and 2 in the others
    assert (apart > 0).sum() <= {"scene": 60, "ramp": 3500, "waves": 20}[name]


@pytest.mark.parametrize("name", NAMES)
def test_jpeg_and_lanczos3_equal_the_evaluation_path(name):
    image, expected = RECORDED[f"{name}.input_256"], RECORDED[f"{name}.oft_resize_224"]
    apart = difference(lanczos3_resize(jpeg_round_trip(image), 224, 224), expected)
    assert apart.max() <= 1 and (apart > 0).sum() <= 60
    with_pillow = io.BytesIO()
    Image.fromarray(image).save(with_pillow, "JPEG", quality=95)
    apart = difference(lanczos3_resize(np.asarray(Image.open(with_pillow)), 224, 224), expected)
    assert apart.max() >= 4  # what Pillow's accurate DCT would cost


@pytest.mark.parametrize("name", NAMES)
def test_center_crop_is_bit_exact(name):
    from_256 = center_crop(RECORDED[f"{name}.input_256"], 0.9, 224, 224)
    assert (from_256 == RECORDED[f"{name}.openvla_center_crop_of_256"]).all()
    from_224 = center_crop(RECORDED[f"{name}.oft_resize_224"], 0.9, 224, 224)
    assert (from_224 == RECORDED[f"{name}.oft_center_crop_of_resized"]).all()


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (33, 18), (240, 321)])
def test_jpeg_of_any_size_stays_close_to_pillow(size):
    ramp = np.add.outer(np.arange(size[0]), 2 * np.arange(size[1])) % 256
    image = np.stack([ramp, 255 - ramp, ramp // 2], axis=-1).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BOX))
    file = io.BytesIO()
    Image.fromarray(smooth).save(file, "JPEG", quality=95)
    apart = difference(jpeg_round_trip(smooth), np.asarray(Image.open(file)))
    assert apart.max() <= 10 and apart.mean() < 1.5


def test_constant_images_stay_constant():
    gray = np.full((48, 32, 3), 77, dtype=np.uint8)
    assert (lanczos3_resize(gray, 20, 50) == 77).all()
    assert (center_crop(gray, 0.9, 24, 24) == 77).all()
    assert (jpeg_round_trip(gray) == 77).all()


def test_bad_crop_raises():
    with pytest.raises(ValueError, match="must lie in"):
        center_crop(np.zeros((8, 8, 3), np.uint8), 1.5, 8, 8)
