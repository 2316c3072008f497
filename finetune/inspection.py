"""Says what is in a dataset and what of it will hurt when OpenVLA is fine-tuned on it.

openvla data inspect my_robot
openvla data inspect datasets/bridge_orig/1.0.0 --out report       writes report.html and report.png
openvla data inspect my_robot --json --strict > inspection.json    status 1 if there is a problem

Bad episodes are listed, with file and reason, and never end the pass over the data. Memory holds all actions, but of
the images only a few thumbnails.
"""

import base64
import html
import io
import json
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from openvla.cli import command_parser
from openvla.finetune.survey import HEAVY_TAIL, INTERVALS, PROBLEM, SHOWN, Finding, Survey, find, survey


def describe(data: Survey, findings: list[Finding]) -> dict:
    """What is in the dataset and what will hurt: what `--json` prints, and the other reports show."""
    reader, lengths = data.reader, [len(actions) for actions in data.actions.values()]
    found = {"name": reader.name, "episodes": len(reader), "usable_episodes": len(lengths), "steps": sum(lengths)}
    found["length"] = (
        {"min": min(lengths), "median": float(np.median(lengths)), "max": max(lengths)} if lengths else {}
    )
    sizes = {camera: {f.size for f in data.frames if f.camera == camera and f.size} for camera in reader.cameras}
    found |= {"fps": reader.fps, "cameras": {camera: sorted(seen) for camera, seen in sizes.items()}}
    counts = {text: len(numbers) for text, numbers in data.instructions.items()}
    found["state_sizes"] = sorted(data.state_sizes)
    found["instructions"] = dict(sorted(counts.items(), key=lambda item: -item[1]))
    found["dims"] = []
    if data.actions:
        columns = {name: data.norm_stats["action"][name] for name in ("min", "q01", "mean", "q99", "max", "mask")}
        columns |= {"bin": data.width.tolist(), "name": data.names, "unit": data.units}
        columns["clipped"] = ((data.stacked < data.low) | (data.stacked > data.high)).mean(axis=0).tolist()
        found["dims"] = [{key: column[dim] for key, column in columns.items()} for dim in range(data.stats.dim)]
    found["gripper"] = describe_gripper(data) if data.actions and data.stats.dim == 7 else ""
    found["findings"] = [asdict(finding) for finding in findings]
    named = {number for finding in findings for number in finding.episodes}
    return {**found, "sources": {number: data.sources.get(number, "") for number in sorted(named)}}


def describe_gripper(data: Survey) -> str:
    """Of the last of seven dims: two states or anything between, and where episodes begin."""
    values = data.stacked[:, 6]
    low, high = values.min(), values.max()
    is_binary = (np.minimum(values - low, high - values) <= 0.05 * (high - low)).mean() > 0.95
    kind = "constant" if low == high else "binary" if is_binary else "continuous"
    above = sum(actions[0, 6] > (low + high) / 2 for actions in data.actions.values())
    return f"{kind} in [{low:.4g}, {high:.4g}], begins in the upper half in {above} of {len(data.actions)} episodes"


def overview(found: dict) -> list[tuple[str, str]]:
    """(what, value) rows for people."""
    length = "{min} to {max}, median {median:g}".format(**found["length"]) if found["length"] else "none"
    rate = "not recorded" if found["fps"] is None else f"{found['fps']:g} Hz"
    states = " or ".join(f"{size} dims" if size else "none" for size in found["state_sizes"])
    return [
        ("episodes", f"{found['episodes']}, {found['usable_episodes']} of them usable"),
        ("steps", f"{found['steps']}, per episode {length}"),
        ("rate", rate),
        *(("camera", f"{camera} {' or '.join(sizes)}") for camera, sizes in found["cameras"].items()),
        ("state", states or "none"),
        *([("gripper", found["gripper"])] if found["gripper"] else []),
        ("instructions", f"{len(found['instructions'])} distinct"),
    ]


def dim_table(found: dict) -> list[list[str]]:
    """Rows of cells, the header first."""
    numbers = ("min", "q01", "mean", "q99", "max", "bin")
    rows = [["dim", *numbers, "clipped", "normalised"]]
    for dim in found["dims"]:
        cells = [f"{dim[name]:.5f}" for name in numbers]
        rows.append([dim["name"], *cells, f"{dim['clipped']:.1%}", "yes" if dim["mask"] else "no"])
    return rows


def verdict(found: dict) -> str:
    counts = Counter(finding["severity"] for finding in found["findings"])
    return ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items()) or "nothing will hurt"


def cases(finding: dict, found: dict) -> list[str]:
    """One line per case of a finding: its own, or the episode and the file it came from."""
    return finding["lines"] or [f"episode {number}: {found['sources'][number]}" for number in finding["episodes"]]


def shortened(items: list, most: int, separator: str = ", ") -> str:
    rest = f"{separator}… and {len(items) - most} more" if len(items) > most else ""
    return separator.join(map(str, items[:most])) + rest


def print_report(found: dict) -> None:
    print(found["name"])
    for what, value in overview(found):
        print(f"  {what:<14}{value}")
    margin = "\n" + " " * 10
    spoken = [f"{count:>8} × {text!r}" for text, count in found["instructions"].items()]
    print(margin[1:-4] + shortened(spoken, 10, margin[:-4]), end="\n\n")
    for cells in dim_table(found):
        print(f"{cells[0]:<12}{''.join(f'{cell:>11}' for cell in cells[1:])}")
    for finding in found["findings"]:
        print(f"\n{finding['severity']:<8}  {finding['title']}: {finding['detail']}", end=margin)
        print(textwrap.fill(finding["advice"], 105).replace("\n", margin))
        if finding["lines"]:
            print(margin[1:] + shortened(finding["lines"], 20, margin))
        elif finding["episodes"]:
            print(f"{margin[1:]}episodes {shortened(finding['episodes'], 20)}")
    print(f"\n{verdict(found)}")


def draw_histograms(data: Survey) -> bytes:
    """PNG: per action dim how often which values occur, and where its 256 bins lie."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    columns = min(data.stats.dim, 4)
    rows = -(-data.stats.dim // columns)
    figure = Figure(figsize=(3.5 * columns, 2.7 * rows + 0.7), layout="constrained")
    for dim, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if dim < data.stats.dim:
            _draw_dim(axis, data, dim)
        else:
            axis.axis("off")
    caption = "green: where the 256 bins lie, a tick every 16 bins; red: clipped (far values in the outermost bar)"
    figure.suptitle(f"{data.reader.name}: {len(data.stacked):,} actions\n{caption}", fontsize=11, parse_math=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _draw_dim(axis, data: Survey, dim: int) -> None:
    from matplotlib.ticker import NullFormatter

    values, low, high = data.stacked[:, dim], data.low[dim], data.high[dim]
    far = HEAVY_TAIL * (high - low) / 2  # what lies further from the middle is counted in the outermost bars
    left = min(low, max(values.min(), (low + high) / 2 - far))
    right = max(high, min(values.max(), (low + high) / 2 + far))
    margin = 0.05 * (right - left) or 0.5
    left, right = left - margin, right + margin
    for start, end, color in ((left, low, "#f8dedc"), (low, high, "#e4f2e4"), (high, right, "#f8dedc")):
        axis.axvspan(start, end, color=color, linewidth=0)
    axis.hist(np.clip(values, left, right), bins=80, range=(left, right), color="#33658a", log=True)
    ticks = low + data.width[dim] * np.arange(0, INTERVALS + 1, 16)
    axis.vlines(ticks, 0.96, 1, transform=axis.get_xaxis_transform(), color="#2e7d32", linewidth=0.7)
    names = ("q01", "q99") if data.stats.mask[dim] else ("-1", "1")
    for place, name, side in zip((low, high), names, ("right", "left")):
        axis.axvline(place, color="#2e7d32", linewidth=1)
        axis.text(place, 1.0, f" {name} ", transform=axis.get_xaxis_transform(), ha=side, va="bottom", fontsize=7)
    axis.set_xlim(left, right)
    axis.set_ylim(0.6, 2 * axis.get_ylim()[1])  # from below one, so that a single action is seen
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.locator_params(axis="x", nbins=5)
    axis.tick_params(labelsize=8)
    clipped = np.mean((values < low) | (values > high))
    what = "constant" if data.stats.constant[dim] else f"bin {data.width[dim]:.2g}, {clipped:.1%} clipped"
    axis.set_title(f"{data.names[dim]}: {what}", fontsize=9, pad=13, parse_math=False)


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td { padding: 1px 14px 1px 0 } .numbers tr:first-child { font-weight: bold }
.numbers td + td { text-align: right; font-variant-numeric: tabular-nums }
.finding { border-left: 5px solid; padding-left: 12px; margin: 14px 0 }
.problem { border-color: #c62828 } .warning { border-color: #f0a000 } details { color: #555 }
figure { margin: 0 0 14px } figure img { width: 240px; margin-right: 4px } .wide { max-width: 100% }
"""


def html_report(found: dict, data: Survey, histograms: bytes | None) -> str:
    """One page that needs no other file. Whatever comes from the dataset is escaped."""
    parts = [f"<h1>{html.escape(found['name'])}</h1>", _html_table(overview(found))]
    parts.append(f"<h2>{verdict(found).capitalize()}</h2>")
    for finding in found["findings"]:
        listed = html.escape(shortened(cases(finding, found), 500, "\n")).replace("\n", "<br>\n")
        text = html.escape(f"{finding['detail']}\n{finding['advice']}").replace("\n", "<br>\n")
        title = f"<b>{html.escape(finding['title'])}</b> ({finding['severity']})"
        parts.append(f'<div class="finding {finding["severity"]}">{title}: {text}')
        parts.append(f"<details><summary>which</summary>{listed}</details></div>" if listed else "</div>")
    if histograms:
        parts += ["<h2>Actions</h2>", _html_table(dim_table(found), "numbers")]
        parts.append(f'<img class="wide" alt="histograms" src="{_data_url(histograms)}">')
    for camera in found["cameras"]:
        parts += [f"<h2>Camera {html.escape(camera)}</h2>", *_contact_sheet(data, camera)]
    spoken = [(f"{count} ×", text) for text, count in found["instructions"].items()]
    rest = [("", f"… and {len(spoken) - 100} more")] if len(spoken) > 100 else []
    parts += ["<h2>Instructions</h2>", _html_table(spoken[:100] + rest)]
    head = f'<meta charset="utf-8"><title>{html.escape(found["name"])}</title><style>{STYLE}</style>'
    return "\n".join(["<!DOCTYPE html>", f'<html lang="en"><head>{head}</head><body>', *parts, "</body></html>\n"])


def _html_table(rows, style: str = "") -> str:
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f'<table class="{style}">' + "\n".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _contact_sheet(data: Survey, camera: str) -> Iterator[str]:
    """First, middle and last frame of the first few sampled episodes, under what the robot was told."""
    for number in list(dict.fromkeys(frame.episode for frame in data.frames))[:SHOWN]:
        told = [text for text, numbers in data.instructions.items() if number in numbers] or ["(no instruction)"]
        caption = html.escape(f"episode {number}, {len(data.actions[number])} steps: {' / '.join(told)}")
        yield f"<figure><figcaption>{caption}</figcaption>"
        for frame in data.frames:
            if (frame.episode, frame.camera) == (number, camera):
                name = html.escape(frame.error or f"step {frame.step}")
                url = _data_url(frame.thumbnail or b"")
                yield f'<img alt="{name}" title="{name}" src="{url}">' if frame.thumbnail else f"<p>{name}</p>"
        yield "</figure>"


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def write(path: Path, content: bytes) -> None:
    """All of it or nothing: under a temporary name first."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def main(argv: list[str]) -> None:
    parser = command_parser("data inspect", __doc__)
    parser.add_argument("data", metavar="SOURCE", help="LeRobot, RLDS, HDF5 or plain folder")
    parser.add_argument("--name", help="unnorm_key; default: the dataset's name")
    parser.add_argument(
        "--mask", nargs="+", type=int, metavar="0_OR_1", help="per action dim: 1 = normalise, 0 = leave"
    )
    parser.add_argument("--frames", type=int, default=16, metavar="N", help="look at 3 frames each of N episodes (16)")
    parser.add_argument("--out", metavar="REPORT", help="write REPORT.html and REPORT.png")
    parser.add_argument("--json", action="store_true", help="print a JSON dictionary instead of text")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if there is a problem")
    args = parser.parse_args(argv)
    if args.frames < 0:
        raise ValueError(f"--frames is a number of episodes, 0 for none, got {args.frames}.")
    if args.out:
        import matplotlib  # noqa: F401  if it is missing, say so before the pass over the data

    from openvla.finetune.readers import open_reader

    mask = None if args.mask is None else [bool(value) for value in args.mask]
    data = survey(open_reader(args.data, args.name), mask, args.frames)
    found = describe(data, find(data))
    if args.out:
        out = Path(args.out.removesuffix(".html")).expanduser()
        out.parent.mkdir(parents=True, exist_ok=True)
        histograms = draw_histograms(data) if data.actions else None
        page = html_report(found, data, histograms).encode("utf-8", "backslashreplace")  # JSON allows half characters
        write(out.with_name(f"{out.name}.html"), page)
        if histograms:
            write(out.with_name(f"{out.name}.png"), histograms)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print_report(found)
    if args.strict and any(finding["severity"] == PROBLEM for finding in found["findings"]):
        sys.exit(1)
