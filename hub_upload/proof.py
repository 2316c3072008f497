"""Shows that an exported folder acts as its source does, and keeps a record valid as long as no file changes."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

PROOF = ".proof.json"  # stays on this machine
# Largest difference of what the head says, as a share of its range: none but for the rounding of converted weights.
TOLERANCE = {"same weights": 1e-5, "torch.float32": 1e-3, "torch.float16": 2e-2, "torch.bfloat16": 5e-2}
# How close two tokens must be for the source, as a share of the range, for the other one to be taken after rounding.
CLOSE = {"torch.float32": 1e-4, "torch.float16": 2e-2, "torch.bfloat16": 2e-2}
SHARE_OF_ADAPTER = 0.1  # largest difference as a share of what the adapter itself changes
ACTION_RANGE = 2.0  # of continuous heads: actions lie in [-1, 1]
# Largest difference of actions from the same weights, as a share of the largest: processes round in other orders, and
# steps of denoising let that grow.
DRIFT = 1e-2


@dataclass
class Observation:
    """What a policy is tried on. `images`: `(H, W, 3)` uint8 RGB, one per camera; `proprio`: `(P,)`, in the units of
    the dataset, for policies that take it."""

    images: list[np.ndarray]
    instruction: str
    unnorm_key: str
    proprio: np.ndarray | None = None


class ProofError(RuntimeError):
    """The folder does not act as its source."""


def prove(folder: Path, source: dict, observations: list[Observation], same_weights: bool) -> tuple[dict, list]:
    """Loads the source with this package and `folder` without it, each in a fresh process, and compares.

    Args:
        source: for `trial.load_as_the_package`: {"folder", "config", "adapter", "new_parts", "processor",
            "norm_stats", "dtype", "center_crop_area"}.
        same_weights: nothing was merged or converted, so tokens and actions must be the same.

    Returns (record of what was compared, the action of each observation in physical units). Raises ProofError.
    """
    with tempfile.TemporaryDirectory() as scratch:
        told = []
        for number, observation in enumerate(observations):
            files = [f"{scratch}/{number}.{camera}.npy" for camera in range(len(observation.images))]
            for file, image in zip(files, observation.images):
                np.save(file, image)
            state = None if observation.proprio is None else np.asarray(observation.proprio, dtype=np.float64).tolist()
            told.append({"images": files, "instruction": observation.instruction, "proprio": state})
            told[-1]["unnorm_key"] = observation.unnorm_key
        before = _try({**source, "as_the_package": True}, told, scratch)
        for number, observation in enumerate(told):
            if f"tokens.{number}" in before:
                observation["tokens"] = before[f"tokens.{number}"].tolist()
        after = _try({"folder": str(folder), "as_the_package": False}, told, scratch)
    record = compare(before, after, len(told), same_weights)
    return record, [after[f"action.{number}"] for number in range(len(told))]


def compare(before: dict, after: dict, count: int, same_weights: bool) -> dict:
    """The record of two trials of the same `count` observations, of the source and of the exported folder.

    Raises ProofError if statistics differ; if logits, or what a continuous head says, differ by more than rounding
    explains, or by more than a tenth of what an adapter changes; if another token is chosen where the source did not
    see the two close together; or if one of the images, or the robot's state, makes no difference.
    """
    if json.loads(str(before["norm_stats"])) != json.loads(str(after["norm_stats"])):
        raise ProofError("The exported policy's statistics are not its source's.")
    start, end = before["actions"]
    dtype, worst, share, equal, tokens, actions, drift = str(after["dtype"]), 0.0, 0.0, 0, 0, 0.0, 0.0
    has_tokens = "tokens.0" in before
    for number in range(count):
        said, found = before[f"said.{number}"], after[f"said.{number}"]
        if any(not np.isfinite(values).all() for values in (said, found)):
            raise ProofError(f"What the {'language model' if has_tokens else 'action head'} says is not finite.")
        difference, reach = np.abs(found - said), np.ptp(said) if has_tokens else ACTION_RANGE
        worst = max(worst, float(difference.max() / reach))
        if f"plain.{number}" in before:
            effect = np.abs(said - before[f"plain.{number}"]).max()
            share = max(share, float(difference.max() / effect) if effect > 0 else np.inf)
        if has_tokens:
            chosen, other = (values[:, start:end].argmax(axis=1) + start for values in (said, found))
            rows = np.arange(len(said))
            if (said[rows, chosen] - said[rows, other] > CLOSE[dtype] * reach).any():
                raise ProofError("The exported policy chooses other tokens than its source.")
            tokens += len(chosen)
            equal += int((chosen == other).sum())
        off = float(np.abs(before[f"action.{number}"] - after[f"action.{number}"]).max())
        actions, drift = max(actions, off), max(drift, off / (np.abs(before[f"action.{number}"]).max() or 1.0))
        for name in (name for name in after if name.startswith(f"blind.{number}.")):
            if np.array_equal(after[name], found[: len(after[name])]):
                what = name.rpartition(".")[2].capitalize()
                raise ProofError(f"{what} makes no difference to what the policy does.")
    allowed = TOLERANCE["same weights" if same_weights else dtype]
    if worst > allowed:
        raise ProofError(
            f"What the exported policy's head says differs from the source's by {worst:.2g} of its range; "
            f"{allowed:.2g} is what rounding may do."
        )
    if share > SHARE_OF_ADAPTER:
        raise ProofError(
            f"Merged in {dtype}, the policy differs from the one with its adapter by {share:.2g} of what the adapter "
            "changes at all: rounding swallows what was learned. Export it with --dtype float32."
        )
    if same_weights and has_tokens and (equal < tokens or actions > 0):
        raise ProofError(f"Only {equal} of {tokens} action tokens are the source's; largest difference {actions}.")
    if same_weights and drift > DRIFT:
        raise ProofError(f"The actions are not the source's; largest difference {actions}.")
    record = {"observations": count, "dtype": dtype, "same_weights": same_weights, "action_difference": actions}
    if has_tokens:
        record |= {"tokens_equal": f"{equal} of {tokens}", "logits_difference": worst}
    else:
        record |= {"head_difference": worst}
    return record | ({"share_of_adapter": share} if "plain.0" in before else {})


def _try(request: dict, observations: list[dict], scratch: str) -> dict:
    """What `trial` finds, in a process that has not imported anything yet and, as a stranger, does not ask the Hub."""
    name = "package" if request["as_the_package"] else "stranger"
    out, file = f"{scratch}/{name}.npz", Path(scratch) / f"{name}.json"
    file.write_text(json.dumps({**request, "observations": observations, "out": out}))
    script = (Path(__file__).parent / "trial.py").read_text()
    environment = {**os.environ, "HF_MODULES_CACHE": f"{scratch}/modules"}
    if not request["as_the_package"]:
        script = "import sys; sys.modules['openvla'] = None\n" + script
        environment |= {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch, check=False)
    if done.returncode != 0:
        who = "The source" if request["as_the_package"] else "The exported folder, loaded without this package,"
        died = f" (killed by signal {-done.returncode}: out of memory?)" if done.returncode < 0 else ""
        raise ProofError(f"{who} does not act{died}:\n{done.stderr.strip()[-3000:]}")
    with np.load(out) as content:
        return dict(content)


def published_files(folder: Path) -> dict[str, Path]:
    """`{path in the repository: file}` of everything that belongs on the Hub.

    Hidden files and caches do not, nor what lies in `assets/` without README.md saying its name: pictures of an older
    card, or somebody's notes. Raises ValueError for symbolic links to somewhere else, which could publish anything.
    """
    folder, found = Path(folder), {}
    card = (folder / "README.md").read_bytes() if (folder / "README.md").is_file() else b""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{path} is a link to {path.resolve()}, outside of the folder: put the file itself there."
            )
        told = name.as_posix()
        mentioned = told.encode() in card or quote(told).encode() in card
        if path.is_file() and (name.parts[0] != "assets" or mentioned):
            found[told] = path
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
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise ValueError(f"{path} is no record that `openvla export` wrote: export it again.")
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
