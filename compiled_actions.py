"""Acting through `torch.compile`: every pass of a policy as one graph of fixed shapes, with CUDA graphs if asked.

Prompts are filled up to a bucket's length on their right. In causal attention, what stands behind a token changes
nothing for it, and what is decoded later takes that place; elsewhere a mask hides it. Shapes do not depend on the
instruction then, so nothing is compiled again when it changes. Graphs read the model's own weights: none is copied.

Legend: B batch · L prompt tokens · N positions of a bucket · n tokens of a pass · T action chunk · A action dims ·
W = T·A · D hidden · P placeholders.
"""

import logging
import threading
import types

import torch
from transformers.utils import logging as transformers_logging

from .language_layers import can_run_layers, keys_and_values, run_layer

logger = logging.getLogger(__name__)

BUCKET_STEP = 32  # matrix kernels work on tiles
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


# --- The passes ------------------------------------------------------------------------------------------------------
class _Written:
    """What layers take for a cache: writes what they make of tokens at `positions` `(B, n)`, and shows everything."""

    def __init__(self, states: list, positions: torch.LongTensor):
        self.states, self.positions = states, positions

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
        for all_states, states in zip(self.states[layer_idx], (keys, values)):
            if states.shape == all_states.shape:
                all_states.copy_(states)
            else:
                all_states.scatter_(2, self.positions[:, None, :, None].expand_as(states), states)
        return self.states[layer_idx]


class _Shown:
    """What a layer takes for a cache: all keys and values, those of its own tokens included."""

    def __init__(self, states: tuple[torch.Tensor, torch.Tensor]):
        self.states = states

    def update(self, *args, **kwargs):
        return self.states


def _read_layers(model, states: list | None, embeds, seen, read) -> torch.Tensor | None:
    """Embeddings `(B, N, D)` of all positions -> hidden states `(B, n, D)` at `read` `(B, n)`, if anything is read.

    Args:
        states: where each layer's keys and values go; None: nowhere.
        seen: `(B, 1, 1, N)` bool, what everything attends to; None: causal.
    """
    positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
    language_model, hidden = model.language_model, embeds
    rotation = language_model.rotary_emb(embeds, positions)
    mask = None if seen is None else seen.expand(-1, -1, embeds.shape[1], -1)
    *layers, last = language_model.layers
    for layer in layers:
        cache = None if states is None else _Written(states, positions.expand(len(embeds), -1))
        hidden = run_layer(layer, hidden, mask, rotation, positions, cache)
    last_states = keys_and_values(last, hidden, rotation)
    if states is not None:
        for mine, new in zip(states[-1], last_states):
            mine.copy_(new)
    if read is None:
        return None
    hidden = hidden.gather(1, read[:, :, None].expand(-1, -1, hidden.shape[2]))
    if seen is None:
        mask = positions <= read[:, :, None]
        mask = mask[:, None]  # (B, 1, n, N)
    else:
        mask = seen.expand(-1, -1, read.shape[1], -1)
    rotation = language_model.rotary_emb(hidden, read)
    return language_model.norm(run_layer(last, hidden, mask, rotation, read, _Shown(last_states)))


def _embed(model, ids: torch.LongTensor, features: torch.Tensor, proprio, times) -> torch.Tensor:
    """`(B, N, D)` of prompts whose placeholders stand behind the first token."""
    embeds = model.get_input_embeddings()(ids)
    features = model._add_state(features, proprio, times).to(embeds)
    return torch.cat([embeds[:, :1], features, embeds[:, 1 + features.shape[1] :]], dim=1)


def _prefill(model, states: list, ids, read, pixel_values, proprio) -> torch.Tensor:
    """A causal policy's prompts `(B, N)` -> hidden states `(B, W, D)` at `read` `(B, W)`."""
    features = model.encode_images(ids, pixel_values)
    return _read_layers(model, states, _embed(model, ids, features, proprio, None), None, read)


def _step(model, states: list, ids, positions) -> torch.Tensor:
    """Ids `(B, n)` at `positions` `(B, n)`, behind what is known -> hidden states `(B, n, D)`."""
    seen = torch.arange(states[0][0].shape[2], device=ids.device) <= positions[:, :, None]
    return _run_behind(model, states, model.get_input_embeddings()(ids), positions, seen[:, None])


def _run_behind(model, states: list, hidden, positions, mask) -> torch.Tensor:
    rotation = model.language_model.rotary_emb(hidden, positions)
    cache = _Written(states, positions)
    for layer in model.language_model.layers:
        hidden = run_layer(layer, hidden, mask, rotation, positions, cache)
    return model.language_model.norm(hidden)


def _look(model, ids, lengths, pixel_values) -> torch.Tensor:
    """`(B, P', D)` of images, seen with the prompts if the towers have FiLM."""
    attended = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return model.encode_images(ids, pixel_values, attended)


def _fill(model, noisy, times, like: torch.Tensor, count: int) -> torch.Tensor:
    """What stands in the slots, `(B, W, D)`."""
    if noisy is None:
        return like.new_zeros(len(like), count, like.shape[2])
    return model.noisy_action_projector(noisy, times).to(like)


def _parallel(model, ids, lengths, read, features, proprio, noisy, times) -> torch.Tensor:
    """Prompts, slots and end token `(B, N)` that all see each other -> hidden states `(B, W, D)` at `read`."""
    embeds = _embed(model, ids, features, proprio, times if model.config.has_time_token else None)
    slots = read + 1  # what is read stands one before them
    filled = _fill(model, noisy, times, embeds, read.shape[1])
    embeds = embeds.scatter(1, slots[:, :, None].expand_as(filled), filled)
    seen = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return _read_layers(model, None, embeds, seen[:, None, None], read)


def _remember_prompt(model, states: list, ids, lengths, features, proprio) -> None:
    """Prompts `(B, N)` that see themselves and no slot."""
    seen = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    _read_layers(model, states, _embed(model, ids, features, proprio, None), seen[:, None, None], None)


def _slots(model, states: list, positions, noisy, times) -> torch.Tensor:
    """Slots at `positions` `(B, W)`, which see each other and the prompt -> hidden states `(B, W, D)`."""
    like = model.get_input_embeddings().weight[None, :1].expand(len(positions), -1, -1)
    seen = torch.arange(states[0][0].shape[2], device=positions.device) <= positions[:, -1:]
    mask = seen[:, None, None].expand(-1, -1, positions.shape[1], -1)
    return _run_behind(model, states, _fill(model, noisy, times, like, positions.shape[1]), positions, mask)


# --- Buckets ---------------------------------------------------------------------------------------------------------
class Bucket:
    """Prompts of up to `size - behind` tokens, `batch` at a time, `count` = T·A tokens or slots behind them."""

    FUNCTIONS: dict = {}  # name -> pass

    def __init__(self, policy, batch: int, size: int, count: int, mode: str):
        self.policy, self.batch, self.size, self.count, self.states = policy, batch, size, count, None
        self.compiled = {name: _compile(function, mode) for name, function in self.FUNCTIONS.items()}

    def keep_states(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of every layer, in tensors that never move, `(B, heads, N, head dim)` each."""
        if self.states is None:
            text, layers = self.policy.config.text_config, self.policy.model.language_model.layers
            heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
            shape = (self.batch, heads, self.size, layers[0].self_attn.head_dim)
            options = {"device": self.policy.device, "dtype": self.policy.dtype}
            with torch.inference_mode(False):  # a caller's mode would forbid everybody else's to write to them
                self.states = [(torch.zeros(shape, **options), torch.zeros(shape, **options)) for _ in layers]
            for states in (each for pair in self.states for each in pair):
                torch._dynamo.mark_static_address(states)  # or CUDA graphs would refuse to write to them
        return self.states

    def run(self, name: str, *args) -> torch.Tensor | None:
        """One pass; what it gives is a copy, as the next pass of a CUDA graph writes over it."""
        torch.compiler.cudagraph_mark_step_begin()
        output = self.compiled[name](self.policy.model, *args)
        return None if output is None else output.clone()

    def take(self, observation: dict) -> list[torch.Tensor | None]:
        """Pixel values and state as graphs know them."""
        values = (observation["pixel_values"], observation["proprio"])
        options = {"device": self.policy.device, "dtype": torch.float32, "memory_format": torch.contiguous_format}
        return [each if each is None else torch.empty_like(each, **options).copy_(each) for each in values]

    def fill_up(self, rows: list[list[int]]) -> torch.LongTensor:
        """`(B, N)` on the policy's device."""
        padding = self.policy.config.pad_token_id
        filled = [row + [padding] * (self.size - len(row)) for row in rows]
        return torch.tensor(filled, device=self.policy.device)


class CausalBucket(Bucket):
    """Passes as `EagerPasses` has them. Those that have guesses are as wide as the widest."""

    FUNCTIONS = {"prefill": _prefill, "step": _step, "steps": _step}

    @staticmethod
    def num_behind(count: int) -> int:
        return 2 * count  # guesses fill a pass even where fewer tokens are left

    def start(self, rows: list[list[int]], observation: dict) -> "CausalBucket":
        self.rows = rows
        self.pixel_values, self.proprio = self.take(observation)
        self.ends = torch.tensor([[len(row)] for row in rows], device=self.policy.device)  # behind what is known
        return self

    def first(self, guesses: torch.LongTensor) -> torch.Tensor:
        ids, count = self.fill_up(self.rows), guesses.shape[1]
        steps = torch.arange(self.count, device=ids.device)
        if count:
            ids.scatter_(1, self.ends + steps[:count], guesses)
        look = self.pixel_values, self.proprio
        hidden = self.run("prefill", self.keep_states(), ids, self.ends - 1 + steps, *look)
        self.ends = self.ends + count
        return hidden[:, : 1 + count]

    def next(self, ids: torch.LongTensor) -> torch.Tensor:
        count = ids.shape[1]
        width = 1 if count == 1 else self.count - 1
        steps = torch.arange(width, device=ids.device)
        wide = ids.new_zeros(self.batch, width)  # of strides that never change, which is part of a graph's shapes
        wide[:, :count] = ids
        hidden = self.run("step" if count == 1 else "steps", self.keep_states(), wide, self.ends + steps)
        self.ends = self.ends + count
        return hidden[:, :count]

    def forget(self, num_tokens: int) -> None:
        self.ends = self.ends - num_tokens

    def warm_up(self, observation: dict, row: list[int]):
        """Runs every pass; yields after each."""
        token = self.policy.action_tokenizer.vocab_start
        ids = torch.full((self.batch, self.count - 1), token, device=self.policy.device)
        self.start([row] * self.batch, observation)
        yield self.first(ids)
        self.forget(self.count - 1)
        yield self.next(ids[:, :1])
        if self.count > 2:
            yield self.next(ids)


class SlotsBucket(Bucket):
    """A policy that decodes in parallel, as a function of what fills its slots."""

    FUNCTIONS = {"look": _look, "parallel": _parallel, "remember": _remember_prompt, "slots": _slots}

    @staticmethod
    def num_behind(count: int) -> int:
        return count + 1

    def start(self, rows: list[list[int]], observation: dict):
        """`(noisy actions, times) -> (B, W, D)`, as `OpenVLAForActionPrediction._run_slots` makes it."""
        config, device = self.policy.config, self.policy.device
        (pixel_values, proprio), steps = self.take(observation), torch.arange(self.count, device=device)
        prompt_ends = torch.tensor([[len(row)] for row in rows], device=device)
        if is_prefix := config.attention == "prefix":
            whole = rows
        else:
            suffix = [config.action_slot_id] * self.count + [config.text_config.eos_token_id]
            whole = [row + suffix for row in rows]
        ids, lengths = self.fill_up(whole), torch.tensor([len(row) for row in whole], device=device)
        features = self.run("look", ids, lengths, pixel_values)
        if is_prefix:
            self.run("remember", self.keep_states(), ids, lengths, features, proprio)

        def run(noisy: torch.Tensor | None = None, times: torch.Tensor | None = None) -> torch.Tensor:
            if is_prefix:
                return self.run("slots", self.keep_states(), prompt_ends + steps, noisy, times)
            return self.run("parallel", ids, lengths, prompt_ends - 1 + steps, features, proprio, noisy, times)

        return run

    def warm_up(self, observation: dict, row: list[int]):
        """Runs every pass; yields after each."""
        config, noisy, times = self.policy.config, None, None
        run = self.start([row] * self.batch, observation)
        yield
        if config.denoises:
            noisy = torch.zeros(self.batch, config.action_chunk, config.action_dim, device=self.policy.device)
            times = torch.zeros(self.batch, device=self.policy.device)
        yield run(noisy, times)


class CompiledPolicy:
    """What `OpenVLAForActionPrediction.compile_for_actions` makes; see there.

    Buckets keep what they know of an observation from pass to pass: `lock` is held from `find` to the last of them.
    """

    def __init__(self, policy, mode: str, batch_sizes: tuple[int, ...], text_tokens: tuple[int, ...]):
        self.policy, self.mode, self.placement, self.told = policy, mode, (policy.device, policy.dtype), set()
        self.lock = threading.Lock()
        config = policy.config
        kind = CausalBucket if config.attention == "causal" else SlotsBucket
        self.count = count = config.action_chunk * _most_action_dims(policy)
        self.shortest, self.behind = 1 + config.num_placeholders, kind.num_behind(count)
        sizes = {-(-(self.shortest + tokens + self.behind) // BUCKET_STEP) * BUCKET_STEP for tokens in text_tokens}
        self.buckets = [
            kind(policy, batch, size, count, mode) for batch in sorted(set(batch_sizes)) for size in sorted(sizes)
        ]

    def __reduce__(self):
        return type(None), ()  # a copy of a policy is not compiled

    def warm_up(self, progress: bool) -> None:
        """Compiles everything, and has CUDA graphs recorded, which takes three runs of each pass."""
        config, runs = self.policy.config, 3 if self.mode in CUDA_GRAPH_MODES else 1
        row = [1] + [config.image_token_id] * config.num_placeholders + [1]
        with transformers_logging.tqdm(desc="compile", unit="pass", disable=not progress) as bar:
            for bucket in self.buckets:
                shapes = _observation_shapes(config, bucket.batch)
                observation = {
                    name: torch.zeros(shape, device=self.policy.device) if shape else None
                    for name, shape in shapes.items()
                }
                for _ in range(runs):
                    for _ in bucket.warm_up(observation, row):
                        bar.update()

    def find(self, rows: list[list[int]], observation: dict, count: int) -> Bucket | None:
        """The smallest bucket for prompts and `count` tokens or slots behind each; or None, having said why once, or
        for what is refused elsewhere."""
        given = {name: None if value is None else tuple(value.shape) for name, value in observation.items()}
        if given != _observation_shapes(self.policy.config, len(rows)):
            return None
        if not observation["pixel_values"].is_floating_point():
            return None
        image_id, end, batches = self.policy.config.image_token_id, self.shortest, {b.batch for b in self.buckets}
        longest = max(map(len, rows))
        fitting = [each for each in self.buckets if each.batch == len(rows) and longest + self.behind <= each.size]
        if self.placement != (self.policy.device, self.policy.dtype):
            why = f"compiled for {self.placement}, but the policy is on {(self.policy.device, self.policy.dtype)} now"
        elif why := refusal(self.policy):
            pass
        elif any(row[1:end] != [image_id] * (end - 1) or row.count(image_id) != end - 1 for row in rows):
            why = "image placeholders do not stand behind the first token"
        elif count > self.count:
            why = f"compiled for up to {self.count} action values, got {count}"
        elif len(rows) not in batches:
            why = f"compiled for batches of {sorted(batches)}, got {len(rows)}"
        elif not fitting:
            room = self.buckets[-1].size - self.behind - end
            why = f"compiled for up to {room} tokens of text, got {longest - end}"
        else:
            return fitting[0]
        if why not in self.told:
            self.told.add(why)
            logger.warning("Acting without compilation: %s.", why)
        return None


def _compile(function, mode: str):
    """For one shape: as a function of its own, or shapes would share a cache that PyTorch limits to a few."""
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, mode=mode, fullgraph=True, dynamic=False)


def refusal(policy) -> str | None:
    """Why a policy's passes cannot be compiled, if so."""
    language_model = policy.model.language_model
    if (kind := language_model.config._attn_implementation) != "sdpa":
        return f"attn_implementation is {kind!r}, not 'sdpa'"
    if getattr(policy, "hf_quantizer", None) is not None:
        return "its weights are quantized"
    if torch.is_autocast_enabled(policy.device.type):
        return "autocast is on"
    if not can_run_layers(language_model):
        return f"its {type(language_model).__name__} can only be run as a whole"
    return None


def _observation_shapes(config, batch: int) -> dict[str, tuple | None]:
    channels, side = 3 * len(config.vision_towers) * config.num_cameras, config.vision_towers[0].image_size
    proprio = (batch, config.proprio_dim) if config.proprio_dim else None
    return {"pixel_values": (batch, channels, side, side), "proprio": proprio}


def _most_action_dims(policy) -> int:
    """That one call can ask for."""
    known = [len(next(iter(each["action"].values()))) for each in (policy.norm_stats or {}).values()]
    return policy.config.action_dim or max(known, default=7)
