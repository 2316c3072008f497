"""Images and an instruction -> tensors: both towers' preprocessing, the prompt, and the image placeholders.

`OpenVLAImageProcessor` is PIL and numpy only and bit-equal to the original's torchvision pipeline; it reads released
`preprocessor_config.json` files unchanged. `OpenVLAProcessor` adds the tokenizer and the prompt the policy was trained
with, and puts one `<image>` id per image patch behind the first token, where the original inserts its patches.

Legend: B batch · C cameras · N towers · S pixels · L tokens.
"""

import json
import os

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AddedToken, BatchFeature
from transformers import __version__ as transformers_version
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessorMixin

from .configuration_openvla import RESIZE_STRATEGIES, OpenVLAConfig
from .oft_files import HUB_KEYS
from .tf_image_ops import center_crop, jpeg_round_trip, lanczos3_resize

IMAGE_TOKEN = "<image>"
_INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_TRANSFORMERS_4 = transformers_version.startswith("4.")


def to_pil(image) -> Image.Image:
    """One image of any accepted kind as an RGB `PIL.Image`.

    Args:
        image: `PIL.Image` (any mode; taken as it is), uint8 numpy array or torch tensor `(H, W)`, `(H, W, 1|3|4)` or
            `(1|3|4, H, W)`, or a path, URL or base64 string (EXIF rotation applied).

    Raises ValueError for other dtypes (floats would be silently rescaled) and shapes.
    """
    if isinstance(image, str | os.PathLike):
        if not os.path.isfile(image):
            return load_image(str(image))  # URL or base64; its error says what it cannot find
        image = ImageOps.exif_transpose(Image.open(image))
    if isinstance(image, Image.Image):
        if image.mode not in _MODES:  # PIL clips 16-bit and float pixels to 255: a white image
            raise ValueError(f"Expected 8-bit pixels, got an image of mode {image.mode!r}: scale it to 8 bits first.")
        return image.convert("RGB")
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"Expected an image as PIL.Image, uint8 array or tensor, path or URL, got {type(image).__name__}."
        )
    if image.dtype != np.uint8:
        raise ValueError(
            f"Expected uint8 pixels in [0, 255], got dtype {image.dtype} of shape {image.shape}: convert explicitly, "
            "e.g. (image * 255).round().astype(np.uint8) if it lies in [0, 1]."
        )
    if image.ndim == 3 and image.shape[-1] not in (1, 3, 4) and image.shape[0] in (1, 3, 4):
        image = image.transpose(1, 2, 0)
    if image.ndim not in (2, 3) or image.size == 0 or (image.ndim == 3 and image.shape[-1] not in (1, 3, 4)):
        raise ValueError(f"Expected an image (H, W), (H, W, 1|3|4) or (1|3|4, H, W), got shape {image.shape}.")
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB")


class OpenVLAImageProcessor(BaseImageProcessor):
    """RGB image -> `pixel_values` `(B, 3·N, S, S)` float32: one resized image, normalised once per tower.

    The first arguments are the fields of released `preprocessor_config.json` files. `tvf_normalize_params` wins over
    `means`/`stds`: in openvla-7b it holds ImageNet statistics rounded to bfloat16, which the policy was released with.

    Args:
        image_resize_strategy: "resize-naive" (squash), "resize-crop" (shorter side, then centre crop) or "letterbox"
            (pad to a square with the mean colour of the last tower).
        input_sizes: `(3, S, S)` per tower.
        interpolations: PIL filter per tower.
        means, stds: per tower and channel, for pixels in [0, 1].
        center_crop_area: share of the image's area to keep (0.9 for policies fine-tuned with random crops), cut out
            and stretched as TensorFlow does; None: whole image.
        jpeg_quality: pass the image through JPEG first, as evaluation on LIBERO does (95); None: not.
        lanczos3_size: side in pixels of TensorFlow's Lanczos3 resize that the training data went through (224), before
            crop and tower resize; None: not.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        use_fused_vision_backbone: bool = False,
        image_resize_strategy: str = "letterbox",
        input_sizes: list[tuple[int, int, int]] | None = None,
        interpolations: list[str] | None = None,
        means: list[tuple[float, float, float]] | None = None,
        stds: list[tuple[float, float, float]] | None = None,
        tvf_letterbox_fill: tuple[int, int, int] | None = None,
        tvf_normalize_params: list[dict] | None = None,
        center_crop_area: float | None = None,
        jpeg_quality: int | None = None,
        lanczos3_size: int | None = None,
        **kwargs,
    ):
        # Written out again by `save_pretrained`, so that the original's code can read the file: not used here.
        unused = {key: kwargs.pop(key) for key in [k for k in kwargs if k.startswith("tvf_")]}
        super().__init__(**kwargs)
        for key, value in unused.items():
            setattr(self, key, value)
        self.use_fused_vision_backbone = use_fused_vision_backbone
        self.image_resize_strategy = image_resize_strategy
        self.input_sizes = [tuple(size) for size in input_sizes or [(3, 224, 224)]]
        self.interpolations = list(interpolations or ["bicubic"] * len(self.input_sizes))
        self.means = [tuple(mean) for mean in means or [(0.5, 0.5, 0.5)] * len(self.input_sizes)]
        self.stds = [tuple(std) for std in stds or [(0.5, 0.5, 0.5)] * len(self.input_sizes)]
        self.tvf_letterbox_fill = tvf_letterbox_fill
        self.tvf_normalize_params = tvf_normalize_params
        self.center_crop_area = center_crop_area
        self.jpeg_quality = jpeg_quality
        self.lanczos3_size = lanczos3_size

        if image_resize_strategy not in RESIZE_STRATEGIES:
            raise ValueError(
                f"image_resize_strategy must be one of {RESIZE_STRATEGIES}, got {image_resize_strategy!r}."
            )
        if unknown := set(self.interpolations) - set(_INTERPOLATIONS):
            raise ValueError(f"interpolations must be among {sorted(_INTERPOLATIONS)}, got {sorted(unknown)}.")
        counts = {len(v) for v in (self.input_sizes, self.interpolations, self.means, self.stds, self._normalizations)}
        if len(counts) != 1:
            raise ValueError("input_sizes, interpolations, means, stds and tvf_normalize_params must agree in length.")

    @property
    def _normalizations(self) -> list[tuple[np.ndarray, np.ndarray]]:
        pairs = zip(self.means, self.stds)
        if self.tvf_normalize_params is not None:
            pairs = [(params["mean"], params["std"]) for params in self.tvf_normalize_params]
        return [tuple(np.asarray(v, dtype=np.float32).reshape(3, 1, 1) for v in pair) for pair in pairs]

    def preprocess(self, images, return_tensors: str | None = "pt", **overrides) -> BatchFeature:
        """Turns images into `pixel_values` `(B, 3·N, S, S)` float32.

        Args:
            images: one image or a list of them (see `to_pil`).
            return_tensors: "pt" or "np".
            overrides: `center_crop_area`, `jpeg_quality` and `lanczos3_size` for this call only.
        """
        options = {name: getattr(self, name) for name in ("center_crop_area", "jpeg_quality", "lanczos3_size")}
        if unknown := {name for name in overrides if name not in options}:
            raise TypeError(f"Unknown image options {sorted(unknown)}; known: {sorted(options)}.")
        options |= overrides
        images = images if isinstance(images, list | tuple) else [images]
        pixel_values = np.stack([self._transform(to_pil(image), **options) for image in images])
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def fit(self, image) -> np.ndarray:
        """One image (see `to_pil`) as the towers get it, before it is normalised: `(S, S, 3)` uint8.

        Fitted once more, or preprocessed, it stays as it is. Raises ValueError for towers that get different ones, and
        for options that would crop or blur it once more.
        """
        options = (self.center_crop_area, self.jpeg_quality, self.lanczos3_size)
        if len(set(zip(self.input_sizes, self.interpolations))) > 1 or any(option is not None for option in options):
            raise ValueError(
                f"Expected towers of one size and interpolation, got {self.input_sizes}, {self.interpolations}; and "
                f"center_crop_area, jpeg_quality and lanczos3_size None, got {options}."
            )
        image = to_pil(image)
        image = self._letterbox(image) if self.image_resize_strategy == "letterbox" else image
        return np.asarray(self._resize(image, self.input_sizes[0], _INTERPOLATIONS[self.interpolations[0]]))

    def _transform(self, image: Image.Image, center_crop_area, jpeg_quality, lanczos3_size) -> np.ndarray:
        # 1. What happened to the pixels before the original's processor saw them
        if jpeg_quality is not None:
            image = Image.fromarray(jpeg_round_trip(np.asarray(image), jpeg_quality))
        if lanczos3_size is not None:
            image = Image.fromarray(lanczos3_resize(np.asarray(image), lanczos3_size, lanczos3_size))
        if center_crop_area is not None:
            height, width = self.input_sizes[0][1:]
            image = Image.fromarray(center_crop(np.asarray(image), center_crop_area, height, width))

        # 2. The processor proper: a square image, then one normalised copy per tower
        if self.image_resize_strategy == "letterbox":
            image = self._letterbox(image)
        channels, previous = [], None
        for size, interpolation, (mean, std) in zip(self.input_sizes, self.interpolations, self._normalizations):
            if previous != (size, interpolation):
                resized, previous = self._resize(image, size, _INTERPOLATIONS[interpolation]), (size, interpolation)
                pixels = np.asarray(resized).transpose(2, 0, 1)  # (3, S, S) uint8
            # The 256 values that a pixel can have are normalised, and then picked: the same numbers, sooner
            values = (np.arange(256, dtype=np.float32) / np.float32(255) - mean[..., 0]) / std[..., 0]  # (3, 256)
            channels += [np.take(table, channel) for table, channel in zip(values, pixels)]
        return np.stack(channels)

    def _letterbox(self, image: Image.Image) -> Image.Image:
        fill = self.tvf_letterbox_fill or [int(value * 255) for value in self.means[-1]]
        side = max(image.size)
        left, top = (side - image.width) // 2, (side - image.height) // 2
        # An odd difference leaves the image one pixel short of square, as in the original; `_resize` crops the rest.
        padded = Image.new("RGB", (image.width + 2 * left, image.height + 2 * top), tuple(fill))
        padded.paste(image, (left, top))
        return padded

    def _resize(self, image: Image.Image, size: tuple[int, int, int], interpolation: int) -> Image.Image:
        _, height, width = size
        if self.image_resize_strategy == "resize-naive":
            return image.resize((width, height), interpolation)
        short, long = min(image.size), max(image.size)
        new_short, new_long = height, int(height * long / short)
        new_size = (new_short, new_long) if image.width <= image.height else (new_long, new_short)
        image = image.resize(new_size, interpolation)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))


class OpenVLAProcessor(ProcessorMixin):
    """Instruction(s) and image(s) -> `input_ids`, `attention_mask`, `pixel_values`.

        processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
        inputs = processor(processor.build_prompt("pick up the cup"), image)
        action = model.predict_action(**inputs, unnorm_key="bridge_orig")

    Args:
        image_processor: `OpenVLAImageProcessor`.
        tokenizer: fast tokenizer of the language model; `<image>` is added as its next free id.
        prompt_template: prompt with `{instruction}` to be filled in; None: `build_prompt` raises.
        prompt_end_token_id: id that ends every prompt ("▁", 29871, for Llama); None: there is none.
        num_patches: image placeholders per camera.
        num_cameras: images per observation.
        num_state_tokens: further placeholders, behind those of the images: one for proprioception, one for the time
            of denoising, if the policy has them.
        image_token_id: what the model takes for a placeholder; raises if the tokenizer gives `<image>` another id.
    """

    if _TRANSFORMERS_4:  # 5.x reads the signature of `__init__` instead
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        prompt_template: str | None = None,
        prompt_end_token_id: int | None = None,
        num_patches: int = 256,
        num_cameras: int = 1,
        num_state_tokens: int = 0,
        image_token_id: int | None = None,
        chat_template: str | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.prompt_template = prompt_template
        self.prompt_end_token_id = prompt_end_token_id
        self.num_patches = num_patches
        self.num_cameras = num_cameras
        self.num_state_tokens = num_state_tokens
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._check_image_token_id(image_token_id)

    def _check_image_token_id(self, expected: int | None) -> None:
        if expected not in (None, self.image_token_id):
            raise ValueError(
                f"The tokenizer gives {IMAGE_TOKEN!r} the id {self.image_token_id}, the model expects {expected} "
                f"(config.image_token_id): is this the model's tokenizer, with its {len(self.tokenizer)} tokens?"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Loads a processor; what old files do not declare (prompt, patches, cameras) comes from `config.json`."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        hub_kwargs = {key: kwargs[key] for key in (*HUB_KEYS, "force_download", "subfolder") if key in kwargs}
        declared, _ = cls.get_processor_dict(pretrained_model_name_or_path, **hub_kwargs)
        if "num_patches" not in declared:
            # The chunk, which OpenVLA-OFT's files do not tell, is not the processor's business.
            told = {name: kwargs[name] for name in ("num_cameras",) if kwargs.get(name) is not None}
            config_dict, _ = OpenVLAConfig.get_config_dict(
                pretrained_model_name_or_path, **hub_kwargs, **told, action_chunk=1
            )
            config = OpenVLAConfig.from_dict(config_dict)
            from_config = {
                "prompt_template": config.prompt_template,
                "prompt_end_token_id": config.prompt_end_token_id,
                "num_patches": config.num_image_tokens // config.num_cameras,
                "num_cameras": config.num_cameras,
                "num_state_tokens": config.num_placeholders - config.num_image_tokens,
            }
            for name, value in from_config.items():
                if name not in kwargs:
                    setattr(processor, name, value)
            processor._check_image_token_id(config.image_token_id)
        return processor

    def save_pretrained(self, save_directory, **kwargs):
        """Saves files that transformers 4.57 and 5.x and the original code's image processor can read."""
        if kwargs.pop("push_to_hub", False):  # which saves through this method first, then uploads
            return self.push_to_hub(kwargs.pop("repo_id", os.path.basename(save_directory)), **kwargs)
        saved = super().save_pretrained(save_directory, **kwargs)
        # Image settings have one owner, preprocessor_config.json; 5.x would nest a copy here and read that.
        self.image_processor.save_pretrained(save_directory)
        _rewrite_json(save_directory, "processor_config.json", drop=("image_processor",))
        # 5.x writes "TokenizersBackend", unknown to 4.57, and leaks arguments of the load call.
        drop = ("is_local", "local_files_only")
        _rewrite_json(save_directory, "tokenizer_config.json", drop, {"tokenizer_class": "PreTrainedTokenizerFast"})
        return saved

    def build_prompt(self, instruction: str) -> str:
        """The prompt for an instruction such as "pick up the cup", lower-cased as in training."""
        if self.prompt_template is None:
            raise ValueError(
                "This checkpoint does not say which prompt it was trained with: set `processor.prompt_template` to a "
                "text with '{instruction}' in it."
            )
        if not isinstance(instruction, str) or not instruction.strip():
            raise ValueError(f"Expected an instruction such as 'pick up the cup', got {instruction!r}.")
        if special := [token for token in {IMAGE_TOKEN, *self.tokenizer.all_special_tokens} if token in instruction]:
            raise ValueError(f"An instruction cannot contain the control tokens {special}: {instruction!r}.")
        return self.prompt_template.format(instruction=instruction.lower())

    def __call__(
        self,
        text: str | list[str] | None = None,
        images=None,
        proprio=None,
        padding: bool | str = True,
        max_length: int | None = None,
        padding_side: str = "left",
        add_special_tokens: bool = True,
        return_tensors: str | None = "pt",
        **image_options,
    ) -> BatchFeature:
        """Prepares prompts and images, in the original's order of arguments.

        Args:
            text: prompt(s); use `build_prompt`. `<image>` in it is redundant: placeholders have one fixed place.
            images: one image per prompt, or with several cameras one list of `num_cameras` images per prompt.
            proprio: the robot's state per prompt `(B, P)`, or `(P,)` for one, in the units of the policy's dataset.
            padding: True (to the longest row), "max_length", or False (rows must be equally long for tensors).
            max_length: in text tokens, image placeholders not counted; default: what the tokenizer declares. Longer
                prompts raise: cut, they would lose the end that asks for the action.
            padding_side: "left" or "right".
            image_options: for `OpenVLAImageProcessor.preprocess`.

        Returns `input_ids` and `attention_mask` `(B, L)` int64 and, with images, `pixel_values` `(B, 3·N·C, S, S)`;
        `proprio` `(B, P)` float32 as it came: `predict_action` normalises it.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"Expected text as a prompt or a list of prompts, got {text!r}; images come second.")
        features = {}
        if images is not None:
            features["pixel_values"] = self._pixel_values(images, len(texts), image_options)
        elif image_options:
            raise TypeError(f"Got {sorted(image_options)} but no images.")

        if proprio is not None:
            features["proprio"] = self._proprio(proprio, len(texts))

        # 1. Tokens of the text alone, so that placeholders cannot change them
        limit = max_length or self.tokenizer.model_max_length
        rows = []
        for prompt in texts:
            prompt = prompt.replace(IMAGE_TOKEN, "")
            ids = self.tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]
            if self._ends_prompt(prompt) and ids[-1] != self.prompt_end_token_id:
                ids = ids + [self.prompt_end_token_id]
            if len(ids) > limit:
                raise ValueError(f"The prompt has {len(ids)} tokens, more than {limit}: {prompt[:80]!r}…")
            rows.append(self.insert_image_tokens(ids) if images is not None else ids)

        # 2. One rectangle
        length = max(map(len, rows))
        if padding == "max_length":
            length = limit + (self.num_placeholders if images is not None else 0)
        if padding and len(set(map(len, rows))) + (padding == "max_length") > 1:
            pad = {"left": lambda row, fill: fill + row, "right": lambda row, fill: row + fill}[padding_side]
            mask = [pad([1] * len(row), [0] * (length - len(row))) for row in rows]
            rows = [pad(row, [self.tokenizer.pad_token_id] * (length - len(row))) for row in rows]
        else:
            mask = [[1] * len(row) for row in rows]
        features = {"input_ids": rows, "attention_mask": mask, **features}
        return BatchFeature(features, tensor_type=return_tensors)

    def insert_image_tokens(self, ids: list[int]) -> list[int]:
        """Puts one observation's placeholders behind the first token (BOS), where the original inserts its patches."""
        return ids[:1] + [self.image_token_id] * self.num_placeholders + ids[1:]

    @property
    def num_placeholders(self) -> int:
        """Ids `<image>` per observation."""
        return self.num_patches * self.num_cameras + self.num_state_tokens

    @staticmethod
    def _proprio(proprio, num_prompts: int) -> np.ndarray:
        states = np.asarray(torch.as_tensor(proprio).cpu(), dtype=np.float32)
        states = states[None] if states.ndim == 1 else states
        if states.ndim != 2 or len(states) != num_prompts or not np.isfinite(states).all():
            raise ValueError(f"Expected finite proprio ({num_prompts}, P), got {states.shape}: {states.tolist()}.")
        return states

    def _ends_prompt(self, prompt: str) -> bool:
        if self.prompt_end_token_id is None or self.prompt_template is None:
            return False
        return prompt.endswith(self.prompt_template.split("{instruction}")[1].lstrip("?"))

    def _pixel_values(self, images, num_prompts: int, image_options: dict) -> torch.Tensor:
        if not isinstance(images, list | tuple):
            images = [images]
        observations = [image if isinstance(image, list | tuple) else [image] for image in images]
        if len(observations) == self.num_cameras > 1 == num_prompts and all(len(o) == 1 for o in observations):
            observations = [[image for (image,) in observations]]  # one prompt with a flat list of its cameras
        counts = [len(observation) for observation in observations]
        if len(counts) != num_prompts or set(counts) != {self.num_cameras}:
            raise ValueError(
                f"Expected {num_prompts} observation(s) of {self.num_cameras} image(s), one per prompt, got "
                f"{len(counts)} observation(s) of {counts} image(s)."
            )
        flat = [image for observation in observations for image in observation]
        pixel_values = self.image_processor.preprocess(flat, **image_options)["pixel_values"]
        return pixel_values.reshape(num_prompts, -1, *pixel_values.shape[2:])  # cameras stacked on channels

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "proprio"]


def _rewrite_json(folder, name: str, drop: tuple[str, ...] = (), replace: dict | None = None) -> None:
    path = os.path.join(folder, name)
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    content = {key: value for key, value in content.items() if key not in drop} | (replace or {})
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
    os.replace(path + ".tmp", path)


OpenVLAImageProcessor.register_for_auto_class()
OpenVLAProcessor.register_for_auto_class()
