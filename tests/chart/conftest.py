from collections.abc import Iterator

import pytest

from e2e.cluster.controlplane import ControlPlane
from tests.chart.helm import Helm
from tests.integration.conftest import Cluster


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """helm without a cluster."""
    return Helm(tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A control plane for all live tests: each release has a namespace of its own, the CRD goes from one to the next."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane"), controllers=True) as control_plane:
        yield Cluster(control_plane)
