"""A real cluster for the benchmarks that need kubelets and engines, with kvplane on it: made for one run, and gone after it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from e2e.cluster.cluster import Cluster
from e2e.cluster.progress import Progress
from e2e.cluster.spec import ClusterSpec
from e2e.stack import Images, Stack


@contextmanager
def with_kvplane(
    name: str, *, nodes: int, images: Images, values: Mapping[str, str], progress: Progress
) -> Iterator[tuple[Cluster, Stack]]:
    """A fresh cluster of that name with kvplane's operator, while in the context; ``values``: of the chart."""
    cluster = Cluster(ClusterSpec(name=name, nodes=nodes), progress=progress)
    try:
        cluster.load(images.all)
        cluster.up(recreate=True)
        stack = Stack.on(cluster.kubeconfig, progress)
        with progress.step("kvplane: its operator"):
            stack.install(images, values)
        yield cluster, stack
    finally:
        cluster.down()
