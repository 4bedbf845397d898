"""Environment variables for the other nodes of a pdsh run.

DeepSpeed carries over only its own list of variables, plus the lines of a `.deepspeed_env` file, in which
a blank line or a comment is a crash. `private_env_file` writes such a file from the environment and the
user's own files, readable by the user alone, and removes it afterwards. The user's files are not touched.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PREFIXES = ("WANDB_", "HF_", "TRANSFORMERS_", "DS_")
NAMES = ("HUGGING_FACE_HUB_TOKEN", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR")
NOT_FORWARDED = ("DS_ENV_FILE", "WANDB_DIR", "WANDB_SERVICE")


@contextmanager
def private_env_file(environ: Mapping[str, str], bin_folder: Path) -> Iterator[Path]:
    """A file for DS_ENV_FILE, mode 600, that exists as long as the context.

    Args:
        environ: where the variables are taken from.
        bin_folder: put first on the PATH of the other nodes, which find ninja there.

    Yields:
        Absolute path of the file.
    """
    handle, name = tempfile.mkstemp(prefix="dense2sparse-env-")  # mkstemp makes it mode 600
    try:
        with os.fdopen(handle, "w") as file:
            file.writelines(line + "\n" for line in env_lines(environ, bin_folder))
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def env_lines(environ: Mapping[str, str], bin_folder: Path) -> list[str]:
    """`NAME=value` lines in DeepSpeed's form: the user's first, ours after them.

    Empty values are left out. A value that cannot cross two shells unharmed (a line break, or pdsh's own
    `%h`, `%n`, `%u`, `%%`) is left out with a line on stderr that names the variable, not its value.
    """
    lines = _user_lines(environ)
    for name, value in sorted(environ.items()):
        if name in NOT_FORWARDED or not (name.startswith(PREFIXES) or name in NAMES):
            continue
        if not value.strip():
            continue
        if re.search(r"[\r\n]|%[hnu%]", value):
            print(
                f"dense2sparse: {name} is not passed to the other nodes: its value holds a line break "
                "or one of %h %n %u %%, which pdsh would change",
                file=sys.stderr,
            )
            continue
        # DeepSpeed puts such values between double quotes without escaping what is inside.
        lines.append(f"{name}=" + re.sub(r'([\\"$`])', r"\\\1", value))
    # Not escaped: the other node's own PATH is meant.
    return [*lines, f"PATH={bin_folder}:$PATH"]


def _user_lines(environ: Mapping[str, str]) -> list[str]:
    """Lines of the user's own files, which DS_ENV_FILE would otherwise replace."""
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    lines: list[str] = []
    # dict: an absolute DS_ENV_FILE is the same path twice.
    for file in dict.fromkeys(Path(folder) / name for folder in (Path.home(), Path.cwd())):
        if file.is_file():
            stripped = (line.strip() for line in file.read_text().splitlines())
            lines += [li for li in stripped if "=" in li and not li.startswith("#")]
    return lines
