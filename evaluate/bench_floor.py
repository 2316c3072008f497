"""How fast could it be? The work of an action, counted from the shapes, over what this machine has been seen to do.

A stage takes at least the longer of its multiplications and of reading its weights. Counted is what any way to the
same action must do: blocks of the towers whose output is read; of the last layer of the language model, queries and
MLP only where hidden states are read; half of causal attention; 256 rows of the head. Activations, norms, positions,
embeddings and the robot's state are not counted: a lower bound. Preprocessing has no floor.

Legend: B batch · L tokens · D hidden · T action chunk · A action dims.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """`flops`: two per multiplication with a weight; `bytes`: what must come out of memory at least once."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def milliseconds(self, ceilings: dict) -> float:
        bandwidth = max(ceilings["copy_gb_s"], ceilings["matvec_gb_s"])
        return max(self.flops / ceilings["matmul_gflop_s"], self.bytes / bandwidth) * 1e-6


def linear(rows: int, weights: int, itemsize: int) -> Work:
    """`rows` vectors through matrices of `weights` elements."""
    return Work(2.0 * rows * weights, weights * itemsize)


def vision_work(config, batch: int, itemsize: int) -> Work:
    """Towers without their last block, and projector. FiLM is not counted."""
    work, images, patches = Work(), batch * config.num_cameras, config.vision_towers[0].num_patches
    for tower in config.vision_towers:
        width, length = tower.embed_dim, tower.num_patches + tower.num_prefix_tokens
        work += linear(images * patches, 3 * tower.patch_size**2 * width, itemsize)
        block = 4 * width * width + 2 * width * int(width * tower.mlp_ratio)
        work += linear(images * length, (tower.depth - 1) * block, itemsize)
        work += Work(4.0 * images * width * length**2 * (tower.depth - 1))
    width, hidden = sum(tower.embed_dim for tower in config.vision_towers), config.text_config.hidden_size
    layers = (width, 4 * width, hidden, hidden) if config.use_fused_vision_backbone else (width, hidden, hidden)
    return work + linear(images * patches, sum(a * b for a, b in zip(layers, layers[1:])), itemsize)


def language_work(text, batch: int, new: int, past: int, read: int, causal: bool, itemsize: int) -> Work:
    """One pass of the language model's layers.

    Args:
        text: its configuration.
        new: tokens of each row in this pass.
        past: tokens whose keys and values are known.
        read: hidden states that are read, of the last tokens.
        causal: whether tokens see only what is before them.
    """
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries = head_dim * text.num_attention_heads
    keys = head_dim * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    matrices = 2 if text.model_type == "phi" else 3
    own = 2 * text.hidden_size * queries + matrices * text.hidden_size * text.intermediate_size  # queries, output, MLP
    shared = 2 * text.hidden_size * keys  # keys, values
    work = Work()
    for layers, rows in ((text.num_hidden_layers - 1, new), (1, read)):
        seen = rows * (past + new) - (rows * (rows - 1) / 2 if causal else 0)  # pairs of a query and a key
        work += linear(batch * new, layers * shared, itemsize)
        work += linear(batch * rows, layers * own, itemsize) if rows else Work()
        work += Work(4.0 * batch * queries * seen * layers, 2.0 * batch * keys * past * layers * itemsize)
    return work


def head_work(config, batch: int, itemsize: int) -> Work:
    """From the hidden states of a chunk to its actions, once; for tokens, of one token."""
    hidden, dim = config.text_config.hidden_size, config.action_dim
    if config.action_head == "token":
        return linear(batch, hidden * config.n_action_bins, itemsize)
    weights = dim * hidden * hidden + 2 * hidden * hidden + hidden * dim
    return linear(batch * config.action_chunk, weights, itemsize)


def action_work(
    config, batch: int, length: int, itemsize: int, drafted: bool = False, passes: int = 1, dim: int | None = None
) -> dict:
    """The passes of an action (or chunk) by stage: `{"vision": [Work], "prefill": [Work], "decode": [Work, …]}`.

    Args:
        length: tokens of the prompt, placeholders included.
        drafted: whether a draft rides along with the prompt.
        passes: of the language model, for tokens one after the other.
        dim: A, where `config.action_dim` does not tell.
    """
    text, count = config.text_config, config.action_chunk * (dim or config.action_dim)
    one_head = head_work(config, batch, itemsize)

    def pass_of(new: int, past: int, read: int, causal: bool) -> Work:
        return language_work(text, batch, new, past, read, causal, itemsize)

    stages = {"vision": [vision_work(config, batch, itemsize)]}
    if config.attention == "causal":
        read = count if drafted else 1
        first = pass_of(length + read - 1, 0, read, True)
        later = [pass_of(1, length + count - passes + step, 1, True) + one_head for step in range(passes - 1)]
        rows = Work(one_head.flops * read, one_head.bytes)  # of the first pass, whose head is read once
        return stages | {"prefill": [first], "decode": [rows, *later]}
    steps = config.num_denoising_steps or 1
    if config.action_head == "token":  # all at once
        one_head = Work(one_head.flops * count, one_head.bytes)
    if config.attention == "prefix":
        step = pass_of(count, length, count, False) + one_head
        return stages | {"prefill": [pass_of(length, 0, 0, False)], "decode": [step] * steps}
    whole = pass_of(length + count + 1, 0, count, False)  # the stop token follows the slots
    return stages | {"prefill": [whole], "decode": [one_head, *[whole + one_head] * (steps - 1)]}


def floor_milliseconds(work: dict, ceilings: dict) -> dict:
    """Per stage and in `total`."""
    floor = {stage: sum(part.milliseconds(ceilings) for part in parts) for stage, parts in work.items()}
    return {**floor, "total": sum(floor.values())}
