"""The clock of the heads: what it compares acts alike, and every way is in the result."""

import json

import numpy as np
import pytest
import torch

from openvla.evaluate import bench_heads


def test_the_originals_way_gives_the_same_actions(oft_policy, oft_recorded, oft_golden):
    from test_oft import KEY, cameras_of

    model, processor = oft_policy()
    entry = oft_recorded["inputs"][0]
    inputs = processor(entry["prompt"], cameras_of(oft_golden, 0), entry["state"])
    proprio = model._normalize_proprio(inputs["proprio"], KEY)
    one = {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"], "proprio": proprio}
    with torch.no_grad():
        found = bench_heads.as_the_original(model, one)
    np.testing.assert_allclose(found[0], entry["normalized_fp32"], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_all_ways_are_measured(tmp_path, capsys):
    out = tmp_path / "heads.json"
    bench_heads.main(["--size", "tiny", "--repeats", "1", "--cameras", "1", "--chunk", "2", "--json", str(out)])
    result = json.loads(out.read_text())
    rows = {row["way"]: row for row in result["ways"]}
    assert list(rows) == list(bench_heads.WAYS)
    assert rows["l1"]["times_l1"] == 1.0
    assert all(row["ms_per_action"] == pytest.approx(row["ms_per_chunk"] / 2, abs=0.01) for row in rows.values())
    told = capsys.readouterr().out
    assert "1 cameras, chunks of 2" in told and all(way in told for way in rows)
