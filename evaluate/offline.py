"""How well a policy predicts recorded actions, step by step: token accuracy and L1 distance, given the right prefix.

Teacher forcing: each token is predicted from the recorded ones before it, which is what training optimises. A policy
that acts is judged in a simulator or on a robot.
"""

import numpy as np
import torch

from openvla.finetune.collator import ActionCollator


@torch.no_grad()
def evaluate_actions(
    model, collator: ActionCollator, indices: list[int], batch_size: int = 8, accelerator=None
) -> dict:
    """Compares predicted with recorded actions on some steps of one dataset.

    Args:
        model: `OpenVLAForActionPrediction`, or a peft model around it; left in the mode it was in.
        collator: without augmentation, over the dataset to compare with.
        indices: steps of `collator.steps`.
        accelerator: shares the steps among its processes; all of them get the result.

    Returns `token_accuracy` (share of tokens that the whole vocabulary's argmax gets right), `l1_normalized` and
    `l1_physical` (mean over steps, `[A]` per dim, of the best action tokens), and `steps`.
    """
    positions = list(range(len(indices)))
    if accelerator is not None and accelerator.num_processes > 1:
        count = accelerator.num_processes
        positions += positions[: -len(positions) % count]  # all have to call a sharded model equally often
        positions = positions[accelerator.process_index :: count]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        found = {}
        for start in range(0, len(positions), batch_size):
            batch = positions[start : start + batch_size]
            found |= zip(batch, _compare(model, collator, [indices[position] for position in batch]))
    finally:
        for module in training:
            module.training = True
    if accelerator is not None and accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        found = dict(gather_object(list(found.items())))
    rights, distances, physical = (np.stack(column) for column in zip(*found.values()))
    return {
        "token_accuracy": float(rights.mean()),
        "l1_normalized": distances.mean(axis=(0, 1)).tolist(),
        "l1_physical": physical.mean(axis=(0, 1)).tolist(),
        "steps": len(indices),
    }


def _compare(model, collator: ActionCollator, indices: list[int]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per step: which tokens are right, distance in normalised and in physical units, all `(T, A)`."""
    tokenizer = collator.tokenizer
    steps = [collator.steps[index] for index in indices]
    stats = collator.stats[steps[0].dataset]
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in collator.collate(steps).items()}
    targets = batch.pop("labels")[:, 1:]
    is_action = (targets >= tokenizer.vocab_start) & (targets < tokenizer.vocab_end)
    kept = is_action.any(dim=0).nonzero()[:, 0]
    logits = model(**batch, use_cache=False, logits_to_keep=kept).logits[is_action[:, kept]].float()
    right = (logits.argmax(dim=-1) == targets[is_action]).cpu().numpy()
    best = logits[:, tokenizer.vocab_start : tokenizer.vocab_end].argmax(dim=-1) + tokenizer.vocab_start
    shape = (len(steps), -1, stats.dim)
    predicted = tokenizer.decode(best.cpu().numpy().reshape(shape))
    recorded = np.stack([step.actions for step in steps])  # (steps, T, A)
    distance = np.abs(predicted - stats.normalize(recorded))
    physical = np.abs(stats.unnormalize(predicted) - recorded)
    return list(zip(right.reshape(shape), distance, physical))
