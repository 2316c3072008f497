"""Many robots, one policy: observations wait in a bounded queue, and those that wait together are answered together.

    batcher = Batcher(infer_batch, max_batch=8, max_queue=64, timeout=10.0)
    answer = await batcher.infer(observation, Turn(session="arm-3", max_age=0.2))

What cannot be answered in time is refused, never answered late: a robot must not act on what it saw long ago.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from openvla.serve.safety import Forbidden

log = logging.getLogger("openvla.serve")
SESSIONS = 1024  # whose newest observations are remembered
FAILURES = 5  # of the policy, one after the other, after which it is said to be broken


class Refused(Exception):
    """An observation that gets no action; `status` as in HTTP."""

    status = 500


class Unfit(Refused):
    """Something is wrong with it."""

    status = 422


class Stale(Refused):
    """It was too old when its turn came."""

    status = 410


class Superseded(Refused):
    """Its session sent a newer one meanwhile."""

    status = 409


class Busy(Refused):
    """Too many wait already, or the server is not ready, or about to stop."""

    status = 503


class TimedOut(Refused):
    """There was no action in time."""

    status = 504


class Failed(Refused):
    """The policy raised, or its action is forbidden."""


class Broken(Failed):
    """It raised what it never should."""


@dataclass(frozen=True)
class Turn:
    """When an observation came, and what its sender says of it.

    Args:
        arrived: on the monotonic clock: its first byte, before it was read and decoded.
        session: whose it is. What still waits of the same session is refused: a robot wants an answer to what it sees
            now.
        age: seconds from the picture to its arrival here, as far as the sender tells.
        max_age: seconds that it may be old when the policy gets it; None: any age.
    """

    arrived: float = field(default_factory=time.monotonic)
    session: str | None = None
    age: float = 0.0
    max_age: float | None = None

    def check(self, acting: float = 0.0) -> None:
        """Raises Stale if it is too old by now, or was before the policy took `acting` seconds."""
        age = self.age + time.monotonic() - self.arrived - acting
        if self.max_age is not None and age > self.max_age:
            allowed = f"{1000 * self.max_age:.0f} are allowed"
            raise Stale(f"The observation is {1000 * age:.0f} ms old, {allowed}.")


@dataclass(eq=False)
class _Waiting:
    observation: dict
    turn: Turn
    answer: asyncio.Future


class Batcher:
    """Asks a policy from a thread of its own, one batch at a time. Lives in one event loop.

    Args:
        infer_batch: observations -> an answer or an exception for each; ValueError if one of them is at fault.
        max_batch: observations at a time.
        max_wait: seconds that the first of a batch waits for others; 0: who waits when the policy is free goes along.
        max_queue: observations that may wait.
        timeout: seconds from an observation's arrival to its answer.
        on_batch: called with the size and the seconds of every batch.
    """

    def __init__(
        self,
        infer_batch: Callable[[list[dict]], list[dict | Exception]],
        max_batch: int = 8,
        max_wait: float = 0.0,
        max_queue: int = 64,
        timeout: float = 10.0,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        self.infer_batch, self.max_batch, self.max_wait = infer_batch, max_batch, max_wait
        self.max_queue, self.timeout, self.on_batch = max_queue, timeout, on_batch
        self.thread = ThreadPoolExecutor(1, "policy")
        self.waiting: deque[_Waiting] = deque()
        self.failures = 0  # of the policy's, since its last answer
        self._since: float | None = None  # when the policy was asked what it is busy with, on the monotonic clock
        self._newest: dict[str, float] = {}  # when each session's newest observation came
        self._arrival = asyncio.Event()
        self._task: asyncio.Task | None = None

    @property
    def problem(self) -> str | None:
        """Why nobody should count on an answer, though who asks is not turned away."""
        if self.failures >= FAILURES:
            return f"The policy failed {self.failures} times in a row; the server's log tells why."
        if self._since is not None and (seconds := time.monotonic() - self._since) > self.timeout:
            return f"The policy has been busy with one batch for {seconds:.0f} s."
        return None

    async def infer(self, observation: dict, turn: Turn) -> dict:
        """The policy's answer. Raises one of the `Refused`."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())
        self._supersede(turn)
        if len(self.waiting) >= self.max_queue:
            raise Busy(f"{len(self.waiting)} observations wait already: ask less often, or start more servers.")
        mine = _Waiting(observation, turn, asyncio.get_running_loop().create_future())
        self.waiting.append(mine)
        self._arrival.set()
        try:
            return await asyncio.wait_for(mine.answer, max(0.0, turn.arrived + self.timeout - time.monotonic()))
        except asyncio.TimeoutError:
            raise TimedOut(f"There was no action within {self.timeout:g} s.") from None
        finally:
            if mine in self.waiting:  # too late, or nobody waits for the answer any more
                self.waiting.remove(mine)

    def stop(self) -> None:
        """Refuses what waits and what the policy has."""
        if self._task is not None:
            self._task.cancel()
        for each in self.waiting:
            _settle(each, Busy("The server stops."))
        self.thread.shutdown(wait=False, cancel_futures=True)

    def _supersede(self, turn: Turn) -> None:
        """Refuses what is older of the same session; Superseded if that is this one, which took longer to decode."""
        if turn.session is None:
            return
        newest = self._newest.pop(turn.session, -math.inf)
        self._newest[turn.session] = max(newest, turn.arrived)
        if len(self._newest) > SESSIONS:
            del self._newest[next(iter(self._newest))]  # the one that was silent longest
        if newest > turn.arrived:
            raise Superseded("Its session sent a newer observation.")
        for older in [each for each in self.waiting if each.turn.session == turn.session]:
            self.waiting.remove(older)
            _settle(older, Superseded("Its session sent a newer observation."))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._arrival.clear()
            if not self.waiting:
                await self._arrival.wait()
                continue
            left = self.waiting[0].turn.arrived + self.max_wait - time.monotonic()
            if left > 0 and len(self.waiting) < self.max_batch:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._arrival.wait(), left)
                continue
            if not (batch := self._next_batch()):
                continue
            self._since = time.monotonic()
            try:
                answers = await loop.run_in_executor(self.thread, self._ask, batch)
            except asyncio.CancelledError:
                for each in batch:
                    _settle(each, Busy("The server stops."))
                raise
            self.on_batch(len(batch), time.monotonic() - self._since)
            self._since = None
            if any(isinstance(answer, dict) for answer in answers):
                self.failures = 0
            else:
                self.failures += any(isinstance(answer, Broken) for answer in answers)
            for each, answer in zip(batch, answers):
                _settle(each, answer)

    def _next_batch(self) -> list[_Waiting]:
        """Those who have waited longest, and are neither too old nor gone."""
        batch: list[_Waiting] = []
        while self.waiting and len(batch) < self.max_batch:
            each = self.waiting.popleft()
            try:
                each.turn.check()
            except Stale as stale:
                _settle(each, stale)
                continue
            if not each.answer.done():
                batch.append(each)
        return batch

    def _ask(self, batch: list[_Waiting]) -> list[dict | Refused]:
        """In the policy's thread: an answer or a refusal for each. One that fails does not spoil the others'."""
        try:
            answers = self.infer_batch([each.observation for each in batch])
            return [_refusal(answer) if isinstance(answer, Exception) else answer for answer in answers]
        except Exception as error:  # whatever it is, the others get their answers and the server goes on
            if len(batch) == 1:
                return [_refusal(error)]
        return [self._ask_alone(each) for each in batch]

    def _ask_alone(self, each: _Waiting) -> dict | Refused:
        """What failed in company, if it is still to be answered."""
        try:
            each.turn.check()
        except Stale as stale:
            return stale
        return Busy("Nobody waits.") if each.answer.done() else self._ask([each])[0]


def _refusal(error: Exception) -> Refused:
    """Of what the policy raised."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, ValueError):
        return Unfit(str(error))
    if isinstance(error, Forbidden):
        return Failed(str(error))
    log.error("the policy failed", exc_info=error)
    return Broken("The policy failed; the server's log tells why.")


def _settle(each: _Waiting, answer: dict | Refused) -> None:
    if each.answer.done():  # given up, or cancelled with its connection
        return
    if isinstance(answer, Refused):
        each.answer.set_exception(answer)
    else:
        each.answer.set_result(answer)
