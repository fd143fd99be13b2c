#!/usr/bin/env bash
# A study on the fleet, run on the head as a Ray job: cluster/study.sh GPUS STUDY [key=value ...]
# Asks for the GPUs, runs or resumes the study, and lets the GPUs go, whatever becomes of it.
set -euo pipefail
cd "$(dirname "$0")/.."
gpus=$1
shift
trap 'python cluster/grow.py 0' EXIT # also where none came; what is asked for comes, and costs, until then
python cluster/grow.py "$gpus" || exit 1
mpformer ablate "$@" cluster.gpu=yes tracking.mlflow="${MLFLOW:-http://$(hostname -I | cut -d' ' -f1):5000}"
