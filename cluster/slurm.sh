#!/usr/bin/env bash
# A study on a SLURM allocation: sbatch cluster/slurm.sh experiments/ablations/mpformer-table8.yaml [key=value ...]
# The same command again continues where the time limit stopped the last one. Not tested on a SLURM cluster.
#
# CHANGE: the #SBATCH lines; ENV, the virtual environment with mpformer (pip install -c constraints.txt . on a node
#   whose CPU and driver are those of the compute nodes). ENV, RESULTS and the data are on the shared file system.
# COST GUARD: --time. The signal comes five minutes before it and makes all runs write a checkpoint.
#SBATCH --job-name=mpformer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
set -euo pipefail
ENV=${ENV:-$HOME/env}
RESULTS=${RESULTS:-$PWD/runs}
export PATH=$ENV/bin:$PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# since Slurm 22.05 srun does not take it from sbatch: Ray would find a machine with one core
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
ray get-auth-token --generate > /dev/null # in ~/.ray/auth_token on the shared home; never print it

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(srun --nodes=1 --ntasks=1 -w "${nodes[0]}" hostname -I | cut -d' ' -f1)
export RAY_ADDRESS=$head:6379
mkdir -p "$RESULTS" # MLflow's server does not create the folder of its database

srun --nodes=1 --ntasks=1 -w "${nodes[0]}" \
    ray start --head --node-ip-address="$head" --port=6379 --dashboard-host=127.0.0.1 --block &
sleep 20
if ((${#nodes[@]} > 1)); then
    srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --exclude="${nodes[0]}" \
        ray start --address="$RAY_ADDRESS" --block &
fi
MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --workers 1 --host "$head" --port 5000 \
    --backend-store-uri "sqlite:///$RESULTS/mlflow.db" --artifacts-destination "$RESULTS/mlartifacts" > mlflow-server.log 2>&1 &

trap 'python cluster/spot_warning.py now "$RAY_ADDRESS"' USR1
srun --overlap --nodes=1 --ntasks=1 -w "${nodes[0]}" mpformer ablate "$@" \
    storage="$RESULTS" tracking.mlflow="http://$head:5000" &
study=$!
while kill -0 "$study" 2> /dev/null; do wait "$study" || true; done
wait "$study"
