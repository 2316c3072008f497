"""Layers run one by one give what the language model gives, and leave out what nobody reads."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel

from openvla.language_layers import CACHE_NAME, PreallocatedCache, can_run_layers, run_layers

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64, "pad_token_id": 0}


def language_model(kind: str = "llama", attention: str = "sdpa", **more):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SIZES, **more)
    model = AutoModel.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("is_padded", [False, True])
@torch.no_grad()
def test_what_is_read_is_what_the_language_model_gives(kind, attention, is_padded):
    model, length = language_model(kind, attention), 12
    embeds = torch.randn(2, length, 32)
    mask = positions = None
    if is_padded:
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, :4] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert can_run_layers(model)
    expected = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=True)
    for num_read in (0, 1, 3, length):
        cache = PreallocatedCache(3, length)
        hidden = run_layers(model, embeds, mask, positions, cache, num_read)
        torch.testing.assert_close(hidden, expected.last_hidden_state[:, length - num_read :], atol=2e-6, rtol=1e-5)
        for layer, other in zip(cache.layers, expected[CACHE_NAME].layers):
            real = torch.ones(2, length) if mask is None else mask
            for mine, theirs in ((layer.keys, other.keys), (layer.values, other.values)):
                difference = (mine - theirs).abs().amax(dim=(1, 3)) * real
                assert difference.max() < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_passes_in_pieces_are_one_pass(attention):
    """Prompt, then one token, then three, two of which are taken back, then two others."""
    model = language_model(attention=attention)
    embeds, wrong = torch.randn(1, 9, 32), torch.randn(1, 2, 32)
    expected = model(inputs_embeds=embeds).last_hidden_state
    cache = PreallocatedCache(3, 9)
    found = [run_layers(model, embeds[:, :5], None, None, cache, 2)]
    storage = cache.layers[0].keys.data_ptr()
    found.append(run_layers(model, embeds[:, 5:6], None, None, cache, 1))
    found.append(run_layers(model, torch.cat([embeds[:, 6:7], wrong], dim=1), None, None, cache, 3)[:, :1])
    cache.crop(-2)
    assert cache.get_seq_length() == 7
    found.append(run_layers(model, embeds[:, 7:], None, None, cache, 2))
    torch.testing.assert_close(torch.cat(found, dim=1), expected[:, 3:], atol=2e-6, rtol=1e-5)
    assert cache.layers[0].keys.data_ptr() == storage  # nothing was copied to make room


@torch.no_grad()
def test_unread_positions_cost_keys_and_values_alone():
    model, seen = language_model(), {}
    for name in ("q_proj", "k_proj", "o_proj"):
        for index, layer in enumerate(model.layers):
            layer.self_attn.get_submodule(name).register_forward_hook(
                lambda module, args, output, key=(index, name): seen.setdefault(key, []).append(args[0].shape[1])
            )
    run_layers(model, torch.randn(1, 12, 32), None, None, PreallocatedCache(3, 12), 1)
    assert seen[0, "q_proj"] == seen[1, "o_proj"] == [12]
    assert seen[2, "k_proj"] == [11, 1] and seen[2, "q_proj"] == seen[2, "o_proj"] == [1]


def test_other_kinds_run_as_they_are():
    assert not can_run_layers(language_model(attention="flex_attention"))
    assert not can_run_layers(language_model("mistral", sliding_window=4))
    assert not can_run_layers(language_model("phi"))
    sliding = language_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert not can_run_layers(sliding)
    spread = language_model()
    spread.layers[2]._hf_hook = object()
    assert not can_run_layers(spread)
    for name in ("", "layers.1", "layers.2.self_attn.q_proj"):
        watched = language_model()
        assert can_run_layers(watched)
        watched.get_submodule(name).register_forward_hook(lambda *_: None)
        assert not can_run_layers(watched)
