"""Which errors are told in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dense2sparse
from dense2sparse.eval.errors import raised_here

_CHECK = """
import sys
from dense2sparse.eval import report
print(report.__file__)
sys.exit(report.main(["nowhere"]))
"""


def test_mistakes_are_sentences_where_the_package_is_a_link(tmp_path):
    link = tmp_path / "dense2sparse"
    link.symlink_to(Path(dense2sparse.__file__).parent)
    told = subprocess.run(
        [sys.executable, "-c", _CHECK],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.stdout.startswith(str(link)), "imported through the link"
    assert told.returncode == 2
    assert told.stderr.startswith("error: nowhere is not a folder") and told.stderr.count("\n") == 1


def test_code_without_a_file_is_not_ours(monkeypatch):
    monkeypatch.chdir(Path(dense2sparse.__file__).parent)
    try:
        exec(compile("raise ValueError('no sentence')", "<string>", "exec"))
    except ValueError as error:
        assert not raised_here(error)
