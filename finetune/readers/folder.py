"""A plain folder, for people who have no format yet:

my_robot/episode_000/episode.json    {"instruction": "pick up the cup", "fps": 10}
my_robot/episode_000/episode.npz     actions (N, A); optionally proprio (N, P)
my_robot/episode_000/front/000.jpg   one image per step and camera (jpg or png), sorted by the numbers in its name
my_robot/episode_000/wrist/000.jpg
"""

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from openvla.finetune.steps import Episode

_SUFFIXES = (".jpg", ".jpeg", ".png")


class FolderReader:
    """Episodes of a plain folder. Cameras are the sub-folders of the first episode, in alphabetical order."""

    def __init__(self, path: str | Path, name: str | None = None):
        self.path = Path(path)
        self.name = name or self.path.name
        self._episodes = sorted((file.parent for file in self.path.glob("episode_*/episode.json")), key=_by_number)
        self.cameras = sorted(folder.name for folder in self._episodes[0].iterdir() if folder.is_dir())
        self.fps = json.loads((self._episodes[0] / "episode.json").read_text()).get("fps")

    def __len__(self) -> int:
        return len(self._episodes)

    def files(self) -> list[str]:
        files = (folder / name for folder in self._episodes for name in ("episode.json", "episode.npz"))
        return [str(file) for file in files if file.exists()]

    def read(self, index: int) -> Episode:
        folder = self._episodes[index]
        arrays = folder / "episode.npz"
        if not arrays.exists():
            raise ValueError(f"{folder} has no episode.npz with an array 'actions'.")
        with np.load(arrays) as data:  # allow_pickle is off
            if "actions" not in data:
                raise ValueError(f"{arrays} has no array 'actions', only {data.files}.")
            actions = data["actions"].astype(np.float32)
            proprio = data["proprio"].astype(np.float32) if "proprio" in data else None
        instruction = json.loads((folder / "episode.json").read_text()).get("instruction", "")
        frames = {}
        for camera in self.cameras:
            files = (file for file in (folder / camera).glob("*") if file.suffix.lower() in _SUFFIXES)
            frames[camera] = sorted(files, key=_by_number)
            if len(frames[camera]) != len(actions):
                raise ValueError(f"{folder / camera} holds {len(frames[camera])} images for {len(actions)} actions.")

        def image(camera: str, step: int) -> np.ndarray:
            picture = Image.open(frames[camera][step])
            if picture.mode not in ("RGB", "RGBA", "L", "P"):  # depth, which would come out white
                raise ValueError(f"{frames[camera][step]} is no colour image of 8 bits, but {picture.mode}.")
            return np.asarray(picture.convert("RGB"))

        return Episode(str(folder), [instruction] * len(actions), actions, proprio, image)


def _by_number(path: Path) -> list:
    """9.png before 10.png, whether or not the names are padded."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
