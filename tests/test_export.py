"""What is exported is the policy that was trained, whole, and acts where this package is not."""

import json
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import openvla
from openvla.finetune.policy import is_new
from openvla.finetune.sft import lora_config
from openvla.hub_upload import convert, export
from openvla.hub_upload.layout import (
    HUB_FILES,
    is_unused,
    released_names,
    skeleton,
    write_companions,
)
from openvla.hub_upload.merge import Adapter
from openvla.hub_upload.proof import Observation, ProofError, check_proof, compare, prove
from openvla.hub_upload.weights import SafetensorsFolder, TensorInfo, write_shards
from openvla.pretrained_openvla import ADAPTER_CONFIG, module_name

TRANSFORMERS_4 = transformers.__version__.startswith("4.")


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def adapt(model, config):
    """The model with an adapter whose every weight was moved, as training does."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return adapted


@pytest.fixture(scope="module")
def run(checkpoint, processor, tmp_path_factory):
    """What a fine-tuning run leaves: run.json, `adapter` with its own statistics and centre crop, `merged`."""
    folder = tmp_path_factory.mktemp("run") / "cup"
    model = openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, dtype=torch.bfloat16)
    statistics = {"cup": json.loads((checkpoint / "dataset_statistics.json").read_text())["bridge_orig"]}
    model.config.norm_stats = statistics
    adapted = adapt(model, lora_config(4, None, 0.0, vision=True, head=True))
    processor = openvla.OpenVLAProcessor.from_pretrained(checkpoint)
    processor.image_processor.center_crop_area = 0.9
    adapted.save_pretrained(folder / "adapter")
    processor.save_pretrained(folder / "adapter")
    (folder / "adapter" / "dataset_statistics.json").write_text(json.dumps(statistics))
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(checkpoint)
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    adapted.merge_and_unload().to(torch.bfloat16).save_pretrained(folder / "merged")
    processor.save_pretrained(folder / "merged")
    facts = {
        "model": "openvla/openvla-7b",
        "data": ["lab/cup"],
        "hub": ["lab/cup"],
        "mode": "lora",
        "learning_rate": 5e-4,
        "batch": 16,
    }
    facts |= {"lora_rank": 4, "lora_alpha": None, "lora_dropout": 0.0, "lora_vision": True, "lora_head": True}
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def exported(run, images, tmp_path_factory):
    """The adapter, exported and proven, with an example on its card."""
    folder = tmp_path_factory.mktemp("exported")
    images[0].convert("RGB").save(folder / "frame.png")
    options = ["--image", str(folder / "frame.png"), "--instruction", "Pick up the cup", "--repo-id", "lab/cup-policy"]
    export.main([str(run / "adapter"), str(folder / "policy"), "--max-shard-size", "0.008", *options])
    return folder / "policy"


# --- Merging ---
VARIANTS = {
    "as openvla finetune makes it": lora_config(4, None, 0.0, vision=True, head=True),
    "rank-stabilised, per-layer ranks": peft.LoraConfig(
        r=4, target_modules=["q_proj", "fc1"], use_rslora=True, rank_pattern={"layers.1.self_attn.q_proj": 2}
    ),
    "DoRA": peft.LoraConfig(r=4, target_modules=["down_proj", "qkv"], use_dora=True),
    "convolution and embedding": peft.LoraConfig(r=4, target_modules=["patch_embed.proj", "embed_tokens"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_one_weight_at_a_time_is_merging_them_all(variant, dtype, checkpoint, tmp_path):
    model = openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = adapt(model, VARIANTS[variant])
    adapted.save_pretrained(tmp_path)
    adapter = Adapter(tmp_path, skeleton(openvla.OpenVLAConfig.from_pretrained(checkpoint)))
    expected = adapted.merge_and_unload().state_dict()
    changed = 0
    for name, weight in before.items():
        merged = adapter.merge(name, weight)
        assert merged.dtype == dtype and torch.equal(merged, expected[name].to(dtype)), name
        changed += not torch.equal(merged, weight)
    assert changed == len({*adapter.layers, *(name.rpartition(".")[0] for name in adapter.replaced)}) > 1


def test_an_adapter_made_for_the_original(checkpoint, write_old_adapter, tmp_path):
    updates = write_old_adapter(tmp_path / "adapter")
    base = SafetensorsFolder(checkpoint)
    adapter = Adapter(tmp_path / "adapter", skeleton(openvla.OpenVLAConfig.from_pretrained(checkpoint)))
    for name in base.infos:
        before = base.read(name).float()
        after = adapter.merge(module_name(name), before)
        if name in updates and not is_unused(adapter.model, name):
            torch.testing.assert_close(after, before + updates[name], rtol=0, atol=1e-5)
        else:
            assert torch.equal(after, before), name
    assert len(adapter.layers) == 7
    assert {key.split(".lora_")[0] for key in adapter.unused} == {
        "base_model.model.vision_backbone.featurizer.blocks.3.attn.qkv"
    }


def test_adapters_that_cannot_be_merged(checkpoint, write_old_adapter, tmp_path):
    model = skeleton(openvla.OpenVLAConfig.from_pretrained(checkpoint))
    write_old_adapter(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())

    def write(some_tensors, **settings):
        save_file(some_tensors, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, **settings}))

    write({**tensors, "base_model.model.language_model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="made for another model: 1 tensors such as .*layers.9"):
        Adapter(tmp_path / "adapter", model)
    write(tensors, init_lora_weights="pissa_niter_4")
    with pytest.raises(ValueError, match="'pissa_niter_4': it changes more of its base"):
        Adapter(tmp_path / "adapter", model)
    name = "base_model.model.projector.fc2.lora_B.weight"
    write({key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(ValueError, match="adapter of model.projector.fc2 is not whole"):
        Adapter(tmp_path / "adapter", model).merge("model.projector.fc2.weight", torch.zeros(128, 1088))
    write({**tensors, name: torch.full_like(tensors[name], torch.nan)})
    with pytest.raises(ValueError, match="model.projector.fc2.weight of the adapter is not finite"):
        Adapter(tmp_path / "adapter", model).merge("model.projector.fc2.weight", torch.zeros(128, 1088))


# --- An adapter becomes a repository ---
def test_the_folder_is_whole(exported, run, checkpoint):
    expected = {*HUB_FILES, "config.json", "generation_config.json", "dataset_statistics.json", "README.md", "assets"}
    expected |= {"preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    expected |= {"handler.py", "requirements.txt", "model.safetensors.index.json", ".proof.json"}
    expected |= {f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)}
    assert {path.name for path in exported.iterdir()} == expected | (
        {"special_tokens_map.json"} if TRANSFORMERS_4 else set()
    )
    config = json.loads((exported / "config.json").read_text())
    statistics = json.loads((run / "adapter" / "dataset_statistics.json").read_text())
    assert config["norm_stats"] == statistics == json.loads((exported / "dataset_statistics.json").read_text())
    assert len(config["auto_map"]) == 6
    assert json.loads((exported / "preprocessor_config.json").read_text())["center_crop_area"] == 0.9


def test_its_weights_are_the_merged_ones_and_the_unused_the_base_s(exported, run, checkpoint):
    written, merged, base = weights(exported), weights(run / "merged"), weights(checkpoint)
    assert written.keys() == base.keys()
    for name, tensor in written.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, merged.get(name, base[name])), name
    assert len(merged) == 122  # the rest is never read, and there for tools that expect it


def test_it_is_proven_and_what_changes_later_is_noticed(exported, tmp_path):
    record = check_proof(exported)
    assert record["observations"] == 2 and record["dtype"] == "torch.bfloat16" and not record["same_weights"]
    assert 0 < record["logits_difference"] < 0.02 and record["tokens_equal"] == "14 of 14"
    assert 0 < record["share_of_adapter"] < 0.1
    copy = tmp_path / "policy"
    shutil.copytree(exported, copy)
    (copy / "README.md").write_text("edited by hand")
    check_proof(copy)
    (copy / "config.json").write_text("{}")
    (copy / "extra.py").write_text("")
    with pytest.raises(ValueError, match=r"changed since it was proven \(config.json, extra.py\)"):
        check_proof(copy)
    (copy / ".proof.json").unlink()
    with pytest.raises(ValueError, match="no proof"):
        check_proof(copy)


def test_its_card_shows_what_it_does(exported, run):
    from huggingface_hub import ModelCard

    card = ModelCard.load(exported / "README.md")
    assert card.data.pipeline_tag == "robotics" and card.data.library_name == "transformers"
    assert card.data.datasets == ["lab/cup"] and card.data.to_dict()["license"] == "llama2"
    assert '"lab/cup-policy"' in card.text and "Pick up the cup" in card.text
    assert "incomplete" not in card.text and str(run) not in card.text
    model, processor = openvla.load(exported)
    picture = Image.open(exported / "assets" / "observation-1.png")
    inputs = processor(processor.build_prompt("Pick up the cup"), picture)
    action = model.predict_action(**inputs, unnorm_key="cup")
    assert f"{action[0]:.4f}".rstrip("0") in card.text.replace("−", "-")


# --- A checkpoint becomes a repository ---
def test_a_checkpoint_passes_byte_by_byte(checkpoint, tmp_path):
    export.main([str(checkpoint), str(tmp_path / "out"), "--no-proof"])
    before, after = weights(checkpoint), weights(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "out" / ".proof.json").exists()


def test_the_card_tells_the_results_of_several_files(checkpoint, tmp_path):
    files = []
    for suite, value in (("libero_spatial", 0.847), ("libero_object", 0.884)):
        files.append(tmp_path / f"{suite}.json")
        files[-1].write_text(json.dumps([{"dataset": suite, "metric": "success_rate", "value": value}]))
    export.main([str(checkpoint), str(tmp_path / "out"), "--no-proof", "--evaluation", *map(str, files)])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| libero\\_spatial | success rate | 84.7 % |" in text
    assert "| libero\\_object | success rate | 88.4 % |" in text


def test_another_precision(checkpoint, tmp_path):
    export.main([str(checkpoint), str(tmp_path / "out"), "--no-proof", "--dtype", "float32"])
    before, after = weights(checkpoint), weights(tmp_path / "out")
    assert all(
        after[name].dtype == torch.float32 and torch.equal(before[name].float(), after[name]) for name in before
    )
    assert openvla.load(tmp_path / "out", dtype="auto")[0].dtype == torch.float32


def test_nested_names_become_the_released_ones(checkpoint, tmp_path):
    source = tmp_path / "nested"
    shutil.copytree(checkpoint, source, ignore=shutil.ignore_patterns("*.safetensors*"))
    before = weights(checkpoint)
    save_file({module_name(name): tensor for name, tensor in before.items()}, source / "model.safetensors")
    export.main([str(source), str(tmp_path / "out"), "--no-proof"])
    after = weights(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_fine_tuning_drops_is_filled_in(run, checkpoint, tmp_path):
    export.main([str(run / "merged"), str(tmp_path / "out"), "--no-proof"])
    kept, base, after = weights(run / "merged"), weights(checkpoint), weights(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in after.items()} == {name: t.shape for name, t in base.items()}
    for name, tensor in after.items():
        assert torch.equal(tensor, kept[name]) if name in kept else not tensor.any(), name


def test_an_adapter_does_not_take_the_statistics_of_its_base(run, checkpoint, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "dataset_statistics.json").unlink()
    with pytest.raises(ValueError, match="adapter brings no action statistics: .* --statistics"):
        export.main([f"{tmp_path}/adapter", f"{tmp_path}/out", "--no-proof"])
    statistics = run / "adapter" / "dataset_statistics.json"
    export.main([f"{tmp_path}/adapter", f"{tmp_path}/out", "--no-proof", "--statistics", str(statistics)])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(config["norm_stats"]) == ["cup"]
    (tmp_path / "run.json").write_text(
        json.dumps({**json.loads((run / "run.json").read_text()), "norm_stats": config["norm_stats"]})
    )
    export.main([f"{tmp_path}/adapter", f"{tmp_path}/out", "--no-proof", "--overwrite"])
    assert list(json.loads((tmp_path / "out" / "config.json").read_text())["norm_stats"]) == ["cup"]


def test_the_centre_crop_can_be_named(checkpoint, tmp_path):
    export.main([str(checkpoint), str(tmp_path / "out"), "--no-proof", "--center-crop-area", "0.9"])
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["center_crop_area"] == 0.9


def test_where_a_run_keeps_its_policy(run, tmp_path):
    assert export.find_source(str(run)).weights == run / "merged"
    found = export.find_source(str(run / "adapter"))
    assert found.adapter == run / "adapter" == found.processor and found.run == run
    shutil.copytree(run, tmp_path / "qlora", ignore=shutil.ignore_patterns("merged"))
    assert export.find_source(str(tmp_path / "qlora")).adapter == tmp_path / "qlora" / "adapter"
    shutil.rmtree(tmp_path / "qlora" / "adapter")
    with pytest.raises(FileNotFoundError, match="neither `merged` nor `adapter`"):
        export.find_source(str(tmp_path / "qlora"))
    with pytest.raises(ValueError, match="is no adapter: leave --base out"):
        export.find_source(str(run / "merged"), base="x/y")


def test_what_is_refused(checkpoint, run, tmp_path):
    def refuse(message, error=ValueError, **changes):
        source = tmp_path / "source"
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(checkpoint, source)
        for name, change in changes.items():
            path = source / f"{name}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        if "norm_stats" in changes.get("config", {}):
            (source / "dataset_statistics.json").unlink()
        with pytest.raises(error, match=message):
            export.main([str(source), str(tmp_path / "out")])
        assert {path.name for path in tmp_path.iterdir()} == {"source"}

    refuse("is quantised", config={"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    refuse("no action statistics", config={"norm_stats": None})
    (tmp_path / "source" / "lora_adapter").mkdir()
    (tmp_path / "source" / "lora_adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="OpenVLA-OFT"):
        export.main([str(tmp_path / "source"), str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        export.main([str(tmp_path / "source" / "lora_adapter" / ".." / ".."), str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        export.main([str(checkpoint), str(tmp_path / "out"), "--image", "x.png"])
    broken = json.loads((run / "adapter" / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/gone"}
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(broken))
    with pytest.raises(FileNotFoundError, match="base is not there: /gone .* Pass --base"):
        export.main([str(tmp_path / "adapter"), str(tmp_path / "out")])
    assert export.find_source(str(tmp_path / "adapter"), base=str(checkpoint)).weights == checkpoint


def test_examples_from_a_dataset(tmp_path):
    for number in range(3):
        folder = tmp_path / "robot" / f"episode_{number:03d}"
        (folder / "front").mkdir(parents=True)
        (folder / "episode.json").write_text(json.dumps({"instruction": f"task {number}", "fps": 10}))
        np.savez(folder / "episode.npz", actions=np.zeros((7, 7), np.float32))
        for step in range(7):
            Image.new("RGB", (8, 8), (30 * step, number, 0)).save(folder / "front" / f"{step:03d}.png")
    found = export.steps_of(str(tmp_path / "robot"), None, None, 1)
    assert [(each.instruction, each.unnorm_key) for each in found] == [("task 0", "robot"), ("task 1", "robot")]
    assert found[1].images[0][0, 0].tolist() == [60, 1, 0]  # step 2 of 7


# --- The proof itself ---
def trial(adapter: bool = False, **changes) -> dict:
    """Two action ids, 90 and 91, of 100; the source is sure of 91 twice."""
    rng = np.random.default_rng(0)
    logits = rng.uniform(-1, 1, (2, 100))
    logits[:, 90], logits[:, 91] = 0.0, 1.0
    found = {
        "said.0": logits,
        "blind.0.image 0": logits[:1] + 1,
        "tokens.0": np.array([91, 91]),
        "action.0": np.ones(2),
    }
    found |= {"actions": np.array([90, 92]), "dtype": np.array("torch.bfloat16"), "norm_stats": np.array('{"a": 1}')}
    return {**found, **({"plain.0": logits - 1} if adapter else {}), **changes}


def moved(by: float, where=np.s_[:]) -> dict:
    logits = trial()["said.0"].copy()
    logits[where] += by
    return trial(**{"said.0": logits})


@pytest.mark.parametrize(
    "before, after, same_weights, message",
    [
        (trial(), moved(0.001), True, "differs from the source's by .* of its range; 1e-05"),
        (trial(), moved(0.3), False, "; 0.05 is what rounding may do"),
        (trial(), moved(np.nan, np.s_[1, 7]), False, "not finite"),
        (trial(), moved(1.1, np.s_[1, 90]), False, "chooses other tokens"),
        (trial(adapter=True), moved(0.09, np.s_[0, 3]), False, None),
        (trial(adapter=True, **{"plain.0": trial()["said.0"] - 0.2}), moved(0.09), False, "rounding swallows"),
        (trial(adapter=True, **{"plain.0": trial()["said.0"]}), moved(0.0), False, "rounding swallows"),
        (trial(), trial(norm_stats=np.array('{"a": 2}')), True, "statistics are not its source's"),
        (trial(), trial(**{"action.0": np.array([1.0, 1.1])}), True, "Only 2 of 2 .* difference 0.1"),
        (trial(), trial(**{"blind.0.image 0": trial()["said.0"][:1]}), True, "Image 0 makes no difference"),
        (trial(), trial(**{"blind.0.image 1": trial()["said.0"][:1]}), True, "Image 1 makes no difference"),
        (trial(), trial(), True, None),
    ],
)
def test_what_counts_as_the_same(before, after, same_weights, message):
    if message is None:
        assert compare(before, after, 1, same_weights)["tokens_equal"] == "2 of 2"
        return
    with pytest.raises(ProofError, match=message):
        compare(before, after, 1, same_weights)


def test_another_token_is_a_failure_only_where_the_source_was_sure():
    near = trial()["said.0"].copy()
    near[0, 90] = 0.995
    before = trial(**{"said.0": near})
    after = trial(**{"said.0": near + np.where(np.arange(100) == 90, 0.01, 0.0)})
    assert compare(before, after, 1, same_weights=False)["tokens_equal"] == "1 of 2"
    wide = np.where(np.arange(100) == 3, 100.0, near)  # a range in which the change of a token is a small share
    wide[:, 91] = 5.0
    swapped = wide.copy()
    swapped[1, [90, 91]] = 3.0, 2.0
    with pytest.raises(ProofError, match="chooses other tokens"):
        compare(trial(**{"said.0": wide}), trial(**{"said.0": swapped}), 1, same_weights=False)


def continuous(said=0.0, action=0.0, state=0.1, **more) -> dict:
    """A chunk of two steps of a head whose actions are -0.5, 0.5."""
    head = np.array([[-0.5], [0.5]])
    found = {"said.0": head + said, "blind.0.image 0": head + 0.1, "blind.0.state": head + state}
    found |= {"action.0": np.ones(2) + action, "dtype": np.array("torch.bfloat16"), "norm_stats": np.array("{}")}
    return found | {"actions": np.array([90, 92]), **more}


@pytest.mark.parametrize(
    "before, after, same_weights, message",
    [
        (continuous(), continuous(), True, None),
        (continuous(), continuous(said=0.09, action=0.2), False, None),  # of [-1, 1], not of what happens to be said
        (continuous(), continuous(said=0.11), False, "head says differs from the source's by 0.055 of its range"),
        (continuous(), continuous(said=1e-4), True, "by 5e-05 of its range; 1e-05"),
        (continuous(), continuous(action=1e-9), True, None),
        (continuous(), continuous(action=0.02), True, "The actions are not the source's; largest difference 0.02"),
        (continuous(), continuous(said=np.nan), False, "action head says is not finite"),
        (continuous(), continuous(state=0.0), True, "State makes no difference"),
        (continuous(**{"plain.0": np.zeros((2, 1))}), continuous(said=0.06), False, "rounding swallows"),
    ],
)
def test_what_counts_as_the_same_of_continuous_heads(before, after, same_weights, message):
    if message is None:
        record = compare(before, after, 1, same_weights)
        assert "tokens_equal" not in record and record["head_difference"] == np.abs(after["said.0"][0] + 0.5) / 2
        return
    with pytest.raises(ProofError, match=message):
        compare(before, after, 1, same_weights)


def test_half_an_adapter_is_not_merged(run, tmp_path):
    def export_without(part):
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(run / "adapter", folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if part not in name}
        save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        export.main([str(folder), str(tmp_path / "out"), "--no-proof"])

    with pytest.raises(ValueError, match="names 24 modules that it has no weights of, such as model.vision_backbone"):
        export_without("vision_backbone")
    with pytest.raises(ValueError, match="names 1 modules .* such as lm_head.weight"):
        export_without("lm_head")
    with pytest.raises(ValueError, match="is not whole"):
        export_without("")


def test_a_wrong_merge_is_not_proven(run, tmp_path, monkeypatch):
    right = Adapter.merge
    monkeypatch.setattr(
        Adapter, "merge", lambda self, name, weight: weight if "layers" in name else right(self, name, weight)
    )
    with pytest.raises(ProofError):
        export.main([str(run / "adapter"), str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_act_is_not_proven(checkpoint, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "broken")
    code = (tmp_path / "broken" / "modeling_openvla.py").read_text()
    broken = code.replace("import logging\n", "import logging\nimport openvla\n", 1)
    assert broken != code
    (tmp_path / "broken" / "modeling_openvla.py").write_text(broken)
    request = dict.fromkeys(("folder", "config", "processor"), str(checkpoint))
    request |= {"adapter": None, "new_parts": False, "dtype": "bfloat16", "center_crop_area": None}
    request["norm_stats"] = json.loads((checkpoint / "dataset_statistics.json").read_text())
    observation = Observation([np.zeros((8, 8, 3), np.uint8)], "push", "bridge_orig")
    with pytest.raises(ProofError, match="(?s)loaded without this package, does not act:.*import of openvla halted"):
        prove(tmp_path / "broken", request, [observation], same_weights=True)


def test_a_failed_proof_leaves_no_folder(checkpoint, tmp_path, monkeypatch):
    def fail(*args):
        raise ProofError("no")

    monkeypatch.setattr("openvla.hub_upload.proof.prove", fail)
    with pytest.raises(ProofError):
        export.main([str(checkpoint), str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


# --- Policies that decode in parallel ---
STATE = [0.1, -0.2, 0.3, 0.0, 0.1, 0.2, 0.5, 0.5]


@pytest.fixture(scope="module")
def converted(oft_folder, tmp_path_factory):
    """`converted(**kind)`: a policy of OpenVLA-OFT in one folder."""
    folders = {}

    def folder(**kind):
        name = str(kind)
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("converted") / "policy"
            convert.main([str(oft_folder(**kind)), str(folders[name]), "--chunk", "8", "--cameras", "2"])
        return folders[name]

    return folder


@pytest.fixture(scope="module")
def frames(images, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("frames")
    for name, image in zip(("front", "wrist"), images):
        image.convert("RGB").save(folder / f"{name}.png")
    return [str(folder / "front.png"), str(folder / "wrist.png")]


def state_of(kind: dict) -> list[str]:
    return ["--proprio", *map(str, STATE)] if kind.get("proprio", True) else []


@pytest.mark.parametrize(
    "kind",
    [
        {"film": True},
        pytest.param({"head": "diffusion"}, marks=pytest.mark.slow),
        pytest.param({"head": "token", "proprio": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_policy_with_all_its_parts(kind, converted, frames, tmp_path, capsys):
    source, out = converted(**kind), tmp_path / "out"
    words = ["--image", *frames, "--instruction", "Pick up the cup", "--unnorm-key", "toy_robot", *state_of(kind)]
    export.main([str(source), str(out), "--repo-id", "lab/arm", *words])
    record = check_proof(out)
    assert record["dtype"] == "torch.bfloat16" and record["action_difference"] == 0.0 and record["observations"] == 2
    if kind.get("head") == "token":
        assert record["tokens_equal"] == "112 of 112"
    else:
        assert record["head_difference"] == 0.0 and "actions within 0, and in one pass" in capsys.readouterr().out
    before, after = weights(source), weights(out)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in before.items())

    model, processor = openvla.load(out, dtype=torch.bfloat16)
    inputs = processor(processor.build_prompt("Pick up the cup"), frames, STATE if model.config.proprio_dim else None)
    noise = torch.randn((1, 8, 7), generator=torch.Generator().manual_seed(0))  # as the proof draws it
    actions = model.predict_action(**inputs, unnorm_key="toy_robot", noise=noise)
    card = (out / "README.md").read_text()
    assert f"| {actions[0, 0]:.4f} | {actions[1, 0]:.4f} |" in card
    assert ("state = [0.1, -0.2, 0.3, 0, 0.1, 0.2, 0.5, 0.5]  # the robot's state: 8" in card) == bool(state_of(kind))
    first, second = (Image.open(frame).size for frame in frames)
    width = first[0] + round(second[0] * first[1] / second[1])
    assert Image.open(out / "assets" / "observation-1.png").size == (width, first[1])


def test_parts_in_float32_are_written_as_the_rest(converted, tmp_path):
    shutil.copytree(converted(film=True), tmp_path / "policy")  # bfloat16
    file = tmp_path / "policy" / "model.safetensors"
    tensors = load_file(file)
    new = [name for name in tensors if is_new(module_name(name))]
    assert {name.split(".")[0] for name in new} == {"vision_backbone", "action_head", "proprio_projector"}
    save_file(tensors | {name: tensors[name].float() for name in new}, file, metadata={"format": "pt"})
    export.main([str(tmp_path / "policy"), str(tmp_path / "out"), "--no-proof"])
    after = weights(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in tensors.items())


def test_examples_need_what_the_policy_takes(converted, frames, tmp_path):
    words = ["--instruction", "go", "--unnorm-key", "toy_robot", "--no-proof"]
    with pytest.raises(ValueError, match=r"takes 8 numbers of the robot's state, the example has none: see --proprio"):
        export.main([str(converted()), str(tmp_path / "out"), "--image", *frames, *words])
    with pytest.raises(ValueError, match=r"takes 8 numbers of the robot's state, the example has 2"):
        options = ["--image", *frames, *words, "--proprio", "0", "1"]
        export.main([str(converted()), str(tmp_path / "out"), *options])
    with pytest.raises(ValueError, match=r"takes 2 image\(s\), the example has 1"):
        export.main([str(converted()), str(tmp_path / "out"), "--image", frames[0], *words, *state_of({})])
    with pytest.raises(SystemExit):
        export.main([str(converted()), str(tmp_path / "out"), *state_of({})])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def new_parts(checkpoint, oft_folder, tmp_path_factory):
    """An adapter that gives a plain OpenVLA a head, a second camera, a state and FiLM, as fine-tuning leaves it."""
    folder = tmp_path_factory.mktemp("new_parts") / "adapter"
    torch.manual_seed(0)
    fields = {"attention": "prefix", "action_head": "flow", "action_chunk": 3, "action_dim": 7, "num_cameras": 2}
    config = openvla.OpenVLAConfig.from_pretrained(checkpoint, proprio_dim=8, film=True, **fields)
    statistics = json.loads((oft_folder() / "dataset_statistics.json").read_text())["toy_robot"]
    config.norm_stats = {"cup": statistics}
    options = {"config": config, "dtype": torch.bfloat16, "output_loading_info": True}
    model, _ = openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, **options)
    model.norm_stats = config.norm_stats
    whole = ["action_head", "proprio_projector", "noisy_action_projector", "scale", "shift"]
    targets = ["q_proj", "down_proj", "qkv"]
    config_of_lora = peft.LoraConfig(r=4, lora_alpha=32, target_modules=targets, modules_to_save=whole)
    adapted = adapt(model, config_of_lora)
    adapted.save_pretrained(folder)
    config.save_pretrained(folder)
    (folder / "config.json").rename(folder / ADAPTER_CONFIG)
    processor = openvla.OpenVLAProcessor.from_pretrained(checkpoint, num_cameras=2)
    processor.num_state_tokens = 1
    processor.save_pretrained(folder)
    (folder / "dataset_statistics.json").write_text(json.dumps(config.norm_stats))
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": str(checkpoint)}))
    merged = adapted.merge_and_unload().eval()
    for parameter in merged.parameters():  # not `merged.to`, which would round the frequencies of positions, too
        parameter.data = parameter.data.bfloat16()
    return folder, merged, processor


def test_an_adapter_that_brings_whole_parts(new_parts, checkpoint, frames, tmp_path):
    adapter, merged, processor = new_parts
    words = ["--image", *frames, "--instruction", "go", "--proprio", *map(str, STATE)]
    export.main([str(adapter), str(tmp_path / "out"), *words])
    record, after = check_proof(tmp_path / "out"), weights(tmp_path / "out")
    assert record["head_difference"] < 0.02 and 0 <= record["share_of_adapter"] < 0.1
    expected = merged._fix_state_dict_keys_on_save(merged.state_dict())
    assert set(expected) <= set(after)
    for name, tensor in expected.items():
        assert torch.equal(after[name], tensor), name
    model, own = openvla.load(tmp_path / "out", dtype=torch.bfloat16)
    assert (model.config.attention, model.config.action_head, model.config.film) == ("prefix", "flow", True)
    inputs = processor(processor.build_prompt("go"), frames, STATE)
    again = own(own.build_prompt("go"), frames, STATE)
    noise = torch.randn((1, 3, 7), generator=torch.Generator().manual_seed(0))
    actions = [policy.predict_action(**each, noise=noise) for policy, each in ((model, again), (merged, inputs))]
    assert np.array_equal(*actions) and actions[0].shape == (3, 7)


@pytest.mark.parametrize("part", ["action_head.velocity.fc2.bias", "proprio_projector.fc1", "blocks.1.shift.weight"])
def test_a_part_that_an_adapter_says_it_brings_is_not_left_out(part, new_parts, checkpoint, tmp_path):
    shutil.copytree(new_parts[0], tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"names \d modules that it has no weights of, such as .*{part}"):
        export.main([str(tmp_path / "adapter"), str(tmp_path / "out"), "--no-proof"])
    with pytest.raises((ValueError, KeyError), match=part):  # the latter from peft, on transformers 4.57
        openvla.load(tmp_path / "adapter")


MEASURE = """
    import json, os, sys, threading, time
    from openvla.hub_upload import export
    most = {"children": 0}
    def watch():
        while True:
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    status = dict(line.split(":", 1) for line in open(f"/proc/{pid}/status") if ":" in line)
                except OSError:
                    continue
                if int(status["PPid"]) == os.getpid() and "RssAnon" in status:
                    most["children"] = max(most["children"], int(status["RssAnon"].split()[0]) * 1024)
            time.sleep(0.1)
    threading.Thread(target=watch, daemon=True).start()
    export.main(sys.argv[1:])
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    most["exporting"] = int(status["VmHWM"].split()[0]) * 1024
    print(json.dumps(most))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_exporting_two_gigabytes_takes_little_memory(checkpoint, tmp_path):
    config = openvla.OpenVLAConfig.from_pretrained(checkpoint).to_dict()
    size = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 18, "num_attention_heads": 16}
    config["text_config"] = {**config["text_config"], **size, "num_key_value_heads": 16, "head_dim": 128}
    config = openvla.OpenVLAConfig.from_dict(config)
    model = skeleton(config)
    state = model.state_dict()
    infos = {
        new: TensorInfo(torch.bfloat16, tuple(state[old].shape)) for old, new in released_names(model, state).items()
    }
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "base").mkdir()
    write_shards(
        tmp_path / "base",
        infos,
        lambda name: torch.randn(infos[name].shape, generator=generator) * infos[name].shape[-1] ** -0.5,
    )
    config.dtype = torch.bfloat16
    processor = openvla.OpenVLAProcessor.from_pretrained(checkpoint)
    write_companions(tmp_path / "base", config, processor, config.norm_stats)
    peft_config = lora_config(16, None, 0.0, vision=True)
    peft_config.base_model_name_or_path = str(tmp_path / "base")
    adapted = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            prefix = f"base_model.model.{name}"
            adapted[f"{prefix}.lora_A.weight"] = torch.randn(16, module.in_features, generator=generator) * 0.03
            adapted[f"{prefix}.lora_B.weight"] = torch.randn(module.out_features, 16, generator=generator) * 0.03
    peft_config.save_pretrained(tmp_path / "adapter")
    save_file(adapted, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter" / "dataset_statistics.json").write_text(json.dumps(config.norm_stats))
    del adapted

    script = [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path / "adapter"), str(tmp_path / "out")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    most = json.loads(done.stdout.splitlines()[-1])
    total, largest = sum(info.nbytes for info in infos.values()), max(info.nbytes for info in infos.values())
    print(f"{total / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, most memory: {most}")
    assert total > 2e9 and check_proof(tmp_path / "out")
    assert most["exporting"] < 1e9 + largest
    assert most["children"] < 1e9 + largest  # besides the weights, which are mapped and may be dropped at any time
