"""The reading benchmark compares contents bit by bit, and takes ratios over pairs of the same work."""

import json

import numpy as np
import pytest

from openvla.evaluate import bench_reading


def items(**change) -> list[dict]:
    fields = {"action": np.float32([1, 2]), "image": np.full((2, 2, 3), 7, np.uint8), "text": "go"}
    return [dict(fields), fields | change]


def test_differences_are_zero_only_for_the_same_bits():
    same = bench_reading.differences(items(), items())
    assert same == {key: {"max": 0.0, "mean": 0.0} for key in ("action", "image", "text")}
    assert bench_reading.must_agree(same, []) == "all 3 fields bit-identical"
    pixels = np.full((2, 2, 3), 7, np.uint8)
    pixels[0, 0] = 1
    found = bench_reading.differences(items(image=pixels), items())
    assert found["image"] == {"max": 6.0, "mean": 0.75}  # 3 of 12 values by 6, in one of two items
    expected = "2 fields bit-identical; pixels differ by 6 of 255 at most, 0.750 on average"
    assert bench_reading.must_agree(found, ["image"]) == expected
    with pytest.raises(RuntimeError, match=r"other values of \['image'\]"):
        bench_reading.must_agree(found, [])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text": "stop"}, "Item 1: text is 'go' here, 'stop' there"),
        ({"action": np.float64([1, 2])}, r"action is float32 \(2,\) here, float64 \(2,\) there"),
        ({"state": np.zeros(2)}, "Item 1 has the fields"),
    ],
)
def test_what_cannot_be_compared_raises(change, message):
    with pytest.raises(ValueError, match=message):
        bench_reading.differences(items(), items(**change))
    with pytest.raises(ValueError, match="2 items here, 1 there"):
        bench_reading.differences(items(), items()[:1])


def test_sides_alternate_and_ratios_are_of_pairs():
    calls = []

    def answer(name: str, seconds: float):
        def ask(number: int) -> dict:
            calls.append(name)
            return {"seconds": seconds * (number + 1), "cpu": seconds, "steps": 10, "checksum": number}

        return ask

    pairs = bench_reading.alternate(answer("ours", 0.5), answer("theirs", 1.0), 3)
    assert calls == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    row = bench_reading.summarize(pairs)
    assert row["times_as_fast"] == {"median": 2.0, "quartiles": [2.0, 2.0]} and row["times_less_cpu"] == 2.0
    assert (row["ours_per_s"], row["theirs_per_s"], row["rounds"]) == (10.0, 5.0, 3)  # the middle round: 1 s and 2 s
    pairs[0][1]["checksum"] = 5
    with pytest.raises(ValueError, match="Not the same steps"):
        bench_reading.summarize(pairs)


def test_a_process_answers_with_the_content_of_the_dataset(tmp_path):
    """Our side as the benchmark runs it, down to the checksum of the actions."""
    from test_readers import INSTRUCTIONS, LENGTHS, actions, states, write_rlds

    with bench_reading.Side(bench_reading.sys.executable, "our-rlds", str(write_rlds(tmp_path / "my_robot"))) as side:
        assert side.about["steps"] == sum(LENGTHS) and side.about["camera"] == "front"
        everything = np.concatenate([actions(0), actions(1)])
        for what in ("fields", "camera"):
            answer = side.ask(what=what)
            assert answer["steps"] == len(everything)
            assert answer["checksum"] == int(everything.view(np.uint32).sum(dtype=np.uint64))
        last = side.items(what="camera")[-1]
        np.testing.assert_array_equal(last["state"], states(1)[-1])
        assert last["text"] == INSTRUCTIONS[1].encode() and last["image"].shape == (32, 48, 3)
    assert side.process.returncode == 0


def test_items_pass_between_environments_unchanged():
    values = [np.arange(6, dtype=np.uint8).reshape(2, 3), np.float32([0.1, -2]), np.array(True)]
    values += [b"\x00\xff", "go", 1.5, [b"a", b"\x80"], None]
    for value in values:
        again = bench_reading._unpack(json.loads(json.dumps(bench_reading._pack(value))))
        assert type(again) is type(value) and np.array_equal(again, value)
        if isinstance(value, np.ndarray):
            assert again.dtype == value.dtype and again.shape == value.shape
