"""Writes the model card of a checkpoint's folder: README.md with the Hub's metadata, and pictures in `assets/`.

A card tells what the files and the given facts tell; what they do not is called unknown. Paths of this machine stay
off it. Results of evaluations come from a JSON file, a list of

    {"dataset": "libero_spatial", "metric": "success_rate", "value": 0.847, "episodes": 500,
     "interval": [0.813, 0.876], "source": "https://…", "command": "openvla evaluate …"}

of which the first three are needed. Rates (metrics that end in `_rate` or `accuracy`) and their intervals are
fractions in [0, 1].
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from openvla.hub_upload.card_facts import (
    RELATIONS,
    CardFacts,
    Example,
    Policy,
    hub_id,
    read_evaluation,
    read_policy,
    read_run,
)
from openvla.hub_upload.card_text import address, choose_license, code, one_line, write_body

__all__ = ["CardFacts", "Example", "read_evaluation", "read_run", "validate_card", "write_card"]

TAGS = ["robotics", "vision-language-action", "openvla"]
PIPELINE_TAGS = ("robotics", "image-text-to-text")  # of the Hub's, those that fit
HUB_TOKEN = r"hf_[A-Za-z0-9]{20,}"
PICTURE = r"!\[(?:[^\]\\]|\\.)*\]\(([^)]+)\)"  # in Markdown: the file


def write_card(folder: Path, facts: CardFacts, examples: Sequence[Example] = ()) -> Path:
    """Writes README.md and `assets/*.png` into a checkpoint's folder, under temporary names first.

    Args:
        folder: in HF layout, with this package's code, as `openvla export` and `openvla convert` make it.

    Returns the path of README.md. Raises ValueError or KeyError for facts that cannot be, or that contradict the
    folder, before anything is written.
    """
    from huggingface_hub import ModelCard

    folder = Path(folder)
    policy = read_policy(folder)
    facts.check()
    for example in examples:
        if example.unnorm_key not in policy.norm_stats:
            known = sorted(policy.norm_stats)
            raise KeyError(f"An example is in units of {example.unnorm_key!r}; the checkpoint has {known}.")
    name = (facts.repo_id or _final_name(folder)).rpartition("/")[2]
    pictures = _draw(policy, examples)
    metadata = _metadata(policy, facts, examples, name)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{write_body(policy, facts, examples, name)}")

    for file, picture in pictures.items():
        (folder / "assets").mkdir(exist_ok=True)
        temporary = folder / "assets" / f".{file}"
        picture.save(temporary, format="png")
        os.replace(temporary, folder / "assets" / file)
    temporary = folder / ".README.md"
    temporary.write_text(str(card), encoding="utf-8", newline="\n")
    os.replace(temporary, folder / "README.md")
    for old in folder.glob("assets/*.png"):  # of a card that had more examples
        if re.fullmatch(r"(example|observation)-\d+\.png", old.name) and old.name not in pictures:
            old.unlink()
    return folder / "README.md"


def validate_card(path: Path, ask_hub: bool = False):
    """Checks a card against its folder: metadata, pictures, statistics, and that it tells no path of this machine.

    Args:
        path: README.md, or its folder.
        ask_hub: also have the Hub check the metadata, which needs a connection.

    Returns huggingface_hub's `ModelCard`. Raises ValueError with all that is wrong.
    """
    from huggingface_hub import ModelCard

    path = Path(path)
    path = path / "README.md" if path.is_dir() else path
    folder, card = path.parent, ModelCard.load(path)
    data, problems = card.data.to_dict(), []
    if data.get("pipeline_tag") not in PIPELINE_TAGS:
        problems.append(f"pipeline_tag is {data.get('pipeline_tag')!r}, expected one of {PIPELINE_TAGS}")
    problems += [f"the metadata has no {name}" for name in ("license", "library_name", "tags") if not data.get(name)]
    for name in ("base_model", "datasets"):
        places = data.get(name) or []
        for place in [places] if isinstance(places, str) else places:
            if hub_id(place) is None:
                problems.append(f"{name} names {place!r}, which is no id on the Hub")
    if data.get("base_model_relation") not in (None, *RELATIONS):
        problems.append(f"base_model_relation is {data['base_model_relation']!r}, expected one of {RELATIONS}")
    files = [example["src"] for example in data.get("widget") or [] if "src" in example]
    for file in files + re.findall(PICTURE, card.text):
        if "://" not in file and not (folder / file).is_file():
            problems.append(f"it shows {file!r}, which is not there")
    for key in read_policy(folder).norm_stats:
        if code(key) not in card.text and code(key, in_table=True) not in card.text:
            problems.append(f"it says nothing about unnorm_key {key!r}")
    if re.search(HUB_TOKEN, card.content):
        problems.append("it tells what looks like a token of the Hub (hf_…): take it out, and revoke it")
    for local in (str(folder.resolve()), str(Path.home())):
        if len(local) > 1 and local in card.content:
            problems.append(f"it tells a path of this machine: {local}")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}.")
    if ask_hub:
        card.validate()
    return card


def _final_name(folder: Path) -> str:
    """The folder's name, also while `layout.new_folder` has it under a temporary one."""
    name = folder.resolve().name
    return name[1:].removesuffix(".incomplete") if name.startswith(".") else name


def _draw(policy: Policy, examples: Sequence[Example]) -> dict[str, Image.Image]:
    """`{file name: picture}`: what the policy saw, and the same with the motion it predicted."""
    from openvla.serve.drawing import draw_motion

    pictures = {}
    for number, example in enumerate(examples, start=1):
        stats = policy.norm_stats[example.unnorm_key]["action"]
        scale = stats if "q01" in stats and "q99" in stats else None
        dims = policy.dims[example.unnorm_key]
        pictures[f"observation-{number}.png"] = example.image.convert("RGB")
        pictures[f"example-{number}.png"] = draw_motion(example.image, example.action, dims, scale)
    return pictures


def _metadata(policy: Policy, facts: CardFacts, examples: Sequence[Example], name: str):
    """huggingface_hub's `ModelCardData`. Fields: hub-docs, model-cards.md, models-widgets.md, modelcard.md."""
    from huggingface_hub import EvalResult, ModelCardData

    (_, base), mode = facts.base, facts.training.get("mode")
    relation = facts.base_model_relation or ("finetune" if facts.training else None)
    widget = []
    for number, example in enumerate(examples, start=1):
        first = np.atleast_2d(example.action)[0]
        dims = policy.dims[example.unnorm_key]
        told = ", ".join(f"{dim} {value:+.4f}" for (dim, _), value in zip(dims, first))
        shown = {"src": f"assets/observation-{number}.png", "text": one_line(example.instruction)}
        output = {"text": f"{example.unnorm_key}: {told}"}
        widget.append({**shown, "example_title": f"Example {number}", "output": output})
    results = [
        EvalResult(
            task_type="robotics",
            task_name="Robotics",
            dataset_type=result["dataset"],
            dataset_name=result["dataset"],
            metric_type=result["metric"],
            metric_name=result["metric"].replace("_", " "),
            metric_value=result["value"],
            metric_args={key: result[key] for key in ("episodes", "interval") if result.get(key)} or None,
            source_url=address(result),
        )
        for result in facts.evaluation
    ]
    chunked = policy.config.action_chunk > 1
    return ModelCardData(
        language=facts.language,
        license=choose_license(policy, facts),
        license_name=facts.license_name,
        license_link=facts.license_link,
        library_name="transformers",
        pipeline_tag="robotics",
        tags=TAGS + [mode] * (mode in ("lora", "qlora")) + ["action-chunking"] * chunked,
        base_model=base,
        base_model_relation=relation if base else None,
        datasets=[name for _, name in facts.data if name] or None,
        model_name=name if results else None,
        eval_results=results or None,
        widget=widget or None,
    )
