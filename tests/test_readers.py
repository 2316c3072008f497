"""All formats, written here the way their own tools write them, give the same episodes."""

import io
import json
import multiprocessing
import struct

import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from openvla import cli
from openvla.finetune import statistics
from openvla.finetune.readers import open_reader
from openvla.finetune.readers.rlds import masked_crc32c
from openvla.finetune.steps import StepDataset

INSTRUCTIONS = ["pick up the cup", "open the drawer"]
LENGTHS = [5, 3]


def actions(episode: int) -> np.ndarray:
    """Seven dims in [-1, 1], the last 0 or 1."""
    values = np.random.default_rng(episode).uniform(-1, 1, (LENGTHS[episode], 7)).astype(np.float32)
    values[:, 6] = np.arange(LENGTHS[episode]) % 2
    return values


def states(episode: int) -> np.ndarray:
    return np.random.default_rng(10 + episode).normal(size=(LENGTHS[episode], 8)).astype(np.float32)


def picture(episode: int, camera: int, step: int) -> np.ndarray:
    """A flat colour that tells episode, camera and step apart, also through JPEG and video."""
    return np.full((32, 48, 3), [40 + 80 * episode, 60 + 90 * camera, 30 + 40 * step], dtype=np.uint8)


def encoded(image: np.ndarray, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format)
    return file.getvalue()


# --- Writers ---------------------------------------------------------------------------------------------------------
def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(values) -> bytes:
    """A `tf.train.Feature`: list of bytes, floats or integers."""
    if isinstance(values, list):
        return field(1, b"".join(field(1, value) for value in values))
    if values.dtype.kind == "f":
        return field(2, field(1, values.astype("<f4").tobytes()))
    return field(3, field(1, b"".join(varint(int(value) & (1 << 64) - 1) for value in values.reshape(-1))))


def record(example: dict) -> bytes:
    entries = [field(1, field(1, key.encode()) + field(2, feature(values))) for key, values in example.items()]
    data = field(1, b"".join(entries))
    size = struct.pack("<Q", len(data))
    return size + struct.pack("<I", masked_crc32c(size)) + data + struct.pack("<I", masked_crc32c(data))


def tensor(shape: list[int], dtype: str = "float32") -> dict:
    return {"tensor": {"shape": {"dimensions": [str(size) for size in shape]}, "dtype": dtype, "encoding": "none"}}


def write_rlds(folder, name: str = "my_robot", cameras=("front", "wrist")):
    folder.mkdir(parents=True)
    observation = {camera: {"image": {"encodingFormat": "png"}} for camera in cameras} | {"state": tensor([8])}
    steps = {"action": tensor([7]), "language_instruction": {"text": {}}, "is_last": tensor([], "bool")}
    steps["observation"] = {"featuresDict": {"features": observation}}
    spec = {"steps": {"sequence": {"feature": {"featuresDict": {"features": steps}}}}}
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": spec}}))
    (folder / "dataset_info.json").write_text(json.dumps({"name": name, "version": "1.0.0"}))
    records = b""
    for episode, length in enumerate(LENGTHS):
        example = {
            "steps/action": actions(episode).reshape(-1),
            "steps/observation/state": states(episode).reshape(-1),
            "steps/language_instruction": [INSTRUCTIONS[episode].encode()] * length,
            "steps/is_last": np.arange(length) == length - 1,
        }
        for number, camera in enumerate(cameras):
            frames = [encoded(picture(episode, number, step)) for step in range(length)]
            example[f"steps/observation/{camera}"] = frames
        records += record(example)
    (folder / f"{name}-train.tfrecord-00000-of-00001").write_bytes(records)
    return folder


def write_hdf5(folder):
    h5py = pytest.importorskip("h5py")
    folder.mkdir()
    for episode in range(2):
        with h5py.File(folder / f"{episode}_demo.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs["problem_info"] = json.dumps({"language_instruction": f'"{INSTRUCTIONS[episode]}"'})
            demo = data.create_group("demo_0")
            demo["actions"] = actions(episode).astype(np.float64)
            demo["obs/ee_states"] = states(episode)[:, :6]
            demo["obs/gripper_states"] = states(episode)[:, 6:]
            for number, camera in enumerate(("agentview_rgb", "eye_in_hand_rgb")):
                frames = [picture(episode, number, step) for step in range(LENGTHS[episode])]
                demo[f"obs/{camera}"] = np.stack(frames)
    return folder


def write_folder(folder):
    for episode in range(2):
        place = folder / f"episode_{episode:03d}"
        for number, camera in enumerate(("front", "wrist")):
            (place / camera).mkdir(parents=True)
            for step in range(LENGTHS[episode]):
                (place / camera / f"{step:03d}.png").write_bytes(encoded(picture(episode, number, step)))
        (place / "episode.json").write_text(json.dumps({"instruction": INSTRUCTIONS[episode], "fps": 10}))
        np.savez(place / "episode.npz", actions=actions(episode), proprio=states(episode))
    return folder


def write_lerobot(folder, version: str, video: bool = True):
    """v2.1 with a file per episode, or v3.0 with all in one, as lerobot lays them out."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    fps, cameras, is_v3 = 10, ("observation.images.front", "observation.images.wrist"), version.startswith("v3")
    kind = "video" if video else "image"
    features = {"action": {"dtype": "float32", "shape": [7]}, "observation.state": {"dtype": "float32", "shape": [8]}}
    features |= {camera: {"dtype": kind, "shape": [32, 48, 3]} for camera in cameras}
    info = {"codebase_version": version, "fps": fps, "features": features, "chunks_size": 1000}
    place = "chunk-{chunk_index:03d}/file-{file_index:03d}" if is_v3 else None
    v2_place = "chunk-{episode_chunk:03d}"
    info["data_path"] = f"data/{place}.parquet" if is_v3 else f"data/{v2_place}/episode_{{episode_index:06d}}.parquet"
    info["video_path"] = (
        f"videos/{{video_key}}/{place}.mp4"
        if is_v3
        else f"videos/{v2_place}/{{video_key}}/episode_{{episode_index:06d}}.mp4"
    )
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    tables, rows = [], []
    for episode, length in enumerate(LENGTHS):
        columns = {
            "action": actions(episode).tolist(),
            "observation.state": states(episode).tolist(),
            "timestamp": [step / fps for step in range(length)],
            "episode_index": [episode] * length,
            "task_index": [episode] * length,
        }
        if not video:
            for number, camera in enumerate(cameras):
                frames = [{"bytes": encoded(picture(episode, number, s)), "path": None} for s in range(length)]
                columns[camera] = frames
        tables.append(arrow.table(columns))
        row = {"episode_index": episode, "tasks": [INSTRUCTIONS[episode]], "length": length}
        row |= {"data/chunk_index": 0, "data/file_index": 0}
        for camera in cameras:
            row |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": 0}
            row[f"videos/{camera}/from_timestamp"] = sum(LENGTHS[:episode]) / fps
        rows.append(row)

    def video_file(path, camera: int, episodes):
        av = pytest.importorskip("av")
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": "1", "g": "2"})
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for episode in episodes:
                for step in range(LENGTHS[episode]):
                    frame = av.VideoFrame.from_ndarray(picture(episode, camera, step), format="rgb24")
                    container.mux(stream.encode(frame))
            container.mux(stream.encode())

    if is_v3:
        (folder / "data" / "chunk-000").mkdir(parents=True)
        parquet.write_table(arrow.concat_tables(tables), folder / "data" / "chunk-000" / "file-000.parquet")
        (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
        table = arrow.Table.from_pylist(rows)
        parquet.write_table(table, folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
        tasks = arrow.table({"task_index": [0, 1], "__index_level_0__": INSTRUCTIONS})
        parquet.write_table(tasks, folder / "meta" / "tasks.parquet")
    else:
        (folder / "data" / "chunk-000").mkdir(parents=True)
        for episode, table in enumerate(tables):
            parquet.write_table(table, folder / "data" / "chunk-000" / f"episode_{episode:06d}.parquet")
        lines = [json.dumps({"task_index": index, "task": task}) for index, task in enumerate(INSTRUCTIONS)]
        (folder / "meta" / "tasks.jsonl").write_text("\n".join(lines))
        (folder / "meta" / "episodes.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for number, camera in enumerate(cameras if video else ()):
        if is_v3:
            video_file(folder / f"videos/{camera}/chunk-000/file-000.mp4", number, range(2))
        else:
            for episode in range(2):
                path = folder / f"videos/chunk-000/{camera}/episode_{episode:06d}.mp4"
                video_file(path, number, [episode])
    return folder


WRITERS = {
    "rlds": write_rlds,
    "hdf5": write_hdf5,
    "folder": write_folder,
    "lerobot v2.1": lambda folder: write_lerobot(folder, "v2.1"),
    "lerobot v3.0": lambda folder: write_lerobot(folder, "v3.0"),
    "lerobot v3.0 images": lambda folder: write_lerobot(folder, "v3.0", video=False),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "CACHE", tmp_path / "cache")


# --- All formats -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("format", WRITERS)
def test_every_format_gives_the_same_episodes(format, tmp_path):
    reader = open_reader(WRITERS[format](tmp_path / "my_robot"))
    assert reader.name == "my_robot" and len(reader) == 2 and len(reader.cameras) == 2
    for number in (1, 0):
        episode = reader.read(number)
        np.testing.assert_array_equal(episode.actions, actions(number))
        np.testing.assert_array_equal(episode.proprio, states(number))
        assert episode.actions.dtype == np.float32
        assert episode.instructions == [INSTRUCTIONS[number]] * LENGTHS[number]
        for camera, name in enumerate(reader.cameras):
            for step in (LENGTHS[number] - 1, 0, 1):
                image = episode.image(name, step)
                assert image.dtype == np.uint8 and image.shape == (32, 48, 3)
                tolerance = 4 if "video" in format or format in ("lerobot v2.1", "lerobot v3.0") else 0
                assert np.abs(image.astype(int) - picture(number, camera, step)).max() <= tolerance


@pytest.mark.parametrize("format", WRITERS)
def test_scan_and_steps(format, tmp_path):
    reader = open_reader(WRITERS[format](tmp_path / "my_robot"))
    found = statistics.scan(reader, progress=False)
    assert found.lengths == LENGTHS and found.norm_stats["num_transitions"] == 8
    everything = np.concatenate([actions(0), actions(1)]).astype(np.float64)
    for name, expected in {
        "q01": np.quantile(everything, 0.01, axis=0),
        "q99": np.quantile(everything, 0.99, axis=0),
        "mean": everything.mean(axis=0),
        "std": everything.std(axis=0),
        "min": everything.min(axis=0),
        "max": everything.max(axis=0),
    }.items():
        np.testing.assert_allclose(found.norm_stats["action"][name], expected, rtol=1e-6)
    assert found.norm_stats["action"]["mask"] == [True] * 6 + [False]
    assert statistics.scan(reader, progress=False) == found  # from the cache
    steps = StepDataset(reader, found.lengths, cameras=reader.cameras, chunk=3)
    step = steps[6]  # episode 1, time 1 of 3
    np.testing.assert_array_equal(step.actions, actions(1)[[1, 2, 2]])
    assert step.is_pad.tolist() == [False, False, True] and step.instruction == INSTRUCTIONS[1]
    assert len(step.images) == 2 and [steps.locate(index) for index in (0, 4, 5, 7)] == [
        (0, 0),
        (0, 4),
        (1, 0),
        (1, 2),
    ]
    assert len(StepDataset(reader, found.lengths, episodes=[1])) == 3
    with pytest.raises(IndexError):
        steps[8]
    with pytest.raises(ValueError, match=r"has no cameras \['top'\]"):
        StepDataset(reader, found.lengths, cameras=["top"])


def test_stats_command(tmp_path, capsys):
    folder = write_folder(tmp_path / "my_robot")
    cli.main(["stats", str(folder), "--json"])
    stats = json.loads(capsys.readouterr().out)["my_robot"]
    assert stats["num_trajectories"] == 2 and stats["action"]["mask"] == [True] * 6 + [False]
    cli.main(["stats", str(folder), "--mask", "1", "1", "1", "0", "1", "1", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("my_robot: 2 episodes, 8 steps")
    assert [line.split()[-1] for line in lines[3:]] == ["yes", "yes", "yes", "no", "yes", "yes", "no"]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_mapped_images_are_the_same(version, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    reader = open_reader(write_lerobot(tmp_path / "my_robot", version, video=False))
    episodes = [reader.read(number) for number in range(2)]
    before = [episodes[0].image(camera, 2) for camera in reader.cameras] + [episodes[1].image(reader.cameras[0], 1)]
    reader.map_images()
    for camera, name in enumerate(reader.cameras):
        for number in (1, 0):
            for step in range(LENGTHS[number]):
                expected = picture(number, camera, step)
                np.testing.assert_array_equal(reader.read(number).image(name, step), expected)
    after = [episodes[0].image(camera, 2) for camera in reader.cameras] + [episodes[1].image(reader.cameras[0], 1)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after))
    opened = open_reader(write_lerobot(tmp_path / "video", version))
    opened.map_images()
    assert opened.read(0).image(opened.cameras[0], 0).shape == (32, 48, 3)  # videos stay as they are


def test_datasets_of_the_hub(tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "datasets--lab--robot"
    for revision, commit in (("main", "a" * 40), ("v3.0", "b" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    write_lerobot(repository / "snapshots" / ("a" * 40), "v2.1")
    write_lerobot(repository / "snapshots" / ("b" * 40), "v3.0")
    write_folder(repository / "snapshots" / ("a" * 40) / "parts" / "cup")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    opened = [open_reader(source) for source in ("lab/robot", "lab/robot@v3.0", "lab/robot/parts/cup")]
    assert [reader.name for reader in opened] == ["robot", "robot", "cup"]
    assert [getattr(reader, "_is_v3", None) for reader in opened] == [False, True, None]
    assert all(np.array_equal(reader.read(1).actions, actions(1)) for reader in opened)
    assert open_reader("lab/robot", "own_name").name == "own_name"
    with pytest.raises(FileNotFoundError, match="the dataset lab/other be fetched from the Hub"):
        open_reader("lab/other")
    with pytest.raises(FileNotFoundError, match="has no folder parts/bowl"):
        open_reader("lab/robot/parts/bowl")


def test_unknown_sources_say_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a dataset's folder"):
        open_reader(tmp_path / "nowhere")
    write_rlds(tmp_path / "robot" / "1.0.0")
    with pytest.raises(ValueError, match=r"is none of: LeRobot.*RLDS versions \['1.0.0'\]"):
        open_reader(tmp_path / "robot")


# --- LeRobot: parquet and video files of other shapes ---------------------------------------------------------------
@pytest.mark.parametrize("options", [{"row_group_size": 2}, {"row_group_size": 4, "write_statistics": False}])
def test_episodes_within_and_across_row_groups(options, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    file = write_lerobot(tmp_path / "my_robot", "v3.0", video=False) / "data/chunk-000/file-000.parquet"
    parquet.write_table(parquet.read_table(file), file, **options)
    reader = open_reader(tmp_path / "my_robot")
    for number in (0, 1):
        episode = reader.read(number)
        np.testing.assert_array_equal(episode.actions, actions(number))
        np.testing.assert_array_equal(episode.proprio, states(number))
        for step in range(LENGTHS[number]):
            np.testing.assert_array_equal(episode.image("observation.images.wrist", step), picture(number, 1, step))


@pytest.mark.parametrize("options", [{"g": "2"}, {"g": "12", "bf": "3"}, {"g": "12", "bf": "3", "open-gop": "1"}])
def test_frames_of_a_video_in_any_order(options, tmp_path):
    av = pytest.importorskip("av")
    from openvla.finetune.readers.lerobot import _Video

    file, fps, count = str(tmp_path / "video.mp4"), 10, 50
    if options.pop("open-gop", None):  # HEVC's usual way: frames before a keyframe need the one before that too
        options = options | {"x264-params": "open-gop=1"}
    with av.open(file, "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for step in range(count):
            moving = np.roll(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8), step, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moving, format="rgb24")))
        container.mux(stream.encode())
    with av.open(file) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    video, shuffled = _Video(file, fps), np.random.default_rng(0).permutation(count).tolist()
    for step in [*range(count), 0, 0, *range(0, count, 3), count - 1, *shuffled, *reversed(range(count))]:
        np.testing.assert_array_equal(video.frame(np.float32(step / fps)), expected[step], err_msg=f"frame {step}")
    assert video.frame(count / fps + 1) is None
    np.testing.assert_array_equal(video.frame(0), expected[0])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_forked_workers_read_their_own_frames(tmp_path, monkeypatch):
    """Files larger than what is read ahead: a worker that used its parent's would find the other's position."""
    noise = np.random.default_rng(0).integers(0, 255, (2, 2, 60, 32, 48, 3), dtype=np.uint8)
    monkeypatch.setitem(globals(), "LENGTHS", [60, 60])
    monkeypatch.setitem(globals(), "picture", lambda episode, camera, step: noise[episode, camera, step])
    folder, camera = write_lerobot(tmp_path / "my_robot", "v3.0"), "observation.images.front"
    expected = [[open_reader(folder).read(number).image(camera, step) for step in range(60)] for number in (0, 1)]
    reader = open_reader(folder)
    episodes = [reader.read(0), reader.read(1)]
    episodes[0].image(camera, 0)  # opened here, before the fork

    def work(number: int, pipe):
        steps = np.random.default_rng(number).integers(0, 60, 300).tolist()
        pipe.send(
            [
                step
                for step in steps
                if not np.array_equal(episodes[number].image(camera, step), expected[number][step])
            ]
        )

    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    workers = [context.Process(target=work, args=(number, pipes[number][1])) for number in range(2)]
    for worker in workers:
        worker.start()
    for (receiver, sender), worker in zip(pipes, workers):
        sender.close()
        wrong = receiver.recv()
        worker.join()
        assert not wrong and worker.exitcode == 0
    np.testing.assert_array_equal(episodes[1].image(camera, 7), expected[1][7])


# --- Bad data --------------------------------------------------------------------------------------------------------
def test_truncated_and_damaged_records(tmp_path):
    file = write_rlds(tmp_path / "my_robot") / "my_robot-train.tfrecord-00000-of-00001"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"truncated: record 1 starts at byte \d+"):
        open_reader(tmp_path / "my_robot")
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ValueError, match="wrong checksum of record 0's length|truncated"):
        open_reader(tmp_path / "my_robot")


def test_missing_shards_and_splits(tmp_path):
    file = write_rlds(tmp_path / "my_robot") / "my_robot-train.tfrecord-00000-of-00001"
    file.rename(file.with_name("my_robot-train.tfrecord-00000-of-00004"))
    with pytest.raises(ValueError, match="holds 1 of the 4 files of its split 'train'"):
        open_reader(tmp_path / "my_robot")
    for file in (tmp_path / "my_robot").glob("*.tfrecord*"):
        file.rename(file.with_name("my_robot-val.tfrecord-00000-of-00001"))
    with pytest.raises(FileNotFoundError, match=r"no files of the split 'train', but of \['val'\]"):
        open_reader(tmp_path / "my_robot")


def test_a_name_of_one_s_own_changes_no_convention(tmp_path):
    info = json.loads((write_rlds(tmp_path / "data") / "dataset_info.json").read_text())
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info | {"name": "ppgm"}))
    opened = [open_reader(tmp_path / "data", name) for name in (None, "cup", "ppgm_wrist")]
    assert [reader.name for reader in opened] == ["ppgm", "cup", "ppgm_wrist"]
    assert [reader.convention for reader in opened] == ["ppgm", "ppgm", "ppgm_wrist"]


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    folder = tmp_path / "my_robot" / "episode_0"
    (folder / "front").mkdir(parents=True)
    (folder / "episode.json").write_text(json.dumps({"instruction": "go"}))
    np.savez(folder / "episode.npz", actions=np.zeros((12, 7), np.float32))
    for step in range(12):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / "front" / f"{step}.png")
    episode = open_reader(tmp_path / "my_robot").read(0)
    assert [episode.image("front", step)[0, 0, 0] for step in range(12)] == list(range(12))
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(folder / "front" / "3.png")
    with pytest.raises(ValueError, match="3.png is no colour image of 8 bits"):
        episode.image("front", 3)


def test_damaged_files_are_named_and_can_be_skipped(tmp_path):
    folder = write_folder(tmp_path / "my_robot")
    file = folder / "episode_001" / "episode.npz"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="my_robot, episode 1: BadZipFile.*--skip-bad-episodes"):
        statistics.scan(open_reader(folder), progress=False)
    assert statistics.scan(open_reader(folder), skip_bad=True, progress=False).lengths == [LENGTHS[0], 0]
    file.unlink()
    assert statistics.scan(open_reader(folder), skip_bad=True, progress=False).lengths == [LENGTHS[0], 0]


def test_a_missing_video(tmp_path):
    write_lerobot(tmp_path / "my_robot", "v2.1")
    (tmp_path / "my_robot/videos/chunk-000/observation.images.wrist/episode_000001.mp4").unlink()
    episode = open_reader(tmp_path / "my_robot").read(1)
    with pytest.raises(FileNotFoundError, match="episode_000001.mp4 is missing"):
        episode.image("observation.images.wrist", 0)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda values: values.__setitem__((2, 3), np.nan), "episode_000: action is nan at step 2, dim 3"),
        (lambda values: None, "episode_001: 6 action dims where earlier episodes have 7"),
    ],
)
def test_bad_actions_name_file_and_step_or_are_skipped(change, message, tmp_path):
    folder, values = write_folder(tmp_path / "my_robot"), actions(0)
    change(values)
    if np.isnan(values).any():
        np.savez(folder / "episode_000" / "episode.npz", actions=values)
    else:
        np.savez(folder / "episode_001" / "episode.npz", actions=actions(1)[:, :6])
    with pytest.raises(ValueError, match=f"{message}.*--skip-bad-episodes"):
        statistics.scan(open_reader(folder), progress=False)
    found = statistics.scan(open_reader(folder), skip_bad=True, progress=False)
    assert len(found.skipped) == 1 and sum(length > 0 for length in found.lengths) == 1


def test_empty_instructions_and_missing_images(tmp_path):
    folder = write_folder(tmp_path / "my_robot")
    (folder / "episode_001" / "episode.json").write_text(json.dumps({"instruction": " "}))
    with pytest.raises(ValueError, match="episode_001: empty instruction at step 0"):
        statistics.scan(open_reader(folder), progress=False)
    (folder / "episode_000" / "wrist" / "002.png").unlink()
    with pytest.raises(ValueError, match="wrist holds 4 images for 5 actions"):
        open_reader(folder).read(0)
