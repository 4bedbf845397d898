#!/usr/bin/env bash
# Hardware counters of the kernels of one layer at 32K tokens, by Nsight Compute: where a kernel's time goes.
#
#   bash benchmarks/bench_counters.sh FILE [HEADS]      64/4 by default; needs ncu, PYTHONPATH as gpu.sh sets it
set -euo pipefail
PYTHON=${PYTHON:-python3}
KERNELS='^_(select|attend|key_gradients|query_gradients|query_tile|key_tile|student|difference|query_gradient|key_gradient)$'
ncu --clock-control none --kernel-name "regex:$KERNELS" --launch-count 16 \
    --section SpeedOfLight --section LaunchStats --section Occupancy --section WarpStateStats \
    --section MemoryWorkloadAnalysis --section ComputeWorkloadAnalysis \
    "$PYTHON" benchmarks/kernels.py --check --ours --data model --heads "${2:-64/4}" --lengths 32K \
    --only select sparse "sparse backward" "sparse kl" kl >"$1" 2>&1
