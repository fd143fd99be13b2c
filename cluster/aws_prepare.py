"""Create the AWS resources that cluster/aws.yaml needs, and write cluster/aws.mine.yaml with their names.

    pip install boto3; python cluster/aws_prepare.py --region us-west-2

A private, encrypted bucket for data and results; an encrypted EFS file system; a security group that admits
SSH from your current address only, and all traffic between its own machines; a role for the head, which may
start and stop machines, and one for the workers, which may use the bucket. Existing resources are kept,
aws.mine.yaml included; run it again when your address changes. Empty resources cost nothing.
"""

import argparse
import ipaddress
import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import boto3

NAME = "mpformer-fleet"
HEAD = "mpformer-head"
IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
HERE = Path(__file__).parent


def prepare(region: str, address: str) -> dict[str, str]:
    """Values for the placeholders of aws.yaml; `address`: the IPv4 address that may use SSH."""
    session = boto3.Session(region_name=region)
    account = session.client("sts").get_caller_identity()["Account"]
    bucket = _bucket(session, f"mpformer-{account}-{region}")
    vpc = _network(session)
    group = _security_group(session.client("ec2"), vpc, address)
    files = _file_system(session, vpc, group)
    _roles(session.client("iam"), account, bucket)
    image = session.client("ssm").get_parameter(Name=IMAGE)["Parameter"]["Value"]
    return {"ami": image, "group": group, "efs": files, "bucket": bucket}


def _bucket(session: Any, name: str) -> str:
    s3 = session.client("s3")
    if name not in {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}:
        region = session.region_name
        place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        s3.create_bucket(Bucket=name, **place)
    blocks = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    s3.put_public_access_block(Bucket=name, PublicAccessBlockConfiguration=dict.fromkeys(blocks, True))
    return name


def _network(session: Any) -> str:
    ec2 = session.client("ec2")
    found = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    return found[0]["VpcId"] if found else ec2.create_default_vpc()["Vpc"]["VpcId"]


def _security_group(ec2: Any, vpc: str, address: str) -> str:
    wanted = [{"Name": "group-name", "Values": [NAME]}, {"Name": "vpc-id", "Values": [vpc]}]
    found = ec2.describe_security_groups(Filters=wanted)["SecurityGroups"]
    if found:
        group, old = found[0]["GroupId"], found[0]["IpPermissions"]
        if old:
            ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=old)
    else:
        text = "mpformer: SSH from one address, everything among its own machines"
        group = ec2.create_security_group(GroupName=NAME, Description=text, VpcId=vpc)["GroupId"]
    ec2.authorize_security_group_ingress(
        GroupId=group,
        IpPermissions=[
            {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": f"{address}/32"}]},
            {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]},
        ],
    )
    return group


def _file_system(session: Any, vpc: str, group: str) -> str:
    efs, ec2 = session.client("efs"), session.client("ec2")
    if not efs.describe_file_systems(CreationToken=NAME)["FileSystems"]:
        efs.create_file_system(CreationToken=NAME, Encrypted=True, ThroughputMode="elastic")
    while (files := efs.describe_file_systems(CreationToken=NAME)["FileSystems"][0])["LifeCycleState"] != (
        "available"
    ):
        time.sleep(2)
    name = files["FileSystemId"]
    served = {m["SubnetId"] for m in efs.describe_mount_targets(FileSystemId=name)["MountTargets"]}
    for subnet in ec2.describe_subnets(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["Subnets"]:
        if subnet["SubnetId"] in served:
            continue
        try:
            efs.create_mount_target(FileSystemId=name, SubnetId=subnet["SubnetId"], SecurityGroups=[group])
        except (efs.exceptions.MountTargetConflict, efs.exceptions.UnsupportedAvailabilityZone) as error:
            print(f"{subnet['AvailabilityZone']}: {error}")  # at most one per zone; some zones have none
    return name


def _roles(iam: Any, account: str, bucket: str) -> None:
    arn = f"arn:aws:s3:::{bucket}"
    use_bucket = [
        {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetBucketLocation"], "Resource": arn},
        {
            "Effect": "Allow",
            "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"],
            "Resource": f"{arn}/*",
        },
    ]
    may_pass = [f"arn:aws:iam::{account}:role/{name}" for name in (NAME, HEAD)]
    run_machines = [
        {"Effect": "Allow", "Action": "ec2:*", "Resource": "*"},
        {"Effect": "Allow", "Action": ["iam:PassRole", "iam:GetInstanceProfile"], "Resource": "*"},
    ]
    run_machines[1]["Resource"] = may_pass + [arn.replace(":role/", ":instance-profile/") for arn in may_pass]
    for name, statements in ((NAME, use_bucket), (HEAD, use_bucket + run_machines)):
        trust = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
        try:
            iam.create_role(RoleName=name, AssumeRolePolicyDocument=_policy([trust]))
            iam.create_instance_profile(InstanceProfileName=name)
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        except iam.exceptions.EntityAlreadyExistsException:
            pass
        iam.put_role_policy(RoleName=name, PolicyName=name, PolicyDocument=_policy(statements))


def _policy(statements: list[dict[str, Any]]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": statements})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--region", default="us-west-2")
    parser.add_argument("--address", help="the IPv4 address that may use SSH (default: your current one)")
    options = parser.parse_args()
    address = options.address
    if address is None:
        with urllib.request.urlopen("https://checkip.amazonaws.com", timeout=10) as answer:
            address = answer.read().decode().strip()
    ipaddress.IPv4Address(address)
    text = (HERE / "aws.yaml").read_text().replace("us-west-2", options.region)
    for name, value in prepare(options.region, address).items():
        text = text.replace(f"<{name}>", value)
        print(f"{name:7} {value}")
    mine = HERE / "aws.mine.yaml"
    if mine.exists():
        print(f"SSH from {address} only; {mine} exists and is kept")
        return
    mine.write_text(text)
    print(f"wrote {mine}: SSH from {address} only")


if __name__ == "__main__":
    main()
