import json
from pathlib import Path

import numpy as np
import pytest

from openvla.action_tokenizer import ActionStats, ActionTokenizer

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "action_tokenizer.json").read_text())
NORM_STATS = {
    "robot": {
        "action": {
            "q01": [-0.5, 0.0, 2.0, 0.0],
            "q99": [0.5, 4.0, 2.0, 1.0],
            "min": [-1.0, -1.0, 2.0, 0.0],
            "max": [1.0, 8.0, 2.0, 1.0],
            "mean": [0.0, 1.0, 2.0, 0.5],
            "std": [0.25, 2.0, 0.0, 0.5],
            "mask": [True, True, True, False],
        }
    }
}


def stats(scheme="q99", **changes) -> ActionStats:
    action = {**NORM_STATS["robot"]["action"], **changes}
    return ActionStats.from_norm_stats({"robot": {"action": action}}, "robot", scheme)


def test_encode_equals_the_original_on_its_whole_grid():
    # bin edges, both neighbours of each in floating point, centres, ±inf and values out of range
    assert ActionTokenizer().encode(RECORDED["grid"]).tolist() == RECORDED["token_ids"]


def test_decode_with_clipping_equals_the_original_also_outside_the_range():
    decoded = ActionTokenizer().decode(np.array(RECORDED["decode_ids"]), clip=True)
    assert decoded.tolist() == RECORDED["decoded"]


def test_hand_computed_bins():
    tokenizer = ActionTokenizer()
    assert tokenizer.encode([-1.0, 0.0, 0.5, 1.0]).tolist() == [31999, 31872, 31808, 31744]
    np.testing.assert_allclose(tokenizer.decode([31999, 31872]), [-0.996078431372549, 0.0], atol=1e-15)
    assert tokenizer.decode([31744]) == tokenizer.decode([31745])  # 256 ids, 255 centres


def test_decode_is_a_right_inverse_of_encode():
    tokenizer = ActionTokenizer()
    ids = np.arange(31745, 32000)  # 31744 means exactly 1, which no centre is
    assert (tokenizer.encode(tokenizer.decode(ids)) == ids).all()


@pytest.mark.parametrize("ids", [[31743], [32000], [2], [-1]])
def test_decode_refuses_tokens_that_are_no_actions(ids):
    with pytest.raises(ValueError, match="not action tokens: expected 31744 … 31999"):
        ActionTokenizer().decode(ids)


def test_decode_refuses_floats_and_encode_refuses_nan():
    with pytest.raises(ValueError, match="must be integers"):
        ActionTokenizer().decode([31800.0])
    with pytest.raises(ValueError, match=r"NaN at \[0, 1\]"):
        ActionTokenizer().encode([[0.0, np.nan]])


def test_other_vocabularies_and_bin_counts():
    tokenizer = ActionTokenizer(vocab_end=100, num_bins=5)  # edges -1, -0.5, 0, 0.5, 1
    assert tokenizer.encode([-1.0, -0.3, 0.7, 1.0]).tolist() == [99, 98, 96, 95]
    assert tokenizer.decode([99, 98, 96, 95]).tolist() == [-0.75, -0.25, 0.75, 0.75]


def test_bins_of_equal_population():
    rng = np.random.default_rng(0)
    motion = np.clip(rng.normal(0, 0.1, 20_000), -1, 1)
    gripper = rng.integers(0, 2, 20_000).astype(float)
    actions = np.stack([motion, gripper, np.zeros(20_000)], axis=1)
    tokenizer = ActionTokenizer(bins=ActionTokenizer.fit(actions))
    decoded = tokenizer.decode(tokenizer.encode(actions))

    counts = np.bincount(tokenizer.encode(actions)[:, 0] - 31744, minlength=256)
    assert counts[1:].min() >= 78 and counts[1:].max() <= 80  # 20,000 actions over 255 intervals
    assert (decoded[:, 1] == gripper).all() and (decoded[:, 2] == 0).all()  # frequent values come back exactly
    uniform = ActionTokenizer()
    error = np.abs(decoded[:, 0] - motion).mean()
    assert error < 0.7 * np.abs(uniform.decode(uniform.encode(motion)) - motion).mean()
    with pytest.raises(ValueError, match="for 3 action dims"):
        tokenizer.encode(np.zeros((2, 4)))


def test_bins_of_equal_population_follow_a_json_round_trip():
    bins = ActionTokenizer.fit(np.linspace(-1, 1, 999)[:, None] ** 3)
    again = json.loads(json.dumps(bins))
    values = np.linspace(-1, 1, 77)[:, None]
    assert (ActionTokenizer(bins=again).encode(values) == ActionTokenizer(bins=bins).encode(values)).all()


def test_unnormalize_equals_the_recorded_actions(recorded):
    norm_stats = json.loads((Path(__file__).parent / "fixtures" / "tiny-openvla" / "config.json").read_text())
    for entry in recorded["inputs"]:
        for key, expected in entry["actions"].items():
            action_stats = ActionStats.from_norm_stats(norm_stats["norm_stats"], key)
            normalized = ActionTokenizer().decode(entry["action_ids"][: action_stats.dim])
            np.testing.assert_allclose(action_stats.unnormalize(normalized), expected, rtol=0, atol=1e-12)


def test_normalize_by_hand():
    # clipped, in range, constant in the dataset (min == max) -> 0, masked -> as it is
    np.testing.assert_allclose(stats().normalize([0.75, 1.0, 2.0, 0.3]), [1.0, -0.5, 0.0, 0.3], atol=1e-8)
    np.testing.assert_allclose(stats("min_max").normalize([0.75, 1.0, 2.0, 0.3]), [0.75, -5 / 9, 0.0, 0.3], atol=1e-8)
    np.testing.assert_allclose(stats("mean_std").normalize([0.75, 1.0, 2.0, 0.3]), [3.0, 0.0, 0.0, 0.3], atol=1e-6)


def test_unnormalize_by_hand():
    assert stats().unnormalize([1.0, -0.5, 0.4, 0.3]).tolist() == [0.5, 1.0, 2.0, 0.3]
    assert stats("mean_std").unnormalize([3.0, 0.0, 0.4, 0.3]).tolist() == [0.75, 1.0, 2.0, 0.3]
    assert stats().unnormalize([3.0, 0.0, 0.0, 0.0])[0] == 1.5  # no clipping at inference


@pytest.mark.parametrize("scheme", ["q99", "min_max", "mean_std"])
def test_inverse_pair_within_the_range(scheme):
    actions = np.random.default_rng(0).uniform([-0.5, 0.0, 2.0, 0.0], [0.5, 4.0, 2.0, 1.0], (5, 3, 4))
    action_stats = stats(scheme)
    np.testing.assert_allclose(action_stats.unnormalize(action_stats.normalize(actions)), actions, atol=1e-7)


def test_equal_quantiles_are_not_constant():
    # q01 == q99 with min != max, as in one released dataset: the value itself maps to -1, not to 0
    assert stats(min=[-1.0, -1.0, 1.0, 0.0]).normalize([0.0, 0.0, 2.0, 0.0])[2] == -1.0


def test_a_missing_mask_normalizes_every_dim():
    action = {key: value for key, value in NORM_STATS["robot"]["action"].items() if key != "mask"}
    action_stats = ActionStats.from_norm_stats({"robot": {"action": action}})
    assert action_stats.unnormalize([0.0, 0.0, 0.0, 1.0])[3] == 1.0 and action_stats.mask.all()


def test_keys():
    two = {**NORM_STATS, "other": NORM_STATS["robot"]}
    assert ActionStats.from_norm_stats(NORM_STATS).dim == 4  # the only one there is
    with pytest.raises(KeyError, match=r"unnorm_key is needed.*\['other', 'robot'\]"):
        ActionStats.from_norm_stats(two)
    with pytest.raises(KeyError, match=r"Unknown unnorm_key 'robto'.*\['other', 'robot'\]"):
        ActionStats.from_norm_stats(two, "robto")
    with pytest.raises(KeyError, match="no action statistics"):
        ActionStats.from_norm_stats(None, "robot")
    with pytest.raises(KeyError, match="no 'proprio' statistics"):
        ActionStats.from_norm_stats(NORM_STATS, entry="proprio")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q99": [0.5, 4.0, 2.0]}, "lengths differ"),
        ({"mask": [True]}, "lengths differ"),
        ({"mask": ["True", "True", "True", "False"]}, "mask must hold true and false"),
        ({"q01": [0.6, 0.0, 2.0, 0.0]}, r"wrong order in dims \[0\]"),
        ({"q01": [float("nan"), 0.0, 2.0, 0.0]}, "must be finite"),
    ],
)
def test_bad_statistics_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        stats(**changes)


@pytest.mark.parametrize("method", ["normalize", "unnormalize"])
def test_bad_actions_raise(method):
    with pytest.raises(ValueError, match="for 4 action dims"):
        getattr(stats(), method)([0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="must be finite, got nan"):
        getattr(stats(), method)([0.0, np.nan, 0.0, 0.0])
