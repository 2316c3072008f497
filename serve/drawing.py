"""Draws what a policy is about to do: the observation, on it a compass of the motion, beside it a bar per action dim.

Where the camera stands is not known to a policy, so nothing is projected into the picture: the compass shows the
robot's own frame from above. PIL and numpy only, and no other file of this package: it is copied next to the demo's
`app.py`.

Legend: T action chunk · A action dims. Lengths are in units of 1/512 of the picture's shorter side.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST = 448  # pixels of the shorter side from which on text is legible
WIDEST = 8  # times as wide as high: a thin picture would be enlarged beyond all memory
SMOOTH = 3  # shapes are drawn so many times too large, then reduced

ARROW = (255, 214, 10)
FINGERS = (235, 238, 242)
AXES = {"x": (242, 85, 90), "y": (70, 182, 122), "z": (91, 141, 239)}
BARS = AXES | {"roll": (245, 154, 157), "pitch": (143, 211, 174), "yaw": (157, 188, 245), "gripper": (245, 160, 60)}
OTHER_BAR = (63, 184, 175)
GROUND, TRACK, ZERO, FAINT, TEXT = (22, 24, 29), (47, 52, 61), (150, 158, 170), (140, 148, 160), (235, 238, 242)
PLATE = (*GROUND, 205)

PANEL, HEADER, FOOTER, ROW = 300, 50, 54, 62  # width of a column of bars; heights
COMPASS, HEIGHT_BAR, GRIPPER = 124, 42, 78  # widths on the plate
PLATE_HEIGHT, LABELS, RADIUS = 172, 140, 50


@dataclass
class _Motion:
    """What to draw. `actions` `(T, A)`; the rest `(A,)`: ends of each dim's scale, `mask` False: not normalised."""

    actions: np.ndarray
    names: list[str]
    units: list[str]
    low: np.ndarray
    high: np.ndarray
    mask: np.ndarray
    has_statistics: bool

    def find(self, *names: str) -> list[int] | None:
        """Where the dims of these names are, if all are there and x, y, z are motions: 0 lies among their data."""
        lowered = [name.lower() for name in self.names]
        if any(name not in lowered for name in names):
            return None
        axes = [lowered.index(name) for name in ("x", "y", "z") if name in lowered]
        if any(not self.low[dim] <= 0 <= self.high[dim] for dim in axes):  # positions, all of them
            return None
        return [lowered.index(name) for name in names]

    @property
    def gripper(self) -> int | None:
        """The dim of a gripper whose polarity is known."""
        found = [dim for dim, name in enumerate(self.names) if name.lower() == "gripper"]
        return found[0] if found and self.units[found[0]] == "1 = open" else None


def draw_motion(
    image: Image.Image, actions: np.ndarray, dims: list[tuple[str, str]], stats: dict | None = None
) -> Image.Image:
    """The observation with the predicted motion on it and the numbers beside it.

    Dims called x and y give an arrow (for a chunk: the path, summed up), z a vertical bar, and a gripper of unit
    "1 = open" two fingers, as far apart as after the last step. Dims whose data do not contain 0 are positions rather
    than motions and give no arrow. All dims get a bar: the first step; ticks on it are later steps.

    Args:
        image: the observation. Below 448 pixels it is enlarged by a whole factor, without smoothing.
        actions: `(A,)` or `(T, A)` finite, physical units.
        dims: `(name, unit)` per dim, as `openvla.action_tokenizer.name_action_dims` gives them.
        stats: `q01` and `q99` `[A]` of the dataset, which give bars and compass their scale, and optionally `mask`
            (False: not normalised). None: scaled to the action itself.

    Returns an RGB image: the picture on the left, unchanged but for the plate in its lower left corner, and the bars.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"Expected the observation as a PIL.Image, got {type(image).__name__}.")
    if max(image.size) > WIDEST * min(image.size):
        raise ValueError(f"Expected a picture of sides up to 1 to {WIDEST}, got {image.size}.")
    motion = _read_motion(actions, dims, stats)
    factor = max(1, math.ceil(SMALLEST / min(image.size)))
    picture = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    unit = min(picture.size) / 512
    panel, plate = _draw_panel(motion, picture.height, unit), _draw_plate(motion, unit)
    drawing = Image.new("RGB", (picture.width + panel.width, picture.height), GROUND)
    drawing.paste(picture, (0, 0))
    drawing.paste(panel, (picture.width, 0), panel)
    if plate is not None:
        margin = round(12 * unit)
        drawing.paste(plate, (margin, picture.height - margin - plate.height), plate)
    return drawing


def _read_motion(actions: np.ndarray, dims: list[tuple[str, str]], stats: dict | None) -> _Motion:
    actions = np.asarray(actions, dtype=np.float64)
    if actions.ndim not in (1, 2) or actions.size == 0 or actions.shape[-1] != len(dims):
        raise ValueError(f"Expected actions (A,) or (T, A) with A = {len(dims)}, one per dim, got {actions.shape}.")
    if not np.isfinite(actions).all():
        raise ValueError(f"Actions must be finite, got {actions[~np.isfinite(actions)][0]} in shape {actions.shape}.")
    actions = np.atleast_2d(actions)
    names, units = [name for name, _ in dims], [unit for _, unit in dims]
    if stats is None:
        reach, mask = np.abs(actions).max(axis=0), np.ones(len(dims), dtype=bool)
        low, high = -reach, reach
    else:
        if missing := [name for name in ("q01", "q99") if name not in stats]:
            raise ValueError(f"stats must have q01 and q99, but {missing} is missing in {sorted(stats)}.")
        low, high = (np.array(stats[name], dtype=np.float64) for name in ("q01", "q99"))
        mask = np.asarray(stats.get("mask", [True] * len(dims)), dtype=bool)
        if not low.shape == high.shape == mask.shape == (len(dims),):
            shapes = [low.shape, high.shape, mask.shape]
            raise ValueError(f"stats must have {len(dims)} entries in q01, q99 and mask, got shapes {shapes}.")
        if not np.isfinite([low, high]).all() or (high < low).any():
            raise ValueError(f"stats must be finite with q01 <= q99, got {low.tolist()} and {high.tolist()}.")
    for dim, unit in enumerate(units):
        if unit == "1 = open":  # closed and open are 0 and 1, or further apart where the data are (-1 and 1 in some)
            low[dim], high[dim] = (min(low[dim], 0.0), max(high[dim], 1.0)) if stats is not None else (0.0, 1.0)
    return _Motion(actions, names, units, low, high, mask, stats is not None)


class _Sheet:
    """A transparent sheet to draw on in units. `reduced` gives it in pixels, with smooth edges."""

    def __init__(self, width: float, height: float, unit: float):
        self.scale = unit * SMOOTH
        self.image = Image.new("RGBA", (round(width * unit) * SMOOTH, round(height * unit) * SMOOTH))
        self.draw = ImageDraw.Draw(self.image)

    def reduced(self) -> Image.Image:
        return self.image.reduce(SMOOTH)

    def box(self, left: float, top: float, right: float, bottom: float, fill: tuple, radius: float = 0) -> None:
        """Edges lie between whole pixels, so that they are sharp and lengths can be compared."""
        left, top, right, bottom = (
            round(value * self.scale / SMOOTH) * SMOOTH for value in (left, top, right, bottom)
        )
        if right > left and bottom > top:  # PIL includes the last pixel
            self.draw.rounded_rectangle([left, top, right - 1, bottom - 1], radius * self.scale, fill)

    def circle(self, x: float, y: float, radius: float, fill=None, outline=None) -> None:
        corners = [value * self.scale for value in (x - radius, y - radius, x + radius, y + radius)]
        self.draw.ellipse(corners, fill, outline, round(1.5 * self.scale) if outline else 0)

    def line(self, points: list[tuple[float, float]], fill: tuple, width: float) -> None:
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.line(scaled, fill, max(1, round(width * self.scale)), joint="curve")

    def polygon(self, points: list[tuple[float, float]], fill: tuple) -> None:
        self.draw.polygon([(x * self.scale, y * self.scale) for x, y in points], fill)

    def text(self, x: float, y: float, text: str, size: float, fill: tuple = TEXT, anchor: str = "ls") -> None:
        """`y` is the baseline; `anchor` as in PIL: ls, ms or rs."""
        font = ImageFont.load_default(size=size * self.scale)
        self.draw.text((x * self.scale, y * self.scale), _plain(text), fill, font, anchor)

    def text_width(self, text: str, size: float) -> float:
        return ImageFont.load_default(size=size * self.scale).getlength(_plain(text)) / self.scale


def _plain(text: str) -> str:
    """What PIL's own font can show; the rest would be empty boxes."""
    return "".join(letter if (letter.isascii() and letter.isprintable()) or letter in "°…" else "?" for letter in text)


# --- The panel: a bar per dim ----------------------------------------------------------------------------------------
def _draw_panel(motion: _Motion, pixels: int, unit: float) -> Image.Image:
    """All dims from top to bottom, in as many columns as it takes. `pixels`: the picture's height."""
    height, count, steps = pixels / unit, len(motion.names), len(motion.actions)
    rows = min(count, int((height - HEADER - FOOTER) // (0.8 * ROW)))
    row_height = min(ROW, (height - HEADER - FOOTER) / rows)
    sheet = _Sheet(PANEL * math.ceil(count / rows), height, unit)
    sheet.text(20, 34, "predicted action" if steps == 1 else f"predicted chunk of {steps} steps", 21)
    for dim in range(count):
        _draw_row(sheet, PANEL * (dim // rows), HEADER + row_height * (dim % rows), row_height, motion, dim)
    scale = "1st to 99th percentile of the data" if motion.has_statistics else "as far as the action itself goes"
    told = [f"track: {scale}"] if steps == 1 else [f"track: {scale}", "bar: first step; ticks: later steps"]
    for number, line in enumerate(reversed(told)):
        sheet.text(20, height - 16 - 17 * number, line, 13, FAINT)
    return sheet.reduced()


def _draw_row(sheet: _Sheet, left: float, top: float, height: float, motion: _Motion, dim: int) -> None:
    """Name and first value, over a bar on a track from the dim's `low` to its `high`."""
    name, unit, values = motion.names[dim], motion.units[dim], motion.actions[:, dim]
    low, high = motion.low[dim], motion.high[dim]
    start, end = left + 20, left + PANEL - 20
    line = top + 0.34 * height
    above, below = line + 6, line + 16
    _write_name_and_value(sheet, start, end, line, name, unit, values[0])
    sheet.box(start, above, end, below, TRACK, radius=2)

    def place(value: float) -> float:
        return start + (end - start) * (min(max(value, low), high) - low) / (high - low)

    if high > low:
        color = BARS.get(name.lower(), OTHER_BAR)
        origin, tip = sorted((place(0.0), place(values[0])))
        sheet.box(origin, above, tip, below, color)
        for value in values[1:]:
            sheet.box(place(value) - 1, above - 2, place(value) + 1, below + 2, color)
        if low < 0 < high:
            sheet.box(place(0.0) - 0.75, above - 3, place(0.0) + 0.75, below + 3, ZERO)
        if not low <= values[0] <= high:  # the bar ends where the data do; the number does not
            edge, side = (end, 1) if values[0] > high else (start, -1)
            point = (edge + 9 * side, (above + below) / 2)
            sheet.polygon([(edge + 2 * side, above), point, (edge + 2 * side, below)], color)
    sheet.text(start, below + 13, f"{low:.3g}", 12, FAINT)
    sheet.text(end, below + 13, f"{high:.3g}", 12, FAINT, anchor="rs")
    remarks = {"hardly moves in the data": low == high, "0 lies outside": not low <= 0 <= high}
    remarks["not normalised"] = not motion.mask[dim]
    if told := [remark for remark, holds in remarks.items() if holds and motion.has_statistics]:
        sheet.text((start + end) / 2, below + 13, told[0], 12, FAINT, anchor="ms")


def _write_name_and_value(
    sheet: _Sheet, start: float, end: float, line: float, name: str, unit: str, value: float
) -> None:
    digits = 4 if abs(value) < 1 else 2 if abs(value) < 100 else 0
    told = f"{value:.2f} ({unit})" if "=" in unit else f"{value:+.{digits}f} {unit}".strip()
    if unit == "rad":
        told += f" ({math.degrees(value):+.1f}°)"
    room = end - start - sheet.text_width(told, 16) - 12
    shown = name
    for cut in range(1, len(name)):
        if sheet.text_width(shown, 17) <= room:
            break
        shown = f"…{name[cut:]}"  # names of joints differ at their ends
    sheet.text(start, line, shown, 17)
    sheet.text(end, line, told, 16, anchor="rs")


# --- The plate on the picture: compass, height, gripper --------------------------------------------------------------
def _draw_plate(motion: _Motion, unit: float) -> Image.Image | None:
    plane, height, gripper = motion.find("x", "y"), motion.find("z"), motion.gripper
    parts = COMPASS * bool(plane) + HEIGHT_BAR * bool(height) + GRIPPER * (gripper is not None)
    if not parts:
        return None
    steps = len(motion.actions)
    told = "" if not (plane or height) else "robot frame, from above" if plane else "robot frame"
    told = ", ".join(filter(None, [told, f"after {steps} steps" if steps > 1 else ""])) if parts > GRIPPER else ""
    width = max(parts + 12, _Sheet(0, 0, unit).text_width(told, 13) + 24)
    sheet = _Sheet(width, PLATE_HEIGHT, unit)
    sheet.box(0, 0, width, PLATE_HEIGHT, PLATE, radius=10)
    sheet.text(width / 2, PLATE_HEIGHT - 11, told, 13, FAINT, anchor="ms")
    left, middle = (width - parts) / 2, 16 + RADIUS
    reach = np.maximum(np.abs(motion.low), np.abs(motion.high)) if motion.has_statistics else 0 * motion.low
    if plane:
        path = np.cumsum(motion.actions[:, plane], axis=0)  # (T, 2)
        rim = max(reach[plane].max(), np.hypot(*path.T).max())
        _draw_compass(sheet, left + COMPASS / 2, middle, path / rim if rim else path)
        told = f"rim {1000 * rim:.3g} mm" if motion.units[plane[0]] == "m" else f"rim {rim:.3g}"
        sheet.text(left + COMPASS / 2, LABELS, told if rim else "no motion", 14, anchor="ms")
        left += COMPASS
    if height:
        total = motion.actions[:, height[0]].sum()
        _draw_height(sheet, left + HEIGHT_BAR / 2, middle, total / (max(reach[height[0]], abs(total)) or 1.0))
        left += HEIGHT_BAR
    if gripper is not None:
        low, high, value = motion.low[gripper], motion.high[gripper], motion.actions[-1, gripper]
        _draw_gripper(sheet, left + GRIPPER / 2, middle, float(np.clip((value - low) / (high - low), 0.0, 1.0)))
    return sheet.reduced()


def _draw_compass(sheet: _Sheet, x: float, y: float, path: np.ndarray) -> None:
    """The robot's frame from above: x up, y left, z towards the viewer. `path`: `(T, 2)`, shares of the rim."""
    sheet.circle(x, y, RADIUS, outline=FAINT)
    sheet.line([(x, y), (x, y - RADIUS)], AXES["x"], 1.5)
    sheet.line([(x, y), (x - RADIUS, y)], AXES["y"], 1.5)
    sheet.text(x + 4, y - RADIUS + 15, "x", 14, AXES["x"])
    sheet.text(x - RADIUS + 6, y + 15, "y", 14, AXES["y"])
    points = [(x, y)] + [(x - RADIUS * left, y - RADIUS * ahead) for ahead, left in path.tolist()]
    for point in points[:-1]:
        sheet.circle(*point, 3, fill=ARROW)
    tip = points[-1]
    start = next((point for point in reversed(points[:-1]) if math.dist(point, tip) > 1), None)
    if start is None:  # shorter than anyone could see
        sheet.circle(x, y, 4, fill=ARROW)
        return
    length = math.dist(start, tip)
    along = ((tip[0] - start[0]) / length, (tip[1] - start[1]) / length)
    head = min(14.0, max(length, 6.0))
    neck = (tip[0] - head * along[0], tip[1] - head * along[1])
    side = (-0.55 * head * along[1], 0.55 * head * along[0])
    sheet.line([*points[:-1], neck if length > head else start], ARROW, 3.5)
    sheet.polygon([tip, (neck[0] + side[0], neck[1] + side[1]), (neck[0] - side[0], neck[1] - side[1])], ARROW)


def _draw_height(sheet: _Sheet, x: float, y: float, share: float) -> None:
    """Up is positive; `share` in [-1, 1]."""
    sheet.box(x - 6, y - RADIUS, x + 6, y + RADIUS, TRACK, radius=2)
    sheet.box(x - 6, min(y, y - RADIUS * share), x + 6, max(y, y - RADIUS * share), AXES["z"])
    sheet.box(x - 9, y - 0.75, x + 9, y + 0.75, ZERO)
    sheet.text(x, LABELS, "z", 14, AXES["z"], anchor="ms")


def _draw_gripper(sheet: _Sheet, x: float, y: float, opening: float) -> None:
    """Two fingers below a palm; `opening` 0: closed, 1: open."""
    gap = 1.5 + 20 * opening  # from the middle to a finger
    sheet.box(x - 5, y - 42, x + 5, y - 18, FINGERS, radius=2)
    sheet.box(x - 31, y - 20, x + 31, y - 8, FINGERS, radius=4)
    for left in (x - gap - 8, x + gap):
        sheet.box(left, y - 10, left + 8, y + 36, FINGERS, radius=3)
    told = "open" if opening > 0.95 else "closed" if opening < 0.05 else f"{opening:.0%} open"
    sheet.text(x, LABELS, told, 14, anchor="ms")
