#!/bin/bash
# All stages as dependent jobs: teacher, store, students, compression. Each is requeued as often as needed; the next
# one starts when it has succeeded. Run it on the login node:
#
#   bash docs/slurm/pipeline.sh recipes/mnist.toml [RUN_FOLDER] [more options of sbatch, such as --partition=gpu]

set -eu
recipe=${1:?"give the recipe: bash pipeline.sh RECIPE [RUN_FOLDER]"}
run=${2:-runs/$(basename "$recipe" .toml)}
options=("${@:3}")
here=$(cd "$(dirname "$0")" && pwd)

submit() { # job to wait for, script, arguments; prints the job's number
    local after=$1
    shift
    sbatch --parsable --kill-on-invalid-dep=yes ${after:+--dependency=afterok:"$after"} "${options[@]}" "$@"
}

teacher=$(submit "" "$here/one-gpu.sh" train-teacher "$recipe" --run "$run")
store=$(submit "$teacher" "$here/cache-array.sh" "$recipe" "$run")
students=$(submit "$store" "$here/one-gpu.sh" train-student "$recipe" --run "$run")
small=$(submit "$students" "$here/one-gpu.sh" compress "$recipe" --run "$run")
echo "teacher $teacher, store $store, students $students, compression $small: kdpipe status $run shows their progress"
