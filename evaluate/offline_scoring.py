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
        normalized: per mode `(N, T, A)` predicted actions in [-1, 1].
        ids: per mode `(N, T, A)` predicted action tokens; empty for policies without tokens.
        replaced: `(N, T, A)`, free-running: whether the best token was no action, and the best action was taken.
        right: `(N, T, A)`, teacher-forced: whether the recorded token is the whole vocabulary's best.
    """

    number: int
    source: str
    instruction: str
    actions: np.ndarray
    normalized: dict[str, np.ndarray] = field(default_factory=dict)
    ids: dict[str, np.ndarray] = field(default_factory=dict)
    replaced: np.ndarray | None = None
    right: np.ndarray | None = None


@dataclass
class Actions:
    """Actions in three forms, `(M, A)` each: in the units of the dataset, in [-1, 1], and as the ids of tokens, if the
    policy has any."""

    physical: np.ndarray
    normalized: np.ndarray
    ids: np.ndarray | None = None

    @classmethod
    def from_physical(cls, physical: np.ndarray, stats, tokenizer=None) -> "Actions":
        normalized = stats.normalize(physical)
        return cls(physical, normalized, None if tokenizer is None else tokenizer.encode(normalized))

    @classmethod
    def from_normalized(cls, normalized: np.ndarray, stats, ids: np.ndarray | None = None) -> "Actions":
        return cls(stats.unnormalize(normalized), normalized, ids)

    @classmethod
    def from_ids(cls, ids: np.ndarray, stats, tokenizer) -> "Actions":
        return cls.from_normalized(tokenizer.decode(ids), stats, ids)


def summarize(traces: list[Trace], stats, tokenizer, dims: list[tuple[str, str]]) -> dict:
    """All numbers of an evaluation.

    Args:
        stats: `ActionStats` that the policy acts with.
        tokenizer: `ActionTokenizer` of the policy; None if it has no tokens: then nothing is said of any.
        dims: `(name, unit)` per action dim.

    Returns `episodes` and `steps` (counts); per mode what `score` gives, and for free-running tokens `replaced`, their
    share; `baselines`, by name what `score` gives; `per_episode`.
    """
    # 1. What is counted: the steps of each episode, and how much later in their chunks, up to the episode's end
    chunk = next(iter(traces[0].normalized.values())).shape[1]
    lengths = [len(trace.actions) for trace in traces]
    counted = [np.nonzero(np.add.outer(np.arange(length), np.arange(chunk)) < length) for length in lengths]
    owner = np.repeat(np.arange(len(traces)), [len(steps) for steps, _ in counted])
    ahead = np.concatenate([later for _, later in counted])

    def gather(values: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([each[index] for each, index in zip(values, counted)])

    # 2. The policy
    actions = np.concatenate([trace.actions[steps + later] for trace, (steps, later) in zip(traces, counted)])
    recorded = Actions.from_physical(actions.astype(np.float64), stats, tokenizer)
    found = {"episodes": len(traces), "steps": sum(lengths), "per_episode": []}
    for trace, length in zip(traces, lengths):
        facts = {"episode": trace.number, "source": trace.source, "instruction": trace.instruction, "steps": length}
        found["per_episode"].append(facts)
    for mode in traces[0].normalized:
        ids = None if tokenizer is None else gather([trace.ids[mode] for trace in traces])
        predicted = Actions.from_normalized(gather([trace.normalized[mode] for trace in traces]), stats, ids)
        right = gather([trace.right for trace in traces]) if mode == "teacher_forced" else None
        found[mode] = score(predicted, recorded, owner, ahead, dims, right)
        means = {"l1_normalized": np.abs(predicted.normalized - recorded.normalized)}
        if ids is not None:
            means = {"token_accuracy": ids == recorded.ids if right is None else right} | means
        for name, values in means.items():
            per_episode = np.bincount(owner, values.mean(axis=1)) / np.bincount(owner)
            for facts, mean in zip(found["per_episode"], per_episode.tolist()):
                facts[f"{mode}_{name}"] = mean
    if tokenizer is not None and "free_running" in found:
        found["free_running"]["replaced"] = float(gather([trace.replaced for trace in traces]).mean())

    # 3. What needs no policy
    mean = recorded.physical.mean(axis=0)
    # known is what precedes the step, not the action; the first step of an episode has nothing before it
    previous = [np.concatenate([mean[None], trace.actions[:-1]])[steps] for trace, (steps, _) in zip(traces, counted)]
    baselines = {
        "mean action": Actions.from_physical(np.broadcast_to(mean, actions.shape), stats, tokenizer),
        "previous action": Actions.from_physical(np.concatenate(previous), stats, tokenizer),
    }
    if tokenizer is not None:
        start = tokenizer.vocab_start
        frequent = [np.bincount(ids - start).argmax() + start for ids in recorded.ids.T]
        baselines = {
            "mean action": baselines["mean action"],
            "most frequent token": Actions.from_ids(np.broadcast_to(frequent, actions.shape), stats, tokenizer),
            "previous action": baselines["previous action"],
            "recorded, as tokens": Actions.from_ids(recorded.ids, stats, tokenizer),
        }
    found["baselines"] = {name: score(each, recorded, owner, ahead, dims) for name, each in baselines.items()}
    return found


def score(
    predicted: Actions,
    recorded: Actions,
    owner: np.ndarray,
    ahead: np.ndarray,
    dims: list[tuple[str, str]],
    right: np.ndarray | None = None,
) -> dict:
    """How far predictions are from recordings.

    Args:
        owner: `(M,)`, the episode of each action.
        ahead: `(M,)`, its place in its chunk: how many steps after the observation, 0 to T - 1.
        right: `(M, A)`, which tokens are; None: those that are the recorded ones, if there are any.

    Returns `token_accuracy` and `l1_normalized` (mean over dims, on the scale from -1 to 1), each with its
    `…_interval` (None for one episode); `dims`, with per dim: in its unit `mae`, `mae_interval`, `median`, `p95` of
    the absolute error and `bias` (mean of predicted less recorded); `l1_normalized`; shares `token_accuracy` and
    `within_one_bin`; and of chunks `ahead`, a list by steps ahead: `actions`, how many there are, `token_accuracy`,
    `l1_normalized`, and that of each of the `dims`. What is about tokens is left out for policies without.
    """
    has_tokens = predicted.ids is not None
    if has_tokens and right is None:
        right = predicted.ids == recorded.ids
    signed = predicted.physical - recorded.physical
    error, distance = np.abs(signed), np.abs(predicted.normalized - recorded.normalized)
    totals = {"token_accuracy": right.mean(axis=1)} if has_tokens else {}
    totals |= {"l1_normalized": distance.mean(axis=1)}
    columns = np.column_stack([*totals.values(), error])  # (M, totals + A)
    means, intervals = columns.mean(axis=0).tolist(), bootstrap(columns, owner)
    found = {}
    for name, mean, interval in zip(totals, means, intervals):
        found |= {name: mean, f"{name}_interval": interval}
    median, p95 = np.quantile(error, [0.5, 0.95], axis=0)
    per_dim = {"median": median, "p95": p95, "bias": signed.mean(axis=0), "l1_normalized": distance.mean(axis=0)}
    if has_tokens:
        near = np.abs(predicted.ids - recorded.ids) <= 1
        per_dim |= {"token_accuracy": right.mean(axis=0), "within_one_bin": near.mean(axis=0)}
    found["dims"] = []
    for index, (name, unit) in enumerate(dims):
        place = len(totals) + index
        entry = {"name": name, "unit": unit, "mae": means[place], "mae_interval": intervals[place]}
        found["dims"].append(entry | {key: float(values[index]) for key, values in per_dim.items()})
    if ahead.max() > 0:
        found["ahead"] = []
        for place in range(ahead.max() + 1):
            here = ahead == place
            entry = {"actions": int(here.sum()), "l1_normalized": float(distance[here].mean())}
            entry |= {"dims": distance[here].mean(axis=0).tolist()}
            found["ahead"].append(entry | ({"token_accuracy": float(right[here].mean())} if has_tokens else {}))
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
