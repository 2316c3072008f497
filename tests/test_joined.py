"""Several datasets under one name: one set of statistics, every episode in its place, pictures from its own files."""

from pathlib import Path

import numpy as np
import pytest

from openvla.finetune.pictures import SmallPictures
from openvla.finetune.readers.joined import JoinedReader
from openvla.finetune.sft import FinetuneArguments, find_datasets
from openvla.finetune.statistics import scan
from openvla.finetune.steps import Episode
from openvla.processing_openvla import OpenVLAImageProcessor


class Recorded:
    """Episodes whose actions and pictures tell where they came from."""

    fps, action_names = 10.0, ["x", "gripper"]

    def __init__(self, folder: Path, name: str, lengths: list[int], cameras=("front", "wrist"), fps=10.0):
        self.name, self.lengths, self.cameras, self.fps = name, lengths, list(cameras), fps
        self.file, self.asked = folder / name, 0
        self.file.write_text(name)

    def __len__(self) -> int:
        return len(self.lengths)

    def files(self) -> list[str]:
        return [str(self.file)]

    def value(self, index: int) -> int:
        return 10 * index + (100 if self.name == "b" else 0)

    def read(self, index: int) -> Episode:
        def image(camera: str, step: int) -> np.ndarray:
            self.asked += 1
            return np.full((4, 4, 3), self.value(index) + step, np.uint8)

        count = self.lengths[index]
        actions = np.stack([self.value(index) + np.arange(count), np.zeros(count)], axis=1).astype(np.float32)
        return Episode(f"{self.name} {index}", ["go"] * count, actions, None, image)


@pytest.fixture
def parts(tmp_path, monkeypatch) -> list[Recorded]:
    monkeypatch.setattr("openvla.finetune.statistics.CACHE", tmp_path / "cache")
    return [Recorded(tmp_path, "a", [2, 3]), Recorded(tmp_path, "b", [4], cameras=["top", "wrist"])]


def test_episodes_follow_each_other(parts):
    joined = JoinedReader("robot", parts)
    assert (joined.name, joined.fps, joined.action_names, joined.cameras) == (
        "robot",
        10.0,
        ["x", "gripper"],
        ["wrist"],
    )
    assert [joined.read(index).source for index in range(len(joined))] == ["a 0", "a 1", "b 0"]
    assert joined.files() == [*parts[0].files(), *parts[1].files()]


def test_statistics_are_of_all_of_them(parts):
    found = scan(JoinedReader("robot", parts), progress=False)
    assert found.lengths == [2, 3, 4]
    values = np.array([0, 1, 10, 11, 12, 100, 101, 102, 103], dtype=np.float64)
    action = found.norm_stats["action"]
    assert action["min"][0] == 0 and action["max"][0] == 103
    assert action["mean"][0] == pytest.approx(values.mean()) and action["std"][0] == pytest.approx(values.std())
    assert action["q99"][0] == pytest.approx(np.quantile(values, 0.99))
    assert found.norm_stats["num_transitions"] == 9


def test_pictures_that_are_kept_for_one_serve_the_whole(parts, tmp_path):
    fit = OpenVLAImageProcessor(input_sizes=[(3, 4, 4)]).fit

    def keep(reader, lengths):
        return SmallPictures(reader, lengths, ["wrist"], fit, {}, tmp_path / "pictures")

    keep(parts[0], [2, 3])
    assert (parts[0].asked, parts[1].asked) == (5, 0)
    kept = JoinedReader("robot", parts).replace_parts(keep, [2, 3, 4])
    assert (parts[0].asked, parts[1].asked) == (5, 4)
    assert [int(kept.read(episode).image("wrist", step)[0, 0, 0]) for episode, step in ((0, 1), (1, 2), (2, 3))] == [
        1,
        12,
        103,
    ]


def test_what_is_not_alike_is_refused(parts, tmp_path):
    with pytest.raises(ValueError, match=r"fps is 10\.0 in .*a and 20\.0"):
        JoinedReader("robot", [parts[0], Recorded(tmp_path, "c", [1], fps=20.0)])
    with pytest.raises(ValueError, match="named twice .*a.*held-out episodes would be trained on"):
        JoinedReader("robot", [parts[0], parts[1], Recorded(tmp_path, "a", [2, 3])])
    with pytest.raises(ValueError, match="no camera is in all"):
        JoinedReader("robot", [parts[0], Recorded(tmp_path, "c", [1], cameras=["left"])])


def test_a_name_joins_datasets():
    def asked(**options):
        return find_datasets(FinetuneArguments(model="m", **options))

    assert asked(data=["x", "y"], name="robot") == [(["x", "y"], "robot", 1.0)]
    assert asked(data=["x", "y"], weights=[1.0, 2.0]) == [(["x"], None, 1.0), (["y"], None, 2.0)]
    assert asked(data=["x"], name="robot") == [(["x"], "robot", 1.0)]
    with pytest.raises(ValueError, match="--weights"):
        asked(data=["x", "y"], name="robot", weights=[1.0, 2.0])


def test_names_with_the_places_join_those_of_a_name(tmp_path, monkeypatch):
    def asked(*data, **options):
        return find_datasets(FinetuneArguments(model="m", data=list(data), **options))

    expected = [(["x", "lab/z"], "left", 2.0), (["y"], None, 1.0), (["w"], "right", 3.0)]
    assert asked("left=x", "y", "left=lab/z", "right=w", weights=[2.0, 1.0, 3.0]) == expected
    (tmp_path / "lr=3").mkdir()  # a folder may be called so
    monkeypatch.chdir(tmp_path)
    assert asked("lr=3", f"{tmp_path}/lr=3") == [(["lr=3"], None, 1.0), ([f"{tmp_path}/lr=3"], None, 1.0)]
    with pytest.raises(ValueError, match="drop --name"):
        asked("left=x", "right=y", name="robot")
    for place in ("=x", "left=", f"{tmp_path}/lr=4"):
        with pytest.raises(ValueError, match="expected a folder, a file or a Hub id, or NAME="):
            asked(place)
