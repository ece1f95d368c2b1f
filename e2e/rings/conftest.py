"""kvplane on a real cluster of four nodes that nobody else uses: rings, and what is done to them.

A cluster of its own, since nodes are cut and drained here, and what takes seconds beside an idle vLLM takes long beside one
that starts. Four nodes: a ring of three, and a place for the rank of a node that is lost.

All tests look at one service of two groups. Rank 0 of group 0 ends whenever it is started, until group 0 is given up
(test_crash_loop.py). So group 1 is the only ring, and what befalls it is all that goes on, until somebody asks for another
try of group 0 (test_two_groups.py, which comes last). Any module can be run alone.
"""

import json
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from transformers import AutoModelForCausalLM

from e2e.cluster.cluster import Cluster
from e2e.cluster.spec import ClusterSpec
from e2e.prometheus import Prometheus, watching
from e2e.prometheus import running as running_prometheus
from e2e.rings.ring import Ring
from e2e.rings.service import SIZE, ring_service
from e2e.stack import Images, Stack, prepare_images
from e2e.tests.client import address
from e2e.tests.fleet import reachable, unpacked_model
from e2e.tests.sidecar import eventually
from e2e.times import PROGRESS
from kvplane_api import names
from tests.ring.tiny import wrong

SERVICE: Final = "long"
RESTART_BUDGET: Final = 3
"""Of each group. The engines that are killed in group 1 stay below it."""
REFORM_GRACE_SECONDS: Final = 5
_LIMITS: Final = "limits"
"""A ConfigMap: the one thing outside of the spec that decides whether rank 0 of group 0 can start."""


@pytest.fixture(scope="session")
def images() -> Images:
    return prepare_images(PROGRESS)


@pytest.fixture(scope="session")
def cluster(images: Images) -> Iterator[Cluster]:
    cluster = Cluster(ClusterSpec(name="rings", nodes=4), progress=PROGRESS)
    cluster.load(images.all)
    cluster.up()
    yield cluster
    cluster.down()


@pytest.fixture(scope="session")
def stack(cluster: Cluster, images: Images) -> Stack:
    stack = Stack.on(Path(cluster.kubeconfig), PROGRESS)
    stack.install(images, {"replicas": "1", "rbac.nodes": "true"})
    return stack


@pytest.fixture(scope="session")
def prometheus(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with running_prometheus(
        watching(stack.kubeconfig), tmp_path_factory.mktemp("prometheus"), progress=PROGRESS
    ) as found:
        yield found


Mistakes = Callable[[list[int], list[int]], list[int]]


@pytest.fixture(scope="session")
def mistakes(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Mistakes:
    """Of a prompt and the tokens that came: indices of those that the unsharded model would not have given."""
    folder = unpacked_model(images, tmp_path_factory.mktemp("model"))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    return lambda prompt, tokens: wrong(model, prompt, tokens)


@dataclass(frozen=True)
class Service:
    """The service that all tests look at."""

    stack: Stack
    cluster: Cluster
    namespace: str
    applied: float
    """When it was, on the monotonic clock."""

    def heal(self) -> None:
        """Take away what makes the rank crash, and ask for another try; the spec stays as it is."""
        data = json.dumps({"data": {"first": "1"}})
        self.stack.kubectl("patch", "configmap", _LIMITS, "-n", self.namespace, "--type=merge", "-p", data)
        annotation = f"{names.ANNOTATION_RETRY}=once"
        self.stack.kubectl("annotate", "llms", SERVICE, "-n", self.namespace, "--overwrite", annotation)

    def pool(self) -> dict[str, Any]:
        """Its entry in ``status.pools``; empty while there is none."""
        status = self.stack.get(self.namespace, "llmservice", SERVICE).get("status", {})
        found: dict[str, Any] = next(iter(status.get("pools", ())), {})
        return found

    def ring(self, group: int) -> Ring:
        """One of its groups."""
        return Ring(self.cluster, self.namespace, SERVICE, SIZE, group)


@pytest.fixture(scope="session")
def service(stack: Stack, cluster: Cluster, images: Images, prometheus: Prometheus) -> Service:
    """Just applied, in a namespace of its own, watched by a Prometheus.

    What the engine gets is $(FIRST), the group and the rank, as one number: 0 for rank 0 of group 0 alone, as FIRST is empty.
    """
    namespace = f"rings-{uuid.uuid4().hex[:6]}"
    stack.make_namespace(namespace)
    first = {"name": _LIMITS, "key": "first"}
    env: list[dict[str, Any]] = [
        {"name": "FIRST", "valueFrom": {"configMapKeyRef": first}},
        {"name": "GROUP", "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{names.LABEL_GROUP}']"}}},
        {"name": "RANK", "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{names.LABEL_POD_INDEX}']"}}},
        {"name": "KVPLANE_RING_MAX_SEQUENCES", "value": "$(FIRST)$(GROUP)$(RANK)"},
    ]
    recovery = {"restartBudget": RESTART_BUDGET, "reformGraceSeconds": REFORM_GRACE_SECONDS}
    stack.apply(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": _LIMITS, "namespace": namespace},
            "data": {"first": ""},
        },
        ring_service(SERVICE, namespace, f"oci://{images.model}", groups=2, env=env, recovery=recovery),
    )
    return Service(stack, cluster, namespace, time.monotonic())


@pytest.fixture(scope="session")
def ring(service: Service) -> Ring:
    """Group 1, whole."""
    ring = service.ring(1)
    ring.await_whole()
    reachable(service.stack, service.namespace, SERVICE)
    return ring


@pytest.fixture
def where(stack: Stack, ring: Ring) -> str:
    """host:port of the service, whose only ring it is, once it is whole and this host's way to it is there."""
    ring.await_whole()
    where = address(stack, ring.namespace, ring.service)
    host, port = where.split(":")

    def leads_there() -> bool:
        with socket.socket() as probe:
            probe.settimeout(5)
            return probe.connect_ex((host, int(port))) == 0

    eventually(leads_there, seconds=30, otherwise=lambda: f"{where} refuses connections")
    return where
