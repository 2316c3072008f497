import json
import subprocess
import sys

import numpy as np
import pytest

from openvla import cli
from openvla.action_tokenizer import name_action_dims


@pytest.fixture
def picture(images, tmp_path):
    images[0].save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def predict(checkpoint, picture, *options):
    instruction = "pick up the black bowl between the plate and the ramekin and place it on the plate"
    cli.main(["predict", "--model", str(checkpoint), "--image", picture, "--instruction", instruction, *options])


def test_predict_prints_a_table(checkpoint, picture, recorded, capsys):
    predict(checkpoint, picture, "--unnorm-key", "bridge_orig")
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(maxsplit=2) for line in lines[3:]]
    assert [row[0] for row in rows] == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    assert [row[2] for row in rows] == ["m"] * 3 + ["rad"] * 3 + ["1 = open"]
    expected = recorded["inputs"][0]["actions"]["bridge_orig"]
    np.testing.assert_allclose([float(row[1]) for row in rows], expected, atol=5e-7)


def test_predict_prints_json(checkpoint, picture, recorded, capsys):
    predict(checkpoint, picture, "--unnorm-key", "toy_nomask_6d", "--json", "--dtype", "float32", "--device", "cpu")
    answer = json.loads(capsys.readouterr().out)
    assert answer["action"] == recorded["inputs"][0]["actions"]["toy_nomask_6d"]
    assert answer["token_ids"] == recorded["inputs"][0]["action_ids"][:6] and not any(answer["replaced"])
    assert answer["dims"][0] == ["action 0", ""]


def test_errors_are_one_line_with_what_to_do(checkpoint, picture):
    with pytest.raises(SystemExit, match=r"openvla predict: unnorm_key is needed.*\['bridge_orig'"):
        predict(checkpoint, picture)
    with pytest.raises(SystemExit, match="openvla predict: .*nowhere.png"):
        predict(checkpoint, "nowhere.png", "--unnorm-key", "bridge_orig")
    with pytest.raises(KeyError):
        predict(checkpoint, picture, "--traceback")


@pytest.mark.parametrize("verb, hint", [("predict", ""), ("upload", "; run the same command again to go on")])
def test_ctrl_c_ends_in_one_line(verb, hint, monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"{cli.COMMANDS[verb][0]}.main", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main([verb])
    assert stop.value.code == 130 and capsys.readouterr().err == f"openvla {verb}: stopped{hint}\n"
    with pytest.raises(KeyboardInterrupt):
        cli.main([verb, "--traceback"])


def test_usage(capsys):
    cli.main([])
    printed = capsys.readouterr().out
    assert all(command in printed for command in cli.COMMANDS)
    with pytest.raises(SystemExit, match="unknown command 'predcit'"):
        cli.main(["predcit"])
    for command in cli.COMMANDS.keys() - {"finetune"}:  # whose parser is TRL's
        with pytest.raises(SystemExit) as stop:
            cli.main([*command.split(), "--help"])
        assert stop.value.code == 0 and f"openvla {command}" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    script = "import sys\nfrom openvla import cli\ntry:\n cli.main(['predict', '--help'])\nexcept SystemExit: pass\n"
    script += "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_names_of_action_dims(model):
    stats = {"viola": {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}}}
    assert name_action_dims(stats, "viola")[0] == ("x", "dataset units")
    assert name_action_dims(stats, "viola")[-1] == ("gripper", "1 = open")
    stats["robot"] = stats["viola"]  # whose seven numbers may be joints, and 1 closed
    assert name_action_dims(stats, "robot")[0] == ("x?", "dataset units")
    assert name_action_dims(stats, "robot")[-1] == ("gripper?", "")
    stats["libero_spatial"] = {"action": {**stats["viola"]["action"], "q01": [0.0] * 6 + [-1.0]}}
    assert name_action_dims(stats, "libero_spatial")[-1] == ("gripper?", "")  # raw LIBERO's sign: 1 is closed
    stats["robot"]["action"]["mask"] = [True] * 7
    assert name_action_dims(stats, "robot")[6] == ("action 6", "")
    stats["robot"]["action"] |= {"names": list("abcdefg"), "units": ["rad"] * 7}
    assert name_action_dims(stats, "robot")[1] == ("b", "rad")
