"""Figures of KV memory in status: capacity of the service, and what one replica of the pool holds and serves.

What is not known is absent, never 0, and a sum over pods of which one is not known is not known either. Usage changes all
the time, and status is for people: it moves in steps of 5 %, at most once a minute.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeVar

from kvplane_api import names
from kvplane_api.service import Admission
from kvplane_api.wire import EngineSignals, SidecarState
from kvplane_operator.autoscaler.startup import p90
from kvplane_operator.plan.signals import Signals
from kvplane_operator.plan.snapshot import Manifest, Snapshot

STEP_PERCENT: Final = 5
MINUTE: Final = 60.0

T = TypeVar("T")
V = TypeVar("V")

_POOL_FIGURES: Final = ("kvTokensPerReplica", "maxContextTokens")


@dataclass(frozen=True)
class Figures:
    """The figures as they should stand in status."""

    service: dict[str, int] | None
    """``status.capacity``; None where nothing is known."""
    pool: dict[str, int]
    """The pool's own."""
    wake_after_seconds: float | None = None
    """Set where a change has to wait for its minute."""


def figures(
    signals: Signals, snapshot: Snapshot, admission: Admission | None, *, now: datetime, ring: bool = False
) -> Figures:
    """The figures of the pods that serve; ``admission`` is None where the spec cannot be read. ``ring``: these are ranks 0,
    whose engines keep no part of their KV memory free.
    """
    written: Mapping[str, int] = snapshot.status.get("capacity") or {}
    if not signals.serving:
        return Figures(None, {})
    if signals.pending or admission is None:
        held: Mapping[str, int] = next(iter(snapshot.status.get("pools") or ()), {})
        return Figures(dict(written) or None, {name: held[name] for name in _POOL_FIGURES if name in held})
    cap = 100 if ring else admission.kv_hard_cap_percent
    pool = _pool(signals.states.values(), cap=cap if admission.policy == "Enforce" else 100)
    measured = _service(signals, written, cap=cap)
    last = snapshot.capacity_written
    if last is None or measured == written or measured.keys() != written.keys():
        return Figures(measured or None, pool)
    wait = MINUTE - (now - last).total_seconds()
    return Figures(dict(written), pool, wait) if wait > 0 else Figures(measured, pool)


def _pool(states: Iterable[SidecarState], *, cap: int) -> dict[str, int]:
    engines = [state.engine for state in states]
    tokens = _of_all(engines, lambda engine: engine.kv_cache_capacity_tokens)
    contexts = _of_all(engines, lambda engine: _longest_context(engine, cap=cap))
    return _present(kvTokensPerReplica=min(tokens, default=None), maxContextTokens=min(contexts, default=None))


def _longest_context(engine: EngineSignals, *, cap: int) -> int | None:
    """The engine's limit; with a cap below 100 %, not more than the whole blocks below that."""
    limit, tokens = engine.max_model_len_tokens, engine.kv_cache_capacity_tokens
    if limit is None or cap == 100:
        return limit
    if tokens is None:
        return None
    below = tokens * cap // 100
    return min(limit, below - below % (engine.kv_cache_block_size_tokens or 1))


def _service(signals: Signals, written: Mapping[str, int], *, cap: int) -> dict[str, int]:
    if len(signals.states) < len(signals.serving):
        return {}
    states = list(signals.states.values())
    total = sum(_of_all(states, lambda state: state.engine.kv_cache_capacity_tokens))
    used = _of_all(states, _used_tokens)
    free = _of_all(states, lambda state: _free_tokens(state, cap=cap))
    if not total:
        used = free = []
    same = total and written.get("kvTokens") == total and "headroomTokens" in written
    before = round(100 * written["headroomTokens"] / total) if same else None
    return _present(
        kvTokens=total or None,
        kvUsedPercent=_step_near(100 * sum(used) / total, written.get("kvUsedPercent")) if used else None,
        headroomTokens=_step_down(100 * sum(free) // total, before) * total // 100 if free else None,
        startupSecondsP90=_startup_p90(signals),
    )


def _used_tokens(state: SidecarState) -> int | None:
    ratio, tokens = state.engine.kv_cache_usage_ratio, state.engine.kv_cache_capacity_tokens
    return None if ratio is None or tokens is None else round(ratio * tokens)


def _free_tokens(state: SidecarState, *, cap: int) -> int | None:
    """Tokens below the cap, in percent, that requests neither hold nor are expected to."""
    used, tokens = _used_tokens(state), state.engine.kv_cache_capacity_tokens
    if used is None or tokens is None:
        return None
    reserved = state.admission.reserved_tokens if state.admission else 0
    return max(0, tokens * cap // 100 - max(used, reserved))


def _step_near(percent: float, written: int | None) -> int:
    """The nearest step; what stands in status, while it is off by less than one: no flapping between two. At most 100: usage may be
    a rounding error above, and the API server refuses a status that says so, whole."""
    if written is not None and abs(percent - written) < STEP_PERCENT:
        return written
    return min(100, STEP_PERCENT * round(percent / STEP_PERCENT))


def _step_down(percent: int, written: int | None) -> int:
    """The step below; what stands in status, while it is not above and off by less than two."""
    if written is not None and written <= percent < written + 2 * STEP_PERCENT:
        return written
    return percent - percent % STEP_PERCENT


def _startup_p90(signals: Signals) -> int | None:
    """Without pods whose sidecar was restarted: beside an engine that runs it measures no start."""
    seconds = [
        state.startup_seconds
        for name, state in signals.states.items()
        if state.startup_seconds is not None and not _sidecar_restarts(signals.serving[name])
    ]
    return math.ceil(p90(seconds)) if seconds else None


def _sidecar_restarts(pod: Manifest) -> int:
    statuses = pod["status"].get("initContainerStatuses", ())
    return sum(status.get("restartCount", 0) for status in statuses if status["name"] == names.CONTAINER_SIDECAR)


def _of_all(items: Iterable[T], figure: Callable[[T], V | None]) -> list[V]:
    """The figure of each item; empty if one lacks it."""
    found = [figure(item) for item in items]
    return [] if any(value is None for value in found) else [value for value in found if value is not None]


def _present(**figures: int | None) -> dict[str, int]:
    return {name: value for name, value in figures.items() if value is not None}
