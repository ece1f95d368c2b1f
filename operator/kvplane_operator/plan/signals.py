"""What the sidecars say of their engines' signals: the condition SignalsFresh, and whether admission lacks any.

A signal is believed only with its pod: a reading counts for the pod that it was asked of, if that pod serves and named
itself in the answer. While a pod that began to serve was not read yet, or the operator has just started, what stands in
status stays: that takes seconds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvplane_api.conditions import Condition, Reason, Type
from kvplane_api.wire import SidecarState
from kvplane_operator.plan.findings import ready
from kvplane_operator.plan.ring.groups import serves_clients
from kvplane_operator.plan.snapshot import Manifest, Reading, Snapshot

SILENT_POLLS: Final = 3
"""Polls in a row without an answer, or with an answer that has no signals yet; fewer are a slow moment."""

STALE_SECONDS: Final = 10.0
"""Age from which the engine's signals count as stale. The sidecar acts on 2 s itself; a condition that wakes people must
not follow each slow step of a busy engine."""

MOST_USAGE: Final = 1.05
"""Of KV blocks in use over those there are: 1, and a rounding error."""


def answered(before: Reading | None, state: SidecarState, *, at: float | None = None) -> Reading:
    """The reading after a sidecar answered, ``at`` seconds since the epoch."""
    believed = _believed(state)
    return Reading(state=believed, silent=_silent(before) if believed.signal_age_seconds is None else 0, at=at)


def failed(before: Reading | None, error: str) -> Reading:
    """The reading after a poll failed; the last state stands for a few polls."""
    silent = _silent(before)
    if before is None or silent >= SILENT_POLLS:
        return Reading(state=None, silent=silent, error=error)
    return Reading(state=before.state, silent=silent, error=error, at=before.at)


def telling(pod: str, reading: Reading) -> tuple[object, ...]:
    """What of a reading is worth a new plan at once. Usage is not: the slow wake-up of each service shows it."""
    state = _fresh_state(pod, reading)
    size = (state.engine.kv_cache_capacity_tokens, state.engine.max_model_len_tokens) if state else None
    emptied = reading.state is not None and reading.state.draining and not reading.state.in_flight
    return (_fault(pod, reading), size, emptied)


@dataclass(frozen=True)
class Fault:
    """Why a pod's signals cannot be counted on."""

    reason: Reason
    pod: str
    message: str
    impairs: bool = False
    """Whether admission in that pod runs, and lacks its signals."""


@dataclass(frozen=True)
class Signals:
    """The pods that serve, and what is known of them."""

    serving: Mapping[str, Manifest]
    states: Mapping[str, SidecarState]
    """Of the pods whose state is their own, and fresh."""
    faults: tuple[Fault, ...]
    """One for each pod that has one, the worst first."""

    @property
    def pending(self) -> bool:
        """Whether it is too early to say anything new."""
        return len(self.states) < len(self.serving) and not self.faults


_WORST_FIRST: Final = (
    Reason.SIGNAL_MISSING,
    Reason.SIGNALS_STALE,
    Reason.POD_MISMATCH,
    Reason.SIDECAR_UNREACHABLE,
)


def read(snapshot: Snapshot) -> Signals:
    """The signals of a service's serving pods."""
    # Of a ring, rank 0 knows all that there is to know; the others have an engine that decides nothing.
    serving = {pod["metadata"]["name"]: pod for pod in snapshot.pods if ready(pod) and serves_clients(pod)}
    readings = {name: reading for name in serving if (reading := snapshot.readings.get(name))}
    states = {name: state for name, reading in readings.items() if (state := _fresh_state(name, reading))}
    faults = [fault for name, reading in readings.items() if (fault := _fault(name, reading))]
    faults.sort(key=lambda fault: (_WORST_FIRST.index(fault.reason), fault.pod))
    return Signals(serving, states, tuple(faults))


def fresh(signals: Signals, snapshot: Snapshot) -> Condition:
    """The condition SignalsFresh."""
    kind = Type.SIGNALS_FRESH
    if not signals.serving:
        return Condition(kind, "Unknown", Reason.NO_SERVING_PODS, "No pod serves, so there is nothing to read.")
    if signals.pending:
        held = _written(snapshot, kind)
        if held and held["status"] != "Unknown" and held["reason"] in tuple(Reason):
            return Condition(kind, held["status"], Reason(held["reason"]), held["message"])
        return Condition(kind, "Unknown", Reason.SIGNALS_PENDING, "The pods that serve were not read yet.")
    if signals.faults:
        worst, count = signals.faults[0], len(signals.faults)
        more = f" Such faults have {count} of {len(signals.serving)} pods that serve." if count > 1 else ""
        return Condition(kind, "False", worst.reason, worst.message + more)
    return Condition(kind, "True", Reason.SIGNALS_READ, "All signals of the pods that serve are there, and fresh.")


def admission_impaired(signals: Signals, snapshot: Snapshot) -> str | None:
    """Why admission decides without its signals; None where it has them, or does not run."""
    if signals.pending:
        held = _written(snapshot, Type.DEGRADED)
        return held["message"] if held and held["reason"] == Reason.ADMISSION_IMPAIRED else None
    return next((fault.message for fault in signals.faults if fault.impairs), None)


def _believed(state: SidecarState) -> SidecarState:
    """The state without figures that cannot be: what is NaN, endless or negative is not known."""
    engine = {name: None for name, value in state.engine if not _possible(value)}
    usage = state.engine.kv_cache_usage_ratio
    if usage is not None and usage > MOST_USAGE:
        engine["kv_cache_usage_ratio"] = None
    own: dict[str, object] = {
        name: None for name in ("signal_age_seconds", "startup_seconds") if not _possible(getattr(state, name))
    }
    if engine:
        own["engine"] = state.engine.model_copy(update=engine)
    if not _possible(state.thrash.wasted_tokens_per_second):
        own["thrash"] = state.thrash.model_copy(update={"wasted_tokens_per_second": None})
    return state.model_copy(update=own) if own else state


def _possible(value: float | None) -> bool:
    return value is None or (math.isfinite(value) and value >= 0)


def _silent(before: Reading | None) -> int:
    return before.silent + 1 if before else 1


def _fresh_state(pod: str, reading: Reading) -> SidecarState | None:
    state = reading.state
    if state is None or state.pod != pod or state.signal_age_seconds is None:
        return None
    return state if state.signal_age_seconds <= STALE_SECONDS else None


def _fault(pod: str, reading: Reading) -> Fault | None:
    """What is wrong; None too while it is too early to tell. Texts change only with the fault: each is a status write."""
    if reading.state is None:
        if reading.silent < SILENT_POLLS:
            return None
        return Fault(Reason.SIDECAR_UNREACHABLE, pod, f"The state of pod {pod} cannot be read: {reading.error}.")
    checks = (_another_pod, _stale, _missing)
    return next((fault for check in checks if (fault := check(pod, reading.state, reading.silent))), None)


def _another_pod(pod: str, state: SidecarState, _: int) -> Fault | None:
    if state.pod == pod:
        return None
    text = f"At the address of pod {pod} answers pod {state.pod or 'without a name'}; its figures are not counted."
    return Fault(Reason.POD_MISMATCH, pod, text)


def _stale(pod: str, state: SidecarState, silent: int) -> Fault | None:
    age = state.signal_age_seconds
    if silent < SILENT_POLLS if age is None else age <= STALE_SECONDS:
        return None
    since = "since its start" if age is None else f"for more than {STALE_SECONDS:.0f} s"
    text = (
        f"Pod {pod}: the sidecar could not read the engine's metrics {since}; the engine's HTTP server hangs or fails."
    )
    return Fault(Reason.SIGNALS_STALE, pod, text, impairs=_admission_runs(state))


def _missing(pod: str, state: SidecarState, _: int) -> Fault | None:
    if not state.missing_signals:
        return None
    text = (
        f"Pod {pod}: the engine's metrics lack {', '.join(state.missing_signals)}. In brackets: the names that were looked "
        "for. This version of the engine probably has renamed it, or its metrics are switched off."
    )
    return Fault(Reason.SIGNAL_MISSING, pod, text, impairs=_admission_runs(state))


def _admission_runs(state: SidecarState) -> bool:
    return state.admission is not None and state.admission.policy != "Off"


def _written(snapshot: Snapshot, kind: Type) -> Mapping[str, Any] | None:
    conditions: list[Mapping[str, Any]] = snapshot.status.get("conditions") or []
    return next((c for c in conditions if c["type"] == kind.value), None)
