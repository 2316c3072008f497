"""Who may ask, and how much: tokens, hosts and origins, sizes and patience. In front of everything else.

Nothing of a request is decoded before it has passed here. What does not pass gets a status and a sentence.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import sys
import time
from urllib.parse import urlsplit

from uvicorn.protocols.http.h11_impl import H11Protocol

OPEN = ("/", "/page.js", "/health", "/healthz", "/ready")  # need no token over HTTP: they move nothing
DISCARDED = 4  # times the largest body: as much of a larger one is read, to tell its sender why it is refused
HEADERS_S, BODY_S = 10.0, 20.0  # seconds in which a request's headers and its body have to come


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded. Requests reach it with `arrived` in their scope: when their headers were there, on the
            monotonic clock.
        tokens: any of them will do, as "Authorization: Bearer …" or "Api-Key …"; none: everybody may ask.
        max_body: bytes of a request.
        max_sockets: websockets at a time.
        max_requests: requests that may be read at a time.
        only_local: the server is for this machine alone: other names of it come from a web page that was led astray
            (DNS rebinding).
    """

    def __init__(
        self, app, tokens: tuple[str, ...], max_body: int, max_sockets: int, max_requests: int, only_local: bool
    ):
        self.app, self.max_body, self.only_local = app, max_body, only_local
        self.tokens = [token.encode() for token in tokens]
        self.max_sockets, self.max_requests = max_sockets, max_requests
        self.sockets = self.requests = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        scope["arrived"] = time.monotonic()
        if refusal := self.check(scope["type"] == "http" and scope["path"] in OPEN, headers):
            if scope["type"] == "http" and self._length(headers) <= DISCARDED * self.max_body:
                await self._discard(receive)
            await _refuse(scope, send, *refusal)
        elif scope["type"] == "websocket":
            await self._pass_socket(scope, receive, send)
        else:
            await self._pass_request(scope, receive, send, headers)

    def check(self, is_open: bool, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and reason of what may not pass.

        Args:
            is_open: no token is needed.
        """
        host = headers.get("host", "")
        if self.only_local and not is_local(_hostname(f"//{host}") or ""):
            return 403, f"This server is for its own machine, as localhost; not as {host[:60]!r}."
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "Web pages of other servers may not ask this one."
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip().encode("latin-1") if scheme.lower() in ("bearer", "api-key") else b""
        known = [hmac.compare_digest(given, token) for token in self.tokens]  # all of them: time must not tell which
        if self.tokens and not is_open and not any(known):
            return 401, "A token is needed: Authorization: Bearer …"
        return None

    async def _pass_socket(self, scope, receive, send) -> None:
        if self.sockets >= self.max_sockets:
            await _refuse(scope, send, 503, f"{self.sockets} websockets are open already.")
            return
        self.sockets += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.sockets -= 1

    async def _pass_request(self, scope, receive, send, headers: dict[str, str]) -> None:
        if self._length(headers) > self.max_body:
            if self._length(headers) <= DISCARDED * self.max_body:
                await self._discard(receive)
            await _refuse(scope, send, 413, f"A request may have {self.max_body} bytes: send smaller pictures.")
            return
        if self.requests >= self.max_requests and scope["method"] == "POST":
            await self._discard(receive)
            await _refuse(scope, send, 503, f"{self.requests} requests are being answered: ask less often.")
            return
        self.requests += 1
        try:
            await self._pass_whole(scope, receive, send)
        finally:
            self.requests -= 1

    async def _pass_whole(self, scope, receive, send) -> None:
        """A request whose body is read first, within limits of size and time."""
        try:
            body = await asyncio.wait_for(self._read(receive), BODY_S)
        except asyncio.TimeoutError:
            await _refuse(scope, send, 408, f"The request did not come within {BODY_S:g} s.")
            return
        if body is None:  # the client left
            return
        if len(body) > self.max_body:
            await self._discard(receive)
            await _refuse(scope, send, 413, f"A request may have {self.max_body} bytes: send smaller pictures.")
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay():
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    def _length(self, headers: dict[str, str]) -> int:
        """That a request declares; of one that declares nonsense, too much."""
        length = headers.get("content-length", "0")
        return int(length) if length.isdecimal() and len(length) < 16 else sys.maxsize

    async def _discard(self, receive) -> None:
        """The rest of a body: a client that is still sending would see a broken pipe instead of the reason."""

        async def read() -> None:
            left = DISCARDED * self.max_body
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), BODY_S)

    async def _read(self, receive) -> bytes | None:
        """The body, or more than `max_body` of it; None if the client left."""
        body = bytearray()
        while len(body) <= self.max_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        return bytes(body)


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP, which alone would wait for the end of a request's headers for ever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        if not self._is_waiting() and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif self._is_waiting() and self._timer is None:
            self._timer = self.loop.call_later(HEADERS_S, self._give_up)

    def _is_waiting(self) -> bool:
        """For headers: neither answering nor handed over to a websocket."""
        mine = self.transport.get_protocol() is self
        return mine and (self.cycle is None or self.cycle.response_complete)

    def _give_up(self) -> None:
        self._timer = None
        if self._is_waiting():
            self.transport.close()


def is_local(host: str) -> bool:
    """Whether a name or an address is this machine's alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


async def _refuse(scope, send, status: int, reason: str) -> None:
    kind = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
    body = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] if scope["type"] == "http" else []
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": f"{kind}.start", "status": status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body, "more_body": False})
