"""Serves a policy to robots: one port for all protocols, and a page to try it.

openvla serve runs/my-robot                       # on this machine: http://127.0.0.1:8000
openvla serve openvla/openvla-7b --unnorm-key bridge_orig --host 0.0.0.0 --token-file token.txt
openvla serve runs/my-robot --limits arm.json --max-age-ms 200 --max-batch 16

    POST /act                 the original's REST, OpenVLA-OFT's, or plain JSON with base64 pictures
    ws://…/                   openpi's websockets (openpi-client)
    ws://…/vla-eval           the vla-evaluation-harness
    /health /ready /metadata /metrics, and the page at /

A client that names no unnorm_key gets --unnorm-key's actions; websockets may ask with ?unnorm_key=… Actions are
checked to be finite and clamped to the range of the statistics, which answers tell. Wider than this machine it serves
only those who have a token (from --token-file, or the environment's OPENVLA_TOKEN). SIGTERM: what is asked is
answered, then it ends.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from importlib.resources import files
from pathlib import Path

from openvla import quantization
from openvla.cli import command_parser

log = logging.getLogger("openvla.serve")
MAX_SOCKETS = 256
MORE_REQUESTS = 16  # that are read at a time than observations that can be answered
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src blob:; connect-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def parser() -> argparse.ArgumentParser:
    arguments = command_parser("serve", __doc__)
    arguments.add_argument("model", metavar="CHECKPOINT", help="folder or Hub id")
    arguments.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all, with a token")
    arguments.add_argument("--port", type=int, default=8000, help="0: any that is free")
    arguments.add_argument("--token-file", type=Path, help="tokens that may ask, one per line")
    arguments.add_argument("--ssl-certfile", help="for https and wss")
    arguments.add_argument("--ssl-keyfile")
    arguments.add_argument("--unnorm-key", help="whose actions clients get who do not say; optional if there is one")
    arguments.add_argument(
        "--limits", type=Path, metavar="FILE", help="what the robot may do; see openvla.serve.safety"
    )
    arguments.add_argument("--no-clamp", action="store_true", help="leave actions beyond the statistics as they are")
    arguments.add_argument("--strict", action="store_true", help="fail if the model prefers a token that is no action")
    arguments.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, float16")
    arguments.add_argument("--device", help="cuda, cpu, …; default: cuda if there is one")
    quantization.add_argument(arguments)
    arguments.add_argument("--compile", metavar="MODE", help="of torch.compile, such as reduce-overhead")
    arguments.add_argument("--revision", help="branch, tag or commit on the Hub")
    arguments.add_argument(
        "--center-crop-area", type=float, metavar="SHARE", help="default: as the checkpoint declares"
    )
    arguments.add_argument("--action-chunk", type=int, metavar="STEPS", help="of a folder of OpenVLA-OFT's training")
    arguments.add_argument("--num-cameras", type=int, metavar="COUNT", help="of a folder of OpenVLA-OFT's training")
    arguments.add_argument(
        "--seed", type=int, help="of the noise that some heads start from; default: another each time"
    )
    arguments.add_argument("--max-batch", type=int, default=8, help="observations that the policy answers at a time")
    arguments.add_argument(
        "--max-wait-ms", type=float, default=0.0, help="how long the first of them waits for others"
    )
    arguments.add_argument("--max-queue", type=int, default=64, help="observations that may wait; beyond: 503")
    arguments.add_argument("--timeout-s", type=float, default=10.0, help="from arrival to action; beyond: 504")
    arguments.add_argument("--max-age-ms", type=float, help="how old an observation may be at its turn; beyond: 410")
    arguments.add_argument("--max-body-mb", type=float, default=16.0, help="of a request or a message; beyond: 413")
    arguments.add_argument("--max-pixels", type=int, default=8 * 2**20, help="of an observation's picture files")
    arguments.add_argument(
        "--execute", type=int, metavar="STEPS", help="of a chunk, before vla-eval's clients get another; default: all"
    )
    arguments.add_argument("--num-denoising-steps", type=int, metavar="COUNT", help="of heads that denoise")
    arguments.add_argument("--patience-s", type=float, default=10.0, help="at the end, for what is being answered")
    arguments.add_argument("--no-check", action="store_true", help="do not check at the start that the policy is fit")
    arguments.add_argument("--log-json", action="store_true", help="one JSON object per line")
    arguments.add_argument(
        "--log-answers", action="store_true", help="a line for every answer, not for refusals alone"
    )
    return arguments


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    tokens = read_tokens(args.token_file)
    from openvla.serve.guard import is_local

    if not is_local(args.host) and not tokens:
        raise ValueError(
            f"--host {args.host} lets others ask: give --token-file, or OPENVLA_TOKEN in the environment. Whoever can "
            "ask moves your robot."
        )
    start_logging(args.log_json, args.log_answers)

    from openvla.serve.policy import OpenVLAPolicy
    from openvla.serve.service import LocalPolicy, Service

    settings = read_settings(args)
    told = {name: getattr(args, name) for name in ("dtype", "device", "revision", "action_chunk", "num_cameras")}
    told |= {"quantize": args.quantize, "compile_mode": args.compile}
    crop = {} if args.center_crop_area is None else {"center_crop_area": args.center_crop_area}
    policy = OpenVLAPolicy.from_pretrained(
        args.model,
        args.unnorm_key,
        image_options=crop,
        strict=args.strict,
        seed=args.seed,
        num_denoising_steps=args.num_denoising_steps,
        batch_sizes=tuple(range(1, args.max_batch + 1)),
        clamp=not args.no_clamp,
        limits=args.limits,
        any_key=args.limits is None,
        **told,
    )
    if (args.execute or 1) > policy.model.config.action_chunk:
        raise ValueError(
            f"--execute {args.execute}: this policy's chunks have {policy.model.config.action_chunk} steps."
        )
    service = Service(LocalPolicy(policy, settings, args.unnorm_key, only=args.limits is not None), settings)
    certificate = {"ssl_certfile": args.ssl_certfile, "ssl_keyfile": args.ssl_keyfile}
    make_server(service, tokens, args.host, args.port, **certificate).run()


def read_settings(args):
    from openvla.serve.service import Settings

    names = ("max_batch", "max_wait_ms", "max_queue", "timeout_s", "max_age_ms", "max_pixels", "patience_s", "execute")
    given = {name: getattr(args, name) for name in names}
    return Settings(**given, max_body=int(args.max_body_mb * 2**20), self_check=not args.no_check)


def read_tokens(file: Path | None) -> tuple[str, ...]:
    """Of a file, or the environment."""
    lines = file.read_text().splitlines() if file else [os.environ.get("OPENVLA_TOKEN", "")]
    tokens = tuple(line.strip() for line in lines if line.strip())
    if file and not tokens:
        raise ValueError(f"{file} holds no token, which is a line of text.")
    return tokens


def create_app(service, tokens: tuple[str, ...] = (), only_local: bool = False):
    """The ASGI application: all protocols, behind the guard. The service starts and stops with it.

    Args:
        tokens, only_local: see `Guard`.
    """
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route, WebSocketRoute

    from openvla.serve import metrics, rest
    from openvla.serve.batching import Refused
    from openvla.serve.guard import Guard
    from openvla.serve.openpi import openpi
    from openvla.serve.service import describe
    from openvla.serve.vla_eval import vla_eval
    from openvla.serve.wire import Malformed

    async def health(request):
        return JSONResponse({"status": "ok"})

    async def healthz(request):  # as openpi's server says it
        return PlainTextResponse("OK\n")

    async def ready(request):
        problem = service.unhealthy
        return JSONResponse({"ready": problem is None, "problem": problem}, 200 if problem is None else 503)

    async def metadata(request):
        default, first = service.backend.default, next(iter(service.backend.metadata), None)
        try:
            key = request.query_params.get("unnorm_key") or default or first
            return JSONResponse({**service.metadata(key), "default_unnorm_key": default})
        except (Malformed, Refused) as error:
            status, words = describe(error)
            return JSONResponse({"error": words}, status)

    async def counts(request):
        service.metrics.ready.set(service.unhealthy is None)
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    def page(name: str, media_type: str):
        content = files("openvla.serve").joinpath(name).read_bytes()

        async def answer(request):
            return Response(content, media_type=media_type, headers=SECURITY)

        return answer

    async def failed(request, error):
        return JSONResponse({"error": "The server failed; its log tells why."}, 500)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        starting = asyncio.create_task(service.start())  # meanwhile /health and /ready answer
        yield
        starting.cancel()
        service.backend.stop()

    routes = [
        Route("/", page("page.html", "text/html")),
        Route("/page.js", page("page.js", "text/javascript")),
        Route("/act", rest.act, methods=["POST"]),
        Route("/reset", rest.reset, methods=["POST"]),
        Route("/health", health),
        Route("/healthz", healthz),
        Route("/ready", ready),
        Route("/metadata", metadata),
        Route("/metrics", counts),
        WebSocketRoute("/", openpi),
        WebSocketRoute("/vla-eval", vla_eval),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={500: failed})
    app.state.service = service
    most = service.settings.max_queue + 2 * service.settings.max_batch + MORE_REQUESTS
    return Guard(app, tokens, service.settings.max_body, MAX_SOCKETS, most, only_local)


def make_server(service, tokens: tuple[str, ...] = (), host: str = "127.0.0.1", port: int = 8000, **options):
    """A `uvicorn.Server`; `.run()` listens until it is told to stop.

    Args:
        options: for `uvicorn.Config`, such as `ssl_certfile`.
    """
    import uvicorn

    from openvla.serve.guard import PatientProtocol, PatientSockets, is_local

    class Server(uvicorn.Server):
        """Answers what is asked before it ends: uvicorn alone drops websockets at once."""

        loop: asyncio.AbstractEventLoop | None = None
        stopping: asyncio.Task | None = None

        async def startup(self, sockets=None) -> None:
            self.loop = asyncio.get_running_loop()
            await super().startup(sockets)

        def handle_exit(self, sig, frame) -> None:
            if self.loop is None or self.stopping is not None:  # before it began, or told twice
                super().handle_exit(signal.SIGINT, frame)
            else:
                self.loop.call_soon_threadsafe(self._stop, sig, frame)

        def _stop(self, sig, frame) -> None:
            self.stopping = self.loop.create_task(self._drain(sig, frame))

        async def _drain(self, sig, frame) -> None:
            log.info("stopping: %d observations are being answered", service.answering)
            for server in self.servers:  # who comes now is refused
                server.close()
            await service.drain()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        create_app(service, tokens, only_local=is_local(host) and not tokens),
        host=host,
        port=port,
        http=PatientProtocol,
        ws=PatientSockets,
        ws_max_size=2 * service.settings.max_body,  # up to there the sender is told why, beyond it is cut off
        ws_ping_interval=None,  # simulators block their client for a minute at a time
        ws_per_message_deflate=False,  # a small message may not become a large one, and pictures are compressed
        timeout_keep_alive=60,
        timeout_graceful_shutdown=5,
        limit_concurrency=1024,
        log_config=None,
        access_log=False,
        server_header=False,
        **options,
    )
    return Server(config)


# --- Logs ------------------------------------------------------------------------------------------------------------
class JsonLines(logging.Formatter):
    """A record as one JSON object, with what `extra` held."""

    known = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        fields |= {name: value for name, value in vars(record).items() if name not in self.known}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def start_logging(as_json: bool, answers: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    # uvicorn's, after a websocket that the guard has answered with a status
    handler.addFilter(lambda record: "without completing handshake" not in record.getMessage())
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    for name in ("openvla.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.DEBUG if answers and name == "openvla.serve" else logging.INFO)
