"""A server on loopback that answers as the original's deploy.py does, with what a test tells it to."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np


class ActServer:
    """`answer`, `metadata`: status and JSON (None: 404); `asked`: path, headers and body of every request."""

    def __init__(self, answer: tuple, port: int = 0):
        self.answer, self.metadata, self.asked, self.port = answer, None, [], port

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


def as_json_numpy(array: np.ndarray) -> dict:
    data = base64.b64encode(array.tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def _handler(server: ActServer) -> type:
    class Handler(BaseHTTPRequestHandler):
        def _reply(self, status: int, content) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self._reply(*(server.metadata or (404, {"detail": "Not Found"})))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append((self.path, self.headers, body))
            self._reply(*server.answer)

        def log_message(self, *args):
            pass

    return Handler
