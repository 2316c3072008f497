"""Parallel decoding, action chunks and continuous heads against what the original OpenVLA-OFT code gave."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import openvla
from openvla.action_tokenizer import ActionStats
from openvla.modeling_openvla import OpenVLAModel

FIXTURES = Path(__file__).parent / "fixtures"
EXTRA = json.loads((FIXTURES / "oft_extra.json").read_text())
KEY = "toy_robot"
# Divided by what is left of the signal, a rounding error of the first of 50 steps grows a thousandfold; our own eager
# and SDPA attention differ as much from each other.
DIFFUSION_TOLERANCE = {50: 2e-4, 10: 5e-5}


def cameras_of(golden, index: int, count: int = 2) -> list[Image.Image]:
    return [Image.fromarray(golden[f"{index:02d}.{name}_u8"].numpy()) for name in ("primary", "wrist")[:count]]


@pytest.fixture
def observe(oft_recorded, oft_golden):
    """`observe(policy, indices)`: the processor's output for recorded observations."""

    def inputs(policy, indices) -> dict:
        model, processor = policy
        entries = [oft_recorded["inputs"][index] for index in indices]
        images = [cameras_of(oft_golden, index, processor.num_cameras) for index in indices]
        states = [entry["state"] for entry in entries] if model.config.proprio_dim else None
        return processor([entry["prompt"] for entry in entries], images, states)

    return inputs


def act(policy, inputs, **options) -> np.ndarray:
    model, _ = policy
    return model.predict_action(**inputs, unnorm_key=KEY, **options).reshape(-1, 8, 7)


def small(attention: str, head: str, checkpoint, chunk: int = 3, **fields):
    """A policy with random weights, one camera, and the recorded one's towers and sizes."""
    torch.manual_seed(0)
    fields = {"attention": attention, "action_head": head, "action_chunk": chunk, "action_dim": 7} | fields
    config = openvla.OpenVLAConfig.from_pretrained(checkpoint, **fields)
    return openvla.OpenVLAForActionPrediction(config).float().eval()


# --- The original's numbers ---
@pytest.mark.parametrize(
    ("recording", "options"),
    [
        ("actions_l1_proprio_fp32", {}),
        ("actions_l1_fp32", {"proprio": False}),
        ("actions_l1_proprio_1img", {"cameras": 1}),
    ],
)
def test_l1_actions_are_the_originals(recording, options, oft_policy, observe, oft_recorded):
    policy = oft_policy(**options)
    for entry in oft_recorded["inputs"]:
        actions = act(policy, observe(policy, [entry["index"]]))
        np.testing.assert_allclose(actions[0], entry[recording], atol=1e-5, rtol=0)


def test_hidden_states_are_the_originals(oft_policy, observe, oft_golden):
    model, _ = policy = oft_policy()
    for index in range(8):
        inputs = observe(policy, [index])
        proprio = model._normalize_proprio(inputs.pop("proprio"), KEY)
        output = model.sample_actions(**inputs, proprio=proprio, output_hidden_states=True)
        torch.testing.assert_close(
            output.hidden_states[0], oft_golden[f"{index:02d}.actions_hidden_states"], atol=2e-5, rtol=0
        )


def test_proprio_is_normalised_and_clipped_as_the_originals(oft_policy, oft_recorded):
    model, _ = oft_policy()
    for entry in oft_recorded["inputs"]:
        found = model._normalize_proprio(np.array(entry["state"]), KEY)
        np.testing.assert_allclose(found[0], entry["proprio_normalized"], atol=1e-6, rtol=0)
        assert found.abs().max() <= 1


@pytest.mark.parametrize("index", [0, 7])
def test_a_whole_batch_in_bfloat16_is_near_the_originals(index, oft_folder, observe, oft_recorded):
    model, processor = openvla.load(oft_folder(), dtype=torch.bfloat16, action_chunk=8, num_cameras=2)
    entry = oft_recorded["inputs"][index]
    actions = act((model, processor), observe((model, processor), [index]))[0]
    np.testing.assert_allclose(actions, entry["actions_l1_proprio_bf16"], atol=0.06, rtol=0)
    assert not np.allclose(actions, entry["actions_l1_proprio_fp32"], atol=1e-5)


def test_tokens_decoded_in_parallel_are_the_originals(oft_policy, observe, oft_recorded, caplog):
    model, _ = policy = oft_policy("token")
    stats = ActionStats.from_norm_stats(model.norm_stats, KEY)
    for entry in oft_recorded["inputs"]:
        inputs = observe(policy, [entry["index"]])
        proprio = model._normalize_proprio(inputs.pop("proprio"), KEY)
        with caplog.at_level(logging.ERROR):
            output = model.sample_actions(**inputs, proprio=proprio, output_hidden_states=True)
        logits = model.lm_head(output.hidden_states)[0]  # (56, vocabulary)
        # The original takes the best of the whole vocabulary, and what is no action for the nearest bin: this policy
        # was not trained for it, so all of it is. We take the best action, and say so.
        original = model.action_tokenizer.decode(logits.argmax(dim=-1).numpy().reshape(8, 7), clip=True)
        np.testing.assert_allclose(stats.unnormalize(original), entry["actions_discrete_fp32"], atol=1e-7, rtol=0)
        assert output.replaced.all()
        best = logits[:, 31744:32000].argmax(dim=-1) + 31744
        assert output.token_ids[0].tolist() == best.tolist()
        with pytest.raises(RuntimeError, match="preferred a token that is not an action"):
            act(policy, observe(policy, [entry["index"]]), strict=True)
    told = model.predict_action(**observe(policy, [entry["index"]]), unnorm_key=KEY, return_dict=True)
    assert told["token_ids"][0].tolist() == best.tolist() and told["log_probs"].shape == (1, 56)


@pytest.mark.parametrize("entry", EXTRA["film"], ids=lambda entry: f"observation {entry['index']}")
def test_film_actions_are_the_originals(entry, oft_policy, observe):
    policy = oft_policy(film=True)
    actions = act(policy, observe(policy, [entry["index"]]))
    np.testing.assert_allclose(actions[0], entry["actions"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("entry", EXTRA["diffusion"], ids=lambda entry: f"{entry['index']} in {entry['steps']} steps")
def test_diffusion_actions_are_the_originals(entry, oft_policy, observe, oft_golden):
    policy = oft_policy("diffusion")
    noise = oft_golden[f"diffusion.{entry['index']:02d}.noise"]
    inputs = observe(policy, [entry["index"]])
    actions = act(policy, inputs, noise=noise, num_denoising_steps=entry["steps"])
    np.testing.assert_allclose(actions[0], entry["actions"], atol=DIFFUSION_TOLERANCE[entry["steps"]], rtol=0)


def batch_of(recorded, golden, policy) -> dict:
    """The recorded training batch: its answer's ids become slots."""
    model, processor = policy
    batch = recorded["train_batch"]
    rows = [processor.insert_image_tokens(row) for row in batch["input_ids"]]
    input_ids = torch.tensor(rows)
    labels = torch.tensor([[-100] * (len(row) - len(told)) + told for row, told in zip(rows, batch["labels"])])
    is_action = (labels >= 31744) & (labels < 32000)
    images = [image for index in batch["samples"] for image in cameras_of(golden, index)]
    pixel_values = processor.image_processor.preprocess(images)["pixel_values"].reshape(len(rows), -1, 224, 224)
    states = [recorded["inputs"][index]["state"] for index in batch["samples"]]
    return {
        "input_ids": input_ids.masked_fill(is_action, model.config.action_slot_id),
        "attention_mask": (input_ids != model.config.pad_token_id).long(),
        "pixel_values": pixel_values,
        "proprio": model._normalize_proprio(np.array(states), KEY) if model.config.proprio_dim else None,
        "labels": labels,
        "actions": torch.tensor(batch["actions"]),
    }


def test_training_has_the_originals_losses_and_gradients(oft_folder, oft_recorded, oft_golden):
    policy = openvla.load(oft_folder(), dtype=torch.float32, action_chunk=8, num_cameras=2)
    model, told = policy[0], oft_recorded["train_batch"]
    batch = batch_of(oft_recorded, oft_golden, policy)
    batch.pop("labels")
    loss = model(**batch).loss
    assert loss.item() == pytest.approx(told["l1_loss"], abs=1e-5)
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        released = next(iter(model._fix_state_dict_keys_on_save({name: 0})))
        released = released if released.startswith(("action_head.", "proprio_projector.")) else f"vla.{released}"
        found[released] = None if parameter.grad is None else parameter.grad.norm().item()
    for name, norm in told["grad_norms"].items():
        if norm is not None:
            assert found[name] == pytest.approx(norm, rel=2e-3, abs=1e-6), name
        else:
            assert found.get(name) is None, name  # blocks and heads that no policy reads
    total = sum(norm**2 for norm in found.values() if norm is not None) ** 0.5
    assert total == pytest.approx(told["grad_norm"], rel=1e-4)


def test_tokens_are_trained_where_they_are_read(oft_policy, oft_recorded, oft_golden):
    model, _ = policy = oft_policy("token")
    batch = batch_of(oft_recorded, oft_golden, policy)
    batch.pop("actions")
    labels = batch.pop("labels")
    with torch.no_grad():
        loss = model(**batch, labels=labels).loss
        outputs = model.model(**batch)
        slots = model.lm_head(model._read_slots(outputs.last_hidden_state, batch["input_ids"]))  # (3, 56, vocabulary)
        ends = model.lm_head(outputs.last_hidden_state)[(batch["input_ids"] == 2).roll(-1, dims=1)]  # (3, vocabulary)
    answers = labels[(labels >= 31744) & (labels < 32000)].reshape(3, 56)
    logits = torch.cat([slots, ends[:, None]], dim=1)
    targets = torch.cat([answers, torch.full((3, 1), 2)], dim=1)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


# --- Attention ---
def moved_by_the_last_slot(model, monkeypatch=None) -> tuple[float, float]:
    """How far the hidden states of the prompt's BOS and of the slots move when the last slot is filled otherwise."""
    count = model.config.action_chunk * model.config.action_dim
    ids = torch.tensor([[1, *[32001] * 256, 512, 29901, 29871, *[32002] * count, 2]])
    features = torch.randn(1, 256, 128, generator=torch.Generator().manual_seed(1))
    noisy = torch.zeros(1, model.config.action_chunk, model.config.action_dim)
    other = noisy.clone()
    other[0, -1, -1] = 1.0
    with torch.no_grad():
        one, two = (
            model.model(input_ids=ids, image_features=features, noisy_actions=each, times=torch.ones(1))
            for each in (noisy, other)
        )
    moved = (one.last_hidden_state - two.last_hidden_state).abs().amax(dim=-1)[0]
    return moved[:260].max().item(), moved[260 : 260 + count - 1].max().item()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize(("attention", "prompt_sees"), [("bidirectional", True), ("prefix", False)])
def test_early_positions_see_late_ones(attention, prompt_sees, implementation, checkpoint):
    model = small(attention, "flow", checkpoint)
    model.set_attn_implementation(implementation)
    prompt, slots = moved_by_the_last_slot(model)
    assert slots > 1e-4
    assert prompt > 1e-4 if prompt_sees else prompt == 0.0


def test_with_causal_attention_forced_nothing_early_moves(checkpoint, monkeypatch):
    model = small("bidirectional", "flow", checkpoint)
    monkeypatch.setattr(OpenVLAModel, "_parallel_mask", lambda self, embeds, ids, mask, past: mask)
    for layer in model.model.language_model.layers:
        layer.self_attn.is_causal = True
    assert moved_by_the_last_slot(model) == (0.0, 0.0)


def test_with_causal_attention_forced_the_originals_actions_are_lost(oft_folder, observe, oft_recorded, monkeypatch):
    policy = openvla.load(oft_folder(), dtype=torch.float32, action_chunk=8, num_cameras=2)
    monkeypatch.setattr(OpenVLAModel, "_parallel_mask", lambda self, embeds, ids, mask, past: mask)
    for layer in policy[0].model.language_model.layers:
        layer.self_attn.is_causal = True
    wrong = act(policy, observe(policy, [0]))[0]
    assert np.abs(wrong - oft_recorded["inputs"][0]["actions_l1_proprio_fp32"]).max() > 0.01


def test_flash_attention_is_told_to_see_everything(checkpoint):
    def causal(attention: str, head: str) -> set[bool]:
        layers = small(attention, head, checkpoint).model.language_model.layers
        return {layer.self_attn.is_causal for layer in layers}

    assert causal("bidirectional", "l1") == {False}  # which is all that its kernels go by
    assert causal("causal", "token") == {True}


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_implementations_agree(implementation, oft_folder, observe, oft_recorded):
    policy = openvla.load(oft_folder(), dtype=torch.float32, action_chunk=8, num_cameras=2)
    policy[0].set_attn_implementation(implementation)
    actions = act(policy, observe(policy, [0]))
    np.testing.assert_allclose(actions[0], oft_recorded["inputs"][0]["actions_l1_proprio_fp32"], atol=1e-5, rtol=0)


def test_attention_that_would_stay_causal_is_refused(checkpoint):
    model = small("prefix", "flow", checkpoint)
    inputs = {"input_ids": torch.tensor([[1, 32002]]), "noisy_actions": torch.zeros(1, 1, 1), "times": torch.zeros(1)}
    for implementation in ("flash_attention_2", "paged|eager"):
        model.model.language_model.config._attn_implementation_internal = implementation
        with pytest.raises(ValueError, match=r"would run this policy's prefix attention as causal"):
            model.model(**inputs)
    with pytest.raises(ValueError, match="not token by token: use predict_action"):
        model.generate(torch.tensor([[1, 512]]))


# --- Batches, prefix ---
@pytest.mark.parametrize("kind", [{}, {"film": True}, {"head": "diffusion"}], ids=["l1", "film", "diffusion"])
def test_a_batch_gives_what_each_observation_gives_alone(kind, oft_policy, observe):
    policy = oft_policy(**kind)
    indices = [0, 1, 7]  # of different lengths, hence padded
    noise = torch.randn(3, 8, 7, generator=torch.Generator().manual_seed(0))
    options = {"num_denoising_steps": 2} if kind.get("head") == "diffusion" else {}
    together = act(policy, observe(policy, indices), noise=noise, **options)
    for row, index in enumerate(indices):
        alone = act(policy, observe(policy, [index]), noise=noise[row : row + 1], **options)
        np.testing.assert_allclose(together[row], alone[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("head", ["flow", "diffusion"])
def test_the_prefix_is_computed_once_and_exactly(head, checkpoint):
    model = small("prefix", head, checkpoint, proprio_dim=2)
    prompts = torch.tensor([[1, 512, 29901, 29871], [32000, 1, 512, 29871]])  # the second is padded
    pixel_values, proprio = torch.randn(2, 6, 224, 224), torch.tensor([[0.5, -0.5], [1.0, 0.0]])
    noise = torch.randn(2, 3, 7)
    calls = []
    model.model.language_model.layers[0].register_forward_hook(
        lambda module, args, output: calls.append(args[0].shape[1])
    )
    output = model.sample_actions(
        prompts, pixel_values, proprio=proprio, noise=noise, num_denoising_steps=2, output_hidden_states=True
    )
    assert calls == [261, 21, 21]  # BOS + 256 patches + state + 3 of text, then nothing but slots

    # the same, over the whole sequence at once
    rows, mask = model._pad_prompts(model._complete_prompts(prompts, None))
    whole = torch.cat([rows, torch.full((2, 21), 32002)], dim=1)
    mask = torch.nn.functional.pad(mask, (0, 21), value=1)

    def slots(noisy, times):
        outputs = model.model(
            input_ids=whole, attention_mask=mask, pixel_values=pixel_values, proprio=proprio,
            noisy_actions=noisy, times=times,
        )  # fmt: skip
        return model._read_slots(outputs.last_hidden_state, whole)

    with torch.no_grad():
        expected = model.action_head.sample(slots, noise, 2)
    torch.testing.assert_close(output.actions.float(), expected, atol=2e-5, rtol=1e-5)


def test_chunks_of_a_causal_policy_go_on_token_by_token(fresh_model, processor, images, recorded):
    one = fresh_model.sample_actions(
        **processor(recorded["inputs"][0]["prompt"], images[0]), action_dim=7
    )  # a chunk of one step
    fresh_model.config.action_chunk = 2
    two = fresh_model.sample_actions(**processor(recorded["inputs"][0]["prompt"], images[0]), action_dim=7)
    assert two.token_ids.shape == (1, 14) and two.token_ids[0, :7].tolist() == one.token_ids[0].tolist()


def test_two_policies_of_different_robots_in_one_process(oft_policy, observe, model, processor, images, recorded):
    policy = oft_policy()
    first = act(policy, observe(policy, [0]))
    entry = recorded["inputs"][0]
    other = model.predict_action(**processor(entry["prompt"], images[0]), unnorm_key="bridge_orig")
    np.testing.assert_allclose(other, entry["actions"]["bridge_orig"], atol=1e-12, rtol=0)
    assert np.array_equal(act(policy, observe(policy, [0])), first)


# --- What cannot be ---
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"action_head": "l1"}, "attention cannot be 'causal'"),
        ({"film": True}, "film needs parallel decoding"),
        ({"attention": "bidirectional"}, "needs action_dim"),
        ({"attention": "prefix", "action_head": "l1", "action_dim": 7}, "for heads that denoise"),
        ({"attention": "sideways"}, "attention must be one of"),
        ({"action_head": "guess"}, "action_head must be one of"),
        (
            {"attention": "bidirectional", "action_head": "diffusion", "action_dim": 7, "num_denoising_steps": 30},
            "a divisor of 50; got 30",
        ),
        (
            {"attention": "prefix", "action_head": "flow", "action_dim": 7, "num_denoising_steps": 0},
            "must be from 1, .* got 0",
        ),
        (
            {"attention": "bidirectional", "action_head": "l1", "action_dim": 7, "num_denoising_steps": 10},
            "would do nothing: a head 'l1' has none",
        ),
        ({"attention": "bidirectional", "action_dim": 7, "action_slot_id": 32064}, "needs a row in the embedding"),
    ],
)
def test_configurations_that_could_not_act_are_refused(fields, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        openvla.OpenVLAConfig.from_pretrained(checkpoint, **fields)


def test_observations_that_do_not_fit_are_refused(oft_policy, observe, model, processor, images, recorded):
    policy = oft_policy()
    inputs = observe(policy, [0])
    with pytest.raises(ValueError, match="takes proprio of 8 dims, got none"):
        act(policy, {key: value for key, value in inputs.items() if key != "proprio"})
    with pytest.raises(ValueError, match="takes proprio of 8 dims, got \\(1, 7\\)"):
        act(policy, {**inputs, "proprio": np.zeros(7)})
    with pytest.raises(ValueError, match="1 prompts but proprio of 2"):
        act(policy, {**inputs, "proprio": np.zeros((2, 8))})
    with pytest.raises(ValueError, match="'l1' has no tokens"):
        act(policy, inputs, do_sample=True)
    with pytest.raises(ValueError, match="takes no proprio"):
        model.predict_action(
            **processor(recorded["inputs"][0]["prompt"], images[0]), proprio=np.zeros(8), unnorm_key=KEY
        )
    with pytest.raises(ValueError, match=r"Expected finite proprio \(1, P\)"):
        policy[1]("x", cameras_of_black(), np.full(8, np.nan))


@pytest.mark.parametrize("steps", [-5, -1, 0, 3, 49, 51, 2.0])
def test_no_steps_of_denoising_would_leave_noise(steps, oft_policy, observe):
    policy = oft_policy("diffusion")
    with pytest.raises(ValueError, match="must be from 1, for diffusion a divisor of 50; got"):
        act(policy, observe(policy, [0]), num_denoising_steps=steps)
    policy = oft_policy()
    with pytest.raises(ValueError, match="would do nothing: a head 'l1' has none"):
        act(policy, observe(policy, [0]), num_denoising_steps=steps)


def cameras_of_black() -> list[Image.Image]:
    return [Image.new("RGB", (224, 224))] * 2


@pytest.mark.parametrize(("dim", "parameters"), [(7, 151_117_831), (14, 268_644_366)])
def test_sizes_on_openvla_7b_are_the_originals(dim, parameters):
    from test_configuration_openvla import OPENVLA_7B

    fields = {"attention": "bidirectional", "action_head": "l1", "action_chunk": 8, "action_dim": dim, "film": True}
    with torch.device("meta"):
        model = openvla.OpenVLAForActionPrediction(openvla.OpenVLAConfig(**OPENVLA_7B, **fields, proprio_dim=8))
    assert sum(each.numel() for each in model.action_head.parameters()) == parameters
    assert sum(each.numel() for each in model.model.proprio_projector.parameters()) == 16_818_176
    film = {name: each for name, each in model.named_parameters() if name.split(".")[-2] in ("scale", "shift")}
    # of the original's 456 M those of the blocks that run: 23 of 1024 and 26 of 1152 channels
    assert sum(each.numel() for each in film.values()) == 2 * (4096 + 1) * (23 * 1024 + 26 * 1152) == 438_411_776
    assert model.action_head.model.fc1.weight.shape == (4096, 4096 * dim)
