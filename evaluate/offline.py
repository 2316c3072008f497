"""Compares what a policy predicts with what was recorded: error per action dim in its unit, and tokens right.

openvla evaluate runs/cup/merged --data my_robot --split held-out
openvla evaluate runs/cup/adapter --data my_robot --episodes 0-9,20 --output-dir evaluations/cup
openvla evaluate openvla/openvla-7b --data datasets/bridge_orig/1.0.0 --sample 50 --dtype bfloat16
openvla evaluate lab/cup --data lab/pick_cup --unnorm-key my_robot --free-running
openvla export runs/cup/merged exported/cup --evaluation evaluations/cup-merged/my_robot/evaluation.json

Every step is predicted from its recorded observation, in two ways unless one is chosen. Free-running: the greedy
action that a robot would get. Teacher-forced: each token given the recorded ones before it, which is what training
optimises. Beside them stands what needs no policy: the mean action and each dim's most frequent token (both chosen in
hindsight, on these very steps), the recorded action of the step before, and the recorded action through tokens and
back, which is as close as tokens can come. Steps past an episode's end are not counted. Intervals hold 95 %, over
draws of whole episodes.

The output folder holds results.json (all numbers), evaluation.json (for `openvla export`'s card), errors.png, and
episode_N.png of a few episodes. None of it says how often a task would succeed: a policy that acts is judged in a
simulator or on a robot.
"""

import argparse
import logging
import platform
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from openvla.cli import command_parser
from openvla.evaluate.offline_episodes import SPLITS, choose_episodes, find_run, split_of_run
from openvla.evaluate.offline_scoring import MODES, Trace, summarize
from openvla.evaluate.report import short_name

VALIDATION_SHARE, SEED = 0.05, 42  # what `openvla finetune` takes unless told otherwise


def evaluate_actions(model, collator, indices: list[int], batch_size: int = 8, accelerator=None) -> dict:
    """Compares predicted with recorded actions on some steps of one dataset, given the right prefix.

    Args:
        model: `OpenVLAForActionPrediction`, or a peft model around it; left in the mode it was in.
        collator: `ActionCollator` without augmentation, over the dataset to compare with.
        indices: steps of `collator.steps`.
        accelerator: shares the steps among its processes; all of them get the result.

    Returns `token_accuracy` (share of tokens that the whole vocabulary's argmax gets right), `l1_normalized` and
    `l1_physical` (mean over steps, `[A]` per dim, of the best action tokens), and `steps`.
    """
    count, rank = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    # repeated until all processes have equally many: a sharded model has to be called by all of them
    positions = np.resize(np.arange(len(indices)), -(-len(indices) // count) * count)[rank::count].tolist()
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        found = {}
        for start in range(0, len(positions), batch_size):
            batch = positions[start : start + batch_size]
            found |= zip(batch, _compare(model, collator, [indices[position] for position in batch]))
    finally:
        for module in training:
            module.training = True
    if count > 1:
        from accelerate.utils import gather_object

        found = dict(gather_object(list(found.items())))
    rights, distances, physical = (np.stack(column) for column in zip(*found.values()))
    return {
        "token_accuracy": float(rights.mean()),
        "l1_normalized": distances.mean(axis=(0, 1)).tolist(),
        "l1_physical": physical.mean(axis=(0, 1)).tolist(),
        "steps": len(indices),
    }


def _compare(model, collator, indices: list[int]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per step: which tokens are right, distance in normalised and in physical units, all `(T, A)`."""
    steps = [collator.steps[index] for index in indices]
    stats = collator.stats[steps[0].dataset]
    ids, right = _predict_teacher_forced(model, collator, steps)
    predicted = collator.tokenizer.decode(ids)
    recorded = np.stack([step.actions for step in steps])  # (steps, T, A)
    distance = np.abs(predicted - stats.normalize(recorded))
    physical = np.abs(stats.unnormalize(predicted) - recorded)
    return list(zip(right, distance, physical))


def _predict_teacher_forced(model, collator, steps: list) -> tuple[np.ndarray, np.ndarray]:
    """Each token given the recorded ones before it: the best action tokens, and which recorded ones the whole
    vocabulary's argmax gets right; both `(steps, T, A)`."""
    import torch

    tokenizer = collator.tokenizer
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in collator.collate(steps).items()}
    targets = batch.pop("labels")[:, 1:]
    is_action = (targets >= tokenizer.vocab_start) & (targets < tokenizer.vocab_end)
    kept = is_action.any(dim=0).nonzero()[:, 0]
    with torch.no_grad():
        logits = model(**batch, use_cache=False, logits_to_keep=kept).logits[is_action[:, kept]].float()
    right = (logits.argmax(dim=-1) == targets[is_action]).cpu().numpy()
    best = logits[:, tokenizer.vocab_start : tokenizer.vocab_end].argmax(dim=-1) + tokenizer.vocab_start
    shape = (len(steps), *steps[0].actions.shape)
    return best.cpu().numpy().reshape(shape), right.reshape(shape)


def _predict_free_running(model, processor, unnorm_key: str, steps: list) -> tuple[np.ndarray, np.ndarray]:
    """What a robot would get: the action's tokens, and at which the model preferred one that is no action; both
    `(steps, T, A)`."""
    prompts = [processor.build_prompt(step.instruction) for step in steps]
    inputs = processor(prompts, [step.images for step in steps]).to(next(model.parameters()).device)
    output = model.predict_action(**inputs, unnorm_key=unnorm_key, return_dict=True)
    shape = (len(steps), *steps[0].actions.shape)
    return output["token_ids"].reshape(shape), output["replaced"].reshape(shape)


def predict_episodes(
    model,
    processor,
    reader,
    unnorm_key: str,
    episodes: list[int],
    cameras: list[str] | None = None,
    modes: tuple[str, ...] = MODES,
    batch_size: int = 8,
    progress: bool = True,
) -> list[Trace]:
    """Predicts every step of some episodes. Images are in memory for one batch, an episode at a time.

    Args:
        model: in eval mode, as `openvla.load` gives it.
        unnorm_key: whose statistics the policy acts and is compared with.
        cameras: which, in the policy's order; None: the dataset's first ones.

    Raises ValueError for a dataset that is not like the policy's: other dims, too few cameras.
    """
    from tqdm import tqdm

    from openvla.action_tokenizer import ActionStats
    from openvla.finetune.collator import ActionCollator
    from openvla.finetune.steps import StepDataset, check_episode

    stats = ActionStats.from_norm_stats(model.norm_stats, unnorm_key, model.config.action_normalization)
    chosen = cameras or reader.cameras[: processor.num_cameras]
    if len(chosen) != processor.num_cameras:
        raise ValueError(
            f"The policy takes {processor.num_cameras} camera(s), got {chosen} of {reader.cameras} that "
            f"{reader.name} has: choose with --cameras, or take a dataset with as many."
        )
    traces = []
    with _quiet(), tqdm(episodes, desc=f"evaluate {reader.name}", unit="episode", disable=not progress) as bar:
        for number in bar:
            episode = reader.read(number)
            check_episode(episode)
            if episode.actions.shape[1] != stats.dim:
                raise ValueError(
                    f"{episode.source} has {episode.actions.shape[1]} action dims, the statistics of {unnorm_key!r} "
                    f"have {stats.dim}: choose others with --unnorm-key, of {sorted(model.norm_stats)}."
                )
            # what has been read is not read again, and is let go with the episode
            opened = SimpleNamespace(name=reader.name, cameras=reader.cameras, read=lambda _, episode=episode: episode)
            steps = StepDataset(opened, [len(episode)], None, chosen, model.config.action_chunk)
            collator = ActionCollator(steps, processor, {reader.name: stats}, model.action_tokenizer)
            found: dict[str, list] = {mode: [] for mode in modes}
            for start in range(0, len(steps), batch_size):
                batch = [steps[index] for index in range(start, min(start + batch_size, len(steps)))]
                if "free_running" in modes:
                    found["free_running"].append(_predict_free_running(model, processor, unnorm_key, batch))
                if "teacher_forced" in modes:
                    found["teacher_forced"].append(_predict_teacher_forced(model, collator, batch))
                bar.set_postfix(step=f"{start + len(batch)}/{len(steps)}")
            trace = Trace(number, episode.source, episode.instructions[0], episode.actions)
            if "free_running" in modes:
                trace.ids["free_running"], trace.replaced = map(np.concatenate, zip(*found["free_running"]))
            if "teacher_forced" in modes:
                trace.ids["teacher_forced"], trace.right = map(np.concatenate, zip(*found["teacher_forced"]))
            traces.append(trace)
    return traces


@contextmanager
def _quiet():
    """Replaced tokens are counted in the result, instead of a warning per batch."""
    from openvla.modeling_openvla import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def parser() -> argparse.ArgumentParser:
    arguments = command_parser("evaluate", __doc__)
    add = arguments.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="folder or Hub id; a merged policy or an adapter")
    add("--data", required=True, metavar="DATASET", help="LeRobot, RLDS, HDF5, plain folder, or Hub id")
    add("--name", help="the dataset's name, by which RLDS episodes are standardised; default: its own")
    add("--unnorm-key", help="whose statistics to act with; default: the dataset's, or the only ones")
    add("--cameras", nargs="+", help="which, in the policy's order; default: the first ones")
    add("--episodes", metavar="WHICH", help="numbers such as 0-9,20; default: all")
    add("--sample", type=int, metavar="N", help="instead: so many at random")
    add("--split", choices=SPLITS, default="all", help="as `openvla finetune` holds out episodes (default: all)")
    add("--run", metavar="FOLDER", help="of `openvla finetune`, which tells the split; default: CHECKPOINT's, if any")
    add("--validation-share", type=float, help=f"of the split; default: the run's, else {VALIDATION_SHARE}")
    add("--seed", type=int, help=f"of split and sampling; default: the run's, else {SEED}")
    add("--skip-bad-episodes", action="store_true", help="leave them out, after a pass over the data")
    add("--free-running", action="store_true", help="only what a robot would get; default: both ways")
    add("--teacher-forced", action="store_true", help="only what training optimises")
    add("--batch-size", type=int, default=8, metavar="STEPS", help="predicted at once (8)")
    add("--center-crop-area", type=float, metavar="SHARE", help="default: as the checkpoint declares")
    add("--dtype", default="auto", help="auto (as stored), float32, bfloat16, float16")
    add("--device", help="cuda, cpu, …; default: cuda if there is one")
    add("--revision", help="branch, tag or commit of CHECKPOINT on the Hub")
    add("--output-dir", metavar="FOLDER", help="default: evaluations/CHECKPOINT/DATASET")
    add("--plots", type=int, default=3, metavar="N", help="draw N episodes; 0: no pictures (3)")
    return arguments


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if args.batch_size < 1 or args.plots < 0:
        raise ValueError(f"Expected --batch-size from 1 and --plots from 0, got {args.batch_size} and {args.plots}.")
    if args.plots:
        import matplotlib  # noqa: F401  if it is missing, say so before the work

    import torch
    import transformers

    import openvla
    from openvla.action_tokenizer import ActionStats, resolve_unnorm_key
    from openvla.evaluate.offline_plots import draw_all
    from openvla.evaluate.offline_report import format_tables, name_dims, write_report
    from openvla.finetune.readers import open_reader
    from openvla.loading import load

    # 1. Which steps
    reader = open_reader(args.data, args.name)
    run = find_run(args.checkpoint, args.run)
    known = args.validation_share is not None or reader.name in (run.get("norm_stats") or {})
    if args.split != "all" and not known:
        raise ValueError(
            f"--split {args.split}: no run.json that names {reader.name} lies beside the checkpoint, so nobody knows "
            "which episodes were held out: pass --run, --validation-share (and --seed), or --episodes."
        )
    share = run.get("validation_share", VALIDATION_SHARE) if args.validation_share is None else args.validation_share
    seed = run.get("seed", SEED) if args.seed is None else args.seed
    candidates = split_of_run(reader, args.split, run, share, seed, args.skip_bad_episodes)
    episodes = choose_episodes(candidates, args.episodes, args.sample, seed)
    if args.split == "all" and reader.name in (run.get("norm_stats") or {}):
        print("note: the run trained on episodes of this dataset; see --split held-out", file=sys.stderr)

    # 2. The policy
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    revision = {"revision": args.revision} if args.revision else {}
    model, processor = load(args.checkpoint, dtype=args.dtype, **revision)
    model = model.to(device)
    if args.center_crop_area is not None:
        processor.image_processor.center_crop_area = args.center_crop_area
    known = reader.name if reader.name in (model.norm_stats or {}) else None
    unnorm_key = resolve_unnorm_key(model.norm_stats, known if args.unnorm_key is None else args.unnorm_key)
    stats = ActionStats.from_norm_stats(model.norm_stats, unnorm_key, model.config.action_normalization)
    modes = tuple(mode for mode in MODES if getattr(args, mode)) or MODES

    # 3. Its predictions
    traces = predict_episodes(model, processor, reader, unnorm_key, episodes, args.cameras, modes, args.batch_size)
    settings = {
        "name": short_name(args.checkpoint),
        "checkpoint": args.checkpoint,
        "revision": args.revision,
        "data": args.data,
        "dataset": reader.name,
        "unnorm_key": unnorm_key,
        "cameras": args.cameras or reader.cameras[: processor.num_cameras],
        "split": args.split,
        "validation_share": None if args.split == "all" else share,
        "seed": seed,
        "episodes": episodes,
        "action_chunk": model.config.action_chunk,
        "center_crop_area": processor.image_processor.center_crop_area,
        "batch_size": args.batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
    }
    versions = {"openvla": openvla.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"numpy": np.__version__, "python": platform.python_version()}
    dims = name_dims(model.norm_stats, unnorm_key, reader)
    found = {
        "command": shlex.join(["openvla", "evaluate", *argv]),
        "settings": settings,
        "versions": versions,
        **summarize(traces, stats, model.action_tokenizer, dims),
    }

    # 4. The report
    folder = Path(args.output_dir or Path("evaluations", settings["name"], reader.name)).expanduser()
    pictures = draw_all(found, traces, stats, model.action_tokenizer, args.plots) if args.plots else {}
    write_report(folder, found, pictures)
    print(format_tables(found))
    print(f"\nnumbers, card entries and pictures: {folder}")
