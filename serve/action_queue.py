"""Chunks of actions -> one action per control step, for one robot.

    queue = ActionQueue(policy)                  # every chunk to its end before the policy is asked again
    queue = ActionQueue(policy, execute=4)       # the first 4 actions of every chunk: receding horizon
    queue = ActionQueue(policy, ensemble=0.01)   # asked at every step; what chunks say of the same step is averaged
    queue.reset()                                # before every episode
    while not done:
        action = queue.act(robot.observe() if queue.needs_observation else None)

Policies that answer token by token get what they said last of the same steps as a draft, and answer sooner: the same,
but for rounding in short types.

The first is how OpenVLA-OFT acts (Kim et al. 2025, arXiv:2502.19645). The last is temporal ensembling (Zhao et al.
2023, arXiv:2304.13705, algorithm 2). `policy` is whatever has `infer`: `OpenVLAPolicy`, `ActClient`.

Legend: T action chunk · A action dims.
"""

import numpy as np

ENSEMBLE = 0.01  # decay of the weights in the paper: the larger, the less new predictions count


class ActionQueue:
    """What is still to be done of the chunks that a policy gave; every robot needs its own.

    Args:
        policy: has `infer(observation) -> {"actions": (T, A), …}`; never given an observation that is not needed.
        execute: actions of each chunk to carry out, from 1 to T; None: all.
        ensemble: average what all chunks say of a step, with weights exp(-ensemble · i), i = 0 for the oldest.
        averaged: `(A,)` bool, dims that an ensemble averages; of the others, the newest chunk's word counts. None: the
            dims that the policy's statistics normalise. The others are commands such as open and closed: their mean is
            a third command that nobody predicted, and comes late. Leave out, too, what has no mean, such as
            quaternions or angles that wrap around.
    """

    def __init__(
        self, policy, execute: int | None = None, ensemble: float | None = None, averaged: list[bool] | None = None
    ):
        if execute is not None and (ensemble is not None or execute < 1):
            problem = "an ensemble asks at every step" if ensemble is not None else "expected 1 or more"
            raise ValueError(f"execute={execute}, ensemble={ensemble}: {problem}.")
        if ensemble is not None and not 0 <= ensemble < np.inf:
            raise ValueError(f"ensemble={ensemble}: expected the weights' decay, 0 (equal weights) or more.")
        if ensemble is not None and averaged is None:
            if getattr(policy, "stats", None) is None:
                raise ValueError(
                    f"{type(policy).__name__} does not tell which action dims its statistics normalise: pass "
                    "averaged, one bool per dim, False for grippers that are open or closed."
                )
            averaged = policy.stats.mask
        self.policy, self.execute, self.ensemble = policy, execute, ensemble
        self.averaged = None if ensemble is None else np.asarray(averaged, dtype=bool)
        self._chunks: list[np.ndarray] = []  # the rest of each, from the present step on; the oldest first
        self._draft: np.ndarray | None = None  # (T·A,)

    def reset(self) -> None:
        """Forgets all chunks: a new episode begins, or the robot was moved by somebody else."""
        self._chunks, self._draft = [], None

    @property
    def needs_observation(self) -> bool:
        """Whether the next `act` asks the policy."""
        return self.ensemble is not None or not self._chunks

    def act(self, observation: dict | None = None) -> np.ndarray:
        """The action of this control step, `(A,)` float64 in the policy's units.

        Args:
            observation: for the policy; None unless `needs_observation`.

        Raises ValueError for a chunk that is none, and what the policy raises; then no action is left over.
        """
        if self.needs_observation:
            if observation is None:
                raise ValueError("The policy has to be asked, and there is no observation: see `needs_observation`.")
            known, self._chunks = self._chunks, []  # if the policy raises, nothing is left for a robot to go on with
            self._chunks = [*known, self._ask(observation)]
        predictions = np.stack([chunk[0] for chunk in self._chunks])  # (chunks, A)
        self._chunks = [chunk[1:] for chunk in self._chunks if len(chunk) > 1]
        action = predictions[-1].copy()
        if len(predictions) > 1:
            weights = np.exp(-self.ensemble * np.arange(len(predictions)))
            action[self.averaged] = (weights @ predictions / weights.sum())[self.averaged]
        return action

    def _ask(self, observation: dict) -> np.ndarray:
        """A chunk, as much of it as is to be carried out."""
        if self._draft is not None:
            observation = {"draft": self._draft, **observation}
        self._draft = None
        result = self.policy.infer(observation)
        chunk = np.asarray(result["actions"], dtype=np.float64)
        if chunk.ndim != 2 or chunk.size == 0 or not np.isfinite(chunk).all():
            raise ValueError(
                f"The policy gave actions of shape {chunk.shape}, expected finite (T, A): {chunk.tolist()}."
            )
        if self.execute is not None and self.execute > len(chunk):
            raise ValueError(f"The policy gives {len(chunk)} action(s) at a time, too few to execute {self.execute}.")
        if self.averaged is not None and self.averaged.shape != chunk.shape[1:]:
            raise ValueError(f"averaged is of shape {self.averaged.shape}, but actions have {chunk.shape[1]} dims.")
        if getattr(self.policy, "takes_drafts", False):
            steps = np.arange(len(chunk)) + (self.execute or (len(chunk) if self.ensemble is None else 1))
            tokens = np.reshape(result["token_ids"], chunk.shape)
            self._draft = tokens[np.minimum(steps, len(chunk) - 1)].ravel()  # beyond the end: as the last step
        return chunk[: self.execute]
