#!/usr/bin/env bash
# A study on the fleet, run on the head as a Ray job: cluster/study.sh GPUS STUDY [key=value ...]
# Requests the GPUs, runs or resumes the study, and releases the GPUs, also after a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
gpus=$1
shift
trap 'python cluster/grow.py 0' EXIT # also if none came: pending requests would start machines later
python cluster/grow.py "$gpus" || exit 1
mpformer ablate "$@" cluster.gpu=yes tracking.mlflow="${MLFLOW:-http://$(hostname -I | cut -d' ' -f1):5000}"
