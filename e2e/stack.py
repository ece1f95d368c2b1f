"""kvplane on a cluster as a user would put it there: images, Helm release, a namespace for services.

Used by `make demo` and by the end-to-end tests, so that both stand on the same path.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from e2e.cluster import binaries, provider, requirements
from e2e.cluster.errors import ClusterError
from e2e.cluster.ports import free_ports
from e2e.cluster.progress import Progress
from e2e.kubectl import get
from images.build import build_images
from images.tools import Tool
from kvplane_api import names

REPOSITORY: Final = Path(__file__).resolve().parents[1]
RELEASE: Final = "kvplane"
SYSTEM_NAMESPACE: Final = "kvplane-system"
IMAGES_VARIABLE: Final = "KVPLANE_IMAGES"
"""Where images were pushed (`make images PUSH=REGISTRY/PATH`), for clusters that pull instead of being loaded."""


@dataclass(frozen=True)
class Images:
    """Full names of the project's images."""

    control: str
    engine: str
    model: str
    ring: str

    @property
    def all(self) -> tuple[str, ...]:
        """Every image that the nodes need."""
        return (self.control, self.engine, self.model, self.ring)

    def values(self) -> dict[str, str]:
        """Chart values for CPU engines from these images."""
        repository, _, tag = self.control.rpartition(":")
        return {
            "image.repository": repository,
            "image.tag": tag,
            "defaults.engineImage": self.engine,
            "defaults.ringImage": self.ring,
            "defaults.accelerator": "",
        }


def prepare_machine(progress: Progress) -> None:
    """Install the packages and build the programs that a cluster on this machine needs; nothing for other clusters."""
    if provider.wanted() is provider.Kind.LOCAL:
        requirements.check(progress)
        binaries.build(progress=progress)


def prepare_images(progress: Progress) -> Images:
    """Bring the images of this checkout up to date, or take the pushed ones that KVPLANE_IMAGES names."""
    recipes = ("control", "engine-cpu", "demo-model", "ring-cpu")
    if pushed := os.environ.get(IMAGES_VARIABLE):
        return Images(*(f"{pushed.rstrip('/')}/{name}:dev" for name in recipes))
    # The cluster of namespaces adopts layers from buildah's store; kind loads what Docker has.
    tool = Tool.BUILDAH if provider.wanted() is provider.Kind.LOCAL else None
    return Images(*build_images(recipes, tool=tool, progress=progress))


RESTRICTED: Final = {
    "pod-security.kubernetes.io/enforce": "restricted",
    "pod-security.kubernetes.io/enforce-version": "latest",
}


def cpu_service(
    name: str, namespace: str, source: str, *, engine: Mapping[str, Any] | None = None, **spec: Any
) -> dict[str, Any]:
    """An LLMService on a small CPU engine; ``engine`` and ``spec`` go over what it says."""
    settings: dict[str, Any] = {
        "dtype": "float32",  # bfloat16 ends in SIGILL on some CPUs
        "blockSize": 32,
        "maxSequences": 16,
        "env": [
            {"name": "VLLM_CPU_KVCACHE_SPACE", "value": "1"},
            # Else each engine pins itself to the first core of the node, and they all share it.
            {"name": "VLLM_CPU_OMP_THREADS_BIND", "value": "nobind"},
            {"name": "OMP_NUM_THREADS", "value": "1"},
            # Else vLLM's CPU build has a third process, its worker, which loads torch once more: 45 s to a start instead of 75.
            {"name": "VLLM_ENABLE_V1_MULTIPROCESSING", "value": "0"},
        ],
        "extraArgs": ["--enforce-eager"],
        "resources": {"requests": {"cpu": "200m", "memory": "1Gi"}, "limits": {"memory": "6Gi"}},
        **(engine or {}),
    }
    defaults = {
        "model": {"source": source},
        "context": {"maxTokens": 2048},
        # What two busy cores can keep; with a GPU's defaults admission would turn away most of what comes.
        "slo": {"ttftMilliseconds": 10_000, "tpotMilliseconds": 1000},
    }
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {**defaults, "engine": settings, **spec},
    }


class StackError(ClusterError):
    """kvplane did not come up on the cluster; the message says what was waited for, and what there was instead."""


@dataclass(frozen=True)
class Stack:
    """A cluster by its kubeconfig, and the programs to speak with it."""

    kubeconfig: Path
    progress: Progress
    programs: Mapping[str, Path]
    """kubectl and helm."""

    @classmethod
    def on(cls, kubeconfig: Path, progress: Progress) -> "Stack":
        """The stack on the cluster of that kubeconfig; builds kubectl and helm if they are not in the cache."""
        programs = binaries.build(binaries.select(["kubernetes", "helm"]), progress=progress)
        return cls(kubeconfig=kubeconfig, progress=progress, programs=programs)

    def kubectl(self, *args: str, stdin: str | None = None, check: bool = True) -> str:
        """Standard output of kubectl."""
        return self._run(str(self.programs["kubectl"]), *args, stdin=stdin, check=check)

    def helm(self, *args: str) -> str:
        """Standard output of helm."""
        return self._run(str(self.programs["helm"]), *args)

    def install(self, images: Images, values: Mapping[str, str] | None = None) -> None:
        """Install or upgrade the release, under pod security `restricted`, and wait until the operator is there."""
        self.make_namespace(SYSTEM_NAMESPACE)
        settings = {**images.values(), **(values or {})}
        flags = [flag for name, value in settings.items() for flag in ("--set", f"{name}={value}")]
        self.helm(
            "upgrade", "--install", RELEASE, str(REPOSITORY / "charts/kvplane"),
            "--namespace", SYSTEM_NAMESPACE, "--wait", "--timeout", "5m", *flags,
        )  # fmt: skip

    def make_namespace(self, name: str, labels: Mapping[str, str] = RESTRICTED) -> None:
        """A namespace for services, which enforces pod security `restricted` unless told otherwise."""
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": dict(labels)}})

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """kubectl apply."""
        self.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))

    def get(self, namespace: str, *what: str) -> Any:
        """See :func:`e2e.kubectl.get`."""
        return get(self.kubectl, namespace, *what)

    def conditions(self, namespace: str, service: str) -> dict[str, dict[str, Any]]:
        """The conditions of an LLMService by type."""
        found = self.get(namespace, "llmservice", service) or {}
        return {c["type"]: c for c in found.get("status", {}).get("conditions", ())}

    def wait_ready(self, namespace: str, service: str, *, seconds: float = 600.0) -> None:
        """Wait for the condition Ready, showing what it says meanwhile; raises StackError with its message."""
        with self.progress.step(f"LLMService {namespace}/{service}") as step:
            end = time.monotonic() + seconds
            while True:
                ready = self.conditions(namespace, service).get("Ready", {})
                step.detail = ready.get("reason", "not seen by the operator yet")
                if ready.get("status") == "True":
                    return
                if time.monotonic() > end:
                    raise StackError(
                        f"LLMService {namespace}/{service} was not Ready within {seconds:.0f} s: "
                        f"{ready.get('reason')}: {ready.get('message')}"
                    )
                time.sleep(0.5)

    def wait_for(self, namespace: str, service: str, field: str, value: object, *, seconds: float = 300.0) -> None:
        """Wait for a field of an LLMService's status to have a value; raises StackError."""
        with self.progress.step(f"LLMService {namespace}/{service}: {field} {value}"):
            end = time.monotonic() + seconds
            while (status := self.get(namespace, "llmservice", service).get("status", {})).get(field) != value:
                if time.monotonic() > end:
                    raise StackError(
                        f"{field} of {namespace}/{service} was not {value} within {seconds:.0f} s: {status}"
                    )
                time.sleep(0.5)

    @contextmanager
    def forward(self, namespace: str, target: str, port: int) -> Iterator[str]:
        """The base URL of a port of a pod or Service, through kubectl port-forward: works on any cluster."""
        (local,) = free_ports(1)
        command = [str(self.programs["kubectl"]), "port-forward", "-n", namespace, target, f"{local}:{port}"]
        process = subprocess.Popen(command, env=self._environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _await_port(local, process)
            yield f"http://127.0.0.1:{local}"
        finally:
            process.terminate()
            process.wait()

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig)}

    def _run(self, *command: str, stdin: str | None = None, check: bool = True) -> str:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, env=self._environment(), check=False
        )
        if check and done.returncode:
            raise StackError(f"{' '.join(command[:6])} … failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if process.poll() is not None:
            assert process.stderr is not None
            raise StackError(f"kubectl port-forward ended: {process.stderr.read().decode().strip()}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise StackError("kubectl port-forward did not listen within 20 s.")
