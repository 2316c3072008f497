"""How much memory fine-tuning takes on each GPU, per mode and batch: an estimate, made without a GPU.

python -m openvla.finetune.memory --model-size 7b
python -m openvla.finetune.memory --model-size 7b --max-vram 24
python -m openvla.finetune.memory --model-size v01 --accumulation
python -m openvla.finetune.memory --model-size 7b --count

Weights, gradients and AdamW's states are exact. What the forward pass saves is counted by running our code on fake
tensors of PyTorch, at the real widths, and extrapolated from one and two layers. Not counted: CUDA itself,
fragmentation, short-lived buffers (some 30 MB a sample), DDP's second copy of the gradients. GPU attention is taken to
save what the CPU's does, NF4 layers what bf16 ones do. Under FSDP, activations are an upper bound.

Nothing here was measured on a GPU. The original's published numbers (batch 16, LoRA of rank 32 without checkpointing;
its README, and Kim et al. 2024, arXiv:2406.09246, table 1) are higher, in GB of 10^9 bytes:

    openvla-7b, LoRA               about 72   here  54.5, 24 % less
    openvla-7b, LoRA, batch 1  at least 27    here  18.9, 30 % less
    one tower,  LoRA                   59.7   here  49.7, 17 % less (v01)
    one tower,  full, two GPUs        163.3   here 115.5, 29 % less (v01, FSDP with checkpointing)

It says batch 12 fits 48 GB and 24 fits 80 GB: here 45.0 and 73.4. The original projects every position onto the
vocabulary, roughly 0.2 GB a sample; the rest of the gap is unexplained. Have 1.4 times of what the table says.
"""

import argparse
from functools import partial
from itertools import product

GIB = 2**30
BATCHES = (1, 4, 8, 16)
TEXT_TOKENS, SCORED_TOKENS = 25, 8  # "In: What action should the robot take to …?\nOut: ", seven actions, end
SIZES = {
    "7b": {
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "use_fused_vision_backbone": True,
    },
    "v01": {},
}
# Of 7b, as `--count` prints it: mode -> `count` with and without checkpointing
COUNTED = {
    "lora": ((121191733, 2044244, 2301952), (2372219197, 215733076, 57295338)),
    "qlora": ((121191733, 4436, 2301952), (2049939773, 148308, 48087530)),
    "full": ((227710661, 407964612, 4603904), (2590375925, 14730768324, 64075306)),
    "frozen-vision": ((227108549, 367525828, 4603904), (2074934277, 13319824324, 64075306)),
    "last-layer": ((208283333, 262668228, 4603904), (1222083077, 13214966724, 37171242)),
    "sandwich": ((223106757, 407964612, 4603904), (1751746037, 14730768324, 37171242)),
}


# --- The policy as it is trained -------------------------------------------------------------------------------------
def build(config, mode: str, rank: int = 32, bf16: bool = True, depths: list[int] | None = None):
    """The policy of `openvla finetune` without values (`meta`): its dtypes, adapters and `requires_grad`. `depths`:
    how many layers of each of `stacks` to keep."""
    import torch
    from peft import get_peft_model

    from openvla.finetune.sft import choose_trainable, lora_config
    from openvla.modeling_openvla import OpenVLAForActionPrediction

    adapts = mode in ("lora", "qlora")
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config).to(torch.bfloat16 if bf16 and adapts else torch.float32)
        for stack, depth in zip(stacks(model), depths or []):
            del stack[depth:]
        if not adapts:
            choose_trainable(model, mode)
            return model
        get_peft_model(model, lora_config(rank, None, 0.0, True))  # in place; adapters are float32
    return model.to(torch.bfloat16) if mode == "qlora" else model  # TRL 1.16: so are adapters of quantised models


def stacks(model) -> list:
    """The lists of equal layers: language model, first tower, second tower if there is one."""
    towers = [model.model.vision_backbone.featurizer, model.model.vision_backbone.fused_featurizer]
    return [model.model.language_model.layers, *(tower.blocks for tower in towers if tower is not None)]


def weight_bytes(name: str, parameter, mode: str) -> float:
    """A parameter on the GPU. NF4: 4 bit, and a float32 scale per block of 64."""
    if mode == "qlora" and "language_model.layers" in name and parameter.ndim == 2 and "lora_" not in name:
        return parameter.numel() * (0.5 + 4 / 64)
    return parameter.numel() * parameter.element_size()


# --- What a forward pass keeps ---------------------------------------------------------------------------------------
def forward(model, batch: int, bf16: bool = True):
    """The loss of a batch of blank images. `model(ids, pixels)` but for its checks of placeholders: those need values,
    and fake tensors have none."""
    import torch

    config = model.config
    size, channels = config.image_sizes[0], 3 * len(config.vision_towers) * config.num_cameras
    ids = torch.ones(batch, config.num_image_tokens + TEXT_TOKENS, dtype=torch.long)
    ids[:, 1 : 1 + config.num_image_tokens] = config.image_token_id
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        embeds = model.get_input_embeddings()(ids)
        patches = model.model.get_image_features(torch.zeros(batch, channels, size, size))
        embeds = embeds.masked_scatter((ids == config.image_token_id).unsqueeze(-1), patches.to(embeds.dtype))
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, torch.arange(SCORED_TOKENS)])
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, :SCORED_TOKENS].flatten())


def saved_bytes(model, run) -> int:
    """Bytes of distinct tensors that `run()` saves for the backward pass, beyond parameters and buffers."""
    import torch

    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # kept, lest another one gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = run()
    assert loss.requires_grad  # and is alive: what it saved is, too
    return sum(storage.nbytes() for storage in saved.values())


def float32_layer_norms(model) -> None:
    """Makes `layer_norm` take and save float32, as under autocast on GPUs; on CPUs autocast lets it be."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float().register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))


def count_at(config, mode: str, rank: int, checkpointing: bool, bf16: bool, depths: list[int]) -> tuple[int, int]:
    """(bytes per sample, bytes whatever the batch: bf16 copies of weights) of `saved_bytes`, by PyTorch's fake
    tensors, which run the same code and hold shapes but no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = build(config, mode, rank, bf16, depths)
    if bf16:
        float32_layer_norms(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        one, two = (saved_bytes(model, partial(forward, model, batch, bf16)) for batch in (1, 2))
    return two - one, 2 * one - two


def count(config, mode: str, rank: int, checkpointing: bool, bf16: bool = True) -> tuple[int, int, int]:
    """(bytes per sample, bytes whatever the batch, bytes per sample of the largest layer), extrapolated linearly from
    one and two layers of each stack."""
    depths = [config.text_config.num_hidden_layers, *(tower.depth - 1 for tower in config.vision_towers)]
    base = count_at(config, mode, rank, checkpointing, bf16, [1] * len(depths))
    total, largest = list(base), 0
    for index, depth in enumerate(depths):
        deeper = [2 if place == index else 1 for place in range(len(depths))]
        layer = [two - one for one, two in zip(base, count_at(config, mode, rank, checkpointing, bf16, deeper))]
        total = [all_of + (depth - 1) * each for all_of, each in zip(total, layer)]
        largest = max(largest, layer[0])
    return (*total, largest)


# --- Everything ------------------------------------------------------------------------------------------------------
def weigh(config, mode: str, rank: int, bf16: bool = True) -> dict[str, float]:
    """Bytes that do not depend on the batch: of parameters (`weights`), of the trained ones' gradients, of the bf16
    copies that autocast makes of those, and what else `training_memory` needs to know of sizes."""
    from torch import nn

    model = build(config, mode, rank, bf16)
    linear = [module.weight for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    layers = [sum(weight.numel() for weight in layer.parameters()) for stack in stacks(model) for layer in stack]
    return {
        "weights": sum(weight_bytes(name, parameter, mode) for name, parameter in model.named_parameters()),
        "gradients": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        "copies": sum(2 * w.numel() for w in linear if w.requires_grad and w.element_size() == 4) if bf16 else 0,
        # FSDP gathers in bf16: what is outside of the layers, a layer, the next one, and the gradients of one
        "gathered": 2 * (sum(p.numel() for p in model.parameters()) - sum(layers) + 3 * max(layers)),
        "unpacked": max(2 * w.numel() for w in stacks(model)[0].parameters() if w.ndim == 2) * (mode == "qlora"),
    }


def peak(weighed: dict, counted: tuple, batch: int, checkpointing: bool, shards: int, accumulation: bool) -> dict:
    """`training_memory` from `weigh` and from `count` with and without checkpointing."""
    with_it, without = counted
    per_sample, copies, _ = with_it if checkpointing else without
    parts = {
        "weights": weighed["weights"] / shards,
        "gradients": weighed["gradients"] / shards,
        "optimizer": 2 * weighed["gradients"] / shards,  # AdamW: two states of the parameter's dtype
        "activations": per_sample * batch,
        "copies": max(copies, weighed["copies"]) if shards == 1 else weighed["gathered"],
        "recomputed": without[2] * batch * checkpointing + weighed["unpacked"],
    }
    forward = parts["activations"] + parts["copies"]
    # Activations and copies go while gradients come, unless those stay from the pass before
    together = forward + parts["gradients"] if accumulation else max(forward, parts["gradients"])
    parts["total"] = parts["weights"] + parts["optimizer"] + together + parts["recomputed"]
    return {name: round(size) for name, size in parts.items()}


def training_memory(
    config,
    mode: str,
    rank: int,
    batch: int,
    gradient_checkpointing: bool,
    bf16: bool = True,
    shards: int = 1,
    accumulation: bool = False,
) -> dict[str, int]:
    """Bytes on one GPU per part, and their `total` at the worst moment of a step.

    Args:
        batch: samples per GPU and forward pass.
        shards: GPUs over which FSDP spreads weights, gradients and optimizer state.
        accumulation: gradients of several passes are added up, so they are there during the forward pass, too.

    Returns `weights`, `gradients`, `optimizer`, `activations` (what the forward pass saves), `copies` (bf16 ones of
    float32 weights, made by autocast, or what FSDP has gathered), `recomputed` (the layer that checkpointing is at;
    the matrix that bitsandbytes unpacks), `total`.
    """
    if mode == "qlora" and shards > 1:
        raise ValueError("mode qlora cannot be sharded: FSDP cannot split NF4 weights as they are loaded here.")
    counted = tuple(count(config, mode, rank, each, bf16) for each in (True, False))
    return peak(weigh(config, mode, rank, bf16), counted, batch, gradient_checkpointing, shards, accumulation)


def tables(measured: dict, accumulation: bool, max_vram: float | None) -> str:
    """Markdown. `measured`: mode -> (`weigh`, `count` with and without checkpointing)."""
    lines = ["| mode | checkpointing | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |"]
    lines.append("|---|---|" + "---:|" * len(BATCHES))
    fits = [f"| largest batch in {max_vram} GiB | checkpointing | 1 GPU | FSDP, 8 GPUs |", "|---|---|---:|---:|"]

    def total(mode: str, checkpointing: bool, batch: int, shards: int = 1) -> float:
        return peak(*measured[mode], batch, checkpointing, shards, accumulation)["total"] / GIB

    for mode, checkpointing in product(measured, (True, False)):
        head = f"| {mode} | {'yes' if checkpointing else 'no'} | "
        lines.append(head + " | ".join(f"{total(mode, checkpointing, batch):.1f}" for batch in BATCHES) + " |")
        one, eight = (
            sum(total(mode, checkpointing, batch, shards) <= (max_vram or 0) for batch in range(1, 1025))
            for shards in (1, 8)
        )
        fits.append(head + f"{one or 'none'} | {'-' if mode == 'qlora' else eight or 'none'} |")
    return "\n".join(lines + ([""] + fits if max_vram else []))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", choices=SIZES, default="7b", help="7b: openvla-7b; v01: one tower")
    parser.add_argument("--rank", type=int, default=32, help="of LoRA and QLoRA")
    parser.add_argument("--max-vram", type=float, metavar="GIB", help="also print the largest batches that fit")
    parser.add_argument("--accumulation", action="store_true", help="gradient_accumulation_steps above 1")
    parser.add_argument("--count", action="store_true", help="count anew, and print the counts, also for 7b")
    args = parser.parse_args(argv)

    from openvla.configuration_openvla import OpenVLAConfig
    from openvla.finetune.sft import MODES

    config = OpenVLAConfig(**SIZES[args.model_size])
    measured = {}
    for mode in MODES:
        counted = COUNTED[mode]
        if args.count or args.model_size != "7b" or args.rank != 32:
            counted = tuple(count(config, mode, args.rank, each) for each in (True, False))
        if args.count:
            print(f'    "{mode}": {counted},')
        measured[mode] = weigh(config, mode, args.rank), counted
    print(f"GiB per GPU, {args.model_size}, bf16, LoRA rank {args.rank}; an estimate from below:")
    print("published measurements of the original are 1.2 to 1.4 times as high. --help tells what is not counted.\n")
    print(tables(measured, args.accumulation, args.max_vram))


if __name__ == "__main__":
    main()
