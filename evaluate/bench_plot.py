"""Pictures of a benchmark's result, as PNG: bars by stage above their floor, or lines over the number of robots."""

import io

from openvla.evaluate.bench_clock import STAGES
from openvla.evaluate.bench_report import title_of

INCH = 150  # pixels
WIDTH, ROW_HEIGHT, FRAME_HEIGHT = 10.0, 0.58, 1.45  # inches
COLORS = ("#9aa5b1", "#66a182", "#33658a", "#d1495b", "#222222")  # of the stages
WHOLE, TEXT, FAINT = "#7d6b91", "#222222", "#6b7280"
LINES = ("#33658a", "#d1495b", "#66a182", "#b7791f", "#7d6b91", "#222222")
NARROW = 0.05  # of the axis: a segment that its number does not fit into


def draw(result: dict) -> bytes:
    """Lines if batches of several sizes were measured, else bars."""
    runs = [run for run in result["runs"] if run["ways"]]
    if not runs:
        raise ValueError("The result holds no way that was measured: nothing to draw.")
    several = len({run["batch"] for run in runs}) > 1
    return draw_scaling(result, runs) if several else draw_bars(result, runs)


def draw_bars(result: dict, runs: list[dict]) -> bytes:
    """One panel per type of numbers, one bar per way; the thin bar below is its floor.

    A bar is as long as the median; its parts have the shares that rounds of their own gave them.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heights = [len(run["ways"]) * ROW_HEIGHT + 0.75 for run in runs]
    figure = Figure(figsize=(WIDTH, sum(heights) + FRAME_HEIGHT - 0.5), layout="constrained")
    panels = figure.subplots(len(runs), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, run in zip(panels, runs):
        _draw_run(axis, run)
    legend = [Patch(color=color, label=stage) for stage, color in zip(STAGES, COLORS)]
    if any(row["stages_ms"] is None for run in runs for row in run["ways"]):
        legend.append(Patch(color=WHOLE, label="compiled, not split"))
    legend.append(Patch(facecolor="#d7dbe0", edgecolor=FAINT, hatch="////", label="floor"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=9, frameon=False)
    figure.suptitle(title_of(result), fontsize=12, x=0.01, ha="left", weight="bold", color=TEXT, parse_math=False)
    return _png(figure)


def _draw_run(axis, run: dict) -> None:
    rows, against = run["ways"], run["against"]
    longest = max(row["ms"]["p50"] for row in rows)
    for place, row in enumerate(rows):
        # 1. What was measured
        total, split = row["ms"]["p50"], row["stages_ms"]
        if split:
            widths = [total * split[stage] / sum(split.values()) for stage in STAGES]
        else:
            widths = [max(total - row["policy_ms"]["p50"], 0.0), row["policy_ms"]["p50"]]
        left = 0.0
        for width, color in zip(widths, COLORS if split else (COLORS[0], WHOLE)):
            axis.barh(place - 0.1, width, 0.52, left, color=color)
            if width > NARROW * longest:
                _say(axis, left + width / 2, place - 0.1, _short(width), "white", 9, ha="center")
            left += width

        # 2. What it would take at least
        floor_left = widths[0]  # preprocessing has no floor
        for stage, color in zip(STAGES, COLORS):
            width = row["floor_ms"].get(stage, 0.0)
            hatched = {"facecolor": color, "alpha": 0.35, "edgecolor": "white", "hatch": "//////", "linewidth": 0}
            axis.barh(place + 0.265, width, 0.17, floor_left, **hatched)
            floor_left += width

        # 3. In numbers
        ratio = "" if row["way"] == against else f"   {row['times_as_fast']['median']:.3g} × as fast"
        told = f"{_short(total)} ms   {row['hz']:.3g} Hz{ratio}"
        _say(axis, total + 0.01 * longest, place - 0.1, told, TEXT, 9.5)
        floor = f"floor {_short(row['floor_ms']['total'])} ms, {row['times_floor']:.2f} ×"
        _say(axis, floor_left + 0.01 * longest, place + 0.265, floor, FAINT, 7.5)
    axis.set_title(
        f"{run['dtype']}, batch {run['batch']}, compared with {against};  {_ceilings(run)}",
        loc="left",
        fontsize=9.5,
        color=FAINT,
    )
    axis.set_yticks(
        [place - 0.1 for place in range(len(rows))], [row["way"] for row in rows], fontsize=10.5, color=TEXT
    )
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, longest * 1.38)
    axis.set_xlabel("milliseconds from picture and instruction to action", fontsize=9, color=FAINT)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", colors=FAINT, labelsize=8.5)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color("#c5cad1")
    axis.grid(axis="x", color="#e7e9ec", linewidth=0.8)
    axis.set_axisbelow(True)


def draw_scaling(result: dict, runs: list[dict]) -> bytes:
    """Time of a pass and actions per second over the number of robots that share one policy."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    time_axis, rate_axis = figure.subplots(1, 2)
    names = list(dict.fromkeys((run["dtype"], row["way"]) for run in runs for row in run["ways"]))
    several_types = len({dtype for dtype, _ in names}) > 1
    ends = []
    for (dtype, way), color in zip(names, LINES * len(names)):
        found = [(run["batch"], row) for run in runs if run["dtype"] == dtype for row in run["ways"]]
        found = sorted((each for each in found if each[1]["way"] == way), key=lambda each: each[0])
        robots = [batch for batch, _ in found]
        label = f"{way}, {dtype}" if several_types else way
        middle, high = ([row["ms"][name] for _, row in found] for name in ("p50", "p99"))
        time_axis.plot(robots, middle, "o-", color=color, label=label, linewidth=2, markersize=5)
        time_axis.fill_between(robots, middle, high, color=color, alpha=0.15, linewidth=0)
        time_axis.plot(robots, [row["floor_ms"]["total"] for _, row in found], ":", color=color, linewidth=1.5)
        rates = [row["actions_per_second"] for _, row in found]
        rate_axis.plot(robots, rates, "o-", color=color, label=label, linewidth=2, markersize=5)
        ends.append((rates[-1], robots[-1], color))
    lowest, highest = 0.0, max(end[0] for end in ends)
    for rate, robots, color in sorted(ends):  # numbers behind the lines, none upon another
        lowest = max(rate, lowest)
        place = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
        rate_axis.annotate(f"{rate:.3g}", (robots, lowest), **place, fontsize=9, color=color)
        lowest += 0.05 * highest
    batches = sorted({run["batch"] for run in runs})
    for axis in (time_axis, rate_axis):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(batches))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("robots per pass", fontsize=9.5, color=FAINT)
        axis.grid(color="#e7e9ec", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["bottom", "left"]].set_color("#c5cad1")
        axis.tick_params(which="both", colors=FAINT, labelsize=9)
        axis.set_axisbelow(True)
    time_axis.set_yscale("log")
    time_axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    time_axis.set_title("milliseconds per pass: median, up to p99; dotted: floor", loc="left", fontsize=10, color=TEXT)
    rate_axis.set_title("actions per second, all robots together", loc="left", fontsize=10, color=TEXT)
    rate_axis.set_ylim(bottom=0)
    time_axis.legend(fontsize=9.5, frameon=False, loc="upper left")
    dtype = "" if several_types else f", {runs[0]['dtype']}"
    title = f"{title_of(result)}{dtype}"
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", weight="bold", color=TEXT, parse_math=False)
    return _png(figure)


def _say(axis, x: float, y: float, text: str, color: str, size: float, ha: str = "left") -> None:
    axis.text(x, y, text, color=color, fontsize=size, ha=ha, va="center", parse_math=False)


def _ceilings(run: dict) -> str:
    best = run["ceilings"]["best"]
    bandwidth, rate = max(best["copy_gb_s"], best["matvec_gb_s"]), best["matmul_gflop_s"]
    products = f"{rate:.3g} GFLOP/s" if rate < 1000 else f"{rate / 1000:.3g} TFLOP/s"
    return f"floor (hatched) at {bandwidth:,.3g} GB/s and {products}, measured here"


def _short(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=INCH)
    return file.getvalue()
