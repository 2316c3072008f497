"""Arrays and pictures from a network: what is right comes back as it was, what is wrong makes nothing."""

import base64
import io
import json
import struct
import zlib

import msgpack
import numpy as np
import pytest
from PIL import Image

from openvla.serve.wire import (
    MAX_DEPTH,
    MAX_ENTRIES,
    Malformed,
    Pictures,
    read_json,
    read_msgpack,
    write_json_numpy,
    write_msgpack,
)

PIXELS = 100_000
PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
ARRAYS = [
    PICTURE,
    np.array([1.5, -2.0]),
    np.float32([[1, 2], [3, 4]]),
    np.array(7),
    np.zeros((0, 3)),
    np.array([True]),
]


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """Black, a thousand times smaller than its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes((3 * width + 1) * height), 9) if width * height < 2**20 else zlib.compress(bytes(2**16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_arrays_come_back(array):
    over_json = read_json(json.dumps({"a": [write_json_numpy(array)]}))["a"][0]
    for bytes_keys in (True, False):
        packed = read_msgpack(write_msgpack({"a": array}, bytes_keys), PIXELS)["a"]
        for read in (packed, over_json):
            np.testing.assert_array_equal(read, array)
            assert read.dtype == array.dtype and read.shape == array.shape


def test_pictures_as_files():
    for content in (png(PICTURE), base64.b64encode(png(PICTURE)).decode()):
        np.testing.assert_array_equal(Pictures(PIXELS).read(content), PICTURE)
    message = msgpack.packb({"i": {"__image__": True, "format": "png", "data": png(PICTURE), "shape": [20, 30, 3]}})
    np.testing.assert_array_equal(read_msgpack(message, PIXELS)["i"], PICTURE)
    raw = {"__image__": True, "format": "raw", "data": PICTURE.tobytes(), "dtype": "|u1", "shape": [20, 30, 3]}
    np.testing.assert_array_equal(read_msgpack(msgpack.packb({"i": raw}), PIXELS)["i"], PICTURE)


def test_depth_is_no_picture():
    file = io.BytesIO()
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100).save(file, "PNG")
    with pytest.raises(Malformed, match="8 bits per channel, got I;16"):
        Pictures(PIXELS).read(file.getvalue())
    for mode in ("L", "P", "RGBA", "LA"):
        file = io.BytesIO()
        Image.fromarray(PICTURE).convert(mode).save(file, "PNG")
        assert Pictures(PIXELS).read(file.getvalue()).shape == PICTURE.shape


def test_single_numbers_of_openpi():
    message = msgpack.packb({"g": {b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f8"}})
    assert read_msgpack(message, PIXELS) == {"g": 0.5}


def test_pixels_are_counted_over_a_message():
    pictures = Pictures(2 * 600)
    pictures.read(png(PICTURE))
    pictures.read(png(PICTURE))
    with pytest.raises(Malformed, match="0 pixels, got 30x20"):
        pictures.read(png(PICTURE))
    with pytest.raises(Malformed, match="30000x30000|far more"):
        Pictures(PIXELS).read(png_of_size(30000, 30000))


WRONG = [
    ({"dtype": "|O", "shape": [1], "data": bytes(8)}, "dtype '|O'"),
    ({"dtype": "O", "shape": [1], "data": bytes(8)}, "dtype 'O'"),
    ({"dtype": "V8", "shape": [1], "data": bytes(8)}, "dtype 'V8'"),
    ({"dtype": "<U2", "shape": [1], "data": bytes(8)}, "dtype '<U2'"),
    ({"dtype": "<M8[s]", "shape": [1], "data": bytes(8)}, "dtype '<M8"),
    ({"dtype": "<c16", "shape": [1], "data": bytes(16)}, "dtype '<c16'"),
    ({"dtype": "f8,f8", "shape": [1], "data": bytes(16)}, "dtype 'f8,f8'"),
    ({"dtype": "(2,)f8", "shape": [1], "data": bytes(16)}, "dtype"),
    ({"dtype": "nonsense", "shape": [1], "data": bytes(8)}, "dtype 'nonsense'"),
    ({"dtype": ",", "shape": [1], "data": bytes(8)}, "dtype ','"),
    ({"dtype": "=,u", "shape": [1], "data": bytes(8)}, "dtype '=,u'"),
    ({"dtype": "<f3", "shape": [1], "data": bytes(3)}, "dtype '<f3'"),
    ({"dtype": 8, "shape": [1], "data": bytes(8)}, "dtype '8'"),
    ({"dtype": "<f8", "shape": [2], "data": bytes(8)}, "8 bytes are no array"),
    ({"dtype": "<f8", "shape": [-1], "data": bytes(8)}, "sizes"),
    ({"dtype": "<f8", "shape": [2**40, 2**40], "data": b""}, "sizes"),
    ({"dtype": "<f8", "shape": [1.0], "data": bytes(8)}, "sizes"),
    ({"dtype": "<f8", "shape": [True], "data": bytes(8)}, "sizes"),
    ({"dtype": "<f8", "shape": [1] * 5, "data": bytes(8)}, "at most 4 sizes"),
    ({"dtype": "<f8", "shape": None, "data": bytes(8)}, "sizes"),
    ({"dtype": "<f8", "shape": [1], "data": None}, "NoneType are no array"),
    ({}, "dtype 'None'"),
]


@pytest.mark.parametrize("fields, problem", WRONG, ids=lambda value: str(value)[:40])
def test_an_array_that_is_none(fields, problem):
    text = {name: value for name, value in fields.items() if name != "data"}
    text["__numpy__"] = base64.b64encode(fields.get("data") or b"").decode()
    if fields.get("data", b"") is not None:
        with pytest.raises(Malformed, match=problem.replace("|", r"\|").replace("(", r"\(").replace("[", r"\[")):
            read_json(json.dumps({"image": text}))
    for keys in (str, str.encode):
        packed = {keys("__ndarray__"): True} | {keys(name): value for name, value in fields.items()}
        with pytest.raises(Malformed):
            read_msgpack(msgpack.packb({"image": packed}), PIXELS)


@pytest.mark.parametrize(
    "body, problem",
    [
        (b"", "Expected JSON"),
        (b"\xff\xfe\x00", "Expected JSON"),
        (b"{" * 19_000, "Expected JSON"),
        (b"[" * 19_000, "Expected JSON|Nested"),
        (b"[" * 100_000, "entries"),
        (b'["' + b"," * MAX_ENTRIES + b'x"]', "entries"),
        (b'{"state": [NaN]}', "NaN is no number"),
        (b'{"state": [1, -Infinity]}', "-Infinity is no number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Expected JSON"),
        (b'{"image": {"__numpy__": "no base64!"}}', "no base64"),
        (b'{"image": {"__numpy__": 7}}', "no base64"),
        (b"[" + b"1," * MAX_ENTRIES + b"1]", "entries"),
        (b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "deep"),
    ],
    ids=range(13),
)
def test_json_that_is_none(body, problem):
    with pytest.raises(Malformed, match=problem):
        read_json(body)


@pytest.mark.parametrize(
    "body, problem",
    [
        (b"", "Expected MessagePack"),
        (b"\xc1", "Expected MessagePack"),
        (msgpack.packb({"a": 1})[:-1], "Expected MessagePack"),
        (msgpack.packb({"a": 1}) + b"\x00", "Expected MessagePack"),
        (b"\x91" * 2000, "Expected MessagePack"),
        (b"\xdd\x00\x01\x00\x00" + b"\x80" * 2**16, "Expected MessagePack"),
        (b"\x92" + 2 * (b"\xdc\x2e\xe0" + b"\x80" * 12_000), "More than 20000 entries"),
        (b"\x91" * (MAX_DEPTH + 1) + b"\x01", "deep"),
        (b"\xdd\xff\xff\xff\xff", "Expected MessagePack"),
        (b"\xa2\xff\xfe", "Expected MessagePack"),
        (b"\x81\x80\x01", "Expected MessagePack"),
        (msgpack.packb(msgpack.ExtType(5, b"x")), "type 5"),
        (msgpack.packb({"i": {"__image__": True, "format": "png", "data": b"GIF89a"}}), "PNG, JPEG or WebP"),
        (msgpack.packb({"i": {"__image__": True, "format": "png", "data": "no base64"}}), "base64"),
        (msgpack.packb({"i": {"__image__": True, "format": "png"}}), "the file of a picture"),
    ],
    ids=range(15),
)
def test_messagepack_that_is_none(body, problem):
    with pytest.raises(Malformed, match=problem):
        read_msgpack(body, PIXELS)
