#!/bin/bash
# Train on several GPUs, of several machines if need be: one process a GPU, the batch of the recipe shared among them.
# srun starts the processes itself, as torchrun would, and returns kdpipe's exit status, which torchrun does not.
#
#   sbatch docs/slurm/several-gpus.sh train-student recipes/mnist.toml --run runs/mnist
#
#SBATCH --job-name=kdpipe-ddp
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=4
#SBATCH --gres=gpu:2
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log

set -u
: "${1:?"give the command: sbatch several-gpus.sh train-student RECIPE"}"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

canceled=no
trap 'canceled=yes' TERM # sent to this script only if the whole job is to end, as by scancel
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 kdpipe "$@"
code=$?
if [ "$code" -eq 75 ] && [ "$canceled" = no ]; then # stopped early: run again
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
