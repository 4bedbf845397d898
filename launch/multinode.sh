#!/usr/bin/env bash
# One run over several nodes that share this folder (or the recipe's output_dir) under the same path.
#
# From one node, with pdsh and password-free ssh to every node of the hostfile:
#
#   ./launch/multinode.sh HOSTFILE RECIPE [a.b=c ...]
#
# Without ssh: the same command on every node, with its line in the hostfile (from 0) in NODE_RANK:
#
#   NODE_RANK=1 MASTER_ADDR=10.0.0.1 ./launch/multinode.sh HOSTFILE RECIPE [a.b=c ...]
#
# MASTER_ADDR is the first node's address; with pdsh DeepSpeed asks that node. MASTER_PORT is 29500 by
# default. WANDB_*, HF_* and DS_ACCELERATOR are passed on to the other nodes.
# Exit codes: 0 done, 1 failed, 2 bad recipe or hostfile, 75 stopped and resumable.
set -euo pipefail

if (($# < 2)); then
    echo "usage: ./launch/multinode.sh HOSTFILE RECIPE [a.b=c ...]" >&2
    exit 2
fi
hostfile=$1
shift

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if ! command -v dense2sparse >/dev/null; then PATH="$root/.venv/bin:$PATH"; fi
if ! command -v dense2sparse >/dev/null; then
    echo "dense2sparse is not installed on $(hostname): activate its environment, or pip install -e $root" >&2
    exit 2
fi

options=(--hostfile "$hostfile")
if [[ -n "${MASTER_ADDR:-}" ]]; then options+=(--master_addr "$MASTER_ADDR"); fi
if [[ -n "${MASTER_PORT:-}" ]]; then options+=(--master_port "$MASTER_PORT"); fi
if [[ -n "${NODE_RANK:-}" ]]; then options+=(--no_ssh --node_rank "$NODE_RANK"); fi
exec dense2sparse run "${options[@]}" "$@"
