"""Which action is carried out at which step, by hand, and with a policy."""

import numpy as np
import pytest
from PIL import Image

from openvla.action_tokenizer import ActionStats
from openvla.serve.action_queue import ENSEMBLE, ActionQueue
from openvla.serve.policy import OpenVLAPolicy


class Counting:
    """Says `[[10·n, 10·n], [10·n + 1, …], …]` when it is asked for the n-th time, n from 0."""

    def __init__(self, chunk: int, mask: tuple[bool, ...] = (True, True)):
        self.chunk, self.asked = chunk, []
        limits = np.zeros(len(mask)), np.ones(len(mask))
        self.stats = ActionStats(*limits, np.array(mask), np.zeros(len(mask), dtype=bool))

    def infer(self, observation):
        rows = 10 * len(self.asked) + np.arange(self.chunk)
        self.asked.append(observation)
        return {"actions": np.repeat(rows[:, None], self.stats.dim, axis=1)}


def run(queue: ActionQueue, steps: int) -> list[list[float]]:
    """`observation` is the number of the step."""
    return [queue.act(step if queue.needs_observation else None).tolist() for step in range(steps)]


def test_open_loop_asks_when_the_chunk_is_over():
    policy = Counting(3)
    assert run(ActionQueue(policy), 7) == [[v, v] for v in (0, 1, 2, 10, 11, 12, 20)]
    assert policy.asked == [0, 3, 6]


def test_a_receding_horizon_drops_the_rest():
    policy = Counting(3)
    assert run(ActionQueue(policy, execute=2), 5) == [[v, v] for v in (0, 1, 10, 11, 20)]
    assert policy.asked == [0, 2, 4]
    policy = Counting(3)
    assert run(ActionQueue(policy, execute=1), 3) == [[v, v] for v in (0, 10, 20)]


def test_an_ensemble_of_equal_weights_is_the_mean():
    policy = Counting(3)
    # step 2: the first chunk's 2, the second's 11, the third's 20; step 3: 12, 21, 30
    assert run(ActionQueue(policy, ensemble=0.0), 4) == [[v, v] for v in (0, (1 + 10) / 2, 11, 21)]
    assert policy.asked == [0, 1, 2, 3]


def test_the_oldest_prediction_weighs_most():
    found = run(ActionQueue(Counting(3), ensemble=np.log(2)), 5)  # weights 1, 1/2, 1/4
    expected = [0, (1 + 10 / 2) / 1.5, (2 + 11 / 2 + 20 / 4) / 1.75, (12 + 21 / 2 + 30 / 4) / 1.75]
    expected.append((22 + 31 / 2 + 40 / 4) / 1.75)
    np.testing.assert_allclose(found, np.transpose([expected] * 2), rtol=1e-12)
    found = run(ActionQueue(Counting(2), ensemble=ENSEMBLE), 2)
    assert found[1][0] == pytest.approx((1 + 10 * 0.9900498337491681) / 1.9900498337491681)  # exp(-0.01)


def test_what_statistics_do_not_normalise_is_not_averaged():
    found = run(ActionQueue(Counting(3, mask=(True, False)), ensemble=0.0), 3)
    assert found == [[0, 0], [5.5, 10], [11, 20]]
    found = run(ActionQueue(Counting(3), ensemble=0.0, averaged=[False, True]), 3)
    assert found == [[0, 0], [10, 5.5], [20, 11]]


def test_one_action_at_a_time_is_itself():
    assert (
        run(ActionQueue(Counting(1), ensemble=0.01), 3)
        == run(ActionQueue(Counting(1)), 3)
        == [[0] * 2, [10] * 2, [20] * 2]
    )


@pytest.mark.parametrize("options", [{}, {"execute": 2}, {"ensemble": 0.01}])
def test_after_a_reset_nothing_is_left(options):
    policy = Counting(3)
    queue = ActionQueue(policy, **options)
    queue.act("first")
    queue.reset()
    assert queue.needs_observation and queue.act("second").tolist() == [10, 10]


def test_robots_do_not_share_anything():
    policy = Counting(2)
    one, other = ActionQueue(policy), ActionQueue(policy)
    assert (one.act(0)[0], other.act(0)[0], one.act()[0], other.act()[0]) == (0, 10, 1, 11)
    one.act(0)[:] = 99  # the caller's to change
    assert one.act()[0] == 21


class Fails(Counting):
    def infer(self, observation):
        if observation == "fails":
            raise RuntimeError("no answer")
        return super().infer(observation)


def test_a_policy_that_fails_leaves_no_action():
    queue = ActionQueue(Fails(3), ensemble=0.0)
    queue.act("works")
    with pytest.raises(RuntimeError, match="no answer"):
        queue.act("fails")
    assert queue.act("works").tolist() == [10, 10]  # not averaged with what was said before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"execute": 0}, "execute=0, ensemble=None: expected 1 or more"),
        ({"execute": 2, "ensemble": 0.01}, "an ensemble asks at every step"),
        ({"ensemble": -1.0}, "0 .equal weights. or more"),
        ({"ensemble": float("nan")}, "0 .equal weights. or more"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        ActionQueue(Counting(3), **options)


def test_what_is_no_chunk_is_refused():
    class Says:
        def __init__(self, actions):
            self.infer = lambda observation: {"actions": actions}

    for actions in (np.zeros(7), np.zeros((0, 7)), np.full((2, 7), np.nan)):
        with pytest.raises(ValueError, match=r"expected finite \(T, A\)"):
            ActionQueue(Says(actions)).act({})
    with pytest.raises(ValueError, match="gives 2 action.s. at a time, too few to execute 3"):
        ActionQueue(Says(np.zeros((2, 7))), execute=3).act({})
    with pytest.raises(ValueError, match="Says does not tell which action dims"):
        ActionQueue(Says(np.zeros((2, 7))), ensemble=0.01)
    with pytest.raises(ValueError, match=r"averaged is of shape \(2,\), but actions have 7 dims"):
        ActionQueue(Says(np.zeros((2, 7))), ensemble=0.01, averaged=[True, False]).act({})
    with pytest.raises(ValueError, match="there is no observation"):
        ActionQueue(Counting(2)).act()


def test_a_policy_s_chunks(oft_policy, oft_recorded, oft_golden):
    """The recorded actions of two observations, one after the other, and their ensemble but for the gripper."""
    policy = OpenVLAPolicy(*oft_policy(), unnorm_key="toy_robot")
    observations, recorded = [], []
    for entry in oft_recorded["inputs"][:2]:
        names = (f"{entry['index']:02d}.{camera}_u8" for camera in ("primary", "wrist"))
        images = [Image.fromarray(oft_golden[name].numpy()) for name in names]
        instruction = entry["prompt"].split("robot take to ")[1].removesuffix("?\nOut:")
        observations.append({"images": images, "instruction": instruction, "proprio": entry["state"]})
        recorded.append(np.array(entry["actions_l1_proprio_fp32"]))
    queue = ActionQueue(policy)
    found = [queue.act(observations[0]), *(queue.act() for _ in range(7)), queue.act(observations[1])]
    np.testing.assert_allclose(found, [*recorded[0], recorded[1][0]], atol=1e-5)
    queue = ActionQueue(policy, ensemble=0.5)
    queue.act(observations[0])
    mean = (recorded[0][1] + np.exp(-0.5) * recorded[1][0]) / (1 + np.exp(-0.5))
    np.testing.assert_allclose(queue.act(observations[1]), [*mean[:6], recorded[1][0][6]], atol=1e-5)


class Drafted(Counting):
    """Answers with tokens 100·n + [0, 1, …], where n counts from 0, and takes drafts."""

    takes_drafts = True

    def infer(self, observation):
        result = super().infer(observation)
        tokens = 100 * (len(self.asked) - 1) + np.arange(result["actions"].size)
        return {**result, "token_ids": tokens}


@pytest.mark.parametrize(
    ("chunk", "options", "expected"),
    [
        (1, {}, [[0, 1], [100, 101]]),
        (3, {}, [[4, 5, 4, 5, 4, 5], [104, 105, 104, 105, 104, 105]]),  # all steps are over: as the last
        (3, {"execute": 2}, [[4, 5, 4, 5, 4, 5], [104, 105, 104, 105, 104, 105]]),
        (3, {"execute": 1}, [[2, 3, 4, 5, 4, 5], [102, 103, 104, 105, 104, 105]]),
        (3, {"ensemble": 0.0}, [[2, 3, 4, 5, 4, 5], [102, 103, 104, 105, 104, 105]]),
    ],
)
def test_what_was_said_of_the_same_steps_is_the_next_draft(chunk, options, expected):
    policy = Drafted(chunk)
    queue = ActionQueue(policy, **options)
    while len(policy.asked) < 3:
        queue.act({"step": 0} if queue.needs_observation else None)
    assert policy.asked[0] == {"step": 0}
    assert [asked["draft"].tolist() for asked in policy.asked[1:]] == expected
    queue.reset()
    queue.act({"step": 0})
    assert "draft" not in policy.asked[3]
