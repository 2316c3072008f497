"""Pictures of an offline evaluation, as PNG: predicted against recorded over an episode, where the errors lie, and how
they grow within a chunk."""

import io

import numpy as np

from openvla.evaluate.offline_scoring import MODES, Trace

INCH = 110  # pixels
EPISODE_WIDTH, ROW_HEIGHT, TITLE_HEIGHT = 11.0, 1.5, 0.8  # inches
PANEL_WIDTH, PANEL_HEIGHT, BARS_HEIGHT = 3.4, 2.5, 3.4
STYLES = {  # colour, line width
    "recorded": ("#222222", 1.4),
    "free_running": ("#d1495b", 1.1),
    "teacher_forced": ("#66a182", 0.8),
}


def draw_all(found: dict, traces: list[Trace], stats, num_episodes: int) -> dict[str, bytes]:
    """`errors.png` and of chunks `ahead.png`, of the first of the modes, and `episode_N.png` of some episodes, evenly
    spread.

    Args:
        found: what `offline_scoring.summarize` gives, and its settings.
        stats: `ActionStats` that the policy acts with.
    """
    mode, dataset = next(iter(traces[0].normalized)), found["settings"]["dataset"]
    dims = [(dim["name"], dim["unit"]) for dim in found[mode]["dims"]]
    predicted = [  # of a chunk the first step
        {mode: stats.unnormalize(values[:, 0]) for mode, values in trace.normalized.items()} for trace in traces
    ]
    errors = np.concatenate([each[mode] - trace.actions for each, trace in zip(predicted, traces)])
    pictures = {"errors.png": draw_errors(found, errors, dims, mode)}
    if "ahead" in found[mode]:
        pictures["ahead.png"] = draw_ahead(found, mode)
    spread = np.linspace(0, len(traces) - 1, min(num_episodes, len(traces)))
    for index in spread.round().astype(int):
        trace = traces[index]
        title = f"{dataset}, episode {trace.number}: {trace.instruction}"
        pictures[f"episode_{trace.number}.png"] = draw_episode(trace.actions, predicted[index], dims, title)
    return pictures


def dim_label(name: str, unit: str) -> str:
    return f"{name} [{unit}]" if unit else name


def draw_episode(
    recorded: np.ndarray, predicted: dict[str, np.ndarray], dims: list[tuple[str, str]], title: str
) -> bytes:
    """One row per dim, over the steps of an episode.

    Args:
        recorded: `(N, A)`, physical units.
        predicted: per mode `(N, A)`; of a chunk the first step.
        dims: `(name, unit)` per dim.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state
    from matplotlib.ticker import MaxNLocator

    size = (EPISODE_WIDTH, ROW_HEIGHT * len(dims) + TITLE_HEIGHT)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(dims), 1, sharex=True, squeeze=False)[:, 0]
    for index, axis in enumerate(axes):
        for name, values in {"recorded": recorded, **predicted}.items():
            color, width = STYLES[name]
            marker = "o" if len(values) == 1 else None  # a line of one point shows nothing
            label = name.replace("_", "-")
            axis.plot(values[:, index], color=color, linewidth=width, marker=marker, label=label)
        axis.set_ylabel(dim_label(*dims[index]), parse_math=False)
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8, frameon=False)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(axes)
    figure.suptitle(_shortened(title), fontsize=11, parse_math=False)
    return _png(figure)


def draw_errors(found: dict, errors: np.ndarray, dims: list[tuple[str, str]], mode: str) -> bytes:
    """Bars of the scaled error per dim beside what needs no policy, and a histogram of the errors of each dim.

    Args:
        found: what `offline_scoring.summarize` gives, and its settings.
        errors: `(N, A)`, predicted less recorded, physical units; of a chunk the first step.
        mode: which errors these are.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    columns = min(len(dims), 4)
    rows = -(-len(dims) // columns)
    size = (PANEL_WIDTH * max(columns, 2), BARS_HEIGHT + PANEL_HEIGHT * rows + TITLE_HEIGHT)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[BARS_HEIGHT, *[PANEL_HEIGHT] * rows])
    axis = figure.add_subplot(grid[0, :])
    policy = {name.replace("_", "-"): found[name] for name in MODES if name in found}
    bars = {**policy, **found["baselines"]}
    width = 0.8 / len(bars)
    for number, (name, scores) in enumerate(bars.items()):
        heights = [dim["l1_normalized"] for dim in scores["dims"]]
        places = np.arange(len(dims)) + (number - (len(bars) - 1) / 2) * width
        axis.bar(places, heights, width, label=name, color="C3" if number == 0 else f"C{number + 3}")
    axis.set_xticks(range(len(dims)), [name for name, _ in dims], parse_math=False)
    axis.set_ylabel("mean error, scale from -1 to 1")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(bars), fontsize=8, frameon=False)
    axis.grid(axis="y", alpha=0.3)
    for index, dim in enumerate(dims):
        axis = figure.add_subplot(grid[1 + index // columns, index % columns])
        far = np.quantile(np.abs(errors[:, index]), 0.995) or 1.0  # what lies further is counted in the outermost bars
        axis.hist(np.clip(errors[:, index], -far, far), bins=60, range=(-far, far), color="#33658a", log=True)
        axis.axvline(0, color="#222222", linewidth=0.8)
        axis.set_ylim(bottom=0.7)
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylabel("steps" if index % columns == 0 else "")
        axis.set_xlabel(dim_label(*dim), parse_math=False)
    settings = found["settings"]
    about = f"{settings['name']} on {settings['dataset']} ({settings['split']}), {len(errors):,} steps"
    caption = f"below: {mode.replace('_', '-')}, predicted less recorded (the farthest 0.5 % in the outermost bars)"
    figure.suptitle(f"{_shortened(about)}\n{caption}", fontsize=11, parse_math=False)
    return _png(figure)


def draw_ahead(found: dict, mode: str) -> bytes:
    """Error of each dim, and of all, by steps ahead in the chunk; beside it, of the action before the observation."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(EPISODE_WIDTH * 0.7, BARS_HEIGHT + TITLE_HEIGHT), layout="constrained")
    axis = figure.subplots()
    for index, dim in enumerate(found[mode]["dims"]):
        axis.plot([entry["dims"][index] for entry in found[mode]["ahead"]], linewidth=0.9, label=dim["name"])
    for name, scores, style in (
        ("all dims", found[mode], "-"),
        ("previous action", found["baselines"]["previous action"], "--"),
    ):
        values = [entry["l1_normalized"] for entry in scores["ahead"]]
        axis.plot(values, style, color="#222222", linewidth=2.2, label=name)
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("steps ahead in the chunk")
    axis.set_ylabel("mean error, scale from -1 to 1")
    axis.grid(alpha=0.3)
    for text in axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False).get_texts():
        text.set_parse_math(False)
    settings = found["settings"]
    about = f"{settings['name']} on {settings['dataset']} ({settings['split']}), {mode.replace('_', '-')}"
    figure.suptitle(_shortened(about, 80), fontsize=11, parse_math=False)
    return _png(figure)


def _shortened(text: str, most: int = 110) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=INCH)
    return file.getvalue()
