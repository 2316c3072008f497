"""Pictures of a dataset, decoded and resized once, in a file: training then waits for no video.

Decoding a frame of a video and resizing it costs as much as a small policy's step on a CPU, at every epoch anew. The
file holds what the processor would make of every picture before it normalises: training is the same to the bit.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from openvla.finetune.steps import Episode, Reader


class SmallPictures:
    """A reader whose pictures are those of another, resized by `fit`, from a file in `folder` that is made once.

    Args:
        reader: `Reader`.
        lengths: steps of its episodes; 0: left out.
        cameras: the only ones that can be asked for then.
        fit: `(H, W, 3)` uint8 -> `(S, S, 3)` uint8, `OpenVLAImageProcessor.fit`.
        settings: what `fit` depends on, JSON; with the reader's files it names the file.
    """

    def __init__(self, reader: Reader, lengths: list[int], cameras: list[str], fit, settings: dict, folder: Path):
        self.reader, self.cameras, self._fit = reader, list(cameras), fit
        self._first = np.cumsum([0, *lengths])
        facts = [(os.path.abspath(file), os.path.getsize(file), os.stat(file).st_mtime_ns) for file in reader.files()]
        named = json.dumps([facts, lengths, self.cameras, settings])
        self.path = Path(folder) / f"{reader.name}-{hashlib.sha256(named.encode()).hexdigest()[:16]}.npy"
        if not self.path.exists():
            self._write(lengths)
        self._pictures = np.load(self.path, mmap_mode="r")  # (steps of all episodes, cameras, S, S, 3)

    def __getattr__(self, name: str):  # name, fps, action_names, files, …
        if name == "reader":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.reader, name)

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> Episode:
        first = self._first[index]

        def image(camera: str, step: int) -> np.ndarray:
            return self._pictures[first + step, self.cameras.index(camera)]

        return dataclasses.replace(self.reader.read(index), image=image)

    def _write(self, lengths: list[int]) -> None:
        from tqdm import tqdm

        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary, pictures = self.path.with_suffix(f".{os.getpid()}.incomplete"), None
        with tqdm(total=sum(lengths), desc=f"pictures of {self.reader.name}", unit="step", dynamic_ncols=True) as bar:
            for index, length in enumerate(lengths):
                if not length:
                    continue
                episode, first = self.reader.read(index), self._first[index]
                for place, camera in enumerate(self.cameras):  # a camera's frames follow each other in its video
                    for step in range(length):
                        small = self._fit(episode.image(camera, step))
                        if pictures is None:
                            shape = (sum(lengths), len(self.cameras), *small.shape)
                            pictures = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
                        pictures[first + step, place] = small
                bar.update(length)
        pictures.flush()
        os.replace(temporary, self.path)
