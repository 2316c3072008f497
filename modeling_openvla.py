"""Tensors -> actions: two vision transformers, a projector, a language model, and a head.

Unusual, and why:
* Modules are nested as `{model: {vision_backbone, projector, language_model}, lm_head}`, files keep the released flat
  names; `CHECKPOINT_RENAMES` is the only bridge, used by loading, saving and adapters alike.
* Images enter through `<image>` placeholders that the processor has put behind BOS, never by growing the sequence
  inside `forward`: generation code counts tokens, and a sequence that grows behind its back loses the image without
  an error. Prompts without placeholders, as old scripts pass them, are expanded once at the door.
* Causal policies act token by token: `predict_action` is its own loop of one prefill and A - 1 greedy steps over
  exactly the original's tokens. Policies that decode in parallel (OpenVLA-OFT) end in one slot per action value; their
  attention is not causal, which the language model alone would never tell: the mask is made here.

Legend: B batch · L tokens · P image patches of all cameras · D hidden · T action chunk · A action dims.
"""

import contextlib
import logging
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .action_decoding import ActionOutput, EagerPasses, TokenChoice, check_draft, decode_tokens
from .action_heads import ACTION_HEADS, NoisyActionProjector, ProprioProjector, time_embedding
from .action_tokenizer import ActionStats, ActionTokenizer, resolve_unnorm_key
from .compiled_actions import MODES, CompiledPolicy, refusal
from .configuration_openvla import OpenVLAConfig
from .language_layers import CACHE_NAME, PreallocatedCache, can_run_layers, causal_mask, run_layers, the_cache
from .linear_layers import make_fast
from .pretrained_openvla import TRANSFORMERS_4, OpenVLAPreTrainedModel
from .vision_towers import OpenVLAVisionBackbone

logger = logging.getLogger(__name__)

# What runs a mask as it is given. Flash attention takes none, but can be told to attend to everything.
MASKED_ATTENTIONS = ("sdpa", "eager", "flex_attention")
FLASH_ATTENTIONS = ("flash_attention_2", "flash_attention_3")


class OpenVLAProjector(nn.Module):
    """Patch features -> language model embeddings: two linear layers for one tower, three for two."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        dim = sum(tower.embed_dim for tower in config.vision_towers)
        hidden = config.text_config.hidden_size
        self.fused = config.use_fused_vision_backbone
        if self.fused:
            self.fc1 = nn.Linear(dim, 4 * dim)
            self.fc2 = nn.Linear(4 * dim, hidden)
            self.fc3 = nn.Linear(hidden, hidden)
        else:
            self.fc1 = nn.Linear(dim, hidden)
            self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        x = self.fc2(F.gelu(self.fc1(patches)))
        return self.fc3(F.gelu(x)) if self.fused else x


# --- Models ----------------------------------------------------------------------------------------------------------
class OpenVLAModel(OpenVLAPreTrainedModel):
    """Images and tokens -> last hidden states of the language model."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        self.vision_backbone = OpenVLAVisionBackbone(config)
        self.projector = OpenVLAProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        dim = config.text_config.hidden_size
        self.proprio_projector = ProprioProjector(config.proprio_dim, dim) if config.proprio_dim else None
        self.noisy_action_projector = NoisyActionProjector(dim, not config.has_time_token) if config.denoises else None
        film = [layer for name, layer in self.vision_backbone.named_modules() if name.endswith((".scale", ".shift"))]
        _start_as_in_torch(self.proprio_projector, self.noisy_action_projector, *film)
        if config.attention == "bidirectional":  # what flash attention goes by; the others get a mask
            for layer in self.language_model.layers:
                layer.self_attn.is_causal = False
        make_fast(self)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor, language: torch.Tensor | None = None) -> torch.Tensor:
        """`(B, 3·N·C, S, S)` -> `(B, P, D)` embeddings that take the placeholders' place.

        Args:
            language: `(B, D)` mean of the prompt's embeddings, for policies with FiLM.
        """
        if (language is not None) != self.config.film:
            raise ValueError("Towers with FiLM, and only those, need the language embedding: see `encode_images`.")
        return self.projector(self.vision_backbone(pixel_values, language))

    def encode_images(
        self, input_ids: torch.LongTensor, pixel_values: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`get_image_features` for prompts `(B, L)`, which policies with FiLM look at their images with.

        Language is what the original counts as such: all text, from BOS to the end of the sequence.
        """
        if not self.config.film:
            return self.get_image_features(pixel_values)
        is_text = (input_ids != self.config.image_token_id) & (input_ids != self.config.action_slot_id)
        if attention_mask is not None and not (self.training and self.config.film_counts_padding):
            is_text = is_text & attention_mask.bool()
        embeddings = self.get_input_embeddings()(input_ids)
        share = is_text / is_text.sum(dim=1, keepdim=True)  # (B, L)
        language = (embeddings.float() * share[..., None]).sum(dim=1)
        return self.get_image_features(pixel_values, language.to(embeddings.dtype))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        proprio: torch.Tensor | None = None,
        noisy_actions: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        num_read: int | None = None,
        cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Runs the language model over embeddings whose placeholders are replaced by image patches.

        Args:
            input_ids: `(B, L)` with, if there are images, exactly `config.num_placeholders` ids
                `config.image_token_id` in each row; in parallel decoding also T·A ids `config.action_slot_id`.
            pixel_values: `(B, 3·N·C, S, S)`, in the first pass only.
            proprio: `(B, config.proprio_dim)` in [-1, 1].
            noisy_actions, times: `(B, T, A)` and `(B,)`, for heads that denoise: what fills the slots.
            image_features: `(B, P, D)` of `encode_images`, instead of `pixel_values`.
            num_read: give the hidden states of the last n positions only, without what the others' would take beyond
                their keys and values in the cache.
            cache, past_key_values: a `Cache`, under the name of any transformers version.

        Raises ValueError when placeholders and images do not match, per row: neither an image that nobody looks at
        nor a placeholder without an image may pass.
        """
        cache = the_cache(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if input_ids is None and (pixel_values is not None or self.config.attention != "causal"):
            raise ValueError("Images and action slots need input_ids, whose placeholders tell where they go.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, L, D)
        if pixel_values is not None:
            image_features = self.encode_images(input_ids, pixel_values, attention_mask)
        if image_features is not None:
            features = self._add_state(image_features, proprio, times)
            inputs_embeds = _scatter(inputs_embeds, input_ids == self.config.image_token_id, features, "image")
        elif input_ids is not None and input_ids.shape[1] > 1:  # a decode step has one token, and no time to wait
            _check_placeholders(input_ids == self.config.image_token_id, (len(input_ids), 0), "image")
        if self.config.attention != "causal":
            inputs_embeds = self._fill_slots(inputs_embeds, input_ids, noisy_actions, times)
            is_first = cache is None or cache.get_seq_length() == 0
            if position_ids is None and attention_mask is not None and is_first:
                position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
            attention_mask = self._parallel_mask(inputs_embeds, input_ids, attention_mask, cache)
        if num_read is not None and can_run_layers(self.language_model):
            hidden = run_layers(self.language_model, inputs_embeds, attention_mask, position_ids, cache, num_read)
            return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE_NAME: cache})
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        if num_read is not None:
            outputs.last_hidden_state = outputs.last_hidden_state[:, inputs_embeds.shape[1] - num_read :]
        return outputs

    def _add_state(
        self, image_features: torch.Tensor, proprio: torch.Tensor | None, times: torch.Tensor | None
    ) -> torch.Tensor:
        """All that takes placeholders: patches, then proprioception, then the time of denoising; `(B, P + …, D)`."""
        expected = self.config.proprio_dim
        if (0 if proprio is None else proprio.shape[-1]) != expected:
            raise ValueError(
                f"The policy takes proprio of {expected or 'no'} dims, got "
                f"{'none' if proprio is None else tuple(proprio.shape)}."
            )
        features = [image_features]
        if proprio is not None:
            features.append(self.proprio_projector(proprio))
        if self.config.has_time_token:
            features.append(time_embedding(times, image_features.shape[-1])[:, None])
        return torch.cat([each.to(image_features) for each in features], dim=1)

    def _fill_slots(
        self,
        inputs_embeds: torch.Tensor,
        input_ids: torch.LongTensor,
        noisy_actions: torch.Tensor | None,
        times: torch.Tensor | None,
    ) -> torch.Tensor:
        slots = input_ids == self.config.action_slot_id  # (B, L)
        if noisy_actions is None:
            return inputs_embeds.masked_fill(slots.unsqueeze(-1), 0.0)
        return _scatter(inputs_embeds, slots, self.noisy_action_projector(noisy_actions, times), "action slot")

    def _parallel_mask(
        self,
        inputs_embeds: torch.Tensor,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        cache,
    ):
        """A mask that the language model takes as it is: everything sees everything but padding, except that with
        attention "prefix" what stands before the slots does not see them."""
        config = self.language_model.config
        kind, prefix = config._attn_implementation, self.config.attention == "prefix"
        if kind in FLASH_ATTENTIONS and not prefix:
            return attention_mask
        if kind not in MASKED_ATTENTIONS:
            raise ValueError(
                f"attn_implementation {kind!r} would run this policy's {self.config.attention} attention as causal, "
                f"and act wrongly; use one of {MASKED_ATTENTIONS}{'' if prefix else f' or {FLASH_ATTENTIONS}'}."
            )
        past = 0 if cache is None else cache.get_seq_length()
        in_slots = (input_ids == self.config.action_slot_id).cumsum(dim=1) > 0  # (B, L), to the end of the row
        one_pass = prefix and not past

        def sees(batch, head, query, key):
            if one_pass:
                return in_slots[batch, query] | ~in_slots[batch, key]
            return key >= 0

        if attention_mask is None:  # or nothing might be made: causal is what no mask means
            attention_mask = torch.ones(len(input_ids), past + input_ids.shape[1], device=input_ids.device)
        return causal_mask(config, inputs_embeds, attention_mask.bool(), cache, or_mask_function=sees)


class OpenVLAForActionPrediction(OpenVLAPreTrainedModel, GenerationMixin):
    """OpenVLA with its token head: `predict_action` for robots, `forward` for training, `generate` for the rest."""

    _tied_weights_keys = [] if TRANSFORMERS_4 else {}
    _tp_plan = {"lm_head": "colwise_rep" if TRANSFORMERS_4 else "colwise_gather_output"}
    _compiled: CompiledPolicy | None = None

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        self.model = OpenVLAModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        head = ACTION_HEADS.get(config.action_head)
        self.action_head = head(config.text_config.hidden_size, config.action_dim) if head else None
        _start_as_in_torch(self.action_head)
        self.action_tokenizer = ActionTokenizer.from_config(config)
        self.loss_type = "ForCausalLM"
        make_fast(self)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head = value

    # --- Statistics, under the names the original's callers use ---
    @property
    def norm_stats(self) -> dict | None:
        """Statistics per dataset; setting it replaces `config.norm_stats`, which is the only owner."""
        return self.config.norm_stats

    @norm_stats.setter
    def norm_stats(self, value: dict | None):
        self.config.norm_stats = value

    def get_action_stats(self, unnorm_key: str | None = None) -> dict:
        """The raw `norm_stats[unnorm_key]["action"]` dict. KeyError lists the keys."""
        return self.norm_stats[resolve_unnorm_key(self.norm_stats, unnorm_key)]["action"]

    def get_action_dim(self, unnorm_key: str | None = None) -> int:
        """Action size A of a dataset."""
        return ActionStats.from_norm_stats(self.norm_stats, unnorm_key, self.config.action_normalization).dim

    # --- Training and generic generation ---
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        proprio: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
        counted: torch.Tensor | None = None,
        cache=None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and the cross-entropy with `labels`; or the loss of a continuous head.

        Args:
            input_ids: `(B, L)`, with placeholders, or as the original's collator makes them, without.
            labels: as long as `input_ids`; -100 is not scored.
            logits_to_keep: compute logits for the last n positions (0: all) or for an index tensor of positions.
            proprio: `(B, config.proprio_dim)` in [-1, 1], for policies that take it.
            actions: `(B, T, A)` in [-1, 1], for continuous heads: what to learn. No logits are made then.
            counted: `(B, T)` bool, which of their steps are scored; None: all.
            cache, past_key_values: a `Cache`, under the name of any transformers version.
        """
        cache = the_cache(cache, past_key_values)
        if pixel_values is not None and input_ids is not None and self._lacks_placeholders(input_ids):
            if cache is not None and cache.get_seq_length() > 0:
                pixel_values = None  # a later step of a caller that always passes the image: it is in the cache
            else:
                input_ids, attention_mask, labels = self.expand_image_tokens(input_ids, attention_mask, labels)
        corrupted = None
        if actions is not None:
            if self.action_head is None:
                raise ValueError("A policy with the token head learns from labels, not from actions.")
            corrupted = self.action_head.corrupt(actions.float())
            kwargs |= {"noisy_actions": corrupted.noisy, "times": corrupted.times}
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            proprio=proprio,
            **kwargs,
        )
        if corrupted is not None:
            hidden = self._read_slots(outputs.last_hidden_state, input_ids)  # (B, T·A, D)
            return CausalLMOutputWithPast(loss=self.action_head.loss(hidden, corrupted.target, counted))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])  # (B, L, vocabulary)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _read_slots(self, hidden: torch.Tensor, input_ids: torch.LongTensor) -> torch.Tensor:
        """The hidden states `(B, T·A, D)` that actions are read from: those of the slots, or, with attention
        "bidirectional" as in OpenVLA-OFT, those one position before: tokens predict what comes next."""
        slots = input_ids == self.config.action_slot_id
        _check_placeholders(slots, (len(input_ids), self.config.action_chunk * self.config.action_dim), "action slot")
        if self.config.attention == "bidirectional":
            slots = F.pad(slots[:, 1:], (0, 1))
        return hidden[slots].reshape(len(hidden), -1, hidden.shape[-1])

    def expand_image_tokens(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
    ) -> tuple[torch.LongTensor, torch.Tensor, torch.LongTensor | None]:
        """Inserts P placeholders behind the first attended token (BOS) of rows `(B, L)` that have none.

        Without a mask, `config.pad_token_id` tells what is padding; a mask one shorter than the ids (a caller that
        appended "▁" as the original does) is completed. Returns ids, mask and labels of `(B, L + P)`.
        """
        mask = self._complete_mask(input_ids, attention_mask)
        count = self.config.num_placeholders
        for row, attended in zip(input_ids.tolist(), mask.tolist()):
            self._refuse_foreign_placeholders([token for token, keep in zip(row, attended) if keep])
        first = mask.argmax(dim=1, keepdim=True)  # (B, 1)
        position = torch.arange(input_ids.shape[1] + count, device=input_ids.device).expand(len(input_ids), -1)
        is_image = (position > first) & (position <= first + count)
        source = torch.where(position <= first, position, (position - count).clamp(min=0))
        input_ids = input_ids.gather(1, source).masked_fill(is_image, self.config.image_token_id)
        mask = mask.gather(1, source).masked_fill(is_image, 1)
        if labels is not None:
            labels = labels.gather(1, source).masked_fill(is_image, -100)
        return input_ids, mask, labels

    def generate(self, inputs=None, **kwargs):
        """`GenerationMixin.generate`; prompts without placeholders come back without them."""
        if self.config.attention != "causal":
            raise ValueError("This policy decodes all actions at once, not token by token: use predict_action.")
        if inputs is not None:
            kwargs["input_ids"] = inputs
        input_ids = kwargs.get("input_ids")
        legacy = (
            input_ids is not None and kwargs.get("pixel_values") is not None and self._lacks_placeholders(input_ids)
        )
        if legacy:
            kwargs["input_ids"], kwargs["attention_mask"], _ = self.expand_image_tokens(
                input_ids, kwargs.get("attention_mask")
            )
        output = super().generate(**kwargs)
        if legacy:
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            kept = kwargs["input_ids"] != self.config.image_token_id  # (B, L + P)
            kept = kept.repeat_interleave(len(sequences) // len(kept), dim=0)
            prompts, answers = sequences[:, : kept.shape[1]], sequences[:, kept.shape[1] :]
            text = torch.cat([prompts[kept].reshape(len(sequences), -1), answers], dim=1)
            if isinstance(output, torch.Tensor):
                return text
            output.sequences = text
        return output

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, pixel_values=None, cache=None, **kwargs):
        kwargs[CACHE_NAME] = cache = the_cache(cache, past_key_values)
        model_inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        # Images belong to the pass that fills the cache; an *empty* cache object is not yet that.
        if cache is None or cache.get_seq_length() == 0:
            model_inputs["pixel_values"] = pixel_values
        return model_inputs

    def _lacks_placeholders(self, input_ids: torch.LongTensor) -> bool:
        if torch.compiler.is_compiling():  # compiled callers come from the processor, with placeholders
            return False
        return not bool((input_ids == self.config.image_token_id).any())

    def _complete_mask(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> torch.LongTensor:
        if attention_mask is None:
            return (input_ids != self.config.pad_token_id).long()
        mask = attention_mask.to(device=input_ids.device, dtype=torch.long)
        if mask.shape[1] == input_ids.shape[1] - 1:
            mask = F.pad(mask, (0, 1), value=1)
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} does not fit input_ids {tuple(input_ids.shape)}."
            )
        return mask

    def _refuse_foreign_placeholders(self, row: list[int]) -> None:
        """A row without our placeholders but with as many of another id was made for another vocabulary."""
        token, times = Counter(row).most_common(1)[0] if row else (None, 0)
        if times >= self.config.num_image_tokens:
            raise ValueError(
                f"A prompt holds id {token} {times} times, but image placeholders are {self.config.image_token_id} "
                "(config.image_token_id): processor and model do not belong together."
            )

    # --- Acting ---
    def predict_action(
        self,
        input_ids: torch.LongTensor | None = None,
        unnorm_key: str | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        proprio: np.ndarray | torch.Tensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        num_denoising_steps: int | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        strict: bool = False,
        draft: np.ndarray | torch.Tensor | None = None,
        return_dict: bool = False,
    ) -> np.ndarray | dict:
        """The action for each observation, in the units of its dataset, from the same tokens as the original's.

        Args:
            input_ids: `(B, L)` or `(L,)` from the processor; rows may be padded on either side, and lack
                placeholders and the trailing "▁" as in old scripts.
            unnorm_key: whose statistics to use; None if the checkpoint has exactly one dataset.
            pixel_values: `(B, 3·N·C, S, S)`.
            attention_mask: `(B, L)`; None: everything but padding ids.
            proprio: `(B, config.proprio_dim)` or `(config.proprio_dim,)`, in the units of the dataset.
            do_sample, temperature, top_p: sample among action tokens instead of taking the best.
            num_denoising_steps: of heads that denoise; None: as the checkpoint declares.
            noise: `(B, T, A)` float32, what they start from (see `draw_noise`); None: drawn from `generator`.
            generator: of whatever is drawn; on the CPU for noise.
            strict: raise RuntimeError when the language model prefers a token that is not an action, instead of
                taking the best action token and warning.
            draft: `(B, T·A)` or `(T·A,)` token ids that the answer may resemble, such as the last answer's: the more
                of them are right from the first on, the fewer passes it takes. No token changes, but where, in
                short types, rounding cannot tell two apart.
            return_dict: return `{"actions", …}` instead of the actions alone, for the token head with `token_ids`,
                `log_probs` and `replaced`, the number of `passes` if it takes several, and with a draft `accepted`
                `(B,)`, how many of its tokens were right.

        Returns float64 `(A,)` for one observation and a one-step policy, `(T, A)` for an action chunk, with a leading
        batch axis for more than one observation, in the units of the dataset `unnorm_key`: metres and radians in
        bridge_orig, whatever the controller took elsewhere; gripper 1 = open.

        Source: Kim et al. 2024 (arXiv:2406.09246), sec. 3.2; of chunks, Kim et al. 2025 (arXiv:2502.19645).
        """
        stats = ActionStats.from_norm_stats(self.norm_stats, unnorm_key, self.config.action_normalization)
        if proprio is not None:
            proprio = self._normalize_proprio(proprio, unnorm_key)
        output = self.sample_actions(
            input_ids,
            pixel_values,
            attention_mask,
            action_dim=stats.dim,
            proprio=proprio,
            do_sample=do_sample,
            temperature=temperature,
            top_p=top_p,
            num_denoising_steps=num_denoising_steps,
            noise=noise,
            generator=generator,
            strict=strict,
            draft=draft,
        )
        actions = stats.unnormalize(output.actions.numpy())  # (B, T, A)
        if self.config.action_chunk == 1:
            actions = actions[:, 0]
        if len(actions) == 1:
            actions = actions[0]
        if not return_dict:
            return actions
        names = ("token_ids", "log_probs", "replaced", "accepted")
        names = [name for name in names if getattr(output, name) is not None]
        passes = {} if output.passes is None else {"passes": output.passes}
        return {"actions": actions, **{name: getattr(output, name).cpu().numpy() for name in names}, **passes}

    def compile_for_actions(
        self,
        mode: str | None = "default",
        *,
        batch_sizes: tuple[int, ...] = (1,),
        text_tokens: tuple[int, ...] = (64,),
        warm_up: bool = True,
        progress: bool = True,
    ) -> "OpenVLAForActionPrediction":
        """Has `predict_action` and `sample_actions` run compiled, with the same results up to rounding.

            model.compile_for_actions("reduce-overhead")  # on CUDA: every pass one CUDA graph

        Call it when weights are where they stay: loaded, merged, cast and moved. Calls that nothing was compiled for
        (longer prompts, other batches, a model that has moved) run as before, with a warning that says why.

        Args:
            mode: of `torch.compile`: "default"; "reduce-overhead" and "max-autotune", which record CUDA graphs;
                "max-autotune-no-cudagraphs". None: back to acting without.
            batch_sizes: numbers of observations in one call.
            text_tokens: the most tokens besides those of images, prompts' wording included, for each bucket.
            warm_up: compile now, which takes seconds to minutes, instead of when first needed.
            progress: show a bar.

        Returns the model. Policies that cannot be compiled stay as they are, with a warning that says why.
        """
        self._compiled = None
        if mode is None:
            return self
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}.")
        if why := refusal(self):
            logger.warning("Acting without compilation: %s.", why)
            return self
        compiled = CompiledPolicy(self, mode, batch_sizes, text_tokens)
        if warm_up:
            with torch.no_grad(), self._acting():
                compiled.warm_up(progress)
        self._compiled = compiled
        return self

    def draw_noise(self, seeds: list) -> torch.Tensor | None:
        """What heads that denoise start from, `(B, T, A)` float32: one seed per observation, whose noise does not
        depend on the others. None for other heads.

        Args:
            seeds: what `numpy.random.default_rng` takes: an integer, several, or None for fresh noise.
        """
        if not self.config.denoises:
            return None
        rows = []
        for seed in seeds:
            try:
                numbers = np.random.default_rng(seed)
            except (TypeError, ValueError) as error:
                raise ValueError(f"A seed is an integer from 0, or several of them; got {seed!r}.") from error
            rows.append(numbers.standard_normal((self.config.action_chunk, self.config.action_dim), np.float32))
        return torch.from_numpy(np.stack(rows))

    def _normalize_proprio(self, proprio: np.ndarray | torch.Tensor, unnorm_key: str | None) -> torch.Tensor:
        """`(B, P)` float32 in [-1, 1], clipped, on the model's device. Dims that never change in the dataset are 0, as
        in the original's training; its `normalize_proprio` for acting makes them -1."""
        if not self.config.proprio_dim:
            raise ValueError("This policy takes no proprio.")
        stats = ActionStats.from_norm_stats(self.norm_stats, unnorm_key, self.config.action_normalization, "proprio")
        proprio = np.atleast_2d(np.asarray(torch.as_tensor(proprio).cpu(), dtype=np.float64))
        if proprio.shape[-1] != self.config.proprio_dim or stats.dim != self.config.proprio_dim:
            raise ValueError(
                f"The policy takes proprio of {self.config.proprio_dim} dims, got {proprio.shape}; its statistics "
                f"have {stats.dim}."
            )
        return torch.from_numpy(stats.normalize(proprio)).to(self.device, torch.float32)

    @torch.no_grad()
    def sample_actions(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        action_dim: int | None = None,
        proprio: torch.Tensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        num_denoising_steps: int | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        strict: bool = False,
        draft: np.ndarray | torch.Tensor | None = None,
        log_probs_over: str = "actions",
        output_hidden_states: bool = False,
    ) -> ActionOutput:
        """T·A action tokens after one prefill, or a chunk in one pass: normalised actions, log-probabilities, hidden
        states.

        Args:
            action_dim: A; None: `config.action_dim`.
            proprio: `(B, config.proprio_dim)` in [-1, 1].
            do_sample: sample from the softmax over action ids at `temperature`, cut to the nucleus `top_p`.
            log_probs_over: "actions" (softmax over the action ids) or "vocabulary" (over all ids); at `temperature` if
                sampling, before the nucleus cut.
            output_hidden_states: also return the hidden state each token (of heads that denoise: each action value,
                in the last step) was read from.

        Other arguments as in `predict_action`.
        """
        action_dim = action_dim or self.config.action_dim
        if action_dim is None:
            raise ValueError(
                "Pass action_dim: neither the call nor config.action_dim tells how many tokens to decode."
            )
        if self.config.action_dim not in (None, action_dim):
            raise ValueError(f"action_dim={action_dim} does not fit config.action_dim={self.config.action_dim}.")
        if log_probs_over not in ("actions", "vocabulary"):
            raise ValueError(f"log_probs_over must be 'actions' or 'vocabulary', got {log_probs_over!r}.")
        if do_sample and not (temperature > 0 and 0 < top_p <= 1):
            raise ValueError(f"Sampling needs temperature > 0 and 0 < top_p <= 1, got {temperature} and {top_p}.")
        if draft is not None and (do_sample or self.config.attention != "causal"):
            raise ValueError(
                "A draft is for the best tokens, one after the other: not for sampling, nor for chunks in one pass."
            )
        if do_sample and self.action_head is not None:
            raise ValueError(f"do_sample is for the token head; {self.config.action_head!r} has no tokens.")
        num_denoising_steps = self.config.choose_denoising_steps(num_denoising_steps)
        if pixel_values is None or input_ids is None:
            raise ValueError("An action needs both input_ids and pixel_values: pass the processor's whole output.")
        rows = self._complete_prompts(input_ids, attention_mask)
        if len(rows) != len(pixel_values):
            raise ValueError(f"Got {len(rows)} prompts but {len(pixel_values)} images.")
        if proprio is not None and len(proprio) != len(rows):
            raise ValueError(f"Got {len(rows)} prompts but proprio of {len(proprio)} observations.")
        observation = {"pixel_values": pixel_values, "proprio": proprio}
        shape = (len(rows), self.config.action_chunk, action_dim)
        if self.config.denoises and noise is None:
            noise = torch.randn(shape, generator=generator)
        if self.config.denoises and tuple(noise.shape) != shape:
            raise ValueError(f"Expected noise of {shape}, got {tuple(noise.shape)}.")
        count = shape[1] * shape[2]
        guesses = torch.empty(len(rows), 0, dtype=torch.long, device=self.device)
        if draft is not None:
            guesses = check_draft(draft, self.action_tokenizer, len(rows), count)[:, :-1].to(self.device)
        sampling = (temperature, top_p, generator) if do_sample else None
        choose = TokenChoice(self.lm_head, self.action_tokenizer, sampling, log_probs_over)
        with self._acting(), self._compiled.lock if self._compiled else contextlib.nullcontext():
            bucket = self._compiled.find(rows, observation, count) if self._compiled else None
            if self.config.attention == "causal":
                eager = (self.model, *self._pad_prompts(rows), observation, count)
                passes = bucket.start(rows, observation) if bucket else EagerPasses(*eager)
                found = decode_tokens(passes, choose, count, guesses)
            else:
                run = bucket.start(rows, observation) if bucket else self._run_slots(rows, observation)
                if self.action_head is not None:
                    found = self._denoise(run, noise, num_denoising_steps)
                else:
                    hidden = run()
                    found = {"token_ids": choose(hidden), "hidden_states": hidden}
        if "token_ids" in found:
            found |= choose.describe(found["hidden_states"], found["token_ids"])
            self._report(found.pop("finite"), found["replaced"], strict)
            ids = found["token_ids"].cpu().numpy().reshape(shape)
            found["actions"] = torch.from_numpy(self.action_tokenizer.decode(ids))
        if not output_hidden_states:
            found["hidden_states"] = None
        return ActionOutput(**found)

    @contextlib.contextmanager
    def _acting(self):
        """Dropout off; and gradient checkpointing, which in training mode would drop the cache, image and all."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def _denoise(self, run, noise: torch.Tensor | None, steps: int | None) -> dict[str, torch.Tensor]:
        """A chunk from a continuous head; `run` as `_run_slots` gives it."""
        hidden = None

        def slots(noisy: torch.Tensor | None, times: torch.Tensor | None) -> torch.Tensor:
            nonlocal hidden
            hidden = run(noisy, times)
            return hidden

        noise = None if noise is None else noise.float().to(self.device)
        actions = self.action_head.sample(slots, noise, steps)
        if not actions.isfinite().all():
            raise RuntimeError(
                "The action head's output holds NaN or infinity: broken weights, broken pixel_values, or an overflow "
                f"of {self.dtype}. No action was returned."
            )
        return {"actions": actions.double().cpu(), "hidden_states": hidden}

    def _run_slots(self, rows: list[list[int]], observation: dict):
        """The policy as a function of what fills the slots: `(noisy actions, times) -> (B, T·A, D)`.

        With attention "prefix" images and prompt are computed here, once: exactly what one pass over everything would
        give. With "bidirectional" they see the slots, so only the towers' work can be kept.
        """
        config = self.config
        input_ids, mask = self._pad_prompts(rows)
        count, is_prefix = config.action_chunk * config.action_dim, config.attention == "prefix"
        end = [] if is_prefix else [config.text_config.eos_token_id]
        suffix = torch.tensor([config.action_slot_id] * count + end, device=input_ids.device)
        suffix = suffix.expand(len(input_ids), -1)
        length = input_ids.shape[1]
        whole = torch.cat([input_ids, suffix], dim=1)
        whole_mask = None if mask is None else F.pad(mask, (0, suffix.shape[1]), value=1)
        if is_prefix:
            positions, cache = None, PreallocatedCache(config.text_config.num_hidden_layers, whole.shape[1])
            self.model(
                input_ids=input_ids,
                attention_mask=mask,
                cache=cache,
                use_cache=True,
                num_read=0,
                **observation,
            )
            if mask is not None:
                positions = (whole_mask.cumsum(dim=1) - 1)[:, length:]
        else:
            features = self.model.encode_images(whole, observation["pixel_values"], whole_mask)

        def run(noisy: torch.Tensor | None = None, times: torch.Tensor | None = None) -> torch.Tensor:
            fill = {"noisy_actions": noisy, "times": times}
            if is_prefix:
                outputs = self.model(
                    input_ids=suffix,
                    attention_mask=whole_mask,
                    position_ids=positions,
                    cache=cache,
                    use_cache=True,
                    num_read=count,
                    **fill,
                )
                cache.crop(-suffix.shape[1])  # the slots of this step are not for the next one to see
                return outputs.last_hidden_state
            outputs = self.model(
                input_ids=whole,
                image_features=features,
                attention_mask=whole_mask,
                proprio=observation["proprio"],
                cache=PreallocatedCache(config.text_config.num_hidden_layers, whole.shape[1]),
                use_cache=True,
                num_read=whole.shape[1] - length + 1,  # as `_read_slots`: from one before the first slot on
                **fill,
            )
            return outputs.last_hidden_state[:, :count]

        return run

    def _complete_prompts(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
        """Any accepted prompts without padding, with placeholders and trailing token."""
        input_ids = torch.atleast_2d(torch.as_tensor(input_ids))
        if attention_mask is not None:
            attention_mask = torch.atleast_2d(torch.as_tensor(attention_mask))
        mask = self._complete_mask(input_ids, attention_mask)
        image_id, end_id = self.config.image_token_id, self.config.prompt_end_token_id
        count = self.config.num_placeholders
        rows = []
        for row, attended in zip(input_ids.tolist(), mask.tolist()):
            row = [token for token, keep in zip(row, attended) if keep]
            if not row:
                raise ValueError("A prompt is empty: every row of input_ids needs at least one attended token.")
            if image_id not in row:
                self._refuse_foreign_placeholders(row)
                row = row[:1] + [image_id] * count + row[1:]
            if end_id is not None and row[-1] != end_id:
                row.append(end_id)
            rows.append(row)
        return rows

    def _pad_prompts(self, rows: list[list[int]]) -> tuple[torch.LongTensor, torch.LongTensor | None]:
        """Rows padded on the left to the longest, and their mask; None: no padding."""
        length = max(map(len, rows))
        packed = [[self.config.pad_token_id] * (length - len(row)) + row for row in rows]
        mask = None
        if any(len(row) < length for row in rows):
            mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return torch.tensor(packed, device=self.device), mask

    def _report(self, finite: torch.Tensor, replaced: torch.Tensor, strict: bool) -> None:
        """Tells of, or raises for, tokens that a policy which knows its task would not prefer."""
        if not finite:
            raise RuntimeError(
                "The language model's logits hold NaN or infinity: broken weights, broken pixel_values, or an "
                f"overflow of {self.dtype}. No action was returned."
            )
        if not replaced.any():
            return
        where = [f"row {row} token {token}" for row, token in replaced.nonzero().tolist()]
        message = (
            f"The language model preferred a token that is not an action at {', '.join(where[:8])}"
            f"{' …' if len(where) > 8 else ''}: wrong prompt, wrong preprocessing, or a task unlike the training data."
        )
        if strict:
            raise RuntimeError(message + " No action was returned (strict=True).")
        logger.warning("%s The best action tokens were taken instead; pass strict=True to raise.", message)


def _start_as_in_torch(*modules: nn.Module | None) -> None:
    """Marks layers that start from PyTorch's own initialisation, as the original's, instead of transformers'."""
    for module in modules:
        for layer in [] if module is None else module.modules():
            layer.starts_as_in_torch = hasattr(layer, "reset_parameters")


def _scatter(inputs_embeds: torch.Tensor, places: torch.Tensor, features: torch.Tensor, what: str) -> torch.Tensor:
    """`features` `(B, n, D)` in the n places `(B, L)` of each row."""
    _check_placeholders(places, features.shape[:2], what)
    features = features.to(device=inputs_embeds.device, dtype=inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(places.unsqueeze(-1), features)


def _check_placeholders(places: torch.Tensor, expected: tuple[int, int], what: str) -> None:
    if torch.compiler.is_compiling():
        return
    batch, count = expected
    if len(places) != batch or bool((places.sum(dim=1) != count).any()):
        raise ValueError(
            f"Expected {batch} row(s) with {count} {what} placeholders each, got {places.sum(dim=1).tolist()}: "
            "pass the processor's input_ids and pixel_values together."
        )


OpenVLAModel.register_for_auto_class("AutoModel")
OpenVLAForActionPrediction.register_for_auto_class("AutoModelForImageTextToText")
