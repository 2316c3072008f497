"""What a benchmark ran on, and what that is seen to do: bandwidth and matrix products."""

import datetime
import os
import platform
import subprocess
import time
from pathlib import Path

LARGE = 256  # MiB: more than any cache holds
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve")


def describe_machine(device: str) -> dict:
    """When, with what, on what."""
    import numpy
    import PIL
    import torch
    import transformers

    import openvla

    cpu = {"name": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if os.path.exists("/proc/cpuinfo"):
        facts = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        facts = {name.strip(): value.strip() for name, value in facts.items()}
        flags = (facts.get("flags") or facts.get("Features") or "").split()
        cpu |= {"name": facts.get("model name", cpu["name"]), "flags": [flag for flag in FLAGS if flag in flags]}
    hardware = {"device": device, "name": cpu["name"], "cpu": cpu, "threads": torch.get_num_threads()}
    hardware["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if device.startswith("cuda"):
        hardware["float32_products"] = torch.get_float32_matmul_precision()  # "highest": no TF32
        gpu = torch.cuda.get_device_properties(device)
        hardware |= {
            "name": gpu.name,
            "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    versions = {"openvla": openvla.__version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "numpy": numpy.__version__, "pillow": PIL.__version__}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": find_commit(Path(openvla.__file__).parent),
        "versions": versions,
        "hardware": hardware,
    }


def find_commit(folder: Path) -> str | None:
    """The commit that a checkout is at, "+" if it has been changed since; None elsewhere."""
    if not (folder / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(folder)]
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout of somebody else's
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def measure_ceilings(device: str, dtype, tokens: int, text, now, seconds: float = 0.3, mebibytes: int = LARGE) -> dict:
    """The best of many runs: copying (read and written), reading a matrix for one vector, and the fastest of the
    prompt's matrix products.

    Args:
        tokens: rows of those products, B·L.
        text: configuration of the language model.
        now: seconds, when the device has done all its work.
        seconds: to spend on each.
    """
    import torch

    from openvla.linear_layers import linear

    hidden, mlp, made = text.hidden_size, text.intermediate_size, {"dtype": dtype, "device": device}
    size = mebibytes * 2**20 // torch.empty((), dtype=dtype).element_size()
    source, vector = torch.ones(size, **made), torch.ones(1, 4096, **made)  # zeros would all be one page of memory
    target, matrix, rates = torch.empty_like(source), source.view(-1, 4096), {}
    with torch.no_grad():
        copy = 2 * source.nbytes / best_seconds(lambda: target.copy_(source), seconds, now)
        matvec = source.nbytes / best_seconds(lambda: linear(vector, matrix), seconds, now)
        for inner, outer in ((hidden, hidden), (hidden, mlp), (mlp, hidden)):
            rows, weight = torch.ones(tokens, inner, **made), torch.ones(outer, inner, **made)
            product = best_seconds(lambda rows=rows, weight=weight: linear(rows, weight), seconds, now)
            rates[tokens, inner, outer] = 2.0 * tokens * inner * outer / product
    shape = max(rates, key=rates.get)
    return {
        "copy_gb_s": copy * 1e-9,
        "matvec_gb_s": matvec * 1e-9,
        "matmul_gflop_s": rates[shape] * 1e-9,
        "matmul_shape": list(shape),
    }


def best_seconds(run, seconds: float, now=time.perf_counter) -> float:
    """The shortest time of a call. Short ones are timed several at once: waiting for a device counts little then."""
    run()
    start = now()
    run()
    calls = max(int(0.005 / max(now() - start, 1e-7)), 1)
    best, until = float("inf"), now() + seconds
    while best == float("inf") or now() < until:
        start = now()
        for _ in range(calls):
            run()
        best = min(best, (now() - start) / calls)
    return best


def best_of(*ceilings: dict) -> dict:
    """Of measurements at several times, the highest of each."""
    best = {name: max(each[name] for each in ceilings) for name in ("copy_gb_s", "matvec_gb_s")}
    fastest = max(ceilings, key=lambda each: each["matmul_gflop_s"])
    return {**best, "matmul_gflop_s": fastest["matmul_gflop_s"], "matmul_shape": fastest["matmul_shape"]}
