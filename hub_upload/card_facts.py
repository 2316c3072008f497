"""What a model card is made of: what the files of a checkpoint tell, and what somebody has to add."""

import json
import math
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

RELATIONS = ("finetune", "adapter", "quantized", "merge")
RESULT_FIELDS = ("dataset", "metric", "value", "episodes", "interval", "source", "command")

# Steps per second of datasets that openvla-7b was trained on, where lerobot (66a3862, push_dataset_to_hub/openx/
# configs.yaml, `fps`) and RDT-1B (b9baaae, configs/dataset_control_freq.json) agree; about dobbe they do not.
_RLDS = "converted_externally_to_rlds"
CONTROL_RATES = {
    f"ucsd_kitchen_dataset_{_RLDS}": 2,
    **dict.fromkeys(("fractal20220817_data", f"nyu_franka_play_dataset_{_RLDS}"), 3),
    **dict.fromkeys(("bridge_orig", "berkeley_autolab_ur5", f"dlr_edan_shared_control_{_RLDS}"), 5),
    **dict.fromkeys(("kuka", "jaco_play", "berkeley_cable_routing", "roboturk", "bc_z", "cmu_stretch"), 10),
    **dict.fromkeys((f"stanford_hydra_dataset_{_RLDS}", f"furniture_bench_dataset_{_RLDS}"), 10),
    **dict.fromkeys(("berkeley_fanuc_manipulation", "fmb_dataset"), 10),
    "taco_play": 15,
    **dict.fromkeys((f"austin_{name}_dataset_{_RLDS}" for name in ("buds", "sailor", "sirius")), 20),
    **dict.fromkeys(("viola", "utaustin_mutex", f"iamlab_cmu_pickup_insert_{_RLDS}"), 20),
    "toto": 30,
}
LIBERO_RATE = 20  # LIBERO 4f0dd18, envs/env_wrapper.py, `control_freq`

LLM_LICENSES = {  # how llm_backbone_id, or the name in hf_llm_id, begins -> the licence's identifier on the Hub
    ("llama2-", "llama-2-", "vicuna"): "llama2",
    ("mistral-v0.1-", "mistral-7b-"): "apache-2.0",
    ("phi-2",): "mit",
    tuple(f"qwen2.5-{size}b" for size in ("0.5", "1.5", "7", "14", "32")): "apache-2.0",  # 3B and 72B have others
}
LOCAL_FOLDERS = ("runs", "data", "datasets", "models", "checkpoints", "outputs", "output", "converted", "exported")
LOCAL_NAMES = re.compile(r"merged|best|adapter|checkpoint-\d+|.*\.(json|hdf5|h5|pt|safetensors)")
PUBLIC_OWNERS = ("openvla", "moojink", "lerobot", "Stanford-ILIAD")  # on the Hub: what they are said to own, is there


@dataclass
class CardFacts:
    """What the files of a checkpoint do not tell; all of it may be unknown.

    Args:
        repo_id: where it will be published, for the code on the card.
        base_model: Hub id (or folder) that it was made from, as the publisher says; None: what was found.
        base_found: the base that the run or the adapter names: a Hub id or a folder, which look the same.
        base_model_relation: one of `RELATIONS`; None: "finetune" if there was a run.
        datasets: Hub ids, or folders, of which only the last part is named; none: what the run says.
        source_name: of the exported folder: "merged", "adapter", or "best", "checkpoint-200", … from before the end.
        license: identifier of the Hub (`llama2`, `apache-2.0`, `other`, …); None: by the language model.
        evaluation: as `read_evaluation` gives it.
        training: `run.json` of a fine-tuning run. history: the entries of its `metrics.jsonl`. See `read_run`.
        notes: Markdown of the publisher, put on the card as it is (but for paths).
    """

    repo_id: str | None = None
    base_model: str | None = None
    base_found: str | None = None
    base_model_relation: str | None = None
    datasets: list[str] = field(default_factory=list)
    source_name: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] = field(default_factory=lambda: ["en"])
    evaluation: list[dict] = field(default_factory=list)
    training: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    notes: str = ""

    def check(self) -> None:
        """Raises ValueError for what cannot be."""
        check_evaluation(self.evaluation, "facts.evaluation")
        if self.base_model_relation not in (None, *RELATIONS):
            raise ValueError(f"base_model_relation must be one of {RELATIONS}, got {self.base_model_relation!r}.")
        if self.repo_id is not None and not (_is_repo_id(self.repo_id) and "/" in self.repo_id):
            raise ValueError(f"repo_id must be owner/name, as on the Hub, got {self.repo_id!r}.")

    @property
    def base(self) -> tuple[str | None, str | None]:
        """What it was made from: the place as it was given, and its Hub id if it is on the Hub."""
        if self.base_model:
            return self.base_model, given_id(self.base_model)
        found = self.base_found or self.training.get("model")
        return found, self._found_id(found)

    @property
    def data(self) -> list[tuple[str, str | None]]:
        """What it was trained on: places and Hub ids, as in `base`."""
        if self.datasets:
            return [(place, given_id(place)) for place in self.datasets]
        return [(place, self._found_id(place)) for place in listed(self.training.get("data"))]

    def _found_id(self, place: str | None) -> str | None:
        """Hub id of what a run or an adapter names, if it is known to be public.

        `ckpts/openvla-7b` could be a folder of where the run was, and whether it exists here says nothing about that.
        """
        name = hub_id(place)
        is_public = name and name.partition("/")[0] in PUBLIC_OWNERS
        return name if is_public or place in listed(self.training.get("hub")) else None

    @property
    def is_from_the_end(self) -> bool:
        """Whether the weights are those that the run ended with."""
        return self.source_name in (None, "merged", "adapter")


@dataclass
class Example:
    """What the policy did once. `image`: RGB, cameras side by side; `action`: `(A,)` or `(T, A)`, physical units;
    `proprio`: `(P,)`, physical units, for policies that take it."""

    image: Image.Image
    instruction: str
    unnorm_key: str
    action: np.ndarray
    proprio: np.ndarray | None = None


@dataclass
class Policy:
    """What the folder of a checkpoint tells.

    `parameters`, `dtypes`: how many numbers each part of the model has, and each dtype; `size`: their bytes.
    `dims`, `stats`: `name_action_dims` and `ActionStats` per unnorm_key. `states`: `ActionStats` of the robot's state,
    where there are some of as many numbers as the policy takes.
    """

    config: object
    image_processor: object
    prompt: str | None
    norm_stats: dict
    parameters: Counter
    dtypes: Counter
    size: int
    dims: dict[str, list[tuple[str, str]]]
    stats: dict[str, object]
    states: dict[str, object]

    @property
    def llm(self) -> str:
        return self.config.hf_llm_id or self.config.llm_backbone_id

    @property
    def llm_license(self) -> str | None:
        """Identifier of the language model's licence, if known."""
        names = (self.config.llm_backbone_id.lower(), self.llm.rpartition("/")[2].lower())
        found = [known for starts, known in LLM_LICENSES.items() if any(name.startswith(starts) for name in names)]
        return found[0] if found else None

    def rate(self, key: str) -> float | None:
        """Steps per second: as the statistics declare, or as known of the dataset."""
        declared = self.norm_stats[key].get("control_frequency")
        if is_number(declared) and declared > 0:
            return declared
        return CONTROL_RATES.get(key) or (LIBERO_RATE if key.startswith("libero_") else None)

    def declares_dims(self, key: str) -> bool:
        return "names" in self.norm_stats[key]["action"]

    def has_gripper(self, key: str) -> bool:
        """Whether the last dim is known for a gripper with 1 = open."""
        return self.dims[key][-1] == ("gripper", "1 = open")

    def guesses_dims(self, key: str) -> bool:
        """Whether the names of the dims are no more than a guess: `name_action_dims` marks those by "?"."""
        return not self.declares_dims(key) and any(name.endswith("?") for name, _ in self.dims[key])


def read_policy(folder: Path) -> Policy:
    """Reads all but the weights themselves. Raises ValueError or FileNotFoundError for what could not be published."""
    from openvla.action_tokenizer import ActionStats, name_action_dims
    from openvla.configuration_openvla import OpenVLAConfig
    from openvla.hub_upload.layout import read_statistics
    from openvla.hub_upload.weights import SafetensorsFolder
    from openvla.processing_openvla import OpenVLAImageProcessor

    for name in ("config.json", "modeling_openvla.py"):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder} lacks {name}: a card is for a whole checkpoint with its code, as `openvla export` and "
                "`openvla convert` make it."
            )
    config = OpenVLAConfig.from_pretrained(folder)
    norm_stats = read_statistics(folder, config) or {}
    prompt = config.prompt_template
    if (folder / "processor_config.json").exists():
        declared = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
        prompt = declared.get("prompt_template", prompt)
    parameters, dtypes, size = Counter(), Counter(), 0
    for name, info in SafetensorsFolder(folder).infos.items():
        parameters[name.partition(".")[0]] += math.prod(info.shape)
        dtypes[str(info.dtype).removeprefix("torch.")] += math.prod(info.shape)
        size += info.nbytes
    scheme = config.action_normalization
    dims = {key: name_action_dims(norm_stats, key) for key in norm_stats}
    stats = {key: ActionStats.from_norm_stats(norm_stats, key, scheme) for key in norm_stats}
    states = {
        key: ActionStats.from_norm_stats(norm_stats, key, scheme, "proprio")
        for key, entry in norm_stats.items()
        if config.proprio_dim and "proprio" in entry
    }
    states = {key: each for key, each in states.items() if each.dim == config.proprio_dim}
    processor = OpenVLAImageProcessor.from_pretrained(folder)
    return Policy(config, processor, prompt, norm_stats, parameters, dtypes, size, dims, stats, states)


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """`training` and `history` of `CardFacts` from a run of `openvla finetune`.

    Raises FileNotFoundError if it is none, and ValueError for broken files; but a run that was killed may have written
    half of its last line of metrics.
    """
    folder = Path(folder)
    if not (folder / "run.json").exists():
        raise FileNotFoundError(f"{folder} has no run.json: expected the --output_dir of `openvla finetune`.")
    training = _object((folder / "run.json").read_bytes(), str(folder / "run.json"))
    metrics, history = folder / "metrics.jsonl", []
    *lines, unfinished = metrics.read_bytes().split(b"\n") if metrics.exists() else [b""]
    for number, line in enumerate(lines, start=1):
        if line.strip():
            history.append(_object(line, f"{metrics}, line {number}"))
    with suppress(ValueError):
        history += [_object(unfinished, str(metrics))] if unfinished.strip() else []
    return training, history


def _object(text: bytes, where: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError as error:  # also bytes that are no UTF-8
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a JSON object, got {str(found)[:80]!r}.")
    return found


def read_evaluation(path: Path) -> list[dict]:
    """Results from a JSON file (format: `model_card.py`). Raises ValueError that names the entry and its problem."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    check_evaluation(results, str(path))
    return results


def check_evaluation(results: list[dict], where: str) -> None:
    """Raises ValueError unless it is a list of well-formed results."""
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise ValueError(f"{where}: expected a list of objects with {', '.join(RESULT_FIELDS[:3])}.")
    for number, result in enumerate(results):
        if problems := _problems(result):
            raise ValueError(f"{where}, entry {number}: {'; '.join(problems)}.")


def _problems(result: dict) -> list[str]:
    problems = [f"lacks {name!r}" for name in RESULT_FIELDS[:3] if name not in result]
    if unknown := sorted(set(result) - set(RESULT_FIELDS)):
        problems.append(f"has unknown fields {unknown}; known: {list(RESULT_FIELDS)}")
    for name in ("dataset", "metric", "source", "command"):
        if name in result and not (isinstance(result[name], str) and result[name].strip()):
            problems.append(f"has {name} {result[name]!r} instead of a text")
    if problems:
        return problems
    value, interval, episodes = result["value"], result.get("interval"), result.get("episodes")
    if not is_number(value):
        return [f"has value {value!r} instead of a number"]
    if is_rate(result["metric"]) and not 0 <= value <= 1:
        problems.append(f"has {result['metric']} {value}: rates are fractions in [0, 1], 84.7 % is 0.847")
    if interval is not None:
        is_pair = isinstance(interval, list | tuple) and len(interval) == 2 and all(map(is_number, interval))
        if not is_pair or not interval[0] <= value <= interval[1]:
            problems.append(f"has interval {interval!r} instead of [low, high] around {value}")
        elif is_rate(result["metric"]) and not 0 <= interval[0] <= interval[1] <= 1:
            problems.append(f"has interval {interval!r}: rates are fractions in [0, 1]")
    if episodes is not None and (type(episodes) is not int or episodes < 1):
        problems.append(f"has episodes {episodes!r} instead of a whole number of 1 or more")
    return problems


def is_rate(metric: str) -> bool:
    return metric.endswith(("_rate", "accuracy"))


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def listed(value) -> list:
    """The entries of a run's field that may be missing, null, or a single text."""
    return [value] if isinstance(value, str) else [entry for entry in value or [] if entry]


def given_id(place: str) -> str | None:
    """`hub_id` of what the publisher names, unless it exists here."""
    name = hub_id(place)
    return name if name and not Path(place).exists() and not Path(name).exists() else None


def hub_id(place: str | None) -> str | None:
    """`owner/name` of a place that could be on the Hub; None for what is called as folders and files are."""
    name = (place or "").partition("@")[0]  # @revision
    owner, _, rest = name.partition("/")
    if not rest or not owner[:1].isalnum() or owner.lower() in LOCAL_FOLDERS or LOCAL_NAMES.fullmatch(rest):
        return None
    return name if _is_repo_id(name) else None


def _is_repo_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
