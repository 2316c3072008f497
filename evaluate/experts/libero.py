"""Scripted experts for LIBERO's tasks: the goal's predicates become a sequence of skills, driven by privileged state.

    expert = LiberoExpert(env, rng=np.random.default_rng(0), noise=0.01)  # env: settled at an initial state
    while not env.check_success():
        action = expert.act()  # (7,) x y z, roll pitch yaw in [-1, 1], gripper 1 = open
        env.step([*action[:6], 1 - 2 * action[6]])  # the simulator wants the gripper as -1 open, +1 close

Where objects are, how they can be held, where doors and drawers lead: all is read from the simulation (LIBERO, Liu et
al. 2023, on robosuite 1.4, mujoco 3.3.7); nothing here knows a task by name.
"""

import numpy as np

from openvla.evaluate.experts.geometry import rotation_between
from openvla.evaluate.experts.skills import Articulated, Command, Joint, PickPlace, Push, Scene, TurnKnob

METRES_PER_UNIT, RADIANS_PER_UNIT = 0.05, 0.5  # of one action of 1.0 (robosuite's OSC_POSE)
FASTEST_TURN = 0.5  # share of the largest turn that is used: beyond it the arm swings past


class LiberoExpert:
    """Acts towards the goal of a LIBERO environment that stands at an initial state.

    Args:
        env: LIBERO's ControlEnv or OffScreenRenderEnv, its initial state set and settled.
        rng: where the noise comes from; the same generator gives the same actions.
        noise: standard deviation in metres of the Gaussian that is added to each step's position error.
    """

    def __init__(self, env, rng: np.random.Generator | None = None, noise: float = 0.0):
        self.scene = Scene(env)
        self.rng, self.noise = rng if rng is not None else np.random.default_rng(0), noise
        self.stages = stages(self.scene)
        self.stage = None

    def act(self) -> np.ndarray:
        """`(7,)` float32: x y z in [-1, 1] (1 = 5 cm), roll pitch yaw in [-1, 1] (1 = 0.5 rad), gripper 1 = open.

        May be asked at a state that other actions brought about; it then does what it can: an object that is not
        where the phase expects it, or slipped, is planned for again. After many actions of others, a new expert is
        better: it starts from what there is, with the object in the hand if it is there.
        """
        while self.stage is None or self.stage.finished:
            if not self.stages:
                self.stages = stages(self.scene)
            if not self.stages:  # the goal is reached: stay
                hand, orientation = self.scene.hand()
                return self.action(Command(hand, orientation, True))
            self.stage = self.stages.pop(0)()
        return self.action(self.stage.command())

    def action(self, command: Command) -> np.ndarray:
        hand, orientation = self.scene.hand()
        error = command.position - hand
        if self.noise:
            error = error + self.rng.normal(0, self.noise, 3)
        action = np.zeros(7, np.float32)
        action[:3] = np.clip(error / METRES_PER_UNIT * command.gain, -1, 1)
        turn = rotation_between(orientation, command.orientation) / RADIANS_PER_UNIT
        action[3:6] = turn / max(1.0, np.abs(turn).max() / FASTEST_TURN)
        action[6] = 1.0 if command.opened else 0.0
        return action


def stages(scene: Scene) -> list:
    """What is left to do, in order: functions that make a skill when its turn comes.

    Drawers and doors that something goes into are opened before (also where the goal does not say so) and closed
    after; what is put on something goes there after that was put where it belongs.
    """
    every = scene.task.parsed_problem["goal_state"]
    goals = [goal for goal in every if not scene.holds(goal)]
    places = [goal for goal in goals if goal[0] in ("on", "in")]
    filled = {container_of(scene, goal[2]) for goal in places if goal[0] == "in"}
    first, opening, knobs, last = [], [], [], []
    for goal in goals:
        relation, name = goal[0], goal[1]
        if relation in ("on", "in"):
            continue
        if relation in ("open", "close"):
            # Closed before what opens beside it, unless something has to go in.
            order = opening if relation == "open" else last if container_of(scene, name) in filled else first
            order.append(articulate(scene, relation, name))
        elif relation in ("turnon", "turnoff"):
            knobs.append(turn(scene, relation, name))
        else:
            raise ValueError(
                f"no skill for the predicate {relation!r} of the goal {goal}: on, in, open, close, turnon "
                "and turnoff are known"
            )
    for goal in places:
        joint = container_of(scene, goal[2]) if goal[0] == "in" else None
        if (
            joint
            and not reached(scene, "open", goal[2])(Joint(scene, joint).value())
            and ["open", goal[2]] not in goals
        ):
            opening.append(articulate(scene, "open", goal[2]))
    # What others are put on goes first.
    places.sort(key=lambda goal: sum(goal[1] == other[2] for other in places), reverse=True)
    return first + opening + knobs + [place(scene, goal, share_of(goal, every)) for goal in places] + last


def share_of(goal: list[str], goals: list[list[str]]) -> float:
    """Off the middle of a region to which several objects go: evenly from -0.55 to 0.55 of its half-size."""
    together = [other[1] for other in goals if len(other) == 3 and other[2] == goal[2]]
    if len(together) < 2:
        return 0.0
    return 0.55 * (2 * together.index(goal[1]) / (len(together) - 1) - 1)


def container_of(scene: Scene, name: str) -> str | None:
    """The joint that opens the region or fixture `name`; None for a basket, a shelf, a table."""
    site = scene.task.object_sites_dict.get(name)
    if site is not None and site.joints:
        return site.joints[0]
    owner = scene.task.get_object(site.parent_name if site is not None else name)
    return owner.joints[0] if name.startswith("microwave") and owner.joints else None


def reached(scene: Scene, relation: str, name: str):
    """Function of a joint's value: whether the region or fixture `name` is open ("open") or shut ("close") there."""
    site = scene.task.object_sites_dict.get(name)
    fixture = scene.task.get_object(site.parent_name if site is not None else name)
    return fixture.is_open if relation == "open" else fixture.is_close


def articulate(scene: Scene, relation: str, name: str):
    pull = relation == "open"
    return lambda: Articulated(scene, container_of(scene, name), reached(scene, relation, name), pull)


def turn(scene: Scene, relation: str, name: str):
    fixture = scene.task.get_object(name)
    return lambda: TurnKnob(scene, fixture.joints[0], fixture.turn_on if relation == "turnon" else fixture.turn_off)


def place(scene: Scene, goal: list[str], share: float):
    relation, name, destination = goal
    # The predicate does not tell pushing from placing; the instruction does.
    if scene.task.parsed_problem["language_instruction"][0].lower() == "push":
        return lambda: Push(scene, name, destination)
    return lambda: PickPlace(scene, name, relation, destination, share)
