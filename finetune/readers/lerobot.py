"""LeRobot datasets, v2.0, v2.1 and v3.0, from a local folder, with pyarrow and PyAV instead of lerobot.

v3 packs many episodes into one parquet and one video file; v2 has a file of each per episode. Frames are found by
time: `timestamp` of the table, plus, in v3, where the episode starts in its video.
"""

import functools
import io
import itertools
import json
import math
import os
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
        names = features.get("action", {}).get("names")
        names = [each for group in names.values() for each in group] if isinstance(names, dict) else names
        self.action_names = [str(name) for name in names or []]  # {"motors": […]} or […], if the recorder wrote any
        self.action_units = features.get("action", {}).get("units") or []  # ours alone: `openvla demos` writes them
        self._videos = [key for key, feature in features.items() if feature["dtype"] == "video"]
        self._images = [key for key, feature in features.items() if feature["dtype"] == "image"]
        self._mapped = None  # see `map_images`
        self.cameras = sorted(self._videos + self._images, key=lambda key: ("wrist" in key, list(features).index(key)))
        self.tasks, self.episodes = self._read_meta()
        # Episodes follow each other: of files with few row groups, the one read last serves the next episode too.
        self._parquet_metadata = functools.lru_cache(maxsize=64)(_parquet_metadata)
        self._row_group = functools.lru_cache(maxsize=len(self._images) + 1)(self._read_row_group)
        self._video = functools.lru_cache(maxsize=16)(self._open_video)

    def __len__(self) -> int:
        return len(self.episodes)

    def files(self) -> list[str]:
        return sorted(str(file) for file in [*self.path.glob("meta/**/*.*"), *self.path.glob("data/**/*.parquet")])

    def read(self, index: int) -> Episode:
        meta = self.episodes[index]
        number = meta["episode_index"]
        file = self.path / self.info["data_path"].format(**self._place(meta, "data"))
        source = f"{file}, episode {number}"
        table = self._rows(file, number, ("action", "observation.state", "timestamp", "task_index"))
        if not len(table):
            raise ValueError(f"{source}: the file has no rows of this episode.")
        actions = _array(table["action"])
        proprio = _array(table["observation.state"]) if "observation.state" in table.column_names else None
        times = table["timestamp"].to_numpy()
        instructions = [self.tasks[task] for task in table["task_index"].to_pylist()]
        encoded = {}  # images of the cameras asked for

        def image(camera: str, step: int) -> np.ndarray:
            if camera in self._videos:
                return self._frame(meta, camera, float(times[step]))
            if self._mapped is not None:
                return _decode(self._mapped_image(camera, number, step, len(times)))
            if camera not in encoded:  # the whole episode's: lerobot writes them as one page, which is read as one
                encoded[camera] = self._rows(file, number, (camera,))[camera]
            return _decode(encoded[camera][step].as_py()["bytes"])

        return Episode(source, instructions, actions, proprio, image)

    def map_images(self) -> None:
        """Makes single images cheap, where they lie in the tables: otherwise each costs reading those of its episode.

        `datasets` copies them once, uncompressed, into its cache (`HF_DATASETS_CACHE`) and maps that into memory, as
        lerobot does. Without images in the tables nothing happens.
        """
        if not self._images or self._mapped is not None:
            return
        from datasets import Dataset, Image

        places = {self.info["data_path"].format(**self._place(meta, "data")): None for meta in self.episodes}
        files = [str(self.path / place) for place in places]
        data = Dataset.from_parquet(files, columns=[*self._images, "episode_index"])
        numbers = np.asarray(data.data.column("episode_index"))
        self._first_rows = dict(zip(*(each.tolist() for each in np.unique(numbers, return_index=True))))
        self._row_numbers = numbers
        self._mapped = {
            camera: data.select_columns(camera).cast_column(camera, Image(decode=False)) for camera in self._images
        }

    def _mapped_image(self, camera: str, number: int, step: int, length: int) -> bytes:
        first = self._first_rows[number]
        if not (self._row_numbers[first : first + length] == number).all():
            raise ValueError(f"{self.path}: the rows of episode {number} do not follow each other.")
        return self._mapped[camera][first + step][camera]["bytes"]

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

    def _rows(self, file: Path, number: int, columns: tuple[str, ...]):
        """A table of one episode. lerobot gives each its own row group: no other episode's images are read."""
        import pyarrow

        _, ranges = self._parquet_metadata(file)
        parts = []
        for group, (first, last) in enumerate(ranges):
            if first <= number <= last:
                table = self._row_group(file, group, columns)
                rows = np.flatnonzero(table["episode_index"].to_numpy() == number)
                # A slice would keep all episodes of the group in memory.
                parts.append(table if len(rows) == len(table) else table.take(rows))
        return pyarrow.concat_tables(parts) if parts else pyarrow.table({})

    def _read_row_group(self, file: Path, group: int, columns: tuple[str, ...]):
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(file, metadata=self._parquet_metadata(file)[0]) as data:
            return data.read_row_group(group, [*columns, "episode_index"], use_threads=False)

    def _open_video(self, process: int, file: Path) -> "_Video":
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: a video that {self.path / 'meta'} lists.")
        return _Video(file, self.fps)

    def _frame(self, meta: dict, camera: str, time: float) -> np.ndarray:
        place = self._place(meta, f"videos/{camera}")
        if self._is_v3:
            time += meta[f"videos/{camera}/from_timestamp"]
        file = self.path / self.info["video_path"].format(video_key=camera, **place)
        episode = meta["episode_index"]
        # By process: a forked data-loader worker shares the position in its parent's open files.
        frame = self._video(os.getpid(), file).frame(time)
        if frame is None:
            raise ValueError(f"{file} has no frame at {time:.3f} s (episode {episode}, camera {camera}).")
        return frame


class _Video:
    """Frames of one open file by time. The next one costs one decoding, any other a seek to the keyframe before it."""

    def __init__(self, file: Path, fps: float):
        import av

        self._fps = fps
        self._container = av.open(str(file))
        self._stream = self._container.streams.video[0]
        # Threads delay single frames and do not survive a fork; the parallelism is that of data-loader workers.
        self._stream.codec_context.thread_count = 1
        # Setting up the conversion takes longer than converting: once for all frames. PyAV 17 also starts threads.
        self._to_rgb = av.video.reformatter.VideoReformatter()
        self._threads = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}
        self._frames = iter(())
        self._at = math.inf  # time of the frame decoded last
        self._reach = 1 / fps  # seconds ahead that decoding on is no more work than the longest seek so far

    def frame(self, time: float) -> np.ndarray | None:
        """The frame within half a step of `time` in seconds, `(H, W, 3)` uint8; None if there is none."""
        earliest = time - 0.5 / self._fps
        at, self._at = self._at, math.inf
        if not at < earliest <= at + self._reach:
            self._seek(time)
        for frame in self._frames:
            if frame.time >= earliest:
                if frame.time > time + 0.5 / self._fps + 1e-3:
                    return None  # the video has a gap here
                self._at = frame.time
                return self._to_rgb.reformat(frame, format="rgb24", **self._threads).to_ndarray()
        return None

    def _seek(self, time: float) -> None:
        """Goes to a keyframe from which the frame at `time` can be decoded."""
        # A little late: times are float32, and just before a keyframe one would decode from the one before it.
        target, back = time + 1e-3, 1.0
        while True:
            self._container.seek(max(0, int(target / self._stream.time_base)), stream=self._stream)
            self._frames = (frame for frame in self._container.decode(self._stream) if frame.time is not None)
            first = next(self._frames, None)
            # The frames just before a keyframe may need the one before that (HEVC's open groups): they are left out.
            if target <= 0 or (first is not None and first.time < time + 0.5 / self._fps):
                break
            target, back = time - back, 2 * back
        if first is not None:
            self._frames = itertools.chain([first], self._frames)
            self._reach = max(self._reach, time - first.time + 1 / self._fps)


def _decode(encoded: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(encoded))
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))  # it would copy


def _parquet_metadata(file: Path) -> tuple:
    """(metadata, (first, last) episode of each row group)."""
    import pyarrow.parquet as parquet

    metadata = parquet.read_metadata(file)
    column = metadata.schema.names.index("episode_index")
    statistics = [metadata.row_group(group).column(column).statistics for group in range(metadata.num_row_groups)]
    whole = (-math.inf, math.inf)
    return metadata, [(one.min, one.max) if one is not None and one.has_min_max else whole for one in statistics]


def _array(column) -> np.ndarray:
    """A column of lists as `(N, size)` float32; of plain numbers, as lerobot stores size 1, as `(N, 1)`."""
    values = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    flat = values.flatten() if hasattr(values, "flatten") else values
    return flat.to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)
