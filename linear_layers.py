"""Linear layers that are as fast on CPUs as they can be.

PyTorch gives float32 products to MKL, which does without AVX-512 on AMD's processors. oneDNN, which PyTorch has with
it and gives shorter types to, does not: products of a prompt take half as long there (`openvla bench`). Elsewhere it
makes no difference. On a GPU, in other types, in autocast and for small products, everything stays as it is.

Legend: B… any leading dims · I inputs · O outputs.
"""

import functools
import platform

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

SMALLEST = 2**20  # multiplications; below, calling oneDNN takes longer than what it saves


def _find_onednn():
    """oneDNN's product of a matrix and vectors, on which `torch.compile` builds as well; None where there is none."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return None
    return getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)


ONEDNN = _find_onednn()
if not hasattr(torch.ops.openvla, "linear"):  # this file may have been imported under another name
    torch.library.define("openvla::linear", "(Tensor input, Tensor weight, Tensor? bias) -> Tensor")
    torch.library.impl("openvla::linear", "CPU", lambda *operands: ONEDNN(*operands, "none", [], ""))
    torch.library.register_fake("openvla::linear", F.linear)


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`: `(B…, I)`, `(O, I)`, `(O,)` -> `(B…, O)`."""
    if not _suits(input, weight):
        return F.linear(input, weight, bias)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (input, weight, bias)):
        return _Product.apply(input, weight, bias)  # oneDNN's has no gradient, and would not say so
    return _multiply(input, weight, bias)


def _suits(input: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        ONEDNN is not None
        and input.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and input.numel() * len(weight) >= SMALLEST
        and weight.is_contiguous()
        and type(weight) in (torch.Tensor, nn.Parameter)  # not a quantized one
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and not torch.jit.is_tracing()
    )


def _multiply(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    input = input.contiguous()  # oneDNN is a hundred times slower on slices
    if torch.compiler.is_compiling():  # which, where it knows oneDNN's product, insists on frozen weights
        return torch.ops.openvla.linear(input, weight, bias)
    return ONEDNN(input, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """With gradients, by oneDNN themselves."""

    @staticmethod
    def forward(input, weight, bias):
        return _multiply(input, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (input, weight), (for_input, for_weight, for_bias) = ctx.saved_tensors, ctx.needs_input_grad
        rows, seen = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
        return (
            _multiply(grad, weight.t()) if for_input else None,
            _multiply(rows.t(), seen.contiguous().t()) if for_weight else None,
            rows.sum(dim=0) if for_bias else None,
        )


def make_fast(model: nn.Module) -> None:
    """Every `nn.Linear` of a model goes by `linear`. Their class stays: quantizers and adapters look for that one."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = functools.partial(_forward, module)  # unlike a method, it can be pickled


def _forward(layer: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return linear(input, layer.weight, layer.bias)
