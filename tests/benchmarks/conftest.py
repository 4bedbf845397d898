"""The benchmarks are scripts, so their folder goes on the path; kernels run in Triton's interpreter."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Triton reads it where a kernel is defined, so it must stand before the first import of one.
os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
