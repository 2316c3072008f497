"""Each finding on data made to have it, with its numbers; clean data have none; reports are whole and escaped."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from test_readers import WRITERS

from openvla import cli
from openvla.finetune import inspection
from openvla.finetune import survey as survey_module
from openvla.finetune.steps import Episode

EPISODES, STEPS = 12, 20
SKIP = object()  # stands for an episode that cannot be read


class Reader:
    """Clean data in memory, to be spoiled: seven dims, noise for images."""

    name, fps = "robot", 5.0

    def __init__(self, episodes: int = EPISODES, steps: int = STEPS, dims: int = 7):
        random = np.random.default_rng(0)
        self.cameras = ["front", "wrist"]
        self.actions = [random.uniform(-0.1, 0.1, (steps, dims)).astype(np.float32) for _ in range(episodes)]
        for actions in self.actions:
            actions[:, -1] = np.arange(steps) < steps // 2  # open, then closed
        self.proprio = [np.zeros((steps, 8), np.float32) for _ in range(episodes)]
        self.instructions = [["open the drawer", "pick up the cup"][number % 2] for number in range(episodes)]
        self.images = {}  # (episode, camera, step) -> what to give instead

    def __len__(self):
        return len(self.actions)

    def read(self, index):
        if self.actions[index] is SKIP:
            raise KeyError("actions")

        def image(camera, step):
            given = self.images.get((index, camera, step), self.images.get((index, camera)))
            if isinstance(given, Exception):
                raise given
            seed = [index, step, self.cameras.index(camera)]
            return np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8) if given is None else given

        spoken = [self.instructions[index]] * len(self.actions[index])
        return Episode(f"file {index}", spoken, self.actions[index], self.proprio[index], image)


def inspect(reader, mask=None, frames=EPISODES):
    """The one finding there is, or None."""
    findings = survey_module.find(survey_module.survey(reader, mask, frames, progress=False))
    assert len(findings) < 2, findings
    return findings[0] if findings else None


def named(reader, **options) -> dict:
    """Findings by title."""
    data = survey_module.survey(reader, **options, progress=False)
    return {finding.title: finding for finding in survey_module.find(data)}


def check(finding, severity, title, *details, episodes=()):
    assert (finding.severity, finding.title) == (severity, title)
    assert all(detail in finding.detail for detail in details), finding.detail
    assert finding.episodes == list(episodes) and finding.advice


def test_clean_data_have_no_findings():
    assert inspect(Reader()) is None
    positions = Reader(dims=14)  # not deltas: the same position again would be no motion
    assert inspect(positions) is None


# --- Episodes --------------------------------------------------------------------------------------------------------
def test_bad_episodes_are_listed_and_the_others_inspected():
    reader = Reader(episodes=15)
    reader.actions[3][7, 2], reader.actions[5][0, 0] = np.nan, np.inf
    reader.actions[4] = reader.actions[4][:, :6]
    reader.actions[6] = SKIP
    reader.proprio[8] = reader.proprio[8][:-1]
    data = survey_module.survey(reader, progress=False)
    assert sorted(data.actions) == [0, 1, 2, 7, 9, 10, 11, 12, 13, 14]
    found = {finding.title: finding for finding in survey_module.find(data)}
    assert len(found) == 4
    check(found["NaN or infinite values"], "problem", "NaN or infinite values", "2 of 15", episodes=[3, 5])
    assert found["NaN or infinite values"].lines[0] == "file 3: action is nan at step 7, dim 2."
    assert found["differing action sizes"].lines == ["file 4: 6 action dims where earlier episodes have 7."]
    assert found["unreadable episodes"].lines == ["episode 6: KeyError: 'actions'"]
    assert found["inconsistent episodes"].lines == ["file 8: 19 states for 20 actions."]


def test_nothing_usable():
    reader = Reader(episodes=2)
    reader.actions = [SKIP, SKIP]
    found = named(reader)
    assert set(found) == {"unreadable episodes", "few episodes"}
    assert all(finding.severity == "problem" for finding in found.values())


def test_few_and_short_episodes():
    check(inspect(Reader(episodes=9)), "warning", "few episodes", "9 usable")
    reader = Reader()
    reader.actions[2], reader.proprio[2] = reader.actions[2][:9], reader.proprio[2][:9]
    check(inspect(reader), "warning", "short episodes", "1 of 12 have fewer than 10", episodes=[2])


def test_differing_state_sizes():
    reader = Reader()
    reader.proprio[1], reader.proprio[4] = None, reader.proprio[4][:, :6]
    details = ("8 in 10 episodes", "none in 1 episodes", "6 in 1 episodes")
    check(inspect(reader), "problem", "differing state sizes", *details, episodes=[1, 4])


def test_duplicates():
    reader = Reader()
    reader.actions[7] = reader.actions[9] = reader.actions[1].copy()
    reader.actions[8] = reader.actions[2].copy()
    check(inspect(reader), "warning", "duplicate episodes", "3 of 12", episodes=[7, 8, 9])
    assert inspect(reader).lines == ["episodes 1 = 7 = 9", "episodes 2 = 8"]
    reader.actions[8][0, 0] += 1e-6
    assert inspect(reader).episodes == [7, 9]


def test_instructions():
    reader = Reader()
    reader.instructions[3] = " "
    check(inspect(reader), "problem", "empty instructions", "1 of 12", episodes=[3])
    reader.instructions[3] = "Pick up  the cup."
    check(inspect(reader), "warning", "instructions spelled differently", "2 spellings of 1", episodes=[3])
    assert inspect(reader).lines == ["'pick up the cup' (5) = 'Pick up  the cup.' (1)"]
    reader.instructions[3] = "pick up the cups"
    assert inspect(reader) is None


# --- Actions ---------------------------------------------------------------------------------------------------------
def test_idle_steps():
    reader = Reader()
    reader.actions[0][:6, :6] = 0.0  # the gripper stays open
    reader.actions[5][5:15, :6] = 0.0  # ten, but in one of them it closes
    check(inspect(reader), "warning", "idle steps", "6.2% (15 of 240)", episodes=[0, 5])
    half_a_bin = 0.2 / 255 / 2
    reader.actions[0][:6, 0], reader.actions[5][5:15, 0] = 0.9 * half_a_bin, -0.9 * half_a_bin
    check(inspect(reader), "warning", "idle steps", "6.2% (15 of 240)", episodes=[0, 5])
    reader.actions[0][:6, 0] = 1.1 * half_a_bin
    assert inspect(reader) is None  # 9 of 240 are 3.75 %


def test_idle_steps_of_positions_are_repeated_ones():
    reader = Reader(dims=8)
    reader.actions[2][:] = reader.actions[2][0]
    check(inspect(reader), "warning", "idle steps", "7.9% (19 of 240)", episodes=[2])


def test_constant_dims():
    reader = Reader()
    for actions in reader.actions:
        actions[:, 3], actions[:, 4] = 0.0, 0.25
    check(inspect(reader), "warning", "constant dims", "roll = 0, pitch = 0.25")
    reader = Reader()
    for actions in reader.actions:
        actions[:, 6] = 1.0  # always open, not normalised: trained as 0, which closes it
    check(inspect(reader), "problem", "lost constants", "gripper = 1")
    stats = survey_module.survey(reader, progress=False).stats
    assert stats.unnormalize(stats.normalize(reader.actions[0]))[0, 6] == 0.0
    assert inspect(reader, mask=[True] * 7).title == "constant dims"
    for actions in reader.actions:
        actions[:, 6] = 0.0
    check(inspect(reader), "warning", "constant dims", "gripper = 0")


def test_nearly_constant_dims():
    reader = Reader()
    for actions in reader.actions:
        actions[:, 5] = 0.0
    reader.actions[4][3, 5] = 0.1
    check(inspect(reader), "problem", "nearly constant dims", "yaw: 0.42% of the values differ", episodes=[4])
    data = survey_module.survey(reader, progress=False)
    np.testing.assert_array_equal(data.stats.unnormalize(data.stats.normalize(reader.actions[4]))[:, 5], 0.0)


def test_values_outside_the_bins_of_dims_that_are_not_normalised():
    reader = Reader()
    reader.actions[1][:3, 2], reader.actions[6][0, 2] = 1.01, -2.0
    mask = [True, True, False, True, True, True, False]
    finding = inspect(reader, mask)
    check(finding, "problem", "values outside the 256 bins", "action 2: 1.67% of the values", episodes=[1, 6])
    reader.actions[1][:3, 2], reader.actions[6][0, 2] = 1.0, -1.0
    assert inspect(reader, mask) is None


def test_heavy_tails():
    reader = Reader()
    reader.actions[9][4, 1] = 1.0
    finding = inspect(reader)
    check(finding, "warning", "heavy tails", episodes=[9])
    low, high = np.quantile(np.concatenate(reader.actions)[:, 1].astype(np.float64), [0.01, 0.99])
    assert finding.detail.endswith(f": y {(1.0 - (low + high) / 2) / ((high - low) / 2):.1f}")
    reader.actions[9][4, 1] = 0.25
    assert inspect(reader) is None


def test_clipped_episodes():
    reader = Reader(episodes=100)
    reader.actions[8][:6, 0] = -0.12  # 30 % of the episode, 0.3 % of all
    check(inspect(reader), "warning", "clipped episodes", "1 of 100", "at most 30%", episodes=[8])
    reader.actions[8][:1, 0] = 0.0
    assert inspect(reader) is None  # 25 %


def gripper(reader, open_value, closed_value):
    for actions in reader.actions:
        actions[:, 6] = np.where(actions[:, 6] == 1.0, open_value, closed_value)
    return reader


def test_gripper_convention():
    libero = gripper(Reader(), -1.0, 1.0)
    details = ("values in [-1, 1], not 1 = open", "12 of 12 episodes begin near -1")
    check(inspect(libero), "problem", "gripper convention", *details)
    check(inspect(gripper(Reader(), 0.08, 0.0)), "problem", "gripper convention", "[0, 0.08]", "0 of 12")
    check(inspect(gripper(Reader(), 85.0, 0.0)), "problem", "gripper convention", "[0, 85]")
    assert inspect(gripper(Reader(), 0.9, 0.1)) is None


def test_gripper_that_may_be_inverted():
    reader = gripper(Reader(), 0.0, 1.0)
    finding = inspect(reader)
    check(finding, "warning", "gripper may be inverted", "12 of 12 episodes begin near 0", episodes=range(12))
    assert "heuristic" in finding.advice
    for actions in reader.actions[:6]:
        actions[0, 6] = 1.0
    assert inspect(reader) is None  # half of them


def test_description_of_the_gripper():
    def describe(reader):
        data = survey_module.survey(reader, progress=False)
        return inspection.describe(data, [])["gripper"]

    assert describe(Reader()) == "binary in [0, 1], begins in the upper half in 12 of 12 episodes"
    reader = Reader()
    for actions in reader.actions:
        actions[:, 6] = np.linspace(0, 1, STEPS)
    assert describe(reader) == "continuous in [0, 1], begins in the upper half in 0 of 12 episodes"
    assert describe(Reader(dims=14)) == ""


@pytest.mark.parametrize("fps, fires", [(None, False), (5, False), (10, False), (4.9, True), (50, True)])
def test_control_rate(fps, fires):
    reader = Reader()
    reader.fps = fps
    for actions in reader.actions[:1]:
        actions[:6, :6] = 0.7 * 0.2 / 255  # 6 of 240 move, but less than a bin
    finding = inspect(reader)
    assert (finding is not None) == fires
    if fires:
        check(finding, "warning", "control rate", f"{fps:g} Hz", "2.5% of the steps move less than a bin")


# --- Frames ----------------------------------------------------------------------------------------------------------
def test_broken_frames():
    reader = Reader()
    reader.images[4, "front", 10] = OSError("image file is truncated")
    finding = inspect(reader)
    check(finding, "problem", "undecodable frames", "front: 1 of 36 sampled frames", episodes=[4])
    assert finding.lines == ["file 4, front, step 10: image file is truncated"]


def test_black_frames_hurt_more_in_the_camera_that_is_trained_on():
    reader = Reader()
    reader.images[4, "front"] = np.full((24, 32, 3), 3, np.uint8)
    check(inspect(reader), "problem", "black or flat frames", "front: 3 of 36", episodes=[4])
    reader.images = {(4, "wrist"): np.full((24, 32, 3), [200, 10, 90], np.uint8)}  # flat, too
    check(inspect(reader), "warning", "black or flat frames", "wrist: 3 of 36", episodes=[4])


def test_frozen_camera():
    reader = Reader()
    still = np.random.default_rng(1).integers(0, 256, (24, 32, 3), np.uint8)
    reader.images[7, "front"] = still
    check(inspect(reader), "problem", "frozen frames", "front: 3 of 36", episodes=[7])
    reader.images[7, "front", 19] = 255 - still
    assert inspect(reader) is None


def test_differing_resolutions():
    reader = Reader()
    reader.images[3, "wrist"] = np.random.default_rng(1).integers(0, 256, (24, 30, 3), np.uint8)
    reader.images[3, "wrist", 0] = 255 - reader.images[3, "wrist"]
    finding = inspect(reader)
    check(finding, "warning", "differing resolutions", "wrist: 3 of 36", episodes=[3])
    assert finding.lines == ["32×24: 33 frames", "30×24: 3 frames"]


def test_sample_of_frames_is_bounded_and_seeded():
    looked = [survey_module.survey(Reader(episodes=40), frames=5, progress=False).frames for _ in range(2)]
    assert looked[0] == looked[1] and len(looked[0]) == 5 * 2 * 3
    assert [frame.step for frame in looked[0][:3]] == [0, 10, 19]
    kept = {frame.episode for frame in looked[0] if frame.thumbnail}
    assert len(kept) == survey_module.SHOWN
    assert survey_module.survey(Reader(), frames=0, progress=False).frames == []


# --- The command -----------------------------------------------------------------------------------------------------
class Page(HTMLParser):
    """Checks that tags close in order, and collects text and images."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.images, self.tags = [], "", [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def write_folder(folder, reader):
    for number in range(len(reader)):
        episode, place = reader.read(number), folder / f"episode_{number:03d}"
        for camera in reader.cameras:
            (place / camera).mkdir(parents=True)
            for step in range(len(episode)):
                Image.fromarray(episode.image(camera, step)).save(place / camera / f"{step:03d}.png")
        about = {"instruction": reader.instructions[number], "fps": reader.fps}
        (place / "episode.json").write_text(json.dumps(about))
        np.savez(place / "episode.npz", actions=episode.actions, proprio=episode.proprio)
    return folder


def test_command_on_a_folder_with_damaged_files(tmp_path, capsys):
    reader = Reader()
    reader.instructions[2] = "<script>alert('$x$')</script> & more"
    folder = write_folder(tmp_path / "my_robot", reader)
    npz = folder / "episode_001" / "episode.npz"
    npz.write_bytes(npz.read_bytes()[:300])
    (folder / "episode_005" / "wrist" / "004.png").unlink()
    cli.main(["data", "inspect", str(folder), "--out", str(tmp_path / "new" / "report"), "--frames", "10"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "my_robot",
        "  episodes      12, 10 of them usable",
        "  steps         200, per episode 20 to 20, median 20",
    ]
    assert "5 × 'open the drawer'" in [line.strip() for line in lines]
    assert "problem   unreadable episodes: 2 of 12 episodes" in lines and lines[-1] == "1 problem"
    assert any("episode 1: " in line for line in lines)
    assert any("episode_005/wrist holds 19 images for 20 actions" in line for line in lines)

    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["report.html", "report.png"]
    page = Page((tmp_path / "new" / "report.html").read_text())
    assert "script" not in page.tags and "<script>alert('$x$')</script> & more" in page.text
    assert "holds 19 images" in page.text and "unreadable episodes" in page.text
    assert len(page.images) == 1 + 2 * 3 * survey_module.SHOWN
    pngs = [np.asarray(decoded(source)) for source in page.images]
    np.testing.assert_array_equal(pngs[0], np.asarray(Image.open(tmp_path / "new" / "report.png")))
    assert pngs[1].shape == (24, 32, 3)


def decoded(source: str) -> Image.Image:
    head, _, data = source.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_json_and_strict(tmp_path, capsys):
    reader = gripper(Reader(), -1.0, 1.0)
    folder = write_folder(tmp_path / "my_robot", reader)
    with pytest.raises(SystemExit) as stop:
        cli.main(["data", "inspect", str(folder), "--json", "--strict", "--name", "other"])
    assert stop.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert found["name"] == "other" and found["episodes"] == found["usable_episodes"] == 12
    assert found["length"] == {"min": 20, "median": 20.0, "max": 20} and found["fps"] == 5.0
    assert found["cameras"] == {"front": ["32×24"], "wrist": ["32×24"]} and found["state_sizes"] == [8]
    assert found["instructions"] == {"open the drawer": 6, "pick up the cup": 6}
    assert [finding["title"] for finding in found["findings"]] == ["gripper convention"]
    everything = np.concatenate(reader.actions).astype(np.float64)
    low, high = np.quantile(everything, [0.01, 0.99], axis=0)
    np.testing.assert_allclose([dim["bin"] for dim in found["dims"]], (high - low) / 255)
    outside = ((everything < low) | (everything > high)).mean(axis=0)
    np.testing.assert_allclose([dim["clipped"] for dim in found["dims"]], outside)
    write_folder(tmp_path / "clean", Reader())
    cli.main(["data", "inspect", str(tmp_path / "clean"), "--strict"])
    assert capsys.readouterr().out.splitlines()[-1] == "nothing will hurt"


def test_command_without_a_usable_episode(tmp_path, capsys):
    folder = write_folder(tmp_path / "my_robot", Reader(episodes=1))
    (folder / "episode_000" / "episode.npz").unlink()
    cli.main(["data", "inspect", str(folder), "--out", str(tmp_path / "report.html")])
    assert capsys.readouterr().out.splitlines()[-1] == "2 problems"
    assert Page((tmp_path / "report.html").read_text()).images == []
    assert not (tmp_path / "report.png").exists()


@pytest.mark.parametrize("format", WRITERS)
def test_every_format(format, tmp_path, capsys):
    cli.main(["data", "inspect", str(WRITERS[format](tmp_path / "my_robot")), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["usable_episodes"] == 2 and found["steps"] == 8 and found["state_sizes"] == [8]
    assert list(found["cameras"].values()) == [["48×32"], ["48×32"]]
    titles = [finding["title"] for finding in found["findings"]]
    assert titles.count("black or flat frames") == 2  # the readers' tests draw flat colours
    assert "few episodes" in titles and "short episodes" in titles and "undecodable frames" not in titles


def test_a_histogram_per_dim(tmp_path):
    for dims in (1, 7, 14):
        reader = Reader(dims=dims)
        reader.actions[0][0, 0] = 50.0  # a heavy tail must not squeeze the rest
        reader.actions[0][:, dims - 1] = 0.5
        picture = Image.open(io.BytesIO(inspection.draw_histograms(survey_module.survey(reader, progress=False))))
        assert picture.width > 300 and len(np.unique(np.asarray(picture.convert("L")))) > 10


def test_reports_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_bytes(b"old")

    def fail(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(inspection.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        inspection.write(tmp_path / "report.html", b"new")
    assert (tmp_path / "report.html").read_bytes() == b"old"
