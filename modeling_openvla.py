"""Tensors -> action tokens: two vision transformers, a projector and a language model.

Unusual, and why:
* The towers are our own, with timm's parameter names and fused qkv, built one block short and without final norm: the
  policy reads the second-to-last block, so the original's last block never mattered. Released weight names are public
  API (old LoRA adapters, quantised and sharded checkpoints depend on them), and timm is not needed.
* Modules are nested as `{model: {vision_backbone, projector, language_model}, lm_head}`, files keep the released flat
  names; `CHECKPOINT_RENAMES` is the only bridge, used by loading, saving and adapters alike.
* Images enter through `<image>` placeholders that the processor has put behind BOS, never by growing the sequence
  inside `forward`: generation code counts tokens, and a sequence that grows behind its back loses the image without
  an error. Prompts without placeholders, as old scripts pass them, are expanded once at the door.
* `predict_action` is its own loop of one prefill and A - 1 greedy steps over exactly the original's tokens.

Legend: B batch · L tokens · P image patches of all cameras · D hidden · T action chunk · A action dims.
"""

import copy
import glob
import json
import logging
import os
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, GenerationMixin, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput, cached_file, can_return_tuple

from .action_tokenizer import ActionStats, ActionTokenizer, resolve_unnorm_key
from .configuration_openvla import OpenVLAConfig, VisionTowerConfig

logger = logging.getLogger(__name__)

# Released name -> module name, as regular expressions.
CHECKPOINT_RENAMES = {
    r"^vision_backbone": "model.vision_backbone",
    r"^projector": "model.projector",
    r"^language_model\.model": "model.language_model",
    r"^language_model\.lm_head": "lm_head",
}
# Left in full precision by bitsandbytes: together 8 % of the parameters, and they see the image or pick the token.
UNQUANTIZED_MODULES = ["model.vision_backbone", "model.projector", "lm_head", "vision_backbone", "projector"]
_TRANSFORMERS_4 = transformers_version.startswith("4.")

if not _TRANSFORMERS_4:
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    # overwrite: remote code is imported anew for every revision of a repository.
    register_checkpoint_conversion_mapping(
        "openvla", [WeightRenaming(source, target) for source, target in CHECKPOINT_RENAMES.items()], overwrite=True
    )


def module_name(released: str) -> str:
    """Where the tensor of a released name lives in the model."""
    for pattern, target in CHECKPOINT_RENAMES.items():
        released = re.sub(pattern, target, released)
    return released


@dataclass
class ActionOutput(ModelOutput):
    """What `sample_actions` returns. Tensors are on the model's device, but for `actions`.

    Args:
        actions: `(B, T, A)` float64 in [-1, 1], before un-normalisation, on the CPU.
        token_ids: `(B, T·A)` int64, ids of `ActionTokenizer`.
        log_probs: `(B, T·A)` float32, log-probability of each token (see `sample_actions`).
        replaced: `(B, T·A)` bool, True where the language model preferred a token that is not an action.
        hidden_states: `(B, T·A, D)` last hidden state each token was read from, if asked for.
    """

    actions: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    replaced: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None


# --- Vision ----------------------------------------------------------------------------------------------------------
class PatchEmbed(nn.Module):
    def __init__(self, tower: VisionTowerConfig):
        super().__init__()
        # bias=False with pre_norm is timm's CLIP
        self.proj = nn.Conv2d(3, tower.embed_dim, tower.patch_size, tower.patch_size, bias=not tower.pre_norm)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionAttention(nn.Module):
    def __init__(self, tower: VisionTowerConfig):
        super().__init__()
        self.num_heads = tower.num_heads
        self.qkv = nn.Linear(tower.embed_dim, 3 * tower.embed_dim)
        self.proj = nn.Linear(tower.embed_dim, tower.embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))


class VisionMLP(nn.Module):
    def __init__(self, tower: VisionTowerConfig):
        super().__init__()
        hidden = int(tower.embed_dim * tower.mlp_ratio)
        self.quick_gelu = tower.act_layer == "quick_gelu"
        self.fc1 = nn.Linear(tower.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, tower.embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc1(x)
        x = x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x)  # exact (erf) GELU, not SigLIP's tanh
        return self.fc2(x)


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_value: float):
        super().__init__()
        self.init_value = init_value
        self.scale_factor = nn.Parameter(torch.full((dim,), init_value))  # timm's `gamma`, under its released name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale_factor


class VisionBlock(GradientCheckpointingLayer):
    def __init__(self, tower: VisionTowerConfig):
        super().__init__()
        dim, scale = tower.embed_dim, tower.init_values
        self.norm1 = nn.LayerNorm(dim, eps=tower.norm_eps)
        self.attn = VisionAttention(tower)
        self.ls1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.norm2 = nn.LayerNorm(dim, eps=tower.norm_eps)
        self.mlp = VisionMLP(tower)
        self.ls2 = nn.Identity() if scale is None else LayerScale(dim, scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """A tower up to its second-to-last block, with timm's parameter names: `(B, 3, S, S)` -> `(B, patches, width)`."""

    def __init__(self, tower: VisionTowerConfig):
        super().__init__()
        dim, prefix = tower.embed_dim, tower.num_prefix_tokens
        self.num_prefix_tokens = prefix
        self.no_embed_class = tower.no_embed_class
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if tower.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, tower.reg_tokens, dim)) if tower.reg_tokens else None
        positions = tower.num_patches + (0 if tower.no_embed_class else prefix)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, dim))
        self.patch_embed = PatchEmbed(tower)
        self.norm_pre = nn.LayerNorm(dim, eps=tower.norm_eps) if tower.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(VisionBlock(tower) for _ in range(tower.depth - 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(images)
        if self.no_embed_class:
            x = x + self.pos_embed
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = torch.cat([*prefix, x], dim=1)
        if not self.no_embed_class:
            x = x + self.pos_embed
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return x[:, self.num_prefix_tokens :]


class OpenVLAVisionBackbone(nn.Module):
    """All cameras through one or two towers. `(B, 3·N·C, S, S)` -> `(B, P, width of both towers)`."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        towers = config.vision_towers
        self.num_cameras = config.num_cameras
        self.image_size = towers[0].image_size
        self.embed_dim = sum(tower.embed_dim for tower in towers)
        self.featurizer = VisionTransformer(towers[0])
        self.fused_featurizer = VisionTransformer(towers[1]) if len(towers) == 2 else None

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        channels = 3 if self.fused_featurizer is None else 6
        expected = (channels * self.num_cameras, self.image_size, self.image_size)
        if tuple(pixel_values.shape[1:]) != expected or not pixel_values.is_floating_point():
            raise ValueError(
                f"Expected floating-point pixel_values {('B', *expected)} for {self.num_cameras} camera(s), got "
                f"{pixel_values.dtype} {tuple(pixel_values.shape)}: pass images through the processor."
            )
        pixel_values = pixel_values.to(self.featurizer.patch_embed.proj.weight.dtype)
        images = pixel_values.reshape(-1, channels, *pixel_values.shape[2:])  # (B·C, 3·N, S, S)
        patches = self.featurizer(images[:, :3])
        if self.fused_featurizer is not None:
            patches = torch.cat([patches, self.fused_featurizer(images[:, 3:])], dim=2)
        return patches.reshape(len(pixel_values), -1, self.embed_dim)


class OpenVLAProjector(nn.Module):
    """Patch features -> language model embeddings: two linear layers for one tower, three for two."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        dim = sum(tower.embed_dim for tower in config.vision_towers)
        hidden = config.text_config.hidden_size
        self.fused = config.use_fused_vision_backbone
        if self.fused:
            self.fc1 = nn.Linear(dim, 4 * dim)
            self.fc2 = nn.Linear(4 * dim, hidden)
            self.fc3 = nn.Linear(hidden, hidden)
        else:
            self.fc1 = nn.Linear(dim, hidden)
            self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        x = self.fc2(F.gelu(self.fc1(patches)))
        return self.fc3(F.gelu(x)) if self.fused else x


# --- Models ----------------------------------------------------------------------------------------------------------
class OpenVLAPreTrainedModel(PreTrainedModel):
    config_class = OpenVLAConfig
    config: OpenVLAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # A whole tower: `device_map` would otherwise part its position table from its blocks.
    _no_split_modules = ["VisionTransformer", "OpenVLAProjector"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True  # transformers 4.57
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _checkpoint_conversion_mapping = CHECKPOINT_RENAMES  # peft reads it to load adapters made for the original

    def __init__(self, config: OpenVLAConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if config.attention != "causal" or config.action_head != "token" or config.proprio_dim:
            raise ValueError(
                f"This version of the code runs causal attention with the token head and without proprioception; the "
                f"checkpoint declares attention={config.attention!r}, action_head={config.action_head!r}, "
                f"proprio_dim={config.proprio_dim}. Running it anyway would give wrong actions."
            )
        # What released files hold beyond what is ever used: last blocks, final norms and pooling heads of the towers.
        names = ("featurizer", "fused_featurizer")
        self._keys_to_ignore_on_load_unexpected = [
            rf"vision_backbone\.{name}\.{unused}"
            for name, tower in zip(names, config.vision_towers)
            for unused in (rf"blocks\.{tower.depth - 1}\.", r"norm\.", r"attn_pool\.", r"fc_norm\.", r"head\.")
        ]

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if hasattr(module, "scale_factor"):
            nn.init.constant_(module.scale_factor, module.init_value)
        elif hasattr(module, "pos_embed"):
            nn.init.trunc_normal_(module.pos_embed, std=0.02)
            for token in (module.cls_token, module.reg_token):
                if token is not None:
                    nn.init.normal_(token, std=1e-6)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """`PreTrainedModel.from_pretrained`, and four things that would otherwise go wrong in silence.

        Weights that are missing or of another shape raise instead of being drawn at random (unless
        `output_loading_info` asks for the report, or `ignore_mismatched_sizes` allows it). bitsandbytes leaves
        `UNQUANTIZED_MODULES` alone unless `llm_int8_skip_modules` says otherwise. A `dataset_statistics.json` beside
        the weights, which the original's fine-tuning writes, replaces `config.norm_stats`, as in the original's
        deployment. OpenVLA-OFT policies are refused.
        """
        if pretrained_model_name_or_path is None:  # a state_dict is given instead
            return super().from_pretrained(None, *args, **kwargs)
        path = str(pretrained_model_name_or_path)
        hub_keys = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        hub_kwargs = {key: kwargs[key] for key in hub_keys if kwargs.get(key) is not None}
        refuse_oft(path, hub_kwargs)
        for flag in ("load_in_4bit", "load_in_8bit"):  # removed in transformers 5, still passed by old scripts
            if kwargs.pop(flag, False):
                kwargs["quantization_config"] = BitsAndBytesConfig(**{flag: True})
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _keep_towers_unquantized(kwargs["quantization_config"])

        report_wanted = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        missing = sorted(key for key in report["missing_keys"] if ".lora_" not in key)  # those start as no-ops
        mismatched = [] if kwargs.get("ignore_mismatched_sizes") else list(report["mismatched_keys"])
        if (missing or mismatched) and not report_wanted:
            raise ValueError(
                f"{path} lacks {len(missing)} tensors ({', '.join(missing[:3])} …) and has {len(mismatched)} of "
                f"another shape ({mismatched[:2]}): a policy with random parts must not act."
            )
        model.config.norm_stats = _dataset_statistics(path, hub_kwargs, model.config.norm_stats)
        return (model, report) if report_wanted else model

    def save_pretrained(self, save_directory, **kwargs):
        """`PreTrainedModel.save_pretrained` in the released layout, with `dataset_statistics.json` for older tools."""
        if self.config.norm_stats is not None:
            os.makedirs(save_directory, exist_ok=True)
            path = os.path.join(save_directory, "dataset_statistics.json")
            with open(path + ".tmp", "w", encoding="utf-8") as file:
                json.dump(self.config.norm_stats, file, indent=2)
            os.replace(path + ".tmp", path)
        if not hasattr(self, "lm_head") and not _TRANSFORMERS_4:  # the base model alone has names of its own there
            state_dict = kwargs.pop("state_dict", None) or self.state_dict()
            kwargs |= {"state_dict": self._fix_state_dict_keys_on_save(state_dict), "save_original_format": False}
        super().save_pretrained(save_directory, **kwargs)

    # transformers 4.57 applies renames only to its own models: the three hooks below do it there.
    def load_adapter(self, *args, **kwargs):
        if _TRANSFORMERS_4:
            options = dict(kwargs.get("adapter_kwargs") or {})
            kwargs["adapter_kwargs"] = {**options, "key_mapping": options.get("key_mapping") or CHECKPOINT_RENAMES}
        return super().load_adapter(*args, **kwargs)

    def _get_key_renaming_mapping(self, checkpoint_keys, key_mapping=None, *unused_flags, **unused_kwargs):
        is_base = not hasattr(self, "lm_head")
        return super()._get_key_renaming_mapping(
            checkpoint_keys, {**CHECKPOINT_RENAMES, **(key_mapping or {})}, is_base, False
        )

    def _fix_state_dict_keys_on_save(self, state_dict: dict) -> dict:
        if not hasattr(self, "lm_head"):  # the base model alone: its names lack the "model." of the full one
            state_dict = {f"model.{key}": value for key, value in state_dict.items()}
        back = {target: source.strip("^").replace("\\", "") for source, target in CHECKPOINT_RENAMES.items()}
        renamed = {}
        for key, value in state_dict.items():
            target = next((t for t in back if key.startswith(t + ".")), None)
            renamed[key if target is None else back[target] + key[len(target) :]] = value
        return renamed


class OpenVLAModel(OpenVLAPreTrainedModel):
    """Images and tokens -> last hidden states of the language model."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        self.vision_backbone = OpenVLAVisionBackbone(config)
        self.projector = OpenVLAProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, 3·N·C, S, S)` -> `(B, P, D)` embeddings that take the placeholders' place."""
        return self.projector(self.vision_backbone(pixel_values))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Runs the language model over embeddings whose placeholders are replaced by image patches.

        Args:
            input_ids: `(B, L)` with exactly P ids `config.image_token_id` in each row if there are `pixel_values`.
            pixel_values: `(B, 3·N·C, S, S)`, in the first pass only.

        Raises ValueError when placeholders and images do not match, per row: neither an image that nobody looks at
        nor a placeholder without an image may pass.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, L, D)
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids, whose placeholders tell where the patches go.")
            patches = self.get_image_features(pixel_values)  # (B, P, D)
            is_image = input_ids == self.config.image_token_id  # (B, L)
            _check_placeholders(is_image, patches.shape[:2])
            patches = patches.to(device=inputs_embeds.device, dtype=inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(is_image.unsqueeze(-1), patches)
        elif input_ids is not None and input_ids.shape[1] > 1:  # a decode step has one token, and no time to wait
            _check_placeholders(input_ids == self.config.image_token_id, (len(input_ids), 0))
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )


class OpenVLAForActionPrediction(OpenVLAPreTrainedModel, GenerationMixin):
    """OpenVLA with its token head: `predict_action` for robots, `forward` for training, `generate` for the rest."""

    _tied_weights_keys = [] if _TRANSFORMERS_4 else {}
    _tp_plan = {"lm_head": "colwise_rep" if _TRANSFORMERS_4 else "colwise_gather_output"}

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        self.model = OpenVLAModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.action_tokenizer = ActionTokenizer.from_config(config)
        self.loss_type = "ForCausalLM"
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head = value

    # --- Statistics, under the names the original's callers use ---
    @property
    def norm_stats(self) -> dict | None:
        """Statistics per dataset; setting it replaces `config.norm_stats`, which is the only owner."""
        return self.config.norm_stats

    @norm_stats.setter
    def norm_stats(self, value: dict | None):
        self.config.norm_stats = value

    def get_action_stats(self, unnorm_key: str | None = None) -> dict:
        """The raw `norm_stats[unnorm_key]["action"]` dict. KeyError lists the keys."""
        return self.norm_stats[resolve_unnorm_key(self.norm_stats, unnorm_key)]["action"]

    def get_action_dim(self, unnorm_key: str | None = None) -> int:
        """Action size A of a dataset."""
        return ActionStats.from_norm_stats(self.norm_stats, unnorm_key, self.config.action_normalization).dim

    # --- Training and generic generation ---
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and the cross-entropy with `labels`.

        Args:
            input_ids: `(B, L)`, with placeholders, or as the original's collator makes them, without.
            labels: as long as `input_ids`; -100 is not scored.
            logits_to_keep: compute logits for the last n positions (0: all) or for an index tensor of positions.
        """
        if pixel_values is not None and input_ids is not None and self._lacks_placeholders(input_ids):
            if past_key_values is not None and past_key_values.get_seq_length() > 0:
                pixel_values = None  # a later step of a caller that always passes the image: it is in the cache
            else:
                input_ids, attention_mask, labels = self.expand_image_tokens(input_ids, attention_mask, labels)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])  # (B, L, vocabulary)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def expand_image_tokens(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
    ) -> tuple[torch.LongTensor, torch.Tensor, torch.LongTensor | None]:
        """Inserts P placeholders behind the first attended token (BOS) of rows `(B, L)` that have none.

        Without a mask, `config.pad_token_id` tells what is padding; a mask one shorter than the ids (a caller that
        appended "▁" as the original does) is completed. Returns ids, mask and labels of `(B, L + P)`.
        """
        mask = self._complete_mask(input_ids, attention_mask)
        count = self.config.num_image_tokens
        for row, attended in zip(input_ids.tolist(), mask.tolist()):
            self._refuse_foreign_placeholders([token for token, keep in zip(row, attended) if keep])
        first = mask.argmax(dim=1, keepdim=True)  # (B, 1)
        position = torch.arange(input_ids.shape[1] + count, device=input_ids.device).expand(len(input_ids), -1)
        is_image = (position > first) & (position <= first + count)
        source = torch.where(position <= first, position, (position - count).clamp(min=0))
        input_ids = input_ids.gather(1, source).masked_fill(is_image, self.config.image_token_id)
        mask = mask.gather(1, source).masked_fill(is_image, 1)
        if labels is not None:
            labels = labels.gather(1, source).masked_fill(is_image, -100)
        return input_ids, mask, labels

    def generate(self, inputs=None, **kwargs):
        """`GenerationMixin.generate`; prompts without placeholders come back without them."""
        if inputs is not None:
            kwargs["input_ids"] = inputs
        input_ids = kwargs.get("input_ids")
        legacy = (
            input_ids is not None and kwargs.get("pixel_values") is not None and self._lacks_placeholders(input_ids)
        )
        if legacy:
            kwargs["input_ids"], kwargs["attention_mask"], _ = self.expand_image_tokens(
                input_ids, kwargs.get("attention_mask")
            )
        output = super().generate(**kwargs)
        if legacy:
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            kept = kwargs["input_ids"] != self.config.image_token_id  # (B, L + P)
            kept = kept.repeat_interleave(len(sequences) // len(kept), dim=0)
            prompts, answers = sequences[:, : kept.shape[1]], sequences[:, kept.shape[1] :]
            text = torch.cat([prompts[kept].reshape(len(sequences), -1), answers], dim=1)
            if isinstance(output, torch.Tensor):
                return text
            output.sequences = text
        return output

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, pixel_values=None, **kwargs):
        model_inputs = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        # Images belong to the pass that fills the cache; an *empty* cache object is not yet that.
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            model_inputs["pixel_values"] = pixel_values
        return model_inputs

    def _lacks_placeholders(self, input_ids: torch.LongTensor) -> bool:
        if torch.compiler.is_compiling():  # compiled callers come from the processor, with placeholders
            return False
        return not bool((input_ids == self.config.image_token_id).any())

    def _complete_mask(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> torch.LongTensor:
        if attention_mask is None:
            return (input_ids != self.config.pad_token_id).long()
        mask = attention_mask.to(device=input_ids.device, dtype=torch.long)
        if mask.shape[1] == input_ids.shape[1] - 1:
            mask = F.pad(mask, (0, 1), value=1)
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} does not fit input_ids {tuple(input_ids.shape)}."
            )
        return mask

    def _refuse_foreign_placeholders(self, row: list[int]) -> None:
        """A row without our placeholders but with as many of another id was made for another vocabulary."""
        token, times = Counter(row).most_common(1)[0] if row else (None, 0)
        if times >= self.config.num_image_tokens:
            raise ValueError(
                f"A prompt holds id {token} {times} times, but image placeholders are {self.config.image_token_id} "
                "(config.image_token_id): processor and model do not belong together."
            )

    # --- Acting ---
    def predict_action(
        self,
        input_ids: torch.LongTensor | None = None,
        unnorm_key: str | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        strict: bool = False,
        return_dict: bool = False,
    ) -> np.ndarray | dict:
        """The action for each observation, in the units of its dataset, from the same tokens as the original's.

        Args:
            input_ids: `(B, L)` or `(L,)` from the processor; rows may be padded on either side, and lack
                placeholders and the trailing "▁" as in old scripts.
            unnorm_key: whose statistics to use; None if the checkpoint has exactly one dataset.
            pixel_values: `(B, 3·N·C, S, S)`.
            attention_mask: `(B, L)`; None: everything but padding ids.
            do_sample, temperature, top_p, generator: sample among action tokens instead of taking the best.
            strict: raise RuntimeError when the language model prefers a token that is not an action, instead of
                taking the best action token and warning.
            return_dict: return `{"actions", "token_ids", "log_probs", "replaced"}` instead of the actions alone.

        Returns float64 `(A,)` for one observation and a one-step policy, `(T, A)` for an action chunk, with a leading
        batch axis for more than one observation, in the units of the dataset `unnorm_key`: metres and radians in
        bridge_orig, whatever the controller took elsewhere; gripper 1 = open.

        Source: Kim et al. 2024 (arXiv:2406.09246), sec. 3.2.
        """
        stats = ActionStats.from_norm_stats(self.norm_stats, unnorm_key, self.config.action_normalization)
        output = self.sample_actions(
            input_ids,
            pixel_values,
            attention_mask,
            action_dim=stats.dim,
            do_sample=do_sample,
            temperature=temperature,
            top_p=top_p,
            generator=generator,
            strict=strict,
        )
        actions = stats.unnormalize(output.actions.numpy())  # (B, T, A)
        if self.config.action_chunk == 1:
            actions = actions[:, 0]
        if len(actions) == 1:
            actions = actions[0]
        if not return_dict:
            return actions
        arrays = {name: getattr(output, name).cpu().numpy() for name in ("token_ids", "log_probs", "replaced")}
        return {"actions": actions, **arrays}

    def sample_actions(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        action_dim: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        strict: bool = False,
        log_probs_over: str = "actions",
        output_hidden_states: bool = False,
    ) -> ActionOutput:
        """Decodes T·A action tokens after one prefill; normalised actions, log-probabilities, hidden states.

        Args:
            action_dim: A; None: `config.action_dim`.
            do_sample: sample from the softmax over action ids at `temperature`, cut to the nucleus `top_p`.
            log_probs_over: "actions" (softmax over the action ids) or "vocabulary" (over all ids); at `temperature` if
                sampling, before the nucleus cut.
            output_hidden_states: also return the hidden state each token was read from.

        Other arguments as in `predict_action`.
        """
        action_dim = action_dim or self.config.action_dim
        if action_dim is None:
            raise ValueError(
                "Pass action_dim: neither the call nor config.action_dim tells how many tokens to decode."
            )
        if self.config.action_dim not in (None, action_dim):
            raise ValueError(f"action_dim={action_dim} does not fit config.action_dim={self.config.action_dim}.")
        if log_probs_over not in ("actions", "vocabulary"):
            raise ValueError(f"log_probs_over must be 'actions' or 'vocabulary', got {log_probs_over!r}.")
        if do_sample and not (temperature > 0 and 0 < top_p <= 1):
            raise ValueError(f"Sampling needs temperature > 0 and 0 < top_p <= 1, got {temperature} and {top_p}.")
        if pixel_values is None or input_ids is None:
            raise ValueError("An action needs both input_ids and pixel_values: pass the processor's whole output.")
        input_ids, mask = self._pack_prompts(input_ids, attention_mask)
        if len(input_ids) != len(pixel_values):
            raise ValueError(f"Got {len(input_ids)} prompts but {len(pixel_values)} images.")
        training = [module for module in self.modules() if module.training]
        self.eval()  # dropout off; and gradient checkpointing in training mode would drop the cache, image and all
        try:
            return self._decode_actions(
                input_ids,
                pixel_values,
                mask,
                action_dim,
                (temperature, top_p, generator) if do_sample else None,
                strict,
                log_probs_over,
                output_hidden_states,
            )
        finally:
            for module in training:
                module.training = True

    @torch.no_grad()
    def _decode_actions(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        mask: torch.LongTensor | None,
        action_dim: int,
        sampling: tuple | None,
        strict: bool,
        log_probs_over: str,
        output_hidden_states: bool,
    ) -> ActionOutput:
        start, end = self.action_tokenizer.vocab_start, self.action_tokenizer.vocab_end
        temperature, top_p, generator = sampling or (1.0, 1.0, None)
        tokens, log_probs, replaced, finite, hidden_states = [], [], [], [], []
        step_ids, position_ids, cache = input_ids, None, None
        if mask is not None:
            position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
        for step in range(self.config.action_chunk * action_dim):
            # 1. One pass: the whole prompt with the image, then one token at a time
            outputs = self.model(
                input_ids=step_ids,
                pixel_values=pixel_values if step == 0 else None,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            cache = outputs.past_key_values
            hidden = outputs.last_hidden_state[:, -1]  # (B, D)
            logits = self.lm_head(hidden).float() / temperature  # (B, vocabulary)
            finite.append(logits.isfinite().all())

            # 2. The best (or a sampled) action id, whatever the rest of the vocabulary says; but note what it says
            action_logits = logits[:, start:end]
            best = logits.argmax(dim=-1)
            replaced.append((best < start) | (best >= end))
            index = _sample(action_logits, top_p, generator) if sampling else action_logits.argmax(dim=-1)
            scored = (action_logits, index) if log_probs_over == "actions" else (logits, index + start)
            log_probs.append(scored[0].log_softmax(dim=-1).gather(1, scored[1][:, None])[:, 0])
            tokens.append(index + start)
            if output_hidden_states:
                hidden_states.append(hidden)

            # 3. Feed it back
            step_ids = tokens[-1][:, None]
            if mask is not None:
                mask = F.pad(mask, (0, 1), value=1)
                position_ids = position_ids[:, -1:] + 1

        token_ids, replaced = torch.stack(tokens, dim=1), torch.stack(replaced, dim=1)
        if not torch.stack(finite).all():
            raise RuntimeError(
                "The language model's logits hold NaN or infinity: broken weights, broken pixel_values, or an "
                f"overflow of {self.dtype}. No action was returned."
            )
        if replaced.any():
            self._report_replaced(replaced, strict)
        normalized = self.action_tokenizer.decode(
            token_ids.cpu().numpy().reshape(len(token_ids), self.config.action_chunk, action_dim)
        )
        return ActionOutput(
            actions=torch.from_numpy(normalized),
            token_ids=token_ids,
            log_probs=torch.stack(log_probs, dim=1),
            replaced=replaced,
            hidden_states=torch.stack(hidden_states, dim=1) if output_hidden_states else None,
        )

    def _pack_prompts(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.LongTensor, torch.LongTensor | None]:
        """Any accepted prompts as left-padded rows with placeholders and trailing token; mask None: no padding."""
        input_ids = torch.atleast_2d(torch.as_tensor(input_ids))
        if attention_mask is not None:
            attention_mask = torch.atleast_2d(torch.as_tensor(attention_mask))
        mask = self._complete_mask(input_ids, attention_mask)
        image_id, end_id = self.config.image_token_id, self.config.prompt_end_token_id
        count = self.config.num_image_tokens
        rows = []
        for row, attended in zip(input_ids.tolist(), mask.tolist()):
            row = [token for token, keep in zip(row, attended) if keep]
            if not row:
                raise ValueError("A prompt is empty: every row of input_ids needs at least one attended token.")
            if image_id not in row:
                self._refuse_foreign_placeholders(row)
                row = row[:1] + [image_id] * count + row[1:]
            if end_id is not None and row[-1] != end_id:
                row.append(end_id)
            rows.append(row)
        length = max(map(len, rows))
        packed = [[self.config.pad_token_id] * (length - len(row)) + row for row in rows]
        mask = None
        if any(len(row) < length for row in rows):
            mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return torch.tensor(packed, device=self.device), mask

    def _report_replaced(self, replaced: torch.Tensor, strict: bool):
        where = [f"row {row} token {token}" for row, token in replaced.nonzero().tolist()]
        message = (
            f"The language model preferred a token that is not an action at {', '.join(where[:8])}"
            f"{' …' if len(where) > 8 else ''}: wrong prompt, wrong preprocessing, or a task unlike the training data."
        )
        if strict:
            raise RuntimeError(message + " No action was returned (strict=True).")
        logger.warning("%s The best action tokens were taken instead; pass strict=True to raise.", message)


def _sample(logits: torch.Tensor, top_p: float, generator: torch.Generator | None) -> torch.LongTensor:
    """Draws from softmax(logits) `(B, n)` cut to the smallest set of ids whose probability reaches `top_p`."""
    probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    before = probs.cumsum(dim=-1) - probs
    probs = probs.masked_fill(before >= top_p, 0.0)
    return order.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]


def _check_placeholders(is_image: torch.Tensor, expected: tuple[int, int]) -> None:
    if torch.compiler.is_compiling():
        return
    batch, count = expected
    if len(is_image) != batch or bool((is_image.sum(dim=1) != count).any()):
        raise ValueError(
            f"Expected {batch} row(s) with {count} image placeholders each, got {is_image.sum(dim=1).tolist()}: "
            "pass the processor's input_ids and pixel_values together."
        )


def _keep_towers_unquantized(quantization_config):
    """A copy of a bitsandbytes configuration that skips `UNQUANTIZED_MODULES`; other kinds are left as they are."""
    quantization_config = copy.deepcopy(quantization_config)
    if isinstance(quantization_config, dict):
        if quantization_config.get("load_in_4bit") or quantization_config.get("load_in_8bit"):
            quantization_config.setdefault("llm_int8_skip_modules", list(UNQUANTIZED_MODULES))
    elif getattr(quantization_config, "llm_int8_skip_modules", ()) is None:
        quantization_config.llm_int8_skip_modules = list(UNQUANTIZED_MODULES)
    return quantization_config


def refuse_oft(path: str, hub_kwargs: dict) -> None:
    """OFT needs bidirectional attention and mostly a head of its own, and its config.json does not say so.

    Its training leaves `action_head--*.pt` and a folder `lora_adapter` beside the merged weights. A policy that was
    stripped of both cannot be told from a plain OpenVLA.
    """
    names = ("config.json", "lora_adapter/adapter_config.json")
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    config, adapter = (cached_file(path, name, **optional, **hub_kwargs) for name in names)
    folder = os.path.dirname(config) if config else path
    heads = glob.glob(os.path.join(glob.escape(folder), "action_head--*.pt"))
    if heads or adapter:
        raise ValueError(
            f"{path} holds an OpenVLA-OFT policy ({os.path.relpath((heads or [adapter])[0], folder)}): it needs "
            "bidirectional attention and its own action head, and would act wrongly as a plain OpenVLA."
        )


def _dataset_statistics(path: str, hub_kwargs: dict, norm_stats: dict | None) -> dict | None:
    """The statistics beside the weights if there are any, else those of the config."""
    name = "dataset_statistics.json"
    try:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    except OSError as error:  # offline, and never asked for before
        logger.warning("Cannot tell whether %s has a %s (%s); using config.norm_stats alone.", path, name, error)
        return norm_stats
    if file is None:
        return norm_stats
    with open(file, encoding="utf-8") as stream:
        statistics = json.load(stream)
    if norm_stats and norm_stats != statistics:
        logger.warning("%s replaces config.norm_stats: %s, not %s.", name, sorted(statistics), sorted(norm_stats))
    return statistics


OpenVLAModel.register_for_auto_class("AutoModel")
OpenVLAForActionPrediction.register_for_auto_class("AutoModelForImageTextToText")
