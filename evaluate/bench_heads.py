"""Milliseconds per chunk of actions, for every head, in turns, in one process.

python -m openvla.evaluate.bench_heads
python -m openvla.evaluate.bench_heads --size tiny --repeats 10 --json heads.json
python -m openvla.evaluate.bench_heads --device cuda --dtype bfloat16 --repeats 20

Weights are random: speed depends on shapes only. All policies take the same images, state and prompt, and share towers
and projector. "l1, as the original" does what the code of OpenVLA-OFT does beside what its actions need: towers run
image by image, the hidden states of all layers are kept, and lm_head projects every position onto the vocabulary, in
float32. Ratios are medians over rounds, each against "l1" of the same round.
"""

import json
import os
import platform
import statistics
import sys
import time

from openvla.cli import command_parser

PARALLEL = {"attention": "bidirectional"}
# way -> fields of its policy
WAYS = {
    "token, one by one": {},
    "token, in parallel": PARALLEL,
    "l1": {**PARALLEL, "action_head": "l1"},
    "l1, as the original": {**PARALLEL, "action_head": "l1"},
    "flow, 10 steps": {"attention": "prefix", "action_head": "flow"},
    "flow, 10 steps, bidirectional": {**PARALLEL, "action_head": "flow"},
    "diffusion, 50 steps, prefix": {"attention": "prefix", "action_head": "diffusion"},
    "diffusion, 50 steps": {**PARALLEL, "action_head": "diffusion"},
}


def build(size: str, chunk: int, cameras: int, dtype, device: str) -> dict:
    """A policy per way."""
    import torch

    from openvla.configuration_openvla import OpenVLAConfig
    from openvla.evaluate.bench import random_policy
    from openvla.modeling_openvla import OpenVLAForActionPrediction

    base = random_policy(size)
    shared = {"action_chunk": chunk, "action_dim": 7, "num_cameras": cameras, "proprio_dim": 8}
    policies = {}
    for way, fields in WAYS.items():
        torch.manual_seed(0)
        config = OpenVLAConfig(**{**base.config.to_dict(), "action_slot_id": None, **shared, **fields})
        policy = OpenVLAForActionPrediction(config).eval()
        policy.model.vision_backbone.featurizer = base.model.vision_backbone.featurizer
        policy.model.vision_backbone.fused_featurizer = base.model.vision_backbone.fused_featurizer
        policy.model.projector, policy.lm_head = base.model.projector, base.lm_head
        policies[way] = policy.to(device=device, dtype=dtype)
    return policies


def as_the_original(policy, inputs: dict):
    """One chunk with what OpenVLA-OFT's code computes beside it; the same actions."""
    import torch

    model, config = policy.model, policy.config
    ids, _ = policy._pad_prompts(policy._complete_prompts(inputs["input_ids"], None))
    count = config.action_chunk * config.action_dim
    suffix = torch.tensor([[config.action_slot_id] * count + [config.text_config.eos_token_id]], device=ids.device)
    ids = torch.cat([ids, suffix], dim=1)
    with torch.no_grad():
        backbone, patches = model.vision_backbone, []
        for image in inputs["pixel_values"].split(6, dim=1):
            features = backbone.featurizer(image[:, :3]), backbone.fused_featurizer(image[:, 3:])
            patches.append(torch.cat(features, dim=2))
        features = model.projector(torch.cat(patches, dim=1))
        outputs = model(
            input_ids=ids,
            image_features=features,
            proprio=inputs["proprio"],
            use_cache=False,
            output_hidden_states=True,
        )
        policy.lm_head(outputs.last_hidden_state).float()
        hidden = policy._read_slots(outputs.hidden_states[-1], ids)
        return policy.action_head(hidden).double().cpu()


def main(argv: list[str]) -> None:
    parser = command_parser("bench", __doc__)
    parser.prog = "python -m openvla.evaluate.bench_heads"
    parser.add_argument("--size", choices=("tiny", "mid"), default="mid", help="size of the random policies")
    parser.add_argument("--chunk", type=int, default=8, help="steps of a chunk")
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the first is not counted")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16")
    parser.add_argument("--device", help="cuda, cpu, …; default: cuda if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--json", metavar="FILE", help="also write the result to a file")
    args = parser.parse_args(argv)

    import torch
    import transformers
    from tqdm import tqdm

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    policies = build(args.size, args.chunk, args.cameras, getattr(torch, args.dtype), device)
    first = policies["l1"].config
    text = [512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304, 5839, 701, 278, 18002, 29973, 13, 3744, 29901]
    prompt = torch.tensor([[1, *text]], device=device)
    torch.manual_seed(0)
    pixel_values = torch.randn(1, 6 * args.cameras, first.image_sizes[0], first.image_sizes[0], device=device)
    inputs = {"input_ids": prompt, "pixel_values": pixel_values, "proprio": torch.zeros(1, 8, device=device)}
    noise = torch.randn(1, args.chunk, 7)

    def act(way: str):
        if way == "l1, as the original":
            return as_the_original(policies[way], inputs)
        return policies[way].sample_actions(**inputs, noise=noise if "steps" in way else None).actions

    with torch.no_grad():  # the language model's, heads' and projectors' random weights are the same
        for part, other in zip(policies["l1"].parameters(), policies["l1, as the original"].parameters()):
            other.copy_(part)
    difference = (act("l1") - act("l1, as the original")).abs().max().item()
    if difference > (1e-4 if args.dtype == "float32" else 0.1):
        raise RuntimeError(f"The original's way differs by {difference}: not comparable.")
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times = {way: [] for way in WAYS}
    for turn in tqdm(range(args.repeats + 1), unit="round", disable=not sys.stderr.isatty()):
        for way in WAYS if turn % 2 else reversed(WAYS):  # so that nobody always follows the same one
            synchronize()
            start = time.perf_counter()
            act(way)
            synchronize()
            if turn:
                times[way].append(1e3 * (time.perf_counter() - start))
    rows = []
    for way, found in times.items():
        ratios = sorted(mine / one for mine, one in zip(found, times["l1"]))
        rows.append(
            {
                "way": way,
                "ms_per_chunk": round(statistics.median(found), 2),
                "ms_per_action": round(statistics.median(found) / args.chunk, 2),
                "spread_ms": [round(min(found), 2), round(max(found), 2)],
                "times_l1": round(statistics.median(ratios), 3),
                "times_l1_spread": [round(ratios[0], 3), round(ratios[-1], 3)],
            }
        )
    result = {
        "size": args.size,
        "parameters": sum(parameter.numel() for parameter in policies["l1"].parameters()),
        "chunk": args.chunk,
        "cameras": args.cameras,
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rounds": args.repeats,
        "ways": rows,
    }
    if args.json:
        with open(args.json + ".tmp", "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
        os.replace(args.json + ".tmp", args.json)
    print(
        f"{args.size}, {result['parameters'] / 1e6:.0f} M parameters, {args.cameras} cameras, chunks of {args.chunk}"
    )
    print(f"{'':<32}{'ms/chunk':>10}{'ms/action':>11}{'x l1':>8}")
    for row in rows:
        print(f"{row['way']:<32}{row['ms_per_chunk']:>10}{row['ms_per_action']:>11}{row['times_l1']:>8}")


if __name__ == "__main__":
    main(sys.argv[1:])
