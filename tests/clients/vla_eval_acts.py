"""vla-eval's harness runs a benchmark of its kind without a simulator. Run by test_clients.py.

python vla_eval_acts.py URL OUT.npz
"""

import asyncio
import sys

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.connection import Connection
from vla_eval.runners.sync_runner import SyncEpisodeRunner
from vla_eval.specs import GRIPPER_CLOSE_POS, IMAGE_RGB, LANGUAGE, POSITION_DELTA, ROTATION_AA, DimSpec, check_specs

STEPS = 3


class Toy(StepBenchmark):
    """Shows noise, does nothing, is done after some steps."""

    def __init__(self):
        super().__init__()
        self.pictures, self.actions = np.random.default_rng(2), []

    def get_tasks(self):
        return [{"name": "pick up the cup"}]

    def reset(self, task):
        return self.pictures.integers(0, 256, (256, 256, 3), dtype=np.uint8)

    def step(self, action):
        self.actions.append(np.array(action["actions"]))
        done = len(self.actions) % STEPS == 0
        return StepResult(obs=self.reset(None), reward=0.0, done=done, info={})

    def make_obs(self, raw_obs, task):
        return {"images": {"agentview": raw_obs}, "task_description": task["name"]}

    def get_step_result(self, step_result):
        return {"success": step_result.done}

    def get_action_spec(self):
        return {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}

    def get_observation_spec(self):
        return {"image": IMAGE_RGB, "language": LANGUAGE}


async def run() -> dict:
    benchmark, (task,) = Toy(), Toy().get_tasks()
    connection = Connection(sys.argv[1])
    await connection.connect(benchmark="toy")
    told = connection.server_info
    specs = [
        {key: DimSpec.from_dict(value) for key, value in told[name].items()}
        for name in ("action_spec", "observation_spec")
    ]
    mismatches = check_specs(specs[0], benchmark.get_action_spec(), specs[1], benchmark.get_observation_spec())
    outcomes = [await SyncEpisodeRunner().run_episode(benchmark, task, connection, max_steps=10) for _ in range(2)]
    await connection.close()
    return {
        "actions": np.stack(benchmark.actions),
        "mismatches": np.array(mismatches, dtype=str),
        "steps": np.array([outcome["steps"] for outcome in outcomes]),
        "success": np.array([outcome["metrics"]["success"] for outcome in outcomes]),
        "protocol": np.array(told["protocol_version"]),
    }


np.savez(sys.argv[2], **asyncio.run(run()))
