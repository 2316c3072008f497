"""Who goes when, and what the clock says: rounds in which every way has its turn, their stages, their memory."""

import os
import time
from collections.abc import Callable

STAGES = ("preprocessing", "vision", "prefill", "decode", "detokenise")


def make_clock(device: str) -> Callable[[], float]:
    """Seconds, when the device has done all that it was told to."""
    if not device.startswith("cuda"):
        return time.perf_counter
    import torch

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def order_of_round(names: list[str], turn: int) -> list[str]:
    """Backwards every other round, and every second round somebody else first: nobody always follows the same one."""
    first = turn // 2 % len(names)
    order = [*names[first:], *names[:first]]
    return order[::-1] if turn % 2 else order


def measure_rounds(
    ways: dict, rounds: int, now: Callable[[], float], done: Callable[[], None] = lambda: None
) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds of preparing and of acting, of every way in every round.

    Args:
        ways: name -> `Way` (of it `prepare` and `act`).
        now: seconds.
        done: called after each turn.
    """
    times = {name: [] for name in ways}
    for turn in range(rounds):
        for name in order_of_round(list(ways), turn):
            start = now()
            inputs = ways[name].prepare()
            ready = now()
            ways[name].act(inputs)
            times[name].append((1e3 * (ready - start), 1e3 * (now() - ready)))
            done()
    return times


def summarize(milliseconds: list[float]) -> dict[str, float]:
    """Least, mean, and percentiles (between two measurements: in proportion)."""
    import numpy as np

    percentiles = {f"p{share}": float(np.percentile(milliseconds, share)) for share in (50, 95, 99)}
    return {"min": min(milliseconds), "mean": float(np.mean(milliseconds)), **percentiles}


def compare(baseline: list[float], way: list[float]) -> dict:
    """How many times as fast a way is as the baseline in the same round: median and quartiles."""
    import numpy as np

    low, median, high = np.percentile(np.divide(baseline, way), (25, 50, 75))
    return {"median": float(median), "quartiles": [float(low), float(high)]}


def measure_stages(way, now: Callable[[], float]) -> tuple[dict[str, float], int]:
    """Milliseconds of each of `STAGES` in one turn of a way, and how many passes its language model took.

    Vision: from the first tower's begin to the projector's end. Prefill: all else up to the end of the first pass,
    packing the prompt included. Decode: all from there to the actions, heads included. Detokenising is timed alone.
    """
    marks = {"towers": [], "projected": [], "passed": []}

    def note(name: str):
        return lambda *_: marks[name].append(now())

    backbone, projector = way.policy.model.vision_backbone, way.policy.model.projector
    hooks = [
        backbone.featurizer.register_forward_pre_hook(note("towers")),
        projector.register_forward_hook(note("projected")),
        way.passes_of.register_forward_hook(note("passed")),
    ]
    try:
        start = now()
        inputs = way.prepare()
        ready = now()
        found = way.act(inputs)
        end = now()
    finally:
        for hook in hooks:
            hook.remove()
    detokenise = best_time(lambda: way.detokenise(found), now)
    vision, first = marks["projected"][-1] - marks["towers"][0], marks["passed"][0]
    seconds = (ready - start, vision, first - ready - vision, end - first - detokenise, detokenise)
    return {stage: 1e3 * each for stage, each in zip(STAGES, seconds)}, len(marks["passed"])


def best_time(run: Callable[[], object], now: Callable[[], float], times: int = 5) -> float:
    """Seconds of the fastest of some calls."""
    taken = []
    for _ in range(times):
        start = now()
        run()
        taken.append(now() - start)
    return min(taken)


def peak_memory(run: Callable[[], object], device: str) -> float | None:
    """MiB that a call needs at its peak, all that lay there before included: of the GPU what torch has allocated, of
    the CPU what the whole process holds. None where the system does not tell."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) / 2**20
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    with open("/proc/self/clear_refs", "w") as file:  # 5: forget the peak so far
        file.write("5")
    run()
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
