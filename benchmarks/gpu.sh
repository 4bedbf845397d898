#!/usr/bin/env bash
# Everything that needs a GPU, without network or installation, in two calls of a few minutes each:
#
#   bash benchmarks/gpu.sh first  [OUT]   within 280 s: is everything right; forward and decoding to 1M tokens
#   bash benchmarks/gpu.sh second [OUT]   within 420 s: training layers, training steps, launch values compared
#   bash benchmarks/gpu.sh full   [OUT]   within 28 minutes: more head layouts and lengths, all baselines
#   bash benchmarks/gpu.sh dry    [OUT]   without a GPU, interpreted: that everything runs
#   bash benchmarks/gpu.sh convert ...    a real conversion with carried packages, see carry.sh
#
# OUT is benchmarks/out by default. The script's own clock ends each call with a fifth of its limit to spare:
# nothing begins that the time does not hold, and what fails or hangs does not stop the next. Every result
# is in a JSON file as soon as it is there. At most 8 files of text: checks.json, kernels.json, kernels.svg,
# step.json, sweep.json, log.txt, profile.txt, summary.txt (at most 60 lines, printed last).
# PARTS="check kernels step sweep profile" chooses among the parts, LIMIT_S sets the limit, PYTHON the
# interpreter. Needs torch and triton, for training steps transformers; the package is found through a link,
# .typing/dense2sparse -> the repository.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

MODE=${1:-}
case $MODE in
first) LIMIT_S=${LIMIT_S:-280} PARTS=${PARTS:-check kernels sweep} ;;
second) LIMIT_S=${LIMIT_S:-420} PARTS=${PARTS:-check kernels step sweep profile} ;;
full) LIMIT_S=${LIMIT_S:-1680} PARTS=${PARTS:-check kernels step profile} ;;
dry) LIMIT_S=${LIMIT_S:-3600} PARTS=${PARTS:-check kernels step profile} ;;
convert) exec bash benchmarks/convert_on_gpu.sh "${@:2}" ;;
*)
    sed -n 's/^# \{0,1\}//; 2,8p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
OUT=${2:-${OUT:-benchmarks/out}}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT" .typing && ln -sfn .. .typing/dense2sparse
export PYTHONPATH="$PWD/.typing:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
LOG=$OUT/log.txt
: >"$LOG"

STEPS=()
FAILED=0
wanted() { [[ " $PARTS " == *" $1 "* ]]; }
has() { "$PYTHON" -c "import $1" >/dev/null 2>&1; }
# left: seconds until the fifth that is kept, some of it for the summary.
left() { echo $((LIMIT_S * 4 / 5 - SECONDS)); }
# within SECONDS: so many, or what is left.
within() {
    local rest
    rest=$(left)
    echo $(($1 < rest ? $1 : rest))
}
# note CODE SECONDS COMMAND...
note() {
    local code=$1 took=$2
    shift 2
    [[ $code == 0 || $code == time ]] || FAILED=1
    STEPS+=("$(printf '%-4s %4d s  %s' "$([[ $code == 0 ]] && echo ok || echo "$code")" "$took" \
        "$(sed "s|$PYTHON ||; s|$OUT/||g; s|$SCRATCH/||g" <<<"$*")")")
}
# step SECONDS COMMAND...: runs it with all it prints in the log, and notes how it ended.
step() {
    local limit begun=$SECONDS code
    limit=$(within "$1")
    shift
    if ((limit < 10)); then
        note time 0 "left out: $*"
        return 0
    fi
    printf '== %s\n' "$*" | tee -a "$LOG"
    # What is printed is shown as well: a call that is cut off leaves it behind.
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$LOG"
    code=${PIPESTATUS[0]}
    note "$code" $((SECONDS - begun)) "$*"
}
# together SECONDS, and commands from stdin, one a line: all at once. They share the device, which makes no
# difference to correctness; most of their time is compilation, which the later steps then find done.
together() {
    local limit begun=$SECONDS line number=0 code
    local -a lines=() pids=()
    limit=$(within "$1")
    while read -r line; do
        lines+=("$line")
        timeout --kill-after=5 "$limit" bash -c "$line" >"$SCRATCH/$number" 2>&1 </dev/null &
        pids+=($!)
        number=$((number + 1))
    done
    for number in "${!pids[@]}"; do
        wait "${pids[number]}"
        code=$?
        [[ $code == 0 ]] || note "$code" $((SECONDS - begun)) "${lines[number]}"
        printf '== %s\n' "${lines[number]}" >>"$LOG"
        cat "$SCRATCH/$number" >>"$LOG"
        [[ $code == 0 ]] || tail -n 4 "$SCRATCH/$number"
    done
    note 0 $((SECONDS - begun)) "${#lines[@]} commands at once, of which those that failed stand above"
}

CHECKS="$PYTHON benchmarks/check_run.py --json $OUT/checks.json"
KERNELS=("$PYTHON" benchmarks/kernels.py --json "$OUT/kernels.json" --plot "$OUT/kernels.svg")
TRAIN=("$PYTHON" benchmarks/step.py --json "$OUT/step.json")
# compile OPERATIONS LENGTHS: lines for `together` that check ours without baselines, and so compile them.
compile() {
    local heads
    for heads in 64/4 32/8; do
        echo "$PYTHON benchmarks/kernels.py --check --ours --data model --heads $heads --lengths $2 --only $1" \
            "--json $SCRATCH/${heads/\//-}-${1//[^a-z]/}.json --total-s 60"
    done
}

# compile_candidates PARTS MOST OPERATION: the same for the launch values that the sweep compares.
compile_candidates() {
    local heads part
    for heads in 64/4 32/8; do
        for part in $(seq "$1"); do
            echo "$PYTHON benchmarks/kernels.py --sweep --part $part/$1 --most $2 --only $3 --heads $heads" \
                "--lengths 4K --budget-s 0 --total-s 60"
        done
    done
}

case $MODE in
dry)
    together "$LIMIT_S" <<END
$CHECKS --dry --jobs 1 --settings "cached keys" --only select_blocks sparse_decode
${KERNELS[*]} --dry --profile $OUT/profile.txt
${TRAIN[*]} --dry
END
    ;;
first)
    if wanted check; then
        together 80 < <(
            echo nvidia-smi
            echo "$CHECKS --total-s 60"
            compile "select sparse" 8K
            compile decode "32K 128K 1M"
            compile_candidates 2 4 select
            compile_candidates 2 4 sparse
        )
    fi
    wanted kernels && step 150 "${KERNELS[@]}" --preset first --total-s $(($(within 150) - 8))
    wanted sweep && step 60 "$PYTHON" benchmarks/kernels.py --sweep --most 4 --only select sparse \
        --heads 64/4 32/8 --lengths 128K --budget-s 0.1 --json "$OUT/sweep.json" \
        --total-s $(($(within 60) - 5))
    ;;
second)
    if wanted check; then
        together 90 < <(
            compile "'sparse backward'" 4K
            compile "'sparse kl'" 4K
            compile "kl 'warmup frozen'" 4K
            has transformers && echo "$PYTHON benchmarks/step.py --check --json $SCRATCH/step.json"
            compile_candidates 1 6 "'sparse backward'"
            compile_candidates 1 6 "'sparse kl'"
            compile_candidates 1 6 kl
        )
    fi
    wanted kernels && step 120 "${KERNELS[@]}" --preset second --total-s $(($(within 120) - 8))
    wanted step && step 110 "${TRAIN[@]}" --preset second --total-s $(($(within 110) - 15))
    wanted sweep && step 90 "$PYTHON" benchmarks/kernels.py --sweep --most 6 \
        --only "sparse backward" "sparse kl" kl --heads 64/4 32/8 --lengths 128K --budget-s 0.2 \
        --json "$OUT/sweep.json" --total-s $(($(within 90) - 5))
    wanted profile && step 40 "$PYTHON" benchmarks/kernels.py --profile "$OUT/profile.txt" \
        --json "$OUT/kernels.json" --only "training layer" "warmup trained"
    ;;
full)
    if wanted check; then
        together 180 < <(
            echo nvidia-smi
            echo "$CHECKS"
            # The tests of kernels turn the interpreter on where nobody says otherwise.
            if has pytest && has hypothesis; then
                echo "TRITON_INTERPRET=0 $PYTHON -m pytest -q -m gpu -p no:cacheprovider tests/kernels tests/benchmarks"
            fi
        )
    fi
    wanted kernels && step 900 "${KERNELS[@]}" --preset full --total-s $(($(within 900) - 30))
    wanted step && step 480 "${TRAIN[@]}" --preset full --total-s $(($(within 480) - 30))
    wanted profile && step 60 "$PYTHON" benchmarks/kernels.py --profile "$OUT/profile.txt" \
        --json "$OUT/kernels.json"
    ;;
esac

{
    printf '%s\n' "code  took  step" "${STEPS[@]}"
    [[ -f $OUT/checks.json ]] && "$PYTHON" benchmarks/check_run.py --table "$OUT/checks.json"
    if [[ $MODE == dry ]]; then
        echo "dry: no speed"
    else
        [[ -f $OUT/kernels.json ]] && "$PYTHON" benchmarks/bench_report.py "$OUT/kernels.json"
        [[ -f $OUT/step.json ]] && "$PYTHON" benchmarks/step.py --table "$OUT/step.json"
    fi
} 2>&1 | cut -c 1-180 | head -n 60 >"$OUT/summary.txt"
cat "$OUT/summary.txt"
# Whoever calls learns from the exit code whether every step ended well.
exit "$FAILED"
