"""LeRobot datasets, v2.0, v2.1 and v3.0, from a local folder, with pyarrow and PyAV instead of lerobot.

v3 packs many episodes into one parquet and one video file; v2 has a file of each per episode. Frames are found by
time: `timestamp` of the table, plus, in v3, where the episode starts in its video.
"""

import functools
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from openvla.finetune.steps import Episode


class LeRobotReader:
    """Episodes of a LeRobot dataset: `action`, `observation.state`, every camera, task strings."""

    def __init__(self, path: str | Path, name: str | None = None):
        self.path = Path(path)
        self.name = name or self.path.name
        self.info = json.loads((self.path / "meta" / "info.json").read_text())
        version = self.info["codebase_version"]
        if not version.startswith(("v2.", "v3.")):
            raise ValueError(f"{self.path} is LeRobot {version}; v2.0, v2.1 and v3.0 are read.")
        self._is_v3 = version.startswith("v3.")
        self.fps = float(self.info["fps"])
        features = self.info["features"]
        self._videos = [key for key, feature in features.items() if feature["dtype"] == "video"]
        images = [key for key, feature in features.items() if feature["dtype"] == "image"]
        self.cameras = sorted(self._videos + images, key=lambda key: ("wrist" in key, list(features).index(key)))
        self.tasks, self.episodes = self._read_meta()
        # One parquet file at a time: episodes of a file follow each other.
        self._table = functools.lru_cache(maxsize=2)(self._read_table)
        self._video = functools.lru_cache(maxsize=8)(self._open_video)

    def __len__(self) -> int:
        return len(self.episodes)

    def files(self) -> list[str]:
        return sorted(str(file) for file in [*self.path.glob("meta/**/*.*"), *self.path.glob("data/**/*.parquet")])

    def read(self, index: int) -> Episode:
        meta = self.episodes[index]
        number = meta["episode_index"]
        file = self.path / self.info["data_path"].format(**self._place(meta, "data"))
        source = f"{file}, episode {number}"
        table = self._table(file)
        rows = np.flatnonzero(table["episode_index"].to_numpy() == number)
        if not len(rows):
            raise ValueError(f"{source}: the file has no rows of this episode.")
        table = table.slice(rows[0], len(rows))
        columns = set(table.column_names)
        actions = _array(table["action"])
        proprio = _array(table["observation.state"]) if "observation.state" in columns else None
        times = table["timestamp"].to_numpy()
        instructions = [self.tasks[task] for task in table["task_index"].to_pylist()]

        def image(camera: str, step: int) -> np.ndarray:
            if camera in self._videos:
                return self._frame(meta, camera, float(times[step]))
            encoded = table[camera][step].as_py()["bytes"]
            return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))

        return Episode(source, instructions, actions, proprio, image)

    def _read_meta(self) -> tuple[dict[int, str], list[dict]]:
        import pyarrow.parquet as parquet

        meta = self.path / "meta"
        if not self._is_v3:
            lines = {name: (meta / f"{name}.jsonl").read_text().splitlines() for name in ("tasks", "episodes")}
            tasks = {row["task_index"]: row["task"] for row in map(json.loads, lines["tasks"])}
            return tasks, [json.loads(line) for line in lines["episodes"]]
        table = parquet.read_table(meta / "tasks.parquet").to_pydict()
        (text,) = set(table) - {"task_index"}  # the index column holds the task's text
        tasks = dict(zip(table["task_index"], table[text]))
        episodes = []
        for file in sorted(meta.glob("episodes/**/*.parquet")):
            columns = [name for name in parquet.read_schema(file).names if not name.startswith("stats/")]
            episodes += parquet.read_table(file, columns=columns).to_pylist()
        return tasks, episodes

    def _place(self, meta: dict, what: str) -> dict:
        """Arguments of the path templates in `info.json`."""
        if self._is_v3:
            return {"chunk_index": meta[f"{what}/chunk_index"], "file_index": meta[f"{what}/file_index"]}
        number = meta["episode_index"]
        return {"episode_chunk": number // self.info["chunks_size"], "episode_index": number}

    def _read_table(self, file: Path):
        import pyarrow.parquet as parquet

        return parquet.read_table(file)

    def _open_video(self, file: Path):
        import av

        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: a video that {self.path / 'meta'} lists.")
        container = av.open(str(file))
        return container, container.streams.video[0]

    def _frame(self, meta: dict, camera: str, time: float) -> np.ndarray:
        place = self._place(meta, f"videos/{camera}")
        if self._is_v3:
            time += meta[f"videos/{camera}/from_timestamp"]
        file = self.path / self.info["video_path"].format(video_key=camera, **place)
        container, stream = self._video(file)
        container.seek(max(0, int((time - 1e-3) / stream.time_base)), stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.time is not None and frame.time >= time - 0.5 / self.fps:
                return frame.to_ndarray(format="rgb24")
        raise ValueError(f"{file} has no frame at {time:.3f} s (episode {meta['episode_index']}, camera {camera}).")


def _array(column) -> np.ndarray:
    """A column of lists as `(N, size)` float32."""
    flat = column.combine_chunks().flatten() if hasattr(column, "combine_chunks") else column.flatten()
    return flat.to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)
