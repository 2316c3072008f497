"""Policies that need no training, to judge the others by: at random, the scripted expert, and the expert in tokens.

They have what the rollouts ask of `OpenVLAPolicy`: `metadata`, `infer_batch`, and what they need to see.
"""

import json
from pathlib import Path

import numpy as np

from openvla.action_tokenizer import ActionStats, ActionTokenizer
from openvla.evaluate.envs import Conventions


class RandomPolicy:
    """Every number uniform over what the simulator takes; the same for the same seed, task, episode and step."""

    needs = ("place",)

    def __init__(self, conventions: Conventions, seed: int):
        self._low, self._high = np.transpose(conventions.action_range)
        self._seed = seed
        self.metadata = describe(conventions, "random")

    def infer_batch(self, observations: list[dict]) -> list[dict]:
        seeds = [(self._seed, *observation["place"]) for observation in observations]
        return [{"actions": np.random.default_rng(seed).uniform(self._low, self._high)[None]} for seed in seeds]


class MajorityPolicy:
    """Says at every step what was most frequent in a dataset: of each number the most frequent of 256 bins."""

    needs = ()

    def __init__(self, conventions: Conventions, source: str):
        reader = _open(source)
        stats = dataset_statistics(source)
        actions = np.concatenate([reader.read(index).actions for index in range(len(reader))])
        tokenizer = ActionTokenizer()
        ids = tokenizer.encode(stats.normalize(actions))
        most = np.array([np.bincount(column).argmax() for column in ids.T])
        self.action = stats.unnormalize(tokenizer.decode(most[None]))
        self.metadata = describe(conventions, "majority")

    def infer_batch(self, observations: list[dict]) -> list[dict]:
        return [{"actions": self.action} for _ in observations]


class ReplayPolicy:
    """Carries out a demonstration of the same instruction, blindly, another one for every episode; then it rests.

    What it reaches needs neither eyes nor learning.
    """

    needs = ("place",)

    def __init__(self, conventions: Conventions, source: str):
        reader = _open(source)
        told = Path(source, "meta", "demonstrations.json")
        made = json.loads(told.read_text())["settings"] if told.exists() else {}
        if any(made.get(option) for option in ("push", "lead", "first")):
            raise ValueError(
                f"{source} was made with --push, --lead or --first: its episodes begin or end on the way. Make it "
                "without."
            )
        self._episodes: dict[str, list[np.ndarray]] = {}
        for index in range(len(reader)):
            episode = reader.read(index)
            self._episodes.setdefault(episode.instructions[0], []).append(episode.actions)
        self.metadata = describe(conventions, "replay")

    def infer_batch(self, observations: list[dict]) -> list[dict]:
        return [{"actions": self._action(**observation)[None]} for observation in observations]

    def _action(self, instruction: str, place: tuple[int, int, int], **_) -> np.ndarray:
        if instruction not in self._episodes:
            raise ValueError(f"There is no demonstration of {instruction!r}, only of {list(self._episodes)}.")
        known, (_, episode, step) = self._episodes[instruction], place
        actions = known[episode % len(known)]
        return actions[step] if step < len(actions) else np.array([*np.zeros(len(actions[0]) - 1), actions[-1][-1]])


class ExpertPolicy:
    """What the scripted expert would do, which looks into the simulator and sends its action with the observation.

    Args:
        stats: of a dataset; actions then go through its normalisation and 256 bins and back, which shows what tokens
            cost: about as much as a policy that speaks in them can hope for.
    """

    needs = ("expert",)

    def __init__(self, conventions: Conventions, stats: ActionStats | None = None):
        self.stats = stats
        self.metadata = describe(conventions, "expert" if stats is None else "expert in tokens")
        if stats is not None:
            self.metadata["action_dims"] = [
                {**dim, "low": float(low), "high": float(high)}
                for dim, low, high in zip(self.metadata["action_dims"], stats.low, stats.high)
            ]
            self.metadata["mask"] = stats.mask.tolist()
            if stats.dim != len(conventions.action_dims):
                raise ValueError(f"Statistics of {stats.dim} dims for actions of {len(conventions.action_dims)}.")

    def infer_batch(self, observations: list[dict]) -> list[dict]:
        actions = [np.asarray(observation["expert_action"], dtype=np.float64) for observation in observations]
        if self.stats is not None:
            actions = through_tokens(np.stack(actions), self.stats)
        return [{"actions": action[None]} for action in actions]


def make_baseline(name: str, conventions: Conventions, statistics: str | None, seed: int):
    """The policy that `openvla evaluate --baseline` names; `statistics` is the dataset that it learns from, if any."""
    if name == "random":
        return RandomPolicy(conventions, seed)
    if name in ("majority", "replay"):
        return (MajorityPolicy if name == "majority" else ReplayPolicy)(conventions, statistics)
    return ExpertPolicy(conventions, dataset_statistics(statistics) if name == "expert-tokens" else None)


def through_tokens(actions: np.ndarray, stats: ActionStats) -> np.ndarray:
    """Actions `(N, A)` as a policy that has learnt them without any error would give them."""
    tokenizer = ActionTokenizer()
    return stats.unnormalize(tokenizer.decode(tokenizer.encode(stats.normalize(actions))))


def _open(source: str):
    """A LeRobot dataset of demonstrations, whose actions are as policies speak them."""
    from openvla.finetune.readers import open_reader
    from openvla.finetune.readers.lerobot import LeRobotReader

    reader = open_reader(source)
    if not isinstance(reader, LeRobotReader):
        raise ValueError(f"Expected a LeRobot dataset of `openvla demos`, got {source}, a {type(reader).__name__}.")
    return reader


def dataset_statistics(source: str) -> ActionStats:
    """Of a dataset's actions, as they are normalised in training: 1st and 99th percentiles.

    Args:
        source: as for `open_reader`; HDF5 files are LIBERO's, whose gripper becomes 1 = open, 0 = closed.
    """
    from openvla.evaluate.envs.libero import from_simulator
    from openvla.finetune.readers import open_reader
    from openvla.finetune.readers.hdf5 import HDF5Reader
    from openvla.finetune.statistics import scan, summarize

    reader = open_reader(source)
    if not isinstance(reader, HDF5Reader):
        return ActionStats.from_norm_stats({reader.name: scan(reader).norm_stats})
    actions = [from_simulator(reader.read(index).actions) for index in range(len(reader))]
    return ActionStats.from_norm_stats({reader.name: summarize(actions, [None] * len(actions))})


def describe(conventions: Conventions, name: str) -> dict:
    """Metadata of a policy that speaks the simulator's own language."""
    dims = [{"name": name, "unit": unit} for name, unit in conventions.action_dims]
    return {"checkpoint": name, "unnorm_key": None, "action_dims": dims, "num_cameras": 1, "action_chunk": 1}
