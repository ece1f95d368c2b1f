"""What tests of several folders share: one real API server, started when the first test asks for it."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from e2e.cluster.api import wait_for
from e2e.cluster.controlplane import ControlPlane

REPOSITORY = Path(__file__).resolve().parents[1]


# The same examples in every run, and no deadline: the machine may be busy.
settings.register_profile("kvplane", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("kvplane")


_ON_UVLOOP = (REPOSITORY / "tests/proxy", REPOSITORY / "tests/sidecar")
_LONGEST = tuple(REPOSITORY / folder for folder in ("tests/integration", "tests/chart", "tests/ring", "e2e"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # A signal cannot end a wait inside uvloop: a test that hangs there ends its process, which names it.
        if any(item.path.is_relative_to(folder) for folder in _ON_UVLOOP):
            item.add_marker(pytest.mark.timeout(120, method="thread"))
    # Files with few tests that mostly wait: begun last, one of them would keep all other processes waiting.
    items.sort(key=lambda item: not any(item.path.is_relative_to(folder) for folder in _LONGEST))


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """etcd and kube-apiserver with the CRD established; no controllers, so what a test writes is all there is."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane") / "files") as control_plane:
        control_plane.kubectl("apply", "--server-side", "-f", str(REPOSITORY / "crds"))
        # Not `kubectl wait`: it fails on a CRD that has no conditions yet.
        wait_for(
            "The CRD's place in the API and in its description",
            lambda: (
                served(control_plane) and "apis/kvplane.dev/v1alpha1" in control_plane.api.get("/openapi/v3")["paths"]
            ),
            seconds=60,
            where=str(control_plane.logs),
        )
        yield control_plane


def served(control_plane: ControlPlane) -> bool:
    """Whether the API server serves LLMServices."""
    resources = control_plane.api.get("/apis/kvplane.dev/v1alpha1")["resources"]
    return any(resource["name"] == "llmservices" for resource in resources)


@pytest.fixture(scope="session")
def make_namespace(control_plane: ControlPlane) -> Callable[..., str]:
    """Makes a namespace of the test's own, with the labels given as keywords; they go with the API server."""

    def make(**labels: str) -> str:
        name = f"test-{uuid.uuid4().hex[:8]}"
        control_plane.api.create("/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
        return name

    return make
