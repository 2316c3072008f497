"""Products by oneDNN are those of PyTorch, gradients included; where they do not suit, nothing changes."""

import copy
import gc
import io
import platform
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import openvla
from openvla import linear_layers
from openvla.linear_layers import SMALLEST, linear, make_fast


def operands(rows: tuple[int, ...] = (4, 33), bias: bool = True, dtype=torch.float32, inputs=256, outputs=128) -> list:
    torch.manual_seed(0)
    shapes = [(*rows, inputs), (outputs, inputs)] + [(outputs,)] * bias
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.fixture
def calls(monkeypatch):
    """The shapes that went to oneDNN, which is slow on slices and wrong on slices of weights."""
    seen, onednn = [], linear_layers.ONEDNN
    if onednn is None:
        pytest.skip("PyTorch without oneDNN for this processor")

    def watch(input, weight, bias, *rest):
        assert input.is_contiguous() and (weight.is_contiguous() or weight.t().is_contiguous())
        assert bias is None or bias.is_contiguous()
        seen.append((tuple(input.shape), tuple(weight.shape)))
        return onednn(input, weight, bias, *rest)

    monkeypatch.setattr(linear_layers, "ONEDNN", watch)
    return seen


@pytest.mark.skipif(platform.machine() != "x86_64" or not torch.backends.mkldnn.is_available(), reason="no oneDNN")
def test_there_is_onednn_where_pytorch_says_so():
    assert linear_layers.ONEDNN is not None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(132,), (4, 33), (2, 2, 33)])
def test_products(rows, bias, calls):
    given = operands(rows, bias)
    exact = F.linear(*(each.double() for each in given))
    found = linear(*given)
    assert len(calls) == 1 and found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found.double(), exact, atol=5e-5, rtol=0)
    strided = given[0].repeat_interleave(2, dim=-1)[..., ::2]
    assert torch.equal(linear(strided, *given[1:]), found)


@pytest.mark.parametrize("needed", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_gradients(needed, calls):
    given = operands()
    mine, theirs = (
        [each.to(dtype, copy=True).requires_grad_(bool(need)) for each, need in zip(given, needed)]
        for dtype in (torch.float32, torch.float64)
    )
    for weight in (torch.randn(4, 33, 128), torch.randn(1).expand(4, 33, 128)):
        linear(*mine).backward(weight)
        F.linear(*theirs).backward(weight.double())
    assert len(calls) == 2 * (1 + sum(needed[:2]))
    for one, other in zip(mine, theirs):
        if other.grad is None:
            assert one.grad is None
        else:
            torch.testing.assert_close(one.grad.double(), other.grad, atol=2e-4, rtol=0)
    with torch.no_grad():
        assert not linear(*mine).requires_grad


def test_second_derivatives_are_refused(calls):
    rows, weight, bias = operands()
    squares = linear(rows.requires_grad_(), weight, bias) ** 2
    (gradient,) = torch.autograd.grad(squares.sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_frozen_layers_keep_nothing_of_what_they_saw(calls):
    rows, weight, bias = operands()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda _: None):
        linear(rows.requires_grad_(), weight, bias)
    assert kept == [weight.data_ptr()]


def test_what_does_not_suit_goes_to_pytorch(calls):
    small = operands((31,), inputs=256, outputs=128)  # 31 * 256 * 128 < 2**20
    assert 31 * 256 * 128 < SMALLEST <= 32 * 256 * 128
    assert torch.equal(linear(*small), F.linear(*small))
    short = operands(dtype=torch.bfloat16)
    assert torch.equal(linear(*short), F.linear(*short))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(*operands()).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        linear(*operands())
    rows, weight, bias = operands(outputs=256)
    assert torch.equal(linear(rows, weight[::2], bias[::2]), F.linear(rows, weight[::2], bias[::2]))
    spread = linear(rows, weight, torch.ones(1).expand(256))
    torch.testing.assert_close(spread, F.linear(rows, weight, torch.ones(256)), atol=1e-4, rtol=0)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(rows, weight[:, :255].contiguous(), bias)

    class Quantized(torch.Tensor):
        pass

    linear(rows, weight.as_subclass(Quantized), bias)
    tangent = torch.func.jvp(lambda x: linear(x, weight, bias), (rows,), (torch.ones_like(rows),))[1]
    torch.testing.assert_close(tangent, weight.sum(dim=1).expand(4, 33, 256), atol=1e-4, rtol=0)
    meta = [each.to("meta") for each in operands()]
    assert linear(*meta).shape == (4, 33, 128)
    assert calls == []
    linear(*operands((32,)))
    assert calls == [((32, 256), (128, 256))]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bias", [True, False])
def test_compiled_in_one_graph(bias, backend, calls):
    given = operands(bias=bias)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, *weights: linear(x + 1, *weights) * 2, backend=backend, fullgraph=True)
    with torch.no_grad():
        found = compiled(*given)
        assert len(calls) == 1
        torch.testing.assert_close(found, 2 * linear(given[0] + 1, *given[1:]), atol=1e-5, rtol=0)


def test_every_linear_layer_of_a_model_and_nothing_else(calls):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(256, 128), nn.Sequential(nn.Linear(128, 256, bias=False)), Own(256, 128))
    seen = torch.randn(64, 256)
    expected = model(seen)
    make_fast(model)
    assert [type(module) for module in (model[0], model[1][0], model[2])] == [nn.Linear, nn.Linear, Own]
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.0.weight", "2.weight", "2.bias"]
    torch.testing.assert_close(model(seen), expected, atol=1e-5, rtol=0)
    assert calls == [((64, 256), (128, 256)), ((64, 128), (256, 128))]


def test_copies_have_weights_of_their_own(calls):
    model = nn.Linear(256, 128)
    make_fast(model)
    other, kept = copy.deepcopy(model), io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    loaded, seen = torch.load(kept, weights_only=False), torch.randn(64, 256)
    with torch.no_grad():
        model.weight.zero_()
        calls.clear()
        for each in (other, loaded):
            torch.testing.assert_close(each(seen), F.linear(seen, each.weight, each.bias), atol=1e-5, rtol=0)
            assert each.weight.abs().max() > 0
    assert len(calls) == 2


def test_layers_die_with_their_model(calls):
    model = nn.Sequential(nn.Linear(256, 128))
    make_fast(model)
    layer = weakref.ref(model[0])
    gc.disable()
    try:
        del model
        assert layer() is None
    finally:
        gc.enable()


def test_policies_use_it(calls, liven, small_checkpoint):
    policy, processor = openvla.load(small_checkpoint, action_dim=7)
    image = Image.fromarray(np.full((28, 28, 3), 100, np.uint8))
    prompts = [processor.build_prompt("pick up the cup " * 40)] * 64  # small layers, many rows
    inputs = processor(prompts, [image] * 64)
    fast = liven(policy).sample_actions(**inputs).token_ids
    assert len(calls) > 10
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(policy.sample_actions(**inputs).token_ids, fast)
    calls.clear()
    policy.train()(**inputs, logits_to_keep=1).logits.sum().backward()
    assert len(calls) > 50 and all(weight.grad is not None for weight in policy.parameters())
