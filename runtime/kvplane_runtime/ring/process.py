"""One rank's process, from start to end: check, load, find the others, serve, stop.

Rank 0: the API on the main thread, the model on a second, the control connections on a third. Workers: the model on the
main thread, the control connection on a second, what they answer about themselves on a third. SIGTERM ends rank 0 when its
requests are done, at most after the drain's time, and a worker when it has left its ring; while weights are loaded, at once.
What ends a process by its own fault ends all of it, with status 1 and the reason in its log; what it was told wrongly
(settings, a model that the ring does not serve, a refusal by rank 0) with status 2, since another start would end the same
way.
"""

import asyncio
import contextlib
import json
import logging
import os
import random
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from functools import partial
from queue import SimpleQueue
from typing import Any, Final

import torch

from kvplane_runtime.ring import api, communicator, messages, promise, tokens
from kvplane_runtime.ring import settings as ring_settings
from kvplane_runtime.ring.accounting import Reserve
from kvplane_runtime.ring.admission import Refusal
from kvplane_runtime.ring.architectures import UnsupportedArchitectureError
from kvplane_runtime.ring.communicator import CPU, Ring
from kvplane_runtime.ring.control import Hub, Left, Severed, Tether
from kvplane_runtime.ring.engine import About, Leader, Promise, RingEngine, Shutdown
from kvplane_runtime.ring.kernel import CUDA_CAPABILITY
from kvplane_runtime.ring.model import RingModel
from kvplane_runtime.ring.openai import ServedModel
from kvplane_runtime.ring.requests import Policy
from kvplane_runtime.ring.settings import Settings, SettingsError
from kvplane_runtime.ring.trial import TOLERANCE
from kvplane_runtime.ring.worker import Place, Worker
from kvplane_runtime.ring.worker_api import WorkerApi

log = logging.getLogger(__name__)

FAULT: Final = 1
"""Exit status after a fault of our own."""
WRONG: Final = 2
"""Exit status of a process that would end the same way again."""
_REPORT_SECONDS: Final = 0.5
"""Time between two reports of progress while weights are loaded."""


def run(settings: Settings) -> int:
    """Runs this rank until it is told to stop; the exit status."""
    torch.set_num_threads(settings.threads or len(os.sched_getaffinity(0)))
    try:
        if settings.ordinal == 0:
            return _lead(settings)
        return _follow(settings)
    except (SettingsError, UnsupportedArchitectureError) as error:
        log.error("%s", error)  # noqa: TRY400  (the sentence says all)
        return WRONG


def _load(settings: Settings, report: Callable[[int, int], None]) -> tuple[RingModel, messages.Join]:
    """The model, and what this process says of itself to join."""
    config_hash = ring_settings.config_hash(settings)
    device = device_of(settings)
    began = time.monotonic()
    model = RingModel.load(settings.model, dtype=_dtype(settings), device=device, progress=_sparsely(report))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else ring_settings.free_bytes()
    capacity = ring_settings.capacity_tokens(settings, kv_bytes_per_token=model.kv_bytes_per_token, free_bytes=free)
    log.info(
        "Rank %d of %d: %s loaded in %.1f s; room for %d KV tokens of %d bytes.",
        settings.ordinal,
        settings.world_size,
        settings.served_name,
        time.monotonic() - began,
        capacity,
        model.kv_bytes_per_token,
    )
    member = messages.Member(settings.ordinal, settings.pod, secrets.token_hex(8), settings.address)
    return model, messages.Join(member, settings.world_size, config_hash, capacity)


def device_of(settings: Settings) -> torch.device:
    """Where this rank computes; raises SettingsError where there is no such device."""
    if settings.device == "cpu":
        return CPU
    if not torch.cuda.is_available():
        raise SettingsError(
            "KVPLANE_RING_DEVICE is cuda, and torch sees no GPU: give the pod one (nvidia.com/gpu) and an image whose torch "
            "is built for CUDA, or set cpu."
        )
    device = torch.device("cuda", 0)
    capability = torch.cuda.get_device_capability(device)
    if capability < CUDA_CAPABILITY:
        raise SettingsError(
            "KVPLANE_RING_DEVICE is cuda, and the GPU's compute capability is {}.{}; the kernels need {}.{}.".format(
                *capability, *CUDA_CAPABILITY
            )
        )
    return device


def _dtype(settings: Settings) -> torch.dtype:
    config = json.loads((settings.model / "config.json").read_text())
    name = settings.dtype
    if name == "auto":
        name = (
            config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype") or "float32"
        )
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or dtype not in TOLERANCE:
        raise SettingsError(f"KVPLANE_RING_DTYPE is auto and the model's dtype is {name!r}; set float32 or bfloat16.")
    return dtype


def _sparsely(report: Callable[[int, int], None]) -> Callable[[int, int], None]:
    last = 0.0

    def progress(loaded: int, total: int) -> None:
        nonlocal last
        if loaded >= total or time.monotonic() - last >= _REPORT_SECONDS:
            last = time.monotonic()
            report(loaded, total)

    return progress


def _build(form: messages.Form, *, settings: Settings) -> Ring:
    """This rank's side of the ring of ``form``; raises RingBrokenError."""
    size, device = len(form.members), device_of(settings)
    if size == 1:
        return Ring.alone(epoch=form.epoch, device=device)
    host, _, port = form.store.rpartition(":")
    return Ring.form(
        store=communicator.connect(host=host, port=int(port), seconds=settings.limits.form),
        epoch=form.epoch,
        rank=form.rank,
        size=size,
        address=settings.address,
        form_seconds=settings.limits.form,
        device=device,
    )


def _follow(settings: Settings) -> int:
    """A worker: the status."""
    inbox: SimpleQueue[messages.AnyMessage | Severed | Left] = SimpleQueue()
    fences: list[Callable[[int, str], None]] = []

    def fence(epoch: int, reason: str) -> None:
        for each in fences:  # none while the model is being loaded
            each(epoch, reason)

    tether = Tether(
        host=settings.leader, port=settings.control_port, limits=settings.limits, deliver=inbox.put, fence=fence
    )
    tether.start()
    model, join = _load(settings, lambda loaded, total: tether.send(messages.Loading(settings.ordinal, loaded, total)))
    place = Place(model=model, build=partial(_build, settings=settings), form_seconds=settings.limits.form)
    fences.append(place.fence)
    worker = Worker(place=place, tether=tether, inbox=inbox, join=join)
    asked = WorkerApi(
        worker=worker,
        served_name=settings.served_name,
        capacity_tokens=join.capacity_tokens,
        host=settings.host,
        port=settings.worker_port,
    )
    try:
        asked.start()
    except OSError as error:  # what is asked of a worker there is of no use to the ring
        log.warning(
            "Port %d cannot be opened (%s), so nobody can ask for this rank's health.", settings.worker_port, error
        )
    _leave_on_signals(worker)
    try:
        refusal = worker.run()
    finally:
        asked.stop()
        tether.stop()
    if refusal is None:
        return 0
    log.error("%s", refusal)
    return WRONG


def _leave_on_signals(worker: Worker) -> None:
    """The first SIGTERM or SIGINT has the worker leave its ring and end; a second one ends it at once."""

    def first(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        worker.leave()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, first)


def _lead(settings: Settings) -> int:
    """Rank 0: the status."""
    try:
        store, port = communicator.serve(host=settings.address, port=settings.store_port)
    except RuntimeError as error:
        raise _taken("KVPLANE_RING_STORE_PORT", settings.store_port, error) from error
    model, join = _load(settings, lambda loaded, total: log.info("Loaded %d of %d MiB.", loaded >> 20, total >> 20))
    inbox: SimpleQueue[Any] = SimpleQueue()
    place = Place(model=model, build=partial(_build, settings=settings), form_seconds=settings.limits.form)
    hub = Hub(
        join=join,
        host=settings.address,
        port=settings.control_port,
        limits=settings.limits,
        tell=inbox.put,
        fence=place.fence,
    )
    try:
        hub.start()
    except OSError as error:
        raise _taken("KVPLANE_RING_CONTROL_PORT", settings.control_port, error) from error
    leader = Leader(
        about=About(
            pod=settings.pod,
            served_name=settings.served_name,
            world_size=settings.world_size,
            capacity_tokens=join.capacity_tokens,
            store=f"{settings.address}:{port}",
        ),
        place=place,
        hub=hub,
        inbox=inbox,
        policy=Policy(
            slice_seconds=settings.slice_seconds,
            window_tokens=settings.window_tokens,
            keys_per_query=model.keys_per_query,
            short_tokens=settings.short_tokens,
            ttft_seconds=settings.ttft_seconds,
            max_sequences=settings.max_sequences,
            park_seconds=settings.park_seconds,
            reserve=Reserve[settings.reserve.upper()],
            model_tokens=model.architecture.context_tokens,
            context_tokens=settings.context_tokens,
        ),
        uniform=random.random,
    )
    engine = RingEngine(leader=leader, inbox=inbox)
    served = ServedModel(
        name=settings.served_name,
        tokenizer=tokens.load(settings.model),
        vocabulary=model.config.get_text_config().vocab_size,
        stop_ids=tokens.stop_ids(settings.model),
    )
    asyncio.run(_serve(settings, engine=engine, leader=leader, served=served, inbox=inbox))
    hub.stop()
    del store  # it had to live until here
    return 0


def _taken(variable: str, port: int, error: Exception) -> SettingsError:
    """What to say where rank 0 cannot listen on a port."""
    reason = str(error).partition("\n")[0]
    return SettingsError(
        f"{variable} is {port}, and rank 0 cannot listen there ({reason}); set a free port for all ranks."
    )


async def _serve(
    settings: Settings, *, engine: RingEngine, leader: Leader, served: ServedModel, inbox: "SimpleQueue[Any]"
) -> None:
    """The API, until SIGTERM or SIGINT. Where the model's thread fails, the process ends."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def work() -> None:
        try:
            leader.run()
        except BaseException:  # a rank 0 whose model is gone serves nobody: who waits for it is not to wait in vain
            log.critical("The model's thread failed; this process ends.", exc_info=True)
            os._exit(FAULT)

    def first() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, first)
    door = api.Api(engine=engine, model=served)
    try:
        runner = await api.serve(door, host=settings.host, port=settings.port)
    except OSError as error:
        raise _taken("KVPLANE_RING_PORT", settings.port, error) from error
    following: asyncio.Task[None] | None = None
    if settings.config_file is not None:
        told = promise.follow(settings.config_file, tell=lambda seconds: inbox.put(Promise(seconds)))
        following = asyncio.create_task(told)
    thread = threading.Thread(target=work, name="ring-model", daemon=True)
    thread.start()
    log.info("Serving %s on http://%s:%d/v1.", settings.served_name, settings.host, settings.port)
    await stop.wait()
    log.info("Stopping, with %d requests in flight.", door.in_flight)
    await door.drain(seconds=settings.drain_seconds)
    inbox.put(Shutdown(Refusal(503, "draining", "The engine shuts down; retry at another one.", None, 1)))
    await asyncio.to_thread(thread.join)
    if following is not None:
        following.cancel()
    await runner.cleanup()


def end_with(parent: int) -> None:
    """Has the kernel kill this process when ``parent`` ends, however that ends (Linux: prctl(2), PR_SET_PDEATHSIG)."""
    import ctypes  # noqa: PLC0415  (only ranks of kvplane-ring local need it)

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew
        sys.exit(1)


def bound_lookups(environment: MutableMapping[str, str]) -> None:
    """Has the resolver ask once and for a second (resolv.conf(5), RES_OPTIONS), unless the environment says otherwise.

    Both ends of a connection to torch's store look up the name of the other (getnameinfo in c10d's socket.cpp), whatever
    address they were given. Where nobody answers for that zone, the default is 10 s for each new ring.
    """
    environment.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


def main(settings: Settings) -> int:
    """:func:`run` with logging and the parent's end taken care of."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s %(levelname)s rank-{settings.ordinal} %(message)s"
    )
    bound_lookups(os.environ)
    if settings.parent is not None:
        end_with(settings.parent)
    with contextlib.suppress(KeyboardInterrupt):
        return run(settings)
    return 0
