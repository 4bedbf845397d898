"""Which packages a machine without network lacks, and their wheels; part of carry.sh.

    python benchmarks/carry_wheels.py check FOLDER     there: do the packages in FOLDER find what they need?

Versions are those of launch/requirements.txt. What the machine has is a text file (gpu_machine.txt).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from carry_parts import CarryError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
"""Tags of wheels with compiled parts, any machine of the last years; pip takes each to the letter."""


@dataclass(frozen=True)
class Machine:
    """A Linux machine of 64 bits (x86): its Python and packages, None where the version is not known."""

    python: str
    packages: Mapping[str, str | None]

    def has(self, requirement: Requirement) -> bool:
        """Whether a package is there, and not in a version that is known to be wrong."""
        name = canonicalize_name(requirement.name)
        version = self.packages.get(name)
        known = version is not None
        return name in self.packages and (not known or fits(requirement, version))

    def wants(self, requirement: Requirement) -> bool:
        """Whether the requirement's marker is true there; extras are never asked for."""
        there = {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "platform_machine": "x86_64",
            "platform_system": "Linux",
            "sys_platform": "linux",
            "os_name": "posix",
            "extra": "",
        }
        return requirement.marker is None or requirement.marker.evaluate(there)


def read_machine(path: Path) -> Machine:
    """The list of a machine's packages.

    Raises:
        CarryError: a line is not `name` or `name==version`, or none says the Python.
    """
    packages: dict[str, str | None] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)(?:==(\S+))?", line)
        if not match:
            raise CarryError(f"{path}, line {number}: {line!r} is not `name` or `name==version`")
        packages[canonicalize_name(match[1])] = match[2]
    python = packages.pop("python", None)
    if python is None:
        raise CarryError(f"{path} does not say which Python is there: add a line like python==3.12")
    return Machine(python, packages)


def read_pins(path: Path) -> dict[str, str]:
    """Canonical name -> version of the pinned requirements."""
    pins: dict[str, str] = {}
    for line in path.read_text().splitlines():
        name, equals, version = line.partition("#")[0].strip().partition("==")
        if equals:
            pins[canonicalize_name(name)] = version
    return pins


def fits(requirement: Requirement, version: str | None) -> bool:
    """Whether a version meets a requirement; pre-releases and local versions count as versions."""
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def lacking(
    roots: Iterable[Requirement],
    machine: Machine,
    pins: Mapping[str, str],
    fetch: Callable[[str, str], Path],
) -> list[Path]:
    """Wheels of everything the roots need and the machine lacks, in the order in which it is found.

    Args:
        fetch: (name, version) -> wheel.

    Raises:
        CarryError: a package that is needed and not pinned, or pinned to a version that does not fit.
    """
    found: dict[str, Path] = {}
    queue = [(requirement, "the package") for requirement in roots]
    while queue:
        requirement, by = queue.pop(0)
        name = canonicalize_name(requirement.name)
        if not machine.wants(requirement) or machine.has(requirement):
            continue
        version = pins.get(name)
        if not fits(requirement, version):
            raise CarryError(
                f"{by} needs {requirement}, which the machine lacks and launch/requirements.txt "
                f"{f'pins to {version}' if version else 'does not pin'}: add it there, or name it in the "
                "machine's list if it is there"
            )
        if name not in found:
            assert version is not None
            found[name] = fetch(name, version)
            queue += [(needed, f"{name}=={version}") for needed in requirements_of(found[name])]
    return list(found.values())


def requirements_of(wheel: Path) -> list[Requirement]:
    """What a wheel's metadata says it needs."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode("utf-8").split("\n\n")[0].splitlines()
    prefix = "requires-dist:"
    return [Requirement(line[len(prefix) :]) for line in lines if line.lower().startswith(prefix)]


def fetch_wheel(name: str, version: str, into: Path, *, python: str) -> Path:
    """A wheel for the machine: from the index, or built here where it has nothing to compile.

    Raises:
        CarryError: the index has none, and building gives one for this machine only.
    """
    target = ["--python-version", python, "--implementation", "cp"]
    target += [word for tag in PLATFORMS for word in ("--platform", tag)]
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        # Only wheels, so nothing of a package runs here.
        said = _pip(
            "download", "--only-binary", ":all:", *target, "-d", scratch, f"{name}=={version}"
        )
        if said:
            said = _pip("wheel", "-w", scratch, f"{name}=={version}")
        made = sorted(Path(scratch).glob("*.whl"))
        if said or not made:
            raise CarryError(
                f"{name}=={version} can neither be downloaded as a wheel nor built ({said or 'no file'}): "
                "check the connection to the package index"
            )
        if not re.search(r"(py3|cp\d+)-\S*-(any|\S*x86_64)\.whl$", made[0].name) or (
            "linux_x86_64" in made[0].name and "manylinux" not in made[0].name
        ):
            raise CarryError(f"{made[0].name} was built for this machine and may not run elsewhere")
        return made[0].replace(into / made[0].name)


def _pip(command: str, *words: str) -> str:
    """pip without dependencies; "" if it succeeded, else the last line that it said."""
    full = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--no-input"]
    full += ["--disable-pip-version-check", *words]
    # DeepSpeed has no wheel on the index; without its compiled operations it is plain Python.
    environ = {**os.environ, "DS_BUILD_OPS": "0"}
    done = subprocess.run(full, env=environ, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or [f"exit code {done.returncode}"])[-1]


def unmet(folder: Path, machine: Machine) -> list[str]:
    """What the packages in a folder need of this Python's packages and do not find, one sentence each."""
    said = []
    for package in importlib.metadata.distributions(path=[str(folder)]):
        for line in package.requires or ():
            requirement = Requirement(line)
            if not machine.wants(requirement):
                continue
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                version = None
            if not fits(requirement, version):
                said.append(f"{package.name} needs {requirement}, found {version or 'none'}")
    return said


def main() -> int:
    """`check FOLDER`: exit code 2 and a line for every need that is not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("check",))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    said = unmet(options.folder, Machine(python, {}))
    for line in said:
        print(line, file=sys.stderr)
    if not said:
        print(f"every need of the packages in {options.folder} is met")
    return 2 if said else 0


if __name__ == "__main__":
    sys.exit(main())
