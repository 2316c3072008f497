import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openvla.configuration_openvla import OpenVLAConfig
from openvla.finetune import memory
from openvla.finetune.sft import MODES

SEVEN = OpenVLAConfig(**memory.SIZES["7b"])
LAYER = 4 * 4096**2 + 3 * 4096 * 11008  # weights of a decoder layer's seven matrices


def small(llm: int = 2, dino: int = 2, siglip: int = 2) -> OpenVLAConfig:
    """Two towers of so many blocks that run, and so many decoder layers."""
    tower = {"embed_dim": 32, "num_heads": 2}
    first = {**tower, "depth": dino + 1, "reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}
    text = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": llm}
    text |= {"num_attention_heads": 2, "vocab_size": 32064, "pad_token_id": 32000, "dtype": "bfloat16"}
    return OpenVLAConfig(
        "small",
        llm_backbone_id="llama2-7b-pure",
        timm_model_ids=["dino", "siglip"],
        image_sizes=[56, 56],
        timm_model_args={"dino": first, "siglip": {**tower, "depth": siglip + 1, "class_token": False}},
        text_config=text,
    )


def test_weights_of_7b_by_hand():
    base, adapters = 7_498_156_704, 107_862_016
    weighed = memory.weigh(SEVEN, "lora", 32)
    assert weighed["weights"] == 2 * base + 4 * adapters and weighed["gradients"] == 4 * adapters
    parts = memory.peak(weighed, memory.COUNTED["lora"], 4, False, 1, False)
    assert parts["weights"] - 2 * base + parts["gradients"] + parts["optimizer"] == 16 * adapters
    assert parts["activations"] == 4 * memory.COUNTED["lora"][1][0]
    assert 0 <= parts["copies"] - 2 * adapters < 10_000  # positions, indices

    weighed = memory.weigh(SEVEN, "qlora", 32)  # 4.5 bit per weight of the decoder; adapters in bf16
    assert weighed["weights"] == 2 * (base - 32 * LAYER) + 32 * LAYER * 4.5 / 8 + 2 * adapters
    assert weighed["gradients"] == 2 * adapters and weighed["unpacked"] == 2 * 4096 * 11008

    for mode, trained in (("full", base), ("last-layer", 2 * 32064 * 4096 + LAYER + 2 * 4096)):
        weighed = memory.weigh(SEVEN, mode, 32)
        assert (weighed["weights"], weighed["gradients"]) == (4 * base, 4 * trained)
    assert weighed["copies"] == 2 * (LAYER + 32064 * 4096)  # embeddings and norms need none


def test_total_is_the_worst_moment():
    weighed = {"weights": 80, "gradients": 40, "copies": 5, "gathered": 11, "unpacked": 1}
    counted = ((2, 3, 0), (10, 7, 4))
    parts = memory.peak(weighed, counted, 2, False, 1, False)
    assert parts["optimizer"] == 80 and parts["activations"] == 20 and parts["copies"] == 7
    assert parts["total"] == 80 + 80 + 40 + 1  # at the end of the backward pass
    assert memory.peak(weighed, counted, 6, False, 1, False)["total"] == 80 + 80 + 67 + 1  # of the forward pass
    assert memory.peak(weighed, counted, 6, False, 1, True)["total"] == 80 + 80 + 67 + 40 + 1
    parts = memory.peak(weighed, counted, 6, True, 8, False)
    assert (parts["weights"], parts["optimizer"], parts["copies"], parts["recomputed"]) == (10, 10, 11, 25)
    assert parts["total"] == 10 + 10 + 12 + 11 + 25


@pytest.mark.parametrize("mode, checkpointing", [*((mode, False) for mode in MODES), ("full", True)])
def test_five_layers_from_one_and_two(mode, checkpointing):
    per_sample, fixed, _ = memory.count(small(5, 3, 4), mode, 4, checkpointing)
    assert (per_sample, fixed) == memory.count_at(small(5, 3, 4), mode, 4, checkpointing, True, [5, 3, 4])


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_counts_are_those_of_a_real_pass(mode):
    """Of the whole model's own `forward`, with values, and the loss of `ActionTrainer`."""
    config, batch = small(), 3
    per_sample, fixed, _ = memory.count(config, mode, 4, False)
    model = memory.build(config, mode, 4)
    memory.float32_layer_norms(model)
    model.to_empty(device="cpu").train()
    ids = torch.ones(batch, config.num_image_tokens + 25, dtype=torch.long)
    ids[:, 1 : 1 + config.num_image_tokens] = config.image_token_id
    kept = torch.arange(8)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, torch.zeros(batch, 6, 56, 56), use_cache=False, logits_to_keep=kept).logits
        scored = torch.ones(batch, 8, dtype=torch.bool)
        return torch.nn.functional.cross_entropy(logits.float()[scored], ids[:, kept][scored], reduction="sum")

    assert memory.saved_bytes(model, run) == pytest.approx(
        per_sample * batch + fixed, rel=0.01
    )  # a causal mask, here implied


class Live(TorchDispatchMode):
    """Bytes of all tensors alive, and their peak: what an allocator without fragmentation would see."""

    def __init__(self, model):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0
        self.add(list(model.parameters()))

    def add(self, tensors):
        for storage in (tensor.untyped_storage() for tensor in tree_leaves(tensors) if torch.is_tensor(tensor)):
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def drop(self, address, size):
        self.alive.discard(address)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(result)
        return result


@pytest.mark.parametrize("mode, checkpointing", [("lora", True), ("lora", False), ("full", False)])
def test_total_is_the_peak_of_a_step(mode, checkpointing):
    """Forward, backward and AdamW at the real widths, with every tensor tracked that lives, however shortly."""
    text = {"model_type": "llama", "num_hidden_layers": 3, "vocab_size": 32064, "pad_token_id": 32000}
    tower = {"embed_dim": 1152, "depth": 4, "num_heads": 16, "class_token": False}
    config = OpenVLAConfig("wide", timm_model_ids=["t"], timm_model_args={"t": tower}, text_config=text)
    batch = 8
    model = memory.build(config, mode)
    memory.float32_layer_norms(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        with Live(model) as live:
            for _ in range(2):  # AdamW's state is there from the second one on
                memory.forward(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
    estimate = memory.training_memory(config, mode, 32, batch, checkpointing)
    assert estimate["total"] == pytest.approx(live.peak, abs=40e6 * batch)  # short-lived buffers


def test_qlora_is_not_sharded():
    with pytest.raises(ValueError, match="qlora cannot be sharded"):
        memory.training_memory(SEVEN, "qlora", 32, 1, True, shards=8)


def test_stored_counts_and_tables():
    assert memory.count(SEVEN, "full", 32, True) == memory.COUNTED["full"][0]
    weighed = {"weights": 4 * memory.GIB, "gradients": memory.GIB, "copies": 0, "gathered": memory.GIB, "unpacked": 0}
    counted = ((memory.GIB, 0, memory.GIB // 2), (3 * memory.GIB, 0, memory.GIB // 2))
    table = memory.tables({"lora": (weighed, counted)}, False, 12).splitlines()
    assert table[2] == "| lora | yes | 7.5 | 12.0 | 18.0 | 30.0 |"  # 4 + 2 + 1.5 per sample
    assert table[3] == "| lora | no | 9.0 | 18.0 | 30.0 | 54.0 |"
    assert table[-2:] == ["| lora | yes | 4 | 6 |", "| lora | no | 2 | 3 |"]  # 8 GPUs: 0.5 + 0.25 + 1 gathered
