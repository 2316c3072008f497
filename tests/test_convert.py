"""What the original's tools wrote comes in, tensor for tensor, and a stranger can load it."""

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
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import openvla
from openvla.hub_upload import convert
from openvla.hub_upload.prismatic import released_name, resample_positions
from openvla.hub_upload.weights import TorchFile

SECTIONS = ("vision_backbone_id", "llm_backbone_id", "arch_specifier", "image_resize_strategy", "llm_max_length")


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def prismatic(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Released names as the training code has them: written here by hand, not by inverting the converter."""
    model = {"vision_backbone": {}, "projector": {}, "llm_backbone": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "projector":
            layer = {"fc1": "0", "fc2": "2", "fc3": "4"}[rest[:3]]
            model["projector"][f"projector.{layer}{rest[3:]}"] = tensor
        elif part == "language_model":
            model["llm_backbone"][f"llm.{rest}"] = tensor
        else:
            tower, _, key = rest.partition(".")
            tower = {"featurizer": "dino_featurizer", "fused_featurizer": "siglip_featurizer"}[tower]
            model["vision_backbone"][f"{tower}.{key.replace('.scale_factor', '.gamma')}"] = tensor
    return model


@pytest.fixture
def run(checkpoint, tmp_path):
    """A training run of the original: float32 `.pt`, config.json that names a base VLM, statistics."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    config = json.loads((checkpoint / "config.json").read_text())
    section = {key: config[key] for key in (*SECTIONS, "timm_model_ids", "timm_model_args", "text_config")}
    (folder / "base.json").write_text(json.dumps({"model": {"model_id": "tiny", **section}}))
    (folder / "config.json").write_text(json.dumps({"vla": {"base_vlm": "prism-dinosiglip-224px+7b"}}))
    shutil.copy(checkpoint / "dataset_statistics.json", folder)
    model = prismatic({name: tensor.float() for name, tensor in weights(checkpoint).items()})
    torch.save({"model": model}, folder / "checkpoints" / "step-000010-epoch-00-loss=1.0000.pt")
    return folder


def to_hf(run, checkpoint, out, *options):
    convert.main([str(run), str(out), "--tokenizer", str(checkpoint), "--base-config", f"{run}/base.json", *options])


def edit(run, change) -> None:
    (path,) = (run / "checkpoints").glob("*.pt")
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


# --- Training runs ---
def test_a_run_becomes_the_released_checkpoint_byte_by_byte(
    run, checkpoint, tmp_path, recorded, images, golden, capsys
):
    to_hf(run, checkpoint, tmp_path / "out", "--max-shard-size", "0.008")
    before, after = weights(checkpoint), weights(tmp_path / "out")
    assert len(before) == 165 and before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16 and torch.equal(after[name], tensor), name
    assert len(list((tmp_path / "out").glob("model-0000?-of-00004.safetensors"))) == 4
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["renamed"]["vision_backbone.dino_featurizer.blocks.0.ls1.gamma"] == (
        "vision_backbone.featurizer.blocks.0.ls1.scale_factor"
    )
    assert len(report["renamed"]) == 165 and len(report["unused"]) == 43 and report["dropped"] == {}
    assert "165 tensors, 165 of them renamed" in capsys.readouterr().out

    model, processor = openvla.load(tmp_path / "out", dtype=torch.float32)
    entry = recorded["inputs"][0]
    inputs = processor(entry["prompt"])
    expected = golden["00.input_ids"].tolist() + [29871]
    assert inputs["input_ids"][0].tolist() == expected
    processor.image_processor.tvf_normalize_params = None  # recorded with statistics that were not rounded
    action = model.predict_action(**processor(entry["prompt"], images[0]), unnorm_key="bridge_orig")
    np.testing.assert_allclose(action, entry["actions"]["bridge_orig"], rtol=0, atol=1e-12)


def test_other_precision(run, checkpoint, tmp_path):
    to_hf(run, checkpoint, tmp_path / "out", "--dtype", "float32")
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("dtype", "float32") == "float32"
    assert openvla.load(tmp_path / "out", dtype="auto")[0].dtype == torch.float32


def test_pixel_statistics_are_rounded_as_the_original_converter_does(run, checkpoint, tmp_path):
    to_hf(run, checkpoint, tmp_path / "out")
    normalize = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["tvf_normalize_params"]
    assert normalize[0]["mean"] == [0.484375, 0.455078125, 0.40625]  # as in openvla-7b
    assert normalize[0]["std"] == [0.228515625, 0.2236328125, 0.224609375]
    assert normalize[1]["mean"] == normalize[1]["std"] == [0.5, 0.5, 0.5]


def test_random_crops_of_the_training_are_remembered(run, checkpoint, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "image_aug": True}))
    to_hf(run, checkpoint, tmp_path / "out")
    assert openvla.OpenVLAProcessor.from_pretrained(tmp_path / "out").image_processor.center_crop_area == 0.9
    assert "centre crop: 0.9" in capsys.readouterr().out
    (run / "dataset_statistics.json").unlink()
    with pytest.raises(FileNotFoundError, match="without it, actions have no units"):
        to_hf(run, checkpoint, tmp_path / "other")


def test_the_preprocessor_is_the_released_one(run, checkpoint, tmp_path):
    to_hf(run, checkpoint, tmp_path / "out")
    made, released = (json.loads((f / "preprocessor_config.json").read_text()) for f in (tmp_path / "out", checkpoint))
    for name, value in released.items():
        if name not in ("auto_map", "processor_class", "image_processor_type", "tvf_normalize_params"):
            assert made.get(name) == value, name


def test_another_tokenizer_of_the_same_size(run, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "other")
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["▁"], vocabulary["а"] = vocabulary["а"], vocabulary["▁"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="29871 is 'а' and not '▁'"):
        to_hf(run, tmp_path / "other", tmp_path / "out")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vision_backbone.dino_featurizer.blocks.3.ls2.gamma", "vision_backbone.featurizer.blocks.3.ls2.scale_factor"),
        ("vision_backbone.siglip_featurizer.attn_pool.latent", "vision_backbone.fused_featurizer.attn_pool.latent"),
        ("vision_backbone.featurizer.pos_embed", "vision_backbone.featurizer.pos_embed"),
        ("projector.projector.4.bias", "projector.fc3.bias"),
        ("llm_backbone.llm.model.norm.weight", "language_model.model.norm.weight"),
        ("llm_backbone.llm.lm_head.weight", "language_model.lm_head.weight"),
        ("projector.projector.weight", None),
        ("downsampler.x", None),
    ],
)
def test_names(name, expected):
    assert released_name(name) == expected


def test_what_is_no_weight_is_dropped_and_told(run, checkpoint, tmp_path, capsys):
    def change(content):
        content["optimizer"] = {"state": {}}
        content["model"]["llm_backbone"]["llm.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)

    edit(run, change)
    to_hf(run, checkpoint, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["dropped"] == {
        "optimizer": "no weights of the policy",
        "llm_backbone.llm.model.layers.0.self_attn.rotary_emb.inv_freq": "computed, not learned",
    }
    assert "dropped: 1 computed, not learned" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["model"]["projector"].pop("projector.0.bias"), "1 missing: projector.fc1.bias"),
        (lambda c: c["model"]["projector"].update({"projector.6.bias": torch.ones(1)}), "of an unknown kind"),
        (lambda c: c["model"]["llm_backbone"].update({"llm.model.x": torch.ones(1)}), "1 unknown: language_model.mod"),
        (lambda c: c["model"]["projector"].update({"projector.0.bias": torch.ones(7)}), r"fc1.bias \(7,\) instead of"),
        (lambda c: c.update(state=c.pop("model")), r"no section 'model' .* \['state'\]"),
        (lambda c: c["model"].update(epoch=3), "epoch is no tensor but a int"),
        (lambda c: c["model"].pop("vision_backbone"), "holds no vision towers, .* --towers"),
    ],
)
def test_every_tensor_needs_a_place_and_every_place_a_tensor(run, checkpoint, tmp_path, change, message):
    edit(run, change)
    with pytest.raises(ValueError, match=message):
        to_hf(run, checkpoint, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}  # nothing half-written


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


def test_no_code_of_a_checkpoint_runs(run, checkpoint, tmp_path, capsys):
    edit(run, lambda content: None)
    (path,) = (run / "checkpoints").glob("*.pt")
    torch.save({"model": {"projector": Bomb()}}, path)
    with pytest.raises(ValueError, match="no whole file of weights"):
        to_hf(run, checkpoint, tmp_path / "out")
    assert "boom" not in capsys.readouterr().out


def test_a_file_that_ends_early(run, checkpoint, tmp_path):
    (path,) = (run / "checkpoints").glob("*.pt")
    path.write_bytes(path.read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match="no whole file of weights"):
        to_hf(run, checkpoint, tmp_path / "out")


def test_views_of_one_storage_are_told_apart(tmp_path):
    whole = torch.arange(24.0)
    views = {"a": whole[:6].view(2, 3), "b": {"c": whole[6:].view(6, 3).t()}}
    torch.save({"model": views, "epoch": 3}, tmp_path / "x.pt")
    file = TorchFile(tmp_path / "x.pt", "model")
    assert file.others == ["epoch"] and file.infos["b.c"].shape == (3, 6)
    assert torch.equal(file.read("a"), views["a"]) and torch.equal(file.read("b.c"), views["b"]["c"])


def test_which_checkpoint_of_a_run(run, checkpoint, tmp_path):
    (path,) = (run / "checkpoints").glob("*.pt")
    shutil.copy(path, run / "checkpoints" / "step-000020-epoch-00-loss=0.9000.pt")
    with pytest.raises(ValueError, match="step-000010.*, step-000020.*: pass the file itself"):
        to_hf(run, checkpoint, tmp_path / "out")
    convert.main(
        [str(path), str(tmp_path / "one"), "--tokenizer", str(checkpoint), "--base-config", f"{run}/base.json"]
    )
    (run / "checkpoints" / "latest-checkpoint.pt").symlink_to(path)
    to_hf(run, checkpoint, tmp_path / "two")
    assert weights(tmp_path / "one").keys() == weights(tmp_path / "two").keys()
    assert (tmp_path / "one" / "dataset_statistics.json").exists()


def test_an_unknown_base_is_refused_and_a_known_one_gives_openvla_7b(run, checkpoint, tmp_path):
    tokenizer = ["--tokenizer", str(checkpoint)]
    with pytest.raises(
        ValueError, match=r"791 missing: .* 148 of another shape: .* \(1, 1, 128\) instead of \(1, 1, 1024\)"
    ):
        convert.main([str(run), str(tmp_path / "out"), *tokenizer])  # takes it for the 7B it names
    (run / "config.json").write_text(json.dumps({"vla": {"base_vlm": "/data/runs/my-vlm+7b"}}))
    with pytest.raises(ValueError, match="base VLM 'my-vlm\\+7b', .* --base-config"):
        convert.main([str(run), str(tmp_path / "out"), *tokenizer])


# --- Base VLMs: their towers were frozen and are timm's ---
@pytest.fixture
def base_vlm(run, checkpoint, tmp_path):
    """Without towers in the `.pt`; timm's beside it, DINOv2 with a position table of 20 x 20 patches."""
    edit(run, lambda content: content["model"].pop("vision_backbone"))
    (run / "dataset_statistics.json").unlink()
    shutil.move(run / "base.json", run / "config.json")
    tensors, files = weights(checkpoint), []
    for tower in ("featurizer", "fused_featurizer"):
        prefix = f"vision_backbone.{tower}."
        own = {n.removeprefix(prefix): t.float() for n, t in tensors.items() if n.startswith(prefix)}
        own = {name.replace("scale_factor", "gamma"): tensor for name, tensor in own.items()}
        if tower == "featurizer":
            row, column = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
            plane = torch.stack([row, column], dim=-1).reshape(1, 400, 2)
            own["pos_embed"] = torch.cat([plane, torch.full((1, 400, 126), 0.25)], dim=-1)
            own["head.weight"] = torch.ones(3, 128)
        files.append(tmp_path / f"{tower}.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in own.items()}, files[-1])
    return run, [str(file) for file in files]


def test_a_base_vlm_becomes_a_policy_to_fine_tune(base_vlm, checkpoint, tmp_path, capsys):
    run, towers = base_vlm
    convert.main([str(run), str(tmp_path / "out"), "--tokenizer", str(checkpoint), "--towers", *towers])
    before, after = weights(checkpoint), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    positions = after.pop("vision_backbone.featurizer.pos_embed").float()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert torch.equal(positions[0, :, 2:], torch.full((256, 126), 0.25))
    # A plane stays a plane where the border does not reach: centre of cell i of 16 lies at (i + 0.5) * 20 / 16 - 0.5.
    inner = positions[0, :, :2].reshape(16, 16, 2)[3:-3, 3:-3]
    centres = (torch.arange(3, 13) + 0.5) * 20 / 16 - 0.5
    torch.testing.assert_close(inner[..., 0], centres[:, None].expand(10, 10), rtol=0, atol=0.05)  # bfloat16
    torch.testing.assert_close(inner[..., 1], centres[None].expand(10, 10), rtol=0, atol=0.05)
    assert "fine-tune it before it can act" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["dropped"] == {"head.weight": "not part of the tower"}

    model, processor = openvla.load(tmp_path / "out", dtype=torch.float32)
    assert model.norm_stats is None and processor.prompt_template.startswith("In: What action")
    with pytest.raises(KeyError, match="no action statistics"):
        model.predict_action(**processor(processor.build_prompt("push"), np.zeros((8, 8, 3), np.uint8)))


def test_towers_that_do_not_fit(base_vlm, run, checkpoint, tmp_path):
    run, towers = base_vlm
    options = ["--tokenizer", str(checkpoint), "--towers"]
    with pytest.raises(ValueError, match="Expected one of --towers for each"):
        convert.main([str(run), str(tmp_path / "out"), *options, towers[0]])
    with pytest.raises(ValueError, match="of another shape"):
        convert.main([str(run), str(tmp_path / "out"), *options, *reversed(towers)])
    with pytest.raises(ValueError, match="both must be square"):
        resample_positions(torch.zeros(1, 257, 4), 256)


# --- Folders of the original's converter ---
def test_a_released_folder_keeps_its_weights_and_gains_code(checkpoint, tmp_path):
    convert.main([str(checkpoint), str(tmp_path / "out")])
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"] == "modeling_openvla.OpenVLAForActionPrediction"
    assert config["norm_stats"] == json.loads((checkpoint / "dataset_statistics.json").read_text())
    assert (tmp_path / "out" / "modeling_openvla.py").exists()
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_nothing_is_overwritten_unasked(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="or pass --overwrite"):
        convert.main([str(checkpoint), str(tmp_path / "out")])
    with pytest.raises(FileExistsError, match="something else than a policy"):
        convert.main([str(checkpoint), str(tmp_path / "out"), "--overwrite"])
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"
    (tmp_path / "out" / "mine.txt").unlink()
    convert.main([str(checkpoint), str(tmp_path / "out"), "--overwrite"])
    (tmp_path / "out" / "mine.txt").write_text("of an older policy")
    convert.main([str(checkpoint), str(tmp_path / "out"), "--overwrite"])
    assert not (tmp_path / "out" / "mine.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_interrupt_between_the_renames_brings_the_old_folder_back(checkpoint, tmp_path, monkeypatch):
    convert.main([str(checkpoint), str(tmp_path / "out")])
    (tmp_path / "out" / "mine.txt").write_text("kept")
    rename, calls = os.replace, []

    def interrupted(old, new):
        calls.append(new)
        if str(new) == str(tmp_path / "out") and sum(str(each) == str(new) for each in calls) == 1:
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert.main([str(checkpoint), str(tmp_path / "out"), "--overwrite"])
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_source_is_never_replaced(checkpoint, tmp_path):
    source = tmp_path / "models" / "source"
    shutil.copytree(checkpoint, source)
    for out in (source, source / "out", source.parent, tmp_path / "link"):
        if out.name == "link":
            out.symlink_to(source)
        with pytest.raises(ValueError, match="and its source .* overlap"):
            convert.main([str(source), str(out), "--overwrite"])
    assert weights(source).keys() == weights(checkpoint).keys() and not (source / "out").exists()


def test_bad_sources(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub id"):
        convert.main(["no/such/folder", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=r"in HF layout already, .* are for \.pt files"):
        convert.main([str(checkpoint), str(tmp_path / "out"), "--tokenizer", "x"])
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of-00002.safetensors: expected a whole checkpoint"):
        convert.main([str(broken), str(tmp_path / "out")])
    shutil.copy(checkpoint / "model-00001-of-00002.safetensors", broken / "model-00002-of-00002.safetensors")
    (broken / "model-00001-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="no whole safetensors file \\(a git-LFS pointer"):
        convert.main([str(broken), str(tmp_path / "out")])
    shutil.copy(checkpoint / "model-00001-of-00002.safetensors", broken / "model.safetensors")
    with pytest.raises(ValueError, match="holds both model.safetensors and"):
        convert.main([str(broken), str(tmp_path / "out")])
    assert not re.search("incomplete", str(list(tmp_path.iterdir())))


# --- Policies of OpenVLA-OFT ---
OFT = {  # kind -> which of the recorded actions, or None for noise of the test's own
    "l1": ({"head": "l1"}, "actions_l1_proprio_fp32"),
    "l1 without state": ({"head": "l1", "proprio": False}, "actions_l1_fp32"),
    "film": ({"head": "l1", "film": True}, "film"),
    "diffusion": ({"head": "diffusion"}, "diffusion"),
    "token": ({"head": "token"}, None),
}
STRANGER = """
    import json, sys
    sys.modules["openvla"] = None
    import numpy as np, torch, transformers
    from PIL import Image
    from safetensors.torch import load_file
    golden, told = load_file(sys.argv[1]), json.loads(sys.argv[3])
    auto = getattr(transformers, "AutoModelFor" + ("Vision2Seq" if sys.argv[2] == "4" else "ImageTextToText"))
    for folder, observations in told:
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        model = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        actions = []
        for index, prompt, state, options in observations:
            images = [Image.fromarray(golden[f"{index:02d}.{name}_u8"].numpy()) for name in ("primary", "wrist")]
            if options:
                options["noise"] = golden[f"diffusion.{index:02d}.noise"]
            inputs = processor(prompt, images, state)
            actions.append(model.predict_action(**inputs, unnorm_key="toy_robot", **options).tolist())
        print(json.dumps(actions))
"""


def test_a_policy_of_openvla_oft_becomes_one_folder_for_strangers(
    oft_folder, oft_policy, oft_recorded, oft_golden, tmp_path, capsys
):
    extra = json.loads((Path(__file__).parent / "fixtures" / "oft_extra.json").read_text())
    told, expected = [], []
    for number, (kind, recording) in enumerate(OFT.values()):
        source, out = oft_folder(**kind), tmp_path / str(number)
        convert.main([str(source), str(out), "--chunk", "8", "--cameras", "2"])
        assert_tensors_are_equal(source, out)
        entries = oft_recorded["inputs"][:2]
        if recording in extra:
            entries = [{**oft_recorded["inputs"][entry["index"]], **entry} for entry in extra[recording][-2:]]
        state = kind.get("proprio", True)
        options = [{"num_denoising_steps": entry["steps"]} if "steps" in entry else {} for entry in entries]
        rows = [(entry["index"], entry["prompt"], entry["state"] if state else None) for entry in entries]
        told.append((str(out), [(*row, more) for row, more in zip(rows, options)]))
        if recording is None:  # the original's are of tokens that are no actions: see test_oft.py
            model, processor = oft_policy(**kind)
            images = [cameras(oft_golden, entry["index"]) for entry in entries]
            inputs = [processor(row[1], shown, row[2]) for row, shown in zip(rows, images)]
            expected.append([model.predict_action(**each, unnorm_key="toy_robot") for each in inputs])
        else:
            name = "actions" if recording in extra else recording
            expected.append([entry[name] for entry in entries])
    assert "centre crop: none; policies trained with random crops" in capsys.readouterr().out

    golden = tmp_path / "golden.safetensors"
    save_file(oft_golden, golden)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", textwrap.dedent(STRANGER), str(golden), transformers.__version__[0]]
    done = subprocess.run([*command, json.dumps(told)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind, actions, wanted in zip(OFT, map(json.loads, done.stdout.splitlines()), expected):
        tolerance = 2e-4 if kind == "diffusion" else 1e-5
        np.testing.assert_allclose(actions, wanted, rtol=0, atol=tolerance, err_msg=kind)


def cameras(golden, index: int) -> list[Image.Image]:
    return [Image.fromarray(golden[f"{index:02d}.{name}_u8"].numpy()) for name in ("primary", "wrist")]


def assert_tensors_are_equal(source: Path, out: Path) -> None:
    """What lies in a folder of OpenVLA-OFT is in the converted one, byte by byte, and the report tells of it."""
    expected, origins = weights(source), {}
    for path in source.glob("*.pt"):
        part = path.name.partition("--")[0]
        for key, tensor in torch.load(path, weights_only=True).items():
            key = key.removeprefix("module.")
            name = key.replace(".block.", ".") if part == "vision_backbone" else f"{part}.{key}"
            expected[name], origins[f"{path.name}: {key}"] = tensor, name
    made = weights(out)
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype and torch.equal(made[name], tensor), name
    report = json.loads((out / "conversion.json").read_text())
    assert report["renamed"] == origins and report["tensors"] == len(expected)
    replaced = {name for name in origins.values() if name in weights(source)}
    assert report["dropped"] == dict.fromkeys(sorted(replaced), "replaced by the towers with FiLM")


def test_chunk_and_cameras_are_for_policies_of_openvla_oft(checkpoint, oft_folder, run, tmp_path):
    for source in (checkpoint, run):
        with pytest.raises(ValueError, match="is no policy of OpenVLA-OFT: --chunk and --cameras are for those"):
            convert.main([str(source), str(tmp_path / "out"), "--chunk", "8"])
    with pytest.raises(ValueError, match="pass num_cameras, as trained"):
        convert.main([str(oft_folder()), str(tmp_path / "out"), "--chunk", "8"])
    assert not (tmp_path / "out").exists()
