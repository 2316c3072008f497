"""Weights by name, one tensor at a time: from safetensors folders and `.pt` files, into sharded safetensors.

A 7B policy has 15 to 30 GB of weights. Whatever passes through here, only one tensor of it is in memory: safetensors
files are opened anew for every tensor, because pages read from a mapped file count as ours until it is closed.
"""

import json
import os
import pickle  # for the name of an error only: files are read with weights_only
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode  # torch gives it no public name; its own tutorials use this

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class SafetensorsFile:
    """`infos[name]` and `read(name)` of one file."""

    def __init__(self, file: Path):
        self.file = Path(file)
        try:
            with safe_open(self.file, "pt") as content:
                slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118 (not a dict)
                described = {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in slices.items()}
        except SafetensorError as error:
            raise ValueError(f"{self.file} is no whole safetensors file (a git-LFS pointer?): {error}") from error
        if unknown := {kind for kind, _ in described.values()} - set(_DTYPES):
            raise ValueError(
                f"{self.file} holds tensors of kind {sorted(unknown)}; expected one of {sorted(_DTYPES)}."
            )
        self.infos = {name: TensorInfo(_DTYPES[kind], tuple(shape)) for name, (kind, shape) in described.items()}

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self.file, "pt") as content:
            return content.get_tensor(name)


class SafetensorsFolder:
    """The weights of a Hub repository, under the names that its files have: `infos[name]`, `read(name)`."""

    def __init__(self, folder: Path):
        folder = Path(folder)
        weight_map, names = None, ["model.safetensors"]
        if (folder / INDEX).exists():
            if (folder / names[0]).exists():
                raise ValueError(f"{folder} holds both {names[0]} and {INDEX}: remove the one that is out of date.")
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
            names = list(dict.fromkeys(weight_map.values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing[:3])}: expected a whole checkpoint.")
        self.files = [SafetensorsFile(folder / name) for name in names]
        self._homes = {name: file for file in self.files for name in file.infos}
        self.infos = {name: file.infos[name] for name, file in self._homes.items()}
        if weight_map is not None and set(weight_map) != set(self.infos):
            odd = sorted(set(weight_map) ^ set(self.infos))
            raise ValueError(f"{folder / INDEX} and its files disagree about {len(odd)} tensors: {odd[:3]} …")

    def read(self, name: str) -> torch.Tensor:
        return self._homes[name].read(name)


class TorchFile:
    """One section of a `.pt` file, a nested dictionary of tensors, as `infos["outer.inner.key"]` and `read`.

    No code from the file runs. Only the description of the tensors is loaded, which says where in the file each one
    lies. Not mapped into memory: torch maps files so that the system must set their size aside, and the 30 GB of a 7B
    policy in float32 are refused where there are 24. `others` are the file's other sections.
    """

    def __init__(self, file: Path, section: str):
        self.file = Path(file)
        try:
            with FakeTensorMode():
                content = torch.load(self.file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{self.file} is no whole file of weights: {reason}") from error
        if not isinstance(content, dict) or not isinstance(content.get(section), dict):
            found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{self.file} has no section {section!r} with weights in it: it holds {found}.")
        self.others = sorted(set(content) - {section})
        self._tensors = dict(_flatten(content[section], ""))
        self.infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        described = self._tensors[name]
        storage = described.untyped_storage()
        if getattr(storage, "_checkpoint_offset", None) is None:
            raise ValueError(
                f"{self.file} does not tell where its tensors lie: it needs torch 2.7 or newer (this is "
                f"{torch.__version__}), and to be no file of torch before 1.6. Load it and torch.save it again."
            )
        if described.numel() == 0:
            return torch.empty(described.shape, dtype=described.dtype)
        content = bytearray(storage.nbytes())
        with open(self.file, "rb") as file:
            file.seek(storage._checkpoint_offset)
            if file.readinto(content) != len(content):
                raise ValueError(f"{self.file} ends in the middle of {name}.")
        whole = torch.frombuffer(content, dtype=described.dtype)
        return whole.as_strided(described.shape, described.stride(), described.storage_offset())


def _flatten(content: dict, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        else:
            raise ValueError(f"{prefix}{key} is no tensor but a {type(value).__name__}.")


def write_shards(
    folder: Path,
    infos: dict[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
    max_shard_size: int = 5 * 10**9,
    progress: bool = True,
) -> None:
    """Writes `model.safetensors`, or shards and their index, asking `read` for one tensor after the other.

    Args:
        infos: dtype and shape of every tensor, in the order of the files; what `read` gives is converted to the dtype
            and must have the shape.
        max_shard_size: bytes per file; a tensor larger than that gets a file of its own.
    """
    from tqdm import tqdm

    shards, size = [[]], 0
    for name, info in infos.items():
        if shards[-1] and size + info.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    total = sum(info.nbytes for info in infos.values())
    weight_map = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not progress) as bar:
        for number, names in enumerate(shards, start=1):
            many = len(shards) > 1
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
            _write_file(Path(folder) / file, {name: infos[name] for name in names}, read, bar)
            weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_text(Path(folder) / INDEX, json.dumps(index, indent=2))


def _write_file(path: Path, infos: dict[str, TensorInfo], read, bar) -> None:
    """One safetensors file: length of the header, header, bytes. The library writes tensors that it all has at once.

    Source: the format's specification, https://github.com/huggingface/safetensors#format.
    """
    kinds = {dtype: kind for kind, dtype in _DTYPES.items()}
    ordered = sorted(infos, key=lambda name: -infos[name].dtype.itemsize)  # so that every tensor is aligned
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in ordered:
        info = infos[name]
        span = [offset, offset + info.nbytes]
        header[name] = {"dtype": kinds[info.dtype], "shape": list(info.shape), "data_offsets": span}
        offset += info.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in ordered:
            tensor = read(name)
            if tuple(tensor.shape) != infos[name].shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {infos[name].shape}.")
            tensor = tensor.detach().to(device="cpu", dtype=infos[name].dtype).contiguous()
            if tensor.is_floating_point() and tensor.numel() and not all(v.isfinite() for v in tensor.aminmax()):
                raise ValueError(f"{name} is not finite as {infos[name].dtype}.")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())
            bar.update(infos[name].nbytes)
            del tensor
    os.replace(temporary, path)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
