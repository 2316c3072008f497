"""A 7-DoF arm asks a policy server over REST, and for the next chunk while the current one plays.

openvla serve . --unnorm-key libero_spatial &
python examples/robot_over_rest.py --instruction "pick up the black bowl on the stove and place it on the plate"
python examples/robot_over_rest.py --url https://gpu.local:8000 --token secret --steps 200
"""

import argparse
import sys
import time
import uuid

from fake_arm import FakeArm

from openvla.serve.client import ActClient, Prefetch  # this one file is enough on a robot's computer

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--url", default="http://127.0.0.1:8000")
arguments.add_argument("--token")
arguments.add_argument("--instruction", default="pick up the black bowl on the stove and place it on the plate")
arguments.add_argument("--steps", type=int, default=40)
arguments.add_argument("--rate", type=float, help="of them a second, if the policy does not say")
arguments.add_argument("--lead", type=int, default=3, help="steps before the end of a chunk to ask for the next")
args = arguments.parse_args()

client = ActClient(args.url, token=args.token, timeout=5.0, session=str(uuid.uuid4()), max_age_ms=500)
client.wait(60)
policy = client.metadata()
arm = FakeArm(policy, args.rate)
lead = min(args.lead, policy["action_chunk"] - 1)
start = time.monotonic()
with Prefetch(client, lead) as chunks:
    while len(arm.done) < args.steps:
        try:
            action = chunks.act(lambda: arm.observe(args.instruction))
        except (OSError, RuntimeError) as error:  # the server is away or refuses: stand still, then look again
            print("no action:", error, file=sys.stderr)
            chunks.reset()
            time.sleep(arm.period)
            client.wait(60)
            continue
        arm.move(action)
seconds = time.monotonic() - start
print(f"{args.steps} steps in {seconds:.2f} s, of which the arm waited {chunks.waited:.2f} s for answers")
print("last action:", dict(zip((dim["name"] for dim in policy["action_dims"]), arm.done[-1].round(4).tolist())))
