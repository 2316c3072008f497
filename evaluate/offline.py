"""How well a policy predicts recorded actions, step by step: token accuracy and L1 distance, given the right prefix.

Teacher forcing: each token is predicted from the recorded ones before it, which is what training optimises. A policy
that acts is judged in a simulator or on a robot.
"""

import numpy as np
import torch

from openvla.finetune.collator import ActionCollator


@torch.no_grad()
def evaluate_actions(model, collator: ActionCollator, indices: list[int], batch_size: int = 8) -> dict:
    """Compares predicted with recorded actions on some steps.

    Args:
        model: `OpenVLAForActionPrediction`, or a peft model around it; left in the mode it was in.
        collator: without augmentation, over the dataset to compare with.
        indices: steps of `collator.steps`.

    Returns `token_accuracy` (share of tokens that the whole vocabulary's argmax gets right), `l1_normalized` and
    `l1_physical` (mean over steps, `[A]` per dim, of the best action tokens), and `steps`.
    """
    policy = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokenizer, stats = collator.tokenizer, collator.stats
    training = [module for module in model.modules() if module.training]
    model.eval()
    right = total = 0
    distances, physical = [], []
    try:
        for start in range(0, len(indices), batch_size):
            steps = [collator.steps[index] for index in indices[start : start + batch_size]]
            batch = {key: value.to(policy.device) for key, value in collator.collate(steps).items()}
            labels = batch.pop("labels")
            hidden = policy.model(**batch, use_cache=False).last_hidden_state[:, :-1]
            targets = labels[:, 1:]
            is_action = (targets >= tokenizer.vocab_start) & (targets < tokenizer.vocab_end)
            logits = policy.lm_head(hidden[is_action]).float()  # (B·T·A, vocabulary)
            right += (logits.argmax(dim=-1) == targets[is_action]).sum().item()
            total += len(logits)
            best = logits[:, tokenizer.vocab_start : tokenizer.vocab_end].argmax(dim=-1) + tokenizer.vocab_start
            predicted = tokenizer.decode(best.cpu().numpy().reshape(-1, stats.dim))
            recorded = np.concatenate([step.actions for step in steps])  # (B·T, A)
            distances.append(np.abs(predicted - stats.normalize(recorded)))
            physical.append(np.abs(stats.unnormalize(predicted) - recorded))
    finally:
        for module in training:
            module.training = True
    return {
        "token_accuracy": right / total,
        "l1_normalized": np.concatenate(distances).mean(axis=0).tolist(),
        "l1_physical": np.concatenate(physical).mean(axis=0).tolist(),
        "steps": len(indices),
    }
