"""What fewer bits cost and bring: a policy against itself quantised, on recorded frames, in turns, in one process.

python -m openvla.evaluate.bench_quantization --model openvla/openvla-7b --data bridge_orig/1.0.0 --frames 256
python -m openvla.evaluate.bench_quantization --model runs/cup/merged --data my_robot --methods nf4 torchao-fp8
python -m openvla.evaluate.bench_quantization --model runs/cup/merged --data demos/libero_object --device cpu \
    --dtype float32 --methods bfloat16 int8 torchao-int8 --json quantization.json

Agreement is with the policy as it is, not with what was recorded: `openvla evaluate --data … --quantize …` tells that.
"bfloat16" as a method quantises nothing: with --dtype float32 it shows what rounding alone does. Random weights have
other margins between tokens than a trained policy's: with --size, only time and memory say something.
"""

import argparse
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from openvla.cli import command_parser
from openvla.evaluate.bench_machine import describe_machine
from openvla.evaluate.bench_policies import SIZES, bench_config, random_policy
from openvla.quantization import METHODS, loading_options, plain_tensors

SEED = 0  # of the choice of frames, and of the noise that some heads start from


def choose_frames(reader, count: int, cameras: list[str]) -> list[dict]:
    """Observations for `OpenVLAPolicy.infer`, from as many episodes as possible; all there are if these are fewer."""
    rng, frames = np.random.default_rng(SEED), []
    share = -(-count // len(reader))
    for number in rng.permutation(len(reader)).tolist():
        episode = reader.read(number)
        for step in rng.permutation(len(episode))[:share].tolist():
            images = [episode.image(camera, step) for camera in cameras]
            frame = {"images": images, "instruction": episode.instructions[step], "seed": (SEED, number, step)}
            frames.append(frame | ({} if episode.proprio is None else {"proprio": episode.proprio[step]}))
        if len(frames) >= count:
            break
    return frames[:count]


def weight_bytes(model) -> int:
    """What parameters and buffers take in memory, with the scales of quantised ones; what is shared counts once."""
    tensors = [each for each in model.state_dict().values() if hasattr(each, "untyped_storage")]
    storages = [plain.untyped_storage() for each in [*tensors, *model.buffers()] for plain in plain_tensors(each)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def compare(reference, policy, frames: list[dict], progress=None) -> dict:
    """How a policy's answers differ from the reference's, and how long both take; who goes first alternates.

    Returns shares `tokens_equal` (None without tokens) and `actions_equal` (of whole actions), `difference` `[A]` (the
    mean absolute one, in the units of the statistics), and `milliseconds` and `reference_milliseconds` of each frame.
    """
    found = {"tokens": [], "actions": [], "difference": [], "milliseconds": [], "reference_milliseconds": []}
    for each in (reference, policy):  # the first pass of all pays for what is made once
        each.infer(frames[0])
    for index, frame in enumerate(frames):
        order = (reference, policy) if index % 2 else (policy, reference)
        answers = {id(each): each.infer(frame) for each in order}
        theirs, ours = answers[id(reference)], answers[id(policy)]
        if "token_ids" in ours:
            found["tokens"].append(ours["token_ids"] == theirs["token_ids"])
        found["actions"].append((ours["actions"] == theirs["actions"]).all(axis=1))
        found["difference"].append(np.abs(ours["actions"] - theirs["actions"]))
        found["milliseconds"].append(ours["timing"]["infer_ms"])
        found["reference_milliseconds"].append(theirs["timing"]["infer_ms"])
        if progress is not None:
            progress.update()
    return {
        "tokens_equal": float(np.mean(found["tokens"])) if found["tokens"] else None,
        "actions_equal": float(np.mean(found["actions"])),
        "difference": np.concatenate(found["difference"]).mean(axis=0).tolist(),
        "milliseconds": found["milliseconds"],
        "reference_milliseconds": found["reference_milliseconds"],
    }


def quartiles(values: list[float], digits: int) -> list[float]:
    """First quartile, median, third quartile."""
    found = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [round(value, digits) for value in found]


def save_random(size: str, model: str, folder: str) -> None:
    """A policy of random weights, with the processor and the statistics of another."""
    import torch

    from openvla.loading import load

    given, processor = load(model)
    policy = random_policy(bench_config(size), torch.bfloat16, "cpu")
    policy.norm_stats = given.norm_stats
    policy.save_pretrained(folder)
    processor.save_pretrained(folder)


def measure(args: argparse.Namespace, checkpoint: str) -> dict:
    """All numbers, of a checkpoint and of the options of `main`."""
    import torch
    from tqdm import tqdm

    from openvla.evaluate.offline import quiet
    from openvla.evaluate.offline_report import name_dims
    from openvla.finetune.readers import open_reader
    from openvla.finetune.steps import choose_cameras
    from openvla.serve.policy import OpenVLAPolicy

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for method in set(args.methods) & set(METHODS):  # what cannot be is said before anything is loaded
        loading_options(method, {"device_map": device, "dtype": args.dtype})
    reader = open_reader(args.data)

    def open_policy(quantize: str | None = None, dtype: str = args.dtype):
        crop = {} if args.center_crop_area is None else {"center_crop_area": args.center_crop_area}
        options = {"image_options": crop, "prefer": (reader.name,), "quantize": quantize}
        return OpenVLAPolicy.from_pretrained(checkpoint, args.unnorm_key, dtype, device, **options)

    # 1. The reference, and what it sees
    reference = open_policy()
    metadata = reference.metadata
    cameras = choose_cameras(reader, metadata["num_cameras"], args.cameras, metadata["cameras"])
    frames = choose_frames(reader, args.frames, cameras)

    # 2. Every method beside it, one after the other
    rows, times = [], []
    total = len(args.methods) * len(frames)
    with quiet(), tqdm(total=total, unit="frame", disable=not sys.stderr.isatty()) as progress:
        for method in args.methods:
            progress.set_description(method)
            policy = open_policy(dtype=method) if method == "bfloat16" else open_policy(method)
            row = {"method": method, "bytes": weight_bytes(policy.model)}
            row |= compare(reference, policy, frames, progress)
            mine, theirs = row.pop("milliseconds"), row.pop("reference_milliseconds")
            times += theirs
            ratios = [slow / fast for slow, fast in zip(theirs, mine)]
            rows.append(row | {"milliseconds": quartiles(mine, 2), "times_as_fast": quartiles(ratios, 3)})
            del policy

    return {
        "model": f"{args.size} (random weights)" if args.size else args.model,
        "parameters": sum(parameter.numel() for parameter in reference.model.parameters()),
        "data": args.data,
        "unnorm_key": reference.unnorm_key,
        "frames": len(frames),
        "action_chunk": metadata["action_chunk"],
        "dims": name_dims(reference.model.norm_stats, reference.unnorm_key, reader),
        "dtype": args.dtype,
        **describe_machine(device),
        "reference": {"bytes": weight_bytes(reference.model), "milliseconds": quartiles(times, 2)},
        "methods": rows,
    }


def format_tables(result: dict) -> str:
    reference, machine = result["reference"], result["hardware"]
    lines = [
        f"{result['model']}, {result['parameters'] / 1e6:.0f} M parameters, {result['dtype']}, {machine['name']}, "
        f"{machine['threads']} threads; {result['frames']} frames of {result['data']}",
        f"{'':<14}{'tokens equal':>14}{'actions equal':>15}{'MiB':>9}{'ms':>9}{'quartiles':>18}   times as fast",
    ]
    for row in [{"method": "reference", **reference}, *result["methods"]]:
        low, middle, high = row["milliseconds"]
        shares = [
            f"{row[name]:.1%}" if row.get(name) is not None else "" for name in ("tokens_equal", "actions_equal")
        ]
        fast = "{1:.2f} ({0:.2f} to {2:.2f})".format(*row["times_as_fast"]) if "times_as_fast" in row else ""
        lines.append(
            f"{row['method']:<14}{shares[0]:>14}{shares[1]:>15}{row['bytes'] / 2**20:>9.1f}{middle:>9.1f}"
            f"{f'{low:.1f} to {high:.1f}':>18}   {fast}".rstrip()
        )
    lines += ["", "mean absolute difference per action dim"]
    lines.append(f"{'':<14}" + "".join(f"{name:>15}" for name, _ in result["dims"]))
    lines.append(f"{'':<14}" + "".join(f"{unit:>15}" for _, unit in result["dims"]))
    for row in result["methods"]:
        lines.append(f"{row['method']:<14}" + "".join(f"{value:>15.3g}" for value in row["difference"]))
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = command_parser("bench", __doc__)
    parser.prog = "python -m openvla.evaluate.bench_quantization"
    add = parser.add_argument
    add("--model", required=True, metavar="PATH_OR_ID", help="a checkpoint that is not quantised")
    add("--size", choices=SIZES, help="instead: a policy of random weights, with its processor and statistics")
    add("--data", required=True, metavar="DATASET", help="LeRobot, RLDS, HDF5, plain folder, or Hub id")
    names = [*METHODS, "bfloat16"]
    add("--methods", nargs="+", choices=names, default=names[:3], metavar="METHOD", help=f"of {', '.join(names)}")
    add("--frames", type=int, default=64, help="chosen at random, from as many episodes as possible (64)")
    add("--unnorm-key", help="whose statistics to act with; default: the dataset's, or the only ones")
    add("--cameras", nargs="+", help="in the policy's order; default: those of its training, or the first ones")
    add("--center-crop-area", type=float, metavar="SHARE", help="default: as the checkpoint declares")
    add("--dtype", default="bfloat16", help="of the reference, and of what is not quantised: bfloat16, float32")
    add("--device", help="cuda, cpu, …; default: cuda if there is one")
    add("--threads", type=int, help="CPU threads; default: torch's choice")
    add("--json", metavar="FILE", help="also write the result to a file")
    args = parser.parse_args(argv)
    if args.frames < 1:
        raise ValueError(f"Expected --frames of 1 or more, got {args.frames}.")

    import torch

    from openvla.evaluate.report import write_json

    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if args.size:
            save_random(args.size, args.model, folder)
        command = shlex.join([*parser.prog.split(), *argv])
        result = {"command": command, **measure(args, folder if args.size else args.model)}
    if args.json:
        write_json(Path(args.json), result)
    print(format_tables(result))


if __name__ == "__main__":
    main(sys.argv[1:])
