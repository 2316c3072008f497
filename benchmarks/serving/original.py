"""How the original serves (vla-scripts/deploy.py): FastAPI, json_numpy, one `predict_action` per request in a thread.

python benchmarks/serving/original.py CHECKPOINT UNNORM_KEY PORT

Its FastAPI is told not to be strict about content types, without which today's refuses its clients.
"""

import sys

import json_numpy
import uvicorn
from fastapi import Body, FastAPI
from fastapi.responses import JSONResponse
from PIL import Image

from openvla.serve.policy import OpenVLAPolicy

json_numpy.patch()
checkpoint, key, port = sys.argv[1:4]
policy = OpenVLAPolicy.from_pretrained(checkpoint, key, dtype="float32", device="cpu")
app = FastAPI(strict_content_type=False)


@app.post("/act")
def act(payload: dict = Body()) -> JSONResponse:  # noqa: B008
    prompt = policy.processor.build_prompt(payload["instruction"])
    inputs = policy.processor(prompt, Image.fromarray(payload["image"]).convert("RGB"))
    action = policy.model.predict_action(**inputs, unnorm_key=payload.get("unnorm_key", key))
    return JSONResponse(json_numpy.dumps(action))


uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")
