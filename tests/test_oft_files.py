"""Policies as OpenVLA-OFT's training leaves them: every combination of parts loads, and nothing is guessed."""

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hub_server import LocalHub
from PIL import Image
from safetensors.torch import load_file

import openvla
from openvla import cli
from openvla.modeling_openvla import OpenVLAModel
from openvla.oft_files import PARTS, OFTWeights, find_oft

TOLD = {"action_chunk": 8, "num_cameras": 2}
KINDS = [
    {"head": "l1"},
    {"head": "l1", "proprio": False},
    {"head": "l1", "film": True},
    {"head": "diffusion"},
    {"head": "diffusion", "proprio": False},
    {"head": "token"},
    {"head": "token", "film": True, "proprio": False},
]
LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "attn_pool.q", "attn_pool.kv", "attn_pool.proj")
LINEAR += ("attn_pool.mlp.fc1", "attn_pool.mlp.fc2")


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read(folder: Path, part: str) -> dict[str, torch.Tensor]:
    (path,) = folder.glob(f"{part}--*.pt")
    return torch.load(path, weights_only=True)


def rewrite(folder: Path, part: str, content) -> None:
    (path,) = folder.glob(f"{part}--*.pt")
    torch.save(content, path)


def name_robot(folder: Path, *keys: str, action_dim: int = 7) -> None:
    """Statistics under other names, of so many dims."""
    stats = next(iter(json.loads((folder / "dataset_statistics.json").read_text()).values()))
    for name, values in stats["action"].items():
        stats["action"][name] = (values * 2)[:action_dim]
    (folder / "dataset_statistics.json").write_text(json.dumps(dict.fromkeys(keys, stats)))


@pytest.fixture
def folder(oft_folder, tmp_path):
    """`folder(**kind)`: a copy, to be changed."""

    def copy(**kind) -> Path:
        return Path(shutil.copytree(oft_folder(**kind), tmp_path / "policy"))

    return copy


# --- What loads ---
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_tensor_of_the_parts_is_in_whatever_loads_it(kind, oft_folder):
    folder = oft_folder(**kind)
    before = digests(folder)
    folder.chmod(0o555)
    try:
        model, processor = openvla.load(folder, dtype=torch.float32, **TOLD)
        again = openvla.OpenVLAForActionPrediction.from_pretrained(folder, dtype=torch.float32, **TOLD)
        base = OpenVLAModel.from_pretrained(folder, dtype=torch.float32, **TOLD)
        alone = openvla.OpenVLAProcessor.from_pretrained(folder, num_cameras=2)
    finally:
        folder.chmod(0o755)
    assert digests(folder) == before

    head, proprio, film = kind["head"], kind.get("proprio", True), kind.get("film", False)
    config = model.config
    assert (config.attention, config.action_head, config.action_dim) == ("bidirectional", head, 7)
    assert (config.proprio_dim, config.film, config.action_chunk, config.num_cameras) == (8 * proprio, film, 8, 2)
    assert config.action_normalization == "q99" and not model.training
    state_tokens = proprio + (head == "diffusion")
    assert processor.num_state_tokens == alone.num_state_tokens == state_tokens
    assert processor.num_cameras == alone.num_cameras == 2
    assert processor.num_placeholders == config.num_placeholders == 2 * 256 + state_tokens

    state = model.state_dict()
    expected = load_file(folder / "model.safetensors")
    for part in PARTS:
        if not list(folder.glob(f"{part}--*.pt")):
            continue
        for name, tensor in read(folder, part).items():
            name = name.removeprefix("module.")
            expected[name.replace(".block.", ".") if part == "vision_backbone" else f"{part}.{name}"] = tensor
    for released, name in model._fix_state_dict_keys_on_save({name: name for name in state}).items():
        assert torch.equal(state[name], expected.pop(released).float()), released
    assert all("blocks.3." in name or "featurizer.norm." in name or "attn_pool" in name for name in expected)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, state[f"model.{name}"]), name


def test_the_config_alone_tells_sizes_and_can_be_given(oft_folder, tmp_path):
    config = openvla.OpenVLAConfig.from_pretrained(oft_folder("diffusion"), **TOLD)
    assert (config.action_head, config.num_denoising_steps, config.num_placeholders) == ("diffusion", 50, 514)
    config.save_pretrained(tmp_path)
    for given in (config, tmp_path, str(tmp_path)):
        model = openvla.OpenVLAForActionPrediction.from_pretrained(oft_folder("diffusion"), config=given)
    head = read(oft_folder("diffusion"), "action_head")["module.noise_predictor.mlp_resnet.fc2.weight"]
    assert torch.equal(model.action_head.noise_predictor["mlp_resnet"].fc2.weight, head)


def test_what_lies_beside_the_weights_is_not_missing(oft_folder):
    (_, report), _ = openvla.load(oft_folder("l1"), output_loading_info=True, **TOLD)
    assert not report["missing_keys"]


def test_prefixes_of_data_parallel_training_are_no_matter(folder):
    policy = folder()
    for part in ("action_head", "proprio_projector"):
        bare = {name.removeprefix("module."): tensor for name, tensor in read(policy, part).items()}
        assert set(bare) != set(read(policy, part))
        rewrite(policy, part, bare)
    files = find_oft(str(policy), {})
    for part in files.parts:
        assert set(files.read(part)) == set(read(policy, part))
    model, _ = openvla.load(policy, **TOLD)
    assert torch.equal(model.action_head.model.fc2.bias, read(policy, "action_head")["model.fc2.bias"])


def test_other_sizes_are_read_from_the_files(folder):
    policy = folder()
    head = read(policy, "action_head")
    wide = {"module.model.fc2.weight": torch.ones(14, 128), "module.model.fc2.bias": torch.arange(14.0)}
    for name in ("layer_norm1.weight", "layer_norm1.bias"):
        wide[f"module.model.{name}"] = torch.ones(14 * 128)
    wide["module.model.fc1.weight"] = torch.zeros(128, 14 * 128)
    rewrite(policy, "action_head", head | wide)
    rewrite(policy, "proprio_projector", read(policy, "proprio_projector") | {"module.fc1.weight": torch.ones(128, 3)})
    model, _ = openvla.load(policy, dtype=torch.float32, **TOLD)
    assert (model.config.action_dim, model.config.proprio_dim) == (14, 3)
    assert model.action_head.model.fc2.bias.tolist() == list(range(14))
    assert model.model.proprio_projector.fc1.weight.shape == (128, 3)


# --- What the files do not tell ---
@pytest.mark.parametrize(
    "keys, dims, expected",
    [
        (["libero_spatial_no_noops"], 7, (8, 2, "q99")),
        (["libero_spatial_no_noops", "libero_10_no_noops"], 7, (8, 2, "q99")),
        (["aloha1_fold_shirt_30_demos"], 7, (25, 3, "min_max")),
        (["my_two_arms"], 14, (25, 3, "min_max")),
        (["bridge_orig"], 7, (5, 1, "q99")),
    ],
)
def test_the_originals_robots_are_known_by_name(keys, dims, expected, folder, caplog):
    policy = folder(head="token")
    name_robot(policy, *keys, action_dim=dims)
    with caplog.at_level(logging.WARNING):
        config = openvla.OpenVLAConfig.from_pretrained(policy)
    assert (config.action_chunk, config.num_cameras, config.action_normalization) == expected
    assert config.action_dim == dims
    assert f"'action_chunk': {expected[0]}, 'num_cameras': {expected[1]}" in caplog.text
    assert openvla.OpenVLAProcessor.from_pretrained(policy).num_cameras == expected[1]


def test_what_is_told_wins_and_what_is_still_assumed_is_said(folder, caplog):
    policy = folder(head="token")
    name_robot(policy, "libero_object_no_noops")
    with caplog.at_level(logging.WARNING):
        config = openvla.OpenVLAConfig.from_pretrained(policy, action_chunk=4, num_cameras=1)
    assert (config.action_chunk, config.num_cameras) == (4, 1)
    assert "taken for a policy of OpenVLA-OFT" not in caplog.text
    name_robot(policy, "aloha1_put_x_into_pot")
    with caplog.at_level(logging.WARNING):
        config = openvla.OpenVLAConfig.from_pretrained(policy, action_chunk=4, num_cameras=1)
    assert (config.action_chunk, config.action_normalization) == (4, "min_max")
    assert "OpenVLA-OFT on aloha: {'action_normalization': 'min_max'}" in caplog.text
    given = openvla.OpenVLAConfig.from_pretrained(policy, action_normalization="q99")
    assert (given.action_chunk, given.num_cameras, given.action_normalization) == (25, 3, "q99")


@pytest.mark.parametrize("keys", [["toy_robot"], ["toy_robot", "bridge_orig"], ["14_bolts"]], ids=str)
def test_chunk_and_cameras_are_asked_for(keys, folder):
    policy = folder()
    name_robot(policy, *keys)
    with pytest.raises(ValueError, match=r"pass action_chunk and num_cameras, as trained"):
        openvla.OpenVLAForActionPrediction.from_pretrained(policy)
    with pytest.raises(ValueError, match=r"pass num_cameras, as trained"):
        openvla.load(policy, action_chunk=8)
    with pytest.raises(ValueError, match=r"pass action_chunk, as trained"):
        openvla.load(policy, num_cameras=2)
    with pytest.raises(ValueError, match=r"pass num_cameras, as trained"):
        openvla.OpenVLAProcessor.from_pretrained(policy)


def test_the_statistics_of_the_base_name_no_robot(folder):
    policy = folder()  # whose config.json has bridge_orig among others, as copied from the base
    (policy / "dataset_statistics.json").unlink()
    with pytest.raises(ValueError, match="pass action_chunk and num_cameras"):
        openvla.OpenVLAConfig.from_pretrained(policy)


# --- What is no policy ---
def test_folders_that_are_not_whole_are_refused(folder):
    policy = folder(head="diffusion")
    (projector,) = policy.glob("noisy_action_projector--*.pt")
    hidden = projector.rename(policy / "hidden")
    with pytest.raises(ValueError, match="only one of a diffusion head and its noisy_action_projector"):
        openvla.load(policy, **TOLD)
    hidden.rename(projector)
    (head,) = policy.glob("action_head--*.pt")
    shutil.copy(head, policy / "action_head--50000_checkpoint.pt")
    with pytest.raises(ValueError, match=r"several steps .*--50000_checkpoint.pt, action_head--diffusion"):
        openvla.load(policy, **TOLD)


def test_heads_of_another_kind_are_refused(folder):
    policy = folder()
    head = read(policy, "action_head")
    rewrite(policy, "action_head", {name.replace("model.", "flow."): tensor for name, tensor in head.items()})
    with pytest.raises(ValueError, match="a kind of head that the original does not have"):
        openvla.load(policy, **TOLD)
    rewrite(policy, "action_head", head | {"module.model.fc3.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"weights that its policy does not have: \['action_head.model.fc3.weight'\]"):
        openvla.load(policy, **TOLD)
    rewrite(policy, "action_head", {name: tensor for name, tensor in head.items() if "fc1" not in name})
    with pytest.raises(ValueError, match=r"lacks 2 tensors \(action_head.model.fc1.bias"):
        openvla.load(policy, **TOLD)


def test_what_a_folder_lacks_is_told(folder, caplog):
    policy = folder()
    assert "taken for" not in caplog.text
    openvla.load(policy, **TOLD)
    assert "is not whole" not in caplog.text
    for path in (*policy.glob("action_head--*.pt"), *policy.glob("proprio_projector--*.pt")):
        path.unlink()
    model, _ = openvla.load(policy, **TOLD)
    assert (model.config.action_head, model.config.proprio_dim) == ("token", 0)
    assert "no action_head--*.pt and no proprio_projector--*.pt: taken for a policy that has none and acts with" in (
        caplog.text
    )


def test_heads_of_other_sizes_do_not_fit(folder):
    with pytest.raises(ValueError, match=r"action_head.model.layer_norm1.weight of \(896,\) for \(1792,\)"):
        openvla.load(folder(), **TOLD, action_dim=14)


class Touch:
    """What a pickle may do when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("content", ["code", "code in a file of torch", "old format", "cut", "pointer", "nested"])
def test_files_that_are_no_weights_are_refused_and_their_code_does_not_run(content, folder, tmp_path):
    policy, witness = folder(), tmp_path / "witness"
    (path,) = policy.glob("proprio_projector--*.pt")
    tensors = read(policy, "proprio_projector")
    if content == "code":
        path.write_bytes(pickle.dumps(tensors | {"more": Touch(witness)}))
    elif content == "code in a file of torch":
        torch.save(tensors | {"more": Touch(witness)}, path)
    elif content == "old format":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-2000])
    elif content == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 73407\n")
    else:
        torch.save({"model": tensors}, path)
    with pytest.raises(ValueError, match=f"{path.name} (is no whole file of weights|holds something else)"):
        openvla.load(policy, **TOLD)
    assert not witness.exists()


def test_auto_classes_are_told_what_to_use(oft_folder):
    # transformers' AutoConfig reads config.json, which says nothing, and would make a plain OpenVLA of it
    name = "AutoModelForVision2Seq" if transformers.__version__.startswith("4.") else "AutoModelForImageTextToText"
    for auto in (transformers.AutoModel, getattr(transformers, name)):
        with pytest.raises(ValueError, match=r"needs bidirectional attention .*`openvla.load` .*`openvla convert`"):
            auto.from_pretrained(oft_folder())
        with pytest.raises(ValueError, match="needs bidirectional attention"):
            auto.from_pretrained(oft_folder(), **TOLD)


# --- FiLM whose LoRA was never merged ---
def with_lora(policy: Path, rank: int = 4, alpha: int | None = 8) -> dict[str, torch.Tensor]:
    """Turns a FiLM file into what training with LoRA leaves. Returns its towers with LoRA merged by hand."""
    generator, tensors, merged = torch.Generator().manual_seed(0), {}, {}
    for name, tensor in read(policy, "vision_backbone").items():
        stem, _, kind = name.rpartition(".")
        merged[name] = tensor
        if not stem.endswith(LINEAR):
            tensors[name] = tensor
            continue
        tensors[f"{stem}.base_layer.{kind}"] = tensor
        if kind == "weight":
            rows, columns = tensor.shape
            down = (torch.randn(rank, columns, generator=generator) * 0.1).bfloat16()
            up = (torch.randn(rows, rank, generator=generator) * 0.1).bfloat16()
            tensors |= {f"{stem}.lora_A.default.weight": down, f"{stem}.lora_B.default.weight": up}
            update = (min(rank, 16) if alpha is None else alpha) / rank * (up.float() @ down.float())
            merged[name] = (tensor.float() + update).bfloat16()
    rewrite(policy, "vision_backbone", tensors)
    told = {"r": rank} | ({} if alpha is None else {"lora_alpha": alpha})
    (policy / "lora_adapter" / "adapter_config.json").write_text(json.dumps(told))
    return merged


@pytest.mark.parametrize("rank, alpha", [(4, 8), (32, None)])
def test_lora_in_towers_with_film_is_merged(rank, alpha, folder, tmp_path, oft_policy, oft_recorded, oft_golden):
    policy = folder(film=True)
    merged = with_lora(policy, rank, alpha)
    by_hand = Path(shutil.copytree(policy, tmp_path / "by_hand"))
    rewrite(by_hand, "vision_backbone", merged)
    weights = OFTWeights(find_oft(str(policy), {}))
    assert len([name for name in weights.lora if "featurizer.blocks.0." in name]) == 8  # both towers
    assert {name.replace(".block.", ".") for name in merged} <= set(weights)
    for name, tensor in merged.items():
        assert torch.equal(weights[name.replace(".block.", ".")], tensor), name

    entry = oft_recorded["inputs"][0]
    actions = {}
    for name, place in {"policy": policy, "by hand": by_hand}.items():
        model, processor = openvla.load(place, dtype=torch.float32, **TOLD)
        images = [Image.fromarray(oft_golden[f"00.{camera}_u8"].numpy()) for camera in ("primary", "wrist")]
        inputs = processor(entry["prompt"], images, entry["state"])
        actions[name] = model.predict_action(**inputs, unnorm_key="toy_robot")
    assert np.array_equal(actions["policy"], actions["by hand"])
    plain, _ = oft_policy(film=True)
    assert np.abs(actions["policy"] - plain.predict_action(**inputs, unnorm_key="toy_robot")).max() > 1e-3


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors, name: tensors.pop(f"{name}.lora_B.default.weight"), r"is not plain: \['A.default.weight'\]"),
        (
            lambda tensors, name: tensors.update({f"{name}.lora_magnitude_vector.default.weight": torch.ones(384)}),
            "is not plain: .*'magnitude_vector",
        ),
        (lambda tensors, name: tensors.pop(f"{name}.base_layer.weight"), "LoRA of .*attn.qkv.weight is not plain"),
    ],
)
def test_lora_that_is_not_whole_is_refused(change, message, folder):
    policy = folder(film=True)
    with_lora(policy)
    tensors = read(policy, "vision_backbone")
    change(tensors, "vision_backbone.featurizer.blocks.0.block.attn.qkv")
    rewrite(policy, "vision_backbone", tensors)
    with pytest.raises(ValueError, match=message):
        openvla.load(policy, **TOLD)


def test_an_adapter_of_another_rank_is_refused(folder):
    policy = folder(film=True)
    with_lora(policy)
    (policy / "lora_adapter" / "adapter_config.json").write_text(json.dumps({"r": 32, "lora_alpha": 16}))
    with pytest.raises(ValueError, match=r"has rank 4, but .*adapter_config.json says 32"):
        openvla.load(policy, **TOLD)


def test_parts_do_not_stay_away_in_silence(oft_folder, tmp_path):
    # what transformers has put on the disk takes no other weights, and says so in a warning alone
    parts = ("model.vision_backbone", "model.projector", "model.language_model", "lm_head", "model.proprio_projector")
    device_map = {**dict.fromkeys(parts, "cpu"), "action_head": "disk"}
    with pytest.raises(ValueError, match=r"16 tensors such as action_head.* cannot be offloaded"):
        openvla.load(oft_folder(), device_map=device_map, offload_folder=tmp_path, **TOLD)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_parts_stay_in_their_files(folder):
    policy = folder(film=True)
    with_lora(policy)
    weights = OFTWeights(find_oft(str(policy), {}))
    maps = Path("/proc/self/maps").read_text()
    assert all(f"{policy}/{part}--" in maps for part in ("action_head", "proprio_projector", "vision_backbone"))
    name = "vision_backbone.featurizer.blocks.0.attn.qkv.weight"
    assert weights[name] is not weights[name]  # merged when asked for, and not kept


# --- On the command line ---
def test_predict_takes_what_the_files_do_not_tell(oft_folder, oft_recorded, oft_golden, tmp_path, capsys):
    entry = oft_recorded["inputs"][0]
    pictures = [str(tmp_path / f"{name}.png") for name in ("primary", "wrist")]
    for picture in pictures:
        Image.fromarray(oft_golden[f"00.{Path(picture).stem}_u8"].numpy()).save(picture)
    words = ["predict", "--model", str(oft_folder()), "--image", *pictures]
    words += ["--instruction", re.search(r"take to (.*)\?\nOut:", entry["prompt"])[1]]
    words += ["--unnorm-key", "toy_robot", "--dtype", "float32", "--device", "cpu"]
    words += ["--action-chunk", "8", "--num-cameras", "2"]
    state = ["--proprio", *(repr(value) for value in entry["state"])]
    cli.main([*words, *state, "--json"])
    answer = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(answer["action"], entry["actions_l1_proprio_fp32"], atol=1e-5, rtol=0)
    assert set(answer) == {"action", "unnorm_key", "dims"}
    cli.main([*words, *state])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["dim", *" ".join(f"step {number}" for number in range(8)).split(), "unit"]
    assert len(lines) == 10 and f"{answer['action'][7][0]:.6f}" in lines[3]
    for more, message in ((["--proprio", "0", "1"], "got 2: see --proprio"), ([], "got none: see --proprio")):
        with pytest.raises(SystemExit, match=f"takes 8 numbers of the robot's state, {message}"):
            cli.main([*words, *more])
    diffusion = [str(oft_folder("diffusion")) if word == str(oft_folder()) else word for word in words]
    answers = []
    for seed in ("1", "1", "2"):
        cli.main([*diffusion, *state, "--seed", seed, "--json"])
        answers.append(json.loads(capsys.readouterr().out)["action"])
    assert answers[0] == answers[1] != answers[2]


def test_long_chunks_are_printed_step_by_step(folder, oft_golden, tmp_path, capsys):
    policy = folder(proprio=False)
    pictures = [str(tmp_path / f"{name}.png") for name in ("primary", "wrist")]
    for picture in pictures:
        Image.fromarray(oft_golden[f"00.{Path(picture).stem}_u8"].numpy()).save(picture)
    words = ["predict", "--model", str(policy), "--image", *pictures, "--instruction", "go", "--action-chunk", "9"]
    cli.main([*words, "--num-cameras", "2", "--unnorm-key", "bridge_orig"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["step", "x", "y", "z", "roll", "pitch", "yaw", "gripper"] and len(lines) == 13
    assert lines[3].split() == ["m"] * 3 + ["rad"] * 3 + ["1", "=", "open"] and lines[12].split()[0] == "8"


# --- On the Hub ---
ACT = """
    import json, os, sys, numpy as np, openvla, torch
    from PIL import Image
    model, processor = openvla.load(sys.argv[1], dtype=torch.float32, action_chunk=8, num_cameras=2)
    with np.load(sys.argv[2]) as told:
        images = [Image.fromarray(told[name]) for name in ("primary", "wrist")]
        inputs = processor(str(told["prompt"]), images, told["state"])
    print(json.dumps(model.predict_action(**inputs, unnorm_key="toy_robot").tolist()))
"""


def make_repository(hub: LocalHub, name: str) -> None:
    """By hand: huggingface_hub is offline in the tests' own process."""
    body, headers = json.dumps({"name": name, "organization": "lab"}).encode(), {"Authorization": "Bearer hf_write"}
    urllib.request.urlopen(urllib.request.Request(f"{hub.endpoint}/api/repos/create", body, headers)).read()


def act(place: str, observation: Path, **environment) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | environment
    command = [sys.executable, "-c", textwrap.dedent(ACT), place, str(observation)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_repository_of_any_name_online_and_offline(folder, oft_recorded, oft_golden, tmp_path):
    policy, entry = folder(), oft_recorded["inputs"][0]
    (policy / "lora_adapter" / "adapter_model.safetensors").write_bytes(bytes(1000))
    (policy / "optimizer--150000_checkpoint.pt").write_bytes(bytes(1000))
    (policy / "modeling_prismatic.py").write_text("raise SystemExit('code of the repository ran')")
    pictures = {name: oft_golden[f"00.{name}_u8"].numpy() for name in ("primary", "wrist")}
    np.savez(tmp_path / "observation.npz", prompt=entry["prompt"], state=entry["state"], **pictures)
    expected = entry["actions_l1_proprio_fp32"]
    with LocalHub(tmp_path / "hub") as hub:
        make_repository(hub, "arm")
        files = {str(path.relative_to(policy)): path for path in policy.rglob("*") if path.is_file()}
        hub.write("lab/arm", {name: path.read_bytes() for name, path in files.items()})
        home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        done = act("lab/arm", tmp_path / "observation.npz", HF_ENDPOINT=hub.endpoint, HF_TOKEN="hf_read", **home)
        assert done.returncode == 0, done.stderr[-3000:]
        np.testing.assert_allclose(json.loads(done.stdout), expected, atol=1e-5, rtol=0)
    (snapshot,) = (tmp_path / "home" / "hub" / "models--lab--arm" / "snapshots").iterdir()
    fetched = {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()}
    assert {name for name in fetched if name.endswith(".pt")} == {
        "action_head--150000_checkpoint.pt",
        "proprio_projector--150000_checkpoint.pt",
    }
    assert "lora_adapter/adapter_config.json" in fetched and "lora_adapter/adapter_model.safetensors" not in fetched
    assert not [name for name in fetched if name.endswith(".py")]

    done = act("lab/arm", tmp_path / "observation.npz", HF_HUB_OFFLINE="1", **home)  # the Hub is gone
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(json.loads(done.stdout), expected, atol=1e-5, rtol=0)


def test_the_statistics_on_the_hub_say_which_robot_it_is(folder, tmp_path):
    policy = folder(head="token")  # and config.json has those of the base
    name_robot(policy, "libero_goal_no_noops")
    with LocalHub(tmp_path / "hub") as hub:
        make_repository(hub, "libero")
        small = {path.name: path.read_bytes() for path in policy.glob("*.json")}
        adapter = (policy / "lora_adapter" / "adapter_config.json").read_bytes()
        hub.write("lab/libero", small | {"lora_adapter/adapter_config.json": adapter})
        script = "import openvla; c = openvla.OpenVLAConfig.from_pretrained('lab/libero'); "
        script += "print(c.action_chunk, c.num_cameras, c.action_dim)"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_read"}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "8 2 7\n", done.stderr[-3000:]
