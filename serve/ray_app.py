"""A fleet: replicas of a policy behind Ray Serve, and in front of them the protocols of `openvla serve`.

OPENVLA_TOKEN=secret serve run openvla.serve.ray_app:app checkpoint=openvla/openvla-7b unnorm_key=bridge_orig
serve run openvla.serve.ray_app:app checkpoint=runs/my-robot num_gpus=0.5 max_replicas=4 max_batch=16

`pip install "openvla[ray]"` brings Ray. The options are those of `Fleet`. Robots ask the same paths as of one server:
/act, ws://…/ for openpi, ws://…/vla-eval, /metadata, /ready, /metrics. Replicas come and go with the load. Four things
are Ray's own: its proxy closes websockets whose clients do not answer pings for 20 s, as simulators that block do; a
session's older observation is dropped only if the newer one meets it at the same replica; an observation's age counts
from when the proxy hands it on whole, not from its first byte (send `timestamp`); and /ready tells of the front alone,
as Ray looks after replicas itself.

Which one: `openvla serve` for one machine, as it is a hop less; this for several GPUs or machines; vLLM's own OpenVLA
for many tokens per second of openvla-7b's layout: it gives 7 token ids, and statistics, crops, chunks, limits and
protocols are left to its user.
"""

import asyncio
import logging
import os
import time
from dataclasses import dataclass, fields, replace
from typing import get_args

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from openvla.serve.batching import Busy, Failed, Refused, TimedOut, Turn
from openvla.serve.metrics import Metrics
from openvla.serve.server import create_app, start_logging
from openvla.serve.service import LocalPolicy, NotFit, Service, Settings

log = logging.getLogger("openvla.serve")


@dataclass(frozen=True)
class Fleet:
    """What to deploy.

    Args:
        checkpoint, unnorm_key, dtype, quantize, clamp, limits, action_chunk, num_cameras: see `openvla serve`.
        num_gpus: of each replica: 0 (CPU), 1, or a part of one, which replicas share.
        num_cpus: of each replica.
        min_replicas, max_replicas: Ray goes between them with the load.
        target_ongoing: observations per replica beyond which Ray starts another.
        max_batch, max_wait_ms, max_queue, timeout_s, max_age_ms, self_check: of each replica; see `Settings`.
        without_token: everybody who reaches Ray's port may ask.
    """

    checkpoint: str
    unnorm_key: str | None = None
    dtype: str = "auto"
    quantize: str | None = None
    num_gpus: float = 0.0
    num_cpus: float = 1.0
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing: int = 8
    max_batch: int = 8
    max_wait_ms: float = 0.0
    max_queue: int = 64
    timeout_s: float = 10.0
    max_age_ms: float | None = None
    self_check: bool = True
    clamp: bool = True
    limits: str | None = None
    action_chunk: int | None = None
    num_cameras: int | None = None
    without_token: bool = False

    @property
    def settings(self) -> Settings:
        """Of each replica."""
        names = ("max_batch", "max_wait_ms", "max_queue", "timeout_s", "max_age_ms", "self_check")
        return Settings(**{name: getattr(self, name) for name in names})

    @property
    def front_settings(self) -> Settings:
        """Of what stands before all of them: as many may wait and be answered as there can be replicas for."""
        each, count = self.settings, self.max_replicas
        return replace(each, max_batch=count * each.max_batch, max_queue=count * each.max_queue)


class Replica:
    """A policy on its share of the hardware."""

    def __init__(self, fleet: Fleet):
        from openvla.serve.policy import OpenVLAPolicy

        start_logging(as_json=False, answers=False)
        names = ("dtype", "quantize", "clamp", "limits", "action_chunk", "num_cameras")
        told = {name: getattr(fleet, name) for name in names}
        only = fleet.limits is not None  # a robot's limits are in the units of one key
        policy = OpenVLAPolicy.from_pretrained(fleet.checkpoint, fleet.unnorm_key, any_key=not only, **told)
        self.backend, self.started = LocalPolicy(policy, fleet.settings, fleet.unnorm_key, only), None

    async def describe(self) -> tuple[dict, str | None] | NotFit:
        """`metadata` by key, and the default key, once the policy is checked and warm. What is wrong is returned: what
        another process raises arrives wrapped in its traceback."""
        self.started = self.started or asyncio.create_task(self.backend.start(Metrics()))
        try:
            await asyncio.shield(self.started)
        except NotFit as problem:
            return problem
        return self.backend.metadata, self.backend.default

    def check_health(self) -> None:
        """For Ray, which replaces a replica that raises here."""
        failed = self.started is not None and self.started.done() and self.started.exception()
        if failed and not isinstance(failed, NotFit):  # another one would be as unfit
            raise failed
        if problem := self.backend.problem:
            raise RuntimeError(problem)

    async def infer(self, observation: dict, session: str | None, age: float, max_age: float | None) -> dict | Refused:
        """See `Turn`. Clocks of machines differ: what is passed is how old the observation was when it was sent."""
        problem = await self.describe()
        if isinstance(problem, NotFit):
            return Failed(str(problem))
        try:
            return await self.backend.infer(observation, Turn(session=session, age=age, max_age=max_age))
        except Refused as refusal:
            return refusal


class RemotePolicy:
    """A `Service`'s backend: the replicas.

    Args:
        replicas: handle of their deployment.
    """

    def __init__(self, replicas, timeout: float):
        self.replicas, self.timeout = replicas, timeout
        self.metadata, self.default = {}, None

    async def start(self, metrics: Metrics) -> None:
        """Waits for a replica, however long that takes; NotFit if its policy must not act."""
        while not self.metadata:
            try:
                found = await self.replicas.describe.remote()
            except (RayError, RayServeException):
                log.exception("no replica yet")
                await asyncio.sleep(5.0)
                continue
            if isinstance(found, NotFit):
                raise found
            self.metadata, self.default = found

    async def infer(self, observation: dict, turn: Turn) -> dict:
        left = turn.arrived + self.timeout - time.monotonic()
        age = turn.age + time.monotonic() - turn.arrived
        try:
            asked = self.replicas.infer.remote(observation, turn.session, age, turn.max_age)
            answer = await asyncio.wait_for(asked, max(0.0, left))
        except asyncio.TimeoutError:
            raise TimedOut(f"There was no action within {self.timeout:g} s.") from None
        except BackPressureError:
            raise Busy("All replicas have as much as they take: ask less often, or start more.") from None
        except (RayError, RayServeException) as error:
            log.exception("a replica failed")
            raise Failed("A replica failed; its log tells why.") from error
        if isinstance(answer, Refused):
            raise answer
        timing = answer["timing"]  # the way to the replica and back counts as waiting, what the policy takes does not
        turn.check(acting=(timing["preprocess_ms"] + timing["infer_ms"]) / 1000)
        return answer

    @property
    def problem(self) -> str | None:
        """None: Ray itself looks after replicas."""
        return None

    def stop(self) -> None:
        """Ray stops replicas itself."""


@serve.ingress()
class Front:
    """Speaks the protocols."""

    def __init__(self, replicas, fleet: Fleet, tokens: tuple[str, ...]):
        start_logging(as_json=False, answers=False)
        self.service = Service(RemotePolicy(replicas, fleet.timeout_s), fleet.front_settings)
        self.tokens = tokens

    def __serve_build_asgi_app__(self):
        return create_app(self.service, self.tokens)


def app(options: dict):
    """What `serve run openvla.serve.ray_app:app name=value …` deploys; ValueError for an option that is none."""
    kinds = {field.name: (*get_args(field.type), field.type)[0] for field in fields(Fleet)}  # of "float | None" float
    if unknown := sorted(set(options) - set(kinds)):
        raise ValueError(f"Unknown options {unknown}; there are {sorted(kinds)}.")
    if "checkpoint" not in options:
        raise ValueError("Say which policy: checkpoint=PATH_OR_ID.")
    fleet = Fleet(**{name: read_option(name, value, kinds[name]) for name, value in options.items()})
    token = os.environ.get("OPENVLA_TOKEN", "").strip()
    if not token and not fleet.without_token:
        raise ValueError("Whoever can ask moves your robots: OPENVLA_TOKEN=secret serve run …, or without_token=true.")
    scaling = {
        "min_replicas": fleet.min_replicas,
        "max_replicas": fleet.max_replicas,
        "target_ongoing_requests": fleet.target_ongoing,
    }
    share = {"num_cpus": fleet.num_cpus, "num_gpus": fleet.num_gpus}
    replicas = serve.deployment(
        Replica,
        autoscaling_config=scaling,
        ray_actor_options=share,
        max_ongoing_requests=fleet.max_batch + fleet.max_queue,
        max_queued_requests=fleet.front_settings.max_queue,
    ).bind(fleet)
    front = serve.deployment(Front, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1024)
    return front.bind(replicas, fleet, (token,) if token else ())


def read_option(name: str, value, kind: type):
    """Of a command line, where everything is text, or of YAML; ValueError if it is of another kind."""
    if kind is bool and isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if kind in (int, float) and isinstance(value, str):
        return kind(value)
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"Expected {name}=true or {name}=false, got {value!r}.")
    return value
