"""Model cards: what they say is what the files and facts say, and nothing leaks."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image

import openvla
from openvla.action_tokenizer import name_action_dims
from openvla.finetune.oxe import ACTIONS
from openvla.hub_upload import convert
from openvla.hub_upload.card_facts import CONTROL_RATES, hub_id
from openvla.hub_upload.card_text import clean_command, code, escape, without_paths
from openvla.hub_upload.model_card import (
    CardFacts,
    Example,
    read_evaluation,
    read_run,
    validate_card,
    write_card,
)
from openvla.serve.drawing import draw_motion

NOTICE = "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc."
ACTION = np.array([0.0123, -0.021, 0.018, -0.02, 0.035, 0.11, 1.0])
RESULT = {"dataset": "libero_spatial", "metric": "success_rate", "value": 0.847}
RUN = {
    "model": "openvla/openvla-7b",
    "data": ["lab/pick_cup@v3.0", "/home/somebody/robots/secret_lab/pour"],
    "hub": ["lab/pick_cup@v3.0"],
    "mode": "lora",
    "lora_rank": 32,
    "lora_alpha": None,
    "lora_dropout": 0.0,
    "lora_vision": False,
    "lora_head": True,
    "cameras": ["front"],
    "learning_rate": 0.0005,
    "lr_scheduler_type": "constant",
    "augment": True,
    "ema": None,
    "validation_share": 0.05,
    "seed": 42,
    "batch": 16,
    "lengths": [[30, 40, 50], [10, 20]],
}
HISTORY = [
    {"loss": 5.1, "step": 20},
    {"eval_pour_l1": 0.31, "eval_pour_token_accuracy": 0.12, "eval_pour_l1/x": 0.2, "step": 100},
    {"eval_pour_l1": 0.25, "eval_pour_token_accuracy": 0.6, "step": 1500},
    {"loss": 0.51234, "step": 1900},
    {"eval_pour_l1": 0.35, "eval_pour_token_accuracy": 0.725, "eval_pour_training_l1": 0.02, "step": 2000},
    {"train_runtime": 5.0, "step": 2000},
]


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    """The recorded checkpoint as this package saves it. Do not write."""
    folder = tmp_path_factory.mktemp("exported") / "policy"
    model, processor = openvla.load(checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """One per test: its weights are links, all else may be changed."""
    copy = tmp_path / "policy"
    shutil.copytree(exported, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    for weights in exported.glob("*.safetensors"):
        (copy / weights.name).symlink_to(weights)
    return copy


@pytest.fixture
def example(images) -> Example:
    return Example(images[0].convert("RGB").resize((128, 96)), "pick up the cup", "bridge_orig", ACTION)


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def write(folder: Path, examples=(), **facts) -> tuple[dict, str]:
    """Metadata and text of a card that was written, and found valid."""
    path = write_card(folder, CardFacts(**facts), examples)
    assert path == folder / "README.md"
    card = validate_card(path)
    return card.data.to_dict(), card.text


def tables(text: str) -> list[list[list[str]]]:
    """Rows of cells, per table: split at bars that are not escaped, as GitHub does."""
    found = re.findall(r"(?:^\|.*\|\n?)+", text, flags=re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", row)[1:-1] for row in part.strip().split("\n")] for part in found]


def facts_of(text: str) -> dict[str, str]:
    """The rows of tables without a header."""
    rows = [row for part in tables(text) for row in part if len(row) == 2]
    return {what.strip(" *"): told.strip() for what, told in rows}


# --- Metadata ---
def test_metadata_comes_back(folder, example):
    data, text = write(folder, [example], repo_id="lab/cup", training=RUN, history=HISTORY)
    assert data["pipeline_tag"] == "robotics" and data["library_name"] == "transformers"
    assert data["base_model"] == "openvla/openvla-7b" and data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["lab/pick_cup"] and data["language"] == ["en"] and data["license"] == "llama2"
    assert data["tags"] == ["robotics", "vision-language-action", "openvla", "lora"]
    told = "bridge_orig: x +0.0123, y -0.0210, z +0.0180, roll -0.0200, pitch +0.0350, yaw +0.1100, gripper +1.0000"
    assert data["widget"] == [
        {
            "src": "assets/observation-1.png",
            "text": "pick up the cup",
            "example_title": "Example 1",
            "output": {"text": told},
        }
    ]
    assert text.lstrip().startswith("# cup\n")


def test_nothing_is_claimed_without_facts(folder):
    data, text = write(folder)
    for name in ("base_model", "base_model_relation", "datasets", "model-index", "widget"):
        assert name not in data
    assert text.lstrip().startswith("# policy\n") and '"your-name/your-policy"' in text
    assert facts_of(text)["made from"] == "unknown"
    assert "## Training\n\nUnknown: no record" in text and "## Evaluation\n\nUnknown: no result" in text
    assert "## Example" not in text and "## Notes" not in text and not (folder / "assets").exists()


def test_explicit_facts_win_over_the_run(folder):
    data, _ = write(
        folder,
        base_model="other/base",
        base_model_relation="merge",
        datasets=["lab/other"],
        license="other",
        license_name="our-terms",
        license_link="LICENSE",
        training=RUN,
    )
    chosen = ("base_model", "base_model_relation", "datasets", "license", "license_name", "license_link")
    assert [data[name] for name in chosen] == [
        "other/base",
        "merge",
        ["lab/other"],
        "other",
        "our-terms",
        "LICENSE",
    ]


def test_the_model_index_survives_the_hubs_own_reader(folder):
    results = [
        RESULT | {"episodes": 500, "interval": [0.813, 0.876], "source": "https://example.org/results"},
        {"dataset": "my_robot", "metric": "l1", "value": 0.0213},
    ]
    data, _ = write(folder, repo_id="lab/cup", evaluation=results)
    name, found = model_index_to_eval_results(data["model-index"])
    assert name == "cup"
    assert [(each.task_type, each.dataset_name, each.metric_type, each.metric_value) for each in found] == [
        ("robotics", "libero_spatial", "success_rate", 0.847),
        ("robotics", "my_robot", "l1", 0.0213),
    ]
    assert found[0].metric_args == {"episodes": 500, "interval": [0.813, 0.876]}
    assert found[0].source_url == "https://example.org/results" and found[1].metric_args is None


@pytest.mark.parametrize(
    "place, expected",
    [
        ("openvla/openvla-7b", "openvla/openvla-7b"),
        ("lab/pick_cup@v3.0", "lab/pick_cup"),
        ("/home/lab/pick_cup", None),
        ("~/pick_cup", None),
        ("../pick_cup", None),
        ("C:\\data\\cup", None),
        ("runs/cup", None),
        ("cup/merged", None),
        ("cup/checkpoint-500", None),
        ("lab/demo.hdf5", None),
        ("lab/cup/extra", None),
        ("pick_cup", None),
        ("", None),
        (None, None),
    ],
)
def test_what_is_an_id_of_the_hub(place, expected):
    assert hub_id(place) == expected


def test_what_the_publisher_names_is_on_the_hub_unless_it_exists_here(folder, tmp_path, monkeypatch):
    (tmp_path / "lab" / "pick_cup").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    given = {"base_model": "lab/pick_cup", "datasets": ["lab/pick_cup", "lab/other@main"]}
    data, text = write(folder, **given, base_found="openvla/openvla-7b", training=RUN)
    assert "base_model" not in data and "base_model_relation" not in data and data["datasets"] == ["lab/other"]
    told = "`pick_cup` (local), [lab/other@main](https://huggingface.co/datasets/lab/other)"
    assert facts_of(text)["data"] == told and facts_of(text)["made from"] == "`pick_cup` (local)"


@pytest.mark.parametrize("found", [None, "ckpts/openvla-7b"])
def test_what_a_run_names_is_local_wherever_the_card_is_written(folder, tmp_path, monkeypatch, found):
    """`ckpts/openvla-7b` is a folder of where the run was: from elsewhere it looks like an id of the Hub."""
    training = RUN | {"model": "ckpts/openvla-7b", "data": ["secret_lab/pick_cup"], "hub": []}
    cards = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        (tmp_path / "one" / "ckpts" / "openvla-7b").mkdir(parents=True, exist_ok=True)
        cards.append(write(folder, base_found=found, training=training))
    assert cards[0] == cards[1]
    data, text = cards[0]
    assert "base_model" not in data and "datasets" not in data
    assert "ckpts" not in text and "secret_lab" not in text
    told = facts_of(text)
    assert (told["made from"], told["data"]) == ("`openvla-7b` (local)", "`pick_cup` (local)")


@pytest.mark.parametrize("owner", ["openvla", "moojink", "lerobot", "Stanford-ILIAD"])
def test_what_a_run_names_is_linked_if_it_is_known_to_be_public(folder, owner):
    place = f"{owner}/thing"
    data, text = write(folder, training={"model": "runs/x", "data": place, "hub": None}, base_found=place)
    assert data["base_model"] == place and data["datasets"] == [place]
    assert facts_of(text)["made from"] == f"[{place}](https://huggingface.co/{place})"
    data, _ = write(folder, training={"model": f"{owner}s/thing", "data": [f"{owner}/best", "a/b"], "hub": ["a/b"]})
    assert "base_model" not in data and data["datasets"] == ["a/b"]


def test_what_a_run_read_from_the_hub_is_linked(folder, tmp_path, monkeypatch):
    (tmp_path / "lab" / "base").mkdir(parents=True)  # that the same exists here says nothing about there
    monkeypatch.chdir(tmp_path)
    data, _ = write(folder, training={"model": "lab/base", "hub": ["lab/base"]})
    assert data["base_model"] == "lab/base" and data["base_model_relation"] == "finetune"
    data, _ = write(folder, training={"model": "other/base", "hub": ["lab/base"]}, base_found="lab/base")
    assert data["base_model"] == "lab/base"


# --- What the files say ---
def test_tables_hold_the_statistics(folder):
    _, text = write(folder)
    rows = [[cell.strip() for cell in row] for part in tables(text) for row in part]
    assert ["`bridge_orig`", "7", "5 Hz", "60,064", "2,135,463", "1 = open"] in rows
    assert ["`toy_robot`", "7", "unknown", "10", "1,000", "unknown"] in rows
    assert ["`toy_nomask_6d`", "6", "unknown", "1", "10", "unknown"] in rows
    assert ["dim", "unit", "1st percentile", "99th percentile", "scaled", "remark"] in rows
    assert ["x", "m", "-0.028727", "0.02831", "yes", ""] in rows
    assert ["yaw", "rad", "-0.20718", "0.20383", "yes", ""] in rows
    assert ["gripper", "1 = open", "0", "1", "no", ""] in rows
    assert ["z?", "dataset units", "-1.5", "-0.25", "yes", "0 lies outside: a position rather than a motion?"] in rows
    assert ["gripper?", "unknown", "-1", "1", "no", ""] in rows
    assert ["action 3", "unknown", "-2", "2", "yes", ""] in rows
    guessed = "the checkpoint names no dims: these names are guessed from their number, so check before a robot moves."
    assert text.count(f"**`toy_robot`**: {guessed}\n") == text.count(guessed) == 1
    assert "**`toy_nomask_6d`**: the checkpoint names no dims; they come in the order" in text
    assert "**`bridge_orig`**: the convention of OpenVLA's own training data." in text


@pytest.mark.parametrize(
    "key, low, high, declared, is_told",
    [
        ("bridge_orig", 0.0, 1.0, False, True),
        ("bridge_orig", -1.0, 1.0, False, False),
        ("bridge_orig", 0.0, 1.5, False, False),
        ("my_robot", 0.0, 1.0, False, False),
        ("my_robot", -1.0, 1.0, True, True),
    ],
)
def test_what_the_gripper_means_is_told_where_it_is_known(folder, key, low, high, declared, is_told):
    stats = json.loads((folder / "dataset_statistics.json").read_text())["bridge_orig"]
    for name, value in (("q01", low), ("min", low), ("q99", high), ("max", high)):
        stats["action"][name][6] = value
    if declared:
        names = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
        stats["action"] |= {"names": names, "units": ["m"] * 3 + ["rad"] * 3 + ["1 = open"]}
    (folder / "dataset_statistics.json").write_text(json.dumps({key: stats}))
    _, text = write(folder)
    assert text.count("1 = open") == (2 if is_told else 0)
    assert ("guessed from their number" in text) == (not is_told)


@pytest.mark.parametrize(
    "scheme, header, expected",
    [
        ("q99", ("1st percentile", "99th percentile"), ("-2", "3")),
        ("min_max", ("minimum", "maximum"), ("-5", "7")),
        ("mean_std", ("mean - deviation", "mean + deviation"), ("0.75", "1.25")),
    ],
)
def test_ends_of_the_range_are_called_by_their_name(folder, scheme, header, expected):
    ends = {"q01": -2.0, "q99": 3.0, "min": -5.0, "max": 7.0, "mean": 1.0, "std": 0.25}
    stats = {"action": {name: [value] * 2 for name, value in ends.items()}}
    (folder / "dataset_statistics.json").write_text(json.dumps({"arm": stats}))
    change(folder / "config.json", action_normalization=scheme)
    _, text = write(folder)
    rows = [[cell.strip() for cell in row] for part in tables(text) for row in part]
    assert ["dim", "unit", *header, "scaled", "remark"] in rows
    assert [row[2:4] for row in rows if row[0] in ("action 0", "action 1")] == [list(expected)] * 2
    assert f"-1 and 1 become its {header[0]} and {header[1]}." in text


def test_the_overview_counts_the_weights(folder, exported):
    _, text = write(folder)
    told = facts_of(text)
    model = openvla.OpenVLAForActionPrediction.from_pretrained(exported)
    assert told["parameters"].startswith(f"{sum(p.numel() for p in model.parameters()):,} in the files")
    size = sum(file.stat().st_size for file in exported.glob("*.safetensors"))
    assert told["weights"] == f"bfloat16, {size / 1e9:.2f} GB"
    assert told["prompt"] == "`In: What action should the robot take to {instruction}?\\nOut:`"
    assert told["language model"] == "`meta-llama/Llama-2-7b-hf`, 3 layers of width 128"


def test_statistics_beside_the_weights_win(folder):
    stats = json.loads((folder / "dataset_statistics.json").read_text())
    stats["toy_robot"]["action"]["q99"][0] = 7.25
    (folder / "dataset_statistics.json").write_text(json.dumps({"toy_robot": stats["toy_robot"]}))
    _, text = write(folder)
    assert "| 7.25 | yes |" in text and "`bridge_orig`" not in text


def test_what_a_dataset_declares_is_told(folder):
    stats = json.loads((folder / "dataset_statistics.json").read_text())["toy_nomask_6d"]
    stats["action"] |= {"names": [f"joint_{n}.pos" for n in range(6)], "units": ["deg"] * 6}
    stats["action"]["min"][5] = stats["action"]["max"][5] = stats["action"]["q01"][5] = stats["action"]["q99"][5] = 3
    (folder / "dataset_statistics.json").write_text(json.dumps({"arm": stats | {"control_frequency": 12.5}}))
    _, text = write(folder)
    assert "names and units are those that the dataset declares" in text and "| 12.5 Hz |" in text
    assert "| joint\\_3.pos | deg | -2 | 2 | yes |  |" in text
    assert "| joint\\_5.pos | deg | 3 | 3 | yes | constant in the data |" in text


def test_many_datasets_are_folded_up_and_all_are_told(folder):
    stats = json.loads((folder / "dataset_statistics.json").read_text())["bridge_orig"]
    keys = [*list(CONTROL_RATES)[:20], "dobbe", "libero_goal"]
    (folder / "dataset_statistics.json").write_text(json.dumps(dict.fromkeys(keys, stats)))
    _, text = write(folder)
    assert text.count("<details>") == text.count("</details>") == 22
    assert "| `dobbe` | 7 | unknown |" in text and "| `libero_goal` | 7 | 20 Hz |" in text
    assert "center_crop_area=0.9" in text  # no crop is declared


def test_known_rates_are_of_datasets_that_exist():
    assert set(CONTROL_RATES) < set(ACTIONS)
    rates = """
        ucsd_kitchen_dataset* 2, fractal20220817_data 3, nyu_franka_play_dataset* 3, bridge_orig 5,
        berkeley_autolab_ur5 5, dlr_edan_shared_control* 5, kuka 10, jaco_play 10, berkeley_cable_routing 10,
        roboturk 10, bc_z 10, cmu_stretch 10, stanford_hydra_dataset* 10, furniture_bench_dataset* 10,
        berkeley_fanuc_manipulation 10, fmb_dataset 10, taco_play 15, austin_buds_dataset* 20,
        austin_sailor_dataset* 20, austin_sirius_dataset* 20, viola 20, utaustin_mutex 20,
        iamlab_cmu_pickup_insert* 20, toto 30
    """
    pairs = (pair.split() for pair in rates.replace("*", "_converted_externally_to_rlds").split(","))
    assert {name: int(rate) for name, rate in pairs} == CONTROL_RATES


@pytest.mark.parametrize("declared, told", [(12.5, "12.5 Hz"), (None, "5 Hz"), (0, "5 Hz"), ("fast", "5 Hz")])
def test_a_declared_rate_wins_over_the_known_one(folder, declared, told):
    stats = json.loads((folder / "dataset_statistics.json").read_text())["bridge_orig"]
    stats = {"bridge_orig": stats | {"control_frequency": declared}}
    (folder / "dataset_statistics.json").write_text(json.dumps(stats))
    assert f"| `bridge_orig` | 7 | {told} |" in write(folder)[1]


def test_the_picture_is_told_as_the_processor_makes_it(folder):
    assert "The picture is resized to 224 × 224 pixels, whatever its proportions (bicubic)." in write(folder)[1]
    change(folder / "preprocessor_config.json", center_crop_area=0.9, jpeg_quality=95, lanczos3_size=224)
    _, text = write(folder, training=RUN)
    numbered = re.findall(r"^\d\. (\w+)", text, flags=re.MULTILINE)
    assert numbered == ["compressed", "resized", "cut", "resized"]
    assert "quality 95" in text and "the middle 90% of its area" in text and "trained on `front`" in text


def test_a_policy_without_statistics_is_a_start(folder):
    (folder / "dataset_statistics.json").unlink()
    change(folder / "config.json", norm_stats=None)
    _, text = write(folder)
    assert "it is a start for fine-tuning" in text and "predict_action" not in text


def test_chunks_and_cameras(folder, example):
    fields = {"num_cameras": 2, "action_chunk": 10, "action_head": "l1", "action_dim": 7, "action_slot_id": 32002}
    change(folder / "config.json", attention="bidirectional", **fields)
    data, text = write(folder, [Example(example.image, "pour", "bridge_orig", np.tile(ACTION, (10, 1)))])
    assert "action-chunking" in data["tags"]
    assert "for number in range(2)]" in text and "# (10, 7): x y z" in text
    assert (
        facts_of(text)["answers"]
        == "10 steps (a chunk) at a time, by a head of the kind `l1`; all numbers at once (bidirectional attention)"
    )
    assert "| dim | step 1 |" in text and "| step 8 | unit |" in text and "The first 8 of 10 steps." in text
    assert facts_of(text)["takes"] == "2 camera pictures, in a fixed order, and an instruction"
    text = " ".join(text.split())
    assert "it looks at 2 camera pictures, reads an instruction" in text and "the next 10 motions of the arm" in text
    assert "## What the pictures must look like" in text and "Each picture is resized" in text
    assert "One answer covers 10 steps: carry out its steps at that rate" in text and "as often as that" not in text
    assert "comes from the present pictures and the instruction alone" in text


def test_one_camera_and_one_step(folder):
    text = " ".join(write(folder)[1].split())
    assert "it looks at a camera picture, reads" in text and "the next motion of the arm" in text
    assert "Ask for a motion as often as that: otherwise" in text and "One answer covers" not in text
    assert "comes from the present picture and the instruction alone" in text


def test_the_state_of_the_robot_is_not_forgotten(folder):
    change(folder / "config.json", proprio_dim=8)
    _, text = write(folder)
    assert facts_of(text)["takes"] == "a camera picture and an instruction, and 8 numbers of the robot's state"
    assert "comes from the robot's present state, the present picture and the instruction alone" in text


@pytest.fixture(scope="module")
def parallel(oft_folder, tmp_path_factory):
    """`parallel(head)`: a converted policy of two cameras, chunks of 8 and a state, with statistics of `toy_robot`."""
    folders = {}

    def folder(head: str = "l1") -> Path:
        if head not in folders:
            folders[head] = tmp_path_factory.mktemp("parallel") / "arm"
            convert.main([str(oft_folder(head)), str(folders[head]), "--chunk", "8", "--cameras", "2"])
            stats = json.loads((folders[head] / "dataset_statistics.json").read_text())["toy_robot"]
            (folders[head] / "dataset_statistics.json").write_text(json.dumps({"toy_robot": stats}))
        return folders[head]

    return folder


STATE = np.array([0.1, -0.2, 0.3, 0.0, 0.1, 0.2, 0.5, 0.25])


def test_a_chunk_a_state_and_the_order_of_cameras_are_told(parallel, images):
    folder = parallel()
    stats = json.loads((folder / "dataset_statistics.json").read_text())["toy_robot"]
    stats["control_frequency"] = 20
    (folder / "dataset_statistics.json").write_text(json.dumps({"toy_robot": stats}))
    picture = images[0].convert("RGB").resize((256, 96))
    example = Example(picture, "pour", "toy_robot", np.tile(ACTION, (8, 1)), STATE)
    data, text = write(folder, [example], training=RUN | {"cameras": ["front", "wrist"]})
    assert "action-chunking" in data["tags"]
    facts = facts_of(text)
    assert facts["takes"].endswith("and an instruction, and 8 numbers of the robot's state")
    assert facts["answers"].endswith("of the kind `l1`; all numbers at once (bidirectional attention)")
    assert "trained on `front`, `wrist`, in this order." in text and "arXiv:2502.19645" in text
    assert "noise" not in text
    header, _, row = next(each for each in tables(text) if each[0][0].strip() == "unnorm_key")
    assert [cell.strip() for cell in header[:4]] == ["unnorm_key", "dims", "rate", "a chunk"]
    assert [cell.strip() for cell in row[:4]] == ["`toy_robot`", "7", "20 Hz", "0.4 s"]
    (table,) = tables(text.partition("## The robot's state")[2].partition("## Training")[0])
    low, high = stats["proprio"]["q01"], stats["proprio"]["q99"]
    expected = [[f"state {n}", f"{low[n]:.5g}", f"{high[n]:.5g}"] for n in range(8)]
    assert [[cell.strip() for cell in cells] for cells in table[2:]] == expected
    assert "The robot's state: 0.1, -0.2, 0.3, 0, 0.1, 0.2, 0.5, 0.25." in text
    assert "| dim | step 1 |" in text and "| step 8 | unit |" in text
    assert Image.open(folder / "assets" / "observation-1.png").size == (256, 96)
    stats["proprio"]["names"] = [f"joint {n}" for n in range(8)]
    (folder / "dataset_statistics.json").write_text(
        json.dumps(
            {
                "toy_robot": stats,
                "other": {**stats, "proprio": {name: values[:7] for name, values in stats["proprio"].items()}},
            }
        )
    )
    _, text = write(folder)
    assert "| joint 7 |" in text and "**`other`** has no statistics of it" in text


def test_heads_that_start_from_noise_are_told(parallel):
    _, text = write(parallel("diffusion"))
    assert facts_of(text)["answers"].startswith(
        "8 steps (a chunk) at a time, by a head of the kind `diffusion`, in 50"
    )
    assert "starts from noise" in text and "noise=model.draw_noise([0])" in text


def test_the_code_on_the_card_of_such_a_policy_acts(parallel, images, tmp_path):
    folder = parallel("l1")
    stats = json.loads((folder / "dataset_statistics.json").read_text())["toy_robot"]
    stats["proprio"].pop("names", None)
    (folder / "dataset_statistics.json").write_text(json.dumps({"toy_robot": stats}))
    _, text = write(folder)
    mean = ", ".join(f"{value:.4g}" for value in stats["proprio"]["mean"])
    assert f"state = [{mean}]  # the robot's state: 8 numbers" in text
    script = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    script = script.replace('"your-name/your-policy"', repr(str(folder))).replace("bfloat16", "float32")
    frames = [image.convert("RGB") for image in images[:2]]
    for number, frame in enumerate(frames):
        frame.save(tmp_path / f"camera_{number}.png")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    script = f"import sys\nsys.modules['openvla'] = None\n{script}\nprint(action.tolist())"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    model, processor = openvla.load(folder, dtype=torch.float32)
    state = [float(f"{value:.4g}") for value in stats["proprio"]["mean"]]
    inputs = processor(processor.build_prompt("pick up the cup"), frames, state)
    expected = model.predict_action(**inputs, unnorm_key="toy_robot")
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), expected, rtol=0, atol=1e-6)


# --- The code on the card ---
def test_the_code_on_the_card_acts(folder, example, model, processor, tmp_path):
    _, text = write(folder, [example])
    script = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    script = script.replace('"your-name/your-policy"', repr(str(folder))).replace("bfloat16", "float32")
    example.image.save(tmp_path / "frame.png")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.modules['openvla'] = None\n{script}\nprint(action.tolist())"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    inputs = processor(processor.build_prompt("pick up the cup"), example.image)
    expected = model.predict_action(**inputs, unnorm_key="bridge_orig")
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), expected, rtol=0, atol=1e-6)


def test_code_for_several_robots_picks_none(folder, example, model, processor):
    _, text = write(folder)
    assert 'unnorm_key = "…"  # one of the datasets below\n' in text and "unnorm_key=unnorm_key)" in text
    inputs = processor(processor.build_prompt("pick up the cup"), example.image)
    with pytest.raises(KeyError, match="Unknown unnorm_key '…': this checkpoint has statistics for"):
        model.predict_action(**inputs, unnorm_key="…")
    _, text = write(folder, [example])
    assert 'unnorm_key="bridge_orig")' in text and "…" not in text
    stats = json.loads((folder / "dataset_statistics.json").read_text())
    (folder / "dataset_statistics.json").write_text(json.dumps({"toy_robot": stats["toy_robot"]}))
    _, text = write(folder)
    assert 'unnorm_key="toy_robot")\nprint(action)  # (7,): x? y? z? roll? pitch? yaw? gripper?' in text


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_code_loads_the_dtype_of_the_weights(folder, dtype):
    from safetensors.torch import load_file, save_file

    assert "trust_remote_code=True, dtype=torch.bfloat16)" in write(folder)[1]
    for file in folder.glob("*.safetensors"):
        weights = {name: weight.to(getattr(torch, dtype)) for name, weight in load_file(file).items()}
        file.unlink()
        save_file(weights, file)
    assert f"trust_remote_code=True, dtype=torch.{dtype})" in write(folder)[1]


# --- Training and evaluation ---
def test_a_run_is_told(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps(RUN))
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, HISTORY)) + "\n")
    training, history = read_run(run)
    _, text = write(folder, training=training, history=history)
    told = facts_of(text)
    assert told["data"] == "[lab/pick\\_cup@v3.0](https://huggingface.co/datasets/lab/pick_cup), `pour` (local)"
    assert told["trained on"] == "3 episodes, 120 steps; 2 episodes, 30 steps"
    rank = (
        "rank 32, alpha 16, dropout 0, on all linear layers but the head and the vision towers; the head itself, whole"
    )
    assert told["adapter"] == rank
    assert told["optimizer steps"] == "2,000" and told["learning rate"] == "0.0005"
    assert told["samples per optimizer step"] == "16" and told["random crops and colours"] == "yes"
    assert told["last loss"] == "0.5123, at step 1900" and "decay of the average of the weights" not in told
    assert "| held out pour | 0.3500 (step 2000) | 0.2500 (step 1500) | 72.5 % |" in text
    assert "| training pour | 0.0200 (step 2000) | 0.0200 (step 2000) | unknown |" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no run.json"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["best", "checkpoint-200"])
def test_what_is_true_of_the_end_is_not_told_of_other_weights(folder, name):
    _, text = write(folder, training=RUN, history=HISTORY, source_name=name)
    told = facts_of(text)
    assert "optimizer steps" not in told and "last loss" not in told and "| held out" not in text
    assert f"The weights are those of `{name}`" in text and "0.5123" not in text and "2,000" not in text
    assert told["learning rate"] == "0.0005"
    for end in ("merged", "adapter", None):
        _, text = write(folder, training=RUN, history=HISTORY, source_name=end)
        assert facts_of(text)["last loss"] == "0.5123, at step 1900" and "| held out pour |" in text
        assert facts_of(text)["optimizer steps"] == "2,000" and "The weights are those of" not in text


@pytest.mark.parametrize("mode", ["lora", "qlora", "full", None])
def test_fields_that_a_run_lacks_are_unknown(folder, mode):
    nulls = dict.fromkeys([*RUN, "mixture", "weights"]) | {"mode": mode}
    for run in (nulls, {"mode": mode, "format": 1}):
        history = [{"loss": None, "step": None}, {"eval_l1": None, "eval_token_accuracy": None}, {"step": "x"}, {}]
        data, text = write(folder, training=run, history=history)
        told = facts_of(text)
        assert told["start"] == told["data"] == told["trained on"] == told["optimizer steps"] == "unknown"
        assert told["mode"] == (mode or "unknown") and "last loss" not in told and "None" not in text
        assert "base_model" not in data and "datasets" not in data
        if mode in ("lora", "qlora"):
            rank = "rank unknown, alpha unknown, dropout unknown"
            assert told["adapter"] == f"{rank}, on layers that are not recorded"
        else:
            assert "adapter" not in told


def test_a_run_that_was_killed_is_read_and_a_broken_one_refused(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    assert read_run(tmp_path) == ({}, [])
    metrics = tmp_path / "metrics.jsonl"
    for end in ("", "\n", '\n{"loss": 0.', "\n5"):
        metrics.write_text(f'{{"step": 1}}\n\n{{"step": 2}}{end}')
        assert read_run(tmp_path) == ({}, [{"step": 1}, {"step": 2}])
    metrics.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no JSON"):
        read_run(tmp_path)
    metrics.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object, got '\[2\]'"):
        read_run(tmp_path)
    metrics.unlink()
    for broken in ("{", "[]", ""):
        (tmp_path / "run.json").write_text(broken)
        with pytest.raises(ValueError, match="run.json"):
            read_run(tmp_path)


def test_results_are_told_with_their_interval(folder):
    results = [
        RESULT | {"episodes": 500, "interval": [0.813, 0.876], "command": "openvla evaluate --model /srv/x/cup"},
        {"dataset": "a|b", "metric": "l1", "value": 0.021346, "source": "https://example.org/x"},
    ]
    _, text = write(folder, evaluation=results)
    how = "`openvla evaluate --model cup`"
    assert f"| libero\\_spatial | success rate | 84.7 % | 81.3 % to 87.6 % | 500 | {how} |" in text
    assert "| a\\|b | l1 | 0.02135 | unknown | unknown | [source](https://example.org/x) |" in text


def test_a_file_of_results_is_read(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([RESULT, RESULT | {"value": 1, "interval": [0.9, 1.0]}]))
    assert [result["value"] for result in read_evaluation(path)] == [0.847, 1]
    path.write_text("[")
    with pytest.raises(ValueError, match="results.json is no JSON"):
        read_evaluation(path)
    with pytest.raises(FileNotFoundError):
        read_evaluation(tmp_path / "missing.json")


@pytest.mark.parametrize(
    "results, message",
    [
        ({"libero": 0.8}, "expected a list of objects"),
        ([RESULT, {"dataset": "x", "value": 1}], "entry 1: lacks 'metric'"),
        ([RESULT | {"value": 84.7}], r"success_rate 84.7: rates are fractions in \[0, 1\]"),
        ([RESULT | {"value": "0.8"}], "value '0.8' instead of a number"),
        ([RESULT | {"value": True}], "value True instead of a number"),
        ([RESULT | {"value": float("nan")}], "value nan instead"),
        ([RESULT | {"episodes": 0}], "episodes 0 instead"),
        ([RESULT | {"episodes": 12.5}], "episodes 12.5 instead"),
        ([RESULT | {"interval": [0.9, 0.95]}], r"interval \[0.9, 0.95\] instead of \[low, high\] around 0.847"),
        ([RESULT | {"interval": [0.8]}], r"interval \[0.8\] instead"),
        ([RESULT | {"interval": [0.8, 1.2]}], r"interval \[0.8, 1.2\]: rates are fractions"),
        ([RESULT | {"episode": 5}], r"unknown fields \['episode'\]"),
        ([RESULT | {"dataset": ""}], "dataset '' instead of a text"),
    ],
)
def test_malformed_results_are_refused(folder, tmp_path, results, message):
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=message):
        read_evaluation(tmp_path / "results.json")
    with pytest.raises(ValueError, match=message):
        write_card(folder, CardFacts(evaluation=results))
    assert not (folder / "README.md").exists()


# --- Licences ---
@pytest.mark.parametrize(
    "llm, given, identifier, has_notice",
    [
        (("llama2-7b-pure", "meta-llama/Llama-2-7b-hf"), None, "llama2", True),
        (("vicuna-v15-7b", "lmsys/vicuna-7b-v1.5"), None, "llama2", True),
        (("our-own", "meta-llama/Llama-2-13b-hf"), None, "llama2", True),
        (("llama2-7b-pure", "meta-llama/Llama-2-7b-hf"), "mit", "mit", True),
        (("qwen25-0_5b", "Qwen/Qwen2.5-0.5B"), None, "apache-2.0", False),
        (("qwen25-3b", "Qwen/Qwen2.5-3B"), None, "other", False),
        (("our-own", "lab/our-own"), None, "other", False),
        (("our-own", "lab/our-own"), "bsd-3-clause", "bsd-3-clause", False),
    ],
)
def test_licences(folder, llm, given, identifier, has_notice):
    change(folder / "config.json", llm_backbone_id=llm[0], hf_llm_id=llm[1])
    data, text = write(folder, license=given)
    assert data["license"] == identifier and (NOTICE in text) == has_notice
    assert ("must decide" in text) == (identifier == "other")
    assert ("declares `" in text) == (given is not None)


# --- Pictures ---
def test_pictures_are_what_was_seen_and_predicted(folder, example):
    _, text = write(folder, [example])
    seen, drawn = (Image.open(folder / "assets" / f"{name}-1.png") for name in ("observation", "example"))
    np.testing.assert_array_equal(np.asarray(seen), np.asarray(example.image))
    stats = json.loads((folder / "dataset_statistics.json").read_text())["bridge_orig"]["action"]
    dims = name_action_dims({"bridge_orig": {"action": stats}}, "bridge_orig")
    expected = draw_motion(example.image, ACTION, dims, stats)
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(expected))
    assert "](assets/example-1.png)" in text and "| yaw | 0.1100 | rad |" in text and "The compass shows" in text
    example.unnorm_key = "toy_robot"
    data, text = write(folder, [example])
    assert "The compass shows" not in text and "| gripper? | 1.0000 | unknown |" in text
    assert data["widget"][0]["output"]["text"].startswith("toy_robot: x? +0.0123, y? -0.0210")


def test_nothing_temporary_and_no_old_picture_is_left(folder, example):
    write(folder, [example, example])
    write(folder, [example])
    assert sorted(path.name for path in (folder / "assets").iterdir()) == ["example-1.png", "observation-1.png"]
    assert not [path.name for path in folder.rglob(".*")]


def test_a_card_that_cannot_be_written_leaves_the_old_one(folder, example):
    write(folder, [example])
    before = {path: path.read_bytes() for path in [folder / "README.md", *folder.glob("assets/*")]}
    wrong = Example(example.image, "pour", "bridge_orig", np.full(7, np.nan))
    with pytest.raises(ValueError, match="finite"):
        write_card(folder, CardFacts(notes="new"), [example, wrong])
    with pytest.raises(KeyError, match=r"in units of 'other'; the checkpoint has \['bridge_orig', 'toy_nomask_6d'"):
        write_card(folder, CardFacts(notes="new"), [Example(example.image, "pour", "other", ACTION)])
    assert {path: path.read_bytes() for path in before} == before
    assert len(list((folder / "assets").iterdir())) == 2


# --- What must not get onto a card, and what must come out as it went in ---
def test_no_path_of_this_machine_gets_onto_a_card(folder, example, tmp_path):
    write_card(
        folder,
        CardFacts(
            base_model=str(tmp_path / "secret_base"),
            datasets=["/home/somebody/secret_lab/pour", "../secret_lab/cup", "C:\\secret_lab\\wipe"],
            training=RUN | {"model": "/home/somebody/secret_lab/x/best"},
            evaluation=[
                RESULT | {"command": "openvla evaluate --model=/home/somebody/secret_lab/m --out secret_lab/a/b"},
                RESULT | {"source": "measured in /home/somebody/secret_lab/here"},
            ],
            notes="See /home/somebody/secret_lab/notes.md, or https://example.org/secret/address.",
        ),
        [example],
    )
    content = (folder / "README.md").read_text()
    for part in ("somebody", "secret_lab", str(tmp_path), "/home"):
        assert part not in content, part
    data = ModelCard(content).data
    assert data.base_model is None and data.datasets is None
    told = facts_of(content)
    assert told["made from"] == "`secret_base` (local)"
    assert told["data"] == "`pour` (local), `cup` (local), `wipe` (local)"
    assert "`openvla evaluate --model=m --out b`" in content and "measured in here" in content
    assert "See notes.md, or https://example.org/secret/address." in content


@pytest.mark.parametrize(
    "command, expected",
    [
        ("HF_TOKEN=abc CUDA_VISIBLE_DEVICES=0 openvla evaluate x", "openvla evaluate x"),
        ("lower='a b' openvla evaluate x", "openvla evaluate x"),
        ("env WANDB_API_KEY='a b' openvla evaluate x", "env openvla evaluate x"),
        ("run --hf-token abc --n 5", "run --hf-token … --n 5"),
        ("run --api_key='a b' --n 5", "run --api_key=… --n 5"),
        ('run --Password "a b" --my-secret=q wandb.api_key=z', "run --Password … --my-secret=… wandb.api_key=…"),
        ("run --use-token --n 5", "run --use-token --n 5"),
        ("run --unnorm-key bridge_orig --unnorm_key=toto", "run --unnorm-key bridge_orig --unnorm_key=toto"),
        (r"run C:\me\cup D:/me/cup '\\host\me\cup' \\host\me\mug", "run cup cup 'cup' mug"),
        ('run --model="C:\\My Robots\\a cup"', 'run --model="a cup"'),
        ("run file:///home/me/cup me@host.lan:runs/cup me@host:cup", "run cup cup cup"),
        ("run --url=https://example.org/a/b --x=1", "run --url=https://example.org/a/b --x=1"),
        ("run openvla/openvla-7b lab/cup secret_lab/cup", "run openvla/openvla-7b lab/cup cup"),
        ("run --say 'put /home/me/cup away' n=5", "run --say 'put cup away' n=5"),
        ("run --say \"don't\" '/home/me/a b'", "run --say \"don't\" 'a b'"),
    ],
)
def test_commands_tell_no_secrets(folder, command, expected):
    assert clean_command(command, {"lab/cup", None}) == expected
    _, text = write(folder, repo_id="lab/cup", evaluation=[RESULT | {"command": command}])
    assert code(expected) in text


def test_paths_of_other_kinds_leave_texts_too():
    text = r"in \\host\me\a, file:///home/me/b, me@host:runs/c and D:\me\d; https://me.org/x, me@example.org, at 5:30"
    assert without_paths(text) == "in a, b, c and d; https://me.org/x, me@example.org, at 5:30"


def test_a_token_of_the_hub_is_found(folder):
    path = write_card(folder, CardFacts(notes="Use hf_" + "aB3" * 7))
    with pytest.raises(ValueError, match="looks like a token of the Hub"):
        validate_card(path)
    write(folder, notes="hf_llm_id, hf_abc")


def test_texts_that_are_no_paths_stay():
    for text in ("and/or", "3 m/s", "http://127.0.0.1:8000/act/now", "a / b", "/act", "lab/cup"):
        assert without_paths(text) == text


@pytest.mark.parametrize(
    "instruction",
    [
        "pick up | the `cup`",
        "two\nlines\n---\nand: more",
        'say "hi" \\ *now* [x](y) <b> & # $1$',
        "yes",
        "- {a: b}",
        "ändere die Tasse ☕",
        "'single' ```fence``` ``two``",
    ],
)
def test_instructions_come_out_as_they_went_in(folder, example, instruction):
    example.instruction = instruction
    data, text = write(folder, [example])
    plain = " ".join(instruction.split())
    assert data["widget"][0]["text"] == plain
    script = re.search(r"```python\n(.*?)\n```\n", text, flags=re.DOTALL)[1]
    found = re.search(r"build_prompt\((.*)\)$", script, flags=re.MULTILINE)[1]
    assert eval(found) == plain
    shown = re.search(r'^\*\*"(.*)"\*\*, in units', text, flags=re.MULTILINE)[1]
    unescaped = re.sub(r"\\([^\w\s])", r"\1", shown)
    assert unescaped.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") == plain
    assert all(len(row) == len(part[0]) for part in tables(text) for row in part)


def test_odd_names_of_datasets_do_not_break_tables(folder):
    stats = json.loads((folder / "dataset_statistics.json").read_text())["bridge_orig"]
    stats["action"] |= {"names": ["a|b", "c`d", "<e>", "f*g*", "h_i_", "[j](k)", "gripper"], "units": ["|"] * 7}
    (folder / "dataset_statistics.json").write_text(json.dumps({"my|robot `x`": stats, "`": stats}))
    _, text = write(folder)
    assert all(len(row) == len(part[0]) for part in tables(text) for row in part)
    assert "| `` my\\|robot `x` `` |" in text
    assert "| a\\|b | \\| |" in text and "| &lt;e&gt; |" in text


def test_markdown_is_escaped():
    assert escape("a_b*c|d`e <f> [g]") == "a\\_b\\*c\\|d\\`e &lt;f&gt; \\[g\\]"
    assert code("x") == "`x`" and code("a`b") == "``a`b``" and code("`") == "`` ` ``"
    assert code("a|b", in_table=True) == "`a\\|b`"


# --- Refusals ---
def test_facts_that_cannot_be_are_refused(folder):
    with pytest.raises(ValueError, match="base_model_relation must be one of"):
        write_card(folder, CardFacts(base_model="a/b", base_model_relation="child"))
    for wrong in ("cup", "a/b/c", "/a", "lab/cu p"):
        with pytest.raises(ValueError, match="repo_id must be owner/name"):
            write_card(folder, CardFacts(repo_id=wrong))


def test_a_folder_that_could_not_be_loaded_gets_no_card(checkpoint, folder):
    with pytest.raises(FileNotFoundError, match="lacks modeling_openvla.py"):  # as the original's tools leave it
        write_card(checkpoint, CardFacts())
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="lacks config.json"):
        write_card(folder, CardFacts())


def test_validation_tells_all_that_is_wrong(folder, example):
    write(folder, [example])
    path = folder / "README.md"
    content = path.read_text().replace("pipeline_tag: robotics", "pipeline_tag: robots")
    content = content.replace("license: llama2\n", "base_model: ../mine\n").replace("`toy_robot`", "`gone`")
    path.write_text(content + f"\nmade in {folder.resolve()}\n")
    (folder / "assets" / "example-1.png").unlink()
    with pytest.raises(ValueError) as error:
        validate_card(folder)
    for problem in (
        "pipeline_tag is 'robots'",
        "no license",
        "base_model names '../mine'",
        "shows 'assets/example-1.png', which is not there",
        "nothing about unnorm_key 'toy_robot'",
        "a path of this machine",
    ):
        assert problem in str(error.value), problem


def test_a_folder_under_its_temporary_name_is_called_by_its_own(folder):
    temporary = folder.with_name(".cup.incomplete")
    folder.rename(temporary)
    _, text = write(temporary)
    assert text.lstrip().startswith("# cup\n")


def test_the_docstring_shows_a_result_that_is_accepted(tmp_path):
    from openvla.hub_upload import model_card

    shown = re.search(r"\{.*?\}", model_card.__doc__, flags=re.DOTALL)[0]
    (tmp_path / "results.json").write_text(f"[{textwrap.dedent(shown)}]")
    assert read_evaluation(tmp_path / "results.json")[0]["interval"] == [0.813, 0.876]
