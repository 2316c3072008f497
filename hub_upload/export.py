"""Makes one folder like a Hub repository of a checkpoint or an adapter, and proves that it acts without this package.

openvla export runs/cup exported/cup --image frame.png --instruction "pick up the cup" --repo-id lab/openvla-cup
openvla export runs/cup/adapter exported/cup --base openvla/openvla-7b --data my_robot --evaluation results.json
openvla export converted/openvla-7b exported/openvla-7b --max-shard-size 2

The folder holds the weights in the original's layout, an adapter merged into them, the code that `trust_remote_code`
runs, processor and tokenizer, statistics, handler.py for Inference Endpoints, and a model card. Weights pass one
tensor at a time. Then a fresh process loads the folder with transformers alone, and acts; only if it acts as the
source does, the folder gets its name, and `openvla upload` accepts it. Pictures go onto the card only if named.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from openvla.cli import command_parser

logger = logging.getLogger(__name__)

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
    """

    weights: Path
    adapter: Path | None
    processor: Path
    run: Path | None
    base_model: str | None


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
    named = base or json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    try:
        weights = fetch(named, PATTERNS)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The adapter's base is not there: {error} Pass --base.") from error
    own = (folder / "preprocessor_config.json").exists()
    return Source(weights, folder, folder if own else weights, run, named)


def write_policy(source: Source, folder: Path, dtype: str | None = None, max_shard_size: int = 5 * 10**9) -> dict:
    """Weights, code and everything a policy acts with. Returns {"dtype", "same_weights", "norm_stats"}.

    What no policy ever reads is written as well, as the source has it or as zeros: other implementations insist.

    Args:
        dtype: of the written weights; None: as they are. An adapter is merged in this precision.
    """
    import torch

    from openvla.configuration_openvla import OpenVLAConfig
    from openvla.hub_upload.layout import (
        check_weights,
        copy_extras,
        module_name,
        never_read,
        read_statistics,
        released_names,
        skeleton,
        write_companions,
    )
    from openvla.hub_upload.weights import SafetensorsFolder, TensorInfo, write_shards
    from openvla.processing_openvla import OpenVLAProcessor

    # 1. What there is
    config = OpenVLAConfig.from_pretrained(source.weights)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{source.weights} is quantised: export the checkpoint it was made from.")
    own = source.adapter is not None and (source.adapter / "dataset_statistics.json").exists()
    statistics = read_statistics(source.adapter if own else source.weights, config)
    if source.adapter is not None and not own:
        logger.warning(
            "%s brings no dataset_statistics.json: exporting those of its base, for %s.",
            source.adapter,
            sorted(statistics or {}),
        )
    if not statistics:
        raise ValueError(f"{source.weights} has no action statistics: fine-tune it before you publish it.")
    weights, model = SafetensorsFolder(source.weights), skeleton(config)
    released = {new: old for old, new in released_names(model, weights.infos).items()}
    found = {new: weights.infos[old] for new, old in released.items()}
    unused = check_weights(model, found, source.weights)
    dtypes = {info.dtype for name, info in found.items() if name not in unused}
    if dtype is None and len(dtypes) != 1:
        raise ValueError(f"{source.weights} mixes {sorted(map(str, dtypes))}: choose one with --dtype.")
    config.dtype = getattr(torch, dtype) if dtype else dtypes.copy().pop()
    shapes = {name: info.shape for name, info in found.items()}
    shapes |= {name: shape for name, shape in never_read(config, shapes).items() if name not in found}
    infos = {name: TensorInfo(config.dtype, shape) for name, shape in shapes.items()}
    adapter = None
    if source.adapter is not None:
        from openvla.hub_upload.merge import Adapter

        adapter = Adapter(source.adapter, model)

    # 2. One tensor after the other
    def read(name: str) -> torch.Tensor:
        if name not in found:  # vLLM demands them, too; any number will do
            return torch.zeros(shapes[name])
        tensor = weights.read(released[name]).to(config.dtype)
        return tensor if adapter is None else adapter.merge(module_name(name), tensor)

    write_shards(folder, infos, read, max_shard_size)

    # 3. The rest
    write_companions(folder, config, OpenVLAProcessor.from_pretrained(source.processor), statistics)
    copy_extras(source.weights, folder)
    shutil.copyfile(Path(__file__).parent.parent / "serve" / "handler.py", folder / "handler.py")
    (folder / "requirements.txt").write_text(REQUIREMENTS)
    merged = 0 if adapter is None else len(adapter.layers) + len(adapter.replaced)
    return {
        "dtype": str(config.dtype).removeprefix("torch."),
        "same_weights": not merged and dtypes == {config.dtype},
        "norm_stats": statistics,
    }


def scenes(unnorm_key: str, num_cameras: int, count: int) -> list:
    """Made-up observations, to try a policy on when nobody names a real one."""
    import numpy as np

    from openvla.evaluate.doctor import INSTRUCTIONS
    from openvla.hub_upload.proof import Observation

    made = []
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 256, (num_cameras, 8, 8, 3), dtype=np.uint8)
        images = [image.repeat(32, axis=0).repeat(32, axis=1) for image in coarse]
        made.append(Observation(images, INSTRUCTIONS[number % len(INSTRUCTIONS)], unnorm_key))
    return made


def steps_of(place: str, name: str | None, unnorm_key: str | None, num_cameras: int, count: int = 2) -> list:
    """A step of each of a dataset's first episodes, a third of the way in, where most arms are under way."""
    from openvla.finetune.readers import open_reader
    from openvla.hub_upload.proof import Observation

    reader = open_reader(place, name)
    chosen = []
    for index in range(min(count, len(reader))):
        episode = reader.read(index)
        time = len(episode) // 3
        images = [episode.image(camera, time) for camera in reader.cameras[:num_cameras]]
        chosen.append(Observation(images, episode.instructions[time], unnorm_key or reader.name))
    return chosen


def export(
    source: Source,
    out: Path,
    examples: list,
    facts,
    dtype: str | None = None,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    proof: bool = True,
) -> dict:
    """Writes and proves the folder `out`. It gets its name only when all is well.

    Args:
        examples: `proof.Observation`s for the card.
        facts: `model_card.CardFacts`.
        proof: False leaves out what needs the whole policy in memory, and `openvla upload` will refuse the folder.

    Returns the record of the proof (empty without one).
    """
    import numpy as np
    from PIL import Image

    from openvla.action_tokenizer import resolve_unnorm_key
    from openvla.hub_upload.layout import new_folder
    from openvla.hub_upload.model_card import Example, validate_card, write_card
    from openvla.hub_upload.proof import prove, write_proof

    with new_folder(out, overwrite) as folder:
        written = write_policy(source, folder, dtype, max_shard_size)
        statistics = written["norm_stats"]
        for example in examples:
            example.unnorm_key = resolve_unnorm_key(statistics, example.unnorm_key)
        record, actions = {}, []
        if proof:
            cameras = json.loads((folder / "config.json").read_text()).get("num_cameras", 1)
            made = scenes(sorted(statistics)[0], cameras, 1 if examples else 2)
            told = {
                "folder": str(source.weights.absolute()),
                "adapter": source.adapter and str(source.adapter.absolute()),
                "processor": str(source.processor.absolute()),
                "norm_stats": statistics,
                "dtype": written["dtype"],
            }
            record, actions = prove(folder.absolute(), told, examples + made, written["same_weights"])
        shown = [
            Example(
                Image.fromarray(np.concatenate(example.images, axis=1)),
                example.instruction,
                example.unnorm_key,
                action,
            )
            for example, action in zip(examples, actions)
        ]
        write_card(folder, facts, shown)
        validate_card(folder / "README.md")
        if proof:
            write_proof(folder, record)
    return record


def main(argv: list[str]) -> None:
    parser = command_parser("export", __doc__)
    parser.add_argument("source", metavar="PATH_OR_ID", help="a run of openvla finetune, a checkpoint, or an adapter")
    parser.add_argument("out", metavar="FOLDER", help="new folder")
    parser.add_argument("--base", metavar="PATH_OR_ID", help="of an adapter, if not the one it names")
    parser.add_argument("--revision", help="branch, tag or commit, if the source is on the Hub")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: as the weights are")
    parser.add_argument("--max-shard-size", type=float, default=5.0, metavar="GB")
    parser.add_argument("--overwrite", action="store_true", help="replace FOLDER if it exists")
    parser.add_argument("--no-proof", action="store_true", help="do not try the policy; it cannot be uploaded then")
    card = parser.add_argument_group("what the model card shows")
    card.add_argument("--image", nargs="+", metavar="FILE", help="an example, one file per camera: will be public")
    card.add_argument("--instruction", help="what the robot is told in the example")
    card.add_argument("--unnorm-key", metavar="KEY", help="the example's dataset; may be left out if there is one")
    card.add_argument("--data", metavar="DATASET", help="take two examples from this dataset instead: will be public")
    card.add_argument("--name", help="the dataset's name, if not its folder's")
    card.add_argument("--repo-id", metavar="NAME/MODEL", help="where it will be published")
    card.add_argument("--base-model", metavar="NAME/MODEL", help="Hub id of what was fine-tuned")
    card.add_argument("--datasets", nargs="+", metavar="NAME/DATASET", help="Hub ids of what it was trained on")
    card.add_argument("--license", metavar="ID", help="of the weights, such as llama2; default: the language model's")
    card.add_argument(
        "--evaluation", metavar="FILE", help="results, as `openvla.hub_upload.model_card` describes them"
    )
    args = parser.parse_args(argv)
    if bool(args.image) != bool(args.instruction):
        parser.error("--image and --instruction belong together")
    if args.image and args.data:
        parser.error("examples come from --image or from --data, not from both")

    import numpy as np

    from openvla.configuration_openvla import OpenVLAConfig
    from openvla.hub_upload.model_card import CardFacts, read_evaluation, read_run
    from openvla.hub_upload.proof import Observation
    from openvla.processing_openvla import to_pil

    source, out = find_source(args.source, args.base, args.revision), Path(args.out).expanduser()
    cameras = OpenVLAConfig.from_pretrained(source.weights).num_cameras
    examples = []
    if args.image:
        images = [np.asarray(to_pil(image)) for image in args.image]
        examples = [Observation(images, args.instruction, args.unnorm_key)]
    elif args.data:
        examples = steps_of(args.data, args.name, args.unnorm_key, cameras)
    training, history = read_run(source.run) if source.run else ({}, [])
    facts = CardFacts(
        repo_id=args.repo_id,
        base_model=args.base_model or source.base_model,
        datasets=args.datasets or [],
        license=args.license,
        evaluation=read_evaluation(args.evaluation) if args.evaluation else [],
        training=training,
        history=history,
    )
    size = int(args.max_shard_size * 10**9)
    record = export(source, out, examples, facts, args.dtype, size, args.overwrite, not args.no_proof)
    if not examples:
        print("The card shows no example: --image and --instruction, or --data, would put one on it.")
    if record:
        print(
            f"A fresh process without this package acted on {record['observations']} observations as the source does: "
            f"{record['tokens_equal']} tokens equal, logits within {record['logits_difference']:.2g} of their range."
        )
        print(f"{out} is ready: openvla upload {args.repo_id or 'NAME/MODEL'} {out}")
    else:
        print(f"{out} is written but not proven: openvla upload will refuse it.")
