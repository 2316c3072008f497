"""One pass over a dataset: every episode checked, its length noted, and `norm_stats` computed. Images are not touched.

The result is cached under the hash of the files' names, sizes and times, so a second run starts at once.
"""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import openvla
from openvla.finetune.steps import DAMAGE, Reader, check_episode

logger = logging.getLogger(__name__)
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "openvla" / "statistics"


@dataclass
class Scan:
    """What a pass over a dataset found.

    Args:
        lengths: steps per episode; 0 for episodes that were skipped as bad.
        norm_stats: `{"action": {mean, std, min, max, q01, q99, mask}, "proprio": {…}, "num_trajectories",
            "num_transitions"}`, as released checkpoints have it.
        skipped: why each bad episode was skipped.
    """

    lengths: list[int]
    norm_stats: dict
    skipped: list[str]


def scan(reader: Reader, skip_bad: bool = False, mask: list[bool] | None = None, progress: bool = True) -> Scan:
    """Reads all episodes of a dataset once; raises ValueError at the first bad one unless `skip_bad`.

    Args:
        mask: which action dims to normalise; None: all, except a last of seven dims that stays in [0, 1] (a gripper).
    """
    cache = CACHE / f"{_fingerprint(reader, skip_bad, mask)}.json"
    if cache.exists():
        found = Scan(**json.loads(cache.read_text()))
        _tell(found)
        return found
    from tqdm import tqdm

    lengths, actions, proprios, skipped = [], [], [], []
    for index in tqdm(range(len(reader)), desc=f"scan {reader.name}", unit="episode", disable=not progress):
        try:
            episode = reader.read(index)
            check_episode(episode, actions[0].shape[1] if actions else None)
        except DAMAGE as error:
            problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            problem = f"{reader.name}, episode {index}: {problem}"
            if not skip_bad:
                raise ValueError(f"{problem} (--skip-bad-episodes leaves such episodes out)") from error
            skipped.append(problem)
            lengths.append(0)
            continue
        lengths.append(len(episode))
        actions.append(episode.actions)
        proprios.append(episode.proprio)
    if not actions:
        raise ValueError(f"{reader.name}: not one good episode among {len(reader)}; first problem: {skipped[:1]}")
    found = Scan(lengths, summarize(actions, proprios, mask), skipped)
    _tell(found)
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(found.__dict__))
    os.replace(temporary, cache)
    return found


def _tell(found: Scan) -> None:
    for problem in found.skipped:
        logger.warning("skipped: %s", problem)
    if found.skipped:
        logger.warning("%d of %d episodes were skipped", len(found.skipped), len(found.lengths))


def summarize(actions: list[np.ndarray], proprios: list[np.ndarray | None], mask: list[bool] | None = None) -> dict:
    """`norm_stats` of episodes' actions `(N, A)` and states `(N, P)`, over all steps."""
    stacked = np.concatenate(actions).astype(np.float64)
    action = _describe(stacked)
    if mask is None:
        last = stacked[:, -1]
        is_gripper = bool(stacked.shape[1] == 7 and last.min() >= 0.0 and last.max() <= 1.0)
        mask = [True] * (stacked.shape[1] - is_gripper) + [False] * is_gripper
    if len(mask) != stacked.shape[1]:
        raise ValueError(f"The mask has {len(mask)} entries for {stacked.shape[1]} action dims.")
    stats = {"action": {**action, "mask": [bool(value) for value in mask]}}
    if all(proprio is not None for proprio in proprios):
        stats["proprio"] = _describe(np.concatenate(proprios).astype(np.float64))
    return {**stats, "num_trajectories": len(actions), "num_transitions": len(stacked)}


def _describe(values: np.ndarray) -> dict[str, list[float]]:
    rows = {"mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0)}
    rows |= {"q01": np.quantile(values, 0.01, axis=0), "q99": np.quantile(values, 0.99, axis=0)}
    return {name: row.tolist() for name, row in rows.items()}


def _fingerprint(reader: Reader, *options) -> str:
    files = [(os.path.abspath(file), os.path.getsize(file), os.stat(file).st_mtime_ns) for file in reader.files()]
    folder = Path(__file__).parent  # of the code that decides what a dataset's actions are
    code = [*sorted(folder.glob("readers/*.py")), folder / "oxe.py", folder / "oxe.json", folder / "statistics.py"]
    content = [openvla.__version__, [file.read_text() for file in code], reader.name, files, options]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
