"""Policies of random weights in the real shapes, and what they look at: nothing is downloaded.

Speed depends on shapes only; weights are made where they are needed, in the type they are needed in.

Legend: C cameras · T action chunk · A action dims.
"""

INSTRUCTION = "put the yellow cup that is next to the green table on the left side of the big black plate"
UNNORM_KEY = "bench"
ACTION_DIM, PROPRIO_DIM, CAMERA_SIDE = 7, 8, 512
# widths of both towers, their depth and head width; width, MLP width and depth of the language model, whose heads are
# 64 wide. "7b": openvla-7b's
SMALL_SIZES = {"tiny": ((64, 64), 3, 32, 128, 352, 3), "mid": ((384, 576), 12, 64, 1024, 2816, 12)}
SIZES = (*SMALL_SIZES, "7b")
# Llama's ids for the words of the prompt
WORDS = {"In": 512, ":": 29901, "What": 1724, "action": 3158, "should": 881, "the": 278, "robot": 19964, "take": 2125}
WORDS |= {"to": 304, "put": 1925, "yellow": 13328, "cup": 18002, "that": 393, "is": 338, "next": 2446, "green": 7933}
WORDS |= {"table": 1591, "on": 373, "left": 2175, "side": 2625, "of": 310, "big": 4802, "black": 4628, "plate": 15284}
WORDS |= {"?": 29973, "\n": 13, "Out": 3744}


def bench_config(size: str, **fields):
    """A policy's configuration.

    Args:
        size: one of `SIZES`: 9 M, 293 M or 7.5 B parameters.
        fields: of `OpenVLAConfig`, on top.
    """
    from openvla.configuration_openvla import OpenVLAConfig

    one, zero = [1.0] * PROPRIO_DIM, [0.0] * PROPRIO_DIM
    action = {"q01": [-0.02] * 6 + [0.0], "q99": [0.02] * 6 + [1.0], "mask": [True] * 6 + [False]}
    statistics = {UNNORM_KEY: {"action": action, "proprio": {"q01": zero, "q99": one}}}
    common = {"llm_backbone_id": "llama2-7b-pure", "image_resize_strategy": "resize-naive", "action_dim": ACTION_DIM}
    common |= {"norm_stats": statistics, "arch_specifier": "no-align+fused-gelu-mlp"}
    if size == "7b":
        return OpenVLAConfig("dinosiglip-vit-so-224px", **common, **fields)
    widths, depth, head, hidden, mlp, layers = SMALL_SIZES[size]
    dino, siglip = ({"embed_dim": width, "depth": depth, "num_heads": width // head} for width in widths)
    dino |= {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}
    siglip |= {"class_token": False}
    text = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    text |= {"num_attention_heads": hidden // 64, "vocab_size": 32064, "pad_token_id": 32000}
    return OpenVLAConfig(
        "bench",
        timm_model_ids=["dino", "siglip"],
        timm_model_args={"dino": dino, "siglip": siglip},
        text_config=text,
        **common,
        **fields,
    )


def random_policy(config, dtype, device: str):
    """A policy whose tokens are actions, as those of a trained one, and depend on the tokens before them."""
    import torch

    from openvla.modeling_openvla import OpenVLAForActionPrediction

    default = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # 7B in float32 on a CPU first would take 30 GB and a minute
    try:
        with torch.device(device):
            policy = OpenVLAForActionPrediction(config).eval()
    finally:
        torch.set_default_dtype(default)
    start, end = policy.action_tokenizer.vocab_start, policy.action_tokenizer.vocab_end
    with torch.no_grad():
        policy.lm_head.weight[:start] *= 0.1
        policy.lm_head.weight[end:] *= 0.1
        policy.get_input_embeddings().weight[start:end] *= 30
    return policy


def twin(policy, **fields):
    """Another policy on the same weights, with other fields of the configuration; what else it has is random."""
    import torch

    from openvla.modeling_openvla import OpenVLAForActionPrediction

    if fields:
        fields = {"num_denoising_steps": None, "action_slot_id": None, **fields}
    config = type(policy.config)(**{**policy.config.to_dict(), **fields})
    with torch.device("meta"):
        other = OpenVLAForActionPrediction(config).eval()
    other.load_state_dict(policy.state_dict(), strict=False, assign=True)
    other.model.language_model.rotary_emb = policy.model.language_model.rotary_emb  # its buffers are in no state_dict
    for module in other.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in own):
            module.to_empty(device=policy.device, recurse=False).to(policy.dtype)
            module.reset_parameters()
    return other


def random_processor(config):
    """The processor of `config`, with a list of words in place of Llama's tokenizer: the prompt gets the same ids."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from openvla.processing_openvla import OpenVLAImageProcessor, OpenVLAProcessor

    named = {"<unk>": 0, "<s>": 1, "</s>": 2, **WORDS}
    taken = set(named.values())
    fillers = {f"<{index}>": index for index in range(config.action_token_end) if index not in taken}
    words = Tokenizer(models.WordLevel(named | fillers, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<PAD>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=config.llm_max_length, **special)
    towers = config.vision_towers
    image_processor = OpenVLAImageProcessor(
        use_fused_vision_backbone=True,
        image_resize_strategy=config.image_resize_strategy,
        input_sizes=[(3, tower.image_size, tower.image_size) for tower in towers],
        means=[(0.485, 0.456, 0.406), (0.5, 0.5, 0.5)],
        stds=[(0.229, 0.224, 0.225), (0.5, 0.5, 0.5)],
    )
    return OpenVLAProcessor(
        image_processor,
        tokenizer,
        config.prompt_template,
        config.prompt_end_token_id,
        num_patches=towers[0].num_patches,
        num_cameras=config.num_cameras,
        num_state_tokens=config.num_placeholders - config.num_image_tokens,
        image_token_id=config.image_token_id,
    )


def observe(batch: int, cameras: int, side: int = CAMERA_SIDE) -> list[list]:
    """A picture of smooth noise per robot and camera: `[batch][cameras]` of `PIL.Image`."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (batch, cameras, 16, 16, 3), dtype=np.uint8)
    return [[Image.fromarray(image).resize((side, side)) for image in robot] for robot in pixels]
