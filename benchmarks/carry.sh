#!/usr/bin/env bash
# Prepares a real conversion for a borrowed GPU machine that has no network:
#
#   bash benchmarks/carry.sh [a.b=c ...] [--limit-mib 63] [--without PACKAGE] [--recipe FILE] [--machine FILE]
#
# Fetches what the recipe (recipes/smollm2-8k.yaml) would download there and what is missing there by
# benchmarks/gpu_machine.txt, cuts it into calls that with the repository's own files stay below the limit,
# writes them to .carry/call-N (ignored by git), and prints which folder to carry with which command. The
# other side is benchmarks/convert_on_gpu.sh. Run it again after any change of the tree: what is there and
# whole is kept. Needs Python 3.11 with pip, pydantic, PyYAML and packaging ($PYTHON, else .venv's), PyPI, and
# apt-get for Austen's novels.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
mkdir -p .typing && ln -sfn .. .typing/dense2sparse
export PYTHONPATH="$PWD/.typing:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" benchmarks/carry.py "$@"
