"""Videos of episodes: the scene, the instruction, the trace of every action dim, and how it ended."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from openvla.evaluate.envs import Conventions

SCENE, PANEL, HEADER = 448, 320, 64  # pixels
GROUND, TRACK, ZERO, TEXT, FAINT = (22, 24, 29), (38, 42, 50), (80, 86, 96), (235, 238, 242), (150, 158, 170)
TRACE = (255, 214, 10)
SUCCESS, FAILURE = (70, 182, 122), (242, 85, 90)
LAST_SECONDS = 1.0  # for which the outcome is shown


def write_episode(
    path: str | Path,
    frames: list[np.ndarray],
    actions: np.ndarray,
    conventions: Conventions,
    title: str,
    instruction: str,
    success: bool | None,
) -> None:
    """Writes an mp4 (H.264), under a temporary name first.

    Args:
        frames: N + 1 pictures `(H, W, 3)` uint8: before each action, and at the end.
        actions: `(N, A)`, the simulator's units.
        success: None: unknown, and not shown.
    """
    panel = _Traces(actions, conventions)

    def pictures():
        for step, frame in enumerate(frames):
            yield _compose(frame, panel.at(step), title, instruction, None)
        last = _compose(frames[-1], panel.at(len(actions)), title, instruction, success)
        for _ in range(round(LAST_SECONDS * conventions.control_frequency)):
            yield last

    write_video(path, pictures(), (SCENE + HEADER, SCENE + PANEL), conventions.control_frequency)


def write_video(path: str | Path, frames, size: tuple[int, int], fps: float) -> None:
    """Writes `(H, W, 3)` uint8 RGB frames of the even `size` (H, W), one by one, as H.264."""
    import av

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    with av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as output:
        stream = output.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "23"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")))
        output.mux(stream.encode())
    os.replace(temporary, path)


def _compose(frame, panel: Image.Image, title: str, instruction: str, success: bool | None) -> np.ndarray:
    sheet = Image.new("RGB", (SCENE + PANEL, SCENE + HEADER), GROUND)
    sheet.paste(Image.fromarray(frame).resize((SCENE, SCENE), Image.Resampling.BICUBIC), (0, HEADER))
    sheet.paste(panel, (SCENE, HEADER))
    draw = ImageDraw.Draw(sheet)
    draw.text((12, 8), _fit(instruction, SCENE + PANEL - 24, 20), fill=TEXT, font=_font(20))
    draw.text((12, 38), title, fill=FAINT, font=_font(14))
    if success is not None:
        colour, word = (SUCCESS, "success") if success else (FAILURE, "failed")
        draw.rectangle((0, HEADER, SCENE - 1, HEADER + SCENE - 1), outline=colour, width=6)
        draw.text((SCENE + PANEL - 12, 38), word, fill=colour, font=_font(18), anchor="ra")
    return np.asarray(sheet)


class _Traces:
    """A curve per action dim over the whole episode, drawn up to the present step."""

    def __init__(self, actions: np.ndarray, conventions: Conventions):
        self.count, dims = actions.shape
        height = SCENE // dims
        self.image = Image.new("RGB", (PANEL, SCENE), GROUND)
        draw = ImageDraw.Draw(self.image)
        for dim, ((name, unit), (low, high)) in enumerate(zip(conventions.action_dims, conventions.action_range)):
            top, bottom = dim * height + 18, (dim + 1) * height - 4
            draw.rectangle((8, top, PANEL - 8, bottom), fill=TRACK)
            place = np.clip((actions[:, dim] - low) / (high - low), 0, 1)
            if low < 0 < high:
                zero = bottom - (0 - low) / (high - low) * (bottom - top)
                draw.line((8, zero, PANEL - 8, zero), fill=ZERO)
            draw.text((8, top - 16), f"{name}  {low:g} … {high:g}  ({unit})", fill=FAINT, font=_font(12))
            points = [(self._x(step), bottom - value * (bottom - top)) for step, value in enumerate(place)]
            draw.line(points if len(points) > 1 else points * 2, fill=TRACE, width=2)

    def at(self, step: int) -> Image.Image:
        image = self.image.copy()
        x = round(self._x(step))
        if x < PANEL - 8:  # what is still to come
            future = Image.new("RGB", (PANEL - 8 - x, SCENE), GROUND)
            image.paste(Image.blend(image.crop((x, 0, PANEL - 8, SCENE)), future, 0.8), (x, 0))
        return image

    def _x(self, step: int) -> float:
        return 8 + (PANEL - 16) * step / max(self.count - 1, 1)


def _font(size: int):
    return ImageFont.load_default(size)


def _fit(text: str, width: int, size: int) -> str:
    while text and _font(size).getlength(text) > width:
        text = text[:-2].rstrip() + "…" if not text.endswith("…") else text[:-2].rstrip() + "…"
    return text
