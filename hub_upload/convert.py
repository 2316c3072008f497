"""Turns checkpoints of the original into folders that today's transformers load: same weights, code beside them.

openvla convert openvla/openvla-7b converted/openvla-7b
openvla convert runs/prism-dinosiglip-224px+mx-bridge converted/bridge --tokenizer openvla/openvla-7b
openvla convert runs/RUN/checkpoints/step-002500-epoch-01-loss=0.5.pt converted/bridge --tokenizer openvla/openvla-7b
openvla convert prism-dinosiglip-224px+7b converted/base --towers dinov2.safetensors siglip.safetensors
openvla convert moojink/openvla-7b-oft-finetuned-libero-spatial converted/oft-spatial --center-crop-area 0.9
openvla convert runs/my-oft--50000_chkpt converted/my-oft --chunk 10 --cameras 3 --center-crop-area 0.9

A source is a folder or Hub repository that the original's own converter wrote (its weights are copied untouched), a
training run of the original (config.json, dataset_statistics.json, checkpoints/*.pt), one `.pt` of it, or a base VLM
of Prismatic in the same layout. Base VLMs have no statistics: the result is for fine-tuning. Trained with frozen
towers, as most were, they do not hold them: pass timm's own with --towers. Policies of OpenVLA-OFT become one folder
with their heads and projectors in the weights; unless they are named after a robot of the original (libero, aloha,
bridge), --chunk and --cameras say what their files do not. Nothing is written into the source.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

from openvla.cli import command_parser

PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "checkpoints/*.pt", "*--*.pt", "lora_adapter/*.json"]
REPORT = "conversion.json"


def convert_folder(
    source: Path, folder: Path, center_crop_area: float | None = None, told: dict[str, int] | None = None
) -> dict:
    """A folder in HF layout: weights and their index byte by byte, everything else for today's transformers.

    Args:
        told: `action_chunk` and `num_cameras` of a policy of OpenVLA-OFT, whose parts become one with the weights.
    """
    from openvla.configuration_openvla import OpenVLAConfig
    from openvla.hub_upload.layout import (
        check_weights,
        copy_extras,
        read_oft,
        read_statistics,
        skeleton,
        write_companions,
    )
    from openvla.hub_upload.weights import INDEX, SafetensorsFolder
    from openvla.processing_openvla import OpenVLAProcessor

    told = told or {}
    oft = read_oft(source)
    if told and oft is None:
        raise ValueError(f"{source} is no policy of OpenVLA-OFT: --chunk and --cameras are for those.")
    config = OpenVLAConfig.from_pretrained(source, **told)
    weights = SafetensorsFolder(source)
    if oft is None:
        report = {"renamed": {}, "dropped": {}, "unused": check_weights(skeleton(config), weights.infos, source)}
        for path in [file.file for file in weights.files] + [source / INDEX] * (source / INDEX).exists():
            shutil.copyfile(path, folder / path.name)
    else:
        report = _write_oft(oft, config, weights, folder)
    processor = OpenVLAProcessor.from_pretrained(source, num_cameras=config.num_cameras)
    if center_crop_area is not None:
        processor.image_processor.center_crop_area = center_crop_area
    write_companions(folder, config, processor, read_statistics(source, config))
    copy_extras(source, folder)
    return report | {"tensors": len(weights.infos)}


def _write_oft(oft, config, weights, folder: Path) -> dict:
    """Weights and parts of a policy of OpenVLA-OFT as one, tensor by tensor, byte by byte; but LoRA is merged."""
    from openvla.hub_upload.layout import check_weights, skeleton
    from openvla.hub_upload.weights import TensorInfo, write_shards
    from openvla.oft_files import OFTWeights

    parts = OFTWeights(oft)
    infos = weights.infos | {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in parts.items()}
    unused = check_weights(skeleton(config), infos, oft.folder)
    write_shards(folder, infos, lambda name: parts[name] if name in parts else weights.read(name), 5 * 10**9)
    replaced = sorted(set(parts) & set(weights.infos))
    weights.infos = infos
    return {
        "renamed": parts.origins,
        "dropped": dict.fromkeys(replaced, "replaced by the towers with FiLM"),
        "unused": unused,
    }


def convert_run(
    source: Path,
    folder: Path,
    dtype: str = "bfloat16",
    tokenizer: str | None = None,
    base_config: str | None = None,
    towers: list[str] | None = None,
    max_shard_size: int = 5 * 10**9,
    center_crop_area: float | None = None,
) -> dict:
    """A training run of the original, or a base VLM: one tensor after the other, renamed and converted to `dtype`.

    Args:
        tokenizer: folder or Hub id with the language model's tokenizer.json; None: the config's `hf_llm_id`.
        base_config: config.json of the base VLM, if the run's own does not tell enough.
        towers: safetensors of timm, in the order of the config, if the `.pt` holds none.
        center_crop_area: None: 0.9 if the run was trained with random crops (`image_aug`).

    Raises ValueError unless every tensor has a place and every place a tensor.
    """
    import torch

    from openvla.hub_upload.layout import check_weights, skeleton, write_companions
    from openvla.hub_upload.prismatic import (
        PrismaticWeights,
        TimmTower,
        find_pt,
        image_processor_for,
        read_config,
        tokenizer_for,
    )
    from openvla.hub_upload.weights import write_shards
    from openvla.processing_openvla import OpenVLAProcessor

    # 1. What there is
    pt = find_pt(source)
    run = pt.parent.parent if source.is_file() else source
    config = read_config(Path(base_config) if base_config else run / "config.json")
    config.dtype = getattr(torch, dtype)
    parts = [PrismaticWeights(pt, config.dtype)]
    if parts[0].has_towers == bool(towers):
        raise ValueError(
            f"{pt} holds the vision towers itself: leave --towers out."
            if towers
            else f"{pt} holds no vision towers, as they were frozen in its training: pass timm's weights with "
            f"--towers, one safetensors file for each of {config.timm_model_ids}."
        )
    if towers and len(towers) != len(config.timm_model_ids):
        raise ValueError(f"Expected one of --towers for each of {config.timm_model_ids}, got {len(towers)}.")
    prefixes = ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")
    for file, prefix, tower in zip(towers or [], prefixes, config.vision_towers):
        positions = tower.num_patches + (0 if tower.no_embed_class else tower.num_prefix_tokens)
        parts.append(TimmTower(Path(file), prefix, positions, config.dtype))

    # 2. Whether it is all there
    infos = {name: info for part in parts for name, info in part.infos.items()}
    readers = {name: part.read for part in parts for name in part.infos}
    unused = check_weights(skeleton(config), infos, pt)
    statistics = None
    if (run / "dataset_statistics.json").exists():
        statistics = json.loads((run / "dataset_statistics.json").read_text())
    told = json.loads((run / "config.json").read_text()) if (run / "config.json").exists() else {}
    if "vla" in told and statistics is None:
        raise FileNotFoundError(f"{run / 'dataset_statistics.json'} is missing: without it, actions have no units.")
    image_processor = image_processor_for(config)
    image_processor.center_crop_area = center_crop_area or (0.9 if told.get("image_aug") else None)
    processor = OpenVLAProcessor(
        image_processor,
        tokenizer_for(config, tokenizer or config.hf_llm_id),
        prompt_template=config.prompt_template,
        prompt_end_token_id=config.prompt_end_token_id,
        num_patches=config.num_image_tokens // config.num_cameras,
        num_cameras=config.num_cameras,
        image_token_id=config.image_token_id,
    )

    # 3. Write
    write_shards(folder, infos, lambda name: readers[name](name), max_shard_size)
    write_companions(folder, config, processor, statistics)
    renamed = {old: new for part in parts for new, old in part.renamed.items()}
    dropped = {name: reason for part in parts for name, reason in part.dropped.items()}
    return {"renamed": renamed, "dropped": dropped, "unused": unused, "tensors": len(infos)}


def tell(report: dict, out: Path, statistics: bool, center_crop_area: float | None) -> str:
    """The report in a few lines; the whole of it lies in the folder."""
    lines = [f"{report['tensors']} tensors, {len(report['renamed'])} of them renamed"]
    if report["unused"]:
        lines.append(f"{len(report['unused'])} of them never read by a policy, kept for older tools")
    lines += [f"dropped: {count} {reason}" for reason, count in Counter(report["dropped"].values()).items()]
    lines.append(f"every tensor: {out / REPORT}")
    advice = (
        "" if center_crop_area else "; policies trained with random crops, as all LIBERO ones: --center-crop-area 0.9"
    )
    lines.append(f"centre crop: {center_crop_area or 'none'}{advice}")
    nothing = "no statistics: fine-tune it before it can act"
    lines.append(f"{out} is ready: " + (f"openvla doctor {out}" if statistics else nothing))
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = command_parser("convert", __doc__)
    parser.add_argument("source", metavar="PATH_OR_ID", help="checkpoint of the original: see below")
    parser.add_argument("out", metavar="FOLDER", help="new folder")
    parser.add_argument("--revision", help="branch, tag or commit, if the source is on the Hub")
    parser.add_argument("--tokenizer", metavar="PATH_OR_ID", help="where tokenizer.json of the language model is")
    parser.add_argument("--base-config", metavar="FILE", help="config.json of the run's base VLM")
    parser.add_argument("--towers", nargs="+", metavar="FILE", help="timm's weights, if the .pt holds none")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of the weights of a .pt; default: bfloat16"
    )
    parser.add_argument("--max-shard-size", type=float, metavar="GB", help="of the weights of a .pt; default: 5")
    parser.add_argument("--chunk", type=int, metavar="STEPS", help="in a chunk of a policy of OpenVLA-OFT")
    parser.add_argument("--cameras", type=int, metavar="COUNT", help="of a policy of OpenVLA-OFT")
    parser.add_argument("--center-crop-area", type=float, metavar="SHARE", help="0.9 for policies trained with crops")
    parser.add_argument("--overwrite", action="store_true", help="replace FOLDER if it exists")
    args = parser.parse_args(argv)

    from openvla.hub_upload.layout import fetch, new_folder
    from openvla.hub_upload.prismatic import is_run

    source, out = fetch(args.source, PATTERNS, args.revision), Path(args.out).expanduser()
    told = {"action_chunk": args.chunk, "num_cameras": args.cameras}
    told = {name: value for name, value in told.items() if value is not None}
    with new_folder(out, args.overwrite, (source,)) as folder:
        if is_run(source):
            if told:
                raise ValueError(f"{source} is no policy of OpenVLA-OFT: --chunk and --cameras are for those.")
            size = int((args.max_shard_size or 5) * 10**9)
            options = (args.dtype or "bfloat16", args.tokenizer, args.base_config, args.towers, size)
            report = convert_run(source, folder, *options, args.center_crop_area)
        elif any((args.tokenizer, args.base_config, args.towers, args.dtype, args.max_shard_size)):
            raise ValueError(
                f"{source} is in HF layout already, and its weights stay as they are: --tokenizer, --base-config, "
                "--towers, --dtype and --max-shard-size are for .pt files."
            )
        else:
            report = convert_folder(source, folder, args.center_crop_area, told)
        report = {"source": args.source, **report}
        (folder / REPORT).write_text(json.dumps(report, indent=2))
        statistics = (folder / "dataset_statistics.json").exists()
        crop = json.loads((folder / "preprocessor_config.json").read_text()).get("center_crop_area")
    print(tell(report, out, statistics, crop))
