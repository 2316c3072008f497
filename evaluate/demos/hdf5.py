"""Demonstrations as LIBERO publishes its own: an HDF5 file per task, as HDF5Reader, robomimic and LIBERO read them.

Of these files two conventions are unlike the rest of this project's: the gripper's command is the simulator's, -1 open
and +1 closed, and pictures are as OpenGL has them, upside down: 180 degrees from what policies see.

Legend: N steps of an episode.
"""

import json
from pathlib import Path

import numpy as np

from openvla.evaluate.demos.parts import Part, frame
from openvla.evaluate.envs.libero import to_simulator

CAMERAS = {"agentview": "agentview_rgb", "wrist": "eye_in_hand_rgb"}  # of ours: the files'


def write_hdf5_files(folder: Path, kept: list[Part], settings: dict) -> None:
    """`SUITE_TASK_instruction_demo.hdf5` for every task that has demonstrations."""
    for task in sorted({part.facts["task"] for part in kept}):
        demos = [part for part in kept if part.facts["task"] == task]
        words = "_".join(demos[0].facts["instruction"].split())
        _write(folder / f"{settings['suite']}_{task:02d}_{words}_demo.hdf5", demos)


def quaternions(angles: np.ndarray) -> np.ndarray:
    """`(N, 3)` axis-angles with angles in [0, 2π] -> `(N, 4)` x, y, z, w; the inverse of `libero.axis_angle`."""
    turn = np.linalg.norm(angles, axis=1, keepdims=True)
    axis = np.divide(angles, turn, out=np.zeros_like(angles), where=turn > 0)
    return np.concatenate([axis * np.sin(turn / 2), np.cos(turn / 2)], axis=1)


def _write(path: Path, demos: list[Part]) -> None:
    import h5py

    facts = demos[0].facts
    problem = {**facts["problem"], "language_instruction": facts["instruction"]}
    kwargs = {
        "robots": ["Panda"],
        "controller": "OSC_POSE",
        "control_freq": int(demos[0].conventions.control_frequency),
    }
    environment = {"type": 1, "env_name": facts["environment"], "problem_name": problem["problem_name"]}
    environment |= {"bddl_file": facts["bddl"], "env_kwargs": kwargs}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps(problem)
        data.attrs["env_args"] = json.dumps(environment)
        data.attrs["env_name"], data.attrs["bddl_file_name"] = facts["environment"], facts["bddl"]
        data.attrs["macros_image_convention"], data.attrs["num_demos"] = "opengl", len(demos)
        data.attrs["total"] = sum(part.facts["steps"] for part in demos)
        for index, part in enumerate(demos):
            _write_demo(data.create_group(f"demo_{index}"), part)


def _write_demo(group, part: Part) -> None:
    arrays = part.arrays()
    proprio, count = arrays["proprio"], len(arrays["actions"])
    position, angles, fingers = proprio[:, :3], proprio[:, 3:6], proprio[:, 6:]
    last = np.zeros(count, np.uint8)
    last[-1] = 1
    states = arrays["states"][:, : part.facts["physics_size"]]
    group.attrs["num_samples"], group.attrs["init_state"] = count, states[0]
    group["actions"] = to_simulator(arrays["actions"])
    group["states"], group["rewards"], group["dones"] = states, last, last
    group["robot_states"] = np.concatenate([fingers, position, quaternions(angles)], axis=1)
    observations = group.create_group("obs")
    observations["ee_pos"], observations["ee_ori"], observations["ee_states"] = position, angles, proprio[:, :6]
    observations["gripper_states"], observations["joint_states"] = fingers, arrays["joints"]
    for camera in part.cameras:
        pictures = np.stack([frame(arrays, camera, step)[::-1, ::-1] for step in range(count)])
        options = {"chunks": (1, *pictures.shape[1:]), "compression": "gzip", "compression_opts": 1}
        observations.create_dataset(CAMERAS[camera], data=pictures, **options)
