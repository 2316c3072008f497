"""Makes demonstrations in a simulator with scripted experts, as a dataset to fine-tune on.

openvla demos libero_object --cameras agentview wrist --workers 2
openvla demos libero_spatial --tasks 0,3-5 --episodes 10-19 --noise 0.01 --renderer fast --out demos/spatial
openvla demos libero_goal --random 50 --format both
openvla demos libero_spatial --random 30 --noise 0 --push 0.03 --other-share 0.3
openvla demos libero_spatial --random 20 --seed 1000 --noise 0 --push 0.02 --lead runs/my-policy/merged
openvla demos libero_object --random 20 --noise 0 --push 0.03 --other-share 0.8 --shuffle
openvla demos libero_object --random 200 --first 12 --noise 0 --push 0.5 --other-share 0.8 --shuffle
openvla demos metaworld --tasks 0-4
openvla demos libero_object --tasks 0 --cameras none --out demos/actions_only
openvla demos --replay demos/libero_object --tokenize

Every step is what was there before an action, and the action that was carried out. Episodes in which the task is not
done at the end are counted and left out (unless --first ends them); none is tried twice. Actions that do nothing (no
motion, gripper as before) are neither carried out nor recorded, as in the published no_noops data. A command that was
stopped goes on when it is given again; the dataset does not depend on that, nor on --workers.

lerobot: OUT is a LeRobot v3.0 dataset. Pictures of 256 pixels are oriented as the published RLDS data (LIBERO's are
turned by 180 degrees: upright but mirrored), actions are as policies speak them: in LIBERO x y z (1 = 5 cm), roll
pitch yaw (1 = 0.5 rad), gripper 1 = open. observation.state is the end effector and the fingers.

hdf5: a file per task, as LIBERO publishes them: pictures upside down as OpenGL has them, the gripper -1 = open and
+1 = closed, and the simulator's state at every step. With --format both they are in OUT/hdf5.

OUT/meta also holds demonstrations.json (settings, versions, every episode) and initial_states.npz, from which
--replay carries out all actions again, blindly; --tokenize sends them through normalisation and the 256 bins first,
which tells what is left of them. (An expert who sees where tokens lead: openvla evaluate --baseline expert-tokens.)
"""

import argparse
import contextlib
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from openvla.cli import command_parser, parse_numbers
from openvla.evaluate.envs import HELD_OUT, list_tasks, open_env, versions

FORMATS = {"lerobot": ("lerobot",), "hdf5": ("hdf5",), "both": ("lerobot", "hdf5")}


def parser() -> argparse.ArgumentParser:
    arguments = command_parser("demos", __doc__)
    arguments.add_argument("suite", nargs="?", help="libero_spatial, libero_goal_swap, metaworld, …")
    arguments.add_argument("--tasks", default="all", help="numbers such as 0,3-5; default: all")
    which = arguments.add_mutually_exclusive_group()
    which.add_argument(
        "--episodes",
        default="10-49",
        help="initial states of each task by number; default: 10-49, because 0-9 are kept for evaluation",
    )
    which.add_argument("--random", type=int, metavar="N", help="instead: N random placements per task")
    arguments.add_argument("--seed", type=int, default=0, help="of the noise; with --random the first placement, too")
    arguments.add_argument("--noise", type=float, default=0.01, help="of the expert's aim, metres per step")
    arguments.add_argument(
        "--push",
        type=float,
        default=0.0,
        metavar="P",
        help="push the arm off its way with this probability per step, unrecorded: every way back is an episode of "
        "its own, from where policies err to; with --noise 0 its actions are exact; LIBERO only",
    )
    arguments.add_argument(
        "--lead",
        metavar="POLICY",
        help="a policy acts for a while at the start and, with --push's probability, in place of a push; not "
        "recorded: the expert shows what to do from where the policy got to; LIBERO only",
    )
    arguments.add_argument(
        "--lead-steps",
        type=int,
        metavar="N",
        help="it acts for 1 to N steps at a time; default: 120; from where an untrained one gets to in so many, the "
        "expert seldom does the task",
    )
    arguments.add_argument(
        "--other-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the episodes in which the scene is asked for another task of the suite: the same pictures, other "
        "words, other actions; LIBERO only",
    )
    arguments.add_argument(
        "--first",
        type=int,
        metavar="N",
        help="play and record only the first N steps of an episode, from where --lead or up to three pushes got to: "
        "what to go for is decided there, and many more scenes take the same time",
    )
    arguments.add_argument(
        "--shuffle",
        action="store_true",
        help="with --random: things change places; with --other-share, words alone then tell where to go; "
        "libero_object only",
    )
    arguments.add_argument("--cameras", nargs="+", help="default: the main one; none: actions and states only")
    arguments.add_argument(
        "--renderer",
        choices=("official", "fast"),
        default="official",
        help="fast: 4x faster on a CPU, pictures differ by 2.3/255 in the mean",
    )
    arguments.add_argument("--keep-no-ops", action="store_true", help="carry out and record actions that do nothing")
    arguments.add_argument("--extra-steps", type=int, default=0, metavar="N", help="go on after success; default: 0")
    arguments.add_argument("--out", help="folder to write; its name is the policies' unnorm_key; default: demos/SUITE")
    arguments.add_argument("--format", choices=FORMATS, default="lerobot")
    arguments.add_argument("--codec", choices=("av1", "h264"), help="of LeRobot's videos; default: av1 if possible")
    arguments.add_argument("--overwrite", action="store_true", help="replace the dataset at OUT")
    arguments.add_argument("--workers", type=int, default=1, help="processes, a simulator each; default: 1")
    arguments.add_argument("--videos", type=int, default=1, metavar="N", help="previews per task; default: 1")
    arguments.add_argument("--keep-parts", action="store_true", help="leave .NAME.parts beside OUT")
    arguments.add_argument("--replay", metavar="FOLDER", help="carry out the actions of a dataset of this command")
    arguments.add_argument("--tokenize", action="store_true", help="with --replay: through tokens and back")
    arguments.add_argument("--json", metavar="FILE", help="with --replay: write the result there, too")
    return arguments


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if args.workers < 1:
        raise ValueError(f"Expected --workers of 1 or more, got {args.workers}.")
    if args.replay:
        replay(Path(args.replay).expanduser(), args)
        return
    if args.suite is None:
        raise ValueError("Expected a suite such as libero_object, or --replay FOLDER.")
    if args.tokenize or args.json:
        raise ValueError("--tokenize and --json belong to --replay.")
    make(args)


# --- Making ----------------------------------------------------------------------------------------------------------
def make(args: argparse.Namespace) -> None:
    from openvla.evaluate.demos.parts import Part, Recorder, open_parts, part_name
    from openvla.evaluate.demos.writing import write_datasets
    from openvla.evaluate.processes import run_in_processes

    # 1. What is asked: checked before anything long begins
    settings = read_settings(args)
    policy, cameras = open_lead(args, settings) if args.lead else (None, None)
    settings = replace(settings, lead=policy.fingerprint() if policy else None)
    out = Path(args.out or Path("demos", args.suite)).expanduser().absolute()
    check_out(out, args)
    folder = out.with_name(f".{out.name}.parts")
    open_parts(folder, {**asdict(settings), "versions": versions(args.suite)})

    # 2. The episodes
    jobs = [(task, episode) for task in settings.tasks for episode in settings.episodes]
    missing = [job for job in jobs if not (folder / part_name(*job)).exists()]
    if len(missing) < len(jobs):
        print(f"{len(jobs) - len(missing)} of {len(jobs)} episodes are in {folder} already", file=sys.stderr)
    record = Recorder(settings, folder, cameras)
    with _progress(len(jobs), len(jobs) - len(missing)) as note:
        try:
            run_in_processes(
                record,
                missing,
                args.workers,
                note,
                # one by one: in a batch they might be rounded otherwise
                policy and (lambda observations: list(map(policy.infer, observations))),
                lambda job: f"{args.suite} task {job[0]} episode {job[1]}",
            )
        except (KeyboardInterrupt, RuntimeError):
            print(f"finished episodes are in {folder}; the same command goes on from there", file=sys.stderr)
            raise

    # 3. The dataset
    parts = [Part(folder / part_name(*job)) for job in jobs]
    facts = [part.facts for part in parts]
    print(format_summary(facts))
    description = describe(asdict(settings), versions(args.suite), facts)
    write_datasets(out, parts, FORMATS[args.format], description, args.overwrite, args.videos, args.codec)
    if not args.keep_parts:
        shutil.rmtree(folder)
    print(f"\n{out}")
    if args.format != "hdf5":
        print(f"next: openvla finetune --data {out} --model openvla/openvla-7b --output_dir runs/{out.name}")
        print(f"then: openvla evaluate runs/{out.name}/merged --suite {args.suite} --episodes 0-{HELD_OUT - 1}")


def read_settings(args: argparse.Namespace):
    """What the options say, as `Settings`."""
    from openvla.evaluate.demos.parts import Settings

    if args.extra_steps < 0 or args.noise < 0:
        raise ValueError(f"--extra-steps and --noise must not be negative, got {args.extra_steps} and {args.noise}.")
    if not 0 <= args.push < 1 or not 0 <= args.other_share <= 1:
        raise ValueError(f"Expected --push and --other-share from 0 to 1, got {args.push} and {args.other_share}.")
    apart = args.push or args.lead or args.other_share
    if apart and (args.format != "lerobot" or not args.suite.startswith("libero")):
        raise ValueError("--push, --lead and --other-share are for LIBERO's suites, and for --format lerobot.")
    if args.lead_steps is not None and (args.lead_steps < 1 or not args.lead):
        raise ValueError(f"Expected --lead-steps of 1 or more, with --lead, got {args.lead_steps}.")
    if args.first is not None and (args.first < 1 or args.extra_steps):
        raise ValueError(f"Expected --first of 1 or more, without --extra-steps, got {args.first}.")
    if args.first and args.format != "lerobot":
        raise ValueError("--first is for --format lerobot: HDF5 files say of their last step that the task is done.")
    if args.shuffle:
        from openvla.evaluate.envs.libero import SHUFFLED

        if args.random is None or args.suite not in SHUFFLED:
            raise ValueError(f"--shuffle is for --random placements of {', '.join(SHUFFLED)}.")
    if args.format != "lerobot" and not args.suite.startswith("libero"):
        raise ValueError(f"--format {args.format} is LIBERO's layout, which {args.suite} does not fit: use lerobot.")
    tasks = parse_numbers(args.tasks, len(list_tasks(args.suite)), "tasks")
    if args.other_share:
        from openvla.evaluate.envs.libero import others

        if alone := [task for task in tasks if not others(args.suite, task)]:
            print(f"note: no other task of {args.suite} can be done in the scenes of {alone}", file=sys.stderr)
    if args.random is not None:
        if args.random < 1 or args.seed < 0:
            raise ValueError(
                f"Expected --random of 1 or more and --seed of 0 or more, got {args.random}, {args.seed}."
            )
        episodes = list(range(args.seed, args.seed + args.random))
    else:
        env = open_env(args.suite, 0)
        episodes = parse_numbers(args.episodes, env.num_episodes, "episodes")
        env.close()
        if held_out := [episode for episode in episodes if episode < HELD_OUT]:
            print(
                f"note: initial states 0-{HELD_OUT - 1} are for evaluation; {held_out} are among them",
                file=sys.stderr,
            )
    return Settings(
        suite=args.suite,
        tasks=tasks,
        episodes=episodes,
        randomize=args.random is not None,
        seed=args.seed,
        noise=args.noise,
        cameras=[] if args.cameras == ["none"] else args.cameras,
        renderer=args.renderer,
        keep_no_ops=args.keep_no_ops,
        extra_steps=args.extra_steps,
        other_share=args.other_share,
        push=args.push,
        lead_steps=args.lead_steps or Settings.lead_steps,
        shuffle=args.shuffle,
        first=args.first,
    )


def open_lead(args: argparse.Namespace, settings):
    """The policy that leads, and the simulator's cameras in its order."""
    from openvla.evaluate.simulate import choose_cameras, loading_options
    from openvla.serve.policy import OpenVLAPolicy

    policy = OpenVLAPolicy.from_pretrained(args.lead, seed=args.seed, **loading_options(args.suite))
    env = open_env(args.suite, settings.tasks[0])
    conventions = env.conventions
    env.close()
    conventions.check(policy.metadata)
    return policy, choose_cameras(policy.metadata, conventions)


def check_out(out: Path, args: argparse.Namespace) -> None:
    """Raises for what would fail only after hours: `out` that must not be replaced, packages that are missing."""
    if out.exists() and not args.overwrite:
        raise FileExistsError(f"{out} is there already: choose another --out, or --overwrite it.")
    mark = out / "meta" / ("demonstrations.json" if args.format == "hdf5" else "info.json")
    if out.exists() and not mark.exists():
        raise FileExistsError(f"{out} is no dataset of this command: remove it yourself.")
    try:
        import av  # noqa: F401
        import h5py  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(f"Writing datasets needs more packages ({error}): pip install 'openvla[sim]'.") from error
    if args.format != "hdf5" and args.cameras != ["none"]:
        from openvla.finetune.lerobot_writer import choose_encoder

        choose_encoder(args.codec)


@contextlib.contextmanager
def _progress(total: int, done: int):
    """A bar; gives the function to call after every episode with its job and facts."""
    from tqdm import tqdm

    successes, start = [], time.perf_counter()
    with tqdm(total=total, initial=done, unit="episode", dynamic_ncols=True) as bar:

        def note(job, facts, restarts) -> None:
            successes.append(facts["success"])
            rate = sum(successes) / (time.perf_counter() - start) * 3600
            bar.set_postfix_str(f"kept {sum(successes)}/{len(successes)}, {rate:.0f} an hour", refresh=False)
            bar.update()

        yield note


def describe(settings: dict, versions: dict, facts: list[dict]) -> dict:
    """For `meta/demonstrations.json`: settings, versions, how many of each task were tried and kept, which failed.
    Nothing in it depends on the run, such as time."""
    tasks, instructions = [], list_tasks(settings["suite"])
    for task in settings["tasks"]:
        tried = [each for each in facts if each["task"] == task]
        kept = sum(each["success"] for each in tried)
        tasks.append({"task": task, "instruction": instructions[task], "tried": len(tried), "succeeded": kept})
    failed = [
        {name: each[name] for name in ("task", "episode", "seed", "steps")}
        for each in facts
        if not each["success"] and "alone" not in each
    ]
    return {"settings": settings, "versions": versions, "tasks": tasks, "failed": failed}


def format_summary(facts: list[dict]) -> str:
    """A line per task, and where the time went."""
    lines = [f"{'task':>4}  {'kept':>7}  {'rate':>5}  {'steps':>5}  {'no-ops':>6}  instruction"]
    tasks = dict.fromkeys(each["task"] for each in facts)
    for task in [*tasks, None]:
        tried = [each for each in facts if task in (None, each["task"])]
        kept = [each for each in tried if each["success"]]
        steps = f"{sum(each['steps'] for each in kept) / len(kept):.0f}" if kept else "-"
        own = next((each["instruction"] for each in tried if "asked" not in each), "")
        label, instruction = ("all", "") if task is None else (task, own)
        lines.append(
            f"{label:>4}  {f'{len(kept)}/{len(tried)}':>7}  {len(kept) / len(tried):>5.0%}  {steps:>5}  "
            f"{sum(each['no_ops'] for each in tried):>6}  {instruction}".rstrip()
        )
    if alone := sum(each.get("alone", False) for each in facts):
        lines.append(f"\n{alone} were done by the policy before the expert's turn: nothing to record")
    kinds = sorted({kind for each in facts for kind in each["cpu_seconds"]})
    seconds = {kind: sum(each["cpu_seconds"].get(kind, 0.0) for each in facts) for kind in kinds}
    total = sum(seconds.values())
    shares = ", ".join(f"{kind} {seconds[kind] / total:.0%}" for kind in sorted(kinds, key=seconds.get, reverse=True))
    lines.append(
        f"\n{len(kept) / total * 3600:.0f} demonstrations per hour and core; {total:.0f} s of processor time: {shares}"
    )
    return "\n".join(lines)


# --- Replaying -------------------------------------------------------------------------------------------------------
def replay(folder: Path, args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from openvla.evaluate.demos.replay import open_replayer, report
    from openvla.evaluate.processes import run_in_processes
    from openvla.evaluate.report import write_json

    replayer = open_replayer(folder, args.tokenize)
    count = len(replayer.description["episodes"])
    successes: dict[int, bool] = {}
    with tqdm(total=count, unit="episode", dynamic_ncols=True) as bar:

        def note(index: int, success: bool, restarts: int) -> None:
            successes[index] = success
            bar.set_postfix_str(f"succeeded {sum(successes.values())}/{len(successes)}", refresh=False)
            bar.update()

        run_in_processes(replayer, range(count), args.workers, note, name=lambda index: f"{folder} episode {index}")
    found = report(replayer, successes)
    instructions = {entry["task"]: entry["instruction"] for entry in replayer.description["tasks"]}
    for entry in [*found["tasks"], {**found, "task": "all"}]:
        share = f"{entry['succeeded']}/{entry['replayed']}"
        rate = entry["succeeded"] / entry["replayed"]
        print(f"{entry['task']:>4}  {share:>7}  {rate:>5.0%}  {instructions.get(entry['task'], '')}".rstrip())
    for entry in found["failed"]:
        print(f"not done again: episode {entry['index']} (task {entry['task']}, initial state {entry['episode']})")
    if args.json:
        write_json(Path(args.json), found)
