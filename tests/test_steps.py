"""Which step a run sees when, over one or several datasets."""

import numpy as np
import pytest

from openvla.finetune.steps import Episode, MixedSteps, StepDataset, run_order


class Reader:
    """Episodes of given lengths in memory; an action's first number is its episode, the second its time."""

    cameras, fps = ["front"], None

    def __init__(self, name: str, lengths: list[int]):
        self.name, self.lengths = name, lengths

    def __len__(self):
        return len(self.lengths)

    def read(self, index):
        times = np.arange(self.lengths[index], dtype=np.float32)
        actions = np.stack([np.full_like(times, index), times], axis=1)
        image = np.zeros((2, 2, 3), np.uint8)
        return Episode(f"{self.name} {index}", ["go"] * len(times), actions, None, lambda camera, step: image)


def test_a_run_is_one_seeded_permutation_after_another():
    order = run_order([[4, 6]], None, 25, seed=3).tolist()
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and order[:10] != order[10:20]
    assert len(order) == 25 and order == run_order([[4, 6]], None, 25, seed=3).tolist()
    assert order != run_order([[4, 6]], None, 25, seed=4).tolist()


def test_datasets_contribute_by_weight_times_size():
    order = run_order([[100], [20, 30], [25]], [1.0, 4.0, 2.0], 70_000, seed=0)  # masses 100, 200, 50
    counts = np.histogram(order, bins=[0, 100, 150, 175])[0]
    np.testing.assert_allclose(counts / 70_000, [100 / 350, 200 / 350, 50 / 350], atol=0.01)
    second = order[(order >= 100) & (order < 150)]
    assert sorted(second[:50]) == list(range(100, 150))  # each dataset goes through all its steps before repeating one


def test_windows_of_episodes_keep_few_open_at_a_time():
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    episode_of = np.repeat(np.arange(8), lengths)
    order = run_order([lengths], None, 62, seed=1, window=3)
    for start in (0, 31):
        each = order[start : start + 31]
        assert sorted(each) == list(range(31))
        episodes = episode_of[each]
        first, last = ([np.flatnonzero(episodes == number)[end] for number in range(8)] for end in (0, -1))
        opened = [sum(a <= at <= b for a, b in zip(first, last)) for at in range(31)]
        assert max(opened) <= 3
    assert order[:31].tolist() != order[31:].tolist()


def test_mixed_steps_are_those_of_their_parts():
    parts = [StepDataset(Reader("a", [2, 3]), [2, 3]), StepDataset(Reader("b", [4, 1]), [4, 1], episodes=[1])]
    steps = MixedSteps(parts)
    seen = [(steps[index].dataset, *steps[index].actions[0].tolist()) for index in range(len(steps))]
    assert seen == [("a", 0, 0), ("a", 0, 1), ("a", 1, 0), ("a", 1, 1), ("a", 1, 2), ("b", 1, 0)]
    with pytest.raises(IndexError):
        steps[6]
