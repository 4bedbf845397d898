"""What this machine offers to a run, found out without importing torch.

Called by `launch.cli`. Only NVIDIA devices are looked for; everything else is CPU ranks.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping


def visible_gpus(environ: Mapping[str, str]) -> list[int]:
    """Indices of the GPUs that a run may use; empty on a machine without any.

    CUDA_VISIBLE_DEVICES is honoured, also with `GPU-...` names. The DeepSpeed launcher is then told the
    numbers, because it ignores that variable where it is told how many devices to use.

    Raises:
        ValueError: CUDA_VISIBLE_DEVICES names a device that does not exist here.
    """
    if environ.get("DS_ACCELERATOR") == "cpu":
        return []
    uuids = _list_gpus(environ)
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None or not uuids:
        return list(range(len(uuids)))
    found: list[int] = []
    for name in (part.strip() for part in wanted.split(",")):
        if name in ("", "-1"):
            break
        matches = [i for i, uuid in enumerate(uuids) if uuid.startswith(name)]
        if name.isdecimal() and int(name) < len(uuids):
            found.append(int(name))
        elif name.startswith("GPU-") and len(matches) == 1:
            found.append(matches[0])
        else:
            raise ValueError(
                f"CUDA_VISIBLE_DEVICES={wanted}: {name!r} is none of this machine's {len(uuids)} GPUs; "
                "use their numbers"
            )
    return found


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _list_gpus(environ: Mapping[str, str]) -> list[str]:
    """UUIDs in index order, from `nvidia-smi -L`."""
    command = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if command is None:
        return []
    try:
        listing = subprocess.run(
            [command, "-L"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []  # a driver that does not answer cannot be trained on either
    if listing.returncode != 0:
        return []
    return re.findall(r"^GPU \d+:.*\(UUID: (\S+)\)", listing.stdout, flags=re.MULTILINE)
