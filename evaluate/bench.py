"""Milliseconds per action: `predict_action` against `generate()`, in alternation, in one process.

openvla bench
openvla bench --size tiny --repeats 30 --json bench.json
openvla bench --model openvla/openvla-7b --dtype bfloat16 --device cuda

Without `--model` the weights are random: speed depends on shapes only. Both ways must give the same tokens, or the run
fails. The ratio is the median over pairs of runs that follow each other, with its quartiles.
"""

import json
import os
import platform
import statistics
import time

from openvla.cli import command_parser

# width, depth and heads of both towers; width, MLP width, depth and heads of the language model
SIZES = {"tiny": (64, 3, 2, 128, 352, 3, 2), "mid": (384, 12, 6, 1024, 2816, 16, 16)}


def random_policy(size: str):
    """A policy of random weights with the released structure (two towers, 256 patches, Llama with 32,064 tokens)."""
    import torch

    from openvla.configuration_openvla import OpenVLAConfig
    from openvla.modeling_openvla import OpenVLAForActionPrediction

    width, depth, heads, hidden, mlp, layers, llm_heads = SIZES[size]
    tower = {"embed_dim": width, "depth": depth, "num_heads": heads}
    dino = {**tower, "reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}
    text = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    text |= {"num_attention_heads": llm_heads, "vocab_size": 32064, "pad_token_id": 32000}
    config = OpenVLAConfig(
        "bench",
        llm_backbone_id="llama2-7b-pure",
        image_resize_strategy="resize-naive",
        timm_model_ids=["dino", "siglip"],
        timm_model_args={"dino": dino, "siglip": {**tower, "class_token": False}},
        text_config=text,
        action_dim=7,
    )
    model = OpenVLAForActionPrediction(config).eval()
    with torch.no_grad():  # random weights would pick any token; ours must be actions, as those of a policy are
        model.lm_head.weight[: model.action_tokenizer.vocab_start] *= 0.1
        model.lm_head.weight[model.action_tokenizer.vocab_end :] *= 0.1
    return model


def measure_pairs(first, second, repeats: int, synchronize) -> list[tuple[float, float]]:
    """Milliseconds of both callables, run in turns; who goes first alternates, so that neither gains by it."""
    pairs = []
    for repeat in range(repeats):
        elapsed = {}
        for way in ((first, second), (second, first))[repeat % 2]:
            synchronize()
            start = time.perf_counter()
            way()
            synchronize()
            elapsed[way] = (time.perf_counter() - start) * 1e3
        pairs.append((elapsed[first], elapsed[second]))
    return pairs


def summarize(name: str, milliseconds: list[float]) -> dict:
    ordered = sorted(milliseconds)
    quantile = {f"p{p}": round(ordered[min(int(len(ordered) * p / 100), len(ordered) - 1)], 2) for p in (5, 50, 95)}
    return {"way": name, **quantile, "hz": round(1e3 / statistics.median(ordered), 2)}


def main(argv: list[str]) -> None:
    parser = command_parser("bench", __doc__)
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a checkpoint instead of random weights")
    parser.add_argument("--size", choices=SIZES, default="mid", help="size of the random policy")
    parser.add_argument("--repeats", type=int, default=15, help="pairs of runs")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16")
    parser.add_argument("--device", help="cuda, cpu, …; default: cuda if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--json", metavar="FILE", help="also write the result to a file")
    args = parser.parse_args(argv)

    import torch
    import transformers

    from openvla.modeling_openvla import OpenVLAForActionPrediction

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.model:
        model = OpenVLAForActionPrediction.from_pretrained(args.model, dtype=dtype).eval()
    else:
        model = random_policy(args.size).to(dtype)
    model = model.to(device)

    # 1. One observation: an instruction of usual length, and noise
    torch.manual_seed(0)
    count, end = model.config.num_image_tokens, model.config.prompt_end_token_id
    text = [512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304, 5839, 701, 278, 18002, 29973, 13, 3744, 29901]
    input_ids = torch.tensor([[1] + [model.config.image_token_id] * count + text + ([end] if end else [])]).to(device)
    side, channels = model.config.image_sizes[0], 3 * len(model.config.timm_model_ids) * model.config.num_cameras
    pixel_values = torch.randn(1, channels, side, side).to(device)
    inputs = {"input_ids": input_ids, "pixel_values": pixel_values}
    dim = model.config.action_dim or 7

    def act():
        return model.sample_actions(**inputs, action_dim=dim).token_ids

    def generate():
        mask = torch.ones_like(input_ids)
        return model.generate(**inputs, attention_mask=mask, max_new_tokens=dim, do_sample=False)[:, -dim:]

    # 2. The same tokens, then the clock
    if act().tolist() != generate().tolist():
        raise RuntimeError(f"predict_action gives {act().tolist()}, generate {generate().tolist()}: not comparable.")
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    pairs = measure_pairs(generate, act, args.repeats, synchronize)
    ratios = [slow / fast for slow, fast in pairs]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    rows = [summarize("generate()", [pair[0] for pair in pairs]), summarize("predict_action", [p[1] for p in pairs])]
    result = {
        "model": args.model or f"{args.size} (random weights)",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "positions": input_ids.shape[1],
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "repeats": args.repeats,
        "milliseconds": rows,
        "speedup": {"median": round(quartiles[1], 3), "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)]},
    }
    if args.json:
        with open(args.json + ".tmp", "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
        os.replace(args.json + ".tmp", args.json)
    print(f"{result['model']}, {result['parameters'] / 1e6:.0f} M parameters, {args.dtype}, {result['device']}")
    print(f"{'':<16}{'p5 ms':>10}{'p50 ms':>10}{'p95 ms':>10}{'Hz':>8}")
    for row in rows:
        print(f"{row['way']:<16}{row['p5']:>10}{row['p50']:>10}{row['p95']:>10}{row['hz']:>8}")
    low, high = result["speedup"]["quartiles"]
    print(f"predict_action is {quartiles[1]:.2f} times as fast (quartiles {low:.2f} to {high:.2f})")
