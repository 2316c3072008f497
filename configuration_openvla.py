"""What an OpenVLA policy is: vision towers, projector, language model, action representation and dataset statistics.

Reads every `config.json` of the OpenVLA family unchanged. Class defaults are those of the original class, because
released files omit the keys that equal them: an empty config is openvla-v01 (SigLIP, Vicuna, letterbox), and
openvla-7b spells out what differs. The same goes for `text_config`: released files hold only what differs from
`LlamaConfig` of transformers 4.40.1, so those defaults are written out here instead of being taken from whatever
version is installed (`rms_norm_eps` 1e-6 although Llama-2 was trained with 1e-5: the released policies act with it).
"""

import inspect
import json
import os
from dataclasses import dataclass, fields, replace

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from .oft_files import HUB_KEYS, find_oft, oft_fields


@dataclass(frozen=True)
class VisionTowerConfig:
    """Sizes of one vision transformer, in timm's argument names. Defaults: what the released towers share."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 14
    image_size: int = 224  # pixels, square
    mlp_ratio: float = 4.0
    class_token: bool = True
    reg_tokens: int = 0
    no_embed_class: bool = False  # True: the position table covers patches only, prefix tokens get none
    init_values: float | None = None  # LayerScale start value; None: no LayerScale
    pre_norm: bool = False  # CLIP: LayerNorm before the first block, and no bias in the patch embedding
    act_layer: str = "gelu"  # "gelu" is exact (erf) in every released tower; "quick_gelu" for CLIP
    norm_eps: float = 1e-6
    global_pool: str = "token"  # describes the checkpoint only: neither class token nor pool head reaches the LLM

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        return int(self.class_token) + self.reg_tokens


_DINOV2 = VisionTowerConfig(1024, 24, 16, reg_tokens=4, no_embed_class=True, init_values=1e-5)
_SIGLIP = VisionTowerConfig(1152, 27, 16, mlp_ratio=3.7362, class_token=False, global_pool="map")
_CLIP = VisionTowerConfig(1024, 24, 16, pre_norm=True, act_layer="quick_gelu", norm_eps=1e-5)
TIMM_TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": _DINOV2,
    "vit_so400m_patch14_siglip_224": _SIGLIP,
    "vit_so400m_patch14_siglip_384": _SIGLIP,
    "vit_large_patch14_clip_224.openai": _CLIP,
    "vit_large_patch14_clip_336.openai": _CLIP,
    "vit_large_patch16_224.augreg_in21k_ft_in1k": VisionTowerConfig(1024, 24, 16, patch_size=16),
}

# vision_backbone_id -> (timm ids, image size). Two ids: features are concatenated on channels ("fused").
_DINOV2_ID = "vit_large_patch14_reg4_dinov2.lvd142m"
VISION_BACKBONES = {
    "clip-vit-l": (["vit_large_patch14_clip_224.openai"], 224),
    "clip-vit-l-336px": (["vit_large_patch14_clip_336.openai"], 336),
    "siglip-vit-so400m": (["vit_so400m_patch14_siglip_224"], 224),
    "siglip-vit-so400m-384px": (["vit_so400m_patch14_siglip_384"], 384),
    "dinov2-vit-l": ([_DINOV2_ID], 224),
    "in1k-vit-l": (["vit_large_patch16_224.augreg_in21k_ft_in1k"], 224),
    "dinoclip-vit-l-336px": ([_DINOV2_ID, "vit_large_patch14_clip_336.openai"], 336),
    "dinosiglip-vit-so-224px": ([_DINOV2_ID, "vit_so400m_patch14_siglip_224"], 224),
    "dinosiglip-vit-so-384px": ([_DINOV2_ID, "vit_so400m_patch14_siglip_384"], 384),
}

# `LlamaConfig` defaults of transformers 4.40.1 (a 7B model): what a missing key of a released `text_config` means.
_LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
_LLAMA_13B = {**_LLAMA_7B, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
_LLAMA_13B |= {"num_attention_heads": 40, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_MISTRAL_7B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_PHI_2 = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "partial_rotary_factor": 0.4,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# llm_backbone_id -> (hub id, model_type, sizes, tokenizer vocabulary)
LLM_BACKBONES = {
    "llama2-7b-pure": ("meta-llama/Llama-2-7b-hf", "llama", _LLAMA_7B, 32000),
    "llama2-13b-pure": ("meta-llama/Llama-2-13b-hf", "llama", _LLAMA_13B, 32000),
    "llama2-7b-chat": ("meta-llama/Llama-2-7b-chat-hf", "llama", _LLAMA_7B, 32000),
    "llama2-13b-chat": ("meta-llama/Llama-2-13b-chat-hf", "llama", _LLAMA_13B, 32000),
    "vicuna-v15-7b": ("lmsys/vicuna-7b-v1.5", "llama", _LLAMA_7B, 32000),
    "vicuna-v15-13b": ("lmsys/vicuna-13b-v1.5", "llama", _LLAMA_13B, 32000),
    "mistral-v0.1-7b-pure": ("mistralai/Mistral-7B-v0.1", "mistral", _MISTRAL_7B, 32000),
    "mistral-v0.1-7b-instruct": ("mistralai/Mistral-7B-Instruct-v0.1", "mistral", _MISTRAL_7B, 32000),
    "phi-2-3b": ("microsoft/phi-2", "phi", _PHI_2, 50257),
}

# Prompts the released policies were trained with; the instruction is lower-cased before it is filled in.
PURE_PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
VICUNA_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What action should the robot take to {instruction}? ASSISTANT:"
)

RESIZE_STRATEGIES = ("resize-naive", "resize-crop", "letterbox")
ACTION_NORMALIZATIONS = ("q99", "min_max", "mean_std")
ATTENTIONS = ("causal", "bidirectional", "prefix")
ACTION_HEADS = ("token", "l1", "diffusion", "flow")
DENOISING_STEPS = {"diffusion": 50, "flow": 10}  # of each head when acting; diffusion is trained on as many
LLAMA_SPACE_TOKEN = 29871  # "▁": stands between "Out:" and the first action token in all training text

AUTO_MAP = {
    "AutoConfig": "configuration_openvla.OpenVLAConfig",
    "AutoModel": "modeling_openvla.OpenVLAModel",
    "AutoModelForImageTextToText": "modeling_openvla.OpenVLAForActionPrediction",
    "AutoModelForVision2Seq": "modeling_openvla.OpenVLAForActionPrediction",
    "AutoProcessor": "processing_openvla.OpenVLAProcessor",
    "AutoImageProcessor": "processing_openvla.OpenVLAImageProcessor",
}


class OpenVLAConfig(PretrainedConfig):
    """Configuration of an OpenVLA policy. Fields up to `norm_stats` are those of released `config.json` files.

    Args:
        vision_backbone_id: one of `VISION_BACKBONES`, or any name with `timm_model_ids` and `timm_model_args`.
        llm_backbone_id: one of `LLM_BACKBONES`, or any name when `text_config` gives every size.
        arch_specifier: projector kind, as the original names it: `…gelu-mlp` (2 layers) or `…fused-gelu-mlp` (3).
        use_fused_vision_backbone: two towers; derived from `vision_backbone_id`.
        image_resize_strategy: how the processor makes images square: one of `RESIZE_STRATEGIES`.
        text_config: configuration of the language model; missing Llama keys mean the 7B values above.
        norm_stats: `{unnorm_key: {"action": {"q01": [A], "q99": [A], "mask": [A], …}, "proprio": {…}}}`, in physical
            units.
        n_action_bins: bin edges over [-1, 1]; the last `n_action_bins` ids of the tokenizer vocabulary are actions.
        timm_model_ids: tower architectures, first `featurizer`, then `fused_featurizer`.
        image_sizes: pixels per tower.
        timm_model_args: `{timm id: {timm argument: value}}`: sizes of towers that `TIMM_TOWERS` does not know.
        attention: one of `ATTENTIONS`: "causal"; or, for decoding all actions of a chunk in parallel, "bidirectional"
            over the whole sequence (OpenVLA-OFT), or "prefix": images and prompt do not see the actions, which see
            everything, so that heads which denoise step by step compute the prefix once.
        action_head: one of `ACTION_HEADS`: "token", or a continuous head stored with the weights.
        num_denoising_steps: of "diffusion" (a divisor of 50, the steps of its training) and "flow" when acting; None:
            50 and 10.
        action_chunk: steps T predicted at once.
        action_dim: action size A; None: the length of the statistics chosen by `unnorm_key`.
        proprio_dim: size of the proprioceptive state the policy takes; 0: none.
        num_cameras: images per observation, stacked on channels in a fixed order.
        film: the mean of the prompt's embeddings modulates every block of both towers (OpenVLA-OFT+).
        film_counts_padding: padding counts in that mean while training, as in the original, which then acts without
            any: its policies saw other means in batches than they act with.
        action_normalization: which statistics map [-1, 1] to physical units: one of `ACTION_NORMALIZATIONS`.
        action_bins: `{"edges": [A][n_action_bins], "centers": [A][n_action_bins - 1]}` for bins of equal population
            (see `ActionTokenizer.fit`); None: uniform bins.
        action_token_end: one past the highest action id (32000 for Llama-2): id `end - k` is bin k, from 1 to
            n_action_bins. None: the language model's vocabulary less its padding.
        prompt_end_token_id: id that must end every prompt, None for vocabularies without one; -1: "▁" for Llama, else
            None.
        pad_token_id, image_token_id, action_slot_id: padding, the placeholder of one embedding that is not text (an
            image patch, proprioception, …), and in parallel decoding that of one action value: rows of the padded
            embedding table that no text token uses. None: the first behind the actions (from 32000 for Llama-2).
    """

    model_type = "openvla"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    # FSDP2 units of transformers 5 (the language model brings its own plan).
    base_model_fsdp_plan = {
        "vision_backbone.featurizer.blocks.*": "free_full_weight",
        "vision_backbone.fused_featurizer.blocks.*": "free_full_weight",
        "projector": "free_full_weight",
    }

    def __init__(
        self,
        vision_backbone_id: str = "siglip-vit-so400m",
        llm_backbone_id: str = "vicuna-v15-7b",
        arch_specifier: str = "no-align+gelu-mlp",
        use_fused_vision_backbone: bool | None = None,
        image_resize_strategy: str = "letterbox",
        text_config: dict | PretrainedConfig | None = None,
        llm_max_length: int = 2048,
        pad_token_id: int | None = None,
        pad_to_multiple_of: int = 64,
        output_projector_states: bool = False,
        norm_stats: dict | None = None,
        n_action_bins: int = 256,
        timm_model_ids: list[str] | None = None,
        timm_override_act_layers: list[str | None] | None = None,
        image_sizes: list[int] | None = None,
        hf_llm_id: str | None = None,
        timm_model_args: dict[str, dict] | None = None,
        attention: str = "causal",
        action_head: str = "token",
        action_chunk: int = 1,
        action_dim: int | None = None,
        proprio_dim: int = 0,
        num_cameras: int = 1,
        film: bool = False,
        film_counts_padding: bool = False,
        num_denoising_steps: int | None = None,
        action_normalization: str = "q99",
        action_bins: dict | None = None,
        action_token_end: int | None = None,
        prompt_end_token_id: int | None = -1,
        image_token_id: int | None = None,
        action_slot_id: int | None = None,
        **kwargs,
    ):
        # 1. Vision: an explicit tower list wins over the one the id implies.
        self.vision_backbone_id = vision_backbone_id
        known_ids, known_size = VISION_BACKBONES.get(vision_backbone_id, (None, None))
        if known_ids is None and timm_model_ids is None:
            raise ValueError(
                f"Unknown vision_backbone_id {vision_backbone_id!r}: use one of {sorted(VISION_BACKBONES)}, or "
                "describe the towers with `timm_model_ids`, `image_sizes` and `timm_model_args`."
            )
        self.timm_model_ids = list(timm_model_ids or known_ids)
        self.image_sizes = list(image_sizes or [known_size or 224] * len(self.timm_model_ids))
        self.timm_override_act_layers = list(timm_override_act_layers or [None] * len(self.timm_model_ids))
        self.timm_model_args = timm_model_args
        self.use_fused_vision_backbone = len(self.timm_model_ids) == 2
        if use_fused_vision_backbone not in (None, self.use_fused_vision_backbone):
            raise ValueError(
                f"use_fused_vision_backbone={use_fused_vision_backbone} contradicts timm_model_ids="
                f"{self.timm_model_ids}."
            )
        self.arch_specifier = arch_specifier
        self.image_resize_strategy = image_resize_strategy
        self.output_projector_states = output_projector_states

        # 2. Language model: keys that the file leaves out take the values the original ran with.
        hub_id, llm_type, sizes, tokenizer_vocab = LLM_BACKBONES.get(llm_backbone_id, (None, None, {}, None))
        if text_config is None and hub_id is None:
            raise ValueError(
                f"Unknown llm_backbone_id {llm_backbone_id!r}: use one of {sorted(LLM_BACKBONES)}, or pass a "
                "complete `text_config`."
            )
        self.llm_backbone_id = llm_backbone_id
        self.hf_llm_id = hf_llm_id or hub_id
        self.llm_max_length = llm_max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        if text_config is None:
            # As the original's converter resizes: the tokenizer's vocabulary plus one block of padding rows.
            text_config = {"model_type": llm_type, "vocab_size": tokenizer_vocab + pad_to_multiple_of}
            text_config |= {"pad_token_id": tokenizer_vocab if pad_token_id is None else pad_token_id, **sizes}
        if isinstance(text_config, dict):
            text_type = text_config.get("model_type", llm_type or "llama")
            if text_type == "llama":
                text_config = {**_LLAMA_7B, **text_config}
            text_config = CONFIG_MAPPING[text_type](**{k: v for k, v in text_config.items() if k != "model_type"})
        self.text_config = text_config
        if action_token_end is None:  # fixed here: a resized embedding table must not move the actions
            action_token_end = text_config.vocab_size - pad_to_multiple_of
        self.action_token_end = action_token_end
        pad_token_id = action_token_end if pad_token_id is None else pad_token_id
        self.image_token_id = action_token_end + 1 if image_token_id is None else image_token_id
        if prompt_end_token_id == -1:
            prompt_end_token_id = LLAMA_SPACE_TOKEN if text_config.model_type == "llama" else None
        self.prompt_end_token_id = prompt_end_token_id

        # 3. Actions
        self.norm_stats = norm_stats
        self.n_action_bins = n_action_bins
        self.attention = attention
        self.action_head = action_head
        self.action_chunk = action_chunk
        self.action_dim = action_dim
        self.proprio_dim = proprio_dim
        self.num_cameras = num_cameras
        self.film = film
        self.film_counts_padding = film_counts_padding
        steps = DENOISING_STEPS.get(action_head) if num_denoising_steps is None else num_denoising_steps
        self.num_denoising_steps = steps
        if action_slot_id is None and attention != "causal":
            action_slot_id = self.image_token_id + 1
        self.action_slot_id = action_slot_id
        self.action_normalization = action_normalization
        self.action_bins = action_bins

        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(pad_token_id=pad_token_id, **kwargs)
        self._check()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """config.json with the fields that the caller gives in place of its own, and with what it does not say of
        policies of OpenVLA-OFT (see `oft_files.py`). transformers would set given fields behind the constructor's
        back, unchecked."""
        hub_kwargs = {name: kwargs.get(name) for name in (*HUB_KEYS, "subfolder")}
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") != cls.model_type:
            return config_dict, kwargs
        known = inspect.signature(cls.__init__).parameters
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in known and name != "kwargs"}
        if given.get("action_head") not in (None, config_dict.get("action_head")):
            config_dict.pop("num_denoising_steps", None)  # it was another head's
        files = find_oft(str(pretrained_model_name_or_path), config_dict, **hub_kwargs)
        fields = {} if files is None else oft_fields(files, config_dict, given)
        return config_dict | fields | given, kwargs

    def _check(self) -> None:
        choices = {
            "image_resize_strategy": RESIZE_STRATEGIES,
            "attention": ATTENTIONS,
            "action_head": ACTION_HEADS,
            "action_normalization": ACTION_NORMALIZATIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        for name, least in {"action_chunk": 1, "num_cameras": 1, "proprio_dim": 0, "n_action_bins": 2}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
        self._check_parallel_decoding()
        if len(self.timm_model_ids) not in (1, 2) or len(self.image_sizes) != len(self.timm_model_ids):
            raise ValueError(
                f"A policy has one or two vision towers with one image size each, got timm_model_ids="
                f"{self.timm_model_ids} and image_sizes={self.image_sizes}."
            )
        if "gelu-mlp" not in self.arch_specifier:
            raise ValueError(f"arch_specifier {self.arch_specifier!r} names no projector; expected '…gelu-mlp'.")
        if len({tower.num_patches for tower in self.vision_towers}) != 1:
            raise ValueError(f"Both towers must give the same number of patches, got {self.vision_towers}.")

    def _check_parallel_decoding(self) -> None:
        head, attention = self.action_head, self.attention
        self.choose_denoising_steps()
        if attention == "causal":
            if head != "token":
                raise ValueError(f"action_head {head!r} reads all actions at once: attention cannot be 'causal'.")
            if self.film:
                raise ValueError("film needs parallel decoding: towers run once, but causal text goes on growing.")
            return
        if attention == "prefix" and not self.denoises:
            raise ValueError(
                f"attention 'prefix' is for heads that denoise ({sorted(DENOISING_STEPS)}); {head!r} takes one pass, "
                "in which 'bidirectional' costs no more."
            )
        if self.action_dim is None:
            raise ValueError(f"attention {attention!r} needs action_dim, which says how many actions are decoded.")
        if self.action_slot_id >= self.text_config.vocab_size:
            raise ValueError(
                f"action_slot_id {self.action_slot_id} needs a row in the embedding table, which has "
                f"{self.text_config.vocab_size}: resize it to a multiple of 64."
            )

    @property
    def denoises(self) -> bool:
        """Whether actions are made from noise, and depend on it."""
        return self.action_head in DENOISING_STEPS

    def choose_denoising_steps(self, steps: int | None = None) -> int | None:
        """In how many steps to act: as many as given, or as the policy declares; None for heads that do not denoise.

        Raises ValueError for what the head cannot do.
        """
        steps = self.num_denoising_steps if steps is None else steps
        if not self.denoises:
            if steps is not None:
                raise ValueError(f"num_denoising_steps would do nothing: a head {self.action_head!r} has none.")
            return None
        whole = isinstance(steps, int) and steps >= 1
        if not whole or (self.action_head == "diffusion" and DENOISING_STEPS["diffusion"] % steps):
            raise ValueError(f"num_denoising_steps must be from 1, for diffusion a divisor of 50; got {steps!r}.")
        return steps

    @property
    def has_time_token(self) -> bool:
        """Whether the time of denoising is a token of its own in the prompt, as in OpenVLA-OFT's diffusion."""
        return self.action_head == "diffusion" and self.attention == "bidirectional"

    @property
    def num_placeholders(self) -> int:
        """Ids `image_token_id` per observation: image patches, then proprioception and the time, if there are any."""
        return self.num_image_tokens + bool(self.proprio_dim) + self.has_time_token

    @property
    def vision_towers(self) -> list[VisionTowerConfig]:
        """Sizes of `featurizer` and, if fused, `fused_featurizer`."""
        towers = []
        for timm_id, size, act in zip(self.timm_model_ids, self.image_sizes, self.timm_override_act_layers):
            if (self.timm_model_args or {}).get(timm_id) is not None:
                tower = _tower_from_timm_args(timm_id, self.timm_model_args[timm_id])
            elif timm_id in TIMM_TOWERS:
                tower = TIMM_TOWERS[timm_id]
            else:
                raise ValueError(
                    f"The sizes of tower {timm_id!r} are unknown: write them into `timm_model_args[{timm_id!r}]` "
                    f"(embed_dim, depth, num_heads, …), or use one of {sorted(TIMM_TOWERS)}."
                )
            tower = replace(tower, image_size=size)
            towers.append(replace(tower, act_layer=act) if act else tower)
        return towers

    @property
    def num_image_tokens(self) -> int:
        """Image patches per observation: those of one camera times cameras."""
        return self.vision_towers[0].num_patches * self.num_cameras

    @property
    def prompt_template(self) -> str | None:
        """The prompt of training with `{instruction}` to be filled in; None if the config does not tell."""
        if self.llm_backbone_id.startswith("vicuna"):
            return VICUNA_PROMPT
        return PURE_PROMPT if self.llm_backbone_id.endswith(("-pure", "phi-2-3b")) else None

    def save_pretrained(self, save_directory, **kwargs):
        """Writes `config.json` with the complete `auto_map`, whatever code the configuration was loaded from."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)
        path = os.path.join(save_directory, "config.json")
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        rope = content["text_config"].get("rope_parameters")
        if rope is None:
            return
        # 5.x keeps rotary settings under a name that 4.57 does not know: it would fall back to others, silently.
        flat = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        if rope.get("rope_type", "default") != "default":
            flat["rope_scaling"] = {name: value for name, value in rope.items() if name not in flat}
        content["text_config"] |= flat
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
        os.replace(path + ".tmp", path)


def _tower_from_timm_args(timm_id: str, args: dict) -> VisionTowerConfig:
    known = {field.name for field in fields(VisionTowerConfig)}
    if unknown := set(args) - known:
        raise ValueError(f"timm_model_args[{timm_id!r}] has unknown keys {sorted(unknown)}; known: {sorted(known)}.")
    if missing := {"embed_dim", "depth", "num_heads"} - set(args):
        raise ValueError(f"timm_model_args[{timm_id!r}] lacks {sorted(missing)}.")
    return VisionTowerConfig(**args)


OpenVLAConfig.register_for_auto_class()
