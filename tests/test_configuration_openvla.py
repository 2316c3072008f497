import json

import pytest
import torch

from openvla.configuration_openvla import (
    LLM_BACKBONES,
    PURE_PROMPT,
    VICUNA_PROMPT,
    VISION_BACKBONES,
    OpenVLAConfig,
)
from openvla.modeling_openvla import OpenVLAForActionPrediction

# config.json of openvla/openvla-7b, but for its norm_stats
OPENVLA_7B = {
    "arch_specifier": "no-align+fused-gelu-mlp",
    "architectures": ["OpenVLAForActionPrediction"],
    "auto_map": {
        "AutoConfig": "configuration_prismatic.OpenVLAConfig",
        "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
    },
    "hf_llm_id": "meta-llama/Llama-2-7b-hf",
    "image_resize_strategy": "resize-naive",
    "image_sizes": [224, 224],
    "llm_backbone_id": "llama2-7b-pure",
    "llm_max_length": 2048,
    "model_type": "openvla",
    "n_action_bins": 256,
    "output_projector_states": False,
    "pad_to_multiple_of": 64,
    "pad_token_id": 32000,
    "text_config": {"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064},
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_fused_vision_backbone": True,
    "vision_backbone_id": "dinosiglip-vit-so-224px",
}


def released_names(dino_depth=24, siglip_depth=27, llm_depth=32) -> set[str]:
    """The 982 tensor names of openvla/openvla-7b, written out independently of our modules."""
    both = ["weight", "bias"]
    names = {f"vision_backbone.featurizer.{n}" for n in ("cls_token", "reg_token", "pos_embed")}
    names.add("vision_backbone.fused_featurizer.pos_embed")
    for tower, depth in (("featurizer", dino_depth), ("fused_featurizer", siglip_depth)):
        prefix = f"vision_backbone.{tower}."
        modules = ["patch_embed.proj", "norm"]
        for block in range(depth):
            parts = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
            modules += [f"blocks.{block}.{part}" for part in parts]
            if tower == "featurizer":
                names |= {f"{prefix}blocks.{block}.ls{n}.scale_factor" for n in (1, 2)}
        if tower == "fused_featurizer":
            modules += [f"attn_pool.{m}" for m in ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")]
            names.add(prefix + "attn_pool.latent")
        names |= {f"{prefix}{module}.{kind}" for module in modules for kind in both}
    names |= {f"projector.fc{n}.{kind}" for n in (1, 2, 3) for kind in both}
    names |= {f"language_model.{n}.weight" for n in ("model.embed_tokens", "model.norm", "lm_head")}
    for layer in range(llm_depth):
        parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
        parts += ["input_layernorm", "post_attention_layernorm"]
        names |= {f"language_model.model.layers.{layer}.{part}.weight" for part in parts}
    return names


def unused(name: str) -> bool:
    prefixes = ("featurizer.blocks.23.", "featurizer.norm.", "fused_featurizer.blocks.26.", "fused_featurizer.norm.")
    prefixes += ("fused_featurizer.attn_pool.",)
    return name.startswith(tuple(f"vision_backbone.{prefix}" for prefix in prefixes))


def test_openvla_7b():
    config = OpenVLAConfig(**OPENVLA_7B)
    dino, siglip = config.vision_towers
    assert (dino.embed_dim, dino.depth, dino.num_heads, dino.num_prefix_tokens) == (1024, 24, 16, 5)
    assert (siglip.embed_dim, siglip.depth, siglip.num_heads, siglip.num_prefix_tokens) == (1152, 27, 16, 0)
    assert int(siglip.embed_dim * siglip.mlp_ratio) == 4304
    assert config.num_image_tokens == 256 and config.action_token_end == 32000
    assert config.text_config.rms_norm_eps == 1e-6 and config.text_config.max_position_embeddings == 2048
    assert config.prompt_template == PURE_PROMPT and config.prompt_end_token_id == 29871
    assert (config.attention, config.action_head, config.action_chunk, config.num_cameras) == ("causal", "token", 1, 1)


def test_full_size_shapes_and_names_without_weights():
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(OpenVLAConfig(**OPENVLA_7B))
    saved = model._fix_state_dict_keys_on_save(model.state_dict())
    names = released_names()
    assert len(names) == 982
    assert set(saved) == {name for name in names if not unused(name)}
    assert sum(tensor.numel() for tensor in saved.values()) == 7_541_237_184 - 43_080_480
    assert sum(p.numel() for p in model.model.vision_backbone.featurizer.parameters()) == 303_230_976 - 12_600_320
    assert sum(p.numel() for p in model.model.projector.parameters()) == 71_385_600


def test_an_empty_config_is_openvla_v01():
    # released files leave out what equals the class defaults, and these are v01's
    config = OpenVLAConfig()
    (siglip,) = config.vision_towers
    assert (siglip.embed_dim, siglip.class_token, config.image_resize_strategy) == (1152, False, "letterbox")
    assert config.prompt_template == VICUNA_PROMPT and not config.use_fused_vision_backbone
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    assert not hasattr(model.model.projector, "fc3")
    # v01 has 7,188,124,608 parameters; SigLIP's unused parts are 30,480,160 of them
    assert sum(p.numel() for p in model.parameters()) == 7_188_124_608 - 30_480_160


@pytest.mark.parametrize("backbone", sorted(VISION_BACKBONES))
def test_every_declared_vision_backbone_has_sizes(backbone):
    config = OpenVLAConfig(vision_backbone_id=backbone)
    size = 384 if "384" in backbone else 336 if "336" in backbone else 224
    patch = 16 if backbone.startswith("in1k") else 14
    assert config.num_image_tokens == (size // patch) ** 2
    assert all(tower.image_size == size for tower in config.vision_towers)
    assert config.use_fused_vision_backbone == backbone.startswith(("dinosiglip", "dinoclip"))


@pytest.mark.parametrize("backbone", sorted(LLM_BACKBONES))
def test_every_declared_language_model_has_sizes(backbone):
    config = OpenVLAConfig(llm_backbone_id=backbone)
    hidden = 5120 if "13b" in backbone else 2560 if "phi" in backbone else 4096
    assert config.text_config.hidden_size == hidden
    assert config.text_config.vocab_size == config.action_token_end + 64
    assert config.prompt_end_token_id == (29871 if config.text_config.model_type == "llama" else None)
    if "chat" in backbone or "instruct" in backbone:
        assert config.prompt_template is None  # no released policy, no known prompt


def test_sizes_can_be_written_out():
    tiny = {"embed_dim": 32, "depth": 3, "num_heads": 2, "reg_tokens": 1, "mlp_ratio": 2.5}
    config = OpenVLAConfig(
        vision_backbone_id="my-own", timm_model_ids=["my_vit"], image_sizes=[28], timm_model_args={"my_vit": tiny}
    )
    (tower,) = config.vision_towers
    assert (tower.embed_dim, tower.num_patches, tower.num_prefix_tokens) == (32, 4, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"vision_backbone_id": "resnet"}, "Unknown vision_backbone_id 'resnet'.*dinosiglip-vit-so-224px"),
        ({"llm_backbone_id": "gpt"}, "Unknown llm_backbone_id 'gpt'.*llama2-7b-pure"),
        ({"timm_model_ids": ["vit_unheard_of"]}, r"sizes of tower 'vit_unheard_of' are unknown.*timm_model_args"),
        ({"timm_model_ids": ["a"], "timm_model_args": {"a": {"width": 3}}}, r"unknown keys \['width'\]"),
        ({"timm_model_ids": ["a"], "timm_model_args": {"a": {"depth": 3}}}, r"lacks \['embed_dim', 'num_heads'\]"),
        ({"use_fused_vision_backbone": True}, "contradicts"),
        ({"image_resize_strategy": "stretch"}, "image_resize_strategy must be one of"),
        ({"attention": "both"}, "attention must be one of"),
        ({"action_chunk": 0}, "action_chunk must be an integer of at least 1"),
        ({"arch_specifier": "no-align+linear"}, "names no projector"),
    ],
)
def test_bad_configs_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        OpenVLAConfig(**arguments)


@pytest.mark.parametrize("arguments", [OPENVLA_7B, {}, {"llm_backbone_id": "phi-2-3b"}, {"prompt_end_token_id": None}])
def test_json_round_trip(arguments, tmp_path):
    config = OpenVLAConfig(**arguments)
    config.save_pretrained(tmp_path)
    again = OpenVLAConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.prompt_end_token_id == config.prompt_end_token_id
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageTextToText"] == "modeling_openvla.OpenVLAForActionPrediction"
    assert auto_map["AutoModelForVision2Seq"] == "modeling_openvla.OpenVLAForActionPrediction"
    assert auto_map["AutoConfig"] == "configuration_openvla.OpenVLAConfig"
    assert auto_map["AutoModel"] == "modeling_openvla.OpenVLAModel"


def test_rotary_settings_are_written_for_both_lines_of_transformers(tmp_path):
    scaling = {"rope_type": "linear", "factor": 2.0}
    text_config = {"model_type": "llama", "vocab_size": 32064, "rope_theta": 5e5, "rope_scaling": dict(scaling)}
    OpenVLAConfig(text_config=text_config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert written["rope_theta"] == 5e5 and written["rope_scaling"] == scaling  # what 4.57 reads
    text = OpenVLAConfig.from_pretrained(tmp_path).text_config
    read = getattr(text, "rope_parameters", None) or {"rope_theta": text.rope_theta, **text.rope_scaling}
    assert read == {"rope_theta": 5e5, **scaling}
