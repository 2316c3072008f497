"""From a MuJoCo state to a grasp: point clouds of bodies and obstacles, orientations of the hand, room for it.

Everything here needs `mujoco` alone. Lengths in metres, angles in radians, world frame; N points of a cloud.
"""

from dataclasses import dataclass

import mujoco
import numpy as np

OBSTACLE_STEP = 0.015  # spacing of the points put on boxes and cylinders: half a finger
WIDEST_GRASP = 0.072  # the Panda's fingers open 8 cm; beyond this an object is held by its rim
FLAT_GROUND = 0.25  # half-size from which on a box is a table top or a wall, not an obstacle
ROBOT_PREFIXES = ("robot0", "gripper0", "mount0")  # robosuite's names
# What the hand needs around the fingertips: half-sizes along and across the closing direction, and from which height
# above the tips on. Measured on the Panda's collision meshes, a little rounded up.
HAND_ALONG, HAND_ACROSS, HAND_ABOVE = 0.115, 0.045, 0.035
FINGER_OUTSIDE, FINGER_INSIDE, FINGER_ACROSS, FINGER_BELOW = 0.062, 0.055, 0.018, 0.012
SPARE = 0.014  # between what is put down and what stands beside it
KNOB = 0.018  # height of the slice that is looked at for a knob
LEANS = (0.0, 0.45, -0.45)  # radians; the hand leans over its closing direction only where it must: it costs 0.03
LEAN_IN = 0.75  # radians from upright to reach in under a roof: the hand stays outside, the fingers clear a cup's rim
DOWN = np.array([0.0, 0.0, -1.0])


@dataclass
class Grasp:
    """Where the fingertips go and how the hand is turned to close them, pointing down.

    position: `(3,)`, midway between the tips. angle: of the closing direction in the plane.
    width: of what is between the fingers. rim: whether the wall of a bowl or cup is held rather than the whole.
    lean: angle by which the hand is turned about the closing direction, away from what stands or hangs beside it.
    """

    position: np.ndarray
    angle: float
    width: float
    rim: bool
    lean: float = 0.0

    @property
    def pointing(self) -> np.ndarray:
        """`(3,)` unit vector along which the fingers point."""
        across = np.array([-np.sin(self.angle), np.cos(self.angle), 0.0])
        return np.cos(self.lean) * DOWN + np.sin(self.lean) * across

    @property
    def closing(self) -> np.ndarray:
        """`(3,)` unit vector along which the fingers close."""
        return np.array([np.cos(self.angle), np.sin(self.angle), 0.0])


def subtree(model, root: str) -> set[int]:
    """Ids of the body `root` and everything that hangs on it."""
    members = {model.body(root).id}
    for body in range(model.nbody):  # a parent's id is always lower than its child's
        if model.body_parentid[body] in members:
            members.add(body)
    return members


def geom_points(model, data, geom: int, step: float = OBSTACLE_STEP) -> np.ndarray:
    """`(N, 3)` points on a mesh's vertices, or filling the box around a primitive with spacing `step` or finer."""
    kind, size = model.geom_type[geom], model.geom_size[geom]
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        start = model.mesh_vertadr[mesh]
        local = model.mesh_vert[start : start + model.mesh_vertnum[mesh]]
    else:
        if kind == mujoco.mjtGeom.mjGEOM_SPHERE:
            half = np.repeat(size[:1], 3)
        elif kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
            half = np.array([size[0], size[0], size[1]])
        elif kind == mujoco.mjtGeom.mjGEOM_CAPSULE:  # its half-length does not count the round ends
            half = np.array([size[0], size[0], size[1] + size[0]])
        else:
            half = size
        axes = [np.linspace(-extent, extent, max(2, int(np.ceil(2 * extent / step)) + 1)) for extent in half]
        local = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    return local @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]


def body_points(model, data, root: str) -> np.ndarray:
    """`(N, 3)` points of what is drawn of a body and its children; boxes count only where they collide (group 0)."""
    members, clouds = subtree(model, root), []
    for geom in range(model.ngeom):
        kind = model.geom_type[geom]
        solid_box = kind == mujoco.mjtGeom.mjGEOM_BOX and model.geom_group[geom] == 0
        if model.geom_bodyid[geom] in members and (kind == mujoco.mjtGeom.mjGEOM_MESH or solid_box):
            clouds.append(geom_points(model, data, geom))
    if not clouds:
        raise ValueError(f"body {root!r} has neither a mesh nor a box of group 0: nothing to grasp or to place on")
    return np.concatenate(clouds)


def obstacle_points(model, data, skip: str | None = None) -> np.ndarray:
    """`(N, 3)` points of everything that collides but the robot, the body `skip` and flat ground."""
    left_out = subtree(model, skip) if skip else set()
    for body in range(model.nbody):
        if model.body(body).name.startswith(ROBOT_PREFIXES):
            left_out.add(body)
    clouds = [np.zeros((0, 3))]
    for geom in range(model.ngeom):
        kind = model.geom_type[geom]
        collides = model.geom_contype[geom] or model.geom_conaffinity[geom]
        if model.geom_bodyid[geom] in left_out or kind == mujoco.mjtGeom.mjGEOM_PLANE or not collides:
            continue
        if kind != mujoco.mjtGeom.mjGEOM_MESH and model.geom_size[geom][:2].min() > FLAT_GROUND:
            continue
        clouds.append(geom_points(model, data, geom))
    return np.concatenate(clouds)


def wrap(angle: float) -> float:
    """The same angle in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def turn_to(angle: float, current: float) -> float:
    """How far to turn a hand that closes along `current`, in [-pi/2, pi/2]: its two fingers are alike."""
    turn = wrap(angle - current)
    return min((turn, wrap(turn + np.pi)), key=abs)


def rotation_between(current: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Rotation vector `(3,)` in the world frame, radians, that turns `(3, 3)` `current` into `target`."""
    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(target @ current.T).ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


def rotated(vector: np.ndarray, axis: np.ndarray, angle: float) -> np.ndarray:
    """`(3,)` vector turned about a unit axis (Rodrigues)."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return vector * cosine + np.cross(axis, vector) * sine + axis * (axis @ vector) * (1 - cosine)


def hand_orientation(pointing, closing, closing_axis: int, current: np.ndarray) -> np.ndarray:
    """Orientation `(3, 3)` of a hand whose column 2 points along `pointing` and which closes along `closing`.

    Of the two that do (the fingers are alike), the one nearer to `current`. closing_axis: 0 or 1, the column of the
    gripper's frame along which the fingers close.
    """
    pointing = np.asarray(pointing, float) / np.linalg.norm(pointing)
    closing = np.asarray(closing, float) - pointing * (pointing @ closing)
    closing = closing / np.linalg.norm(closing)
    options = []
    for sign in (1, -1):
        columns = [None, None, pointing]
        columns[closing_axis] = sign * closing
        other = np.cross(pointing, columns[0]) if closing_axis == 0 else np.cross(columns[1], pointing)
        columns[1 - closing_axis] = other
        options.append(np.stack(columns, axis=1))
    return min(options, key=lambda option: np.linalg.norm(rotation_between(current, option)))


def blocked(center, angle: float, height: float, obstacles: np.ndarray, rim: bool, lean: float = 0.0) -> float:
    """0.04 if something is where the hand would be plus 0.04 if it is where a finger would be, as a grasp's score.

    center: `(2,)` where the tips are; height: of the tips; angle, rim, lean: as in `Grasp`. With `rim` the inner
    finger is inside the object, where nothing else stands, so only the outer one is looked at.
    """
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    above = obstacles[obstacles[:, 2] > height - FINGER_BELOW]
    rise = above[:, 2] - height
    position = (above[:, :2] - center) @ along
    beside = np.abs((above[:, :2] - center) @ across + np.tan(lean) * rise)
    hand = (rise > HAND_ABOVE) & (np.abs(position) < HAND_ALONG) & (beside < HAND_ACROSS)
    inner = 0.0 if rim else -FINGER_INSIDE
    fingers = (position > inner) & (position < FINGER_OUTSIDE) & (beside < FINGER_ACROSS)
    return 0.04 * hand.any() + 0.04 * fingers.any()


def plan_grasp(points, obstacles, hand_position, hand_angle: float, shift=(0.0, 0.0, 0.0), inwards=None) -> Grasp:
    """The best grasp of a cloud from above: the narrow side of an object, or the rim of what is too wide.

    Args:
        points: `(N, 3)` of the object.
        obstacles: `(N, 3)` of everything else.
        hand_position: `(3,)` where the hand is now. hand_angle: of its closing direction.
        shift: `(3,)` by which the object will be moved without turning: the hand should fit there as well.
        inwards: `(3,)` level direction in which the object will go in under a roof: the fingers then close across it
            and the hand leans back, to stay outside.
    """
    low, high, shift = points.min(0), points.max(0), np.asarray(shift)
    height = high[2] - low[2]
    # The upper third is what the fingers meet; of something flat, all of it. Where that is too wide there may be a
    # knob on top (a moka pot's lid); if not, the rim is left.
    top = points[points[:, 2] > high[2] - 0.35 * height - 1e-6] if height > 0.05 else points
    tips = max(low[2] + 0.012, high[2] - min(0.035, 0.55 * height))
    if narrowest(top) > WIDEST_GRASP:
        knob = points[points[:, 2] > high[2] - KNOB]
        if narrowest(knob) < WIDEST_GRASP / 2:
            top, tips = knob, high[2] - KNOB / 2
    rim = narrowest(top) > WIDEST_GRASP
    if rim:
        tips = high[2] - 0.022
    best, lowest = None, np.inf
    center = (low + high)[:2] / 2
    for score, at, angle, width in rim_grasps(top, center, hand_position) if rim else side_grasps(top):
        score += 0.012 * abs(turn_to(angle, hand_angle))
        leans = LEANS
        if inwards is not None:
            sideways = np.array([np.cos(angle), np.sin(angle), 0.0])
            score += abs(sideways @ inwards)
            leans = (LEAN_IN * np.sign(np.cross(DOWN, sideways) @ -inwards + 1e-9),)
        for lean in leans:
            total = score + 0.03 * (lean != 0) + blocked(at, angle, tips, obstacles, rim, lean)
            if shift.any():
                total += 0.6 * blocked(at + shift[:2], angle, tips + shift[2], obstacles, rim, lean)
            if total < lowest:
                lowest, best = total, Grasp(np.array([*at, tips]), angle, width, rim, lean)
    return best


def narrowest(points: np.ndarray) -> float:
    """Width of a cloud along the level direction in which it is smallest."""
    return min(np.ptp(points[:, :2] @ direction) for direction in directions(36, np.pi)[1])


def directions(count: int, span: float) -> tuple[np.ndarray, np.ndarray]:
    """`(count,)` angles from 0 up to but without `span`, and their unit vectors `(count, 2)`."""
    angles = span * np.arange(count) / count
    return angles, np.stack([np.cos(angles), np.sin(angles)], axis=1)


def rim_grasps(top: np.ndarray, center: np.ndarray, hand_position: np.ndarray) -> list[tuple]:
    """(score, `(2,)` place, angle, width) of 48 points of a rim, closing radially; nearer ones are better."""
    grasps = []
    for angle, outwards in zip(*directions(48, 2 * np.pi)):
        radius = ((top[:, :2] - center) @ outwards).max()
        at = center + outwards * (radius - 0.008)
        grasps.append((0.02 * np.linalg.norm(at - hand_position[:2]), at, angle, 2 * radius))
    return grasps


def side_grasps(top: np.ndarray) -> list[tuple]:
    """(score, `(2,)` place, angle, width) of 36 directions across an object, at its middle and beside: the width."""
    grasps = []
    for angle, along in zip(*directions(36, np.pi)):
        across = np.array([-along[1], along[0]])
        first, second = top[:, :2] @ along, top[:, :2] @ across
        middle = along * (first.max() + first.min()) / 2 + across * (second.max() + second.min()) / 2
        for slide in (0.0, -0.25, 0.25):  # off the middle, where something stands beside it
            at = middle + across * slide * np.ptp(second)
            grasps.append((np.ptp(first) + 0.02 * abs(slide), at, angle, np.ptp(first)))
    return grasps


def free_spot(points, obstacles, origin, center, half, bottom: float) -> np.ndarray:
    """`(2,)` place for an object's origin within a region, where it meets the least on its way down from above.

    Args:
        points: `(N, 3)` of the object, its origin at `origin` `(3,)`.
        obstacles: `(N, 3)`; those above `bottom`, the height at which the object is let go, count.
        center: `(2,)` preferred place. half: `(2,)` half-sizes of what is allowed around it.
    """
    footprint, undersides = cells(points - origin, np.minimum)
    near = (np.abs(obstacles[:, :2] - center) < half + np.abs(footprint).max(0) + 0.03).all(1)
    walls, tops = cells(obstacles[near & (obstacles[:, 2] > bottom)], np.maximum)
    meets = tops[:, None] > (undersides - undersides.min() + bottom)[None]  # a bowl is narrower at its foot
    best, lowest = np.asarray(center, float), np.inf
    for x in np.linspace(-half[0], half[0], 9):
        for y in np.linspace(-half[1], half[1], 9):
            apart = np.linalg.norm(walls[:, None] - (center + [x, y] + footprint)[None], axis=2)
            nearest = np.where(meets, apart, np.inf).min(1, initial=np.inf)
            score = 5.0 * np.maximum(SPARE - nearest, 0).sum() + np.hypot(x, y)
            if score < lowest - 1e-9:
                best, lowest = center + np.array([x, y]), score
    return best


def cells(points: np.ndarray, keep, size: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """`(M, 2)` centres of the squares of a level grid that hold a point, and `(M,)` the lowest or highest z in each.

    keep: `np.minimum` or `np.maximum`.
    """
    squares, which = np.unique(np.round(points[:, :2] / size), axis=0, return_inverse=True)
    heights = np.full(len(squares), np.inf if keep is np.minimum else -np.inf)
    keep.at(heights, which.ravel(), points[:, 2])
    return squares * size, heights


def entrance(obstacles: np.ndarray, center: np.ndarray, half: np.ndarray) -> np.ndarray | None:
    """`(3,)` level unit vector into a region (`(3,)` center, half-sizes) under a roof, from its open side.

    None for a region that is open above: there things go in from above.
    """
    inside = (np.abs(obstacles[:, :2] - center[:2]) < 0.25 * half[:2]).all(1)
    if not (inside & (obstacles[:, 2] > center[2])).any():
        return None
    level = obstacles[np.abs(obstacles[:, 2] - center[2]) < 0.5 * half[2]][:, :2] - center[:2]
    ways = [np.array([x, y, 0.0]) for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1))]  # inwards; sites are axis-aligned

    def in_the_way(inwards):
        depth, beside = -(level @ inwards[:2]), level @ np.array([-inwards[1], inwards[0]])
        return ((depth > 0) & (depth < 0.2) & (np.abs(beside) < 0.04)).sum()

    return min(ways, key=in_the_way)


def way_out(points: np.ndarray, obstacles: np.ndarray) -> np.ndarray:
    """`(3,)` shortest level shift after which nothing hangs over an object: from under an open drawer, a shelf."""
    low, high = points.min(0), points.max(0)
    center, radius = (low + high)[:2] / 2, (high - low)[:2].max() / 2 + 0.02
    above = obstacles[obstacles[:, 2] > high[2] + 0.01][:, :2]
    above = above[np.linalg.norm(above - center, axis=1) < radius + 0.3]
    footprint, _ = cells(points, np.minimum)
    # Overhead is only what is over the object itself: a tall neighbour does not hinder.
    if not (np.linalg.norm(above[:, None] - footprint[None], axis=2) < 0.006).any():
        return np.zeros(3)
    above = above - center
    for distance in np.arange(0, 0.26, 0.02):
        for direction in directions(16, 2 * np.pi)[1]:
            if (np.linalg.norm(above - distance * direction, axis=1) > radius).all():
                return np.array([*(distance * direction), 0.0])
    return np.zeros(3)  # under a roof that reaches further: straight up is as good as any


def tallest_on_the_way(obstacles: np.ndarray, start: np.ndarray, end: np.ndarray, reach: float = 0.10) -> float:
    """Height of the highest point within `reach` of the line from `start` to `end` (`(2,)`), -inf where there is none.

    What stands within 6 cm of the start does not count: it was beside the object when the fingers went in.
    """
    along = end - start
    share = np.clip((obstacles[:, :2] - start) @ along / max(along @ along, 1e-6), 0, 1)
    near = np.linalg.norm(obstacles[:, :2] - (start + share[:, None] * along), axis=1) < reach
    near &= np.linalg.norm(obstacles[:, :2] - start, axis=1) > 0.06
    return obstacles[near, 2].max() if near.any() else -np.inf
