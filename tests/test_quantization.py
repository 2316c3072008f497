"""Lossy acting: weights are what a hand would round them to, the rest is untouched, and what cannot be is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_readers import write_folder

import openvla
from openvla import cli, quantization
from openvla.evaluate import bench_quantization
from openvla.evaluate.offline_report import card_entries
from openvla.finetune.steps import Episode
from openvla.quantization import METHODS, loading_options, plain_tensors
from openvla.serve.policy import OpenVLAPolicy

INSTRUCTION = "pick up the black bowl between the plate and the ramekin and place it on the plate"
UP = "model.language_model.layers.1.mlp.up_proj"
# Farthest that the logits of action tokens may be, relative to how far these lie from their mean. Measured: 0.6 %,
# 5.1 %, 0.3 %, in the arithmetic of a CPU 2.4 % (fp8); int4 not. With the scales of neighbouring rows mixed up: 15 %.
FARTHEST = {"int8": 0.012, "nf4": 0.08, "torchao-int8": 0.008, "torchao-fp8": 0.05, "torchao-int4": 0.1}
# Dettmers et al. 2023 (arXiv:2305.14314), appendix E
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302]
NF4 += [0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
INPUTS = torch.rand(3, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1  # of a layer


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    """The recorded policy with 40 more neurons in each MLP, which say nothing: 384 suits the kernels of all."""
    folder = tmp_path_factory.mktemp("policy") / "padded"
    text = {**model.config.text_config.to_dict(), "intermediate_size": 384}
    torch.manual_seed(0)
    padded = openvla.OpenVLAForActionPrediction(
        openvla.OpenVLAConfig(**model.config.to_dict() | {"text_config": text})
    )
    weights = padded.state_dict()
    for name, weight in model.state_dict().items():
        if "down_proj" in name:
            weights[name].zero_()
        weights[name][tuple(slice(size) for size in weight.shape)] = weight
    padded.bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def load(folder):
    """`load(method)`: a model that all tests share, in float32 where the method computes in any dtype."""
    models = {}

    def load(method: str | None = None, dtype=None):
        dtype = dtype or (torch.bfloat16 if method and METHODS[method].capability else torch.float32)
        if (method, dtype) not in models:
            skip_what_cannot_run(method)
            models[method, dtype] = openvla.load(folder, quantize=method, dtype=dtype)[0]
        return models[method, dtype]

    return load


def skip_what_cannot_run(method: str | None) -> None:
    if method:
        try:
            loading_options(method, {})
        except ImportError as error:
            pytest.skip(str(error))
        except ValueError as error:
            assert METHODS[method].capability
            pytest.skip(str(error))


def linears(model) -> dict[str, torch.nn.Linear]:
    """What is quantised: seven in each of three layers."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: module for name, module in found.items() if ".language_model.layers." in name}


def look(model, processor, recorded, images) -> tuple[np.ndarray, torch.Tensor]:
    """Of five recorded inputs the tokens `(5, 7)`, and the logits of action tokens for the first one `(5, 256)`."""
    tokens, logits = [], []
    for entry, image in zip(recorded["inputs"][:5], images):
        inputs = processor(entry["prompt"], image).to(model.device)
        tokens.append(model.predict_action(**inputs, unnorm_key="bridge_orig", return_dict=True)["token_ids"][0])
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, -1, 31744:32000].float().cpu())
    return np.stack(tokens), torch.stack(logits)


@pytest.fixture(scope="module")
def reference(load, processor, recorded, images) -> torch.Tensor:
    tokens, logits = look(load(), processor, recorded, images)
    assert share_equal(tokens, recorded) == 1
    return logits


def share_equal(tokens: np.ndarray, recorded) -> float:
    return np.mean(tokens == [entry["action_ids"] for entry in recorded["inputs"][: len(tokens)]])


def distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return ((logits - reference).norm() / (reference - reference.mean(dim=1, keepdim=True)).norm()).item()


# --- What comes out ---
@pytest.mark.parametrize("method", METHODS)
def test_agreement_with_the_policy_as_it_is(method, load, reference, processor, recorded, images):
    tokens, logits = look(load(method), processor, recorded, images)
    assert share_equal(tokens, recorded) > 0.95
    assert 1e-3 < distance(logits, reference) < FARTHEST[method]


def test_a_broken_quantiser_would_be_noticed(folder, reference, processor, recorded, images):
    skip_what_cannot_run("torchao-int8")
    model, _ = openvla.load(folder, quantize="torchao-int8", dtype=torch.float32)
    for layer in linears(model).values():
        layer.weight.scale = layer.weight.scale.roll(1, dims=0)
    tokens, logits = look(model, processor, recorded, images)
    assert share_equal(tokens, recorded) < 0.9
    assert distance(logits, reference) > 0.12


def test_fp8_in_the_arithmetic_of_a_cpu(folder, reference, processor, recorded, images, monkeypatch):
    """What it does on the GPUs that it needs, but for their rounding: this machine's CPU is let through."""
    api = pytest.importorskip("torchao.quantization.quant_api")
    monkeypatch.setitem(METHODS, "torchao-fp8", METHODS["torchao-fp8"]._replace(capability=None))
    monkeypatch.setattr(api, "_check_hardware_support", lambda granularity: None)
    model, _ = openvla.load(folder, quantize="torchao-fp8", dtype=torch.bfloat16, device_map="cpu")
    weight = linears(model)[UP].weight
    assert weight.qdata.dtype == torch.float8_e4m3fn and weight.scale.shape == (384, 1)
    inputs = INPUTS.bfloat16()
    inputs[1] = 0  # a token of padding, or a slot: its scale would be zero
    output = linears(model)[UP](inputs)
    assert not output[1].any() and output[0].isfinite().all()
    tokens, logits = look(model, processor, recorded, images)
    assert share_equal(tokens, recorded) > 0.95
    assert 1e-3 < distance(logits, reference) < FARTHEST["torchao-fp8"]


# --- What is in memory ---
def test_int8_by_hand(load):
    """bitsandbytes: rows of weights by their largest, and so of inputs, without outliers."""
    layer, weight = linears(load("int8"))[UP], linears(load())[UP].weight.half().float()
    largest = weight.abs().amax(dim=1, keepdim=True)
    codes, found = (weight * 127 / largest).round(), layer.state_dict()["weight"].cpu().float()
    assert (found - codes).abs().max() <= 1 and (found != codes).float().mean() < 3e-3  # ties
    rows = INPUTS.half().float()
    steps = rows.abs().amax(dim=1, keepdim=True) / 127
    by_hand = ((rows / steps).round() * steps) @ (found * largest / 127).T
    torch.testing.assert_close(layer(INPUTS.to(layer.weight.device)).cpu(), by_hand, atol=3e-3, rtol=0)


def test_nf4_by_hand(folder, load):
    """The nearest of 16 numbers, times the largest of 64 neighbours."""
    skip_what_cannot_run("nf4")
    from bitsandbytes.functional import dequantize_4bit

    model, _ = openvla.load(folder, quantize="nf4", dtype=torch.float32)  # unused: some CPUs pack it anew
    layer, weight = linears(model)[UP], linears(load())[UP].weight.reshape(-1, 64)
    largest = weight.abs().amax(dim=1, keepdim=True)
    codes = (weight / largest)[:, :, None].sub(torch.tensor(NF4)).abs().argmin(dim=-1)
    by_hand = (torch.tensor(NF4)[codes] * largest).reshape(384, 128)
    assert layer.weight.numel() == by_hand.numel() / 2  # two in a byte
    torch.testing.assert_close(dequantize_4bit(layer.weight.data, layer.weight.quant_state).cpu(), by_hand)
    inputs = INPUTS.to(model.device)
    torch.testing.assert_close(layer(inputs).cpu(), INPUTS @ by_hand.T, atol=0.02, rtol=0)  # some CPUs: bfloat16


def test_torchao_int8_by_hand(load):
    """Rows of weights by their largest; inputs as they are."""
    layer, weight = linears(load("torchao-int8"))[UP], linears(load())[UP].weight
    steps = weight.abs().amax(dim=1, keepdim=True) / 127.5
    codes, found = (weight / steps).round().clamp(-128, 127), layer.weight.qdata.cpu().float()
    assert (found - codes).abs().max() <= 1 and (found != codes).float().mean() < 3e-3  # ties
    inputs = INPUTS.to(layer.weight.device)
    torch.testing.assert_close(layer(inputs).cpu(), INPUTS @ (found * steps).T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_rest_stays_bit_by_bit(method, load):
    model = load(method)
    plain, quantized = load(None, model.dtype), linears(model)
    parameters = dict(model.named_parameters())
    touched = set()
    for name, parameter in plain.named_parameters():
        found = parameters[name]
        kept = len(plain_tensors(found)) == 1 and found.dtype == parameter.dtype
        if not kept or not torch.equal(found, parameter.to(found.device)):
            touched.add(name.removesuffix(".weight"))
    assert touched == set(quantized) and len(quantized) == 21


def test_torchaos_own_configuration_spares_the_towers(folder):
    ao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    given = TorchAoConfig(ao.Int8WeightOnlyConfig())
    model = openvla.OpenVLAForActionPrediction.from_pretrained(folder, quantization_config=given)
    quantized = {name for name, parameter in model.named_parameters() if len(plain_tensors(parameter)) > 1}
    assert quantized == {f"{name}.weight" for name in linears(model)} and given.modules_to_not_convert is None


# --- What is refused ---
@pytest.mark.parametrize(
    "method, options, problem",
    [
        ("int7", {}, "quantize='int7': expected one of int8, nf4, torchao-int8, torchao-fp8, torchao-int4"),
        ("nf4", {"load_in_8bit": True}, "Got quantize='nf4' and load_in_8bit"),
        (
            "torchao-fp8",
            {"device_map": "cpu"},
            r"torchao-fp8 runs on GPUs of compute capability \(8, 9\) or more, got",
        ),
        ("torchao-int4", {"device_map": {"": "cpu"}}, r"torchao-int4 runs on GPUs .* \(8, 0\) or more, got a CPU"),
        ("torchao-int4", {"dtype": "float32"}, "torchao-int4 computes in bfloat16, got dtype torch.float32"),
    ],
)
def test_what_cannot_be(method, options, problem, folder):
    with pytest.raises(ValueError, match=problem):
        openvla.load(folder, quantize=method, **options)


@pytest.mark.parametrize("needs", ["no-such-package>=1.0", "numpy>=99"])
def test_a_package_that_is_missing_or_too_old(needs, folder, monkeypatch):
    monkeypatch.setitem(METHODS, "int8", METHODS["int8"]._replace(needs=needs))
    with pytest.raises(ImportError, match=f"int8 needs {needs}: pip install '{needs}'"):
        openvla.load(folder, quantize="int8")


def test_adapters_and_what_is_quantised_already(folder, load, write_old_adapter, tmp_path):
    write_old_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapter is an adapter, .* merge them with `openvla export`"):
        openvla.load(tmp_path / "adapter", quantize="int8")
    load("nf4").save_pretrained(tmp_path / "small")
    shutil.copytree(folder, tmp_path / "small", dirs_exist_ok=True, ignore=shutil.ignore_patterns("model*", "config*"))
    with pytest.raises(ValueError, match=r"small is quantised already \(bitsandbytes\): load it without"):
        openvla.load(tmp_path / "small", quantize="nf4")


def test_sizes_that_do_not_suit(checkpoint, model):
    skip_what_cannot_run("nf4")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"nf4 cannot quantise layers.0.mlp.gate_proj of \(344, 128\)"):
            openvla.load(checkpoint, quantize="nf4")
    with pytest.raises(ValueError, match=r"torchao-int4 cannot quantise layers.0.self_attn.q_proj of \(128, 128\)"):
        quantization.check_quantized(model, "torchao-int4")  # which torchao leaves as they are, and nobody is told


# --- The door, and the commands ---
def test_policies_tell_how_they_are_quantised(folder, load):
    skip_what_cannot_run("torchao-int8")
    options = {"unnorm_key": "bridge_orig", "dtype": "float32", "device": "cpu"}
    first, second = (OpenVLAPolicy.from_pretrained(folder, quantize="torchao-int8", **options) for _ in range(2))
    plain = OpenVLAPolicy.from_pretrained(folder, **options)
    assert first.metadata["quantize"] == "torchao-int8" and plain.metadata["quantize"] is None
    assert first.fingerprint() == second.fingerprint() != plain.fingerprint()
    weight = linears(second.model)[UP].weight
    weight.scale *= 1.01  # the codes are the same
    assert first.fingerprint() != second.fingerprint()


def test_predict(folder, images, recorded, tmp_path, capsys):
    skip_what_cannot_run("torchao-int8")
    images[0].save(tmp_path / "picture.png")
    told = ["predict", "--model", str(folder), "--image", str(tmp_path / "picture.png"), "--instruction", INSTRUCTION]
    told += ["--unnorm-key", "bridge_orig", "--json", "--device", "cpu", "--dtype", "float32"]
    cli.main([*told, "--quantize", "torchao-int8"])
    assert json.loads(capsys.readouterr().out)["token_ids"] == recorded["inputs"][0]["action_ids"]
    with pytest.raises(SystemExit, match="openvla predict: torchao-fp8 (runs on GPUs|computes in bfloat16)"):
        cli.main([*told, "--quantize", "torchao-fp8"])
    with pytest.raises(SystemExit):
        cli.main(["predict", "--help"])
    assert "lossy: fewer bits" in " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "robot")


def test_evaluate(folder, dataset, tmp_path, capsys):
    skip_what_cannot_run("torchao-int8")
    told = ["evaluate", str(folder), "--data", str(dataset), "--unnorm-key", "bridge_orig", "--episodes", "1"]
    told += ["--free-running", "--plots", "0", "--device", "cpu", "--output-dir", str(tmp_path / "out")]
    cli.main([*told, "--quantize", "torchao-int8"])
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["settings"]["quantize"] == "torchao-int8"
    assert {each["dataset"] for each in card_entries(found)} == {"robot, policy quantised as torchao-int8"}
    with pytest.raises(SystemExit, match="--quantize would do nothing here: no checkpoint is loaded"):
        cli.main(["evaluate", "--baseline", "expert", "--suite", "libero_goal", "--quantize", "int8"])


# --- How much it costs ---
class Drawn(list):
    """A reader of five episodes of four steps, which notes what is read."""

    def __len__(self):
        return 5

    def read(self, number: int) -> Episode:
        self.append(number)
        states = np.full((4, 2), float(number))
        return Episode("", [str(number)] * 4, np.zeros((4, 7)), states, lambda camera, step: f"{camera} {step}")


def test_frames_come_from_all_episodes():
    reader, cameras = Drawn(), ["front", "wrist"]
    frames = bench_quantization.choose_frames(reader, 7, cameras)
    read = list(iter(reader))
    assert len(frames) == 7 == len({frame["seed"] for frame in frames}) and len(set(read)) == 4 == len(read)
    _, number, step = frames[2]["seed"]
    assert read[1] == number == int(frames[2]["instruction"]) == frames[2]["proprio"][0]
    assert frames[2]["images"] == [f"front {step}", f"wrist {step}"]
    again = bench_quantization.choose_frames(Drawn(), 7, cameras)
    assert [frame["seed"] for frame in again] == [frame["seed"] for frame in frames]
    assert len(bench_quantization.choose_frames(Drawn(), 100, cameras)) == 20


def test_bytes_by_hand(load):
    plain, quantized = load(), load("torchao-int8")
    numbers = sum(layer.weight.numel() for layer in linears(plain).values())
    rows = sum(len(layer.weight) for layer in linears(plain).values())
    saved = 4 * numbers - (numbers + 5 * rows)  # per row a scale of 4 bytes, and the zero point of 1
    assert bench_quantization.weight_bytes(plain) - bench_quantization.weight_bytes(quantized) == saved
    tied = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    tied[1].weight = tied[0].weight
    assert bench_quantization.weight_bytes(tied) == 4 * 64


def test_compare_by_hand():
    """Two of three frames alike; of the third, one token of two and so one action of two differ."""

    class Answers:
        def __init__(self, shift):
            self.shift, self.asked = shift, []

        def infer(self, frame):
            self.asked.append(frame)
            order.append(self.shift)
            actions = np.array([[0.5, 1.0], [0.0, 2.0]]) + (self.shift if frame == 2 else 0) * np.array(
                [[0, 1], [0, 0]]
            )
            ids = np.array([1, 2, 3, 4 + (self.shift if frame == 2 else 0)])
            return {"actions": actions, "token_ids": ids, "timing": {"infer_ms": 10.0 + self.shift}}

    order: list[int] = []
    found = bench_quantization.compare(Answers(0), Answers(3), [0, 1, 2])
    assert found["tokens_equal"] == pytest.approx(11 / 12) and found["actions_equal"] == pytest.approx(5 / 6)
    assert found["difference"] == [0.0, 0.5]
    assert found["milliseconds"] == [13.0] * 3 and found["reference_milliseconds"] == [10.0] * 3
    assert order == [0, 3, 3, 0, 0, 3, 3, 0]  # each once to warm up, then in turns


def test_bench(folder, dataset, tmp_path, capsys):
    skip_what_cannot_run("torchao-int8")
    told = ["--model", str(folder), "--data", str(dataset), "--unnorm-key", "bridge_orig", "--device", "cpu"]
    told += ["--dtype", "float32", "--frames", "3", "--json", str(tmp_path / "found.json")]
    bench_quantization.main([*told, "--methods", "bfloat16", "torchao-int8"])
    found = json.loads((tmp_path / "found.json").read_text())
    plain, eight = found["methods"]
    assert [plain["method"], eight["method"], found["frames"]] == ["bfloat16", "torchao-int8", 3]
    assert found["reference"]["bytes"] == pytest.approx(2 * plain["bytes"], rel=1e-4)
    assert plain["bytes"] < eight["bytes"] < found["reference"]["bytes"]  # here most is in the embeddings
    assert eight["tokens_equal"] > 0.8 and len(eight["difference"]) == 7 == len(found["dims"])
    assert eight["times_as_fast"] == sorted(eight["times_as_fast"]) and eight["milliseconds"][0] > 0
    printed = capsys.readouterr().out
    assert "torchao-int8" in printed and "1 = open" in printed and "times as fast" in printed
    with pytest.raises(ValueError, match="torchao-int4 computes in bfloat16"):
        bench_quantization.main([*told, "--methods", "torchao-int4"])
    bench_quantization.main([*told, "--methods", "torchao-int8", "--size", "tiny", "--frames", "1"])
    assert json.loads((tmp_path / "found.json").read_text())["model"] == "tiny (random weights)"
