"""inspect-robots with its WidowX plug-in evaluates on a robot that is none: REST and openpi. Run by test_clients.py.

python inspect_robots_acts.py PORT OUT.npz
"""

import sys
import tempfile

import numpy as np
from inspect_robots.eval import eval
from inspect_robots.scene import ListSceneDataset, Scene
from inspect_robots.task import Task
from inspect_robots_widowx.embodiment import Status, WidowXEmbodiment
from inspect_robots_widowx.policy import OpenpiPolicy, OpenVLAPolicy

PORT, OUT = int(sys.argv[1]), sys.argv[2]


class Arm:
    """The plug-in's own hook for a robot: does what it is told, sees another picture each time."""

    def __init__(self):
        self.done, self.seen = [], np.random.default_rng(0)

    def init(self, env_params):
        return Status.SUCCESS

    def reset(self):
        return Status.SUCCESS

    def move(self, pose_4x4, duration, blocking):
        return Status.SUCCESS

    def step_action(self, action, blocking):
        self.done.append(np.array(action))
        return Status.SUCCESS

    def get_observation(self):
        return {"full_image": self.seen.integers(0, 256, (480, 640, 3), dtype=np.uint8), "state": np.zeros(7)}

    def stop(self):
        pass


results = {}
for name, policy in (
    ("rest", OpenVLAPolicy(server_url=f"http://127.0.0.1:{PORT}")),
    ("openpi", OpenpiPolicy(port=PORT, action_horizon=1, replan_interval=1)),
):
    arm = Arm()
    robot = WidowXEmbodiment(
        client_factory=lambda config, arm=arm: arm, unattended=True, sleep_fn=lambda seconds: None
    )
    scenes = ListSceneDataset([Scene(id="cup", instruction="pick up the cup")])
    task = Task(name="toy", scenes=scenes, scorer="success_at_end", max_steps=4)
    (log,) = eval(task, policy, robot, log_dir=tempfile.mkdtemp())
    print(name, log.status, len(arm.done))
    results[name] = np.stack(arm.done)
    results[f"{name}_status"] = np.array(log.status)
np.savez(OUT, **results)
