"""kvplane on one real cluster of three nodes, shared by all end-to-end tests.

Services of different tests live in namespaces of their own, which enforce pod security `restricted` unless the test is
about something that it forbids. vLLM takes most of a core for half a minute to start, so tests share services where they
can, and start those that they need at the same time.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from e2e.cluster.cluster import Cluster
from e2e.cluster.progress import Progress
from e2e.cluster.spec import ClusterSpec
from e2e.stack import RESTRICTED, Images, Stack, cpu_service, prepare_images

PROGRESS = Progress()


@pytest.fixture(scope="session")
def images() -> Images:
    return prepare_images(PROGRESS)


@pytest.fixture(scope="session")
def cluster(images: Images) -> Iterator[Cluster]:
    cluster = Cluster(ClusterSpec(name="e2e", nodes=3), progress=PROGRESS)
    cluster.load(images.all)
    cluster.up()
    yield cluster
    cluster.down()


@pytest.fixture(scope="session")
def stack(cluster: Cluster, images: Images) -> Stack:
    stack = Stack.on(Path(cluster.kubeconfig), PROGRESS)
    stack.install(images, VALUES)
    return stack


VALUES = {"security.allowPathSources": "true", "replicas": "1"}


@pytest.fixture(scope="session")
def make_namespace(stack: Stack) -> Callable[..., str]:
    def make(labels: Mapping[str, str] = RESTRICTED) -> str:
        name = f"e2e-{uuid.uuid4().hex[:6]}"
        stack.make_namespace(name, labels)
        return name

    return make


@pytest.fixture
def namespace(stack: Stack, make_namespace: Callable[..., str]) -> Iterator[str]:
    name = make_namespace()
    yield name
    stack.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def chat(stack: Stack, images: Images, make_namespace: Callable[..., str]) -> str:
    """The namespace of a Ready service `chat`, whose model comes as an image volume."""
    namespace = make_namespace()
    stack.apply(cpu_service("chat", namespace, f"oci://{images.model}"))
    stack.wait_ready(namespace, "chat")
    return namespace
