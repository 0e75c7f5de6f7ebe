#!/bin/bash
# Run any kdpipe command on one GPU; it survives preemption and time limits. Before the limit Slurm sends USR1; kdpipe
# finishes its step, saves and exits 75, and the job goes back into the queue until the work is done.
#
#   sbatch docs/slurm/one-gpu.sh run recipes/mnist.toml --run runs/mnist
#
#SBATCH --job-name=kdpipe
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --gres=gpu:1
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log

set -u
: "${1:?"give the command: sbatch one-gpu.sh run RECIPE"}"

canceled=no
trap 'canceled=yes' TERM # sent to this script only if the whole job is to end, as by scancel
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" kdpipe "$@"
code=$?
if [ "$code" -eq 75 ] && [ "$canceled" = no ]; then # stopped early: run again
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
