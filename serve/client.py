"""Asks a policy on a server, over the original's REST protocol: numpy and the standard library, no torch.

    client = ActClient("http://127.0.0.1:8000", unnorm_key="bridge_orig")
    actions = client.infer({"images": frame, "instruction": "pick up the cup"})["actions"]  # (T, A)

The protocol: POST /act with `{"image": uint8 array, "instruction": text, "unnorm_key": text}` as JSON, arrays as
json_numpy writes them; the answer is one array, `(A,)` or `(T, A)`, or a JSON string that holds it. The original
answers every failure with status 200 and the string "error". Source: vla-scripts/deploy.py of the original code.
"""

import base64
import json
import time
import urllib.error
import urllib.request

import numpy as np


class ActClient:
    """One server.

    Args:
        url: `http://host:port`, with or without `/act`.
        unnorm_key: sent with every observation; None: the server's choice.
        token: sent as `Authorization: Bearer …`.
        timeout: seconds to wait for an answer.
    """

    needs = ("images",)

    def __init__(self, url: str, unnorm_key: str | None = None, token: str | None = None, timeout: float = 60.0):
        self.url = url.rstrip("/").removesuffix("/act")
        self.unnorm_key, self.timeout = unnorm_key, timeout
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})

    def metadata(self) -> dict | None:
        """What the policy declares (`OpenVLAPolicy.metadata`); None from the original's, which does not tell."""
        try:
            return json.loads(self._ask("/metadata"))
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def infer(self, observation: dict) -> dict:
        """The action for one observation with one image; see `OpenVLAPolicy.infer`.

        Raises RuntimeError if the server fails or its answer is no finite array, OSError if it cannot be reached.
        """
        images = observation["images"]
        images = list(images.values()) if isinstance(images, dict) else images
        image = images[0] if isinstance(images, list | tuple) and len(images) == 1 else images
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            raise ValueError("Expected one image as a uint8 array: the original's protocol has no more cameras.")
        payload = {"image": _encode(image), "instruction": observation["instruction"]}
        payload |= {"unnorm_key": self.unnorm_key} if self.unnorm_key else {}
        start = time.perf_counter()
        try:
            answer = json.loads(self._ask("/act", json.dumps(payload).encode()))
        except urllib.error.HTTPError as error:
            said = error.read(1000).decode(errors="replace")
            raise RuntimeError(f"{self.url}/act answered {error.code}: {said}") from error
        timing = {"round_trip_ms": 1000 * (time.perf_counter() - start)}
        actions = _decode(answer)
        if actions.ndim not in (1, 2) or not np.isfinite(actions).all():
            raise RuntimeError(f"{self.url}/act answered no finite (A,) or (T, A), but {actions.tolist()}.")
        return {"actions": np.atleast_2d(actions), "timing": timing}

    def infer_batch(self, observations: list[dict]) -> list[dict]:
        """One after the other: the protocol has no batches."""
        return [self.infer(observation) for observation in observations]

    def _ask(self, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.url + path, body, self._headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            return answer.read()


def _encode(array: np.ndarray) -> dict:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def _decode(answer) -> np.ndarray:
    if isinstance(answer, str) and answer.startswith("{"):  # encoded twice
        answer = json.loads(answer)
    if not isinstance(answer, dict) or "__numpy__" not in answer:
        raise RuntimeError(f"The server answered {str(answer)[:200]!r} instead of an action; its log may say why.")
    kind = np.dtype(answer["dtype"])
    if kind.kind not in "fiu":
        raise RuntimeError(f"The server answered an array of {kind}, not of numbers.")
    return np.frombuffer(base64.b64decode(answer["__numpy__"]), kind).reshape(answer["shape"]).astype(np.float64)
