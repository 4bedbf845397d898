#!/usr/bin/env bash
# Everything that needs a GPU, in one command, without network or installation:
#
#   bash benchmarks/gpu.sh [--quick|--full|--dry] [OUT]      about 8, 20 or 1 minutes; OUT: $OUT or benchmarks/out
#
# Correctness first, then the benchmark, then a profile of the slowest operation. A step that fails or runs
# out of time does not stop the next. Writes into OUT, 7 files of text:
#   machine.txt correctness.txt kernels.txt kernels.json kernels.svg profile.txt summary.txt
# SELECTION=file.pt adds tensors of a real layer (benchmarks/unions.py --save); PYTHON=... is the interpreter.
# Needs torch and triton; the package is found through a link, .typing/dense2sparse -> the repository.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

MODE=--quick
case "${1:-}" in --quick | --full | --dry)
    MODE=$1
    shift
    ;;
esac
OUT=${1:-${OUT:-benchmarks/out}}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT" .typing && ln -sfn .. .typing/dense2sparse
export PYTHONPATH="$PWD/.typing:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"

STEPS=()
# step SECONDS FILE COMMAND...: runs it with all it prints in OUT/FILE, and notes how it ended.
step() {
    local limit=$1 file=$2 begun=$SECONDS code
    shift 2
    printf '== %s\n' "$*" | tee -a "$OUT/$file"
    timeout --kill-after=20 "$limit" "$@" >>"$OUT/$file" 2>&1
    code=$?
    STEPS+=("$(printf '%-4s %5d s  %s' "$([[ $code == 0 ]] && echo ok || echo "$code")" $((SECONDS - begun)) "$*")")
    return 0
}
has() { "$PYTHON" -c "import $1" >/dev/null 2>&1; }

rm -f "$OUT"/{machine,correctness,kernels,profile,summary}.txt "$OUT"/kernels.{json,svg}
step 60 machine.txt "$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
RESULTS=(--json "$OUT/kernels.json" --plot "$OUT/kernels.svg")
if [[ $MODE == --dry ]]; then
    step 120 kernels.txt "$PYTHON" benchmarks/kernels.py --dry "${RESULTS[@]}" --profile "$OUT/profile.txt"
else
    step 30 machine.txt nvidia-smi
    if has pytest && has hypothesis; then
        # The tests of kernels turn the interpreter on where nobody says otherwise.
        step 240 correctness.txt env TRITON_INTERPRET=0 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/kernels
    else
        echo "pytest or hypothesis is missing here: the GPU tests are left out" >>"$OUT/correctness.txt"
    fi
    step 240 correctness.txt "$PYTHON" benchmarks/kernels.py --check --total-s 200
    LIMIT=300
    [[ $MODE == --full ]] && LIMIT=900
    if [[ -n ${SELECTION:-} ]]; then
        step 90 kernels.txt "$PYTHON" benchmarks/kernels.py --selection "$SELECTION" --block-size 32 --total-s 60
    fi
    step $((LIMIT + 40)) kernels.txt "$PYTHON" benchmarks/kernels.py --preset "${MODE#--}" --total-s "$LIMIT" "${RESULTS[@]}"
    step 90 profile.txt "$PYTHON" benchmarks/kernels.py --profile "$OUT/profile.txt.part" --json "$OUT/kernels.json"
    [[ -f $OUT/profile.txt.part ]] && cat "$OUT/profile.txt.part" >>"$OUT/profile.txt" && rm "$OUT/profile.txt.part"
fi

{
    printf '%s\n' "code  took  step" "${STEPS[@]}"
    if [[ $MODE == --dry ]]; then
        echo "dry: no speed"
    elif [[ -f $OUT/kernels.json ]]; then
        "$PYTHON" benchmarks/bench_report.py "$OUT/kernels.json"
    fi
} >"$OUT/summary.txt" 2>&1
cat "$OUT/summary.txt"
# Whoever calls learns from the exit code whether every step ended well.
printf '%s\n' "${STEPS[@]}" | grep -qv '^ok' && exit 1
exit 0
