"""Opens a LeRobot dataset with lerobot itself and compares every frame. Meant for an environment that has lerobot:

python tests/lerobot_reads_it.py my_robot expected.npz

expected.npz holds, for all S steps in order: actions (S, A), optionally states (S, P), tasks (S,), episodes (S,),
and, per camera, its frames (S, H, W, 3) uint8 under the camera's feature name.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:  # built for CUDA, beside a torch that is not: its operators are missing, which nobody here calls
    for module in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[module]
    operators = torch.library.Library("torchvision", "DEF")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from lerobot.datasets.lerobot_dataset import LeRobotDataset

VIDEO_TOLERANCE = 10.0  # levels of 255, mean absolute difference of a frame; crf 30 on noisy 64-pixel frames: 8


def equal(name: str, found, expected) -> None:
    if not np.array_equal(found, expected):
        raise SystemExit(f"{name}: lerobot gives {found}, expected {expected}")


def compare(folder: Path, expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Exits with what differs; returns the largest mean difference of a frame per camera, in levels of 255."""
    dataset = LeRobotDataset(f"local/{folder.name}", root=folder)
    meta, episodes = dataset.meta, expected["episodes"]
    equal("steps", len(dataset), len(episodes))
    equal("episodes", dataset.num_episodes, len(np.unique(episodes)))
    equal("totals", (meta.total_frames, meta.total_episodes), (len(episodes), len(np.unique(episodes))))
    cameras = sorted(set(expected) - {"actions", "states", "tasks", "episodes"})
    equal("cameras", sorted(meta.camera_keys), cameras)
    worst = dict.fromkeys(cameras, 0.0)
    first = 0
    for index in range(len(dataset)):
        item, where = dataset[index], f"step {index}"
        first = index if index and episodes[index] != episodes[index - 1] else first
        equal(f"{where}, action", item["action"].numpy(), expected["actions"][index])
        if "states" in expected:
            equal(f"{where}, state", item["observation.state"].numpy(), expected["states"][index])
        equal(f"{where}, task", item["task"], str(expected["tasks"][index]))
        equal(f"{where}, numbers", (item["index"], item["episode_index"]), (index, episodes[index]))
        equal(f"{where}, frame", item["frame_index"], index - first)
        equal(f"{where}, time", item["timestamp"].numpy(), np.float32((index - first) / meta.fps))
        for camera in cameras:
            frame = (item[camera].permute(1, 2, 0).numpy() * 255).round().astype(np.int64)
            equal(f"{where}, shape of {camera}", frame.shape, expected[camera][index].shape)
            difference = float(np.abs(frame - expected[camera][index]).mean())
            worst[camera] = max(worst[camera], difference)
            if difference > (VIDEO_TOLERANCE if camera in meta.video_keys else 0):
                raise SystemExit(f"{where}: {camera} differs by {difference:.2f} levels on average")
    for row in meta.episodes:
        steps = np.flatnonzero(episodes == row["episode_index"])
        equal("boundaries", (row["dataset_from_index"], row["dataset_to_index"]), (steps[0], steps[-1] + 1))
        equal("tasks of an episode", sorted(row["tasks"]), sorted(set(expected["tasks"][steps].tolist())))
    check_statistics(meta.stats, expected)
    return worst


def check_statistics(stats: dict, expected: dict[str, np.ndarray]) -> None:
    for key, name in (("action", "actions"), ("observation.state", "states")):
        if name in expected:
            values = expected[name].astype(np.float64)
            equal(f"min of {key}", stats[key]["min"], values.min(0))
            equal(f"max of {key}", stats[key]["max"], values.max(0))
            np.testing.assert_allclose(stats[key]["mean"], values.mean(0), rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(stats[key]["std"], values.std(0), rtol=1e-6, atol=1e-9)
            equal(f"count of {key}", stats[key]["count"], [len(values)])
            for low, high in (("min", "q01"), ("q01", "q10"), ("q10", "q50"), ("q50", "q90"), ("q90", "q99")):
                assert (stats[key][low] <= stats[key][high] + 1e-9).all(), (key, low, high)
    for camera in set(expected) & set(stats):
        pixels = expected[camera].astype(np.float64) / 255
        assert stats[camera]["mean"].shape == (3, 1, 1)
        np.testing.assert_allclose(stats[camera]["mean"][:, 0, 0], pixels.mean((0, 1, 2)), atol=2e-3)
        np.testing.assert_allclose(stats[camera]["std"][:, 0, 0], pixels.std((0, 1, 2)), atol=2e-3)


if __name__ == "__main__":
    with np.load(sys.argv[2]) as arrays:
        print(json.dumps(compare(Path(sys.argv[1]), dict(arrays))))
