"""Prints a dataset's statistics as checkpoints hold them, after checking every episode.

openvla stats my_robot
openvla stats datasets/bridge_orig/1.0.0 --json > norm_stats.json
openvla stats my_robot --mask 1 1 1 1 1 1 0
"""

import json

from openvla.cli import command_parser


def main(argv: list[str]) -> None:
    parser = command_parser("stats", __doc__)
    parser.add_argument("data", help="LeRobot, RLDS, HDF5 or plain folder")
    parser.add_argument("--name", help="unnorm_key; default: the dataset's name")
    parser.add_argument(
        "--mask", nargs="+", type=int, metavar="0_OR_1", help="per action dim: 1 = normalise, 0 = leave"
    )
    parser.add_argument("--skip-bad-episodes", action="store_true", help="leave them out and say why")
    parser.add_argument("--json", action="store_true", help='print {"unnorm_key": {…}} as in config.norm_stats')
    args = parser.parse_args(argv)

    from openvla.action_tokenizer import name_action_dims
    from openvla.finetune.readers import open_reader
    from openvla.finetune.statistics import scan

    reader = open_reader(args.data, args.name)
    mask = None if args.mask is None else [bool(value) for value in args.mask]
    found = scan(reader, args.skip_bad_episodes, mask)
    norm_stats = {reader.name: found.norm_stats}
    if args.json:
        print(json.dumps(norm_stats, indent=2))
        return
    stats = found.norm_stats
    print(f"{reader.name}: {stats['num_trajectories']} episodes, {stats['num_transitions']} steps, {reader.cameras}\n")
    columns = ("min", "q01", "mean", "q99", "max", "std")
    print(f"{'dim':<12}{''.join(f'{column:>11}' for column in columns)}  normalised")
    for index, (name, _) in enumerate(name_action_dims(norm_stats, reader.name)):
        values = "".join(f"{stats['action'][column][index]:>11.5f}" for column in columns)
        print(f"{name:<12}{values}  {'yes' if stats['action']['mask'][index] else 'no'}")
    for problem in found.skipped:
        print(f"skipped: {problem}")
