"""Load on policy servers, one after the other in one run: every client checks that its answers are its own.

python benchmarks/serving/measure.py --servers openvla original litserve ray --seconds 60 --clients 32
python benchmarks/serving/measure.py runs/my-robot --unnorm-key my_robot

The checkpoint takes one picture; without one, the recorded policy of the tests serves, its weights scaled up so that
what it sees matters. Every client has a picture and an
instruction of its own, asks again as soon as it is answered, and compares with what `predict_action` says. Reports per
server answers per second, milliseconds (median and 99th percentile), mean batch, and answers that were lost or
another's; and for one client alone the milliseconds that serving adds to preprocessing and `predict_action`, in turn.
"""

import argparse
import asyncio
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
WARM = 3.0  # seconds of load before counting begins


def command(name: str, checkpoint: str, key: str, port: int) -> list[str]:
    """How a server is started, by the interpreter that runs this."""
    openvla = [sys.executable, "-m", "openvla.cli"]
    return {
        "openvla": [
            *openvla,
            "serve",
            checkpoint,
            "--unnorm-key",
            key,
            "--port",
            str(port),
            "--no-check",
            "--no-clamp",
        ],
        "original": [sys.executable, str(HERE / "original.py"), checkpoint, key, str(port)],
        "litserve": [sys.executable, str(HERE / "lit.py"), checkpoint, key, str(port)],
        "ray": [sys.executable, str(HERE / "fleet.py"), checkpoint, key, str(port)],
    }[name]


def make_checkpoint() -> str:
    """The recorded policy of the tests with larger weights, so that noise matters to it; in a temporary folder."""
    import torch

    import openvla

    sys.path.insert(0, str(HERE.parents[1] / "tests" / "fixtures"))
    from assemble import assemble

    folder = Path(tempfile.mkdtemp())
    assemble(folder / "recorded")
    model = openvla.OpenVLAForActionPrediction.from_pretrained(folder / "recorded", dtype=torch.float32)
    tokenizer = model.action_tokenizer
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight *= 6 if ".layers." in name else 3 if "projector" in name else 1
        model.get_input_embeddings().weight *= 5
        model.lm_head.weight[: tokenizer.vocab_start] *= 0.01
        model.lm_head.weight[tokenizer.vocab_end :] *= 0.01
    model.save_pretrained(folder / "alive")
    openvla.OpenVLAProcessor.from_pretrained(folder / "recorded").save_pretrained(folder / "alive")
    return str(folder / "alive")


def make_requests(checkpoint: str, key: str, count: int) -> tuple[list[bytes], np.ndarray, object]:
    """A body per client, as the original's clients send it; the actions `(count, A)`; the policy and what it saw."""
    from openvla.serve.policy import OpenVLAPolicy
    from openvla.serve.wire import write_json_numpy

    policy = OpenVLAPolicy.from_pretrained(checkpoint, key, dtype="float32", device="cpu")
    rng, bodies, expected, observations = np.random.default_rng(0), [], [], []
    for _ in range(20 * count):
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = np.repeat(np.repeat(coarse, 32, 0), 32, 1)  # 256 x 256
        instruction = f"pick up object {len(bodies)}"
        inputs = policy.processor(policy.processor.build_prompt(instruction), picture)
        action = policy.model.predict_action(**inputs, unnorm_key=key)
        if any((action == other).all() for other in expected):
            continue  # or answers that are mixed up would go unnoticed
        bodies.append(json.dumps({"image": write_json_numpy(picture), "instruction": instruction}).encode())
        observations.append({"images": picture, "instruction": instruction})
        expected.append(action)
        if len(bodies) == count:
            break
    else:
        raise ValueError(f"{checkpoint} has only {len(bodies)} different actions for {20 * count} pictures of noise.")
    return bodies, np.array(expected), (policy, observations)


class Connection:
    """HTTP/1.1 that is kept open, and no more: the generator shares the machine with the server."""

    def __init__(self, port: int):
        self.port = port

    async def open(self) -> "Connection":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def ask(self, body: bytes) -> tuple[int, bytes]:
        head = ["POST /act HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        self.writer.write("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        await self.writer.drain()
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        content = await self.reader.readexactly(int(headers["content-length"]))
        return int(lines[0].split()[1]), content


def read_action(content: bytes) -> np.ndarray:
    from openvla.serve.wire import read_json

    answer = read_json(content)
    return (read_json(answer) if isinstance(answer, str) else answer).reshape(-1)  # the original's is encoded twice


async def load(port: int, bodies: list[bytes], expected: np.ndarray, seconds: float) -> dict:
    """All clients at once."""
    times, others, lost = [], 0, 0
    begin = time.perf_counter() + WARM
    end = begin + seconds

    async def client(index: int) -> None:
        nonlocal others, lost
        connection = await Connection(port).open()
        while (start := time.perf_counter()) < end:
            try:
                status, content = await connection.ask(bodies[index])
            except (OSError, asyncio.IncompleteReadError):
                lost += 1
                connection = await Connection(port).open()
                continue
            finish = time.perf_counter()
            if status != 200:
                lost += 1
                continue
            if not np.allclose(read_action(content), expected[index], atol=1e-9):
                others += 1
                continue
            if begin <= finish <= end:
                times.append(finish - start)

    await asyncio.gather(*(client(index) for index in range(len(bodies))))
    p50, p99 = (float(np.percentile(times, share)) * 1000 for share in (50, 99))
    return {"answers_per_s": len(times) / seconds, "p50_ms": p50, "p99_ms": p99, "others": others, "lost": lost}


async def alone(port: int, bodies: list[bytes], scene, key: str, rounds: int) -> dict:
    """One client; in turn with the same through the model in this process."""
    policy, observations = scene
    connection, served, bare = await Connection(port).open(), [], []
    for index in range(rounds):
        start = time.perf_counter()
        status, _ = await connection.ask(bodies[index % len(bodies)])
        assert status == 200
        middle = time.perf_counter()
        observation = observations[index % len(bodies)]
        inputs = policy.processor(policy.processor.build_prompt(observation["instruction"]), observation["images"])
        policy.model.predict_action(**inputs, unnorm_key=key)
        served.append(middle - start)
        bare.append(time.perf_counter() - middle)
    served, bare = 1000 * np.array(served[10:]), 1000 * np.array(bare[10:])
    added = served - bare
    return {
        "one_client_p50_ms": float(np.median(served)),
        "bare_p50_ms": float(np.median(bare)),
        "added_p50_ms": float(np.median(added)),
        "added_quartiles_ms": [float(value) for value in np.percentile(added, (25, 75))],
    }


def count_batches(port: int) -> tuple[float, float]:
    """Observations and batches so far, of a server that counts them; else zeros."""
    try:
        lines = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode().splitlines()
    except OSError:
        return 0.0, 0.0
    values = dict(line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return tuple(float(values.get(f"openvla_batch_size_{name}", 0)) for name in ("sum", "count"))


def measure(name: str, args, bodies: list[bytes], expected: np.ndarray, scene) -> dict:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command(name, args.checkpoint, args.unnorm_key, port), stdout=log, stderr=log)
        try:
            asyncio.run(wait_until_it_acts(process, port, bodies[0]))
            single = asyncio.run(alone(port, bodies, scene, args.unnorm_key, args.rounds))
            before = count_batches(port)
            loaded = asyncio.run(load(port, bodies, expected, args.seconds))
            observations, batches = np.subtract(count_batches(port), before)
            return single | loaded | {"mean_batch": observations / batches if batches else None}
        except (AssertionError, TimeoutError):
            log.seek(0)
            print(log.read().decode()[-5000:], file=sys.stderr)
            raise
        finally:
            process.terminate()
            process.wait(60)


async def wait_until_it_acts(process, port: int, body: bytes) -> None:
    for _ in range(240):
        assert process.poll() is None, "the server ended"
        try:
            status, _ = await (await Connection(port).open()).ask(body)
            if status == 200:
                return
        except (OSError, asyncio.IncompleteReadError, KeyError):
            pass
        await asyncio.sleep(0.5)
    raise TimeoutError("the server does not act")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("checkpoint", nargs="?", help="folder or Hub id; default: the tests' policy")
    arguments.add_argument("--unnorm-key", default="bridge_orig")
    arguments.add_argument("--servers", nargs="+", default=["openvla", "original", "litserve", "ray"])
    arguments.add_argument("--clients", type=int, default=32)
    arguments.add_argument("--seconds", type=float, default=60.0)
    arguments.add_argument("--rounds", type=int, default=200, help="of one client alone")
    arguments.add_argument("--json", type=Path, help="where the results go")
    args = arguments.parse_args()

    import torch
    import transformers

    args.checkpoint = args.checkpoint or make_checkpoint()
    bodies, expected, scene = make_requests(args.checkpoint, args.unnorm_key, args.clients)
    kinds = len(np.unique(expected.round(9), axis=0))
    print(f"{args.clients} clients, {kinds} different actions, {len(bodies[0]) / 1000:.0f} kB per request")
    found = {}
    for name in args.servers:
        found[name] = measure(name, args, bodies, expected, scene)
        print(name, json.dumps(found[name]), flush=True)
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    report = {
        "command": " ".join(["python", *sys.argv]),
        "commit": revision,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "clients": args.clients,
        "different_actions": kinds,
        "seconds": args.seconds,
        "servers": found,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
