"""Ask the autoscaler for GPUs and wait for them: `python cluster/grow.py 8`; 0 lets go of all of them.

A study lays its runs out over the GPUs that are there when it starts, so they are asked for before. What is
no longer asked for goes when it is idle (`idle_timeout_minutes`). Runs on the cluster, as a Ray job does.
"""

import sys
import time

import ray
from ray.autoscaler.sdk import request_resources

MINUTES_OF_PATIENCE = 30


def main(gpus: int) -> int:
    ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
    request_resources(bundles=[{"GPU": 1}] * gpus)
    deadline = time.monotonic() + 60 * MINUTES_OF_PATIENCE
    while (have := int(ray.cluster_resources().get("GPU", 0))) < gpus:
        if time.monotonic() > deadline:
            print(
                f"{have} of {gpus} GPUs after {MINUTES_OF_PATIENCE} minutes: {'going on' if have else 'none'}"
            )
            request_resources(bundles=[{"GPU": 1}] * have)  # what comes later would cost and not be used
            return 0 if have else 1
        time.sleep(5)
    print(f"{gpus} GPUs asked for, {have} there", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
