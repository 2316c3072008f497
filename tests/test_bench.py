"""The benchmark: whose turn it is, what a clock that is told the time makes of it, whole runs of a small policy."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from openvla.cli import main as cli
from openvla.evaluate import bench
from openvla.evaluate.bench_clock import (
    STAGES,
    compare,
    make_clock,
    measure_rounds,
    measure_stages,
    order_of_round,
    peak_memory,
    summarize,
)
from openvla.evaluate.bench_plot import draw
from openvla.evaluate.bench_policies import UNNORM_KEY, bench_config, observe, random_policy, random_processor
from openvla.evaluate.bench_report import tell
from openvla.evaluate.bench_ways import Scene, build_ways


@pytest.fixture(autouse=True)
def one_thread():
    """Two would wait for each other on a machine that has something else to do, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- The clock -------------------------------------------------------------------------------------------------------
def test_ways_take_turns():
    assert ["".join(order_of_round(["a", "b"], turn)) for turn in range(4)] == ["ab", "ba", "ba", "ab"]
    orders = ["".join(order_of_round(list("abc"), turn)) for turn in range(6)]
    assert orders == ["abc", "cba", "bca", "acb", "cab", "bac"]  # everybody follows everybody, and is at every place


def slow_and_fast():
    """A clock, and ways that take their time by it: one acts twice as long as the other; both get slower by turns."""
    clock = SimpleNamespace(now=0.0, turns=[])

    def way(name: str, seconds: float):
        def prepare():
            clock.turns.append(name)
            clock.now += 0.5
            return {"turn": len(clock.turns)}

        def act(inputs: dict):
            clock.now += seconds * (1 + (inputs["turn"] - 1) // 2)

        return SimpleNamespace(prepare=prepare, act=act)

    return clock, {"slow": way("slow", 2.0), "fast": way("fast", 1.0)}


def test_twice_the_time_is_half_the_speed():
    clock, ways = slow_and_fast()
    done = []
    times = measure_rounds(ways, 3, lambda: clock.now, lambda: done.append(1))
    assert times == {
        "slow": [(500.0, 2000.0), (500.0, 4000.0), (500.0, 6000.0)],
        "fast": [(500.0, 1000.0), (500.0, 2000.0), (500.0, 3000.0)],
    }
    assert clock.turns == ["slow", "fast", "fast", "slow", "fast", "slow"] and len(done) == 6
    found = bench.describe_times(times["fast"], times["slow"], num_actions=8)
    assert found["policy_times_as_fast"] == {"median": 2.0, "quartiles": [2.0, 2.0]}
    assert found["times_as_fast"]["median"] == pytest.approx(4500 / 2500)
    assert found["ms"]["p50"] == 2500.0 and found["policy_ms"]["p50"] == 2000.0
    assert found["hz"] == 0.4 and found["actions_per_second"] == 3.2


def test_percentiles():
    assert summarize([float(value) for value in range(100, 0, -1)]) == {
        "min": 1.0,
        "mean": 50.5,
        "p50": 50.5,
        "p95": pytest.approx(95.05),
        "p99": pytest.approx(99.01),
    }
    assert compare([10.0, 30.0, 90.0], [10.0, 10.0, 10.0]) == {"median": 3.0, "quartiles": [2.0, 6.0]}


def test_stages_add_up():
    """By a clock that goes on by a second each time somebody looks: towers, projector, seven passes, the end."""
    policy = random_policy(bench_config("tiny"), torch.float32, "cpu")
    scene = Scene("pick up the cup", observe(1, 1), None, UNNORM_KEY, None)
    (way,) = build_ways(["eager"], policy, random_processor, scene)[0].values()
    seconds = iter(range(100))
    stages, passes = measure_stages(way, lambda: next(seconds))
    # 0 start, 1 prepared, 2 towers, 3 projected, 4 first pass, 5 to 10 the others, 11 the end; 1 to detokenise
    assert stages == dict(zip(STAGES, [1000.0, 1000.0, 2000.0, 6000.0, 1000.0])) and passes == 7
    modules = (policy.model.projector, policy.model, policy.model.vision_backbone.featurizer)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_call():
    large = peak_memory(lambda: bytearray(b"x" * (200 * 2**20)), "cpu")
    small = peak_memory(lambda: None, "cpu")
    assert small + 190 < large < small + 1000  # and what a call before has needed is forgotten


def test_the_clock_of_the_cpu_is_the_plain_one():
    now = make_clock("cpu")
    assert now() <= now()


# --- Whole runs ------------------------------------------------------------------------------------------------------
def test_a_run_is_told_written_and_drawn(tmp_path, capsys):
    out, picture = tmp_path / "new" / "speed.json", tmp_path / "speed.png"
    ways = ["original", "eager", "draft-3", "graphs"]
    command = ["bench", "--quick", "--repeats", "2", "--warmup", "0", "--ways", *ways]
    cli([*command, "--json", str(out), "--plot", str(picture)])
    told = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["command"].startswith("openvla bench --quick --repeats 2") and result["versions"]["torch"]
    assert result["settings"]["size"] == "tiny" and result["hardware"]["device"] == "cpu"
    (run,) = result["runs"]
    assert (run["dtype"], run["batch"], run["against"]) == ("float32", 1, "original")
    assert run["parameters"] == 9_268_288 and list(run["skipped"]) == ["graphs"]
    rows = {row["way"]: row for row in run["ways"]}
    assert {name: row["passes"] for name, row in rows.items()} == {"original": 7, "eager": 7, "draft-3": 4}
    for name, row in rows.items():
        assert row["prompt_tokens"] == 1 + 256 + 33 + 1 and len(row["samples_ms"]) == 2
        assert tuple(row["stages_ms"]) == STAGES and min(row["stages_ms"].values()) >= 0
        assert row["differing_tokens"] == 0 and (row["peak_memory_mib"] or 100) > 50
        whole = [sum(pair) for pair in row["samples_ms"]]
        assert row["ms"]["p50"] == pytest.approx(sum(whole) / 2, rel=1e-3)
        assert row["ms"]["min"] == pytest.approx(min(whole), rel=1e-3)
        assert row["hz"] == row["actions_per_second"] == pytest.approx(1e3 / row["ms"]["p50"], rel=1e-3)
        floor = row["floor_ms"]
        assert floor["total"] == pytest.approx(floor["vision"] + floor["prefill"] + floor["decode"], rel=1e-3)
        assert row["times_floor"] == pytest.approx(row["policy_ms"]["p50"] / floor["total"], rel=1e-3)
        assert f"\n{name} " in told
    assert rows["original"]["times_as_fast"] == {"median": 1.0, "quartiles": [1.0, 1.0]}
    best, seen = run["ceilings"]["best"], [run["ceilings"][name] for name in ("before", "after")]
    assert best["copy_gb_s"] == max(each["copy_gb_s"] for each in seen)
    assert picture.read_bytes().startswith(b"\x89PNG") and not list(tmp_path.rglob("*.tmp"))

    again = tmp_path / "again.png"
    cli(["bench", "--from", str(out), "--plot", str(again)])
    assert capsys.readouterr().out == told and again.read_bytes().startswith(b"\x89PNG")


def test_fleets_and_types(tmp_path, capsys):
    out = tmp_path / "fleet.json"
    command = ["bench", "--quick", "--repeats", "1", "--warmup", "0", "--ways", "eager", "--batch", "1", "3"]
    cli([*command, "--dtype", "float32", "bfloat16", "--json", str(out), "--plot", str(tmp_path / "fleet.png")])
    result = json.loads(out.read_text())
    assert [(run["dtype"], run["batch"]) for run in result["runs"]] == [
        ("float32", 1),
        ("float32", 3),
        ("bfloat16", 1),
        ("bfloat16", 3),
    ]
    row = result["runs"][1]["ways"][0]
    assert row["actions_per_second"] == pytest.approx(3 * row["hz"], rel=1e-3)
    floors = [
        run["ways"][0]["floor_ms"]["total"] * run["ceilings"]["best"]["matmul_gflop_s"] for run in result["runs"]
    ]
    assert floors[1] > 1.5 * floors[0]
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in told[-4:]] == [
        ["bfloat16", "eager", "1"],
        ["bfloat16", "eager", "3"],
        ["float32", "eager", "1"],
        ["float32", "eager", "3"],
    ]
    assert draw(result) == (tmp_path / "fleet.png").read_bytes()


def test_heads_are_compared_with_l1(tmp_path):
    out = tmp_path / "heads.json"
    command = ["bench", "--quick", "--repeats", "1", "--warmup", "0", "--chunk", "2", "--cameras", "1"]
    cli([*command, "--ways", "token-parallel", "l1", "l1-original", "flow", "--json", str(out)])
    (run,) = json.loads(out.read_text())["runs"]
    rows = {row["way"]: row for row in run["ways"]}
    assert run["against"] == "l1" and rows["l1"]["times_as_fast"]["median"] == 1.0
    assert {name: row["passes"] for name, row in rows.items()} == {
        "token-parallel": 1,
        "l1": 1,
        "l1-original": 1,
        "flow": 11,
    }
    assert rows["l1"]["actions_per_second"] == pytest.approx(2 * rows["l1"]["hz"], rel=1e-3)
    assert rows["l1"]["prompt_tokens"] == 1 + 256 + 1 + 33 + 1  # the state is one


def test_a_checkpoint_is_measured_with_its_own_processor(checkpoint, tmp_path, capsys):
    out = tmp_path / "own.json"
    command = ["bench", "--model", str(checkpoint), "--repeats", "1", "--warmup", "0", "--ways", "original", "eager"]
    cli([*command, "--json", str(out)])
    result = json.loads(out.read_text())
    assert result["settings"]["model"] == str(checkpoint) and result["settings"]["size"] is None
    assert [row["passes"] for row in result["runs"][0]["ways"]] == [7, 7]
    assert "preferred a token that is not an action" not in capsys.readouterr().err


def test_groups_and_defaults():
    args = bench.parse(["--ways", "drafts", "eager", "draft-6"])
    assert args.ways == [*(f"draft-{right}" for right in range(7)), "eager"] and args.against == "draft-0"
    assert (args.size, args.repeats, args.chunk, args.cameras, args.proprio) == ("mid", 15, 1, 1, 0)
    args = bench.parse(["--ways", "heads", "--quick"])
    assert (args.size, args.repeats, args.chunk, args.cameras, args.proprio) == ("tiny", 3, 8, 2, 8)
    assert args.ways[0] == "eager" and len(args.ways) == 8 and args.against == "l1"
    assert bench.parse(["--device", "cpu"]).ways == ["original", "generate", "eager", "draft"]
    assert bench.parse(["--device", "cuda"]).ways == bench.GROUPS["tokens"]
    assert bench.parse(["--batch", "1", "64"]).ways == ["eager", "draft"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--ways", "eagre"], r"Unknown ways \['eagre'\]; there are \['compiled'"),
        (["--ways", "eager", "--against", "draft"], r"--against must be one of the ways \['eager'\], got 'draft'"),
        (["--batch", "0"], "--batch and --repeats must be from 1"),
        (["--repeats", "0"], "--batch and --repeats must be from 1"),
        (["--ways", "l1", "--model", "x"], "random weights"),
    ],
)
def test_what_cannot_be_measured_is_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        bench.parse(argv)


def test_ways_without_stages_are_told_and_drawn(tmp_path):
    """Compiled ways on a machine that is not this one: bars of one colour, no memory, terabytes per second."""
    floor = {"vision": 0.4, "prefill": 4.0, "decode": 16.0, "total": 20.4}
    ms = {"min": 30.0, "mean": 33.0, "p50": 32.0, "p95": 40.0, "p99": 41.0}
    ratio = {"median": 3.5, "quartiles": [3.4, 3.6]}
    row = {"way": "graphs", "what": "", "ms": ms, "policy_ms": ms, "hz": 31.25, "actions_per_second": 31.25}
    row |= {"times_as_fast": ratio, "policy_times_as_fast": ratio, "stages_ms": None, "passes": 7}
    row |= {"compile_seconds": 93.2}
    row |= {"peak_memory_mib": None, "floor_ms": floor, "times_floor": 1.57}
    row |= {"differing_tokens": 2, "largest_margin": 0.01, "samples_ms": [[2.0, 30.0]], "prompt_tokens": 275}
    best = {"copy_gb_s": 4300.0, "matvec_gb_s": 4100.0, "matmul_gflop_s": 790e3, "matmul_shape": [275, 4096, 11008]}
    run = {"dtype": "bfloat16", "batch": 1, "parameters": 7_498_156_704, "against": "original", "ways": [row]}
    run |= {"ceilings": {"best": best}, "skipped": {"compiled": "for a reason"}}
    result = {"settings": {"model": None, "size": "7b", "batch": [1]}, "runs": [run]}
    result["hardware"] = {"device": "cuda", "name": "NVIDIA H200", "threads": 8}
    told = tell(result)
    assert told.startswith("7b, random weights, 7,498 M parameters, NVIDIA H200\n")
    assert "graphs: 2 tokens differ, at most 0.01 of the logits' spread apart" in told
    assert "\nseconds to compile: graphs 93\n" in told
    assert "3.5 (3.4 to 3.6)" in told and told.endswith("skipped: compiled (for a reason)")
    assert draw(result).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(result | {"runs": [run | {"ways": []}]})
