"""The vla-evaluation-harness' protocol 1: benchmarks ask for one action per step, over a websocket.

MessagePack {"type", "payload", "seq", "timestamp"}: a hello is answered with what the policy takes and gives, every
observation with one action; between the ends of a chunk the policy is not asked. The harness wants grippers as
-1 = open, 1 = closed; datasets of OpenVLA's have 1 = open, 0 = closed. Source: vla-eval 0.8.0, protocol/messages.py,
specs.py, model_servers/oft.py.
"""

import asyncio
import time

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from openvla.serve.action_queue import ActionQueue
from openvla.serve.batching import Refused
from openvla.serve.observations import OPTIONS, is_on_the_arm, read_observation, read_turn
from openvla.serve.service import Left, Service, describe
from openvla.serve.sockets import Messages, read_bytes
from openvla.serve.wire import Malformed, read_msgpack, write_msgpack

PROTOCOL = 1
END_EFFECTOR = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
OPENS = "1 = open"  # unit of grippers in statistics
# That a payload may hold; the key is the connection's, as chunks play on between questions
LOOKED_AT = tuple(name for name in OPTIONS if name != "unnorm_key")


class _Received:
    """A policy for `ActionQueue` that was asked already: its observation is the answer."""

    def infer(self, answer: dict) -> dict:
        return answer


class _Episode:
    """What is left of a chunk, and what it is to do."""

    def __init__(self, execute: int | None):
        self.queue, self.instruction = ActionQueue(_Received(), execute), None

    def reset(self) -> None:
        self.queue.reset()


async def vla_eval(websocket: WebSocket) -> None:
    """One client, from its connection to its leaving. `?unnorm_key=…` chooses the statistics."""
    service: Service = websocket.app.state.service
    unnorm_key = websocket.query_params.get("unnorm_key")
    episode = _Episode(service.settings.execute)
    await websocket.accept()
    async with Messages(websocket) as messages:
        async for frame, arrived in messages:
            seq = 0
            try:
                service.admit()
                data = read_bytes(frame, service.settings.max_body)
                content = await asyncio.to_thread(_read, data, service.settings.max_pixels)
                kind, payload, seq = content["type"], content["payload"], content["seq"]
                if kind == "observation":
                    with service.answer_one("vla-eval", arrived):
                        work = _act(service, payload, service.metadata(unnorm_key), episode, arrived)
                        await websocket.send_bytes(_message("action", await messages.while_there(work), seq))
                elif kind == "hello":
                    await websocket.send_bytes(_message("hello", describe_policy(service.metadata(unnorm_key)), seq))
                elif kind in ("episode_start", "episode_end"):  # which get no answer
                    episode.reset()
                else:
                    raise Malformed(
                        f"Expected hello, observation, episode_start or episode_end, got {str(kind)[:40]!r}."
                    )
            except (Left, WebSocketDisconnect):
                return
            except (Refused, Malformed) as error:
                episode.reset()  # a robot must not go on with what was planned before
                status, words = describe(error)
                await websocket.send_bytes(_message("error", {"error": f"{status}: {words}"}, seq))


async def _act(service: Service, payload: dict, metadata: dict, episode: _Episode, arrived: float) -> dict:
    """`actions` `(A,)` float32 of this step, as the harness has it, and of a new chunk what was `clamped`. The policy
    is asked when the chunk is at its end, or there is something else to do."""
    check_gripper(metadata)
    observation = await asyncio.to_thread(read_observation, payload, metadata, LOOKED_AT)
    turn, answer = service.limit_age(read_turn(payload, arrived)), {}
    turn.check()
    if observation["instruction"] != episode.instruction:
        episode.reset()
    if episode.queue.needs_observation:
        answer = await service.act({**observation, "unnorm_key": metadata["unnorm_key"]}, turn)
        episode.instruction = observation["instruction"]
    action = to_harness(episode.queue.act(answer), metadata).astype(np.float32)
    return {"actions": action} | ({"clamped": answer["clamped"]} if answer.get("clamped") else {})


def describe_policy(metadata: dict) -> dict:
    """Payload of a hello: the harness compares it with its benchmark, and sends what `observation_params` ask for."""
    from openvla import __version__

    check_gripper(metadata)
    cameras = metadata["cameras"] or ["image", *["wrist_image"] * (metadata["num_cameras"] - 1)]
    names = [name.rpartition(".")[2] for name in cameras]
    specs = {name: {"name": name, "dims": 0, "format": "rgb_hwc_uint8"} for name in names}
    params = {"send_wrist_image": True} if metadata["num_cameras"] > 1 or is_on_the_arm(names[0]) else {}
    if metadata["proprio_dim"]:
        is_libero = metadata["unnorm_key"].startswith("libero")
        kind = "eef_pos3_axisangle3_gripper2" if is_libero else "raw"
        specs["state"] = {"name": "state", "dims": metadata["proprio_dim"], "format": kind}
        params |= {"send_state": True} | ({"quat_no_antipodal": True} if is_libero else {})
    specs["language"] = {"name": "language", "dims": 0, "format": "language"}
    hello = {
        "harness_version": f"openvla {__version__}",
        "protocol_version": PROTOCOL,
        "model_server": str(metadata["checkpoint"]),
        "capabilities": {},
        "observation_params": params,
        "observation_spec": specs,
    }
    dims = metadata["action_dims"]
    if [dim["name"] for dim in dims] == END_EFFECTOR and dims[-1]["unit"] == OPENS:
        hello["action_spec"] = {
            "position": {"name": "position", "dims": 3, "format": "delta_xyz", "range": [-1.0, 1.0]},
            "rotation": {"name": "rotation", "dims": 3, "format": "axis_angle", "range": [-3.15, 3.15]},
            "gripper": {"name": "gripper", "dims": 1, "format": "binary_close_positive", "range": [-1.0, 1.0]},
        }
    return hello


def check_gripper(metadata: dict) -> None:
    """Malformed if nobody knows which way the gripper closes: the harness would open it where it should close."""
    dim = metadata["action_dims"][-1]
    if dim["name"].rstrip("?") == END_EFFECTOR[-1] and dim["unit"] != OPENS:
        raise Malformed(
            f"The statistics of {metadata['unnorm_key']!r} do not say what the gripper's numbers mean (unit: "
            f"{dim['unit']!r}), which this protocol has as -1 = open: add names and units to them ({OPENS!r})."
        )


def to_harness(action: np.ndarray, metadata: dict) -> np.ndarray:
    """`(A,)` with grippers whose unit is "1 = open" as the harness has them."""
    opens = np.array([dim["unit"] == OPENS for dim in metadata["action_dims"]])
    return np.where(opens, np.where(action > 0.5, -1.0, 1.0), action)


def _read(message: bytes, max_pixels: int) -> dict:
    content = read_msgpack(message, max_pixels)
    fields = {"type": str, "payload": dict, "seq": int, "timestamp": (int, float)}
    wrong = isinstance(content, dict) and [
        name for name, kind in fields.items() if not isinstance(content.get(name), kind)
    ]
    if not isinstance(content, dict) or wrong:
        raise Malformed(f"Expected a message with {list(fields)}, got {wrong or type(content).__name__} wrong.")
    return content


def _message(kind: str, payload: dict, seq: int) -> bytes:
    message = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
    return write_msgpack(message, bytes_keys=False)
