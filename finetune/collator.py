"""Steps -> the tensors that training takes, with exact labels: action ids and the end of the sequence, nothing else.

Policies that decode in parallel get slots in the place of the ids; continuous heads get the actions themselves.

Legend: B batch · L tokens · T action chunk · A action dims.
"""

import numpy as np
import torch

from openvla.action_tokenizer import ActionStats, ActionTokenizer
from openvla.finetune.augment import augment
from openvla.finetune.steps import MixedSteps, Step, StepDataset


class ActionCollator:
    """Rows of a run's order (`{"index": which step, "draw": which draw of the run}`) -> one batch.

    Loading happens here, inside the data loader's workers. Augmentation is seeded by the draw, so that a resumed run
    sees the very images an uninterrupted one would have seen.

    Args:
        steps: where rows' indices point to.
        processor: `OpenVLAProcessor`.
        stats: of each dataset by its name, to normalise actions.
        tokenizer: of the model (`ActionTokenizer.from_config`).
        seed: of the augmentation; None: no augmentation, as for evaluation.
        config: of the model; None: a causal policy of one step without proprioception.
        proprio_stats: of each dataset by its name, for policies that take proprioception.
        multiple: rows are padded to a multiple of so many tokens, for compiled code that wants few lengths.
    """

    def __init__(
        self,
        steps: StepDataset | MixedSteps,
        processor,
        stats: dict[str, ActionStats],
        tokenizer: ActionTokenizer,
        seed: int | None = None,
        config=None,
        proprio_stats: dict[str, ActionStats] | None = None,
        multiple: int = 1,
    ):
        self.steps = steps
        self.processor = processor
        self.stats = stats
        self.tokenizer = tokenizer
        self.seed = seed
        self.slot = None if config is None or config.attention == "causal" else config.action_slot_id
        self.continuous = config is not None and config.action_head != "token"
        self.ends = config is None or config.attention != "prefix"  # there, nothing follows the slots
        self.proprio_stats = proprio_stats if config is not None and config.proprio_dim else None
        self.multiple = multiple

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `attention_mask`, `labels` `(B, L)`, padded right, and `pixel_values`.

        Policies that take proprioception get `proprio` `(B, P)` in [-1, 1]; continuous heads, instead of `labels`,
        `actions` `(B, T, A)` in [-1, 1] and `counted` `(B, T)`. What lies past the end of an episode is not scored.
        """
        return self.collate([self.steps[row["index"]] for row in rows], [row["draw"] for row in rows])

    def collate(self, steps: list[Step], draws: list[int] | None = None) -> dict[str, torch.Tensor]:
        """The batch of given steps; `draws` seed their augmentation."""
        images = [step.images for step in steps]
        options = {}
        if self.seed is not None:
            images = [self._augment(step.images, draw) for step, draw in zip(steps, draws)]
            options["center_crop_area"] = None  # the random crop stands in for the crop at test time
        prompts = [self.processor.build_prompt(step.instruction) for step in steps]
        pixel_values = self.processor(prompts, images, **options)["pixel_values"]

        rows, answers = [], []
        for step, prompt in zip(steps, prompts):
            ids = self.processor([prompt])["input_ids"][0].tolist()
            told = self.action_ids(step)
            fed = told if self.slot is None else [self.slot] * len(told)
            end = [self.processor.tokenizer.eos_token_id] if self.ends else []
            rows.append(self.processor.insert_image_tokens(ids) + fed + end)
            scored = np.repeat(~step.is_pad, len(told) // len(step.is_pad))
            answers.append([token if counts else -100 for token, counts in zip(told, scored)] + end)
        length = -(-max(map(len, rows)) // self.multiple) * self.multiple
        pad = self.processor.tokenizer.pad_token_id
        batch = {
            "input_ids": torch.tensor([row + [pad] * (length - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
            "pixel_values": pixel_values,
        }
        if self.proprio_stats is not None:
            batch["proprio"] = torch.tensor(np.stack([self.state(step) for step in steps]), dtype=torch.float32)
        if self.continuous:
            batch["actions"] = torch.tensor(np.stack([self.normalized(step) for step in steps]), dtype=torch.float32)
            batch["counted"] = torch.tensor(np.stack([~step.is_pad for step in steps]))
            return batch
        labels = torch.full_like(batch["input_ids"], -100)
        for index, (row, answer) in enumerate(zip(rows, answers)):
            labels[index, len(row) - len(answer) : len(row)] = torch.tensor(answer)
        return batch | {"labels": labels}

    def normalized(self, step: Step) -> np.ndarray:
        """`(T, A)` in [-1, 1]."""
        try:
            return self.stats[step.dataset].normalize(step.actions)
        except ValueError as error:
            raise ValueError(f"{step.source}: {error}") from error

    def state(self, step: Step) -> np.ndarray:
        """`(P,)` in [-1, 1]."""
        if step.proprio is None:
            raise ValueError(f"{step.source}: the policy takes proprioception, and there is none.")
        try:
            return self.proprio_stats[step.dataset].normalize(step.proprio)
        except ValueError as error:
            raise ValueError(f"{step.source}: {error}") from error

    def action_ids(self, step: Step) -> list[int]:
        """T·A action ids of a step, time by time."""
        return self.tokenizer.encode(self.normalized(step)).reshape(-1).tolist()

    def _augment(self, images: list[np.ndarray], draw: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, draw])
        return [augment(image, rng) for image in images]
