"""Offline evaluation: the original's recorded tokens come out, and every number is what a hand would compute."""

import copy
import json
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_readers import actions, write_folder

import openvla
from openvla.action_tokenizer import ActionStats, ActionTokenizer
from openvla.cli import main as command_line
from openvla.evaluate import offline, offline_plots
from openvla.evaluate.offline_episodes import choose_episodes, split_of_run
from openvla.evaluate.offline_report import name_dims
from openvla.evaluate.offline_scoring import MODES, Trace, bootstrap
from openvla.evaluate.offline_scoring import summarize as summarize_traces
from openvla.finetune.collator import ActionCollator
from openvla.finetune.readers import open_reader
from openvla.finetune.sft import split_episodes
from openvla.finetune.steps import Episode, StepDataset, choose_cameras
from openvla.hub_upload.model_card import read_evaluation

INPUTS = [[0, 2, 3, 5], [6, 8]]  # recorded inputs that two episodes consist of; instructions of several lengths
HALF_BIN = 1 / 255


class Reader:
    """Episodes of recorded images and instructions, with actions that are given."""

    name, cameras, fps = "robot", ["front"], 5.0

    def __init__(self, recorded, images, actions):
        self.recorded, self.images, self.actions = recorded["inputs"], images, actions

    def __len__(self):
        return len(INPUTS)

    def read(self, index):
        numbers = INPUTS[index]
        spoken = [self.recorded[number]["instruction"] for number in numbers]

        def image(camera, step):
            return np.asarray(self.images[numbers[step]].convert("RGB"))

        return Episode(f"file {index}", spoken, self.actions[index].astype(np.float32), None, image)


@pytest.fixture(scope="module")
def stats(model) -> ActionStats:
    return ActionStats.from_norm_stats(model.norm_stats, "bridge_orig")


@pytest.fixture(scope="module")
def tokens(recorded) -> list[np.ndarray]:
    """What the original code predicts, per episode `(N, 7)`."""
    return [np.array([recorded["inputs"][number]["action_ids"] for number in numbers]) for numbers in INPUTS]


@pytest.fixture(scope="module")
def own(recorded, images, tokens, stats) -> Reader:
    """A dataset whose actions are the policy's own: the middle of each token's bin, but 1 for the one of exactly 1."""
    normalized = [ActionTokenizer().decode(ids) for ids in tokens]
    for values, ids in zip(normalized, tokens):
        assert not (ids[:, :6] == 31744).any() and (ids[:, 6] == 31744).any()
        values[ids == 31744] = 1.0
    return Reader(recorded, images, [stats.unnormalize(values) for values in normalized])


@pytest.fixture(scope="module")
def traces(model, processor, own) -> list[Trace]:
    return offline.predict_episodes(model, processor, own, "bridge_orig", [0, 1], batch_size=4, progress=False)


def summarize(traces, stats) -> dict:
    dims = [("x", "m"), *[("other", "")] * (stats.dim - 2), ("gripper", "1 = open")]
    return summarize_traces(traces, stats, ActionTokenizer(), dims)


# --- With a policy ---------------------------------------------------------------------------------------------------
def test_the_original_s_tokens_come_out(traces, tokens):
    for trace, expected in zip(traces, tokens):
        np.testing.assert_array_equal(trace.ids["free_running"][:, 0], expected)


def test_a_policy_is_perfect_on_its_own_actions(traces, stats):
    found = summarize(traces, stats)
    assert (found["episodes"], found["steps"]) == (2, 6)
    assert found["free_running"]["token_accuracy"] == 1
    assert found["free_running"]["token_accuracy_interval"] == [1, 1]
    assert found["baselines"]["recorded, as tokens"]["token_accuracy"] == 1
    for mode in MODES:
        for dim in found[mode]["dims"][:6]:
            assert dim["mae"] < 1e-6 and dim["p95"] < 1e-6 and dim["l1_normalized"] < 1e-6
            assert dim["within_one_bin"] == 1
        share = np.mean(np.concatenate([trace.ids[mode][:, 0, 6] == 31744 for trace in traces]))
        assert found[mode]["dims"][6]["mae"] == pytest.approx(HALF_BIN * share) and share > 0
    # the prefix is the same in both ways: they differ only where another token than an action is the best
    assert found["teacher_forced"]["token_accuracy"] == pytest.approx(1 - found["free_running"]["replaced"])
    assert found["per_episode"][1] == {
        "episode": 1,
        "source": "file 1",
        "instruction": found["per_episode"][1]["instruction"],
        "steps": 2,
        "free_running_token_accuracy": 1.0,
        "free_running_l1_normalized": pytest.approx(
            HALF_BIN * np.mean(traces[1].ids["free_running"][..., 6] == 31744) / 7, abs=1e-6
        ),
        "teacher_forced_token_accuracy": pytest.approx(traces[1].right.mean()),
        "teacher_forced_l1_normalized": found["per_episode"][1]["teacher_forced_l1_normalized"],
    }


@pytest.mark.parametrize("bins, near", [(1, 1.0), (3, 0.0)])
def test_a_known_shift_of_one_dim_is_its_error(bins, near, model, processor, own, stats):
    width = (stats.high[2] - stats.low[2]) / 255
    shifted = copy.copy(own)
    shifted.actions = [values.copy() for values in own.actions]
    middle = (stats.low[2] + stats.high[2]) / 2
    for values in shifted.actions:
        values[:, 2] += np.where(values[:, 2] > middle, -bins, bins) * width  # towards the middle: nothing is clipped
    traces = offline.predict_episodes(
        model, processor, shifted, "bridge_orig", [0, 1], modes=("free_running",), progress=False
    )
    found = summarize(traces, stats)["free_running"]
    assert found["dims"][2]["mae"] == pytest.approx(bins * width, rel=1e-4)
    assert found["dims"][2]["mae_interval"] == pytest.approx([bins * width] * 2, rel=1e-4)
    assert found["dims"][2]["median"] == pytest.approx(bins * width, rel=1e-4)
    assert found["dims"][2]["l1_normalized"] == pytest.approx(bins * 2 / 255, rel=1e-4)
    assert (found["dims"][2]["token_accuracy"], found["dims"][2]["within_one_bin"]) == (0, near)
    assert all(dim["mae"] < 1e-6 and dim["token_accuracy"] == 1 for dim in found["dims"][:2] + found["dims"][3:6])
    assert found["token_accuracy"] == pytest.approx(6 / 7)


def test_the_batch_size_changes_no_number_and_training_sees_the_same(
    model, processor, recorded, images, stats, traces
):
    noise = np.random.default_rng(0)
    given = [noise.uniform(stats.low, stats.high, (len(numbers), 7)) for numbers in INPUTS]
    reader = Reader(recorded, images, given)
    both = [
        offline.predict_episodes(model, processor, reader, "bridge_orig", [0, 1], batch_size=size, progress=False)
        for size in (1, 4)
    ]
    single, batched = (summarize(each, stats) for each in both)
    assert single == batched
    for trace, other in zip(both[0], traces):  # what was recorded does not matter to a policy that acts
        np.testing.assert_array_equal(trace.ids["free_running"], other.ids["free_running"])
    steps = StepDataset(reader, [len(numbers) for numbers in INPUTS])
    collator = ActionCollator(steps, processor, {"robot": stats}, model.action_tokenizer)
    expected = offline.evaluate_actions(model, collator, list(range(6)), batch_size=3)
    found = single["teacher_forced"]
    assert found["token_accuracy"] == pytest.approx(expected["token_accuracy"])
    assert [dim["l1_normalized"] for dim in found["dims"]] == pytest.approx(expected["l1_normalized"])
    assert [dim["mae"] for dim in found["dims"]] == pytest.approx(expected["l1_physical"])
    last_of_four = SimpleNamespace(num_processes=4, process_index=3)  # which all have to call the model, for one step
    alone, shared = (offline.evaluate_actions(model, collator, [4], accelerator=each) for each in (None, last_of_four))
    assert alone == shared


# --- Without one -----------------------------------------------------------------------------------------------------
PLAIN = ActionStats(np.zeros(2), np.array([2.0, 4.0]), np.ones(2, bool), np.zeros(2, bool))
MIDDLE = 31872  # the token of 0, hence of [1, 2] in PLAIN's units


def plain_traces() -> list[Trace]:
    """Three steps in two episodes; the policy says the middle."""
    recorded = [np.array([[0, 4], [1, 2]], np.float32), np.array([[1, 2]], np.float32)]
    return [
        Trace(
            number,
            f"file {number}",
            "go",
            values,
            {"free_running": np.zeros((len(values), 1, 2))},
            {"free_running": np.full((len(values), 1, 2), MIDDLE)},
            replaced=np.zeros((len(values), 1, 2), bool),
        )
        for number, values in enumerate(recorded)
    ]


def maes(scores: dict) -> list[float]:
    return [dim["mae"] for dim in scores["dims"]]


def test_hand_computed_numbers():
    found = summarize(plain_traces(), PLAIN)
    policy, baselines = found["free_running"], found["baselines"]
    assert maes(policy) == pytest.approx([1 / 3, 2 / 3])  # errors [1, 2], [0, 0], [0, 0]
    assert policy["token_accuracy"] == pytest.approx(2 / 3)
    assert policy["l1_normalized"] == pytest.approx(1 / 3)
    first, second = policy["dims"]
    assert (first["name"], first["unit"], second["name"], second["unit"]) == ("x", "m", "gripper", "1 = open")
    assert (first["median"], first["p95"], first["bias"]) == (0, pytest.approx(0.9), pytest.approx(1 / 3))
    assert (second["median"], second["p95"], second["bias"]) == (0, pytest.approx(1.8), pytest.approx(-2 / 3))
    # whole episodes are drawn: twice the first, twice the second, or both
    assert policy["token_accuracy_interval"] == pytest.approx([1 / 2, 1])
    assert first["mae_interval"] == pytest.approx([0, 1 / 2])

    # the mean is [2/3, 8/3]; the step before is that at the beginning of an episode
    assert maes(baselines["mean action"]) == pytest.approx([4 / 9, 8 / 9])
    assert maes(baselines["previous action"]) == pytest.approx([2 / 3, 4 / 3])
    assert maes(baselines["most frequent token"]) == pytest.approx([1 / 3, 2 / 3])
    assert baselines["most frequent token"]["token_accuracy"] == pytest.approx(2 / 3)
    assert baselines["mean action"]["token_accuracy"] == baselines["previous action"]["token_accuracy"] == 0
    assert maes(baselines["recorded, as tokens"]) == pytest.approx([1 / 255 / 3, 2 / 255 / 3])
    assert baselines["recorded, as tokens"]["token_accuracy"] == 1


def test_one_episode_has_no_interval():
    found = summarize(plain_traces()[:1], PLAIN)
    assert found["free_running"]["token_accuracy_interval"] is None
    assert found["free_running"]["dims"][0]["mae_interval"] is None


def test_the_interval_is_that_of_the_mean():
    random = np.random.default_rng(1)
    values = random.normal(5, 2, (400, 1))
    low, high = bootstrap(values, np.arange(400))[0]  # episodes of one step: independent
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    # steps that repeat tell nothing new
    again = bootstrap(np.repeat(values, 10, axis=0), np.repeat(np.arange(400), 10))[0]
    assert again == pytest.approx([low, high])


def test_what_lies_past_the_end_of_an_episode_is_not_counted():
    traces = plain_traces()
    for trace in traces:
        trace.ids["free_running"] = np.full((len(trace.actions), 2, 2), MIDDLE)
        trace.ids["free_running"][-1, 1] = 31999
        trace.normalized["free_running"] = ActionTokenizer().decode(trace.ids["free_running"])
        trace.replaced = np.zeros((len(trace.actions), 2, 2), bool)
        trace.replaced[-1, 1] = True
    found = summarize(traces, PLAIN)
    # counted are [0, 4] and the [1, 2] after it, the [1, 2] of the second step, and that of the other episode
    assert found["steps"] == 3
    assert maes(found["free_running"]) == pytest.approx([1 / 4, 2 / 4])
    assert found["free_running"]["replaced"] == 0
    # the mean is [3/4, 5/2]; errors of what came before: [3/4, 3/2], [1/4, 1/2], [1, 2], [1/4, 1/2]
    assert maes(found["baselines"]["previous action"]) == pytest.approx([9 / 16, 9 / 8])
    # by steps ahead: now [0, 4], [1, 2] and [1, 2], and the [1, 2] that follows the first
    now, later = found["free_running"]["ahead"]
    assert (now["actions"], later["actions"]) == (3, 1)
    assert now["dims"] == pytest.approx([1 / 3, 1 / 3]) and later["dims"] == pytest.approx([0, 0], abs=1e-7)
    assert now["l1_normalized"] == pytest.approx(1 / 3) and now["token_accuracy"] == pytest.approx(2 / 3)
    assert later["l1_normalized"] == pytest.approx(0, abs=1e-7) and later["token_accuracy"] == 1


def test_without_tokens_nothing_is_said_of_them():
    traces = plain_traces()
    for trace in traces:
        trace.normalized["free_running"] = np.full((len(trace.actions), 1, 2), 0.5)  # [1.5, 3] in PLAIN's units
        trace.ids, trace.replaced = {}, None
    found = summarize_traces(traces, PLAIN, None, [("x", "m"), ("gripper", "1 = open")])
    assert maes(found["free_running"]) == pytest.approx([(1.5 + 0.5 + 0.5) / 3, (1 + 1 + 1) / 3])
    assert found["free_running"]["l1_normalized"] == pytest.approx((1.5 + 0.5 + 0.5 + 0.5 + 0.5 + 0.5) / 6)
    assert list(found["baselines"]) == ["mean action", "previous action"]
    assert maes(found["baselines"]["mean action"]) == pytest.approx([4 / 9, 8 / 9])
    assert found["per_episode"][0]["free_running_l1_normalized"] == pytest.approx((1.5 + 0.5 + 0.5 + 0.5) / 4)
    for scores in (found, found["free_running"], *found["free_running"]["dims"], *found["per_episode"]):
        assert not [key for key in scores if "token" in key or "bin" in key or key in ("replaced", "ahead")]


# --- Policies that decode in parallel --------------------------------------------------------------------------------
class Chunks:
    """One episode of 8 steps; `actions` are what a policy of OpenVLA-OFT predicts for the first of them."""

    name, cameras, fps = "toy_robot", ["primary", "wrist"], 5.0

    def __init__(self, recorded, golden, actions):
        self.entries, self.golden, self.actions = recorded["inputs"], golden, np.array(actions, np.float32)

    def __len__(self):
        return 1

    def read(self, index):
        spoken = [entry["prompt"].split("robot take to ")[1].removesuffix("?\nOut:") for entry in self.entries]
        states = np.array([entry["state"] for entry in self.entries], np.float32)
        return Episode(
            "file", spoken, self.actions, states, lambda camera, step: self.golden[f"{step:02d}.{camera}_u8"].numpy()
        )


def collate(reader, model, processor) -> ActionCollator:
    steps = StepDataset(reader, [8], None, reader.cameras, 8)
    stats = ActionStats.from_norm_stats(model.norm_stats, "toy_robot")
    return ActionCollator(steps, processor, {"toy_robot": stats}, model.action_tokenizer)


def test_chunks_of_a_continuous_head_against_recorded_ones(oft_policy, oft_recorded, oft_golden):
    model, processor = oft_policy()
    chunks = np.array([entry["actions_l1_proprio_fp32"] for entry in oft_recorded["inputs"]])  # (8, 8, 7)
    shift = np.array([0, 0, 0.1, 0, 0, 0, 0])
    reader = Chunks(oft_recorded, oft_golden, chunks[0] + shift)
    collator = collate(reader, model, processor)
    stats = collator.stats["toy_robot"]

    # 1. Its own chunk, but for one dim that is off by 0.1
    found = offline.evaluate_actions(model, collator, [0])
    assert set(found) == {"l1_normalized", "l1_physical", "steps"} and found["steps"] == 1
    assert found["l1_physical"] == pytest.approx(shift, abs=1e-5)
    assert found["l1_normalized"] == pytest.approx(shift * 2 / (stats.high - stats.low), abs=2e-5)

    # 2. Of steps 6 and 7, two actions and one lie inside the episode
    found = offline.evaluate_actions(model, collator, [6, 7], batch_size=1)
    recorded = reader.actions
    errors = [chunks[6][0] - recorded[6], chunks[6][1] - recorded[7], chunks[7][0] - recorded[7]]
    assert found["l1_physical"] == pytest.approx(np.abs(errors).mean(axis=0), abs=1e-5)
    assert offline.evaluate_actions(model, collator, [6, 7])["l1_physical"] == pytest.approx(
        found["l1_physical"], abs=1e-5
    )

    # 3. The whole episode, as the command tells it and as training sees it
    (trace,) = offline.predict_episodes(model, processor, reader, "toy_robot", [0], progress=False)
    np.testing.assert_allclose(stats.unnormalize(trace.normalized["free_running"]), chunks, atol=2e-5)
    assert list(trace.normalized) == ["free_running"] and not trace.ids
    told = summarize_traces([trace], stats, None, [("", "")] * 7)["free_running"]
    counted = [(step, later) for step in range(8) for later in range(8 - step)]
    errors = np.abs([chunks[step, later] - recorded[step + later] for step, later in counted])
    assert maes(told) == pytest.approx(errors.mean(axis=0), abs=1e-5)
    assert [entry["actions"] for entry in told["ahead"]] == [8, 7, 6, 5, 4, 3, 2, 1]
    (last,) = np.abs(trace.normalized["free_running"][0, 7] - stats.normalize(recorded[7]))[None]
    assert told["ahead"][7]["dims"] == pytest.approx(last) and told["ahead"][7]["l1_normalized"] == pytest.approx(
        last.mean()
    )
    found = offline.evaluate_actions(model, collator, list(range(8)))
    assert found["l1_physical"] == pytest.approx(maes(told), abs=1e-5)


def test_noise_is_the_same_at_every_evaluation(oft_policy, oft_recorded, oft_golden, monkeypatch):
    model, processor = oft_policy("diffusion")
    monkeypatch.setattr(model.config, "num_denoising_steps", 2)
    chunks = [entry["actions_l1_proprio_fp32"] for entry in oft_recorded["inputs"]]
    collator = collate(Chunks(oft_recorded, oft_golden, chunks[0]), model, processor)
    torch.manual_seed(1)
    first = offline.evaluate_actions(model, collator, [0, 3, 5])
    torch.manual_seed(2)
    assert offline.evaluate_actions(model, collator, [0, 3, 5]) == first
    one_by_one = offline.evaluate_actions(model, collator, [0, 3, 5], batch_size=1)
    assert one_by_one["l1_normalized"] == pytest.approx(first["l1_normalized"], abs=1e-4)
    monkeypatch.setattr(offline, "NOISE_SEED", 1)
    other = offline.evaluate_actions(model, collator, [0, 3, 5])
    assert np.abs(np.subtract(other["l1_normalized"], first["l1_normalized"])).max() > 1e-3


def test_tokens_decoded_in_parallel(oft_policy, oft_recorded, oft_golden):
    """This policy was not trained for tokens: it would prefer others than actions everywhere."""
    model, processor = oft_policy("token")
    reader = Chunks(oft_recorded, oft_golden, np.zeros((8, 7)))
    (trace,) = offline.predict_episodes(model, processor, reader, "toy_robot", [0], progress=False)
    assert list(trace.ids) == ["free_running"] and trace.replaced.all()
    stats = ActionStats.from_norm_stats(model.norm_stats, "toy_robot")
    reader = Chunks(
        oft_recorded, oft_golden, stats.unnormalize(ActionTokenizer().decode(trace.ids["free_running"][0]))
    )
    (trace,) = offline.predict_episodes(model, processor, reader, "toy_robot", [0], progress=False)
    told = summarize_traces([trace], stats, model.action_tokenizer, [("", "")] * 7)["free_running"]
    assert told["replaced"] == 1 and told["token_accuracy"] > 0
    collator = collate(reader, model, processor)
    found = offline.evaluate_actions(model, collator, [0])
    assert found["token_accuracy"] == 0 and found["l1_normalized"] == pytest.approx([0] * 7, abs=HALF_BIN + 1e-6)


def test_a_state_that_the_data_lack_is_told(oft_policy, oft_recorded, oft_golden):
    model, processor = oft_policy()
    reader = Chunks(oft_recorded, oft_golden, np.zeros((8, 7)))
    for entries, problem in ((slice(0, 7), "has 7"), (None, "has none")):
        short = copy.copy(reader)
        episode = reader.read(0)
        episode.proprio = None if entries is None else episode.proprio[:, entries]
        short.read = lambda index, episode=episode: episode
        with pytest.raises(ValueError, match=f"takes 8 numbers of the robot's state; file, step 0 {problem}"):
            offline.predict_episodes(model, processor, short, "toy_robot", [0], progress=False)


# --- What is asked for -----------------------------------------------------------------------------------------------
def test_episodes_are_chosen():
    candidates = [0, 1, 2, 5, 8]
    assert choose_episodes(candidates, None, None, 0) == candidates
    assert choose_episodes(candidates, "0-2,8", None, 0) == [0, 1, 2, 8]
    assert choose_episodes(candidates, "5", None, 0) == [5]
    some, more = (set(choose_episodes(candidates, None, count, 3)) for count in (2, 4))
    assert len(some) == 2 and some < more < set(candidates)
    many = list(range(100))
    assert choose_episodes(many, None, 5, 3) != choose_episodes(many, None, 5, 4)


@pytest.mark.parametrize(
    "candidates, selection, sample, message",
    [
        ([], None, None, "There is no episode to evaluate in this split"),
        ([0, 1], None, 0, "--sample 0: expected 1 to 2 episodes"),
        ([0, 1], None, 3, "--sample 3: expected 1 to 2 episodes"),
        ([0, 1], "0", 1, "either --episodes or --sample"),
        ([0, 1], "0-3", None, "--episodes go from 0 to 1, each once; got '0-3'"),
        ([0, 3], "0-3", None, r"\[1, 2\] are not among the 2 to choose from, 0 … 3"),
        ([0, 1], "1-0", None, "Expected --episodes as numbers such as 0,3-5"),
        ([0, 1], ",", None, "Expected --episodes as numbers such as 0,3-5"),
        ([0, 1], "first", None, "Expected --episodes as numbers such as 0,3-5"),
    ],
)
def test_selections_that_are_none(candidates, selection, sample, message):
    with pytest.raises(ValueError, match=message):
        choose_episodes(candidates, selection, sample, 0)


def test_the_split_is_that_of_training():
    class Many:
        name = "robot"

        def __len__(self):
            return 40

    training, held_out = split_episodes([7] * 40, 0.25, 5)
    run = {"norm_stats": {"other": {}, "robot": {}}, "lengths": [[3], [7] * 30]}
    assert split_of_run(Many(), "held-out", run, 0.25, 5, False) == held_out and len(held_out) == 10
    assert split_of_run(Many(), "training", {}, 0.25, 5, False) == training
    assert split_of_run(Many(), "all", run, 0.25, 5, False) == list(range(40))
    with pytest.raises(
        ValueError, match="The run trained on 30 episodes of robot; a share of 0.5 held out here leave"
    ):
        split_of_run(Many(), "held-out", run, 0.5, 5, False)


@pytest.mark.parametrize(
    "count, given, declared, expected",
    [
        (1, None, None, ["front"]),  # the main one
        (2, None, None, ["front", "wrist"]),
        (2, None, ["wrist", "front"], ["wrist", "front"]),  # as trained
        (1, None, ["wrist"], ["wrist"]),
        (1, None, ["agentview"], ["front"]),
        (2, ["front", "top"], ["wrist", "front"], ["front", "top"]),
    ],
)
def test_cameras_are_those_of_the_training(count, given, declared, expected):
    reader = SimpleNamespace(name="robot", cameras=["front", "wrist", "top"])
    assert choose_cameras(reader, count, given, declared) == expected


def test_nobody_guesses_which_cameras_a_policy_means():
    reader = SimpleNamespace(name="robot", cameras=["front", "wrist"])
    with pytest.raises(ValueError, match=r"trained with the cameras \['a', 'b'\], and robot has .* --cameras"):
        choose_cameras(reader, 2, None, ["a", "b"])
    with pytest.raises(ValueError, match=r"takes 2 camera\(s\), got \['front'\]"):
        choose_cameras(reader, 2, ["front"], None)


def test_datasets_unlike_the_policy_s_are_refused(model, processor, own):
    with pytest.raises(ValueError, match="file 0 has 7 action dims, the statistics of 'toy_nomask_6d' have 6"):
        offline.predict_episodes(model, processor, own, "toy_nomask_6d", [0], progress=False)
    two = copy.copy(processor)
    two.num_cameras = 2
    with pytest.raises(ValueError, match=r"takes 2 camera\(s\), got \['front'\] of \['front'\] that robot has"):
        offline.predict_episodes(model, two, own, "bridge_orig", [0], progress=False)
    with pytest.raises(ValueError, match=r"no cameras \['wrist'\]"):
        offline.predict_episodes(model, processor, own, "bridge_orig", [0], ["wrist"], progress=False)


def test_names_of_dims():
    class Named:
        action_names = ["shoulder", "elbow"]

    stats = {"action": {"q01": [0, 0], "q99": [1, 1]}}
    assert name_dims({"x": stats}, "x", object()) == [("action 0", ""), ("action 1", "")]
    assert name_dims({"x": stats}, "x", Named()) == [("shoulder", ""), ("elbow", "")]
    declared = {"action": stats["action"] | {"names": ["a", "b"], "units": ["m", "rad"]}}
    assert name_dims({"x": declared}, "x", Named()) == [("a", "m"), ("b", "rad")]


# --- The command -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def two_cameras(checkpoint, tmp_path_factory):
    """A run's `merged` with a policy of two cameras that predicts two steps at once."""
    folder = tmp_path_factory.mktemp("run") / "merged"
    options = {"num_cameras": 2, "action_chunk": 2, "dtype": torch.float32}
    openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, **options).save_pretrained(folder)
    openvla.OpenVLAProcessor.from_pretrained(checkpoint, num_cameras=2).save_pretrained(folder)
    facts = {"validation_share": 0.5, "seed": 1, "norm_stats": {"toy_robot": {}}, "lengths": [[5]]}
    (folder.parent / "run.json").write_text(json.dumps(facts))
    return folder


def test_the_examples_can_be_pasted():
    examples = [line for line in offline.__doc__.splitlines() if line.startswith("openvla evaluate")]
    assert len(examples) == 4
    for example in examples:
        checkpoint, *_ = words = shlex.split(example)[2:]
        assert offline.parser().parse_args(words).checkpoint == checkpoint


def test_the_whole_command(two_cameras, tmp_path, capsys):
    data, out = write_folder(tmp_path / "data"), tmp_path / "out"
    common = [
        str(two_cameras),
        "--data",
        str(data),
        "--name",
        "toy_robot",
        "--device",
        "cpu",
        "--output-dir",
        str(out),
    ]
    command_line(["evaluate", *common, "--batch-size", "4"])
    told = capsys.readouterr()
    assert "on toy_robot: 2 episodes (all), 8 steps; as 'toy_robot'" in told.out and "--split held-out" in told.err
    found = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    settings = found["settings"]
    assert (settings["cameras"], settings["action_chunk"], settings["episodes"]) == (["front", "wrist"], 2, [0, 1])
    assert settings["unnorm_key"] == "toy_robot" and found["versions"]["torch"] == torch.__version__
    assert found["command"].startswith(f"openvla evaluate {two_cameras} --data")
    assert sorted(path.name for path in out.iterdir()) == [
        "ahead.png",
        "episode_0.png",
        "episode_1.png",
        "errors.png",
        "evaluation.json",
        "results.json",
    ]

    # 1. What is told is what the policy does: here, for the first step of the first episode
    model, processor = openvla.load(two_cameras, dtype=torch.float32)
    reader = open_reader(str(data), "toy_robot")
    episode = reader.read(0)
    pictures = [[episode.image(camera, 0) for camera in ("front", "wrist")]]
    inputs = processor([processor.build_prompt("pick up the cup")], pictures)
    expected = model.predict_action(**inputs, unnorm_key="toy_robot", return_dict=True)
    traces = offline.predict_episodes(model, processor, reader, "toy_robot", [0], progress=False)
    np.testing.assert_array_equal(traces[0].ids["free_running"][0].reshape(-1), expected["token_ids"][0])
    stats = ActionStats.from_norm_stats(model.norm_stats, "toy_robot")
    counted = np.arange(5)[:, None] + np.arange(2) < 5
    predicted = stats.unnormalize(ActionTokenizer().decode(traces[0].ids["free_running"]))[counted]
    errors = np.abs(predicted - actions(0)[np.minimum(np.arange(5)[:, None] + np.arange(2), 4)][counted])

    collator = ActionCollator(
        StepDataset(reader, [5, 3], None, ["front", "wrist"], 2),
        processor,
        {"toy_robot": stats},
        model.action_tokenizer,
    )
    in_training = offline.evaluate_actions(model, collator, list(range(8)), batch_size=3)
    assert in_training["token_accuracy"] == pytest.approx(found["teacher_forced"]["token_accuracy"])
    assert in_training["l1_physical"] == pytest.approx(maes(found["teacher_forced"]))

    # 2. The card can have it
    results = read_evaluation(out / "evaluation.json")
    assert [result["metric"] for result in results] == [
        "free_running_token_accuracy",
        "free_running_l1_normalized",
        "teacher_forced_token_accuracy",
        "teacher_forced_l1_normalized",
    ]
    assert results[0]["value"] == found["free_running"]["token_accuracy"] and results[0]["dataset"] == "toy_robot"
    low, high = found["free_running"]["token_accuracy_interval"]
    assert results[0]["interval"] == [low, high] and results[0]["episodes"] == 2

    # 3. The pictures
    pixels = offline_plots.INCH
    size = offline_plots.EPISODE_WIDTH, offline_plots.ROW_HEIGHT * 7 + offline_plots.TITLE_HEIGHT
    with Image.open(out / "episode_1.png") as picture:
        picture.load()
        assert picture.size == pytest.approx([pixels * inches for inches in size], abs=1)
        drawn = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for color, _ in offline_plots.STYLES.values():  # every line is there
        rgb = [int(color[place : place + 2], 16) for place in (1, 3, 5)]
        assert (np.abs(drawn - np.array(rgb)).max(axis=1) < 12).sum() > 50
    height = offline_plots.BARS_HEIGHT + 2 * offline_plots.PANEL_HEIGHT + offline_plots.TITLE_HEIGHT
    with Image.open(out / "errors.png") as picture:
        picture.load()
        assert picture.size == pytest.approx((pixels * 4 * offline_plots.PANEL_WIDTH, pixels * height), abs=1)

    # 4. Held-out episodes of the run the policy lies in, in another way; old pictures go
    _, held_out = split_episodes([5, 3], 0.5, 1)
    offline.main([*common, "--split", "held-out", "--free-running", "--plots", "1"])
    found = json.loads((out / "results.json").read_text())
    assert found["settings"]["episodes"] == held_out == [0] and found["settings"]["seed"] == 1
    assert "teacher_forced" not in found and found["episodes"] == 1
    assert maes(found["free_running"]) == pytest.approx(errors.mean(axis=0))
    assert [dim["median"] for dim in found["free_running"]["dims"]] == pytest.approx(np.median(errors, axis=0))
    assert [result["dataset"] for result in read_evaluation(out / "evaluation.json")] == [
        "toy_robot (held-out episodes)"
    ] * 2
    assert sorted(path.name for path in out.glob("*.png")) == ["ahead.png", "episode_0.png", "errors.png"]
    assert "unknown" in capsys.readouterr().out  # the interval


def test_the_whole_command_for_a_head_without_tokens(oft_policy, tmp_path, capsys):
    model, processor = oft_policy("diffusion")
    model.save_pretrained(tmp_path / "policy")
    processor.save_pretrained(tmp_path / "policy")
    data, out = write_folder(tmp_path / "data"), tmp_path / "out"
    common = [str(tmp_path / "policy"), "--data", str(data), "--name", "toy_robot", "--device", "cpu"]
    common += ["--output-dir", str(out), "--dtype", "float32"]
    command_line(["evaluate", *common, "--num-denoising-steps", "1", "--teacher-forced", "--plots", "1"])
    told = capsys.readouterr()
    assert "note: this policy decodes in parallel; teacher-forced is free-running" in told.err
    assert "token" not in told.out and "bin" not in told.out
    found = json.loads((out / "results.json").read_text())
    settings = found["settings"]
    assert (settings["action_head"], settings["num_denoising_steps"], settings["action_chunk"]) == ("diffusion", 1, 8)
    ahead = found["free_running"]["ahead"]
    assert [entry["actions"] for entry in ahead] == [8, 6, 4, 2, 1]  # episodes of 5 and 3 steps
    (line,) = [line for line in told.out.splitlines() if line.split()[:2] == ["3", "2"]]
    assert line.split()[2] == f"{ahead[3]['l1_normalized']:.4f}"
    assert [entry["metric"] for entry in read_evaluation(out / "evaluation.json")] == ["free_running_l1_normalized"]
    assert sorted(path.name for path in out.glob("*.png")) == ["ahead.png", "episode_0.png", "errors.png"]
    with Image.open(out / "ahead.png") as picture:
        drawn = np.asarray(picture.convert("L"))
    assert (drawn < 60).sum() > 500  # two thick lines, and words

    # what it would do for the first step of the first episode
    reader = open_reader(str(data), "toy_robot")
    episode = reader.read(0)
    noise = np.random.default_rng((offline.NOISE_SEED, 0, 0)).standard_normal((1, 8, 7), dtype=np.float32)
    pictures = [[episode.image(camera, 0) for camera in ("front", "wrist")]]
    inputs = processor([processor.build_prompt(episode.instructions[0])], pictures, episode.proprio[:1])
    options = {"noise": torch.from_numpy(noise), "num_denoising_steps": 1, "unnorm_key": "toy_robot"}
    expected = model.predict_action(**inputs, **options)
    (trace,) = offline.predict_episodes(
        model, processor, reader, "toy_robot", [0], num_denoising_steps=1, progress=False
    )
    stats = ActionStats.from_norm_stats(model.norm_stats, "toy_robot")
    np.testing.assert_allclose(stats.unnormalize(trace.normalized["free_running"][0]), expected, atol=1e-4)
    with pytest.raises(SystemExit, match="choose|takes 2 camera"):
        command_line(["evaluate", *common, "--cameras", "front"])


def test_an_adapter_is_evaluated_as_what_it_merges_to(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, processor = openvla.load(checkpoint, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    data, found = write_folder(tmp_path / "my_robot"), []
    for name in ("adapter", "merged"):
        options = ["--unnorm-key", "toy_robot", "--dtype", "float32", "--device", "cpu", "--plots", "0"]
        options += ["--episodes", "1-1", "--output-dir", str(tmp_path / f"{name}-out")]
        offline.main([str(tmp_path / name), "--data", str(data), *options])
        found.append(json.loads((tmp_path / f"{name}-out" / "results.json").read_text()))
    for mode in MODES:
        assert found[0][mode] == found[1][mode]
    assert not list((tmp_path / "merged-out").glob("*.png"))


def test_keys_that_the_policy_lacks_are_refused_before_anything_is_written(checkpoint, tmp_path):
    data = write_folder(tmp_path / "my_robot")
    common = [str(checkpoint), "--data", str(data), "--device", "cpu", "--output-dir", str(tmp_path / "out")]
    with pytest.raises(KeyError, match=r"unnorm_key is needed: .*'bridge_orig'"):
        offline.main(common)
    with pytest.raises(KeyError, match=r"Unknown unnorm_key 'kitchen': .*'bridge_orig'"):
        offline.main([*common, "--unnorm-key", "kitchen"])
    with pytest.raises(ValueError, match="Expected --batch-size from 1"):
        offline.main([*common, "--batch-size", "0"])
    assert not (tmp_path / "out").exists()
