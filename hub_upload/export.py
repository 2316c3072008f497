"""Makes one folder like a Hub repository of a checkpoint or an adapter, and proves that it acts without this package.

openvla export runs/cup exported/cup --image frame.png --instruction "pick up the cup" --repo-id lab/openvla-cup
openvla export runs/cup/adapter exported/cup --base openvla/openvla-7b --data my_robot --evaluation results.json
openvla export runs/oft exported/oft --image front.png wrist.png --proprio 0.1 0.2 0.3 0 0 0 0.04 -0.04 \
    --instruction "pick up the cup"
openvla export converted/openvla-7b exported/openvla-7b --max-shard-size 2

The folder holds the weights in the original's layout, an adapter merged into them, the code that `trust_remote_code`
runs, processor and tokenizer, statistics, handler.py for Inference Endpoints, and a model card. Weights pass one
tensor at a time. Then a fresh process loads the folder with transformers alone, and acts; only if it acts as the
source does, the folder gets its name, and `openvla upload` accepts it. Pictures go onto the card only if named.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from openvla.cli import command_parser

PATTERNS = ["*.json", "*.safetensors", "tokenizer.model"]
# For Inference Endpoints, whose toolkit (huggingface-inference-toolkit 0.5.6) cannot be imported with transformers 5.
REQUIREMENTS = "transformers>=4.57.6,<5\naccelerate>=1.1\nsafetensors\nnumpy\npillow\n"


@dataclass
class Source:
    """Where a policy's parts are.

    Args:
        weights: folder with config.json and safetensors.
        adapter: folder of a LoRA adapter for them, or None.
        processor: folder whose processor the policy uses.
        run: folder of the fine-tuning run it came from, or None.
        base_model: what it was made from, as adapter or run name it; None: unknown.
        statistics: file with the statistics to publish, if the user names one.
    """

    weights: Path
    adapter: Path | None
    processor: Path
    run: Path | None
    base_model: str | None
    statistics: Path | None = None

    @property
    def config(self) -> Path:
        """What describes the policy: the adapter's own file, for it may bring a head, or the folder of the weights."""
        from openvla.pretrained_openvla import ADAPTER_CONFIG

        own = self.adapter and self.adapter / ADAPTER_CONFIG
        return own if own and own.exists() else self.weights

    def __str__(self) -> str:
        return f"{self.adapter}, merged into {self.weights}" if self.adapter else str(self.weights)


def find_source(place: str, base: str | None = None, revision: str | None = None) -> Source:
    """Resolves a run of `openvla finetune`, a checkpoint, or an adapter, here or on the Hub.

    Args:
        base: of an adapter, if not the one its adapter_config.json names.
    """
    from openvla.hub_upload.layout import fetch

    folder = fetch(place, PATTERNS, revision)
    run = next((each for each in (folder, folder.parent) if (each / "run.json").exists()), None)
    if folder == run:
        found = [folder / name for name in ("merged", "adapter") if (folder / name).is_dir()]
        if not found:
            raise FileNotFoundError(f"{folder} holds neither `merged` nor `adapter`: has that run ended?")
        folder = found[0]
    facts = json.loads((run / "run.json").read_text()) if run else {}
    if not (folder / "adapter_config.json").exists():
        if base:
            raise ValueError(f"{folder} is no adapter: leave --base out.")
        return Source(folder, None, folder, run, facts.get("model"))
    told = json.loads((folder / "adapter_config.json").read_text())
    named = base or told.get("base_model_name_or_path")
    try:
        weights = fetch(str(named), PATTERNS, None if base else told.get("revision"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The adapter's base is not there: {error} Pass --base.") from error
    own = (folder / "preprocessor_config.json").exists()
    return Source(weights, folder, folder if own else weights, run, named)


def statistics_of(source: Source, config) -> dict:
    """What the policy's actions mean. An adapter's own, or its run's: those of its base are another robot's."""
    from openvla.hub_upload.layout import read_statistics

    if source.statistics is not None:
        return json.loads(source.statistics.read_text(encoding="utf-8"))
    if source.adapter is None:
        found = read_statistics(source.weights, config)
    elif (source.adapter / "dataset_statistics.json").exists():
        found = json.loads((source.adapter / "dataset_statistics.json").read_text(encoding="utf-8"))
    else:
        found = json.loads((source.run / "run.json").read_text()).get("norm_stats") if source.run else None
    if not found:
        raise ValueError(
            f"{source.adapter or source.weights} brings no action statistics: pass the dataset_statistics.json of its "
            "training with --statistics, or fine-tune it before you publish it."
        )
    return found


def write_policy(
    source: Source,
    folder: Path,
    statistics: dict,
    dtype: str | None = None,
    max_shard_size: int = 5 * 10**9,
    center_crop_area: float | None = None,
) -> dict:
    """Weights, code and everything a policy acts with. Returns {"dtype", "same_weights", "new_parts",
    "center_crop_area"}, where "new_parts" says whether the adapter brings parts that its base does not have.

    What no policy ever reads is written as well, as the source has it or as zeros: other implementations insist.

    Args:
        dtype: of the written weights; None: as they are, or for heads and projectors beside them, which training may
            keep in float32, as the rest. An adapter is merged in this precision.
        center_crop_area: for policies trained with random crops whose processor does not say so.
    """
    import torch

    from openvla.configuration_openvla import OpenVLAConfig
    from openvla.finetune.policy import is_new
    from openvla.hub_upload.layout import (
        check_weights,
        copy_extras,
        never_read,
        released_names,
        skeleton,
        write_companions,
    )
    from openvla.hub_upload.weights import SafetensorsFolder, TensorInfo, write_shards
    from openvla.pretrained_openvla import module_name
    from openvla.processing_openvla import OpenVLAProcessor

    # 1. What there is
    config = OpenVLAConfig.from_pretrained(source.config)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{source.weights} is quantised: export the checkpoint it was made from.")
    weights, model = SafetensorsFolder(source.weights), skeleton(config)
    released = {new: old for old, new in released_names(model, weights.infos).items()}
    found = {new: weights.infos[old] for new, old in released.items()}
    adapter = None
    if source.adapter is not None:
        from openvla.hub_upload.merge import Adapter

        adapter = Adapter(source.adapter, model)
        whole = released_names(model, adapter.replaced)
        found |= {new: adapter.source.infos[adapter.replaced[old]] for old, new in whole.items() if new not in found}
    unused = check_weights(model, found, source)
    read_dtypes = {name: info.dtype for name, info in found.items() if name not in unused}
    dtypes = {each for name, each in read_dtypes.items() if not is_new(name) and name in released}
    if dtype is None and len(dtypes) != 1:
        raise ValueError(f"{source.weights} mixes {sorted(map(str, dtypes))}: choose one with --dtype.")
    config.dtype = getattr(torch, dtype) if dtype else dtypes.copy().pop()
    shapes = {name: info.shape for name, info in found.items()}
    shapes |= {name: shape for name, shape in never_read(config, shapes).items() if name not in found}
    infos = {name: TensorInfo(config.dtype, shape) for name, shape in shapes.items()}

    # 2. One tensor after the other
    def read(name: str) -> torch.Tensor:
        if name not in found:  # vLLM demands them, too; any number will do
            return torch.zeros(shapes[name])
        if name in released:
            tensor = weights.read(released[name]).to(config.dtype)
        else:  # whatever was there, the adapter replaces it
            tensor = torch.zeros(shapes[name], dtype=config.dtype)
        return tensor if adapter is None else adapter.merge(module_name(name), tensor)

    write_shards(folder, infos, read, max_shard_size)

    # 3. The rest
    processor = OpenVLAProcessor.from_pretrained(source.processor)
    processor.num_cameras = config.num_cameras
    processor.num_state_tokens = config.num_placeholders - config.num_image_tokens
    if center_crop_area is not None:
        processor.image_processor.center_crop_area = center_crop_area
    write_companions(folder, config, processor, statistics)
    copy_extras(source.weights, folder)
    shutil.copyfile(Path(__file__).parent.parent / "serve" / "handler.py", folder / "handler.py")
    (folder / "requirements.txt").write_text(REQUIREMENTS)
    merged = 0 if adapter is None else len(adapter.layers) + len(adapter.replaced)
    return {
        "dtype": str(config.dtype).removeprefix("torch."),
        "same_weights": not merged and set(read_dtypes.values()) == {config.dtype},
        "new_parts": not set(found) <= set(released),
        "center_crop_area": processor.image_processor.center_crop_area,
    }


def scenes(config, statistics: dict, count: int) -> list:
    """Made-up observations, to try a policy on when nobody names a real one. States lie within the statistics."""
    import numpy as np

    from openvla.action_tokenizer import ActionStats
    from openvla.evaluate.doctor import INSTRUCTIONS
    from openvla.hub_upload.proof import Observation

    sizes = {key: len(next(iter(entry.get("proprio", {}).values()), ())) for key, entry in statistics.items()}
    fitting = [key for key in sorted(statistics) if config.proprio_dim in (0, sizes[key])]
    if not fitting:
        raise ValueError(f"The policy takes {config.proprio_dim} numbers of state, its statistics have {sizes}.")
    made, unnorm_key, state = [], fitting[0], None
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 256, (config.num_cameras, 8, 8, 3), dtype=np.uint8)
        images = [image.repeat(32, axis=0).repeat(32, axis=1) for image in coarse]
        if config.proprio_dim:
            stats = ActionStats.from_norm_stats(statistics, unnorm_key, config.action_normalization, "proprio")
            state = rng.uniform(stats.low, stats.high)
        made.append(Observation(images, INSTRUCTIONS[number % len(INSTRUCTIONS)], unnorm_key, state))
    return made


def steps_of(
    place: str,
    name: str | None,
    unnorm_key: str | None,
    num_cameras: int,
    cameras: list[str] | None = None,
    with_state: bool = False,
    count: int = 2,
) -> list:
    """A step of each of a dataset's first episodes, a third of the way in, where most arms are under way.

    Args:
        with_state: with the robot's state, for policies that take it.
        cameras: those the policy was trained on, in its order; None: the dataset's first ones.
    """
    from openvla.finetune.readers import open_reader
    from openvla.hub_upload.proof import Observation

    reader = open_reader(place, name)
    chosen = []
    for index in range(min(count, len(reader))):
        episode = reader.read(index)
        time = len(episode) // 3
        images = [episode.image(camera, time) for camera in cameras or reader.cameras[:num_cameras]]
        if with_state and episode.proprio is None:
            raise ValueError(f"{episode.source} has no proprio, which the policy takes.")
        state = episode.proprio[time] if with_state else None
        chosen.append(Observation(images, episode.instructions[time], unnorm_key or reader.name, state))
    return chosen


def side_by_side(images: list):
    """What all cameras see as one `PIL.Image`, as high as the first."""
    from PIL import Image

    pictures = [Image.fromarray(image) for image in images]
    height = pictures[0].height
    pictures = [picture.resize((round(picture.width * height / picture.height), height)) for picture in pictures]
    whole = Image.new("RGB", (sum(picture.width for picture in pictures), height))
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width
    return whole


def export(
    source: Source,
    out: Path,
    examples: list,
    facts,
    dtype: str | None = None,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    proof: bool = True,
    center_crop_area: float | None = None,
) -> dict:
    """Writes and proves the folder `out`. It gets its name only when all is well.

    Args:
        examples: `proof.Observation`s for the card.
        facts: `model_card.CardFacts`.
        proof: False leaves out what needs the whole policy in memory, and `openvla upload` will refuse the folder.

    Returns the record of the proof (empty without one).
    """
    import torch
    import transformers

    from openvla.action_tokenizer import resolve_unnorm_key
    from openvla.configuration_openvla import OpenVLAConfig
    from openvla.hub_upload.layout import new_folder, read_oft
    from openvla.hub_upload.model_card import Example, validate_card, write_card
    from openvla.hub_upload.proof import prove, write_proof

    # 1. What can be refused is refused before anything is written
    if read_oft(source.weights) is not None:
        raise ValueError(
            f"{source.weights} holds a policy as OpenVLA-OFT's training leaves it: make one folder of its parts with "
            "`openvla convert` first."
        )
    config = OpenVLAConfig.from_pretrained(source.config)
    statistics = statistics_of(source, config)
    for example in examples:
        example.unnorm_key = resolve_unnorm_key(statistics, example.unnorm_key)
        if len(example.images) != config.num_cameras:
            raise ValueError(f"The policy takes {config.num_cameras} image(s), the example has {len(example.images)}.")
        if (given := 0 if example.proprio is None else len(example.proprio)) != config.proprio_dim:
            raise ValueError(
                f"The policy takes {config.proprio_dim or 'no'} numbers of the robot's state, the example has "
                f"{given or 'none'}: see --proprio."
            )

    # 2. Write, try, describe
    sources = {source.weights, source.processor, source.adapter or source.weights}
    with new_folder(out, overwrite, tuple(sources)) as folder:
        written = write_policy(source, folder, statistics, dtype, max_shard_size, center_crop_area)
        record, actions = {}, []
        if proof:
            made = scenes(config, statistics, 1 if examples else 2)
            told = {
                "folder": str(source.weights.absolute()),
                "config": str(source.config.absolute()),
                "new_parts": written["new_parts"],
                "adapter": source.adapter and str(source.adapter.absolute()),
                "processor": str(source.processor.absolute()),
                "norm_stats": statistics,
                "dtype": written["dtype"],
                "center_crop_area": center_crop_area,
            }
            record, actions = prove(folder.absolute(), told, examples + made, written["same_weights"])
            record |= {"torch": torch.__version__, "transformers": transformers.__version__}
        shown = [
            Example(side_by_side(each.images), each.instruction, each.unnorm_key, action, each.proprio)
            for each, action in zip(examples, actions)
        ]
        write_card(folder, facts, shown)
        validate_card(folder / "README.md")
        if proof:
            write_proof(folder, record)
    crop = written["center_crop_area"]
    print(f"exported {source}: {written['dtype']}, statistics of {', '.join(sorted(statistics))}")
    advice = "" if crop else "; policies trained with random crops, as all LIBERO ones: --center-crop-area 0.9"
    print(f"centre crop: {crop or 'none'}{advice}")
    return record


def main(argv: list[str]) -> None:
    parser = command_parser("export", __doc__)
    parser.add_argument("source", metavar="PATH_OR_ID", help="a run of openvla finetune, a checkpoint, or an adapter")
    parser.add_argument("out", metavar="FOLDER", help="new folder")
    parser.add_argument("--base", metavar="PATH_OR_ID", help="of an adapter, if not the one it names")
    parser.add_argument("--revision", help="branch, tag or commit, if the source is on the Hub")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: as the weights are")
    parser.add_argument("--max-shard-size", type=float, default=5.0, metavar="GB", help="of the files of weights")
    parser.add_argument(
        "--statistics", type=Path, metavar="FILE", help="dataset_statistics.json, if the source has none"
    )
    parser.add_argument("--center-crop-area", type=float, metavar="SHARE", help="0.9 for policies trained with crops")
    parser.add_argument("--overwrite", action="store_true", help="replace FOLDER if it exists")
    parser.add_argument("--no-proof", action="store_true", help="do not try the policy; it cannot be uploaded then")
    card = parser.add_argument_group("what the model card shows")
    card.add_argument("--image", nargs="+", metavar="FILE", help="an example, one file per camera: will be public")
    card.add_argument("--instruction", help="what the robot is told in the example")
    card.add_argument(
        "--proprio", type=float, nargs="+", metavar="NUMBER", help="the robot's state in the example, if it is taken"
    )
    card.add_argument("--unnorm-key", metavar="KEY", help="the example's dataset; may be left out if there is one")
    card.add_argument("--data", metavar="DATASET", help="take two examples from this dataset instead: will be public")
    card.add_argument("--name", help="the dataset's name, if not its folder's")
    card.add_argument("--repo-id", metavar="NAME/MODEL", help="where it will be published")
    card.add_argument("--base-model", metavar="NAME/MODEL", help="Hub id of what was fine-tuned")
    card.add_argument("--datasets", nargs="+", metavar="NAME/DATASET", help="Hub ids of what it was trained on")
    card.add_argument("--license", metavar="ID", help="of the weights, such as llama2; default: the language model's")
    card.add_argument(
        "--evaluation",
        nargs="+",
        default=[],
        metavar="FILE",
        help="results, as `openvla.hub_upload.model_card` describes them",
    )
    args = parser.parse_args(argv)
    if bool(args.image) != bool(args.instruction):
        parser.error("--image and --instruction belong together")
    if args.image and args.data:
        parser.error("examples come from --image or from --data, not from both")
    if args.proprio and not args.image:
        parser.error("--proprio belongs to --image; --data brings its own")

    import numpy as np

    from openvla.configuration_openvla import OpenVLAConfig
    from openvla.hub_upload.model_card import CardFacts, read_evaluation, read_run
    from openvla.hub_upload.proof import Observation
    from openvla.processing_openvla import to_pil

    source, out = find_source(args.source, args.base, args.revision), Path(args.out).expanduser()
    source.statistics = args.statistics
    training, history = read_run(source.run) if source.run else ({}, [])
    config = OpenVLAConfig.from_pretrained(source.config)
    examples = []
    if args.image:
        images = [np.asarray(to_pil(image)) for image in args.image]
        examples = [Observation(images, args.instruction, args.unnorm_key, args.proprio)]
    elif args.data:
        options = (config.num_cameras, training.get("cameras"), bool(config.proprio_dim))
        examples = steps_of(args.data, args.name, args.unnorm_key, *options)
    facts = CardFacts(
        repo_id=args.repo_id,
        base_model=args.base_model,
        base_found=source.base_model,
        source_name=(source.adapter or source.weights).name if source.run else None,
        datasets=args.datasets or [],
        license=args.license,
        evaluation=[result for file in args.evaluation for result in read_evaluation(file)],
        training=training,
        history=history,
    )
    size = int(args.max_shard_size * 10**9)
    facts.check()
    options = (args.dtype, size, args.overwrite, not args.no_proof, args.center_crop_area)
    record = export(source, out, examples, facts, *options)
    if not examples:
        print("The card shows no example: --image and --instruction, or --data, would put one on it.")
    if record:
        same = f"actions within {record['action_difference']:.2g}, and in one pass its head"
        if "tokens_equal" in record:
            same = f"{record['tokens_equal']} tokens equal, logits"
        worst = record.get("logits_difference", record.get("head_difference"))
        print(
            f"A fresh process without this package acted on {record['observations']} observations as the source does: "
            f"{same} within {worst:.2g} of {'their' if 'tokens_equal' in record else 'its'} range."
        )
        print(f"{out} is ready: openvla upload {args.repo_id or 'NAME/MODEL'} {out}")
    else:
        print(f"{out} is written but not proven: openvla upload will refuse it.")
