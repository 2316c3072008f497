"""Images -> patch features: one or two vision transformers with timm's parameter names and fused qkv.

Built one block short and without final norm: the policy reads the second-to-last block, so the original's last block
never mattered. Released weight names are public API (old LoRA adapters, quantised and sharded checkpoints depend on
them), and timm is not needed.

Legend: B batch · N towers · C cameras · P image patches of all cameras · S image side · D hidden.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_openvla import OpenVLAConfig, VisionTowerConfig


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
    """A transformer block; with `language_dim`, FiLM shifts and scales what its attention adds to: OpenVLA-OFT's way
    to have towers look for what the instruction names. Source: Kim et al. 2025 (arXiv:2502.19645), sec. IV-B."""

    def __init__(self, tower: VisionTowerConfig, language_dim: int | None = None):
        super().__init__()
        dim, scale = tower.embed_dim, tower.init_values
        self.norm1 = nn.LayerNorm(dim, eps=tower.norm_eps)
        self.attn = VisionAttention(tower)
        self.ls1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.norm2 = nn.LayerNorm(dim, eps=tower.norm_eps)
        self.mlp = VisionMLP(tower)
        self.ls2 = nn.Identity() if scale is None else LayerScale(dim, scale)
        if language_dim is not None:
            self.scale = nn.Linear(language_dim, dim)
            self.shift = nn.Linear(language_dim, dim)

    def forward(self, x: torch.Tensor, language: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        if language is not None:
            x = x * (1 + self.scale(language)[:, None]) + self.shift(language)[:, None]
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """A tower up to its second-to-last block, with timm's parameter names: `(B, 3, S, S)` -> `(B, patches, width)`.

    `language` `(B, D)` conditions every block, if they were built with FiLM.
    """

    def __init__(self, tower: VisionTowerConfig, language_dim: int | None = None):
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
        self.blocks = nn.ModuleList(VisionBlock(tower, language_dim) for _ in range(tower.depth - 1))

    def forward(self, images: torch.Tensor, language: torch.Tensor | None = None) -> torch.Tensor:
        x = self.patch_embed(images)
        if self.no_embed_class:
            x = x + self.pos_embed
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = torch.cat([*prefix, x], dim=1)
        if not self.no_embed_class:
            x = x + self.pos_embed
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x, language)
        return x[:, self.num_prefix_tokens :]


class OpenVLAVisionBackbone(nn.Module):
    """All cameras through one or two towers, in one batch. `(B, 3·N·C, S, S)` -> `(B, P, width of both towers)`."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        towers = config.vision_towers
        self.num_cameras = config.num_cameras
        self.image_size = towers[0].image_size
        self.embed_dim = sum(tower.embed_dim for tower in towers)
        language_dim = config.text_config.hidden_size if config.film else None
        self.featurizer = VisionTransformer(towers[0], language_dim)
        self.fused_featurizer = VisionTransformer(towers[1], language_dim) if len(towers) == 2 else None

    def forward(self, pixel_values: torch.Tensor, language: torch.Tensor | None = None) -> torch.Tensor:
        channels = 3 if self.fused_featurizer is None else 6
        expected = (channels * self.num_cameras, self.image_size, self.image_size)
        if tuple(pixel_values.shape[1:]) != expected or not pixel_values.is_floating_point():
            raise ValueError(
                f"Expected floating-point pixel_values {('B', *expected)} for {self.num_cameras} camera(s), got "
                f"{pixel_values.dtype} {tuple(pixel_values.shape)}: pass images through the processor."
            )
        pixel_values = pixel_values.to(self.featurizer.patch_embed.proj.weight.dtype)
        images = pixel_values.reshape(-1, channels, *pixel_values.shape[2:])  # (B·C, 3·N, S, S)
        if language is not None:  # of the whole observation, for each of its cameras
            language = language.to(pixel_values.dtype).repeat_interleave(self.num_cameras, dim=0)  # (B·C, D)
        patches = self.featurizer(images[:, :3], language)
        if self.fused_featurizer is not None:
            patches = torch.cat([patches, self.fused_featurizer(images[:, 3:], language)], dim=2)
        return patches.reshape(len(pixel_values), -1, self.embed_dim)
