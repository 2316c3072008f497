"""An arm that is none: it shows pictures, does what it is told, and counts. Put your robot's driver in its place."""

import time
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent


class FakeArm:
    """Seven numbers a step: six of motion, one gripper.

    Args:
        policy: what the server's /metadata says: how many cameras, how large the state, how many steps a second.
    """

    def __init__(self, policy: dict):
        names = ["agentview", "wrist"][: policy["num_cameras"]]
        self.pictures = [np.array(Image.open(HERE / f"{name}.png").convert("RGB")) for name in names]
        self.state = np.zeros(policy["proprio_dim"])
        self.period = 1 / (policy["control_frequency"] or 5.0)
        self.done: list[np.ndarray] = []
        self._next = time.monotonic()

    def observe(self, instruction: str) -> dict:
        """As a camera and a driver would give it."""
        state = {"proprio": self.state} if self.state.size else {}
        return {"images": self.pictures, "instruction": instruction, **state}

    def move(self, action: np.ndarray) -> None:
        """One control step, in time."""
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"This arm takes 7 finite numbers, got {action}.")
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = max(time.monotonic(), self._next + self.period)
        self.done.append(action)
