"""Steps per second of our readers against TensorFlow Datasets (RLDS) and the lerobot package, measured in turns.

bench="python -m openvla.evaluate.bench_reading --tfds-python tfds/bin/python --lerobot-python lerobot/bin/python"
$bench --check-rlds bridge_dataset/1.0.0
$bench --make-rlds bridge_x10 --source bridge_dataset/1.0.0
$bench --make-lerobot videos --episodes 200
$bench --make-lerobot images --episodes 200 --images
$bench --rlds bridge_x10 --lerobot videos images --cores 1 --json reading.json
$bench --memory videos_40 videos_400 --memory images_40 images_400

Both sides are long-lived processes that get the same requests; who goes first alternates. `--tfds-python` and
`--lerobot-python` are interpreters of environments that hold `tensorflow tensorflow-datasets` and `lerobot`: this file
runs there too, and imports nothing of ours. Content comes before the clock: all but the pixels must be the same bit by
bit, and how far pixels differ is said. Ratios are medians over pairs of runs that follow each other, with quartiles.

How TFDS reads. "whole episodes": its steps undecoded (`SkipDecoding`), as the original OpenVLA does, the fastest way
we know. "by step": its documented way, a dataset of steps in every episode, without decoding unwanted cameras. Both
read files, parse and decode in parallel and prefetch (AUTOTUNE). TensorFlow decodes JPEG a little wrong, for speed,
unless told not to: "same pixels". Ours uses one thread; `--cores 1` gives each side the same, as data-loader workers.
"""

import argparse
import base64
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CHUNK = 8  # actions per step
# what: (request, request of the other side)
RLDS_WAYS = {
    "all fields, images encoded; TFDS whole episodes": ({"what": "fields"}, {"what": "fields", "how": "episodes"}),
    "all fields, images encoded; TFDS by step": ({"what": "fields"}, {"what": "fields", "how": "steps"}),
    "main camera decoded; TFDS whole episodes": ({"what": "camera"}, {"what": "camera", "how": "episodes"}),
    "main camera decoded, same pixels; whole episodes": (
        {"what": "camera"},
        {"what": "camera", "how": "episodes", "dct": "INTEGER_ACCURATE"},
    ),
    "main camera decoded; TFDS by step": ({"what": "camera"}, {"what": "camera", "how": "steps"}),
}


# --- Our side --------------------------------------------------------------------------------------------------------
class OurRLDS:
    def __init__(self, folder: str, split: str = "train"):
        import PIL

        from openvla.finetune.readers.rlds import RLDSReader
        from openvla.finetune.steps import StepDataset

        self.reader = RLDSReader(folder, split=split)
        camera = self.reader.cameras[0]
        self.reader.convention = None  # actions stay what they are, as with TFDS
        lengths = [len(self.reader.read(index)) for index in range(len(self.reader))]
        self.steps = StepDataset(self.reader, lengths, cameras=[camera])
        versions = {"numpy": np.__version__, "pillow": PIL.__version__}
        self.about = {"versions": versions, "threads": 1, "camera": camera, "steps": len(self.steps)}

    def read(self, what: str):
        if what == "fields":
            return map(self.reader.raw_steps, range(len(self.reader)))
        return map(self.steps.__getitem__, range(len(self.steps)))

    def actions(self, item) -> np.ndarray:
        return item["action"] if isinstance(item, dict) else item.actions

    def plain(self, item) -> list[dict]:
        if isinstance(item, dict):
            return [{key: _bytes(values) for key, values in item.items()}]
        fields = {"action": item.actions[0], "state": item.proprio, "text": _bytes(item.instruction)}
        return [fields | {"image": item.images[0]}]


class OurLeRobot:
    def __init__(self, folder: str):
        import PIL
        import pyarrow

        from openvla.finetune.readers.lerobot import LeRobotReader
        from openvla.finetune.steps import StepDataset

        start = time.perf_counter()
        self.cache = tempfile.TemporaryDirectory()
        os.environ["HF_DATASETS_CACHE"] = self.cache.name
        reader = LeRobotReader(folder)
        reader.map_images()  # as for training
        self.cameras = sorted(reader.cameras)
        lengths = [episode["length"] for episode in reader.episodes]
        self.steps = StepDataset(reader, lengths, cameras=self.cameras, chunk=CHUNK)
        opened = round(time.perf_counter() - start, 2)
        versions = {"numpy": np.__version__, "pillow": PIL.__version__, "pyarrow": pyarrow.__version__}
        if reader.info.get("video_path"):
            import av

            versions["av"] = av.__version__
        self.about = {"versions": versions, "threads": 1, "steps": len(self.steps), "opened_s": opened}

    def read(self, indices: list[int], floats: bool = False):
        for index in indices:
            step = self.steps[index]
            if floats:  # as lerobot gives them
                step.images = [image.transpose(2, 0, 1).astype(np.float32) / 255 for image in step.images]
            yield step

    def actions(self, item) -> np.ndarray:
        return item.actions

    def plain(self, item) -> list[dict]:
        fields = {"action": item.actions, "is_pad": item.is_pad, "state": item.proprio, "text": item.instruction}
        return [fields | dict(zip(self.cameras, item.images))]


# --- Their side: only their packages and numpy -----------------------------------------------------------------------
class TensorFlowDatasets:
    def __init__(self, folder: str, split: str = "train"):
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
        import tensorflow
        import tensorflow_datasets as tfds

        self.split, self.builder = split, tfds.builder_from_directory(folder)
        versions = {"tensorflow": tensorflow.__version__, "tensorflow_datasets": tfds.__version__}
        self.about = {"versions": versions, "threads": cores()}
        self.datasets = {}  # traced once

    def read(self, **request):
        key = json.dumps(request)
        if key not in self.datasets:
            self.datasets[key] = self.dataset(**request)
        return self.datasets[key].as_numpy_iterator()

    def dataset(self, what: str, how: str, camera: str, dct: str = ""):
        import tensorflow as tf
        import tensorflow_datasets as tfds

        skip, auto = tfds.decode.SkipDecoding(), tf.data.AUTOTUNE
        observation = self.builder.info.features["steps"]["observation"]
        cameras = [key for key, feature in observation.items() if isinstance(feature, tfds.features.Image)]
        options = {"split": self.split, "shuffle_files": False, "read_config": tfds.ReadConfig(try_autocache=False)}

        def decode(image):
            if dct:
                return tf.io.decode_jpeg(image, channels=3, dct_method=dct)
            return tf.io.decode_image(image, channels=3, expand_animations=False)

        def wanted(step):
            seen = step["observation"]
            fields = {"action": step["action"], "state": seen["state"], "text": step["language_instruction"]}
            return fields | {"image": seen[camera]}

        def decoded(episode):
            steps = wanted(episode["steps"])
            return steps | {"image": tf.map_fn(decode, steps["image"], fn_output_signature=tf.uint8)}

        if how == "episodes":
            data = self.builder.as_dataset(decoders={"steps": skip}, **options)
            data = data.map(
                (lambda episode: episode["steps"]) if what == "fields" else decoded, num_parallel_calls=auto
            )
        else:
            skipped = {key: skip for key in cameras if what == "fields" or key != camera}
            data = self.builder.as_dataset(decoders={"steps": {"observation": skipped}}, **options)
            data = data.flat_map(lambda episode: episode["steps"])
            data = data if what == "fields" else data.map(wanted, num_parallel_calls=auto)
        return data.prefetch(auto)

    def actions(self, item) -> np.ndarray:
        return item["action"]

    def plain(self, item) -> list[dict]:
        fields = {key: _bytes(values) for key, values in _flat(item)}
        if "image" in fields and fields["action"].ndim == 2:  # a whole episode
            return [{key: values[step] for key, values in fields.items()} for step in range(len(fields["action"]))]
        return [fields]


class LeRobotPackage:
    def __init__(self, folder: str):
        # Where its `datasets` copies all parquet files, uncompressed, when a dataset is opened for the first time
        self.cache = tempfile.TemporaryDirectory()
        os.environ["HF_DATASETS_CACHE"] = self.cache.name
        dataset, versions = import_lerobot()
        import torch

        fps = json.loads((Path(folder) / "meta" / "info.json").read_text())["fps"]
        times = {"action": [step / fps for step in range(CHUNK)]}
        start = time.perf_counter()
        self.dataset = dataset(f"local/{Path(folder).name}", root=folder, delta_timestamps=times)
        opened = round(time.perf_counter() - start, 2)
        copied = sum(file.stat().st_size for file in Path(self.cache.name).rglob("*.arrow"))
        self.cameras = sorted(self.dataset.meta.camera_keys)
        self.about = {"versions": versions, "threads": torch.get_num_threads(), "steps": len(self.dataset)}
        self.about |= {"opened_s": opened, "copied_mb": round(copied / 2**20)}

    def read(self, indices: list[int]):
        return map(self.dataset.__getitem__, indices)

    def actions(self, item) -> np.ndarray:
        return item["action"].numpy()

    def plain(self, item) -> list[dict]:
        fields = {"action": item["action"].numpy(), "is_pad": item["action_is_pad"].numpy()}
        fields |= {"state": item["observation.state"].numpy(), "text": item["task"]}
        images = {key: (item[key].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for key in self.cameras}
        return [fields | images]


def import_lerobot():
    """(LeRobotDataset, versions), also where torchvision is built for CUDA, beside a torch that is not."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # its operators are missing, which nobody here calls
        for module in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[module]
        operators = torch.library.Library("torchvision", "DEF")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_lerobot.keep = operators  # gone with the library object otherwise
    from importlib.metadata import version

    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset, {name: version(name) for name in ("lerobot", "torch", "torchcodec", "datasets")}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _flat(tree: dict, path: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", value


def _bytes(values):
    """Text and encoded images as bytes, or as lists of them; arrays as they are."""
    if isinstance(values, np.ndarray) and values.dtype != object:
        return values
    if isinstance(values, (str, bytes)):
        return values.encode() if isinstance(values, str) else values
    return [_bytes(value) for value in values]


def _pack(value) -> list:
    """As JSON, from one environment to another, whose packages may differ: exactly, and nothing that runs."""
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        return [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode()]
    if isinstance(value, bytes):
        return ["bytes", base64.b64encode(value).decode()]
    return ["list", [_pack(each) for each in value]] if isinstance(value, list) else ["plain", value]


def _unpack(packed: list):
    kind, *content = packed
    if kind == "bytes":
        return base64.b64decode(content[0])
    if kind == "list":
        return [_unpack(each) for each in content[0]]
    if kind == "plain":
        return content[0]
    return np.frombuffer(base64.b64decode(content[1]), kind).reshape(content[0])


# --- The process of a side -------------------------------------------------------------------------------------------
SIDES = {"our-rlds": OurRLDS, "our-lerobot": OurLeRobot, "tfds": TensorFlowDatasets, "lerobot": LeRobotPackage}


def serve(kind: str, folder: str, options: str) -> None:
    """Answers the requests of a `Side`, one line of JSON each, until there are no more."""
    options = json.loads(options)
    if count := options.pop("cores", None):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # TensorFlow and lerobot print
    side = SIDES[kind](folder, **options)
    print(json.dumps(side.about), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        dump = request.pop("dump", None)
        if dump:
            items = [plain for item in side.read(**request) for plain in side.plain(item)]
            Path(dump).write_text(json.dumps([{key: _pack(value) for key, value in item.items()} for item in items]))
            answer = {}
        else:
            answer = run(side, request)
        print(json.dumps(answer), file=answers, flush=True)


def run(side, request: dict) -> dict:
    """Seconds of one pass, and the sum of all bits of its actions: the same for the same steps in whatever order."""
    import resource

    steps = checksum = 0
    cpu, start = time.process_time(), time.perf_counter()
    for item in side.read(**request):
        actions = side.actions(item)
        whole = "indices" not in request and actions.ndim == 2
        steps += len(actions) if whole else 1
        checksum += int(actions.view(np.uint32).sum(dtype=np.uint64))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {"seconds": seconds, "cpu": cpu, "steps": steps, "checksum": checksum, "peak_mb": peak}


class Side:
    """A process of `python` that reads `folder`."""

    def __init__(self, python: str, kind: str, folder: str, **options):
        command = [python, __file__, "--worker", kind, folder, json.dumps(options)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.kind, self.about = kind, self._answer()

    def ask(self, **request) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def items(self, **request) -> list[dict]:
        with tempfile.TemporaryDirectory() as folder:
            self.ask(dump=f"{folder}/items", **request)
            items = json.loads(Path(folder, "items").read_text())
            return [{key: _unpack(value) for key, value in item.items()} for item in items]

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{' '.join(self.process.args[:5])} ended with status {self.process.wait()}; see above."
            )
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


# --- Comparing -------------------------------------------------------------------------------------------------------
def differences(ours: list[dict], theirs: list[dict]) -> dict[str, dict]:
    """`{"image": {"max": 3.0, "mean": 0.1}, …}` for every field; zeros mean the same bits, shapes and types.

    Raises ValueError if they cannot be compared: other fields, lengths, shapes, types, or texts.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} items here, {len(theirs)} there.")
    found = {}
    for number, (mine, other) in enumerate(zip(ours, theirs)):
        if set(mine) != set(other):
            raise ValueError(f"Item {number} has the fields {sorted(mine)} here, {sorted(other)} there.")
        for key, value in mine.items():
            worst = found.setdefault(key, {"max": 0.0, "mean": 0.0})
            if not isinstance(value, np.ndarray):
                if value != other[key]:
                    raise ValueError(f"Item {number}: {key} is {value!r:.60} here, {other[key]!r:.60} there.")
                continue
            here, there = (f"{array.dtype} {array.shape}" for array in (value, other[key]))
            if here != there:
                raise ValueError(f"Item {number}: {key} is {here} here, {there} there.")
            if value.tobytes() != other[key].tobytes():
                gap = np.abs(value.astype(np.float64) - other[key].astype(np.float64))
                worst["max"] = max(worst["max"], float(gap.max()))
                worst["mean"] += float(gap.mean()) / len(ours)
    return found


def must_agree(found: dict[str, dict], pixels: list[str]) -> str:
    """What to print; raises RuntimeError if anything but `pixels` differs."""
    if other := [key for key, gap in found.items() if gap["max"] and key not in pixels]:
        raise RuntimeError(f"Both sides read other values of {other}: {found}")
    gaps = {key: gap for key, gap in found.items() if gap["max"]}
    if not gaps:
        return f"all {len(found)} fields bit-identical"
    worst, mean = max(gap["max"] for gap in gaps.values()), max(gap["mean"] for gap in gaps.values())
    rest = len(found) - len(gaps)
    return f"{rest} fields bit-identical; pixels differ by {worst:.0f} of 255 at most, {mean:.3f} on average"


def alternate(first, second, rounds: int) -> list[tuple[dict, dict]]:
    """Answers of both callables, which get the number of the round; who goes first alternates."""
    pairs = []
    for number in range(rounds):
        answers = {way: way(number) for way in ((first, second), (second, first))[number % 2]}
        pairs.append((answers[first], answers[second]))
    return pairs


def summarize(pairs: list[tuple[dict, dict]]) -> dict:
    """Steps per second of both sides, and how many times as fast the first is by wall clock and by CPU time.

    Raises ValueError if they did not read the same steps.
    """
    for ours, theirs in pairs:
        if (ours["steps"], ours["checksum"]) != (theirs["steps"], theirs["checksum"]):
            raise ValueError(f"Not the same steps: {ours} here, {theirs} there.")
    ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "steps": pairs[0][0]["steps"],
        "ours_per_s": statistics.median(ours["steps"] / ours["seconds"] for ours, _ in pairs),
        "theirs_per_s": statistics.median(theirs["steps"] / theirs["seconds"] for _, theirs in pairs),
        "times_as_fast": {"median": median, "quartiles": [low, high]},
        "times_less_cpu": statistics.median(theirs["cpu"] / max(ours["cpu"], 1e-9) for ours, theirs in pairs),
        "rounds": len(pairs),
    }


# --- The benchmarks --------------------------------------------------------------------------------------------------
def check_rlds(folder: str, python: str) -> dict[str, str]:
    """All fields of all steps of every split against TFDS, and the main camera with both ways to decode JPEG."""
    said = {}
    for split in json.loads((Path(folder) / "dataset_info.json").read_text())["splits"]:
        name = split["name"]
        with (
            Side(sys.executable, "our-rlds", folder, split=name) as ours,
            Side(python, "tfds", folder, split=name) as tfds,
        ):
            camera = ours.about["camera"]
            found = differences(ours.items(what="fields"), tfds.items(what="fields", how="episodes", camera=camera))
            said[f"{name}, {ours.about['steps']} steps, images encoded"] = must_agree(found, [])
            for dct in ("", "INTEGER_ACCURATE"):
                theirs = tfds.items(what="camera", how="episodes", camera=camera, dct=dct)
                found = must_agree(differences(ours.items(what="camera"), theirs), ["image"])
                said[f"{name}, {camera}, decoded by TensorFlow with {dct or 'its default'}"] = found
    return said


def bench_rlds(folder: str, python: str, rounds: int, cores: int | None) -> tuple[dict, dict]:
    """({way: summary}, what both sides are)"""
    with (
        Side(sys.executable, "our-rlds", folder, cores=cores) as ours,
        Side(python, "tfds", folder, cores=cores) as tfds,
    ):
        rows, camera = {}, ours.about["camera"]
        for way, (mine, other) in RLDS_WAYS.items():
            other = other | {"camera": camera}
            ours.ask(**mine), tfds.ask(**other)  # warm up: files into the page cache, graphs traced
            pairs = alternate(lambda _: ours.ask(**mine), lambda _: tfds.ask(**other), rounds)  # noqa: B023
            rows[way] = summarize(pairs)
        return rows, {"ours": ours.about, "theirs": tfds.about}


def bench_lerobot(folder: str, python: str, rounds: int, cores: int | None, steps: int) -> tuple[dict, dict, dict]:
    """({way: summary}, {what: how far the content agrees}, what both sides are)"""
    with (
        Side(sys.executable, "our-lerobot", folder, cores=cores) as ours,
        Side(python, "lerobot", folder, cores=cores) as lerobot,
    ):
        total = ours.about["steps"]
        if total != lerobot.about["steps"]:
            raise RuntimeError(f"{folder}: {total} steps here, {lerobot.about['steps']} there.")
        some = random.Random(0).sample(range(total), min(120, total))
        found = differences(ours.items(indices=some), lerobot.items(indices=some))
        said = {
            f"{len(some)} random steps": must_agree(found, [key for key in found if key.startswith("observation.im")])
        }

        def shuffled(number: int) -> list[int]:
            return random.Random(number).sample(range(total), min(steps, total))

        def in_order(number: int) -> list[int]:
            return [(number * steps + step) % total for step in range(steps)]

        rows = {}
        for way, order in (("random", shuffled), ("in order", in_order)):
            for name, options in ((way, {}), (f"{way}, ours to float32 too", {"floats": True})):
                pairs = alternate(
                    lambda number: ours.ask(indices=order(number), **options),  # noqa: B023
                    lambda number: lerobot.ask(indices=order(number)),  # noqa: B023
                    rounds,
                )
                rows[name] = summarize(pairs)
        return rows, said, {"ours": ours.about, "theirs": lerobot.about}


def peak_memory(folder: str) -> tuple[int, float]:
    """(steps, peak MB) of a new process that reads everything in order, images decoded."""
    is_lerobot = (Path(folder) / "meta").is_dir()
    with Side(sys.executable, "our-lerobot" if is_lerobot else "our-rlds", folder) as ours:
        steps = ours.about["steps"]
        request = {"indices": list(range(steps))} if is_lerobot else {"what": "camera"}
        return steps, ours.ask(**request)["peak_mb"]


# --- Data to read: made by the other side's packages -----------------------------------------------------------------
def make_lerobot(folder: str, options: str) -> None:
    """Two cameras pan over pictures with the spectrum of photographs (amplitude 1/f), with a camera's noise."""
    dataset, _ = import_lerobot()
    episodes, steps, images, side = json.loads(options)
    cameras = ("observation.images.front", "observation.images.wrist")
    features = {"action": {"dtype": "float32", "shape": (7,), "names": None}}
    features["observation.state"] = {"dtype": "float32", "shape": (8,), "names": None}
    for camera in cameras:
        names = ["height", "width", "channels"]
        features[camera] = {"dtype": "image" if images else "video", "shape": (side, side, 3), "names": names}
    data = dataset.create(
        "local/made", fps=10, features=features, root=folder, use_videos=not images, streaming_encoding=not images
    )
    rng = np.random.default_rng(0)
    size = side + 2 * steps
    grid = np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij")
    frequency = np.maximum(np.hypot(*grid), 1 / size)
    for episode in range(episodes):
        scenes = []
        for _ in cameras:
            scene = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(3, size, size))) / frequency, s=(size, size))
            scenes.append(128 + 45 * (scene / scene.std()).transpose(1, 2, 0))
        for step in range(steps):
            frame = {"action": rng.uniform(-1, 1, 7).astype(np.float32), "task": f"pick up object {episode % 5}"}
            frame["observation.state"] = rng.normal(size=8).astype(np.float32)
            for number, camera in enumerate(cameras):
                top, left = (number + 1) * step, (2 - number) * step
                view = scenes[number][top : top + side, left : left + side]
                frame[camera] = (view + rng.normal(0, 2, view.shape)).clip(0, 255).astype(np.uint8)
            data.add_frame(frame)
        data.save_episode()
    data.finalize()


def make_rlds(folder: str, options: str) -> None:
    """The training split of an RLDS dataset, once per file; with `side`, its images scaled to so many pixels."""
    import tensorflow as tf

    source, copies, side = json.loads(options)
    source, folder = Path(source), Path(folder)
    folder.mkdir(parents=True)
    info = json.loads((source / "dataset_info.json").read_text())
    features = (source / "features.json").read_text()
    records = [bytes(r.numpy()) for r in tf.data.TFRecordDataset(sorted(map(str, source.glob("*-train.tfrecord-*"))))]
    if side:
        pictures = []
        for record in records:
            example = tf.train.Example.FromString(record)
            for values in example.features.feature.values():
                for index, value in enumerate(values.bytes_list.value):
                    if value.startswith(b"\xff\xd8"):
                        image = tf.image.resize(tf.io.decode_jpeg(value), (side, side), "bicubic")
                        image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
                        values.bytes_list.value[index] = tf.io.encode_jpeg(image, quality=95).numpy()
            pictures.append(example.SerializeToString())
        records, spec = pictures, json.loads(features)
        _scale_images(spec, side)
        features = json.dumps(spec)
    for copy in range(copies):
        name = folder / f"{info['name']}-train.tfrecord-{copy:05d}-of-{copies:05d}"
        with tf.io.TFRecordWriter(str(name)) as writer:
            for record in records:
                writer.write(record)
    split = next(split for split in info["splits"] if split["name"] == "train")
    split |= {"shardLengths": [str(len(records))] * copies, "numBytes": str(copies * sum(map(len, records)))}
    (folder / "dataset_info.json").write_text(json.dumps(info | {"splits": [split]}))
    (folder / "features.json").write_text(features)


def _scale_images(spec, side: int) -> None:
    for key, value in spec.items() if isinstance(spec, dict) else ():
        if key == "image" and "encodingFormat" in value:
            value["shape"] = {"dimensions": [str(side), str(side), "3"]}
        else:
            _scale_images(value, side)


# --- Command ---------------------------------------------------------------------------------------------------------
def machine() -> dict:
    """What figures depend on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    found = {"cpu": model, "cores": cores(), "python": platform.python_version(), "commit": commit}
    return found | {"load": [round(load, 2) for load in os.getloadavg()]}


def print_rows(title: str, rows: dict[str, dict]) -> None:
    print(f"\n{title}\n{'':<52}{'ours/s':>10}{'theirs/s':>10}{'times as fast':>23}{'less CPU':>10}")
    for way, row in rows.items():
        low, high = row["times_as_fast"]["quartiles"]
        ratio = f"{row['times_as_fast']['median']:.2f} ({low:.2f} to {high:.2f})"
        print(
            f"{way:<52}{row['ours_per_s']:>10.0f}{row['theirs_per_s']:>10.0f}{ratio:>23}{row['times_less_cpu']:>10.2f}"
        )


def main(argv: list[str]) -> None:
    workers = {"make-lerobot": make_lerobot, "make-rlds": make_rlds}
    if argv[:1] == ["--worker"]:
        kind, *arguments = argv[1:]
        return workers[kind](*arguments) if kind in workers else serve(kind, *arguments)

    description, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m openvla.evaluate.bench_reading",
        description=description,
        epilog=f"examples:\n{details}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tfds-python", metavar="FILE", help="interpreter that has TensorFlow Datasets")
    parser.add_argument("--lerobot-python", metavar="FILE", help="interpreter that has lerobot")
    parser.add_argument("--check-rlds", nargs="*", default=[], metavar="FOLDER", help="compare content of all splits")
    parser.add_argument("--rlds", nargs="*", default=[], metavar="FOLDER", help="RLDS version folders to time")
    parser.add_argument("--lerobot", nargs="*", default=[], metavar="FOLDER", help="LeRobot datasets to time")
    parser.add_argument(
        "--memory", nargs=2, action="append", default=[], metavar=("SMALL", "LARGE"), help="peak memory over both"
    )
    parser.add_argument("--rounds", type=int, default=9, help="pairs of runs")
    parser.add_argument("--cores", type=int, help="CPU cores each side may use while timed (Linux); default: all")
    parser.add_argument("--steps", type=int, default=600, help="LeRobot steps a run")
    parser.add_argument("--json", metavar="FILE", help="also write the result to a file")
    parser.add_argument("--make-rlds", metavar="FOLDER", help="copy --source, for longer runs")
    parser.add_argument("--source", metavar="FOLDER", help="for --make-rlds: an RLDS version folder")
    parser.add_argument("--copies", type=int, default=10, help="for --make-rlds: files, each the whole training split")
    parser.add_argument("--side", type=int, help="pixels; for --make-rlds: scale JPEGs; for --make-lerobot: 224")
    parser.add_argument("--make-lerobot", metavar="FOLDER", help="make a dataset of two cameras")
    parser.add_argument("--episodes", type=int, default=20, help="for --make-lerobot")
    parser.add_argument("--episode-steps", type=int, default=60, help="for --make-lerobot")
    parser.add_argument("--images", action="store_true", help="for --make-lerobot: PNG images instead of AV1 videos")
    args = parser.parse_args(argv)
    if (args.rlds or args.check_rlds or args.make_rlds) and not args.tfds_python:
        parser.error("Pass --tfds-python: an interpreter that has tensorflow and tensorflow-datasets.")
    if (args.lerobot or args.make_lerobot) and not args.lerobot_python:
        parser.error("Pass --lerobot-python: an interpreter that has lerobot.")
    if args.make_rlds:
        options = json.dumps([args.source, args.copies, args.side])
        subprocess.run([args.tfds_python, __file__, "--worker", "make-rlds", args.make_rlds, options], check=True)
    if args.make_lerobot:
        options = json.dumps([args.episodes, args.episode_steps, args.images, args.side or 224])
        subprocess.run(
            [args.lerobot_python, __file__, "--worker", "make-lerobot", args.make_lerobot, options], check=True
        )

    result = {"machine": machine(), "content": {}, "speed": {}, "sides": {}, "memory": {}}
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    # Memory first: Linux counts what a parent used when it started a process as that process's peak.
    for small, large in args.memory:
        (steps, peak), (more_steps, more) = peak_memory(small), peak_memory(large)
        result["memory"][f"{small}, {large}"] = {"steps": [steps, more_steps], "peak_mb": [peak, more]}
        print(
            f"{small} -> {large}: {steps} -> {more_steps} steps, peak {peak:.0f} -> {more:.0f} MB ({more - peak:+.0f})"
        )
    for folder in args.check_rlds:
        result["content"][folder] = check_rlds(folder, args.tfds_python)
    for folder in args.rlds:
        result["speed"][folder], result["sides"][folder] = bench_rlds(
            folder, args.tfds_python, args.rounds, args.cores
        )
    for folder in args.lerobot:
        found = bench_lerobot(folder, args.lerobot_python, args.rounds, args.cores, args.steps)
        result["speed"][folder], result["content"][folder], result["sides"][folder] = found
    for folder, said in result["content"].items():
        print(f"\n{folder}", *(f"  {what}: {how}" for what, how in said.items()), sep="\n")
    for folder, rows in result["speed"].items():
        print_rows(folder, rows)
        for side, about in result["sides"][folder].items():
            print(f"  {side}: {', '.join(f'{key} {value}' for key, value in about.items())}")
    result["machine"]["load_at_end"] = [round(load, 2) for load in os.getloadavg()]
    print(f"\nload at the end {result['machine']['load_at_end']}")
    if args.json:
        with open(args.json + ".tmp", "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
        os.replace(args.json + ".tmp", args.json)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
