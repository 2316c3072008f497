"""What robots send and get, as bytes: arrays in JSON and in MessagePack, pictures as files.

Nothing from a network is unpickled, and no array is made unless its kind, shape and number of bytes agree. Arrays:

    json_numpy   {"__numpy__": base64, "dtype": "|u1", "shape": [H, W, 3]}                      OpenVLA, OFT
    openpi       {b"__ndarray__": True, b"data": bytes, b"dtype": "|u1", b"shape": [H, W, 3]}   openpi-client
    vla-eval     {"__ndarray__": True, "data": bytes, "dtype": "uint8", "shape": [H, W, 3]}, and pictures as
                 {"__image__": True, "format": "png", "data": bytes, "shape": [H, W, 3]}

Everything that is wrong raises Malformed, with words for whoever sent it.
"""

import base64
import json
import math
import re

import msgpack
import numpy as np

from openvla.serve.handler import decode_file, decode_image

NUMBERS = re.compile(r"[|<>=]?(\?|[biuf]\d{1,2})|bool|u?int\d{1,2}|float\d{2}")  # never objects, text or dates
MAX_DIMS = 4
MAX_DEPTH, MAX_ENTRIES = 16, 20_000  # of a message


class Malformed(ValueError):
    """What came is no message of its protocol."""


# --- Arrays and pictures ---------------------------------------------------------------------------------------------
def read_array(data, dtype, shape) -> np.ndarray:
    """A view of `data`."""
    try:
        kind = np.dtype(dtype) if isinstance(dtype, str) and NUMBERS.fullmatch(dtype) else None
    except TypeError:
        kind = None
    if kind is None:
        raise Malformed(f"Expected an array of numbers, got one of dtype {str(dtype)[:40]!r}.")
    sizes = list(shape) if isinstance(shape, list | tuple) else None
    if sizes is None or len(sizes) > MAX_DIMS or not all(type(size) is int and 0 <= size < 2**31 for size in sizes):
        raise Malformed(f"Expected at most {MAX_DIMS} sizes as an array's shape, got {str(shape)[:80]}.")
    if not isinstance(data, bytes) or len(data) != math.prod(sizes) * kind.itemsize:
        got = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise Malformed(f"{got} are no array of shape {sizes} and dtype {kind}.")
    return np.frombuffer(data, kind).reshape(sizes)


class Pictures:
    """Decodes the pictures of one message; `(H, W, 3)` uint8. Sizes are checked before a pixel is decoded.

    Args:
        max_pixels: of all of them together: a PNG of 109 kB can hold 900 million.
    """

    def __init__(self, max_pixels: int):
        self.left = max_pixels

    def read(self, file: bytes | str) -> np.ndarray:
        """Of a PNG, JPEG or WebP file, or of its base64."""
        if not isinstance(file, bytes | str):
            raise Malformed(f"Expected the file of a picture, got {type(file).__name__}.")
        decode = decode_file if isinstance(file, bytes) else decode_image
        try:
            image = decode(file, self.left)
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise Malformed(f"A picture has 8 bits per channel, got {image.mode}: depth is no picture.")
            picture = np.asarray(image.convert("RGB"))
        except ValueError as error:
            raise Malformed(str(error)) from None
        self.left -= picture.shape[0] * picture.shape[1]
        return picture


# --- JSON ------------------------------------------------------------------------------------------------------------
def read_json(body: bytes | str):
    """The content, with json_numpy's arrays."""

    def refuse(text: str):
        raise Malformed(f"{text} is no number of JSON.")

    marks = ",[{" if isinstance(body, str) else (b",", b"[", b"{")
    if sum(body.count(mark) for mark in marks) > MAX_ENTRIES:  # before any is made
        raise Malformed(f"More than {MAX_ENTRIES} entries are no observation; pictures come as base64.")
    try:
        content = json.loads(body, parse_constant=refuse, object_hook=_json_numpy)
    except Malformed:
        raise
    except (ValueError, RecursionError) as error:
        raise Malformed(f"Expected JSON, got {body[:40]!r}… ({error}).") from None
    return check_depth(content)


def _json_numpy(content: dict):
    if "__numpy__" not in content:
        return content
    try:
        data = base64.b64decode(content["__numpy__"], validate=True)
    except (TypeError, ValueError) as error:
        raise Malformed(f'An array\'s "__numpy__" is no base64: {error}.') from None
    return read_array(data, content.get("dtype"), content.get("shape"))


def write_json_numpy(array: np.ndarray) -> dict:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


# --- MessagePack -----------------------------------------------------------------------------------------------------
def read_msgpack(body: bytes, max_pixels: int):
    """The content, with openpi's and vla-eval's arrays and pictures."""
    pictures, left = Pictures(max_pixels), MAX_ENTRIES

    def count(entries: int) -> None:
        nonlocal left
        left -= 1 + entries
        if left < 0:
            raise Malformed(f"More than {MAX_ENTRIES} entries are no observation.")

    def refuse(code: int, data: bytes):
        raise Malformed(f"Extension type {code} of MessagePack is not understood.")

    def unpack(content: dict):
        count(len(content))
        return _packed(content, pictures)

    def unpack_list(content: list):
        count(len(content))
        return content

    most = {"max_array_len": MAX_ENTRIES, "max_map_len": MAX_ENTRIES}
    hooks = {"object_hook": unpack, "list_hook": unpack_list, "ext_hook": refuse}

    try:
        content = msgpack.unpackb(body, raw=False, strict_map_key=False, **hooks, **most)
    except Malformed:
        raise
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException, RecursionError) as error:
        raise Malformed(f"Expected MessagePack, got {len(body)} bytes that are none ({error}).") from None
    return check_depth(content)


def _packed(content: dict, pictures: Pictures):
    if b"__ndarray__" in content:
        return read_array(content.get(b"data"), content.get(b"dtype"), content.get(b"shape"))
    if "__ndarray__" in content:
        return read_array(content.get("data"), content.get("dtype"), content.get("shape"))
    if b"__npgeneric__" in content:  # a single number
        return content.get(b"data")
    if "__image__" in content:
        if content.get("format") == "raw":
            return read_array(content.get("data"), content.get("dtype", "|u1"), content.get("shape"))
        return pictures.read(content.get("data"))
    return content


def write_msgpack(content, bytes_keys: bool) -> bytes:
    """With openpi's arrays, whose keys are bytes, or vla-eval's, whose keys are text."""

    def pack(value):
        if isinstance(value, np.generic):
            return value.item()
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{type(value).__name__} cannot be packed")
        data = np.ascontiguousarray(value).tobytes()
        if bytes_keys:
            return {b"__ndarray__": True, b"data": data, b"dtype": value.dtype.str, b"shape": value.shape}
        return {"__ndarray__": True, "data": data, "dtype": str(value.dtype), "shape": list(value.shape)}

    return msgpack.packb(content, default=pack)


# --- Depth -----------------------------------------------------------------------------------------------------------
def check_depth(content):
    """The same; Malformed if it is nested too deeply to be an observation."""
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [each for value in level for each in _inside(value)]
        if not level:
            return content
    raise Malformed(f"Nested more than {MAX_DEPTH} deep, which no observation is.")


def _inside(value):
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()
