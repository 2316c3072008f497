"""openpi's client asks with LIBERO's and ALOHA's names; then something wrong, and goes on. Run by test_clients.py.

python openpi_acts.py PORT OUT.npz [TOKEN]
"""

import sys

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

port, out = int(sys.argv[1]), sys.argv[2]
client = WebsocketClientPolicy("127.0.0.1", port, api_key=sys.argv[3] if len(sys.argv) > 3 else None)
picture = np.random.default_rng(1).integers(0, 256, (224, 224, 3), dtype=np.uint8)
found = {"unnorm_key": np.array(client.get_server_metadata()["unnorm_key"])}
libero = {"observation/image": picture, "observation/state": np.zeros(8), "prompt": "pick up the cup"}
aloha = {"images": {"cam_high": picture.transpose(2, 0, 1)}, "state": np.zeros(14), "prompt": "pick up the cup"}
for name, observation in (("libero", libero), ("aloha", aloha)):
    answer = client.infer(observation)
    found[name] = answer["actions"]
    assert answer["server_timing"]["infer_ms"] > 0
try:
    client.infer({"observation/image": picture})
except RuntimeError as error:
    found["error"] = np.array(str(error))
found["after"] = client.infer(libero)["actions"]
np.savez(out, picture=picture, **found)
