"""How fast does each head learn a dataset by heart? A small random policy, trained once per head, on a CPU.

python -m openvla.evaluate.bench_learning --data bridge_dataset/1.0.0 --processor runs/tiny-openvla
python -m openvla.evaluate.bench_learning --data my_robot --processor openvla/openvla-7b --steps l1=500 flow=2000

Errors are those of `openvla finetune`: mean absolute error of the actions that the policy gives on the steps it was
trained with, on the scale from -1 to 1. It says what a head can fit, not what a robot would do.
"""

import json
import sys
from pathlib import Path

from openvla.cli import command_parser

STEPS = ("l1=1000", "flow=4000", "diffusion=12000")
SIDE = 56  # pixels: 16 patches


def small_policy(processor_of: str, folder: Path) -> None:
    """A policy of random weights with the released structure on small images, for a processor's tokenizer."""
    import torch

    from openvla.configuration_openvla import OpenVLAConfig
    from openvla.modeling_openvla import OpenVLAForActionPrediction
    from openvla.processing_openvla import OpenVLAImageProcessor, OpenVLAProcessor

    tower = {"embed_dim": 96, "depth": 4, "num_heads": 3}
    text = {"model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 3, "vocab_size": 32064, "pad_token_id": 32000}
    config = OpenVLAConfig(
        "small",
        llm_backbone_id="llama2-7b-pure",
        image_resize_strategy="resize-naive",
        timm_model_ids=["dino", "siglip"],
        image_sizes=[SIDE, SIDE],
        timm_model_args={
            "dino": {**tower, "reg_tokens": 4, "no_embed_class": True, "init_values": 0.1},
            "siglip": {**tower, "class_token": False},
        },
        text_config=text,
    )
    torch.manual_seed(0)
    OpenVLAForActionPrediction(config).save_pretrained(folder)
    given = OpenVLAProcessor.from_pretrained(processor_of)
    settings = {**given.image_processor.to_dict(), "input_sizes": [(3, SIDE, SIDE)] * 2}
    template, end = given.prompt_template, given.prompt_end_token_id
    patches = config.vision_towers[0].num_patches
    OpenVLAProcessor(
        OpenVLAImageProcessor(**settings), given.tokenizer, template, end, num_patches=patches
    ).save_pretrained(folder)


def main(argv: list[str]) -> None:
    parser = command_parser("bench", __doc__)
    parser.prog = "python -m openvla.evaluate.bench_learning"
    parser.add_argument("--data", required=True, help="demonstrations, as for openvla finetune")
    parser.add_argument("--processor", required=True, metavar="PATH_OR_ID", help="policy whose tokenizer to take")
    parser.add_argument("--steps", nargs="+", default=STEPS, metavar="HEAD=COUNT", help=f"default: {' '.join(STEPS)}")
    parser.add_argument("--chunk", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", default="runs/bench_learning", help="new folder for the runs")
    args = parser.parse_args(argv)

    from openvla.finetune import sft

    out = Path(args.out)
    if out.exists():
        raise ValueError(f"{out} exists: choose another --out.")
    small_policy(args.processor, out / "start")
    rows = []
    for head, _, count in (each.partition("=") for each in args.steps):
        run, every = out / head, max(int(count) // 4, 1)
        options = ["--head", head, "--chunk", str(args.chunk), "--pad_chunks", "true", "--proprio", "true"]
        options += ["--mode", "full", "--augment", "false", "--validation_share", "0", "--validation_steps", "1000000"]
        options += ["--max_steps", count, "--per_device_train_batch_size", str(args.batch_size), "--bf16", "false"]
        options += ["--learning_rate", "1e-3", "--lr_scheduler_type", "cosine", "--warmup_steps", "50"]
        options += ["--eval_strategy", "steps", "--eval_steps", str(every), "--save_strategy", "no"]
        options += ["--gradient_checkpointing", "false", "--report_to", "none", "--logging_steps", "100"]
        sft.main(["--model", str(out / "start"), "--data", args.data, "--output_dir", str(run), *options])
        entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        scores = {entry["step"]: entry["eval_training_l1"] for entry in entries if "eval_training_l1" in entry}
        seconds = next(entry["train_runtime"] for entry in reversed(entries) if "train_runtime" in entry)
        rows.append((head, scores, seconds))
    print(f"\n{'head':<12}{'minutes':>8}   L1 on what was trained, after so many steps")
    for head, scores, seconds in rows:
        told = "   ".join(f"{step}: {score:.4f}" for step, score in scores.items())
        print(f"{head:<12}{seconds / 60:>8.1f}   {told}")


if __name__ == "__main__":
    main(sys.argv[1:])
