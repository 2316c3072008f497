"""Carries out recorded demonstrations again, to see whether their actions alone still do the task."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openvla.action_tokenizer import ActionStats
from openvla.evaluate.baselines import dataset_statistics, through_tokens
from openvla.evaluate.envs import open_env
from openvla.evaluate.envs.libero import from_simulator


@dataclass
class Replayer:
    """Replays the episodes of a dataset of `openvla demos`, each from the state in which its recording began.

    Args:
        folder: of the dataset.
        description: its `meta/demonstrations.json`.
        stats: of its actions, which then go through normalisation, tokens and back; None: as recorded.
    """

    folder: Path
    description: dict
    stats: ActionStats | None = None

    def __post_init__(self):
        self._reader = self._env = self._task = None

    def __call__(self, index: int) -> bool:
        """Whether the task was done at some time of episode `index`."""
        from openvla.finetune.readers import open_reader

        if self._reader is None:
            self._reader = open_reader(str(self.folder))
        settings, episode = self.description["settings"], self.description["episodes"][index]
        if self._task != episode["task"]:
            if self._env is not None:
                self._env.close()
            self._env, self._task = open_env(settings["suite"], episode["task"]), episode["task"]
        actions = self._reader.read(index).actions
        if not (self.folder / "meta" / "info.json").exists():
            actions = from_simulator(actions)
        if self.stats is not None:
            actions = through_tokens(actions, self.stats)
        with np.load(self.folder / "meta" / "initial_states.npz") as states:
            state = states[str(index)]
        if settings.get("other_share"):
            self._env.ask(episode.get("asked"))
        self._env.reset(episode["episode"], state=state, randomize=settings["randomize"])
        return any(self._env.step(action) for action in actions)


def open_replayer(folder: Path, tokenize: bool) -> Replayer:
    """Raises FileNotFoundError for folders that are no datasets of demonstrations."""
    file = folder / "meta" / "demonstrations.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: {folder} was not made by `openvla demos`, so how is unknown.")
    description = json.loads(file.read_text())
    if description["settings"].get("push") or description["settings"].get("first"):
        raise ValueError(f"{folder} was made with --push or --first: its episodes end before the task is done.")
    return Replayer(folder, description, dataset_statistics(str(folder)) if tokenize else None)


def report(replayer: Replayer, successes: dict[int, bool]) -> dict:
    """`successes` by the episode's index -> per task and in total, how many were done again, and which were not."""
    episodes = replayer.description["episodes"]
    tasks: dict[int, dict] = {}
    for index in sorted(successes):
        entry = tasks.setdefault(episodes[index]["task"], {"replayed": 0, "succeeded": 0})
        entry["replayed"] += 1
        entry["succeeded"] += successes[index]
    return {
        "folder": str(replayer.folder),
        "tokenize": replayer.stats is not None,
        "tasks": [{"task": task, **entry} for task, entry in sorted(tasks.items())],
        "replayed": len(successes),
        "succeeded": sum(successes.values()),
        "failed": [
            {"index": index, "task": episodes[index]["task"], "episode": episodes[index]["episode"]}
            for index, success in sorted(successes.items())
            if not success
        ],
    }
