"""Announce the preemption of this machine to Ray, so that its runs write a checkpoint at once.

    python cluster/spot_warning.py aws|gcp HEAD:6379    polls the cloud's metadata service until it warns
    python cluster/spot_warning.py now HEAD:6379        announces it for all machines (SLURM's time limit)

The metadata service is at 169.254.169.254. It warns two minutes ahead on AWS, half a minute on GCP.
"""

import sys
import time
import urllib.error
import urllib.request

SECONDS_AHEAD = {"aws": 120, "gcp": 30, "now": 300}
METADATA = "http://169.254.169.254"


def warned(cloud: str, metadata: str = METADATA) -> bool:
    """Whether the cloud has announced this machine's preemption; False if the service does not answer."""
    try:
        if cloud == "gcp":
            path = "/computeMetadata/v1/instance/preempted"
            return _ask(metadata + path, {"Metadata-Flavor": "Google"}).strip() == "TRUE"
        lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
        token = _ask(metadata + "/latest/api/token", lifetime, method="PUT")
        _ask(metadata + "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
        return True
    except urllib.error.HTTPError as error:
        if error.code == 404:  # AWS: no preemption is scheduled
            return False
        print(f"metadata service: {error}", flush=True)
    except OSError as error:
        print(f"metadata service: {error}", flush=True)
    return False


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    with urllib.request.urlopen(
        urllib.request.Request(url, headers=headers, method=method), timeout=2
    ) as answer:
        return answer.read().decode()


def drain(address: str, seconds: int, own_only: bool = True) -> int:
    """Announce to Ray that this machine, or every one, stops in `seconds`; returns the number announced."""
    import ray
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    client, own = GcsClient(address=address), ray.util.get_node_ip_address()
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    announced = 0
    for node in client.get_all_node_info().values():
        if node.state == 0 and (not own_only or node.node_manager_address == own):
            deadline = int((time.time() + seconds) * 1000)
            accepted, message = client.drain_node(node.node_id.hex(), reason, "spot warning", deadline)
            print(f"{node.node_manager_address}: {'announced' if accepted else message}", flush=True)
            announced += accepted
    return announced


def main(cloud: str, address: str) -> None:
    while cloud != "now" and not warned(cloud):
        time.sleep(3)
    drain(address, SECONDS_AHEAD[cloud], own_only=cloud != "now")


if __name__ == "__main__":
    main(*sys.argv[1:])
