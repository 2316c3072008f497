"""The last look at an action before a robot gets it: within what the policy learned, within what the robot may do.

A file of limits is one robot's, in the units of its actions; dims that it does not name are free:

    {"dims": {"x": [-0.02, 0.02], "y": [-0.02, 0.02], "z": [-0.02, 0.02]}, "beyond": "clamp"}

`beyond`: "clamp" (the nearest value that is allowed) or "refuse" (no action at all). What was changed is always told.

Legend: T action chunk · A action dims.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STATISTICS = "statistics"  # as a source of limits
EXPECTED = '{"dims": {"x": [low, high], …}, "beyond": "clamp" or "refuse"}'


class Forbidden(RuntimeError):
    """An action that the robot's limits do not allow, and that is not to be clamped."""


@dataclass(frozen=True)
class Limits:
    """Bounds of every action.

    Args:
        low, high: `(A,)` float64 in the units of the actions, `-inf` and `inf` where there are none.
        names: of the A dims.
        source: where they come from, for messages: "statistics", or a file.
        refuse: raise instead of clamping.
    """

    low: np.ndarray
    high: np.ndarray
    names: list[str]
    source: str
    refuse: bool = False

    def apply(self, actions: np.ndarray) -> tuple[np.ndarray, list[dict]]:
        """`(T, A)` within the bounds, and what was changed.

        Returns of each dim that was changed its `dim` (name), `wanted` (the value farthest off), `bound`, in how many
        `steps`, and whose `limits`. Raises Forbidden instead if `refuse`.
        """
        clamped = np.clip(actions, self.low, self.high)
        changed = []
        for dim in np.flatnonzero((clamped != actions).any(axis=0)):
            off = np.abs(clamped[:, dim] - actions[:, dim])
            worst = int(off.argmax())
            changed.append(
                {
                    "dim": self.names[dim],
                    "wanted": float(actions[worst, dim]),
                    "bound": float(clamped[worst, dim]),
                    "steps": int((off > 0).sum()),
                    "limits": self.source,
                }
            )
        if changed and self.refuse:
            told = ", ".join(f"{each['dim']} {each['wanted']:.4g} beyond {each['bound']:.4g}" for each in changed)
            raise Forbidden(f"The action is outside of the robot's limits ({self.source}): {told}.")
        return clamped, changed


def range_of_statistics(stats, bounds: dict) -> tuple[np.ndarray, np.ndarray] | None:
    """The range of the training data, `(A,)` each: 1st to 99th percentile of dims that were clipped to it; of others,
    which are not normalised or not by the scheme "q99", least and greatest value. None if the statistics tell none.

    Args:
        stats: `ActionStats` of a dataset.
        bounds: its `norm_stats[unnorm_key]["action"]`.
    """
    known = [pair for pair in (("q01", "q99"), ("min", "max")) if set(pair) <= set(bounds)]
    if not known:
        return None
    full = known[-1]
    usual = known[0] if stats.scheme == "q99" else full
    low, high = (np.where(stats.mask, bounds[usual[end]], bounds[full[end]]).astype(np.float64) for end in (0, 1))
    return low, high


def limits_of_statistics(stats, bounds: dict, names: list[str]) -> Limits:
    """To that range; ValueError if there is none."""
    if (found := range_of_statistics(stats, bounds)) is None:
        raise ValueError(f"There is no range to clamp to: the statistics hold only {sorted(bounds)}.")
    return Limits(*found, list(names), STATISTICS)


def read_limits(file: str | Path, names: list[str]) -> Limits:
    """Of a robot. Raises ValueError that says what is wrong with the file."""
    try:
        content = json.loads(Path(file).read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}. Expected {EXPECTED}.") from None
    if not isinstance(content, dict) or not isinstance(content.get("dims"), dict):
        raise ValueError(f"{file}: expected {EXPECTED}.")
    if unknown := sorted(set(content) - {"dims", "beyond"}) + sorted(set(content["dims"]) - set(names)):
        raise ValueError(f"{file}: {unknown} are not known; the policy's action dims are {names}.")
    beyond = content.get("beyond", "clamp")
    if beyond not in ("clamp", "refuse"):
        raise ValueError(f'{file}: beyond must be "clamp" or "refuse", got {beyond!r}.')
    low, high = np.full(len(names), -np.inf), np.full(len(names), np.inf)
    for name, pair in content["dims"].items():
        is_pair = isinstance(pair, list) and [type(value) in (int, float) for value in pair] == [True, True]
        if not is_pair or not pair[0] <= pair[1] or not all(map(math.isfinite, pair)):
            raise ValueError(f"{file}: expected {name} as [low, high], got {pair}.")
        low[names.index(name)], high[names.index(name)] = pair
    return Limits(low, high, list(names), str(file), beyond == "refuse")
