import dataclasses
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

os.environ.setdefault("MUJOCO_GL", "egl")  # a test imports Meta-World before the simulator does

from openvla.evaluate import envs  # noqa: E402
from openvla.evaluate.envs import metaworld  # noqa: E402

installed = pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None, reason="Meta-World is not installed: pip install 'openvla[sim]'"
)
STAY = (0.0, 0.0, 0.0, 0.5)


def number(name: str) -> int:
    return metaworld.TASKS.index(name)


@pytest.fixture(scope="module")
def reach():
    env = envs.open_env("metaworld", number("reach-v3"), renderer="fast")
    yield env
    env.close()


def test_every_task_has_its_own_instruction():
    instructions = envs.list_tasks("metaworld")
    assert len(instructions) == 50 and len(set(instructions)) == 50
    assert instructions[number("push-v3")] == "push the puck to the goal"
    assert envs.max_steps("metaworld") == 500


@installed
def test_the_tasks_are_those_of_the_benchmark():
    from metaworld.env_dict import MT50_V3
    from metaworld.policies import ENV_POLICY_MAP

    assert tuple(MT50_V3) == metaworld.TASKS and set(ENV_POLICY_MAP) == set(metaworld.TASKS)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(ImportError, match=r"Meta-World is not installed .*pip install 'openvla\[sim\]'"):
        metaworld._import_metaworld.__wrapped__()


@installed
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is a screen")
def test_mujoco_imported_too_early_is_an_error_not_the_end():
    code = "import mujoco; from openvla.evaluate.envs import open_env; open_env('metaworld', 0)"
    environment = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "set MUJOCO_GL=egl (or osmesa) before Python starts" in done.stderr


def test_conventions_tell_a_fitting_policy_from_one_of_libero():
    dims = [{"name": name, "unit": unit, "low": 0.0, "high": 1.0} for name, unit in metaworld.CONVENTIONS.action_dims]
    fitting = {"unnorm_key": "mine", "action_dims": dims, "num_cameras": 2, "control_frequency": 80.0}
    metaworld.CONVENTIONS.check(fitting)
    with pytest.raises(ValueError, match="it acts 20 times a second, the simulator 80"):
        metaworld.CONVENTIONS.check({**fitting, "control_frequency": 20.0})
    dims[3]["low"] = -1.0  # Meta-World's own gripper
    with pytest.raises(ValueError, match="its gripper goes from -1 to 1, expected 0 to 1"):
        metaworld.CONVENTIONS.check(fitting)
    names = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    with pytest.raises(ValueError, match="its actions have 7 numbers, the simulator wants 4"):
        metaworld.CONVENTIONS.check({"unnorm_key": "libero_spatial", "action_dims": [{"name": n} for n in names]})


@installed
def test_unknown_options_and_episodes_are_refused(reach):
    with pytest.raises(ValueError, match="no cameras .*wrist.*it has .*corner4"):
        envs.open_env("metaworld", 0, cameras=["wrist"])
    with pytest.raises(ValueError, match="renderer must be one of"):
        envs.open_env("metaworld", 0, renderer="slow")
    with pytest.raises(ValueError, match="tasks 0 to 49, got 50"):
        envs.open_env("metaworld", 50)
    with pytest.raises(ValueError, match="placements 0 to 49, got 50"):
        reach.reset(50)
    reach.reset(0)
    with pytest.raises(ValueError, match="as a state of reach-v3"):
        reach.reset(0, state=reach.get_state()[1:])
    for action in (np.zeros(7), np.array([0.0, np.nan, 0.0, 1.0])):
        with pytest.raises(ValueError, match="Expected 4 finite numbers"):
            reach.step(action)


@installed
def test_an_episode_is_the_same_every_time(reach):
    def start(**how):
        reach.reset(**how)
        return reach.get_state(), reach.render("corner4")

    before = np.random.get_state()[1].copy()
    state, picture = start(episode=3)
    reach.step((1.0, -1.0, 0.5, 0.0))
    random_state, random_picture = start(episode=3, randomize=True)
    assert not np.array_equal(state, random_state) and not np.array_equal(picture, random_picture)
    assert not np.array_equal(start(episode=4)[0], state)
    for how, expected in (({}, (state, picture)), ({"randomize": True}, (random_state, random_picture))):
        again = start(episode=3, **how)
        assert np.array_equal(again[0], expected[0]) and np.array_equal(again[1], expected[1])
    assert np.array_equal(np.random.get_state()[1], before)  # the caller's generator is left alone
    assert reach.num_episodes == 50
    placements = np.array(reach.placements)
    assert len(np.unique(placements, axis=0)) == 50
    assert (reach.data.site("goal").xpos == random_state[3:6]).all()


@installed
def test_one_is_a_centimetre_and_open(reach):
    reach.reset(0)
    start, hand = reach.data.mocap_pos[0].copy(), reach.proprio()
    assert hand.shape == (4,) and np.allclose(hand[:3], reach.data.body("hand").xpos)
    for _ in range(10):
        reach.step((1.0, 0.0, -3.0, 1.0))  # clipped to -1
    assert np.allclose(reach.data.mocap_pos[0] - start, [0.10, 0.0, -0.10])
    assert np.allclose(reach.data.ctrl, [-1.0, 1.0])  # the fingers' motors: apart
    for _ in range(20):
        reach.step((0.0, 0.0, 0.0, 1.0))
    moved = reach.proprio() - hand
    assert abs(moved[0] - 0.10) < 0.005 and abs(moved[1]) < 0.005  # the hand lags behind, and arrives
    opened = reach.proprio()[3]
    reach.step((0.0, 0.0, 0.0, 0.2))
    assert np.allclose(reach.data.ctrl, [0.6, -0.6])
    for _ in range(40):
        reach.step((0.0, 0.0, 0.0, 0.0))
    assert opened > 0.9 and reach.proprio()[3] < 0.4
    assert metaworld.CONVENTIONS.control_frequency * reach.simulator.dt == 1.0


@installed
@pytest.mark.parametrize("name", ["button-press-topdown-v3", "pick-place-v3", "basketball-v3"])
def test_the_expert_succeeds_and_a_state_can_be_continued(name):
    env = envs.open_env("metaworld", number(name))
    env.reset(0)
    assert not env.step(STAY)
    env.reset(0)
    expert, actions, done = env.expert(), [], False
    while not done and len(actions) < 200:
        if len(actions) == 30:
            middle = env.get_state()
        actions.append(expert.act())
        done = env.step(actions[-1])
    assert done and len(actions) > 40 and actions[0].dtype == np.float32
    assert np.abs(np.array(actions)[:, :3]).max() == 1.0
    end, final = env.get_state(), env.proprio()
    env.close()

    other = envs.open_env("metaworld", number(name))  # of another placement, and never told of this one
    other.reset(7, randomize=True)
    other.reset(1, state=middle)
    assert np.array_equal(other.get_state(), middle)
    expert = other.expert()
    for action in actions[30:]:
        assert np.array_equal(expert.act(), action)
        reached = other.step(action)
    assert reached and np.array_equal(other.get_state(), end) and np.array_equal(other.proprio(), final)
    other.close()


@installed
def test_noise_of_the_expert(reach):
    reach.reset(2)

    def act(**options):
        expert = reach.expert(**options)
        return np.array([expert.act() for _ in range(300)], dtype=np.float64)

    quiet, noisy = act(), act(seed=1, noise=0.004)
    assert np.array_equal(noisy, act(seed=1, noise=0.004)) and not np.array_equal(noisy, act(seed=2, noise=0.004))
    free = np.abs(quiet[0, :3]) < 0.5  # not clipped, nor by the noise
    assert free.any() and np.allclose((noisy - quiet)[:, :3][:, free].std(), 25 * 0.004, rtol=0.15)
    assert np.array_equal(noisy[:, 3], quiet[:, 3]) and quiet[0, 3] == 0.5  # no force


@installed
@pytest.mark.parametrize("camera", ["corner4", "corner2", "behindGripper"])
def test_pictures_are_upright_and_not_mirrored(reach, camera):
    # The red sphere at the goal is where a camera sees it whose up is the world's and whose right is to its right.
    reach.reset(10)
    source = reach.data.camera("corner2" if camera == "corner4" else camera)
    position = np.array(metaworld.CORNER4) if camera == "corner4" else source.xpos
    forward = -source.xmat.reshape(3, 3)[:, 2]
    up = source.xmat.reshape(3, 3)[:, 1]
    up = up * np.sign(up[2])
    right = np.cross(forward, up)
    offset = reach.data.site("goal").xpos - position
    focal = 128 / np.tan(np.deg2rad(reach.model.camera(source.name).fovy[0]) / 2)
    column = 128 + focal * (offset @ right) / (offset @ forward)
    row = 128 - focal * (offset @ up) / (offset @ forward)
    red, green, blue = reach.render(camera)[int(row), int(column)].astype(int)
    assert red > 150 and green < 60 and blue < 60


@installed
def test_renderers(reach):
    reach.reset(0)
    official = envs.open_env("metaworld", reach.task, cameras=["corner2", "corner4"])
    official.reset(0)
    own = type(reach.simulator)(render_mode="rgb_array", camera_name="corner2", width=256, height=256)
    own.set_task(metaworld._benchmark("reach-v3")[1][0])
    own.reset()
    own.step(np.array([1.0, 0.0, 0.0, 1.0]))  # which brings its goal's sphere to its place
    official.step((1.0, 0.0, 0.0, 0.0))
    reach.step((1.0, 0.0, 0.0, 0.0))
    assert np.array_equal(official.render("corner2"), own.render()[::-1, ::-1])
    difference = np.abs(official.render("corner4").astype(int) - reach.render("corner4")).mean()
    assert 0.5 < difference < 2  # edges; without shadows it would be 8
    observation = official.observe()
    assert list(observation["images"]) == ["corner2", "corner4"]
    assert observation["instruction"] == "reach the goal with the gripper"
    assert all(image.shape == (224, 224, 3) and image.dtype == np.uint8 for image in observation["images"].values())
    assert np.array_equal(observation["proprio"], official.proprio())
    assert set(official.stopwatch.seconds) == {"physics", "render"}
    own.close()
    official.close()


@installed
def test_a_simulation_that_breaks_is_no_failure_of_the_policy(reach, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warning into a file where it runs
    reach.reset(0)
    reach.data.qvel[0] = np.nan
    with pytest.raises(RuntimeError, match="reach-v3 became unstable"):
        reach.step(STAY)
    reach.reset(0)
    assert not reach.step(STAY)


@installed
def test_conventions_are_data(reach):
    known = {reach.model.camera(index).name for index in range(reach.model.ncam)}
    assert set(metaworld.CONVENTIONS.cameras) - {"corner4"} == known - {"corner4"}
    assert dataclasses.asdict(reach.conventions)["action_dims"][3] == ("gripper", "1 = open")
