"""What a rank's process does before it is a rank: it finds its device, and bounds its waits for DNS."""

import pytest
import torch

from kvplane_runtime.ring.process import bound_lookups, device_of
from kvplane_runtime.ring.settings import Settings, SettingsError, from_environment


def settings(device: str) -> Settings:
    told = {"WORLD_SIZE": "1", "KVPLANE_RING_MODEL": "/models/m", "KVPLANE_RING_DEVICE": device}
    return from_environment(told, hostname="laptop")


def test_a_gpu_that_is_not_there_or_too_old_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(settings("cpu")) == torch.device("cpu")
    with pytest.raises(SettingsError, match="KVPLANE_RING_DEVICE is cuda, and torch sees no GPU: give the pod one"):
        device_of(settings("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(SettingsError, match=r"the GPU's compute capability is 7\.5; the kernels need 8\.0\."):
        device_of(settings("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert device_of(settings("cuda")) == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("given", "then"),
    [({}, "timeout:1 attempts:1"), ({"RES_OPTIONS": "timeout:3"}, "timeout:3")],
)
def test_a_lookup_is_bounded_unless_the_pod_says_how(given: dict[str, str], then: str) -> None:
    environment = dict(given)
    bound_lookups(environment)
    assert environment["RES_OPTIONS"] == then
