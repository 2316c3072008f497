"""Writes LeRobot v3.0 datasets without lerobot, as lerobot 0.4.4 lays them out: parquet tables and mp4 videos.

Files hold many episodes and are limited in size. Videos are encoded episode by episode beside the dataset (AV1, a
keyframe every two frames, quality 30, as lerobot's own) and then copied into the open mp4 without encoding again, so
that a bad frame in the middle of an episode leaves nothing behind.

Legend: N steps of an episode · D dims.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from openvla.finetune.steps import Episode, check_episode

PLACE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
ENCODERS = {"av1": "libsvtav1", "h264": "libx264"}
ENCODER_OPTIONS = {
    "libsvtav1": {"g": "2", "crf": "30", "preset": "12"},
    "libx264": {"g": "2", "crf": "30", "bf": "0"},
}
STATISTICS = ("min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99")
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
INDEX_FEATURES = {
    name: {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1], "names": None}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index")
}
MEGABYTE = 1024**2


# --- Statistics ------------------------------------------------------------------------------------------------------
def describe(values: np.ndarray) -> dict[str, np.ndarray]:
    """lerobot's statistics of `(N, D)` values: `(D,)` each, `count` `(1,)`. Quantiles are values that occur."""
    exact = values.astype(np.float64)
    stats = {"min": values.min(0), "max": values.max(0), "mean": exact.mean(0), "std": exact.std(0)}
    stats["count"] = np.array([len(values)])
    return stats | {name: np.quantile(exact, q, axis=0, method="inverted_cdf") for name, q in QUANTILES.items()}


def describe_pixels(counts: np.ndarray, num_frames: int) -> dict[str, np.ndarray]:
    """The same of frames, in [0, 1], `(3, 1, 1)` each, from how often each channel has each value: `(3, 256)`.

    lerobot 0.4.4 squares bytes as bytes, so its `std` of images is too small or 0; this one is right.
    """
    levels, shares, below = np.arange(256) / 255, counts / counts.sum(1, keepdims=True), counts.cumsum(1)
    mean = shares @ levels
    stats = {"min": [levels[row > 0][0] for row in counts], "max": [levels[row > 0][-1] for row in counts]}
    stats |= {"mean": mean, "std": np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(1))}
    stats |= {name: [levels[np.searchsorted(row, q * row[-1])] for row in below] for name, q in QUANTILES.items()}
    shaped = {name: np.reshape(row, (3, 1, 1)) for name, row in stats.items()}
    return {name: shaped.get(name, np.array([num_frames])) for name in STATISTICS}


def merge(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Statistics of two parts together. Quantiles become the parts' weighted mean, as in lerobot: an approximation."""
    count = first["count"] + second["count"]
    old, new = first["count"] / count, second["count"] / count
    mean = old * first["mean"] + new * second["mean"]
    spread = [part["std"] ** 2 + (part["mean"] - mean) ** 2 for part in (first, second)]
    stats = {"min": np.minimum(first["min"], second["min"]), "max": np.maximum(first["max"], second["max"])}
    stats |= {"mean": mean, "std": np.sqrt(old * spread[0] + new * spread[1]), "count": count}
    return stats | {name: old * first[name] + new * second[name] for name in QUANTILES}


# --- Files -----------------------------------------------------------------------------------------------------------
class _Tables:
    """Parquet files of limited size, `chunks_size` to a folder; every write is a row group, as in lerobot."""

    def __init__(self, folder: Path, megabytes: float, chunks_size: int):
        self.folder, self.limit, self.chunks_size = folder, megabytes * MEGABYTE, chunks_size
        self.number = self.rows = 0
        self.writer = None

    def make_room(self, rows: int) -> dict[str, int]:
        """Where so many more rows go: another file if, like those before, they would make this one too large."""
        if self.writer is not None:
            size = self._path().stat().st_size
            if size + size / self.rows * rows >= self.limit:
                self.close()
                self.number += 1
        return _place(self.number, self.chunks_size)

    def write(self, table) -> None:
        import pyarrow.parquet as parquet

        if self.writer is None:
            self._path().parent.mkdir(parents=True, exist_ok=True)
            self.writer, self.rows = parquet.ParquetWriter(self._path(), table.schema), 0
        self.writer.write_table(table)
        self.rows += len(table)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.writer = None

    def _path(self) -> Path:
        return self.folder / f"{PLACE.format(**_place(self.number, self.chunks_size))}.parquet"


class _Videos:
    """One camera's mp4 files: finished videos of episodes, one after the other, copied without encoding again."""

    def __init__(self, folder: Path, fps: Fraction, megabytes: float, chunks_size: int):
        self.folder, self.fps, self.limit, self.chunks_size = folder, fps, megabytes * MEGABYTE, chunks_size
        self.number = self.frames = self.bytes = 0
        self.output = None

    def append(self, video: Path, num_frames: int) -> dict[str, int | float]:
        """Adds an episode's video; returns the file and from when to when, in seconds."""
        import av

        if self.output is not None and self.bytes + video.stat().st_size >= self.limit:
            self.close()
            self.number += 1
        place = _place(self.number, self.chunks_size)
        with av.open(str(video)) as source:
            stream = source.streams.video[0]
            if self.output is None:
                path = self.folder / f"{PLACE.format(**place)}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                self.output = av.open(str(path), "w", options={"movflags": "faststart"})
                self.stream = self.output.add_stream_from_template(stream, opaque=True)
                self.stream.time_base = stream.time_base
                self.frames = self.bytes = 0
            start = int(self.frames / self.fps / stream.time_base)
            for packet in source.demux(stream):
                if packet.dts is None:  # the end
                    continue
                packet.stream = self.stream
                packet.pts, packet.dts = packet.pts + start, packet.dts + start
                self.bytes += packet.size
                self.output.mux(packet)
        times = [float(frames / self.fps) for frames in (self.frames, self.frames + num_frames)]
        self.frames += num_frames
        return {**place, "from_timestamp": times[0], "to_timestamp": times[1]}

    def close(self) -> None:
        if self.output is not None:
            self.output.close()
        self.output = None


def _place(number: int, chunks_size: int) -> dict[str, int]:
    return dict(zip(("chunk_index", "file_index"), divmod(number, chunks_size)))


def choose_encoder(codec: str | None) -> str:
    """ffmpeg's name of the encoder for "av1" or "h264"; None: the first that this PyAV has, in this order."""
    import av

    available = {name: encoder for name, encoder in ENCODERS.items() if encoder in av.codecs_available}
    if not available or (codec and codec not in available):
        raise ValueError(f"PyAV {av.__version__} encodes {sorted(available)}, not {codec}: --images needs no video.")
    return available[codec or next(iter(available))]


def encode_video(path: Path, frames: Iterable[np.ndarray], size: list[int], fps: Fraction, encoder: str) -> None:
    """Writes `(H, W, 3)` uint8 RGB frames of `size` (H, W, …) as an mp4, one by one."""
    import av

    os.environ.setdefault("SVT_LOG", "1")  # errors only, or libsvtav1 prints a page per video
    try:
        with av.open(str(path), "w") as output:
            stream = output.add_stream(encoder, rate=fps, options=ENCODER_OPTIONS[encoder])
            stream.height, stream.width, stream.pix_fmt = *size[:2], "yuv420p"
            with _priorities_kept():
                output.start_encoding()
            for frame in frames:
                output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            output.mux(stream.encode())
    except av.FFmpegError as error:
        hint = "H.264 needs even sizes; --codec av1 takes all, --images needs no video."
        raise RuntimeError(f"{encoder} cannot encode frames of {size[1]}x{size[0]} ({error}). {hint}") from error


@contextlib.contextmanager
def _priorities_kept() -> Iterator[None]:
    """Takes back the real-time priority that libsvtav1, opened by root, gives itself and the thread that opens it.

    Whatever the process starts later would inherit it, and threads that spin while they wait, as OpenMP's do, then
    keep all others from the cores: PyTorch in a child process stalls the machine.
    """
    threads = Path("/proc/self/task")
    if not threads.exists():
        yield
        return

    def priorities() -> dict[int, tuple[int, os.sched_param]]:
        found = {}
        for number in [int(thread.name) for thread in threads.iterdir()]:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                found[number] = os.sched_getscheduler(number), os.sched_getparam(number)
        return found

    before, usual = priorities(), (os.sched_getscheduler(0), os.sched_getparam(0))
    yield
    for number, found in priorities().items():
        if found != (wanted := before.get(number, usual)):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setscheduler(number, *wanted)


# --- The dataset -----------------------------------------------------------------------------------------------------
def feature_names(cameras: list[str]) -> dict[str, str]:
    """`{"steps/wrist": "observation.images.wrist"}`: the last part of each camera's name, as lerobot calls it."""
    short = {camera: camera.rsplit("/", 1)[-1] for camera in cameras}
    if len(set(short.values())) < len(short):
        short = {camera: camera.replace("/", "_") for camera in cameras}
    bare = {camera: name.removeprefix("observation.").removeprefix("images.") for camera, name in short.items()}
    return {camera: f"observation.images.{name}" for camera, name in bare.items()}


class LeRobotWriter:
    """Writes a LeRobot v3.0 dataset episode by episode, in constant memory, as lerobot 0.4.4 lays it out.

        with LeRobotWriter("my_robot", fps=10, cameras=["front", "wrist"]) as writer:
            writer.add_episode(Episode("take 1", ["pick up the cup"] * 90, actions, states, lambda camera, step: …))

    All goes to `.my_robot.incomplete`; leaving the block renames it, or removes it after an error.

    Args:
        folder: of the dataset; its name is the `unnorm_key` of policies trained on it.
        fps: steps per second.
        cameras: what `Episode.image` is asked for, the main one first.
        robot_type: free text for `info.json`.
        use_videos: False stores every frame as PNG in the tables.
        codec: "av1" or "h264"; None: the first of these that PyAV can encode.
        overwrite: replace a LeRobot dataset that is there already.
        chunks_size: files per folder.
        data_files_size_in_mb: about where a table ends and the next begins.
        video_files_size_in_mb: the same of a camera's videos.
    """

    def __init__(
        self,
        folder: str | Path,
        fps: float,
        cameras: list[str],
        robot_type: str | None = None,
        use_videos: bool = True,
        codec: str | None = None,
        overwrite: bool = False,
        chunks_size: int = 1000,
        data_files_size_in_mb: float = 100,
        video_files_size_in_mb: float = 200,
    ):
        if not fps > 0:
            raise ValueError(f"Expected a positive number of steps per second, got {fps}.")
        self.folder = Path(folder).expanduser().absolute()
        if self.folder.exists() and not overwrite:
            raise FileExistsError(f"{self.folder} is there already: choose another, or --overwrite it.")
        if self.folder.exists() and not (self.folder / "meta" / "info.json").exists():
            raise FileExistsError(f"{self.folder} is no LeRobot dataset (meta/info.json): remove it yourself.")
        self.fps = Fraction(fps).limit_denominator(1001)  # 30000/1001 and 7.5 are exact in mp4
        self.keys = feature_names(cameras)
        self.encoder = choose_encoder(codec) if use_videos and cameras else None
        self.info = {
            "codebase_version": "v3.0",
            "robot_type": robot_type,
            "total_episodes": 0,
            "total_frames": 0,
            "total_tasks": 0,
            "chunks_size": chunks_size,
            "data_files_size_in_mb": data_files_size_in_mb,
            "video_files_size_in_mb": video_files_size_in_mb,
            "fps": int(self.fps) if self.fps.denominator == 1 else float(self.fps),
            "splits": {},
            "data_path": f"data/{PLACE}.parquet",
            "video_path": f"videos/{{video_key}}/{PLACE}.mp4" if use_videos else None,
            "features": {},
        }
        self.tasks: dict[str, int] = {}
        self.stats: dict[str, dict[str, np.ndarray]] = {}
        self.work = self.folder.with_name(f".{self.folder.name}.incomplete")
        if self.work.exists():  # of a run that was killed
            shutil.rmtree(self.work)
        (self.work / "meta").mkdir(parents=True)
        self._data = _Tables(self.work / "data", data_files_size_in_mb, chunks_size)
        self._episodes = _Tables(self.work / "meta" / "episodes", data_files_size_in_mb, chunks_size)
        self._rows: list[dict] = []  # of episodes, not yet written
        sizes = (self.fps, video_files_size_in_mb, chunks_size)
        self._videos = {key: _Videos(self.work / "videos" / key, *sizes) for key in self.keys.values()}

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()

    def add_episode(self, episode: Episode) -> None:
        """Writes one episode; a ValueError says what is wrong with it, and leaves the dataset as it was."""
        features = self._features_of(episode)
        pixels = {key: np.zeros((3, 256), np.int64) for key in self.keys.values()}
        images, videos, row = {}, {}, {"episode_index": self.info["total_episodes"]}
        with tempfile.TemporaryDirectory(dir=self.work) as temporary:
            # 1. All that can fail, beside the dataset
            for camera, key in self.keys.items():
                frames = self._frames(episode, camera, features[key]["shape"], pixels[key])
                if self.encoder:
                    videos[key] = Path(temporary) / f"{key}.mp4"
                    encode_video(videos[key], frames, features[key]["shape"], self.fps, self.encoder)
                else:
                    images[key] = [_png(frame, step) for step, frame in enumerate(frames)]
            # 2. Into the tables and videos
            self.info["features"] = features
            columns = self._columns(episode)
            row |= {"tasks": list(dict.fromkeys(episode.instructions)), "length": len(episode)}
            row |= _prefixed("data", self._data.make_room(len(episode)))
            first = self.info["total_frames"]
            row |= {"dataset_from_index": first, "dataset_to_index": first + len(episode)}
            self._data.write(_table(features, columns | images))
            for key, video in videos.items():
                row |= _prefixed(f"videos/{key}", self._videos[key].append(video, len(episode)))
        # 3. Into the statistics
        stats = {key: describe(values.reshape(len(episode), -1)) for key, values in columns.items()}
        stats |= {key: describe_pixels(histogram, len(episode)) for key, histogram in pixels.items()}
        for key in features:
            self.stats[key] = merge(self.stats[key], stats[key]) if key in self.stats else stats[key]
            row |= _prefixed(f"stats/{key}", {name: value.tolist() for name, value in stats[key].items()})
        self._rows.append(row)
        self.info["total_episodes"] += 1
        self.info["total_frames"] += len(episode)
        if len(self._rows) == 100:
            self._write_rows()

    def finish(self) -> Path:
        """Writes what describes the whole and gives the dataset its name; returns its folder."""
        if not self.info["total_episodes"]:
            self.abort()
            raise ValueError(f"There is not one good episode to write to {self.folder}.")
        self._write_rows()
        self._close()
        self.info |= {"total_tasks": len(self.tasks), "splits": {"train": f"0:{self.info['total_episodes']}"}}
        _write_tasks(self.work / "meta" / "tasks.parquet", self.tasks)
        stats = {key: {name: value.tolist() for name, value in self.stats[key].items()} for key in self.stats}
        for name, content in (("info", self.info), ("stats", stats)):
            (self.work / "meta" / f"{name}.json").write_text(json.dumps(content, indent=4, ensure_ascii=False))
        old = self.folder.with_name(f".{self.folder.name}.old")
        if self.folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.folder, old)
        os.replace(self.work, self.folder)
        shutil.rmtree(old, ignore_errors=True)
        return self.folder

    def abort(self) -> None:
        """Leaves nothing behind."""
        self._close()
        shutil.rmtree(self.work, ignore_errors=True)

    def _close(self) -> None:
        for file in (self._data, self._episodes, *self._videos.values()):
            file.close()

    def _features_of(self, episode: Episode) -> dict[str, dict]:
        """`info["features"]`; raises ValueError if the episode is bad or unlike those before."""
        known = self.info["features"]
        check_episode(episode, known["action"]["shape"][0] if known else None)
        features = {"action": {"dtype": "float32", "shape": [episode.actions.shape[1]], "names": None}}
        if episode.proprio is not None:
            features["observation.state"] = {**features["action"], "shape": [episode.proprio.shape[1]]}
        if known:
            has, had = (which.get("observation.state", {}).get("shape") for which in (features, known))
            if has != had:
                raise ValueError(f"{episode.source}: the state's shape is {has} where earlier episodes have {had}.")
            return known
        for camera, key in self.keys.items():
            shape = list(self._frame(episode, camera, 0).shape)
            features[key] = {"dtype": "video" if self.encoder else "image", "shape": shape}
            features[key]["names"] = ["height", "width", "channels"]
            if self.encoder:
                features[key]["info"] = {
                    "video.height": shape[0],
                    "video.width": shape[1],
                    "video.codec": next(name for name, encoder in ENCODERS.items() if encoder == self.encoder),
                    "video.pix_fmt": "yuv420p",
                    "video.is_depth_map": False,
                    "video.fps": self.info["fps"],
                    "video.channels": 3,
                    "has_audio": False,
                }
        return features | INDEX_FEATURES

    def _frame(self, episode: Episode, camera: str, step: int, shape: list[int] | None = None) -> np.ndarray:
        import av

        where = f"{episode.source}, camera {camera}, step {step}"
        try:
            frame = np.ascontiguousarray(episode.image(camera, step))
        except (OSError, ValueError, LookupError, SyntaxError, av.FFmpegError) as error:  # SyntaxError: PIL, bad PNG
            raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"{where}: expected (height, width, 3) uint8, got {frame.shape} {frame.dtype}.")
        if shape and list(frame.shape) != shape:
            raise ValueError(f"{where}: a frame of {list(frame.shape)} where earlier ones have {shape}.")
        return frame

    def _frames(self, episode: Episode, camera: str, shape: list[int], counts: np.ndarray) -> Iterator[np.ndarray]:
        """A camera's frames one by one; adds to `counts` `(3, 256)` how often each channel has each value."""
        stride = max(shape) // 150 if max(shape) >= 300 else 1  # of the pixels that are counted, as lerobot
        for step in range(len(episode)):
            frame = self._frame(episode, camera, step, shape)
            for channel in range(3):
                counts[channel] += np.bincount(frame[::stride, ::stride, channel].reshape(-1), minlength=256)
            yield frame

    def _columns(self, episode: Episode) -> dict[str, np.ndarray]:
        steps = np.arange(len(episode))
        for instruction in episode.instructions:
            self.tasks.setdefault(instruction, len(self.tasks))
        columns = {"action": episode.actions.astype(np.float32)}
        if episode.proprio is not None:
            columns["observation.state"] = episode.proprio.astype(np.float32)
        columns["timestamp"] = (steps / float(self.fps)).astype(np.float32)
        columns |= {"frame_index": steps, "episode_index": np.full_like(steps, self.info["total_episodes"])}
        columns["index"] = steps + self.info["total_frames"]
        columns["task_index"] = np.array([self.tasks[instruction] for instruction in episode.instructions])
        return columns

    def _write_rows(self) -> None:
        import pyarrow

        if not self._rows:
            return
        place = _prefixed("meta/episodes", self._episodes.make_room(len(self._rows)))
        for row in self._rows:
            row |= place
        self._episodes.write(pyarrow.Table.from_pylist(self._rows))
        self._rows.clear()


def _prefixed(prefix: str, values: dict) -> dict:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _png(frame: np.ndarray, step: int) -> dict[str, bytes | str]:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"frame-{step:06d}.png"}


def _table(features: dict[str, dict], columns: dict):
    """Steps as an arrow table whose schema tells the `datasets` library what images and lists are."""
    import pyarrow

    arrays, described = {}, {}
    for key, feature in features.items():
        kind, (size, *_) = feature["dtype"], feature["shape"]
        value = {"dtype": kind, "_type": "Value"}
        if kind == "image":
            struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
            arrays[key], described[key] = pyarrow.array(columns[key], struct), {"_type": "Image"}
        elif kind != "video" and size == 1:
            arrays[key], described[key] = pyarrow.array(columns[key].reshape(-1)), value
        elif kind != "video":
            arrays[key] = pyarrow.FixedSizeListArray.from_arrays(columns[key].reshape(-1), size)
            described[key] = {"feature": value, "length": size, "_type": "List"}
    metadata = {"huggingface": json.dumps({"info": {"features": described}})}
    return pyarrow.table(arrays).replace_schema_metadata(metadata)


def _write_tasks(path: Path, tasks: dict[str, int]) -> None:
    """`tasks.parquet` as pandas writes a frame whose index is the text."""
    import pyarrow
    import pyarrow.parquet as parquet

    index = {"name": None, "field_name": "__index_level_0__", "pandas_type": "unicode", "numpy_type": "object"}
    pandas = {"index_columns": ["__index_level_0__"], "column_indexes": [], "columns": [{**index, "metadata": None}]}
    table = pyarrow.table({"task_index": list(tasks.values()), "__index_level_0__": list(tasks)})
    parquet.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)
