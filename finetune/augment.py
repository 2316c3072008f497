"""Image augmentation of the original's fine-tuning: a random crop of 0.9 of the area, then colours.

Source: `prismatic/vla/datasets/datasets.py` and dlimp. Two differences, neither of which inference can notice: crops
slide freely, where dlimp's share one seed for both axes and stay on the diagonal; and pixels are rounded once more
between crop and colours.
"""

import numpy as np

from openvla.tf_image_ops import crop_and_resize

CROP_AREA = 0.9
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.2, (0.8, 1.2), (0.8, 1.2), 0.05


def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A randomly cropped and coloured copy of an `(H, W, 3)` uint8 image, of the same size."""
    position = (rng.uniform(), rng.uniform())
    image = crop_and_resize(image, CROP_AREA, position, *image.shape[:2])
    pixels = image.astype(np.float32) / 255.0
    pixels = np.clip(pixels + rng.uniform(-BRIGHTNESS, BRIGHTNESS), 0.0, 1.0)
    mean = pixels.mean(axis=(0, 1))
    pixels = np.clip((pixels - mean) * rng.uniform(*CONTRAST) + mean, 0.0, 1.0)
    hsv = rgb_to_hsv(pixels)
    hsv[..., 1] = np.clip(hsv[..., 1] * rng.uniform(*SATURATION), 0.0, 1.0)
    hsv[..., 0] = (hsv[..., 0] + rng.uniform(-HUE, HUE)) % 1.0
    return np.rint(hsv_to_rgb(hsv) * 255.0).astype(np.uint8)


def rgb_to_hsv(rgb: np.ndarray) -> np.ndarray:
    """`(…, 3)` in [0, 1] -> hue in turns, saturation, value."""
    value, least = rgb.max(axis=-1), rgb.min(axis=-1)
    chroma = value - least
    safe = np.where(chroma > 0, chroma, 1.0)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    sextant = np.where(
        value == red,
        (green - blue) / safe % 6.0,
        np.where(value == green, (blue - red) / safe + 2.0, (red - green) / safe + 4.0),
    )
    hue = np.where(chroma > 0, sextant / 6.0, 0.0)
    return np.stack([hue, np.where(value > 0, chroma / np.where(value > 0, value, 1.0), 0.0), value], axis=-1)


def hsv_to_rgb(hsv: np.ndarray) -> np.ndarray:
    """The inverse of `rgb_to_hsv`."""
    hue, saturation, value = np.moveaxis(hsv, -1, 0)
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = (offset + hue * 6.0) % 6.0
        channels.append(value - value * saturation * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0))
    return np.stack(channels, axis=-1)
