"""What is compared: policies of the real shapes on shared weights, ways that act alike, and proof that they do."""

import numpy as np
import pytest
import torch

from openvla.evaluate.bench import measure_in_stages
from openvla.evaluate.bench_clock import measure_stages
from openvla.evaluate.bench_policies import (
    INSTRUCTION,
    UNNORM_KEY,
    bench_config,
    observe,
    random_policy,
    random_processor,
    twin,
)
from openvla.evaluate.bench_ways import (
    ResizePerTower,
    Scene,
    act_as_the_original,
    build_ways,
    check_agreement,
    name_ways,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Two would wait for each other on a machine that has something else to do, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def scene_of(batch: int = 1, cameras: int = 1, states: list | None = None, noise=None) -> Scene:
    return Scene(INSTRUCTION, observe(batch, cameras), states, UNNORM_KEY, noise)


@pytest.fixture(scope="module")
def policy():
    return random_policy(bench_config("tiny"), torch.float32, "cpu")


def test_7b_is_openvla_7b_without_what_is_never_used():
    from openvla.modeling_openvla import OpenVLAForActionPrediction

    with torch.device("meta"):
        model = OpenVLAForActionPrediction(bench_config("7b"))
    dino, siglip, width = 12 * 1024**2 + 15 * 1024, 2 * 1152 * 4304 + 4 * 1152**2 + 4304 + 9 * 1152, 1152
    pool = 4 * width**2 + 2 * width * 4304 + 4304 + 8 * width  # query, keys and values, output, norm, MLP
    unused = dino + siglip + 2 * 1024 + 2 * width + pool  # last blocks, final norms, pooling head
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_541_237_184 - unused


def test_a_policy_is_made_in_its_type(policy):
    short = random_policy(bench_config("tiny"), torch.bfloat16, "cpu")
    assert {parameter.dtype for parameter in short.parameters()} == {torch.bfloat16}
    assert short.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_twins_share_weights(policy):
    same = twin(policy)
    head = twin(policy, attention="prefix", action_head="flow", action_chunk=8)
    own = dict(policy.named_parameters())
    for other in (same, head):
        shared = {name for name, weight in other.named_parameters() if name in own}
        assert shared == own.keys()
        assert all(
            weight.data_ptr() == own[name].data_ptr() for name, weight in other.named_parameters() if name in own
        )
    extra = {name.split(".")[0]: weight for name, weight in head.named_parameters() if name not in own}
    assert set(extra) == {"action_head", "model"} and all(weight.isfinite().all() for weight in extra.values())
    assert head.config.num_denoising_steps == 10 and policy.config.attention == "causal"
    inputs = random_processor(policy.config)(["Out:"], observe(1, 1)[0])
    tokens = [each.sample_actions(**inputs).token_ids for each in (policy, same)]
    assert torch.equal(*tokens)


def test_prompts_have_llamas_ids(policy, processor):
    ours = random_processor(policy.config)
    prompt = ours.build_prompt(INSTRUCTION)
    assert prompt == processor.build_prompt(INSTRUCTION)
    image = observe(1, 1)[0][0]
    mine, theirs = ours(prompt, image), processor(prompt, image)
    assert torch.equal(mine["input_ids"], theirs["input_ids"])
    assert torch.equal(mine["attention_mask"], theirs["attention_mask"])


def test_images_resized_for_each_tower_are_the_same(processor, images):
    plain, twice = processor.image_processor, ResizePerTower(processor.image_processor)
    assert len(twice.towers) == 2
    expected = plain.preprocess(images[:2])["pixel_values"]
    assert torch.equal(twice.preprocess(images[:2])["pixel_values"], expected)
    boxed = type(plain)(**{**plain.to_dict(), "image_resize_strategy": "letterbox"})
    assert torch.equal(
        ResizePerTower(boxed).preprocess(images[0])["pixel_values"], boxed.preprocess(images[0])["pixel_values"]
    )


def test_token_ways_take_their_passes_and_agree(policy):
    names = ["original", "generate", "eager", "draft", "draft-0", "draft-4", "graphs"]  # the last needs a GPU
    scene = scene_of(batch=2)
    ways, skipped = build_ways(names, policy, random_processor, scene)
    assert list(ways) == names[:-1] and list(skipped) == ["graphs"]
    agreement = check_agreement(ways, policy, scene)
    assert agreement == {name: {"differing_tokens": 0, "largest_margin": 0.0} for name in ways}
    ticks = iter(range(10**6))
    passes = {name: measure_stages(way, lambda: next(ticks))[1] for name, way in ways.items()}
    assert passes == {"original": 7, "generate": 7, "eager": 7, "draft": 1, "draft-0": 7, "draft-4": 3}
    assert all(way.what == name_ways(7)[name] for name, way in ways.items())
    found = ways["eager"].act(ways["eager"].prepare())
    np.testing.assert_array_equal(ways["eager"].detokenise(found), found["actions"])


def test_what_the_original_computes_in_vain(policy):
    ways, _ = build_ways(["original", "generate"], policy, random_processor, scene_of())
    shapes, blocks = {name: [] for name in ways}, {name: [] for name in ways}
    for name, way in ways.items():
        watched = [(way.policy.lm_head, shapes[name])]
        for tower in (way.policy.model.vision_backbone.featurizer, way.policy.model.vision_backbone.fused_featurizer):
            watched += [(block.mlp, blocks[name]) for block in tower.blocks]
        hooks = [
            module.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output.shape[1]))
            for module, seen in watched
        ]
        way.act(way.prepare())
        for hook in hooks:
            hook.remove()
    assert shapes == {"original": [291, *[1] * 6], "generate": [1] * 7}
    assert blocks == {"original": [261] * 3 + [256] * 3, "generate": [261] * 2 + [256] * 2}


def test_compiled_ways_act_on_a_twin(policy, captured):
    scene = scene_of(batch=2)
    ways, skipped = build_ways(["eager", "compiled", "compiled-draft"], policy, random_processor, scene)
    assert not skipped and policy._compiled is None
    assert ways["compiled"].policy is ways["compiled-draft"].policy is not policy
    assert ways["compiled"].policy._compiled.mode == "default" and ways["compiled"].compile_seconds > 0
    agreement = check_agreement(ways, policy, scene)
    assert all(each["differing_tokens"] == 0 for each in agreement.values())
    passes = {name: measure_in_stages(way, lambda: 0.0, 1)[1] for name, way in ways.items() if name != "eager"}
    assert passes == {"compiled": 7, "compiled-draft": 1}
    ways["compiled"].policy.compile_for_actions(None)
    with pytest.raises(RuntimeError, match="compiled acted without compilation"):
        check_agreement(ways, policy, scene)


def test_ways_that_differ_are_told_of(policy):
    ways, _ = build_ways(["generate", "eager"], policy, random_processor, scene_of())
    act = ways["eager"].act

    def another(inputs: dict) -> dict:
        found = act(inputs)
        found["token_ids"][0, 3] = 31744 + (found["token_ids"][0, 3] - 31744 + 1) % 256
        return found

    ways["eager"].act = another
    with pytest.raises(RuntimeError, match=r"eager gives the tokens .*not comparable.* [0-9.]+ spreads apart"):
        check_agreement(ways, policy, scene_of())


def test_short_types_may_differ_by_rounding():
    """Two actions whose rows of the head are equal are equally right, others are not."""
    policy, scene = random_policy(bench_config("tiny"), torch.bfloat16, "cpu"), scene_of(batch=2)
    ways, _ = build_ways(["generate", "eager"], policy, random_processor, scene)
    found = ways["generate"].act(ways["generate"].prepare())
    chosen = int(found["token_ids"][1, 5])
    other = 31744 + (chosen - 31744 + 1) % 256
    different = found["token_ids"].copy()
    different[1, 5] = other
    ways["generate"].act = lambda inputs: found
    ways["eager"].act = lambda inputs: {"token_ids": different}
    with pytest.raises(RuntimeError, match="0.125 would be rounding"):
        check_agreement(ways, policy, scene)
    with torch.no_grad():
        policy.lm_head.weight[other] = policy.lm_head.weight[chosen]
    assert check_agreement(ways, policy, scene)["eager"] == {"differing_tokens": 1, "largest_margin": 0.0}


def test_heads_act_on_the_same_weights():
    base = random_policy(bench_config("tiny", action_chunk=2, num_cameras=2, proprio_dim=8), torch.float32, "cpu")
    noise = torch.randn(1, 2, 7, generator=torch.Generator().manual_seed(1))
    scene = scene_of(cameras=2, states=[[0.5] * 8], noise=noise)
    names = ["eager", "token-parallel", "l1", "l1-original", "flow"]
    ways, skipped = build_ways(names, base, random_processor, scene)
    assert list(ways) == names and not skipped
    agreement = check_agreement(ways, base, scene)
    assert agreement["l1-original"]["largest_difference"] < 1e-5
    found = {name: way.act(way.prepare()) for name, way in ways.items()}
    assert {name: each["actions"].shape for name, each in found.items()} == dict.fromkeys(names, (1, 2, 7))
    again = ways["flow"].act(ways["flow"].prepare())["actions"]
    np.testing.assert_array_equal(found["flow"]["actions"], again)  # the same noise
    ticks = iter(range(10**6))
    passes = {name: measure_stages(way, lambda: next(ticks))[1] for name, way in ways.items()}
    assert passes == {"eager": 14, "token-parallel": 1, "l1": 1, "l1-original": 1, "flow": 11}
    head = ways["l1-original"].policy
    with torch.no_grad():
        head.action_head.model.fc2.bias += 1.0
    with pytest.raises(RuntimeError, match="l1-original acts .* from l1"):
        check_agreement({name: ways[name] for name in ("l1", "l1-original")}, base, scene)


def test_a_parallel_policy_acts_its_own_way_only():
    base = random_policy(
        bench_config("tiny", attention="bidirectional", action_head="l1", action_chunk=2), torch.float32, "cpu"
    )
    ways, skipped = build_ways(["original", "eager", "draft"], base, random_processor, scene_of())
    assert list(ways) == ["eager"] and set(skipped.values()) == {"this policy decodes all its actions at once"}
    assert check_agreement(ways, base, scene_of()) == {}


def test_the_originals_way_gives_the_recorded_actions(oft_policy, oft_recorded, oft_golden):
    from test_oft import KEY, cameras_of

    model, processor = oft_policy()
    entry = oft_recorded["inputs"][0]
    inputs = processor(entry["prompt"], cameras_of(oft_golden, 0), entry["state"])
    proprio = model._normalize_proprio(inputs["proprio"], KEY)
    one = {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"], "proprio": proprio}
    with torch.no_grad():
        found = act_as_the_original(model, one)
    np.testing.assert_allclose(found[0], entry["normalized_fp32"], atol=1e-5, rtol=0)
