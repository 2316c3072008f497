"""A websocket's messages with the time they came, and whether its client is still there."""

import asyncio
import contextlib
import time
from collections.abc import Coroutine

from starlette.websockets import WebSocket

from openvla.serve.service import unless

AHEAD = 2  # messages that are taken before those before them are answered


class Messages:
    """Of an accepted websocket.

    async with Messages(websocket) as messages:
        async for message, arrived in messages:
            await websocket.send_bytes(await messages.while_there(answer(message)))
    """

    def __init__(self, websocket: WebSocket):
        self.websocket, self.gone = websocket, asyncio.Event()
        self._messages: asyncio.Queue = asyncio.Queue(AHEAD)

    async def __aenter__(self) -> "Messages":
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *error) -> None:
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader

    def __aiter__(self) -> "Messages":
        return self

    async def __anext__(self) -> tuple[dict, float]:
        """An ASGI message, and when it was there on the monotonic clock."""
        if (found := await self._messages.get()) is None:
            raise StopAsyncIteration
        return found

    async def while_there(self, work: Coroutine):
        """What `work` returns; Left, and `work` is given up, when the client leaves."""
        return await unless(self.gone.wait(), work)

    async def _read(self) -> None:
        while (message := await self.websocket.receive())["type"] != "websocket.disconnect":
            await self._messages.put((message, time.monotonic()))
        self.gone.set()
        await self._messages.put(None)
