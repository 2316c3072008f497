import numpy as np
import pytest
import torch
from PIL import Image

from openvla.action_tokenizer import ActionStats, ActionTokenizer
from openvla.finetune.augment import augment, hsv_to_rgb, rgb_to_hsv
from openvla.finetune.collator import ActionCollator
from openvla.finetune.steps import Step

IDENTITY = ActionStats(-np.ones(7), np.ones(7), np.zeros(7, bool), np.zeros(7, bool))  # nothing is normalised


def steps_of(recorded, images, indices) -> list[Step]:
    steps = []
    for index in indices:
        entry = recorded["inputs"][index]
        action = np.array([entry["gt_action"]], dtype=np.float64)
        image = np.asarray(images[index].convert("RGB"))
        steps.append(Step([image], entry["instruction"], action, np.zeros(1, bool), None, entry["image"]))
    return steps


@pytest.fixture
def collator(processor) -> ActionCollator:
    return ActionCollator(None, processor, {"": IDENTITY}, ActionTokenizer())


def test_labels_are_the_recorded_action_ids_and_the_end(collator, recorded, images):
    indices = [0, 1, 3, 6, 8, 10]
    batch = collator.collate(steps_of(recorded, images, indices))
    assert batch["input_ids"].shape == (6, 100 + 256) and batch["pixel_values"].shape == (6, 6, 224, 224)
    for row, index in enumerate(indices):
        expected = recorded["inputs"][index]["train_ids"]
        kept = batch["attention_mask"][row].bool()
        ids = [token for token in batch["input_ids"][row][kept].tolist() if token != 32001]
        assert ids == expected
        scored = batch["labels"][row] != -100
        assert batch["labels"][row][scored].tolist() == expected[-8:]
        assert scored.nonzero()[:, 0].tolist() == list(range(kept.sum() - 8, kept.sum()))


@torch.no_grad()
def test_the_loss_is_the_original_one(collator, model, recorded, images):
    expected = recorded["train_batch"]
    batch = collator.collate(steps_of(recorded, images, expected["samples"]))
    assert model(**batch).loss.item() == pytest.approx(expected["loss"], rel=1e-4)


def test_chunks_are_encoded_step_by_step(processor):
    stats = ActionStats(np.zeros(2), np.array([2.0, 4.0]), np.ones(2, bool), np.zeros(2, bool))
    collator = ActionCollator(None, processor, {"": stats}, ActionTokenizer())
    actions = np.array([[0.0, 4.0], [1.0, 2.0], [1.0, 2.0]])
    step = Step([np.zeros((8, 8, 3), np.uint8)], "go", actions, np.array([False, False, True]), None, "here")
    assert collator.action_ids(step) == [31999, 31745, 31872, 31872, 31872, 31872]  # the 1e-8 keeps 1 below the top
    step.actions = actions[:, :1]
    with pytest.raises(ValueError, match=r"here: Statistics are for 2 action dims"):
        collator.action_ids(step)


def test_augmentation_depends_on_the_draw_alone(processor, recorded, images):
    steps = steps_of(recorded, images, [0, 1])
    collator = ActionCollator(None, processor, {"": IDENTITY}, ActionTokenizer(), seed=7)
    first, again = (collator.collate(steps, [3, 4])["pixel_values"] for _ in range(2))
    other = collator.collate(steps, [5, 4])["pixel_values"]
    assert torch.equal(first, again) and torch.equal(first[1], other[1]) and not torch.equal(first[0], other[0])


def test_augmented_images_stay_close_and_move():
    image = np.asarray(Image.linear_gradient("L").convert("RGB"))
    results = [augment(image, np.random.default_rng(seed)) for seed in range(20)]
    assert all(result.shape == image.shape and result.dtype == np.uint8 for result in results)
    assert len({result.tobytes() for result in results}) == 20
    brightness = [result.mean() - image.mean() for result in results]
    assert max(brightness) > 20 and min(brightness) < -20 and max(map(abs, brightness)) < 0.2 * 255 + 15


def test_hsv_round_trip_and_known_colours():
    rgb = np.random.default_rng(0).uniform(size=(50, 50, 3)).astype(np.float32)
    np.testing.assert_allclose(hsv_to_rgb(rgb_to_hsv(rgb)), rgb, atol=1e-5)
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0.5, 0.5, 0.5], [0, 0, 0]], dtype=np.float32)
    expected = [[0, 1, 1], [1 / 3, 1, 1], [2 / 3, 1, 1], [1 / 6, 1, 1], [0, 0, 0.5], [0, 0, 0]]
    np.testing.assert_allclose(rgb_to_hsv(colours), expected, atol=1e-6)


def test_rows_may_be_padded_to_a_multiple(processor, recorded, images):
    steps = steps_of(recorded, images, [0, 1])
    plain, padded = (
        ActionCollator(None, processor, {"": IDENTITY}, ActionTokenizer(), multiple=each).collate(steps)
        for each in (1, 64)
    )
    length = plain["input_ids"].shape[1]
    assert length % 64 and padded["input_ids"].shape[1] == 64 * (length // 64 + 1)
    for name, filler in (("input_ids", processor.tokenizer.pad_token_id), ("attention_mask", 0), ("labels", -100)):
        assert torch.equal(padded[name][:, :length], plain[name]) and (padded[name][:, length:] == filler).all()
