"""The files of `cluster/`: of the right form, at the tested versions, with guards, and shut to the world."""

from __future__ import annotations

import copy
import http.server
import importlib.util
import os
import re
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHED = ["aws", "gcp", "azure", "onpremise"]
CLOUDS = ["aws", "gcp", "azure"]
VERSIONS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def read_all(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / f"{name}.yaml").read_text()))


def load(path: Path) -> ModuleType:
    """A file of `cluster/` as a module; they belong to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_accepts_the_cluster_file(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(read(name))))


def test_ray_refuses_a_misspelt_one():
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    wrong = read("aws") | {"idle_timeout": 10}
    with pytest.raises(ValidationError):
        validate_config(prepare_config(wrong))


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_cluster_file_opens_nothing_to_the_world(name):
    tree, text = read(name), (CLUSTER / f"{name}.yaml").read_text()
    assert "0.0.0.0" not in text
    head = next(line for line in tree["head_start_ray_commands"] if "ray start --head" in line)
    assert "--dashboard-host=127.0.0.1" in head
    assert "RAY_AUTH_MODE=token" in text
    assert "~/.ray/auth_token" in tree["file_mounts"]
    # no secret has its place in a file that lies in a repository
    assert not re.search(r"(?i)(secret|password|access_key|auth_token=|api_key)\S*\s*[:=]\s*\S", text)


def test_no_machine_on_aws_takes_the_group_that_ray_makes():
    """Left to itself, Ray makes a security group that admits SSH from 0.0.0.0/0."""
    for node in read("aws")["available_node_types"].values():
        assert node["node_config"]["SecurityGroupIds"] == ["<group>"]
        assert node["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}


@pytest.mark.slow  # moto's AWS takes seconds to load
def test_what_aws_needs_is_made_once_and_shut(monkeypatch, tmp_path):
    """Against moto's AWS: twice, from two addresses; the file that comes out is one that Ray accepts."""
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    moto = pytest.importorskip("moto", reason="moto is not installed: no AWS to try it on")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    for name in ("aws.yaml", "aws_prepare.py"):
        (tmp_path / name).write_text((CLUSTER / name).read_text())
    prepare = load(tmp_path / "aws_prepare.py")
    monkeypatch.setattr(prepare, "IMAGE", "/image")
    with moto.mock_aws():
        boto3.client("ssm", "eu-west-1").put_parameter(Name="/image", Value="ami-1", Type="String")
        for address in ("198.51.100.1", "198.51.100.2"):
            monkeypatch.setattr("sys.argv", ["x", "--region", "eu-west-1", "--address", address])
            prepare.main()
        ec2 = boto3.client("ec2", "eu-west-1")
        named = [{"Name": "group-name", "Values": ["mpformer-fleet"]}]
        (group,) = ec2.describe_security_groups(Filters=named)["SecurityGroups"]
        from_outside = [r["CidrIp"] for p in group["IpPermissions"] for r in p["IpRanges"]]
        assert from_outside == ["198.51.100.2/32"]
        (bucket,) = boto3.client("s3").list_buckets()["Buckets"]
        shut = boto3.client("s3").get_public_access_block(Bucket=bucket["Name"])
        assert all(shut["PublicAccessBlockConfiguration"].values())
        (files,) = boto3.client("efs", "eu-west-1").describe_file_systems()["FileSystems"]
        assert files["Encrypted"]
    text = (tmp_path / "aws.mine.yaml").read_text()
    tree = yaml.safe_load(text)
    assert not re.search(r"<[\w-]+>", "\n".join(li for li in text.splitlines() if not li.startswith("#")))
    assert tree["provider"]["region"] == "eu-west-1"
    assert tree["available_node_types"]["worker"]["node_config"]["SecurityGroupIds"] == [group["GroupId"]]


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cloud_s_bill_has_an_upper_bound(name):
    tree = read(name)
    types = tree["available_node_types"]
    assert tree["max_workers"] <= 8
    assert tree["idle_timeout_minutes"] <= 10
    assert types["worker"]["min_workers"] == 0
    assert types["worker"]["max_workers"] <= tree["max_workers"]
    assert tree["provider"]["cache_stopped_nodes"] is False
    assert tree["head_node_type"] == "head"
    head, worker = yaml.safe_dump(types["head"]).lower(), yaml.safe_dump(types["worker"]).lower()
    assert "spot" in worker
    assert "spot" not in head


@pytest.mark.parametrize("name", [*LAUNCHED, "kubernetes/cluster", "kubernetes/job", "kubernetes/services"])
def test_each_file_says_what_to_change_and_what_guards_it(name):
    comments = "\n".join(
        line for line in (CLUSTER / f"{name}.yaml").read_text().splitlines() if line.startswith("#")
    )
    assert "CHANGE" in comments
    assert "GUARDS" in comments
    placeholders = set(re.findall(r"<[\w-]+>", (CLUSTER / f"{name}.yaml").read_text()))
    assert all(placeholder in comments for placeholder in placeholders)


# --- Kubernetes: KubeRay's own schema is not in Ray's package ---------------------------------------


def check_ray_cluster(spec: dict[str, Any]) -> None:
    """What KubeRay's RayCluster must have, and may have, as far as these files use it."""
    allowed = {
        "rayVersion",
        "authOptions",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "headGroupSpec",
        "workerGroupSpecs",
    }
    assert set(spec) <= allowed
    assert spec["rayVersion"] == VERSIONS["ray"]
    # the operator makes the token and hands it to head, workers, autoscaler and submitter (KubeRay 1.5.1)
    assert spec["authOptions"] == {"mode": "token"}
    assert set(spec["headGroupSpec"]) <= {"serviceType", "rayStartParams", "template"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    groups = spec["workerGroupSpecs"]
    for group in groups:
        assert set(group) <= {
            *("groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template")
        }
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] <= 8
    for group in (spec["headGroupSpec"], *groups):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        claimed = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["image"].endswith(f"-ray{VERSIONS['ray']}")
            assert container["resources"]["limits"] == container["resources"]["requests"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= claimed
            assert not any(entry["name"].startswith("RAY_AUTH") for entry in container.get("env", []))


def check_policy(policy: dict[str, Any], cluster: dict[str, Any]) -> None:
    """It holds for every pod of the cluster, and admits chosen pods alone, its own among them."""
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert chosen.items() <= group["template"]["metadata"]["labels"].items()
    (rule,) = policy["spec"]["ingress"]
    assert {"podSelector": {"matchLabels": chosen}} in rule["from"]
    assert all(peer["podSelector"]["matchLabels"] and "ipBlock" not in peer for peer in rule["from"])


def test_the_ray_cluster_of_kubernetes():
    cluster, policy = read_all("kubernetes/cluster")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    check_ray_cluster(cluster["spec"])
    check_policy(policy, cluster["spec"])


def test_the_ray_job_of_kubernetes_takes_its_cluster_down():
    job, policy = read_all("kubernetes/job")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) <= {
        *("entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds"),
        *("backoffLimit", "rayClusterSpec"),
    }
    assert spec["shutdownAfterJobFinishes"] is True
    check_ray_cluster(spec["rayClusterSpec"])
    assert spec["rayClusterSpec"] == read_all("kubernetes/cluster")[0]["spec"]
    check_policy(policy, spec["rayClusterSpec"])
    # the pod that submits is no pod of the cluster: KubeRay's job has the RayJob's name
    peers = [peer["podSelector"]["matchLabels"] for peer in policy["spec"]["ingress"][0]["from"]]
    assert {"batch.kubernetes.io/job-name": job["metadata"]["name"]} in peers


def test_mlflow_on_kubernetes_is_reached_by_the_fleet_alone():
    parts = {(part["kind"], part["metadata"]["name"]): part for part in read_all("kubernetes/services")}
    cluster = read_all("kubernetes/cluster")[0]["spec"]
    head = cluster["headGroupSpec"]["template"]
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in head["spec"]["volumes"]}
    assert all(("PersistentVolumeClaim", claim) in parts for claim in claims)
    shared = parts["PersistentVolumeClaim", "mpformer"]["spec"]
    assert shared["accessModes"] == ["ReadWriteMany"]

    service, server = parts["Service", "mlflow"], parts["Deployment", "mlflow"]["spec"]["template"]
    assert service["spec"]["type"] == "ClusterIP"
    assert service["spec"]["selector"] == server["metadata"]["labels"]
    (container,) = server["spec"]["containers"]
    check_server(container["command"], {entry["name"]: entry.get("value") for entry in container["env"]})
    address = {entry["name"]: entry["value"] for entry in head["spec"]["containers"][0]["env"]}["MLFLOW"]
    host = address.removeprefix("http://")
    assert host == f"mlflow:{service['spec']['ports'][0]['port']}"
    assert host in container["command"][container["command"].index("--allowed-hosts") + 1].split(",")
    assert container["image"].endswith(f"-ray{VERSIONS['ray']}")

    policy = parts["NetworkPolicy", "mlflow"]["spec"]
    assert policy["podSelector"]["matchLabels"] == server["metadata"]["labels"]
    (rule,) = policy["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": head["metadata"]["labels"]}}]


def check_server(command: Sequence[str], environment: Mapping[str, str | None]) -> None:
    """One worker and no workers for jobs: 0.3 GiB, where MLflow's default takes more than 2."""
    assert command[command.index("--workers") + 1] == "1"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_mlflow_on_kubernetes_has_a_postgresql_of_its_own():
    from sqlalchemy import make_url

    parts = {(part["kind"], part["metadata"]["name"]): part for part in read_all("kubernetes/services")}
    (server,) = parts["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"]
    database = parts["Deployment", "mlflow-database"]["spec"]["template"]
    (container,) = database["spec"]["containers"]
    settings = {entry["name"]: entry for entry in container["env"]}
    url = make_url(server["command"][server["command"].index("--backend-store-uri") + 1])
    service = parts["Service", url.host]["spec"]
    assert url.get_driver_name() + "-binary" in VERSIONS
    assert url.get_driver_name() + "-binary" in (CLUSTER / "Dockerfile").read_text()
    assert (url.port, service["type"]) == (service["ports"][0]["port"], "ClusterIP")
    assert service["selector"] == database["metadata"]["labels"]
    assert url.username == settings["POSTGRES_USER"]["value"]
    assert url.database == settings["POSTGRES_DB"]["value"]
    # the password is in a secret of the cluster alone, the same for both
    assert url.password is None
    password = next(entry for entry in server["env"] if entry["name"] == "PGPASSWORD")
    assert password["valueFrom"] == settings["POSTGRES_PASSWORD"]["valueFrom"]
    secret = password["valueFrom"]["secretKeyRef"]
    made = f"kubectl create secret generic {secret['name']} --from-literal={secret['key']}="
    assert made in (ROOT / "docs" / "fleet.md").read_text()
    (volume,) = database["spec"]["volumes"]
    assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in parts
    policy = parts["NetworkPolicy", "mlflow-database"]["spec"]
    assert policy["podSelector"]["matchLabels"] == database["metadata"]["labels"]
    (rule,) = policy["ingress"]
    mlflow = parts["Deployment", "mlflow"]["spec"]["template"]["metadata"]["labels"]
    assert rule["from"] == [{"podSelector": {"matchLabels": mlflow}}]


@pytest.mark.parametrize("name", LAUNCHED)
def test_mlflow_s_server_on_a_head_is_a_small_one(name):
    (line,) = (line for line in read(name)["head_start_ray_commands"] if "mlflow server" in line)
    check_server(line.split(), dict(re.findall(r"(MLFLOW\w+)=(\S+)", line)))


# --- what runs on the machines ----------------------------------------------------------------------


def test_the_image_copies_what_is_there():
    text = (CLUSTER / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE):
        sources = [word for word in line.split()[:-1] if not word.startswith("--")]
        assert all((ROOT / source).exists() for source in sources), line
    assert "USER ray" in text
    assert "_deform_attn_cpu" in text


STUB = """#!/usr/bin/env bash
echo "${0##*/}|${SRUN_CPUS_PER_TASK:-}|${MLFLOW_SERVER_ENABLE_JOB_EXECUTION:-}|$*" >> "$CALLS"
case ${0##*/} in
    scontrol) printf 'node1\\nnode2\\n' ;;
    srun) [[ $* != *hostname* ]] || echo 10.0.0.1 ;;
esac
"""
"""In the place of the programs that the script calls: notes name, two variables and arguments."""


def test_the_slurm_script_gives_each_step_its_cores(tmp_path):
    """Since Slurm 22.05 `srun` does not inherit `--cpus-per-task`: it reads its own variable."""
    (tmp_path / "env" / "bin").mkdir(parents=True)
    for name in ("ray", "scontrol", "srun", "mlflow", "sleep"):
        stub = tmp_path / "env" / "bin" / name
        stub.write_text(STUB)
        stub.chmod(0o755)
    calls = tmp_path / "calls"
    of_sbatch = {"SLURM_CPUS_PER_TASK": "32", "SLURM_JOB_NODELIST": "node[1-2]"}
    of_user = {"ENV": str(tmp_path / "env"), "RESULTS": str(tmp_path / "runs"), "CALLS": str(calls)}
    subprocess.run(
        # its servers run in the background: the notes are complete once they have ended, too
        ["bash", "-c", '. "$@"; wait', "bash", CLUSTER / "slurm.sh", "study.yaml"],
        env=os.environ | of_sbatch | of_user,
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    made = [line.split("|") for line in calls.read_text().splitlines()]
    steps = [arguments for name, cores, _, arguments in made if name == "srun" and cores == "32"]
    assert len(steps) == sum(name == "srun" for name, *_ in made) == 4
    assert any("ray start --head" in step for step in steps)
    assert any("ray start --address=10.0.0.1:6379" in step and "--exclude=node1" in step for step in steps)
    assert any("mpformer ablate study.yaml" in step and "--overlap" in step for step in steps)
    (server,) = ((jobs, arguments) for name, _, jobs, arguments in made if name == "mlflow")
    check_server(server[1].split(), {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": server[0]})


@pytest.fixture
def metadata():
    """The service that tells a spot machine of its end: its address, and what it answers."""
    answers: dict[str, tuple[int, str]] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = answers.get(self.path, (404, ""))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_PUT = do_GET

        def log_message(self, *_args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


def test_a_cloud_s_warning_is_understood(metadata):
    spot = load(CLUSTER / "spot_warning.py")
    address, answers = metadata
    answers["/latest/api/token"] = (200, "a token")
    assert not spot.warned("aws", address)
    answers["/latest/meta-data/spot/instance-action"] = (200, '{"action": "terminate"}')
    assert spot.warned("aws", address)
    preempted = "/computeMetadata/v1/instance/preempted"
    answers[preempted] = (200, "FALSE")
    assert not spot.warned("gcp", address)
    answers[preempted] = (200, "TRUE")
    assert spot.warned("gcp", address)
    assert not spot.warned("aws", "http://127.0.0.1:1")  # nobody there is no warning
