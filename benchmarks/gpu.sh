#!/usr/bin/env bash
# Everything that needs a GPU, in one command, without network or installation:
#
#   bash benchmarks/gpu.sh [--quick|--full|--dry] [OUT]     at most 10, 28 or 3 minutes; OUT: $OUT or benchmarks/out
#
# Correctness first, then kernels, then training steps, then a profile of the slowest kernel. A step that
# fails or runs out of time does not stop the next, and nothing begins that the whole time does not hold.
# Writes into OUT, 8 files of text:
#   correctness.txt kernels.txt kernels.json kernels.svg step.txt step.json profile.txt summary.txt
# PARTS="check kernels step profile" chooses among them (the files of the others stay), LIMIT_S sets the
# whole time in seconds, SELECTION=file.pt adds tensors of a real layer (benchmarks/unions.py --save), PYTHON
# is the interpreter. Needs torch and triton, for step.txt transformers; the package is found through a link,
# .typing/dense2sparse -> the repository.
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
PARTS=${PARTS:-check kernels step profile}
mkdir -p "$OUT" .typing && ln -sfn .. .typing/dense2sparse
export PYTHONPATH="$PWD/.typing:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

# Seconds: of the whole, and of each part (CHECK_S: of each process of the check).
case $MODE in
--quick) WHOLE_S=570 CHECK_S=120 KERNELS_S=240 STEP_S=120 ;;
--full) WHOLE_S=1680 CHECK_S=180 KERNELS_S=900 STEP_S=480 ;;
--dry) WHOLE_S=180 CHECK_S=60 KERNELS_S=150 STEP_S=120 ;;
esac
WHOLE_S=${LIMIT_S:-$WHOLE_S}

STEPS=()
FAILED=0
wanted() { [[ " $PARTS " == *" $1 "* ]]; }
has() { "$PYTHON" -c "import $1" >/dev/null 2>&1; }
# note CODE SECONDS COMMAND...
note() {
    local code=$1 took=$2
    shift 2
    [[ $code == 0 ]] || FAILED=1
    STEPS+=("$(printf '%-4s %5d s  %s' "$([[ $code == 0 ]] && echo ok || echo "$code")" "$took" "$*")")
}
# within SECONDS: so many, or what is left of the whole, with some for the summary.
within() {
    local left=$((WHOLE_S - SECONDS - 10))
    echo $(($1 < left ? $1 : left))
}
# step SECONDS FILE COMMAND...: runs it with all it prints in OUT/FILE, and notes how it ended.
step() {
    local limit file=$2 begun=$SECONDS code
    limit=$(within "$1")
    shift 2
    if ((limit < 15)); then
        note time 0 "$*"
        return 0
    fi
    printf '== %s\n' "$*" | tee -a "$OUT/$file"
    timeout --kill-after=10 "$limit" "$@" >>"$OUT/$file" 2>&1
    code=$?
    note "$code" $((SECONDS - begun)) "$*"
}
# together SECONDS FILE, and commands from stdin, one a line: all at once. They share the device, which
# makes no difference to correctness; most of their time is compilation, which the later steps then find done.
together() {
    local limit file=$2 begun=$SECONDS line number=0 code
    local -a lines=() pids=()
    limit=$(within "$1")
    while read -r line; do
        lines+=("$line")
        timeout --kill-after=10 "$limit" bash -c "$line" >"$SCRATCH/$number" 2>&1 </dev/null &
        pids+=($!)
        number=$((number + 1))
    done
    for number in "${!pids[@]}"; do
        wait "${pids[number]}"
        code=$?
        [[ $code == 5 && ${lines[number]} == *pytest* ]] && code=0 # no test is marked
        note "$code" $((SECONDS - begun)) "${lines[number]}"
        printf '== %s\n' "${lines[number]}" | tee -a "$OUT/$file"
        cat "$SCRATCH/$number" >>"$OUT/$file"
    done
}

wanted check && rm -f "$OUT"/correctness.txt
wanted kernels && rm -f "$OUT"/kernels.{txt,json,svg}
wanted step && rm -f "$OUT"/step.{txt,json}
wanted profile && rm -f "$OUT"/profile.txt
step 60 correctness.txt "$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'

KERNELS=("$PYTHON" benchmarks/kernels.py --json "$OUT/kernels.json" --plot "$OUT/kernels.svg")
TRAIN=("$PYTHON" benchmarks/step.py --json "$OUT/step.json")
if [[ $MODE == --dry ]]; then
    # Two at once: the interpreter is slow.
    together $((KERNELS_S + STEP_S)) kernels.txt <<END
${KERNELS[*]} --dry --profile "$OUT/profile.txt"
${TRAIN[*]} --dry >"$OUT/step.txt" 2>&1
END
else
    step 30 correctness.txt nvidia-smi
    if wanted check; then
        together "$CHECK_S" correctness.txt < <(
            for heads in 64/4 32/8 16/8 28/4 9/3; do
                echo "$PYTHON benchmarks/kernels.py --check --heads $heads --total-s $((CHECK_S - 20))"
            done
            # The tests of kernels turn the interpreter on where nobody says otherwise.
            if has pytest && has hypothesis; then
                echo "TRITON_INTERPRET=0 $PYTHON -m pytest -q -m gpu -p no:cacheprovider tests/kernels"
            fi
            if has transformers; then echo "$PYTHON benchmarks/step.py --check"; fi
        )
    fi
    if wanted kernels; then
        if [[ -n ${SELECTION:-} ]]; then
            step 90 kernels.txt "$PYTHON" benchmarks/kernels.py --selection "$SELECTION" --block-size 32 --total-s 60
        fi
        LIMIT=$(within "$KERNELS_S")
        step "$LIMIT" kernels.txt "${KERNELS[@]}" --preset "${MODE#--}" --total-s $((LIMIT - 30))
    fi
    if wanted step; then
        LIMIT=$(within "$STEP_S")
        step "$LIMIT" step.txt "${TRAIN[@]}" --preset "${MODE#--}" --total-s $((LIMIT - 20))
    fi
    if wanted profile; then
        step 60 profile.txt "$PYTHON" benchmarks/kernels.py --profile "$SCRATCH/profile" --json "$OUT/kernels.json"
        [[ -f $SCRATCH/profile ]] && cat "$SCRATCH/profile" >>"$OUT/profile.txt"
    fi
fi

{
    printf '%s\n' "code  took  step" "${STEPS[@]}"
    if [[ $MODE == --dry ]]; then
        echo "dry: no speed"
    else
        [[ -f $OUT/kernels.json ]] && "$PYTHON" benchmarks/bench_report.py "$OUT/kernels.json"
        [[ -f $OUT/step.json ]] && "$PYTHON" benchmarks/step.py --table "$OUT/step.json"
    fi
} >"$OUT/summary.txt" 2>&1
cat "$OUT/summary.txt"
# Whoever calls learns from the exit code whether every step ended well.
exit "$FAILED"
