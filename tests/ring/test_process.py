"""What a rank's process does before it is a rank: it finds its device and ports, and bounds its waits for DNS."""

import asyncio
import json
import socket
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from kvplane_runtime.ring import communicator, process
from kvplane_runtime.ring.openai import ServedModel
from kvplane_runtime.ring.process import bound_lookups, device_of
from kvplane_runtime.ring.settings import Settings, SettingsError, from_environment
from tests.ring.fake_engine import FakeEngine

HOST = "127.0.0.1"


def settings(device: str = "cpu", **more: str) -> Settings:
    told = {"WORLD_SIZE": "1", "KVPLANE_RING_MODEL": "/models/m", "KVPLANE_RING_DEVICE": device, **more}
    return from_environment(told, hostname="laptop")


def test_a_store_port_that_is_taken_is_named() -> None:
    store, port = communicator.serve(host=HOST)
    with pytest.raises(SettingsError, match=f"KVPLANE_RING_STORE_PORT is {port}, and rank 0 cannot listen there \\("):
        process._lead(settings(POD_IP=HOST, KVPLANE_RING_STORE_PORT=str(port)))
    del store  # it had to live until here


def test_an_api_port_that_is_taken_is_named() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        serving: Any = process._serve(
            settings(KVPLANE_RING_PORT=str(port)),
            engine=FakeEngine(),  # type: ignore[arg-type]  # all that the API needs of one
            leader=None,  # type: ignore[arg-type]  # it is not begun
            served=ServedModel("tiny", 256, None, frozenset()),
            inbox=SimpleQueue(),
        )
        with pytest.raises(SettingsError, match=f"KVPLANE_RING_PORT is {port}, and rank 0 cannot listen there"):
            asyncio.run(serving)


@pytest.mark.parametrize("name", ["float64", "int8", "nonsense"])
def test_a_data_type_that_the_ring_does_not_compute_in_is_refused_before_weights_are_read(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"dtype": name}))
    with pytest.raises(SettingsError, match=f"the model's dtype is '{name}'; set float32 or bfloat16"):
        process._dtype(settings(KVPLANE_RING_MODEL=str(tmp_path)))


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
