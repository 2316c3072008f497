"""The language model's layers as acting needs them: a cache of known size, and of the last layer only what is read.

Keys and values of the last layer are needed for every position, as later tokens attend to them; its queries, attention
and MLP only for positions whose hidden states are read. The rest of what the layers compute is transformers' own.

Legend: B batch · L tokens of this pass · n positions to be read · D hidden.
"""

import inspect

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

# What transformers calls a cache where it passes or returns one: `cache` since 5.24, which renamed it
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

# Language models whose layers are run one by one, with attention that can be told what to see in a plain tensor
LAYERED = ("LlamaModel", "Qwen2Model")
TENSOR_MASKED = ("sdpa", "eager")


class PreallocatedLayer(DynamicLayer):
    """Keys and values in tensors of their final size, instead of new ones for every token."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        values = key_states if value_states is None else value_states  # transformers 4.57 does not pass them
        self.all_keys, self.all_values = (
            states.new_empty(*states.shape[:2], self.size, states.shape[-1]) for states in (key_states, values)
        )
        self.keys, self.values = self.all_keys[:, :, :0], self.all_values[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        self.all_keys[:, :, start:end] = key_states
        self.all_values[:, :, start:end] = value_states
        self.keys, self.values = self.all_keys[:, :, :end], self.all_values[:, :, :end]
        return self.keys, self.values


class PreallocatedCache(Cache):
    """For at most `size` tokens."""

    def __init__(self, num_layers: int, size: int):
        super().__init__(layers=[PreallocatedLayer(size) for _ in range(num_layers)])


def the_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """What a caller passed under the one name or the other."""
    if cache is not None and past_key_values is not None:
        raise ValueError("Pass one cache: as cache, or as past_key_values, its name before transformers 5.24.")
    return past_key_values if cache is None else cache


def causal_mask(config, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, cache, **options):
    """`create_causal_mask` of either transformers line."""
    if "cache_position" in inspect.signature(create_causal_mask).parameters:  # transformers 4.57
        past = 0 if cache is None else cache.get_seq_length()
        options["cache_position"] = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)
    return create_causal_mask(config, inputs_embeds, attention_mask, **{CACHE_NAME: cache}, **options)


def can_run_layers(language_model) -> bool:
    """Whether `run_layers` does what the language model itself does; decided by kind, not by trying."""
    config = language_model.config
    return (
        type(language_model).__name__ in LAYERED
        and config._attn_implementation in TENSOR_MASKED
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
        and not any(has_hooks(module) for module in [language_model, *language_model.layers.modules()])
    )


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call does more than `forward`: somebody looks, or weights are spread over devices."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or hasattr(module, "_hf_hook")


def run_layers(
    language_model,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.LongTensor | None,
    cache,
    num_read: int,
) -> torch.Tensor:
    """Hidden states `(B, n, D)` of the last n of L positions, after all layers and the last norm.

    Args:
        inputs_embeds: `(B, L, D)`.
        attention_mask: `(B, known + L)`, `(B, 1, L, known + L)`, or None: causal, without padding.
        position_ids: `(B, L)`; None: those after what the cache holds.
        cache: a `Cache`, which gets the keys and values of all L positions.
    """
    past, length = cache.get_seq_length(), inputs_embeds.shape[1]
    if position_ids is None:
        position_ids = torch.arange(past, past + length, device=inputs_embeds.device)[None]
    is_plain = attention_mask is None and length == 1  # one token sees all before it: nothing to mask
    if not is_plain and (attention_mask is None or attention_mask.ndim == 2):
        attention_mask = causal_mask(language_model.config, inputs_embeds, attention_mask, cache)
    cos, sin = language_model.rotary_emb(inputs_embeds, position_ids)
    hidden = inputs_embeds
    for layer in language_model.layers[:-1]:
        hidden = run_layer(layer, hidden, attention_mask, (cos, sin), position_ids, cache)
    unread, last = length - num_read, language_model.layers[-1]
    if unread:
        unread_states = keys_and_values(last, hidden[:, :unread], (cos[:, :unread], sin[:, :unread]))
        cache.update(*unread_states, last.self_attn.layer_idx)
        hidden, cos, sin, position_ids = (each[:, unread:] for each in (hidden, cos, sin, position_ids))
        if attention_mask is not None:
            attention_mask = attention_mask[:, :, unread:]
        elif num_read > 1:  # what SDPA takes for causal is so only for as many queries as keys
            known = torch.ones(num_read, past + length, dtype=torch.bool, device=hidden.device)
            attention_mask = known.tril(past + unread)[None, None]
    if num_read:
        hidden = run_layer(last, hidden, attention_mask, (cos, sin), position_ids, cache)
    return language_model.norm(hidden)


def run_layer(
    layer,
    hidden: torch.Tensor,
    attention_mask: torch.Tensor | None,
    rotation: tuple[torch.Tensor, torch.Tensor],
    position_ids: torch.LongTensor,
    cache,
) -> torch.Tensor:
    """One layer; of `cache`, it needs `update` alone."""
    return layer(
        hidden,
        attention_mask=attention_mask,
        position_embeddings=rotation,
        position_ids=position_ids,
        use_cache=True,
        **{CACHE_NAME: cache},
    )


def keys_and_values(layer, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> tuple:
    """What a layer makes of `hidden` `(B, L, D)` for later tokens to attend to, `(B, heads, L, head dim)` each."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*normed.shape[:2], -1, attention.head_dim)
    keys = attention.k_proj(normed).view(shape).transpose(1, 2)
    values = attention.v_proj(normed).view(shape).transpose(1, 2)
    cos, sin = (each[:, None] for each in rotation)
    first, second = keys.chunk(2, dim=-1)
    return keys * cos + torch.cat([-second, first], dim=-1) * sin, values
