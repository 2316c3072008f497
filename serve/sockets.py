"""A websocket's messages with the time of their first byte, and whether its client is still there.

Everything is read as it comes, since nobody sees when that came which waits in the kernels' buffers; what a client
sends before it has its answers is soon refused, in its turn, as answers are told apart by their order alone.
"""

import asyncio
import contextlib
import time
from collections.abc import Coroutine

from starlette.websockets import WebSocket, WebSocketDisconnect

from openvla.serve.batching import Busy
from openvla.serve.service import TooLarge, unless
from openvla.serve.wire import Malformed

AHEAD = 2  # messages that are kept while those before them are answered; of others, only the place
MOST = 64  # places


class Messages:
    """Of an accepted websocket.

    async with Messages(websocket) as messages:
        async for message, arrived in messages:
            await websocket.send_bytes(await messages.while_there(answer(read_bytes(message, max_body))))
    """

    def __init__(self, websocket: WebSocket):
        self.websocket, self.gone = websocket, asyncio.Event()
        self._messages: asyncio.Queue = asyncio.Queue()
        self._overrun = False

    async def __aenter__(self) -> "Messages":
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *error) -> None:
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        if self._overrun:
            with contextlib.suppress(WebSocketDisconnect):  # it left meanwhile
                await self.websocket.close(1008, f"More than {MOST} messages were sent without waiting for answers.")

    def __aiter__(self) -> "Messages":
        return self

    async def __anext__(self) -> tuple[dict | None, float]:
        """An ASGI message, None for one that was not kept; and when its first byte came, on the monotonic clock."""
        if (found := await self._messages.get()) is None:
            raise StopAsyncIteration
        return found

    async def while_there(self, work: Coroutine):
        """What `work` returns; Left, and `work` is given up, when the client leaves."""
        return await unless(self.gone.wait(), work)

    async def _read(self) -> None:
        arrivals = self.websocket.scope.get("arrivals", ())  # of `PatientSockets`
        while not self._overrun and (message := await self.websocket.receive())["type"] != "websocket.disconnect":
            arrived, waiting = arrivals.popleft() if arrivals else time.monotonic(), self._messages.qsize()
            self._messages.put_nowait((message if waiting < AHEAD else None, arrived))
            self._overrun = waiting >= MOST
        if not self._overrun:
            self.gone.set()
        self._messages.put_nowait(None)


def read_bytes(message: dict | None, max_body: int) -> bytes:
    """Of an ASGI message. Raises Busy, Malformed or TooLarge."""
    if message is None:
        raise Busy(f"{AHEAD} messages of this client wait already: wait for answers.")
    if message.get("bytes") is None:
        raise Malformed("Expected a frame of bytes, got one of text.")
    if len(message["bytes"]) > max_body:
        raise TooLarge(f"A message may have {max_body} bytes: send smaller pictures.")
    return message["bytes"]
