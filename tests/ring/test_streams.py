"""A ring on GPUs, as far as a machine without one can show it: what it asks of NCCL and of events, and what ends its waits."""

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvplane_runtime.ring import communicator
from kvplane_runtime.ring.communicator import Ring, RingBrokenError

GPU = torch.device("cuda", 0)


@dataclass
class Device:
    """A GPU that is done with all it was given, or not yet. Each wait for a message takes its stream a quarter of a second."""

    busy: bool = False

    def event(self, **_: bool) -> Any:
        return SimpleNamespace(record=lambda _: None, query=lambda: not self.busy, elapsed_time=lambda _: 250.0)


@dataclass
class Group:
    """What is used of torch's group."""

    said: list[str] = field(default_factory=list)
    error: str = "SUCCESS"
    ended: threading.Event = field(default_factory=threading.Event)

    def _start_coalescing(self) -> None:
        self.said.append("start")

    def send(self, _: list[torch.Tensor], peer: int, tag: int) -> None:
        self.said.append(f"send {peer}")

    def recv(self, _: list[torch.Tensor], peer: int, tag: int) -> None:
        self.said.append(f"receive {peer}")

    def _end_coalescing(self) -> Any:
        nothing = self.said[-1] == "start"
        self.said.append("end")
        return None if nothing else self._work()

    def _allgather_base(self, everyone: torch.Tensor, mine: torch.Tensor) -> Any:
        self.said.append("gather")
        return self._work()

    def get_error(self) -> Any:
        return SimpleNamespace(name=self.error)

    def abort(self) -> None:
        self.ended.set()

    def _work(self) -> Any:
        return SimpleNamespace(wait=lambda: self.said.append("follow"))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(communicator, "_Event", made.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    return made


def ring(group: Group, *, quiet_seconds: float = 60.0) -> Ring:
    return Ring(epoch=1, rank=0, size=2, group=group, quiet_seconds=quiet_seconds, device=GPU)


@pytest.mark.usefixtures("device")
def test_what_is_posted_together_is_one_operation_that_the_stream_waits_for() -> None:
    group = Group()
    mine = ring(group)
    pending = mine.post(sends=[(torch.ones(2), 1)], receives=[(torch.empty(2), 1)], later=True)
    assert group.said == ["start", "send 1", "receive 1", "end"]
    pending.wait()
    mine.all_gather(torch.ones(2), torch.empty(2, 2))
    assert group.said[4:] == ["follow", "gather", "follow"]
    assert mine.traffic.waited_seconds == 0
    mine.settle()
    assert mine.traffic.waited_seconds == 0.5
    mine.settle()
    assert mine.traffic.waited_seconds == 0.5
    mine.post().wait()
    assert group.said[7:] == ["start", "end"]
    mine.abort()
    assert group.ended.wait(10)


def test_an_abort_ends_the_wait_for_the_device_and_the_group(device: Device) -> None:
    device.busy = True
    group = Group()
    mine = ring(group)
    threading.Timer(0.05, mine.abort, ["rank 1 sent no heartbeat for 1 s"]).start()
    with pytest.raises(RingBrokenError, match=r"The ring of epoch 1 is broken: rank 1 sent no heartbeat for 1 s\."):
        mine.settle()
    assert group.ended.wait(10)
    with pytest.raises(RingBrokenError, match="no heartbeat"):
        mine.post(sends=[(torch.ones(2), 1)])


def test_what_nccl_found_breaks_the_ring_though_its_kernels_have_ended(device: Device) -> None:
    """They have then written what nobody sent."""
    group = Group(error="REMOTE_ERROR")
    mine = ring(group)
    with pytest.raises(RingBrokenError, match=r"rank 0 lost rank 1 \(NCCL says REMOTE_ERROR\)") as broken:
        mine.settle()
    assert broken.value.peers == (1,)
    assert not device.busy
    assert group.ended.wait(10)


def test_a_device_that_waits_for_too_long_has_lost_its_peers(device: Device) -> None:
    device.busy = True
    group = Group()
    with pytest.raises(RingBrokenError, match=r"rank 0 lost rank 1 \(nothing came for 0.05 s\)"):
        ring(group, quiet_seconds=0.05).settle()
    assert group.ended.wait(10)


def test_a_ring_of_one_waits_for_its_device(device: Device) -> None:
    device.busy = True
    done = threading.Event()

    def settle() -> None:
        Ring.alone(device=GPU).settle()
        done.set()

    threading.Thread(target=settle, daemon=True).start()
    assert not done.wait(0.1)
    device.busy = False
    assert done.wait(10)
