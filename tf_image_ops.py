"""TensorFlow's image operations in numpy: the pixels that OpenVLA policies were trained and evaluated on.

Training frames went through `tf.image.resize(lanczos3, antialias=True)`, evaluation frames through a JPEG round trip
before it and sometimes a centre crop (`tf.image.crop_and_resize`) after it. PIL's Lanczos differs by up to 3 levels,
its JPEG decoder (accurate DCT) from TensorFlow's default (libjpeg's fast integer DCT) by up to 10.

All images are uint8 `(H, W, 3)` RGB.
"""

import math

import numpy as np


def lanczos3_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """`tf.image.resize(image, (height, width), "lanczos3", antialias=True)`, rounded and clipped to uint8.

    Equal to TensorFlow 2.21 within one level, which occurs only where the float result lies on a rounding tie.
    """
    rows, columns = _lanczos3_weights(image.shape[0], height), _lanczos3_weights(image.shape[1], width)
    resized = np.tensordot(rows, image.astype(np.float32), axes=(1, 0))  # (height, W, 3)
    resized = np.tensordot(columns, resized, axes=(1, 1)).transpose(1, 0, 2)  # (height, width, 3)
    return np.clip(np.rint(resized), 0, 255).astype(np.uint8)


def _lanczos3_weights(size: int, new_size: int) -> np.ndarray:
    """Weights `(new_size, size)` of TensorFlow's `ScaleAndTranslate` with the Lanczos kernel of radius 3."""
    scale = np.float32(size / new_size)
    kernel_scale = max(scale, np.float32(1.0))  # antialias: widen the kernel when shrinking
    centers = (np.arange(new_size, dtype=np.float32) + np.float32(0.5)) * scale
    offset = (np.arange(size, dtype=np.float32) + np.float32(0.5) - centers[:, None]) / kernel_scale
    x = np.abs(offset)
    with np.errstate(divide="ignore", invalid="ignore"):
        kernel = 3 * np.sin(math.pi * x) * np.sin(math.pi * x / 3) / (math.pi * math.pi * x * x)
    kernel = np.where(x <= 1e-3, 1.0, np.where(x > 3, 0.0, kernel))
    return (kernel / kernel.sum(axis=1, keepdims=True)).astype(np.float32)


def center_crop(image: np.ndarray, area: float, height: int, width: int) -> np.ndarray:
    """The central `area` (0.9: sides of 0.949) stretched to `(height, width)`, as the original does at test time.

    Bit-equal to `tf.image.crop_and_resize` (bilinear, no antialias) and `convert_image_dtype(…, saturate=True)`.
    """
    return crop_and_resize(image, area, (0.5, 0.5), height, width)


def crop_and_resize(
    image: np.ndarray, area: float, position: tuple[float, float], height: int, width: int
) -> np.ndarray:
    """A share of the area, cut out at `position` (down, right; 0 to 1 of the room there is), stretched bilinearly."""
    if not 0.0 < area <= 1.0:
        raise ValueError(f"The crop's share of the area must lie in (0, 1], got {area}.")
    side = np.sqrt(np.float32(area))
    pixels = image.astype(np.float32) * np.float32(1.0 / 255.0)
    for axis, new_size in ((1, width), (0, height)):  # TensorFlow's order, which decides the last bit
        start = np.float32(position[axis]) * (np.float32(1.0) - side)
        last = np.float32(pixels.shape[axis] - 1)
        end = start + side
        step = (end - start) * last / np.float32(max(new_size - 1, 1))
        samples = start * last + np.arange(new_size, dtype=np.float32) * step
        low = np.floor(samples).astype(np.int64)
        high = np.minimum(np.ceil(samples).astype(np.int64), pixels.shape[axis] - 1)
        weight = (samples - low.astype(np.float32)).reshape([-1 if a == axis else 1 for a in range(3)])
        below, above = pixels.take(low, axis=axis), pixels.take(high, axis=axis)
        pixels = below + (above - below) * weight
    return (np.clip(pixels, 0.0, 1.0) * np.float32(255.5)).astype(np.uint8)


# --- JPEG ------------------------------------------------------------------------------------------------------------
# Annex K tables (ITU-T T.81), natural order.
_LUMINANCE = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
_CHROMINANCE = """17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99"""
_QUANTIZATION = [np.array(table.split(), dtype=np.int64).reshape(8, 8) for table in (_LUMINANCE, _CHROMINANCE)]
# cos(k pi/16) * sqrt(2) in 14-bit fixed point: the scaling that the fast DCT leaves to the quantisation table.
_AAN = np.array([16384, 22725, 21407, 19266, 16384, 12873, 8867, 4520], dtype=np.int64)


def jpeg_round_trip(image: np.ndarray, quality: int = 95) -> np.ndarray:
    """`tf.io.decode_jpeg(tf.io.encode_jpeg(image, quality=quality))`: 4:2:0, decoded with the fast integer DCT.

    Follows libjpeg step by step in its own integer arithmetic; entropy coding is lossless and left out.
    """
    height, width = image.shape[:2]
    r, g, b = (image[..., channel].astype(np.int64) for channel in range(3))
    y = (19595 * r + 38470 * g + 7471 * b + 32768) >> 16
    cb = (-11059 * r - 21709 * g + 32768 * b + (128 << 16) + 32767) >> 16
    cr = (32768 * r - 27439 * g - 5329 * b + (128 << 16) + 32767) >> 16

    y, cb, cr = (
        _code_plane(y, quality, 0)[:height, :width],
        _upsample(_code_plane(_downsample(cb), quality, 1)[: -(-height // 2), : -(-width // 2)], height, width) - 128,
        _upsample(_code_plane(_downsample(cr), quality, 1)[: -(-height // 2), : -(-width // 2)], height, width) - 128,
    )
    rgb = [
        y + ((91881 * cr + 32768) >> 16),
        y + ((-22554 * cb - 46802 * cr + 32768) >> 16),
        y + ((116130 * cb + 32768) >> 16),
    ]
    return np.clip(np.stack(rgb, axis=-1), 0, 255).astype(np.uint8)


def _downsample(plane: np.ndarray) -> np.ndarray:
    """Mean of 2 × 2 pixels, rounded up and down in alternating columns; the right edge is repeated to whole blocks."""
    height, width = plane.shape
    plane = np.pad(plane, ((0, height % 2), (0, -width % 16)), mode="edge")
    total = plane[0::2, 0::2] + plane[0::2, 1::2] + plane[1::2, 0::2] + plane[1::2, 1::2]
    return (total + 1 + np.arange(total.shape[1]) % 2) >> 2


def _upsample(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """Doubles both axes with libjpeg's triangle filter: 3/4 of the nearer sample, 1/4 of the farther one."""
    rows = np.pad(plane, ((1, 1), (0, 0)), mode="edge")
    sums = np.stack([3 * rows[1:-1] + rows[:-2], 3 * rows[1:-1] + rows[2:]], axis=1).reshape(-1, plane.shape[1])
    columns = np.pad(sums, ((0, 0), (1, 1)), mode="edge")
    left = (3 * sums + columns[:, :-2] + 8) >> 4
    right = (3 * sums + columns[:, 2:] + 7) >> 4
    return np.stack([left, right], axis=2).reshape(len(sums), -1)[:height, :width]


def _code_plane(plane: np.ndarray, quality: int, table: int) -> np.ndarray:
    """Forward DCT, quantisation and fast inverse DCT of one plane, padded to whole 8 × 8 blocks."""
    scale = 200 - 2 * quality if quality >= 50 else 5000 // quality
    quantization = np.clip((_QUANTIZATION[table] * scale + 50) // 100, 1, 255)
    plane = np.pad(plane, [(0, -size % 8) for size in plane.shape], mode="edge")
    blocks = plane.reshape(plane.shape[0] // 8, 8, plane.shape[1] // 8, 8).transpose(0, 2, 1, 3) - 128

    divisor = quantization * 8  # the forward DCT's output is scaled by 8
    scaled = _forward_dct(blocks)
    coefficients = np.sign(scaled) * ((np.abs(scaled) + divisor // 2) // divisor)

    multiplier = (quantization * ((_AAN[:, None] * _AAN + 8192) >> 14) + 2048) >> 12
    columns = _fast_inverse_dct(np.moveaxis(coefficients * multiplier, -2, 0))  # along columns first: (8, …, 8)
    rows = _fast_inverse_dct(np.moveaxis(columns, -1, 0))  # (8 x, 8 y, blocks high, blocks wide)
    pixels = np.clip((rows >> 5) + 128, 0, 255)
    return pixels.transpose(2, 1, 3, 0).reshape(plane.shape)


def _forward_dct(blocks: np.ndarray) -> np.ndarray:
    """libjpeg's accurate integer DCT (`jfdctint`, Loeffler-Ligtenberg-Moschytz) of `(…, 8, 8)`, scaled by 8."""
    rows = _forward_dct_pass(np.moveaxis(blocks, -1, 0), lambda v: v << 2, 11)
    columns = _forward_dct_pass(np.moveaxis(np.moveaxis(rows, 0, -1), -2, 0), lambda v: (v + 2) >> 2, 15)
    return np.moveaxis(columns, 0, -2)


def _forward_dct_pass(d: np.ndarray, scale_even, shift: int) -> np.ndarray:
    def descale(value):
        return (value + (1 << (shift - 1))) >> shift

    t0, t1, t2, t3 = d[0] + d[7], d[1] + d[6], d[2] + d[5], d[3] + d[4]
    t7, t6, t5, t4 = d[0] - d[7], d[1] - d[6], d[2] - d[5], d[3] - d[4]
    t10, t13, t11, t12 = t0 + t3, t0 - t3, t1 + t2, t1 - t2
    z1 = (t12 + t13) * 4433
    z5 = (t4 + t6 + t5 + t7) * 9633
    z3, z4 = (t4 + t6) * -16069 + z5, (t5 + t7) * -3196 + z5
    z2 = (t5 + t6) * -20995
    z0 = (t4 + t7) * -7373
    return np.stack(
        [
            scale_even(t10 + t11),
            descale(t7 * 12299 + z0 + z4),
            descale(z1 + t13 * 6270),
            descale(t6 * 25172 + z2 + z3),
            scale_even(t10 - t11),
            descale(t5 * 16819 + z2 + z4),
            descale(z1 - t12 * 15137),
            descale(t4 * 2446 + z0 + z3),
        ]
    )


def _fast_inverse_dct(c: np.ndarray) -> np.ndarray:
    """One pass of libjpeg's fast integer inverse DCT (`jidctfst`, Arai-Agui-Nakajima) along axis 0."""
    t10, t11, t13 = c[0] + c[4], c[0] - c[4], c[2] + c[6]
    t12 = ((c[2] - c[6]) * 362 >> 8) - t13
    e0, e3, e1, e2 = t10 + t13, t10 - t13, t11 + t12, t11 - t12
    z13, z10, z11, z12 = c[5] + c[3], c[5] - c[3], c[1] + c[7], c[1] - c[7]
    z5 = (z10 + z12) * 473 >> 8
    o7 = z11 + z13
    o6 = (z10 * -669 >> 8) + z5 - o7
    o5 = ((z11 - z13) * 362 >> 8) - o6
    o4 = (z12 * 277 >> 8) - z5 + o5
    return np.stack([e0 + o7, e1 + o6, e2 + o5, e3 - o4, e3 + o4, e2 - o5, e1 - o6, e0 - o7])
