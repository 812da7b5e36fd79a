#!/bin/bash
# Training on several machines under Slurm. Copy it, set what your cluster calls partition and account, then:
#     sbatch --nodes 4 configs/slurm.sh run_sft.sh --num_train_epochs 2
#     CONFIG=zero3 MODEL=/shared/models/Qwen3-32B DATA=/shared/data/sft sbatch configs/slurm.sh run_sft.sh
# The words after this file are a launcher and its flags; the launchers' variables are passed on from where sbatch is
# called. Start it from the project's folder, which all machines must see under the same path, as they must the model,
# the data and the output folder. Make .venv beforehand, by a first small training on the login node, for instance
#     bash run_sft.sh --max_steps 1
#
#SBATCH --job-name=suwen
#SBATCH --nodes=2
# One task a machine: the launcher starts a process for each of its GPUs.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=outputs/slurm-%j.log
# Before the time is up, or when the job is pushed aside, all processes get SIGTERM, with two minutes to end by themselves.
#SBATCH --signal=TERM@120
# A job that was pushed aside, or lost a machine, is queued again and goes on from its last checkpoint (--resume auto).
#SBATCH --requeue
#SBATCH --open-mode=append
# --partition and --account differ from cluster to cluster:
##SBATCH --partition=gpu
##SBATCH --account=medicine

set -eu
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[ $# -gt 0 ] || { echo "usage: sbatch configs/slurm.sh run_sft.sh [--flag value ...]" >&2; exit 2; }

# Machine 0 is the first of the list; the port follows from the job, so that two jobs on one machine do not meet.
NUM_MACHINES=$SLURM_JOB_NUM_NODES
MAIN_PROCESS_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MAIN_PROCESS_PORT=$((20000 + SLURM_JOB_ID % 20000))
export NUM_MACHINES MAIN_PROCESS_IP MAIN_PROCESS_PORT
# Links between the machines other than the first Ethernet, where NCCL does not find them by itself:
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

# A machine that fails ends the others: the launchers watch each other, and --kill-on-bad-exit ends what is left.
exec srun --kill-on-bad-exit=1 bash -c 'MACHINE_RANK=$SLURM_NODEID exec bash "$@"' slurm "$@"
