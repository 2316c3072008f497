"""Asks a policy on a server, over the original's REST protocol: numpy and the standard library, no torch.

    client = ActClient("http://127.0.0.1:8000", unnorm_key="bridge_orig")
    actions = client.infer({"images": frame, "instruction": "pick up the cup"})["actions"]  # (T, A)

    with Prefetch(client, lead=3) as chunks:         # asks for the next chunk while the current one plays
        while not done:
            robot.step(chunks.act(robot.observe))    # (A,) of this control step

This file alone is enough on a robot's computer. The protocol: POST /act with `{"image": uint8 array, "instruction":
text, "unnorm_key": text}` as JSON, arrays as json_numpy writes them; the answer is one array, `(A,)` or `(T, A)`, or a
JSON string that holds it. Several cameras go as `images`, the robot's state as `proprio`, which the original does not
know. It answers every failure with status 200 and the string "error". Source: vla-scripts/deploy.py of the original
code.

Legend: T action chunk · A action dims · P proprioception dims.
"""

import asyncio
import base64
import http.client
import json
import math
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures

import numpy as np

WAIT = 0.2  # seconds before a server that cannot be reached is tried again


class ActClient:
    """One server, over one connection that is made anew when it breaks. May be shared by threads, which take turns.

    Args:
        url: `http://host:port` or https, with or without `/act`.
        unnorm_key: sent with every observation; None: the server's choice.
        token: sent as `Authorization: Bearer …`.
        timeout: seconds to wait for an answer.
        patience: seconds to go on trying while the server cannot be reached or is not ready: it may be starting anew.
        session: with it, a newer observation replaces one that still waits on the server.
        max_age_ms: how old an observation may be when the policy gets it, from the call of `infer` on; there are no
            more tries when it is older. The server is told its age when it is sent, connecting included; what the
            network holds up after that, it does not see.
    """

    needs: tuple[str, ...] = ("images",)

    def __init__(
        self,
        url: str,
        unnorm_key: str | None = None,
        token: str | None = None,
        timeout: float = 60.0,
        patience: float = 0.0,
        session: str | None = None,
        max_age_ms: float | None = None,
    ):
        self.url = url.rstrip("/").removesuffix("/act")
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"Expected a server as http://host:port, got {url!r}.")
        self._parts, self._connection, self._lock = parts, None, threading.Lock()
        self.unnorm_key, self.timeout, self.patience, self.max_age_ms = unnorm_key, timeout, patience, max_age_ms
        self._extra = {"unnorm_key": unnorm_key, "session": session, "max_age_ms": max_age_ms}
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})

    def metadata(self) -> dict | None:
        """What the policy declares (`OpenVLAPolicy.metadata`); None from the original's, which does not tell."""
        query = f"?{urllib.parse.urlencode({'unnorm_key': self.unnorm_key})}" if self.unnorm_key else ""
        status, _, answer = self._ask("GET", f"/metadata{query}", end=time.monotonic() + self.patience)
        if status in (404, 405):
            return None
        return _parse(self._checked(status, answer, "/metadata"))

    def wait(self, seconds: float) -> None:
        """Until the server acts; OSError or RuntimeError if it does not within `seconds`."""
        status, _, answer = self._ask("GET", "/ready", end=time.monotonic() + seconds)
        if status not in (404, 405):  # the original's does not tell
            self._checked(status, answer, "/ready")

    def infer(self, observation: dict) -> dict:
        """The action for one observation; see `OpenVLAPolicy.infer`.

        Args:
            observation: `images`: one, or of several cameras a list in the policy's order or a dict by their names,
                uint8 `(H, W, 3)`; `instruction`; `proprio` `(P,)`, if the policy takes it; and if you like `seed`, for
                heads that denoise.

        Returns `actions` `(T, A)` float64; `timing`: `round_trip_ms`, with all tries; and `clamped`, if the server
        changed the action to keep it within limits.

        Raises ValueError for an observation that is none, RuntimeError if the server refuses or fails, or its answer
        is no finite array, OSError if it cannot be reached, or not while the observation is fresh.
        """
        start = time.monotonic()
        payload = self._payload(observation)
        fresh_until = math.inf if self.max_age_ms is None else start + self.max_age_ms / 1000

        def body() -> bytes:
            age = 1000 * (time.monotonic() - start)
            return json.dumps(payload | ({"age_ms": age} if age > 1 and self.max_age_ms else {})).encode()

        status, headers, answer = self._ask("POST", "/act", body, start + self.patience, fresh_until)
        timing = {"round_trip_ms": 1000 * (time.monotonic() - start)}
        actions = _decode(self._checked(status, answer, "/act"))
        if actions.ndim not in (1, 2) or not actions.size or not np.isfinite(actions).all():
            raise RuntimeError(f"{self.url}/act answered no finite (A,) or (T, A), but {actions.tolist()}.")
        clamped = {"clamped": _parse(headers["X-Clamped"].encode())} if "X-Clamped" in headers else {}
        return {"actions": np.atleast_2d(actions), "timing": timing, **clamped}

    async def infer_async(self, observation: dict) -> dict:
        """The same, while the event loop goes on."""
        return await asyncio.to_thread(self.infer, observation)

    def infer_batch(self, observations: list[dict]) -> list[dict]:
        """One after the other: the protocol has no batches."""
        return [self.infer(observation) for observation in observations]

    def close(self) -> None:
        """Of the connection, when it is free; the next question opens another."""
        with self._lock:
            self._drop()

    def _payload(self, observation: dict) -> dict:
        images = observation["images"]
        in_order = images if isinstance(images, list | tuple) else [images]
        named = images if isinstance(images, dict) else dict(enumerate(in_order))
        for image in named.values():
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
                got = f"{image.shape} of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
                raise ValueError(f"Expected images as uint8 arrays (H, W, 3), got {got}.")
        encoded = {name: _encode(image) for name, image in named.items()}
        if len(encoded) == 1:  # as the original's protocol has it
            payload = {"image": next(iter(encoded.values()))}
        else:
            payload = {"images": encoded if isinstance(images, dict) else list(encoded.values())}
        payload["instruction"] = observation["instruction"]
        if observation.get("proprio") is not None:
            payload["proprio"] = _encode(np.asarray(observation["proprio"], dtype=np.float64))
        if observation.get("seed") is not None:
            payload["seed"] = np.asarray(observation["seed"]).tolist()
        return payload | {name: value for name, value in self._extra.items() if value is not None}

    def _ask(self, method: str, path: str, body=lambda: None, end: float = 0.0, fresh_until: float = math.inf):
        """Status, headers and content. A question that finds no server that is ready is asked again: it moves nothing.

        Args:
            body: makes what is sent, for every try.
            end: of the patience, on the monotonic clock.
            fresh_until: when there is no use in asking any more.
        """
        with self._lock:
            while True:
                reused = self._connection is not None
                try:
                    answer = self._ask_once(method, path, body, fresh_until)
                except TimeoutError:
                    self._drop()
                    raise
                except (OSError, http.client.HTTPException) as error:
                    self._drop()
                    if reused:  # it was closed while it lay idle
                        continue
                    if time.monotonic() + WAIT > min(end, fresh_until):
                        if isinstance(error, OSError):
                            raise
                        raise ConnectionError(f"{self.url}{path} gave no answer of HTTP: {error!r}") from error
                else:
                    if answer[0] != 503 or time.monotonic() + WAIT > min(end, fresh_until):
                        return answer
                time.sleep(WAIT)

    def _ask_once(
        self, method: str, path: str, body: Callable[[], bytes | None], fresh_until: float
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        self._connect(fresh_until)
        content = body()  # with its age when it leaves
        if time.monotonic() > fresh_until:
            raise TimeoutError(f"The observation was older than {self.max_age_ms:g} ms before {self.url} had it.")
        self._connection.request(method, self._parts.path + path, content, self._headers)
        answer = self._connection.getresponse()
        return answer.status, answer.headers, answer.read()

    def _connect(self, fresh_until: float) -> None:
        """If there is no connection, within `timeout`, and while the observation is fresh."""
        if self._connection is not None:
            return
        where = (self._parts.hostname, self._parts.port)
        seconds = min(self.timeout, max(fresh_until - time.monotonic(), 0.001))
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            self._connection = http.client.HTTPSConnection(*where, timeout=seconds, context=context)
        else:
            self._connection = http.client.HTTPConnection(*where, timeout=seconds)
        try:
            self._connection.connect()
        except TimeoutError as error:  # of a machine that is off, not of an answer that is late
            raise ConnectionError(f"{self.url} cannot be reached within {seconds:.3g} s") from error
        self._connection.sock.settimeout(self.timeout)

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _checked(self, status: int, answer: bytes, path: str) -> bytes:
        if status != 200:
            raise RuntimeError(f"{self.url}{path} answered {status}: {answer[:1000].decode(errors='replace')}")
        return answer


class Prefetch:
    """One action per control step, of chunks that are asked for before they are needed.

    The chunk that was asked for `lead` steps before the end of the current one begins where the robot was then; what
    it says of the steps that were played meanwhile is left out, so that every action is the one for its step.

    Args:
        policy: whatever has `infer`: `ActClient`, `OpenVLAPolicy`.
        lead: control steps before the end of a chunk at which the next is asked for: as many as an answer takes, at
            most half a chunk; 0: at its end.
    """

    def __init__(self, policy, lead: int):
        if lead < 0:
            raise ValueError(f"Expected lead in control steps, 0 or more, got {lead}.")
        self.policy, self.lead = policy, lead
        self.waited = 0.0  # seconds that the robot stood still for an answer, since `reset`
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._chunk = np.zeros((0, 0))  # the rest of the current one
        self._next: Future | None = None
        self._abandoned: Future | None = None  # asked for before the last `reset`
        self._played = 0  # steps since the next one was asked for

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def reset(self) -> None:
        """Forgets all chunks: a new episode begins, or the robot was moved by somebody else."""
        self._abandoned = self._next or self._abandoned
        self._chunk, self._next, self._played, self.waited = np.zeros((0, 0)), None, 0, 0.0

    def close(self) -> None:
        """Asks nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def act(self, observe: Callable[[], dict]) -> np.ndarray:
        """The action of this control step, `(A,)`.

        Args:
            observe: gives an observation for the policy; called when one is needed.

        Raises what the policy raises; then no action is left over. ValueError if chunks are too short for `lead`.
        """
        if self._next is None and len(self._chunk) <= self.lead:
            if self._abandoned is not None:  # else what is observed now would grow old behind it
                wait_for_futures([self._abandoned])
                self._abandoned = None
            self._next, self._played = self._thread.submit(self.policy.infer, observe()), 0
        if not len(self._chunk):
            self._chunk = self._receive()
        action, self._chunk = self._chunk[0], self._chunk[1:]
        self._played += 1
        return action

    def _receive(self) -> np.ndarray:
        start = time.perf_counter()
        pending, self._next = self._next, None
        chunk = np.asarray(pending.result()["actions"], dtype=np.float64)
        self.waited += time.perf_counter() - start
        if chunk.ndim != 2 or not np.isfinite(chunk).all():
            raise ValueError(f"The policy gave actions of shape {chunk.shape}, expected finite (T, A).")
        if len(chunk) <= self._played:
            raise ValueError(f"Chunks of {len(chunk)} steps are too short to ask {self.lead} steps ahead.")
        return chunk[self._played :]


def _encode(array: np.ndarray) -> dict:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def _parse(answer: bytes):
    """JSON; RuntimeError for what is none, as of a proxy that answers in the server's place."""
    try:
        return json.loads(answer)
    except ValueError as error:
        raise RuntimeError(f"The server answered no JSON ({error}): {answer[:200]!r}") from None


def _decode(answer: bytes) -> np.ndarray:
    content = _parse(answer)
    if isinstance(content, str) and content.startswith("{"):  # encoded twice
        content = _parse(content.encode())
    if not isinstance(content, dict) or "__numpy__" not in content:
        raise RuntimeError(f"The server answered {str(content)[:200]!r} instead of an action; its log may say why.")
    try:
        kind = np.dtype(content["dtype"])
        if kind.kind not in "fiu":
            raise RuntimeError(f"The server answered an array of {kind}, not of numbers.")
        numbers = np.frombuffer(base64.b64decode(content["__numpy__"]), kind)
        return numbers.reshape(content["shape"]).astype(np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise RuntimeError(f"The server answered an array that is none ({error!r}): {str(content)[:200]}") from None
