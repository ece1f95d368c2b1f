"""The whole sidecar between a client, a kubelet and an engine, on loopback."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from e2e.cluster.ports import free_ports
from kvplane_api.wire import SidecarState
from kvplane_runtime.sidecar import admin, app, config, drain, engine, leader
from kvplane_runtime.sidecar.app import Settings, run
from kvplane_runtime.sidecar.config import ConfigError

RING = """\
# HELP kvplane_ring_members Ranks of the ring that is, or was last.
# TYPE kvplane_ring_members gauge
kvplane_ring_members{model_name="chat"} 3.0
"""
RECORDED = Path(__file__).parent / "expositions" / "vllm-0.32.0.recorded.txt"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product's periods are seconds; what is tested is their order."""
    monkeypatch.setattr(engine, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(engine, "METRICS_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(engine, "HEALTH_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(engine, "SILENCE_TOLERANCE_SECONDS", 60)
    monkeypatch.setattr(config, "CHECK_SECONDS", 0.02)
    monkeypatch.setattr(app, "CHECK_SECONDS", 0.02)
    monkeypatch.setattr(drain, "DRAIN_GRACE_SECONDS", 0)
    monkeypatch.setattr(admin, "_DRAIN_CHECK_SECONDS", 0.01)


@dataclass
class FakeEngine:
    """An engine in the shape of vLLM's server."""

    port: int = field(default_factory=lambda: free_ports(1)[0])
    health: int = 200
    hanging: set[str] = field(default_factory=set)
    """Paths that never answer."""
    redirected: set[str] = field(default_factory=set)
    """Paths that are said to be elsewhere, at a host that has no name."""
    said: dict[str, str] = field(default_factory=dict)
    """Bodies by path, where they are others than usual."""
    exposition: str = field(default_factory=RECORDED.read_text)
    finish: asyncio.Event = field(default_factory=asyncio.Event)
    """Streams end when this is set."""
    streaming: int = 0
    asked: list[str] = field(default_factory=list)
    """Paths, in the order of the questions."""
    _runner: web.AppRunner | None = None

    async def start(self) -> None:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(application, shutdown_timeout=0.05, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        if request.path in self.hanging:
            await asyncio.Event().wait()
        if request.path in self.redirected:
            return web.Response(status=302, headers={"location": "http://no..name/"})
        if request.path == "/health":
            return web.Response(status=self.health)
        bodies = {
            "/version": '{"version": "0.32.0"}',
            "/v1/models": '{"data": [{"id": "chat", "max_model_len": 1024}]}',
            "/metrics": self.exposition,
        } | self.said
        body = bodies.get(request.path)
        return await self._stream(request) if body is None else web.Response(text=body)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        self.streaming += 1
        try:
            await response.write(b"data: first\n\n")
            await self.finish.wait()
            await response.write(b"data: [DONE]\n\n")
        finally:
            self.streaming -= 1
        return response


@dataclass
class Running:
    """A sidecar, and a session to ask it with."""

    settings: Settings
    engine: FakeEngine
    session: aiohttp.ClientSession

    async def admin(self, path: str) -> tuple[int, str]:
        async with self.session.get(f"http://127.0.0.1:{self.settings.admin_port}{path}") as response:
            return response.status, await response.text()

    async def state(self) -> SidecarState:
        _, text = await self.admin("/state")
        return SidecarState.model_validate_json(text)

    def complete(self) -> "aiohttp.client._RequestContextManager":
        return self.session.post(f"http://127.0.0.1:{self.settings.port}/v1/completions", json={"prompt": "x"})

    async def becomes(self, path: str, status: int) -> None:
        await until(lambda: answers(self, path, status))

    async def exports(self, line: str) -> bool:
        return line in (await self.admin("/metrics"))[1]

    async def exports_nothing(self, prefix: str) -> bool:
        return not any(line.startswith(prefix) for line in (await self.admin("/metrics"))[1].splitlines())

    async def signal_is_older(self, *, than_seconds: float) -> bool:
        _, metrics = await self.admin("/metrics")
        age = next(line for line in metrics.splitlines() if 'signal="requests_running"' in line)
        return float(age.split()[1]) > than_seconds

    async def signals_are_fresh(self) -> bool:
        return not await self.signal_is_older(than_seconds=0.1)

    async def engine_is_idle(self) -> bool:
        return self.engine.streaming == 0

    async def knows_its_engine(self) -> bool:
        engine = (await self.state()).engine
        return None not in (engine.preemptions_total, engine.max_model_len_tokens)


def write_config(path: Path, **fields: object) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"servedName": "chat"} | fields))
    new.rename(path)


@asynccontextmanager
async def running(
    directory: Path,
    *,
    engine_up: bool = True,
    pod: str = "chat-0",
    ring: bool = False,
    said: dict[str, str] | None = None,
    **fields: object,
) -> AsyncIterator[Running]:
    write_config(directory / "sidecar.json", **fields)
    fake = FakeEngine(said=said or {})
    if engine_up:
        await fake.start()
    settings = Settings(
        config_file=directory / "sidecar.json",
        pod=pod,
        host="127.0.0.1",
        port=free_ports(1)[0],
        admin_port=free_ports(1)[0],
        engine_port=fake.port,
        ring=ring,
    )
    stop = asyncio.Event()
    task = asyncio.create_task(run(settings, stop=stop))
    try:
        async with aiohttp.ClientSession() as session:
            sidecar = Running(settings, fake, session)
            await until(lambda: answers(sidecar, "/healthz", 200))
            if engine_up:
                await until(lambda: answers(sidecar, "/ready", 200))
            yield sidecar
    finally:
        fake.finish.set()
        fake.hanging.clear()
        stop.set()
        async with asyncio.timeout(30):
            await task
        await fake.stop()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Waits for what another task or process brings about."""
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110  (what is waited for has no event)
            await asyncio.sleep(0.01)


async def answers(sidecar: Running, path: str, status: int) -> bool:
    try:
        return (await sidecar.admin(path))[0] == status
    except aiohttp.ClientConnectorError:
        return False


async def refuses(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # the listener was closed with this connection in its backlog
        return False
    writer.close()
    return False


async def test_a_pod_starts_serves_and_stops(tmp_path: Path) -> None:
    async with running(tmp_path, engine_up=False) as sidecar:
        assert [(await sidecar.admin(path))[0] for path in ("/ready", "/engine/startup", "/engine/live")] == [
            503,
            503,
            200,
        ]
        state = await sidecar.state()
        assert (state.pod, state.engine_ready, state.signal_age_seconds) == ("chat-0", False, None)
        assert set(state.engine.model_dump().values()) == {None}
        async with sidecar.complete() as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "5")
            assert (await response.json())["error"]["code"] == "engine_not_ready"

        await sidecar.engine.start()
        for path in ("/ready", "/engine/startup", "/engine/live"):
            await sidecar.becomes(path, 200)
        async with sidecar.complete() as response:
            assert await response.content.readuntil(b"\n\n") == b"data: first\n\n"
            assert (await sidecar.state()).in_flight == 1
            sidecar.engine.finish.set()
            assert await response.content.readuntil(b"\n\n") == b"data: [DONE]\n\n"
        await until(sidecar.engine_is_idle)
        await until(sidecar.knows_its_engine)  # what it says of itself is asked for after its health
        state = await sidecar.state()
        assert (state.in_flight, state.engine.preemptions_total, state.engine.max_model_len_tokens) == (0, 44, 1024)
        assert state.startup_seconds is not None
        _, metrics = await sidecar.admin("/metrics")
        assert 'kvplane_preemptions_total{model_name="chat"} 44.0' in metrics
        assert 'kvplane_engine_info{model_name="chat",version="0.32.0"} 1.0' in metrics


async def test_a_client_that_goes_aborts_the_engines_request(tmp_path: Path) -> None:
    async with running(tmp_path) as sidecar:
        response = await sidecar.complete()
        await response.content.readuntil(b"\n\n")
        assert sidecar.engine.streaming == 1
        response.close()
        await until(sidecar.engine_is_idle)
        assert (await sidecar.state()).in_flight == 0


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_drain_loses_no_request(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "DRAIN_GRACE_SECONDS", 3600)
    async with running(tmp_path) as sidecar:
        in_flight = await sidecar.complete()
        url = f"http://127.0.0.1:{sidecar.settings.admin_port}/drain"
        drained = asyncio.ensure_future(sidecar.session.request(method, url))
        await sidecar.becomes("/ready", 503)
        late = await sidecar.complete()  # within the grace
        assert (late.status, late.headers["Connection"]) == (200, "close")
        monkeypatch.setattr(drain, "DRAIN_GRACE_SECONDS", 0)  # now it is over
        async with sidecar.complete() as refused:
            assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
            assert (await refused.json())["error"]["code"] == "draining"
        assert not drained.done()
        sidecar.engine.finish.set()
        for response in (in_flight, late):
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        async with await drained as over:
            assert await over.json() == {"inFlight": 0}


async def test_a_drain_ends_the_connections_that_clients_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a client goes on using one long after the Service has stopped to send others here."""
    monkeypatch.setattr(drain, "DRAIN_GRACE_SECONDS", 3600)
    body = b'{"prompt": "x"}'
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    async with running(tmp_path) as sidecar:
        idle, silent = await asyncio.open_connection("127.0.0.1", sidecar.settings.port)
        busy, writer = await asyncio.open_connection("127.0.0.1", sidecar.settings.port)
        writer.write(request)
        head = await busy.readuntil(b"\r\n\r\n")
        assert b"connection: close" not in head.lower()
        drained = asyncio.ensure_future(sidecar.admin("/drain"))
        await sidecar.becomes("/ready", 503)
        assert await idle.read() == b""
        sidecar.engine.finish.set()
        assert (await busy.read()).endswith(b"0\r\n\r\n")
        monkeypatch.setattr(drain, "DRAIN_GRACE_SECONDS", 0)
        await drained
        writer.close()
        silent.close()


async def test_a_drain_gives_up_after_drain_seconds(tmp_path: Path) -> None:
    async with running(tmp_path, drainSeconds=0) as sidecar:
        stuck = await sidecar.complete()
        status, text = await sidecar.admin("/drain")
        assert (status, json.loads(text)) == (200, {"inFlight": 1})
        stuck.close()


async def test_a_drain_ends_an_engine_that_loads_and_none_that_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(app, "end_engine", lambda *, port: ended.append(port))
    async with running(tmp_path) as sidecar:
        assert (await sidecar.admin("/drain"))[0] == 200
        assert ended == []
    async with running(tmp_path, engine_up=False) as sidecar:
        assert (await sidecar.admin("/drain"))[0] == 200
        assert ended == [sidecar.engine.port]


async def test_the_operators_drain_that_outlives_an_engine_does_not_end_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was for the requests of the engine that crashed, and the exit of another one would count as a crash too."""
    ended: list[int] = []
    monkeypatch.setattr(app, "end_engine", lambda *, port: ended.append(port))
    monkeypatch.setattr(drain, "DRAIN_GRACE_SECONDS", 3600)
    async with running(tmp_path) as sidecar:
        url = f"http://127.0.0.1:{sidecar.settings.admin_port}/drain"
        drained = asyncio.ensure_future(sidecar.session.post(url))
        await sidecar.becomes("/ready", 503)
        await sidecar.engine.stop()
        async with await drained as over:
            assert over.status == 200
        assert ended == []


async def test_the_operators_drain_ends_no_engine_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(app, "end_engine", lambda *, port: ended.append(port))
    async with running(tmp_path, engine_up=False) as sidecar:
        url = f"http://127.0.0.1:{sidecar.settings.admin_port}/drain"
        async with sidecar.session.post(url) as over:
            assert over.status == 200
        assert ended == []


async def test_a_drain_of_a_dead_engine_is_over_at_once_and_its_restart_ends_it(tmp_path: Path) -> None:
    async with running(tmp_path) as sidecar:
        await sidecar.engine.stop()
        await sidecar.becomes("/ready", 503)
        assert (await sidecar.admin("/drain"))[0] == 200
        assert (await sidecar.state()).draining
        await sidecar.engine.start()
        await sidecar.becomes("/ready", 200)
        assert not (await sidecar.state()).draining


async def test_an_engine_that_hangs_is_tolerated_then_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path) as sidecar:
        sidecar.engine.hanging = {"/health"}
        assert [(await sidecar.admin(path))[0] for path in ("/ready", "/engine/live")] == [200, 200]
        monkeypatch.setattr(engine, "SILENCE_TOLERANCE_SECONDS", 0.2)
        await sidecar.becomes("/engine/live", 503)
        assert (await sidecar.admin("/ready"))[0] == 503
        sidecar.engine.hanging = set()
        await sidecar.becomes("/engine/live", 200)


async def test_an_engine_that_says_it_is_dead_is_not_ready(tmp_path: Path) -> None:
    async with running(tmp_path) as sidecar:
        sidecar.engine.health = 503
        await sidecar.becomes("/ready", 503)


@pytest.mark.parametrize("fault", ["hanging", "garbage", "renamed"])
async def test_metrics_that_fail_age_the_signals_and_nothing_else(tmp_path: Path, fault: str) -> None:
    async with running(tmp_path) as sidecar:
        await until(lambda: sidecar.exports("kvplane_requests_running{"))
        match fault:
            case "hanging":
                sidecar.engine.hanging = {"/metrics"}
            case "garbage":
                sidecar.engine.exposition = "vllm:num_requests_running{ garbage"
            case "renamed":
                sidecar.engine.exposition = "engine_requests 1\n"
        await until(lambda: sidecar.signal_is_older(than_seconds=0.2))
        assert (await sidecar.admin("/ready"))[0] == 200
        if fault == "renamed":  # which, unlike the age, shows only with the next answer
            await until(lambda: sidecar.exports_nothing("kvplane_requests_running{"))
        else:
            assert await sidecar.exports("kvplane_requests_running{")


IMPOSSIBLE = {
    "a bucket without le": 'vllm:time_to_first_token_seconds_bucket{engine="0"} 1\nvllm:time_to_first_token_seconds_sum 1\n',
    "blocks of 400 digits": 'vllm:cache_config_info{block_size="16",num_gpu_blocks="%s"} 1\n' % ("9" * 400)
    + "vllm:kv_cache_usage_perc 0.5\n",
    "counts beyond all": "vllm:num_preemptions_total 1e308\n" * 2,
}


@pytest.mark.parametrize("exposition", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
async def test_metrics_that_cannot_be_cut_no_stream(tmp_path: Path, exposition: str) -> None:
    async with running(tmp_path, admission={"policy": "Observe"}) as sidecar:
        await until(lambda: sidecar.exports("kvplane_requests_running{"))
        stream = await sidecar.complete()
        await stream.content.readuntil(b"\n\n")
        sidecar.engine.exposition = exposition
        await until(lambda: sidecar.signal_is_older(than_seconds=0.2))
        async with sidecar.complete() as another:
            sidecar.engine.finish.set()
            assert (await another.read()).endswith(b"data: [DONE]\n\n")
        assert (await stream.read()).endswith(b"data: [DONE]\n\n")
        sidecar.engine.exposition = RECORDED.read_text()
        await until(sidecar.signals_are_fresh)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "said",
    [
        {"/version": DEEP, "/v1/models": DEEP},
        {"/version": '{"version": "\\ud800"}', "/v1/models": '{"data": [{"max_model_len": true}]}'},
        {"/version": '{"version": 1}', "/v1/models": '{"data": [{"max_model_len": -1}]}'},
        {"/version": "[]", "/v1/models": '{"data": [{"max_model_len": %s}]}' % ("9" * 400)},
        {"/version": json.dumps({"version": "x" * 1000}), "/v1/models": '{"data": {}}'},
    ],
)
async def test_an_engine_that_misnames_itself_is_served_unnamed(tmp_path: Path, said: dict[str, str]) -> None:
    async with running(tmp_path, said=said, admission={"policy": "Observe"}) as sidecar:

        async def asked_again() -> bool:
            return all(sidecar.engine.asked.count(path) > 2 for path in said)

        await until(asked_again)
        assert (await sidecar.state()).engine.max_model_len_tokens is None
        assert await sidecar.exports("kvplane_engine_ready{")
        assert await sidecar.exports_nothing("kvplane_engine_info")
        sidecar.engine.finish.set()
        async with sidecar.complete() as response:
            assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_an_engine_that_points_elsewhere_is_not_followed(tmp_path: Path) -> None:
    async with running(tmp_path) as sidecar:
        await until(lambda: sidecar.exports("kvplane_requests_running{"))
        sidecar.engine.redirected = {"/health", "/metrics", "/version", "/v1/models"}
        await sidecar.becomes("/ready", 503)
        sidecar.engine.redirected = {"/metrics"}
        await sidecar.becomes("/ready", 200)
        await until(lambda: sidecar.signal_is_older(than_seconds=0.2))


async def test_limits_change_without_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path, maxBodyBytes=4096) as sidecar:
        url = f"http://127.0.0.1:{sidecar.settings.port}/v1/completions"
        write_config(tmp_path / "sidecar.json", maxBodyBytes=1024)
        await until(lambda: sidecar.exports('result="applied"} 1.0'))
        async with sidecar.session.post(url, data=b"x" * 2000) as response:
            assert response.status == 413
        assert (await sidecar.state()).in_flight == 0


async def test_an_invalid_configuration_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "sidecar.json").write_text("{}")
    with pytest.raises(ConfigError, match="servedName: Field required"):
        await run(Settings(config_file=tmp_path / "sidecar.json", pod="p"), stop=asyncio.Event())


async def test_the_process_finishes_what_is_in_flight_when_it_is_told_to_stop(tmp_path: Path) -> None:
    write_config(tmp_path / "sidecar.json")
    fake = FakeEngine()
    await fake.start()
    port, admin_port = free_ports(2)
    ports = ("--port", str(port), "--admin-port", str(admin_port), "--engine-port", str(fake.port))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvplane_runtime.sidecar", "--host", "127.0.0.1", *ports),
        env={
            **os.environ,
            "PYTHONPATH": f"{REPOSITORY}/operator:{REPOSITORY}/runtime",
            "KVPLANE_CONFIG_FILE": str(tmp_path / "sidecar.json"),
            "KVPLANE_POD_NAME": "chat-0",
        },
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with aiohttp.ClientSession() as session:
            sidecar = Running(Settings(Path(), "", port=port, admin_port=admin_port), fake, session)
            await until(lambda: answers(sidecar, "/ready", 200))
            stream = await sidecar.complete()
            process.send_signal(signal.SIGTERM)
            await until(lambda: refuses(port))
            fake.finish.set()
            assert (await stream.read()).endswith(b"data: [DONE]\n\n")
        _, log = await process.communicate()
    finally:  # uvloop's loop waits for what is left open, for ever
        if process.returncode is None:
            process.kill()
            await process.wait()
        await fake.stop()
    assert process.returncode == 0, log
    assert b"Stopping, with 1 requests in flight." in log
    assert b"Traceback" not in log


async def test_a_rank_is_started_when_it_answers_and_ready_when_its_ring_works(tmp_path: Path) -> None:
    async with running(tmp_path, engine_up=False, ring=True) as sidecar:
        assert (await sidecar.admin("/engine/startup"))[0] == 503
        sidecar.engine.health = 503
        await sidecar.engine.start()
        await sidecar.becomes("/engine/startup", 200)
        assert [(await sidecar.admin(path))[0] for path in ("/ready", "/engine/live")] == [503, 200]
        assert not (await sidecar.state()).engine_ready
        sidecar.engine.health = 200
        await sidecar.becomes("/ready", 200)
        sidecar.engine.health = 503
        await sidecar.becomes("/ready", 503)
        assert [(await sidecar.admin(path))[0] for path in ("/engine/startup", "/engine/live")] == [200, 200]


async def test_a_rank_that_says_that_it_hangs_is_to_be_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waits for its ring is not, however long (test_engine_health)."""
    monkeypatch.setattr(engine, "SILENCE_TOLERANCE_SECONDS", 0.5)
    async with running(tmp_path, ring=True) as sidecar:
        sidecar.engine.health = 500
        await sidecar.becomes("/engine/live", 503)
        assert (await sidecar.admin("/ready"))[0] == 503


async def test_a_drain_waits_for_requests_that_a_ring_holds_while_it_forms_anew(tmp_path: Path) -> None:
    async with running(tmp_path, ring=True) as sidecar:
        stream = await sidecar.complete()
        await stream.content.readuntil(b"\n\n")
        sidecar.engine.health = 503
        await sidecar.becomes("/ready", 503)
        drained = asyncio.ensure_future(sidecar.admin("/drain"))
        await until(lambda: draining(sidecar))
        assert not (await sidecar.state()).drained
        assert not drained.done()
        sidecar.engine.finish.set()
        assert (await stream.read()).endswith(b"data: [DONE]\n\n")
        assert (await drained)[0] == 200
        assert (await sidecar.state()).drained


async def draining(sidecar: Running) -> bool:
    return (await sidecar.state()).draining


async def test_a_worker_goes_after_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its name is gone before it, as when the service is deleted."""
    monkeypatch.setattr(leader, "ASK_SECONDS", 0.01)
    rank_0 = FakeRank0(said={"draining": True, "drained": False})
    await rank_0.start()
    names = ["127.0.0.1"]

    async def once(host: str) -> str:
        if not names:
            raise OSError(f"{host} is not known any more")
        return names.pop()

    monkeypatch.setattr(app, "ip_of", once)
    monkeypatch.setattr(app, "PORT_ADMIN", rank_0.port)
    try:
        async with running(tmp_path, pod="chat-ring-0-1", ring=True) as sidecar:
            drained = asyncio.ensure_future(sidecar.admin("/drain"))
            await until(rank_0.was_asked_twice)
            assert not drained.done()
            rank_0.said = {"draining": True, "drained": True}
            assert (await drained)[0] == 200
    finally:
        await rank_0.stop()


@pytest.mark.parametrize(("ordinal", "models"), [(0, True), (1, False)])
async def test_only_rank_0_is_asked_for_its_models(
    tmp_path: Path, ordinal: int, models: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker serves none: it would be asked each second for ever."""

    async def nowhere(host: str) -> str:
        raise OSError(f"{host} is not known")

    monkeypatch.setattr(app, "ip_of", nowhere)
    async with running(tmp_path, pod=f"chat-ring-0-{ordinal}", ring=True) as sidecar:

        async def asked_often() -> bool:
            return sidecar.engine.asked.count("/health") > 3

        await until(asked_often)
        assert "/version" in sidecar.engine.asked
        assert ("/v1/models" in sidecar.engine.asked) is models


@dataclass
class FakeRank0:
    """The sidecar of another pod."""

    port: int = field(default_factory=lambda: free_ports(1)[0])
    said: dict[str, bool] = field(default_factory=dict)
    asked: int = 0
    _runner: web.AppRunner | None = None

    async def start(self) -> None:
        application = web.Application()
        application.router.add_get("/state", self._state)
        self._runner = web.AppRunner(application, shutdown_timeout=0.05)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def was_asked_twice(self) -> bool:
        return self.asked > 1

    async def _state(self, _: web.Request) -> web.Response:
        self.asked += 1
        usual = {"pod": "chat-ring-0-0", "servedName": "chat", "engineReady": True, "draining": False, "inFlight": 1}
        return web.json_response(usual | self.said)


@pytest.mark.parametrize("fault", ["stopped", "hanging", "garbage"])
async def test_what_only_a_ring_has_is_passed_on_while_the_engine_answers(tmp_path: Path, fault: str) -> None:
    async with running(tmp_path, ring=True) as sidecar:
        sidecar.engine.exposition += RING
        await until(lambda: sidecar.exports('kvplane_ring_members{model_name="chat"} 3.0'))
        match fault:
            case "stopped":
                await sidecar.engine.stop()
            case "hanging":
                sidecar.engine.hanging = {"/metrics"}
            case "garbage":
                sidecar.engine.exposition = RECORDED.read_text() + RING.replace('"} 3.0', '" 3.0')
        await until(lambda: sidecar.exports_nothing("kvplane_ring_"))
        assert await sidecar.exports("kvplane_requests_running{")


async def test_a_paged_engine_has_nothing_to_pass_on(tmp_path: Path) -> None:
    async with running(tmp_path) as sidecar:
        sidecar.engine.exposition = RING + "vllm:num_requests_running 7\n"
        await until(lambda: sidecar.exports('kvplane_requests_running{model_name="chat"} 7.0'))
        assert await sidecar.exports_nothing("kvplane_ring_")


async def test_in_front_of_a_ring_nothing_is_held_for_kv(tmp_path: Path) -> None:
    """So there is no factor by which it would be (tests/admission has the rest)."""
    for ring in (False, True):
        folder = tmp_path / str(ring)
        folder.mkdir()
        async with running(folder, ring=ring) as sidecar:
            assert await sidecar.exports_nothing("kvplane_admission_kappa") is ring
