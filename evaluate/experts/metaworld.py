"""Meta-World's own scripted policies (`metaworld.policies`), speaking as this project's policies do.

expert = env.expert(seed=0, noise=0.01)  # env: a MetaWorldEnv, reset
while not env.step(expert.act()): ...
"""

import warnings
from collections.abc import Callable

import numpy as np

GAIN = 25.0  # action units per metre of position error, as most of Meta-World's policies have (4 to 50)


class MetaWorldExpert:
    """Acts towards the goal of a Meta-World task; reads privileged state, remembers nothing of the episode.

    Args:
        name: "push-v3", …
        observe: gives Meta-World's present observation, `(39,)`.
        rng: where the noise comes from; the same generator gives the same actions.
        noise: standard deviation in metres of the Gaussian that is added to each step's position error; 0.01 is a
            quarter of an action unit.
    """

    def __init__(
        self,
        name: str,
        observe: Callable[[], np.ndarray],
        rng: np.random.Generator | None = None,
        noise: float = 0.0,
    ):
        from metaworld.policies import ENV_POLICY_MAP

        self.policy, self.observe = ENV_POLICY_MAP[name](), observe
        self.rng, self.noise = rng if rng is not None else np.random.default_rng(0), noise

    def act(self) -> np.ndarray:
        """`(4,)` float32: x y z in [-1, 1] (1 = 1 cm), the gripper's force in [0, 1], 1 = open."""
        with warnings.catch_warnings():  # "Constant(s) may be too high": what exceeds 1 is clipped below
            warnings.simplefilter("ignore", UserWarning)
            action = np.array(self.policy.get_action(self.observe()), dtype=np.float64)
        if self.noise:
            action[:3] += GAIN * self.rng.normal(0.0, self.noise, 3)
        action = np.clip(action, -1.0, 1.0)
        action[3] = (1.0 - action[3]) / 2.0
        return action.astype(np.float32)
