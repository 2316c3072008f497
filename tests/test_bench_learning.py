"""The comparison of how fast heads learn, on a folder of two short episodes."""

import pytest

pytest.importorskip("trl")
from test_readers import write_folder

from openvla.evaluate import bench_learning
from openvla.finetune import statistics


@pytest.mark.slow
def test_every_head_gets_its_row(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(statistics, "CACHE", tmp_path / "cache")
    data = write_folder(tmp_path / "my_robot")
    command = ["--data", str(data), "--processor", str(checkpoint), "--chunk", "2", "--batch-size", "2"]
    command += ["--steps", "l1=4", "flow=8", "--out", str(tmp_path / "runs")]
    bench_learning.main(command)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("l1 ", "flow "))]
    assert [row[0] for row in rows] == ["l1", "flow"]
    assert [each.rstrip(":") for each in rows[0][2::2]] == ["1", "2", "3", "4"]
    assert [each.rstrip(":") for each in rows[1][2::2]] == ["2", "4", "6", "8"]
    assert all(0 < float(score) < 2 for row in rows for score in row[3::2])
    with pytest.raises(ValueError, match="exists: choose another --out"):
        bench_learning.main(command)
