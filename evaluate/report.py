"""Success rates with their uncertainty: table, JSON, the entries of a model card, and a picture."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

CONFIDENCE_95 = 1.959963984540054  # standard normal quantile of 0.975


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a rate (Wilson 1927), fractions in [0, 1]; honest at 0 and 100 %, unlike ± formulas."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"Expected 0 to {trials} successes of at least one trial, got {successes}.")
    rate, z2 = successes / trials, CONFIDENCE_95**2
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = CONFIDENCE_95 / (1 + z2 / trials) * (rate * (1 - rate) / trials + z2 / (4 * trials**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def summarize(episodes: Iterable[dict]) -> dict:
    """Counts and rates of finished episodes, by task and together.

    Args:
        episodes: lines of `episodes.jsonl`: `task`, `instruction`, `success`, `steps`, `cpu_seconds`, `restarts`, ….

    Returns `tasks`, a list of `{"task", "instruction", "episodes", "successes", "success_rate", "interval",
    "mean_steps", "failed"}`, of which `failed` lists initial states; all but the first two and the last for all
    together, `cpu_ms_per_step` by what it was spent on, and `accepted_per_draft`, tokens of the last answer that were
    right for the next one, from the first on.
    """
    episodes = sorted(episodes, key=lambda line: (line["task"], line["episode"]))
    tasks = []
    for task in sorted({line["task"] for line in episodes}):
        lines = [line for line in episodes if line["task"] == task]
        told = " | ".join(dict.fromkeys(line["instruction"] for line in lines))  # several if asked for others
        failed = [line["episode"] for line in lines if not line["success"]]
        tasks.append({"task": task, "instruction": told, **_rate(lines), "failed": failed})
    steps = sum(line["steps"] for line in episodes)
    spent = sorted({what for line in episodes for what in line["cpu_seconds"]})
    per_step = {what: 1000 * sum(line["cpu_seconds"].get(what, 0.0) for line in episodes) / steps for what in spent}
    restarts = sum(line.get("restarts", 0) for line in episodes)
    replaced = sum(line.get("replaced", 0) for line in episodes)
    drafts = sum(line.get("drafts", 0) for line in episodes)
    accepted = sum(line.get("accepted", 0) for line in episodes) / drafts if drafts else None
    return {
        "tasks": tasks,
        **_rate(episodes),
        "cpu_ms_per_step": per_step,
        "restarts": restarts,
        "replaced_tokens": replaced,
        "accepted_per_draft": accepted,
    }


def _rate(lines: list[dict]) -> dict:
    successes = sum(line["success"] for line in lines)
    return {
        "episodes": len(lines),
        "successes": successes,
        "success_rate": successes / len(lines),
        "interval": list(wilson_interval(successes, len(lines))),
        "mean_steps": sum(line["steps"] for line in lines) / len(lines),
    }


def format_table(suite: str, summary: dict) -> str:
    """The result as text, one line per task."""
    rows = [(str(task["task"]), task["instruction"], task) for task in summary["tasks"]]
    width = min(80, max(len(text) for _, text, _ in rows))
    lines = [f"{'':>4}  {suite:<{width}}  {'success':>12}  {'95 % interval':>15}  {'steps':>6}"]
    for number, text, row in [*rows, ("all", "", summary)]:
        counts = f"{row['successes']}/{row['episodes']} {row['success_rate']:>6.1%}"
        low, high = row["interval"]
        text = text if len(text) <= width else text[: width - 1] + "…"
        interval = f"{low:.1%} – {high:.1%}"
        lines.append(f"{number:>4}  {text:<{width}}  {counts:>12}  {interval:>15}  {row['mean_steps']:>6.0f}")
    spent = ", ".join(f"{what} {value:.1f}" for what, value in summary["cpu_ms_per_step"].items())
    lines.append(f"\nprocessor milliseconds per step: {spent}")
    if summary["restarts"]:
        lines.append(f"simulators that died and were replaced, and their episodes run again: {summary['restarts']}")
    if summary["accepted_per_draft"] is not None:
        lines.append(f"tokens right in the last answer, which drafts the next: {summary['accepted_per_draft']:.2f}")
    if summary["replaced_tokens"]:
        lines.append(f"{summary['replaced_tokens']} tokens were no actions; the best actions were taken")
    return "\n".join(lines)


def card_entries(dataset: str, summary: dict, command: str) -> list[dict]:
    """What `openvla export --evaluation` writes on the model card; format: `hub_upload/model_card.py`."""
    return [
        {
            "dataset": dataset,
            "metric": "success_rate",
            "value": summary["success_rate"],
            "episodes": summary["episodes"],
            "interval": summary["interval"],
            "command": command,
        }
    ]


def draw_summary(path: Path, title: str, summary: dict) -> None:
    """A PNG with a bar per task, its interval, and all together."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [(f"{task['task']}  {task['instruction']}", task) for task in summary["tasks"]]
    rows.append((f"all {summary['episodes']} episodes", summary))
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.34 * len(rows)), layout="constrained")
    for place, (_, row) in enumerate(rows):
        low, high = row["interval"]
        colour = "#264653" if place == len(rows) - 1 else "#2a9d8f"
        axes.barh(place, row["success_rate"], color=colour, height=0.62)
        axes.plot([low, high], [place, place], color="#e76f51", linewidth=2.5, solid_capstyle="butt")
        axes.text(1.02, place, f"{row['successes']}/{row['episodes']}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [text if len(text) < 75 else text[:74] + "…" for text, _ in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.set_xlabel("success, with 95 % interval")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
    os.replace(temporary, path)


def short_name(checkpoint: str) -> str:
    """The last two parts of a folder, a Hub id, or an address: "runs/cup/merged" -> "cup-merged"."""
    place = Path(checkpoint).expanduser()
    return "-".join((place.resolve() if place.exists() else place).parts[-2:]).replace(":", "-")


def tell_differences(there: dict, now: dict) -> str:
    """What differs between the settings of results that are there and those asked for now, as text."""
    differing = sorted(key for key in there | now if there.get(key) != now.get(key))
    return "; ".join(f"{key}: {there.get(key)} there, {now.get(key)} now" for key in differing)


def write_json(path: Path, content) -> None:
    """Writes JSON under a temporary name, then renames it."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
