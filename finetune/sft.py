"""Fine-tunes a policy on demonstrations: LeRobot, RLDS, HDF5 or a plain folder in, a Hub checkpoint out.

openvla finetune --model openvla/openvla-7b --data my_robot --output_dir runs/cup --max_steps 5000
openvla finetune --model openvla/openvla-7b --data my_robot --output_dir runs/cup --mode qlora --max_steps 5000
openvla finetune --model openvla/openvla-7b --data lab/pick_cup lab/pour --weights 1 0.5 --output_dir runs/both
openvla finetune --model openvla/openvla-7b --data my_robot --output_dir runs/oft --head l1 --chunk 8 \
    --cameras front wrist --proprio true --max_steps 50000 --decay_steps 25000
openvla finetune --model openvla/openvla-7b --data my_robot my_robot_again --name my_robot --output_dir runs/more
openvla finetune --model openvla/openvla-7b --data left=monday left=tuesday right=sunday --output_dir runs/arms
openvla finetune --model openvla/openvla-7b --data datasets --mixture bridge_rt_1 --mode full --output_dir runs/oxe
openvla finetune --config recipe.yaml --learning_rate 1e-4
openvla finetune --config recipe.yaml --resume true
accelerate launch --num_processes 8 -m openvla.cli finetune --config recipe.yaml

Options of TRL's SFTConfig are accepted. A run folder holds `checkpoint-N` (to resume from), `best` (lowest L1 on
held-out episodes so far; an adapter in LoRA modes), `merged` (after the last step: a folder like a Hub repository,
ready to act), `metrics.jsonl`, `curves.png`, and `run.json` (what a resumed run must share).
"""

import functools
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from openvla.finetune.policy import FILM, NEW_PARTS, is_new

MODES = ("lora", "qlora", "full", "frozen-vision", "last-layer", "sandwich")


@dataclass
class FinetuneArguments:
    """What to train on what. `mode`: lora, qlora, full, frozen-vision (all but the towers), last-layer (embeddings,
    last decoder layer, head), sandwich (towers, projector, and last-layer)."""

    model: str = field(metadata={"help": "folder or Hub id of the policy to start from"})
    data: list[str] = field(
        metadata={
            "help": "folders, HDF5 files, or Hub ids of LeRobot datasets; NAME=FOLDER names one, and joins those of "
            "one name"
        }
    )
    name: str | None = field(
        default=None,
        metadata={
            "help": "unnorm_key of the new policy; default: the dataset's; of several datasets: joined, as one robot's"
        },
    )
    weights: list[float] | None = field(
        default=None, metadata={"help": "of several datasets, which contribute in proportion to weight x steps"}
    )
    mixture: str | None = field(
        default=None, metadata={"help": "of Open X-Embodiment (bridge_rt_1, …): data is the folder of its datasets"}
    )
    mask: list[int] | None = field(
        default=None,
        metadata={"help": "per action dim: 1 = normalise, 0 = leave; default: all but a gripper in [0, 1]"},
    )
    mode: str = field(default="lora", metadata={"help": ", ".join(MODES)})
    head: str | None = field(
        default=None,
        metadata={"help": "token, l1, diffusion, flow: decode in parallel (OpenVLA-OFT); default: as it is"},
    )
    attention: str | None = field(
        default=None, metadata={"help": "bidirectional or prefix; default: prefix for flow, else bidirectional"}
    )
    chunk: int | None = field(default=None, metadata={"help": "steps predicted at once, with --head"})
    pad_chunks: bool = field(
        default=False, metadata={"help": "train on the last steps of episodes, too, scoring chunks up to the end"}
    )
    cameras: list[str] | None = field(
        default=None, metadata={"help": "which, in order: the policy takes as many; default: the first ones"}
    )
    proprio: bool | None = field(default=None, metadata={"help": "the robot's state is an input; default: as it is"})
    film: bool | None = field(
        default=None, metadata={"help": "towers conditioned on the instruction (OFT+), with --head; default: as it is"}
    )
    lora_rank: int = 32
    lora_alpha: int | None = field(default=None, metadata={"help": "default: min(rank, 16), as the original"})
    lora_dropout: float = 0.0
    lora_vision: bool = field(default=True, metadata={"help": "adapters in the vision towers, too"})
    lora_head: bool = field(default=False, metadata={"help": "also train lm_head, whole: helps small policies"})
    augment: bool = field(default=True, metadata={"help": "random crops and colours; recorded in the checkpoint"})
    cache_images: bool = field(
        default=False,
        metadata={"help": "decode and resize all pictures once, into a file in output_dir; with --augment false"},
    )
    decay_steps: list[int] | None = field(
        default=None, metadata={"help": "steps at which the learning rate is divided by ten"}
    )
    ema: float | None = field(
        default=None, metadata={"help": "decay (0.999, say) of an average of the weights, which is what gets saved"}
    )
    shuffle_episodes: int = field(
        default=0, metadata={"help": "shuffle within windows of so many episodes, for slow disks; 0: everything"}
    )
    validation_share: float = field(default=0.05, metadata={"help": "of the episodes, held out; 0: none"})
    validation_steps: int = field(default=200, metadata={"help": "at most so many steps per dataset and evaluation"})
    skip_bad_episodes: bool = field(default=False, metadata={"help": "leave them out and say which"})
    resume: bool = field(default=False, metadata={"help": "continue from the last checkpoint of output_dir, if any"})
    action_names: list[str] | None = field(
        default=None, metadata={"help": "of the action's dims, for the checkpoint: x y z roll pitch yaw gripper"}
    )
    action_units: list[str] | None = field(
        default=None, metadata={"help": "of the action's dims: m m m rad rad rad '1 = open'; needs --action_names"}
    )


# Where TRL's own defaults do not suit: the original's for LoRA (5e-4, constant; 2e-5 for the other modes)
DEFAULTS = {"learning_rate": None, "lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": 500}


def split_episodes(lengths: list[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Training and held-out episodes, by a seeded shuffle of the good ones; at least one each unless `share` is 0."""
    import numpy as np

    if not 0 <= share < 1:
        raise ValueError(f"Expected a validation share from 0 to below 1 (0.05 for 5 %), got {share}.")
    good = [index for index, length in enumerate(lengths) if length]
    if not share:
        return good, []
    if len(good) < 2:
        raise ValueError(f"Cannot hold out a share of {share} of {len(good)} episode: pass --validation_share 0.")
    order = np.random.default_rng(seed).permutation(good).tolist()
    count = min(max(round(share * len(good)), 1), len(good) - 1)
    return sorted(order[count:]), sorted(order[:count])


def choose_trainable(model, mode: str) -> None:
    """Freezes what a mode of partial fine-tuning does not train (`requires_grad`), as the original's stages do."""
    if mode not in ("full", "frozen-vision", "last-layer", "sandwich"):
        raise ValueError(f"Unknown mode {mode!r}; expected one of {MODES}.")
    language_model = model.model.language_model
    # a policy with another head never asks lm_head, and what gets no gradient must not wait for one
    head = [model.lm_head] if model.action_head is None else []
    last = [language_model.get_input_embeddings(), language_model.layers[-1], *head]
    trained = {
        "full": [model.model, *head],
        "frozen-vision": [model.model.projector, language_model, *head],
        "last-layer": last,
        "sandwich": [model.model.vision_backbone, model.model.projector, *last],
    }[mode]
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if is_new(name):
            parameter.requires_grad_(True)


def lora_config(rank: int, alpha: int | None, dropout: float, vision: bool, head: bool = False, config=None):
    """LoRA on every linear layer but the head, as the original but for modules that never run. Continuous heads,
    projectors of other inputs and FiLM, which `config` tells of, are trained whole."""
    from peft import LoraConfig

    whole = ["lm_head"] if head else []
    if config is not None:
        whole += ["action_head"] if config.action_head != "token" else []
        whole += ["noisy_action_projector"] if config.action_head in ("diffusion", "flow") else []
        whole += ["proprio_projector"] if config.proprio_dim else []
        whole += list(FILM) if config.film else []
    excluded = [rf".*\b{name}\b.*" for name in whole if name != "lm_head"]
    excluded += [] if vision else [r".*vision_backbone.*"]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha or min(rank, 16),
        lora_dropout=dropout,
        target_modules="all-linear",
        exclude_modules="|".join(excluded) or None,
        modules_to_save=whole or None,
        init_lora_weights="gaussian",
    )


def parameter_table(model) -> str:
    """Parameters and trainable share per part of the policy."""
    parts = {part: [0, 0] for part in ("vision_backbone", "projector", "language_model", "lm_head", *NEW_PARTS)}
    for name, parameter in model.named_parameters():
        part = parts[next(part for part in parts if f".{part}." in f".{name}")]
        part[0] += parameter.numel()
        part[1] += parameter.numel() * parameter.requires_grad
    parts = {name: sizes for name, sizes in parts.items() if sizes[0]}
    parts["total"] = [sum(column) for column in zip(*parts.values())]
    width = max(16, max(map(len, parts)) + 1)
    rows = [f"{'':<{width}}{'parameters':>16}{'trained':>16}{'share':>9}"]
    rows += [
        f"{name:<{width}}{size:>16,}{trained:>16,}{trained / size:>9.2%}" for name, (size, trained) in parts.items()
    ]
    return "\n".join(rows)


def last_checkpoint(folder: str) -> str | None:
    """The newest complete `checkpoint-N`: folders get that name only once everything is in them."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


@dataclass
class Source:
    """One dataset of a run: its reader, what a pass over it found, and which episodes are for what."""

    reader: object
    weight: float
    scan: object
    training: list[int]
    held_out: list[int]


def describe_dataset(source: Source, cameras: list[str], names: list[str] | None, units: list[str] | None) -> dict:
    """`norm_stats` of a dataset with what is known of it beyond numbers: `control_frequency` in Hz, `cameras` in the
    policy's order, and per action dim `names` and `units`, as given or as the dataset has them."""
    stats = {**source.scan.norm_stats, "action": {**source.scan.norm_stats["action"]}, "cameras": list(cameras)}
    dims = len(stats["action"]["min"])
    for option, given in (("names", names), ("units", units)):
        if given and len(given) != dims:
            raise ValueError(f"--action_{option} has {len(given)} entries, {source.reader.name} has {dims} dims.")
    if units and not names:
        raise ValueError("--action_units needs --action_names.")
    recorded = getattr(source.reader, "action_names", None) or []
    if not names and len(recorded) == dims and len(set(recorded)) == dims:
        names, told = recorded, getattr(source.reader, "action_units", None) or []
        units = told if len(told) == dims else None
    if source.reader.fps:
        stats["control_frequency"] = source.reader.fps
    if names:
        stats["action"]["names"] = list(names)
        stats["action"]["units"] = list(units or [""] * dims)
    return stats


def check_options(args: FinetuneArguments, config) -> None:
    """Mends what a YAML file may hold; raises ValueError for what would do nothing, or harm."""
    lists = ("data", "weights", "mask", "cameras", "decay_steps", "action_names", "action_units")
    for name in lists:  # one value instead of a list of one
        value = getattr(args, name)
        if value is not None and not isinstance(value, list):
            setattr(args, name, [value])
    if args.mode not in MODES:
        raise ValueError(f"Unknown mode {args.mode!r}; expected one of {MODES}.")
    if args.cache_images and args.augment:
        raise ValueError("--cache_images true keeps small pictures, which lose by being cropped: --augment false.")
    if args.validation_steps < 1:
        raise ValueError(f"Expected --validation_steps of 1 or more, got {args.validation_steps}.")
    instead = {
        "resume_from_checkpoint": "--resume true continues from the last checkpoint of --output_dir",
        "load_best_model_at_end": "the best policy so far is kept in the folder `best`",
        "label_smoothing_factor": "the loss is the cross-entropy",
        "loss_type": "the loss is the cross-entropy",
    }
    for name, reason in instead.items():
        default = config.__dataclass_fields__[name].default
        if getattr(config, name) not in (default, None, False):
            raise ValueError(f"--{name} {getattr(config, name)} would have no effect here: {reason}.")


def policy_fields(args: FinetuneArguments, sources: list[Source]) -> dict:
    """Fields of `OpenVLAConfig` that a run gives its policy; what it says nothing of stays as the checkpoint has it.

    A head that is named decodes in parallel: with attention "prefix" if it is "flow", which then computes images and
    prompt once for all its steps, otherwise with "bidirectional", as OpenVLA-OFT.
    """
    fields = {} if args.cameras is None else {"num_cameras": len(args.cameras)}
    sizes = {
        name: {source.reader.name: len(source.scan.norm_stats.get(name, {}).get("mean", ())) for source in sources}
        for name in ("action", "proprio")
    }

    def shared(name: str) -> int:
        if len(set(sizes[name].values())) > 1 or not all(sizes[name].values()):
            raise ValueError(f"One policy needs {name} of as many dims in all its data, which have {sizes[name]}.")
        return next(iter(sizes[name].values()))

    if args.proprio is not None:
        fields["proprio_dim"] = shared("proprio") if args.proprio else 0
    if args.head is not None:
        attention = args.attention or ("prefix" if args.head == "flow" else "bidirectional")
        fields |= {"action_head": args.head, "attention": attention, "action_dim": shared("action")}
        fields |= {} if args.chunk is None else {"action_chunk": args.chunk}
        fields |= {} if args.film is None else {"film": args.film}
    elif args.attention or args.chunk or args.film is not None:
        raise ValueError("--attention, --chunk and --film belong to parallel decoding: say with which --head.")
    return fields


def check_datasets(sources: list[Source], model) -> None:
    """Raises ValueError for data that the policy would learn wrongly from without an error."""
    names = [source.reader.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"Datasets of a run need different names (the folder's, or after the / on the Hub): {names}.")
    for source in sources:
        action, name = source.scan.norm_stats["action"], source.reader.name
        dims = len(action["min"])
        if model.config.action_dim is not None and model.config.action_dim != dims:
            raise ValueError(f"{name} has {dims} action dims, the policy is made for {model.config.action_dim}.")
        for dim, (low, high, normalized) in enumerate(zip(action["min"], action["max"], action["mask"])):
            if low == high != 0 and not normalized:
                raise ValueError(
                    f"{name}: dim {dim} is always {low} and is not normalised, so it would be trained and come back "
                    f"as 0: an open gripper as a closed one. Normalise it: --mask {' '.join(['1'] * dims)}"
                )


def check_resume(run: Path, facts: dict, resume: bool) -> str | None:
    """The checkpoint to go on from. What a resumed run must share lies in `run.json`.

    Raises ValueError if the folder belongs to another run.
    """
    checkpoint = last_checkpoint(str(run))
    facts = json.loads(json.dumps(facts))
    if checkpoint is None:
        if resume:
            print(f"{run} has no checkpoint: starting from the beginning.")
        return None
    if not resume:
        raise ValueError(f"{run} holds checkpoints of a run: --resume true goes on, or choose another --output_dir.")
    if not (run / "run.json").exists():
        raise ValueError(f"{run} has no run.json, which tells what its run was: choose another --output_dir.")
    before = json.loads((run / "run.json").read_text())
    changed = {key: (before.get(key), facts.get(key)) for key in before | facts if before.get(key) != facts.get(key)}
    if changed:
        told = "; ".join(
            f"{key}: {str(old)[:60]} then, {str(new)[:60]} now" for key, (old, new) in sorted(changed.items())
        )
        raise ValueError(f"{run} was begun otherwise, so it would not go on as it was: {told}")
    print(f"resuming from {checkpoint}")
    return checkpoint


def find_datasets(args: FinetuneArguments) -> list[tuple[list[str], str | None, float]]:
    """(places, name or None, weight) of each dataset of a run; several places become one dataset of that name."""
    if args.mixture is not None:
        return _find_mixture(args)
    named = [_split_name(place) for place in args.data]
    if args.name is not None:
        if any(name is not None for name, _ in named):
            raise ValueError("--data names its datasets: drop --name.")
        named = [(args.name, place) for _, place in named]
    found: dict[tuple, list[str]] = {}
    for number, (name, place) in enumerate(named):
        found.setdefault((name, number if name is None else None), []).append(place)
    weights = args.weights or [1.0] * len(found)
    if len(weights) != len(found) or min(weights) <= 0:
        raise ValueError(f"Expected {len(found)} positive --weights, one per dataset, got {weights}.")
    return [(places, name, weight) for ((name, _), places), weight in zip(found.items(), weights)]


def _split_name(place: str) -> tuple[str | None, str]:
    """NAME=PLACE, but for a place that exists as it is written."""
    name, equals, rest = place.partition("=")
    if not equals or Path(place).expanduser().exists():
        return None, place
    if not (name and rest) or "/" in name:
        raise ValueError(f"--data {place}: expected a folder, a file or a Hub id, or NAME= and one of these.")
    return name, rest


def _find_mixture(args: FinetuneArguments) -> list[tuple[list[str], str, float]]:
    from openvla.finetune.oxe import mixture_weights

    places = args.data
    if len(places) != 1 or args.weights or args.name:
        raise ValueError("With --mixture, --data is the one folder of its datasets, without --weights and --name.")
    found = []
    for name, weight in mixture_weights(args.mixture).items():
        versions = sorted(Path(places[0]).expanduser().glob(f"{name}/*/features.json"))
        if not versions:
            raise FileNotFoundError(
                f"{args.mixture} needs {places[0]}/{name}/VERSION/features.json, which is missing."
            )
        found.append(([str(versions[-1].parent)], name, weight))
    return found


def main(argv: list[str]) -> None:
    import numpy as np
    import torch
    from accelerate import PartialState
    from datasets import Dataset
    from transformers import set_seed
    from trl import SFTConfig, TrlParser

    from openvla.action_tokenizer import ActionStats
    from openvla.finetune.collator import ActionCollator
    from openvla.finetune.pictures import SmallPictures
    from openvla.finetune.policy import open_policy
    from openvla.finetune.readers import open_reader
    from openvla.finetune.readers.joined import JoinedReader
    from openvla.finetune.statistics import scan
    from openvla.finetune.steps import MixedSteps, StepDataset, choose_cameras, run_order
    from openvla.finetune.trainer import ActionTrainer, WeightAverage, plot_curves, save_atomically
    from openvla.quantization import quantization_config

    parser = TrlParser((FinetuneArguments, SFTConfig), prog="openvla finetune", description=__doc__)
    parser.set_defaults(**DEFAULTS, bf16=torch.cuda.is_available())
    args, config = parser.parse_args_and_config(argv)
    check_options(args, config)
    adapts = args.mode in ("lora", "qlora")
    if config.learning_rate is None:
        config.learning_rate = 5e-4 if adapts else 2e-5

    # 1. Demonstrations
    sources = []
    for places, name, weight in find_datasets(args):
        with PartialState().main_process_first():  # the others find what it cached
            readers = [open_reader(place, name) for place in places]
            reader = readers[0] if len(readers) == 1 else JoinedReader(name, readers)
            if hasattr(reader, "map_images") and not args.shuffle_episodes:
                reader.map_images()
            found = scan(reader, args.skip_bad_episodes, args.mask and [bool(value) for value in args.mask])
        try:
            training, held_out = split_episodes(found.lengths, args.validation_share, config.seed)
        except ValueError as error:
            raise ValueError(f"{reader.name}: {error}") from error
        sources.append(Source(reader, weight, found, training, held_out))
    names = [source.reader.name for source in sources]

    # 2. Policy: its statistics are those of the new data alone, before the first step
    quantization = quantization_config("nf4", torch.bfloat16) if args.mode == "qlora" else None
    dtype = torch.bfloat16 if config.bf16 and adapts else torch.float32
    fields = policy_fields(args, sources)
    set_seed(config.seed)  # new heads start at random
    model, processor = open_policy(args.model, fields, dtype=dtype, quantization_config=quantization)
    for name, module in model.named_modules():
        if is_new(f"{name}.weight"):  # trained whole, at LoRA's learning rate
            module.float()
    if getattr(model, "peft_config", None):
        raise ValueError(f"{args.model} is an adapter: start from the folder `merged` of its run instead.")
    check_datasets(sources, model)
    if model.config.action_bins is not None:
        raise ValueError(f"{args.model} has bins fitted to other data (config.action_bins): set them to null.")
    trained = [each.get("cameras") for each in (model.norm_stats or {}).values()]
    declared = trained[0] if trained and all(each == trained[0] for each in trained) else None
    described = {}
    for source in sources:
        cameras = choose_cameras(source.reader, processor.num_cameras, args.cameras, declared)
        described[source.reader.name] = describe_dataset(source, cameras, args.action_names, args.action_units)
        if args.cache_images:
            fit, settings = processor.image_processor.fit, processor.image_processor.to_dict()
            options = {"cameras": cameras, "fit": fit, "settings": settings}
            keep = functools.partial(SmallPictures, **options, folder=Path(config.output_dir) / "pictures")
            with PartialState().main_process_first():
                if isinstance(source.reader, JoinedReader):
                    source.reader = source.reader.replace_parts(keep, source.scan.lengths)
                else:
                    source.reader = keep(source.reader, source.scan.lengths)
    model.config.norm_stats = described
    if args.augment:
        processor.image_processor.center_crop_area = 0.9  # at test time; recorded in the checkpoint

    # 3. What is trained, in which order
    peft_config = None
    if adapts:
        if args.lora_head and model.action_head is not None:
            raise ValueError(f"--lora_head trains lm_head, which head {model.config.action_head!r} never asks.")
        lora = args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_vision, args.lora_head
        peft_config = lora_config(*lora, model.config)
    else:
        choose_trainable(model, args.mode)
    chunk, scheme = model.config.action_chunk, model.config.action_normalization
    stats = {name: ActionStats.from_norm_stats(model.norm_stats, name, scheme) for name in names}
    states = {}
    if model.config.proprio_dim:
        states = {name: ActionStats.from_norm_stats(model.norm_stats, name, scheme, "proprio") for name in names}

    def steps_of(source: Source, episodes: list[int], pad_chunks: bool = True) -> StepDataset:
        cameras = model.norm_stats[source.reader.name]["cameras"]
        keep_open = max(32, args.shuffle_episodes)
        return StepDataset(source.reader, source.scan.lengths, episodes, cameras, chunk, pad_chunks, keep_open)

    def collate(steps: StepDataset | MixedSteps, seed: int | None = None) -> ActionCollator:
        multiple = config.pad_to_multiple_of if isinstance(config.pad_to_multiple_of, int) else 1  # or None, "auto"
        return ActionCollator(steps, processor, stats, model.action_tokenizer, seed, model.config, states, multiple)

    parts = [steps_of(source, source.training, args.pad_chunks) for source in sources]
    steps = MixedSteps(parts)
    for source, part in zip(sources, parts):
        if not len(part):
            raise ValueError(
                f"{source.reader.name} has no episode of {chunk} steps: shorten --chunk or --pad_chunks true"
            )
    collator = collate(steps, config.seed if args.augment else None)
    validation = {}
    for kind, share in (("", "held_out"), ("training_", "training")):
        for source in sources:
            scored = steps_of(source, getattr(source, share))
            if len(scored):
                prefix = kind if len(sources) == 1 else f"{source.reader.name}_{kind}"
                indices = run_order(
                    [scored.episode_lengths], None, min(args.validation_steps, len(scored)), config.seed
                )
                validation[prefix] = (collate(scored), indices)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    if config.max_steps < 0:
        config.max_steps = math.ceil(len(steps) * config.num_train_epochs / batch)
    weights = [source.weight for source in sources]
    lengths = [part.episode_lengths for part in parts]
    order = run_order(lengths, weights, config.max_steps * batch, config.seed, args.shuffle_episodes)
    rows = Dataset.from_dict({"index": order, "draw": np.arange(len(order))})

    # 4. Train
    config.remove_unused_columns = False
    config.dataset_kwargs = {"skip_prepare_dataset": True}
    config.max_length = None
    run = Path(config.output_dir)
    given = ("model", "data", "mode", "weights", "mixture", "lora_rank", "lora_alpha", "lora_dropout", "lora_vision")
    given += ("lora_head", "augment", "decay_steps", "ema", "shuffle_episodes", "validation_share", "cameras")
    given += ("pad_chunks",)
    facts = {name: getattr(args, name) for name in given}
    of_config = ("seed", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "bf16")
    facts |= {name: getattr(config, name) for name in of_config}
    facts |= {"policy": fields, "batch": batch, "norm_stats": model.norm_stats, "lengths": lengths}
    places = [args.model, *(_split_name(place)[1] for place in args.data)]
    facts["hub"] = [place for place in places if not Path(place).expanduser().exists()]
    checkpoint = check_resume(run, facts, args.resume)
    trainer = ActionTrainer(
        model,
        args=config,
        train_dataset=rows,
        eval_dataset=rows,  # to have `evaluate` called
        data_collator=collator,
        processing_class=processor,
        peft_config=peft_config,
        validation=validation,
        decay_steps=args.decay_steps,
        average=None if args.ema is None else WeightAverage(args.ema),
    )
    main_process = trainer.is_world_process_zero()
    if main_process:
        for source, part in zip(sources, parts):
            counts = f"{len(source.training)} episodes, {len(part)} steps; held out: {len(source.held_out)} episodes"
            print(f"{source.reader.name}: {counts}")
            told = part.reader.read(source.training[0]).instructions[0]
            print(f"  cameras {part.cameras} of {source.reader.cameras}; first told: {told!r}")
        print(f"\n{parameter_table(trainer.accelerator.unwrap_model(trainer.model))}\n")
    start = time.monotonic()
    if main_process:
        run.mkdir(parents=True, exist_ok=True)
        (run / "run.json.tmp").write_text(json.dumps(facts, indent=2))
        os.replace(run / "run.json.tmp", run / "run.json")
    trainer.train(resume_from_checkpoint=checkpoint)
    scored = {entry["step"] for entry in trainer.state.log_history if any(key.startswith("eval_") for key in entry)}
    if config.eval_strategy != "no" and trainer.state.global_step not in scored:
        trainer.evaluate()

    # 5. What others can load
    if trainer.average is not None:
        trainer.average.put_in()
    result = run / "merged"
    if adapts:
        trainer.save_policy(run / "adapter")
    if args.mode == "qlora" or (adapts and trainer.is_fsdp_enabled):  # 4 bits, or shards, are not merged into
        result = run / "adapter"
    elif not adapts:
        trainer.save_policy(result)
    elif main_process:
        save_atomically(trainer.accelerator.unwrap_model(trainer.model).merge_and_unload(), processor, result)
    if main_process:
        plot_curves(trainer.state.log_history, run / "curves.png")
        print(f"trained for {(time.monotonic() - start) / 60:.1f} minutes; curves: {run / 'curves.png'}")
        print(f"{result} is ready: openvla predict --model {result} …")
