"""Compiled acting gives the same, in one graph per pass, for every prompt that fits; else it says why it does not."""

import copy
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import openvla

START, IMAGE, SLOT = 31744, 32001, 32002
STATS = {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}, "proprio": {"q01": [-1.0] * 2, "q99": [1.0] * 2}}


@pytest.fixture
def policy(small_checkpoint, liven):
    """`policy(**config fields)`: random weights that choose among actions."""

    def build(dtype=torch.float32, **fields):
        torch.manual_seed(0)
        fields = {"action_dim": 7} | fields
        config = openvla.OpenVLAConfig.from_pretrained(small_checkpoint, **fields)
        model = openvla.OpenVLAForActionPrediction(config).eval()
        model.norm_stats = {"robot": STATS}
        return liven(model).to(dtype)

    return build


def observation(model, num_words: int | tuple[int, ...], seed: int = 0) -> dict:
    """Prompts of so many words of noise, one per observation."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (num_words,) if isinstance(num_words, int) else num_words
    rows = [[1, *torch.randint(500, 30000, (length,), generator=generator).tolist(), 29871] for length in lengths]
    rows = [[32000] * (1 + max(lengths) - len(row) + 1) + row for row in rows]
    channels = 6 * model.config.num_cameras
    inputs = {"pixel_values": torch.randn(len(rows), channels, 28, 28, generator=generator)}
    if model.config.proprio_dim:
        inputs["proprio"] = torch.rand(len(rows), model.config.proprio_dim, generator=generator)
    return {"input_ids": torch.tensor(rows), **inputs}


def both(model, inputs: dict, **options):
    """Without and with compilation."""
    compiled, model._compiled = model._compiled, None
    plain = model.sample_actions(**inputs, **options)
    model._compiled = compiled
    return plain, model.sample_actions(**inputs, **options)


def test_tokens_are_the_same_for_every_prompt_that_fits(captured, policy):
    model = policy(action_chunk=2)
    assert model.compile_for_actions(text_tokens=(12, 40), progress=False) is model
    assert [bucket.size for bucket in model._compiled.buckets] == [64, 96]  # 5 of BOS and image, 28 behind
    rng = np.random.default_rng(0)
    with torch.compiler.set_stance("fail_on_recompile"):
        for case in range(30):
            inputs = observation(model, 2 + case % 38, seed=case)
            plain, compiled = both(model, inputs)
            assert torch.equal(plain.token_ids, compiled.token_ids) and compiled.passes == 14
            torch.testing.assert_close(plain.log_probs, compiled.log_probs, atol=1e-4, rtol=0)
            right = int(rng.integers(0, 15))
            draft = np.where(np.arange(14) < right, plain.token_ids.numpy(), rng.integers(START, START + 256, 14))
            plain, compiled = both(model, inputs, draft=draft)
            assert torch.equal(plain.token_ids, compiled.token_ids)
            assert plain.accepted.tolist() == compiled.accepted.tolist() and plain.passes == compiled.passes
    assert not model._compiled.told


def test_batches_of_prompts_of_several_lengths(captured, policy):
    model = policy()
    model.compile_for_actions(batch_sizes=(1, 3), text_tokens=(20,), progress=False)
    inputs = observation(model, (3, 15, 8))
    plain, compiled = both(model, inputs)
    assert torch.equal(plain.token_ids, compiled.token_ids)
    draft = plain.token_ids.clone()
    draft[1, 4] = START
    plain, compiled = both(model, inputs, draft=draft)
    assert torch.equal(plain.token_ids, compiled.token_ids) and compiled.accepted.tolist() == [6, 4, 6]


@pytest.mark.parametrize(
    "fields",
    [
        {"attention": "bidirectional"},
        {"attention": "bidirectional", "action_head": "l1", "num_cameras": 2, "proprio_dim": 2},
        {"attention": "bidirectional", "action_head": "l1", "film": True},
        {"attention": "bidirectional", "action_head": "diffusion", "proprio_dim": 2, "num_denoising_steps": 2},
        {"attention": "prefix", "action_head": "diffusion", "proprio_dim": 2, "num_denoising_steps": 2},
        {"attention": "prefix", "action_head": "flow", "film": True},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())),
)
def test_policies_that_decode_in_parallel(fields, captured, policy):
    model = policy(action_chunk=3, **fields)
    model.compile_for_actions(batch_sizes=(2,), text_tokens=(20,), progress=False)
    noise = torch.randn(2, 3, 7) if model.config.denoises else None
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in ((3, 3), (12, 5), (19, 18)):
            plain, compiled = both(model, observation(model, lengths), noise=noise)
            torch.testing.assert_close(plain.actions, compiled.actions, atol=2e-5, rtol=0)
            if model.config.action_head == "token":
                assert torch.equal(plain.token_ids, compiled.token_ids)
    assert not model._compiled.told


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generated_code_gives_the_same_tokens(dtype, policy):
    """Also of weights that a LoRA adapter was merged into, and in half the precision."""
    from peft import LoraConfig, get_peft_model

    torch._dynamo.reset()
    model = policy()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model = adapted.merge_and_unload().to(dtype)
    model.compile_for_actions(text_tokens=(20,), progress=False)
    for seed in range(8):
        plain, compiled = both(model, observation(model, 3 + seed, seed), output_hidden_states=True)
        if dtype == torch.float32:
            assert torch.equal(plain.token_ids, compiled.token_ids)
            torch.testing.assert_close(plain.hidden_states, compiled.hidden_states, atol=1e-4, rtol=0)
        else:  # other kernels round otherwise: a token may differ where two are as good as each other
            logits = (plain.hidden_states @ model.lm_head.weight[START : START + 256].T).float()
            first = (plain.token_ids != compiled.token_ids).int().argmax(-1)  # those behind it follow from it
            margin = logits.amax(-1) - logits.gather(-1, compiled.token_ids[..., None] - START)[..., 0]
            assert margin[0, first] <= 4 * 2**-8 * logits.abs().max()


def test_weights_may_change(captured, policy):
    model = policy()
    model.compile_for_actions(text_tokens=(20,), progress=False)
    before = model.sample_actions(**observation(model, 5)).token_ids
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight.copy_(weight.roll(1, dims=0))
    plain, compiled = both(model, observation(model, 5))
    assert torch.equal(plain.token_ids, compiled.token_ids) and not torch.equal(before, compiled.token_ids)


def test_what_was_not_compiled_runs_as_before_and_says_why(captured, policy, caplog):
    model = policy()
    model.compile_for_actions(batch_sizes=(1,), text_tokens=(20,), progress=False)
    cases = [
        ({"num_words": 60}, "compiled for up to 45 tokens of text, got 61"),
        ({"num_words": (3, 3)}, "compiled for batches of [1], got 2"),
    ]
    for options, message in cases:
        caplog.clear()
        plain, compiled = both(model, observation(model, **options))
        both(model, observation(model, **options))
        assert torch.equal(plain.token_ids, compiled.token_ids)
        warnings = [text for text in caplog.messages if "Acting without compilation" in text]
        assert warnings == [f"Acting without compilation: {message}."]
    caplog.clear()
    model.to(torch.bfloat16)
    model.sample_actions(**observation(model, 3))
    assert "the policy is on (device(type='cpu'), torch.bfloat16) now" in caplog.text
    model.compile_for_actions(None)
    caplog.clear()
    model.sample_actions(**observation(model, (3, 3)))
    assert "compilation" not in caplog.text


def test_the_longest_prompt_and_what_is_no_prompt(captured, policy, caplog):
    model = policy()
    model.compile_for_actions(text_tokens=(20,), progress=False)
    (bucket,) = model._compiled.buckets
    room = bucket.size - model._compiled.behind - model._compiled.shortest  # 45 of text, "▁" included
    for num_words, warnings in ((room - 1, 0), (room, 1)):
        plain, compiled = both(model, observation(model, num_words))
        assert torch.equal(plain.token_ids, compiled.token_ids)
        assert sum("Acting without" in text for text in caplog.messages) == warnings
    assert f"up to {room} tokens of text, got {room + 1}" in caplog.text
    ids = observation(model, 5)["input_ids"]
    moved = torch.cat([ids[:, 5:7], torch.full((1, 4), IMAGE), ids[:, 7:]], dim=1)  # placeholders behind a word
    inputs = {**observation(model, 5), "input_ids": moved, "attention_mask": torch.ones_like(moved)}
    assert model._compiled.find(moved.tolist(), {"pixel_values": inputs["pixel_values"], "proprio": None}, 7) is None
    assert "image placeholders do not stand behind the first token" in caplog.text
    assert "compiled for up to 7 action values, got 14" not in caplog.text
    rows = [[1, *[IMAGE] * 4, 500, 29871]]
    assert model._compiled.find(rows, {"pixel_values": inputs["pixel_values"], "proprio": None}, 14) is None
    assert "compiled for up to 7 action values, got 14" in caplog.text
    model.set_attn_implementation("eager")
    plain, compiled = both(model, observation(model, 5))
    assert torch.equal(plain.token_ids, compiled.token_ids)
    assert "Acting without compilation: attn_implementation is 'eager', not 'sdpa'." in caplog.text


def test_threads_take_turns(captured, policy):
    """Buckets know an observation from pass to pass: of one at a time."""
    model = policy()
    model.compile_for_actions(text_tokens=(20,), progress=False)
    inputs = [observation(model, 3 + number, number) for number in range(6)]
    expected = [model.sample_actions(**each).token_ids for each in inputs]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda number: model.sample_actions(**inputs[number % 6]).token_ids, range(30)))
    assert all(torch.equal(tokens, expected[number % 6]) for number, tokens in enumerate(found))


def test_flags_modes_and_copies(captured, policy):
    model = policy().train()
    model.model.vision_backbone.eval()
    model.compile_for_actions(text_tokens=(20,), warm_up=False, progress=False)
    expected = both(model, observation(model, 5))[0].token_ids
    with torch.inference_mode():
        model.sample_actions(**observation(model, 5))
    assert torch.equal(model.sample_actions(**observation(model, 5)).token_ids, expected)
    model.compile_for_actions(text_tokens=(20,), progress=False)
    assert model.training and not any(module.training for module in model.model.vision_backbone.modules())
    other = copy.deepcopy(model)
    assert other._compiled is None and torch.equal(other.sample_actions(**observation(model, 5)).token_ids, expected)


def test_what_is_refused_stays_refused(captured, policy):
    model = policy(proprio_dim=2)
    model.compile_for_actions(text_tokens=(20,), progress=False)
    inputs = observation(model, 3)
    with pytest.raises(ValueError, match="Expected floating-point pixel_values"):
        model.sample_actions(**{**inputs, "pixel_values": torch.zeros(1, 6, 30, 30)})
    with pytest.raises(ValueError, match="Expected floating-point pixel_values"):
        model.sample_actions(**{**inputs, "pixel_values": torch.zeros(1, 6, 28, 28, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="takes proprio of 2 dims, got none"):
        model.sample_actions(**{**inputs, "proprio": None})
    with pytest.raises(ValueError, match="mode must be one of .*reduce-overhead.*, got 'fast'"):
        model.compile_for_actions("fast")


def test_policies_that_cannot_be_compiled_say_so(policy, caplog):
    model = policy()
    model.set_attn_implementation("eager")
    with caplog.at_level(logging.WARNING):
        assert model.compile_for_actions(progress=False)._compiled is None
    assert "Acting without compilation: attn_implementation is 'eager', not 'sdpa'." in caplog.text
