"""Fine-tunes a policy on demonstrations: LeRobot, RLDS, HDF5 or a plain folder in, a Hub checkpoint out.

openvla finetune --model openvla/openvla-7b --data my_robot --output_dir runs/cup --max_steps 5000
openvla finetune --model openvla/openvla-7b --data my_robot --output_dir runs/cup --mode qlora --max_steps 5000
openvla finetune --config recipe.yaml --learning_rate 1e-4
openvla finetune --config recipe.yaml --resume true

Every option of TRL's SFTConfig is accepted. A run folder holds `checkpoint-N` (to resume from), `best` (by L1 on
held-out episodes), `merged` (a folder like a Hub repository, ready to act), `metrics.jsonl` and `curves.png`.
"""

import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)
MODES = ("lora", "qlora", "full", "frozen-vision", "last-layer", "sandwich")


@dataclass
class FinetuneArguments:
    """What to train on what. `mode`: lora, qlora, full, frozen-vision (all but the towers), last-layer (embeddings,
    last decoder layer, head), sandwich (towers, projector, and last-layer)."""

    model: str = field(metadata={"help": "folder or Hub id of the policy to start from"})
    data: str = field(metadata={"help": "folder (or HDF5 file) of the demonstrations"})
    name: str | None = field(default=None, metadata={"help": "unnorm_key of the new policy; default: the dataset's"})
    mode: str = field(default="lora", metadata={"help": ", ".join(MODES)})
    cameras: list[str] | None = field(default=None, metadata={"help": "which, in order; default: the first ones"})
    lora_rank: int = 32
    lora_alpha: int | None = field(default=None, metadata={"help": "default: min(rank, 16), as the original"})
    lora_dropout: float = 0.0
    lora_vision: bool = field(default=True, metadata={"help": "adapters in the vision towers, too"})
    lora_head: bool = field(default=False, metadata={"help": "also train lm_head, whole: helps small policies"})
    augment: bool = field(default=True, metadata={"help": "random crops and colours; recorded in the checkpoint"})
    validation_share: float = field(default=0.05, metadata={"help": "of the episodes, held out; 0: none"})
    validation_steps: int = field(default=200, metadata={"help": "at most so many steps per evaluation"})
    skip_bad_episodes: bool = False
    resume: bool = field(default=False, metadata={"help": "continue from the last checkpoint of output_dir"})


def run_order(num_steps: int, draws: int, seed: int) -> list[int]:
    """Which step each draw of a run takes: one seeded permutation of all steps after another."""
    import numpy as np

    passes = -(-draws // num_steps)
    permutations = [np.random.default_rng([seed, number]).permutation(num_steps) for number in range(passes)]
    return np.concatenate(permutations)[:draws].tolist()


def split_episodes(lengths: list[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Training and held-out episodes, by a seeded shuffle of the good ones; at least one each unless `share` is 0."""
    import numpy as np

    good = [index for index, length in enumerate(lengths) if length]
    if not share:
        return good, []
    if len(good) < 2:
        raise ValueError(f"Cannot hold out a share of {share} of {len(good)} episode: pass --validation_share 0.")
    order = np.random.default_rng(seed).permutation(good).tolist()
    count = min(max(round(share * len(good)), 1), len(good) - 1)
    return sorted(order[count:]), sorted(order[:count])


def choose_trainable(model, mode: str) -> None:
    """Freezes what a mode of partial fine-tuning does not train (`requires_grad`), as the original's stages do."""
    if mode not in ("full", "frozen-vision", "last-layer", "sandwich"):
        raise ValueError(f"Unknown mode {mode!r}; expected one of {MODES}.")
    language_model = model.model.language_model
    last = [language_model.get_input_embeddings(), language_model.layers[-1], model.lm_head]
    trained = {
        "full": [model],
        "frozen-vision": [model.model.projector, language_model, model.lm_head],
        "last-layer": last,
        "sandwich": [model.model.vision_backbone, model.model.projector, *last],
    }[mode]
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)


def lora_config(rank: int, alpha: int | None, dropout: float, vision: bool, head: bool = False):
    """LoRA on every linear layer but the head, as the original but for modules that never run."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=alpha or min(rank, 16),
        lora_dropout=dropout,
        target_modules="all-linear",
        exclude_modules=None if vision else r".*vision_backbone.*",
        modules_to_save=["lm_head"] if head else None,
        init_lora_weights="gaussian",
    )


def parameter_table(model) -> str:
    """Parameters and trainable share per part of the policy."""
    parts = {"vision_backbone": [0, 0], "projector": [0, 0], "language_model": [0, 0], "lm_head": [0, 0]}
    for name, parameter in model.named_parameters():
        part = parts[next(part for part in parts if f".{part}." in f".{name}")]
        part[0] += parameter.numel()
        part[1] += parameter.numel() * parameter.requires_grad
    parts["total"] = [sum(column) for column in zip(*parts.values())]
    rows = [f"{'':<16}{'parameters':>16}{'trained':>16}{'share':>9}"]
    rows += [f"{name:<16}{size:>16,}{trained:>16,}{trained / size:>9.2%}" for name, (size, trained) in parts.items()]
    return "\n".join(rows)


def last_checkpoint(folder: str) -> str | None:
    """The newest complete `checkpoint-N`: folders get that name only once everything is in them."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


def make_trainer_class():
    """`SFTTrainer` that takes rows in their order, keeps half-written checkpoints out of sight, and scores actions.

    Made on demand, because TRL takes seconds to import.
    """
    import torch
    from trl import SFTTrainer

    from openvla.evaluate.offline import evaluate_actions

    class ActionTrainer(SFTTrainer):
        def __init__(self, *args, validation=None, **kwargs):
            super().__init__(*args, **kwargs)
            self.validation = validation  # (collator, indices) or None
            self.best = float("inf")
            self._staging = None

        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)  # rows are the run's order

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            """Cross-entropy over the scored tokens alone. TRL 1.16 projects every position onto the vocabulary where
            there is no Triton, which makes a step on a CPU several times slower."""
            targets = inputs["labels"][:, 1:]
            kept = (targets != -100).any(dim=0).nonzero()[:, 0]
            targets = targets[:, kept]
            batch = {key: value for key, value in inputs.items() if key != "labels"}
            outputs = model(**batch, use_cache=False, logits_to_keep=kept)
            logits, scored = outputs.logits.float(), targets != -100
            loss = torch.nn.functional.cross_entropy(logits[scored], targets[scored], reduction="sum")
            right = (logits.argmax(dim=-1) == targets)[scored].sum()
            right, count = self.accelerator.gather_for_metrics(torch.stack([right, scored.sum()])).view(-1, 2).sum(0)
            self._metrics["train"]["mean_token_accuracy"].append((right / count).item())
            if num_items_in_batch is None:
                loss = loss / scored.sum()
            else:  # of all processes, whose gradients are averaged
                loss = loss * self.accelerator.num_processes / num_items_in_batch
            return (loss, outputs) if return_outputs else loss

        def _get_output_dir(self, trial):
            return self._staging or super()._get_output_dir(trial)

        def _save_checkpoint(self, model, trial):
            run, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
            self._staging = str(run / ".incomplete")
            super()._save_checkpoint(model, trial)
            self._staging = None
            if not self.args.should_save:
                return
            shutil.rmtree(run / name, ignore_errors=True)
            os.replace(run / ".incomplete" / name, run / name)
            kept = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
            for old in kept[: -(self.args.save_total_limit or len(kept))]:
                shutil.rmtree(old)

        def evaluate(self, *args, **kwargs):
            """Token accuracy and L1 on held-out steps; the best model so far is kept in `best`."""
            collator, indices = self.validation
            model = self.accelerator.unwrap_model(self.model)
            found = evaluate_actions(model, collator, indices, self.args.per_device_eval_batch_size)
            metrics = {f"eval_{key}": value for key, value in found.items()}
            metrics["eval_l1"] = sum(found["l1_normalized"]) / len(found["l1_normalized"])
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            if metrics["eval_l1"] < self.best and self.args.should_save:
                self.best = metrics["eval_l1"]
                save_atomically(model, self.processing_class, Path(self.args.output_dir) / "best")
            return metrics

        def log(self, logs, *args, **kwargs):
            super().log(logs, *args, **kwargs)
            if self.args.should_save and self.state.log_history:
                path = Path(self.args.output_dir) / "metrics.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = [json.dumps(entry) for entry in self.state.log_history]  # whole: a resumed run rewrites it
                path.with_suffix(".tmp").write_text("\n".join(lines) + "\n")
                os.replace(path.with_suffix(".tmp"), path)

    return ActionTrainer


def save_atomically(model, processor, folder: Path) -> None:
    """Saves model (or adapter) and processor under a temporary name first."""
    temporary = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def plot_curves(history: list[dict], path: Path) -> None:
    """Loss, token accuracy and L1 over the steps of a run, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "loss": ["loss"],
        "token accuracy": ["mean_token_accuracy", "eval_token_accuracy"],
        "L1, normalised": ["eval_l1"],
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.5))
    for axis, (title, keys) in zip(axes, panels.items()):
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axis.plot(*zip(*points), label="held out" if key.startswith("eval") else "training")
                axis.legend()
        axis.set(title=title, xlabel="step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    import torch
    from datasets import Dataset
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig, TrlParser

    from openvla.action_tokenizer import ActionStats
    from openvla.finetune.collator import ActionCollator
    from openvla.finetune.readers import open_reader
    from openvla.finetune.statistics import scan
    from openvla.finetune.steps import StepDataset
    from openvla.loading import load

    parser = TrlParser((FinetuneArguments, SFTConfig), prog="openvla finetune", description=__doc__)
    args, config = parser.parse_args_and_config(argv)
    if args.mode not in MODES:
        raise ValueError(f"Unknown mode {args.mode!r}; expected one of {MODES}.")

    # 1. Demonstrations
    reader = open_reader(args.data, args.name)
    found = scan(reader, args.skip_bad_episodes)
    train_episodes, held_out = split_episodes(found.lengths, args.validation_share, config.seed)

    # 2. Policy: its statistics are those of the new data alone, before the first step
    quantization = None
    if args.mode == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    dtype = torch.bfloat16 if config.bf16 and args.mode in ("lora", "qlora") else torch.float32
    model, processor = load(args.model, dtype=dtype, quantization_config=quantization)
    model.config.norm_stats = {reader.name: found.norm_stats}
    if args.augment:
        processor.image_processor.center_crop_area = 0.9  # at test time; recorded in the checkpoint
    cameras = args.cameras or reader.cameras[: processor.num_cameras]
    if len(cameras) != processor.num_cameras:
        raise ValueError(f"The policy takes {processor.num_cameras} camera(s), got {cameras} of {reader.cameras}.")

    # 3. What is trained, in which order
    peft_config = None
    if args.mode in ("lora", "qlora"):
        peft_config = lora_config(args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_vision, args.lora_head)
    else:
        choose_trainable(model, args.mode)
    chunk = model.config.action_chunk
    stats = ActionStats.from_norm_stats(model.norm_stats, reader.name, model.config.action_normalization)
    steps = StepDataset(reader, found.lengths, train_episodes, cameras, chunk)
    collator = ActionCollator(steps, processor, stats, model.action_tokenizer, config.seed if args.augment else None)
    validation = None
    if held_out:
        held_out_steps = StepDataset(reader, found.lengths, held_out, cameras, chunk)
        indices = run_order(len(held_out_steps), min(args.validation_steps, len(held_out_steps)), config.seed)
        validation = (ActionCollator(held_out_steps, processor, stats, model.action_tokenizer), indices)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    if config.max_steps < 0:
        config.max_steps = -(-len(steps) * int(config.num_train_epochs) // batch)
    order = run_order(len(steps), config.max_steps * batch, config.seed)
    rows = Dataset.from_dict({"index": order, "draw": list(range(len(order)))})

    # 4. Train
    config.remove_unused_columns = False
    config.dataset_kwargs = {"skip_prepare_dataset": True}
    config.max_length = None
    if validation is None:
        config.eval_strategy = "no"
    trainer = make_trainer_class()(
        model,
        args=config,
        train_dataset=rows,
        eval_dataset=rows if validation else None,
        data_collator=collator,
        processing_class=processor,
        peft_config=peft_config,
        validation=validation,
    )
    if trainer.is_world_process_zero():
        counts = f"{len(train_episodes)} episodes, {len(steps)} steps; held out: {len(held_out)} episodes"
        print(f"{reader.name}: {counts}\n\n{parameter_table(trainer.accelerator.unwrap_model(trainer.model))}\n")
    trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir) if args.resume else None)

    # 5. What others can load
    if trainer.is_world_process_zero():
        run = Path(config.output_dir)
        plot_curves(trainer.state.log_history, run / "curves.png")
        trained = trainer.accelerator.unwrap_model(trainer.model)
        if peft_config is not None:
            save_atomically(trained, processor, run / "adapter")
        if args.mode == "qlora":
            print(f"{run / 'adapter'} is the adapter; merge it into the unquantised base to publish.")
            return
        merged = trained.merge_and_unload() if peft_config is not None else trained
        save_atomically(merged, processor, run / "merged")
        print(f"{run / 'merged'} is ready: openvla predict --model {run / 'merged'} …")
