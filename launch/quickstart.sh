#!/usr/bin/env bash
# The whole conversion of a real 135M checkpoint, on the CPU or on this machine's GPUs:
#
#   ./launch/quickstart.sh [a.b=c ...]        for example train.seed=3 output_dir=/data/runs
#
# Run it again to continue where it stands, or to be told that all is done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_environment.sh
source launch/_environment.sh

prepare_environment launch/requirements.txt
export PATH="$PWD/$VENV/bin:$PATH"
exec dense2sparse run recipes/quickstart.yaml "$@"
