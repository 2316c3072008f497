"""One action token after the other: what is chosen, what is told of the choice, and drafts that save passes.

Legend: B batch · L prompt tokens · n tokens of one pass · D hidden · T action chunk · A action dims.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from .action_tokenizer import ActionTokenizer
from .language_layers import PreallocatedCache, has_hooks
from .linear_layers import linear


@dataclass
class ActionOutput(ModelOutput):
    """What `sample_actions` returns. Tensors are on the model's device, but for `actions`.

    Args:
        actions: `(B, T, A)` float64 in [-1, 1], before un-normalisation, on the CPU.
        token_ids: `(B, T·A)` int64, ids of `ActionTokenizer`.
        log_probs: `(B, T·A)` float32, log-probability of each token (see `sample_actions`).
        replaced: `(B, T·A)` bool, True where the language model preferred a token that is not an action.
        hidden_states: `(B, T·A, D)` last hidden state each token was read from, if asked for.
        accepted: `(B,)` int64, how many tokens of a draft were right before the first wrong one.
        passes: of the language model, for tokens one after the other.
    """

    actions: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    replaced: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None
    accepted: torch.Tensor | None = None
    passes: int | None = None


class TokenChoice:
    """The best (or a sampled) action id, whatever the rest of the vocabulary says; and what that says, afterwards.

    Args:
        head: `(…, D)` -> logits of the whole vocabulary. Of a plain linear layer, only rows of actions are computed to
            choose.
        sampling: `(temperature, top_p, generator)`; None: the best.
        log_probs_over: "actions" or "vocabulary".
    """

    def __init__(self, head: nn.Module, tokenizer: ActionTokenizer, sampling: tuple | None, log_probs_over: str):
        self.head, self.sampling, self.log_probs_over = head, sampling, log_probs_over
        self.start, self.end = tokenizer.vocab_start, tokenizer.vocab_end
        is_plain = type(head) is nn.Linear and head.bias is None and len(head.weight) >= self.end
        self.rows = head.weight[self.start : self.end] if is_plain and not has_hooks(head) else None

    def __call__(self, hidden: torch.Tensor) -> torch.LongTensor:
        """Ids `(B, n)` for hidden states `(B, n, D)`."""
        logits = self.head(hidden)[..., self.start : self.end] if self.rows is None else linear(hidden, self.rows)
        if self.sampling is None:
            return logits.argmax(dim=-1) + self.start
        temperature, top_p, generator = self.sampling
        index = _sample((logits.float() / temperature).flatten(0, 1), top_p, generator)
        return index.reshape(hidden.shape[:2]) + self.start

    def describe(self, hidden: torch.Tensor, token_ids: torch.LongTensor) -> dict[str, torch.Tensor]:
        """Of all tokens at once: `log_probs` and `replaced` of `ActionOutput`; whether all logits were `finite`."""
        logits = self.head(hidden).float()  # (B, n, vocabulary)
        temperature = self.sampling[0] if self.sampling else 1.0
        best = logits.argmax(dim=-1)
        over_actions = self.log_probs_over == "actions"
        scored = logits[..., self.start : self.end] if over_actions else logits
        chosen = token_ids - self.start if over_actions else token_ids
        log_probs = (scored / temperature).log_softmax(dim=-1).gather(-1, chosen[..., None])[..., 0]
        replaced = (best < self.start) | (best >= self.end)
        return {"log_probs": log_probs, "replaced": replaced, "finite": logits.isfinite().all()}


class EagerPasses:
    """Passes of the model over a prompt and what follows, as PyTorch runs them.

    Args:
        model: `OpenVLAModel`.
        input_ids: `(B, L)`, padded on the left where `mask` `(B, L)` says so; None: no padding.
        observation: what else the first pass takes.
        count: of tokens to be found.
    """

    def __init__(self, model: nn.Module, input_ids: torch.LongTensor, mask, observation: dict, count: int):
        self.model, self.input_ids, self.mask, self.observation = model, input_ids, mask, observation
        num_layers = model.config.text_config.num_hidden_layers
        self.cache = PreallocatedCache(num_layers, input_ids.shape[1] + count - 1)

    def first(self, guesses: torch.LongTensor) -> torch.Tensor:
        """The prompt and guesses `(B, G)` -> hidden states `(B, 1 + G, D)` from the prompt's last token on."""
        ids = torch.cat([self.input_ids, guesses], dim=1)
        return self._run(ids, 1 + guesses.shape[1], **self.observation)

    def next(self, ids: torch.LongTensor) -> torch.Tensor:
        """Tokens `(B, n)` behind those that are known -> hidden states `(B, n, D)`."""
        return self._run(ids, ids.shape[1])

    def forget(self, num_tokens: int) -> None:
        """Takes the last ones back."""
        self.cache.crop(-num_tokens)

    def _run(self, ids: torch.LongTensor, num_read: int, **observation) -> torch.Tensor:
        mask = position_ids = None
        if self.mask is not None:
            length = self.cache.get_seq_length() + ids.shape[1]
            mask = F.pad(self.mask, (0, length - self.mask.shape[1]), value=1)
            position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model(
            input_ids=ids,
            **observation,
            attention_mask=mask,
            position_ids=position_ids,
            cache=self.cache,
            use_cache=True,
            num_read=num_read,
        ).last_hidden_state


def decode_tokens(passes, choose: TokenChoice, count: int, guesses: torch.LongTensor) -> dict:
    """`count` tokens, each given those before it: `token_ids`, `hidden_states`, `passes`, `accepted`.

    A draft rides along with the prompt. Where it says what the policy itself chooses there, that choice has been made
    for the token behind it, too; from the first difference on, what the policy said to the wrong draft is the next
    one. Whatever the draft, every token is the one chosen after the right ones before it.
    Source: Leviathan et al. 2023 (arXiv:2211.17192), greedy; Santilli et al. 2023 (arXiv:2305.10427), Jacobi.

    Args:
        passes: `EagerPasses`, or what compilation made of them.
        guesses: `(B, count - 1)` tokens of the draft but the last, which nothing follows; `(B, 0)`: no draft.
    """
    found, known, num_passes, accepted = [], 0, 1, None
    hidden = passes.first(guesses)  # (B, 1 + G, D)
    while True:
        # 1. The best (or sampled) action ids, up to the first after a wrong guess in any row
        chosen, right = choose(hidden), 0
        if guesses.shape[1]:
            leading = (chosen[:, :-1] == guesses).cumprod(dim=1).sum(dim=1)  # (B,)
            accepted = leading if accepted is None else accepted
            right = int(leading.min())
            if right < guesses.shape[1]:
                passes.forget(guesses.shape[1] - right)
        found.append((chosen[:, : right + 1], hidden[:, : right + 1]))
        known += right + 1
        if known == count:
            break

        # 2. Feed back the last of them, and what the policy said to wrong guesses as new ones
        guesses = chosen[:, right + 1 : -1]
        hidden = passes.next(torch.cat([chosen[:, right : right + 1], guesses], dim=1))
        num_passes += 1
    token_ids, hidden = (torch.cat(parts, dim=1) for parts in zip(*found))
    return {"token_ids": token_ids, "hidden_states": hidden, "passes": num_passes, "accepted": accepted}


def check_draft(draft, tokenizer: ActionTokenizer, batch: int, count: int) -> torch.LongTensor:
    """`draft` as `(B, count)` int64; ValueError if it is no action."""
    draft = torch.atleast_2d(torch.as_tensor(draft))
    start, end = tokenizer.vocab_start, tokenizer.vocab_end
    is_wrong = draft.is_floating_point() or tuple(draft.shape) != (batch, count)
    if is_wrong or bool(((draft < start) | (draft >= end)).any()):
        raise ValueError(
            f"Expected a draft {(batch, count)} of token ids from {start} to {end - 1}, got {draft.tolist()}."
        )
    return draft.long()


def _sample(logits: torch.Tensor, top_p: float, generator: torch.Generator | None) -> torch.LongTensor:
    """Draws from softmax(logits) `(B, n)` cut to the smallest set of ids whose probability reaches `top_p`."""
    probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    before = probs.cumsum(dim=-1) - probs
    probs = probs.masked_fill(before >= top_p, 0.0)
    return order.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]
