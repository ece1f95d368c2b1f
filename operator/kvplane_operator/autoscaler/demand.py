"""Demand in replicas: how many the work of now would fill.

    D = max(D_kv, D_prefill) + D_waste
    D_kv = (held + queued + shed reservation) / (C x min(kappa, u*))
    D_prefill = R + z x sqrt(R)
    R = (prompt tokens computed per second + those that wait / 10 s) / those of the fastest replica

z is the margin of :mod:`room`. While nothing says that room is short, prompts count by u_p x the rate of a replica that they alone
kept busy; until one was, KV memory is what counts.

Work that waits and work that was refused counts, else admission would hide demand from the scaler; a ring keeps requests
waiting itself, and tells of them. What was refused is a flow, and becomes an amount by Little's law: reservation per second
x the time a request stays. A request never fills more than one replica, however large it is: so one long prompt on a ring
asks for its group and not for two.

What is unread counts nothing here; that it lowers nothing either is the law's part.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kvplane_operator.autoscaler.flows import UNKNOWN, Meter, Rates
from kvplane_operator.autoscaler.learned import Learned
from kvplane_operator.autoscaler.settings import Settings
from kvplane_operator.autoscaler.signals import Reading, Signals

_QUEUE_SECONDS: Final = 10.0
"""In which prompts that wait should be computed: what waits longer is refused by admission."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """In replicas, by cause."""

    held: float = 0.0
    queued: float = 0.0
    shed: float = 0.0
    prefill: float | None = None
    """``None``: the prefill rate is not known yet, so KV memory is what runs out first."""
    waste: float = 0.0
    margin: float | None = None
    """That prompts are given, and that is in ``prefill``; ``None``: nothing says that room is short."""

    @property
    def kv(self) -> float:
        return self.held + self.queued + self.shed

    @property
    def total(self) -> float:
        return max(self.kv, self.prefill or 0.0) + self.waste

    def __str__(self) -> str:
        prefill = "not known" if self.prefill is None else f"{self.prefill:.2f}"
        if self.margin is not None:
            prefill += f" with a margin of {self.margin:.2f}"
        return (
            f"{self.total:.2f} replicas (KV {self.kv:.2f}: held {self.held:.2f}, queued {self.queued:.2f}, refused "
            f"{self.shed:.2f}; prefill {prefill}; thrash {self.waste:.2f})"
        )


def measure(signals: Signals, meters: Mapping[str, Meter], learned: Learned, settings: Settings) -> Demand:
    """The demand that the replicas which serve, and were read, tell of."""
    held = queued = shed = waste = prefill = 0.0
    pace = backlog = 0.0
    rate, room = learned.prefill_tokens_per_second, learned.room
    for replica in signals.ready:
        reading = replica.reading
        if reading is None:
            continue
        meter = meters.get(replica.name)
        rates = meter.rates if meter else UNKNOWN
        usable = reading.capacity_tokens * min(reading.kappa, learned.usable.share)
        own_held = min(reading.held_tokens / usable, reading.running + reading.queued)
        held += own_held
        queued += min(reading.queued_tokens / usable, reading.running + reading.queued - own_held)
        shed += _shed(rates, usable, learned.residence_seconds)
        waste += _waste(reading, rates)
        if rate is not None:
            prefill += _prefill(reading, rates, settings.tuning.prefill_share * rate)
        if room.fastest is not None:
            pace += (meter.pace or 0.0) if meter else 0.0
            waiting = _waiting(reading) / _QUEUE_SECONDS
            backlog += min(waiting, (reading.running + reading.queued) * room.fastest) + _refused_tokens(rates)
    needed = room.needed(pace, backlog, cost_of_miss=settings.cost_of_miss)
    return Demand(
        held=held,
        queued=queued,
        shed=shed,
        prefill=needed.replicas if needed else None if rate is None else prefill,
        waste=waste,
        margin=needed.margin if needed else None,
    )


def shed_share(meters: Mapping[str, Meter]) -> float:
    """Share of the requests of late that were refused for want of room; 0 where there were none or it is not known."""
    admitted = sum(meter.rates.admitted or 0.0 for meter in meters.values())
    refused = sum(_refused(meter.rates) for meter in meters.values())
    return refused / (admitted + refused) if refused else 0.0


def _refused(rates: Rates) -> float:
    """Requests refused for want of room, per second: those that a sidecar counts without what they shed were refused for good."""
    return (rates.refused or 0.0) if rates.shed_tokens else 0.0


def _shed(rates: Rates, usable: float, residence_seconds: float) -> float:
    if not rates.shed_tokens:
        return 0.0
    shed = rates.shed_tokens * residence_seconds / usable
    return shed if rates.refused is None else min(shed, rates.refused * residence_seconds)


def _waste(reading: Reading, rates: Rates) -> float:
    """Share of this replica's work that is done again."""
    wasted = reading.wasted_tokens_per_second
    if not wasted or rates.prompt_tokens is None or rates.generation_tokens is None:
        return 0.0
    return wasted / (wasted + rates.prompt_tokens + rates.generation_tokens)


def _prefill(reading: Reading, rates: Rates, usable: float) -> float:
    """Replicas of ``usable`` tokens per second that prompts fill: computed, waiting, and refused ones.

    Who came and went between two readings is seen by its tokens alone, so one request there was.
    """
    own = ((rates.prompt_tokens or 0.0) + _waiting(reading) / _QUEUE_SECONDS) / usable
    return min(own, max(1.0, reading.running + reading.queued)) + _refused_tokens(rates) / usable


def _waiting(reading: Reading) -> float:
    """Prompt tokens that are still to be computed. Of one that admission keeps waiting as much is cached as of the others."""
    return reading.queued_prompt_tokens * _computed_share(reading) + reading.waiting_prompt_tokens


def _refused_tokens(rates: Rates) -> float:
    """Prompt tokens per second that were refused: such a prompt is as long as the others are."""
    return _refused(rates) * (rates.prompt_tokens or 0.0) / rates.admitted if rates.admitted else 0.0


def _computed_share(reading: Reading) -> float:
    """Of the prompt tokens so far, those that the prefix cache had not; all, where it tells nothing."""
    prompts, hits = reading.prompt_tokens_total, reading.prefix_hits_tokens_total
    return max(0.0, 1 - hits / prompts) if prompts and hits is not None else 1.0
