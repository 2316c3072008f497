"""Linear layers that are as fast on CPUs as they can be.

PyTorch gives float32 products to MKL, which does without AVX-512 on AMD's processors. oneDNN, which PyTorch has with
it and gives shorter types to, does not: products of a prompt take half as long there (`openvla bench`). Elsewhere it
makes no difference. On a GPU, in other types, in autocast and for small products, everything stays as it is.

Legend: B… any leading dims · I inputs · O outputs.
"""

import platform
import weakref

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
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
    if not _suits(input, weight, bias):
        return F.linear(input, weight, bias)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (input, weight, bias)):
        return _Product.apply(input, weight, bias)  # oneDNN's has no gradient, and would not say so
    return _multiply(input, weight, bias)


def _suits(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether oneDNN does what PyTorch does: it trusts sizes, and reads weights as if they were contiguous."""
    return (
        ONEDNN is not None
        and input.device.type == "cpu"
        and _is_plain(weight)
        and (bias is None or (_is_plain(bias) and bias.shape == weight.shape[:1]))
        and input.dtype == torch.float32
        and input.shape[-1:] == weight.shape[1:]
        and input.numel() * len(weight) >= SMALLEST
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and forward_ad._current_level < 0  # of derivatives forwards, oneDNN would know nothing
        and not torch.jit.is_tracing()
    )


def _is_plain(weight: torch.Tensor) -> bool:
    return (
        type(weight) in (torch.Tensor, nn.Parameter)  # not a quantized one
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.is_contiguous()
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
        (input, weight, _), (for_input, for_weight, _) = inputs, ctx.needs_input_grad
        ctx.save_for_backward(input if for_weight else None, weight if for_input else None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (input, weight), (for_input, for_weight, for_bias) = ctx.saved_tensors, ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            _multiply(grad, weight.t()) if for_input else None,
            _multiply(rows.t(), input.reshape(-1, input.shape[-1]).contiguous().t()) if for_weight else None,
            rows.sum(dim=0) if for_bias else None,
        )


def make_fast(model: nn.Module) -> None:
    """Every `nn.Linear` of a model goes by `linear`, on machines without a GPU.

    Their class stays: quantizers and adapters look for that one. `nn.DataParallel`'s copies on several GPUs would
    multiply by the weights of the first.
    """
    if ONEDNN is None or torch.cuda.is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = _Forward(module)


class _Forward:
    """`layer.forward`, which does not keep its layer alive, and is copied and pickled with it."""

    def __init__(self, layer: nn.Linear):
        self.layer = weakref.ref(layer)

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        layer = self.layer()
        return linear(input, layer.weight, layer.bias)

    def __reduce__(self):
        return _Forward, (self.layer(),)
