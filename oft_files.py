"""Reads policies of OpenVLA-OFT as its fine-tuning leaves them, in a folder or on the Hub.

Beside merged weights, and a config.json that says nothing of it, such a folder holds `action_head--N_checkpoint.pt`,
`proprio_projector--…`, `noisy_action_projector--…`, `vision_backbone--…` (towers with FiLM, their LoRA not merged) and
`lora_adapter/`. What no file tells is how many steps a chunk has and how many cameras there are: the original takes
both from the words of its command line. Nothing is written into the folder.

Source: Kim et al. 2025 (arXiv:2502.19645) and the behaviour of its code (moojink/openvla-oft, 213c5ff).
"""

import json
import logging
import os
import pickle  # for the name of an error only: files are read with weights_only
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

logger = logging.getLogger(__name__)

PARTS = ("action_head", "proprio_projector", "noisy_action_projector", "vision_backbone")
ADAPTER = "lora_adapter/adapter_config.json"
STATISTICS = "dataset_statistics.json"
HUB_KEYS = ("cache_dir", "local_files_only", "token", "revision")
# What the original takes from words of its command line
TOLD = ("action_chunk", "num_cameras", "action_normalization")
# The original's robots: how the keys of their statistics begin -> these
PLATFORMS = {"libero": (8, 2, "q99"), "aloha": (25, 3, "min_max"), "bridge": (5, 1, "q99")}
ALOHA_DIM = 14  # two arms; no other robot of the original has as many actions


@dataclass
class OFTFiles:
    """What a policy consists of beside its merged weights. Absent parts are missing from `parts`."""

    folder: Path
    parts: dict[str, Path] = field(default_factory=dict)

    def read(self, part: str) -> dict[str, torch.Tensor]:
        """Tensors of a part, memory-mapped, without the prefix that data-parallel training adds.

        No code from the file runs. Raises ValueError for what holds anything but tensors.
        """
        try:
            tensors = torch.load(self.parts[part], map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{self.parts[part]} is no whole file of weights: {reason}") from error
        if not isinstance(tensors, dict) or not all(isinstance(each, torch.Tensor) for each in tensors.values()):
            raise ValueError(f"{self.parts[part]} holds something else than tensors by name.")
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def find_oft(path: str, config: dict, **hub_kwargs) -> OFTFiles | None:
    """The files of a policy of OpenVLA-OFT; None if a folder or Hub repository is none.

    Args:
        config: its config.json. One that declares `attention` was written by this code, and means what it says.
    """
    if "attention" in config:
        return None
    folder = Path(path)
    subfolder = hub_kwargs.pop("subfolder", None) or ""
    if not folder.is_dir():
        names = (*(f"{part}--*.pt" for part in PARTS), ADAPTER, STATISTICS)
        patterns = [os.path.join(subfolder, name) for name in names]
        shared = {key: hub_kwargs[key] for key in HUB_KEYS if hub_kwargs.get(key) is not None}
        try:
            folder = Path(snapshot_download(path, allow_patterns=patterns, **shared))
        except OSError as error:  # offline, and never asked for before
            logger.warning("Cannot tell whether %s is a policy of OpenVLA-OFT (%s); taking it for none.", path, error)
            return None
    folder = folder / subfolder
    found = OFTFiles(folder)
    for part in PARTS:
        files = sorted(folder.glob(f"{part}--*.pt"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{path} holds several steps of one training ({names}): put one in a folder of its own.")
        if files:
            found.parts[part] = files[0]
    return found if found.parts or (folder / ADAPTER).is_file() else None


def oft_fields(files: OFTFiles, config: dict, given: dict) -> dict:
    """Fields of `OpenVLAConfig` that the parts and their sizes tell.

    Args:
        config: config.json of the policy.
        given: fields that the caller tells, of which `action_chunk`, `num_cameras` and `action_normalization` are in
            no file; left out, they are those of the original's robots, if the statistics are named after one.

    Raises ValueError if they are needed.
    """
    fields = {"attention": "bidirectional", "action_head": "token", "film": "vision_backbone" in files.parts}
    fields["film_counts_padding"] = fields["film"]
    statistics = read_statistics(files.folder, config)
    dims = {len(next(iter(each["action"].values()))) for each in statistics.values()}
    if "action_head" in files.parts:
        shapes = {name: tensor.shape for name, tensor in files.read("action_head").items()}
        kinds = {"model.fc2.weight": "l1", "noise_predictor.mlp_resnet.fc2.weight": "diffusion"}
        known = [name for name in kinds if name in shapes]
        if not known:
            raise ValueError(
                f"{files.parts['action_head']} is a kind of head that the original does not have: {sorted(shapes)[:4]}"
            )
        fields["action_head"], dims = kinds[known[0]], {shapes[known[0]][0]}
    if given.get("action_dim") is not None:
        dims = {given["action_dim"]}
    if len(dims) != 1:
        raise ValueError(
            f"{files.folder} is a policy of OpenVLA-OFT without action head, and its statistics have {sorted(dims)} "
            "action dims: pass action_dim."
        )
    (fields["action_dim"],) = dims
    if "proprio_projector" in files.parts:
        fields["proprio_dim"] = files.read("proprio_projector")["fc1.weight"].shape[1]
    if (fields["action_head"] == "diffusion") != ("noisy_action_projector" in files.parts):
        raise ValueError(f"{files.folder} has only one of a diffusion head and its noisy_action_projector.")

    robot = next((name for name in PLATFORMS if statistics and all(key.startswith(name) for key in statistics)), None)
    if robot is None and fields["action_dim"] == ALOHA_DIM:
        robot = "aloha"
    told = {name: given[name] for name in TOLD if given.get(name) is not None}
    assumed = dict(zip(TOLD, PLATFORMS.get(robot, ())))
    assumed = {name: value for name, value in assumed.items() if name not in told}
    told |= assumed
    if missing := [name for name in ("action_chunk", "num_cameras") if name not in told]:
        raise ValueError(
            f"{files.folder} is a policy of OpenVLA-OFT, whose files do not tell {' and '.join(missing)}, and its "
            f"statistics {sorted(statistics)} name no robot of the original: pass {' and '.join(missing)}, as trained."
        )
    if absent := [part for part in ("action_head", "proprio_projector") if part not in files.parts]:
        logger.warning(
            "%s holds no %s: taken for a policy that has none%s. If its training saved one, the folder is not whole.",
            files.folder,
            " and no ".join(f"{part}--*.pt" for part in absent),
            " and acts with tokens" if "action_head" in absent else "",
        )
    if "action_chunk" in assumed or assumed.get("action_normalization", "q99") != "q99":
        logger.warning("%s is taken for a policy of OpenVLA-OFT on %s: %s.", files.folder, robot, assumed)
    return fields | told


def read_statistics(folder: Path, config: dict) -> dict:
    """The statistics a policy acts with: dataset_statistics.json beside the weights, else those of its config."""
    path = folder / STATISTICS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else config.get("norm_stats") or {}


class OFTWeights(Mapping):
    """All tensors of the parts, by the names our files have; towers with FiLM replace those beside them.

    They stay in their files, but for the towers with FiLM, whose LoRA is merged when a tensor is asked for. FiLM was
    put in after the adapters, which therefore were not merged with the others: in the file, blocks are wrapped, and so
    are their linear layers. `origins` is `{name in the file: name here}`, of LoRA that of the weight it changes.
    """

    def __init__(self, files: OFTFiles):
        adapter = files.folder / ADAPTER
        self.adapter = json.loads(adapter.read_text(encoding="utf-8")) if adapter.is_file() else {}
        self.tensors, self.lora, self.origins = {}, {}, {}
        for part in files.parts:
            for key, tensor in files.read(part).items():
                name, lora, kind = f"{part}.{key}", "", ""
                if part == "vision_backbone":
                    name, lora, kind = key.replace(".block.", ".").partition(".lora_")
                    name = f"{name}.weight" if lora else name.replace(".base_layer.", ".")
                self.origins[f"{files.parts[part].name}: {key}"] = name
                if lora:
                    self.lora.setdefault(name, {})[kind] = tensor
                else:
                    self.tensors[name] = tensor
        for name, pair in self.lora.items():
            if set(pair) != {"A.default.weight", "B.default.weight"} or name not in self.tensors:
                raise ValueError(f"{files.parts['vision_backbone']}: LoRA of {name} is not plain: {sorted(pair)}.")
            told, rank = self.adapter.get("r"), len(pair["A.default.weight"])
            if told not in (None, rank):
                raise ValueError(f"LoRA of {name} has rank {rank}, but {adapter} says {told}.")

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self.tensors[name]
        if name not in self.lora:
            return weight
        down, up = (self.lora[name][f"{kind}.default.weight"].float() for kind in "AB")
        scale = self.adapter.get("lora_alpha", min(len(down), 16)) / len(down)
        return (weight.float() + scale * up @ down).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
