"""Datasets of demonstrations: parts, in the order of tasks and episodes, as LeRobot v3.0 and as LIBERO's HDF5."""

import json
import os
import shutil
from pathlib import Path

import numpy as np

from openvla.evaluate.demos.hdf5 import write_hdf5_files
from openvla.evaluate.demos.parts import Part, frame

STATE_NAMES = {  # by family
    "libero": ["x", "y", "z", "axis_x", "axis_y", "axis_z", "finger_left", "finger_right"],
    "metaworld": ["x", "y", "z", "fingers"],
}


def write_datasets(
    out: Path, parts: list[Part], formats: tuple[str, ...], description: dict, overwrite: bool, videos: int, codec=None
) -> None:
    """Writes the demonstrations that succeeded; `out` appears when all is written, or not at all.

    Args:
        out: with "lerobot" a LeRobot dataset, whose sub-folder `hdf5` has the HDF5 files if they are wanted too; with
            "hdf5" alone a folder of these. Both have `previews` (videos) and `meta` (see `write_meta`).
        formats: "lerobot", "hdf5" or both.
        description: of the run, for `meta/demonstrations.json`.
        videos: previews per task.
    """
    kept = [part for part in parts if part.facts["success"]]
    if not kept:
        raise ValueError(f"Not one of {len(parts)} episodes succeeded: there is no dataset to write.")
    if "lerobot" in formats:
        write_lerobot(out, kept, description, overwrite, videos, "hdf5" in formats, codec)
        return
    work, old = out.with_name(f".{out.name}.incomplete"), out.with_name(f".{out.name}.old")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_hdf5_files(work, kept, description["settings"])
    write_meta(work / "meta", kept, description)
    write_previews(work / "previews", kept, description["settings"], videos)
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out, old)
    os.replace(work, out)
    shutil.rmtree(old, ignore_errors=True)


def write_lerobot(
    out: Path, kept: list[Part], description: dict, overwrite: bool, videos: int, hdf5: bool, codec: str | None
) -> None:
    from openvla.finetune.lerobot_writer import LeRobotWriter
    from openvla.finetune.steps import Episode

    suite, cameras, conventions = description["settings"]["suite"], kept[0].cameras, kept[0].conventions
    options = {"use_videos": bool(cameras), "codec": codec, "overwrite": overwrite, "robot_type": suite.split("_")[0]}
    with LeRobotWriter(out, conventions.control_frequency, cameras, **options) as writer:
        for part in kept:
            arrays = part.arrays()
            states = arrays["proprio"].astype(np.float32)
            for start, stop in part.pieces():

                def image(camera: str, step: int, arrays=arrays, start=start) -> np.ndarray:
                    return frame(arrays, camera, start + step)

                instructions = [part.facts["instruction"]] * (stop - start)
                piece = arrays["actions"][start:stop], states[start:stop]
                writer.add_episode(Episode(part.path.stem, instructions, *piece, image))
        features = writer.info["features"]
        features["action"]["names"] = [name for name, _ in conventions.action_dims]
        features["action"]["units"] = [unit for _, unit in conventions.action_dims]  # so that policies declare them
        features["observation.state"]["names"] = STATE_NAMES.get(suite.split("_")[0])
        write_meta(writer.work / "meta", kept, description)
        write_previews(writer.work / "previews", kept, description["settings"], videos)
        if hdf5:
            (writer.work / "hdf5").mkdir()
            write_hdf5_files(writer.work / "hdf5", kept, description["settings"])


def write_meta(folder: Path, kept: list[Part], description: dict) -> None:
    """`demonstrations.json`: `description`, and `episodes`, the dataset's in order, each with task, number, seed and
    steps, and if there are any the task `asked` for in its stead, and `start`, after how many steps it goes on behind
    a push; `initial_states.npz`: per episode of the dataset, by its index, the simulator's state `(S,)` float64 when
    recording began."""
    folder.mkdir(exist_ok=True)
    episodes = []
    for part in kept:
        facts = {name: part.facts[name] for name in ("task", "episode", "seed", "asked") if name in part.facts}
        for start, stop in part.pieces():
            episodes.append({**facts, "steps": stop - start} | ({"start": start} if start else {}))
    dims = [{"name": name, "unit": unit} for name, unit in kept[0].conventions.action_dims]
    content = {**description, "action_dims": dims, "episodes": episodes}
    (folder / "demonstrations.json").write_text(json.dumps(content, indent=1, ensure_ascii=False))
    states = [state for part in kept for state in part.initial_states()]
    np.savez(folder / "initial_states.npz", **{str(index): state for index, state in enumerate(states)})


def write_previews(folder: Path, kept: list[Part], settings: dict, videos: int) -> None:
    """The first demonstrations of every task as `task_003_episode_0012.mp4`, by the main camera."""
    from openvla.evaluate.videos import write_episode

    if not kept[0].cameras:
        return
    camera, shown = kept[0].cameras[0], {}
    for part in kept:
        task, episode = part.facts["task"], part.facts["episode"]
        shown[task] = shown.get(task, 0) + 1
        if shown[task] <= videos:
            arrays = part.arrays()
            count = len(arrays["actions"])
            frames = [frame(arrays, camera, min(step, count - 1)) for step in range(count + 1)]
            title = f"{settings['suite']} · task {task} · episode {episode} · scripted expert"
            path = folder / f"{part.path.stem}.mp4"
            success = None if settings.get("first") else True  # after first steps nobody knows
            write_episode(path, frames, arrays["actions"], part.conventions, title, part.facts["instruction"], success)
