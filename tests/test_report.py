import json

import pytest
from PIL import Image

from openvla.evaluate.report import card_entries, draw_summary, format_table, summarize, wilson_interval, write_json
from openvla.hub_upload.model_card import read_evaluation


def episode(task: int, number: int, success: bool, steps: int, restarts: int = 0) -> dict:
    spent = {"render": 0.05 * steps, "physics": 0.02 * steps}
    line = {"task": task, "episode": number, "success": success, "steps": steps, "instruction": f"do {task}"}
    return {**line, "cpu_seconds": spent, "seconds": 1.0, "restarts": restarts, "replaced": 0}


EPISODES = [episode(1, 0, True, 100), episode(0, 1, False, 220, 1), episode(0, 0, True, 80), episode(1, 1, True, 100)]


@pytest.mark.parametrize(
    "successes, trials, low, high",  # Newcombe 1998 (Statistics in Medicine 17), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_refuses_what_cannot_be():
    for successes, trials in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="successes"):
            wilson_interval(successes, trials)


def test_summary_counts_by_task_and_together():
    summary = summarize(EPISODES)
    assert [(task["task"], task["successes"], task["episodes"]) for task in summary["tasks"]] == [(0, 1, 2), (1, 2, 2)]
    assert summary["success_rate"] == 0.75 and summary["mean_steps"] == 125
    assert summary["interval"] == list(wilson_interval(3, 4))
    assert summary["cpu_ms_per_step"] == pytest.approx({"physics": 20, "render": 50})
    assert summary["restarts"] == 1 and summary["accepted_per_draft"] is None
    drafted = [{**line, "drafts": 10, "accepted": 13} for line in EPISODES[:2]] + [{**EPISODES[2], "drafts": 5}]
    assert summarize(drafted)["accepted_per_draft"] == 26 / 25
    assert "which drafts the next: 1.04" in format_table("libero_goal", summarize(drafted))
    assert summarize(reversed(EPISODES)) == summary


def test_the_summary_tells_what_failed_and_all_that_was_asked():
    asked = {**episode(0, 2, False, 220), "instruction": "do 3"}
    (first, second) = summarize([*EPISODES, asked])["tasks"]
    assert (first["instruction"], first["failed"]) == ("do 0 | do 3", [1, 2])
    assert (second["instruction"], second["failed"]) == ("do 1", [])


def test_the_table_shows_counts_and_intervals():
    table = format_table("libero_goal", summarize(EPISODES)).splitlines()
    assert "1/2  50.0%" in table[1] and "9.5% – 90.5%" in table[1] and table[1].endswith("150")
    assert "3/4  75.0%" in table[3] and table[-1].endswith("run again: 1")


def test_the_model_card_takes_the_entries(tmp_path):
    write_json(tmp_path / "evaluation.json", card_entries("libero_goal", summarize(EPISODES), "openvla evaluate x"))
    (entry,) = read_evaluation(tmp_path / "evaluation.json")
    assert (entry["dataset"], entry["metric"], entry["value"]) == ("libero_goal", "success_rate", 0.75)
    assert entry["episodes"] == 4 and json.dumps(entry)


def test_the_picture_shows_each_task(tmp_path):
    draw_summary(tmp_path / "summary.png", "a policy", summarize(EPISODES))
    image = Image.open(tmp_path / "summary.png").convert("RGB")
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {(0x2A, 0x9D, 0x8F), (0x26, 0x46, 0x53), (0xE7, 0x6F, 0x51)} <= colours
    assert list(tmp_path.iterdir()) == [tmp_path / "summary.png"]
