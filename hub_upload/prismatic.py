"""The original's training runs: which policy their config.json means, and their `.pt` under released names."""

import inspect
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

from openvla.configuration_openvla import OpenVLAConfig
from openvla.hub_upload.weights import SafetensorsFile, TensorInfo, TorchFile
from openvla.processing_openvla import OpenVLAImageProcessor

# A VLA's config.json names its base VLM; what the name means is in Prismatic's registry (prismatic/conf/models.py).
BASE_VLMS = {
    "prism-dinosiglip-224px+7b": {
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
    },
    "siglip-224px+7b": {
        "vision_backbone_id": "siglip-vit-so400m",
        "llm_backbone_id": "vicuna-v15-7b",
        "arch_specifier": "no-align+gelu-mlp",
        "image_resize_strategy": "letterbox",
    },
}
# Prefix in a `.pt` -> released prefix. A sole tower is called `featurizer` in both.
NAMES = {
    "vision_backbone.featurizer.": "vision_backbone.featurizer.",
    "vision_backbone.dino_featurizer.": "vision_backbone.featurizer.",
    "vision_backbone.siglip_featurizer.": "vision_backbone.fused_featurizer.",
    "vision_backbone.clip_featurizer.": "vision_backbone.fused_featurizer.",
    "projector.projector.0.": "projector.fc1.",
    "projector.projector.2.": "projector.fc2.",
    "projector.projector.4.": "projector.fc3.",
    "llm_backbone.llm.": "language_model.",
}
COMPUTED = r"rotary_emb\.inv_freq$"  # old versions of transformers saved it
# Mean and standard deviation of the pixels each tower was trained with, by what its timm id contains.
PIXEL_STATISTICS = {
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ".openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ".augreg": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def is_run(source: Path) -> bool:
    """Whether a path is a training run of the original or one of its files, and not a folder in HF layout."""
    return source.suffix == ".pt" or (source / "checkpoints").is_dir()


def find_pt(source: Path) -> Path:
    """The `.pt` of a run: what its link calls the latest, or the only one."""
    if source.is_file():
        return source
    folder = source / "checkpoints"
    latest = folder / "latest-checkpoint.pt"
    found = [latest] if latest.exists() else sorted(folder.glob("*.pt"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"Expected one checkpoint in {folder}, found {names}: pass the file itself.")
    return found[0]


def read_config(path: Path) -> OpenVLAConfig:
    """The policy that the config.json of a VLA's or a base VLM's run describes. The section "model" of the latter may
    hold any field of `OpenVLAConfig`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it tells what the policy consists of.")
    content = json.loads(path.read_text())
    if "model" in content:
        known = inspect.signature(OpenVLAConfig).parameters
        return OpenVLAConfig(**{key: value for key, value in content["model"].items() if key in known})
    name = str(content.get("vla", {}).get("base_vlm", "")).rstrip("/").rpartition("/")[2]
    if name not in BASE_VLMS:
        raise ValueError(
            f"{path} names the base VLM {name!r}, which is none of {sorted(BASE_VLMS)}: pass that VLM's own "
            "config.json with --base-config."
        )
    return OpenVLAConfig(**BASE_VLMS[name])


def released_name(name: str) -> str | None:
    """`vision_backbone.dino_featurizer.blocks.0.ls1.gamma` of a `.pt` as released files have it; None if unknown."""
    for prefix, released in NAMES.items():
        if name.startswith(prefix):
            name = released + name.removeprefix(prefix)
            if name.startswith("vision_backbone.") and name.endswith(".gamma"):  # LayerScale
                name = name.removesuffix("gamma") + "scale_factor"
            return name
    return None


class PrismaticWeights:
    """The weights of a `.pt` under released names: `infos`, `read`; `renamed` and `dropped` account for all it holds.

    Args:
        dtype: what the weights become; the original's converter gives bfloat16.
    """

    def __init__(self, file: Path, dtype: torch.dtype):
        self.source = TorchFile(file, "model")
        self.renamed: dict[str, str] = {}
        self.dropped = dict.fromkeys(self.source.others, "no weights of the policy")
        unknown = []
        for name in self.source.infos:
            released = released_name(name)
            if released is None:
                unknown.append(name)
            elif re.search(COMPUTED, released):
                self.dropped[name] = "computed, not learned"
            else:
                self.renamed[released] = name
        if unknown:
            raise ValueError(f"{file} holds {len(unknown)} tensors of an unknown kind: {', '.join(unknown[:5])}")
        self.infos = {new: TensorInfo(dtype, self.source.infos[old].shape) for new, old in self.renamed.items()}

    @property
    def has_towers(self) -> bool:
        return any(name.startswith("vision_backbone.") for name in self.infos)

    def read(self, name: str) -> torch.Tensor:
        return self.source.read(self.renamed[name])


class TimmTower:
    """A tower of timm's own (safetensors), for base VLMs that were trained with frozen towers and do not hold them.

    Args:
        prefix: `vision_backbone.featurizer.` or `vision_backbone.fused_featurizer.`
        num_positions: entries of the policy's position table; timm's is resampled to it.
    """

    def __init__(self, file: Path, prefix: str, num_positions: int, dtype: torch.dtype):
        self.source = SafetensorsFile(file)
        self.num_positions = num_positions
        self.renamed, self.dropped = {}, {}
        for name in self.source.infos:
            if re.match(r"(cls_token|reg_token|pos_embed|patch_embed\.|blocks\.|norm|fc_norm\.|attn_pool\.)", name):
                self.renamed[prefix + re.sub(r"\.gamma$", ".scale_factor", name)] = name
            else:
                self.dropped[name] = "not part of the tower"
        if f"{prefix}pos_embed" not in self.renamed:
            raise ValueError(f"{file} has no pos_embed: expected the weights of a vision transformer of timm.")
        self.infos = {new: TensorInfo(dtype, self.source.infos[old].shape) for new, old in self.renamed.items()}
        dim = self.infos[f"{prefix}pos_embed"].shape[2]
        self.infos[f"{prefix}pos_embed"] = TensorInfo(dtype, (1, num_positions, dim))

    def read(self, name: str) -> torch.Tensor:
        tensor = self.source.read(self.renamed[name])
        return resample_positions(tensor, self.num_positions) if name.endswith(".pos_embed") else tensor


def resample_positions(table: torch.Tensor, num_positions: int) -> torch.Tensor:
    """A position table `(1, n², D)` for another number of patches, as timm does it: bicubic, antialiased."""
    if table.shape[1] == num_positions:
        return table
    side, new_side = round(table.shape[1] ** 0.5), round(num_positions**0.5)
    if side**2 != table.shape[1] or new_side**2 != num_positions:
        raise ValueError(f"Cannot resample {table.shape[1]} positions to {num_positions}: both must be square.")
    grid = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", antialias=True)
    return grid.permute(0, 2, 3, 1).reshape(1, num_positions, -1).to(table.dtype)


def image_processor_for(config: OpenVLAConfig) -> OpenVLAImageProcessor:
    """The image processor that the original's converter makes for a config.

    It runs with bfloat16 as default dtype and so rounds the pixel statistics: released policies act with those.
    """
    chosen = []
    for timm_id in config.timm_model_ids:
        known = [values for kind, values in PIXEL_STATISTICS.items() if kind in timm_id]
        if len(known) != 1:
            raise ValueError(f"How pixels are normalised for tower {timm_id!r} is not known to this converter.")
        chosen.append(known[0])
    rounded = [[torch.tensor(values, dtype=torch.bfloat16).tolist() for values in pair] for pair in chosen]
    sides = config.image_sizes
    return OpenVLAImageProcessor(
        use_fused_vision_backbone=config.use_fused_vision_backbone,
        image_resize_strategy=config.image_resize_strategy,
        input_sizes=[(3, side, side) for side in sides],
        interpolations=["bicubic"] * len(sides),
        means=[mean for mean, _ in chosen],
        stds=[std for _, std in chosen],
        tvf_normalize_params=[{"inplace": False, "mean": mean, "std": std} for mean, std in rounded],
        # For the original's code, which reads these:
        tvf_resize_params=[
            {"antialias": True, "interpolation": 3, "max_size": None, "size": [side, side]} for side in sides
        ],
        tvf_crop_params=[{"output_size": [side, side]} for side in sides],
        tvf_do_letterbox=config.image_resize_strategy == "letterbox",
    )


def tokenizer_for(config: OpenVLAConfig, source: str) -> PreTrainedTokenizerFast:
    """The language model's tokenizer with `<PAD>` behind its vocabulary, as the original's converter leaves it.

    Made of tokenizer.json alone: told that it is a LlamaTokenizer, transformers 5 would rebuild it in a way of its
    own, and text behind a special token would get other ids.
    """
    files = {name: cached_file(source, name) for name in ("tokenizer.json", "tokenizer_config.json")}
    with open(files["tokenizer_config.json"], encoding="utf-8") as file:
        declared = json.load(file)
    special = {name: declared[name] for name in ("bos_token", "eos_token", "unk_token") if declared.get(name)}
    special = {name: token["content"] if isinstance(token, dict) else token for name, token in special.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=files["tokenizer.json"],
        model_max_length=config.llm_max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    if tokenizer.pad_token_id != config.pad_token_id:
        raise ValueError(
            f"With the tokenizer of {source}, <PAD> gets the id {tokenizer.pad_token_id}, the policy has "
            f"{config.pad_token_id}: expected the tokenizer of {config.hf_llm_id}."
        )
    end = config.prompt_end_token_id
    if end is not None and tokenizer.convert_ids_to_tokens(end) != "▁":
        raise ValueError(
            f"In the tokenizer of {source}, {end} is {tokenizer.convert_ids_to_tokens(end)!r} and not '▁', which ends "
            f"every prompt: expected the tokenizer of {config.hf_llm_id}."
        )
    return tokenizer
