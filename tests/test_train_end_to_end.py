"""`openvla finetune` as a user runs it, on a small policy and two demonstrations."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from test_readers import write_folder

import openvla
from openvla.action_tokenizer import name_action_dims
from openvla.configuration_openvla import OpenVLAConfig
from openvla.finetune import statistics
from openvla.finetune.collator import ActionCollator

pytest.importorskip("trl")
from openvla.finetune import sft  # noqa: E402
from openvla.hub_upload import export  # noqa: E402

OPTIONS = ["--per_device_train_batch_size", "2", "--report_to", "none", "--bf16", "false", "--logging_steps", "1"]
OPTIONS += ["--gradient_checkpointing", "false", "--validation_share", "0", "--eval_strategy", "no"]
OPTIONS += ["--disable_tqdm", "true", "--use_cpu", "true"]


@pytest.fixture
def policy(small_checkpoint):
    return small_checkpoint


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "CACHE", tmp_path / "cache")
    return write_folder(tmp_path / "my_robot")


def finetune(policy, data, run, *options) -> list[float]:
    """Runs it and returns the losses."""
    sft.main(["--model", str(policy), "--data", str(data), "--output_dir", str(run), *OPTIONS, *options])
    return losses(run)


def losses(run) -> list[float]:
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    "mode, moved",
    [
        ("full", ["vision_backbone", "projector", "layers.0", "layers.1", "embed_tokens", "lm_head", "model.norm"]),
        ("frozen-vision", ["projector", "layers.0", "layers.1", "embed_tokens", "lm_head", "model.norm"]),
        ("last-layer", ["layers.1", "embed_tokens", "lm_head"]),
        ("sandwich", ["vision_backbone", "projector", "layers.1", "embed_tokens", "lm_head"]),
    ],
)
def test_every_trained_weight_moves_and_every_frozen_one_stays(mode, moved, policy, data, tmp_path):
    run = tmp_path / "run"
    options = ["--mode", mode, "--num_train_epochs", "0.5", "--learning_rate", "1e-2", "--save_strategy", "no"]
    assert len(finetune(policy, data, run, *options, "--warmup_steps", "0")) == 2  # 8 steps, batches of 2
    before, after = weights(policy), weights(run / "merged")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) != any(part in name for part in moved), name


def test_lora_moves_linear_layers_only_and_merges(policy, data, tmp_path):
    run = tmp_path / "run"
    finetune(policy, data, run, "--max_steps", "2", "--learning_rate", "1e-2", "--save_strategy", "no")
    before, after = weights(policy), weights(run / "merged")
    for name, tensor in before.items():
        linear = any(f".{part}.weight" in name for part in ("qkv", "attn.proj", "fc1", "fc2", "fc3"))
        linear |= "_proj.weight" in name or ("projector" in name and "weight" in name)
        assert torch.equal(after[name], tensor) != linear, name
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (32, 16)
    # what others load: adapter on its base, and the merged folder, act alike; with the new statistics and crop
    merged, processor = openvla.load(run / "merged", dtype=torch.float32)
    assert set(merged.norm_stats) == {"my_robot"} and processor.image_processor.center_crop_area == 0.9
    adapted, own_processor = openvla.load(run / "adapter", dtype=torch.float32)
    assert adapted.norm_stats == merged.norm_stats and own_processor.image_processor.center_crop_area == 0.9
    inputs = processor(processor.build_prompt("go"), np.full((32, 48, 3), 90, np.uint8))
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, adapted(**inputs).logits, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(adapted.predict_action(**inputs), merged.predict_action(**inputs))


def test_what_is_known_of_a_dataset_reaches_the_checkpoint(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "CACHE", tmp_path / "cache")
    folder = write_folder(tmp_path / "my_robot")
    for file in folder.glob("episode_*/episode.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "fps": 10}))
    names = ["--action_names", *"abcdefg", "--action_units", *["rad"] * 6, "1 = closed"]
    finetune(policy, folder, tmp_path / "run", "--max_steps", "1", "--save_strategy", "no", *names)
    stats = json.loads((tmp_path / "run" / "merged" / "config.json").read_text())["norm_stats"]
    assert stats["my_robot"]["control_frequency"] == 10
    assert name_action_dims(stats, "my_robot")[5:] == [("f", "rad"), ("g", "1 = closed")]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["hub"] == []
    with pytest.raises(ValueError, match="--action_names has 2 entries, my_robot has 7 dims"):
        finetune(policy, folder, tmp_path / "other", "--max_steps", "1", "--action_names", "x", "y")


def test_names_and_units_come_from_the_dataset_unless_they_are_given():
    reader = SimpleNamespace(name="sim", fps=20.0, action_names=["x", "gripper"], action_units=["m", "1 = open"])
    source = SimpleNamespace(scan=SimpleNamespace(norm_stats={"action": {"min": [0, 0]}}), reader=reader)
    found = sft.describe_dataset(source, ["front"], None, None)
    assert found["cameras"] == ["front"]
    assert found["action"]["names"] == ["x", "gripper"] and found["action"]["units"] == ["m", "1 = open"]
    assert found["control_frequency"] == 20
    given = sft.describe_dataset(source, ["front"], ["a", "b"], None)  # whose units the dataset's are not
    assert given["action"]["names"] == ["a", "b"] and given["action"]["units"] == ["", ""]
    reader.action_units = ["m"]
    assert sft.describe_dataset(source, ["front"], None, None)["action"]["units"] == ["", ""]


def test_qlora_trains_on_a_cpu(policy, data, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = ["--mode", "qlora", "--max_steps", "2", "--learning_rate", "1e-2", "--save_strategy", "no"]
    assert all(np.isfinite(finetune(policy, data, tmp_path / "run", *options)))
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    moved = {name for name, tensor in adapter.items() if "lora_B" in name and tensor.abs().max() > 0}
    assert any("language_model" in name for name in moved) and any("vision_backbone" in name for name in moved)
    assert not (tmp_path / "run" / "merged").exists()  # merged into the unquantised base, not into 4 bits
    adapted, processor = openvla.load(tmp_path / "run" / "adapter", dtype=torch.float32)
    export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--no-proof"])
    merged, _ = openvla.load(tmp_path / "out", dtype=torch.float32)
    inputs = processor(processor.build_prompt("go"), np.full((32, 48, 3), 90, np.uint8))
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, adapted(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_lora_without_vision(policy, data, tmp_path):
    options = ["--lora_vision", "false", "--lora_rank", "4", "--max_steps", "1", "--save_strategy", "no"]
    finetune(policy, data, tmp_path / "run", *options)
    names = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert names and not any("vision_backbone" in name for name in names) and any("projector" in n for n in names)


def test_lora_with_the_head(policy, data, tmp_path):
    options = ["--lora_head", "true", "--max_steps", "2", "--learning_rate", "1e-2", "--save_strategy", "no"]
    finetune(policy, data, tmp_path / "run", *options)
    before, after = weights(policy), weights(tmp_path / "run" / "merged")
    assert set(before) == set(after)
    assert not torch.equal(after["language_model.lm_head.weight"], before["language_model.lm_head.weight"])
    adapted, processor = openvla.load(tmp_path / "run" / "adapter", dtype=torch.float32)
    merged, _ = openvla.load(tmp_path / "run" / "merged", dtype=torch.float32)
    inputs = processor(processor.build_prompt("go"), np.full((32, 48, 3), 90, np.uint8))
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, adapted(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_one_large_batch_equals_many_small_ones(policy, data, tmp_path):
    common = ["--mode", "full", "--max_steps", "3", "--save_strategy", "no", "--learning_rate", "1e-3"]
    large = finetune(policy, data, tmp_path / "large", *common, "--per_device_train_batch_size", "8")
    small = finetune(
        policy,
        data,
        tmp_path / "small",
        *common,
        "--per_device_train_batch_size",
        "1",
        "--gradient_accumulation_steps",
        "8",
    )
    np.testing.assert_allclose(small, large, rtol=1e-5)


@pytest.mark.parametrize(
    "option",
    [
        ("--gradient_checkpointing", "true"),
        ("--dataloader_num_workers", "2"),
        pytest.param(("--torch_compile", "true"), marks=pytest.mark.slow),
    ],
    ids=lambda option: option[0],
)
def test_what_saves_memory_or_time_changes_no_loss(option, policy, data, tmp_path):
    common = ["--max_steps", "2", "--learning_rate", "1e-2", "--save_strategy", "no"]
    plain = finetune(policy, data, tmp_path / "plain", *common)
    other = finetune(policy, data, tmp_path / "other", *common, *option)
    np.testing.assert_allclose(other, plain, rtol=1e-5)
    before, after = weights(tmp_path / "plain" / "merged"), weights(tmp_path / "other" / "merged")
    assert set(before) == set(after)


def test_held_out_episodes_are_scored_and_the_best_is_kept(policy, data, tmp_path):
    run = tmp_path / "run"
    options = ["--validation_share", "0.5", "--eval_strategy", "steps", "--eval_steps", "2", "--max_steps", "4"]
    finetune(policy, data, run, *options, "--save_strategy", "no", "--learning_rate", "1e-2")
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [entry for entry in history if "eval_token_accuracy" in entry]
    assert [entry["step"] for entry in scores] == [2, 4]
    dims = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    for entry in scores:
        assert entry["eval_l1"] == pytest.approx(np.mean([entry[f"eval_l1/{dim}"] for dim in dims]))
        assert all(entry[f"eval_l1_physical/{dim}"] > 0 for dim in dims)
    assert all(0 <= entry["eval_training_token_accuracy"] <= 1 and entry["eval_training_l1"] > 0 for entry in scores)
    assert (run / "best" / "adapter_model.safetensors").exists() and (run / "curves.png").stat().st_size > 10_000


def test_a_mixture_is_trained_with_each_dataset_s_own_statistics(policy, data, tmp_path):
    other = write_folder(tmp_path / "other_robot")
    for folder in other.glob("episode_*"):
        with np.load(folder / "episode.npz") as arrays:
            np.savez(folder / "episode.npz", actions=10 * arrays["actions"])
    run = tmp_path / "run"
    options = ["--weights", "1", "3", "--max_steps", "4", "--validation_share", "0.5", "--eval_strategy", "steps"]
    options += ["--eval_steps", "4", "--save_strategy", "no", "--output_dir", str(run), "--model", str(policy)]
    sft.main(["--data", str(data), str(other), *OPTIONS, *options])
    stats = openvla.OpenVLAConfig.from_pretrained(run / "merged").norm_stats
    small, large = (np.array(stats[name]["action"]["q99"][:6]) for name in ("my_robot", "other_robot"))
    np.testing.assert_allclose(large, 10 * small, rtol=1e-5)
    scored = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = {key for entry in scored for key in entry if key.endswith("_l1")}
    names = ("my_robot", "other_robot")
    assert keys == {f"eval_{name}_l1" for name in names} | {f"eval_{name}_training_l1" for name in names}
    with pytest.raises(ValueError, match=r"Expected 2 positive --weights, one per dataset, got \[1.0\]"):
        sft.main(["--data", str(data), str(other), *OPTIONS, *options, "--weights", "1"])
    with pytest.raises(ValueError, match="need different names"):
        sft.main(["--data", str(data), str(data), *OPTIONS, *options])


def test_a_named_mixture_finds_its_datasets(tmp_path):
    for name in ("bridge_orig/1.0.0", "fractal20220817_data/0.1.0"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "features.json").write_text("{}")
    arguments = sft.FinetuneArguments(model="", data=[str(tmp_path)], mixture="bridge_rt_1")
    assert sft.find_datasets(arguments) == [
        ([str(tmp_path / "bridge_orig/1.0.0")], "bridge_orig", 1.0),
        ([str(tmp_path / "fractal20220817_data/0.1.0")], "fractal20220817_data", 1.0),
    ]
    arguments.mixture = "rtx"
    with pytest.raises(FileNotFoundError, match="rtx needs .*kuka/VERSION"):
        sft.find_datasets(arguments)


def test_the_learning_rate_warms_up_and_drops(policy, data, tmp_path):
    options = ["--decay_steps", "4", "5", "--warmup_steps", "2", "--max_steps", "6", "--learning_rate", "1e-3"]
    finetune(policy, data, tmp_path / "run", *options, "--save_strategy", "no")
    history = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    np.testing.assert_allclose(rates, [0, 0.5e-3, 1e-3, 1e-3, 1e-4, 1e-5], rtol=1e-6)


def test_the_average_of_the_weights_is_what_gets_saved(policy, data, tmp_path):
    common = ["--mode", "last-layer", "--learning_rate", "1e-2", "--save_steps", "1", "--max_steps", "3"]
    common += ["--lr_scheduler_type", "constant"]
    finetune(policy, data, tmp_path / "run", *common, "--ema", "0.9")
    name = "language_model.lm_head.weight"
    trained = [weights(tmp_path / "run" / f"checkpoint-{step}")[name] for step in (1, 2, 3)]
    average = weights(policy)[name]
    for step, values in enumerate(trained, start=1):
        decay = (1 + step) / (10 + step)  # below 0.9 so early
        average = decay * average + (1 - decay) * values
    torch.testing.assert_close(weights(tmp_path / "run" / "merged")[name], average, atol=1e-6, rtol=1e-5)
    resumed = [*common, "--ema", "0.9", "--resume", "true", "--max_steps", "4"]
    finetune(policy, data, tmp_path / "run", *resumed)
    finetune(policy, data, tmp_path / "whole", *common, "--ema", "0.9", "--max_steps", "4")
    after, whole = (weights(tmp_path / folder / "merged")[name] for folder in ("run", "whole"))
    assert torch.equal(after, whole)


def test_speed_is_told(policy, data, tmp_path):
    finetune(policy, data, tmp_path / "run", "--max_steps", "3", "--save_strategy", "no")
    history = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [entry for entry in history if "samples_per_second" in entry]
    assert [entry["step"] for entry in told] == [2, 3] and told[-1]["eta_minutes"] == 0
    assert all(entry["samples_per_second"] > 0 and 0 <= entry["data_wait"] < 1 for entry in told)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_resumed_run_sees_what_it_would_have_seen(mode, policy, data, tmp_path):
    options = ["--max_steps", "6", "--save_steps", "2", "--learning_rate", "1e-2", "--mode", mode]
    options += ["--lora_dropout", "0.1"]
    whole = finetune(policy, data, tmp_path / "whole", *options)
    stopped = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        collate = ActionCollator.__call__

        def fail(self, rows):
            if rows[0]["draw"] >= 2 * 5:  # the sixth batch, fetched during the fifth step
                raise KeyboardInterrupt
            return collate(self, rows)

        patch.setattr(ActionCollator, "__call__", fail)
        with pytest.raises(KeyboardInterrupt):
            finetune(policy, data, stopped, *options)
    assert sft.last_checkpoint(str(stopped)).endswith("checkpoint-4")
    assert finetune(policy, data, stopped, *options, "--resume", "true") == whole
    before, after = weights(tmp_path / "whole" / "merged"), weights(stopped / "merged")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_half_written_and_resumes(policy, data, tmp_path):
    options = ["--max_steps", "40", "--save_steps", "3", "--learning_rate", "1e-3", "--model", str(policy)]
    command = [sys.executable, "-m", "openvla.cli", "finetune", "--data", str(data), *OPTIONS, *options]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, "--output_dir", str(whole)], check=True, env=environment, capture_output=True)
    process = subprocess.Popen([*command, "--output_dir", str(killed)], env=environment, stderr=subprocess.DEVNULL)
    while not (killed / ".incomplete" / "checkpoint-21").exists():  # while it writes
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for checkpoint in killed.glob("checkpoint-*"):
        assert (checkpoint / "trainer_state.json").exists() and load_file(checkpoint / "adapter_model.safetensors")
    resumed = [*command, "--output_dir", str(killed), "--resume", "true"]
    subprocess.run(resumed, check=True, env=environment, capture_output=True)
    assert losses(killed) == losses(whole)


# --- Parts -----------------------------------------------------------------------------------------------------------
def test_split_holds_out_whole_good_episodes():
    lengths = [3, 0, 5, 2, 4, 6]
    train, held_out = sft.split_episodes(lengths, 0.4, seed=0)
    assert sorted(train + held_out) == [0, 2, 3, 4, 5] and len(held_out) == 2
    assert sft.split_episodes(lengths, 0.4, seed=0) == (train, held_out)
    assert sft.split_episodes(lengths, 0.0, seed=0) == ([0, 2, 3, 4, 5], [])
    with pytest.raises(ValueError, match="Cannot hold out"):
        sft.split_episodes([3], 0.1, seed=0)


def test_lora_on_openvla_7b_trains_what_the_original_did_but_for_what_never_runs():
    peft = pytest.importorskip("peft")
    from test_configuration_openvla import OPENVLA_7B

    with torch.device("meta"):
        model = openvla.OpenVLAForActionPrediction(OpenVLAConfig(**OPENVLA_7B))
        adapted = peft.get_peft_model(model, sft.lora_config(32, None, 0.0, vision=True))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    rank, head = 32, 32 * (4096 + 32064)
    dino_block = rank * (1024 + 3072 + 2 * 1024 + 2 * (1024 + 4096))
    siglip_block = rank * (1152 + 3456 + 2 * 1152 + 2 * (1152 + 4304))
    pool = rank * (2 * 1152 + 1152 + 2304 + 2 * 1152 + 2 * (1152 + 4304))
    convolutions = sum(rank * (3 * 14 * 14) + rank * dim for dim in (1024, 1152))
    # the original's 110,828,288 include adapters of the head, of blocks and a pool that never run, and of convolutions
    assert trained == 110_828_288 - head - dino_block - siglip_block - pool - convolutions == 107_862_016
    assert "lm_head              131,334,144               0    0.00%" in sft.parameter_table(adapted)


# --- What is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, message",
    [
        (["--mode", "lorra"], "Unknown mode 'lorra'"),
        (["--validation_share", "5"], r"validation share from 0 to below 1 \(0.05 for 5 %\), got 5.0"),
        (["--validation_steps", "0"], "--validation_steps of 1 or more"),
        (["--resume_from_checkpoint", "x"], "--resume_from_checkpoint x would have no effect here: --resume true"),
        (["--label_smoothing_factor", "0.5"], "--label_smoothing_factor 0.5 would have no effect"),
        (["--loss_type", "dft"], "--loss_type dft would have no effect"),
        (["--mask", "1", "1"], "mask has 2 entries for 7 action dims"),
        (["--cameras", "top"], r"has no cameras \['top'\]"),
    ],
)
def test_options_that_would_do_nothing_or_harm(options, message, policy, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune(policy, data, tmp_path / "run", *options, "--max_steps", "1")
    assert not (tmp_path / "run").exists()


def test_single_values_in_yaml(policy, data, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(f"model: {policy}\ndata: {data}\nweights: 2\ncameras: wrist\ndecay_steps: 1\nmax_steps: 1\n")
    sft.main(["--config", str(config), "--output_dir", str(tmp_path / "run"), *OPTIONS, "--save_strategy", "no"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["cameras"] == ["wrist"]


def test_a_gripper_that_never_closes_is_refused_unless_normalised(policy, data, tmp_path):
    for folder in data.glob("episode_*"):
        with np.load(folder / "episode.npz") as arrays:
            values = arrays["actions"].copy()
        values[:, 6] = 1.0
        np.savez(folder / "episode.npz", actions=values)
    with pytest.raises(ValueError, match="my_robot: dim 6 is always 1.0 and is not normalised.*--mask 1 1 1 1 1 1 1"):
        finetune(policy, data, tmp_path / "run", "--max_steps", "1")
    options = ["--mask", *"1111111", "--max_steps", "1", "--save_strategy", "no"]
    finetune(policy, data, tmp_path / "run", *options)
    model, processor = openvla.load(tmp_path / "run" / "merged", dtype=torch.float32)
    action = model.predict_action(**processor(processor.build_prompt("go"), np.full((32, 48, 3), 90, np.uint8)))
    assert action[6] == 1.0


def test_adapters_and_foreign_bins_are_no_start(policy, data, tmp_path):
    finetune(policy, data, tmp_path / "run", "--max_steps", "1", "--save_strategy", "no")
    with pytest.raises(ValueError, match="adapter is an adapter: start from the folder `merged`"):
        finetune(tmp_path / "run" / "adapter", data, tmp_path / "next", "--max_steps", "1")
    fitted = openvla.ActionTokenizer.fit(np.random.default_rng(0).normal(0, 0.01, (500, 7)))
    for change, message in (
        ({"action_dim": 14}, "my_robot has 7 action dims, the policy is made for 14"),
        ({"action_bins": fitted}, "bins fitted to other data"),
    ):
        config = json.loads((policy / "config.json").read_text()) | change
        shutil.copytree(policy, tmp_path / "changed", dirs_exist_ok=True)
        (tmp_path / "changed" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            finetune(tmp_path / "changed", data, tmp_path / "next", "--max_steps", "1")


def test_a_run_goes_on_only_as_it_began(policy, data, tmp_path, capsys):
    run, options = tmp_path / "run", ["--max_steps", "2", "--save_steps", "2"]
    finetune(policy, data, run, *options, "--resume", "true")
    assert "has no checkpoint: starting from the beginning" in capsys.readouterr().out
    assert not (run / ".incomplete").exists()
    with pytest.raises(ValueError, match="holds checkpoints of a run: --resume true goes on, or choose another"):
        finetune(policy, data, run, *options)
    for changed in (["--learning_rate", "0.1"], ["--seed", "1"], ["--ema", "0.9"], ["--mode", "full"]):
        with pytest.raises(ValueError, match=f"was begun otherwise.*{changed[0][2:]}: "):
            finetune(policy, data, run, *options, "--resume", "true", *changed)
    with np.load(data / "episode_000" / "episode.npz") as arrays:
        np.savez(data / "episode_000" / "episode.npz", actions=10 * arrays["actions"])
    with pytest.raises(ValueError, match="norm_stats: "):
        finetune(policy, data, run, *options, "--resume", "true")


# --- Several processes -----------------------------------------------------------------------------------------------
# accelerate shards over GPUs only; told that these processes have some, it does the same over gloo
FSDP_ON_CPU = """
import sys
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
start = AcceleratorState.__init__
def start_sharded(self, *args, fsdp_plugin=None, **options):
    start(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
AcceleratorState.__init__ = start_sharded
from openvla import cli
cli.main(["--traceback", "finetune", *sys.argv[1:]])
"""


def in_two_processes(folder: Path, way: str, policy, data, *options: str) -> None:
    """Runs `openvla finetune` with DDP or FSDP2 on gloo; `options` come after the usual ones."""
    script = folder / "finetune.py"
    script.write_text(FSDP_ON_CPU)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    if way == "fsdp2":
        settings = yaml.safe_load((Path(sft.__file__).parent / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
        environment |= {key.upper(): str(value) for key, value in settings.items()} | {"ACCELERATE_USE_FSDP": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    command += ["--model", str(policy), "--data", str(data), *OPTIONS, *options]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, [line for line in done.stderr.decode().splitlines() if "Error" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, way, head",
    [
        *[("lora", "ddp", None), ("full", "ddp", None), ("full", "fsdp2", None), ("lora", "fsdp2", None)],
        *[("lora", "ddp", "l1"), ("full", "fsdp2", "l1"), ("lora", "fsdp2", "l1")],
    ],
)
def test_two_processes_learn_as_one(mode, way, head, policy, data, tmp_path):
    options = ["--head", head, "--chunk", "2", "--proprio", "true", "--film", "true"] if head else []
    options += ["--mode", mode, "--max_steps", "4", "--learning_rate", "1e-3", "--validation_share", "0.5"]
    options += ["--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2", "--lr_scheduler_type", "cosine"]
    one, two = tmp_path / "one", tmp_path / "two"
    expected = finetune(policy, data, one, *options, "--per_device_train_batch_size", "4")
    run = partial(in_two_processes, tmp_path, way, policy, data, *options, "--output_dir", str(two))

    run()
    np.testing.assert_allclose(losses(two), expected, rtol=1e-4)
    scores = [
        [entry for entry in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "eval_l1" in entry]
        for folder in (one, two)
    ]
    for dim in ("x", "yaw", "gripper"):
        key = f"eval_l1_physical/{dim}"
        assert scores[1][-1][key] == pytest.approx(scores[0][-1][key], rel=1e-3)
    for name in ("merged", "best"):
        if (two / name / "config.json").exists():
            assert (two / name / "modeling_openvla.py").exists() and not list((two / name).glob("_fsdp*"))
            before, after = weights(one / name), weights(two / name)
            assert set(before) == set(after)
            for key, tensor in before.items():
                torch.testing.assert_close(after[key], tensor, atol=1e-4, rtol=1e-3)
    assert (two / "merged").exists() or (mode, way) == ("lora", "fsdp2")
    if transformers.__version__.startswith("4."):
        return  # Trainer 4.57 cannot load an optimizer into one of several CPU processes
    # from the second step on, again
    shutil.rmtree(two / "checkpoint-4")
    run("--resume", "true")
    np.testing.assert_allclose(losses(two), expected, rtol=1e-4)


@pytest.mark.slow
def test_each_process_draws_noise_of_its_own(policy, data, tmp_path):
    options = ["--head", "flow", "--chunk", "2", "--max_steps", "1", "--save_steps", "1"]
    in_two_processes(tmp_path, "ddp", policy, data, *options, "--output_dir", str(tmp_path / "run"))
    files = [tmp_path / "run" / "checkpoint-1" / f"rng_state_{rank}.pth" for rank in (0, 1)]
    first, second = (torch.load(file, weights_only=False)["cpu"] for file in files)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", ["none", "added", "bool", "causal"])
def test_plain_attention_is_pytorchs(kind):
    from openvla.finetune.trainer import _PlainAttention

    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8).requires_grad_() for _ in range(3))
    seen = torch.rand(2, 1, 5, 5) > 0.3
    seen[..., 0] = True
    options = {"added": {"attn_mask": torch.randn(2, 1, 5, 5)}, "bool": {"attn_mask": seen, "scale": 0.7}}
    options |= {"none": {}, "causal": {"is_causal": True}}
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(query, key, value, **options[kind])
    wanted = torch.autograd.grad(expected.square().sum(), (query, key, value))
    with _PlainAttention():
        found = attend(query, key, value, **options[kind])
        dropped = attend(query, key, value, dropout_p=1.0)  # not asked for by any policy of ours: left to PyTorch
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(found.square().sum(), (query, key, value))
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-5)
    assert dropped.abs().max() == 0


def test_plain_attention_weighs_in_float32_under_autocast():
    from openvla.finetune.trainer import _PlainAttention

    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8).bfloat16() for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16), _PlainAttention():
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    scores = ((query * 8**-0.5) @ key.mT).float()
    assert found.dtype == torch.bfloat16 and torch.equal(found, scores.softmax(dim=-1).bfloat16() @ value)
