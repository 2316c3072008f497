"""Hosts a policy on Hugging Face Inference Endpoints, which run this file if it lies beside the weights.

curl "$ENDPOINT?instruction=pick%20up%20the%20cup&unnorm_key=bridge_orig" -H "Authorization: Bearer $HF_TOKEN" \
    -H "Content-Type: image/png" --data-binary @frame.png
curl "$ENDPOINT" -H "Authorization: Bearer $HF_TOKEN" -H "Content-Type: application/json" --data @request.json

with a request such as

    {"inputs": {"image": "iVBORw0KG…", "instruction": "pick up the cup"}, "parameters": {"unnorm_key": "bridge_orig"}}

`inputs` is one observation or a list of them; a policy with several cameras takes `images`, a list in its order, and
one that feels its robot `proprio` (or `state`), numbers in the units of its dataset. The reply, one per observation:

    {"action": [A] or [T][A], in the units of `dims`      "unnorm_key": whose statistics gave the units
     "dims": [{"name": "x", "unit": "m"}, …]              "milliseconds": for the whole request}

and of policies with tokens "token_ids" and "replaced", per token, as `predict_action` gives them.

What cannot be answered raises, ValueError if the request is at fault, and the service turns that into status 400 with
the message; there is no default action. Images come as base64 only: no URL is fetched and no path is opened.
"""

import base64
import io
import math
import re
import struct
import sys
import threading
import time

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor

MAX_OBSERVATIONS = 16
MAX_INSTRUCTION = 2000  # characters
MAX_ENCODED = 12 * 2**20  # characters of base64 per image: 9 MiB of PNG, JPEG or WebP
MAX_PIXELS = 4096 * 4096  # per image; a PNG of 109 kB can hold 900 million
FORMATS = ("PNG", "JPEG", "WEBP")
# What PIL raises for files in disarray; the last three come from EXIF data, which it rewrites when it turns a picture.
DAMAGED = (OSError, ValueError, SyntaxError, TypeError, AttributeError, struct.error)
DATA_URL = re.compile(r"data:image/(png|jpeg|webp);base64,")
PARAMETERS = {
    "unnorm_key": str,
    "instruction": str,  # for observations that are a bare image
    "strict": bool,
    "do_sample": bool,
    "temperature": float,
    "top_p": float,
    "seed": int,  # of the noise that heads which denoise start from: the same for every observation
    "num_denoising_steps": int,
}
NOISE = {"seed", "num_denoising_steps"}
STATE = ("proprio", "state")  # names of the same
EXPECTED = '{"image": base64 of a PNG, JPEG or WebP file, "instruction": text}'


class EndpointHandler:
    """Loads a policy once, checks that it looks at its image, and answers requests one at a time.

    Args:
        path: folder with the policy and this file. bfloat16 on CUDA, float32 on a processor.

    Raises at start if the policy has no usable statistics, or acts without regard to the image, as the original code
    does on newer versions of transformers, without a word.
    """

    def __init__(self, path: str = ""):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True, dtype=dtype)
        self.model = model.to(device).eval()
        # The `action_tokenizer.py` that the model itself was loaded with, wherever transformers has put it.
        self.action_tokenizer = sys.modules[type(self.model.action_tokenizer).__module__]
        self.one_at_a_time = threading.Lock()  # two at once would share the device and double the memory
        self._check_sight()

    def __call__(self, data: dict) -> dict | list[dict]:
        """Answers `{"inputs": …, "parameters": {…}}`; see the top of this file."""
        start = time.perf_counter()
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError(f'Expected a request {{"inputs": {EXPECTED}, "parameters": {{…}}}}, got {_brief(data)}.')
        if unknown := sorted(map(str, set(data) - {"inputs", "parameters"})):
            raise ValueError(f"Unknown keys {unknown[:5]} in a request: they belong into its inputs or parameters.")
        parameters = _read_parameters(data.get("parameters"))
        instruction = parameters.pop("instruction", None)
        unnorm_key = self._resolve_unnorm_key(parameters.pop("unnorm_key", None))
        if not self.model.config.denoises and (unused := NOISE & set(parameters)):
            raise ValueError(
                f"Parameters {sorted(unused)} are for heads that denoise, which this policy does not have."
            )
        batch = data["inputs"] if isinstance(data["inputs"], list) else [data["inputs"]]
        if not 1 <= len(batch) <= MAX_OBSERVATIONS:
            raise ValueError(f"Expected 1 to {MAX_OBSERVATIONS} observations in a request, got {len(batch)}.")

        # 1. Tensors. Prompts first: they are cheap to refuse
        observations = [self._read_observation(observation, instruction) for observation in batch]
        prompts = [self.processor.build_prompt(instruction) for _, instruction, _ in observations]
        images = [[decode_image(image) for image in images] for images, _, _ in observations]
        states = [state for _, _, state in observations] if self.model.config.proprio_dim else None
        parameters["noise"] = self.model.draw_noise([parameters.pop("seed", None)] * len(batch))
        inputs = self.processor(prompts, images, states).to(self.model.device)

        # 2. Actions
        with self.one_at_a_time:
            result = self.model.predict_action(**inputs, unnorm_key=unnorm_key, return_dict=True, **parameters)
        actions = result["actions"] if len(batch) > 1 else result["actions"][None]
        if not np.isfinite(actions).all():
            raise RuntimeError(
                f"The action holds NaN or infinity: {actions.tolist()}. Check norm_stats[{unnorm_key!r}]."
            )

        # 3. Replies, in types of JSON
        dims = self.action_tokenizer.name_action_dims(self.model.norm_stats, unnorm_key)
        shared = {"unnorm_key": unnorm_key, "dims": [{"name": name, "unit": unit} for name, unit in dims]}
        milliseconds = round(1000 * (time.perf_counter() - start), 1)
        replies = [
            {
                "action": actions[row].tolist(),
                **shared,
                **{name: result[name][row].tolist() for name in ("token_ids", "replaced") if name in result},
                "milliseconds": milliseconds,
            }
            for row in range(len(batch))
        ]
        return replies if isinstance(data["inputs"], list) else replies[0]

    def _read_observation(self, observation, instruction: str | None) -> tuple[list, str, list[float] | None]:
        """`(images, still encoded, instruction and the robot's state)` of one observation."""
        if isinstance(observation, Image.Image):  # the service decodes bodies of type image/* itself
            observation = {"image": observation}
        if not isinstance(observation, dict):
            raise ValueError(f"Expected an observation {EXPECTED}, got {_brief(observation)}.")
        if unknown := sorted(set(observation) - {"image", "images", "instruction", *STATE}):
            raise ValueError(f"Unknown keys {unknown[:5]} in an observation; expected {EXPECTED}.")
        if ("image" in observation) == ("images" in observation):
            raise ValueError('An observation needs either "image" or, for several cameras, "images".')
        images = observation["images"] if "images" in observation else [observation["image"]]
        count = self.processor.num_cameras
        if not isinstance(images, list) or len(images) != count:
            got = len(images) if isinstance(images, list) else _brief(images)
            raise ValueError(f"This policy looks at {count} image(s) per observation, got {got}.")
        instruction = observation.get("instruction", instruction)
        if not isinstance(instruction, str):
            raise ValueError(
                f"Expected an instruction such as 'pick up the cup', got {_brief(instruction)}: pass it in the "
                'observation, or for a bare image as parameters["instruction"].'
            )
        if len(instruction) > MAX_INSTRUCTION:
            raise ValueError(f"An instruction may have {MAX_INSTRUCTION} characters, got {len(instruction)}.")
        return images, instruction, self._read_state(observation)

    def _read_state(self, observation: dict) -> list[float] | None:
        """`proprio` or `state` of an observation, for policies that take it; ValueError if it does not fit."""
        given, count = [name for name in STATE if name in observation], self.model.config.proprio_dim
        if not count and given:
            raise ValueError(f"This policy does not take the robot's state: leave {given[0]!r} out.")
        if not count:
            return None
        state = observation[given[0]] if len(given) == 1 else None
        is_whole = isinstance(state, list) and len(state) == count and all(map(_is_number, state))
        if not is_whole:
            got = f"{len(given)} of {list(STATE)}" if len(given) != 1 else _brief(state)
            got = f"{len(state)} entries: {str(state)[:200]}" if isinstance(state, list) else got
            raise ValueError(
                f'This policy takes the robot\'s state as "proprio", {count} finite numbers in the units of its '
                f"dataset, got {got}."
            )
        return state

    def _resolve_unnorm_key(self, unnorm_key: str | None) -> str:
        try:
            return self.action_tokenizer.resolve_unnorm_key(self.model.norm_stats, unnorm_key)
        except KeyError as error:  # whose text would reach the caller as a quoted Python string
            raise ValueError(error.args[0]) from None

    def _check_sight(self) -> None:
        """Acts on two scenes, which also warms up, and raises unless the state behind the first action changes."""
        dims = [self.model.get_action_dim(key) for key in self.model.norm_stats or [None]]  # raises if one is unusable
        ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (256, 256))
        stripes = np.where(np.arange(256) // 32 % 2, 255, 40).astype(np.uint8)
        stripes = np.broadcast_to(stripes[:, None], (256, 256))
        prompt = self.processor.build_prompt("pick up the red cup")
        states, config = [], self.model.config
        noise = torch.zeros(1, config.action_chunk, dims[0])
        steps = 1 if config.denoises else None
        options = {"action_dim": dims[0], "noise": noise, "num_denoising_steps": steps, "output_hidden_states": True}
        for scene in (ramp, stripes):
            inputs = self.processor(prompt, [[scene] * self.processor.num_cameras]).to(self.model.device)
            if config.proprio_dim:
                options["proprio"] = torch.zeros(1, config.proprio_dim, device=self.model.device)
            output = self.model.sample_actions(**inputs, **options)
            states.append(output.hidden_states[0, 0].float())
        change = ((states[1] - states[0]).norm() / states[0].norm()).item()
        if not change > 1e-6:  # also when NaN
            raise RuntimeError(
                f"Another image changes the state behind the action by {change:.1e}: this policy does not look at its "
                "image. Do not act with it; `openvla doctor` tells more."
            )


def decode_image(image: str | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture of a base64 string, upright as its EXIF data says, or of what the service has decoded already.

    Size and format are checked before any pixel is decoded. ValueError for everything else.
    """
    if isinstance(image, str):
        if len(image) > MAX_ENCODED:
            raise ValueError(f"An image may have {MAX_ENCODED} characters of base64, got {len(image)}: scale it down.")
        match = DATA_URL.match(image)
        try:
            content = base64.b64decode(image[match.end() :] if match else image, validate=True)
        except ValueError as error:
            raise ValueError(
                f"Expected an image as base64 without line breaks, got {_brief(image)} ({error}). URLs and paths are "
                "not read: send the content of the file."
            ) from None
        return decode_file(content, max_pixels)
    if not isinstance(image, Image.Image):
        raise ValueError(f"Expected an image as base64 of a PNG, JPEG or WebP file, got {_brief(image)}.")
    return _upright(image, max_pixels)


def decode_file(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture of a PNG, JPEG or WebP file; see `decode_image`."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)  # reads the header alone
    except Image.DecompressionBombError as error:  # PIL's own limit, ten times ours
        raise ValueError(f"An image may have {max_pixels} pixels, got far more: {error}") from None
    except DAMAGED:
        raise ValueError(
            f"Expected a PNG, JPEG or WebP file, got {len(content)} bytes that are none: {content[:16]!r}."
        ) from None
    return _upright(image, max_pixels)


def _upright(image: Image.Image, max_pixels: int) -> Image.Image:
    if image.width * image.height > max_pixels:
        raise ValueError(f"An image may have {max_pixels} pixels, got {image.width}x{image.height}: scale it down.")
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except DAMAGED as error:
        raise ValueError(f"The image of {image.width}x{image.height} pixels is damaged: {error}.") from None


def _read_parameters(parameters) -> dict:
    """Parameters that are given, each of its type; ValueError otherwise."""
    if not isinstance(parameters, dict | None):
        raise ValueError(
            f"Expected parameters as an object with some of {sorted(PARAMETERS)}, got {_brief(parameters)}."
        )
    parameters = {name: value for name, value in (parameters or {}).items() if value is not None}
    if unknown := sorted(set(parameters) - set(PARAMETERS)):
        raise ValueError(f"Unknown parameters {unknown[:5]}; known: {sorted(PARAMETERS)}.")
    for name, value in parameters.items():
        kind = PARAMETERS[name]
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or (kind is float and not math.isfinite(value)):
            wanted = "finite number" if kind is float else kind.__name__
            raise ValueError(f"Parameter {name!r} must be a {wanted}, got {_brief(value)}.")
    if not parameters.get("do_sample") and (unused := {"temperature", "top_p"} & set(parameters)):
        raise ValueError(f"Parameters {sorted(unused)} have no effect without do_sample: true.")
    return parameters


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _brief(value) -> str:
    """What came, short enough for a message."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:60]!r}… ({len(value)} characters)"
    return repr(value) if isinstance(value, bool | int | float | None) else type(value).__name__
