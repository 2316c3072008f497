"""RLDS episodes as TFDS writes them (TFRecord files of `tf.train.Example`), without TensorFlow.

A TFRecord is `length (8 bytes) · crc (4) · data · crc (4)`; the data is a protobuf of one message, `Example`, whose
map from name to list of bytes, floats or integers is read here directly. `features.json` beside the files says what
each list means; images stay encoded until asked for. Checksums are CRC-32C of length and data, masked.
"""

import glob
import io
import json
import os
import re
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from openvla.finetune.oxe import STANDARDIZE, Trajectory, image_keys
from openvla.finetune.steps import Episode


class RLDSReader:
    """Episodes of one split of an RLDS dataset, standardised as OpenVLA does if it is known (see `oxe`).

    Args:
        name: the `unnorm_key`; default: the dataset's own. If it is that of a known dataset, it also says how to
            standardise; otherwise the dataset's own does.
    """

    def __init__(self, folder: str | Path, name: str | None = None, split: str = "train"):
        self.folder = str(folder)
        self.info = json.loads((Path(folder) / "dataset_info.json").read_text())
        self.name = name or self.info["name"]
        self.fps = None  # RLDS does not tell
        self.features = _flat_features(json.loads((Path(folder) / "features.json").read_text()))
        self.convention = self.name if self.name in STANDARDIZE else self.info["name"]
        self._files = _shards(self.folder, split)
        images = [key.removeprefix("observation/") for key, (kind, *_) in self.features.items() if kind == "image"]
        self.cameras = image_keys(self.convention, images)
        self._records = [(file, start, size) for file in self._files for start, size in _record_positions(file)]

    def __len__(self) -> int:
        return len(self._records)

    def files(self) -> list[str]:
        return [*self._files, os.path.join(self.folder, "features.json")]

    def read(self, index: int) -> Episode:
        file, start, _ = self._records[index]
        source = f"{file}, record at byte {start} (episode {index})"
        try:
            steps = self.raw_steps(index)
            trajectory = STANDARDIZE.get(self.convention, Trajectory.from_steps)(steps)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error

        def image(camera: str, step: int) -> np.ndarray:
            encoded = steps[f"observation/{camera}"][step + trajectory.first_step]
            picture = Image.open(io.BytesIO(encoded))
            return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))  # it would copy

        return Episode(source, trajectory.instructions, trajectory.actions, trajectory.proprio, image)

    def raw_steps(self, index: int) -> dict[str, np.ndarray | list]:
        """`{"observation/state": (N, …), "observation/image": [bytes] * N, …}`: the steps of an episode as stored."""
        file, start, size = self._records[index]
        with open(file, "rb") as stream:
            stream.seek(start)
            data = stream.read(size)
        steps = {}
        for key, values in _parse_example(data).items():
            if not key.startswith("steps/"):
                continue
            key = key.removeprefix("steps/")
            kind, shape, dtype = self.features.get(key, ("tensor", (), None))
            if kind == "text":
                values = [value.decode("utf-8", "replace") for value in values]
            elif kind == "tensor" and not isinstance(values, list):
                values = values.astype(bool if dtype == "bool" else dtype or values.dtype, copy=False)
                values = values.reshape(-1, *shape)
            steps[key] = values
        return steps


def _shards(folder: str, split: str) -> list[str]:
    """The files of a split, all of them: an interrupted copy must not pass for a small dataset."""
    files = sorted(glob.glob(os.path.join(glob.escape(folder), f"*-{split}.tfrecord-*")))
    if not files:
        splits = {re.search(r"-([^-]+)\.tfrecord-", file) for file in os.listdir(folder)}
        found = sorted(match[1] for match in splits if match)
        raise FileNotFoundError(f"{folder} has no files of the split {split!r}, but of {found}.")
    expected = int(files[0].rpartition("-of-")[2]) if "-of-" in files[0] else len(files)
    if len(files) != expected:
        raise ValueError(f"{folder} holds {len(files)} of the {expected} files of its split {split!r}: copy the rest.")
    return files


def _flat_features(spec: dict) -> dict[str, tuple]:
    """`{"observation/state": ("tensor", (7,), "float32"), …}` for what lies below `steps`."""
    flat = {}

    def walk(node: dict, path: tuple[str, ...]):
        if "featuresDict" in node:
            for key, child in node["featuresDict"]["features"].items():
                walk(child, (*path, key))
        elif "sequence" in node:
            walk(node["sequence"]["feature"], path)
        elif "image" in node:
            flat["/".join(path)] = ("image", None, "uint8")
        elif "text" in node:
            flat["/".join(path)] = ("text", None, None)
        elif "tensor" in node:
            shape = tuple(int(size) for size in node["tensor"]["shape"].get("dimensions", []))
            flat["/".join(path)] = ("tensor", shape, node["tensor"]["dtype"])

    walk(spec, ())
    return {key.removeprefix("steps/"): value for key, value in flat.items() if key.startswith("steps/")}


def _record_positions(file: str) -> list[tuple[int, int]]:
    """(first byte, bytes) of each record, from the headers alone. A file that ends within a record raises."""
    positions, end = [], os.path.getsize(file)
    with open(file, "rb") as stream:
        start = 0
        while start < end:
            header = stream.read(12)
            size = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else end
            if len(header) < 12 or start + size + 16 > end:
                raise ValueError(f"{file} is truncated: record {len(positions)} starts at byte {start} of {end}.")
            crc = struct.unpack("<I", header[8:])[0]
            if crc != masked_crc32c(header[:8]):
                raise ValueError(f"{file} is damaged: wrong checksum of record {len(positions)}'s length.")
            positions.append((start + 12, size))
            start += size + 16
            stream.seek(start)
    return positions


def masked_crc32c(data: bytes) -> int:
    """The checksum of TFRecord files. Table-driven and slow: meant for headers."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 255] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC32C = _crc_table()


# --- Protobuf: just what tf.train.Example needs ----------------------------------------------------------------------
def _varint(data: bytes, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 127) << shift
        if byte < 128:
            return result, at
        shift += 7


def _fields(data: bytes, at: int, end: int):
    """(field number, value) of a message; value: int, or (start, end) of a length-delimited field."""
    while at < end:
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire == 2:
            size, at = _varint(data, at)
            value, at = (at, at + size), at + size
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, at = (at, at + size), at + size
        else:
            raise ValueError(f"unknown protobuf wire type {wire} at byte {at}")
        if at > end:
            raise ValueError(f"protobuf field {number} runs past byte {end}")
        yield number, value


def _parse_example(data: bytes) -> dict[str, list[bytes] | np.ndarray]:
    features = {}
    for _, message in _fields(data, 0, len(data)):  # Example.features
        for _, entry in _fields(data, *message):  # Features.feature: map entries
            parts = dict(_fields(data, *entry))
            features[data[slice(*parts[1])].decode()] = _parse_feature(data, *parts[2]) if 2 in parts else []
    return features


def _parse_feature(data: bytes, start: int, end: int) -> list[bytes] | np.ndarray:
    for kind, span in _fields(data, start, end):
        if kind == 1:  # BytesList
            return [data[slice(*value)] for _, value in _fields(data, *span)]
        if kind == 2:  # FloatList, packed or not
            parts = [np.frombuffer(data, "<f4", (b - a) // 4, a) for _, (a, b) in _fields(data, *span)]
            return np.concatenate(parts) if parts else np.zeros(0, np.float32)
        return _parse_int64_list(data, *span)
    return []


def _parse_int64_list(data: bytes, start: int, end: int) -> np.ndarray:
    values = []
    for _, value in _fields(data, start, end):
        if isinstance(value, int):
            values.append(value)
            continue
        at, stop = value  # packed
        raw = np.frombuffer(data, np.uint8, stop - at, at)
        if (raw < 128).all():  # one byte each: flags and small numbers
            values.extend(raw.tolist())
            continue
        while at < stop:
            number, at = _varint(data, at)
            values.append(number)
    return np.array(values, np.uint64).astype(np.int64)
