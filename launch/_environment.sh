# shellcheck shell=bash
# The environment of quickstart.sh and test.sh: finds Python, makes .venv, installs pinned versions.
# Sourced, not run. Call `prepare_environment requirements-file ...` with the repository as the
# working directory; a second call with nothing changed takes a fraction of a second.

TORCH_VERSION=2.13.0
NUMPY_VERSION=2.4.6
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
# The folder counts too: in a clone that was moved, the scripts in .venv point to the old place.
checksums() {
    local count kind=cpu
    if has_gpu; then kind=gpu; fi
    for ((count = 1; count <= $#; count++)); do
        { echo "$PWD $kind" && cat "${@:1:count}" pyproject.toml launch/_environment.sh; } | cksum
    done
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
    local pip=(.venv/bin/python -m pip install --quiet "numpy==$NUMPY_VERSION")
    if has_gpu; then
        # pip takes a CPU build from before the GPU was there for this very version.
        if .venv/bin/python -m pip freeze | grep "^$pin+cpu" >/dev/null; then
            quietly "$log" .venv/bin/python -m pip uninstall --yes torch
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
    say "[1/4] Python: $("$python" --version 2>&1), environment in .venv"
    check_disk 4
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv."
    quietly .venv.log "$python" -m venv --clear .venv || fail "making .venv failed: $(tail -n 1 .venv.log)"
    rm -f .venv.log
}

# prepare_environment FILE...: .venv with torch, the pinned FILEs and this package, ready to use.
prepare_environment() {
    local file sums requirements=() log=.venv/install.log
    for file in "$@"; do requirements+=(-r "$file"); done
    sums=$(checksums "$@")
    if ! .venv/bin/python -c 'import sys' >/dev/null 2>&1; then
        make_venv
    elif grep -qxF "$(tail -n 1 <<<"$sums")" .venv/installed 2>/dev/null; then
        return
    else
        say "[1/4] Python: $(.venv/bin/python --version 2>&1), environment in .venv"
    fi
    rm -f .venv/installed
    say "[2/4] torch $TORCH_VERSION for the $(if has_gpu; then echo GPU; else echo CPU; fi)"
    install_torch "$log"
    say "[3/4] pinned dependencies: $*"
    quietly "$log" .venv/bin/python -m pip install --quiet "${requirements[@]}" ||
        explain_pip "$log" "the dependencies"
    say "[4/4] this package"
    quietly "$log" .venv/bin/python -m pip install --quiet --no-deps -e . || explain_pip "$log" "this package"
    # Last, so that an installation that was interrupted is repeated.
    printf '%s\n' "$sums" >.venv/installed
}
