"""helm as the tests call it: the pinned binary, with its own empty home, on the chart of this repository."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from charts.generate import CHART
from e2e.cluster import binaries
from e2e.cluster.progress import Progress

RELEASE = "kvplane"
NAMESPACE = "kvplane-system"

Manifest = dict[str, Any]


@cache
def program() -> Path:
    return binaries.build(binaries.select(["helm"]), progress=Progress(quiet=True))["helm"]


@dataclass(frozen=True)
class Done:
    """What a helm command printed, and whether it succeeded."""

    succeeded: bool
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Helm:
    """helm with a home of its own and, where there is one, a cluster."""

    home: Path
    kubeconfig: Path | None = None

    def run(self, *arguments: str, values: Mapping[str, object] | None = None) -> Done:
        """Run it; `values` are laid over those of the arguments, by path: {"crds.install": False}."""
        environment = {
            "PATH": os.defpath,
            "HOME": str(self.home),
            "KUBECONFIG": str(self.kubeconfig or self.home / "no-cluster"),
        }
        more = [f"--set-json={path}={json.dumps(value)}" for path, value in (values or {}).items()]
        done = subprocess.run(
            [program(), *arguments, *more], env=environment, capture_output=True, text=True, check=False
        )
        return Done(done.returncode == 0, done.stdout, done.stderr)

    def must(self, *arguments: str, values: Mapping[str, object] | None = None) -> str:
        """Run it; its stdout. It has to succeed."""
        done = self.run(*arguments, values=values)
        assert done.succeeded, f"helm {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def render(
        self, *arguments: str, values: Mapping[str, object] | None = None, release: str = RELEASE, chart: Path = CHART
    ) -> "Rendered":
        """What `helm template` makes of the chart, hooks included."""
        text = self.must("template", release, str(chart), f"--namespace={NAMESPACE}", *arguments, values=values)
        return Rendered(tuple(m for m in yaml.load_all(text, Loader=yaml.CSafeLoader) if m))


@dataclass(frozen=True)
class Rendered:
    """The objects of a release."""

    manifests: tuple[Manifest, ...]

    def of(self, kind: str) -> list[Manifest]:
        return [m for m in self.manifests if m["kind"] == kind]

    def one(self, kind: str, *, name: str = "") -> Manifest:
        """The only object of a kind (whose name is `name`)."""
        found = [m for m in self.of(kind) if name in ("", m["metadata"]["name"])]
        assert len(found) == 1, f"{len(found)} of {kind} {name}"
        return found[0]

    @property
    def pod(self) -> Manifest:
        """The pod template of the operator."""
        template: Manifest = self.one("Deployment")["spec"]["template"]
        return template

    @property
    def operator(self) -> Manifest:
        """The operator's container."""
        container: Manifest = self.pod["spec"]["containers"][0]
        return container

    @property
    def selftest(self) -> Manifest:
        """The container of `helm test`."""
        container: Manifest = self.one("Pod")["spec"]["containers"][0]
        return container


def environment(container: Manifest, *, pod: str = "operator-0", namespace: str = NAMESPACE) -> dict[str, str]:
    """The environment of a container, its references to the pod resolved."""
    fields = {"metadata.name": pod, "metadata.namespace": namespace}
    return {
        variable["name"]: variable["value"]
        if "value" in variable
        else fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        for variable in container["env"]
    }


def rights(rules: list[Manifest]) -> Iterator[tuple[str, str, str]]:
    """(verb, API group, resource) of every right that the rules give."""
    for rule in rules:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                yield from ((verb, group, resource) for verb in rule["verbs"])
