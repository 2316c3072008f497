"""The drawing of predicted motion, measured in pixels."""

import ast
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openvla.action_tokenizer import name_action_dims
from openvla.serve import drawing
from openvla.serve.drawing import ARROW, BARS, FINGERS, OTHER_BAR, RADIUS, draw_motion

SIDE = 512  # so that a unit is a pixel
NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
DIMS = list(zip(NAMES, ["m"] * 3 + ["rad"] * 3 + ["1 = open"]))
STATS = {"q01": [-0.05] * 6 + [0.0], "q99": [0.05] * 6 + [1.0], "mask": [True] * 6 + [False]}
PLATE = (slice(328, 500), slice(12, 268))  # rows, columns


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(30, 200, (SIDE, SIDE, 3), dtype=np.uint8)
    noise[..., 2] = 17  # none of it has a colour that the tests look for
    return Image.fromarray(noise)


def action(**values: float) -> np.ndarray:
    return np.array([values.get(name, 0.0) for name in NAMES])


def draw(picture, actions, stats=STATS, dims=DIMS) -> np.ndarray:
    return np.asarray(draw_motion(picture, actions, dims, stats)).astype(int)


def places(pixels: np.ndarray, color: tuple, tolerance: int = 0) -> np.ndarray:
    """`(N, 2)` row and column of the pixels of a colour."""
    return np.argwhere((np.abs(pixels[..., :3] - color) <= tolerance).all(axis=-1))


def bar(pixels: np.ndarray, name: str) -> tuple[int, int]:
    """First column of a dim's bar, and how many there are; columns count from the panel's left edge."""
    columns = np.unique(places(pixels[:, SIDE:], BARS[name])[:, 1])
    return columns.min(), len(columns)


# --- The picture ---
def test_the_picture_is_unchanged_outside_the_plate(picture):
    pixels = draw(picture, action(x=0.02, gripper=1.0))[:, :SIDE]
    changed = (pixels != np.asarray(picture)).any(axis=-1)
    assert changed[PLATE].mean() > 0.95
    changed[PLATE] = False
    assert not changed.any()


def test_a_small_picture_is_enlarged_without_smoothing():
    noise = np.random.default_rng(1).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    pixels = draw(Image.fromarray(noise), action(x=0.02))
    assert pixels.shape[0] == 6 * 80  # the first whole factor beyond 448
    enlarged = noise.repeat(6, axis=0).repeat(6, axis=1)
    np.testing.assert_array_equal(pixels[:300, :600], enlarged[:300])
    np.testing.assert_array_equal(pixels[300:480, 270:600], enlarged[300:, 270:])


def test_nothing_is_drawn_on_the_picture_for_dims_of_unknown_meaning(picture):
    dims = [(f"action {index}", "") for index in range(14)]
    pixels = draw(picture, np.linspace(-1, 1, 14), {"q01": [-1] * 14, "q99": [1] * 14}, dims)
    np.testing.assert_array_equal(pixels[:, :SIDE], np.asarray(picture))
    assert len(places(pixels[:, SIDE:], OTHER_BAR)) > 14 * 100
    assert pixels.shape[1] == SIDE + 600  # 8 and 6 rows, in two columns


def test_the_same_action_gives_the_same_pixels(picture):
    first, second = (draw_motion(picture, action(x=0.02, yaw=-0.01), DIMS, STATS) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != draw_motion(picture, action(x=0.02, yaw=-0.02), DIMS, STATS).tobytes()


# --- The compass ---
@pytest.fixture(scope="module")
def origin(picture) -> np.ndarray:
    """Row and column of the dot that stands for no motion."""
    return places(draw(picture, action()), ARROW).mean(axis=0)


@pytest.mark.parametrize(
    "name, value, direction",
    [("x", 0.05, (-1, 0)), ("x", -0.05, (1, 0)), ("y", 0.05, (0, -1)), ("y", -0.05, (0, 1))],
)
def test_x_points_up_and_y_to_the_left(picture, origin, name, value, direction):
    offsets = places(draw(picture, action(**{name: value})), ARROW) - origin
    along = offsets @ np.array(direction)
    across = offsets @ np.array(direction[::-1])
    assert along.max() == pytest.approx(RADIUS, abs=3) and along.min() > -5  # the tip is but a point
    assert np.abs(across).max() < 10 and across.mean() == pytest.approx(0, abs=0.5)


def test_the_arrow_is_as_long_as_its_share_of_the_data(picture, origin):
    offsets = places(draw(picture, action(x=0.02)), ARROW) - origin
    assert -offsets[:, 0].min() == pytest.approx(0.4 * RADIUS, abs=2)
    unscaled = places(draw(picture, action(x=0.02), stats=None), ARROW) - origin
    assert -unscaled[:, 0].min() == pytest.approx(RADIUS, abs=2)


def test_a_chunk_is_drawn_as_the_path_of_its_sums(picture, origin):
    chunk = np.stack([action(x=0.02, gripper=1.0), action(y=0.02, gripper=1.0)])
    offsets = places(draw(picture, chunk, stats=None), ARROW) - origin
    side = RADIUS / np.sqrt(2)

    def is_drawn(row: float, column: float) -> bool:
        return bool((np.hypot(*(offsets - (row, column)).T) < 2.5).any())

    assert is_drawn(-side, 0) and is_drawn(-side, -side)  # ahead first, then to the left
    assert is_drawn(-side / 2, 0) and is_drawn(-side, -side / 2)
    assert not is_drawn(-side / 2, -side / 2) and not is_drawn(0, -side)
    assert offsets[:, 1].min() == pytest.approx(-side, abs=2)


def test_positions_are_not_drawn_as_motions(picture):
    stats = {"q01": [0.3, -0.2, 0.1, -3, -3, -3, 0], "q99": [0.6, 0.2, 0.4, 3, 3, 3, 1]}
    pixels = draw(picture, action(x=0.4, y=0.1, z=0.2), stats)
    assert len(places(pixels, ARROW)) == 0 and len(places(pixels[:, :SIDE], BARS["z"])) == 0
    assert len(places(pixels[:, :SIDE], FINGERS)) > 100  # the gripper still is what it was


def test_height_rises(picture):
    def rows_of(z: float) -> np.ndarray:
        pixels = draw(picture, action(z=z))[PLATE]
        return np.unique(places(pixels[:110], BARS["z"])[:, 0])  # without the letter below

    full, half, down = rows_of(0.05), rows_of(0.025), rows_of(-0.05)
    assert len(full) == pytest.approx(50, abs=2) and len(half) == pytest.approx(25, abs=2)
    assert full.max() == pytest.approx(half.max(), abs=1) and full.max() < down.min() + 2


# --- The gripper ---
def opening(pixels: np.ndarray) -> int:
    """Pixels between the fingers."""
    row = places(pixels[PLATE][90:91], FINGERS)[:, 1]
    return np.diff(row).max() - 1


def test_fingers_are_as_far_apart_as_the_gripper_is_open(picture):
    closed, half, opened = (opening(draw(picture, action(gripper=value))) for value in (0.0, 0.5, 1.0))
    assert (closed, opened) == (pytest.approx(3, abs=2), pytest.approx(43, abs=2))
    assert half == pytest.approx((closed + opened) / 2, abs=1)


def test_the_gripper_of_a_chunk_is_that_of_its_last_step(picture):
    chunk = np.stack([action(gripper=1.0), action(gripper=0.0)])
    assert opening(draw(picture, chunk)) == opening(draw(picture, action(gripper=0.0)))


def test_a_gripper_between_minus_one_and_one_is_half_open_at_zero(picture):
    stats = STATS | {"q01": [-0.05] * 6 + [-1.0]}
    assert opening(draw(picture, action(gripper=0.0), stats)) == opening(draw(picture, action(gripper=0.5)))


def test_a_gripper_of_unknown_polarity_has_no_fingers(picture):
    pixels = draw(picture, action(gripper=1.0), dims=[*DIMS[:6], ("gripper", "")])
    assert not (pixels[PLATE][90] == FINGERS).all(axis=-1).any()


# --- The bars ---
def test_bars_are_proportional_to_the_action(picture):
    pixels = draw(picture, action(roll=0.025, pitch=0.05, yaw=-0.0125))
    assert bar(pixels, "roll") == (pytest.approx(150, abs=2), pytest.approx(65, abs=2))
    assert bar(pixels, "pitch") == (pytest.approx(150, abs=2), pytest.approx(130, abs=2))
    assert bar(pixels, "yaw") == (pytest.approx(150 - 32.5, abs=2), pytest.approx(32.5, abs=2))
    roll, pitch = (len(places(pixels[:, SIDE:], BARS[name])) for name in ("roll", "pitch"))
    assert pitch / roll == pytest.approx(2, rel=0.01)


def test_zero_stands_where_the_range_has_it(picture):
    stats = STATS | {"q01": [-0.05] * 3 + [-0.01] + [-0.05] * 2 + [0.0]}
    first, width = bar(draw(picture, action(roll=0.02), stats), "roll")
    assert (first, width) == (pytest.approx(20 + 260 / 6, abs=2), pytest.approx(2 * 260 / 6, abs=2))


def test_a_bar_ends_at_the_end_of_the_range_and_an_arrow_tells(picture):
    first, width = bar(draw(picture, action(roll=0.05)), "roll")
    assert first + width == pytest.approx(280, abs=1)
    beyond = np.unique(places(draw(picture, action(roll=0.2))[:, SIDE:], BARS["roll"])[:, 1])
    assert 285 <= beyond.max() <= 290 and not (beyond == 281).any()


def test_later_steps_of_a_chunk_are_ticks(picture):
    chunk = np.stack([action(roll=0.01), action(roll=0.04)])
    columns = np.unique(places(draw(picture, chunk)[:, SIDE:], BARS["roll"])[:, 1])
    tick = columns[columns > 200]
    assert tick.mean() == pytest.approx(150 + 0.8 * 130, abs=1) and len(tick) <= 3
    assert len(columns[columns <= 200]) == pytest.approx(26, abs=2)


def test_what_the_names_of_the_action_dims_give_is_understood(picture):
    norm_stats = {"bridge_orig": {"action": STATS}}
    dims = name_action_dims(norm_stats, "bridge_orig")
    assert dims == DIMS
    assert len(places(draw(picture, action(x=0.03), dims=dims), ARROW)) > 100


def test_an_action_without_any_motion_and_statistics(picture):
    pixels = draw(picture, action(), stats=None)
    assert len(places(pixels[:, SIDE:], BARS["x"])) == 0 and len(places(pixels, ARROW)) > 20


# --- Refusals ---
@pytest.mark.parametrize(
    "actions, stats, message",
    [
        (np.zeros(6), STATS, r"A = 7, one per dim, got \(6,\)"),
        (np.zeros((1, 2, 7)), STATS, r"got \(1, 2, 7\)"),
        (np.zeros((0, 7)), STATS, r"got \(0, 7\)"),
        (action(y=np.nan), STATS, "finite, got nan"),
        (action(y=np.inf), None, "finite, got inf"),
        (action(), {"q01": [0.0] * 7}, r"\['q99'\] is missing"),
        (action(), STATS | {"q01": [0.0] * 6}, "7 entries"),
        (action(), STATS | {"mask": [True]}, "7 entries"),
        (action(), STATS | {"q01": [1.0] * 7, "q99": [0.0] * 7}, "q01 <= q99"),
    ],
)
def test_wrong_input_is_refused(picture, actions, stats, message):
    with pytest.raises(ValueError, match=message):
        draw_motion(picture, actions, DIMS, stats)


def test_an_array_is_no_picture():
    with pytest.raises(ValueError, match="PIL.Image, got ndarray"):
        draw_motion(np.zeros((64, 64, 3), np.uint8), action(), DIMS)


def test_the_file_stands_alone():
    tree = ast.parse(Path(drawing.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"math", "dataclasses", "numpy", "PIL"}


def test_positions_give_no_arrow_even_if_some_of_them_cross_zero():
    names, units = ("x", "y", "z", "roll", "pitch", "yaw", "gripper"), ["m"] * 3 + ["rad"] * 3 + ["1 = open"]
    dims = list(zip(names, units))
    picture, action = Image.new("RGB", (512, 512), (90, 90, 90)), np.array([0.1, 0.1, 0.3, 0, 0, 0, 1.0])
    low, high = [-0.2, -0.2, -0.1, -1, -1, -1, 0], [0.2, 0.2, 0.4, 1, 1, 1, 1]
    moving = draw_motion(picture, action, dims, {"q01": low, "q99": high})
    low[2] = 0.02  # heights above a table
    placed = draw_motion(picture, action, dims, {"q01": low, "q99": high})
    plate = (12, 300, 500, 500)
    arrows = [np.asarray(drawn.crop(plate)).reshape(-1, 3) for drawn in (moving, placed)]
    assert len(np.unique(arrows[0], axis=0)) > len(np.unique(arrows[1], axis=0))


def test_thin_pictures_are_refused():
    with pytest.raises(ValueError, match=r"of sides up to 1 to 8, got \(1, 512\)"):
        draw_motion(Image.new("RGB", (1, 512)), np.zeros(1), [("x", "m")])
