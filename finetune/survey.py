"""A pass over a dataset that never stops at a bad episode, and what of it will hurt when OpenVLA is fine-tuned on it.

Legend: N steps of an episode · A action dims.
"""

import hashlib
import io
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from openvla.action_tokenizer import ActionStats, name_action_dims
from openvla.finetune.statistics import summarize
from openvla.finetune.steps import DAMAGE, Episode, Reader, check_episode

INTERVALS = 255  # between the edges of 256 bins
NO_RANGE = 1e-8  # what `ActionStats.normalize` adds to a range: a smaller one is lost
FEW_EPISODES, SHORT_EPISODE = 10, 10
MANY_IDLE = 0.05  # share of steps
CLIPPED_EPISODE = 0.25  # share of an episode's values of a dim beyond [q01, q99], where 2 % of all are
HEAVY_TAIL = 3.0  # size of the largest normalised value, where bins end at 1
CONTROL_RATE = (5, 10)  # Hz
FLAT = 8  # grey levels between darkest and lightest pixel: a black frame from JPEG or video has a few
SHOWN = 4  # sampled episodes whose frames are kept for the report

PROBLEM, WARNING = "problem", "warning"  # trains something wrong or not at all; probably costs success
_BAD = "Repair or remove them: fine-tuning stops there, or leaves them out with --skip_bad_episodes."
ADVICE = {
    PROBLEM: {
        "unreadable episodes": _BAD,
        "NaN or infinite values": _BAD,
        "differing action sizes": _BAD,
        "inconsistent episodes": _BAD,
        "differing state sizes": "Record the same state everywhere: its statistics need one size.",
        "empty instructions": "Write down what the robot does there: fine-tuning refuses such steps.",
        "lost constants": "Record these dims in motion: any constant is trained as 0, and, not normalised, stays 0.",
        "nearly constant dims": "Record more of it or none: values fall into the edge bins, and all come back as q01.",
        "values outside the 256 bins": "Normalise the dim (1 in --mask), or scale it to [-1, 1]: the rest is cut off.",
        "gripper convention": "Convert it, and do the reverse on the robot; raw LIBERO (-1 = open): (1 - value) / 2.",
        "undecodable frames": "Copy or encode these files again: fine-tuning stops where it meets such a frame.",
        "black or flat frames": "Check the camera; leave it, or these episodes, out.",
        "frozen frames": "First, middle and last are equal in every pixel: check whether the camera hung.",
    },
    WARNING: {
        "few episodes": "Record more: from so few, a policy learns to replay them instead of looking.",
        "short episodes": "Check that recording did not stop early; remove what is no whole demonstration.",
        "duplicate episodes": "Remove them: a copy counts twice, or is held out while its twin is trained on.",
        "instructions spelled differently": "Write each in one way: the prompt only levels upper and lower case.",
        "idle steps": "Drop them, as the published LIBERO data do: a policy that learned to wait may wait for ever.",
        "constant dims": "Check that they are recorded: the policy will always answer this constant.",
        "heavy tails": "Look for jumps; if they are real, mind that the policy cannot move beyond q01 and q99.",
        "clipped episodes": "Check units and speed: they move unlike the rest, beyond what can be learned.",
        "gripper may be inverted": "Only a heuristic: if their first frames show it open, turn it around (1 - value).",
        "control rate": "Above 10 Hz take every n-th step and add up the deltas between: fast ones drown in noise, or "
        "in a single bin. Below 5 Hz act as slowly as it was recorded: the same deltas acted out faster are too fast.",
        "differing resolutions": "Bring all to one shape: whatever comes is squeezed into the same square.",
    },
}


@dataclass
class Finding:
    """Something that will hurt. `detail`: the numbers; `advice`: what to do; `episodes`: the reader's numbers of those
    it concerns; `lines`: one per case, where each has its own reason."""

    severity: str
    title: str
    detail: str
    advice: str
    episodes: list[int] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


@dataclass
class Frame:
    """What a sampled frame looked like, or why it could not be decoded. `thumbnail`: PNG, of the first few only."""

    episode: int
    camera: str
    step: int
    size: str = ""
    is_flat: bool = False
    digest: bytes = b""
    error: str = ""
    thumbnail: bytes | None = None


@dataclass
class Survey:
    """What the pass over a dataset collected; `actions` and all below `unusable` are of usable episodes."""

    reader: Reader
    sources: dict[int, str] = field(default_factory=dict)
    unusable: dict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))  # title -> episode -> why
    actions: dict[int, np.ndarray] = field(default_factory=dict)  # (N, A) each
    instructions: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    without_instruction: list[int] = field(default_factory=list)
    state_sizes: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  # 0: no state
    frames: list[Frame] = field(default_factory=list)

    def summarize(self, mask: list[bool] | None) -> None:
        """Sets the statistics, and where the bins lie: over [q01, q99], or [-1, 1] for dims that pass as they are."""
        name = self.reader.name
        self.norm_stats = summarize(list(self.actions.values()), [None] * len(self.actions), mask)
        self.stats = ActionStats.from_norm_stats({name: self.norm_stats}, name)
        names, self.units = zip(*name_action_dims({name: self.norm_stats}, name))
        self.names = tuple(each.rstrip("?") for each in names)
        self.low = np.where(self.stats.mask, self.stats.low, -1.0)
        self.high = np.where(self.stats.mask, self.stats.high, 1.0)
        self.width = (self.high - self.low) / INTERVALS
        self.has_bins = ~self.stats.constant & (self.high - self.low > NO_RANGE)
        self.stacked = np.concatenate(list(self.actions.values())).astype(np.float64)  # (steps, A)


# --- The pass over the data ------------------------------------------------------------------------------------------
def survey(reader: Reader, mask: list[bool] | None = None, frames: int = 16, progress: bool = True) -> Survey:
    """Reads every episode once, then the first, middle and last frames of `frames` of them, seeded."""
    from tqdm import tqdm

    data, action_dim = Survey(reader), None
    for number in tqdm(range(len(reader)), desc=f"inspect {reader.name}", unit="episode", disable=not progress):
        episode = None
        try:
            episode = reader.read(number)
            data.sources[number] = episode.source
            spoken = [text if text.strip() else "(none)" for text in episode.instructions]  # a finding of its own
            check_episode(replace(episode, instructions=spoken), action_dim)
        except DAMAGE as error:
            where = f"episode {number}" if episode is None else episode.source
            data.unusable[_what_is_wrong(episode, action_dim)][number] = _reason(error, where)
            continue
        action_dim = episode.actions.shape[1]
        data.actions[number] = episode.actions
        data.state_sizes[0 if episode.proprio is None else episode.proprio.shape[1]].append(number)
        for text in dict.fromkeys(episode.instructions):
            (data.instructions[text] if text.strip() else data.without_instruction).append(number)
    if data.actions:
        data.summarize(mask)
    sample = random.Random(0).sample(sorted(data.actions), min(frames, len(data.actions)))
    for place, number in enumerate(tqdm(sample, desc="look at frames", unit="episode", disable=not progress)):
        data.frames += look(reader, number, keep=place < SHOWN)
    return data


def _what_is_wrong(episode: Episode | None, action_dim: int | None) -> str:
    if episode is None:
        return "unreadable episodes"
    if not all(np.isfinite(values).all() for values in (episode.actions, episode.proprio) if values is not None):
        return "NaN or infinite values"
    is_other_size = episode.actions.ndim == 2 and action_dim not in (None, episode.actions.shape[1])
    return "differing action sizes" if is_other_size else "inconsistent episodes"


def _reason(error: Exception, where: str) -> str:
    why = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
    return why if where in why else f"{where}: {why}"


def look(reader: Reader, number: int, keep: bool) -> list[Frame]:
    """The first, middle and last frame of an episode, for each camera; `keep`: with thumbnails."""
    from PIL import Image

    episode, frames = reader.read(number), []
    for camera in reader.cameras:
        for step in sorted({0, len(episode) // 2, len(episode) - 1}):
            frame = Frame(number, camera, step)
            frames.append(frame)
            try:
                image = episode.image(camera, step)
            except DAMAGE as error:
                frame.error = _reason(error, f"{episode.source}, {camera}, step {step}")
                continue
            frame.size = f"{image.shape[1]}×{image.shape[0]}"
            frame.is_flat = bool((image.max((0, 1)).astype(int) - image.min((0, 1))).max() <= FLAT)
            frame.digest = hashlib.sha256(image.tobytes()).digest()
            if keep:
                thumbnail, file = Image.fromarray(image), io.BytesIO()
                thumbnail.thumbnail((240, 240))
                thumbnail.save(file, "PNG")
                frame.thumbnail = file.getvalue()
    return frames


# --- What will hurt --------------------------------------------------------------------------------------------------
def find(data: Survey) -> list[Finding]:
    """Everything that will hurt, problems first."""
    checks = [find_unusable, find_sizes, find_instructions, find_frames]
    if data.actions:
        checks += [find_duplicates, find_idle, find_ranges, find_clipped, find_gripper, find_control_rate]
    findings = [finding for check in checks for finding in check(data)]
    return sorted(findings, key=lambda finding: finding.severity != PROBLEM)


def _finding(title: str, detail: str, episodes=(), lines=(), severity: str | None = None) -> Finding:
    usual = PROBLEM if title in ADVICE[PROBLEM] else WARNING
    return Finding(severity or usual, title, detail, ADVICE[usual][title], list(episodes), list(lines))


def find_unusable(data: Survey) -> Iterator[Finding]:
    for title, cases in data.unusable.items():
        yield _finding(title, f"{len(cases)} of {len(data.reader)} episodes", cases, cases.values())


def find_sizes(data: Survey) -> Iterator[Finding]:
    if len(data.actions) < FEW_EPISODES:
        yield _finding("few episodes", f"{len(data.actions)} usable", severity=None if data.actions else PROBLEM)
    if short := [number for number, actions in data.actions.items() if len(actions) < SHORT_EPISODE]:
        detail = f"{len(short)} of {len(data.actions)} have fewer than {SHORT_EPISODE} steps"
        yield _finding("short episodes", detail, short)
    if len(data.state_sizes) > 1:
        by_size = sorted(data.state_sizes.items(), key=lambda item: -len(item[1]))
        detail = ", ".join(f"{size or 'none'} in {len(numbers)} episodes" for size, numbers in by_size)
        yield _finding("differing state sizes", detail, sorted(sum((numbers for _, numbers in by_size[1:]), [])))


def find_instructions(data: Survey) -> Iterator[Finding]:
    if empty := data.without_instruction:
        yield _finding("empty instructions", f"in {len(empty)} of {len(data.actions)} episodes", empty)
    alike = defaultdict(list)
    for text in sorted(data.instructions, key=lambda text: -len(data.instructions[text])):
        alike[re.sub(r"[\W_]+", " ", text.casefold()).strip()].append(text)
    if groups := [group for group in alike.values() if len(group) > 1]:
        lines = [" = ".join(f"{text!r} ({len(data.instructions[text])})" for text in group) for group in groups]
        odd = {number for group in groups for text in group[1:] for number in data.instructions[text]}
        detail = f"{sum(map(len, groups))} spellings of {len(groups)}, apart by case, spaces or punctuation"
        yield _finding("instructions spelled differently", detail, sorted(odd), lines)


def find_duplicates(data: Survey) -> Iterator[Finding]:
    twins = defaultdict(list)
    for number, actions in data.actions.items():
        twins[hashlib.sha256(actions.tobytes()).digest()].append(number)
    groups = [group for group in twins.values() if len(group) > 1]
    if copies := sorted(number for group in groups for number in group[1:]):
        detail = f"{len(copies)} of {len(data.actions)} repeat the actions of another one exactly"
        lines = [f"episodes {' = '.join(map(str, group))}" for group in groups]
        yield _finding("duplicate episodes", detail, copies, lines)


def motion(actions: np.ndarray, data: Survey) -> np.ndarray:
    """`(N,)` the largest motion of each step, in bins. Seven dims are taken for deltas and a gripper, which is left
    out; others may be positions, so that motion is the change, and unknown (infinite) at the first step."""
    dims = data.has_bins.copy()
    if len(dims) == 7:
        dims[6] = False
    else:
        actions = np.diff(actions, axis=0, prepend=np.full((1, len(dims)), np.inf))
    return (np.abs(actions[:, dims]) / data.width[dims]).max(axis=1, initial=0.0)


def idle_steps(actions: np.ndarray, data: Survey) -> np.ndarray:
    """`(N,)` bool: no motion that bins can tell from none, and the gripper's command is that of the step before."""
    idle = motion(actions, data) <= 0.5
    if actions.shape[1] == 7:
        idle &= np.abs(np.diff(actions[:, 6], prepend=actions[:1, 6])) <= 0.5 * data.width[6]
    return idle


def find_idle(data: Survey) -> Iterator[Finding]:
    idle = {number: idle_steps(actions, data) for number, actions in data.actions.items()}
    count, steps = sum(int(flags.sum()) for flags in idle.values()), len(data.stacked)
    if count > MANY_IDLE * steps:
        detail = f"{count / steps:.1%} ({count} of {steps}) neither move nor change the gripper"
        yield _finding("idle steps", detail, [number for number, flags in idle.items() if flags.mean() > MANY_IDLE])


def find_ranges(data: Survey) -> Iterator[Finding]:
    """Dims without a range, and dims beyond the bins."""
    stats, first = data.stats, data.stacked[0]
    # `normalize` makes 0 of any constant, and `unnormalize` turns it back only where the dim is normalised.
    lost = stats.constant & ~stats.mask & (first != 0)
    for title, which in (("constant dims", stats.constant & ~lost), ("lost constants", lost)):
        if which.any():
            yield _finding(title, ", ".join(f"{data.names[dim]} = {first[dim]:.4g}" for dim in np.flatnonzero(which)))
    nearly = stats.mask & ~stats.constant & (stats.high - stats.low <= NO_RANGE)
    away = {number: nearly & (np.abs(actions - stats.low) > NO_RANGE) for number, actions in data.actions.items()}
    yield from _by_dim(data, "nearly constant dims", "differ, while q01 = q99", away)
    outside = {number: ~stats.mask & (np.abs(actions) > 1.0) for number, actions in data.actions.items()}
    yield from _by_dim(data, "values outside the 256 bins", "lie outside [-1, 1]", outside)


def _by_dim(data: Survey, title: str, what: str, flags: dict[int, np.ndarray]) -> Iterator[Finding]:
    """A finding with the share of flagged values, `(N, A)` bool per episode, in each dim that has any."""
    shares = np.concatenate(list(flags.values())).mean(axis=0)
    if shares.any():
        detail = ", ".join(f"{data.names[dim]}: {shares[dim]:.2%} of the values" for dim in np.flatnonzero(shares))
        yield _finding(title, f"{detail} {what}", [number for number in flags if flags[number].any()])


def find_clipped(data: Survey) -> Iterator[Finding]:
    """By construction some 2 % of a dim's values lie beyond [q01, q99]: but how far, and are they of few episodes?"""
    dims = np.flatnonzero(data.has_bins & data.stats.mask)
    middle, half = (data.low[dims] + data.high[dims]) / 2, (data.high[dims] - data.low[dims]) / 2
    sizes = {number: np.abs(actions[:, dims] - middle) / half for number, actions in data.actions.items()}
    largest = np.max([values.max(axis=0) for values in sizes.values()], axis=0)
    if far := [f"{data.names[dim]} {size:.1f}" for dim, size in zip(dims, largest) if size > HEAVY_TAIL]:
        odd = [number for number, values in sizes.items() if (values > HEAVY_TAIL).any()]
        yield _finding("heavy tails", f"largest normalised value, where bins end at 1: {', '.join(far)}", odd)
    shares = {number: (values > 1.0).mean(axis=0).max(initial=0.0) for number, values in sizes.items()}
    if odd := [number for number, share in shares.items() if share > CLIPPED_EPISODE]:
        detail = (
            f"{len(odd)} of {len(shares)} have more than {CLIPPED_EPISODE:.0%} of a dim's values beyond q01 or q99"
        )
        yield _finding("clipped episodes", f"{detail}, at most {max(shares.values()):.0%}; 2% are usual", odd)


def find_gripper(data: Survey) -> Iterator[Finding]:
    """The last of seven dims against OpenVLA's convention: absolute, 1 = open, 0 = closed."""
    if data.stats.dim != 7 or data.stats.constant[6]:
        return
    low, high = data.stacked[:, 6].min(), data.stacked[:, 6].max()
    lower = [number for number, actions in data.actions.items() if actions[0, 6] < (low + high) / 2]
    begin = f"{len(lower)} of {len(data.actions)} episodes begin near {low:.4g}"
    if not (low >= 0.0 and 0.5 < high <= 1.0):
        detail = f"values in [{low:.4g}, {high:.4g}], not 1 = open and 0 = closed; {begin}"
        yield _finding("gripper convention", detail)
    elif len(lower) > len(data.actions) / 2:
        yield _finding("gripper may be inverted", f"{begin}, which is closed", lower)


def find_control_rate(data: Survey) -> Iterator[Finding]:
    fps, (slowest, fastest) = data.reader.fps, CONTROL_RATE
    if fps is not None and not slowest <= fps <= fastest:
        small = np.mean(np.concatenate([motion(actions, data) for actions in data.actions.values()]) < 1.0)
        detail = f"{fps:g} Hz, where OpenVLA acts at {slowest} to {fastest} Hz"
        yield _finding("control rate", f"{detail}; {small:.1%} of the steps move less than a bin")


def find_frames(data: Survey) -> Iterator[Finding]:
    for place, camera in enumerate(data.reader.cameras):
        frames = [frame for frame in data.frames if frame.camera == camera]
        good = [frame for frame in frames if not frame.error]
        sizes = Counter(frame.size for frame in good).most_common()
        seen = defaultdict(set)
        for frame in good:
            seen[frame.episode].add(frame.step if frame.is_flat else frame.digest)  # flat ones all look the same
        moving = {number for number, looks in seen.items() if len(looks) > 1 or len(data.actions[number]) < 3}
        checks = {
            "undecodable frames": [frame for frame in frames if frame.error],
            "black or flat frames": [frame for frame in good if frame.is_flat],
            "frozen frames": [frame for frame in good if frame.episode not in moving],
            "differing resolutions": [frame for frame in good if frame.size != sizes[0][0]],
        }
        for title, bad in checks.items():
            if bad:
                detail = f"{camera}: {len(bad)} of {len(frames)} sampled frames"
                lines = [frame.error for frame in bad if frame.error]
                if title == "differing resolutions":
                    lines = [f"{size}: {count} frames" for size, count in sizes]
                minor = place > 0 and title != "undecodable frames"  # training takes the first camera unless told to
                episodes = sorted({frame.episode for frame in bad})
                yield _finding(title, detail, episodes, lines, WARNING if minor else None)
