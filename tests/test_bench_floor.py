"""The floor: work counted by hand, by torch, and from the parameters; what it takes at given ceilings."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openvla.evaluate.bench_floor import Work, action_work, floor_milliseconds, head_work, language_work, vision_work
from openvla.evaluate.bench_machine import best_of, best_seconds, describe_machine, find_commit, measure_ceilings
from openvla.evaluate.bench_policies import bench_config, random_policy

CEILINGS = {"copy_gb_s": 10.0, "matvec_gb_s": 20.0, "matmul_gflop_s": 100.0, "matmul_shape": [1, 2, 3]}


@pytest.fixture(scope="module")
def policy():
    return random_policy(bench_config("tiny"), torch.float32, "cpu")


def test_a_pass_by_hand():
    """3 layers of width 4, 2 heads and 1 of keys, an MLP of 8; 2 rows with 3 new tokens after 5; one is read."""
    text = SimpleNamespace(hidden_size=4, num_attention_heads=2, num_key_value_heads=1, model_type="llama")
    text.intermediate_size, text.num_hidden_layers, text.head_dim = 8, 3, None
    own, shared = 4 * 4 + 4 * 4 + 3 * 4 * 8, 2 * 4 * 2  # queries, output, MLP; keys, values
    # Two layers for all 6 tokens, which see 6, 7 and 8 others; the last layer's keys for all, the rest for 2 tokens.
    flops = 2 * (2 * 6 * (own + shared) + 2 * (4 * 4 * (6 + 7 + 8))) + 2 * 6 * shared + 2 * 2 * own + 2 * (4 * 4 * 8)
    size = 3 * (own + shared) * 2 + 3 * 2 * 5 * (2 + 2) * 2  # weights, and keys and values of the 5 tokens of 2 rows
    assert language_work(text, 2, 3, 5, 1, True, 2) == Work(flops, size) == Work(5760, 1104)
    everything = language_work(text, 2, 3, 5, 3, False, 2)
    assert everything.flops == 3 * (2 * 6 * (own + shared) + 2 * 4 * 4 * 3 * 8)
    unread = language_work(text, 2, 3, 0, 0, False, 2)  # of a prompt that only fills the cache
    assert unread.bytes == (2 * (own + shared) + shared) * 2


def count(run) -> int:
    mkldnn = torch.backends.mkldnn.flags(enabled=False)  # whose products PyTorch does not count
    with mkldnn, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def matrices(*modules) -> int:
    """Bytes of weights, without positions and prefix tokens, which are looked up."""
    names = (item for module in modules for item in module.named_parameters())
    return sum(weight.nbytes for name, weight in names if weight.ndim > 1 and not name.endswith(("embed", "token")))


def test_towers_as_torch_counts_them(policy):
    model, pixel_values = policy.model, torch.randn(2, 6, 224, 224)
    work = vision_work(policy.config, 2, 4)
    assert work.flops == count(lambda: model.get_image_features(pixel_values))
    assert work.bytes == matrices(model.vision_backbone, model.projector)


def test_the_language_model_as_torch_counts_it(policy):
    language_model, text = policy.model.language_model, policy.config.text_config
    counted = count(lambda: language_model(inputs_embeds=torch.randn(2, 20, 128)))
    whole = language_work(text, 2, 20, 0, 20, causal=False, itemsize=4)  # torch counts what the mask hides, too
    assert counted == pytest.approx(whole.flops, rel=1e-4)  # transformers 4.57 has its rotations as a product, too
    assert whole.bytes == matrices(language_model.layers)
    causal = language_work(text, 2, 20, 0, 20, causal=True, itemsize=4)
    hidden_pairs = 20 * 19 / 2
    assert whole.flops - causal.flops == 2 * 3 * 4 * 128 * hidden_pairs


@pytest.mark.parametrize("head", ["l1", "flow", "diffusion"])
def test_heads_as_torch_counts_them(head):
    fields = {"attention": "bidirectional", "action_head": head, "action_chunk": 8}
    head_policy = random_policy(bench_config("tiny", **fields), torch.float32, "cpu")
    counted = count(lambda: head_policy.action_head(torch.randn(3, 56, 128)))
    work = head_work(head_policy.config, 3, 4)
    assert work.flops == counted and work.bytes == matrices(head_policy.action_head)


def test_the_work_of_7b():
    """Against what was counted elsewhere: 6.476 B weights in layers, 0.405 and 3.66 TFLOP for 281 positions."""
    config = bench_config("7b")
    whole = language_work(config.text_config, 1, 281, 0, 281, False, 2)
    assert whole.bytes == 2 * 6_476_005_376 and whole.flops == pytest.approx(3.66e12, rel=0.01)
    vision = vision_work(config, 1, 2)
    assert vision.flops == pytest.approx(0.405e12, rel=0.01) and vision.bytes == pytest.approx(2 * 756e6, rel=0.01)
    token = action_work(config, 1, 281, 2, passes=7)["decode"][1]
    ceilings = {"copy_gb_s": 4800.0, "matvec_gb_s": 4000.0, "matmul_gflop_s": 990e3}
    # per token, with the head's 256 rows that matter instead of 32,064, and keys and values of 281 tokens
    expected = (2 * (6_476_005_376 + 256 * 4096) + 2 * 2 * 32 * 4096 * 281) / 4.8e12 * 1e3
    assert token.milliseconds(ceilings) == pytest.approx(expected) == pytest.approx(2.75, rel=0.02)


def test_the_passes_of_each_way():
    config = bench_config("tiny")
    text = config.text_config
    plain = action_work(config, 1, 275, 4, passes=7)
    assert plain["prefill"] == [language_work(text, 1, 275, 0, 1, True, 4)]
    one_row = Work(2 * 128 * 256, 128 * 256 * 4)
    assert len(plain["decode"]) == 7 and plain["decode"][0] == one_row
    assert plain["decode"][1] == language_work(text, 1, 1, 275, 1, True, 4) + one_row
    assert plain["decode"][6] == language_work(text, 1, 1, 280, 1, True, 4) + one_row
    right = action_work(config, 1, 275, 4, drafted=True, passes=1)
    assert right["prefill"] == [language_work(text, 1, 281, 0, 7, True, 4)]
    assert right["decode"] == [Work(7 * one_row.flops, one_row.bytes)]
    partly = action_work(config, 1, 275, 4, drafted=True, passes=5)  # two tokens were right: three are known
    assert partly["decode"][1] == language_work(text, 1, 1, 277, 1, True, 4) + one_row and len(partly["decode"]) == 5

    six = action_work(bench_config("tiny"), 1, 275, 4, passes=6, dim=6)
    assert six["decode"] == plain["decode"][:6]

    flow = bench_config("tiny", attention="prefix", action_head="flow", action_chunk=8)
    step = language_work(text, 1, 56, 275, 56, False, 4) + head_work(flow, 1, 4)
    assert action_work(flow, 1, 275, 4)["prefill"] == [language_work(text, 1, 275, 0, 0, False, 4)]
    assert action_work(flow, 1, 275, 4)["decode"] == [step] * 10
    both = bench_config("tiny", attention="bidirectional", action_head="diffusion", action_chunk=8)
    whole = language_work(text, 1, 276 + 56 + 1, 0, 56, False, 4)
    found = action_work(both, 1, 276, 4)
    assert found["prefill"] == [whole] and found["decode"] == [head_work(both, 1, 4)] + 49 * [
        whole + head_work(both, 1, 4)
    ]


def test_time_is_the_longer_of_both():
    assert Work(2e9, 1e9).milliseconds(CEILINGS) == 50.0  # 20 ms of products, 50 ms at 20 GB/s
    assert Work(2e10, 1e9).milliseconds(CEILINGS) == 200.0
    work = {"vision": [Work(1e10, 0.0)], "prefill": [Work(0.0, 4e8)], "decode": [Work(1e9, 1e9), Work(1e10, 0.0)]}
    assert floor_milliseconds(work, CEILINGS) == {"vision": 100.0, "prefill": 20.0, "decode": 150.0, "total": 270.0}


def test_ceilings_are_those_of_the_machine(policy):
    text = policy.config.text_config
    found = measure_ceilings("cpu", torch.float32, 16, text, time.perf_counter, seconds=0.01, mebibytes=16)
    assert set(found) == set(CEILINGS) and found["matmul_shape"][0] == 16
    assert found["matmul_shape"][1:] in ([128, 128], [128, 352], [352, 128])
    assert all(found[name] > 0.01 for name in found if name != "matmul_shape")
    better = {**CEILINGS, "matvec_gb_s": 1.0, "matmul_gflop_s": 200.0, "matmul_shape": [4, 5, 6]}
    assert best_of(CEILINGS, better) == {**better, "matvec_gb_s": 20.0}


def test_short_calls_are_timed_together():
    clock = SimpleNamespace(now=0.0, calls=0)

    def run():
        clock.calls += 1
        clock.now += 0.001 if clock.calls < 20 else 0.0005  # it gets faster

    assert best_seconds(run, 0.05, lambda: clock.now) == pytest.approx(0.0005)
    assert (clock.calls - 2) % 5 == 0


def test_the_machine_describes_itself(tmp_path):
    found = describe_machine("cpu")
    assert found["versions"]["torch"] == torch.__version__ and found["hardware"]["cpu"]["cores"] >= 1
    assert found["hardware"]["threads"] == torch.get_num_threads() and found["hardware"]["name"]
    assert find_commit(tmp_path) is None
