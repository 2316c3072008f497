"""Acting with fewer bits per weight. Lossy: a quantised policy prefers another token now and then.

    model, processor = openvla.load("openvla/openvla-7b", quantize="int8", device_map="cuda")

The linear layers of the language model are quantised while they are loaded, 86 % of openvla-7b's parameters. Towers,
projectors, action heads and lm_head see the image or pick the action: they stay as they are. What is lost and gained:
`python -m openvla.evaluate.bench_quantization`.
"""

import argparse
import importlib.metadata
import logging
from typing import NamedTuple


class Method(NamedTuple):
    what: str
    needs: str  # for pip
    capability: tuple[int, int] | None = None  # of the GPU that its kernels need; they compute in bfloat16


METHODS = {
    "int8": Method("bitsandbytes' LLM.int8", "bitsandbytes>=0.48"),
    "nf4": Method("4 bits, as --mode qlora trains", "bitsandbytes>=0.48"),
    "torchao-int8": Method("weights alone in 8 bits", "torchao>=0.18"),
    "torchao-fp8": Method("8-bit floats, GPUs of capability 8.9", "torchao>=0.18", (8, 9)),
    "torchao-int4": Method("weights alone in 4 bits, GPUs of capability 8.0", "torchao>=0.18", (8, 0)),
}


def add_argument(parser: argparse.ArgumentParser) -> None:
    """`--quantize`, for all commands that act."""
    told = "; ".join(f"{name}: {method.what}" for name, method in METHODS.items())
    parser.add_argument("--quantize", choices=METHODS, help=f"lossy: fewer bits for the language model. {told}")


def loading_options(method: str, kwargs: dict) -> dict:
    """`kwargs` for `from_pretrained`, with the `quantization_config`, `device_map` and `dtype` of a method.

    Raises ValueError or ImportError for what cannot be, before anything is loaded.
    """
    import torch

    if method not in METHODS:
        raise ValueError(f"quantize={method!r}: expected one of {', '.join(METHODS)}.")
    if given := [name for name in ("quantization_config", "load_in_4bit", "load_in_8bit") if kwargs.get(name)]:
        raise ValueError(f"Got quantize={method!r} and {given[0]}: expected one of them.")
    options = {**kwargs, "device_map": kwargs.get("device_map") or ("cuda" if torch.cuda.is_available() else "cpu")}
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if METHODS[method].capability:
        if dtype not in (None, "auto", torch.bfloat16):
            raise ValueError(f"{method} computes in bfloat16, got dtype {dtype}.")
        options["dtype"] = torch.bfloat16
    on_cpu = _check_device(method, options["device_map"])
    _check_package(method)
    known = dtype if isinstance(dtype, torch.dtype) else torch.float32
    return {**options, "quantization_config": quantization_config(method, known if on_cpu else torch.bfloat16)}


def quantization_config(method: str, compute_dtype):
    """What transformers takes, for acting and for QLoRA. Only "nf4" is free to compute in any dtype."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if method == "int8":  # computes in float16, and would say so in every layer of every pass
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    if method == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)
    import torchao.quantization as ao

    shared = {"set_inductor_config": False}  # which would set float32's precision for the whole process, too
    if method == "torchao-int8":
        return TorchAoConfig(ao.Int8WeightOnlyConfig(**shared))
    if method == "torchao-fp8":  # a scale per token, also of tokens that are zero (padding, slots of chunks): not 0/0
        shared |= {"granularity": ao.PerRow(), "activation_value_lb": 1e-12}
        return TorchAoConfig(ao.Float8DynamicActivationFloat8WeightConfig(**shared))
    # packed for torch's own kernel: the default wants another package
    return TorchAoConfig(ao.Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d", **shared))


def _check_package(method: str) -> None:
    from packaging.requirements import Requirement

    needed = Requirement(METHODS[method].needs)
    found = [each.version for each in importlib.metadata.distributions(name=needed.name)]
    if not found or not needed.specifier.contains(found[0]):
        raise ImportError(f"{method} needs {needed}: pip install '{needed}'")


def _check_device(method: str, device_map) -> bool:
    """Whether some of the policy goes to the CPU; ValueError if the method does not run where it goes."""
    import torch

    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    on_cpu = not torch.cuda.is_available() or "cpu" in map(str, places)
    needed, found = METHODS[method].capability, None if on_cpu else torch.cuda.get_device_capability()
    if needed and (on_cpu or found < needed):
        raise ValueError(f"{method} runs on GPUs of compute capability {needed} or more, got {found or 'a CPU'}.")
    return on_cpu


def check_quantized(model, method: str) -> None:
    """Raises ValueError if a layer's size does not suit a method: torchao leaves it as it is, in silence."""
    from torch import nn

    layers = [each for each in model.model.language_model.named_modules() if isinstance(each[1], nn.Linear)]
    for name, layer in layers:
        size = (layer.out_features, layer.in_features)
        # what bitsandbytes' kernel for CPUs with AVX-512 asserts, in the first pass
        odd = method == "nf4" and layer.weight.device.type == "cpu" and any(number % 64 for number in size)
        if odd or (type(layer) is nn.Linear and plain_tensors(layer.weight)[0] is layer.weight):
            raise ValueError(f"{method} cannot quantise {name} of {size}: choose another method.")


def plain_tensors(tensor) -> list:
    """What lies in memory: torchao's tensors consist of several."""
    parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    return [plain for name in parts for plain in plain_tensors(getattr(tensor, name))] or [tensor]
