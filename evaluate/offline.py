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

Policies that decode in parallel give no token another to go by: both ways are one, and free-running is told. Without
tokens there is only the error; of chunks, also how it grows with the steps ahead. Heads that denoise start from the
same noise at every evaluation.

The output folder holds results.json (all numbers), evaluation.json (for `openvla export`'s card), errors.png, of
chunks ahead.png, and episode_N.png of a few episodes. None of it says how often a task would succeed: a policy that
acts is judged in a simulator or on a robot.
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

from openvla import quantization
from openvla.cli import command_parser
from openvla.evaluate.offline_episodes import SPLITS, choose_episodes, find_run, split_of_run
from openvla.evaluate.offline_scoring import MODES, Trace, summarize
from openvla.evaluate.report import short_name

VALIDATION_SHARE, SEED = 0.05, 42  # what `openvla finetune` takes unless told otherwise
NOISE_SEED = 0  # with the step's number, of heads that denoise: the same noise whenever they are evaluated


def evaluate_actions(model, collator, indices: list[int], batch_size: int = 8, accelerator=None) -> dict:
    """Compares predicted with recorded actions on some steps of one dataset: tokens given the right ones before them,
    or, of policies that decode in parallel, the chunk that they would act by. What lies past an episode's end does not
    count.

    Args:
        model: `OpenVLAForActionPrediction`, or a peft model around it; left in the mode it was in.
        collator: `ActionCollator` without augmentation, over the dataset to compare with.
        indices: steps of `collator.steps`.
        accelerator: shares the steps among its processes; all of them get the result.

    Returns `l1_normalized` and `l1_physical` (mean over actions, `[A]` per dim; of the token head, of the best action
    tokens), `steps`, and of the token head `token_accuracy`, the share of tokens that the whole vocabulary's argmax
    gets right.
    """
    count, rank = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    # repeated until all processes have equally many: a sharded model has to be called by all of them
    positions = np.resize(np.arange(len(indices)), -(-len(indices) // count) * count)[rank::count].tolist()
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        found = {}
        with quiet():
            for start in range(0, len(positions), batch_size):
                batch = positions[start : start + batch_size]
                found |= zip(batch, _compare(model, collator, [indices[position] for position in batch]))
    finally:
        for module in training:
            module.training = True
    if count > 1:
        from accelerate.utils import gather_object

        found = dict(gather_object(list(found.items())))
    rights, distances, physical = (np.concatenate(column) for column in zip(*(found[key] for key in sorted(found))))
    accuracy = {"token_accuracy": float(rights.mean())} if rights.shape[-1] else {}
    return accuracy | {
        "l1_normalized": distances.mean(axis=0).tolist(),
        "l1_physical": physical.mean(axis=0).tolist(),
        "steps": len(indices),
    }


def _compare(model, collator, indices: list[int]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per step: which tokens are right, `(n, A)`, or `(n, 0)` without tokens; distance in normalised and in physical
    units, both `(n, A)`; of those n actions of its chunk that lie inside the episode."""
    steps = [collator.steps[index] for index in indices]
    stats = collator.stats[steps[0].dataset]
    recorded = np.stack([step.actions for step in steps])  # (steps, T, A)
    normalized = stats.normalize(recorded)
    right = np.zeros((*recorded.shape[:2], 0), dtype=bool)
    if model.config.attention == "causal":
        ids, right = _predict_teacher_forced(model, collator, steps)
        predicted = collator.tokenizer.decode(ids)
    else:
        seeds = [(NOISE_SEED, index) for index in indices]
        output = _predict_free_running(model, collator.processor, steps[0].dataset, steps, seeds)
        predicted = output["normalized"]
        if "ids" in output:
            right = (output["ids"] == collator.tokenizer.encode(normalized)) & ~output["replaced"]
    distance, physical = np.abs(predicted - normalized), np.abs(stats.unnormalize(predicted) - recorded)
    counted = [~step.is_pad for step in steps]
    return [tuple(each[row][inside] for each in (right, distance, physical)) for row, inside in enumerate(counted)]


def _predict_teacher_forced(model, collator, steps: list) -> tuple[np.ndarray, np.ndarray]:
    """Each token given the recorded ones before it: the best action tokens, and which recorded ones the whole
    vocabulary's argmax gets right; both `(steps, T, A)`. What lies past an episode's end is not predicted."""
    import torch

    tokenizer = collator.tokenizer
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in collator.collate(steps).items()}
    if model.config.proprio_dim:
        batch["proprio"] = _states(model, steps, steps[0].dataset)
    targets = batch.pop("labels")[:, 1:]
    is_action = (targets >= tokenizer.vocab_start) & (targets < tokenizer.vocab_end)
    kept = is_action.any(dim=0).nonzero()[:, 0]
    with torch.no_grad():
        logits = model(**batch, use_cache=False, logits_to_keep=kept).logits[is_action[:, kept]].float()
    right = (logits.argmax(dim=-1) == targets[is_action]).cpu().numpy()
    best = logits[:, tokenizer.vocab_start : tokenizer.vocab_end].argmax(dim=-1) + tokenizer.vocab_start
    shape = (len(steps), steps[0].actions.size)
    counts = is_action.sum(dim=1).cpu().numpy()
    scored = np.arange(shape[1]) < counts[:, None]  # (steps, T·A): labels may stop at the end of the episode
    ids, rights = np.full(shape, tokenizer.vocab_start), np.zeros(shape, dtype=bool)
    ids[scored], rights[scored] = best.cpu().numpy(), right
    shape = (len(steps), *steps[0].actions.shape)
    return ids.reshape(shape), rights.reshape(shape)


def _predict_free_running(
    model, processor, unnorm_key: str, steps: list, seeds: list, num_denoising_steps: int | None = None
) -> dict[str, np.ndarray]:
    """What a robot would get: `normalized` actions, and of the token head `ids`, and `replaced`, where the model
    preferred a token that is no action; all `(steps, T, A)`.

    Args:
        seeds: per step, of the noise that heads which denoise start from.
    """
    import torch

    prompts = [processor.build_prompt(step.instruction) for step in steps]
    inputs = processor(prompts, [step.images for step in steps]).to(next(model.parameters()).device)
    with torch.no_grad():
        output = model.sample_actions(
            **inputs,
            action_dim=steps[0].actions.shape[1],
            proprio=_states(model, steps, unnorm_key) if model.config.proprio_dim else None,
            noise=model.draw_noise(seeds),
            num_denoising_steps=num_denoising_steps,
        )
    found = {"normalized": output.actions, "ids": output.token_ids, "replaced": output.replaced}
    shape = (len(steps), *steps[0].actions.shape)
    return {name: values.cpu().numpy().reshape(shape) for name, values in found.items() if values is not None}


def _states(model, steps: list, unnorm_key: str):
    """Their proprioception as a tensor `(steps, P)` in [-1, 1]."""
    import torch

    from openvla.action_tokenizer import ActionStats

    if missing := [step.source for step in steps if step.proprio is None]:
        raise ValueError(
            f"The policy takes {model.config.proprio_dim} numbers of the robot's state; {missing[0]} has none."
        )
    stats = ActionStats.from_norm_stats(model.norm_stats, unnorm_key, model.config.action_normalization, "proprio")
    states = np.stack([step.proprio for step in steps])
    if states.shape[1] != model.config.proprio_dim:
        raise ValueError(
            f"The policy takes {model.config.proprio_dim} numbers of the robot's state; {steps[0].source} has "
            f"{states.shape[1]}."
        )
    return torch.from_numpy(stats.normalize(states)).to(next(model.parameters()).device, torch.float32)


def predict_episodes(
    model,
    processor,
    reader,
    unnorm_key: str,
    episodes: list[int],
    cameras: list[str] | None = None,
    modes: tuple[str, ...] = MODES,
    batch_size: int = 8,
    num_denoising_steps: int | None = None,
    progress: bool = True,
) -> list[Trace]:
    """Predicts every step of some episodes. Images are in memory for one batch, an episode at a time.

    Args:
        model: in eval mode, as `openvla.load` gives it.
        unnorm_key: whose statistics the policy acts and is compared with.
        cameras: which, in the policy's order; None: those it was trained with, or the dataset's first ones.
        modes: of `MODES`; policies that decode in parallel have "free_running" alone.

    Raises ValueError for a dataset that is not like the policy's: other dims, too few cameras.
    """
    from tqdm import tqdm

    from openvla.action_tokenizer import ActionStats
    from openvla.finetune.collator import ActionCollator
    from openvla.finetune.steps import StepDataset, check_episode, choose_cameras

    stats = ActionStats.from_norm_stats(model.norm_stats, unnorm_key, model.config.action_normalization)
    modes = modes if model.config.attention == "causal" else ("free_running",)
    chosen = choose_cameras(reader, processor.num_cameras, cameras, model.norm_stats[unnorm_key].get("cameras"))
    traces = []
    with quiet(), tqdm(episodes, desc=f"evaluate {reader.name}", unit="episode", disable=not progress) as bar:
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
            free, forced = [], []
            for start in range(0, len(steps), batch_size):
                times = range(start, min(start + batch_size, len(steps)))
                batch = [steps[time] for time in times]
                if "free_running" in modes:
                    seeds = [(NOISE_SEED, number, time) for time in times]
                    free.append(_predict_free_running(model, processor, unnorm_key, batch, seeds, num_denoising_steps))
                if "teacher_forced" in modes:
                    forced.append(_predict_teacher_forced(model, collator, batch))
                bar.set_postfix(step=f"{start + len(batch)}/{len(steps)}")
            trace = Trace(number, episode.source, episode.instructions[0], episode.actions)
            if free:
                whole = {name: np.concatenate([each[name] for each in free]) for name in free[0]}
                trace.normalized["free_running"] = whole["normalized"]
                trace.replaced = whole.get("replaced")
                if "ids" in whole:
                    trace.ids["free_running"] = whole["ids"]
            if forced:
                ids, trace.right = map(np.concatenate, zip(*forced))
                trace.ids["teacher_forced"] = ids
                trace.normalized["teacher_forced"] = model.action_tokenizer.decode(ids)
            traces.append(trace)
    return traces


@contextmanager
def quiet():
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
    add("--cameras", nargs="+", help="which, in the policy's order; default: those of its training, or the first ones")
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
    quantization.add_argument(arguments)
    add("--revision", help="branch, tag or commit of CHECKPOINT on the Hub")
    add("--output-dir", metavar="FOLDER", help="default: evaluations/CHECKPOINT/DATASET")
    add("--num-denoising-steps", type=int, metavar="N", help="of diffusion and flow heads; default: as declared")
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
    from openvla.finetune.steps import choose_cameras
    from openvla.loading import load_onto

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
    told = {"dtype": args.dtype, "revision": args.revision}
    model, processor = load_onto(device, args.checkpoint, args.quantize, **told)
    if args.center_crop_area is not None:
        processor.image_processor.center_crop_area = args.center_crop_area
    known = reader.name if reader.name in (model.norm_stats or {}) else None
    unnorm_key = resolve_unnorm_key(model.norm_stats, known if args.unnorm_key is None else args.unnorm_key)
    stats = ActionStats.from_norm_stats(model.norm_stats, unnorm_key, model.config.action_normalization)
    modes = tuple(mode for mode in MODES if getattr(args, mode)) or MODES
    if model.config.attention != "causal" and modes == ("teacher_forced",):
        print("note: this policy decodes in parallel; teacher-forced is free-running", file=sys.stderr)
    denoising_steps = model.config.choose_denoising_steps(args.num_denoising_steps)
    tokenizer = model.action_tokenizer if model.config.action_head == "token" else None

    declared = model.norm_stats[unnorm_key].get("cameras")
    cameras = choose_cameras(reader, processor.num_cameras, args.cameras, declared)

    # 3. Its predictions
    options = {"modes": modes, "batch_size": args.batch_size, "num_denoising_steps": denoising_steps}
    traces = predict_episodes(model, processor, reader, unnorm_key, episodes, cameras, **options)
    settings = {
        "name": short_name(args.checkpoint),
        "checkpoint": args.checkpoint,
        "revision": args.revision,
        "data": args.data,
        "dataset": reader.name,
        "unnorm_key": unnorm_key,
        "cameras": cameras,
        "split": args.split,
        "validation_share": None if args.split == "all" else share,
        "seed": seed,
        "episodes": episodes,
        "action_chunk": model.config.action_chunk,
        "action_head": model.config.action_head,
        "num_denoising_steps": denoising_steps,
        "center_crop_area": processor.image_processor.center_crop_area,
        "batch_size": args.batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantize": args.quantize,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
    }
    versions = {"openvla": openvla.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"numpy": np.__version__, "python": platform.python_version()}
    dims = name_dims(model.norm_stats, unnorm_key, reader)
    found = {
        "command": shlex.join(["openvla", "evaluate", *argv]),
        "settings": settings,
        "versions": versions,
        **summarize(traces, stats, tokenizer, dims),
    }

    # 4. The report
    folder = Path(args.output_dir or Path("evaluations", settings["name"], reader.name)).expanduser()
    pictures = draw_all(found, traces, stats, args.plots) if args.plots else {}
    write_report(folder, found, pictures)
    print(format_tables(found))
    print(f"\nnumbers, card entries and pictures: {folder}")
