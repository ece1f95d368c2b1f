"""What is known of each replica at one moment. A reading is sound as a whole or missing: what is NaN, negative, absurd, stale
or of another pod counts as missing, and a missing signal never lowers anything.
"""

import math
from dataclasses import dataclass
from typing import Final

from kvplane_api.wire import SidecarState
from kvplane_operator.plan.signals import MOST_USAGE, STALE_SECONDS

_MOST_TOKENS: Final = 1e12
"""No replica holds, queues or sheds so many in a year."""
_MOST_TOTAL: Final = 1e15
_MOST_REQUESTS: Final = 1e7
_LEAST_KAPPA: Final = 0.1
_MOST_KAPPA: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one replica's sidecar said. Optional figures are ``None`` where the engine or admission does not tell them."""

    at: float
    """When it was read, by the clock of ``decide``."""
    capacity_tokens: float
    """Above 0."""
    held_tokens: float
    """KV in use, with what requests that a ring has parked will need, or the peak expected of what was let in, if that is more."""
    queued_tokens: float = 0.0
    """KV that queued requests would reserve."""
    queued_prompt_tokens: float = 0.0
    """Of requests that admission keeps waiting, what is cached of them included."""
    waiting_prompt_tokens: float = 0.0
    """Of requests that wait inside a ring, what is cached of them left out; other engines do not tell it."""
    kappa: float = 1.0
    """Admission lets in up to kappa x capacity."""
    running: float = 0.0
    """Requests in the engine."""
    queued: float = 0.0
    """Requests that wait, in the sidecar or in the engine."""
    admitted_total: float | None = None
    refused_total: float | None = None
    shed_tokens_total: float | None = None
    """KV that refused requests would have reserved; one that is tried again and refused again counts again."""
    prompt_tokens_total: float | None = None
    prefix_hits_tokens_total: float | None = None
    """Of the prompts' tokens, those that the prefix cache had; ``None``: taken for none."""
    generation_tokens_total: float | None = None
    kept_total: float | None = None
    """Answers that came whole and kept the promises in ``spec.slo``; ``None``: the sidecar does not judge them."""
    broken_total: float | None = None
    """Those that came whole and did not."""
    wasted_tokens_per_second: float = 0.0
    """Tokens computed again, while the thrash detector says that the engine thrashes; else 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One pod of a paged service, or one group of a ring service as rank 0 speaks for it."""

    name: str
    created_at: float
    ready: bool
    changed_at: float | None = None
    """When it became ready or ceased to be; ``None``: not known, or its node is lost. One that is not ready starts from then on, be
    it that a node has only just taken it, or that it served before."""
    draining: bool = False
    """Being taken away: its room no longer counts, and its work ends with it."""
    image_cached: bool | None = None
    """Whether its node had the image when it came; ``None``: not known."""
    refused: bool = False
    """It cannot be scheduled, its image cannot be had, or a quota forbids it: another one would fare no better."""
    reading: Reading | None = None
    """``None``: missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """One service at one moment."""

    asked: int
    """Replicas that its children ask for now."""
    replicas: tuple[Replica, ...] = ()
    wake: bool = False
    """Somebody asks for a service that has no replica."""

    @property
    def ready(self) -> tuple[Replica, ...]:
        return tuple(replica for replica in self.replicas if replica.ready and not replica.draining)

    @property
    def pending(self) -> tuple[Replica, ...]:
        return tuple(replica for replica in self.replicas if not replica.ready and not replica.draining)

    @property
    def unread(self) -> tuple[str, ...]:
        """Replicas that serve and whose signals are missing."""
        return tuple(replica.name for replica in self.ready if replica.reading is None)


def read(state: SidecarState | None, *, pod: str, at: float) -> Reading | None:
    """What the state of ``pod``, read at ``at``, says; ``None`` where a figure that demand stands on is missing or unsound.

    Those are: capacity, usage, and of admission, where it runs, everything but its rates.
    """
    if state is None or state.pod != pod or _sound(state.signal_age_seconds, STALE_SECONDS) is None:
        return None
    engine, admission = state.engine, state.admission
    capacity = _sound(engine.kv_cache_capacity_tokens, _MOST_TOKENS)
    usage = _sound(engine.kv_cache_usage_ratio, MOST_USAGE)
    running = _sound(engine.requests_running, _MOST_REQUESTS)
    waiting = _sound(engine.requests_waiting, _MOST_REQUESTS)
    if capacity is None or capacity < 1 or usage is None or running is None or waiting is None:
        return None
    wasted = _sound(state.thrash.wasted_tokens_per_second, _MOST_TOKENS) if state.thrash.kind else None
    told = _sound(engine.waiting_kv_tokens, _MOST_TOKENS)
    used = usage * capacity + (told or 0.0)
    waiting_prompt = _sound(engine.waiting_prompt_tokens, _MOST_TOKENS) or 0.0
    prompt_total = _sound(engine.prompt_tokens_total, _MOST_TOTAL)
    hits_total = _sound(engine.prefix_hits_tokens_total, _MOST_TOTAL)
    generation_total = _sound(engine.generation_tokens_total, _MOST_TOTAL)
    promises = state.promises
    kept_total = _sound(promises.kept_total, _MOST_TOTAL) if promises else None
    broken_total = _sound(promises.broken_total, _MOST_TOTAL) if promises else None
    if admission is None or admission.policy == "Off":
        return Reading(
            at=at,
            capacity_tokens=capacity,
            held_tokens=used,
            # Where nobody reserves, those that wait are taken to need as much as those that run.
            queued_tokens=usage * capacity * waiting / running if running and told is None else 0.0,
            waiting_prompt_tokens=waiting_prompt,
            running=running,
            queued=waiting,
            prompt_tokens_total=prompt_total,
            prefix_hits_tokens_total=hits_total,
            generation_tokens_total=generation_total,
            kept_total=kept_total,
            broken_total=broken_total,
            wasted_tokens_per_second=wasted or 0.0,
        )
    reserved = _sound(admission.reserved_tokens, _MOST_TOKENS)
    queued_tokens = _sound(admission.queued_reservation_tokens, _MOST_TOKENS)
    queued_prompt = _sound(admission.queued_prompt_tokens, _MOST_TOKENS)
    queued = _sound(admission.queued, _MOST_REQUESTS)
    kappa = _sound(admission.kappa, _MOST_KAPPA)
    if reserved is None or queued_tokens is None or queued_prompt is None or queued is None:
        return None
    if kappa is None or kappa < _LEAST_KAPPA:
        return None
    return Reading(
        at=at,
        capacity_tokens=capacity,
        held_tokens=max(used, reserved),
        queued_tokens=queued_tokens,
        queued_prompt_tokens=queued_prompt,
        waiting_prompt_tokens=waiting_prompt,
        kappa=kappa,
        running=running,
        queued=queued + waiting,
        admitted_total=_sound(admission.admitted_total, _MOST_TOTAL),
        refused_total=_sound(admission.refused_total, _MOST_TOTAL),
        shed_tokens_total=_sound(admission.shed_reservation_tokens_total, _MOST_TOTAL),
        prompt_tokens_total=prompt_total,
        prefix_hits_tokens_total=hits_total,
        generation_tokens_total=generation_total,
        kept_total=kept_total,
        broken_total=broken_total,
        wasted_tokens_per_second=wasted or 0.0,
    )


def _sound(value: float | None, most: float) -> float | None:
    """The value as a float; ``None`` unless it is a number from 0 to ``most``."""
    if value is None or not math.isfinite(value) or not 0 <= value <= most:
        return None
    return float(value)
