"""Several datasets of one robot as if they were one: a policy normalises all of it by the same statistics."""

import numpy as np

from openvla.finetune.steps import Episode, Reader


class JoinedReader:
    """The episodes of several readers, one after the other.

    Args:
        name: of the whole, its `unnorm_key`.
        parts: readers with the same rate and names of actions; cameras that not all have are left out.

    Raises ValueError for parts that are not alike, share no camera, or are the same.
    """

    def __init__(self, name: str, parts: list[Reader]):
        self.name, self.parts = name, parts
        first, *others = parts
        for fact in ("fps", "action_names", "action_units"):
            value = getattr(first, fact, None)
            setattr(self, fact, value)
            for part in others:
                if (found := getattr(part, fact, None)) != value:
                    raise ValueError(
                        f"Datasets under one name must be alike: {fact} is {value} in {first.files()[0]} and {found} "
                        f"in {part.files()[0]}."
                    )
        self.cameras = [camera for camera in first.cameras if all(camera in part.cameras for part in others)]
        if not self.cameras:
            raise ValueError(f"{name}: no camera is in all its datasets: {[part.cameras for part in parts]}.")
        files = self.files()
        if repeated := sorted({file for file in files if files.count(file) > 1}):
            raise ValueError(
                f"{name}: a dataset is named twice ({repeated[0]}): its held-out episodes would be trained on. "
                "Name each once."
            )
        self._first = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, index: int) -> Episode:
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        return self.parts[part].read(index - int(self._first[part]))

    def files(self) -> list[str]:
        return [file for part in self.parts for file in part.files()]

    def map_images(self) -> None:
        for part in self.parts:
            if hasattr(part, "map_images"):
                part.map_images()

    def replace_parts(self, change, lengths: list[int]) -> "JoinedReader":
        """With `change(part, its lengths)` in the place of every part.

        Args:
            lengths: steps of all episodes.
        """
        bounds = zip(self._first[:-1], self._first[1:])
        return JoinedReader(
            self.name, [change(part, lengths[start:stop]) for part, (start, stop) in zip(self.parts, bounds)]
        )
