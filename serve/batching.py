"""Many robots, one policy: observations wait in a bounded queue, and those that wait together are answered together.

    batcher = Batcher(infer_batch, max_batch=8, max_queue=64, timeout=10.0)
    answer = await batcher.infer(observation, session="arm-3", max_age=0.2)

What cannot be answered in time is refused, never answered late: a robot must not act on what it saw long ago.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from openvla.serve.safety import Forbidden

log = logging.getLogger("openvla.serve")


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


@dataclass(eq=False)
class _Waiting:
    observation: dict
    session: str | None
    age: float
    max_age: float | None
    answer: asyncio.Future
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """Asks a policy from a thread of its own, one batch at a time. Lives in one event loop.

    Args:
        infer_batch: observations -> an answer for each; ValueError if one of them is at fault.
        max_batch: observations at a time.
        max_wait: seconds that the first of a batch waits for others; 0: who waits when the policy is free goes along.
        max_queue: observations that may wait.
        timeout: seconds from an observation's arrival to its answer.
        on_batch: called with the size and the seconds of every batch.
    """

    def __init__(
        self,
        infer_batch: Callable[[list[dict]], list[dict]],
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
        self._arrival = asyncio.Event()
        self._task: asyncio.Task | None = None

    async def infer(
        self, observation: dict, session: str | None = None, age: float = 0.0, max_age: float | None = None
    ) -> dict:
        """The policy's answer. Raises one of the `Refused`.

        Args:
            session: what still waits of the same session is refused: a robot wants an answer to what it sees now.
            age: seconds from the picture to its arrival here, as far as the sender tells.
            max_age: seconds that it may be old when the policy gets it.
        """
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())
        for older in [each for each in self.waiting if session is not None and each.session == session]:
            self.waiting.remove(older)
            _settle(older, Superseded("Its session sent a newer observation."))
        if len(self.waiting) >= self.max_queue:
            raise Busy(f"{len(self.waiting)} observations wait already: ask less often, or start more servers.")
        mine = _Waiting(observation, session, age, max_age, asyncio.get_running_loop().create_future())
        self.waiting.append(mine)
        self._arrival.set()
        try:
            return await asyncio.wait_for(mine.answer, self.timeout)
        except asyncio.TimeoutError:
            raise TimedOut(f"There was no action within {self.timeout:g} s.") from None
        finally:
            if mine in self.waiting:  # too late, or nobody waits for the answer any more
                self.waiting.remove(mine)

    def stop(self) -> None:
        """Refuses what waits."""
        if self._task is not None:
            self._task.cancel()
        for each in self.waiting:
            _settle(each, Busy("The server stops."))
        self.thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._arrival.clear()
            if not self.waiting:
                await self._arrival.wait()
                continue
            left = self.waiting[0].arrived + self.max_wait - time.monotonic()
            if left > 0 and len(self.waiting) < self.max_batch:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._arrival.wait(), left)
                continue
            if not (batch := self._next_batch()):
                continue
            start = time.perf_counter()
            answers = await loop.run_in_executor(self.thread, self._ask, [each.observation for each in batch])
            self.on_batch(len(batch), time.perf_counter() - start)
            for each, answer in zip(batch, answers):
                _settle(each, answer)

    def _next_batch(self) -> list[_Waiting]:
        """Those who have waited longest, and are neither too old nor gone."""
        batch: list[_Waiting] = []
        now = time.monotonic()
        while self.waiting and len(batch) < self.max_batch:
            each = self.waiting.popleft()
            age = each.age + now - each.arrived
            if each.max_age is not None and age > each.max_age:
                allowed = f"{1000 * each.max_age:.0f} are allowed"
                _settle(each, Stale(f"The observation is {1000 * age:.0f} ms old, {allowed}."))
            elif not each.answer.done():
                batch.append(each)
        return batch

    def _ask(self, observations: list[dict]) -> list[dict | Refused]:
        """In the policy's thread: an answer or a refusal for each. One that fails does not spoil the others'."""
        try:
            return list(self.infer_batch(observations))
        except Exception as error:  # whatever it is, the others get their answers and the server goes on
            if len(observations) > 1:
                return [self._ask([observation])[0] for observation in observations]
            if isinstance(error, ValueError):
                return [Unfit(str(error))]
            if isinstance(error, Forbidden):
                return [Failed(str(error))]
            log.exception("the policy failed")
            return [Failed("The policy failed; the server's log tells why.")]


def _settle(each: _Waiting, answer: dict | Refused) -> None:
    if each.answer.done():  # given up, or cancelled with its connection
        return
    if isinstance(answer, Refused):
        each.answer.set_exception(answer)
    else:
        each.answer.set_result(answer)
