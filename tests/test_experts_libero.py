"""The scripted experts: geometry by hand-computed numbers on small MuJoCo models, goals to skills, real episodes."""

import os

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("PYOPENGL_PLATFORM", "egl")

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

mujoco = pytest.importorskip("mujoco", reason="needs the simulator: pip install 'openvla[sim]'")

from openvla.evaluate.experts.geometry import (  # noqa: E402
    DOWN,
    Grasp,
    blocked,
    body_points,
    free_spot,
    hand_orientation,
    obstacle_points,
    plan_grasp,
    rotated,
    rotation_between,
    tallest_on_the_way,
    turn_to,
    way_out,
    wrap,
)
from openvla.evaluate.experts.libero import LiberoExpert  # noqa: E402
from openvla.evaluate.experts.skills import Articulated, Command, Joint, PickPlace, Push, TurnKnob  # noqa: E402

TABLE = """
<mujoco><worldbody>
  <geom type="plane" size="1 1 0.1"/>
  <geom name="table" type="box" size="0.5 0.5 0.01" pos="0 0 -0.01"/>
  <body name="brick_main" pos="0.1 0.2 0.02"><freejoint/><geom type="box" size="0.02 0.05 0.02" euler="0 0 30"/></body>
  <body name="post_main" pos="0.1 -0.2 0.1"><geom type="cylinder" size="0.03 0.1"/></body>
  <body name="robot0_link" pos="0 0 0.5"><geom type="box" size="0.1 0.1 0.1"/></body>
  <body name="ghost_main" pos="0.3 0 0.1">
    <geom type="box" size="0.02 0.02 0.02" contype="0" conaffinity="0" group="1"/>
  </body>
  <body name="door_main" pos="0 0.4 0.1">
    <joint name="door" type="hinge" axis="0 0 1" range="-90 0"/>
    <geom type="box" size="0.1 0.01 0.1" pos="0.1 0 0"/>
  </body>
  <body name="drawer_main" pos="0.4 0.4 0.1">
    <joint name="drawer" type="slide" axis="0 -1 0" range="-0.16 0.01"/>
    <geom type="box" size="0.1 0.1 0.03"/>
  </body>
</worldbody></mujoco>
"""


@pytest.fixture(scope="module")
def table():
    """Model and data: a brick (4 x 10 x 4 cm, turned by 30 degrees), a post, a robot's link, a ghost, two joints."""
    model = mujoco.MjModel.from_xml_string(TABLE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


# --- Geometry ---
def test_angles():
    assert wrap(3.5 * np.pi) == pytest.approx(-0.5 * np.pi)
    assert turn_to(np.deg2rad(170), 0.0) == pytest.approx(np.deg2rad(-10))  # the two fingers are alike
    assert turn_to(np.deg2rad(80), 0.0) == pytest.approx(np.deg2rad(80))


def test_rotation_between_and_rotated_are_inverse():
    axis = np.array([0.6, 0.0, 0.8])
    turn = np.stack([rotated(column, axis, 0.7) for column in np.eye(3)], axis=1)
    np.testing.assert_allclose(rotation_between(np.eye(3), turn), 0.7 * axis, atol=1e-12)
    np.testing.assert_allclose(rotated(np.array([1.0, 0, 0]), np.array([0, 0, 1.0]), np.pi / 2), [0, 1, 0], atol=1e-12)


@pytest.mark.parametrize("closing_axis", [0, 1])
def test_hand_orientation_points_closes_and_takes_the_nearer_of_two(closing_axis):
    for angle in (0.3, 0.3 + np.pi):
        closing = np.array([np.cos(angle), np.sin(angle), 0])
        hand = hand_orientation(DOWN, closing, closing_axis, np.eye(3))
        np.testing.assert_allclose(hand @ hand.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(hand) == pytest.approx(1)
        np.testing.assert_allclose(hand[:, 2], DOWN, atol=1e-12)
        assert abs(hand[:, closing_axis] @ closing) == pytest.approx(1)
        again = hand_orientation(DOWN, closing, closing_axis, hand)
        np.testing.assert_allclose(again, hand, atol=1e-12)  # nothing to turn


def test_points_of_bodies_and_obstacles(table):
    model, data = table
    brick = body_points(model, data, "brick_main")
    corner = np.array([0.02, 0.05])
    reach = [abs(np.cos(np.pi / 6)) * corner[0] + 0.5 * corner[1], 0.5 * corner[0] + np.cos(np.pi / 6) * corner[1]]
    np.testing.assert_allclose(brick.max(0), [0.1 + reach[0], 0.2 + reach[1], 0.04], atol=1e-9)
    obstacles = obstacle_points(model, data, "brick_main")
    assert obstacles[:, 2].max() == pytest.approx(0.2)  # the post and the door; neither table, ghost nor robot
    assert not ((np.abs(obstacles[:, :2] - [0.1, 0.2]) < 0.05).all(1)).any()
    with pytest.raises(ValueError, match="'ghost_main' has neither a mesh nor a box"):
        body_points(model, data, "ghost_main")


def test_a_brick_is_grasped_across_its_narrow_side(table):
    model, data = table
    points = body_points(model, data, "brick_main")
    grasp = plan_grasp(points, np.zeros((0, 3)), np.array([0, 0, 0.3]), 0.0)
    assert grasp.angle == pytest.approx(np.deg2rad(30)) and grasp.width == pytest.approx(0.04, abs=1e-6)
    assert not grasp.rim and grasp.lean == 0
    np.testing.assert_allclose(grasp.position, [0.1, 0.2, 0.018], atol=1e-9)  # 2.2 cm below the top of 4


def ring(radius: float, height: float) -> np.ndarray:
    """Points of a bowl's wall, its foot half as wide as its rim."""
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    return np.concatenate([
        np.stack([r * np.cos(angles), r * np.sin(angles), np.full(96, z)], axis=1)
        for z, r in zip(np.linspace(0, height, 12), np.linspace(radius / 2, radius, 12))
    ])  # fmt: skip


def test_what_is_too_wide_is_held_by_its_rim_away_from_a_wall():
    bowl = ring(0.055, 0.05)
    grasp = plan_grasp(bowl, np.zeros((0, 3)), np.array([0.5, 0, 0.3]), 0.0)
    assert grasp.rim and grasp.position[2] == pytest.approx(0.05 - 0.022)
    np.testing.assert_allclose(grasp.position[:2], [0.047, 0], atol=1e-6)  # nearest to the hand, 8 mm within
    wall = np.stack(np.meshgrid(0.09, np.linspace(-0.1, 0.1, 21), np.linspace(0, 0.3, 21)), -1).reshape(-1, 3)
    away = plan_grasp(bowl, wall, np.array([0.5, 0, 0.3]), 0.0)
    assert blocked(grasp.position[:2], grasp.angle, grasp.position[2], wall, rim=True) == pytest.approx(0.08)
    assert blocked(away.position[:2], away.angle, away.position[2], wall, True, away.lean) == 0


def test_a_knob_is_taken_where_the_body_is_too_wide():
    pot = np.concatenate([ring(0.05, 0.12), ring(0.008, 0.02) + [0.01, 0, 0.12]])
    grasp = plan_grasp(pot, np.zeros((0, 3)), np.array([0, 0, 0.3]), 0.0)
    assert not grasp.rim and grasp.width < 0.02
    np.testing.assert_allclose(grasp.position, [0.01, 0, 0.14 - 0.009], atol=1e-3)


def test_lean_keeps_the_closing_direction_and_clears_what_hangs_beside():
    grasp = Grasp(np.zeros(3), 0.0, 0.04, False, lean=0.45)
    np.testing.assert_allclose(grasp.pointing, [0, np.sin(0.45), -np.cos(0.45)], atol=1e-12)
    assert grasp.pointing @ grasp.closing == pytest.approx(0)
    beam = np.array([[0.0, 0.04, 0.1]])  # beside the upright hand, 4 cm off: within its half-thickness
    assert blocked(np.zeros(2), 0.0, 0.0, beam, False) == pytest.approx(0.04)
    assert blocked(np.zeros(2), 0.0, 0.0, beam, False, lean=0.45) == 0  # it leans to the other side
    assert blocked(np.zeros(2), 0.0, 0.0, beam, False, lean=-0.45) == pytest.approx(0.08)


def test_way_out_and_tallest_on_the_way():
    bowl = ring(0.05, 0.05)
    assert (way_out(bowl, np.array([[0.0, 0, 0.04]])) == 0).all()  # nothing above it
    shift = way_out(bowl, np.array([[0.03, 0.0, 0.2]]))
    assert np.linalg.norm(shift[:2] - [0.03, 0]) > 0.07 and shift[0] < 0 and shift[2] == 0
    posts = np.array([[0.5, 0.05, 0.3], [0.5, 0.5, 0.9], [0.01, 0, 0.8]])
    assert tallest_on_the_way(posts, np.zeros(2), np.array([1.0, 0])) == 0.3
    assert tallest_on_the_way(posts[1:], np.zeros(2), np.array([1.0, 0])) == -np.inf


def test_free_spot_goes_round_what_stands_there():
    can, origin = ring(0.03, 0.1), np.zeros(3)
    room = (can, np.zeros((0, 3)), origin, np.array([1.0, 2.0]), np.array([0.05, 0.05]), 0.0)
    np.testing.assert_allclose(free_spot(*room), [1, 2])
    other = ring(0.03, 0.1) + [1.02, 2.0, 0.0]
    spot = free_spot(can, other, *room[2:])
    assert np.linalg.norm(spot - [1.02, 2]) > 0.055 and spot[0] < 1


def test_joints_tell_how_their_bodies_move(table):
    scene = SimpleNamespace(model=table[0], data=table[1])
    door, drawer = Joint(scene, "door"), Joint(scene, "drawer")
    np.testing.assert_allclose(door.motion_of(np.array([0.2, 0.4, 0.3])), [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(drawer.motion_of(np.zeros(3)), [0, -1, 0], atol=1e-12)
    assert door.direction(lambda angle: angle > -0.005) == 1 and drawer.direction(lambda way: way < -0.14) == -1
    with pytest.raises(ValueError, match="'door': both ends"):
        door.direction(lambda angle: True)


# --- In the simulator ---
@pytest.fixture(scope="module")
def libero():
    """Function (suite, task, state) -> settled environment, without a renderer; one per task is kept."""
    pytest.importorskip("libero.libero", reason="needs the simulator: pip install 'openvla[sim]'")
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs.env_wrapper import OffScreenRenderEnv

    kept = {}

    def settled(suite_name: str, task: int, state: int = 0):
        suite = benchmark.get_benchmark(suite_name)(task_order_index=0)
        if (suite_name, task) not in kept:
            found = suite.get_task(task)
            bddl = Path(get_libero_path("bddl_files")) / found.problem_folder / found.bddl_file
            off = {"use_camera_obs": False, "has_offscreen_renderer": False, "hard_reset": False}
            kept[suite_name, task] = OffScreenRenderEnv(bddl_file_name=str(bddl), **off)
            kept[suite_name, task].seed(0)
        env = kept[suite_name, task]
        env.reset()
        env.set_init_state(suite.get_task_init_states(task)[state])
        for _ in range(10):
            env.step([0] * 6 + [-1])
        return env

    yield settled
    for env in kept.values():
        env.close()


def play(env, expert, limit: int) -> np.ndarray:
    """Acts until success; returns the actions `(steps, 7)`."""
    actions = []
    while not env.check_success():
        assert len(actions) < limit, f"no success in {limit} steps, in {expert.stage} {expert.stage.phase}"
        actions.append(expert.act())
        env.step([*actions[-1][:6], 1 - 2 * actions[-1][6]])
    return np.stack(actions)


def test_pick_and_place_with_its_conventions(libero):
    env = libero("libero_goal", 6)  # cream cheese in the bowl
    expert = LiberoExpert(env, rng=np.random.default_rng(0))
    first = expert.act()
    assert first.dtype == np.float32 and first.shape == (7,) and first[6] == 1  # open on the way there
    actions = play(env, expert, 150)
    assert isinstance(expert.stage, PickPlace)
    assert np.abs(actions[:, :6]).max() <= 1 and set(actions[:, 6]) == {0.0, 1.0}
    grip = int(np.argmin(actions[:, 6]))  # the first closed step: the hand is at the cheese, not above
    assert 15 < grip < 60 and (actions[:grip, 6] == 1).all()


def test_noise_comes_from_the_generator_alone(libero):
    env = libero("libero_goal", 6)
    expert = LiberoExpert(env, np.random.default_rng(3), noise=0.005)
    hand, orientation = expert.scene.hand()
    action = expert.action(Command(hand, orientation, opened=False))
    expected = np.random.default_rng(3).normal(0, 0.005, 3) / 0.05 * 1.6  # metres per unit, gain
    np.testing.assert_allclose(action, [*np.clip(expected, -1, 1), 0, 0, 0, 0], atol=1e-6)
    again = [LiberoExpert(env, np.random.default_rng(3), noise=0.005).act() for _ in range(2)]
    np.testing.assert_array_equal(*again)
    still = LiberoExpert(env).action(Command(hand + [0.01, -0.5, 0.5], orientation, opened=True))
    np.testing.assert_allclose(still, [0.32, -1, 1, 0, 0, 0, 1], atol=1e-6)


def test_an_object_that_was_moved_is_planned_for_again(libero):
    env = libero("libero_goal", 6)
    expert = LiberoExpert(env)
    for _ in range(10):
        action = expert.act()
        env.step([*action[:6], 1 - 2 * action[6]])
    cheese, grasp = expert.stage.planned, expert.stage.grasp.position
    address = env.env.sim.model.get_joint_qpos_addr("cream_cheese_1_joint0")[0]
    env.env.sim.data.qpos[address] += 0.06
    env.env.sim.forward()
    expert.act()
    np.testing.assert_allclose(expert.stage.planned - cheese, [0.06, 0, 0], atol=0.003)
    assert expert.stage.grasp.position[0] - grasp[0] > 0.03  # along the cheese it may choose another place


@pytest.mark.parametrize("phase", ["lift", "carry"])
def test_a_new_expert_takes_over_what_the_hand_holds(libero, phase):
    env = libero("libero_goal", 6)
    first = LiberoExpert(env)
    assert not first.scene.grips("cream_cheese_1") and first.scene.height("cream_cheese_1") < 0.002
    while first.stage is None or first.stage.phase != phase:
        action = first.act()
        env.step([*action[:6], 1 - 2 * action[6]])
    assert first.scene.grips("cream_cheese_1") and not first.scene.grips("akita_black_bowl_1")
    second = LiberoExpert(env)
    assert second.act()[6] == 0 and second.stage.phase == phase
    assert second.stage.carry == pytest.approx(first.stage.carry, abs=0.012)  # not another 10 cm up
    np.testing.assert_allclose(second.stage.release, first.stage.release, atol=0.012)
    grippers = play(env, second, 60)[:, 6]
    assert np.flatnonzero(np.diff(grippers)).size == 1  # opened once: over the bowl


def test_goals_become_skills_in_an_order_that_works(libero):
    def skills(suite, task):
        return [make() for make in LiberoExpert(libero(suite, task)).stages]

    drawer, bowl = skills("libero_goal", 3)  # put the bowl into the top drawer: it is closed
    assert isinstance(drawer, Articulated) and drawer.pull and drawer.sign == -1
    assert isinstance(bowl, PickPlace) and bowl.relation == "in"
    (plate,) = skills("libero_goal", 5)
    assert isinstance(plate, Push) and plate.name == "plate_1"
    bowl, drawer = skills("libero_10", 3)  # the goal names the closing first
    assert isinstance(bowl, PickPlace) and isinstance(drawer, Articulated) and not drawer.pull
    stove, pot = skills("libero_10", 2)
    assert isinstance(stove, TurnKnob) and stove.sign == 1 and isinstance(pot, PickPlace) and pot.share == 0


def test_a_predicate_without_a_skill_is_named(libero):
    env = libero("libero_goal", 7)
    goals = env.env.parsed_problem["goal_state"]
    env.env.parsed_problem["goal_state"] = [["up", "plate_1"]]
    try:
        with pytest.raises(ValueError, match="no skill for the predicate 'up'"):
            LiberoExpert(env)
    finally:
        env.env.parsed_problem["goal_state"] = goals


@pytest.mark.slow
@pytest.mark.parametrize(
    "suite, task, limit",
    [("libero_goal", 0, 120), ("libero_goal", 5, 250), ("libero_goal", 7, 120), ("libero_90", 0, 150)],
    ids=["pull", "push", "turn", "push shut"],
)
def test_every_kind_of_skill_reaches_its_goal(libero, suite, task, limit):
    env = libero(suite, task)
    play(env, LiberoExpert(env), limit)
