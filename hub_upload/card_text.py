"""The text of a model card: Markdown that a newcomer reads from top to bottom."""

import json
import re
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np

from openvla.hub_upload.card_facts import (
    PUBLIC_OWNERS,
    CardFacts,
    Example,
    Policy,
    hub_id,
    is_number,
    is_rate,
    listed,
)

PLACEHOLDER = "your-name/your-policy"  # in the code of cards of which nobody knows yet where they go
MOST_OPEN = 3  # tables of so many datasets are open; more are folded up
MOST_STEPS = 8  # columns of an example's table

BODY = """\
# {name}

A policy for a robot arm: it looks at {sight}, reads an instruction such as "pick up the cup", and answers
with {motion} of the arm. It is an [OpenVLA](https://arxiv.org/abs/2406.09246) vision-language-action model; the
code that runs it on today's `transformers` lies beside the weights.

{overview}

## Act in a few lines

`pip install torch 'transformers>=4.57.6,<6' accelerate pillow`, then:

```python
{code}
```

{usage}

`trust_remote_code=True` runs the Python files of this repository: read them, and pass `revision=` to stay with the
version you have read. On transformers 4.57 the class is also called `AutoModelForVision2Seq`, which 5.x no longer has.

{examples}

## What the picture{plural} must look like

As in the training data: same kind of camera, same place, upright, RGB, 8 bits. {cameras} Pass pictures as the
camera gives them; the processor does the rest, as `preprocessor_config.json` declares. {stages}

{crop_hint}

## Actions

{actions}

{state}

## Training

{training}

## Evaluation

{evaluation}

{notes}

## Limits and safety

- **It acts only in setups like those of its data**: same robot and controller, same place of the camera, similar
  light, objects and tasks. Elsewhere it answers just as readily, and may be wrong.
- **For another robot it has to be fine-tuned.** The statistics of one dataset do not transfer to another.
- **It has no sense of danger.** It knows neither collisions nor forces nor the limits of the workspace, and not when a
  task is done or impossible: it answers any picture with a motion.
- **Instructions** are lower-cased, and were in English in OpenVLA's training. Sentences unlike those of the data may
  be misunderstood or ignored.
- **It remembers nothing**: an answer comes from {inputs} alone.

Before a real robot moves: limit speed, workspace and force in its own controller, keep people out of reach and a hand
on the emergency stop, and try it slowly first. This is research software without any warranty, not made for uses in
which a wrong motion could harm someone.

## Licence

{license}

The training data may carry terms of their own. The code is under the MIT licence.

## Citation

```bibtex
@article{{kim24openvla,
  title={{OpenVLA: An Open-Source Vision-Language-Action Model}},
  author={{Kim, Moo Jin and Pertsch, Karl and Karamcheti, Siddharth and Xiao, Ted and Balakrishna, Ashwin and
    Nair, Suraj and Rafailov, Rafael and Foster, Ethan and Lam, Grace and Sanketi, Pannag and Vuong, Quan and
    Kollar, Thomas and Burchfiel, Benjamin and Tedrake, Russ and Sadigh, Dorsa and Levine, Sergey and
    Liang, Percy and Finn, Chelsea}},
  journal={{arXiv preprint arXiv:2406.09246}},
  year={{2024}}
}}
```

{citation}

{origin}
"""

CODE = """\
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

repository = {repository}
device = "cuda" if torch.cuda.is_available() else "cpu"
processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(repository, trust_remote_code=True, dtype=torch.{dtype})
model = model.to(device).eval()
prompt = processor.build_prompt({instruction})
{inputs}
{act}"""

CITATION_OFT = """\
It decodes in parallel, after

```bibtex
@article{kim25openvlaoft,
  title={Fine-Tuning Vision-Language-Action Models: Optimizing Speed and Success},
  author={Kim, Moo Jin and Finn, Chelsea and Liang, Percy},
  journal={arXiv preprint arXiv:2502.19645},
  year={2025}
}
```"""

LLAMA_NOTICE = """\
Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved. These
weights are derived from Llama 2: its [licence](https://ai.meta.com/llama/license/) and
[acceptable use policy](https://ai.meta.com/llama/use-policy/) hold for whoever uses them or passes them on, whatever
else is declared here."""


def write_body(policy: Policy, facts: CardFacts, examples: Sequence[Example], name: str) -> str:
    """All of the card below its metadata."""
    cameras, chunk = policy.config.num_cameras, policy.config.action_chunk
    inputs = ["the present picture" + "s" * (cameras > 1), "the instruction"]
    inputs = ["the robot's present state", *inputs] if policy.config.proprio_dim else inputs
    text = BODY.format(
        name=escape(name),
        plural="s" * (cameras > 1),
        sight="a camera picture" if cameras == 1 else f"{cameras} camera pictures",
        motion="the next motion" if chunk == 1 else f"the next {chunk} motions",
        inputs=f"{', '.join(inputs[:-1])} and {inputs[-1]}",
        overview=_overview(policy, facts),
        code=_code_to_act(policy, facts, examples),
        usage=_usage(policy, facts),
        examples=_examples(policy, examples),
        cameras=_cameras(policy, facts),
        stages=_stages(policy),
        crop_hint=_crop_hint(policy),
        actions=_actions(policy),
        state=_state(policy),
        citation=CITATION_OFT if policy.config.attention != "causal" else "",
        training=_training(facts),
        evaluation=_evaluation(facts),
        notes=f"## Notes\n\n{without_paths(facts.notes.strip())}" if facts.notes.strip() else "",
        license=_license(policy, facts),
        origin=_origin(),
    )
    return re.sub(r"\n{3,}", "\n\n", text)  # where a part is empty


def choose_license(policy: Policy, facts: CardFacts) -> str:
    """The publisher's, else the language model's, else `other`: somebody must decide."""
    return facts.license or policy.llm_license or "other"


# --- What it is, and how to use it -----------------------------------------------------------------------------------
def _overview(policy: Policy, facts: CardFacts) -> str:
    config, parameters = policy.config, policy.parameters
    takes = (
        "a camera picture" if config.num_cameras == 1 else f"{config.num_cameras} camera pictures, in a fixed order,"
    )
    takes += " and an instruction"
    if config.proprio_dim:
        takes += f", and {config.proprio_dim} numbers of the robot's state"
    steps = "one step" if config.action_chunk == 1 else f"{config.action_chunk} steps (a chunk)"
    head = f"by a head of the kind {code(config.action_head, in_table=True)}"
    if config.action_head == "token":
        bins = "bins of equal population" if config.action_bins else "equal bins"
        head = f"each number one token, out of {config.n_action_bins} {bins} of its range"
    if config.num_denoising_steps:
        head += f", in {config.num_denoising_steps} steps from noise"
    if config.attention != "causal":
        head += f"; all numbers at once ({config.attention} attention)"
    towers = zip(config.timm_model_ids, config.image_sizes)
    llm, sizes = code(policy.llm, in_table=True), config.text_config
    parts = ", ".join(f"{escape(part)} {count:,}" for part, count in parameters.most_common())
    rows = {
        "made from": linked(*facts.base),
        "takes": takes,
        "answers": f"{steps} at a time, {head}",
        "prompt": code(policy.prompt.replace("\n", "\\n"), in_table=True) if policy.prompt else "unknown",
        "vision": " and ".join(f"{code(name, in_table=True)} at {size} pixels" for name, size in towers),
        "language model": f"{llm}, {sizes.num_hidden_layers} layers of width {sizes.hidden_size}",
        "parameters": f"{sum(parameters.values()):,} in the files ({parts})",
        "weights": f"{' and '.join(dtype for dtype, _ in policy.dtypes.most_common())}, {policy.size / 1e9:.2f} GB",
    }
    if getattr(config, "quantization_config", None):
        rows["parameters"] += "; the weights are quantised, so a stored number may hold several"
    return facts_table(rows)


def _code_to_act(policy: Policy, facts: CardFacts, examples: Sequence[Example]) -> str:
    image, cameras = 'Image.open("frame.png").convert("RGB")', policy.config.num_cameras
    inputs = f"inputs = processor(prompt, {image}).to(device)"
    if cameras > 1:
        images = f'[Image.open(f"camera_{{number}}.png").convert("RGB") for number in range({cameras})]'
        inputs = f"images = {images}\ninputs = processor(prompt, images).to(device)"
    if policy.config.proprio_dim:
        told = f"the robot's state: {policy.config.proprio_dim} numbers, in units of the dataset"
        inputs = inputs.replace("inputs = ", f"state = {_some_state(policy, examples)}  # {told}\ninputs = ")
        inputs = inputs.replace(").to(device)", ", state).to(device)")
    act = "# it has no statistics of actions: fine-tune it before it can act"
    if policy.norm_stats:
        keys = [examples[0].unnorm_key] if examples else list(policy.norm_stats)
        key = _quoted(keys[0])
        names = [name for name, _ in policy.dims[keys[0]]]
        shape = (len(names),) if policy.config.action_chunk == 1 else (policy.config.action_chunk, len(names))
        told = f"{shape}: {one_line(' '.join(names))}"
        act = ""
        if len(keys) > 1:  # which robot it is, nobody but the reader knows: "…" raises a KeyError that lists the keys
            act, key, told = 'unnorm_key = "…"  # one of the datasets below\n', "unnorm_key", "in that dataset's units"
        act += f"action = model.predict_action(**inputs, unnorm_key={key})\nprint(action)  # {told}"
    dtype = policy.dtypes.most_common(1)[0][0]
    return CODE.format(
        repository=_quoted(facts.repo_id or PLACEHOLDER),
        dtype=dtype if dtype in ("float32", "bfloat16", "float16") else "bfloat16",
        instruction=_quoted(one_line(examples[0].instruction) if examples else "pick up the cup"),
        inputs=inputs,
        act=act,
    )


def _some_state(policy: Policy, examples: Sequence[Example]) -> str:
    """What the first example has, or the mean of the only dataset, or zeros."""
    state = [0.0] * policy.config.proprio_dim
    if examples and examples[0].proprio is not None:
        state = examples[0].proprio
    elif len(policy.norm_stats) == 1:
        state = next(iter(policy.norm_stats.values())).get("proprio", {}).get("mean", state)
    return f"[{', '.join(f'{value:.4g}' for value in state)}]"


def _quoted(text: str) -> str:
    """A text in Python, with double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _usage(policy: Policy, facts: CardFacts) -> str:
    told = "" if facts.repo_id else f"Put the repository's id, or its folder, in place of {code(PLACEHOLDER)}. "
    if len(policy.norm_stats) > 1:
        told += (
            "`unnorm_key` says which dataset's statistics turn the answer into motion: that of your robot and its "
            f"controller. There are {len(policy.norm_stats)}, listed below. "
        )
    if policy.config.num_denoising_steps:
        told += (
            "Its head starts from noise, so the same picture gives somewhat other motions each time; "
            "`noise=model.draw_noise([0])` repeats one. Fewer `num_denoising_steps` are faster and "
            "coarser."
        )
    return told.strip()


def _examples(policy: Policy, examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    blocks = ["## Example" + "s" * (len(examples) > 1)]
    blocks.append("What this policy predicts for a picture: not what would be right, nor what happened then.")
    for number, example in enumerate(examples, start=1):
        actions = np.atleast_2d(example.action)
        shown, several = actions[:MOST_STEPS], len(actions) > 1
        values = [f"step {step}" for step in range(1, len(shown) + 1)] if several else ["value"]
        rows = [
            [escape(name), *(f"{value:.4f}" for value in shown[:, index]), escape(unit) or "unknown"]
            for index, (name, unit) in enumerate(policy.dims[example.unnorm_key])
        ]
        blocks.append(f'**"{escape(example.instruction)}"**, in units of {code(example.unnorm_key)}:')
        if example.proprio is not None:
            blocks.append(f"The robot's state: {', '.join(f'{value:.4g}' for value in example.proprio)}.")
        blocks.append(f"![The picture, and the motion predicted for it](assets/example-{number}.png)")
        blocks.append(table(["dim", *values, "unit"], rows))
        if len(actions) > MOST_STEPS:
            blocks.append(f"The first {MOST_STEPS} of {len(actions)} steps.")
    told = "Where a camera stands is unknown to the policy, so nothing is projected into the picture. "
    if any({"x", "y"} <= {name for name, _ in policy.dims[example.unnorm_key]} for example in examples):
        told += "The compass shows the robot's own frame from above, x up and y to the left. "
    blocks.append(f"{told}The bars lie within the range of the dataset.")
    return "\n\n".join(blocks)


# --- What goes in and comes out --------------------------------------------------------------------------------------
def _cameras(policy: Policy, facts: CardFacts) -> str:
    named = {tuple(each.get("cameras") or ()) for each in policy.norm_stats.values()}
    told = facts.training.get("cameras") or (named.pop() if len(named) == 1 else None)
    if cameras := [str(camera) for camera in listed(told)]:
        ordered = ", in this order" if policy.config.num_cameras > 1 else ""
        return f"It was trained on {', '.join(map(code, cameras))}{ordered}."
    asked = "Which camera that was" if policy.config.num_cameras == 1 else "Which cameras those were, in which order,"
    return f"{asked} is not recorded."


def _stages(policy: Policy) -> str:
    processor = policy.image_processor
    size = " × ".join(map(str, processor.input_sizes[0][1:]))
    stages = []
    if processor.jpeg_quality is not None:
        stages.append(f"compressed to JPEG of quality {processor.jpeg_quality} and back, as the training data were")
    if side := processor.lanczos3_size:
        stages.append(f"resized to {side} × {side} pixels by TensorFlow's Lanczos3, as the training data were")
    if share := processor.center_crop_area:
        stages.append(f"cut to the middle {share:.0%} of its area, because training cropped at random")
    shapes = {
        "resize-naive": f"resized to {size} pixels, whatever its proportions",
        "resize-crop": f"resized to {size} pixels by its shorter side, and cut at the ends of the longer one",
        "letterbox": f"padded to a square and resized to {size} pixels",
    }
    stages.append(f"{shapes[processor.image_resize_strategy]} ({processor.interpolations[0]})")
    start = "The picture is" if policy.config.num_cameras == 1 else "Each picture is"
    if len(stages) == 1:
        return f"{start} {stages[0]}."
    return f"{start}\n\n" + "\n".join(f"{number}. {stage}" for number, stage in enumerate(stages, start=1))


def _crop_hint(policy: Policy) -> str:
    if policy.image_processor.center_crop_area or not any(key.startswith("libero_") for key in policy.norm_stats):
        return ""
    return (
        "No centre crop is declared. Policies that were trained with random crops, as OpenVLA's own for LIBERO, want "
        "`processor(prompt, image, center_crop_area=0.9)`."
    )


ENDS = {  # of the range that -1 to 1 stands for
    "q99": ("1st percentile", "99th percentile"),
    "min_max": ("minimum", "maximum"),
    "mean_std": ("mean - deviation", "mean + deviation"),
}


def _actions(policy: Policy) -> str:
    if not policy.norm_stats:
        return "There are no statistics of actions, so it cannot act: it is a start for fine-tuning."
    rows, blocks = [], []
    for key, entry in policy.norm_stats.items():
        rate, amounts = policy.rate(key), [entry.get("num_trajectories"), entry.get("num_transitions")]
        amounts = [f"{amount:,}" if amount else "unknown" for amount in amounts]
        if policy.config.action_chunk > 1:
            amounts.insert(0, f"{policy.config.action_chunk / rate:.3g} s" if rate else "unknown")
        told = [str(len(policy.dims[key])), f"{rate:g} Hz" if rate else "unknown", *amounts, _gripper(policy, key)]
        rows.append([code(key, in_table=True), *told])
        block = f"{_convention(policy, key)}\n\n{_dims(policy, key)}"
        if len(policy.norm_stats) > MOST_OPEN:
            block = f"<details>\n<summary>{escape_html(key)}</summary>\n\n{block}\n\n</details>"
        else:
            block = f"**{code(key)}**: {block}"
        blocks.append(block)
    pace, chunk = "Ask for a motion as often as that", policy.config.action_chunk
    if chunk > 1:
        pace = f"One answer covers {chunk} steps: carry out its steps at that rate, one after the other"
    unknown = " Where it is unknown, look it up in the dataset." if any(row[2] == "unknown" for row in rows) else ""
    return "\n\n".join(
        [
            "The policy answers in numbers from -1 to 1. The statistics of a dataset turn them into its units: -1 and "
            f"1 become its {' and '.join(ENDS[policy.config.action_normalization])}. Unscaled dims stay as they are.",
            table(["unnorm_key", "dims", "rate", *["a chunk"] * (chunk > 1), "episodes", "steps", "gripper"], rows),
            f"The rate is that of the data. {pace}: otherwise the robot moves faster or slower than it was shown."
            f"{unknown}",
            *blocks,
        ]
    )


def _state(policy: Policy) -> str:
    """What the numbers of the robot's state are, as far as it is known."""
    if not policy.config.proprio_dim or not policy.norm_stats:
        return ""
    blocks, names = [], ENDS[policy.config.action_normalization]
    for key, entry in policy.norm_stats.items():
        stats = policy.states.get(key)
        if stats is None:
            blocks.append(f"**{code(key)}** has no statistics of it: the policy does not act with this dataset's.")
            continue
        told = list(entry["proprio"].get("names", [])) or [f"state {number}" for number in range(stats.dim)]
        rows = [[escape(name), f"{low:.5g}", f"{high:.5g}"] for name, low, high in zip(told, stats.low, stats.high)]
        blocks.append(f"**{code(key)}**:\n\n{table(['dim', *names], rows)}")
    body = "\n\n".join(blocks)
    if len(blocks) > MOST_OPEN:
        body = f"<details>\n<summary>of each dataset</summary>\n\n{body}\n\n</details>"
    return (
        f"## The robot's state\n\nThe policy takes {policy.config.proprio_dim} numbers of it, in the order and the "
        "units of the data it was trained on. Pass them as they are: `predict_action` brings what lies between the "
        f"values below to [-1, 1], and clips what lies beyond.\n\n{body}"
    )


def _dims(policy: Policy, key: str) -> str:
    stats, rows = policy.stats[key], []
    columns = zip(policy.dims[key], stats.low, stats.high, stats.mask, stats.constant)
    for (name, unit), low, high, scaled, constant in columns:
        remark = "" if low <= 0 <= high else "0 lies outside: a position rather than a motion?"
        if low == high:
            remark = "constant in the data" if constant else "hardly moves in the data"
        told = [f"{low:.5g}", f"{high:.5g}", "yes" if scaled else "no", remark]
        rows.append([escape(name), escape(unit) or "unknown", *told])
    return table(["dim", "unit", *ENDS[policy.config.action_normalization], "scaled", "remark"], rows)


def _convention(policy: Policy, key: str) -> str:
    """Where the names and units of the dims come from."""
    if policy.declares_dims(key):
        return "names and units are those that the dataset declares."
    if policy.has_gripper(key):
        return "the convention of OpenVLA's own training data."
    if policy.guesses_dims(key):
        return (
            "the checkpoint names no dims: these names are guessed from their number, so check before a robot moves."
        )
    return "the checkpoint names no dims; they come in the order of the dataset's actions."


def _gripper(policy: Policy, key: str) -> str:
    if not policy.has_gripper(key):
        return "see below" if policy.declares_dims(key) else "unknown"
    if policy.stats[key].constant[-1]:
        return "constant in the data"
    return "1 = open"


# --- How it was made, and how well it does ---------------------------------------------------------------------------
SETTINGS = {  # of run.json
    "batch": "samples per optimizer step",
    "learning_rate": "learning rate",
    "lr_scheduler_type": "schedule",
    "decay_steps": "rate divided by ten at steps",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradient norm, at most",
    "ema": "decay of the average of the weights",
    "augment": "random crops and colours",
    "bf16": "bfloat16",
    "mixture": "mixture",
    "weights": "weights of the datasets",
    "validation_share": "share of episodes held out",
    "seed": "seed",
}


def _training(facts: CardFacts) -> str:
    run, data = facts.training, ", ".join(linked(*place, "datasets/") for place in facts.data)
    if not run:
        told = f"Trained on {data}. How is unknown" if data else "Unknown"
        return f"{told}: no record of a run came with these weights."
    amounts = "; ".join(f"{len(part):,} episodes, {sum(part):,} steps" for part in listed(run.get("lengths")))
    rows = {"start": linked(*facts.base), "data": data or "unknown", "trained on": amounts or "unknown"}
    rows["mode"] = escape(str(run.get("mode") or "unknown"))
    if run.get("mode") in ("lora", "qlora"):
        rows["adapter"] = _adapter(run)
    if facts.is_from_the_end:
        steps = max((entry["step"] for entry in facts.history if is_number(entry.get("step"))), default=0)
        rows["optimizer steps"] = f"{steps:,}" if steps else "unknown"
    for name, told in SETTINGS.items():
        if (value := run.get(name)) is not None:
            rows[told] = ("yes" if value else "no") if isinstance(value, bool) else escape(str(value))
    if not facts.is_from_the_end:
        return (
            f"{facts_table(rows)}\n\nThe weights are those of {code(_last_part(facts.source_name))}, which the run "
            "saved before its end: how it ended says nothing about them, and is left out."
        )
    if losses := [entry for entry in facts.history if is_number(entry.get("loss"))]:
        rows["last loss"] = f"{losses[-1]['loss']:.4f}, at step {losses[-1].get('step', 'unknown')}"
    return f"{facts_table(rows)}\n\n{_scores(facts.history)}"


def _adapter(run: dict) -> str:
    """Rank and places of LoRA. A null `lora_alpha` stands for min(rank, 16)."""
    rank, alpha, dropout = (run.get(f"lora_{name}") for name in ("rank", "alpha", "dropout"))
    alpha = alpha or (min(rank, 16) if rank and "lora_alpha" in run else None)
    told = [("rank", rank), ("alpha", alpha), ("dropout", f"{dropout:g}" if is_number(dropout) else dropout)]
    where = "all linear layers but the head" + ("" if run.get("lora_vision") else " and the vision towers")
    where = "layers that are not recorded" if run.get("lora_vision") is None else where
    where += "; the head itself, whole" if run.get("lora_head") else ""
    return ", ".join(f"{name} {'unknown' if value is None else value}" for name, value in told) + f", on {where}"


def _scores(history: list[dict]) -> str:
    """What the run measured while it trained, last and best, per set of episodes."""
    found = {}
    for entry in history:
        for name, value in entry.items():
            if (match := re.fullmatch(r"eval_(.*)l1", name)) and is_number(value):
                accuracy = entry.get(f"eval_{match[1]}token_accuracy")
                found.setdefault(match[1], []).append((value, entry.get("step", "unknown"), accuracy))
    if not found:
        return "No episodes were scored during training."
    rows = []
    for prefix, scores in found.items():  # "", "training_", "NAME_", "NAME_training_"
        kind = "training" if prefix.endswith("training_") else "held out"
        dataset = prefix.removesuffix("training_").rstrip("_")
        (last, step, accuracy), (best, best_step, _) = scores[-1], min(scores, key=lambda score: score[0])
        told = [f"{last:.4f} (step {step})", f"{best:.4f} (step {best_step})"]
        told.append(f"{100 * accuracy:.1f} %" if is_number(accuracy) else "unknown")
        rows.append([f"{kind} {escape(dataset)}".strip(), *told])
    return (
        "Distance to the recorded actions (L1, on the scale from -1 to 1) and share of action tokens predicted right, "
        "step by step, given the right tokens before. This does not say how often a task would succeed.\n\n"
        + table(["episodes", "L1, last", "L1, lowest", "tokens right, last"], rows)
    )


def _evaluation(facts: CardFacts) -> str:
    if not facts.evaluation:
        return "Unknown: no result of letting it act, in simulation or on a robot, came with it."
    rows, known = [], {facts.repo_id, *(name for _, name in [facts.base, *facts.data])}
    for result in facts.evaluation:
        scale, form = (100, "{:.1f} %") if is_rate(result["metric"]) else (1, "{:.4g}")
        low, high = result.get("interval") or (None, None)
        how = []
        if url := address(result):
            how.append(f"[source]({url})")
        elif "source" in result:
            how.append(escape(without_paths(result["source"])))
        if "command" in result:
            how.append(code(clean_command(result["command"], known), in_table=True))
        told = [form.format(scale * result["value"])]
        told.append("unknown" if low is None else f"{form.format(scale * low)} to {form.format(scale * high)}")
        told.append(f"{result['episodes']:,}" if result.get("episodes") else "unknown")
        metric = escape(result["metric"].replace("_", " "))
        rows.append([escape(result["dataset"]), metric, *told, ", ".join(how) or "unknown"])
    header = ["dataset", "metric", "value", "interval", "episodes", "how"]
    return f"As the publisher of this card reports:\n\n{table(header, rows)}"


def _license(policy: Policy, facts: CardFacts) -> str:
    chosen = code(choose_license(policy, facts))
    if facts.license:
        named = f" ({escape(facts.license_name)})" if facts.license_name else ""
        told = f"The publisher of these weights declares {chosen}{named}."
    elif policy.llm_license:
        told = (
            f"{chosen}, as the language model {code(policy.llm)} that these weights are derived from: the cautious "
            "choice, where their publisher has made none."
        )
    else:
        told = (
            f"**Undecided.** Nobody has looked up what the licences of {code(policy.llm)} and of the training data "
            "ask for; the publisher of these weights must decide."
        )
    return f"{told}\n\n{LLAMA_NOTICE}" if policy.llm_license == "llama2" else told


def _origin() -> str:
    packages = ("openvla", "torch", "transformers", "huggingface_hub")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"This card was written by `openvla export` from the files beside it, with {versions}."


# --- Markdown --------------------------------------------------------------------------------------------------------
def table(header: list[str], rows: list[list[str]]) -> str:
    """Cells have to be ready: escaped, and on one line."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def facts_table(rows: dict[str, str]) -> str:
    """Two columns without a header."""
    return table(["", ""], [[f"**{what}**", told] for what, told in rows.items()])


def one_line(text: str) -> str:
    return " ".join(text.split())


def escape_html(text: str) -> str:
    return one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def escape(text: str) -> str:
    """Text that comes out as it is, in tables, too."""
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", escape_html(text))


def code(text: str, in_table: bool = False) -> str:
    """A code span, whatever backticks are in it. Tables want bars escaped even there."""
    text = one_line(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{pad}{text.replace('|', chr(92) + '|') if in_table else text}{pad}{fence}"


def linked(place: str | None, name: str | None, kind: str = "") -> str:
    """A link to the Hub if the place has a `name` there; else only the last part of what is a path somewhere."""
    if not place:
        return "unknown"
    if name:
        return f"[{escape(place)}](https://huggingface.co/{kind}{name})"
    return f"{code(_last_part(place), in_table=True)} (local)"


def address(result: dict) -> str | None:
    """The source of a result, if it is one that can be followed."""
    source = result.get("source", "")
    return source if re.fullmatch(r"https?://[^\s()<>|]+", source) else None


# Absolute, from the home or present folder, Windows', network shares, file:// addresses, and folders of other machines
_PATH = r"""(?:file://|~/|\.\.?[/\\]|/(?=[^\s/]+/)|[A-Za-z]:[\\/](?!/)|\\\\(?=[^\s\\])|[\w.-]+@[\w.-]+:(?!\d))"""
_VALUE = r"""(?:"[^"]*"|'[^']*'|\S)+"""
_SECRET = r"(?!-*unnorm[-_]key\b)[\w.+-]*(?:key|token|secret|password)[\w.-]*"


def without_paths(text: str) -> str:
    """Paths that are told as such shrink to their last part; addresses, and what could be a Hub id, stay."""
    path = rf"(?<![\w:/\\.~@-]){_PATH}[^\s'\"`|,;)]+"
    return re.sub(path, lambda match: _last_part(match[0]), text)


def clean_command(command: str, known: Collection[str | None] = ()) -> str:
    """A command without what is nobody's business.

    Paths shrink to their last part; addresses, and ids of public owners or in `known`, stay. Assignments of
    environment variables go, and so do the values of options that sound secret, but for `unnorm_key`.
    """
    start = r"(?<![^\s'\"])"
    command = re.sub(rf"^(?:[A-Za-z_]\w*={_VALUE}\s+)+", "", one_line(command))
    command = re.sub(rf"{start}[A-Z_][A-Z0-9_]*={_VALUE}\s*", "", command)
    command = re.sub(rf"(?i){start}({_SECRET})={_VALUE}", r"\1=…", command)
    command = re.sub(rf"(?i){start}(?=-)({_SECRET})\s+(?!-){_VALUE}", r"\1 …", command)

    def shorten(match: re.Match) -> str:
        word = match[0]
        if word[0] in "'\"" and not re.match(_PATH, word[1:]):  # a sentence: word by word
            return word[0] + re.sub(r"[^\s='\"]+", shorten, word[1:-1]) + word[0]
        plain = word.strip("'\"")
        name = hub_id(plain)
        stays = name and (name in known or name.partition("/")[0] in PUBLIC_OWNERS)
        stays = stays or ("://" in plain and not plain.startswith("file:"))
        is_path = "/" in plain or "\\" in plain or re.match(_PATH, plain)
        return word.replace(plain, _last_part(plain)) if is_path and not stays else word

    return re.sub(r""""[^"]*"|'[^']*'|[^\s='"]+""", shorten, command)


def _last_part(place: str) -> str:
    name = PureWindowsPath(PurePosixPath(place).name).name
    return (name.rpartition(":")[2] if "@" in name else name) or "unnamed"
