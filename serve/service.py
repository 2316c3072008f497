"""One policy behind all protocols: which statistics, whose turn, how long it may take, and what it has done so far.

service = Service(LocalPolicy(policy, settings), settings)
await service.start()                       # checks and warms up; ready afterwards
answer = await service.act({"images": [frame], "instruction": "pick up the cup"}, "rest")
await service.drain()
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Coroutine
from dataclasses import dataclass, replace

from openvla.serve.batching import Batcher, Busy, Refused, Turn
from openvla.serve.metrics import Metrics
from openvla.serve.safety import STATISTICS
from openvla.serve.wire import Malformed

log = logging.getLogger("openvla.serve")


@dataclass(frozen=True)
class Settings:
    """How to serve.

    Args:
        max_batch: observations that the policy answers at a time.
        max_wait_ms: how long the first of them waits for others.
        max_queue: how many may wait; beyond, 503.
        timeout_s: from arrival to action; beyond, 504.
        max_age_ms: how old an observation may be when the policy gets it, unless it says so itself; None: any age.
        max_body: bytes of a request or a message; beyond, 413.
        max_pixels: of all pictures of an observation that come as files.
        patience_s: at the end, for what is being answered.
        self_check: `doctor`'s checks at the start.
        execute: actions of each chunk that vla-eval's clients get before the policy is asked again; None: all.

    Raises ValueError for what cannot be.
    """

    max_batch: int = 8
    max_wait_ms: float = 0.0
    max_queue: int = 64
    timeout_s: float = 10.0
    max_age_ms: float | None = None
    max_body: int = 16 * 2**20
    max_pixels: int = 8 * 2**20
    patience_s: float = 10.0
    self_check: bool = True
    execute: int | None = None

    def __post_init__(self):
        for name in ("max_batch", "max_queue", "timeout_s", "max_age_ms", "max_body", "max_pixels", "execute"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value}.")
        for name in ("max_wait_ms", "patience_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}.")


class NotFit(RuntimeError):
    """A policy that must not act, with what is wrong with it."""


class TooLarge(Refused):
    """More bytes than are read."""

    status = 413


class Left(Refused):
    """Nobody waits for the answer any more."""

    status = 499


class LocalPolicy:
    """A policy in this process, for every key of its statistics, several observations at a time.

    Args:
        policy: `OpenVLAPolicy`.
        default: what clients get who name no `unnorm_key`; None: they have to, if there are several.
        only: serve no other key: a robot's limits hold for one.
    """

    def __init__(self, policy, settings: Settings, default: str | None = None, only: bool = False):
        keys = [policy.unnorm_key] if only else list(policy.model.norm_stats)
        self.policies = {key: policy.with_statistics(key) for key in keys}
        self.default = default or (keys[0] if len(keys) == 1 else None)
        self.metadata = {key: each.metadata for key, each in self.policies.items()}
        self.settings = settings
        wait, timeout = settings.max_wait_ms / 1000, settings.timeout_s
        self.batcher = Batcher(self.infer_batch, settings.max_batch, wait, settings.max_queue, timeout)

    async def start(self, metrics: Metrics) -> None:
        """Checks and warms up; NotFit if the policy must not act."""
        self.batcher.on_batch = metrics.note_batch
        await asyncio.get_running_loop().run_in_executor(self.batcher.thread, self._prepare)

    def _prepare(self) -> None:
        policy = next(iter(self.policies.values()))
        if self.settings.self_check:
            from openvla.evaluate.doctor import FAILED, OK, diagnose

            checks = diagnose(policy.model, policy.processor)
            for check in checks:
                level = logging.INFO if check.status == OK else logging.WARNING
                log.log(level, "check %s: %s", check.name, check.detail)
            if failed := [f"{check.name}: {check.detail}" for check in checks if check.status == FAILED]:
                raise NotFit(f"This policy is not fit to act. {'; '.join(failed)}")
        for size in sorted({1, self.settings.max_batch}):
            milliseconds = policy.warm_up(size)
            log.info("warm: %d observation(s) in %.1f ms", size, milliseconds)
            if milliseconds > 1000 * self.settings.timeout_s:
                log.warning("that is longer than the timeout of %g s: most will get none", self.settings.timeout_s)

    def infer_batch(self, observations: list[dict]) -> list[dict | Exception]:
        """Those with the same statistics in one pass."""
        answers: list = [None] * len(observations)
        keys = [observation["unnorm_key"] for observation in observations]
        for key in dict.fromkeys(keys):
            places = [place for place, each in enumerate(keys) if each == key]
            batch = [{**observations[place]} for place in places]
            for observation in batch:
                del observation["unnorm_key"]
            for place, answer in zip(places, self.policies[key].try_batch(batch)):
                answers[place] = answer
        return answers

    async def infer(self, observation: dict, turn: Turn) -> dict:
        return await self.batcher.infer(observation, turn)

    @property
    def problem(self) -> str | None:
        return self.batcher.problem

    def stop(self) -> None:
        self.batcher.stop()


class Service:
    """What every protocol asks.

    Args:
        backend: `LocalPolicy`, or what has the same methods.
    """

    def __init__(self, backend, settings: Settings):
        self.backend, self.settings, self.metrics = backend, settings, Metrics()
        self.problem: str | None = "The policy is being checked and warmed up."  # why it is not ready
        self.stopping = False
        self.answering = 0  # observations that are read, decoded, waiting, or whose answers are being sent

    @property
    def ready(self) -> bool:
        """Whether observations are taken."""
        return self.problem is None

    @property
    def unhealthy(self) -> str | None:
        """Why orchestrators should send robots elsewhere: not ready, or the policy fails again and again."""
        return self.problem or self.backend.problem

    async def start(self) -> None:
        """Makes ready; what is wrong with the policy ends in `problem`, as the server goes on to tell it."""
        try:
            await self.backend.start(self.metrics)
        except Exception as error:
            self.problem = str(error) if isinstance(error, NotFit) else "It failed; the server's log tells why."
            log.exception("not ready")
            return
        if self.stopping:
            return
        self.problem = None
        log.info("ready")

    async def drain(self) -> None:
        """Takes nothing more, and waits until all answers are sent, as long as the settings' patience lasts."""
        self.stopping, self.problem = True, "The server is about to stop."
        end = time.monotonic() + self.settings.patience_s
        while self.answering and time.monotonic() < end:
            await asyncio.sleep(0.01)
        self.backend.stop()

    def metadata(self, unnorm_key: str | None = None) -> dict:
        """`OpenVLAPolicy.metadata` and all `unnorm_keys`; Malformed for a key that is none of them, Busy before there
        is a policy."""
        if not self.ready:
            raise Busy(f"Not ready. {self.problem}")
        keys = list(self.backend.metadata)
        key = self.backend.default if unnorm_key is None else unnorm_key
        if key is None:
            raise Malformed(f"Say whose actions you want: unnorm_key is one of {keys}.")
        if not isinstance(key, str) or key not in keys:
            raise Malformed(f"Unknown unnorm_key {str(key)[:60]!r}; this policy has {keys}.")
        return {**self.backend.metadata[key], "unnorm_keys": keys}

    def admit(self) -> None:
        """Busy if there is no use in reading another observation."""
        if not self.ready:
            raise Busy(f"Not ready. {self.problem}")
        if self.answering > self.settings.max_queue + 2 * self.settings.max_batch:
            raise Busy(f"{self.answering} observations are being answered: ask less often, or start more servers.")

    @contextlib.contextmanager
    def answer_one(self, protocol: str, arrived: float):
        """Around everything from an observation's arrival on: admits, counts, times, logs.

        Args:
            arrived: on the monotonic clock.
        """
        self.answering += 1
        self.metrics.in_flight.inc()
        outcome = "ok"
        try:
            self.admit()
            yield
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            seconds = time.monotonic() - arrived
            self.answering -= 1
            self.metrics.in_flight.dec()
            self.metrics.note_answer(protocol, outcome, seconds)
            facts = {"protocol": protocol, "outcome": outcome, "ms": 1000 * seconds}
            level = logging.DEBUG if outcome == "ok" else logging.INFO
            log.log(level, "%s %s in %.1f ms", protocol, outcome, 1000 * seconds, extra=facts)

    def limit_age(self, turn: Turn) -> Turn:
        """With the server's limit, if its sender has set none."""
        if turn.max_age is None and self.settings.max_age_ms is not None:
            return replace(turn, max_age=self.settings.max_age_ms / 1000)
        return turn

    async def act(self, observation: dict, turn: Turn) -> dict:
        """The answer of `OpenVLAPolicy.infer`; raises one of `Refused`.

        Args:
            observation: of `OpenVLAPolicy.infer`, with its `unnorm_key`.
        """
        answer = await self.backend.infer(observation, self.limit_age(turn))
        if changed := answer.get("clamped"):
            self.metrics.clamped.inc()
            by_robot = any(each["limits"] != STATISTICS for each in changed)
            told = ", ".join(f"{each['dim']} {each['wanted']:.4g} to {each['bound']:.4g}" for each in changed)
            facts = {"clamped": changed, "unnorm_key": observation["unnorm_key"]}
            log.log(logging.WARNING if by_robot else logging.DEBUG, "clamped: %s", told, extra=facts)
        return answer


async def unless(gone: Coroutine, work: Coroutine):
    """What `work` returns; Left, and `work` is given up, if `gone` ends first."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Left("The client left.")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def describe(error: Refused | Malformed) -> tuple[int, str]:
    """Status as in HTTP, and words for whoever asked."""
    status = error.status if isinstance(error, Refused) else 422
    return status, str(error).encode("utf-8", "replace").decode()
