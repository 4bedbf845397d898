#!/usr/bin/env bash
#SBATCH --job-name=dense2sparse
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#
# One run as a Slurm job; submit it from the repository, and change the lines above on the command line:
#
#   sbatch --nodes=4 --time=24:00:00 launch/slurm.sh RECIPE [a.b=c ...]
#
# One task a node starts that node's ranks without ssh, pdsh or MPI. Slots of a node: its GPUs, or
# RANKS_PER_NODE. Ten minutes before the time limit the run saves, and the job goes back into the queue.
# The environment (WANDB_*, HF_*, ...) crosses to the nodes by srun.
set -euo pipefail

if (($# < 1)); then
    echo "usage: sbatch [options] launch/slurm.sh RECIPE [a.b=c ...]" >&2
    exit 2
fi
# Slurm runs a copy of this file, so its own path says nothing.
cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch}"
if ! command -v dense2sparse >/dev/null; then export PATH="$PWD/.venv/bin:$PATH"; fi

slots=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
hostfile=$PWD/.hostfile.$SLURM_JOB_ID
trap 'rm -f "$hostfile"' EXIT
printf '%s slots='"$slots"'\n' "${nodes[@]}" >"$hostfile"

# Signals to the job's steps would also hit the launchers; the stop file reaches every rank at a step.
# shellcheck disable=SC2064  # the recipe as it is now
trap "dense2sparse stop $(printf '%q ' "$@")" USR1

# shellcheck disable=SC2016  # SLURM_NODEID is each node's own
srun --ntasks-per-node=1 --kill-on-bad-exit=0 bash -c \
    'exec dense2sparse run --no_ssh --node_rank "$SLURM_NODEID" "$@"' dense2sparse \
    --hostfile "$hostfile" --master_addr "${nodes[0]}" \
    --master_port "$((20000 + SLURM_JOB_ID % 10000))" "$@" &
step=$!

status=0
wait "$step" || status=$?
# `wait` also returns when the trap has run; then the step is still saving.
while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
done
if ((status == 75)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
