"""Who may ask, and how much: tokens, hosts and origins, sizes and patience. In front of everything else.

Nothing of a request is decoded before it has passed here. What does not pass gets a status and a sentence.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import socket
import sys
import time
from collections import deque
from urllib.parse import urlsplit

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

log = logging.getLogger("openvla.serve")

OPEN = ("/", "/page.js", "/health", "/healthz", "/ready")  # need no token over HTTP: they move nothing
DISCARDED = 4  # times the largest body: as much of a larger one is read, to tell its sender why it is refused
HEADERS_S, BODY_S = 10.0, 20.0  # seconds in which a request's headers and its body, or a message, have to come
# Seconds until a silent client is asked whether it is there, between further tries, and how many there are: by the
# kernels of both machines, so that a client that is blocked for minutes is not taken for one that is gone
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded. Requests reach it with `arrived` in their scope: when their headers were there, on the
            monotonic clock.
        tokens: any of them will do, as "Authorization: Bearer …" or "Api-Key …"; none: everybody may ask.
        max_body: bytes of a request.
        max_sockets: websockets at a time.
        max_requests: requests with bodies (POST) that may be read at a time.
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
        brings_body = scope["type"] == "http" and scope["method"] == "POST"
        is_open = scope["type"] == "http" and scope["path"] in OPEN and not brings_body
        if refusal := self.check(is_open, headers):
            log.info("refused %s %s: %s", scope["type"], scope["path"], refusal[1])
            if scope["type"] == "http" and self._length(headers) <= DISCARDED * self.max_body:
                await self._discard(receive)
            await _refuse(scope, send, *refusal)
        elif scope["type"] == "websocket":
            await self._pass_socket(scope, receive, send)
        elif brings_body:
            await self._pass_request(scope, receive, send, headers)
        else:  # whose body, if there is one, nobody reads
            await self.app(scope, receive, send)

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
        if self.requests >= self.max_requests:
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
        if (connection := transport.get_extra_info("socket")) is not None:
            keep_alive(connection)
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


class PatientSockets(WebSocketsSansIOProtocol):
    """uvicorn's websockets. Their scope holds `arrivals`: of every message that waits, when its first byte was there,
    on the monotonic clock. One that does not come to its end in time ends the connection."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._arrivals: deque[float] = deque()
        self._begun: float | None = None  # of the message that is coming
        self._timer: asyncio.TimerHandle | None = None

    def handle_connect(self, event) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):  # else it was refused
            self.scope["arrivals"] = self._arrivals

    def data_received(self, data: bytes) -> None:
        self._now, self._ended = time.monotonic(), False
        self._begun = self._now if self._begun is None else self._begun
        super().data_received(data)
        if self._ended and not (self.frames or self.conn.reader.buffer):  # nothing has begun that is not at its end
            self._begun = None
            self._stop_timer()
            return
        self._begun = self._now if self._begun is None else self._begun
        if self._timer is None:
            self._timer = self.loop.call_later(BODY_S, self._give_up)

    def handle_events(self) -> None:
        self._ended = bool(self.conn.events)  # a frame, or the handshake
        super().handle_events()

    def send_receive_event_to_app(self) -> None:
        # of several messages in one piece of data, all but the first begin and end there
        self._arrivals.append(self._now if self._begun is None else self._begun)
        self._begun = None
        self._stop_timer()
        super().send_receive_event_to_app()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        self._timer = None
        if self.read_paused:  # it is us who do not read on
            self._timer = self.loop.call_later(BODY_S, self._give_up)
        elif not self.transport.is_closing():
            self.conn.fail(1008, f"A message has to come within {BODY_S:g} s.")
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def keep_alive(connection: socket.socket) -> None:
    """Has the kernel find out that a client has vanished: robots are switched off without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


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
