import copy
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from openvla.serve.policy import OpenVLAPolicy


@pytest.fixture(scope="module")
def policy(model, processor):
    return OpenVLAPolicy(model, processor, "bridge_orig", checkpoint="tiny")


def observe(recorded, images, index: int) -> dict:
    instruction = recorded["inputs"][index]["instruction"]
    return {"images": images[index], "instruction": instruction}


def test_the_recorded_actions(policy, recorded, images):
    for index in (0, 3):
        result = policy.infer(observe(recorded, images, index))
        assert result["actions"].shape == (1, 7)
        np.testing.assert_allclose(
            result["actions"][0], recorded["inputs"][index]["actions"]["bridge_orig"], atol=1e-12
        )
        assert result["token_ids"].tolist() == recorded["inputs"][index]["action_ids"]
        assert not result["replaced"].any()


def test_a_batch_is_the_same_as_one_by_one(policy, recorded, images):
    observations = [observe(recorded, images, index) for index in (0, 1, 2)]
    batch = policy.infer_batch(observations)
    for observation, result in zip(observations, batch):
        np.testing.assert_array_equal(result["actions"], policy.infer(observation)["actions"])
        assert result["timing"]["batch_size"] == 3


def test_images_by_name_or_in_a_list(policy, recorded, images):
    expected = policy.infer(observe(recorded, images, 0))["actions"]
    for form in ({"agentview": images[0]}, [images[0]], np.asarray(images[0])):
        result = policy.infer({**observe(recorded, images, 0), "images": form, "proprio": np.zeros(8)})
        np.testing.assert_array_equal(result["actions"], expected)


def test_image_options_reach_the_processor(model, processor, recorded, images):
    cropped = OpenVLAPolicy(model, processor, "bridge_orig", {"center_crop_area": 0.5})
    inputs = processor(processor.build_prompt(recorded["inputs"][0]["instruction"]), images[0], center_crop_area=0.5)
    expected = model.predict_action(**inputs, unnorm_key="bridge_orig")
    np.testing.assert_array_equal(cropped.infer(observe(recorded, images, 0))["actions"][0], expected)
    assert cropped.metadata["center_crop_area"] == 0.5


def test_metadata_is_json_and_tells_units_and_ranges(policy, model):
    metadata = json.loads(json.dumps(policy.metadata))
    assert [dim["name"] for dim in metadata["action_dims"]] == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    assert [dim["unit"] for dim in metadata["action_dims"]] == ["m"] * 3 + ["rad"] * 3 + ["1 = open"]
    stats = model.norm_stats["bridge_orig"]["action"]
    low, high = ([dim[end] for dim in metadata["action_dims"]] for end in ("low", "high"))
    assert low == [*stats["q01"][:6], stats["min"][6]] and high == [*stats["q99"][:6], stats["max"][6]]
    (limits,) = OpenVLAPolicy(model, policy.processor, "bridge_orig", clamp=True).limits  # what it is clamped to
    assert (limits.low.tolist(), limits.high.tolist()) == (low, high)
    assert metadata["num_cameras"] == metadata["action_chunk"] == 1 and metadata["image_size"] == [224, 224]
    assert metadata["checkpoint"] == "tiny" and metadata["control_frequency"] is None
    assert metadata["mask"] == [True] * 6 + [False] and policy.needs == ("images", "draft")
    assert (metadata["action_head"], metadata["attention"]) == ("token", "causal")
    assert metadata["proprio_dim"] == 0 and metadata["proprio_names"] is None and "seed" not in metadata


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"images": None}, r"has no \['images'\], only \['instruction'\]"),
        ({"instruction": None}, r"has no \['instruction'\]"),
        ({"instruction": "  "}, "Expected an instruction"),
        ({"wrist": np.zeros((8, 8, 3), np.uint8)}, r"got also \['wrist'\]"),
        ({"images": [np.zeros((8, 8, 3), np.uint8)] * 2}, "1 image"),
        ({"images": np.zeros((8, 8, 3))}, "uint8"),
    ],
)
def test_an_observation_that_is_not_whole(policy, recorded, images, change, problem):
    observation = {**observe(recorded, images, 0), **change}
    observation = {key: value for key, value in observation.items() if value is not None}
    with pytest.raises(ValueError, match=problem):
        policy.infer(observation)


def test_an_action_that_is_not_finite_is_not_returned(fresh_model, processor, recorded, images, monkeypatch):
    policy = OpenVLAPolicy(fresh_model, processor, "bridge_orig")
    broken = {"actions": np.full(7, np.nan), "token_ids": np.zeros((1, 7)), "replaced": np.zeros((1, 7), bool)}
    monkeypatch.setattr(fresh_model, "predict_action", lambda **inputs: broken)
    with pytest.raises(RuntimeError, match="NaN"):
        policy.infer(observe(recorded, images, 0))


def test_which_statistics(checkpoint):
    with pytest.raises(KeyError, match="unnorm_key is needed"):
        OpenVLAPolicy.from_pretrained(checkpoint, device="cpu")
    preferred = OpenVLAPolicy.from_pretrained(checkpoint, device="cpu", prefer=("libero_goal", "toy_robot"))
    assert preferred.unnorm_key == "toy_robot"
    named = OpenVLAPolicy.from_pretrained(checkpoint, "toy_nomask_6d", device="cpu", prefer=("toy_robot",))
    assert named.unnorm_key == "toy_nomask_6d" and len(named.metadata["action_dims"]) == 6


def test_the_fingerprint_is_of_the_weights(policy, fresh_model, processor):
    other = OpenVLAPolicy(fresh_model, processor, "toy_robot")
    assert other.fingerprint() == policy.fingerprint()
    with torch.no_grad():
        fresh_model.lm_head.weight += 1e-3
    changed = other.fingerprint()
    fresh_model.bfloat16()
    assert len({policy.fingerprint(), changed, other.fingerprint()}) == 3


# --- Decoding in parallel: chunks, cameras, the robot's state ---
@pytest.fixture
def observations(oft_recorded, oft_golden) -> list[dict]:
    """Recorded, with instructions of several lengths."""
    found = []
    for index in (0, 1, 7):
        entry = oft_recorded["inputs"][index]
        pictures = (oft_golden[f"{index:02d}.{camera}_u8"].numpy() for camera in ("primary", "wrist"))
        images = list(map(Image.fromarray, pictures))
        instruction = entry["prompt"].split("robot take to ")[1].removesuffix("?\nOut:")
        found.append({"images": images, "instruction": instruction, "proprio": entry["state"]})
    return found


def test_chunks_of_a_batch_are_the_originals(oft_policy, observations, oft_recorded):
    results = OpenVLAPolicy(*oft_policy(), unnorm_key="toy_robot").infer_batch(observations)
    for index, result in zip((0, 1, 7), results):
        expected = oft_recorded["inputs"][index]["actions_l1_proprio_fp32"]
        np.testing.assert_allclose(result["actions"], expected, atol=2e-5, rtol=0)
        assert set(result) == {"actions", "timing"}  # an L1 head has no tokens


def test_tokens_decoded_in_parallel_are_told(oft_policy, observations):
    model, processor = oft_policy("token")
    policy = OpenVLAPolicy(model, processor, "toy_robot")
    result = policy.infer(observations[0])
    actions = policy.stats.unnormalize(model.action_tokenizer.decode(result["token_ids"].reshape(8, 7)))
    np.testing.assert_array_equal(result["actions"], actions)
    assert result["replaced"].shape == (56,) and result["replaced"].all()  # it was not trained for tokens


def test_a_policy_without_proprio_does_not_look_at_it(oft_policy, observations, oft_recorded):
    policy = OpenVLAPolicy(*oft_policy(proprio=False), unnorm_key="toy_robot")
    expected = oft_recorded["inputs"][0]["actions_l1_fp32"]
    for proprio in (observations[0]["proprio"], np.zeros(3), None):
        actions = policy.infer({**observations[0], "proprio": proprio})["actions"]
        np.testing.assert_allclose(actions, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "proprio, problem",
    [
        (None, "takes proprio of 8 dims, in dataset units; the observation has none"),
        (np.zeros(7), r"takes proprio of 8 dims, in dataset units and finite, got shape \(7,\)"),
        (np.zeros((1, 8)), r"got shape \(1, 8\)"),
        ([np.nan] * 8, "finite"),
    ],
)
def test_a_state_that_does_not_fit(oft_policy, observations, proprio, problem):
    policy = OpenVLAPolicy(*oft_policy(), unnorm_key="toy_robot")
    with pytest.raises(ValueError, match=problem):
        policy.infer_batch([observations[1], {**observations[0], "proprio": proprio}])


def test_cameras_by_name_need_names(oft_policy, observations, monkeypatch):
    model, processor = oft_policy()
    policy, (first, second) = OpenVLAPolicy(model, processor, "toy_robot"), observations[0]["images"]
    expected = policy.infer(observations[0])["actions"]
    with pytest.raises(
        ValueError, match=r"do not name its cameras: pass a list in its order, not \['wrist', 'front'\]"
    ):
        policy.infer({**observations[0], "images": {"wrist": second, "front": first}})
    told = {**model.norm_stats["toy_robot"], "cameras": ["front", "wrist"]}
    monkeypatch.setattr(model.config, "norm_stats", {"toy_robot": told})
    assert policy.metadata["cameras"] == ["front", "wrist"]
    for named in ({"front": first, "wrist": second}, {"wrist": second, "front": first}):
        np.testing.assert_array_equal(policy.infer({**observations[0], "images": named})["actions"], expected)
    for wrong in ({"front": first}, {"front": first, "hand": second}, {}):
        with pytest.raises(ValueError, match=r"of the cameras \['front', 'wrist'\], got"):
            policy.infer({**observations[0], "images": wrong})


def test_noise_depends_on_the_seed_alone(oft_policy, observations):
    model, processor = oft_policy("diffusion")
    policy = OpenVLAPolicy(model, processor, "toy_robot", num_denoising_steps=2)
    seeded = [{**observation, "seed": (7, number)} for number, observation in enumerate(observations)]
    together = [result["actions"] for result in policy.infer_batch(seeded)]
    for observation, expected in zip(seeded, together):
        np.testing.assert_allclose(policy.infer(observation)["actions"], expected, atol=5e-5, rtol=0)
    turned = policy.infer_batch(seeded[::-1])[::-1]
    np.testing.assert_allclose([result["actions"] for result in turned], together, atol=5e-5, rtol=0)

    # 1. It is that noise, and that number of steps
    noise = np.random.default_rng((7, 1)).standard_normal((1, 8, 7), dtype=np.float32)
    inputs = processor(
        [processor.build_prompt(observations[1]["instruction"])],
        [observations[1]["images"]],
        [observations[1]["proprio"]],
    )
    options = {"num_denoising_steps": 2, "noise": torch.from_numpy(noise), "unnorm_key": "toy_robot"}
    np.testing.assert_array_equal(policy.infer(seeded[1])["actions"], model.predict_action(**inputs, **options))

    # 2. The policy's own seed is for observations without; without any, noise is fresh
    own = OpenVLAPolicy(model, processor, "toy_robot", num_denoising_steps=2, seed=3)
    first = own.infer(observations[0])["actions"]
    np.testing.assert_array_equal(own.infer(observations[0])["actions"], first)
    np.testing.assert_array_equal(policy.infer({**observations[0], "seed": 3})["actions"], first)
    np.testing.assert_array_equal(own.infer(seeded[0])["actions"], policy.infer(seeded[0])["actions"])
    fresh = [policy.infer(observations[0])["actions"] for _ in range(2)]
    assert np.abs(fresh[0] - fresh[1]).max() > 1e-3 and np.abs(first - together[0]).max() > 1e-3


def test_only_heads_that_denoise_have_noise(oft_policy, model, processor):
    for head in ("l1", "token"):
        assert oft_policy(head)[0].draw_noise([1, 2]) is None
    with pytest.raises(ValueError, match="num_denoising_steps would do nothing: a head 'token' has none"):
        OpenVLAPolicy(model, processor, "bridge_orig", num_denoising_steps=5)
    with pytest.raises(ValueError, match="num_denoising_steps must be from 1, for diffusion a divisor of 50; got 0"):
        OpenVLAPolicy(*oft_policy("diffusion"), "toy_robot", num_denoising_steps=0)


@pytest.mark.parametrize("seed", [-1, 1.5, "x", [3, -2]])
def test_seeds_are_integers_from_0(seed, oft_policy):
    model, _ = oft_policy("diffusion")
    with pytest.raises(ValueError, match=f"integer from 0, or several of them; got {re.escape(repr(seed))}"):
        model.draw_noise([0, seed])


def test_metadata_of_a_policy_that_decodes_in_parallel(oft_policy):
    model, processor = oft_policy("diffusion")
    policy = OpenVLAPolicy(model, processor, "toy_robot", seed=5)
    metadata = json.loads(json.dumps(policy.metadata))
    assert (metadata["action_chunk"], metadata["num_cameras"], metadata["proprio_dim"]) == (8, 2, 8)
    assert (metadata["action_head"], metadata["attention"]) == ("diffusion", "bidirectional")
    assert (metadata["num_denoising_steps"], metadata["seed"]) == (50, 5) and policy.needs == ("images", "seed")
    assert metadata["proprio_names"] is None
    named = copy.copy(model)
    named.config = copy.deepcopy(model.config)
    names = named.norm_stats["toy_robot"]["proprio"]["names"] = [f"joint {number}" for number in range(8)]
    policy = OpenVLAPolicy(named, processor, "toy_robot")
    assert policy.metadata["proprio_names"] == names and policy.metadata["seed"] is None
    with pytest.raises(ValueError, match=r"8 dims \(\['joint 0', "):
        policy.infer({"images": [Image.new("RGB", (9, 9))] * 2, "instruction": "x"})


def test_the_originals_folders_are_loaded(oft_folder, observations, oft_recorded):
    options = {"dtype": "float32", "device": "cpu", "action_chunk": 8, "num_cameras": 2}
    policy = OpenVLAPolicy.from_pretrained(oft_folder(), "toy_robot", **options)
    expected = oft_recorded["inputs"][0]["actions_l1_proprio_fp32"]
    np.testing.assert_allclose(policy.infer(observations[0])["actions"], expected, atol=1e-5, rtol=0)


def test_drafts_save_passes_and_change_nothing(policy, recorded, images):
    entries = [recorded["inputs"][index] for index in (0, 1)]
    plain = [{"images": images[entry["index"]], "instruction": entry["instruction"]} for entry in entries]
    answers = policy.infer_batch(plain)
    assert "accepted" not in answers[0] and "passes" not in answers[0]
    drafted = [{**each, "draft": answer["token_ids"]} for each, answer in zip(plain, answers)]
    for answer, found in zip(answers, policy.infer_batch(drafted)):
        np.testing.assert_array_equal(found["actions"], answer["actions"])
        assert (found["accepted"], found["passes"]) == (6, 1)
    assert "passes" not in policy.infer_batch([drafted[0], plain[1]])[0]  # one has none
    with pytest.raises(ValueError, match=r"Expected drafts of \(7,\) token ids, got \(3,\)"):
        policy.infer_batch([drafted[0], {**plain[1], "draft": [31744] * 3}])
    without = OpenVLAPolicy(policy.model, policy.processor, policy.unnorm_key, drafts=False)
    assert not without.takes_drafts and "draft" not in without.needs and not without.metadata["drafts"]
    assert "accepted" not in without.infer(drafted[0])


def test_policies_that_decode_in_parallel_look_at_no_draft(oft_policy, observations, oft_recorded):
    policy = OpenVLAPolicy(*oft_policy(), unnorm_key="toy_robot")
    assert not policy.takes_drafts
    expected = oft_recorded["inputs"][0]["actions_l1_proprio_fp32"]
    np.testing.assert_allclose(policy.infer({**observations[0], "draft": [1]})["actions"], expected, atol=1e-5, rtol=0)
