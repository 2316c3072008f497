"""Predicted against recorded actions, as numbers: per dim, in total, beside what needs no policy, with intervals.

Legend: N steps of an episode · T action chunk · A action dims · M actions counted, of all episodes.
"""

from dataclasses import dataclass, field

import numpy as np

MODES = ("free_running", "teacher_forced")
RESAMPLES = 2000


@dataclass
class Trace:
    """What was recorded in an episode and what was predicted; no images.

    Args:
        actions: `(N, A)` float32, as recorded.
        ids: per mode `(N, T, A)` predicted action tokens.
        replaced: `(N, T, A)`, free-running: whether the best token was no action, and the best action was taken.
        right: `(N, T, A)`, teacher-forced: whether the recorded token is the whole vocabulary's best.
    """

    number: int
    source: str
    instruction: str
    actions: np.ndarray
    ids: dict[str, np.ndarray] = field(default_factory=dict)
    replaced: np.ndarray | None = None
    right: np.ndarray | None = None


@dataclass
class Actions:
    """Actions in three forms, `(M, A)` each: in the units of the dataset, in [-1, 1], and as token ids."""

    physical: np.ndarray
    normalized: np.ndarray
    ids: np.ndarray

    @classmethod
    def from_physical(cls, physical: np.ndarray, stats, tokenizer) -> "Actions":
        normalized = stats.normalize(physical)
        return cls(physical, normalized, tokenizer.encode(normalized))

    @classmethod
    def from_ids(cls, ids: np.ndarray, stats, tokenizer) -> "Actions":
        normalized = tokenizer.decode(ids)
        return cls(stats.unnormalize(normalized), normalized, ids)


def summarize(traces: list[Trace], stats, tokenizer, dims: list[tuple[str, str]]) -> dict:
    """All numbers of an evaluation.

    Args:
        stats: `ActionStats` that the policy acts with.
        dims: `(name, unit)` per action dim.

    Returns `episodes` and `steps` (counts); per mode what `score` gives, and for free-running `replaced`, the share of
    tokens; `baselines`, by name what `score` gives; `per_episode`.
    """
    # 1. What is counted: the steps of each episode, and how much later in their chunks, up to the episode's end
    chunk = next(iter(traces[0].ids.values())).shape[1]
    lengths = [len(trace.actions) for trace in traces]
    counted = [np.nonzero(np.add.outer(np.arange(length), np.arange(chunk)) < length) for length in lengths]
    owner = np.repeat(np.arange(len(traces)), [len(steps) for steps, _ in counted])

    def gather(values: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([each[index] for each, index in zip(values, counted)])

    # 2. The policy
    actions = np.concatenate([trace.actions[steps + later] for trace, (steps, later) in zip(traces, counted)])
    recorded = Actions.from_physical(actions.astype(np.float64), stats, tokenizer)
    found = {"episodes": len(traces), "steps": sum(lengths), "per_episode": []}
    for trace, length in zip(traces, lengths):
        facts = {"episode": trace.number, "source": trace.source, "instruction": trace.instruction, "steps": length}
        found["per_episode"].append(facts)
    for mode in traces[0].ids:
        predicted = Actions.from_ids(gather([trace.ids[mode] for trace in traces]), stats, tokenizer)
        is_forced = mode == "teacher_forced"
        right = gather([trace.right for trace in traces]) if is_forced else predicted.ids == recorded.ids
        found[mode] = score(predicted, recorded, owner, dims, right)
        distance = np.abs(predicted.normalized - recorded.normalized)
        for name, values in (("token_accuracy", right), ("l1_normalized", distance)):
            means = np.bincount(owner, values.mean(axis=1)) / np.bincount(owner)
            for facts, mean in zip(found["per_episode"], means.tolist()):
                facts[f"{mode}_{name}"] = mean
    if "free_running" in found:
        found["free_running"]["replaced"] = float(gather([trace.replaced for trace in traces]).mean())

    # 3. What needs no policy
    mean = recorded.physical.mean(axis=0)
    frequent = [np.bincount(ids - tokenizer.vocab_start).argmax() + tokenizer.vocab_start for ids in recorded.ids.T]
    # known is what precedes the step, not the action; the first step of an episode has nothing before it
    previous = [np.concatenate([mean[None], trace.actions[:-1]])[steps] for trace, (steps, _) in zip(traces, counted)]
    baselines = {
        "mean action": Actions.from_physical(np.broadcast_to(mean, actions.shape), stats, tokenizer),
        "most frequent token": Actions.from_ids(np.broadcast_to(frequent, actions.shape), stats, tokenizer),
        "previous action": Actions.from_physical(np.concatenate(previous), stats, tokenizer),
        "recorded, as tokens": Actions.from_ids(recorded.ids, stats, tokenizer),
    }
    found["baselines"] = {
        name: score(each, recorded, owner, dims, each.ids == recorded.ids) for name, each in baselines.items()
    }
    return found


def score(
    predicted: Actions, recorded: Actions, owner: np.ndarray, dims: list[tuple[str, str]], right: np.ndarray
) -> dict:
    """How far predictions are from recordings.

    Args:
        owner: `(M,)`, the episode of each action.
        right: `(M, A)`, which tokens are.

    Returns `token_accuracy` and `l1_normalized` (mean over dims, on the scale from -1 to 1), each with its
    `…_interval` (None for one episode), and `dims`, with per dim: in its unit `mae`, `mae_interval`, `median`, `p95`
    of the absolute error and `bias` (mean of predicted less recorded); `l1_normalized`; shares `token_accuracy` and
    `within_one_bin`.
    """
    signed = predicted.physical - recorded.physical
    error, distance = np.abs(signed), np.abs(predicted.normalized - recorded.normalized)
    columns = np.column_stack([right.mean(axis=1), distance.mean(axis=1), error])  # (M, 2 + A)
    means, intervals = columns.mean(axis=0).tolist(), bootstrap(columns, owner)
    found = {"token_accuracy": means[0], "token_accuracy_interval": intervals[0]}
    found |= {"l1_normalized": means[1], "l1_normalized_interval": intervals[1], "dims": []}
    median, p95 = np.quantile(error, [0.5, 0.95], axis=0)
    near = np.abs(predicted.ids - recorded.ids) <= 1
    per_dim = {"median": median, "p95": p95, "bias": signed.mean(axis=0), "l1_normalized": distance.mean(axis=0)}
    per_dim |= {"token_accuracy": right.mean(axis=0), "within_one_bin": near.mean(axis=0)}
    for index, (name, unit) in enumerate(dims):
        entry = {"name": name, "unit": unit, "mae": means[2 + index], "mae_interval": intervals[2 + index]}
        found["dims"].append(entry | {key: float(values[index]) for key, values in per_dim.items()})
    return found


def bootstrap(values: np.ndarray, owner: np.ndarray, seed: int = 0) -> list[list[float] | None]:
    """95 % interval of the mean of each column, drawing whole episodes: steps of one are alike. None for one episode.

    Args:
        values: `(M, K)`.
        owner: `(M,)`, from 0 to E - 1, the episode of each row.
    """
    counts = np.bincount(owner)
    if len(counts) < 2:
        return [None] * values.shape[1]
    sums = np.stack([np.bincount(owner, column) for column in values.T], axis=1)  # (E, K)
    rng = np.random.default_rng(seed)
    means = np.empty((RESAMPLES, values.shape[1]))
    for row in means:
        drawn = rng.integers(len(counts), size=len(counts))
        row[:] = sums[drawn].sum(axis=0) / counts[drawn].sum()
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    mean = values.mean(axis=0)  # inside but for rounding, when all draws agree
    return np.stack([np.minimum(low, mean), np.maximum(high, mean)], axis=1).tolist()
