import json

import numpy as np
import pytest
import torch

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
    assert [dim["low"] for dim in metadata["action_dims"]] == stats["q01"]
    assert [dim["high"] for dim in metadata["action_dims"]] == stats["q99"]
    assert metadata["num_cameras"] == metadata["action_chunk"] == 1 and metadata["image_size"] == [224, 224]
    assert metadata["checkpoint"] == "tiny" and metadata["control_frequency"] is None


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
