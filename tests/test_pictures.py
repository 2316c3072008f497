"""Pictures that were resized once: what the policy gets is the same to the bit, and the file is made once."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from openvla.finetune.pictures import SmallPictures
from openvla.finetune.steps import Episode, StepDataset
from openvla.processing_openvla import OpenVLAImageProcessor

LENGTHS = [3, 0, 2]  # the second one was bad


class Filmed:
    """Two cameras, pictures of noise; counts how many were asked for."""

    name, cameras, fps = "filmed", ["front", "wrist", "left"], 20.0

    def __init__(self, folder: Path):
        self.file, self.asked = folder / "data", 0
        self.file.write_text("demonstrations")

    def __len__(self) -> int:
        return len(LENGTHS)

    def files(self) -> list[str]:
        return [str(self.file)]

    def read(self, index: int) -> Episode:
        def image(camera: str, step: int) -> np.ndarray:
            self.asked += 1
            rng = np.random.default_rng([index, self.cameras.index(camera), step])
            return rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)

        count = LENGTHS[index]
        actions = np.arange(count * 7, dtype=np.float32).reshape(count, 7)
        return Episode(f"filmed {index}", ["go"] * count, actions, None, image)


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
def test_the_policy_gets_the_same(tmp_path, strategy):
    processor = OpenVLAImageProcessor(image_resize_strategy=strategy, input_sizes=[(3, 28, 28)])
    reader, cameras = Filmed(tmp_path), ["wrist", "front"]
    small = SmallPictures(reader, LENGTHS, cameras, processor.fit, processor.to_dict(), tmp_path / "pictures")
    assert (small.name, small.fps, len(small), reader.asked) == ("filmed", 20.0, 3, 10)
    steps = [StepDataset(each, LENGTHS, cameras=cameras) for each in (reader, small)]
    for index in range(5):
        expected, found = (each[index] for each in steps)
        assert found.images[0].shape == (28, 28, 3)
        values = [processor(step.images)["pixel_values"] for step in (expected, found)]
        torch.testing.assert_close(*values, rtol=0, atol=0)
        np.testing.assert_array_equal(found.actions, expected.actions)
    with pytest.raises(ValueError, match="no cameras"):
        StepDataset(small, LENGTHS, cameras=["left"])


def test_the_file_is_made_once_for_each_way_of_resizing(tmp_path):
    processor, reader = OpenVLAImageProcessor(input_sizes=[(3, 28, 28)]), Filmed(tmp_path)

    def make(processor, cameras=("front",)) -> SmallPictures:
        return SmallPictures(reader, LENGTHS, list(cameras), processor.fit, processor.to_dict(), tmp_path / "pictures")

    first = make(processor)
    assert reader.asked == 5
    assert make(processor).path == first.path and reader.asked == 5
    larger = OpenVLAImageProcessor(input_sizes=[(3, 42, 42)])
    assert make(larger).read(0).image("front", 2).shape == (42, 42, 3)
    assert len({make(larger).path, make(processor, ("wrist",)).path, first.path}) == 3
    reader.file.write_text("other demonstrations")
    assert make(processor).path != first.path
    assert not list((tmp_path / "pictures").glob("*.incomplete"))


def test_a_file_is_whole_or_absent(tmp_path):
    class Broken(Filmed):
        def read(self, index: int) -> Episode:
            episode = super().read(index)
            return episode if index == 0 else dataclasses.replace(episode, image=lambda camera, step: 1 / 0)

    processor = OpenVLAImageProcessor(input_sizes=[(3, 28, 28)])
    with pytest.raises(ZeroDivisionError):
        SmallPictures(Broken(tmp_path), LENGTHS, ["front"], processor.fit, processor.to_dict(), tmp_path / "pictures")
    assert not list((tmp_path / "pictures").glob("*.npy"))


def test_pictures_that_towers_get_differently_are_refused():
    sizes = [(3, 28, 28), (3, 42, 42)]
    processor = OpenVLAImageProcessor(use_fused_vision_backbone=True, input_sizes=sizes)
    with pytest.raises(ValueError, match="Expected towers of one size"):
        processor.fit(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="center_crop_area"):
        OpenVLAImageProcessor(center_crop_area=0.9).fit(np.zeros((8, 8, 3), np.uint8))
