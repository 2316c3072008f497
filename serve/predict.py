"""Acts once: image and instruction in, action out, or a chunk of them.

openvla predict --model openvla/openvla-7b --image frame.png --instruction "pick up the cup" --unnorm-key bridge_orig
openvla predict --model runs/my-robot --image http://camera.local/frame.jpg --instruction "open the drawer" --json
openvla predict --model runs/my-robot --image front.png wrist.png --instruction "open the drawer" --strict
openvla predict --model runs/oft --image front.png wrist.png --proprio 0.1 0.2 0.3 0 0 0 0.04 -0.04 \
    --instruction "open the drawer"
"""

import argparse
import json
import sys

from openvla import quantization
from openvla.cli import command_parser

MOST_COLUMNS = 8  # steps of a chunk side by side; longer ones are printed one below the other


def parser() -> argparse.ArgumentParser:
    arguments = command_parser("predict", __doc__)
    arguments.add_argument("--model", required=True, metavar="PATH_OR_ID", help="folder or Hub id of a checkpoint")
    arguments.add_argument(
        "--image", required=True, nargs="+", metavar="FILE_OR_URL", help="one per camera, in the policy's order"
    )
    arguments.add_argument("--instruction", required=True, help='what to do, such as "pick up the cup"')
    arguments.add_argument(
        "--proprio", type=float, nargs="+", metavar="NUMBER", help="the robot's state, in the units of the dataset"
    )
    arguments.add_argument("--unnorm-key", help="dataset whose statistics give the units; optional if there is one")
    arguments.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, float16")
    arguments.add_argument("--device", help="cuda, cpu, …; default: cuda if there is one")
    quantization.add_argument(arguments)
    arguments.add_argument("--revision", help="branch, tag or commit on the Hub")
    arguments.add_argument(
        "--center-crop-area",
        type=float,
        metavar="SHARE",
        help="0.9 for policies fine-tuned with random crops (LIBERO); default: as the checkpoint declares",
    )
    arguments.add_argument("--action-chunk", type=int, metavar="STEPS", help="of a folder of OpenVLA-OFT's training")
    arguments.add_argument("--num-cameras", type=int, metavar="COUNT", help="of a folder of OpenVLA-OFT's training")
    arguments.add_argument(
        "--seed", type=int, help="of the noise that some heads start from; default: another each time"
    )
    arguments.add_argument("--strict", action="store_true", help="fail if the model prefers a token that is no action")
    arguments.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return arguments


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)

    import torch

    from openvla.action_tokenizer import name_action_dims, resolve_unnorm_key
    from openvla.loading import load_onto

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    told = {name: getattr(args, name) for name in ("revision", "action_chunk", "num_cameras")}
    model, processor = load_onto(device, args.model, args.quantize, dtype=args.dtype, **told)
    unnorm_key = resolve_unnorm_key(model.norm_stats, args.unnorm_key)
    crop = {} if args.center_crop_area is None else {"center_crop_area": args.center_crop_area}
    cropped = "cameras" not in model.norm_stats[unnorm_key]  # else our training declared it, if there were crops
    if unnorm_key.startswith("libero") and cropped and not crop and processor.image_processor.center_crop_area is None:
        print("note: LIBERO policies were trained with crops; consider --center-crop-area 0.9", file=sys.stderr)
    if (given := len(args.proprio or ())) != model.config.proprio_dim:
        raise ValueError(
            f"The policy takes {model.config.proprio_dim or 'no'} numbers of the robot's state, got "
            f"{given or 'none'}: see --proprio."
        )
    inputs = processor(processor.build_prompt(args.instruction), args.image, args.proprio, **crop).to(device)
    options = {"unnorm_key": unnorm_key, "strict": args.strict, "noise": model.draw_noise([args.seed])}
    result = model.predict_action(**inputs, **options, return_dict=True)

    dims = name_action_dims(model.norm_stats, unnorm_key)
    chunk = result["actions"].reshape(-1, len(dims))  # (T, A)
    if args.json:
        answer = {"action": result["actions"].tolist(), "unnorm_key": unnorm_key, "dims": dims}
        answer |= {name: result[name][0].tolist() for name in ("token_ids", "replaced") if name in result}
        print(json.dumps(answer))
        return
    print(f'{args.model} · {unnorm_key} · "{args.instruction}"\n')
    if len(chunk) > MOST_COLUMNS:
        print(f"{'step':<6}{''.join(f'{name:>12}' for name, _ in dims)}")
        print(f"{'':<6}{''.join(f'{unit:>12}' for _, unit in dims)}")
        for step, values in enumerate(chunk):
            print(f"{step:<6}{''.join(f'{value:>12.6f}' for value in values)}")
        return
    steps = "".join(f"{f'step {step}' if len(chunk) > 1 else 'value':>12}" for step in range(len(chunk)))
    print(f"{'dim':<12}{steps}  unit")
    for index, (name, unit) in enumerate(dims):
        print(f"{name:<12}{''.join(f'{value:>12.6f}' for value in chunk[:, index])}  {unit}")
