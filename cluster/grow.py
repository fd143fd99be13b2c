"""Request GPUs from the autoscaler and wait for them: `python cluster/grow.py 8`; 0 releases all of them.

A study distributes its runs over the GPUs available when it starts, so they are requested before. Released
machines stop once they are idle (`idle_timeout_minutes`). Run it on the cluster, like a Ray job.
"""

import sys
import time

import ray
from ray.autoscaler.sdk import request_resources

TIMEOUT_MINUTES = 30


def main(gpus: int) -> int:
    ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
    request_resources(bundles=[{"GPU": 1}] * gpus)
    deadline = time.monotonic() + 60 * TIMEOUT_MINUTES
    while (have := int(ray.cluster_resources().get("GPU", 0))) < gpus:
        if time.monotonic() > deadline:
            outcome = "continuing" if have else "giving up"
            print(f"{have} of {gpus} GPUs after {TIMEOUT_MINUTES} minutes: {outcome}")
            request_resources(bundles=[{"GPU": 1}] * have)  # later machines would cost without being used
            return 0 if have else 1
        time.sleep(5)
    print(f"{gpus} GPUs requested, {have} available", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
