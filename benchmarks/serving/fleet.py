"""`openvla.serve.ray_app` on this machine, one replica.

python benchmarks/serving/fleet.py CHECKPOINT UNNORM_KEY PORT
"""

import signal
import sys
import threading

import ray
from ray import serve

from openvla.serve.ray_app import app

checkpoint, key, port = sys.argv[1:4]
ray.init(num_cpus=2, include_dashboard=False, configure_logging=True, logging_level="warning")
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
options = {"checkpoint": checkpoint, "unnorm_key": key, "dtype": "float32", "self_check": "false", "clamp": "false"}
options["without_token"] = "true"
serve.run(app(options))
ended = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: ended.set())
ended.wait()
serve.shutdown()
ray.shutdown()
