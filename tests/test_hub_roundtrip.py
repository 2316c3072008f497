"""What leaves this package loads for a stranger; what the original's tools wrote comes in."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import openvla

TRANSFORMERS_4 = transformers.__version__.startswith("4.")


@pytest.fixture(scope="module")
def exported(fresh_export_model, processor, tmp_path_factory):
    """The checkpoint as this package saves it, code included."""
    folder = tmp_path_factory.mktemp("exported") / "policy"
    fresh_export_model.save_pretrained(folder, max_shard_size="5MB")
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fresh_export_model(checkpoint):
    return openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def observation(recorded, images, processor):
    return processor(recorded["inputs"][0]["prompt"], images[0])


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def run_without_the_package(script: str, **environment) -> str:
    """Runs a script in a process where `import openvla` fails; returns what it prints."""
    script = "import sys; sys.modules['openvla'] = None\n" + textwrap.dedent(script)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **{k: str(v) for k, v in environment.items()}}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


# --- Saving ---
def test_saved_tensors_are_byte_equal_to_the_released_ones(checkpoint, exported):
    before, after = weights(checkpoint), weights(exported)
    unused = {name for name in before if name not in after}
    assert len(before) == 165 and not set(after) - set(before)
    assert all("blocks.3." in name or "featurizer.norm." in name or "attn_pool" in name for name in unused)
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, before[name]), name


def test_both_transformers_lines_rename_alike(exported, model):
    # 4.57 renames with our own code, 5.x with its WeightRenaming
    assert set(weights(exported)) == set(model._fix_state_dict_keys_on_save(model.state_dict()))


def test_the_base_model_saves_the_released_names_too(checkpoint, exported, tmp_path):
    base = openvla.OpenVLAModel.from_pretrained(checkpoint)
    base.save_pretrained(tmp_path)
    assert set(weights(tmp_path)) == set(weights(exported)) - {"language_model.lm_head.weight"}
    again = openvla.OpenVLAModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), base.parameters()))


def test_a_resized_embedding_table_does_not_move_the_actions(checkpoint, fresh_model, observation, tmp_path):
    before = fresh_model.sample_actions(**observation, action_dim=7).token_ids
    fresh_model.resize_token_embeddings(32128)
    fresh_model.save_pretrained(tmp_path)
    again = openvla.OpenVLAForActionPrediction.from_pretrained(tmp_path).eval()
    assert again.get_input_embeddings().num_embeddings == 32128 and again.action_tokenizer.vocab_end == 32000
    assert torch.equal(again.sample_actions(**observation, action_dim=7).token_ids, before)


def test_bins_of_equal_population_are_part_of_the_checkpoint(fresh_model, observation, recorded, tmp_path):
    actions = np.random.default_rng(0).normal(0, 0.2, (1000, 7))
    fresh_model.config.action_bins = openvla.ActionTokenizer.fit(actions)
    fresh_model.save_pretrained(tmp_path)
    again = openvla.OpenVLAForActionPrediction.from_pretrained(tmp_path, dtype=torch.float32).eval()
    output = again.sample_actions(**observation, action_dim=7)
    ids = recorded["inputs"][0]["action_ids"]
    assert output.token_ids.tolist() == [ids]
    centers = np.array(fresh_model.config.action_bins["centers"])
    expected = [centers[dim][min(32000 - token - 1, 254)] for dim, token in enumerate(ids)]
    np.testing.assert_allclose(output.actions[0, 0].numpy(), expected, atol=1e-12)


def test_missing_weights_raise(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "broken", ignore=shutil.ignore_patterns("*.safetensors*"))
    kept = {name: tensor for name, tensor in weights(checkpoint).items() if not name.startswith("projector.fc2")}
    save_file(kept, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 tensors \(model.projector.fc2.bias, model.projector.fc2.weight"):
        openvla.OpenVLAForActionPrediction.from_pretrained(tmp_path / "broken")
    _, report = openvla.OpenVLAForActionPrediction.from_pretrained(tmp_path / "broken", output_loading_info=True)
    assert len(report["missing_keys"]) == 2


def test_the_folder_holds_its_code_and_a_complete_auto_map(exported):
    for name in (
        "configuration_openvla",
        "modeling_openvla",
        "processing_openvla",
        "action_tokenizer",
        "tf_image_ops",
    ):
        assert (exported / f"{name}.py").exists(), name
    auto_map = json.loads((exported / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForVision2Seq"} <= set(auto_map)
    processor_map = json.loads((exported / "processor_config.json").read_text())["auto_map"]
    assert processor_map["AutoProcessor"] == "processing_openvla.OpenVLAProcessor"


# --- Loading by a stranger ---
LOAD_AND_ACT = """
    import numpy as np, torch, transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from safetensors.torch import load_file, save_file
    import os
    source, picture, out = os.environ["SOURCE"], os.environ["PICTURE"], os.environ["OUT"]
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True, dtype=torch.float32).eval()
    inputs = processor(os.environ["PROMPT"], picture)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].clone()
    action = torch.from_numpy(model.predict_action(**inputs, unnorm_key="bridge_orig"))
    save_file({"logits": logits, "action": action, **inputs}, out)
    print(type(model).__module__)
"""


@pytest.mark.parametrize("place", ["folder", "hub cache"])
def test_a_stranger_gets_identical_logits(place, exported, observation, recorded, images, model, tmp_path):
    source, environment = exported, {"HF_MODULES_CACHE": tmp_path / "modules"}
    if place == "hub cache":
        repository = tmp_path / "hub" / "models--lab--policy"
        snapshot = repository / "snapshots" / ("a" * 40)
        shutil.copytree(exported, snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
        source, environment["HF_HUB_CACHE"] = "lab/policy", tmp_path / "hub"
    images[0].save(tmp_path / "picture.png")
    environment |= {"SOURCE": source, "PICTURE": tmp_path / "picture.png", "OUT": tmp_path / "out.safetensors"}
    printed = run_without_the_package(LOAD_AND_ACT, PROMPT=recorded["inputs"][0]["prompt"], **environment)
    assert printed.startswith("transformers_modules.")
    result = load_file(tmp_path / "out.safetensors")
    assert torch.equal(result["input_ids"], observation["input_ids"])
    assert torch.equal(result["pixel_values"], observation["pixel_values"])
    with torch.no_grad():
        assert torch.equal(result["logits"], model(**observation).logits[0, -1])
    expected = recorded["inputs"][0]["actions"]["bridge_orig"]
    np.testing.assert_allclose(result["action"].numpy(), expected, rtol=0, atol=1e-12)


def test_other_auto_classes(exported, model, observation, tmp_path):
    printed = run_without_the_package(
        """
        import os, torch, transformers
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
        source = os.environ["SOURCE"]
        print(type(AutoConfig.from_pretrained(source, trust_remote_code=True)).__name__)
        print(type(AutoModel.from_pretrained(source, trust_remote_code=True)).__name__)
        print(type(AutoImageProcessor.from_pretrained(source, trust_remote_code=True)).__name__)
        print(AutoTokenizer.from_pretrained(source, trust_remote_code=True).convert_tokens_to_ids("<image>"))
        if hasattr(transformers, "AutoModelForVision2Seq"):
            auto = transformers.AutoModelForVision2Seq
            print(type(auto.from_pretrained(source, trust_remote_code=True)).__name__)
        """,
        SOURCE=exported,
        HF_MODULES_CACHE=tmp_path,
    )
    expected = ["OpenVLAConfig", "OpenVLAModel", "OpenVLAImageProcessor", "32001"]
    assert printed.split() == expected + ["OpenVLAForActionPrediction"] * TRANSFORMERS_4


def test_the_base_model_alone(checkpoint, model, observation):
    base = openvla.OpenVLAModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(base(**observation).last_hidden_state, model.model(**observation).last_hidden_state)


# --- Released repositories, whose own code is dead ---
def test_a_released_folder_is_served_by_this_package(checkpoint, recorded, observation):
    auto_map = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForVision2Seq"] == "modeling_prismatic.OpenVLAForActionPrediction"
    model, processor = openvla.load(checkpoint, dtype=torch.float32)
    assert type(processor.image_processor) is openvla.OpenVLAImageProcessor
    action = model.predict_action(**observation, unnorm_key="bridge_orig")
    np.testing.assert_allclose(action, recorded["inputs"][0]["actions"]["bridge_orig"], rtol=0, atol=1e-12)


@pytest.mark.skipif(TRANSFORMERS_4, reason="4.57 prefers a repository's own code; openvla.load is tested above")
@pytest.mark.parametrize("order", ["openvla, transformers", "transformers, openvla"])
@pytest.mark.parametrize("trust", [True, None])
def test_auto_classes_serve_released_folders_once_the_package_is_imported(checkpoint, order, trust):
    script = f"""
        import {order}
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
        kwargs = {{}} if {trust} is None else {{"trust_remote_code": {trust}}}
        for auto in (AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoImageProcessor):
            loaded = auto.from_pretrained({str(checkpoint)!r}, **kwargs)
            print(type(loaded).__module__, type(loaded).__name__)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split("\n")[:4] == [
        "openvla.configuration_openvla OpenVLAConfig",
        "openvla.modeling_openvla OpenVLAForActionPrediction",
        "openvla.processing_openvla OpenVLAProcessor",
        "openvla.processing_openvla OpenVLAImageProcessor",
    ]


AUTO_CLASSES = ("AutoConfig", "AutoImageProcessor", "AutoModel", "AutoProcessor", "AutoTokenizer")


@pytest.mark.parametrize("first", [*AUTO_CLASSES, "Dinov2Model", "GenerationMixin", "Trainer"])
def test_whatever_comes_first_all_are_registered(first):
    script = f"""
        import openvla
        from transformers import {first}
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
        from openvla import auto_registration
        print(auto_registration._registered == set(auto_registration._PAIRS))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr[-2000:]


def test_importing_the_package_imports_neither_torch_nor_transformers():
    script = "import sys, openvla; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_dataset_statistics_beside_the_weights_win(checkpoint, tmp_path, caplog):
    folder = tmp_path / "fine-tuned"
    shutil.copytree(checkpoint, folder)
    norm_stats = json.loads((checkpoint / "config.json").read_text())["norm_stats"]
    changed = {"toy_robot": json.loads(json.dumps(norm_stats["toy_robot"])), "new_robot": norm_stats["bridge_orig"]}
    changed["toy_robot"]["action"]["q99"][0] = 9.0
    (folder / "dataset_statistics.json").write_text(json.dumps(changed))
    model = openvla.OpenVLAForActionPrediction.from_pretrained(folder)
    assert model.norm_stats == changed
    assert "replaces config.norm_stats: ['new_robot', 'toy_robot']" in caplog.text
    # what is set and saved is what comes back
    model.norm_stats["toy_robot"]["action"]["q99"][0] = 5.0
    model.save_pretrained(folder)
    again = openvla.OpenVLAForActionPrediction.from_pretrained(folder)
    assert again.norm_stats["toy_robot"]["action"]["q99"][0] == 5.0


# --- Quantisation, placement, adapters, pipelines ---
def quantized_linears(model) -> set[str]:
    return {name for name, module in model.named_modules() if "bit" in type(module).__name__.lower()}


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_spares_towers_projector_and_head(bits, checkpoint, observation, tmp_path):
    pytest.importorskip("bitsandbytes")
    # Sizes of 64: bitsandbytes' CPU kernels refuse the recorded checkpoint's 344 on processors with AVX-512 bf16.
    text = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32064, "pad_token_id": 32000}
    config = openvla.OpenVLAConfig.from_pretrained(checkpoint, text_config=text)
    openvla.OpenVLAForActionPrediction(config).save_pretrained(tmp_path / "random")
    options = {"bnb_4bit_quant_type": "nf4"} if bits == 4 else {}
    quantization = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **options)
    model = openvla.OpenVLAForActionPrediction.from_pretrained(
        tmp_path / "random", quantization_config=quantization, dtype=torch.float32
    ).eval()
    names = quantized_linears(model)
    assert len(names) == 3 * 7 and all(name.startswith("model.language_model.layers.") for name in names)
    assert quantization.llm_int8_skip_modules is None  # the caller's object is left alone
    model.save_pretrained(tmp_path / "quantized")
    again = openvla.OpenVLAForActionPrediction.from_pretrained(tmp_path / "quantized", dtype=torch.float32).eval()
    assert quantized_linears(again) == names
    with torch.no_grad():
        assert torch.equal(again(**observation).logits, model(**observation).logits)


def test_bitsandbytes_spares_every_projector_of_chunked_policies(oft_folder, oft_policy, oft_recorded, oft_golden):
    pytest.importorskip("bitsandbytes")
    from test_oft import KEY, cameras_of

    options = {"dtype": torch.float32, "action_chunk": 8, "num_cameras": 2}
    quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model, processor = openvla.load(oft_folder(), quantization_config=quantization, **options)
    plain, _ = oft_policy()
    assert len(quantized_linears(model)) == 21
    for name in ("model.proprio_projector", "action_head", "model.projector"):
        for kept, parameter in zip(model.get_submodule(name).parameters(), plain.get_submodule(name).parameters()):
            assert torch.equal(kept, parameter)
    entry = oft_recorded["inputs"][0]
    inputs = processor(entry["prompt"], cameras_of(oft_golden, 0), entry["state"])
    found, expected = model.predict_action(**inputs, unnorm_key=KEY), np.array(entry["actions_l1_proprio_fp32"])
    assert 1e-5 < np.abs(found - expected).mean() < 0.01  # measured: 0.0028, of actions up to 1


def test_old_flags_for_quantisation(checkpoint):
    pytest.importorskip("bitsandbytes")
    model = openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, load_in_4bit=True)
    assert len(quantized_linears(model)) == 21


def test_device_map_with_disk_offload(checkpoint, model, observation, tmp_path):
    device_map = {"model.vision_backbone": "cpu", "model.projector": "disk", "model.language_model": "disk"}
    offloaded = openvla.OpenVLAForActionPrediction.from_pretrained(
        checkpoint, dtype=torch.float32, device_map={**device_map, "lm_head": "cpu"}, offload_folder=tmp_path
    )
    with torch.no_grad():
        assert torch.equal(offloaded(**observation).logits, model(**observation).logits)


@pytest.mark.parametrize("way", ["peft", "transformers"])
def test_an_old_lora_adapter_has_its_full_effect(
    way, checkpoint, fresh_model, observation, write_old_adapter, tmp_path
):
    peft = pytest.importorskip("peft")
    updates = write_old_adapter(tmp_path / "adapter")
    merged = {name: tensor.float() for name, tensor in weights(checkpoint).items()}
    for name, update in updates.items():
        merged[name] += update
    shutil.copytree(checkpoint, tmp_path / "merged", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(merged, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    expected_model = openvla.OpenVLAForActionPrediction.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        plain = fresh_model(**observation).logits
    if way == "peft":
        adapted = peft.PeftModel.from_pretrained(fresh_model, tmp_path / "adapter")
    else:
        adapted = fresh_model
        adapted.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        expected, actual = expected_model.eval()(**observation).logits, adapted.eval()(**observation).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)
    assert (plain - expected).abs().max() > 0.5  # the adapter is no small thing


def test_load_takes_an_adapter_with_its_base(checkpoint, observation, write_old_adapter, tmp_path):
    pytest.importorskip("peft")
    write_old_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(checkpoint)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    adapted, processor = openvla.load(tmp_path / "adapter", dtype=torch.float32)
    plain = openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, dtype=torch.float32).eval()
    plain.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(adapted(**observation).logits, plain.eval()(**observation).logits)
    assert processor.prompt_template.startswith("In: ")


def test_plans_for_several_devices(model):
    language_model = "model.language_model.layers"
    assert model._tp_plan[f"{language_model}.*.self_attn.q_proj"] == "colwise"
    assert language_model in model._pp_plan
    assert {"VisionTransformer", "OpenVLAProjector"} <= set(model._no_split_modules)
    if not TRANSFORMERS_4:
        assert model._tp_plan["lm_head"] == "colwise_gather_output"
        for unit in ("model.vision_backbone.featurizer.blocks.*", "model.projector", f"{language_model}.*"):
            assert model._fsdp_plan[unit] == "free_full_weight"


def test_image_text_to_text_pipeline(model, processor, recorded, images, golden):
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    entry = recorded["inputs"][0]
    (answer,) = pipe(text=entry["prompt"], images=images[0], max_new_tokens=7, return_full_text=False)
    characters = processor.tokenizer.decode(entry["action_ids"])
    assert answer["generated_text"].strip() == characters.strip()
