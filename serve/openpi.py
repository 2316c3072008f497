"""openpi's websocket protocol: the policy's metadata first, then an observation, its chunk, an observation, …

MessagePack, arrays as openpi-client packs them. An answer is {"actions": (T, A), "server_timing": milliseconds, …}; a
frame of text is an error, after which the connection goes on. Observations may also hold what REST's do: `unnorm_key`,
`session`, `timestamp`, `age_ms`, `max_age_ms`, `seed`. Source: openpi, websocket_policy_server.py.
"""

import asyncio
import time

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from openvla.serve.batching import Refused
from openvla.serve.observations import read_observation, read_turn
from openvla.serve.service import Left, Service, describe
from openvla.serve.sockets import Messages, read_bytes
from openvla.serve.wire import Malformed, read_msgpack, write_msgpack


async def openpi(websocket: WebSocket) -> None:
    """One client, from its connection to its leaving. `?unnorm_key=…` chooses the statistics."""
    service: Service = websocket.app.state.service
    unnorm_key = websocket.query_params.get("unnorm_key")
    await websocket.accept()
    try:
        metadata = service.metadata(unnorm_key)
    except (Malformed, Refused) as error:
        metadata = {"unnorm_keys": list(service.backend.metadata), "note": str(error)}
    await websocket.send_bytes(write_msgpack(metadata, bytes_keys=True))
    previous: float | None = None
    async with Messages(websocket) as messages:
        async for message, arrived in messages:
            try:
                with service.answer_one("openpi", arrived):
                    reply = await messages.while_there(_answer(service, message, arrived, unnorm_key))
                    if previous is not None:
                        reply["server_timing"]["prev_total_ms"] = previous
                    await websocket.send_bytes(write_msgpack(reply, bytes_keys=True))
                previous = 1000 * (time.monotonic() - arrived)
            except (Left, WebSocketDisconnect):
                return
            except (Refused, Malformed) as error:
                status, words = describe(error)
                await websocket.send_text(f"{status}: {words}")


async def _answer(service: Service, message: dict | None, arrived: float, unnorm_key: str | None) -> dict:
    data = read_bytes(message, service.settings.max_body)
    content = await asyncio.to_thread(read_msgpack, data, service.settings.max_pixels)
    if not isinstance(content, dict):
        raise Malformed(f"Expected an observation as a map, got {type(content).__name__}.")
    wanted = content.get("unnorm_key")
    metadata = service.metadata(unnorm_key if wanted is None else wanted)
    observation = await asyncio.to_thread(read_observation, content, metadata)
    answer = await service.act({**observation, "unnorm_key": metadata["unnorm_key"]}, read_turn(content, arrived))
    return {
        "actions": np.ascontiguousarray(answer["actions"]),
        "server_timing": {"infer_ms": answer["timing"]["infer_ms"]},
        "policy_timing": answer["timing"],
        **{name: answer[name] for name in ("clamped",) if name in answer},
    }
