"""What LIBERO's scripted experts can do: pick and place, drawers and doors, a knob, pushing; and how they see.

Each skill says from the state of the simulation what the hand should do next, as a `Command`, until it is `finished`.
"""

from dataclasses import dataclass, replace

import mujoco
import numpy as np

from openvla.evaluate.experts.geometry import (
    DOWN,
    body_points,
    entrance,
    free_spot,
    hand_orientation,
    obstacle_points,
    plan_grasp,
    rotated,
    rotation_between,
    subtree,
    tallest_on_the_way,
    way_out,
)

BRISK, GENTLE = 1.6, 1.0  # gain on the position error: the arm covers about 60 % of what is commanded in one step
CLEARANCE = 0.03  # between what is carried and what stands below
JUST_INSIDE, REACH_IN = 0.03, 0.14  # how deep under a roof an object's origin is put; how far outside it is lined up
DROP_ON, DROP_IN = 0.02, 0.05  # height above a surface, above a container's floor, from which an object is let go


@dataclass
class Command:
    """What the hand should do next: `(3,)` position of the fingertips, `(3, 3)` orientation, fingers, gain."""

    position: np.ndarray
    orientation: np.ndarray
    opened: bool
    gain: float = BRISK


class Scene:
    """The state of a LIBERO environment as the skills read it; `env` is LIBERO's ControlEnv or a subclass."""

    def __init__(self, env):
        self.task = env.env
        self.model, self.data = self.task.sim.model._model, self.task.sim.data._data
        fingers = self.data.body("gripper0_leftfinger").xpos - self.data.body("gripper0_rightfinger").xpos
        self.closing_axis = int(np.argmax(np.abs(self.hand()[1].T @ fingers)))

    def hand(self) -> tuple[np.ndarray, np.ndarray]:
        """Fingertips' position `(3,)` and orientation `(3, 3)`; column 2 points where the fingers point."""
        site = self.data.site("gripper0_grip_site")
        return site.xpos.copy(), site.xmat.reshape(3, 3).copy()

    def hand_angle(self) -> float:
        """Of the closing direction, seen from above."""
        closing = self.hand()[1][:, self.closing_axis]
        return float(np.arctan2(closing[1], closing[0]))

    def orientation(self, pointing, closing) -> np.ndarray:
        return hand_orientation(pointing, closing, self.closing_axis, self.hand()[1])

    def position(self, name: str) -> np.ndarray:
        """Of the body's origin, `(3,)`: what LIBERO's predicates look at."""
        return self.data.body(f"{name}_main").xpos.copy()

    def points(self, name: str) -> np.ndarray:
        return body_points(self.model, self.data, f"{name}_main")

    def obstacles(self, name: str | None = None) -> np.ndarray:
        return obstacle_points(self.model, self.data, f"{name}_main" if name else None)

    def ceiling(self) -> float:
        """How high the arm still moves freely with what it carries: about 15 cm above where it starts."""
        return self.data.body("robot0_base").xpos[2] + 0.41

    def grips(self, name: str) -> bool:
        """Whether both fingers touch the object."""
        model, data = self.model, self.data
        members, touching = subtree(model, f"{name}_main"), set()
        fingers = {side: subtree(model, f"gripper0_{side}finger") for side in ("left", "right")}
        for contact in data.contact[: data.ncon]:
            bodies = {int(model.geom_bodyid[geom]) for geom in contact.geom}
            if bodies & members:
                touching |= {side for side, finger in fingers.items() if bodies & finger}
        return len(touching) == 2

    def height(self, name: str) -> float:
        """How far an object's lowest point is above what is below its origin."""
        bottom, body = self.points(name)[:, 2].min(), self.model.body(f"{name}_main").id
        start = np.array([*self.position(name)[:2], bottom + 0.005])
        fall = mujoco.mj_ray(self.model, self.data, start, DOWN, None, 1, body, np.zeros(1, np.int32))
        return max(0.0, fall - 0.005)

    def holds(self, predicate: list[str]) -> bool:
        """Whether a goal's predicate is true now."""
        return bool(self.task._eval_predicate(predicate))


class PickPlace:
    """Takes an object from above and puts it on an object, or on or into a region; one that the hand holds already,
    however it came to, stays held.

    share: of the half-size of a region by which to stay off its middle, where others have to go as well; in [-1, 1].
    """

    def __init__(self, scene: Scene, name: str, relation: str, destination: str, share: float = 0.0):
        self.scene, self.name, self.relation, self.destination = scene, name, relation, destination
        self.share = share
        self.finished = False
        self.plan(held=scene.grips(name))

    def plan(self, held: bool = False) -> None:
        scene = self.scene
        hand, orientation = scene.hand()
        points, obstacles = scene.points(self.name), scene.obstacles(self.name)
        self.planned = scene.position(self.name)
        bottom = points[:, 2].min()
        target, surface = self.target(points, obstacles)
        shift = np.array([*(target - self.planned[:2]), surface - bottom])
        self.grasp = plan_grasp(points, obstacles, hand, scene.hand_angle(), shift, self.inwards)
        self.orientation = scene.orientation(self.grasp.pointing, self.grasp.closing)
        if held:
            self.grasp, self.orientation = replace(self.grasp, position=hand), orientation
        self.aside = self.grasp.position + way_out(points, obstacles) + [0, 0, 0.015]
        self.release = self.grasp.position + shift
        held_below = self.grasp.position[2] - bottom
        in_the_way = max(tallest_on_the_way(obstacles, self.aside[:2], self.release[:2]), self.top)
        self.before_release = self.release
        if self.inwards is not None:  # up to the door at the height of the release, then level
            self.before_release = self.release - REACH_IN * self.inwards
            in_the_way = -np.inf
        lowest = self.grasp.position[2] + 0.10 - (min(0.10, scene.height(self.name)) if held else 0.0)
        self.carry = max(lowest, min(scene.ceiling(), in_the_way + held_below + CLEARANCE))
        rise = np.clip(self.carry - self.grasp.position[2], 0.11, 0.16)
        self.over = self.grasp.position - rise * self.grasp.pointing
        self.travel = min(scene.ceiling(), tallest_on_the_way(obstacles, hand[:2], self.grasp.position[:2]) + 0.05)
        self.start("over")
        if held:
            self.take_up(hand)

    def target(self, points, obstacles) -> tuple[np.ndarray, float]:
        """Where the object's origin should be, `(2,)`, and its bottom's height on release."""
        scene, self.inwards = self.scene, None
        if self.destination not in scene.task.object_sites_dict:
            self.top = scene.points(self.destination)[:, 2].max()
            return scene.position(self.destination)[:2], self.top + DROP_ON
        site = scene.data.site(self.destination)
        half = np.abs(site.xmat.reshape(3, 3) @ scene.model.site(self.destination).size)
        self.top = site.xpos[2] + half[2]
        surface = site.xpos[2] - half[2] + DROP_IN if self.relation == "in" else self.top + DROP_ON
        center, room = site.xpos[:2].copy(), np.maximum(half[:2] - 0.02, 0.0)
        if self.share:  # side by side along the object's narrow side
            axis = int(np.argmin(np.ptp(points[:, :2], axis=0)))
            center[axis] += self.share * half[axis]
            room[axis] = max(0.0, half[axis] * (1 - abs(self.share)) - 0.01)
        if self.relation == "in":
            parent = scene.task.object_sites_dict[self.destination].parent_name  # what already lies in it is no roof
            self.inwards = entrance(scene.points(parent), site.xpos, half)
        if self.inwards is not None:  # just inside: the door takes it further, the hand would not fit
            within = (np.abs(obstacles - site.xpos) < half * [0.5, 0.5, 1.2]).all(1) & (obstacles[:, 2] < site.xpos[2])
            floor = obstacles[within, 2].max(initial=site.xpos[2] - half[2])
            depth = abs(self.inwards[:2]) @ half[:2]
            center = center - self.inwards[:2] * (depth - JUST_INSIDE)
            room = np.where(self.inwards[:2] != 0, 0.0, room)
            obstacles = obstacles[obstacles[:, 2] < site.xpos[2]]
            surface = floor + 0.022  # rim-held, it hangs at a slant
        return free_spot(points, obstacles, self.planned, center, room, surface), surface

    def start(self, phase: str) -> None:
        self.phase, self.steps, self.before = phase, 0, None

    def stalled(self, hand: np.ndarray) -> bool:
        """Whether the hand came to rest on something: it will get no further."""
        still = self.before is not None and np.linalg.norm(hand - self.before) < 0.0008
        self.before = hand
        return still and self.steps > 8

    def command(self) -> Command:
        hand, orientation = self.scene.hand()
        self.steps += 1
        moved = self.scene.position(self.name) - self.planned
        if self.phase in ("over", "reach") and np.linalg.norm(moved) > 0.02 and self.steps > 3:
            self.plan()
        if self.phase in ("aside", "lift", "carry", "lower"):
            slipped = self.scene.position(self.name) - hand - self.held
            if np.linalg.norm(slipped) > 0.05:
                self.plan()
        return getattr(self, f"_{self.phase}")(hand, orientation)

    def _over(self, hand, orientation) -> Command:
        target = self.over.copy()
        away = np.linalg.norm(hand[:2] - target[:2])
        turn = np.linalg.norm(rotation_between(orientation, self.orientation))
        if away < 0.008 and turn < 0.08 and hand[2] < self.over[2] + 0.05:
            if np.linalg.norm(self.scene.position(self.name) - self.planned) > 0.004:
                self.plan()  # it was still settling
            else:
                self.start("reach")
        if away > 0.06:
            target[2] = max(self.over[2], self.travel)
            if hand[2] < self.travel - 0.04:
                target[:2] = hand[:2]  # up first: something stands between
        return Command(target, self.orientation, True)

    def _reach(self, hand, orientation) -> Command:
        if np.linalg.norm(hand - self.grasp.position) < 0.008 or self.stalled(hand) or self.steps > 40:
            self.start("grip")
        return Command(self.grasp.position, self.orientation, True, GENTLE)

    def _grip(self, hand, orientation) -> Command:
        if self.steps >= 10:
            self.take_up(hand)
        return Command(self.grasp.position, self.orientation, False)

    def take_up(self, hand: np.ndarray) -> None:
        self.held = self.scene.position(self.name) - hand
        self.start("aside" if np.linalg.norm((self.aside - self.grasp.position)[:2]) > 0.001 else "lift")

    def _aside(self, hand, orientation) -> Command:
        if np.linalg.norm((hand - self.aside)[:2]) < 0.015 or self.steps > 30:
            self.start("lift")
        return Command(self.aside, self.orientation, False)

    def _lift(self, hand, orientation) -> Command:
        if hand[2] > self.carry - 0.03 or self.steps > 50:
            self.start("carry")
        return Command(np.array([*self.aside[:2], self.carry]), self.orientation, False)

    def _carry(self, hand, orientation) -> Command:
        target = np.array([*self.before_release[:2], self.carry])
        if self.inwards is not None:
            target[2] = max(self.release[2], self.grasp.position[2] + 0.03)
        if np.linalg.norm(hand[:2] - target[:2]) < 0.012 or self.stalled(hand):  # at a joint's limit it stays short
            self.start("lower")
        return Command(target, self.orientation, False)

    def _lower(self, hand, orientation) -> Command:
        near = np.linalg.norm(hand - self.release) < 0.012 or (
            self.inwards is None and abs(hand[2] - self.release[2]) < 0.012
        )
        if near or self.stalled(hand) or self.steps > 30:
            self.start("release")
        return Command(self.release, self.orientation, False, GENTLE)

    def _release(self, hand, orientation) -> Command:
        if self.steps >= 6:
            self.start("retreat")
        return Command(self.release, self.orientation, True)

    def _retreat(self, hand, orientation) -> Command:
        target = np.array([*self.release[:2], max(self.carry, self.release[2] + 0.10)])
        if self.inwards is not None and -(hand - self.release) @ self.inwards < 0.10:
            return Command(hand - 0.05 * self.grasp.pointing, self.orientation, True)
        self.finished = abs(hand[2] - target[2]) < 0.03 or self.steps > 40
        return Command(target, self.orientation, True)


class Joint:
    """One hinge or slide of a fixture."""

    def __init__(self, scene: Scene, name: str):
        self.model, self.data = scene.model, scene.data
        self.number = scene.model.joint(name).id
        self.is_hinge = scene.model.jnt_type[self.number] == mujoco.mjtJoint.mjJNT_HINGE

    def value(self) -> float:
        """Radians or metres."""
        return float(self.data.qpos[self.model.jnt_qposadr[self.number]])

    def direction(self, reached) -> float:
        """+1 or -1: towards the end of the range for which `reached(value)` is true."""
        low, high = self.model.jnt_range[self.number]
        if reached(low) == reached(high):
            raise ValueError(
                f"joint {self.model.joint(self.number).name!r}: both ends of its range {low, high} are "
                f"{'' if reached(low) else 'not '}where it should be: no way to tell which way to move it"
            )
        return 1.0 if reached(high) else -1.0

    def axis(self) -> tuple[np.ndarray, np.ndarray]:
        """Unit vector `(3,)` and a point `(3,)` on it, in the world."""
        return self.data.xaxis[self.number], self.data.xanchor[self.number]

    def points(self) -> np.ndarray:
        return body_points(self.model, self.data, self.model.body(self.model.jnt_bodyid[self.number]).name)

    def motion_of(self, point: np.ndarray) -> np.ndarray:
        """Unit vector `(3,)` along which a point of the body moves as the joint's value grows."""
        axis, anchor = self.axis()
        motion = np.cross(axis, point - anchor) if self.is_hinge else axis
        return motion / np.linalg.norm(motion)


class Articulated:
    """Moves a drawer or a door by its handle: pulls it open with the fingers around the handle, or pushes it shut.

    The handle is what sticks out furthest in the direction in which the joint opens.
    """

    # How far below the horizontal the hand points. To pull: a little, or the upper finger would not fit between handle
    # and front (1.6 cm). To push: more, as the wrist does not turn that far sideways, but not straight down, where the
    # hand would meet the handles above.
    # A door swings round, and the hand with it: nearly straight down is what the arm can follow.
    PULL_TILT, PUSH_TILT, SWING_TILT = np.deg2rad(8), np.deg2rad(50), np.deg2rad(80)
    LEAD = 0.04  # metres by which the hand's target runs ahead of the handle: what pulls and pushes

    def __init__(self, scene: Scene, joint: str, reached, pull: bool):
        """reached: function of the joint's value that says whether it is where it should be."""
        self.scene, self.joint, self.reached, self.pull = scene, Joint(scene, joint), reached, pull
        self.sign = self.joint.direction(reached)
        self.finished = False
        self.start("over")

    def start(self, phase: str) -> None:
        self.phase, self.steps = phase, 0

    def handle(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Position `(3,)` of the handle, direction `(3,)` in which it moves, and `(3,)` along its bar."""
        points = self.joint.points()
        motion = self.sign * self.joint.motion_of(points.mean(0))
        outwards = motion if self.pull else -motion
        reach = points @ outwards
        bar = points[reach > reach.max() - 0.016]
        if self.joint.is_hinge:  # a door's face: away from the hinge, where the lever is long
            lever = np.linalg.norm(np.cross(bar - self.joint.axis()[1], self.joint.axis()[0]), axis=1)
            bar = bar[lever > 0.7 * lever.max()]
        center = (bar.min(0) + bar.max(0)) / 2
        along = np.linalg.svd(bar - bar.mean(0), full_matrices=False)[2][0]
        return center, self.sign * self.joint.motion_of(center), along

    def command(self) -> Command:
        hand, orientation = self.scene.hand()
        self.steps += 1
        center, motion, bar = self.handle()
        inwards = -motion if self.pull else motion
        tilt = self.PULL_TILT if self.pull else self.SWING_TILT if self.joint.is_hinge else self.PUSH_TILT
        pointing = inwards * np.cos(tilt) + DOWN * np.sin(tilt)
        closing = np.cross(pointing, bar) if self.pull else np.cross(DOWN, inwards)
        target = self.scene.orientation(pointing, closing)
        turned = np.linalg.norm(rotation_between(orientation, target)) < 0.12
        if self.phase == "over":
            place = center - 0.10 * pointing
            if np.linalg.norm(hand - place) < 0.02 and turned:
                self.start("reach")
            if np.linalg.norm((hand - place)[:2]) > 0.05:  # above what stands between, an open drawer itself for one
                obstacles = self.scene.obstacles()
                height = tallest_on_the_way(obstacles, hand[:2], place[:2], 0.08) + 0.07
                place[2] = max(place[2], min(height, self.scene.ceiling()))
            return Command(place, target, self.pull)
        if self.phase == "reach":
            place = center if self.pull else center - 0.01 * pointing
            if np.linalg.norm(hand - place) < 0.008 or self.steps > 30:
                self.start("grip" if self.pull else "drive")
            return Command(place, target, self.pull, GENTLE)
        if self.phase == "grip":
            if self.steps >= 8:
                self.start("drive")
            return Command(center, target, False)
        if self.phase == "drive":
            if np.linalg.norm(hand - center) > 0.06:  # it slipped off
                self.start("over")
            if not self.reached(self.joint.value()):
                self.steps = 0
            elif self.steps >= 4:
                self.start("retreat")
            return Command(center + self.LEAD * motion, target, False)
        self.finished = self.steps > 6
        return Command(hand - 0.05 * pointing, target, True)


class TurnKnob:
    """Takes a knob from above by its narrow side and turns it."""

    LEAD = 0.35  # radians by which the hand runs ahead of the knob

    def __init__(self, scene: Scene, joint: str, reached):
        self.scene, self.joint, self.reached = scene, Joint(scene, joint), reached
        self.finished = False
        self.plan()

    def plan(self) -> None:
        hand, _ = self.scene.hand()
        self.sign, self.before = self.joint.direction(self.reached), self.joint.value()
        self.grasp = plan_grasp(self.joint.points(), np.zeros((0, 3)), hand, self.scene.hand_angle())
        self.orientation = self.scene.orientation(DOWN, self.grasp.closing)
        self.start("over")

    def start(self, phase: str) -> None:
        self.phase, self.steps = phase, 0

    def command(self) -> Command:
        hand, orientation = self.scene.hand()
        self.steps += 1
        above = self.grasp.position + [0, 0, 0.10]
        if self.phase == "over":
            turned = np.linalg.norm(rotation_between(orientation, self.orientation)) < 0.08
            if np.linalg.norm((hand - above)[:2]) < 0.008 and turned and hand[2] < above[2] + 0.05:
                self.start("reach")
            return Command(above, self.orientation, True)
        if self.phase == "reach":
            if np.linalg.norm(hand - self.grasp.position) < 0.008 or self.steps > 25:
                self.start("grip")
            return Command(self.grasp.position, self.orientation, True, GENTLE)
        if self.phase == "grip":
            if self.steps >= 8:
                self.start("turn")
            return Command(self.grasp.position, self.orientation, False)
        if self.phase == "turn":
            turned = self.joint.value() - self.before
            angle = turned + self.sign * self.LEAD
            axis, anchor = self.joint.axis()
            place = anchor + rotated(self.grasp.position - anchor, axis, turned)
            if not self.reached(self.joint.value()):
                self.steps = min(self.steps, 60)
            if self.reached(self.joint.value()) and self.steps >= 4:
                self.start("retreat")
            elif self.steps == 60 or np.linalg.norm(hand - place) > 0.06:  # it slipped off
                self.plan()
            return Command(place, np.stack([rotated(c, axis, angle) for c in self.orientation.T], 1), False)
        self.finished = hand[2] > above[2] - 0.02 or self.steps > 20
        return Command(np.array([*hand[:2], above[2]]), orientation, True)


class Push:
    """Pushes a dish over the table with the closed fingertips inside its rim: that way it cannot turn aside."""

    LEAD = 0.03

    def __init__(self, scene: Scene, name: str, destination: str):
        self.scene, self.name, self.destination = scene, name, destination
        self.finished = False
        self.start("over")

    def start(self, phase: str) -> None:
        self.phase, self.steps = phase, 0

    def command(self) -> Command:
        hand, orientation = self.scene.hand()
        self.steps += 1
        center = self.scene.position(self.name)
        way = (self.scene.data.site(self.destination).xpos - center)[:2]
        left = np.linalg.norm(way)
        down = self.scene.orientation(DOWN, self.scene.hand()[1][:, self.scene.closing_axis])
        floor = center[2] + 0.008
        if self.phase == "over":
            if np.linalg.norm((hand - center)[:2]) < 0.01 and hand[2] < floor + 0.14:
                self.start("reach")
            return Command(np.array([*center[:2], floor + 0.10]), down, False)
        if self.phase == "reach":
            if hand[2] < floor + 0.006 or self.steps > 30:
                self.start("drive")
            return Command(np.array([*center[:2], floor]), down, False, GENTLE)
        if self.phase == "drive":
            if hand[2] > center[2] + 0.06 or np.linalg.norm((hand - center)[:2]) > 0.12:  # it came out of the dish
                self.start("over")
            if left < 0.012:
                self.start("retreat")
            return Command(np.array([*(hand[:2] + way / left * min(self.LEAD, left)), floor]), down, False)
        self.finished = self.steps > 12
        return Command(np.array([*hand[:2], floor + 0.15]), down, False)
