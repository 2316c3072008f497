"""A real server on loopback, in a thread of the test, and what its policy was asked."""

import threading
import time
import urllib.request

from openvla.serve.server import make_server
from openvla.serve.service import LocalPolicy, Service, Settings


class Served:
    """`url`; `service`; `asked`: the observations of every batch.

    Args:
        policy: `OpenVLAPolicy`.
        default: its `unnorm_key` for clients that name none.
        tokens: see `Guard`.
        settings: of `Settings`.
    """

    def __init__(
        self, policy, default: str | None = None, tokens: tuple[str, ...] = (), only: bool = False, **settings
    ):
        settings = Settings(**{"self_check": False, **settings})
        self.backend = LocalPolicy(policy, settings, default, only)
        self.service, self.asked = Service(self.backend, settings), []
        self.backend.batcher.infer_batch = self._note
        self.server = make_server(self.service, tokens, port=0)

    def _note(self, observations: list[dict]) -> list[dict]:
        self.asked.append(observations)
        return self.backend.infer_batch(observations)

    def __enter__(self) -> "Served":
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        wait_for(lambda: self.server.started, 30)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        wait_for(lambda: self.service.ready, 60)
        self.asked.clear()
        return self

    def __exit__(self, *error) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def get(self, path: str) -> bytes:
        return urllib.request.urlopen(self.url + path, timeout=30).read()


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
