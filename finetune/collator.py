"""Steps -> the tensors that training takes, with exact labels: action ids and the end of the sequence, nothing else.

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
    """

    def __init__(
        self,
        steps: StepDataset | MixedSteps,
        processor,
        stats: dict[str, ActionStats],
        tokenizer: ActionTokenizer,
        seed: int | None = None,
    ):
        self.steps = steps
        self.processor = processor
        self.stats = stats
        self.tokenizer = tokenizer
        self.seed = seed

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `attention_mask`, `labels` `(B, L)`, padded right, and `pixel_values`."""
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
            answer = [*self.action_ids(step), self.processor.tokenizer.eos_token_id]
            rows.append(self.processor.insert_image_tokens(ids) + answer)
            answers.append(len(answer))
        length = max(map(len, rows))
        pad = self.processor.tokenizer.pad_token_id
        input_ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        labels = torch.full_like(input_ids, -100)
        for index, (row, answer) in enumerate(zip(rows, answers)):
            labels[index, len(row) - answer : len(row)] = input_ids[index, len(row) - answer : len(row)]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "pixel_values": pixel_values,
        }

    def action_ids(self, step: Step) -> list[int]:
        """T·A action ids of a step, time by time."""
        try:
            return self.tokenizer.encode(self.stats[step.dataset].normalize(step.actions)).reshape(-1).tolist()
        except ValueError as error:
            raise ValueError(f"{step.source}: {error}") from error

    def _augment(self, images: list[np.ndarray], draw: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, draw])
        return [augment(image, rng) for image in images]
