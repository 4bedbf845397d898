"""Fixture of the launch tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from toy_cluster import ToyCluster  # noqa: E402


@pytest.fixture
def cluster(tmp_path: Path) -> ToyCluster:
    """A fresh folder with the toy recipe."""
    return ToyCluster(tmp_path)
