"""What a demonstration is, once for all formats: `Episode` as readers give it, `Step` as training takes it.

Readers give whole episodes by number, with images decoded only when asked for. Everything else, chunking, shuffling,
sharding by worker and rank, resuming at the exact sample, follows from plain indices: a step is (episode, time), so a
permutation of integers says what any run sees in which order, and nothing has to be replayed to continue.

Legend: N steps of an episode · T action chunk · A action dims · P proprioception dims.
"""

import bisect
import itertools
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

# What readers and the libraries under them raise on files that are cut off, overwritten or filled in wrongly.
DAMAGE = (ValueError, LookupError, OSError, EOFError, RuntimeError, TypeError, AttributeError, SyntaxError)
DAMAGE += (struct.error, zipfile.BadZipFile, zlib.error)


@dataclass
class Episode:
    """One demonstration.

    Args:
        source: file (and record) it came from, for error messages.
        instructions: N strings.
        actions: `(N, A)` float32, the units of the dataset.
        proprio: `(N, P)` float32, or None.
        image: `(camera, step) -> (H, W, 3)` uint8 RGB, decoded on call.
    """

    source: str
    instructions: list[str]
    actions: np.ndarray
    proprio: np.ndarray | None
    image: Callable[[str, int], np.ndarray]

    def __len__(self) -> int:
        return len(self.actions)


@dataclass
class Step:
    """One training example.

    Args:
        images: one `(H, W, 3)` uint8 RGB array per camera, in the policy's order.
        instruction: what the robot was asked to do.
        actions: `(T, A)` float32, this step's action and the T - 1 that follow, the last one repeated past the end.
        is_pad: `(T,)` bool, True past the end of the episode.
        proprio: `(P,)` float32, or None.
        source: file, episode and time, for error messages.
        dataset: name of its dataset, hence whose statistics apply.
    """

    images: list[np.ndarray]
    instruction: str
    actions: np.ndarray
    is_pad: np.ndarray
    proprio: np.ndarray | None
    source: str
    dataset: str = ""


class Reader(Protocol):
    """What each format provides. Opening is cheap; `read` costs what one episode without its images costs."""

    name: str  # of the dataset: the `unnorm_key` of policies trained on it
    cameras: list[str]  # all there are, the main one first
    fps: float | None

    def __len__(self) -> int: ...  # episodes

    def read(self, index: int) -> Episode: ...

    def files(self) -> list[str]: ...  # everything the content depends on, for cache keys


def check_episode(episode: Episode, action_dim: int | None = None) -> None:
    """Raises ValueError that names file, episode and step for whatever training would silently learn from."""
    actions, where = episode.actions, episode.source
    if actions.ndim != 2 or len(actions) == 0:
        raise ValueError(f"{where}: expected actions (steps, dims) with at least one step, got shape {actions.shape}.")
    if action_dim is not None and actions.shape[1] != action_dim:
        raise ValueError(f"{where}: {actions.shape[1]} action dims where earlier episodes have {action_dim}.")
    if not np.isfinite(actions).all():
        step, dim = np.argwhere(~np.isfinite(actions))[0]
        raise ValueError(f"{where}: action is {actions[step, dim]} at step {step}, dim {dim}.")
    if episode.proprio is not None and not np.isfinite(episode.proprio).all():
        raise ValueError(f"{where}: state is not finite at step {np.argwhere(~np.isfinite(episode.proprio))[0][0]}.")
    for name, values in (("instructions", episode.instructions), ("states", episode.proprio)):
        if values is not None and len(values) != len(actions):
            raise ValueError(f"{where}: {len(values)} {name} for {len(actions)} actions.")
    for step, instruction in enumerate(episode.instructions):
        if not instruction.strip():
            raise ValueError(f"{where}: empty instruction at step {step}.")


def choose_cameras(reader: Reader, count: int, given: list[str] | None, declared: list[str] | None) -> list[str]:
    """Which of a dataset's cameras a policy looks through, in its order.

    Args:
        count: how many the policy takes.
        given: those that the caller wants; None: those that the policy was trained with, or else the first ones.
        declared: `norm_stats[unnorm_key]["cameras"]`, None in published policies.

    Raises ValueError if there are not as many, or if nobody knows which of them the policy's are.
    """
    chosen = given
    if given is None and declared and set(declared) <= set(reader.cameras):
        chosen = declared
    elif given is None and declared and count > 1:
        raise ValueError(
            f"The policy was trained with the cameras {declared}, and {reader.name} has {reader.cameras}: say with "
            "--cameras which they are, in the policy's order."
        )
    chosen = list(reader.cameras[:count] if chosen is None else chosen)
    if len(chosen) != count:
        raise ValueError(
            f"The policy takes {count} camera(s), got {chosen} of {reader.cameras} that {reader.name} has: choose "
            "with --cameras, or take a dataset with as many."
        )
    return chosen


class StepDataset:
    """Steps of a reader's episodes by number: `len(dataset)`, `dataset[i]`.

    Keeps the last few episodes open, so that neighbouring steps cost one read; memory does not grow with the data.

    Args:
        reader: a `Reader`.
        lengths: steps per episode (see `statistics.scan`).
        episodes: which episodes to use; None: all.
        cameras: which cameras, in the policy's order; None: the main one.
        chunk: T.
        pad_chunks: whether steps count whose chunk runs past the end of the episode; otherwise the last T - 1 do not.
        keep_open: episodes held in memory, without decoded images.
    """

    def __init__(
        self,
        reader: Reader,
        lengths: list[int],
        episodes: list[int] | None = None,
        cameras: list[str] | None = None,
        chunk: int = 1,
        pad_chunks: bool = True,
        keep_open: int = 32,
    ):
        self.reader = reader
        self.cameras = cameras or reader.cameras[:1]
        if unknown := [camera for camera in self.cameras if camera not in reader.cameras]:
            raise ValueError(f"{reader.name} has no cameras {unknown}; it has {reader.cameras}.")
        self.chunk = chunk
        self.episodes = list(range(len(lengths))) if episodes is None else list(episodes)
        short = 0 if pad_chunks else chunk - 1
        self.episode_lengths = [max(lengths[episode] - short, 0) for episode in self.episodes]
        self._ends = list(itertools.accumulate(self.episode_lengths))
        self._open: OrderedDict[int, Episode] = OrderedDict()
        self._keep_open = keep_open

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[int, int]:
        """(episode, time) of a step."""
        if not 0 <= index < len(self):
            raise IndexError(f"Step {index} of {len(self)}.")
        position = bisect.bisect_right(self._ends, index)
        return self.episodes[position], index - (self._ends[position - 1] if position else 0)

    def __getitem__(self, index: int) -> Step:
        number, time = self.locate(index)
        episode = self._episode(number)
        times = np.minimum(np.arange(time, time + self.chunk), len(episode) - 1)
        return Step(
            images=[episode.image(camera, time) for camera in self.cameras],
            instruction=episode.instructions[time],
            actions=episode.actions[times],
            is_pad=np.arange(time, time + self.chunk) >= len(episode),
            proprio=None if episode.proprio is None else episode.proprio[time],
            source=f"{episode.source}, step {time}",
            dataset=self.reader.name,
        )

    def _episode(self, number: int) -> Episode:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        episode = self._open[number] = self.reader.read(number)
        if len(self._open) > self._keep_open:
            self._open.popitem(last=False)
        return episode


class MixedSteps:
    """Several `StepDataset`s, one after the other, as one."""

    def __init__(self, parts: list[StepDataset]):
        self.parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Step:
        if not 0 <= index < len(self):
            raise IndexError(f"Step {index} of {len(self)}.")
        part = bisect.bisect_right(self._ends, index)
        return self.parts[part][index - (self._ends[part - 1] if part else 0)]


def run_order(
    lengths: list[list[int]], weights: list[float] | None, draws: int, seed: int, window: int = 0
) -> np.ndarray:
    """Which step of `MixedSteps` each draw of a run takes, `(draws,)`.

    Each dataset contributes in proportion to weight × steps, by a seeded choice per draw, and goes through all its
    steps again and again, each time in another seeded order. Source of the shares: the original's
    `sample_from_datasets`.

    Args:
        lengths: of each dataset, the steps of each episode.
        window: 0: every order is a permutation of all steps; otherwise of the episodes, cut into windows of so many,
            within which steps are permuted: few episodes are open at a time, at the price of a poorer shuffle.
    """
    sizes = [sum(episodes) for episodes in lengths]
    mass = np.asarray(sizes, dtype=np.float64) * (np.ones(len(sizes)) if weights is None else weights)
    choices = np.zeros(draws, dtype=np.int64)
    if len(sizes) > 1:
        choices = np.random.default_rng([seed, len(sizes)]).choice(len(sizes), size=draws, p=mass / mass.sum())
    order = np.empty(draws, dtype=np.int64)
    for part, episodes in enumerate(lengths):
        taken = choices == part
        passes, count = [], int(taken.sum())
        while sum(map(len, passes)) < count:
            rng = np.random.default_rng([seed, part, len(passes)] if part else [seed, len(passes)])
            passes.append(_shuffle(np.asarray(episodes), window, rng))
        order[taken] = np.concatenate([np.empty(0, np.int64), *passes])[:count] + sum(sizes[:part])
    return order


def _shuffle(lengths: np.ndarray, window: int, rng: np.random.Generator) -> np.ndarray:
    if not window:
        return rng.permutation(lengths.sum())
    first = np.cumsum(lengths) - lengths
    episodes = rng.permutation(len(lengths))
    windows = [episodes[start : start + window] for start in range(0, len(episodes), window)]
    steps = [np.concatenate([first[episode] + np.arange(lengths[episode]) for episode in each]) for each in windows]
    return np.concatenate([rng.permutation(each) for each in steps])
