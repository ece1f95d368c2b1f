"""Which cluster the demo and the end-to-end tests run on: our own, kind's, or one that is there already.

KVPLANE_CLUSTER=local        (default) nodes made on this machine, see cluster.py; the only one with faults
KVPLANE_CLUSTER=kind         a cluster of kind's, which must be installed, as must Docker
KVPLANE_CLUSTER=kubeconfig   the cluster of $KUBECONFIG, used as it is; it must be able to pull the images
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from e2e.cluster import cache
from e2e.cluster.cluster import Cluster
from e2e.cluster.commands import run
from e2e.cluster.errors import ClusterStateError, CommandError, RequirementError
from e2e.cluster.progress import Progress
from e2e.cluster.spec import ClusterSpec

VARIABLE = "KVPLANE_CLUSTER"
KIND_READY = "180s"


class Kind(StrEnum):
    """The values of KVPLANE_CLUSTER."""

    LOCAL = "local"
    KIND = "kind"
    KUBECONFIG = "kubeconfig"


class Provider(Protocol):
    """What the demo needs of any cluster."""

    @property
    def kubeconfig(self) -> Path:
        """For KUBECONFIG, once it is up."""

    def up(self) -> None:
        """Have it up, every node Ready."""

    def load(self, images: Sequence[str]) -> None:
        """Have images on every node."""

    def down(self) -> None:
        """Remove it, if it is ours to remove."""

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """The stdout of `kubectl ARGUMENTS`."""


def wanted(environment: Mapping[str, str] = os.environ) -> Kind:
    """What KVPLANE_CLUSTER says.

    Raises:
        ClusterStateError: it says something else.
    """
    value = environment.get(VARIABLE) or Kind.LOCAL
    try:
        return Kind(value)
    except ValueError:
        raise ClusterStateError(f"{VARIABLE} is {value!r}; give {', '.join(Kind)} or leave it unset.") from None


def existing_cluster(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The kubeconfig of the cluster that we were told to use as it is; None where we are to make one.

    Raises:
        ClusterStateError: we were told so, and there is none.
    """
    if wanted(environment) is not Kind.KUBECONFIG:
        return None
    named = environment.get("KUBECONFIG", "").split(os.pathsep)[0]
    path = Path(named) if named else Path.home() / ".kube" / "config"
    if not path.is_file():
        raise ClusterStateError(
            f"{VARIABLE}=kubeconfig asks for the cluster of a kubeconfig, but there is no file {path}: set KUBECONFIG."
        )
    return path.absolute()


def resolve(
    spec: ClusterSpec | None = None,
    *,
    environment: Mapping[str, str] = os.environ,
    progress: Progress | None = None,
) -> Provider:
    """The cluster to run on.

    Raises:
        ClusterStateError: KVPLANE_CLUSTER or KUBECONFIG make no sense.
        RequirementError: kind is asked for and not installed.
    """
    spec, progress = spec or ClusterSpec(), progress or Progress()
    match wanted(environment):
        case Kind.LOCAL:
            return Cluster(spec, progress=progress)
        case Kind.KIND:
            if missing := [program for program in ("kind", "docker", "kubectl") if shutil.which(program) is None]:
                raise RequirementError(
                    f"{VARIABLE}=kind needs {' and '.join(missing)}: install it, or leave {VARIABLE} unset to run "
                    "nodes on this machine without Docker (as root)."
                )
            return KindCluster(spec, progress)
        case Kind.KUBECONFIG:
            kubeconfig = existing_cluster(environment)
            assert kubeconfig is not None
            return GivenCluster(kubeconfig, progress)


@dataclass(frozen=True)
class KindCluster:
    """A cluster of kind's: its nodes are Docker containers, so that Docker's images can be loaded into them."""

    spec: ClusterSpec
    progress: Progress = field(repr=False)

    @property
    def kubeconfig(self) -> Path:
        return cache.clusters() / f"{self.spec.name}.kind-kubeconfig"

    def up(self) -> None:
        cache.clusters().mkdir(parents=True, exist_ok=True)
        target = ("--name", self.spec.name, "--kubeconfig", str(self.kubeconfig))
        if self.spec.name in run("kind", "get", "clusters").split():
            run("kind", "export", "kubeconfig", *target)
            return
        with self.progress.step(f"kind cluster {self.spec.name} with {self.spec.nodes} nodes"):
            run("kind", "create", "cluster", *target, "--wait", KIND_READY, "--config", "-", stdin=self.config())

    def config(self) -> str:
        """kind's configuration (JSON, which is YAML): a control plane and the nodes, with image volumes on."""
        return json.dumps(
            {
                "kind": "Cluster",
                "apiVersion": "kind.x-k8s.io/v1alpha4",
                "featureGates": {"ImageVolume": True},
                "nodes": [{"role": "control-plane"}, *({"role": "worker"} for _ in range(self.spec.nodes))],
            }
        )

    def load(self, images: Sequence[str]) -> None:
        for image in images:
            kind = "image-archive" if Path(image).is_file() else "docker-image"
            with self.progress.step(f"image {image}"):
                run("kind", "load", kind, image, "--name", self.spec.name)

    def down(self) -> None:
        with self.progress.step(f"kind cluster {self.spec.name} removed"):
            run("kind", "delete", "cluster", "--name", self.spec.name, "--kubeconfig", str(self.kubeconfig))
        self.kubeconfig.unlink(missing_ok=True)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return run("kubectl", f"--kubeconfig={self.kubeconfig}", *arguments, stdin=stdin)


@dataclass(frozen=True)
class GivenCluster:
    """A cluster of somebody's: neither made nor removed, and images cannot be put on its nodes."""

    kubeconfig: Path
    progress: Progress = field(repr=False)

    def up(self) -> None:
        try:
            self.kubectl("get", "--raw", "/readyz")
        except CommandError as error:
            raise ClusterStateError(f"The cluster of {self.kubeconfig} does not answer: {error}") from None
        self.progress.say(f"Using the cluster of {self.kubeconfig} as it is.")

    def load(self, images: Sequence[str]) -> None:
        self.progress.say(
            f"The nodes must be able to pull {', '.join(images)}: push them to a registry that they reach with "
            "`make images PUSH=REGISTRY/PATH`, and install with images from there."
        )

    def down(self) -> None:
        self.progress.say(f"The cluster of {self.kubeconfig} is not ours: it stays as it is.")

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        if shutil.which("kubectl") is None:
            raise RequirementError("kubectl is missing: install it from your distribution or from kubernetes.io.")
        return run("kubectl", f"--kubeconfig={self.kubeconfig}", *arguments, stdin=stdin)
