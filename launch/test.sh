#!/usr/bin/env bash
# The test suite in an environment of its own:
#
#   ./launch/test.sh [pytest arguments]               for example tests/recipes -x
#   STACK=torch-2.11 ./launch/test.sh                 the same with torch 2.11, Triton 3.6, transformers 5.17
#   TEST_WORKERS=0 ./launch/test.sh                   in one process, for a debugger; default: one a core, at most 4
#
# Style and types first, since they take seconds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_environment.sh
source launch/_environment.sh

prepare_environment launch/requirements.txt launch/requirements-test.txt
export PATH="$PWD/$VENV/bin:$PATH"
# Tiny models: threads cost more than they give, and ranks must not fight over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

SECONDS=0
status=0
step() {
    say "== $1"
    shift
    "$@" || status=1
}

step "ruff check" ruff check .
step "ruff format" ruff format --check .
# mypy needs a folder that is called like the package; .typing/dense2sparse is a link to this one.
mkdir -p .typing
ln -sfn .. .typing/dense2sparse
packages=()
for folder in recipes kernels data model train eval launch; do
    if compgen -G "$folder/*.py" >/dev/null; then packages+=(-p "dense2sparse.$folder"); fi
done
step "mypy" env MYPYPATH=.typing mypy "${packages[@]}"
# At most four: each holds torch, and its tests start processes of their own.
workers=$(env -u OMP_NUM_THREADS nproc)
workers=${TEST_WORKERS:-$((workers < 4 ? workers : 4))}
# A file's tests stay together, since they share what is dear to make.
step "pytest" python -m pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder "$@"

if ((status)); then
    say "FAILED after $SECONDS s"
else
    say "passed in $SECONDS s"
fi
exit "$status"
