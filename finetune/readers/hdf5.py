"""HDF5 in the layout of LIBERO and robomimic: `data/demo_0/{actions, obs/agentview_rgb, …}`, one file or a folder."""

import json
from pathlib import Path

import numpy as np

from openvla.finetune.steps import Episode

_MAIN_CAMERAS = ("agentview_rgb", "agentview_image")
_STATE_KEYS = ("ee_states", "ee_pos", "ee_ori", "gripper_states")


class HDF5Reader:
    """Episodes of one or several files, taken as they are: LIBERO's raw gripper is -1 open, +1 closed.

    The instruction is the file's `problem_info["language_instruction"]`, or the file's name with spaces (robomimic).
    """

    def __init__(self, path: str | Path, name: str | None = None):
        import h5py

        path = Path(path)
        self._files = [path] if path.is_file() else sorted([*path.glob("*.hdf5"), *path.glob("*.h5")])
        self.name = name or path.stem
        self.fps = None
        self._demos, self._instructions = [], {}
        for file in self._files:
            with h5py.File(file, "r") as data:
                if "data" not in data or not len(data["data"]):
                    raise ValueError(f"{file} has no demonstrations: expected groups data/demo_0, data/demo_1, …")
                info = json.loads(data["data"].attrs.get("problem_info", "{}"))
                instruction = info.get("language_instruction", file.stem.removesuffix("_demo").replace("_", " "))
                self._instructions[file] = instruction.strip().strip('"')
                demos = sorted(data["data"], key=lambda demo: int(demo.rsplit("_", 1)[-1]))
                self._demos += [(file, demo) for demo in demos]
                observations = data["data"][demos[0]]["obs"]
                images = [
                    key for key in observations if observations[key].ndim == 4 and observations[key].shape[-1] == 3
                ]
        self.cameras = sorted(images, key=lambda key: (key not in _MAIN_CAMERAS, key))

    def __len__(self) -> int:
        return len(self._demos)

    def files(self) -> list[str]:
        return [str(file) for file in self._files]

    def read(self, index: int) -> Episode:
        import h5py

        file, demo = self._demos[index]
        source = f"{file}, {demo}"
        with h5py.File(file, "r") as data:
            group = data["data"][demo]
            actions = np.asarray(group["actions"], dtype=np.float32)
            keys = [key for key in _STATE_KEYS if key in group["obs"]]
            keys = [key for key in keys if key == "ee_states" or key == "gripper_states" or "ee_states" not in keys]
            counts = {key: len(group["obs"][key]) for key in self.cameras}
            if wrong := {key: count for key, count in counts.items() if count != len(actions)}:
                raise ValueError(f"{source}: {len(actions)} actions, but frames {wrong}.")
            states = [np.asarray(group["obs"][key], dtype=np.float32).reshape(len(actions), -1) for key in keys]

        def image(camera: str, step: int) -> np.ndarray:
            with h5py.File(file, "r") as data:
                return np.asarray(data["data"][demo]["obs"][camera][step], dtype=np.uint8)

        proprio = np.concatenate(states, axis=1) if states else None
        return Episode(source, [self._instructions[file]] * len(actions), actions, proprio, image)
