"""Measures a policy: in closed loop in a simulator, or against recorded actions (--data, see there: --data X --help).

openvla evaluate openvla/openvla-7b-finetuned-libero-spatial --suite libero_spatial --center-crop-area 0.9
openvla evaluate runs/my-policy --suite libero_object --tasks 0,3-5 --episodes 0-9 --num-envs 4 --videos 2
openvla evaluate moojink/openvla-7b-oft-finetuned-libero-10 --suite libero_10 --center-crop-area 0.9
openvla evaluate runs/my-policy --suite libero_goal --ensemble
openvla evaluate http://127.0.0.1:8000 --suite libero_spatial --unnorm-key libero_spatial_no_noops
openvla evaluate --baseline expert --suite libero_goal --episodes 0-9
openvla evaluate --baseline expert-tokens --statistics demos/libero_goal --suite libero_goal --episodes 0-9
openvla evaluate --baseline replay --statistics demos/libero_goal --suite libero_goal --episodes 0-9
openvla evaluate runs/my-policy --suite libero_spatial --ask-other
openvla evaluate runs/my-policy --data demos/libero_object --episodes 0-9

The published protocol is the default: every official initial state once (LIBERO: 50 of each of 10 tasks), and its
limits of steps. Every episode is written down as it ends: the same command goes on where it was stopped. Several
simulators share one policy, which answers those that wait in one batch; in low precision a batch may round otherwise
than one alone, so --num-envs 1 is what repeats to the bit. Policies get the simulator's first cameras, as many as they
take (in LIBERO agentview, then wrist), and the robot's state if they take it. Of a chunk all actions are carried out,
as OpenVLA-OFT does; --execute asks again earlier, --ensemble at every step, averaging chunks as ACT does.

The output folder holds episodes.jsonl, results.json (all numbers), evaluation.json (for `openvla export`'s card),
summary.png, and videos.
"""

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from openvla import quantization
from openvla.cli import command_parser, parse_numbers
from openvla.evaluate.envs import HELD_OUT, list_tasks, open_env, versions
from openvla.evaluate.report import short_name, tell_differences
from openvla.serve.action_queue import ENSEMBLE

BASELINES = ("expert", "expert-tokens", "majority", "random", "replay")
LEARNED = ("expert-tokens", "majority", "replay")  # from the dataset that --statistics names


def parser() -> argparse.ArgumentParser:
    arguments = command_parser("evaluate", __doc__)
    arguments.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT", help="folder, Hub id, or http:// address of a server"
    )
    arguments.add_argument("--suite", required=True, help="libero_spatial, libero_goal_swap, metaworld, …")
    arguments.add_argument("--tasks", default="all", help="numbers such as 0,3-5; default: all")
    arguments.add_argument("--episodes", default="all", help="initial states of each task, such as 0-9; default: all")
    arguments.add_argument("--baseline", choices=BASELINES, help="instead of a checkpoint")
    arguments.add_argument(
        "--statistics",
        metavar="DATASET",
        help="for expert-tokens, majority and replay: dataset, or folder of demonstrations, to normalise by, to take "
        "each number's most frequent value of, or to carry out blindly",
    )
    arguments.add_argument(
        "--ask-other",
        action="store_true",
        help="ask in every scene for other tasks of the suite that can be done there: does the policy listen?",
    )
    arguments.add_argument("--unnorm-key", help="whose statistics; default: the suite's name, also with _no_noops")
    arguments.add_argument(
        "--center-crop-area", type=float, metavar="SHARE", help="0.9 for LIBERO policies; default: as declared"
    )
    arguments.add_argument(
        "--execute", type=int, metavar="N", help="actions of a chunk before asking again; default: all"
    )
    arguments.add_argument(
        "--ensemble",
        type=float,
        nargs="?",
        const=ENSEMBLE,
        metavar="DECAY",
        help=f"ask at every step, and average over chunks; the weights' decay, {ENSEMBLE} unless told otherwise",
    )
    arguments.add_argument(
        "--num-denoising-steps", type=int, metavar="N", help="of diffusion and flow heads; default: as declared"
    )
    arguments.add_argument("--num-envs", type=int, default=1, help="simulators at a time, a process each")
    arguments.add_argument("--cameras", nargs="+", help="in the policy's order; default: the simulator's first ones")
    arguments.add_argument(
        "--renderer",
        choices=("official", "fast"),
        default="official",
        help="fast: a quarter of the time without a GPU, pictures differ slightly",
    )
    arguments.add_argument("--videos", type=int, default=1, metavar="N", help="recordings per task; they cost time")
    arguments.add_argument("--output-dir", metavar="FOLDER", help="default: evaluations/POLICY/SUITE")
    arguments.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, float16")
    arguments.add_argument("--device", help="cuda, cpu, …; default: cuda if there is one")
    quantization.add_argument(arguments)
    arguments.add_argument("--no-drafts", action="store_true", help="do not try the last answer first; slower")
    arguments.add_argument("--revision", help="branch, tag or commit on the Hub")
    arguments.add_argument("--seed", type=int, default=7, help="of baselines and noise; the initial states are fixed")
    return arguments


def main(argv: list[str]) -> None:
    if any(argument.split("=")[0] == "--data" for argument in argv):
        from openvla.evaluate import offline

        offline.main(argv)
        return
    args = parser().parse_args(argv)
    _check(args)

    import av  # noqa: F401  if these two are missing, say so before the work
    import matplotlib  # noqa: F401
    import numpy as np
    from tqdm import tqdm

    from openvla.evaluate.report import card_entries, draw_summary, format_table, summarize, write_json
    from openvla.evaluate.rollout import Job, run_episodes

    # 1. What is asked, and of whom: checked before anything long begins
    tasks = parse_numbers(args.tasks, len(list_tasks(args.suite)), "tasks")
    env = open_env(args.suite, tasks[0])
    conventions, episodes = env.conventions, parse_numbers(args.episodes, env.num_episodes, "episodes")
    env.close()
    policy, metadata = _policy(args, conventions)
    conventions.check(metadata)
    cameras = args.cameras or choose_cameras(metadata, conventions)
    if len(cameras) != metadata["num_cameras"]:
        raise ValueError(f"The policy takes {metadata['num_cameras']} camera(s), got {cameras}.")
    env_options = {"cameras": cameras, "renderer": args.renderer}
    if args.execute and args.execute > metadata.get("action_chunk", args.execute):
        raise ValueError(f"--execute {args.execute}: the policy gives {metadata['action_chunk']} action(s) at a time.")
    _tell(args, metadata, conventions, episodes)

    # 2. What has been done already
    name = args.baseline or short_name(args.checkpoint)
    folder = Path(args.output_dir or Path("evaluations", name, args.suite))
    settings = {
        "suite": args.suite,
        "policy": metadata,
        "execute": args.execute,
        "ensemble": args.ensemble,
        "env": env_options,
        "seed": args.seed,
        "versions": _versions(args.suite),
    } | ({"ask_other": True} if args.ask_other else {})
    settings = json.loads(json.dumps(settings))
    log = EpisodeLog(folder, settings)
    jobs = []
    for task in tasks:
        for place, episode in enumerate(episodes):
            video = folder / "videos" / f"task_{task:02d}_episode_{episode:02d}.mp4"
            if (task, episode) not in log.episodes:
                asked = choose_other(args.suite, task, episode) if args.ask_other else None
                jobs.append(Job(args.suite, task, episode, str(video) if place < args.videos else None, asked))
    wanted = {(task, episode) for task in tasks for episode in episodes}
    if done := len(wanted & set(log.episodes)):
        print(f"{done} of {len(wanted)} episodes are in {log.path} already", file=sys.stderr)

    # 3. The episodes
    successes = [line["success"] for key, line in log.episodes.items() if key in wanted]
    with tqdm(total=len(wanted), initial=len(successes), unit="episode", dynamic_ncols=True) as progress:

        def note(job: Job, outcome) -> None:
            log.add({"task": job.task, "episode": job.episode, **asdict(outcome)})
            successes.append(outcome.success)
            progress.set_postfix_str(f"success {np.mean(successes):.1%}")
            progress.update()

        action_dim = len(conventions.action_dims)
        acting = {"execute": args.execute, "ensemble": args.ensemble, "action_dim": action_dim, "seed": args.seed}
        run_episodes(jobs, policy, env_options, args.num_envs, **acting, on_outcome=note)

    # 4. The report, of what this command asked for
    summary = summarize(line for key, line in log.episodes.items() if key in wanted)
    command = f"openvla evaluate {shlex.join(argv)}"
    write_json(folder / "results.json", {"command": command, "settings": settings, **summary})
    write_json(folder / "evaluation.json", card_entries(_describe(args, tasks, episodes, env), summary, command))
    draw_summary(folder / "summary.png", f"{name} · {args.suite}", summary)
    print(format_table(args.suite, summary))
    print(f"\n{folder}/results.json, evaluation.json, summary.png" + (", videos" if args.videos else ""))


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that contradict each other, or would do nothing."""
    if (args.checkpoint is None) == (args.baseline is None):
        raise ValueError("Expected either a checkpoint or --baseline.")
    if args.num_envs < 1 or args.videos < 0 or (args.execute is not None and args.execute < 1):
        raise ValueError("Expected --num-envs and --execute of 1 or more, and --videos of 0 or more.")
    if args.execute is not None and args.ensemble is not None:
        raise ValueError("Expected either --execute or --ensemble, which asks at every step.")
    if args.ensemble is not None and not 0 <= args.ensemble < float("inf"):
        raise ValueError(f"--ensemble {args.ensemble}: expected 0 (equal weights) or more.")
    if (args.baseline in LEARNED) != (args.statistics is not None):
        raise ValueError(f"--statistics, a dataset, and the baselines {', '.join(LEARNED)} belong together.")
    if args.ask_other and not args.suite.startswith("libero"):
        raise ValueError(f"--ask-other is for LIBERO's suites, {args.suite} has one task per scene.")
    loading = ("center_crop_area", "num_denoising_steps", "device", "revision", "quantize")
    idle = [name for name in loading if getattr(args, name) is not None] + ["dtype"] * (args.dtype != "auto")
    idle += ["no_drafts"] * args.no_drafts
    if args.baseline and args.unnorm_key:
        idle.append("unnorm_key")
    if idle and (args.baseline or _is_address(args.checkpoint)):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ValueError(f"{options} would do nothing here: no checkpoint is loaded by this command.")


def _tell(args: argparse.Namespace, metadata: dict, conventions, episodes: list[int]) -> None:
    """Prints what may be a mistake."""
    units = [dim.get("unit", "") for dim in metadata["action_dims"]]
    if not any(units):
        print("note: the policy declares no units; they are taken for the simulator's", file=sys.stderr)
    ours = units == [unit for _, unit in conventions.action_dims] and not args.baseline
    if ours and episodes[-1] >= HELD_OUT:
        print(
            f"note: openvla demos takes initial states from {HELD_OUT} on: if this policy learned from them, only "
            f"--episodes 0-{HELD_OUT - 1} are new to it",
            file=sys.stderr,
        )
    if args.ensemble is not None and metadata.get("action_chunk") == 1:
        print("note: one action at a time leaves --ensemble nothing to average", file=sys.stderr)
    published = str(metadata.get("unnorm_key")).startswith("libero") and not metadata.get("cameras")
    if published and metadata.get("center_crop_area", 1.0) is None:
        print("note: LIBERO policies were trained with crops; consider --center-crop-area 0.9", file=sys.stderr)


def _describe(args: argparse.Namespace, tasks: list[int], episodes: list[int], env) -> str:
    """The suite, and what of it was run, if not all of it as published."""
    parts = [f"tasks {args.tasks}"] if len(tasks) < len(list_tasks(args.suite)) else []
    parts += [f"episodes {args.episodes}"] if len(episodes) < env.num_episodes else []
    parts += [f"{args.renderer} renderer"] if args.renderer != "official" else []
    parts += [f"{args.execute} actions of each chunk"] if args.execute else []
    parts += [f"ensemble of chunks, {args.ensemble:g}"] if args.ensemble is not None else []
    parts += [f"{args.num_denoising_steps} denoising steps"] if args.num_denoising_steps else []
    parts += [f"policy quantised as {args.quantize}"] if args.quantize else []
    parts += [f"baseline {args.baseline}"] if args.baseline else []
    parts += ["asked for another task of the suite that can be done there"] if args.ask_other else []
    return f"{args.suite} ({'; '.join(parts)})" if parts else args.suite


def loading_options(suite: str) -> dict:
    """What `OpenVLAPolicy.from_pretrained` is told of a policy that acts in a simulator."""
    published = "_".join(suite.split("_")[:2])  # without LIBERO-PRO's changes
    return {
        "prefer": (suite, published, f"{published}_no_noops"),
        "image_options": {"jpeg_quality": None},  # the simulator's pictures have been through it
    }


def choose_cameras(metadata: dict, conventions) -> list[str]:
    """The simulator's cameras in the order in which the policy wants them: by name, also as LeRobot names them, or, if
    its training named others or none, the first ones."""
    trained = [name.removeprefix("observation.images.") for name in metadata.get("cameras") or []]
    if trained and set(trained) <= set(conventions.cameras):
        return trained
    if len(trained) > 1:
        print(f"note: the policy was trained with cameras {trained}; it gets the first ones", file=sys.stderr)
    return list(conventions.cameras[: metadata["num_cameras"]])


def choose_other(suite: str, task: int, episode: int) -> int:
    """Which other task is asked for in the scene of `task`: each that can be done there in its turn."""
    from openvla.evaluate.envs.libero import others

    found = list(others(suite, task))
    if not found:
        raise ValueError(f"No other task of {suite} can be done in the scene of task {task}: leave it out of --tasks.")
    return found[episode % len(found)]


class EpisodeLog:
    """`episodes.jsonl`: the settings, then a line per finished episode, on disk before the next one begins.

    Raises ValueError if the folder holds episodes of other settings.
    """

    def __init__(self, folder: Path, settings: dict):
        self.path = folder / "episodes.jsonl"
        self.episodes: dict[tuple[int, int], dict] = {}
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        whole = [json.loads(line) for line in lines[:-1]]  # the last is empty, or torn by a power cut
        if not whole:
            self._write([settings], "wb")
            return
        if whole[0] != settings:
            raise ValueError(
                f"{self.path} holds episodes of other settings ({tell_differences(whole[0], settings)}): choose "
                "another --output-dir, or remove it."
            )
        for line in whole[1:]:
            self.episodes[line["task"], line["episode"]] = line
        if lines[-1]:
            os.truncate(self.path, self.path.stat().st_size - len(lines[-1]))

    def add(self, line: dict) -> None:
        self.episodes[line["task"], line["episode"]] = line
        self._write([line], "ab")

    def _write(self, lines: list[dict], mode: str) -> None:
        with open(self.path, mode) as file:
            file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def _policy(args: argparse.Namespace, conventions) -> tuple:
    """What acts, and what it declares."""
    from openvla.evaluate.baselines import describe, make_baseline

    if args.baseline:
        policy = make_baseline(args.baseline, conventions, args.statistics, args.seed)
        return policy, policy.metadata
    if _is_address(args.checkpoint):
        from openvla.serve.client import ActClient

        client = ActClient(args.checkpoint, args.unnorm_key)
        metadata = client.metadata()
        if metadata is None:
            print("note: this server declares no conventions; they are taken for the simulator's", file=sys.stderr)
            assumed = describe(conventions, args.checkpoint) | {"unnorm_key": args.unnorm_key}
            del assumed["action_chunk"]  # the answers will tell
            return client, assumed
        if missing := {"action_dims", "num_cameras", "unnorm_key"} - set(metadata):
            raise ValueError(f"{args.checkpoint}/metadata does not tell {sorted(missing)}.")
        if metadata.get("jpeg_quality"):
            print("note: this server compresses pictures as JPEG; the simulator's have been already", file=sys.stderr)
        if args.unnorm_key not in (None, metadata["unnorm_key"]):
            raise ValueError(f"The server describes {metadata['unnorm_key']!r}, not {args.unnorm_key!r}.")
        if "num_denoising_steps" in metadata:
            client.needs += ("seed",)
        return client, metadata

    from openvla.serve.policy import OpenVLAPolicy

    options = loading_options(args.suite)
    if args.center_crop_area is not None:
        options["image_options"]["center_crop_area"] = args.center_crop_area
    policy = OpenVLAPolicy.from_pretrained(
        args.checkpoint,
        unnorm_key=args.unnorm_key,
        dtype=args.dtype,
        device=args.device,
        num_denoising_steps=args.num_denoising_steps,
        revision=args.revision,
        quantize=args.quantize,
        drafts=not args.no_drafts,
        **options,
    )
    return policy, policy.metadata | {"weights": policy.fingerprint(), "device": str(policy.model.device)}


def _versions(suite: str) -> dict[str, str]:
    """Of what decides about the outcome of an episode."""
    from importlib.metadata import version

    packages = {package: version(package) for package in ("torch", "transformers", "numpy")}
    return {**versions(suite), **packages, "MUJOCO_GL": os.environ.get("MUJOCO_GL", "")}


def _is_address(checkpoint: str | None) -> bool:
    return str(checkpoint).startswith(("http://", "https://"))
