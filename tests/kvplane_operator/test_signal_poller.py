"""The poller: every serving pod, nobody else, in virtual time; and the client, against a real server on loopback."""

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kvplane_api import names
from kvplane_api.wire import SidecarState
from kvplane_operator import metrics
from kvplane_operator.signals import SignalPoller, StateError, connect_to_sidecars
from kvplane_operator.store import POD, SERVICE, Store
from tests.kvplane_operator.world import pod, state

PERIOD = 10.0


class Pods:
    """The pods of the service `chat`, in a store."""

    def __init__(self) -> None:
        self.store = Store()
        self._version = 0
        self.put(SERVICE, {"metadata": {"name": "chat", "uid": "chat", "generation": 1}, "spec": {}})

    def autoscaled(self, policy: str = "Native") -> None:
        """From now on the service asks for this."""
        spec = {"autoscaling": {"policy": policy}}
        self.put(SERVICE, {"metadata": {"name": "chat", "uid": "chat", "generation": 2}, "spec": spec})

    def put(self, kind: str, manifest: dict[str, Any]) -> None:
        self._version += 1
        manifest["metadata"] |= {"namespace": "team", "resourceVersion": str(self._version)}
        self.store.put(kind, manifest)

    def serve(self, name: str, *, ready: bool = True, ip: str | None = None, **metadata: str) -> None:
        manifest = pod(name, ready=ready)
        manifest["metadata"] |= {"labels": {names.LABEL_SERVICE: "chat"}, **metadata}
        manifest["status"]["podIP"] = name if ip is None else ip  # what the fake sidecars answer to
        self.put(POD, manifest)

    def remove(self, name: str) -> None:
        self.store.remove(POD, {"metadata": {"namespace": "team", "name": name, "uid": f"uid-of-{name}"}})

    def reading(self, name: str) -> Any:
        return self.store.reading(f"uid-of-{name}")


class FakeSidecars:
    """Answers at once, or as told; remembers when it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, str]] = []
        self.states: dict[str, SidecarState] = {}
        self.faults: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.most_at_once = self._now = 0

    async def fetch(self, ip: str) -> SidecarState:
        self.asked.append((asyncio.get_running_loop().time(), ip))
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            await asyncio.sleep(self.seconds.get(ip, 0))
        finally:
            self._now -= 1
        if ip in self.faults:
            raise StateError(self.faults[ip])
        return self.states.get(ip) or state(ip)

    def times(self, ip: str) -> list[float]:
        return [at for at, asked in self.asked if asked == ip]


@pytest.fixture
def pods() -> Pods:
    return Pods()


@pytest.fixture
def sidecars() -> FakeSidecars:
    return FakeSidecars()


def poller_of(
    pods: Pods,
    sidecars: FakeSidecars,
    *,
    leading: Callable[[], bool] = lambda: True,
    enqueue: Callable[[str], None] = lambda _: None,
) -> SignalPoller:
    return SignalPoller(
        store=pods.store,
        fetch=sidecars.fetch,
        leading=leading,
        enqueue=enqueue,
        period_seconds=PERIOD,
        clock=asyncio.get_running_loop().time,
    )


@contextlib.asynccontextmanager
async def polling(
    pods: Pods, sidecars: FakeSidecars, *, leading: Callable[[], bool] = lambda: True
) -> AsyncIterator[list[str]]:
    """Runs a poller; yields the list of services that it wanted planned again."""
    enqueued: list[str] = []
    poller = poller_of(pods, sidecars, leading=leading, enqueue=enqueued.append)
    task = asyncio.create_task(poller.run())
    try:
        yield enqueued
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_serving_pod_is_read_within_a_second_and_then_each_period(pods: Pods, sidecars: FakeSidecars) -> None:
    async with polling(pods, sidecars):
        await asyncio.sleep(3.5)
        pods.serve("a")
        await asyncio.sleep(1.1)
        assert pods.reading("a").state == state("a")
        await asyncio.sleep(100)
    times = sidecars.times("a")
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert 5 <= gaps[0] <= 11
    assert all(9 <= gap <= 12 for gap in gaps[1:])  # jitter, and the loop's second


async def test_pods_found_together_are_spread_over_the_period(pods: Pods, sidecars: FakeSidecars) -> None:
    for n in range(100):
        pods.serve(f"p{n}")
    async with polling(pods, sidecars):
        await asyncio.sleep(12)
    second = {sidecars.times(f"p{n}")[1] for n in range(100)}
    assert len(second) >= 4


@pytest.mark.parametrize(
    "unfit",
    [{"ready": False}, {"ip": ""}, {"deletionTimestamp": "2026-01-01T12:00:00Z"}],
    ids=["not ready", "no address", "going"],
)
async def test_pods_that_do_not_serve_are_left_alone(pods: Pods, sidecars: FakeSidecars, unfit: dict[str, Any]) -> None:
    pods.serve("a", **unfit)
    async with polling(pods, sidecars):
        await asyncio.sleep(60)
    assert sidecars.asked == []


async def test_of_a_ring_only_rank_0_is_read_also_while_it_drains(pods: Pods, sidecars: FakeSidecars) -> None:
    labels: Any = {names.LABEL_SERVICE: "chat", names.LABEL_GROUP: "0"}
    drains: Any = {names.ANNOTATION_DRAIN_SINCE: "2026-01-01T12:00:00Z"}
    pods.serve("chat-ring-0-0", ready=False, labels=labels, annotations=drains)
    pods.serve("chat-ring-0-1", labels=labels)
    async with polling(pods, sidecars) as enqueued:
        sidecars.states["chat-ring-0-0"] = state("chat-ring-0-0", draining=True, inFlight=3)
        await asyncio.sleep(25)
        enqueued.clear()
        sidecars.states["chat-ring-0-0"] = state("chat-ring-0-0", draining=True, inFlight=0)
        await asyncio.sleep(12)
        assert enqueued == ["chat"]  # it is empty: the operator goes on at once
    assert {ip for _, ip in sidecars.asked} == {"chat-ring-0-0"}


async def test_without_pods_there_is_no_work(sidecars: FakeSidecars) -> None:
    """A thousand services cost one wake-up of one loop a second."""
    pods = Pods()
    for n in range(1000):
        pods.put(SERVICE, {"metadata": {"name": f"s{n}", "uid": f"s{n}", "generation": 1}, "spec": {}})
    async with polling(pods, sidecars) as enqueued:
        await asyncio.sleep(0)
        tasks = len(asyncio.all_tasks())
        await asyncio.sleep(60)
        assert len(asyncio.all_tasks()) == tasks == 2  # the test and the loop
    assert (sidecars.asked, enqueued) == ([], [])


async def test_only_the_leader_polls(pods: Pods, sidecars: FakeSidecars) -> None:
    pods.serve("a")
    leading = False
    async with polling(pods, sidecars, leading=lambda: leading):
        await asyncio.sleep(60)
        assert sidecars.asked == []
        leading = True
        await asyncio.sleep(1.1)
        assert len(sidecars.asked) == 1


async def test_a_failing_pod_holds_up_no_other(pods: Pods, sidecars: FakeSidecars) -> None:
    for n in range(40):
        pods.serve(f"hung{n}")
        sidecars.seconds[f"hung{n}"] = 2.0
        sidecars.faults[f"hung{n}"] = "does not answer"
    pods.serve("well")
    async with polling(pods, sidecars):
        await asyncio.sleep(0.5)
        assert pods.reading("well").state == state("well")
        assert pods.reading("hung1") is None
        await asyncio.sleep(60)
    assert pods.reading("hung1").error == "does not answer"
    assert len(sidecars.times("well")) >= 5


async def test_what_is_asked_at_the_same_time_is_bounded(pods: Pods, sidecars: FakeSidecars) -> None:
    for n in range(300):
        pods.serve(f"p{n}")
        sidecars.seconds[f"p{n}"] = 1.0
    async with polling(pods, sidecars):
        await asyncio.sleep(10)
    assert sidecars.most_at_once == 256
    assert {ip for _, ip in sidecars.asked} == {f"p{n}" for n in range(300)}


async def test_the_service_is_planned_again_where_status_has_something_to_tell(
    pods: Pods, sidecars: FakeSidecars
) -> None:
    pods.serve("a")
    async with polling(pods, sidecars) as enqueued:
        await asyncio.sleep(1)
        assert enqueued == ["chat"]
        for ratio in (0.1, 0.5, 0.9):
            sidecars.states["a"] = state("a", engine={"kvCacheUsageRatio": ratio})
            await asyncio.sleep(20)
        assert enqueued == ["chat"]
        sidecars.states["a"] = state("a", missingSignals=["kv_cache_usage_ratio (vllm:kv_cache_usage_perc)"])
        await asyncio.sleep(60)
        assert enqueued == ["chat"] * 2
        sidecars.faults["a"] = "refused"
        await asyncio.sleep(60)
        assert enqueued == ["chat"] * 3  # once, when it has been silent for too long
        assert pods.reading("a").state is None


async def test_a_pod_that_stops_serving_is_forgotten_and_read_anew(pods: Pods, sidecars: FakeSidecars) -> None:
    """An engine that restarts: what was read of it before says nothing of it now."""
    pods.serve("a")
    async with polling(pods, sidecars):
        await asyncio.sleep(1.5)
        pods.serve("a", ready=False)
        await asyncio.sleep(1)
        assert pods.reading("a") is None
        pods.serve("a")
        await asyncio.sleep(1)
        assert pods.reading("a").state == state("a")
        pods.remove("a")
        assert pods.reading("a") is None
        await asyncio.sleep(60)
    assert len(sidecars.asked) == 2


async def test_an_answer_that_comes_after_the_end_is_not_kept(pods: Pods, sidecars: FakeSidecars) -> None:
    pods.serve("a")
    sidecars.seconds["a"] = 2.0
    async with polling(pods, sidecars) as enqueued:
        await asyncio.sleep(0.5)
        pods.remove("a")
        await asyncio.sleep(10)
    assert (pods.reading("a"), enqueued) == (None, [])


@pytest.mark.parametrize("policy", ["Native", "External"])
async def test_pods_that_the_autoscaler_reads_are_read_once_and_left_to_it(
    pods: Pods, sidecars: FakeSidecars, policy: str
) -> None:
    pods.autoscaled(policy)
    pods.serve("a")
    async with polling(pods, sidecars):
        await asyncio.sleep(60)
        assert len(sidecars.asked) == 1
        pods.autoscaled("Off")
        await asyncio.sleep(15)
    assert len(sidecars.asked) >= 2


async def test_all_pods_of_a_service_are_read_at_the_same_time(pods: Pods, sidecars: FakeSidecars) -> None:
    pods.autoscaled()
    for name in ("a", "b", "hung"):
        pods.serve(name)
        sidecars.seconds[name] = 1.0
    pods.serve("starts", ready=False)
    pods.put(SERVICE, {"metadata": {"name": "mail", "uid": "mail", "generation": 1}, "spec": {}})
    labels: Any = {names.LABEL_SERVICE: "mail"}
    pods.serve("other", labels=labels)
    sidecars.faults["hung"] = "does not answer"
    now = asyncio.get_running_loop().time()
    await poller_of(pods, sidecars).read("chat")
    assert sorted(sidecars.asked) == [(now, "a"), (now, "b"), (now, "hung")]
    assert (pods.reading("a").state, pods.reading("a").at) == (state("a"), now + 1.0)
    assert pods.reading("hung").error == "does not answer"


async def test_a_pod_that_is_being_read_is_not_read_twice(pods: Pods, sidecars: FakeSidecars) -> None:
    pods.autoscaled()
    pods.serve("a")
    sidecars.seconds["a"] = 1.0
    poller = poller_of(pods, sidecars)
    await asyncio.gather(poller.read("chat"), poller.read("chat"))
    assert len(sidecars.asked) == 1


async def test_a_service_that_is_gone_has_nothing_to_read(pods: Pods, sidecars: FakeSidecars) -> None:
    await poller_of(pods, sidecars).read("gone")
    assert sidecars.asked == []


async def test_polls_are_counted(pods: Pods, sidecars: FakeSidecars) -> None:
    def count(result: str) -> float:
        return metrics.REGISTRY.get_sample_value("kvplane_operator_state_polls_total", {"result": result}) or 0.0

    before = count("answered"), count("failed")
    pods.serve("a")
    pods.serve("b")
    sidecars.faults["b"] = "refused"
    async with polling(pods, sidecars):
        await asyncio.sleep(1)
    assert (count("answered"), count("failed")) == (before[0] + 1, before[1] + 1)


class Server:
    """What answers at a pod's address: a status and a body, both as told."""

    def __init__(self, ip: str) -> None:
        answer: dict[str, Any] = {"status": 200, "body": b"", "length": True}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked += 1
                server.paths.append(self.path)
                self.send_response(answer["status"])
                if answer["length"]:
                    self.send_header("Content-Length", str(len(answer["body"])))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(answer["body"])

            def do_POST(self) -> None:
                server.posted.append(self.path)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self.answer = answer
        self.asked = 0
        self.posted: list[str] = []
        self.paths: list[str] = []
        self._server = ThreadingHTTPServer((ip, names.PORT_ADMIN), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class TestClient:
    """On the real clock: a real socket does not wait in virtual time."""

    IP = "127.20.0.1"

    @pytest.fixture
    def server(self) -> Iterator[Server]:
        server = Server(self.IP)
        yield server
        server.close()

    @staticmethod
    def fetch(ip: str) -> SidecarState:
        async def once() -> SidecarState:
            sidecars = connect_to_sidecars()
            try:
                return await sidecars.fetch(ip)
            finally:
                await sidecars.close()

        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            return runner.run(once())

    def test_a_state(self, server: Server) -> None:
        server.answer["body"] = state("chat-1").model_dump_json(by_alias=True).encode()
        assert self.fetch(self.IP) == state("chat-1")

    def test_fields_of_a_newer_sidecar_are_ignored(self, server: Server) -> None:
        server.answer["body"] = state("chat-1").model_dump_json(by_alias=True).encode()[:-1] + b', "later": {"a": 1}}'
        assert self.fetch(self.IP) == state("chat-1")

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            ({"status": 404}, "answers 404"),
            ({"status": 302}, "answers 302"),
            ({"body": b"<html>"}, "answers with something that is not a sidecar's state"),
            ({"body": b'{"pod": "a"}'}, "answers with something that is not a sidecar's state"),
            ({"body": b"\xff\xfe"}, "answers with something that is not a sidecar's state"),
            ({"body": b" " * 100_000}, "answers with more than 65536 bytes"),
            ({"body": b" " * 100_000, "length": False}, "answers with more than 65536 bytes"),
        ],
    )
    def test_whatever_else_answers(self, server: Server, answer: dict[str, Any], text: str) -> None:
        server.answer |= answer
        with pytest.raises(StateError, match=f"^http://{self.IP}:8001/state {text}$"):
            self.fetch(self.IP)

    @staticmethod
    def drain(ip: str) -> None:
        async def once() -> None:
            sidecars = connect_to_sidecars()
            try:
                await sidecars.drain(ip)
            finally:
                await sidecars.close()

        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(once())

    def test_a_drain_is_asked_for(self, server: Server) -> None:
        self.drain(self.IP)
        assert server.posted == ["/drain"]

    def test_a_drain_that_cannot_be_asked_for_is_no_error(self) -> None:
        """Whether it drains is read from its state, and it is asked again."""
        self.drain("127.20.0.9")

    def test_a_simulation_leads_elsewhere(self, server: Server) -> None:
        server.answer["body"] = state("chat-1").model_dump_json(by_alias=True).encode()

        async def once() -> SidecarState:
            sidecars = connect_to_sidecars(lambda ip: f"http://{self.IP}:{names.PORT_ADMIN}/{ip}")
            try:
                return await sidecars.fetch("10.1.2.3")
            finally:
                await sidecars.close()

        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            assert runner.run(once()) == state("chat-1")
        assert server.paths == ["/10.1.2.3/state"]

    def test_nobody_listens(self) -> None:
        with pytest.raises(StateError, match=r"^http://127\.20\.0\.9:8001/state takes no connection \(.*refused\)$"):
            self.fetch("127.20.0.9")

    def test_an_address_of_the_other_family(self) -> None:
        with pytest.raises(StateError, match=r"^http://\[::1\]:8001/state takes no connection"):
            self.fetch("::1")
