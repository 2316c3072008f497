"""What a model card is made of: what the files of a checkpoint tell, and what somebody has to add."""

import json
import math
import re
from collections import Counter
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


@dataclass
class CardFacts:
    """What the files of a checkpoint do not tell; all of it may be unknown.

    Args:
        repo_id: where it will be published, for the code on the card.
        base_model: Hub id (or folder) that it was made from; None: what the run says.
        base_model_relation: one of `RELATIONS`; None: "finetune" if there was a run.
        datasets: Hub ids, or folders, of which only the last part is named; none: what the run says.
        license: identifier of the Hub (`llama2`, `apache-2.0`, `other`, …); None: by the language model.
        evaluation: as `read_evaluation` gives it.
        training: `run.json` of a fine-tuning run. history: the entries of its `metrics.jsonl`. See `read_run`.
        notes: Markdown of the publisher, put on the card as it is (but for paths).
    """

    repo_id: str | None = None
    base_model: str | None = None
    base_model_relation: str | None = None
    datasets: list[str] = field(default_factory=list)
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
    def base(self) -> str | None:
        return self.base_model or self.training.get("model")

    @property
    def data(self) -> list[str]:
        return list(self.datasets or self.training.get("data") or [])


@dataclass
class Example:
    """What the policy did once. `image`: RGB, cameras side by side; `action`: `(A,)` or `(T, A)`, physical units."""

    image: Image.Image
    instruction: str
    unnorm_key: str
    action: np.ndarray


@dataclass
class Policy:
    """What the folder of a checkpoint tells.

    `parameters`, `dtypes`: how many numbers each part of the model has, and each dtype; `size`: their bytes.
    `dims`, `stats`: `name_action_dims` and `ActionStats` per unnorm_key.
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
        return declared or CONTROL_RATES.get(key) or (LIBERO_RATE if key.startswith("libero_") else None)

    def declares_dims(self, key: str) -> bool:
        return "names" in self.norm_stats[key]["action"]

    def has_gripper(self, key: str) -> bool:
        """Whether the dims are taken for OpenVLA's convention: x y z roll pitch yaw gripper, 1 = open."""
        return self.dims[key][-1] == ("gripper", "1 = open")


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
    processor = OpenVLAImageProcessor.from_pretrained(folder)
    return Policy(config, processor, prompt, norm_stats, parameters, dtypes, size, dims, stats)


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """`training` and `history` of `CardFacts` from a run of `openvla finetune`. FileNotFoundError if it is none."""
    folder = Path(folder)
    if not (folder / "run.json").exists():
        raise FileNotFoundError(f"{folder} has no run.json: expected the --output_dir of `openvla finetune`.")
    lines = []
    if (folder / "metrics.jsonl").exists():
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / "run.json").read_text(encoding="utf-8")), [json.loads(line) for line in lines]


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


def hub_id(place: str | None) -> str | None:
    """`owner/name` of a place that is on the Hub, as far as one can tell; None for folders and files.

    `runs/cup` could be either. What exists here, or is called as folders are, is taken for local: a missing link harms
    less than a wrong one.
    """
    name = (place or "").partition("@")[0]  # @revision
    owner, _, rest = name.partition("/")
    if not rest or not owner[:1].isalnum() or owner.lower() in LOCAL_FOLDERS or LOCAL_NAMES.fullmatch(rest):
        return None
    return name if _is_repo_id(name) and not Path(name).exists() else None


def _is_repo_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
