"""Shows that an exported folder acts as its source does, and keeps a record valid as long as no file changes."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PROOF = ".proof.json"  # stays on this machine
# Largest difference of logits, as a share of their range: none but for the rounding of merged or converted weights.
TOLERANCE = {"same weights": 1e-5, "torch.float32": 1e-3, "torch.float16": 2e-2, "torch.bfloat16": 5e-2}


@dataclass
class Observation:
    """What a policy is tried on. `images`: `(H, W, 3)` uint8 RGB, one per camera."""

    images: list[np.ndarray]
    instruction: str
    unnorm_key: str


class ProofError(RuntimeError):
    """The folder does not act as its source."""


def prove(folder: Path, source: dict, observations: list[Observation], same_weights: bool) -> tuple[dict, list]:
    """Loads `folder` without this package and its source with it, each in a fresh process, and compares.

    Args:
        source: for `trial.load_as_the_package`: {"folder", "adapter", "processor", "norm_stats", "dtype"}.
        same_weights: nothing was merged or converted, so tokens and actions must be the same.

    Returns (record of what was compared, the action of each observation in physical units). Raises ProofError.
    """
    with tempfile.TemporaryDirectory() as scratch:
        told = []
        for number, observation in enumerate(observations):
            files = [f"{scratch}/{number}.{camera}.npy" for camera in range(len(observation.images))]
            for file, image in zip(files, observation.images):
                np.save(file, image)
            told.append(
                {"images": files, "instruction": observation.instruction, "unnorm_key": observation.unnorm_key}
            )
        stranger = _try({"folder": str(folder), "as_the_package": False}, told, scratch)
        source = _try({**source, "as_the_package": True}, told, scratch)
    record = compare(source, stranger, len(told), same_weights)
    return record, [stranger[f"action.{number}"] for number in range(len(told))]


def compare(source: dict, stranger: dict, count: int, same_weights: bool) -> dict:
    """The record of two trials of the same `count` observations. Raises ProofError if they differ by more than the
    rounding of weights explains, or if images make no difference."""
    dtype = str(stranger["dtype"])
    differences, equal, tokens, actions = [], 0, 0, []
    for number in range(count):
        logits = source[f"logits.{number}"]
        difference = np.abs(stranger[f"logits.{number}"] - logits).max() / np.ptp(logits)
        differences.append(float(difference))
        equal += int((source[f"tokens.{number}"] == stranger[f"tokens.{number}"]).sum())
        tokens += source[f"tokens.{number}"].size
        actions.append(float(np.abs(source[f"action.{number}"] - stranger[f"action.{number}"]).max()))
        if np.array_equal(stranger[f"blind.{number}"], stranger[f"logits.{number}"]):
            raise ProofError("The image makes no difference to what the exported policy does.")
    worst, allowed = max(differences), TOLERANCE["same weights" if same_weights else dtype]
    if not worst <= allowed:
        raise ProofError(
            f"The exported policy's logits differ from the source's by {worst:.2g} of their range; {allowed:.2g} is "
            "what rounding may do."
        )
    if same_weights and (equal < tokens or max(actions) > 0):
        raise ProofError(
            f"Only {equal} of {tokens} action tokens are the source's; largest difference {max(actions)}."
        )
    return {
        "observations": count,
        "dtype": dtype,
        "same_weights": same_weights,
        "logits_difference": worst,
        "tokens_equal": f"{equal} of {tokens}",
        "action_difference": max(actions),
    }


def _try(request: dict, observations: list[dict], scratch: str) -> dict:
    """What `trial` finds, in a process that has not imported anything yet and does not ask the Hub."""
    name = "package" if request["as_the_package"] else "stranger"
    out = f"{scratch}/{name}.npz"
    file = Path(scratch) / f"{name}.json"
    file.write_text(json.dumps({**request, "observations": observations, "out": out}))
    script = (Path(__file__).parent / "trial.py").read_text()
    if not request["as_the_package"]:
        script = "import sys; sys.modules['openvla'] = None\n" + script
    environment = {**os.environ, "HF_MODULES_CACHE": f"{scratch}/modules"}
    if not request["as_the_package"]:
        environment |= {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(file)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=scratch,
        check=False,
    )
    if done.returncode != 0:
        who = "The source" if request["as_the_package"] else "The exported folder, loaded without this package,"
        raise ProofError(f"{who} does not act:\n{done.stderr.strip()[-3000:]}")
    with np.load(out) as content:
        return dict(content)


def published_files(folder: Path) -> dict[str, Path]:
    """`{path in the repository: file}` of everything that belongs on the Hub: no hidden files, no caches."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            found[name.as_posix()] = path
    return found


def write_proof(folder: Path, found: dict) -> None:
    """Writes the proof: what was compared (`found`, JSON), and the SHA-256 of every file that acting depends on."""
    record = {**found, "files": _digests(folder)}
    temporary = Path(folder) / f"{PROOF}.tmp"
    temporary.write_text(json.dumps(record, indent=2))
    os.replace(temporary, Path(folder) / PROOF)


def check_proof(folder: Path) -> dict:
    """The record of `write_proof`. Raises ValueError if there is none, or if a file has changed since."""
    path = Path(folder) / PROOF
    if not path.exists():
        raise ValueError(
            f"{folder} has no proof that it acts as it should: make it with `openvla export`, which tries it out."
        )
    record = json.loads(path.read_text())
    before, now = record["files"], _digests(folder)
    changed = sorted(name for name in before | now if before.get(name) != now.get(name))
    if changed:
        raise ValueError(f"{folder} has changed since it was proven ({', '.join(changed[:5])}): export it again.")
    return record


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 per file, but for the card and its pictures, which may be edited by hand."""
    digests = {}
    for name, path in published_files(folder).items():
        if name == "README.md" or name.startswith("assets/"):
            continue
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digests[name] = digest.hexdigest()
    return digests
