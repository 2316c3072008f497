"""From logits to action tokens: what is chosen, and what is told of the choice."""

from dataclasses import dataclass, field

import torch
from transformers.utils import ModelOutput

from .action_tokenizer import ActionTokenizer


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


@dataclass
class TokenChoice:
    """The best (or a sampled) action id, whatever the rest of the vocabulary says; but it notes what that says.

    Args:
        sampling: `(temperature, top_p, generator)`; None: the best.
    """

    tokenizer: ActionTokenizer
    sampling: tuple | None
    log_probs_over: str
    finite: list[torch.Tensor] = field(default_factory=list)  # whether all logits were, looked at in the end

    def __call__(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """Fields of `ActionOutput` for logits `(B, n, vocabulary)` of n tokens."""
        start, end = self.tokenizer.vocab_start, self.tokenizer.vocab_end
        temperature, top_p, generator = self.sampling or (1.0, 1.0, None)
        logits = logits.float() / temperature
        self.finite.append(logits.isfinite().all())
        action_logits = logits[..., start:end]
        best = logits.argmax(dim=-1)
        if self.sampling:
            index = _sample(action_logits.flatten(0, 1), top_p, generator).reshape(best.shape)
        else:
            index = action_logits.argmax(dim=-1)
        scored, chosen = (action_logits, index) if self.log_probs_over == "actions" else (logits, index + start)
        log_probs = scored.log_softmax(dim=-1).gather(-1, chosen[..., None])[..., 0]
        replaced = (best < start) | (best >= end)
        return {"token_ids": index + start, "log_probs": log_probs, "replaced": replaced}


def _sample(logits: torch.Tensor, top_p: float, generator: torch.Generator | None) -> torch.LongTensor:
    """Draws from softmax(logits) `(B, n)` cut to the smallest set of ids whose probability reaches `top_p`."""
    probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    before = probs.cumsum(dim=-1) - probs
    probs = probs.masked_fill(before >= top_p, 0.0)
    return order.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]
