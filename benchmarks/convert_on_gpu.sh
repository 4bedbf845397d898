#!/usr/bin/env bash
# A real conversion on a GPU machine without network, from what benchmarks/carry.sh prepared elsewhere:
#
#   bash benchmarks/convert_on_gpu.sh receive N             keeps call N of .carry/ outside the tree, verified
#   bash benchmarks/convert_on_gpu.sh check                 installs the wheels beside Python's own, tries them
#   bash benchmarks/convert_on_gpu.sh run OUT [a.b=c ...]   the whole recipe, through the deepspeed launcher
#
# `run` ends after LIMIT_S seconds (480) and continues when it is started again; what there is goes to OUT in
# any case, 8 files at most: log.txt (each line with its second) summary.txt report.html metrics.jsonl
# results.json results.tar.gz environment.json recipe.json. Everything else lies in CARRY_HOME
# (/tmp/d2s-carry). RECIPE is the recipe, SOURCE the folder with call-N, PYTHON the interpreter, which has
# torch, transformers and pip; nothing is installed into it. Exit codes: 0 done, 2 something did not arrive
# or does not fit, else that of `dense2sparse run`.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

CARRY_HOME=${CARRY_HOME:-/tmp/d2s-carry}
SOURCE=${SOURCE:-.carry}
RECIPE=${RECIPE:-recipes/smollm2-8k.yaml}
PYTHON=${PYTHON:-python3}
LIMIT_S=${LIMIT_S:-480}
NAME_OF='import sys; from dense2sparse.recipes.load import load; print(load(sys.argv[1], sys.argv[2:]).name)'
SITE=$CARRY_HOME/site
FILES=$CARRY_HOME/files
mkdir -p "$CARRY_HOME" .typing && ln -sfn .. .typing/dense2sparse

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# What the pipeline would download comes from the files: pip from a folder, texts from a filled cache, and
# the hub is not asked. One machine: collectives stay on the loopback device.
offline() {
    export PYTHONPATH="$PWD/.typing:$SITE${PYTHONPATH:+:$PYTHONPATH}" PATH="$SITE/bin:$PATH"
    export PYTHONUNBUFFERED=1 TQDM_DISABLE=1
    export HF_HUB_OFFLINE=1 HF_HOME="$CARRY_HOME/hub" WANDB_MODE=offline
    export PIP_NO_INDEX=1 PIP_FIND_LINKS="$FILES/checkpoint" PIP_CONFIG_FILE=/dev/null PIP_CONSTRAINT=
    export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}" GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
}

# Wheels into a folder of their own and texts into the cache, once; both came with the first call.
install() {
    [[ -f $CARRY_HOME/installed ]] && return
    compgen -G "$FILES/wheels/*.whl" >/dev/null || fail "no wheels in $FILES: receive call 1 first"
    rm -rf "$SITE"
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --disable-pip-version-check --root-user-action=ignore --target "$SITE" "$FILES"/wheels/*.whl ||
        fail "the wheels in $FILES/wheels could not be installed: the lines above say why"
    [[ -f $FILES/cache.tar.xz ]] || fail "$FILES/cache.tar.xz has not come: receive the calls in their order"
    mkdir -p "$CARRY_HOME/cache"
    "$PYTHON" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \
        "$FILES/cache.tar.xz" "$CARRY_HOME/cache" || fail "$FILES/cache.tar.xz cannot be unpacked"
    touch "$CARRY_HOME/installed"
}

# Before the rest is carried: do the packages fit each other, does DeepSpeed see the GPU, is the recipe good?
check() {
    install
    offline
    "$PYTHON" benchmarks/carry_wheels.py check "$SITE" || echo "warning: some needs are not met (above)" >&2
    "$PYTHON" - <<'END' || fail "an import failed: the lines above say which"
import importlib

for name in ("torch", "triton", "numpy", "transformers", "pydantic", "gguf", "wandb", "deepspeed"):
    print(name, importlib.import_module(name).__version__ if name != "gguf" else "imported", flush=True)
from deepspeed.accelerator import get_accelerator

import dense2sparse.train.stages  # noqa: F401

print("DeepSpeed runs on", get_accelerator().device_name())
END
    command -v deepspeed || fail "the deepspeed command is not in $SITE/bin"
    "$PYTHON" -m dense2sparse.launch.cli plan "$RECIPE" | tail -n 12 || fail "$RECIPE is no recipe"
}

with_seconds() {
    local line
    while IFS= read -r line; do printf '%4d %s\n' $((SECONDS - $1)) "$line"; done
}

# The run's results as a few files; those of a run that did not end too.
collect() {
    local out=$1 folder=$2 name
    for name in report.html metrics.jsonl environment.json recipe.json; do
        [[ -f $folder/$name ]] && cp "$folder/$name" "$out/$name"
    done
    (cd "$folder" && tar czf - eval stages/*/done.json 2>/dev/null) >"$out/results.tar.gz"
    find "$out" -maxdepth 1 -type f -size +16000k -printf 'left out, larger than 16 MiB: %f\n' -delete
}

run() {
    [[ $# -ge 1 ]] || fail "run needs a folder for its results"
    local out=$1 name folder code begun=$SECONDS
    shift
    mkdir -p "$out" && out=$(cd "$out" && pwd)
    "$PYTHON" benchmarks/carry_parts.py complete --home "$CARRY_HOME" || exit 2
    install
    offline
    name=$("$PYTHON" -c "$NAME_OF" "$RECIPE" "$@") || fail "the recipe cannot be used: the line above says why"
    folder=$CARRY_HOME/runs/$name
    timeout --kill-after=45 --signal=TERM "$LIMIT_S" "$PYTHON" -m dense2sparse.launch.cli run "$RECIPE" \
        output_dir="$CARRY_HOME/runs" data.cache_dir="$CARRY_HOME/cache" "$@" 2>&1 |
        with_seconds "$begun" | tee -a "$out/log.txt"
    code=${PIPESTATUS[0]}
    if [[ $code != 0 && -d $folder ]]; then # of what there is
        timeout 60 "$PYTHON" -m dense2sparse.launch.cli report "$folder" 2>&1 | tee -a "$out/log.txt"
    fi
    [[ -d $folder ]] && collect "$out" "$folder"
    {
        echo "exit code $code after $((SECONDS - begun)) s of at most $LIMIT_S: $RECIPE $*"
        nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo "no GPU"
        "$PYTHON" benchmarks/record_run.py "$folder" "$out/results.json" || tail -n 5 "$out/log.txt"
    } >"$out/summary.txt" 2>&1
    cat "$out/summary.txt"
    exit "$code"
}

case "${1:-}" in
receive)
    "$PYTHON" benchmarks/carry_parts.py receive "${2:?which call: a number}" \
        --source "$SOURCE" --home "$CARRY_HOME"
    ;;
check) check ;;
run) run "${@:2}" ;;
*) fail "say receive N, check or run OUT" ;;
esac
