"""A 7-DoF arm asks a policy server over openpi's websocket protocol; `pip install websockets msgpack numpy pillow`.

openvla serve . --unnorm-key libero_spatial &
python examples/robot_over_websocket.py --instruction "pick up the black bowl on the stove and place it on the plate"
python examples/robot_over_websocket.py --url "wss://gpu.local:8000/?unnorm_key=bridge_orig" --token secret

With openpi's own client it is shorter: WebsocketClientPolicy("127.0.0.1", 8000).infer({"observation/image": …}).
"""

import argparse
import time

import msgpack
import numpy as np
from fake_arm import FakeArm
from websockets.sync.client import connect

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--url", default="ws://127.0.0.1:8000")
arguments.add_argument("--token")
arguments.add_argument("--instruction", default="pick up the black bowl on the stove and place it on the plate")
arguments.add_argument("--steps", type=int, default=40)
arguments.add_argument("--rate", type=float, help="of them a second, if the policy does not say")
args = arguments.parse_args()


def pack_array(array: np.ndarray) -> dict:
    return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}


def unpack_array(content: dict):
    if b"__ndarray__" not in content:
        return content
    return np.frombuffer(content[b"data"], content[b"dtype"]).reshape(content[b"shape"])


def receive(server) -> dict:
    frame = server.recv(timeout=30)
    if isinstance(frame, str):  # the server says what was wrong; there is no action
        raise RuntimeError(frame)
    return msgpack.unpackb(frame, object_hook=unpack_array)


headers = {"Authorization": f"Api-Key {args.token}"} if args.token else None
with connect(args.url, compression=None, max_size=None, additional_headers=headers) as server:
    policy = receive(server)
    arm, slowest = FakeArm(policy, args.rate), 0.0
    while len(arm.done) < args.steps:
        seen = arm.observe(args.instruction)
        observation = {"images": seen["images"], "prompt": seen["instruction"]}
        observation |= {"observation/state": seen["proprio"]} if "proprio" in seen else {}
        start = time.monotonic()
        server.send(msgpack.packb(observation, default=pack_array))
        chunk = receive(server)["actions"]
        slowest = max(slowest, time.monotonic() - start)
        for action in chunk[: args.steps - len(arm.done)]:
            arm.move(action)
print(f"{args.steps} steps; the slowest answer took {1000 * slowest:.0f} ms")
print("last action:", dict(zip((dim["name"] for dim in policy["action_dims"]), arm.done[-1].round(4).tolist())))
