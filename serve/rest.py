"""POST /act, as the original and OpenVLA-OFT speak it, and in plain JSON; POST /reset.

Requests are told apart by what is in them; the Content-Type does not matter, as robots' scripts leave it out:

    original   {"image": json_numpy, "instruction": text, "unnorm_key": text}    -> json_numpy (A,); of chunks (T, A)
    OFT        {"full_image": json_numpy, "…wrist_image": …, "state": …}         -> a list of T json_numpy (A,)
    plain      {"image": base64 of a PNG, JPEG or WebP file, "instruction": text}
                             -> {"actions": (T, A) as lists, "unnorm_key", "dims", "timing", "clamped", …}
               with "draw": true also "drawing", a PNG in base64 of the motion beside the first picture

Several cameras come as `images`, by name or as a list in the policy's order. Whoever wraps a request as
{"encoded": its JSON as text} gets the answer as JSON in text, too. Any of them may hold `session` (text: a newer
observation replaces one that waits), `timestamp` (seconds since 1970, when the picture was taken) or `age_ms` (its age
when it was sent), `max_age_ms`, and `seed` for heads that denoise. What was clamped the header X-Clamped tells, as
JSON. Failures are 4xx and 5xx with {"error": text}, never 200.
Source: vla-scripts/deploy.py of openvla and openvla-oft.
"""

import asyncio
import base64
import io
import json

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from openvla.serve.batching import Refused
from openvla.serve.drawing import draw_motion
from openvla.serve.observations import OPTIONS, read_observation, read_turn
from openvla.serve.service import Service, describe, unless
from openvla.serve.wire import Malformed, Pictures, read_json, write_json_numpy

DRAWN_SIDE = 1024  # pixels of the picture that a motion is drawn on, at most


async def act(request: Request) -> Response:
    """One observation, one chunk."""
    service: Service = request.app.state.service
    arrived = request.scope["arrived"]
    try:
        with service.answer_one("rest", arrived):
            body = await request.body()
            content, encoded = await asyncio.to_thread(_read, body)
            metadata = service.metadata(content.get("unnorm_key"))
            observation, plain = await asyncio.to_thread(_observe, content, metadata, service.settings.max_pixels)
            turn = read_turn(content, arrived)
            answer = await unless(_leaves(request), service.act(observation, turn))
            style = "plain" if plain else "oft" if "full_image" in content else "original"
            reply = _write(answer, metadata, style)
            if plain and content.get("draw"):
                reply["drawing"] = await asyncio.to_thread(_draw, observation["images"][0], reply, metadata)
            text = json.dumps(reply)
            clamped = {"X-Clamped": json.dumps(answer["clamped"])} if answer.get("clamped") else None
            return Response(json.dumps(text) if encoded else text, 200, clamped, "application/json")
    except (Refused, Malformed) as error:
        status, words = describe(error)
        headers = {"Retry-After": "1"} if status == 503 else None
        return JSONResponse({"error": words}, status, headers)


async def _leaves(request: Request) -> None:
    """Ends when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def reset(request: Request) -> Response:
    """A new episode: nothing to forget here, as chunks are the client's."""
    return JSONResponse({"status": "ok"})


def _read(body: bytes) -> tuple[dict, bool]:
    """The request, and whether it was JSON in text."""
    content = read_json(body)
    encoded = isinstance(content, dict) and set(content) == {"encoded"}
    if encoded:
        if not isinstance(content["encoded"], str):
            raise Malformed(f'Expected text in "encoded", got {type(content["encoded"]).__name__}.')
        content = read_json(content["encoded"])
    if not isinstance(content, dict):
        raise Malformed(f"Expected an observation as a JSON object, got {type(content).__name__}.")
    return content, encoded


def _observe(content: dict, metadata: dict, max_pixels: int) -> tuple[dict, bool]:
    """For the policy, and whether pictures came as files."""
    pictures = Pictures(max_pixels)
    content, plain = dict(content), False
    for name in ("image", "images"):
        given = content.get(name)
        entries = given.values() if isinstance(given, dict) else given if isinstance(given, list) else [given]
        if not any(isinstance(each, str) for each in entries):
            continue
        plain = True
        read = [pictures.read(each) if isinstance(each, str) else each for each in entries]
        content[name] = (
            dict(zip(given, read)) if isinstance(given, dict) else read if isinstance(given, list) else read[0]
        )
    if not isinstance(content.get("draw"), bool | None):
        raise Malformed(f"Expected draw as true or false, got {str(content['draw'])[:40]!r}.")
    observation = read_observation(content, metadata, (*OPTIONS, "draw"))
    return observation | {"unnorm_key": metadata["unnorm_key"]}, plain


def _draw(picture: np.ndarray, reply: dict, metadata: dict) -> str:
    dims = [(dim["name"], dim["unit"]) for dim in metadata["action_dims"]]
    low, high = ([dim[end] for dim in metadata["action_dims"]] for end in ("low", "high"))
    stats = {"q01": low, "q99": high, "mask": metadata["mask"]}
    file, image = io.BytesIO(), Image.fromarray(picture)
    image.thumbnail((DRAWN_SIDE, DRAWN_SIDE))
    draw_motion(image, np.asarray(reply["actions"]), dims, stats).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _write(answer: dict, metadata: dict, style: str):
    """In types of JSON."""
    actions = answer["actions"]  # (T, A)
    if style == "original":
        return write_json_numpy(actions[0] if len(actions) == 1 else actions)
    if style == "oft":
        return [write_json_numpy(action) for action in actions]
    dims = [{"name": dim["name"], "unit": dim["unit"]} for dim in metadata["action_dims"]]
    rest = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in answer.items()}
    return {**rest, "unnorm_key": metadata["unnorm_key"], "dims": dims}
