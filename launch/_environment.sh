# shellcheck shell=bash
# The environment of quickstart.sh and test.sh: finds Python, makes .venv, installs pinned versions.
# Sourced, not run. Call `prepare_environment requirements-file ...` with the repository as the
# working directory; a second call with nothing changed takes a fraction of a second.

# STACK=torch-2.11 is a second environment beside the usual one, with the oldest versions that are tested: those
# of machines whose torch and Triton are older, in launch/requirements-torch-2.11.txt.
case "${STACK:-}" in
"") VENV=.venv TORCH_VERSION=2.13.0 NUMPY_VERSION=2.4.6 ;;
# Triton 3.6's interpreter fails with numpy 2.4.
torch-2.11) VENV=.venv-torch-2.11 TORCH_VERSION=2.11.0 NUMPY_VERSION=2.3.5 ;;
*)
    echo "STACK=$STACK is not known: leave it out, or set STACK=torch-2.11" >&2
    exit 2
    ;;
esac
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { printf '%s\n' "$*"; }

fail() {
    printf '%s\n' "$*" >&2
    exit 1
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }

# Prints the first Python of at least 3.11; PYTHON=... goes before all others.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed, and python3 here is" \
        "$(python3 --version 2>/dev/null || echo missing); install one, or set PYTHON=/path/to/python3.11."
}

# check_disk GIB: refuses to begin an installation that would fill the disk.
check_disk() {
    local free_gib
    free_gib=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1024 / 1024))
    if ((free_gib < $1)); then
        fail "$PWD has $free_gib GiB of free disk, but the installation needs $1 GiB; free some, or clone elsewhere."
    fi
}

# quietly LOG COMMAND...: its output goes to LOG only.
quietly() { "${@:2}" >"$1" 2>&1; }

# checksums FILE...: one line for each FILE, of everything that decides what is installed up to it.
# The folder counts too: in a clone that was moved, the scripts in it point to the old place.
checksums() {
    local count kind=cpu
    if has_gpu; then kind=gpu; fi
    for ((count = 1; count <= $#; count++)); do
        { echo "$PWD $kind" && cat "${@:1:count}" "$(overrides)" pyproject.toml launch/_environment.sh; } | cksum
    done
}

# overrides: the file of what STACK pins otherwise.
overrides() { if [[ -n ${STACK:-} ]]; then echo "launch/requirements-$STACK.txt"; else echo /dev/null; fi; }

# pins FILE: the file to install from: FILE, or what it becomes where STACK pins some packages otherwise.
pins() {
    if [[ -z ${STACK:-} ]]; then
        echo "$1"
        return
    fi
    awk -F '==' 'NR == FNR { if (NF == 2) other[$1] = $0; next } $1 in other { $0 = other[$1] } 1' \
        "$(overrides)" "$1" >"$VENV/${1##*/}"
    echo "$VENV/${1##*/}"
}

explain_pip() {
    local log=$1 what=$2
    tail -n 15 "$log" >&2
    if grep -qE 'NewConnectionError|ConnectTimeout|NameResolutionError|ProxyError|from versions: none' "$log"; then
        fail "Installing $what failed because the package index cannot be reached, or lacks it; check the" \
            "network, or set PIP_INDEX_URL to a mirror. Whole log: $log"
    fi
    fail "Installing $what failed; the lines above say why. Whole log: $log"
}

# Without a GPU the CPU build, which is a tenth of the CUDA build: from the configured index if it has
# one, else from PyTorch's own; the build on PyPI (with CUDA, several GB) only if both fail.
install_torch() {
    local log=$1 pin="torch==$TORCH_VERSION"
    local pip=($VENV/bin/python -m pip install --quiet "numpy==$NUMPY_VERSION")
    if has_gpu; then
        # pip takes a CPU build from before the GPU was there for this very version.
        if $VENV/bin/python -m pip freeze | grep "^$pin+cpu" >/dev/null; then
            quietly "$log" $VENV/bin/python -m pip uninstall --yes torch
        fi
    else
        quietly "$log" "${pip[@]}" "$pin+cpu" && return
        quietly "$log" "${pip[@]}" --retries 1 --timeout 20 "$pin" --index-url "$TORCH_CPU_INDEX" && return
        say "      no CPU build found; taking the build on the package index, which may be large"
    fi
    check_disk 12
    quietly "$log" "${pip[@]}" "$pin" || explain_pip "$log" "torch $TORCH_VERSION"
}

make_venv() {
    local python
    python=$(find_python)
    say "[1/4] Python: $("$python" --version 2>&1), environment in $VENV"
    check_disk 4
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv."
    quietly "$VENV.log" "$python" -m venv --clear "$VENV" || fail "making $VENV failed: $(tail -n 1 "$VENV.log")"
    rm -f "$VENV.log"
}

# prepare_environment FILE...: .venv with torch, the pinned FILEs and this package, ready to use.
prepare_environment() {
    local file sums requirements=() log=$VENV/install.log
    sums=$(checksums "$@")
    if ! $VENV/bin/python -c 'import sys' >/dev/null 2>&1; then
        make_venv
    elif grep -qxF "$(tail -n 1 <<<"$sums")" $VENV/installed 2>/dev/null; then
        return
    else
        say "[1/4] Python: $($VENV/bin/python --version 2>&1), environment in $VENV"
    fi
    rm -f $VENV/installed
    say "[2/4] torch $TORCH_VERSION for the $(if has_gpu; then echo GPU; else echo CPU; fi)"
    install_torch "$log"
    say "[3/4] pinned dependencies: $*"
    for file in "$@"; do requirements+=(-r "$(pins "$file")"); done
    quietly "$log" $VENV/bin/python -m pip install --quiet "${requirements[@]}" ||
        explain_pip "$log" "the dependencies"
    say "[4/4] this package"
    quietly "$log" $VENV/bin/python -m pip install --quiet --no-deps -e . || explain_pip "$log" "this package"
    # Last, so that an installation that was interrupted is repeated.
    printf '%s\n' "$sums" >$VENV/installed
}
