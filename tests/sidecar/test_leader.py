"""A worker's drain waits for rank 0's, as long as rank 0 says so."""

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from kvplane_runtime.sidecar import leader
from kvplane_runtime.sidecar.leader import LeaderDrain
from tests.sidecar.clock import Clock

STATE = {"pod": "chat-ring-0-0", "servedName": "chat", "engineReady": True, "draining": False, "inFlight": 1}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "ASK_SECONDS", 0.001)
    # Questions are counted: on a busy machine too none that is answered may come twice.
    monkeypatch.setattr(leader, "ANSWER_SECONDS", 30)


@dataclass
class Rank0:
    """Rank 0's sidecar."""

    said: list[dict[str, Any]] = field(default_factory=list)
    """Its answers, one after another; the last one again and again."""
    asked: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    hangs: int = 0
    """So many questions are never answered."""
    port: int = 0

    async def state(self, _: web.Request) -> web.Response:
        self.asked.put_nowait(1)
        if self.hangs:
            self.hangs -= 1
            await asyncio.Event().wait()
        return web.json_response(STATE | (self.said.pop(0) if len(self.said) > 1 else self.said[0]))


@pytest_asyncio.fixture
async def rank_0() -> AsyncIterator[Rank0]:
    made = Rank0()
    application = web.Application()
    application.router.add_get("/state", made.state)
    runner = web.AppRunner(application, shutdown_timeout=0.05)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.port = runner.addresses[0][1]
    yield made
    await runner.cleanup()


class Names:
    """What rank 0's name gives each time that it is looked up, and then nothing any more."""

    def __init__(self, *found: str) -> None:
        self._found = list(found)

    async def __call__(self, host: str) -> str:
        assert host == "chat-ring-0-0.chat-ring-0"
        if not self._found:
            raise OSError("Name or service not known")
        return self._found.pop(0)


def drain(port: int, clock: Clock | None = None, *, names: Names | None = None) -> LeaderDrain:
    return LeaderDrain(
        host="chat-ring-0-0.chat-ring-0", port=port, clock=clock or Clock(), look_up=names or Names("127.0.0.1")
    )


LATER = Clock().now + 600


@pytest.mark.parametrize(
    ("pod", "found"),
    [
        ("chat-ring-0-2", "chat-ring-0-0.chat-ring-0"),
        ("chat-ring-12-10", "chat-ring-12-0.chat-ring-12"),
        ("chat-ring-0-0", None),
        ("chat", None),
    ],
)
def test_rank_0_is_found_by_the_name_of_the_pod(pod: str, found: str | None) -> None:
    assert leader.rank_0(pod) == found


async def test_an_address_is_its_own_name() -> None:
    assert await leader.ip_of("127.0.0.1") == "127.0.0.1"


async def test_where_rank_0_does_not_drain_nothing_is_waited_for(rank_0: Rank0) -> None:
    rank_0.said = [{"draining": False}]
    await drain(rank_0.port).over(until=LATER)
    assert rank_0.asked.qsize() == 1


async def test_it_is_over_when_rank_0_is_done(rank_0: Rank0) -> None:
    rank_0.said = [{"draining": True}] * 3 + [{"draining": True, "drained": True}]
    await drain(rank_0.port).over(until=LATER)
    assert rank_0.asked.qsize() == 4


async def test_an_answer_that_comes_late_is_not_the_end_of_rank_0(
    rank_0: Rank0, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader, "ANSWER_SECONDS", 1)
    rank_0.said = [{"draining": True}, {"draining": True, "drained": True}]
    rank_0.hangs = 2
    await drain(rank_0.port).over(until=LATER)
    assert rank_0.asked.qsize() == 4


async def test_rank_0_is_waited_for_also_when_its_name_went_first(rank_0: Rank0) -> None:
    """Who deletes the service deletes the Services too, and the pods are the last to go."""
    rank_0.said = [{"draining": True}] * 2 + [{"draining": True, "drained": True}]
    found = drain(rank_0.port, names=Names("127.0.0.1"))
    looks = asyncio.create_task(found.run())
    await asyncio.sleep(0)  # the first look
    await found.over(until=LATER)
    looks.cancel()
    assert rank_0.asked.qsize() == 3


async def test_a_rank_0_that_was_made_anew_is_asked_where_it_is_now(rank_0: Rank0) -> None:
    rank_0.said = [{"draining": True}, {"draining": True, "drained": True}]
    found = drain(rank_0.port, names=Names("127.0.0.9", "127.0.0.1"))
    looks = asyncio.create_task(found.run())
    await asyncio.sleep(0)
    await found.over(until=LATER)
    looks.cancel()
    assert rank_0.asked.qsize() == 2


async def test_another_pod_at_its_address_is_not_waited_for(rank_0: Rank0) -> None:
    rank_0.said = [{"pod": "mail-ring-0-0", "draining": True}]
    await drain(rank_0.port).over(until=LATER)
    assert rank_0.asked.qsize() == 1


async def test_a_rank_0_whose_name_was_never_known_is_not_waited_for(rank_0: Rank0) -> None:
    await drain(rank_0.port, names=Names()).over(until=LATER)
    assert rank_0.asked.qsize() == 0


async def test_it_has_an_end_whatever_rank_0_says(rank_0: Rank0) -> None:
    rank_0.said = [{"draining": True}]
    clock = Clock()
    over = asyncio.create_task(drain(rank_0.port, clock).over(until=clock.now + 600))
    for _ in range(3):
        await rank_0.asked.get()
    assert not over.done()
    clock.pass_seconds(600)
    await over


@pytest.mark.parametrize("fault", ["hangs", "gone", "garbage"])
async def test_a_rank_0_that_cannot_be_asked_is_not_waited_for(
    rank_0: Rank0, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader, "ANSWER_SECONDS", 0.2)
    rank_0.said = [{"draining": True}]
    port = rank_0.port
    match fault:
        case "hangs":
            rank_0.hangs = 99
        case "gone":
            with socket.create_server(("127.0.0.1", 0)) as closed:
                port = closed.getsockname()[1]
        case "garbage":
            rank_0.said = [{"draining": "perhaps"}]
    async with asyncio.timeout(10):
        await drain(port).over(until=LATER)
