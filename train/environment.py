"""`environment.json`: what a run ran on, so that its numbers can be read later."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .files import read_json, write_json

_PACKAGES = (
    "dense2sparse",
    "torch",
    "transformers",
    "deepspeed",
    "datasets",
    "wandb",
    "triton",
    "numpy",
    "safetensors",
)


def describe(*, world_size: int, commit: str) -> dict[str, Any]:
    """Versions, hardware, commit and date of this start."""
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(_memory_gib(), 1),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "world_size": world_size,
        "torch_threads": torch.get_num_threads(),
    }


def write_environment(path: Path, *, world_size: int, commit: str) -> None:
    """Write the description of this start; earlier starts of the same run are kept under `starts`."""
    before = read_json(path)
    now = describe(world_size=world_size, commit=commit)
    starts = [
        *(before.get("starts", []) if before else []),
        {"date": now["date"], "commit": commit},
    ]
    write_json(path, {**now, "starts": starts})


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform's own word below
    return platform.processor() or "unknown"


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
