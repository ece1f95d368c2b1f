"""The cluster's programs, built from pinned Go modules and kept by what they are built from.

No release archive is downloaded: a Go module proxy and go.sum are all that is trusted. Each component is one folder in
`modules/` with a go.mod whose `tool` lines name the programs; its result lies in `bin/NAME-KEY/` of the cache, where KEY
hashes go.mod, go.sum, the flags and the toolchain. A folder appears by rename when it is whole, so a killed build leaves
nothing that could be taken for a result, and two builds at once wait for each other.

A component of somebody else (a peer's controller in a benchmark) is built the same way: make a `Component` whose
`module` is its own folder.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from e2e.cluster import cache, requirements, toolchain
from e2e.cluster.errors import BuildError, ClusterStateError, RequirementError
from e2e.cluster.locks import exclusive
from e2e.cluster.progress import Progress, Step

GIB = 2**30
DISK_COLD = 10 * GIB
"""Go's caches after building everything have 9 GiB."""
DISK_WARM = 2 * GIB

MODULES = Path(__file__).resolve().parent / "modules"


@dataclass(frozen=True)
class Component:
    """The programs built from one Go module."""

    name: str
    module: Path
    """Folder with the go.mod and go.sum."""
    programs: Mapping[str, str]
    """Program name to the Go package that it is built from."""
    tags: tuple[str, ...] = ()
    ldflags: tuple[str, ...] = ()
    """Beside `-s -w`; `{version}` stands for the version of `versioned_by` in go.mod."""
    versioned_by: str = field(default="")
    """The Go module whose version the component is known by."""

    def version(self) -> str:
        """The version that go.mod pins, such as "v1.36.3"; "" where the component names no module."""
        return module_version((self.module / "go.mod").read_text(), self.versioned_by) if self.versioned_by else ""

    def linker_flags(self) -> str:
        return " ".join(["-s", "-w", *(flag.format(version=self.version()) for flag in self.ldflags)])


_KUBERNETES = "k8s.io/kubernetes"
_CONTAINERD = "github.com/containerd/containerd/v2"

COMPONENTS: tuple[Component, ...] = (
    Component(
        name="kubernetes",
        module=MODULES / "kubernetes",
        versioned_by=_KUBERNETES,
        programs={
            name: f"{_KUBERNETES}/cmd/{name}"
            for name in (
                "kube-apiserver",
                "kubectl",
                "kube-controller-manager",
                "kube-scheduler",
                "kubelet",
                "kube-proxy",
            )
        },
        ldflags=(
            "-X k8s.io/component-base/version.gitVersion={version}",
            "-X k8s.io/client-go/pkg/version.gitVersion={version}",
        ),
    ),
    Component(
        name="etcd",
        module=MODULES / "etcd",
        versioned_by="go.etcd.io/etcd/server/v3",
        programs={"etcd": "go.etcd.io/etcd/server/v3"},
    ),
    Component(
        name="containerd",
        module=MODULES / "containerd",
        versioned_by=_CONTAINERD,
        programs={name: f"{_CONTAINERD}/cmd/{name}" for name in ("containerd", "containerd-shim-runc-v2", "ctr")},
        tags=("no_btrfs", "no_devmapper", "no_zfs"),
    ),
    Component(
        name="coredns",
        module=MODULES / "coredns",
        versioned_by="github.com/coredns/coredns",
        programs={"coredns": "github.com/coredns/coredns"},
    ),
    Component(
        name="helm",
        module=MODULES / "helm",
        versioned_by="helm.sh/helm/v4",
        programs={"helm": "helm.sh/helm/v4/cmd/helm"},
    ),
)
"""What clusters are made of and worked with."""

_PROMETHEUS = "github.com/prometheus/prometheus"

PROMETHEUS = Component(
    name="prometheus",
    module=MODULES / "prometheus",
    versioned_by=_PROMETHEUS,
    programs={name: f"{_PROMETHEUS}/cmd/{name}" for name in ("prometheus", "promtool")},
    # Discovery by Kubernetes only, which halves the build; the web pages are not in the module.
    tags=("netgo", "remove_all_sd", "enable_kubernetes_sd"),
    ldflags=("-X github.com/prometheus/common/version.Version={version}",),
)
"""For the tests of metrics, alerts and dashboards; no part of a cluster."""

KNOWN: tuple[Component, ...] = (*COMPONENTS, PROMETHEUS)


def module_version(go_mod: str, module: str) -> str:
    """The version that the text of a go.mod requires of `module`.

    Raises:
        BuildError: go.mod does not require the module.
    """
    found = re.search(rf"^\s*(?:require\s+)?{re.escape(module)}\s+(v\S+)", go_mod, re.MULTILINE)
    if not found:
        raise BuildError(f"go.mod does not require {module}: run `go get -tool` for it in its folder in {MODULES}.")
    return found.group(1)


def select(names: Sequence[str]) -> tuple[Component, ...]:
    """The components of these names, in building order; those of a cluster for no name.

    Raises:
        ClusterStateError: there is no such component.
    """
    known = {component.name for component in KNOWN}
    if unknown := sorted(set(names) - known):
        raise ClusterStateError(f"There is no component {unknown[0]!r}; the components are {', '.join(sorted(known))}.")
    return tuple(component for component in KNOWN if component.name in names) if names else COMPONENTS


def key(component: Component, go_version: str) -> str:
    """12 hex digits that change when anything that the programs are built from changes."""
    digest = hashlib.sha256()
    for part in (
        (component.module / "go.mod").read_bytes(),
        (component.module / "go.sum").read_bytes(),
        repr(sorted(component.programs.items())).encode(),
        repr((component.tags, component.linker_flags(), go_version)).encode(),
    ):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:12]


def build(components: Iterable[Component] = COMPONENTS, *, progress: Progress | None = None) -> dict[str, Path]:
    """Program name to file of every program of `components`, built where they are not in the cache.

    A cold build of all takes about 15 minutes on 2 cores and 8 GiB of disk; a filled cache some 50 ms.

    Raises:
        RequirementError: there is no Go toolchain, or too little disk.
        BuildError: a module could not be downloaded or did not compile.
    """
    wanted, progress = tuple(components), progress or Progress()
    needed = max(toolchain.required_version((c.module / "go.mod").read_text()) for c in wanted)
    go = toolchain.find(needed, progress)
    programs: dict[str, Path] = {}
    for component in wanted:
        folder = cache.binaries() / f"{component.name}-{key(component, go.version)}"
        if not folder.exists():
            cache.binaries().mkdir(parents=True, exist_ok=True)
            lock = cache.binaries() / f".{component.name}.lock"
            with exclusive(lock, waiting_for=f"another build of {component.name}", progress=progress):
                if not folder.exists():
                    _build(component, folder, go, progress)
        programs |= {name: folder / name for name in component.programs}
    return programs


def download_source(component: Component, module: str) -> None:
    """Have the source of a module of `component` in the module cache, for what is made from it without Go.

    Raises:
        RequirementError: there is no Go toolchain.
        BuildError: it could not be downloaded.
    """
    go = toolchain.find(toolchain.required_version((component.module / "go.mod").read_text()), Progress(quiet=True))
    _lines([go.go, "mod", "download", module], component, go, Step("download"))


def _build(component: Component, folder: Path, go: toolchain.Toolchain, progress: Progress) -> None:
    if problem := requirements.disk(DISK_WARM if (cache.go() / "build").exists() else DISK_COLD):
        raise RequirementError(problem)
    for left in cache.binaries().glob(f".{component.name}-*.tmp"):  # of builds that were killed: we hold the lock
        shutil.rmtree(left)
    out = Path(tempfile.mkdtemp(prefix=f".{component.name}-", suffix=".tmp", dir=cache.binaries()))
    packages = list(component.programs.values())
    flags = ["-trimpath", "-tags", ",".join(component.tags), "-ldflags", component.linker_flags()]
    with progress.step(f"build {component.name} {component.version()}") as step:
        step.detail = "downloading modules"
        total = len(_lines([go.go, "list", "-deps", *flags[:3], *packages], component, go, step))
        step.detail = "linking"
        compiled = _lines([go.go, "build", "-v", *flags, "-o", f"{out}/", *packages], component, go, step, total=total)
        step.detail = f"{len(compiled)} of {total} packages compiled"
    for name, package in component.programs.items():
        if not (out / name).exists():  # Go names a program after its package, which for etcd is "server"
            (out / _go_name(package)).rename(out / name)
    out.chmod(0o755)
    out.rename(folder)


def _go_name(package: str) -> str:
    """The file name that `go build` gives the program of a package: its last part that is no major version."""
    parts = package.split("/")
    return parts[-2] if re.fullmatch(r"v\d+", parts[-1]) else parts[-1]


def _lines(
    command: Sequence[str | os.PathLike[str]],
    component: Component,
    go: toolchain.Toolchain,
    step: Step,
    total: int = 0,
) -> list[str]:
    """What a go command prints, line by line into the step's detail.

    `go build -v` names a package when it starts to compile it and is silent about cached ones, so the count against
    `total` is a sign of life, not a percentage.
    """
    lines: list[str] = []
    with subprocess.Popen(
        command,
        cwd=component.module,
        env=go.environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("go: downloading"):
                    step.detail = line.strip()
                    continue
                lines.append(line.rstrip())
                if total:
                    step.detail = f"{len(lines)} of {total} packages"
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        tail = "\n".join(lines)[-3000:]
        raise BuildError(
            f"go could not build {component.name} in {component.module}. Where modules cannot be downloaded, set "
            f"GOPROXY to a proxy that this machine reaches; the compiler needs some 2 GiB of memory.\n{tail}"
        )
    return lines
