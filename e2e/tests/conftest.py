"""kvplane on one real cluster of three nodes, shared by all end-to-end tests.

Services of different tests live in namespaces of their own, which enforce pod security `restricted` unless the test is
about something that it forbids. vLLM takes most of a core for half a minute to start, so tests share services where they
can (`chat`, and the three of the fleet), and start those that they need at the same time. The files are in an order (their
names) in which autoscaling comes first, while no other engine takes the cores, and the node drain before the fleet: what is
evicted has to start again.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster.cluster import Cluster
from e2e.cluster.spec import ClusterSpec
from e2e.prometheus import Prometheus, watching
from e2e.prometheus import running as running_prometheus
from e2e.stack import RESTRICTED, Images, Stack, cpu_service, prepare_images
from e2e.tests import elastic as scaling
from e2e.tests import fleet as fleets
from e2e.tests import overload as overloads
from e2e.tests.elastic import Elastic
from e2e.tests.fleet import Fleet
from e2e.tests.overload import Overload
from e2e.times import PROGRESS, tell


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
    stack.apply(chat_service(namespace, images))
    stack.wait_ready(namespace, "chat")
    fleets.reachable(stack, namespace, "chat")
    return namespace


def chat_service(namespace: str, images: Images, **engine: Any) -> dict[str, Any]:
    """The service `chat`, with every paged feature that vLLM's CPU build has, and a cache that is soon full."""
    features = {
        "blockSize": 32,
        "speculative": {"method": "Ngram", "tokens": 3},
        # vLLM's example of a connector: it keeps the KV of prompts in files.
        "kvTransfer": {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": "/tmp/kv"},  # the pod's own emptyDir
        },
        "extraArgs": ["--enforce-eager", "--num-gpu-blocks-override", str(CHAT_BLOCKS + 1)],
    }
    return cpu_service("chat", namespace, f"oci://{images.model}", engine=features | engine)


CHAT_BLOCKS = 80
"""Of 32 tokens: one request as long as the context takes 64."""


@pytest.fixture(scope="session")
def fleet(
    stack: Stack,
    cluster: Cluster,
    images: Images,
    make_namespace: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Fleet]:
    model = fleets.unpacked_model(images, tmp_path_factory.mktemp("models"))
    with fleets.running(stack, cluster, model, tmp_path_factory.mktemp("cache"), make_namespace) as found:
        yield found


@pytest.fixture(scope="session")
def prometheus(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with running_prometheus(
        watching(stack.kubeconfig), tmp_path_factory.mktemp("prometheus"), progress=PROGRESS
    ) as found:
        yield found


@pytest.fixture(scope="session")
def overload(stack: Stack, fleet: Fleet, prometheus: Prometheus) -> Overload:
    with PROGRESS.step("overload"):
        return overloads.run(stack, fleet, prometheus)


@pytest.fixture(scope="session")
def elastic(
    stack: Stack, cluster: Cluster, images: Images, prometheus: Prometheus, make_namespace: Callable[..., str]
) -> Elastic:
    namespace = make_namespace()
    with PROGRESS.step("autoscaling"):
        found = scaling.run(stack, cluster, images, prometheus, namespace)
    tell(
        f"autoscaling: a second replica asked for {found.asked_seconds:.2f} s after the overload; woken "
        f"{' s and '.join(f'{seconds:.2f}' for seconds in found.wake_seconds)} s after the annotation"
    )
    stack.kubectl("delete", "namespace", namespace, "--wait=false")
    return found
