#!/bin/bash
# Cache a teacher with several GPUs at once: each element of the array computes its share of the store's units.
# An element that is stopped before its time limit, or preempted, goes back into the queue and computes what is missing.
#
#   sbatch docs/slurm/cache-array.sh recipes/mnist.toml [RUN_FOLDER] [more options of kdpipe cache-teacher]
#
#SBATCH --job-name=kdpipe-cache
#SBATCH --array=0-3
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --gres=gpu:1
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.log

set -u
recipe=${1:?"give the recipe: sbatch cache-array.sh RECIPE [RUN_FOLDER]"}
run=${2:-runs/$(basename "$recipe" .toml)}

canceled=no
trap 'canceled=yes' TERM # sent to this script only if the whole job is to end, as by scancel
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" kdpipe cache-teacher "$recipe" --run "$run" "${@:3}"
code=$?
if [ "$code" -eq 75 ] && [ "$canceled" = no ]; then # stopped early: run again
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
