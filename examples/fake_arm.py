"""An arm that is none: it shows pictures, does what it is told, and counts. Put your robot's driver in its place."""

import time
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent


DIMS = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]


class FakeArm:
    """Seven numbers a step: six of motion, and a gripper that is open at 1.

    Args:
        policy: what the server's /metadata says: what its actions are, how many cameras, how large the state, how many
            steps a second.
        rate: steps a second, if the policy does not say.

    Raises ValueError if the policy moves another kind of arm. Compare the units of motion with your driver's, too.
    """

    def __init__(self, policy: dict, rate: float | None = None):
        dims = policy["action_dims"]
        if [dim["name"].rstrip("?") for dim in dims] != DIMS or dims[-1]["unit"] != "1 = open":
            raise ValueError(f"This arm moves by {DIMS}, gripper 1 = open; the policy by {dims}.")
        rate = policy["control_frequency"] or rate
        if rate is None:
            raise ValueError("The policy does not say how many steps a second it was trained for: pass --rate.")
        names = ["agentview", "wrist"][: policy["num_cameras"]]
        self.pictures = [np.array(Image.open(HERE / f"{name}.png").convert("RGB")) for name in names]
        self.state = np.zeros(policy["proprio_dim"])
        self.period = 1 / rate
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
