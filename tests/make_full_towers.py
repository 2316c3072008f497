"""Makes a policy with both towers of openvla-7b at full size and a small Llama: `python make_full_towers.py FOLDER`.

For implementations that take no other towers, such as vLLM's. 1.5 GB in bf16, as fine-tuning leaves a policy: without
the tensors that none ever reads. Weights are random, the same ones every time, scaled so that the tokens depend on
image and instruction and that actions win over the rest of the vocabulary.
"""

import json
import os
import sys
import zlib
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from openvla import OpenVLAConfig, OpenVLAProcessor
from openvla.hub_upload.layout import new_folder, released_names, skeleton, write_companions
from openvla.hub_upload.weights import TensorInfo, write_shards

TINY = Path(__file__).parent / "fixtures" / "tiny-openvla"
TEXT_SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
# As released with openvla-7b: ImageNet's, rounded to bfloat16, and SigLIP's.
NORMALIZATIONS = [
    {"mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375], "inplace": False},
    {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "inplace": False},
]


def make(folder: Path) -> None:
    # 1. What differs from the small recorded policy: towers, language model, normalisation
    released = json.loads((TINY / "config.json").read_text())
    for name in ("timm_model_ids", "timm_model_args"):  # the id of the vision backbone tells
        del released[name]
    released["text_config"] |= {**TEXT_SIZES, "num_hidden_layers": 2}
    config = OpenVLAConfig.from_dict(released)
    config.dtype = torch.bfloat16
    processor = OpenVLAProcessor.from_pretrained(TINY)
    processor.image_processor.tvf_normalize_params = NORMALIZATIONS

    # 2. Weights under their released names, then everything else
    model = skeleton(config)
    state = model.state_dict()
    shapes = {new: tuple(state[old].shape) for old, new in released_names(model, state).items()}
    infos = {name: TensorInfo(config.dtype, shape) for name, shape in shapes.items()}
    with new_folder(folder) as out:
        write_shards(out, infos, lambda name: draw(name, shapes[name], model.action_tokenizer), progress=False)
        write_companions(out, config, processor, {"bridge_orig": released["norm_stats"]["bridge_orig"]})


def draw(name: str, shape: tuple, action_tokenizer) -> torch.Tensor:
    """Random values of a tensor, decided by its name.

    Chosen by trial: embeddings small enough that the epsilons of the norms behind them matter, what comes from the
    image large enough that it does.
    """
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    layer, kind = name.rsplit(".", 2)[-2:]
    if kind in ("cls_token", "reg_token", "pos_embed"):
        return 0.1 * values
    if layer == "embed_tokens":
        return 0.3 * values
    if kind == "scale_factor":  # LayerScale
        return 0.2 * values
    if kind == "bias":
        return (0.1 if ".blocks." in name else 0.03) * values
    if len(shape) == 1:  # norms
        return 1 + 0.2 * values
    factors = {"q_proj": 1.5, "k_proj": 1.5, "o_proj": 2, "fc3": 2}
    values *= factors.get(layer, 1) / values[0].numel() ** 0.5
    if layer == "lm_head":
        start, end = action_tokenizer.vocab_start, action_tokenizer.vocab_end
        values[:start] *= 0.4
        values[start:end] *= 4
        values[end:] *= 0.4
    return values


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(Path(sys.argv[1]))
