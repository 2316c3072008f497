"""The same policy under LitServe, with its batches.

python benchmarks/serving/lit.py CHECKPOINT UNNORM_KEY PORT
"""

import base64
import sys

import litserve
import numpy as np

from openvla.serve.policy import OpenVLAPolicy
from openvla.serve.wire import write_json_numpy

checkpoint, key, port = sys.argv[1:4]


class Act(litserve.LitAPI):
    def setup(self, device) -> None:
        self.policy = OpenVLAPolicy.from_pretrained(checkpoint, key, dtype="float32", device="cpu")

    def decode_request(self, request: dict) -> dict:
        image = request["image"]
        pixels = np.frombuffer(base64.b64decode(image["__numpy__"]), image["dtype"]).reshape(image["shape"])
        return {"images": pixels, "instruction": request["instruction"]}

    def batch(self, inputs: list[dict]) -> list[dict]:
        return inputs

    def predict(self, inputs: list[dict]) -> list[np.ndarray]:
        return [answer["actions"][0] for answer in self.policy.infer_batch(inputs)]

    def unbatch(self, output: list[np.ndarray]):
        return output

    def encode_response(self, output: np.ndarray) -> dict:
        return write_json_numpy(output)


if __name__ == "__main__":
    api = Act(max_batch_size=8, batch_timeout=0.002, api_path="/act")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(host="127.0.0.1", port=int(port), log_level="warning", generate_client_file=False)
