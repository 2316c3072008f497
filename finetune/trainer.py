"""TRL's SFTTrainer for action tokens: rows in their order, exact resume, scores on episodes held out and trained on.

A run folder holds `checkpoint-N` (to resume from; complete or absent), `best` (lowest L1 so far), `metrics.jsonl`, and
in the end `curves.png` and what `openvla finetune` leaves. Import this module only when training: TRL takes seconds.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl import SFTTrainer

from openvla.action_tokenizer import name_action_dims
from openvla.evaluate.offline import evaluate_actions
from openvla.finetune.collator import ActionCollator
from openvla.pretrained_openvla import ADAPTER_CONFIG, module_name

ATTENTION_OPTIONS = ("query", "key", "value", "attn_mask", "is_causal", "scale")


class ActionTrainer(SFTTrainer):
    """Trains on `{"index", "draw"}` rows, in their order.

    Args:
        validation: name -> (collator without augmentation, steps): what `evaluate` scores. Its names prefix the
            metrics: `""` gives `eval_l1`, `"training_"` `eval_training_l1`, `"robot_training_"`
            `eval_robot_training_l1`.
        decay_steps: optimizer steps at which the learning rate is divided by ten; otherwise TRL's schedulers.
        average: of the trained weights, to score and save instead of them.
    """

    def __init__(
        self,
        *args,
        validation: dict[str, tuple[ActionCollator, list[int]]] | None = None,
        decay_steps: list[int] | None = None,
        average: "WeightAverage | None" = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        # each process draws noise of its own; what is the same in all was drawn before
        torch.manual_seed(self.args.seed + self.accelerator.process_index)
        self.validation = validation
        self.decay_steps = decay_steps
        self.average = average
        self.best = float("inf")
        self._staging = None
        self._samples_sharded = False
        self._waited = 0.0  # seconds for data since the last log
        self._clock = None  # (time, step) of the last log
        if average is not None:
            if self.is_fsdp_enabled:
                raise ValueError("--ema needs the whole weights in every process: train with DDP instead of FSDP.")
            average.follow(self.model)
            self.add_callback(average)

    # --- What is trained on --------------------------------------------------------------------------------------
    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)  # rows are the run's order

    def get_batch_samples(self, *args, **kwargs):
        start = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self._waited += time.perf_counter() - start
        return batches

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy over the scored tokens alone. TRL 1.16 projects every position onto the vocabulary where there
        is no Triton, which makes a step on a CPU several times slower. Of continuous heads, their own loss."""
        if "actions" in inputs:
            outputs = model(**inputs, use_cache=False)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        targets = inputs["labels"][:, 1:]
        kept = (targets != -100).any(dim=0).nonzero()[:, 0]
        targets = targets[:, kept]
        batch = {key: value for key, value in inputs.items() if key != "labels"}
        outputs = model(**batch, use_cache=False, logits_to_keep=kept)
        logits, scored = outputs.logits.float(), targets != -100
        loss = torch.nn.functional.cross_entropy(logits[scored], targets[scored], reduction="sum")
        right = (logits.argmax(dim=-1) == targets)[scored].sum()
        right, count = self.accelerator.gather_for_metrics(torch.stack([right, scored.sum()])).view(-1, 2).sum(dim=0)
        self._metrics["train"]["mean_token_accuracy"].append((right / count).item())
        loss = loss / (scored.sum() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # counted over all processes, whose gradients are averaged
        return (loss, outputs) if return_outputs else loss

    def compute_loss_context_manager(self):
        """On a CPU with attention in plain products, of which PyTorch's kernel makes more work going back."""
        context = super().compute_loss_context_manager()
        if self.args.device.type != "cpu" or not self.args.bf16 or self.args.gradient_checkpointing:
            return context
        stack = contextlib.ExitStack()
        stack.enter_context(context)
        stack.enter_context(_PlainAttention())
        return stack

    def create_scheduler(self, num_training_steps, optimizer=None):
        if not self.decay_steps:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            if step < warmup:
                return step / warmup
            return 0.1 ** sum(step >= milestone for milestone in self.decay_steps)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    # --- What is told --------------------------------------------------------------------------------------------
    def evaluate(self, *args, **kwargs):
        """L1, and accuracy of tokens if there are any, on each set of `validation`; keeps the best model in `best`."""
        if self.is_fsdp_enabled and not self._samples_sharded:  # gathers the shards for it, as for `forward`
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(self.accelerator.unwrap_model(self.model), "sample_actions")
            self._samples_sharded = True
        metrics = {}
        with self._averaged_weights(), self.compute_loss_context_manager():
            for name, (collator, indices) in self.validation.items():
                found = evaluate_actions(
                    self.accelerator.unwrap_model(self.model),
                    collator,
                    indices,
                    self.args.per_device_eval_batch_size,
                    self.accelerator,
                )
                metrics |= {f"eval_{name}{key}": value for key, value in self._scalars(collator, found).items()}
            score = self._score(metrics)
            if score < self.best:
                self.best = score
                self.save_policy(Path(self.args.output_dir) / "best")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _score(self, metrics: dict[str, float]) -> float:
        """Mean L1 over the datasets, on held-out episodes where there are any: what decides which model is `best`."""
        found = {name: metrics[f"eval_{name}l1"] for name in self.validation}
        held_out = [value for name, value in found.items() if not name.endswith("training_")]
        chosen = held_out or list(found.values())
        return sum(chosen) / len(chosen)

    def _scalars(self, collator: ActionCollator, found: dict) -> dict[str, float]:
        """What trackers can plot: `l1` over all dims, and per dim `l1/x` (normalised) and `l1_physical/x`."""
        dataset = collator.steps.reader.name
        dims = [name.rstrip("?") for name, _ in name_action_dims(self.model.config.norm_stats, dataset)]
        scalars = {"token_accuracy": found["token_accuracy"]} if "token_accuracy" in found else {}
        scalars |= {"l1": sum(found["l1_normalized"]) / len(dims)}
        scalars |= {f"l1/{dim}": value for dim, value in zip(dims, found["l1_normalized"])}
        return scalars | {f"l1_physical/{dim}": value for dim, value in zip(dims, found["l1_physical"])}

    def log(self, logs, *args, **kwargs):
        """Adds speed, the share of the time spent waiting for data, and what is left; writes `metrics.jsonl`."""
        now, step = time.perf_counter(), self.state.global_step
        if "loss" in logs:
            if self._clock is not None and step > self._clock[1]:
                seconds, steps = now - self._clock[0], step - self._clock[1]
                batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
                logs["samples_per_second"] = round(steps * batch / seconds, 3)
                logs["data_wait"] = round(self._waited / seconds, 4)
                logs["eta_minutes"] = round((self.state.max_steps - step) * seconds / steps / 60, 1)
            self._clock, self._waited = (now, step), 0.0
        super().log(logs, *args, **kwargs)
        if self.args.should_save and self.state.log_history:
            path = Path(self.args.output_dir) / "metrics.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(entry) for entry in self.state.log_history]  # whole: a resumed run rewrites it
            path.with_suffix(".tmp").write_text("\n".join(lines) + "\n")
            os.replace(path.with_suffix(".tmp"), path)

    # --- What is kept --------------------------------------------------------------------------------------------
    def _save(self, output_dir=None, state_dict=None):
        with _own_class(self.accelerator.unwrap_model(self.model)):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            _save_statistics(self.model, Path(output_dir or self.args.output_dir))

    def _get_output_dir(self, trial):
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        run, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self._staging = str(run / ".incomplete")
        super()._save_checkpoint(model, trial)
        self._staging = None
        self.accelerator.wait_for_everyone()  # each process writes the state of its random numbers
        if not self.args.should_save:
            return
        if self.average is not None:
            save_file(self.average.weights, run / ".incomplete" / name / "average.safetensors")
        shutil.rmtree(run / name, ignore_errors=True)
        os.replace(run / ".incomplete" / name, run / name)
        (run / ".incomplete").rmdir()
        kept = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        for old in kept[: -(self.args.save_total_limit or len(kept))]:
            shutil.rmtree(old)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        if resume_from_checkpoint is not None:
            if self.average is not None:
                self.average.load(Path(resume_from_checkpoint) / "average.safetensors")
            history = json.loads((Path(resume_from_checkpoint) / "trainer_state.json").read_text())["log_history"]
            scores = [self._score(entry) for entry in history if any(key.startswith("eval_") for key in entry)]
            self.best = min(scores, default=self.best)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Trainer takes the names in the files as they are. Ours are the released ones: it would find none of them in
        the model, warn, and go on from the weights it started with (transformers 5.23)."""
        files = sorted(Path(resume_from_checkpoint).glob("model*.safetensors"))
        if self.is_fsdp_enabled or not files:  # shards, or an adapter
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        model = self.model if model is None else model
        missing = set(model.state_dict())
        for file in files:
            weights = {module_name(name): tensor for name, tensor in load_file(file).items()}
            unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
            if unexpected:
                raise ValueError(f"{file} holds weights that the policy does not have: {unexpected[:5]} …")
            missing -= set(weights)
        if missing:
            raise ValueError(f"{resume_from_checkpoint} lacks weights of the policy: {sorted(missing)[:5]} …")

    def _averaged_weights(self):
        return contextlib.nullcontext() if self.average is None else self.average.swapped_in()

    def save_policy(self, folder: Path) -> None:
        """Saves model (or adapter) and processor, under a temporary name first. All processes have to call it."""
        state = None
        if self.is_fsdp_enabled:  # gathers the shards; over gloo they come as tensors that are still on their way
            state = self.accelerator.get_state_dict(self.model)
            state = {name: value if type(value) is torch.Tensor else value.clone() for name, value in state.items()}
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            with _own_class(model):
                save_atomically(model, self.processing_class, folder, state)


class _PlainAttention(torch.overrides.TorchFunctionMode):
    """Scaled dot product attention as two products and a softmax in float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        wanted = function is torch.nn.functional.scaled_dot_product_attention
        if not wanted or kwargs.get("dropout_p") or kwargs.get("enable_gqa"):
            return function(*args, **kwargs)
        return _attend(*args, **{name: value for name, value in kwargs.items() if name in ATTENTION_OPTIONS})


def _attend(query, key, value, attn_mask=None, *, is_causal: bool = False, scale: float | None = None):
    """Queries `(…, L, D)`, keys `(…, S, D)`, values `(…, S, V)` -> `(…, L, V)`; `attn_mask` `(…, L, S)` is bool, True
    where to look, or added."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = ((query * scale) @ key.mT).float()
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(dim=-1).to(value.dtype) @ value


class WeightAverage(TrainerCallback):
    """Exponential moving average of the trained weights, in float32.

    Args:
        decay: share of the average that stays at every step; early on less, so that it follows at once:
            `min(decay, (1 + step) / (10 + step))`.
    """

    def __init__(self, decay: float):
        if not 0.0 < decay < 1.0:
            raise ValueError(f"The decay of the weights' average must lie between 0 and 1, got {decay}.")
        self.decay = decay
        self.weights: dict[str, torch.Tensor] = {}
        self._parameters: dict[str, torch.nn.Parameter] = {}

    def follow(self, model: torch.nn.Module) -> None:
        self._parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.weights = {name: value.detach().float().clone() for name, value in self._parameters.items()}

    def on_step_end(self, args, state, control, **kwargs):
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, parameter in self._parameters.items():
            self.weights[name] = self.weights[name].to(parameter.device)
            self.weights[name].lerp_(parameter.detach().float(), 1 - decay)

    def load(self, file: Path) -> None:
        if not file.exists():
            raise ValueError(f"{file} is missing: that run did not average its weights; resume it without --ema.")
        self.weights = load_file(file)

    @contextlib.contextmanager
    def swapped_in(self):
        """The average in the model's place, for a while."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.put_in()
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data.copy_(kept[name])

    def put_in(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data.copy_(self.weights[name])


@contextlib.contextmanager
def _own_class(model):
    """Undoes for a while that FSDP2 makes the model an instance of a class of its own: `save_pretrained` would copy
    the code of that class in place of ours, and the folder would not load."""
    kept = type(model)
    model.__class__ = next(each for each in kept.__mro__ if not each.__module__.startswith("torch.distributed.fsdp"))
    try:
        yield
    finally:
        model.__class__ = kept


def save_atomically(model, processor, folder: Path, state_dict: dict | None = None) -> None:
    """Saves model (or adapter) and processor under a temporary name first."""
    temporary = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, **({} if state_dict is None else {"state_dict": state_dict}))
    processor.save_pretrained(temporary)
    _save_statistics(model, temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def _save_statistics(model, folder: Path) -> None:
    """And of an adapter's policy all it declares: its base may have another head and other inputs."""
    if (folder / "adapter_config.json").exists():
        with tempfile.TemporaryDirectory() as temporary:
            model.config.save_pretrained(temporary)
            told = json.loads((Path(temporary) / "config.json").read_text())
        told.pop("quantization_config", None)  # of the run, not of the base
        (folder / ADAPTER_CONFIG).write_text(json.dumps(told, indent=2))
    (folder / "dataset_statistics.json").write_text(json.dumps(model.config.norm_stats, indent=2))


def plot_curves(history: list[dict], path: Path) -> None:
    """Loss, token accuracy and L1 over the steps of a run, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"loss": "loss", "token accuracy": "token_accuracy", "L1, normalised": "l1"}
    if not any(key.endswith("token_accuracy") for entry in history for key in entry):  # a continuous head
        del panels["token accuracy"]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.5))
    for axis, (title, suffix) in zip(axes, panels.items()):
        keys = {key: None for entry in history for key in entry if key.endswith(suffix) and key != "train_loss"}
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            axis.plot(*zip(*points), label=_curve_label(key, suffix), linewidth=1.2)
        if len(keys):
            axis.legend()
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _curve_label(key: str, suffix: str) -> str:
    """`eval_training_l1` -> "training episodes"; `eval_l1` -> "held out"; `mean_token_accuracy` -> "batches"."""
    if not key.startswith("eval_"):
        return "batches"
    name = key.removeprefix("eval_").removesuffix(suffix).strip("_")
    names = name.removesuffix("training").strip("_")
    return f"{names} {'training episodes' if name.endswith('training') else 'held out'}".strip()
