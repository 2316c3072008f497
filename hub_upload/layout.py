"""What a published folder consists of, and which weights a policy must have: shared by convert and export."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import GenerationConfig

from openvla.hub_upload.weights import TensorInfo
from openvla.modeling_openvla import OpenVLAForActionPrediction
from openvla.oft_files import find_oft

PACKAGE = Path(__file__).parent.parent
HUB_FILES = (
    "configuration_openvla.py",
    "action_tokenizer.py",
    "tf_image_ops.py",
    "linear_layers.py",
    "vision_towers.py",
    "action_decoding.py",
    "language_layers.py",
    "compiled_actions.py",
    "action_heads.py",
    "oft_files.py",
    "processing_openvla.py",
    "pretrained_openvla.py",
    "modeling_openvla.py",
)


def skeleton(config):
    """The policy of a config without memory for its weights (on the meta device)."""
    with torch.device("meta"):
        return OpenVLAForActionPrediction(config)


def released_names(model, names) -> dict[str, str]:
    """`{name: name in released files}`: nested names, as some tools save them, become the released ones."""
    return {old: new for new, old in model._fix_state_dict_keys_on_save({name: name for name in names}).items()}


def is_unused(model, released: str) -> bool:
    """Whether a tensor belongs to what no policy ever reads: last blocks, final norms and pooling heads of towers."""
    return any(re.search(pattern, released) for pattern in model._keys_to_ignore_on_load_unexpected)


def never_read(config, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of what released files have and no policy reads: last block, final norm and pooling head of each tower.

    Args:
        shapes: of the tensors that are read, by released name.
    """
    found = {}
    for name, tower in zip(("featurizer", "fused_featurizer"), config.vision_towers):
        prefix, dim, hidden = f"vision_backbone.{name}.", tower.embed_dim, int(tower.embed_dim * tower.mlp_ratio)
        first, last = f"{prefix}blocks.0.", f"{prefix}blocks.{tower.depth - 1}."
        found |= {key.replace(first, last): shape for key, shape in shapes.items() if key.startswith(first)}
        found |= {f"{prefix}norm.weight": (dim,), f"{prefix}norm.bias": (dim,)}
        if tower.global_pool == "map":
            found |= {f"{prefix}attn_pool.latent": (1, 1, dim), f"{prefix}attn_pool.norm.weight": (dim,)}
            found |= {f"{prefix}attn_pool.norm.bias": (dim,)}
            linear = {"q": (dim, dim), "kv": (2 * dim, dim), "proj": (dim, dim)}
            for layer, shape in (linear | {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}).items():
                found |= {f"{prefix}attn_pool.{layer}.weight": shape, f"{prefix}attn_pool.{layer}.bias": shape[:1]}
    return found


def check_weights(model, infos: dict[str, TensorInfo], source) -> list[str]:
    """Accounts for every tensor, under released names. Returns those that no policy ever reads (`is_unused`).

    Raises ValueError for tensors that are missing, of another shape, or unknown.
    """
    state = model.state_dict()
    expected = {new: tuple(state[old].shape) for old, new in released_names(model, state).items()}
    missing = sorted(set(expected) - set(infos))
    wrong = [
        f"{name} {infos[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in infos and infos[name].shape != shape
    ]
    extra = [name for name in infos if name not in expected]
    unused = [name for name in extra if is_unused(model, name)]
    unknown = sorted(set(extra) - set(unused))
    problems = [
        f"{len(found)} {what}: {', '.join(found[:3])}{' …' if len(found) > 3 else ''}"
        for what, found in (("missing", missing), ("of another shape", wrong), ("unknown", unknown))
        if found
    ]
    if problems:
        raise ValueError(
            f"{source} does not hold the policy that its config.json describes. Tensors {'; '.join(problems)}"
        )
    return unused


def write_companions(folder: Path, config, processor, statistics: dict | None) -> None:
    """Everything but the weights: code, config.json with the whole auto_map, processor, tokenizer, generation_config
    and, for older tools, dataset_statistics.json."""
    folder = Path(folder)
    config.norm_stats = statistics
    config.text_config.dtype = config.dtype  # 4.57 would build the language model in that of the source
    config.architectures = ["OpenVLAForActionPrediction"]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in HUB_FILES:
        shutil.copyfile(PACKAGE / name, folder / name)
    ids = {name: getattr(processor.tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    GenerationConfig(**ids, pad_token_id=config.pad_token_id).save_pretrained(folder)
    if statistics is not None:
        (folder / "dataset_statistics.json").write_text(json.dumps(statistics, indent=2))


def read_oft(source: Path):
    """The files of a policy of OpenVLA-OFT that its training left (`oft_files.py`); None for other checkpoints.

    Raises FileNotFoundError for folders that are no checkpoint in HF layout.
    """
    config = Path(source) / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{source} has no config.json: expected a checkpoint, or a run of openvla finetune.")
    return find_oft(str(source), json.loads(config.read_text(encoding="utf-8")))


def read_statistics(source: Path, config) -> dict | None:
    """The statistics a policy acts with: dataset_statistics.json beside the weights, else those of its config."""
    path = Path(source) / "dataset_statistics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else config.norm_stats


def copy_extras(source: Path, folder: Path) -> None:
    """generation_config.json and tokenizer.model of a source, which nothing here needs but others may."""
    for name in ("generation_config.json", "tokenizer.model"):
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, Path(folder) / name)


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool = False, sources: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A folder under a temporary name that gets its own once everything is in it; removed if anything goes wrong.

    Args:
        overwrite: replace `out` if it is empty or a policy's folder; anything else is never deleted.

    Raises ValueError if `out` would replace one of the `sources`, or lie in one.
    """
    out = Path(out).expanduser()
    for source in (path.resolve() for path in sources):
        if out.resolve() in (source, *source.parents) or source in out.resolve().parents:
            raise ValueError(f"{out} and its source {source} overlap: choose another folder.")
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise FileExistsError(f"{out} exists: choose another folder, or pass --overwrite.")
        a_policy = out.is_dir() and (out / "config.json").exists() and (out / "modeling_openvla.py").exists()
        if out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not a_policy):
            raise FileExistsError(
                f"{out} holds something else than a policy, and is not overwritten: remove it first."
            )
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".incomplete", dir=out.absolute().parent))
    temporary = scratch / out.name  # its last part, so that what is written about the folder calls it by its name
    temporary.mkdir()
    try:
        yield temporary
        if out.exists():
            os.replace(out, scratch / "replaced")
        os.replace(temporary, out)
    finally:
        if (scratch / "replaced").exists() and not out.exists():
            os.replace(scratch / "replaced", out)
        shutil.rmtree(scratch, ignore_errors=True)


def fetch(source: str, patterns: list[str], revision: str | None = None) -> Path:
    """A folder as it is, or the matching files of a Hub repository."""
    folder = Path(source).expanduser()
    if folder.exists():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise FileNotFoundError(f"{source} is neither a folder nor a Hub id such as openvla/openvla-7b.")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
