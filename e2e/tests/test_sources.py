"""All four model sources, each with a real vLLM on it. The image volume is what `chat` runs on, the other three the fleet."""

from e2e.stack import Stack
from e2e.tests.client import address, complete
from e2e.tests.fleet import Fleet


def test_volume_directory_and_hub(stack: Stack, fleet: Fleet) -> None:
    for name, namespace in fleet.namespaces.items():
        complete(address(stack, namespace, name), name)


def test_download_broken_halfway_goes_on_where_it_stopped(fleet: Fleet) -> None:
    """Once for all pods of the service, however many there were: it is in the cache then."""
    weights = [served for served in fleet.hub.downloads() if served.path.endswith("model.safetensors")]
    assert [served.status for served in weights] == [200, 206]
    assert all("/v1/" in s.path or "/resolve/" in s.path for s in weights)
