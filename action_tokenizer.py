"""What an action is: physical units <-> [-1, 1] <-> bins <-> token ids. numpy only.

Two inverse pairs, used by training, inference, evaluation and serving alike:
`ActionStats.normalize / unnormalize` (physical units <-> [-1, 1]) and `ActionTokenizer.encode / decode`
([-1, 1] <-> token ids). Source: Kim et al. 2024 (arXiv:2406.09246), sec. 3.2, and the original code's behaviour
where the two differ.

Legend: B batch · T action chunk · A action dims.
"""

from dataclasses import dataclass

import numpy as np


class ActionTokenizer:
    """Maps normalised actions to the last ids of a vocabulary and back.

    Uniform bins (the original): `num_bins` edges over [-1, 1]; an action in `[edge[k-1], edge[k])` is bin `k` and gets
    id `vocab_end - k`, so the *smallest* action has the *largest* id (31999 … 31744 for Llama-2). There are
    `num_bins` ids but `num_bins - 1` intervals: only an action of exactly 1 falls into the last bin, and the two
    lowest ids decode to the same centre.

    Bins of equal population (`fit`): own edges and representative values per action dimension, stored in the
    checkpoint as `config.action_bins`.

    Args:
        vocab_end: one past the highest action id.
        num_bins: number of edges, and of action ids.
        bins: None for uniform bins, or `{"edges": (A, num_bins), "centers": (A, num_bins - 1)}` in [-1, 1].
    """

    def __init__(self, vocab_end: int = 32000, num_bins: int = 256, bins: dict | None = None):
        self.vocab_end = vocab_end
        self.num_bins = num_bins
        if bins is None:
            self.edges = np.linspace(-1.0, 1.0, num_bins)
            self.centers = (self.edges[:-1] + self.edges[1:]) / 2.0
        else:
            self.edges = np.asarray(bins["edges"], dtype=np.float64)
            self.centers = np.asarray(bins["centers"], dtype=np.float64)
            dims = len(self.edges)
            if self.edges.shape != (dims, num_bins) or self.centers.shape != (dims, num_bins - 1):
                raise ValueError(
                    f"Bins of equal population need edges (A, {num_bins}) and centers (A, {num_bins - 1}), "
                    f"got {self.edges.shape} and {self.centers.shape}."
                )
            if not (np.diff(self.edges, axis=1) >= 0).all() or not np.isfinite(self.centers).all():
                raise ValueError("Bin edges must not decrease along a dimension, and centers must be finite.")

    @classmethod
    def from_config(cls, config) -> "ActionTokenizer":
        """The tokenizer that an `OpenVLAConfig` declares."""
        return cls(config.action_token_end, config.n_action_bins, config.action_bins)

    @staticmethod
    def fit(actions: np.ndarray, num_bins: int = 256) -> dict:
        """Bins that hold equally many of the given actions, for `OpenVLAConfig.action_bins`.

        Args:
            actions: `(N, A)` normalised actions of the training set, finite.

        Returns `{"edges": [A][num_bins], "centers": [A][num_bins - 1]}`. A centre is the mean of the actions in its
        bin (the middle where a bin is empty), so values that occur often, such as an open gripper or an idle
        dimension, come back exactly.
        """
        actions = _finite(np.asarray(actions, dtype=np.float64), "actions")
        if actions.ndim != 2 or len(actions) == 0:
            raise ValueError(f"Expected actions (N, A) with at least one row, got shape {actions.shape}.")
        edges = np.quantile(np.clip(actions, -1.0, 1.0), np.linspace(0.0, 1.0, num_bins), axis=0).T
        centers = (edges[:, :-1] + edges[:, 1:]) / 2.0
        for dim, values in enumerate(np.clip(actions, -1.0, 1.0).T):
            index = np.clip(np.digitize(values, edges[dim]) - 1, 0, num_bins - 2)
            counts = np.bincount(index, minlength=num_bins - 1)
            sums = np.bincount(index, weights=values, minlength=num_bins - 1)
            centers[dim, counts > 0] = sums[counts > 0] / counts[counts > 0]
        return {"edges": edges.tolist(), "centers": centers.tolist()}

    @property
    def vocab_start(self) -> int:
        """The lowest action id (31744 for Llama-2)."""
        return self.vocab_end - self.num_bins

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Token ids of normalised actions.

        Args:
            actions: `(…, A)` in [-1, 1]; values outside, ±inf included, are clipped to it. NaN raises.

        Returns int64 `(…, A)` in [vocab_start, vocab_end).
        """
        actions = np.asarray(actions, dtype=np.float64)
        if np.isnan(actions).any():
            raise ValueError(f"Actions contain NaN at {np.argwhere(np.isnan(actions))[0].tolist()}.")
        actions = np.clip(actions, -1.0, 1.0)
        if self.edges.ndim == 1:
            return self.vocab_end - np.digitize(actions, self.edges)
        self._check_dims(actions)
        bins = np.stack([np.digitize(actions[..., d], edges) for d, edges in enumerate(self.edges)], axis=-1)
        return self.vocab_end - np.clip(bins, 1, self.num_bins)

    def decode(self, ids: np.ndarray, clip: bool = False) -> np.ndarray:
        """Normalised actions of token ids: the centre (or the mean of the population) of each bin.

        Args:
            ids: integers `(…, A)` in [vocab_start, vocab_end).
            clip: take ids outside that range for the nearest bin, as the original does without a word. By default
                they raise: a token that is not an action moves no robot.

        Returns float64 `(…, A)` in [-1, 1].
        """
        ids = np.asarray(ids)
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"Token ids must be integers, got {ids.dtype}.")
        outside = (ids < self.vocab_start) | (ids >= self.vocab_end)
        if outside.any() and not clip:
            raise ValueError(
                f"Ids {np.unique(ids[outside]).tolist()} are not action tokens: expected "
                f"{self.vocab_start} … {self.vocab_end - 1}."
            )
        index = np.clip(self.vocab_end - ids - 1, 0, self.num_bins - 2)
        if self.edges.ndim == 1:
            return self.centers[index]
        self._check_dims(index)
        return np.stack([self.centers[d][index[..., d]] for d in range(len(self.centers))], axis=-1)

    def _check_dims(self, values: np.ndarray) -> None:
        if values.shape[-1] != len(self.edges):
            raise ValueError(f"These bins are for {len(self.edges)} action dims, got shape {values.shape}.")


@dataclass(frozen=True)
class ActionStats:
    """Statistics of one dataset that map physical units to [-1, 1] and back.

    `low`/`high` are the 1st and 99th percentile ("q99"), minimum and maximum ("min_max"), or mean ± std ("mean_std").
    `mask` False marks dims that pass through unchanged (the gripper: 1 = open, 0 = closed); `constant` marks dims
    that never change in the dataset. Arrays are float64 / bool `(A,)`.
    """

    low: np.ndarray
    high: np.ndarray
    mask: np.ndarray
    constant: np.ndarray
    scheme: str = "q99"

    @classmethod
    def from_norm_stats(
        cls, norm_stats: dict | None, unnorm_key: str | None = None, scheme: str = "q99", entry: str = "action"
    ) -> "ActionStats":
        """Reads `norm_stats[unnorm_key]["action"]` of a checkpoint.

        Args:
            norm_stats: `config.norm_stats`: `{key: {"action": {"q01": [A], "q99": [A], "mask": [A], …}}}`.
            unnorm_key: which dataset; None is allowed when there is exactly one.
            scheme: "q99", "min_max" or "mean_std".
            entry: "action", or "proprio" for the robot's state.

        Raises KeyError that lists the keys if there are no statistics or the key is unknown, ValueError if the entry
        lacks what `scheme` needs.
        """
        key = resolve_unnorm_key(norm_stats, unnorm_key)
        if entry not in norm_stats[key]:
            raise KeyError(f"norm_stats[{key!r}] has no {entry!r} statistics, only {sorted(norm_stats[key])}.")
        stats = norm_stats[key][entry]
        needed = {"q99": ("q01", "q99"), "min_max": ("min", "max"), "mean_std": ("mean", "std")}
        if scheme not in needed:
            raise ValueError(f"Unknown normalisation {scheme!r}; expected one of {sorted(needed)}.")
        if missing := [name for name in needed[scheme] if name not in stats]:
            raise ValueError(f"norm_stats[{key!r}][{entry!r}] lacks {missing}, needed for {scheme!r}.")
        first, second = (np.asarray(stats[name], dtype=np.float64) for name in needed[scheme])
        low, high = (first - second, first + second) if scheme == "mean_std" else (first, second)
        mask = np.asarray(stats.get("mask", np.ones(low.shape, dtype=bool)))
        if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
            raise ValueError(f"norm_stats[{key!r}][{entry!r}]: mask must hold true and false, got {mask.tolist()}.")
        mask = mask.astype(bool)
        # Without minimum and maximum nothing is known to be constant, as in statistics made for inference only.
        constant = np.zeros(low.shape, dtype=bool)
        if "min" in stats and "max" in stats:
            constant = np.asarray(stats["min"]) == np.asarray(stats["max"])
        if low.ndim != 1 or not low.shape == high.shape == mask.shape == constant.shape:
            raise ValueError(
                f"norm_stats[{key!r}][{entry!r}]: lengths differ: {needed[scheme][0]} {low.shape}, "
                f"{needed[scheme][1]} {high.shape}, mask {mask.shape}, min/max {constant.shape}."
            )
        _finite(np.stack([low, high]), f"norm_stats[{key!r}][{entry!r}]")
        if (high < low).any():
            dims = np.flatnonzero(high < low).tolist()
            raise ValueError(
                f"norm_stats[{key!r}][{entry!r}]: {needed[scheme]} are in the wrong order in dims {dims}."
            )
        return cls(low, high, mask, constant, scheme)

    @property
    def dim(self) -> int:
        """Action size A."""
        return len(self.low)

    def normalize(self, actions: np.ndarray) -> np.ndarray:
        """Physical units -> [-1, 1], as the original does for training.

        Clips to [-1, 1] ("mean_std" does not), adds 1e-8 to the range, and sets dims that are constant in the dataset
        to 0; masked dims pass through (unless constant). This is the original's asymmetry: `unnormalize` does none
        of these, so what training clipped does not come back, and a constant dim comes back as its range's middle.

        Args:
            actions: `(…, A)` finite, physical units.

        Returns float64 `(…, A)`.
        """
        actions = self._check(actions)
        if self.scheme == "mean_std":
            mean, std = (self.low + self.high) / 2.0, (self.high - self.low) / 2.0
            scaled = (actions - mean) / (std + 1e-8)
        else:
            scaled = np.clip(2.0 * (actions - self.low) / (self.high - self.low + 1e-8) - 1.0, -1.0, 1.0)
        return np.where(self.constant, 0.0, np.where(self.mask, scaled, actions))

    def unnormalize(self, actions: np.ndarray) -> np.ndarray:
        """[-1, 1] -> the dataset's units (metres and radians in bridge_orig; gripper 1 = open).

        Args:
            actions: `(…, A)` finite; masked dims pass through.

        Returns float64 `(…, A)`. No clipping, no epsilon: bit-equal to the original's `predict_action`.
        """
        actions = self._check(actions)
        return np.where(self.mask, 0.5 * (actions + 1.0) * (self.high - self.low) + self.low, actions)

    def _check(self, actions: np.ndarray) -> np.ndarray:
        actions = _finite(np.asarray(actions, dtype=np.float64), "actions")
        if actions.ndim == 0 or actions.shape[-1] != self.dim:
            raise ValueError(f"Statistics are for {self.dim} action dims, got actions of shape {actions.shape}.")
        return actions


def resolve_unnorm_key(norm_stats: dict | None, unnorm_key: str | None) -> str:
    """The key to use: `unnorm_key` if it exists, or the only one there is. KeyError lists the keys otherwise."""
    if not norm_stats:
        raise KeyError(
            "This checkpoint has no action statistics (config.norm_stats), so its actions have no physical units. "
            "Set `model.norm_stats` from the dataset_statistics.json of the training run."
        )
    if unnorm_key is None and len(norm_stats) == 1:
        return next(iter(norm_stats))
    if unnorm_key not in norm_stats:
        problem = "unnorm_key is needed" if unnorm_key is None else f"Unknown unnorm_key {unnorm_key!r}"
        raise KeyError(f"{problem}: this checkpoint has statistics for {sorted(norm_stats)}.")
    return unnorm_key


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got {values[~np.isfinite(values)][0]} among shape {values.shape}.")
    return values


# Deltas of the end effector, then the gripper: the convention of OpenVLA's own training data, told by their names.
_END_EFFECTOR = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_OPENVLA_DATASETS = ("austin_buds", "austin_sailor", "austin_sirius", "bc_z", "berkeley_autolab_ur5", "bridge_dataset")
_OPENVLA_DATASETS += ("berkeley_cable_routing", "berkeley_fanuc_manipulation", "bridge_orig", "cmu_stretch", "dobbe")
_OPENVLA_DATASETS += ("dlr_edan_shared_control", "fmb_dataset", "fractal20220817_data", "furniture_bench", "jaco_play")
_OPENVLA_DATASETS += ("iamlab_cmu_pickup_insert", "kuka", "libero_", "nyu_franka_play", "roboturk", "stanford_hydra")
_OPENVLA_DATASETS += ("taco_play", "toto", "ucsd_kitchen", "utaustin_mutex", "viola")
_METRIC = ("bridge_orig", "fractal20220817_data")  # others hold controller commands, millimetres, …


def name_action_dims(norm_stats: dict, unnorm_key: str) -> list[tuple[str, str]]:
    """`(name, unit)` per action dim of a dataset.

    Taken from `norm_stats[unnorm_key]["action"]["names"]` and `["units"]` if it declares them. Otherwise seven dims of
    which only the last is masked have OpenVLA's names, and its gripper (1 = open), if the dataset is one of OpenVLA's
    own; of any other dataset they may as well be joints, so names are guesses, marked by "?", without polarity.
    Metres and radians are said of datasets known to use them only. Anything else is just numbered.
    """
    stats = norm_stats[unnorm_key]["action"]
    low, high = (stats.get(names[0], stats.get(names[1])) for names in (("q01", "min"), ("q99", "max")))
    dim = len(stats["mean"] if low is None else low)
    if "names" in stats:
        return list(zip(stats["names"], stats.get("units", [""] * dim)))
    if dim != 7 or list(stats.get("mask", [])) != [True] * 6 + [False]:
        return [(f"action {index}", "") for index in range(dim)]
    if not unnorm_key.startswith(_OPENVLA_DATASETS) or low is None or low[6] < 0 or high is None or high[6] > 1:
        return list(zip([f"{name}?" for name in _END_EFFECTOR], ["dataset units"] * 6 + [""]))
    length, angle = ("m", "rad") if unnorm_key in _METRIC else ("dataset units", "dataset units")
    return list(zip(_END_EFFECTOR, [length] * 3 + [angle] * 3 + ["1 = open"]))
