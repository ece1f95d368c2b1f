"""The operator's process: wait for the Lease, then watch and reconcile until told to stop.

A standby watches nothing. A leader that loses the Lease stops writing at once and goes on watching; it writes again when
it holds the Lease again, from what it has seen by then. An outage of the API server ends no process.
"""

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Coroutine
from typing import Any, Final

import kopf

from kvplane_operator import health, metrics
from kvplane_operator.audit import audit
from kvplane_operator.cluster import Cluster, connect
from kvplane_operator.handlers import build_registry, configure
from kvplane_operator.leader import Leadership
from kvplane_operator.namespaces import Namespaces
from kvplane_operator.reconcile import Reconciler
from kvplane_operator.scalers import look_for_scalers
from kvplane_operator.scaling import Autoscaler
from kvplane_operator.scaling_metrics import AutoscalerCollector
from kvplane_operator.settings import OperatorSettings
from kvplane_operator.signals import Resolve, SignalPoller, admin_port, connect_to_sidecars
from kvplane_operator.store import Store
from kvplane_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)

_ENDS_WELL: Final = ("stop", "watch", "namespaces")
"""Parts whose end without an error is no error."""


async def run(settings: OperatorSettings, *, resolve: Resolve = admin_port) -> int:
    """Run until told to stop (exit code 0) or until a part of it ends by an error (1).

    ``resolve`` leads from a pod's IP to its sidecar, elsewhere in a simulation.
    """
    stop = asyncio.Event()
    _stop_on_signals(stop)
    loop = asyncio.get_running_loop()

    leadership = Leadership(settings)
    api = await connect()
    unfenced = Cluster(api, timeout_seconds=settings.request_timeout_seconds)
    cluster = Cluster(api, timeout_seconds=settings.request_timeout_seconds, fence=leadership.check)
    store = Store()
    metrics.SERVICES.set_function(store.services)
    metrics.REGISTRY.register(metrics.ServiceCollector(services=store.llmservices, pods=store.pods))
    sidecars = connect_to_sidecars(resolve)
    reconciler = Reconciler(store=store, cluster=cluster, settings=settings, drain=sidecars.drain)
    looked = asyncio.Event()
    namespaces = Namespaces(settings.watch_namespaces)

    async def may_write() -> None:
        await looked.wait()
        await leadership.wait()

    queue = WorkQueue(reconciler.reconcile, workers=settings.workers, gate=may_write)
    poller = SignalPoller(
        store=store,
        fetch=sidecars.fetch,
        leading=leadership.held,
        enqueue=queue.add,
        period_seconds=settings.signals_seconds,
    )
    autoscaler = Autoscaler(store=store, cluster=cluster, read=poller.read, leading=leadership.held, enqueue=queue.add)
    metrics.REGISTRY.register(AutoscalerCollector(autoscaler.reports))
    runners = await health.serve(settings, oldest_work_seconds=queue.oldest_work_seconds)
    lag = loop.create_task(health.measure_loop_lag())
    tasks: list[asyncio.Task[Any]] = []
    try:
        if not await _unless(stop, namespaces.choose(unfenced)):
            return 0
        tasks.append(loop.create_task(leadership.campaign(unfenced), name="lease"))
        # A standby may have waited for days: what can be watched is asked once more.
        if not await _unless(stop, leadership.wait()) or not await _unless(stop, namespaces.choose(unfenced)):
            return 0
        tasks += [
            loop.create_task(queue.run(), name="queue"),
            loop.create_task(audit(cluster=cluster, store=store, settings=settings, enqueue=queue.add), name="audit"),
            loop.create_task(poller.run(), name="signals"),
            loop.create_task(autoscaler.run(), name="autoscaler"),
            loop.create_task(_watch(settings, namespaces.watched, store, queue, stop), name="watch"),
            loop.create_task(namespaces.join(unfenced), name="namespaces"),
            loop.create_task(stop.wait(), name="stop"),
        ]
        if settings.read_autoscalers:
            looking = look_for_scalers(
                cluster=cluster, store=store, settings=settings, enqueue=queue.add, looked=looked
            )
            tasks.append(loop.create_task(looking, name="scalers"))
        else:
            looked.set()
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        first = done.pop()
        logger.info("Ending: %s came to its end.", first.get_name())
        return 0 if first.get_name() in _ENDS_WELL and first.exception() is None else 1
    finally:
        stop.set()  # ends the watches, which end their own tasks
        for task in tasks:
            if task.get_name() != "watch":
                task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                logger.error("Ended by an error.", exc_info=result)
        await leadership.release(unfenced)
        lag.cancel()
        for runner in runners:
            await runner.cleanup()
        await sidecars.close()
        await api.close()


def _stop_on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Wait for ``work`` unless told to stop first; True if it ended."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return False
    task.result()
    return True


async def _watch(
    settings: OperatorSettings, namespaces: tuple[str, ...], store: Store, queue: WorkQueue, stop: asyncio.Event
) -> None:
    registry = build_registry(store=store, enqueue=queue.add, forget=queue.forget, nodes=settings.read_nodes)

    started = asyncio.Event()

    async def take_signals_back() -> None:
        # kopf takes the signals, and at one waits 5 s for its own waiter of a stop flag that nobody sets.
        await started.wait()
        _stop_on_signals(stop)

    taken_back = asyncio.create_task(take_signals_back())
    await kopf.operator(
        registry=registry,
        settings=configure(kopf.OperatorSettings()),
        standalone=True,
        clusterwide=not namespaces,
        namespaces=namespaces,
        stop_flag=stop,
        ready_flag=started,
    )
    taken_back.cancel()


def main() -> None:
    """Console script ``kvplane-operator``."""
    settings = OperatorSettings()
    logging.basicConfig(
        level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("kopf").setLevel(logging.WARNING)
    # Not on uvloop: a connection that fails in aiohttp's client can abort the process there (0001).
    sys.exit(asyncio.run(run(settings)))


if __name__ == "__main__":
    main()
