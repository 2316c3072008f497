"""What `openvla data convert` writes is what it read: by our own reader, by hand-computed numbers, and by lerobot."""

import json
import os
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from openvla import cli
from openvla.finetune import lerobot_writer
from openvla.finetune.lerobot_writer import LeRobotWriter, feature_names
from openvla.finetune.readers import open_reader
from openvla.finetune.steps import Episode

pytest.importorskip("av")
parquet = pytest.importorskip("pyarrow.parquet")

CAMERAS = ["front", "wrist"]
LENGTHS = [5, 3, 4]
TOLERANCE = 6  # levels of 255: mean absolute difference of a frame after video, by either codec


def picture(episode: int, camera: str, step: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """Smooth, asymmetric, different for each episode, camera and step."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    red = rows * 2 + 30 * episode
    green = columns * 2 + 60 * (camera == "wrist")
    return np.stack([red, green, np.full_like(red, 30 + 40 * step)], axis=-1).astype(np.uint8)


def make_episode(number: int, length: int | None = None, size=(48, 64), instructions=None, image=None) -> Episode:
    random = np.random.default_rng(number)
    length = length or LENGTHS[number % 3]
    actions = random.uniform(-1, 1, (length, 7)).astype(np.float32)
    states = random.normal(size=(length, 8)).astype(np.float32)
    instructions = instructions or [f"pick up cup {number}"] * length
    image = image or (lambda camera, step: picture(number, camera, step, size))
    return Episode(f"take {number}", instructions, actions, states, image)


def write(folder: Path, episodes: list[Episode], **options) -> Path:
    with LeRobotWriter(folder, **({"fps": 10, "cameras": CAMERAS} | options)) as writer:
        for episode in episodes:
            writer.add_episode(episode)
    return folder


def rows_of(folder: Path) -> list[dict]:
    """The episodes' table, all files."""
    return [row for file in sorted(folder.glob("meta/episodes/*/*")) for row in parquet.read_table(file).to_pylist()]


def files_of(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def check_same(folder: Path, episodes: list[Episode], tolerance: float) -> None:
    reader = open_reader(folder)
    assert len(reader) == len(episodes)
    for number in reversed(range(len(episodes))):
        found, expected = reader.read(number), episodes[number]
        assert found.actions.tobytes() == expected.actions.tobytes()
        assert found.proprio.tobytes() == expected.proprio.tobytes()
        assert found.instructions == expected.instructions
        for camera in CAMERAS:
            for step in reversed(range(len(expected))):
                frame = found.image(f"observation.images.{camera}", step).astype(int)
                assert np.abs(frame - expected.image(camera, step)).mean() <= tolerance, (number, camera, step)


# --- Round trips -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{"use_videos": False}, {"codec": "h264"}, {"codec": "av1"}, {"fps": 7.5}])
def test_what_is_read_is_what_was_written(options, tmp_path):
    episodes = [make_episode(number) for number in range(3)]
    episodes[1].instructions = ["open the drawer", "open the drawer", "pick up cup 0"]  # changes, and comes back
    try:
        folder = write(tmp_path / "my_robot", episodes, **options)
    except ValueError as error:
        if "encodes" in str(error):
            pytest.skip(str(error))  # this PyAV lacks the encoder
        raise
    check_same(folder, episodes, tolerance=TOLERANCE if options.get("use_videos", True) else 0)
    assert open_reader(folder).fps == options.get("fps", 10)
    assert open_reader(folder).cameras == [f"observation.images.{camera}" for camera in CAMERAS]
    assert os.listdir(tmp_path) == ["my_robot"]


def test_layout_is_lerobots(tmp_path):
    """Compared with what lerobot 0.4.4's create, add_frame, save_episode and finalize write."""
    episodes = [make_episode(0), make_episode(1), make_episode(2, length=1)]
    episodes[1].instructions = ["wipe the table", "wipe the table", "pick up cup 0"]
    folder = write(tmp_path / "my_robot", episodes, robot_type="widowx", codec="h264")
    place = "chunk-000/file-000"
    assert files_of(folder) == [
        f"data/{place}.parquet",
        f"meta/episodes/{place}.parquet",
        "meta/info.json",
        "meta/stats.json",
        "meta/tasks.parquet",
        f"videos/observation.images.front/{place}.mp4",
        f"videos/observation.images.wrist/{place}.mp4",
    ]
    info = json.loads((folder / "meta" / "info.json").read_text())
    features = info.pop("features")
    assert info == {
        "codebase_version": "v3.0",
        "robot_type": "widowx",
        "total_episodes": 3,
        "total_frames": 9,
        "total_tasks": 3,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": 10,
        "splits": {"train": "0:3"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    indices = ["timestamp", "frame_index", "episode_index", "index", "task_index"]
    cameras = [f"observation.images.{camera}" for camera in CAMERAS]
    assert list(features) == ["action", "observation.state", *cameras, *indices]
    assert features["action"] == {"dtype": "float32", "shape": [7], "names": None}
    assert features["timestamp"] == {"dtype": "float32", "shape": [1], "names": None}
    assert features[cameras[1]] == {
        "dtype": "video",
        "shape": [48, 64, 3],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": 48,
            "video.width": 64,
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": 10,
            "video.channels": 3,
            "has_audio": False,
        },
    }
    table = parquet.read_table(folder / f"data/{place}.parquet")
    assert [str(field.type) for field in table.schema] == [
        "fixed_size_list<element: float>[7]",
        "fixed_size_list<element: float>[8]",
        "float",
        *["int64"] * 4,
    ]
    assert table.column_names == ["action", "observation.state", *indices]
    assert table["index"].to_pylist() == list(range(9))
    assert table["frame_index"].to_pylist() == [0, 1, 2, 3, 4, 0, 1, 2, 0]
    assert table["episode_index"].to_pylist() == [0] * 5 + [1] * 3 + [2]
    assert table["task_index"].to_pylist() == [0] * 5 + [1, 1, 0] + [2]
    np.testing.assert_array_equal(table["timestamp"].to_numpy()[:5], np.float32([0.0, 0.1, 0.2, 0.3, 0.4]))
    described = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert described["action"] == {"feature": {"dtype": "float32", "_type": "Value"}, "length": 7, "_type": "List"}
    assert described["index"] == {"dtype": "int64", "_type": "Value"}
    tasks = parquet.read_table(folder / "meta" / "tasks.parquet")
    assert tasks.to_pydict() == {
        "task_index": [0, 1, 2],
        "__index_level_0__": ["pick up cup 0", "wipe the table", "pick up cup 2"],
    }
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["__index_level_0__"]
    rows = rows_of(folder)
    assert [row["tasks"] for row in rows][1:] == [["wipe the table", "pick up cup 0"], ["pick up cup 2"]]
    names = [name for name in rows[0] if not name.startswith("stats/")]
    of_videos = [
        f"videos/{camera}/{name}"
        for camera in cameras
        for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    ]
    assert names == [
        "episode_index",
        "tasks",
        "length",
        "data/chunk_index",
        "data/file_index",
        "dataset_from_index",
        "dataset_to_index",
        *of_videos,
        "meta/episodes/chunk_index",
        "meta/episodes/file_index",
    ]
    statistics = ["min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"]
    stats = [name.removeprefix("stats/") for name in rows[0] if name.startswith("stats/")]
    assert stats == [f"{feature}/{statistic}" for feature in features for statistic in statistics]
    spans = [(row["dataset_from_index"], row["dataset_to_index"], row["length"]) for row in rows]
    assert spans == [(0, 5, 5), (5, 8, 3), (8, 9, 1)]
    spans = [[row[f"videos/{cameras[0]}/{end}_timestamp"] for end in ("from", "to")] for row in rows]
    np.testing.assert_allclose(spans, [[0, 0.5], [0.5, 0.8], [0.8, 0.9]])


def test_images_are_structs_that_datasets_understands(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = write(tmp_path / "my_robot", [make_episode(0)], use_videos=False)
    assert not (folder / "videos").exists()
    info = json.loads((folder / "meta" / "info.json").read_text())
    assert info["video_path"] is None
    assert info["features"]["observation.images.front"] == {
        "dtype": "image",
        "shape": [48, 64, 3],
        "names": ["height", "width", "channels"],
    }
    file = folder / "data/chunk-000/file-000.parquet"
    first = parquet.read_table(file)["observation.images.wrist"][4].as_py()
    assert first["path"] == "frame-000004.png" and first["bytes"].startswith(b"\x89PNG")
    dataset = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    assert dataset.features["observation.images.wrist"] == datasets.Image()
    np.testing.assert_array_equal(np.asarray(dataset[4]["observation.images.wrist"]), picture(0, "wrist", 4))


def test_statistics_by_hand(tmp_path):
    """Two episodes of one action dim and flat pictures: every number below was computed on paper."""
    levels = {0: [0, 51, 102, 153], 1: [255, 255]}
    episodes = []
    for number, values in enumerate(([1.0, 2.0, 3.0, 4.0], [10.0, 20.0])):
        actions = np.array([[value, -value] for value in values], np.float32)
        frames = [np.full((16, 16, 3), [level, 0, 255], np.uint8) for level in levels[number]]
        image = lambda camera, step, frames=frames: frames[step]  # noqa: E731
        episodes.append(Episode(f"take {number}", ["go"] * len(values), actions, None, image))
    folder = write(tmp_path / "my_robot", episodes, cameras=["front"], use_videos=False)
    first, second = rows_of(folder)
    assert "stats/observation.state/min" not in first
    by_hand = {"min": [1, -4], "max": [4, -1], "mean": [2.5, -2.5], "std": [1.25**0.5] * 2, "count": [4]}
    by_hand |= {"q01": [1, -4], "q10": [1, -4], "q50": [2, -3], "q90": [4, -1], "q99": [4, -1]}
    for name, value in by_hand.items():
        np.testing.assert_allclose(first[f"stats/action/{name}"], value, err_msg=name)
    assert second["stats/action/std"] == [5, 5] and second["stats/action/q50"] == [10, -20]
    red = {name: first[f"stats/observation.images.front/{name}"][0] for name in by_hand}
    by_hand = {"min": 0, "max": 0.6, "mean": 0.3, "std": 0.05**0.5, "q10": 0, "q50": 0.2, "q90": 0.6}
    for name, value in by_hand.items():
        np.testing.assert_allclose(red[name], [[value]], err_msg=name)
    stats = json.loads((folder / "meta" / "stats.json").read_text())
    everything = np.array([1, 2, 3, 4, 10, 20])
    by_hand = {"min": 1, "max": 20, "mean": 40 / 6, "std": everything.std(), "count": 6}
    by_hand |= {"q50": (4 * 2 + 2 * 10) / 6, "q99": (4 * 4 + 2 * 20) / 6}  # weighted means, as lerobot
    for name, value in by_hand.items():
        np.testing.assert_allclose(stats["action"][name][0], value, err_msg=name)
    pixels = np.array([0, 0.2, 0.4, 0.6, 1, 1])
    expected = {"mean": [pixels.mean(), 0, 1], "std": [pixels.std(), 0, 0], "min": [0, 0, 1], "max": [1, 0, 1]}
    for name, value in expected.items():
        found = np.array(stats["observation.images.front"][name])
        assert found.shape == (3, 1, 1)
        np.testing.assert_allclose(found[:, 0, 0], value, atol=1e-12, err_msg=name)
    assert stats["observation.images.front"]["count"] == [6]
    assert stats["frame_index"]["max"] == [3] and stats["index"]["max"] == [5] and stats["task_index"]["std"] == [0]


def test_one_action_dim_and_no_camera(tmp_path):
    """lerobot stores features of size 1 as plain numbers."""
    actions, states = np.float32([[0.1], [0.2], [0.3]]), np.float32([[1], [2], [3]])
    folder = write(tmp_path / "my_robot", [Episode("take 0", ["go"] * 3, actions, states, None)] * 2, cameras=[])
    assert str(parquet.read_table(folder / "data/chunk-000/file-000.parquet")["action"].type) == "float"
    reader = open_reader(folder)
    assert reader.cameras == [] and len(reader) == 2
    np.testing.assert_array_equal(reader.read(1).actions, actions)
    np.testing.assert_array_equal(reader.read(1).proprio, states)


# --- Files -----------------------------------------------------------------------------------------------------------
def test_files_end_at_their_size_and_folders_at_their_number(tmp_path):
    episodes = [make_episode(number, length=4) for number in range(7)]
    limits = {"data_files_size_in_mb": 0.003, "video_files_size_in_mb": 0.004, "chunks_size": 2, "codec": "h264"}
    folder = write(tmp_path / "my_robot", episodes, **limits)
    check_same(folder, episodes, TOLERANCE)
    rows = rows_of(folder)
    camera = "videos/observation.images.front"
    for what in ("data", camera):
        places = [(row[f"{what}/chunk_index"], row[f"{what}/file_index"]) for row in rows]
        assert places == sorted(places) and places[0] == (0, 0)
        number = len(set(places))
        assert 3 <= number < len(episodes), "several files, and one of them with several episodes"
        assert sorted(set(places)) == [divmod(index, 2) for index in range(number)]
    for file in folder.glob("videos/*/*/*.mp4"):
        assert file.stat().st_size < 1.5 * 0.004 * 1024**2
    for before, row in zip(rows, rows[1:]):
        places = [[which[f"{camera}/{index}"] for index in ("chunk_index", "file_index")] for which in (before, row)]
        expected = before[f"{camera}/to_timestamp"] if places[0] == places[1] else 0
        assert row[f"{camera}/from_timestamp"] == pytest.approx(expected)
    assert [row["dataset_from_index"] for row in rows] == list(range(0, 28, 4))


def test_every_episode_starts_with_a_keyframe_and_every_second_frame_is_one(tmp_path):
    import av

    folder = write(tmp_path / "my_robot", [make_episode(number) for number in range(3)])
    with av.open(str(next(folder.glob("videos/*front/*/*.mp4")))) as video:
        frames = list(video.decode(video=0))
        assert video.streams.video[0].average_rate == 10
    np.testing.assert_allclose([frame.time for frame in frames], np.arange(12) / 10, atol=1e-9)
    keys = [frame.key_frame for frame in frames]
    assert keys == [step % 2 == 0 for length in LENGTHS for step in range(length)]


def test_many_episodes_are_many_rows(tmp_path):
    """More than are held back before they are written."""
    episodes = [make_episode(0, length=1, size=(16, 16), instructions=[f"task {n}"]) for n in range(230)]
    folder = write(tmp_path / "my_robot", episodes, use_videos=False, cameras=["front"])
    assert parquet.ParquetFile(folder / "meta/episodes/chunk-000/file-000.parquet").num_row_groups == 3
    rows = rows_of(folder)
    assert [row["episode_index"] for row in rows] == list(range(230))
    assert [row["tasks"] for row in rows] == [[f"task {n}"] for n in range(230)]


def test_feature_names():
    names = feature_names(["observation/front", "steps/wrist", "observation.images.top", "observation.image", "rgb"])
    assert [name.removeprefix("observation.images.") for name in names.values()] == [
        "front",
        "wrist",
        "top",
        "image",
        "rgb",
    ]
    assert list(feature_names(["left/rgb", "right/rgb"]).values()) == [
        "observation.images.left_rgb",
        "observation.images.right_rgb",
    ]


# --- Refusals --------------------------------------------------------------------------------------------------------
def broken_at(step: int):
    def image(camera: str, index: int) -> np.ndarray:
        if camera == "wrist" and index == step:
            raise OSError("image file is truncated")
        return picture(1, camera, index)

    return image


def nan_action() -> Episode:
    episode = make_episode(1)
    episode.actions[2, 3] = np.nan
    return episode


def no_state() -> Episode:
    episode = make_episode(1)
    episode.proprio = None
    return episode


BAD = {
    "take 1: action is nan at step 2, dim 3": nan_action,
    r"take 1: the state's shape is None where earlier episodes have \[8\]": no_state,
    "take 1, camera wrist, step 2: OSError: image file is truncated": lambda: make_episode(1, image=broken_at(2)),
    r"take 1, camera front, step 0: a frame of \[32, 32, 3\] where earlier ones have \[48, 64, 3\]": (
        lambda: make_episode(1, size=(32, 32))
    ),
    r"take 1, camera front, step 0: expected \(height, width, 3\) uint8, got \(48, 64\) float64": (
        lambda: make_episode(1, image=lambda camera, step: np.zeros((48, 64)))
    ),
    "take 1: empty instruction at step 0": lambda: make_episode(1, instructions=[" "] * 3),
}


@pytest.mark.parametrize("use_videos", [True, False])
@pytest.mark.parametrize("message", BAD)
def test_a_bad_episode_leaves_no_trace(message, use_videos, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "my_robot", [make_episode(0), BAD[message]()], use_videos=use_videos)
    assert os.listdir(tmp_path) == [], "neither the dataset nor what it was written to"
    with LeRobotWriter(tmp_path / "my_robot", 10, CAMERAS, use_videos=use_videos) as writer:
        writer.add_episode(make_episode(0))
        with pytest.raises(ValueError, match=message):
            writer.add_episode(BAD[message]())
        writer.add_episode(make_episode(2))
    check_same(tmp_path / "my_robot", [make_episode(0), make_episode(2)], TOLERANCE if use_videos else 0)
    rows = rows_of(tmp_path / "my_robot")
    assert [(row["episode_index"], row["dataset_from_index"]) for row in rows] == [(0, 0), (1, 5)]
    assert json.loads((tmp_path / "my_robot/meta/info.json").read_text())["total_tasks"] == 2
    assert all(name.startswith(("data/", "meta/", "videos/")) for name in files_of(tmp_path / "my_robot"))


def test_nothing_appears_before_the_end(tmp_path):
    writer = LeRobotWriter(tmp_path / "my_robot", 10, CAMERAS)
    writer.add_episode(make_episode(0))
    assert os.listdir(tmp_path) == [".my_robot.incomplete"]  # what a killed run leaves; the next one removes it
    write(tmp_path / "my_robot", [make_episode(0)])
    assert os.listdir(tmp_path) == ["my_robot"]
    with pytest.raises(ValueError, match="not one good episode"):
        write(tmp_path / "other", [])
    assert os.listdir(tmp_path) == ["my_robot"]


def test_what_is_there_is_not_overwritten_by_mistake(tmp_path):
    folder = write(tmp_path / "my_robot", [make_episode(0)])
    with pytest.raises(FileExistsError, match="my_robot is there already.*--overwrite"):
        write(folder, [make_episode(1)])
    with pytest.raises(ValueError, match="action is nan"):
        write(folder, [nan_action()], overwrite=True)
    check_same(folder, [make_episode(0)], TOLERANCE)
    write(folder, [make_episode(1)], overwrite=True, use_videos=False)
    check_same(folder, [make_episode(1)], 0)
    (tmp_path / "thesis").mkdir()
    with pytest.raises(FileExistsError, match="thesis is no LeRobot dataset"):
        write(tmp_path / "thesis", [make_episode(0)], overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["my_robot", "thesis"]


def test_sizes_and_codecs(tmp_path, monkeypatch):
    odd = [make_episode(0, size=(33, 47))]
    with pytest.raises(RuntimeError, match="libx264 cannot encode frames of 47x33.*even sizes.*--images"):
        write(tmp_path / "my_robot", odd, codec="h264")
    check_same(write(tmp_path / "images", odd, use_videos=False), odd, 0)
    monkeypatch.setattr(lerobot_writer, "ENCODERS", {"av1": "no_such_encoder", "h264": "libx264"})
    with pytest.raises(ValueError, match=r"encodes \['h264'\], not av1: --images"):
        write(tmp_path / "my_robot", odd, codec="av1")
    assert LeRobotWriter(tmp_path / "my_robot", 10, CAMERAS).encoder == "libx264"
    with pytest.raises(ValueError, match="positive number of steps per second, got 0"):
        write(tmp_path / "my_robot", odd, fps=0)


# --- The command -----------------------------------------------------------------------------------------------------
def write_source(folder: Path, fps: float | None = 10) -> Path:
    """A plain folder of three episodes."""
    from PIL import Image

    for number, length in enumerate(LENGTHS):
        episode, place = make_episode(number), folder / f"episode_{number:03d}"
        for camera in CAMERAS:
            (place / camera).mkdir(parents=True)
            for step in range(length):
                Image.fromarray(episode.image(camera, step)).save(place / camera / f"{step:03d}.png")
        (place / "episode.json").write_text(json.dumps({"instruction": episode.instructions[0], "fps": fps}))
        np.savez(place / "episode.npz", actions=episode.actions, proprio=episode.proprio)
    return folder


def test_command(tmp_path, capsys):
    source, out = write_source(tmp_path / "source"), tmp_path / "cups"
    cli.main(["data", "convert", str(source), str(out), "--images"])
    check_same(out, [make_episode(number) for number in range(3)], 0)
    printed = capsys.readouterr().out
    assert "3 episodes, 12 steps at 10 per second, 3 instructions" in printed
    assert "observation.images.wrist" in printed and "times less than raw pixels (png)" in printed
    assert f"openvla finetune --data {out} " in printed and "standardised" not in printed
    assert open_reader(out).name == "cups" and open_reader(out).fps == 10
    options = ["--overwrite", "--cameras", "wrist", "--episodes", "2", "--fps", "5", "--codec", "h264"]
    cli.main(["data", "convert", str(source), str(out), *options])
    reader = open_reader(out)
    assert reader.cameras == ["observation.images.wrist"] and len(reader) == 2 and reader.fps == 5
    again = tmp_path / "again"
    cli.main(["data", "convert", str(out), str(again), "--images"])
    assert open_reader(again).cameras == reader.cameras, "no observation.images.observation.images"


def test_command_skips_and_counts(tmp_path, capsys):
    source = write_source(tmp_path / "source")
    np.savez(source / "episode_001" / "episode.npz", actions=nan_action().actions)
    with pytest.raises(SystemExit, match="episode_001: action is nan.*--skip-bad-episodes"):
        cli.main(["data", "convert", str(source), str(tmp_path / "cups")])
    assert os.listdir(tmp_path) == ["source"]
    cli.main(["data", "convert", str(source), str(tmp_path / "cups"), "--skip-bad-episodes"])
    check_same(tmp_path / "cups", [make_episode(0), make_episode(2)], TOLERANCE)
    printed = capsys.readouterr().out
    assert "skipped: " in printed and "episode_001: action is nan" in printed and "1 of 3 episodes" in printed


def test_command_refuses(tmp_path):
    source, out = write_source(tmp_path / "source", fps=None), str(tmp_path / "cups")
    with pytest.raises(SystemExit, match="does not say how many steps there are per second: pass --fps"):
        cli.main(["data", "convert", str(source), out])
    with pytest.raises(SystemExit, match=r"source has no cameras \['top'\]; it has \['front', 'wrist'\]"):
        cli.main(["data", "convert", str(source), out, "--fps", "10", "--cameras", "top"])
    for place in (source, tmp_path):
        with pytest.raises(SystemExit, match="would remove the source"):
            cli.main(["data", "convert", str(source), str(place), "--fps", "10", "--overwrite"])
    assert os.listdir(tmp_path) == ["source"]


# --- By lerobot itself -----------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"codec": "h264"}, {"use_videos": False}, {"fps": 7.5}, {"size": (33, 47)}])
def test_lerobot_reads_it(options, tmp_path):
    if not (python := os.environ.get("OPENVLA_LEROBOT_PYTHON")):
        pytest.skip("OPENVLA_LEROBOT_PYTHON does not name the python of an environment with lerobot 0.4.4")
    options = dict(options)
    size = options.pop("size", (48, 64))
    episodes = [make_episode(number, size=size) for number in range(6)]
    episodes[1].instructions = ["open the drawer", "open the drawer", "pick up cup 0"]
    limits = {"data_files_size_in_mb": 0.003, "video_files_size_in_mb": 0.004, "chunks_size": 2}
    folder = write(tmp_path / "my_robot", episodes, **limits, **options)
    expected = {
        "actions": np.concatenate([episode.actions for episode in episodes]),
        "states": np.concatenate([episode.proprio for episode in episodes]),
        "tasks": np.array([task for episode in episodes for task in episode.instructions]),
        "episodes": np.repeat(np.arange(6), [len(episode) for episode in episodes]),
    }
    for camera, key in feature_names(CAMERAS).items():
        expected[key] = np.stack([episode.image(camera, step) for episode in episodes for step in range(len(episode))])
    np.savez(tmp_path / "expected.npz", **expected)
    command = [python, str(Path(__file__).with_name("lerobot_reads_it.py")), str(folder), tmp_path / "expected.npz"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    worst = json.loads(result.stdout.splitlines()[-1])
    assert max(worst.values()) <= (TOLERANCE if options.get("use_videos", True) else 0)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="libsvtav1 changes priorities of root alone")
@pytest.mark.parametrize("encoder", ["libsvtav1", "libx264"])
def test_videos_change_no_priority(encoder, tmp_path):
    """While a video is written and afterwards, no thread has real-time priority, which children would inherit."""
    before, seen = os.sched_getscheduler(0), set()

    def frames():
        for _ in range(5):
            yield np.zeros((64, 64, 3), dtype=np.uint8)
            seen.update(os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task"))

    lerobot_writer.encode_video(tmp_path / "video.mp4", frames(), [64, 64], Fraction(5), encoder)
    assert seen == {before} == {os.sched_getscheduler(0)} and before != os.SCHED_FIFO
