"""Turns any dataset we read into a LeRobot v3.0 dataset, for lerobot, its viewers and the Hub, and for fast reading.

openvla data convert datasets/bridge_orig/1.0.0 bridge_lerobot --fps 5
openvla data convert libero_spatial libero_lerobot --fps 20 --cameras agentview_rgb eye_in_hand_rgb
openvla data convert my_robot my_robot_lerobot --images --episodes 10
openvla data convert my_old_lerobot_v2 my_lerobot_v3 --codec h264 --skip-bad-episodes

Kept are actions and states (bit by bit), instructions, and frames: as AV1 video like lerobot's own (a keyframe every
two frames, quality 30), or without any loss with --images. Actions and states are written as training sees them: RLDS
episodes of datasets that OpenVLA knows come standardised, so nothing has to know the dataset's name afterwards. OUT
appears when all is written, or not at all.
"""

from pathlib import Path

import numpy as np

from openvla.cli import command_parser
from openvla.finetune.lerobot_writer import ENCODERS, INDEX_FEATURES, MEGABYTE, LeRobotWriter
from openvla.finetune.steps import Reader


def convert(reader: Reader, writer: LeRobotWriter, num_episodes: int, skip_bad: bool = False) -> list[str]:
    """Copies the first episodes; returns what was wrong with those that were skipped."""
    from tqdm import tqdm

    skipped = []
    for index in tqdm(range(num_episodes), desc=f"convert {reader.name}", unit="episode"):
        try:
            writer.add_episode(reader.read(index))
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{error} (--skip-bad-episodes leaves such episodes out)") from error
            skipped.append(str(error))
    return skipped


def report(folder: Path, info: dict) -> str:
    """What was written, in a few lines."""
    features = {key: feature for key, feature in info["features"].items() if key not in INDEX_FEATURES}
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    frames = [feature for feature in features.values() if feature["dtype"] in ("video", "image")]
    raw = info["total_frames"] * sum(int(np.prod(feature["shape"])) for feature in frames)
    kinds = {feature["info"]["video.codec"] if "info" in feature else "png" for feature in frames}
    amount = f"{info['total_episodes']} episodes, {info['total_frames']} steps at {info['fps']} per second"
    lines = [f"{folder}: {amount}, {info['total_tasks']} instructions"]
    lines += [f"  {key:<32} {feature['dtype']:<8} {feature['shape']}" for key, feature in features.items()]
    compression = f", {raw / size:.1f} times less than raw pixels ({', '.join(kinds)})" if raw else ""
    return "\n".join([*lines, f"  {size / MEGABYTE:.1f} MB on disk{compression}"])


def main(argv: list[str]) -> None:
    parser = command_parser("data convert", __doc__)
    parser.add_argument("source", help="RLDS, HDF5, plain folder, or LeRobot v2 or v3")
    parser.add_argument("out", help="folder to write; its name is the unnorm_key of policies trained on it")
    parser.add_argument("--fps", type=float, help="steps per second, where the source does not say (RLDS, HDF5)")
    parser.add_argument("--cameras", nargs="+", help="which; default: all")
    parser.add_argument("--name", help="the source's name, by which RLDS episodes are standardised")
    parser.add_argument("--robot-type", help="free text for meta/info.json")
    parser.add_argument("--episodes", type=int, metavar="N", help="only the first N")
    parser.add_argument("--images", action="store_true", help="lossless PNG instead of video")
    parser.add_argument("--codec", choices=ENCODERS, help="of the videos; default: av1 if PyAV can, else h264")
    parser.add_argument("--skip-bad-episodes", action="store_true", help="leave them out and say why")
    parser.add_argument("--overwrite", action="store_true", help="replace the LeRobot dataset at OUT")
    args = parser.parse_args(argv)

    from openvla.finetune.oxe import STANDARDIZE
    from openvla.finetune.readers import open_reader

    source, out = Path(args.source).expanduser().resolve(), Path(args.out).expanduser().resolve()
    if out == source or out in source.parents:
        raise ValueError(f"Writing {out} would remove the source: choose another folder.")
    reader = open_reader(args.source, args.name)
    if not (fps := args.fps or reader.fps):
        raise ValueError(f"{args.source} does not say how many steps there are per second: pass --fps, e.g. --fps 5.")
    cameras = args.cameras or reader.cameras
    if unknown := [camera for camera in cameras if camera not in reader.cameras]:
        raise ValueError(f"{reader.name} has no cameras {unknown}; it has {reader.cameras}.")
    options = {"codec": args.codec, "overwrite": args.overwrite, "robot_type": args.robot_type}
    num_episodes = min(args.episodes or len(reader), len(reader))
    with LeRobotWriter(out, fps, cameras, use_videos=not args.images, **options) as writer:
        skipped = convert(reader, writer, num_episodes, args.skip_bad_episodes)
    print(report(writer.folder, writer.info))
    if (source / "features.json").exists() and reader.name in STANDARDIZE:
        print(f"  actions and states are standardised as OpenVLA does for {reader.name}")
    for problem in skipped:
        print(f"  skipped: {problem}")
    if skipped:
        print(f"  {len(skipped)} of {num_episodes} episodes were skipped")
    print(f"next: openvla finetune --data {args.out} --model openvla/openvla-7b --output_dir runs/{out.name}")
