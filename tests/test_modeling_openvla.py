"""The model against recordings of the original, and against itself called in other ways."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, StaticCache

import openvla
from openvla.configuration_openvla import TIMM_TOWERS, OpenVLAConfig, VisionTowerConfig
from openvla.language_layers import CACHE_NAME
from openvla.vision_towers import VisionTransformer

ACTIONS = slice(31744, 32000)


@pytest.fixture(scope="module")
def inputs(recorded, images, processor) -> list:
    """One observation per recorded input."""
    return [processor(entry["prompt"], image) for entry, image in zip(recorded["inputs"], images)]


def legacy(recorded, golden, images, processor, index: int) -> dict:
    """What the original's processor returns: no placeholders, no trailing token."""
    ids = golden[f"{index:02d}.input_ids"][None].long()
    pixel_values = processor(recorded["inputs"][index]["prompt"], images[index])["pixel_values"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixel_values}


def tokens(model, inputs, **kwargs) -> list:
    return model.sample_actions(**inputs, action_dim=7, **kwargs).token_ids.tolist()


# --- Parity with the original ---
@torch.no_grad()
def test_projected_patches(model, inputs, golden):
    for index, one in enumerate(inputs):
        patches = model.model.get_image_features(one["pixel_values"])[0]
        torch.testing.assert_close(patches, golden[f"{index:02d}.projected"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_logits(model, inputs, golden):
    for index, one in enumerate(inputs):
        logits = model(**one).logits[0, -1]
        torch.testing.assert_close(logits, golden[f"{index:02d}.logits_last"], atol=5e-5, rtol=0)


@torch.no_grad()
def test_logits_of_every_decoding_step(model, inputs, recorded, golden):
    for index, (one, entry) in enumerate(zip(inputs, recorded["inputs"])):
        ids = torch.cat([one["input_ids"], torch.tensor([entry["action_ids"][:-1]])], dim=1)
        logits = model(input_ids=ids, pixel_values=one["pixel_values"], logits_to_keep=7).logits[0]
        expected = golden[f"{index:02d}.step_logits_action_rows"]
        torch.testing.assert_close(logits[:, ACTIONS], expected, atol=5e-5, rtol=0)


def test_actions_for_every_robot(model, inputs, recorded):
    for one, entry in zip(inputs, recorded["inputs"]):
        for key, expected in entry["actions"].items():
            result = model.predict_action(**one, unnorm_key=key, return_dict=True)
            assert result["token_ids"][0].tolist() == entry["action_ids"][: len(expected)]
            assert result["actions"].dtype == np.float64 and result["actions"].shape == (len(expected),)
            np.testing.assert_allclose(result["actions"], expected, rtol=0, atol=1e-12)
            assert not result["replaced"].any()


def test_the_same_image_with_another_prompt(model, recorded, images, processor):
    for entry, image in zip(recorded["inputs"], images):
        prompt = recorded["inputs"][entry["cross"]["prompt_index"]]["prompt"]
        assert tokens(model, processor(prompt, image)) == [entry["cross"]["action_ids"]]


def test_bfloat16(checkpoint, inputs, recorded, golden):
    model = openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    for index, (one, entry) in enumerate(zip(inputs, recorded["inputs"])):
        assert tokens(model, one) == [entry["action_ids_bf16"]]
        with torch.no_grad():
            logits = model(**one).logits[0, -1]
        torch.testing.assert_close(logits, golden[f"{index:02d}.logits_last_bf16"], atol=0.12, rtol=0)


def test_training_step(fresh_model, recorded, images, processor):
    """Loss, gradients and the loss after one AdamW step on a right-padded batch without placeholders."""
    expected = recorded["train_batch"]
    entries = [recorded["inputs"][index] for index in expected["samples"]]
    length = max(len(entry["train_ids"]) for entry in entries)
    ids = torch.tensor([entry["train_ids"] + [32000] * (length - len(entry["train_ids"])) for entry in entries])
    labels = torch.full_like(ids, -100)
    for row, entry in enumerate(entries):
        end = len(entry["train_ids"])
        labels[row, end - 8 : end] = ids[row, end - 8 : end]  # 7 action tokens and </s>
    pixel_values = torch.cat(
        [processor(entry["prompt"], images[i])["pixel_values"] for i, entry in zip(expected["samples"], entries)]
    )
    assert list(ids.shape) == expected["shape"]
    batch = {"input_ids": ids, "attention_mask": ids != 32000, "labels": labels, "pixel_values": pixel_values}

    model = fresh_model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-4)
    grads = model._fix_state_dict_keys_on_save({name: p.grad for name, p in model.named_parameters()})
    used = {name: norm for name, norm in expected["grad_norms"].items() if norm is not None}
    assert set(grads) == set(used)  # every trainable tensor of the original gets a gradient, and nothing else exists
    for name, norm in used.items():
        assert grads[name].norm().item() == pytest.approx(norm, rel=1e-4), name
    total = torch.stack([grad.norm() for grad in grads.values()]).norm()
    assert total.item() == pytest.approx(expected["grad_norm"], rel=1e-4)
    optimizer.step()
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(expected["loss_after_adamw_5e-4"], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(fresh_model, inputs):
    model, one = fresh_model.train(), inputs[1]
    labels = one["input_ids"].clone()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**one, labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert len(blocks) >= 3 + 3 + 3  # every block of both towers and of the language model
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


# --- Old scripts ---
def test_legacy_inputs(model, recorded, golden, images, processor):
    for index in range(12):
        old, expected = legacy(recorded, golden, images, processor, index), [recorded["inputs"][index]["action_ids"]]
        assert tokens(model, old) == expected
        # the original appends "▁" and forgets the mask
        appended = torch.cat([old["input_ids"], torch.tensor([[29871]])], dim=1)
        assert tokens(model, {**old, "input_ids": appended}) == expected
        assert tokens(model, {**old, "attention_mask": None}) == expected
        one_dimensional = {**old, "input_ids": old["input_ids"][0], "attention_mask": old["attention_mask"][0]}
        assert tokens(model, one_dimensional) == expected


def test_legacy_call_of_predict_action(model, recorded, golden, images, processor):
    old = legacy(recorded, golden, images, processor, 3)
    action = model.predict_action(**old, unnorm_key="bridge_orig", do_sample=False)
    np.testing.assert_allclose(action, recorded["inputs"][3]["actions"]["bridge_orig"], rtol=0, atol=1e-12)


@torch.no_grad()
def test_legacy_forward_equals_the_new_one(model, recorded, golden, images, processor, inputs):
    old = legacy(recorded, golden, images, processor, 2)
    logits = model(**old).logits
    torch.testing.assert_close(logits, model(**inputs[2]).logits[:, :-1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_expansion_finds_bos_behind_padding(model, side):
    row, padding = [1, 512, 29901], [32000, 32000]
    ids = torch.tensor([padding + row if side == "left" else row + padding])
    expanded, mask, labels = model.expand_image_tokens(ids, None, ids.clone())
    image = [32001] * 256
    assert expanded[0].tolist() == (
        padding + [1] + image + [512, 29901] if side == "left" else [1] + image + [512, 29901] + padding
    )
    assert mask[0].tolist() == [int(token != 32000) for token in expanded[0].tolist()]
    assert labels[0].tolist() == [-100 if token == 32001 else token for token in expanded[0].tolist()]


# --- Batches ---
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_the_tokens_of_its_rows(model, recorded, images, processor, side):
    entries = recorded["inputs"]
    batch = processor([entry["prompt"] for entry in entries], images, padding_side=side)
    assert (batch["attention_mask"] == 0).any()
    assert tokens(model, batch) == [entry["action_ids"] for entry in entries]
    actions = model.predict_action(**batch, unnorm_key="bridge_orig")
    np.testing.assert_allclose(actions, [entry["actions"]["bridge_orig"] for entry in entries], rtol=0, atol=1e-12)


def test_a_legacy_batch_without_mask(model, recorded, golden, images, processor):
    olds = [legacy(recorded, golden, images, processor, index) for index in (0, 1, 6)]
    rows = [old["input_ids"][0].tolist() for old in olds]
    length = max(map(len, rows))
    for pad in (lambda row, fill: fill + row, lambda row, fill: row + fill):
        ids = torch.tensor([pad(row, [32000] * (length - len(row))) for row in rows])
        batch = {"input_ids": ids, "pixel_values": torch.cat([old["pixel_values"] for old in olds])}
        expected = [recorded["inputs"][index]["action_ids"] for index in (0, 1, 6)]
        assert tokens(model, batch) == expected
        # with "▁" behind the padding, and a mask that is one short
        ids = torch.cat([ids, torch.full((3, 1), 29871)], dim=1)
        mask = (ids != 32000).long()[:, :-1]
        assert tokens(model, {**batch, "input_ids": ids, "attention_mask": mask}) == expected


def test_generate_equals_predict_action(model, recorded, golden, images, processor, inputs):
    entries = recorded["inputs"]
    batch = processor([entry["prompt"] for entry in entries[:3]], images[:3])
    expected = [entry["action_ids"] for entry in entries[:3]]
    options = {"max_new_tokens": 7, "do_sample": False}
    assert model.generate(**batch, **options)[:, -7:].tolist() == expected
    assert model.generate(**inputs[0], **options, use_cache=False)[0, -7:].tolist() == expected[0]
    assert model.generate(**inputs[0], **options, cache_implementation="static")[0, -7:].tolist() == expected[0]
    assert model.generate(**inputs[0], **options, num_beams=2)[0, -7:].tolist() == expected[0]
    # prompts without placeholders come back without them
    old = legacy(recorded, golden, images, processor, 0)
    ids = torch.cat([old["input_ids"], torch.tensor([[29871]])], dim=1)
    generated = model.generate(ids, pixel_values=old["pixel_values"], **options)
    assert generated[0].tolist() == ids[0].tolist() + expected[0]
    as_dict = model.generate(ids, pixel_values=old["pixel_values"], **options, return_dict_in_generate=True)
    assert as_dict.sequences.tolist() == generated.tolist()


@pytest.mark.parametrize("implementation", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_attention_implementations_agree(checkpoint, recorded, inputs, golden, implementation):
    model = openvla.OpenVLAForActionPrediction.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation=implementation
    ).eval()
    assert model.model.language_model.config._attn_implementation == implementation
    assert tokens(model, inputs[4]) == [recorded["inputs"][4]["action_ids"]]
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs[4]).logits[0, -1], golden["04.logits_last"], atol=1e-4, rtol=0)


# --- Tokens that are no actions ---
@pytest.fixture
def chatty_model(fresh_model, inputs, recorded):
    """Prefers </s> to the third action token of input 0, where the original would stop and return prompt ids."""
    with torch.no_grad():
        third = recorded["inputs"][0]["action_ids"][2]
        fresh_model.lm_head.weight[2] = 1.5 * fresh_model.lm_head.weight[third]
    return fresh_model


def test_the_best_action_token_replaces_a_token_that_is_none(chatty_model, inputs, recorded, caplog):
    with caplog.at_level(logging.WARNING):
        result = chatty_model.predict_action(**inputs[0], unnorm_key="toy_robot", return_dict=True)
    assert result["token_ids"][0].tolist() == recorded["inputs"][0]["action_ids"]
    assert result["replaced"][0, 2] and "row 0 token 2" in caplog.text
    with pytest.raises(RuntimeError, match="not an action.*No action was returned"):
        chatty_model.predict_action(**inputs[0], unnorm_key="toy_robot", strict=True)


def test_strict_is_silent_when_all_is_well(model, inputs, caplog):
    with caplog.at_level(logging.WARNING):
        model.predict_action(**inputs[0], unnorm_key="toy_robot", strict=True)
    assert "not an action" not in caplog.text


# --- Sampling ---
@torch.no_grad()
def test_log_probs_and_hidden_states(model, inputs, golden):
    output = model.sample_actions(**inputs[5], action_dim=7, output_hidden_states=True)
    ids = output.token_ids
    over_actions = golden["05.step_logits_action_rows"].log_softmax(dim=-1).gather(1, (ids - 31744).T)[:, 0]
    torch.testing.assert_close(output.log_probs[0], over_actions, atol=1e-4, rtol=0)
    logits = model.lm_head(output.hidden_states)
    torch.testing.assert_close(logits[0, :, ACTIONS], golden["05.step_logits_action_rows"], atol=5e-5, rtol=0)
    over_all = model.sample_actions(**inputs[5], action_dim=7, log_probs_over="vocabulary").log_probs
    torch.testing.assert_close(over_all, logits.log_softmax(dim=-1).gather(2, ids[..., None])[..., 0])
    assert (over_all <= output.log_probs + 1e-6).all()


def test_sampling_follows_the_distribution_and_the_seed(model, inputs, golden):
    def draw(seed, **kwargs):
        generator = torch.Generator().manual_seed(seed)
        return model.sample_actions(**inputs[0], action_dim=1, do_sample=True, generator=generator, **kwargs)

    assert draw(1, temperature=30.0).token_ids.tolist() == draw(1, temperature=30.0).token_ids.tolist()
    drawn = torch.cat([draw(seed, temperature=30.0).token_ids for seed in range(200)]) - 31744
    assert len(drawn.unique()) > 50 and drawn.min() >= 0 and drawn.max() < 256
    probs = (golden["00.step_logits_action_rows"][0] / 30.0).softmax(dim=-1)
    # the upper half of the distribution is drawn about half of the time: 5 standard deviations of slack
    upper = probs >= probs.sort(descending=True).values[(probs.sort(descending=True).values.cumsum(0) < 0.5).sum()]
    share = upper[drawn[:, 0]].float().mean().item()
    assert abs(share - probs[upper].sum().item()) < 5 * 0.5 / 200**0.5
    log_prob = draw(3, temperature=30.0)
    assert log_prob.log_probs[0, 0].exp().item() == pytest.approx(
        probs[log_prob.token_ids[0, 0] - 31744].item(), rel=1e-3
    )
    # a small nucleus leaves the best token only
    best = golden["00.step_logits_action_rows"][0].argmax().item() + 31744
    assert {draw(seed, temperature=30.0, top_p=1e-4).token_ids.item() for seed in range(20)} == {best}


# --- Chunks, cameras, other towers ---
def test_a_chunk_is_decoded_token_by_token(fresh_model, inputs, recorded):
    fresh_model.config.action_chunk = 2
    chunk = fresh_model.predict_action(**inputs[0], unnorm_key="toy_nomask_6d")
    assert chunk.shape == (2, 6)
    np.testing.assert_allclose(chunk[0], recorded["inputs"][0]["actions"]["toy_nomask_6d"], rtol=0, atol=1e-12)


@torch.no_grad()
def test_two_cameras_are_two_images_in_a_row(checkpoint, images, processor):
    config = OpenVLAConfig.from_pretrained(checkpoint)
    config.num_cameras = 2
    model = openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, config=config, dtype=torch.float32)
    first, second = (processor("go", images[i])["pixel_values"] for i in (0, 1))
    both = model.model.get_image_features(torch.cat([first, second], dim=1))
    assert both.shape == (1, 512, 128)
    single = [
        model.model.projector(model.model.vision_backbone(torch.cat([p, p], dim=1)))[:, :256] for p in (first, second)
    ]
    torch.testing.assert_close(both, torch.cat(single, dim=1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_clip_tower_equals_the_transformers_one():
    """Class token with a position, pre-norm, quick GELU: what neither recorded tower has."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    reference = CLIPVisionModel(CLIPVisionConfig(**size, image_size=28, patch_size=14, hidden_act="quick_gelu")).eval()
    clip = TIMM_TOWERS["vit_large_patch14_clip_336.openai"]
    tower = VisionTransformer(
        VisionTowerConfig(
            32,
            3,
            2,
            image_size=28,
            mlp_ratio=2,
            pre_norm=clip.pre_norm,
            act_layer=clip.act_layer,
            norm_eps=clip.norm_eps,
        )
    )
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs = {key.removeprefix("vision_model."): value for key, value in reference.state_dict().items()}
    ours = {
        "cls_token": theirs["embeddings.class_embedding"].reshape(1, 1, -1),
        "pos_embed": theirs["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": theirs["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        ours[f"norm_pre.{kind}"] = theirs[f"pre_layrnorm.{kind}"]
        for block in range(2):
            layer = f"encoder.layers.{block}."
            ours[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(
                [theirs[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
            ours[f"blocks.{block}.attn.proj.{kind}"] = theirs[f"{layer}self_attn.out_proj.{kind}"]
            for n in (1, 2):
                ours[f"blocks.{block}.norm{n}.{kind}"] = theirs[f"{layer}layer_norm{n}.{kind}"]
                ours[f"blocks.{block}.mlp.fc{n}.{kind}"] = theirs[f"{layer}mlp.fc{n}.{kind}"]
    tower.load_state_dict(ours)
    pictures = torch.randn(2, 3, 28, 28)
    expected = reference(pictures, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(tower(pictures), expected, atol=1e-5, rtol=1e-5)


def test_one_tower_two_projector_layers():
    tiny = {"embed_dim": 16, "depth": 2, "num_heads": 2, "class_token": False}
    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 32064}
    config = OpenVLAConfig("v", timm_model_ids=["t"], image_sizes=[28], timm_model_args={"t": tiny}, text_config=text)
    model = openvla.OpenVLAForActionPrediction(config).eval()
    pixel_values, projector = torch.randn(1, 3, 28, 28), model.model.projector
    patches = model.model.vision_backbone(pixel_values)
    expected = F.linear(F.gelu(F.linear(patches, projector.fc1.weight, projector.fc1.bias)), projector.fc2.weight)
    torch.testing.assert_close(model.model.get_image_features(pixel_values), expected + projector.fc2.bias)
    with pytest.raises(KeyError, match="no action statistics"):
        model.predict_action(torch.tensor([[1, 5]]), pixel_values=pixel_values)
    output = model.sample_actions(torch.tensor([[1, 5]]), pixel_values, action_dim=14)
    assert output.actions.shape == (1, 1, 14)


# --- Bad input ---
def test_missing_and_mismatched_inputs_raise(model, inputs):
    one = inputs[0]
    with pytest.raises(ValueError, match="needs both input_ids and pixel_values"):
        model.predict_action(one["input_ids"], "toy_robot")
    with pytest.raises(ValueError, match="1 prompts but 2 images"):
        doubled = torch.cat([one["pixel_values"]] * 2)
        model.predict_action(one["input_ids"], "toy_robot", pixel_values=doubled)
    with pytest.raises(ValueError, match=r"1 row\(s\) with 0 image placeholders each, got \[256\]"):
        model(input_ids=one["input_ids"])  # placeholders without an image
    with pytest.raises(ValueError, match=r"with 256 image placeholders each, got \[255\]"):
        model.predict_action(one["input_ids"][:, [0, *range(2, 290)]], "toy_robot", pixel_values=one["pixel_values"])
    for bad in (one["pixel_values"][:, :3], one["pixel_values"][..., :200], one["pixel_values"].int()):
        with pytest.raises(ValueError, match=r"floating-point pixel_values \('B', 6, 224, 224\) for 1 camera"):
            model.predict_action(one["input_ids"], "toy_robot", pixel_values=bad)
    with pytest.raises(ValueError, match="does not fit input_ids"):
        model.predict_action(**{**one, "attention_mask": torch.ones(1, 5)}, unnorm_key="toy_robot")
    with pytest.raises(ValueError, match="every row of input_ids needs"):
        model.predict_action(
            **{**one, "attention_mask": torch.zeros_like(one["attention_mask"])}, unnorm_key="toy_robot"
        )
    with pytest.raises(TypeError, match="max_new_tokens"):
        model.predict_action(**one, unnorm_key="toy_robot", max_new_tokens=7)


@pytest.mark.parametrize("strict", [True, False])
def test_nan_moves_no_robot(model, fresh_model, inputs, strict):
    broken = {**inputs[0], "pixel_values": inputs[0]["pixel_values"] * float("nan")}
    with pytest.raises(RuntimeError, match="NaN or infinity.*No action was returned"):
        model.predict_action(**broken, unnorm_key="toy_robot", strict=strict)
    with torch.no_grad():
        fresh_model.model.language_model.norm.weight[0] = float("inf")
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        fresh_model.predict_action(**inputs[0], unnorm_key="toy_robot", strict=strict)


def test_acting_during_training(fresh_model, inputs, recorded):
    # gradient checkpointing in training mode would drop the cache after the prefill, and the image with it
    fresh_model.train()
    fresh_model.gradient_checkpointing_enable()
    fresh_model.model.projector.eval()
    assert tokens(fresh_model, inputs[0]) == [recorded["inputs"][0]["action_ids"]]
    assert fresh_model.training and fresh_model.model.language_model.training
    assert not fresh_model.model.projector.training


def test_placeholders_of_another_vocabulary_are_refused(model, inputs):
    ids = inputs[0]["input_ids"].masked_fill(inputs[0]["input_ids"] == 32001, 32002)
    other = {**inputs[0], "input_ids": ids}
    for call in (model, model.generate, lambda **kwargs: model.predict_action(**kwargs, unnorm_key="toy_robot")):
        with pytest.raises(ValueError, match="holds id 32002 256 times, but image placeholders are 32001"):
            call(**other)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@torch.no_grad()
def test_a_cached_step_is_that_of_one_pass(model, inputs, name):
    # under the name of the installed transformers, and under that of the other versions
    step = torch.tensor([[31999]])
    whole = torch.cat([inputs[0]["input_ids"], step], dim=1)
    expected = model(input_ids=whole, pixel_values=inputs[0]["pixel_values"]).logits[:, -1]
    cache = model(**inputs[0], use_cache=True)[CACHE_NAME]
    length = cache.get_seq_length()
    # as the original: callers that pass the image with every step get one image, not two
    logits = model(input_ids=step, pixel_values=inputs[0]["pixel_values"], **{name: cache}).logits
    assert logits.shape[1] == 1 and cache.get_seq_length() == length + 1
    torch.testing.assert_close(logits[:, 0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_two_caches_are_refused(model, inputs):
    cache, other = DynamicCache(), DynamicCache()
    for call in (model, model.model):
        with pytest.raises(ValueError, match="Pass one cache"):
            call(**inputs[0], cache=cache, past_key_values=other)


@torch.no_grad()
def test_prefill_and_decoding_compile_to_one_graph_each(model, inputs, recorded):
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    cache = StaticCache(config=model.config.text_config, max_cache_len=300)
    logits = compiled(**inputs[1], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    length, ids = inputs[1]["input_ids"].shape[1], []
    for step in range(7):
        ids.append(logits[0, -1].argmax().item())
        position = torch.tensor([length + step])
        logits = compiled(
            input_ids=torch.tensor([ids[-1:]]),
            position_ids=position[None],
            cache_position=position,
            past_key_values=cache,
            use_cache=True,
        ).logits
    assert ids == recorded["inputs"][1]["action_ids"]


def test_placeholders_are_counted_per_row(model, inputs):
    # 255 + 257 make 512 in total: patches of one observation would slip into the other
    ids = torch.cat([inputs[0]["input_ids"]] * 2)
    ids[0, 1], ids[1, -1] = 29871, 32001
    with pytest.raises(ValueError, match=r"got \[255, 257\]"):
        model(input_ids=ids, pixel_values=torch.cat([inputs[0]["pixel_values"]] * 2))


def test_unnorm_keys(model, fresh_model, inputs, recorded):
    with pytest.raises(KeyError, match=r"unnorm_key is needed.*\['bridge_orig', 'toy_nomask_6d', 'toy_robot'\]"):
        model.predict_action(**inputs[0])
    with pytest.raises(KeyError, match="Unknown unnorm_key 'bridge'"):
        model.predict_action(**inputs[0], unnorm_key="bridge")
    fresh_model.norm_stats = {"mine": model.norm_stats["bridge_orig"]}
    np.testing.assert_allclose(
        fresh_model.predict_action(**inputs[0]), recorded["inputs"][0]["actions"]["bridge_orig"], rtol=0, atol=1e-12
    )
    assert fresh_model.config.norm_stats is fresh_model.norm_stats
    assert model.get_action_dim("toy_nomask_6d") == 6
    assert model.get_action_stats("toy_robot")["q01"][0] == -0.75
