"""Milliseconds per action: ways to act side by side in one process, by stage, and how far they are from the floor.

openvla bench                                                       # 293 M parameters, random weights
openvla bench --quick --plot speed.png
openvla bench --threads 1 --ways original eager drafts compiled --json speed.json --plot speed.png
openvla bench --size 7b --dtype bfloat16 --device cuda              # nothing is downloaded
openvla bench --size 7b --dtype bfloat16 --batch 1 2 4 8 16 32 64   # one policy for a fleet of robots
openvla bench --ways heads                                          # chunks of 8, two cameras: every head
openvla bench --model openvla/openvla-7b --dtype bfloat16
openvla bench --from speed.json --plot speed.png                    # the same tables, drawn again

Ways: original (generate() with the head over all positions, images resized per tower), generate (ours), eager
(predict_action), draft (with the right answer as a draft), draft-K (K tokens of it right), compiled, compiled-draft,
graphs, graphs-draft (CUDA graphs); of chunks: token-parallel, l1, l1-original, flow, flow-bidirectional, diffusion,
diffusion-prefix. Groups: tokens, drafts, heads.

Ways take turns; a ratio is the median over rounds of baseline to way, with quartiles ("policy": without
preprocessing). Those that choose the same tokens must do so, or the run fails. Stages come from rounds of their own.
The floor is what the work takes at the bandwidth and the matrix products that this machine is seen to do before and
after (`evaluate/bench_floor.py`); preprocessing has none, and is left out of "x floor".
"""

import contextlib
import copy
import json
import logging
import os
import shlex
import statistics
import sys
from pathlib import Path

from openvla.cli import command_parser
from openvla.evaluate.bench_clock import (
    STAGES,
    compare,
    make_clock,
    measure_rounds,
    measure_stages,
    peak_memory,
    summarize,
)
from openvla.evaluate.bench_floor import action_work, floor_milliseconds
from openvla.evaluate.bench_machine import best_of, describe_machine, measure_ceilings
from openvla.evaluate.bench_policies import (
    ACTION_DIM,
    INSTRUCTION,
    PROPRIO_DIM,
    SIZES,
    UNNORM_KEY,
    bench_config,
    observe,
    random_policy,
    random_processor,
)
from openvla.evaluate.bench_report import tell
from openvla.evaluate.bench_ways import HEAD_WAYS, TOKEN_WAYS, Scene, build_ways, check_agreement, name_ways

DTYPES = ("float32", "bfloat16", "float16")
DRAFTS = [f"draft-{right}" for right in range(ACTION_DIM)]
GROUPS = {"tokens": list(TOKEN_WAYS), "drafts": DRAFTS, "heads": ["eager", *HEAD_WAYS]}
USUAL = ["original", "generate", "eager", "draft"]


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.plot:
        import matplotlib  # noqa: F401  # before the measurement, not after
    if args.source:
        result = json.loads(Path(args.source).read_text(encoding="utf-8"))
    else:
        result = {"command": shlex.join(["openvla", "bench", *argv]), **measure(args)}
    if args.json:
        write(args.json, json.dumps(result, indent=1).encode())
    print(tell(result))
    if args.plot:
        from openvla.evaluate.bench_plot import draw

        write(args.plot, draw(result))


def parse(argv: list[str]):
    """The arguments, with those that depend on others settled."""
    parser = command_parser("bench", __doc__)
    parser.add_argument(
        "--ways", nargs="+", metavar="WAY", help="which; default: the first four, on CUDA all of tokens"
    )
    parser.add_argument(
        "--against", metavar="WAY", help="what ratios are to; default: original, eager, l1 or the first"
    )
    parser.add_argument("--size", choices=SIZES, help="of a policy with random weights; default: mid (293 M)")
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a checkpoint instead")
    parser.add_argument("--unnorm-key", metavar="KEY", help="its statistics; default: the first")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="ROBOTS", help="observations at once")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--chunk", type=int, help="steps of a chunk; default: 1, with heads 8, of a model its own")
    parser.add_argument("--cameras", type=int, help="default: 1, with heads 2, of a model its own")
    parser.add_argument("--repeats", type=int, help="rounds; default: 15, with heads 3")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before that are not counted")
    parser.add_argument("--quick", action="store_true", help="tiny, 3 rounds, unless told otherwise")
    parser.add_argument("--device", help="cuda, cpu, …; default: cuda if there is one")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's choice")
    parser.add_argument("--json", metavar="FILE", help="write the result")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it (needs matplotlib)")
    parser.add_argument("--from", dest="source", metavar="FILE", help="a result to show again instead of measuring")
    args = parser.parse_args(argv)
    if args.source:
        return args
    args.size = args.size or ("tiny" if args.quick else "mid")
    if min(*args.batch, 1 if args.repeats is None else args.repeats) < 1 or args.warmup < 0:
        given = f"{args.batch}, {args.repeats}, {args.warmup}"
        raise ValueError(f"--batch and --repeats must be from 1 and --warmup from 0; got {given}.")
    args.ways = settle_ways(args)
    with_heads = any(name in HEAD_WAYS for name in args.ways)
    if args.against not in (None, *args.ways):
        raise ValueError(f"--against must be one of the ways {args.ways}, got {args.against!r}.")
    args.against = args.against or next((name for name in ("original", "l1") if name in args.ways), args.ways[0])
    args.repeats = args.repeats or (3 if args.quick or with_heads else 15)
    if args.model:
        if with_heads:
            raise ValueError("Heads are compared with random weights: leave out --model, or these ways.")
        args.size = None
        return args
    args.chunk, args.cameras = args.chunk or (8 if with_heads else 1), args.cameras or (2 if with_heads else 1)
    args.proprio = PROPRIO_DIM if with_heads else 0
    return args


def settle_ways(args) -> list[str]:
    """Names of ways, groups resolved."""
    if args.ways is None:
        if len(args.batch) > 1:
            return ["eager", "draft"]
        import torch

        on_gpu = (args.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
        return GROUPS["tokens"] if on_gpu else USUAL
    names = [name for given in args.ways for name in GROUPS.get(given, [given])]
    known = name_ways(ACTION_DIM)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"Unknown ways {unknown}; there are {sorted(known)} and the groups {sorted(GROUPS)}.")
    return list(dict.fromkeys(names))


# --- Measuring -------------------------------------------------------------------------------------------------------
def measure(args) -> dict:
    """All runs: one per type and batch size."""
    import torch
    from tqdm import tqdm

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this torch ({torch.__version__}) sees no GPU.")
    if args.threads:
        torch.set_num_threads(args.threads)
    result = {**describe_machine(device), "settings": settings_of(args), "runs": []}
    turns = len(args.dtype) * len(args.batch) * len(args.ways) * turns_of_a_way(args)
    with tqdm(total=turns, unit="turn", disable=not sys.stderr.isatty()) as bar, _quiet():
        for name in args.dtype:
            policy, make_processor, key = find_policy(args, getattr(torch, name), device)
            for batch in args.batch:
                run = measure_run(args, policy, make_processor, key, batch, bar)
                result["runs"].append({"dtype": name, "batch": batch, "parameters": policy.num_parameters(), **run})
    return result


def find_policy(args, dtype, device: str):
    """A policy, a function that gives everybody who asks a processor of their own, and whose statistics to use."""
    if not args.model:
        fields = {"action_chunk": args.chunk, "num_cameras": args.cameras, "proprio_dim": args.proprio}
        return random_policy(bench_config(args.size, **fields), dtype, device), random_processor, UNNORM_KEY
    from openvla.loading import load_onto

    policy, processor = load_onto(device, args.model, dtype=dtype, action_chunk=args.chunk, num_cameras=args.cameras)
    key = args.unnorm_key or next(iter(policy.norm_stats or {}), None)
    return policy, lambda config: copy.copy(processor), key


@contextlib.contextmanager
def _quiet():
    """A trained policy would rather not act on noise: that need not be said at every turn."""
    logger = logging.getLogger("openvla.modeling_openvla")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def measure_run(args, policy, make_processor, unnorm_key: str, batch: int, bar) -> dict:
    """One batch size in one type."""
    import torch

    config, device = policy.config, str(policy.device)
    now = make_clock(device)
    states = [[0.5] * config.proprio_dim] * batch if config.proprio_dim else None
    dim = policy.get_action_dim(unnorm_key)
    noise = torch.randn(batch, config.action_chunk, dim, generator=torch.Generator().manual_seed(0))
    scene = Scene(INSTRUCTION, observe(batch, config.num_cameras), states, unnorm_key, noise)

    # 1. The same actions, the ceilings, and what need not be counted
    ways, skipped = build_ways(args.ways, policy, make_processor, scene)
    bar.total -= len(skipped) * turns_of_a_way(args)
    if not ways:
        return {"ways": [], "skipped": skipped}
    agreement = check_agreement(ways, policy, scene)
    lengths = {name: way.prepare()["input_ids"].shape[1] for name, way in ways.items()}
    seconds = 0.05 if args.quick else 0.3
    about = (device, policy.dtype, batch * max(lengths.values()), config.text_config, now, seconds)
    before = measure_ceilings(*about)
    measure_rounds(ways, args.warmup, now, bar.update)
    memory = {}
    for name, way in ways.items():
        memory[name] = peak_memory(lambda way=way: way.act(way.prepare()), device)
        bar.update()

    # 2. The clock; then, as looking at them takes time, the stages
    times = measure_rounds(ways, args.repeats, now, bar.update)
    stages = {}
    for name, way in ways.items():
        stages[name] = measure_in_stages(way, now, stage_rounds(args))
        bar.update(stage_rounds(args))
    after = measure_ceilings(*about)
    ceilings = best_of(before, after)

    # 3. What it says
    against = args.against if args.against in ways else next(iter(ways))
    rows = []
    for name, way in ways.items():
        split, passes = stages[name]
        itemsize = policy.lm_head.weight.element_size()
        work = action_work(way.policy.config, batch, lengths[name], itemsize, way.drafted, passes, dim)
        row = {
            "way": name,
            "what": way.what,
            **describe_times(times[name], times[against], batch * way.policy.config.action_chunk),
            "compile_seconds": way.compile_seconds,
            "stages_ms": split,
            "passes": passes,
            "prompt_tokens": lengths[name],
            "peak_memory_mib": memory[name],
            "floor_ms": floor_milliseconds(work, ceilings),
            **agreement.get(name, {}),
            "samples_ms": times[name],
        }
        row["times_floor"] = row["policy_ms"]["p50"] / row["floor_ms"]["total"]
        rows.append(rounded(row))
    seen = {"before": before, "after": after, "best": ceilings}
    return {"against": against, "ceilings": rounded(seen), "ways": rows, "skipped": skipped}


def describe_times(samples: list, baseline: list, num_actions: int) -> dict:
    """Of turns `(preparing, acting)` in milliseconds, and those of the baseline in the same rounds."""
    whole, base = ([sum(pair) for pair in pairs] for pairs in (samples, baseline))
    acting, base_acting = ([pair[1] for pair in pairs] for pairs in (samples, baseline))
    milliseconds = summarize(whole)
    return {
        "ms": milliseconds,
        "policy_ms": summarize(acting),
        "hz": 1e3 / milliseconds["p50"],
        "actions_per_second": 1e3 * num_actions / milliseconds["p50"],
        "times_as_fast": compare(base, whole),
        "policy_times_as_fast": compare(base_acting, acting),
    }


def stage_rounds(args) -> int:
    return max(args.repeats // 3, 1)


def turns_of_a_way(args) -> int:
    return args.warmup + 1 + args.repeats + stage_rounds(args)  # the one is for memory


def measure_in_stages(way, now, rounds: int) -> tuple[dict | None, int]:
    """Medians of the stages, and the number of passes; None for ways whose stages are one."""
    if way.passes_of is None:
        return None, way.act(way.prepare()).get("passes", 1)
    found = [measure_stages(way, now) for _ in range(rounds)]
    return {stage: statistics.median(split[stage] for split, _ in found) for stage in STAGES}, found[0][1]


def settings_of(args) -> dict:
    names = ("model", "size", "dtype", "batch", "ways", "chunk", "cameras", "repeats", "warmup", "quick")
    return {name: getattr(args, name) for name in names}


def rounded(value):
    """Numbers to five digits, however deep."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write(path: str, content: bytes) -> None:
    """Writes a file whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path + ".tmp", "wb") as file:
        file.write(content)
    os.replace(path + ".tmp", path)
